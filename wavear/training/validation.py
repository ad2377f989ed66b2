"""Held-out bits of a run: in total, by loudness and by speaker, and next to the baselines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch

from wavear.data.corpus import Corpus, Recording
from wavear.data.crops import read_span
from wavear.evaluation.bits import LEVELS
from wavear.evaluation.held_out import Bits, Counts, baselines, held_out_bits, subset
from wavear.evaluation.metrics import frame_levels
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of
from wavear.training.config import TrainConfig

_FRAME_SECONDS = 0.02  # of a level

Group = dict[str, tuple[float, int]]
"""Bits per sample and samples, by the name of what they are of."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of the held-out recordings."""

    bits: Bits
    groups: dict[str, Group]
    """"level" and "speaker"."""


def score_held_out(
    trainer: L.Trainer,
    model: AutoregressiveModel,
    recordings: Sequence[Recording],
    speakers: Sequence[str],
) -> HeldOut:
    """Score recordings; every process scores its share and returns the sums over all."""
    levels = ByLevel(model.config.sample_rate)
    rank, world = trainer.global_rank, trainer.world_size
    found = held_out_bits(model, recordings, speakers, rank=rank, world=world, note=levels.add)
    if world > 1:
        arrays = (found.total, found.samples, levels.bits, levels.samples)
        joined = torch.from_numpy(np.concatenate(arrays)).to(trainer.strategy.root_device)
        sums: Any = trainer.strategy.reduce(joined, reduce_op="sum")
        ends = np.cumsum([array.size for array in arrays])[:-1]
        total, samples, levels.bits, levels.samples = np.split(sums.cpu().numpy(), ends)
        found = Bits(total, samples, found.skipped)
    return HeldOut(found, {"level": levels.named(), "speaker": by_speaker(recordings, found)})


def final_scores(
    config: TrainConfig, corpus: Corpus, best: AutoregressiveModel, speakers: Sequence[str] = ()
) -> tuple[dict[str, float], dict[str, str]]:
    """Return bits per sample of "model" and baselines, and the recordings that cannot be read."""
    layout, grid, rate = layout_of(best, 1), best.grid, config.sample_rate
    recordings = subset(corpus.validation, config.final_seconds * rate)
    scored = held_out_bits(best, recordings, speakers)
    counted = Counts.of(subset(corpus.train, config.baseline_seconds * rate), layout, grid)
    others = baselines(counted, Counts.of(recordings, layout, grid))
    return {"model": scored.per_sample} | others, scored.skipped


class ByLevel:
    """Bits by the RMS of the 20 ms around a sample, counted from the recording's beginning.

    As in `wavear.evaluate`: samples in incomplete 20 ms at a recording's end are not counted.
    """

    def __init__(self, rate: int):
        self.rate = rate
        self.samples = np.zeros(len(LEVELS) - 1)
        self.bits = np.zeros(len(LEVELS) - 1)

    def add(self, recording: Recording, first: int, bits: np.ndarray) -> None:
        """Add the bits (n,) of the samples [first, first + n) of a recording."""
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

    def named(self) -> Group:
        """Return the groups that are not empty, by dB of full scale: "below -70", "-70 to -60"."""
        names = [_name(low, high) for low, high in itertools.pairwise(LEVELS)]
        rows = zip(names, self.bits, self.samples, strict=True)
        return {name: (float(bits / count), int(count)) for name, bits, count in rows if count}


def _name(low: float, high: float) -> str:
    if math.isinf(low):
        return f"below {high:g}"
    return f"above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def by_speaker(recordings: Sequence[Recording], bits: Bits) -> Group:
    """Return the bits of each named speaker; empty for fewer than two."""
    speakers = np.array([recording.speaker or "" for recording in recordings])
    found: Group = {}
    for name in np.unique(speakers[speakers != ""]):
        if count := int(bits.samples[speakers == name].sum()):
            found[str(name)] = (float(bits.total[speakers == name].sum() / count), count)
    return found if len(found) > 1 else {}


def interleave_speakers(recordings: Sequence[Recording]) -> list[Recording]:
    """Return the recordings with the speakers in turn, so that the first seconds cover many."""
    groups: dict[Any, list[Recording]] = {}
    for recording in recordings:
        groups.setdefault(recording.speaker, []).append(recording)
    rounds = itertools.zip_longest(*groups.values())
    return [recording for each in rounds for recording in each if recording is not None]
