"""Train by the free run: the energy distance between spectra of generated and recorded audio.

The likelihood judges one sample after the true past. In the free run the past is the model's own,
and small errors of it grow. So two stretches y, y' are generated independently from the past and
the mel of a recorded stretch x, and

    2 times the mean of d(x, y) - d(y, y')

is made small, where d compares spectra. Its mean is least where generated spectra are distributed
as the recorded ones: the second term keeps the model from giving the same average every time
(Gritsenko et al., 2020, "A Spectral Energy Distance for Parallel Speech Synthesis",
https://arxiv.org/abs/2008.01160).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wavear.data.crops import Batch, Layout
from wavear.models.crop_loss import inputs
from wavear.models.predictive import PredictiveWaveNet
from wavear.models.rollout import past_of, rollout

STRETCH = 256
"""Samples through which gradients pass; a crop is divided into such stretches."""
WINDOWS = (4, 9, 17, 35)
"""Milliseconds of the Fourier windows, with a hop of a quarter: at 22.05 kHz 88 to 772 samples."""
_FLOOR = 1e-4  # added to magnitudes: noise of 16-bit samples is 1e-5
_FLOOR_OF_LEVEL = 1e-3  # likewise, in proportion to the recording's level


def window_lengths(rate: int) -> list[int]:
    """Return `WINDOWS` in samples, multiples of 4.

    Examples
    --------
    >>> window_lengths(22050)
    [88, 200, 376, 772]
    """
    return [round(milliseconds * rate / 4000) * 4 for milliseconds in WINDOWS]


def spectra(waveform: Tensor, lengths: list[int]) -> list[Tensor]:
    """Return the magnitudes (B, n, bins) of a waveform (B, T) for each length of window up to T.

    White noise of deviation 1 has a mean square of 1 in them.
    """
    found = []
    for length in (n for n in lengths if n <= waveform.shape[1]):
        window = torch.hann_window(length, device=waveform.device)
        frames = waveform.unfold(1, length, length // 4) * window
        found.append(torch.fft.rfft(frames).abs() / window.square().sum().sqrt())
    return found


def spectral_difference(a: list[Tensor], b: list[Tensor], floor: Tensor) -> Tensor:
    """Return the mean difference (B,) of two `spectra`: of logarithms, and relative to the level.

    `floor` (B,) is added to the magnitudes before the logarithm.
    """
    total = torch.zeros_like(floor)
    least = floor[:, None, None]
    for p, q in zip(a, b, strict=True):
        total = total + ((p + least).log() - (q + least).log()).abs().mean((1, 2))
        level = (p + q).detach().mean((1, 2)).clamp(min=_FLOOR)
        total = total + (p - q).abs().mean((1, 2)) / level
    return total / len(a)


def energy_distance(recorded: Tensor, first: Tensor, second: Tensor, rate: int) -> Tensor:
    """Return d(x, y) + d(x, y') - d(y, y') of waveforms (B, T) at `rate` Hz: (B,)."""
    lengths = window_lengths(rate)
    level = recorded.square().mean(1).sqrt().clamp(min=1e-3)
    floor = level * _FLOOR_OF_LEVEL + _FLOOR
    x, y, z = (spectra(waveform, lengths) for waveform in (recorded, first, second))
    return (
        spectral_difference(x, y, floor)
        + spectral_difference(x, z, floor)
        - spectral_difference(y, z, floor)
    )


def free_run_losses(
    model: PredictiveWaveNet, batch: Batch, layout: Layout, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the mean energy distance over crops of one stretch after the other.

    The first follows the recording, each other one the generated stretch before it, whose gradient
    has then been taken: so each needs the memory of one stretch. Their sum, each weighted by its
    length, is the loss of the batch. Crops that end before their window are left out.
    """
    with torch.no_grad():
        codes, cond, mask = inputs(model, batch, layout)
    recorded = model.value(codes)
    whole = mask[:, -1].float()
    begin, rate = layout.context, layout.sample_rate
    longest = min(max(window_lengths(rate)), begin)
    past = past_of(model, codes[:, :begin], cond[:, :, :begin]).twice()
    heard = recorded[:, begin - longest : begin]
    heard = torch.cat([heard, heard])
    for start in range(begin, layout.window, STRETCH):
        stop = min(start + STRETCH, layout.window)
        _, cond, _ = inputs(model, batch, layout)  # its gradient is taken with each stretch
        made, after = rollout(model, past, cond[:, :, start:stop].repeated(2), generator)
        joined = torch.cat([heard, made], dim=1)
        first, second = joined.chunk(2)
        distance = energy_distance(recorded[:, start - longest : stop], first, second, rate)
        yield (distance * whole).mean() * (stop - start) / layout.segment
        past, heard = after, joined.detach()[:, -longest:]
