"""Levels that recordings are brought to. No torch here: the command line reads it."""

from typing import Literal

Normalize = Literal["none", "peak", "rms"]

PEAK_TARGET = 0.9  # of full scale
RMS_TARGET = 10 ** (-23 / 20)  # -23 dB of full scale, near the level of broadcast (EBU R 128)
