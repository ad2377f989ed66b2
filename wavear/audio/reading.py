"""Read audio files as mono float32 waveforms of shape (T,) in [-1, 1].

libsndfile decodes WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and its other formats;
`wavear.audio.headers` first corrects headers that contradict the file.
"""

from __future__ import annotations

import contextlib
import functools
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
from wavear.audio.scale import counts
from wavear.audio.waveforms import (
    MAX_SAMPLE_RATE,
    MIN_SAMPLE_RATE,
    check_count,
    check_rate,
    resample_blocks,
    resampled_length,
)
from wavear.common.errors import WavearError, require

if TYPE_CHECKING:
    import soundfile


ENDINGS = {
    "WAV": (".wav", ".wave"),
    "RF64": (".rf64",),
    "W64": (".w64",),
    "FLAC": (".flac",),
    "OGG": (".ogg", ".oga", ".opus"),
    "MP3": (".mp3",),
    "AIFF": (".aif", ".aiff", ".aifc"),
    "AU": (".au", ".snd"),
    "CAF": (".caf",),
    "NIST": (".sph", ".nist"),
}
"""Endings of audio files, by libsndfile's name of the format. Its others are rare, have no header
(RAW), or share their ending with files that are not audio (MAT5)."""
SUFFIXES = tuple(ending for endings in ENDINGS.values() for ending in endings)
"""Endings of the files that folders are searched for."""

_MOST_KEPT = 2**24  # samples of a decoded file that is kept: 64 MiB, 35 minutes at 8 kHz


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


_BLOCK = 2**18  # samples that are decoded at once
# The densest coding is FLAC's of constant samples: blocks of 65535 in 13 bytes or more.
_SAMPLES_PER_BYTE = 8192

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
    floating: bool = False
    """True if the file stores floating-point samples, which may exceed [-1, 1]."""

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
        floating = file.subtype in ("FLOAT", "DOUBLE")
        return AudioInfo(file.samplerate, file.frames, file.channels, floating)


def read_channels(path: AudioPath, start: int, frames: int) -> np.ndarray:
    """Return samples of all channels at the file's own rate, (T, channels), float32; see `read`."""
    with _open(path) as (file, last_seek):
        stop = min(start + frames, file.frames)
        start = min(start, stop)
        parts = _finite(path, _decode(path, file, start, stop, last_seek), start)
        return np.concatenate([np.empty((0, file.channels), np.float32), *parts])


def read_pcm16(path: AudioPath) -> tuple[np.ndarray, int]:
    """Return the 16-bit samples of all channels, (channels, T) int16, and their rate in Hz.

    An `AudioError` refuses a file that stores anything else; others as `read`.
    """
    with _open(path) as (file, _):
        if file.subtype != "PCM_16":
            raise AudioError(
                f"{path}: stores {file.subtype_info} samples, expected 16-bit PCM: convert it to a"
                " 16-bit WAV or FLAC first"
            )
        return np.ascontiguousarray(file.read(dtype="int16", always_2d=True).T), file.samplerate


def count_beyond(path: AudioPath) -> np.ndarray:
    """Decode a floating-point file, and return `wavear.audio.scale.counts` of its mono mix."""
    found = np.zeros(3, np.int64)
    with _open(path) as (file, last_seek):
        for block in _mono(_decode(path, file, 0, file.frames, last_seek)):
            found += counts(block)
    return found


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
    parts = list(blocks(path, sample_rate, start, frames))
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def blocks(
    path: AudioPath, sample_rate: int | None = None, start: int = 0, frames: int | None = None
) -> Iterator[np.ndarray]:
    """Yield what `read` returns, bit for bit, in blocks of at most 262,144 samples.

    Parameters, exceptions: see `read`.
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
        if file.seekable() or file.frames > _MOST_KEPT:
            decoded = _finite(path, _decode(path, file, first, last, last_seek), first)
            decoded = _mono(decoded)
        else:
            decoded = iter([_decoded_whole(path, _state(path))[first:last].copy()])
        if rate == own_rate:
            yield from decoded
            return
        # `first` is a multiple of the ratio's denominator, so it falls on a sample of the result.
        at = first * rate // own_rate
        for block in resample_blocks(decoded, own_rate, rate):
            part = block[max(start - at, 0) : max(stop - at, 0)]
            at += len(block)
            if part.size:
                yield part.copy()


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
            size = _size(path)
            if not 0 < file.frames <= size * _SAMPLES_PER_BYTE:
                raise AudioError(
                    f"{path}: is damaged: its header promises {file.frames} samples, and it has"
                    f" {size} bytes"
                )
            yield file, findings.last_seek


def _size(path: AudioPath) -> int:
    """Return the bytes of a file."""
    return path.size if isinstance(path, Member) else os.path.getsize(path)


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


@functools.lru_cache(maxsize=1)
def _decoded_whole(path: AudioPath, state: tuple[int, int]) -> np.ndarray:
    """Decode a file without seeking (GSM 6.10, G.721) once, for all crops; cached by its state."""
    with _open(path) as (file, _):
        decoded = _finite(path, _decode(path, file, 0, file.frames, None), 0)
        return np.concatenate([*_mono(decoded)])


def _state(path: AudioPath) -> tuple[int, int]:
    status = os.stat(path.archive if isinstance(path, Member) else path)
    return status.st_size, status.st_mtime_ns


def _decode(
    path: AudioPath, file: soundfile.SoundFile, first: int, last: int, last_seek: int | None
) -> Iterator[np.ndarray]:
    """Yield samples [first, last) of a file, (n, channels), in blocks.

    Memory grows with what is decoded, whatever the header promises.
    """
    import soundfile

    begin = first if last_seek is None else min(first, last_seek)
    if file.subtype == "OPUS" or not file.seekable():
        begin = 0  # Opus: its prediction has unlimited memory
    elif file.format in ("MP3", "OGG"):
        # These decoders have a short memory (MP3: a bit reservoir of three frames of 1152 samples;
        # Vorbis: a block) and reach the same state from this much earlier.
        begin = max(begin - 4608, 0)
    try:
        if begin:
            file.seek(begin)
        for at in range(begin, last, _BLOCK):
            count = min(_BLOCK, last - at)
            samples = file.read(count, dtype="float32", always_2d=True)
            if len(samples) < count:
                raise AudioError(
                    f"{path}: is damaged or truncated inside (audio ends at sample"
                    f" {at + len(samples)} of {file.frames})"
                )
            samples = samples[max(first - at, 0) :]
            if samples.size:
                yield samples
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: is damaged or truncated inside ({error.error_string})"
        ) from error


def _finite(path: AudioPath, blocks: Iterator[np.ndarray], at: int) -> Iterator[np.ndarray]:
    """Pass on blocks (n, C), the first of which begins at sample `at`; refuse NaN and infinity."""
    for block in blocks:
        if not np.isfinite(block).all():
            wrong = at + int(np.argwhere(~np.isfinite(block))[0, 0])
            raise AudioError(f"{path}: holds NaN or infinity (at sample {wrong})")
        at += len(block)
        yield block


def _mono(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Average the channels of blocks (n, C): (n,) each."""
    for block in blocks:
        one = block.shape[1] == 1
        yield block[:, 0].copy() if one else block.mean(axis=1, dtype=np.float32)


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
