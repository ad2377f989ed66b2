"""Bits of whole recordings to the last sample, under a model and under fitted baselines."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from wavear.audio.emphasis import coefficient, emphasised
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.common.errors import WavearError
from wavear.data.corpus import Recording, reason
from wavear.data.crops import Layout, file_mel, read_span
from wavear.evaluation.held_out import Counts, baselines, code_blocks
from wavear.evaluation.metrics import frame_levels
from wavear.generation.conditioner import Conditioner
from wavear.generation.scoring import score_parallel
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of
from wavear.models.distributions import converts
from wavear.models.fitting import Fitter
from wavear.models.linear import Linear

BLOCK_SECONDS = 60.0  # of a recording at once
# dB of full scale, RMS of 20 ms
LEVELS = (-math.inf, -70.0, -60.0, -50.0, -40.0, -30.0, -20.0, math.inf)
ORDER = 32  # of the linear baseline


@dataclass
class Scores:
    """Bits of one recording, as sums over its samples."""

    samples: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    """"model", and the baselines "uniform", "unigram", "markov", "linear" where they exist."""
    level_samples: np.ndarray = field(default_factory=lambda: np.zeros(len(LEVELS) - 1, np.int64))
    """Samples by the level of the 20 ms around them, between `LEVELS`."""
    level_bits: np.ndarray = field(default_factory=lambda: np.zeros(len(LEVELS) - 1))
    """Bits of the model, likewise."""
    digest: str = ""
    """Digest of the codes: equal for recordings that the model cannot distinguish."""
    common: dict[str, float] = field(default_factory=dict)
    """Bits of the model on `COMMON_GRIDS`, "linear" and "mulaw", without a grid that is finer than
    the model's in places and coarser in others. Empty where codes are of pre-emphasised audio."""


@dataclass(frozen=True)
class Baselines:
    """Distributions that need no model, fitted to recordings."""

    counts: Counts
    linear: Linear
    failed: dict[str, str] = field(default_factory=dict)
    """Recordings that cannot be read, and why: they are skipped."""

    @classmethod
    def fit(cls, recordings: Sequence[Recording], layout: Layout, grid: Grid) -> Baselines:
        """Fit to the codes of recordings.

        Raises
        ------
        ValueError
            If none of them can be read.
        """
        layout = dataclasses.replace(layout, hop=1)  # every sample
        small = np.uint8 if grid.classes <= 256 else np.uint16
        good, rows, failed = [], [], {}
        for recording in recordings:
            try:
                blocks = [codes.astype(small) for codes in code_blocks(recording, layout, grid)]
            except (ValueError, OSError, MemoryError) as error:
                failed[recording.name] = reason(error, recording)
            else:
                good.append(recording)
                rows.append(np.concatenate(blocks))
        if failed and not good:
            name, why = next(iter(failed.items()))
            raise WavearError(
                f"none of the recordings for the baselines can be read; the first: {name}: {why}"
            )
        return cls(Counts.of(good, layout, grid), fit_predictor(rows, grid), failed)

    def bits(self, recording: Recording, layout: Layout, grid: Grid) -> dict[str, float]:
        """Return the bits of a recording by baseline, summed over every sample."""
        layout = dataclasses.replace(layout, hop=1)
        counted = Counts.of([recording], layout, grid)
        samples = int(counted.single.sum())
        found = {name: value * samples for name, value in baselines(self.counts, counted).items()}
        total, past = 0.0, np.zeros(0, np.int64)
        order = self.linear.receptive_field
        assert order is not None  # a linear model has one
        for codes in code_blocks(recording, layout, grid):
            joined = np.concatenate([past, codes])
            total += float(bits_of(self.linear, joined, first=len(past)).sum())
            past = joined[-order:]
        return found | {"linear": total}


def fit_predictor(recordings: Iterable[np.ndarray], grid: Grid, order: int = ORDER) -> Linear:
    """Return the likeliest linear predictor of recordings given as codes (T_i,).

    Samples and (of mu-law codes) companded values are tried, each with a Laplace and a normal
    residual.

    Raises
    ------
    ValueError
        If there are no samples.
    """
    fitter = Fitter(grid, order=order, law="auto", domain="auto", method="silence")
    for codes in recordings:
        fitter.begin()
        fitter.push(codes)
        fitter.end()
    return fitter.fit().model


@torch.inference_mode()
def bits_of(model: Linear, codes: np.ndarray, first: int = 0) -> np.ndarray:
    """Return -log2 P of codes[first:] given those before them, (T - first,) float64.

    Silence precedes codes[0].

    Parameters
    ----------
    model : Linear
    codes : array, shape (T,), integers in [0, Q)
    first : int
    """
    given = torch.from_numpy(np.asarray(codes, dtype=np.int64))[None]
    scores = score_parallel(model, given, Conditioner(model, None, None), first=first)
    return -scores[0].numpy() / math.log(2)


@torch.inference_mode()
def score_recording(
    model: AutoregressiveModel, recording: Recording, speaker: int | None
) -> Scores:
    """Return the bits of every sample of a recording under a model, in bounded memory.

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
        size = round(0.02 * rate)
        groups = level_groups(waveform, rate)
        np.add.at(found.level_samples, groups, size)
        np.add.at(found.level_bits, groups, bits[: len(groups) * size].reshape(-1, size).sum(1))
    found.bits["model"] = total
    found.digest = digest.hexdigest()
    return found


def level_groups(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Return the group, a number of an interval of `LEVELS`, of each whole 20 ms of a waveform."""
    levels = frame_levels(waveform, rate)
    return np.clip(np.searchsorted(LEVELS, levels, side="right") - 1, 0, len(LEVELS) - 2)


def scored_blocks(
    model: AutoregressiveModel,
    recording: Recording,
    speaker: int | None,
    seconds: float = BLOCK_SECONDS,
    grids: Sequence[Grid] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield waveform (n,) and -log P in nats (n,), as `wavear.score`, block by block.

    With `grids`, -log P is on each of them, (len(grids), n).

    A block is scored with all of the past that the model sees in front of it, or from the carried
    state, and with the mel of the whole: the frames that its conditioning sees, from all samples
    under their windows.
    """
    rate, mel_config, total = model.config.sample_rate, model.config.mel, recording.frames
    layout = layout_of(model, 1)
    hop = layout.hop
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
        read = read_span(recording, rate, a, min(b, total))
        waveform = torch.from_numpy(np.pad(read, (0, max(b - total, 0))))
        mels = None
        if mel_config is not None:
            given = file_mel(recording, layout, first // hop, last // hop)
            if given is None:
                whole = log_mel(waveform[None], mel_config)
                mels = [whole[0, :, (first - a) // hop : (last - a) // hop]]
            else:
                mels = [torch.from_numpy(given)]
        conditioner = Conditioner(model, mels, None if speaker is None else [speaker])
        heard = emphasised(waveform[first - a : stop - a], coefficient(model.config))
        codes = model.grid.encode(heard)[None]
        scores = score_parallel(
            model, codes, conditioner, first=start - first, state=state, grids=grids
        )
        yield waveform[start - a : stop - a].numpy(), -scores[..., 0, :].numpy()
