"""Fit what the loss does not train: mel statistics, and a predictive WaveNet's scale and period."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import torch

from wavear.audio.periods import measure_period
from wavear.common.log import get_logger
from wavear.data.crops import Batch, Layout, Segments, collate, mel_of
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import inputs
from wavear.models.period import period_loss
from wavear.models.prediction import LEAST_SCALE
from wavear.models.predictive import PredictiveWaveNet

logger = get_logger(__name__)

_STATISTICS_CROPS = 64  # random crops whose mels give each band's mean and deviation
_MEAN_RESIDUAL = 0.6  # mean of |e|: it brings a logistic mixture of scale 1 about to its middle
_GAIN_CROPS = 32

# The period network
_CROPS, _CROP_SECONDS = 300, 1.0  # random crops whose periods are measured
_STEPS, _ROWS, _FRAMES = 1500, 16, 64
_RATE, _WARMUP = 3e-3, 50
_QUARTERS = np.array([1, 3, 5, 7]) / 8  # of a frame: the middles of the blocks that are measured
_WINDOW_SECONDS = 512 / 22050
_GROSS = 0.05  # a larger relative error of a lag is a gross error
_VOICED = 0.7  # correlation above which a frame counts as voiced


def prepare(model: AutoregressiveModel, segments: Segments, seed: int) -> None:
    """Fit what the loss does not train, in place, on random crops of the training data.

    The crops follow the seed of `segments`; `seed` is of the period network.
    """
    if segments.layout.mel is None or getattr(model, "conditioning", None) is None:
        return
    fit_mel_statistics(model, segments)
    if isinstance(model, PredictiveWaveNet):
        fit_period(model, segments, seed)
        fit_gain(model, segments)


@torch.no_grad()
def fit_mel_statistics(model: AutoregressiveModel, segments: Segments) -> None:
    """Set the mean and deviation by which the model normalises mel bands, from random crops."""
    layout = segments.layout
    frames = []
    for index in range(_STATISTICS_CROPS):
        batch = collate([segments[index]])
        count = math.ceil((batch.span[0, 1] // layout.hop).item())
        frames.append(mel_of(batch, layout)[0, :, layout.lookback : layout.lookback + count])
    mels = torch.cat(frames, dim=1).double()
    conditioning: Any = model.conditioning
    conditioning.mel_mean.copy_(mels.mean(1))
    conditioning.mel_deviation.copy_(mels.std(1).clamp(min=0.1))


@torch.no_grad()
def fit_gain(model: PredictiveWaveNet, segments: Segments) -> None:
    """Set the factor on the residual's scale that makes the mean of |e| 0.6 in training data."""
    gain = model.conditioning.gain
    gain.fill_(1.0)
    total, count = 0.0, 0
    for index in range(_GAIN_CROPS):
        codes, cond, mask = inputs(model, collate([segments[index]]), segments.layout)
        residual, scale = model.residuals(codes, cond)
        used = mask & (scale > 2 * LEAST_SCALE)  # digital silence has no scale to fit
        total += float(residual[used].abs().clamp(max=15).sum())
        count += int(used.sum())
    if count:
        gain.fill_(min(max(total / count / _MEAN_RESIDUAL, 1e-3), 1e3))


def fit_period(model: PredictiveWaveNet, segments: Segments, seed: int) -> None:
    """Train the network for lag and voicing on periods measured in random crops; log its errors."""
    began = time.monotonic()
    network, config = model.conditioning.period, model.config
    mels, log_lags, correlations = _measured(model, segments)
    held = max(len(mels) // 20, 1)
    context = network.context
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network.requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        for step in range(_STEPS):
            rows = random.integers(held, len(mels), _ROWS)
            starts = random.integers(0, log_lags.shape[1] - _FRAMES + 1, _ROWS)
            pairs = list(zip(rows, starts, strict=True))
            mel = torch.stack([mels[r, :, s : s + _FRAMES + context] for r, s in pairs])
            lag, correlation = (
                torch.stack([x[r, s : s + _FRAMES] for r, s in pairs])
                for x in (log_lags, correlations)
            )
            logits, voicing = network(mel)
            loss = period_loss(logits, voicing, lag, correlation, network.grid)
            cosine = 0.5 * (1 + math.cos(math.pi * step / _STEPS))
            optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARMUP) * cosine
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.requires_grad_(False)
    with torch.no_grad():
        found, _ = network.track(mels[:held])
    voiced = correlations[:held] > _VOICED
    off = (found - log_lags[:held])[voiced].abs()
    if off.numel():
        cents = float(off.median()) * 1200 / math.log(2)
        gross = float((off > math.log1p(_GROSS)).float().mean())
        quality = f"median error {cents:.1f} cents, {gross:.1%} of voiced frames off by over 5%"
    else:
        quality = "no voiced frame in the held-out crops"
    rate, shortest, longest = config.sample_rate, config.shortest_period, config.longest_period
    logger.info(
        f"period network: {quality} (lags of {shortest} to {longest} samples, {rate / longest:.0f}"
        f" to {rate / shortest:.0f} Hz; {time.monotonic() - began:.0f} s)"
    )


def _measured(
    model: PredictiveWaveNet, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normalised mels (n, M, F + context), log lags and correlations (n, F) of crops."""
    layout, config, network = segments.layout, model.config, model.conditioning.period
    window = round(_WINDOW_SECONDS * config.sample_rate)
    before = network.context if config.causal else network.context // 2
    around = (
        math.ceil((window // 2 + config.longest_period + layout.hop) / layout.hop) + network.context
    )
    frames = max(math.ceil(_CROP_SECONDS * config.sample_rate / layout.hop), _FRAMES)
    wider = dataclasses.replace(
        layout,
        segment=frames * layout.hop,
        context=0,
        receptive_field=0,
        lookback=around,
        lookahead=around,
    )
    crops = Segments(segments.recordings, wider, list(segments.speakers), segments.seed)
    rows = [_measure(collate([crops[i]]), crops.layout, window, config) for i in range(_CROPS)]
    mels, lags, correlations = (torch.stack(column) for column in zip(*rows, strict=True))
    last = mels.shape[2] - around + network.context - before
    return model.conditioning.normalised(mels)[:, :, around - before : last], lags, correlations


def _measure(
    batch: Batch, layout: Layout, window: int, config: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mel (M, frames + 2 * around), log lag and correlation (frames,) of one crop."""
    own = mel_of(batch, layout)[0]
    block = max(layout.hop // len(_QUARTERS), 1)
    lags, correlation = measure_period(
        batch.waveform[0].numpy(), config.shortest_period, config.longest_period, block, window
    )
    frames = layout.window // layout.hop
    places = layout.margin + (np.arange(frames)[:, None] + _QUARTERS) * layout.hop
    at = np.minimum((places / block).astype(int), len(lags) - 1)
    log_lag = np.log(lags[at[:, 1:-1]].mean(1))
    live = np.arange(frames) * layout.hop < int(batch.span[0, 1])  # there is no sound after the end
    voicing = correlation[at].mean(1) * live.astype(np.float32)
    return own, torch.from_numpy(log_lag).float(), torch.from_numpy(voicing).float()
