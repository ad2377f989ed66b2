"""Bits per sample of whole recordings: under the model, and under laws that need none, on the same samples."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from wavear.audio.emphasis import coefficient, emphasised
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.data.corpus import Recording, reason
from wavear.data.crops import Layout, read_span
from wavear.evaluation.held_out import Counts, baselines, code_blocks
from wavear.evaluation.linear_baseline import bits_of, fit_predictor
from wavear.evaluation.metrics import frame_levels
from wavear.generation.conditioner import Conditioner
from wavear.generation.scoring import score_parallel
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.distributions import converts
from wavear.models.linear import Linear

BLOCK_SECONDS = 60.0  # of a recording at once
LEVELS = (
    -math.inf,
    -70.0,
    -60.0,
    -50.0,
    -40.0,
    -30.0,
    -20.0,
    math.inf,
)  # dB of full scale, RMS of 20 ms


@dataclass
class Scores:
    """Of one recording. Bits are sums; per sample they are what is divided by `samples`."""

    samples: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    """"model", "uniform", "unigram", "markov", "linear": those there are."""
    level_samples: np.ndarray = field(default_factory=lambda: np.zeros(len(LEVELS) - 1, np.int64))
    """Samples by the level of the 20 ms around them, between `LEVELS`."""
    level_bits: np.ndarray = field(default_factory=lambda: np.zeros(len(LEVELS) - 1))
    """Bits of the model, likewise."""
    digest: str = ""
    """Of the codes: equal for recordings that are the same to the model."""
    common: dict[str, float] = field(default_factory=dict)
    """Bits of the model on `COMMON_GRIDS`, "linear" and "mulaw"; without those that are finer than the model's own grid
    in places and coarser in others, and none where the codes are of pre-emphasised audio."""


@dataclass(frozen=True)
class Baselines:
    """Laws that need no model, fitted."""

    counts: Counts
    linear: Linear
    failed: dict[str, str] = field(default_factory=dict)
    """Recordings that cannot be read, and why: they are passed over."""

    @classmethod
    def fit(cls, recordings: Sequence[Recording], layout: Layout, grid: Grid) -> Baselines:
        """To the codes of recordings.

        Raises
        ------
        ValueError
            If not one of them can be read.
        """
        layout = every_sample(layout)
        good, rows, failed = [], [], {}
        for recording in recordings:
            try:
                rows.append(codes_of(recording, layout, grid))
                good.append(recording)
            except (ValueError, OSError) as error:
                failed[recording.name] = reason(error, recording)
        if failed and not good:
            name, why = next(iter(failed.items()))
            raise ValueError(
                f"none of the recordings for the baselines can be read; the first: {name}: {why}"
            )
        return cls(Counts.of(good, layout, grid), fit_predictor(rows, grid), failed)

    def bits(self, recording: Recording, layout: Layout, grid: Grid) -> dict[str, float]:
        """Sums over a recording."""
        layout = every_sample(layout)
        counted = Counts.of([recording], layout, grid)
        samples = int(counted.single.sum())
        found = {name: value * samples for name, value in baselines(self.counts, counted).items()}
        order = self.linear.receptive_field
        total, past = 0.0, np.zeros(0, np.int64)
        for codes in code_blocks(recording, layout, grid):
            joined = np.concatenate([past, codes])
            total += float(bits_of(self.linear, joined)[len(past) :].sum())
            past = joined[-order:]
        return found | {"linear": total}


def every_sample(layout: Layout) -> Layout:
    """A layout by which `code_blocks` leaves out no samples at the end."""
    return dataclasses.replace(layout, hop=1)


def codes_of(recording: Recording, layout: Layout, grid: Grid) -> np.ndarray:
    """All codes of a recording, (T,), in as few bytes as they need."""
    small = np.uint8 if grid.classes <= 256 else np.uint16
    return np.concatenate([codes.astype(small) for codes in code_blocks(recording, layout, grid)])


@torch.inference_mode()
def score_recording(
    model: AutoregressiveModel, recording: Recording, speaker: int | None
) -> Scores:
    """Bits of every sample of a recording under a model, in memory that does not grow with its length.

    Parameters
    ----------
    model : AutoregressiveModel
    recording : Recording
        As `open_corpus` makes it.
    speaker : int, optional
        For a model with speakers.
    """
    found, digest, rate = Scores(), hashlib.blake2b(digest_size=16), model.config.sample_rate
    total = 0.0
    grids = {} if coefficient(model.config) else COMMON_GRIDS
    grids = {name: grid for name, grid in grids.items() if converts(model.grid, grid)}
    found.common = dict.fromkeys(grids, 0.0)
    for waveform, rows in scored_blocks(
        model, recording, speaker, grids=[model.grid, *grids.values()]
    ):
        bits = rows[0] / math.log(2)
        found.samples += bits.size
        total += float(bits.sum())
        for name, row in zip(grids, rows[1:], strict=True):
            found.common[name] += float((row / math.log(2)).sum())
        codes = model.grid.encode(torch.from_numpy(waveform)).numpy()
        digest.update(codes.astype("<u2").tobytes())
        _add_by_level(found, waveform, bits, rate)
    found.bits["model"] = total
    found.digest = digest.hexdigest()
    return found


def scored_blocks(
    model: AutoregressiveModel,
    recording: Recording,
    speaker: int | None,
    seconds: float = BLOCK_SECONDS,
    grids: Sequence[Grid] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A recording block by block: waveform (n,) and -log P of its samples (n,), in nats, as `wavear.score` has them.

    With `grids`, -log P on each of them, (len(grids), n).

    A block is scored with all of the past that the model sees in front of it, or from the state
    that it carries, and with the mel of the whole: the frames its conditioning looks at, from all
    samples that their windows see.
    """
    rate, mel_config, total = model.config.sample_rate, model.config.mel, recording.frames
    hop = 1 if mel_config is None else mel_config.hop_length
    length = math.ceil(seconds * rate / hop) * hop
    if total <= length or (model.receptive_field is None and not model.carries):
        length = math.ceil(total / hop) * hop  # one block
    state, past = (model.init_state(1), 1) if model.carries else (None, model.receptive_field or 0)
    ahead = 0 if mel_config is None else model.lookahead * hop
    margin = 0 if mel_config is None else mel_config.context_samples
    # One more: pre-emphasis takes the sample before the first to be 0.
    context = math.ceil((past + 1) / hop) * hop + ahead
    padded = math.ceil(total / hop) * hop  # `score` fills up the last frame with zeros
    for start in range(0, total, length):
        stop = min(start + length, total)
        first, last = max(start - context, 0), min(math.ceil(stop / hop) * hop + ahead, padded)
        a, b = max(first - margin, 0), min(last + margin, padded)
        waveform = torch.from_numpy(
            np.pad(read_span(recording, rate, a, min(b, total)), (0, max(b - total, 0)))
        )
        mels = None
        if mel_config is not None:
            mels = [
                log_mel(waveform[None], mel_config)[0, :, (first - a) // hop : (last - a) // hop]
            ]
        conditioner = Conditioner(model, mels, None if speaker is None else [speaker])
        codes = model.grid.encode(
            emphasised(waveform[first - a : stop - a], coefficient(model.config))
        )[None]
        scores = score_parallel(
            model, codes, conditioner, first=start - first, state=state, grids=grids
        )
        yield waveform[start - a : stop - a].numpy(), -scores[..., 0, :].numpy()


def _add_by_level(scores: Scores, waveform: np.ndarray, bits: np.ndarray, rate: int) -> None:
    size = round(0.02 * rate)
    whole = bits.size // size * size
    if not whole:
        return
    which = np.clip(
        np.searchsorted(LEVELS, frame_levels(waveform, rate), side="right") - 1, 0, len(LEVELS) - 2
    )
    np.add.at(scores.level_samples, which, size)
    np.add.at(scores.level_bits, which, bits[:whole].reshape(-1, size).sum(1))
