"""Look into one audio file: read its header, or measure the level of a stretch of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wavear import audio
from wavear.audio.reading import blocks
from wavear.audio.waveforms import sounding
from wavear.common.errors import one_line

Normalise = Literal["none", "peak", "rms"]

_PEAK_TARGET = 0.9  # of full scale
_RMS_TARGET = 10 ** (-23 / 20)  # -23 dB of full scale, near the level of broadcast (EBU R 128)
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
    normalise: Normalise
    trim_silence: float | None


def look(source: audio.AudioPath, stretch: Stretch | None = None) -> Looked:
    """Read the header of a file, or measure the level of a stretch of it."""
    try:
        if stretch is not None:
            return _level(source, stretch)
        info = audio.info(source)
        return Looked(frames=info.frames, rate=info.sample_rate)
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
    if asked.normalise == "none":
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
    gain = _PEAK_TARGET / peak if asked.normalise == "peak" else min(_RMS_TARGET / rms, 1 / peak)
    return Looked(start, frames, gain=gain)


def why(error: Exception, source: audio.AudioPath) -> str:
    """Return why a file cannot be used, in one line without its name."""
    if isinstance(error, MemoryError):
        return one_line(error)
    lines = str(error).strip().splitlines()
    return lines[0].replace(f"{source}: ", "") if lines else type(error).__name__
