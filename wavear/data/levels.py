"""Look into one audio file: read its header, or measure the level of a stretch of it."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from wavear import audio
from wavear.audio.reading import blocks
from wavear.audio.scale import share_beyond
from wavear.audio.waveforms import sounding
from wavear.common.errors import one_line
from wavear.data.gains import PEAK_TARGET, RMS_TARGET, Normalize

_HASHED = 4096  # bytes from the middle of a file
_TRIM_KEEP_SECONDS = 0.05  # silence that `trim_silence` leaves at either end


@dataclass(frozen=True, slots=True)
class Looked:
    """The result of looking into a file."""

    start: int = 0
    """First sample, at the asked rate; 0 for a header."""
    frames: int = 0
    """Samples: at the file's rate for a header, else at the asked rate."""
    rate: int = 0
    """Sample rate of the file in Hz, for a header."""
    gain: float = 1.0
    """For a header: the share of samples within full scale."""
    error: str | None = None
    """Why the file cannot be used."""
    lasting: bool = True
    """False if the file could not be opened, so that another try may succeed."""


class Found:
    """Columns of `Looked`, a row per file."""

    def __init__(self, count: int):
        self.start, self.frames, self.rate = np.zeros((3, count), np.int64)
        self.gain = np.ones(count)
        self.error: Any = np.full(count, None, object)  # str or None
        self.new = 0
        """Files that were looked into, not remembered."""

    def put(self, row: int, one: Looked) -> None:
        """Set a row."""
        self.start[row], self.frames[row], self.rate[row] = one.start, one.frames, one.rate
        self.gain[row], self.error[row] = one.gain, one.error

    def take(self, rows: np.ndarray) -> Found:
        """Return some rows, by numbers."""
        part = Found(0)
        part.new = self.new
        for name in ("start", "frames", "rate", "gain", "error"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    @property
    def failed(self) -> np.ndarray:
        """(n,) bool: which files cannot be used."""
        return self.error.astype(bool)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A question about the level of a stretch of a file; positions in samples at `rate`."""

    rate: int
    start: int
    frames: int
    normalize: Normalize
    trim_silence: float | None


@dataclass(frozen=True, slots=True)
class Digest:
    """A question about the bytes of a file; the answer is in `Looked.start`."""

    whole: bool
    """All bytes, or a block from the middle."""


def look(source: audio.AudioPath, question: Stretch | Digest | None = None) -> Looked:
    """Read the header of a file, measure the level of a stretch of it, or hash its bytes."""
    try:
        if isinstance(question, Stretch):
            return _level(source, question)
        if question is not None:
            return Looked(start=_hashed(source, question.whole))
        info = audio.info(source)
        within = 1 - share_beyond(audio.count_beyond(source)) if info.floating else 1.0
        return Looked(frames=info.frames, rate=info.sample_rate, gain=within)
    except (ValueError, OSError, MemoryError) as error:
        return Looked(error=why(error, source), lasting=isinstance(error, ValueError))


def _level(source: audio.AudioPath, asked: Stretch) -> Looked:
    """Return the gain that brings a stretch to its level, and the stretch without silent ends."""
    first, last = 0, asked.frames
    if asked.trim_silence is not None:
        margin = round(_TRIM_KEEP_SECONDS * asked.rate)
        whole = blocks(source, asked.rate, asked.start, asked.frames)
        first, last = sounding(whole, asked.trim_silence, margin)
    start, frames = asked.start + first, last - first
    if asked.normalize == "none":
        return Looked(start, frames)
    peak, energy, at, count = 0.0, 0.0, 0, 0
    for block in blocks(source, asked.rate, asked.start, asked.frames):
        kept = block[max(first - at, 0) : max(last - at, 0)]
        at += len(block)
        if kept.size:
            peak = max(peak, float(np.abs(kept).max()))
            count += kept.size
            energy += float(np.square(kept, dtype=np.float64).sum())
    if peak == 0:
        return Looked(start, frames)
    rms = math.sqrt(energy / count)
    gain = PEAK_TARGET / peak if asked.normalize == "peak" else min(RMS_TARGET / rms, 1 / peak)
    return Looked(start, frames, gain=gain)


def _hashed(source: audio.AudioPath, whole: bool) -> int:
    """Return a hash of 63 bits of a file's bytes, or of a block from its middle."""
    member = source if isinstance(source, audio.Member) else None
    digest = hashlib.blake2b(digest_size=8)
    with open(member.archive if member else os.fspath(source), "rb") as file:  # type: ignore
        size = member.size if member else os.fstat(file.fileno()).st_size
        left = size if whole else min(size, _HASHED)
        file.seek((member.offset if member else 0) + (size - left) // 2)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return int.from_bytes(digest.digest(), "big") >> 1


def why(error: Exception, source: audio.AudioPath) -> str:
    """Return why a file cannot be used, in one line without its name."""
    if isinstance(error, MemoryError):
        return one_line(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.replace(f"cannot read {source}: ", "")
    lines = str(error).strip().splitlines()
    return lines[0].replace(f"{source}: ", "") if lines else type(error).__name__
