"""Waveforms: read and write files, mu-law, grids of codes, pre-emphasis, periods."""

from wavear.audio.reading import SUFFIXES, AudioError, AudioInfo, AudioPath, Member, info, read
from wavear.audio.waveforms import fade, normalize_peak, resample, trim_silence
from wavear.audio.writing import write

__all__ = [
    "SUFFIXES",
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
