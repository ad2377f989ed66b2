"""Held-out bits by loudness and by speaker: where a model is good, and where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from wavear.data.corpus import Recording
from wavear.data.crops import read_span
from wavear.evaluation.bits import LEVELS
from wavear.evaluation.held_out import Bits
from wavear.evaluation.metrics import frame_levels

_FRAME_SECONDS = 0.02  # of a level


class ByLevel:
    """Bits by the RMS of the 20 ms that a sample lies in, counted from the recording's beginning.

    As `wavear.evaluate` has them: samples in a rest shorter than 20 ms at the end of a recording
    are in no group.

    Parameters
    ----------
    rate : int
        Of the model, Hz.
    """

    def __init__(self, rate: int):
        self.rate = rate
        self.samples = np.zeros(len(LEVELS) - 1)
        self.bits = np.zeros(len(LEVELS) - 1)

    def add(self, recording: Recording, first: int, bits: np.ndarray) -> None:
        """Count the samples [first, first + n) of a recording, with their bits (n,)."""
        size = round(_FRAME_SECONDS * self.rate)
        start, stop = first // size, min(-(-(first + len(bits)) // size), recording.frames // size)
        if stop <= start:
            return
        levels = frame_levels(read_span(recording, self.rate, start * size, stop * size), self.rate)
        groups = np.clip(np.searchsorted(LEVELS, levels, side="right") - 1, 0, len(LEVELS) - 2)
        frames = np.arange(first, first + len(bits)) // size - start
        inside = frames < len(groups)
        np.add.at(self.samples, groups[frames[inside]], 1)
        np.add.at(self.bits, groups[frames[inside]], bits[inside])

    def named(self) -> dict[str, tuple[float, int]]:
        """Bits per sample and samples, by the level in dB of full scale: "below -70", "-70 to -60", ...; none empty."""
        names = [_name(low, high) for low, high in itertools.pairwise(LEVELS)]
        rows = zip(names, self.bits, self.samples, strict=True)
        return {name: (float(bits / count), int(count)) for name, bits, count in rows if count}


def _name(low: float, high: float) -> str:
    if np.isinf(low):
        return f"below {high:g}"
    return f"above {low:g}" if np.isinf(high) else f"{low:g} to {high:g}"


def by_speaker(recordings: Sequence[Recording], bits: Bits) -> dict[str, tuple[float, int]]:
    """Bits per sample and samples of each speaker that is named; empty where there are fewer than two."""
    sums: dict[str, list[float]] = {}
    for recording, total, samples in zip(recordings, bits.total, bits.samples, strict=True):
        if recording.speaker is not None:
            group = sums.setdefault(recording.speaker, [0.0, 0.0])
            group[0] += total
            group[1] += samples
    return {
        name: (float(total / count), int(count))
        for name, (total, count) in sorted(sums.items())
        if len(sums) > 1
    }


def turn_about(recordings: Sequence[Recording]) -> list[Recording]:
    """In the order of their names, but one of each speaker in turn: the first seconds are then of as many as can be."""
    groups: dict[Any, list[Recording]] = {}
    for recording in recordings:
        groups.setdefault(recording.speaker, []).append(recording)
    rounds = itertools.zip_longest(*groups.values())
    return [recording for each in rounds for recording in each if recording is not None]
