"""Mel frames in, sound out, as they come: `wavear synthesize CHECKPOINT - --stream`."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.words import counted
from wavear.generation.frame_reader import read_frames
from wavear.generation.settings import Sampling
from wavear.generation.streams import Stream
from wavear.mel.conventions import describe_source
from wavear.mel.detection import adapt_mel, judge_mel
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

_PIECE_SECONDS = 0.02  # of mel per push at most, so that sound begins before a long mel is done
_JUDGED_SECONDS = 1.0
_AUDIBLE = 0.005  # seconds: any player buffers over a shorter gap


class Sink(Protocol):
    """Where PCM goes."""

    def write(self, pcm: bytes) -> None: ...

    def close(self) -> None: ...


class Pipe:
    """Raw PCM to a file descriptor; raises `BrokenPipeError` if nobody reads it any more."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def write(self, pcm: bytes) -> None:
        self.file.write(pcm)
        self.file.flush()

    def close(self) -> None:
        pass


class Device:
    """A sound device, by name, number or "" for the default, through the package `sounddevice`."""

    def __init__(self, sample_rate: int, name: str = ""):
        try:
            import sounddevice  # type: ignore[import-not-found]
        except (ImportError, OSError) as error:  # OSError: its library PortAudio is missing
            raise WavearError(
                f"a sound device needs the package sounddevice ({error}): pip install sounddevice,"
                " or drop --out and pipe to a player"
            ) from None
        self.underflows = 0
        device = int(name) if name.isdigit() else name or None
        try:
            self.stream = sounddevice.RawOutputStream(
                samplerate=sample_rate, channels=1, dtype="int16", device=device
            )
        except (sounddevice.PortAudioError, ValueError) as error:
            raise WavearError(
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
            self.stream.stop()  # plays its buffer first
        self.stream.close()


@dataclass
class Report:
    """The result, and when a player that starts with the first sample ran dry."""

    sample_rate: int
    samples: int = 0
    computing: float = 0.0
    """Seconds."""
    first_sound: float | None = None
    """Seconds from the first frame read to the first samples written."""
    underruns: int = 0
    gaps_waiting: float = 0.0
    """Seconds in which a player had nothing to play because no mel had come."""
    gaps_computing: float = 0.0
    """The same, because samples were not ready."""
    dry: float = 0.0
    """The time at which all samples so far are played."""

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return self.samples / self.sample_rate

    @property
    def speed(self) -> float:
        """Real-time factor of the computation."""
        return self.seconds / max(self.computing, 1e-9)

    def add(self, samples: int, now: float, waited: float) -> None:
        """Count samples that are ready at `now`, after `waited` seconds without a mel."""
        gap = now - self.dry if self.samples else 0.0
        if gap > 0:
            waiting = min(gap, waited)
            self.gaps_waiting += waiting
            self.gaps_computing += gap - waiting
            self.underruns += gap > _AUDIBLE
            if gap > _AUDIBLE and self.underruns == 1:
                late = waiting > gap / 2
                cause = "the mel came late" if late else f"computed at {self.speed:.2f} x real time"
                logger.info("underrun of %.0f ms after %.2f s: %s", gap * 1000, self.seconds, cause)
        start = now if gap > 0 or not self.samples else self.dry
        self.dry = start + samples / self.sample_rate
        self.samples += samples

    def __str__(self) -> str:
        text = f"{self.seconds:.2f} s of audio, computed at {self.speed:.2f} x real time"
        if not self.underruns:
            return f"{text}, no underrun"
        total = self.gaps_waiting + self.gaps_computing
        return (
            f"{text}, {counted(self.underruns, 'underrun')} of {total:.2f} s in all"
            f" ({self.gaps_waiting:.2f} s waiting for mels, {self.gaps_computing:.2f} s computing)"
        )


class _Doubts:
    """Warns of mels that seem wrong, once for each kind of fault."""

    def __init__(self, model: AutoregressiveModel, judge: bool):
        self.model = model
        self.kinds: set[str] = set()
        self.heard: list[np.ndarray] | None = [] if judge else None

    def warn(self, line: str) -> None:
        kind = re.sub(r"\d[\d.]*%", "", line)
        if kind not in self.kinds:
            logger.warning("%s", line)
        self.kinds.add(kind)

    def judge(self, mel: np.ndarray | None, needed: float) -> None:
        """Judge the mel once, when `needed` frames are there, or no more of them come (None)."""
        if self.heard is None:
            return
        self.heard += [] if mel is None else [mel]
        if self.heard and (mel is None or sum(part.shape[1] for part in self.heard) >= needed):
            verdict = judge_mel(np.concatenate(self.heard, axis=1), self.model)
            self.heard = None
            if verdict.verdict == "wrong":
                self.warn(verdict.reason)


def serve(
    model: AutoregressiveModel,
    source: io.BufferedReader,
    sink: Sink,
    sampling: Sampling = Sampling(),
    *,
    mel_source: MelConfig | str | None = None,
) -> Report:
    """Make audio of the mel frames from `source` (see `read_frames`), as soon as they come.

    The sink gets 16-bit PCM, mono, little-endian. `mel_source` is the convention of the frames, to
    convert them: `source` of `wavear.adapt_mel`. It logs the latency, expected and measured, the
    first underrun, and at the end the report. `BrokenPipeError`: nobody reads the audio.
    """
    config = model.config.mel
    if config is None:
        raise WavearError(
            "the model is not conditioned on mels, it cannot follow frames: use `wavear generate`"
        )
    if mel_source is not None:
        describe_source(mel_source, config)  # reject an unknown name before there are frames
    stream = Stream.with_settings(model, sampling)
    # The first call of everything, so that the first frames do not wait for it.
    stream.fork().push(torch.zeros(config.bands, stream.latency))
    rate = model.config.sample_rate
    frame = config.hop_length / rate
    logger.info(
        "%d Hz, mono, s16le, engine %s; first sound after %d frames (%.0f ms of mel, %d of them"
        " look-ahead)",
        *(rate, stream.description, stream.latency, stream.latency * frame * 1000, model.lookahead),
    )
    doubts = _Doubts(model, judge=mel_source is None)
    report = Report(rate)
    step = max(1, int(_PIECE_SECONDS / frame))
    first = 0.0
    frames = read_frames(source, config.bands)
    mel: np.ndarray | None = np.empty((config.bands, 0))
    while mel is not None:
        asked = time.perf_counter()
        mel = next(frames, None)
        came = time.perf_counter()
        waited, first = came - asked, first or came
        if mel is not None and mel_source is not None:
            mel = adapt_mel(mel, model, mel_source, warn=doubts.warn).numpy()
        pushes = [None] if mel is None else np.split(mel, range(step, mel.shape[1], step), axis=1)
        for piece in pushes:
            began = time.perf_counter()
            audio = stream.flush() if piece is None else stream.push(piece)
            ready = time.perf_counter()
            report.computing += ready - began
            if not len(audio):
                continue
            if report.first_sound is None:
                report.first_sound = ready - first
                logger.info(
                    "first sound %.0f ms after the first frame came, %.0f ms after the last that it"
                    " needed",
                    *(report.first_sound * 1000, (ready - came) * 1000),
                )
            report.add(len(audio), ready, waited)
            waited = 0.0
            sink.write(pcm16(audio.numpy()))
        doubts.judge(mel, _JUDGED_SECONDS / frame)
    sink.close()
    if isinstance(sink, Device) and sink.underflows:
        logger.info("the sound device ran dry %d times", sink.underflows)
    logger.info("%s", report)
    return report


def pcm16(audio: np.ndarray) -> bytes:
    """Return samples in [-1, 1] as 16-bit little-endian PCM, rounded as in a file."""
    return np.clip(np.rint(audio.astype(np.float64) * 32768), -32768, 32767).astype("<i2").tobytes()


def run(
    model: AutoregressiveModel, out: str, sampling: Sampling, mel_source: str | None = None
) -> None:
    """Serve stdin to stdout ("-") or a sound device ("device", "device:NAME")."""
    if out != "-" and out.split(":")[0] != "device":
        raise WavearError(
            f"--out is {out}; with --stream it is - (stdout, the default), device, or device:NAME"
        )
    if sys.stdin is None or (out == "-" and sys.stdout is None):
        raise WavearError(
            "stdin or stdout is closed: pipe mel frames to stdin, and the sound from stdout"
        )
    if sys.stdin.isatty():
        raise WavearError(
            "stdin is a terminal: pipe mel frames to it, float32, frame after frame, or a .npy file"
        )
    rate = model.config.sample_rate
    if out == "-" and sys.stdout.isatty():
        raise WavearError(
            "stdout is a terminal: pipe the sound on, such as to `aplay -t raw -f S16_LE -c 1 -r"
            f" {rate}`, or pass --out device"
        )
    sink = Pipe(sys.stdout.buffer) if out == "-" else Device(rate, out.partition(":")[2])
    source: Any = sys.stdin.buffer
    try:
        serve(model, source, sink, sampling, mel_source=mel_source)
    except BrokenPipeError:
        # The player was closed, which is how one stops listening. Python would complain when it
        # flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
