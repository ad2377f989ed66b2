"""Mel frames in, sound out, as they come: `wavear synthesize CHECKPOINT - --stream`."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from wavear.generation.streams import Stream
from wavear.mel.detection import adapt_mel, describe_source, judge_mel
from wavear.mel.spectrogram import MelConfig

_PIECE_SECONDS = (
    0.02  # of mel pushed at once at most, so that sound begins before a long mel is done
)
_JUDGED_SECONDS = 1.0
_AUDIBLE = 0.005  # seconds: a shorter gap is within what any player holds in store
_MAGIC = b"\x93NUMPY"


class Sink(Protocol):
    """Where PCM goes."""

    def write(self, pcm: bytes) -> None: ...

    def close(self) -> None: ...


class Pipe:
    """Raw PCM to a file descriptor. `BrokenPipeError` if nobody reads it any more."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def write(self, pcm: bytes) -> None:
        self.file.write(pcm)
        self.file.flush()

    def close(self) -> None:
        pass


class Device:
    """A sound device, through the package `sounddevice`; it starts with the first samples.

    Parameters
    ----------
    sample_rate : int
    name : str
        Of the device, or its number; empty for the system's default.

    Raises
    ------
    ValueError
        If the package is missing, or there is no such device.
    """

    def __init__(self, sample_rate: int, name: str = ""):
        try:
            import sounddevice  # type: ignore[import-not-found]
        except (
            ImportError,
            OSError,
        ) as error:  # OSError: the package is there, its library PortAudio is not
            raise ValueError(
                f"a sound device needs the package sounddevice ({error}): pip install sounddevice, or leave --out away"
                " and pipe to a player"
            ) from None
        self.underflows = 0
        device = int(name) if name.isdigit() else name or None
        try:
            self.stream = sounddevice.RawOutputStream(
                samplerate=sample_rate, channels=1, dtype="int16", device=device
            )
        except (sounddevice.PortAudioError, ValueError) as error:
            raise ValueError(
                f"cannot open the sound device {name or '(default)'}: {error}"
            ) from None
        self.started = False

    def write(self, pcm: bytes) -> None:
        if not self.started:
            self.stream.start()
            self.started = True
        self.underflows += bool(self.stream.write(pcm))

    def close(self) -> None:
        if self.started:
            self.stream.stop()  # plays what it holds first
        self.stream.close()


@dataclass
class Report:
    """What was done."""

    samples: int = 0
    sample_rate: int = 1
    computing: float = 0.0
    """Seconds."""
    first_sound: float | None = None
    """Seconds from the first frame read to the first samples written."""
    underruns: int = 0
    gaps_waiting: float = 0.0
    """Seconds in which a player had nothing to play because no mel had come."""
    gaps_computing: float = 0.0
    """The same, because samples were not ready."""

    @property
    def seconds(self) -> float:
        """Of audio."""
        return self.samples / self.sample_rate

    def __str__(self) -> str:
        said = f"{self.seconds:.2f} s of audio, computed at {self.seconds / max(self.computing, 1e-9):.2f} x real time"
        if not self.underruns:
            return f"{said}, no underrun"
        return (
            f"{said}, {self.underruns} underrun{'s' * (self.underruns > 1)} of "
            f"{self.gaps_waiting + self.gaps_computing:.2f} s in all ({self.gaps_waiting:.2f} s waiting for mels, "
            f"{self.gaps_computing:.2f} s computing)"
        )


def serve(
    model: Any,
    source: io.BufferedReader,
    sink: Sink,
    *,
    say: Callable[[str], object],
    mel_source: MelConfig | str | None = None,
    **settings: Any,
) -> Report:
    """Audio of the mel frames that `source` brings, as soon as they come.

    Parameters
    ----------
    model : AutoregressiveModel
        Conditioned on mels.
    source : binary file
        Frames, see `read_frames`.
    sink : Sink
        Is given 16-bit PCM, mono, little-endian, as `wavear.audio.write` rounds it.
    say : callable
        Is told, in one line each: the latency, expected and measured; the first underrun; at the
        end what was done.
    mel_source : MelConfig or str, optional
        What the frames are, to convert them: `source` of `wavear.adapt_mel`. By default what the
        model expects.
    settings
        Of `Stream`.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If the model takes no mels, or the frames do not fit it.
    BrokenPipeError
        If nobody reads what is written.
    """
    config = model.config.mel
    if config is None:
        raise ValueError(
            "the model is not conditioned on mels, it cannot follow frames: use `wavear generate`"
        )
    if mel_source is not None:
        describe_source(mel_source, config)  # a name that is none is known before there are frames
    stream = Stream(model, **settings)
    _warm_up(stream, config.bands)
    rate = model.config.sample_rate
    frame = config.hop_length / rate
    say(
        f"{rate} Hz, mono, s16le, engine {stream.description}; first sound after {stream.latency} frames"
        f" ({stream.latency * frame * 1000:.0f} ms of mel, {model.lookahead} of them look-ahead)"
    )
    told: set[str] = set()

    def doubt(line: str) -> None:
        """Once, although it is found in the frames again and again, with other numbers."""
        kind = re.sub(r"\d[\d.]*%", "", line)
        if kind not in told:
            say(f"warning: {line}")
        told.add(kind)

    heard: list[np.ndarray] | None = (
        [] if mel_source is None else None
    )  # to be judged by their numbers

    def judge(mel: np.ndarray | None) -> None:
        """Once, when there is a second of frames, or no more of them: sound has begun, and goes on."""
        nonlocal heard
        if heard is None:
            return
        heard += [] if mel is None else [mel]
        if heard and (
            mel is None or sum(part.shape[1] for part in heard) * frame >= _JUDGED_SECONDS
        ):
            verdict = judge_mel(np.concatenate(heard, axis=1), model)
            if verdict.verdict == "wrong":
                doubt(verdict.reason)
            heard = None

    report = Report(sample_rate=rate)
    played = _Player(report, say, rate)
    step = max(1, int(_PIECE_SECONDS / frame))
    first = 0.0
    frames = read_frames(source, config.bands)
    mel: np.ndarray | None = np.empty((config.bands, 0))
    while mel is not None:
        asked = time.perf_counter()
        mel = next(frames, None)
        came = time.perf_counter()
        waited = came - asked
        first = first or came
        if mel is not None and mel_source is not None:
            mel = adapt_mel(mel, model, mel_source, warn=doubt).numpy()
        pushes = [None] if mel is None else np.split(mel, range(step, mel.shape[1], step), axis=1)
        for piece in pushes:
            began = time.perf_counter()
            audio = stream.flush() if piece is None else stream.push(piece)
            ready = time.perf_counter()
            report.computing += ready - began
            if len(audio):
                if report.first_sound is None:
                    report.first_sound = ready - first
                    say(
                        f"first sound {report.first_sound * 1000:.0f} ms after the first frame came,"
                        f" {(ready - came) * 1000:.0f} ms after the last that it needed"
                    )
                played.add(len(audio), ready, waited)
                waited = 0.0
                sink.write(pcm16(audio.numpy()))
        judge(mel)
    sink.close()
    if isinstance(sink, Device) and sink.underflows:
        say(f"the sound device ran dry {sink.underflows} times")
    say(str(report))
    return report


def pcm16(audio: np.ndarray) -> bytes:
    """Samples in [-1, 1] as signed 16-bit little-endian PCM, as `wavear.audio.write` rounds them."""
    return np.clip(np.rint(audio.astype(np.float64) * 32768), -32768, 32767).astype("<i2").tobytes()


class _Player:
    """Knows when somebody who plays from the first sample on would have run dry."""

    def __init__(self, report: Report, say: Callable[[str], object], rate: int):
        self.report, self.say, self.rate = report, say, rate
        self.dry = 0.0  # the time at which all that was written is played

    def add(self, samples: int, now: float, waited: float) -> None:
        """`samples` more are there at the time `now`; of the time before, `waited` seconds passed without a mel."""
        report = self.report
        gap = now - self.dry if report.samples else 0.0
        if gap > 0:
            waiting = min(gap, waited)
            report.gaps_waiting += waiting
            report.gaps_computing += gap - waiting
            if gap > _AUDIBLE:
                report.underruns += 1
                if report.underruns == 1:
                    speed = report.seconds / max(report.computing, 1e-9)
                    cause = (
                        "the mel came late"
                        if waiting > gap / 2
                        else f"computed at {speed:.2f} x real time"
                    )
                    self.say(
                        f"underrun of {gap * 1000:.0f} ms after {report.seconds:.2f} s: {cause}"
                    )
        self.dry = (now if gap > 0 or not report.samples else self.dry) + samples / self.rate
        report.samples += samples


def _warm_up(stream: Stream, bands: int) -> None:
    """The first call of everything, so that the first frames do not wait for it."""
    probe = stream.fork()
    probe.push(torch.zeros(bands, stream.latency))


def read_frames(source: io.BufferedReader, bands: int) -> Iterator[np.ndarray]:
    """Mel frames as they come, (M, n) each, float32.

    Parameters
    ----------
    source : binary file, with `read1`
        Raw little-endian float32, frame after frame, each with its M bands; or one `.npy` array,
        (F, M), or (M, F) as `numpy.save` writes a mel (then it is read whole, its frames lie
        apart). If F = M it is taken for (M, F).
    bands : int
        M.

    Raises
    ------
    ValueError
        If it ends within a frame, has none, or is an array of another shape or type.
    """
    buffered = _Buffered(source)
    dtype, total, across = np.dtype("<f4"), None, False
    if buffered.peek(len(_MAGIC)) == _MAGIC:
        dtype, total, across = _npy_header(buffered, bands)
    if total == 0:
        raise ValueError("stdin held no mel frames")
    if across:
        assert total is not None
        values = np.frombuffer(buffered.take(total * bands * dtype.itemsize), dtype)
        if values.size < total * bands:
            raise ValueError(
                f"the array on stdin ends after {values.size} of {total * bands} numbers"
            )
        yield values.reshape(bands, total).astype(np.float32)
        return
    size = bands * dtype.itemsize
    count = 0
    while total is None or count < total:
        data = buffered.some(size, None if total is None else (total - count) * size)
        if not data:
            break
        if len(data) % size:
            raise ValueError(
                f"stdin ended within frame {count + len(data) // size}: it had {len(data) % size} of {size} bytes;"
                f" expected {bands} bands of {dtype.name} for each frame"
            )
        frames = np.frombuffer(data, dtype).reshape(-1, bands)
        bad = np.flatnonzero(~np.isfinite(frames).all(axis=1))
        if bad.size:
            raise ValueError(f"frame {count + bad[0]} of stdin holds NaN or infinity")
        count += len(frames)
        yield np.array(frames.T, np.float32, order="C")
    if total is not None and count < total:
        raise ValueError(f"the array on stdin ends after {count} of {total} frames")
    if not count:
        raise ValueError("stdin held no mel frames")


def _npy_header(buffered: _Buffered, bands: int) -> tuple[np.dtype, int, bool]:
    """Type, frames, and whether the frames lie across: band after band."""
    start = buffered.take(8)
    wide = 2 if start[6:7] == b"\x01" else 4
    length = buffered.take(wide)
    header = io.BytesIO(length + buffered.take(int.from_bytes(length, "little")))
    read = np.lib.format.read_array_header_1_0 if wide == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(header)
    except ValueError as error:
        raise ValueError(f"the array on stdin has a damaged header: {error}") from None
    if dtype.kind != "f":
        raise ValueError(f"the array on stdin is {dtype}, expected floating point")
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) != 2 or bands not in shape:
        raise ValueError(
            f"the array on stdin has shape {shape}, expected (frames, {bands}) or ({bands}, frames)"
        )
    bands_first = shape[0] == bands
    return dtype, shape[1] if bands_first else shape[0], bands_first != fortran


class _Buffered:
    """Bytes as they come, without waiting for more than is asked for."""

    def __init__(self, source: io.BufferedReader):
        self.source = source
        self.held = bytearray()

    def _more(self) -> bool:
        data = self.source.read1(1 << 16)
        self.held += data
        return bool(data)

    def peek(self, count: int) -> bytes:
        while len(self.held) < count and self._more():
            pass
        return bytes(self.held[:count])

    def take(self, count: int) -> bytes:
        """`count` bytes, fewer only at the end."""
        data = self.peek(count)
        del self.held[:count]
        return data

    def some(self, unit: int, most: int | None) -> bytes:
        """What is there, in whole units, at least one; at the end what is left."""
        self.peek(unit)
        count = len(self.held) // unit * unit or len(self.held)
        return self.take(count if most is None else min(count, most))


def run(model: Any, out: str, **settings: Any) -> int:
    """The command: stdin to stdout, or to a sound device; the exit status.

    Parameters
    ----------
    out : str
        "-" for stdout, "device" for the default sound device, "device:NAME" or "device:NUMBER" for
        another.
    settings
        Of `serve`.
    """
    if out != "-" and out.split(":")[0] != "device":
        raise ValueError(
            f"--out is {out}: with --stream it is - (stdout, the default), device, or device:NAME"
        )
    if sys.stdin is None or (out == "-" and sys.stdout is None):
        raise ValueError(
            "stdin or stdout is closed: pipe mel frames to the one, and the sound on from the other"
        )
    if sys.stdin.isatty():
        raise ValueError(
            "stdin is a terminal: pipe mel frames to it, float32, frame after frame, or a .npy file"
        )
    if out == "-" and sys.stdout.isatty():
        raise ValueError(
            f"stdout is a terminal: pipe the sound on, such as to `aplay -t raw -f S16_LE -c 1 -r"
            f" {model.config.sample_rate}`, or pass --out device"
        )

    def say(line: str) -> None:
        print(f"wavear: {line}", file=sys.stderr, flush=True)

    rate = model.config.sample_rate
    sink = Pipe(sys.stdout.buffer) if out == "-" else Device(rate, out.partition(":")[2])
    try:
        source: Any = sys.stdin.buffer
        serve(model, source, sink, say=say, **settings)
    except BrokenPipeError:
        # The player was closed, which is how one stops listening. Python would complain when it
        # flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
