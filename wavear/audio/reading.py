"""Read audio files as mono float32 waveforms of shape (T,) in [-1, 1].

libsndfile decodes WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and its other formats;
`wavear.audio.headers` first corrects headers that contradict the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavear.audio import headers
from wavear.audio.waveforms import (
    MAX_SAMPLE_RATE,
    MIN_SAMPLE_RATE,
    check_count,
    check_rate,
    resample_row,
    resampled_length,
)
from wavear.common.errors import WavearError, require

if TYPE_CHECKING:
    import soundfile


@dataclass(frozen=True, slots=True)
class Member:
    """An audio file stored uncompressed in another file, such as a tar archive."""

    archive: str
    offset: int
    """Position of its first byte in the archive."""
    size: int
    """Bytes."""
    member: str
    """Its name in the archive."""

    @property
    def name(self) -> str:
        """Last part of its name."""
        return Path(self.member).name

    def resolve(self) -> Member:
        """Return it with the real path of its archive."""
        return Member(os.path.realpath(self.archive), self.offset, self.size, self.member)

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"


AudioPath = str | os.PathLike[str] | Member


class AudioError(WavearError):
    """A file that cannot be used as audio; the message names it and gives the reason."""


@dataclass(frozen=True)
class AudioInfo:
    """Sample rate, length and channels of a file."""

    sample_rate: int
    """Hz."""
    frames: int
    """Samples per channel."""
    channels: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / self.sample_rate


def info(path: AudioPath) -> AudioInfo:
    """Return the sample rate, length and channels of an audio file without decoding it.

    Parameters
    ----------
    path : str, Path or Member

    Raises
    ------
    AudioError, OSError
        As `read`, except for damage that only decoding reveals.
    """
    with _open(path) as (file, _):
        return AudioInfo(file.samplerate, file.frames, file.channels)


def read(
    path: AudioPath, sample_rate: int | None = None, start: int = 0, frames: int | None = None
) -> torch.Tensor:
    """Read an audio file, or a part of it, as a mono waveform.

    Channels are averaged. Only the requested part is decoded and resampled, with some context where
    the format or the resampling needs it: the part equals that slice of the whole file to 1e-6.

    Parameters
    ----------
    path : str, Path or Member
    sample_rate : int, optional
        Rate of the result, Hz; by default the file's own.
    start : int
        First sample to return, at the rate of the result.
    frames : int, optional
        Number of samples to return, at the rate of the result; by default all. Fewer if the file
        ends first.

    Returns
    -------
    Tensor, shape (T,), float32
        In [-1, 1], which lossy codecs and floating-point files may exceed; nothing is clipped. T is
        `frames`, or round(samples of the file * sample_rate / its rate) - `start`.

    Raises
    ------
    AudioError
        If the file is empty, is not audio, has no samples, is damaged or truncated inside, holds
        NaN or infinity, or has a sample rate outside 1 to 384 kHz; if `start` lies beyond its end.
    WavearError
        If `sample_rate`, `start` or `frames` is out of range.
    FileNotFoundError, IsADirectoryError, PermissionError, OSError
        If the file is missing, is a folder, or cannot be read.
    """
    if sample_rate is not None:
        sample_rate = check_rate(sample_rate)
    start = check_count("start", start, 0)
    if frames is not None:
        frames = check_count("frames", frames)
    with _open(path) as (file, last_seek):
        own_rate = file.samplerate
        rate = sample_rate or own_rate
        length = resampled_length(file.frames, own_rate, rate)
        if length == 0:
            raise AudioError(
                f"{path}: is too short ({file.frames} samples at {own_rate} Hz) for a sample at"
                f" {rate} Hz"
            )
        if start >= length:
            raise AudioError(
                f"{path}: start {start} lies beyond its end ({length} samples at {rate} Hz)"
            )
        stop = length if frames is None else min(start + frames, length)
        first, last = _needed(start, stop, own_rate, rate, file.frames)
        waveform = _decode(path, file, first, last, last_seek)
    if rate == own_rate:
        return torch.from_numpy(waveform)
    # `first` is a multiple of the ratio's denominator, so it falls on a sample of the result.
    offset = first * rate // own_rate
    resampled = resample_row(waveform, own_rate, rate)
    return torch.from_numpy(resampled[start - offset : stop - offset].copy())


@contextlib.contextmanager
def _open(path: AudioPath) -> Iterator[tuple[soundfile.SoundFile, int | None]]:
    """Open and check a file; yield it with the latest sample that a seek reaches exactly."""
    import soundfile

    require(path, (str, os.PathLike, Member), "path", "the name of an audio file")
    name = str(path)
    if "\0" in name:
        raise AudioError(f"{name!r} cannot be a file name: it contains a zero byte")
    if name.lower().endswith(".raw"):
        raise AudioError(
            f"{path}: raw samples have no sample rate and no format: convert them to WAV first,"
            " such as with sox or ffmpeg"
        )
    source, findings = _checked(path)
    # A file that only has the name of an MP3 goes to the MP3 decoder, too.
    noisy = findings.is_mp3 or str(path).lower().endswith(".mp3")
    with _decoder_quiet() if noisy else contextlib.nullcontext():
        try:
            file = soundfile.SoundFile(source)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{path}: is not audio, or its header is damaged ({error.error_string})"
            ) from error
        with file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                raise AudioError(
                    f"{path}: has a sample rate of {file.samplerate} Hz, expected"
                    f" {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
                )
            if file.frames == 0:
                raise AudioError(f"{path}: holds no audio (0 samples)")
            yield file, findings.last_seek


def _checked(path: AudioPath) -> tuple[Any, headers.Findings]:
    """Return what soundfile opens for a path, and the findings about its header."""
    member = isinstance(path, Member)
    holder = path.archive if member else path
    stretch = (path.offset, path.size) if member else None
    try:
        status = os.stat(holder)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path}: is a folder, expected an audio file")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path}: is not a regular file; audio cannot be read from pipes")
        if (stretch[1] if stretch else status.st_size) == 0:
            raise AudioError(f"{path}: is empty (0 bytes)")
        if stretch and sum(stretch) > status.st_size:
            raise AudioError(
                f"{path}: is damaged or truncated inside (the archive ends before it does)"
            )
        findings = headers.examine(holder, stretch)
    except headers.HeaderError as error:
        raise AudioError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot read {path}: {error.strerror}") from error
    if stretch or findings.splice:
        with open(holder, "rb") as file:
            file.seek(stretch[0] if stretch else 0)
            data = file.read(stretch[1] if stretch else -1)
        if findings.splice:
            offset, removed, inserted = findings.splice
            data = data[:offset] + inserted + data[offset + removed :]
        return io.BytesIO(data), findings
    # soundfile encodes str strictly; on POSIX, names need not be Unicode.
    return os.fsencode(holder) if os.name == "posix" else os.fspath(holder), findings


def _decode(
    path: AudioPath, file: soundfile.SoundFile, first: int, last: int, last_seek: int | None
) -> np.ndarray:
    """Return samples [first, last) of a file, mono."""
    import soundfile

    begin = first if last_seek is None else min(first, last_seek)
    if file.subtype == "OPUS":
        begin = 0  # its prediction has unlimited memory
    elif file.format in ("MP3", "OGG"):
        # These decoders have a short memory (MP3: a bit reservoir of three frames of 1152 samples;
        # Vorbis: a block) and reach the same state from this much earlier.
        begin = max(begin - 4608, 0)
    try:
        if begin:
            file.seek(begin)
        samples = file.read(last - begin, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: is damaged or truncated inside ({error.error_string})"
        ) from error
    if len(samples) < last - begin:
        end = begin + len(samples)
        raise AudioError(
            f"{path}: is damaged or truncated inside (audio ends at sample {end} of {file.frames})"
        )
    samples = samples[first - begin :]
    if not np.isfinite(samples).all():
        at = first + int(np.argwhere(~np.isfinite(samples))[0, 0])
        raise AudioError(f"{path}: holds NaN or infinity (at sample {at})")
    return samples[:, 0].copy() if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def _needed(start: int, stop: int, own_rate: int, rate: int, frames: int) -> tuple[int, int]:
    """Return the samples [first, last) of the file that [start, stop) of the result need."""
    if rate == own_rate:
        return start, stop
    # soxr's filter reaches 100 to 130 samples of the lower rate to either side.
    margin = math.ceil(256 * max(own_rate / rate, 1.0))
    step = own_rate // math.gcd(own_rate, rate)
    first = max(start * own_rate // rate - margin, 0) // step * step
    return first, min(stop * own_rate // rate + 1 + margin, frames)


_stderr_lock = threading.RLock()
_CHATTER = re.compile(rb"mpg123|^(Note|Warning): |^\s*$")


@contextlib.contextmanager
def _decoder_quiet() -> Iterator[None]:
    """Drop the MP3 decoder's messages, which it prints at every seek.

    It writes them to file descriptor 2 from C, so the descriptor is redirected; other output that
    arrives meanwhile is printed afterwards.
    """
    with _stderr_lock:
        try:
            terminal = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        with tempfile.TemporaryFile() as caught:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                if sys.stderr is not None:
                    sys.stderr.flush()
                os.dup2(terminal, 2)
                os.close(terminal)
                caught.seek(0)
                for line in caught:
                    if not _CHATTER.search(line):
                        os.write(2, line)


# A child that another thread forks meanwhile would have no stderr, and a lock that is never freed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_stderr_lock.acquire,
        after_in_parent=_stderr_lock.release,
        after_in_child=_stderr_lock.release,
    )
