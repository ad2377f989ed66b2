"""Waveforms: read and write files, mu-law, grids of codes, pre-emphasis, periods."""

from wavear.audio.reading import (
    SUFFIXES,
    AudioError,
    AudioInfo,
    AudioPath,
    Member,
    count_beyond,
    info,
    read,
    read_channels,
)
from wavear.audio.waveforms import fade, normalize_peak, resample, trim_silence
from wavear.audio.writing import write

__all__ = [
    "SUFFIXES",
    "AudioError",
    "AudioInfo",
    "AudioPath",
    "Member",
    "count_beyond",
    "fade",
    "info",
    "normalize_peak",
    "read",
    "read_channels",
    "resample",
    "trim_silence",
    "write",
]
