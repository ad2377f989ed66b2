"""Replace a damaged stretch of a recording by what fits on both sides.

    left side -> state -> N candidates -> likelihood of the right side -> resample, fork -> ...

A model predicts from the left only. So candidates are weighted by the exact likelihood of the first
samples behind the gap (the seam), as in sequential importance resampling: the likely ones are
forked shortly before the end of the gap, with new seeds, and weighted again. `janssen` is the
classic alternative, linear prediction from both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import coefficient
from wavear.audio.waveforms import resample
from wavear.common.errors import WavearError
from wavear.generation.conditioner import Conditioner
from wavear.generation.engine import Engine
from wavear.generation.engines import make_engine
from wavear.generation.inputs import check_mel
from wavear.generation.priming import fill
from wavear.generation.settings import candidate_seeds
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models import lpc
from wavear.models.base import AutoregressiveModel, check_model
from wavear.models.sampling import systematic, uniforms

SEAM_SECONDS = 0.02
FORKS = (0.01, 0.004, 0.0015)  # seconds before the end of the gap


@dataclass(frozen=True)
class Infilled:
    """A recording whose gap is filled."""

    waveform: Tensor
    """(T,), float32; outside of the gap that of the recording."""
    seam: float
    """log P of the seam in nats per sample, under the model."""
    first_seam: float
    """The same of the mean candidate before any was forked."""


@torch.inference_mode()
def infill(
    model: AutoregressiveModel,
    waveform: Tensor,
    start: int,
    stop: int,
    *,
    sample_rate: int | None = None,
    features: Tensor | None = None,
    candidates: int = 16,
    seed: int = 0,
    engine: str = "auto",
) -> Infilled:
    """Fill samples `start` to `stop` of a recording.

    Parameters
    ----------
    model : AutoregressiveModel
        Without speakers. One with mels gets those of the recording; where the gap touches a frame,
        it is interpolated between the frames on both sides.
    waveform : Tensor, shape (T,), floating point in [-1, 1]
        Samples inside the gap are not used.
    start, stop : int
        The gap.
    sample_rate : int, optional
        Of the recording, Hz. At another than the model's, frequencies that the model lacks are
        filled by `janssen`.
    features : Tensor, shape (C, F), optional
        What conditions the model instead of the recording's mel; a model of features needs them.
    candidates : int
        More fit better, and take as many times as long.
    seed : int
    engine : str
        See `wavear.generation.engines.make_engine`.

    Raises
    ------
    WavearError
        If the gap is empty or reaches an end, or the model is not suited.
    """
    check_model(model)
    total, rate = len(waveform), sample_rate or model.config.sample_rate
    if not 0 < start < stop < total:
        raise WavearError(
            f"the gap is {start / rate:g} to {stop / rate:g} s of {total / rate:g} s: it must begin"
            " and end inside the recording"
        )
    if model.config.speakers or coefficient(model.config):
        raise WavearError("infilling takes a model without speakers and pre-emphasis")
    if candidates < 2:
        raise WavearError(f"candidates is {candidates}, expected 2 or more")
    own = model.config.sample_rate
    if rate != own:
        filled = janssen(waveform, start, stop)  # the gap's samples would ring outside of it
        low, *gap = at_rate(filled, start, stop, rate, own)
        given: dict[str, Any] = {
            "features": features,
            "candidates": candidates,
            "seed": seed,
            "engine": engine,
        }
        found = infill(model, low, *gap, **given)
        change = resample(found.waveform - low, own, rate)
        filled[start:stop] = (filled + change[:total])[start:stop].clamp(-1, 1)
        return replace(found, waveform=filled)
    codes = model.grid.encode(waveform.float()).numpy()
    conditioner = _conditioner(model, waveform, start, stop, features)
    _, runner = make_engine(model, candidates, engine)
    fill(runner, 0, model, codes[:start], conditioner.utterances[0])
    left = runner.state(0)
    conditioner.repeat(candidates)
    end = min(stop + round(SEAM_SECONDS * rate), total)
    seam = np.repeat(codes[None, stop:end], candidates, axis=0)
    points = [start, *(p for s in FORKS if (p := stop - round(s * rate)) > start), stop]
    states, made = [left] * candidates, np.zeros((candidates, stop - start), np.int64)
    generator, seeds = np.random.default_rng(seed), candidate_seeds(seed, candidates)
    best, likeliest, first = made[0], -math.inf, 0.0
    for number, point in enumerate(points[:-1]):
        _load(runner, states)
        for a, b in zip(points[number:-1], points[number + 1 :], strict=True):
            draws = np.stack([uniforms((s + number) % 2**64, a, b - a) for s in seeds])
            made[:, a - start : b - start] = runner.generate(draws, conditioner.span(a, b))
            if a == point:
                states = [runner.state(n) for n in range(candidates)]
        found = runner.score(seam, conditioner.span(stop, end)).sum(axis=1)
        first = first if number else float(found.mean())
        if found.max() > likeliest:
            best, likeliest = made[found.argmax()].copy(), float(found.max())
        chosen = systematic(np.exp(found - found.max()), generator.random())
        states, made = [states[n] for n in chosen], made[chosen]
    filled = waveform.float().clone()
    filled[start:stop] = model.grid.decode(torch.from_numpy(best))
    return Infilled(filled, likeliest / seam.shape[1], first / seam.shape[1])


def at_rate(
    waveform: Tensor, start: int, stop: int, from_rate: int, to_rate: int
) -> tuple[Tensor, int, int]:
    """Return a recording at another rate, and where the gap begins and ends there."""
    ratio = to_rate / from_rate
    return (
        resample(waveform, from_rate, to_rate),
        math.floor(start * ratio),
        math.ceil(stop * ratio),
    )


@torch.inference_mode()
def seam_of(
    model: AutoregressiveModel,
    waveform: Tensor,
    start: int,
    stop: int,
    features: Tensor | None = None,
) -> float:
    """Return log P of the seam behind a filled gap, in nats per sample, as `infill` reports it."""
    codes = model.grid.encode(waveform.float()).numpy()
    conditioner = _conditioner(model, waveform, start, stop, features)
    _, runner = make_engine(model, 1)
    fill(runner, 0, model, codes[:stop], conditioner.utterances[0])
    end = min(stop + round(SEAM_SECONDS * model.config.sample_rate), len(codes))
    return float(runner.score(codes[None, stop:end], conditioner.span(stop, end)).mean())


def janssen(waveform: Tensor, start: int, stop: int, *, order: int = 64, rounds: int = 8) -> Tensor:
    """Fill a gap by linear prediction from both sides.

    The samples of the gap and the coefficients minimise the energy of the residual in turn
    (Janssen, Veldhuis and Vries, 1986).

    Parameters
    ----------
    waveform : Tensor, shape (T,)
    start, stop : int
        The gap.
    order : int
        Of the prediction.
    rounds : int
    """
    from scipy.linalg import solve_toeplitz

    reach = max(16 * order, 2 * (stop - start))
    first, last = max(start - reach, 0), min(stop + reach, len(waveform))
    x = waveform[first:last].double().numpy().copy()
    gap = slice(start - first, stop - first)
    x[gap] = 0.0
    for _ in range(rounds):
        if not x.any():
            break
        filter_ = np.concatenate([[1.0], -lpc.burg(x, order)[0]])
        b = np.correlate(filter_, filter_, "full")[order:]  # of the normal equations, by lag
        known = x.copy()
        known[gap] = 0.0
        right = -np.convolve(known, np.concatenate([b[:0:-1], b]), "same")[gap]
        column = np.pad(b, (0, max(len(right) - len(b), 0)))[: len(right)]
        x[gap] = solve_toeplitz(column, right)
    filled = waveform.float().clone()
    filled[start:stop] = torch.from_numpy(x[gap]).float().clamp(-1, 1)
    return filled


def _load(runner: Engine, states: list[dict[str, Tensor]]) -> None:
    for n, state in enumerate(states):
        runner.load_state(n, state)


def _conditioner(
    model: AutoregressiveModel, waveform: Tensor, start: int, stop: int, features: Tensor | None
) -> Conditioner:
    """Return the conditioning of a recording, in which the gap is not heard."""
    config = model.config.mel
    if features is None and isinstance(config, MelConfig):
        features = gap_features(waveform, [(start, stop)], config)[:-1]
    frames = check_mel(features, config)
    if frames and config and frames[0].shape[1] < len(waveform) // config.hop_length:
        raise WavearError(
            f"there are {frames[0].shape[1]} frames of features, and the recording has"
            f" {len(waveform) // config.hop_length}: make them of all of it"
        )
    return Conditioner(model, frames, None)


def gap_features(waveform: Tensor, gaps: list[tuple[int, int]], config: MelConfig) -> Tensor:
    """Return the mel of a recording in which no gap is heard, and a mask.

    Frames that a gap touches are interpolated between those on both sides.

    Parameters
    ----------
    waveform : Tensor, shape (T,)
    gaps : list of (start, stop)
        In samples, at least a window apart.
    config : MelConfig

    Returns
    -------
    Tensor, shape (M + 1, F), F = T / hop rounded up
        The last channel is 1 in the frames that are interpolated, else 0.

    Raises
    ------
    WavearError
        If a gap is not a part of the recording, or touches every frame.
    """
    hop, (left, right) = config.hop_length, config.window_span
    missing = -len(waveform) % hop
    mel = log_mel(torch.nn.functional.pad(waveform.float(), (0, missing))[None], config)[0]
    frames = mel.shape[1]
    mask = torch.zeros(1, frames)
    for start, stop in gaps:
        if not 0 <= start < stop <= len(waveform):
            a, b, c = (n / config.sample_rate for n in (start, stop, len(waveform)))
            raise WavearError(f"the gap is {a:g} to {b:g} s of {c:g} s: it must be a part of it")
        # Frame f hears the samples from f * hop - left to f * hop + right.
        before, after = math.floor((start - right) / hop), math.ceil((stop + left) / hop)
        known = [f for f in (before, after) if 0 <= f < frames]
        if not known:
            raise WavearError(f"the gap touches all of {frames} frames: the recording is too short")
        first, last = mel[:, known[0]], mel[:, known[-1]]
        share = torch.linspace(0, 1, after - before + 1)[None]
        within = slice(max(before + 1, 0), min(after, frames))
        values = torch.lerp(first[:, None], last[:, None], share)[:, 1:-1]
        mel[:, within] = values[:, within.start - before - 1 :][:, : within.stop - within.start]
        mask[:, within] = 1
    return torch.cat([mel, mask])
