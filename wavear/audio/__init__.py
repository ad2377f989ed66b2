"""Waveforms: read and write files, mu-law, grids of codes, pre-emphasis, periods."""

from wavear.audio.waveforms import (
    AudioError,
    AudioInfo,
    AudioPath,
    Member,
    fade,
    info,
    normalize_peak,
    read,
    resample,
    trim_silence,
    write,
)

__all__ = [
    "AudioError",
    "AudioInfo",
    "AudioPath",
    "Member",
    "fade",
    "info",
    "normalize_peak",
    "read",
    "resample",
    "trim_silence",
    "write",
]
