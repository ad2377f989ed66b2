"""Linear prediction from a mel, without training: envelope -> autocorrelation -> coefficients.

A mel is a smoothed power spectrum. Its inverse Fourier transform is an autocorrelation, and the
predictor that fits an autocorrelation best is the solution of the normal equations (Makhoul, 1975,
"Linear prediction: a tutorial review"). With x the samples of the past:

    p[t] = -sum over k = 1 .. P of a[k] x[t - k]        prediction
    e[t] = (x[t] - p[t]) / s[t]                         residual, of about unit scale
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig, mel_filter_bank

LAG_WINDOW_HZ = 40.0
"""Width of the Gaussian that smooths the spectrum, so that harmonics are not predicted."""
WHITE_NOISE = 1e-4
"""Share of the power that is added: limits the envelope (and the coefficients) to 40 dB."""
TOP_FALL = 2.0
"""Nats of amplitude that the envelope falls by between the centre of the last band and half of the
sample rate."""
LEAST_SCALE = 2.0**-15
"""A step of the 16-bit grid: the least scale of the residual."""
ROUNDING_POWER = LEAST_SCALE**2 / 12
"""Power of the noise of rounding to 16 bits."""
LEAST_LOG_DENSITY = -32.0
"""Nats of power: -139 dB of full scale per bin."""
_LEAST_PLAIN = 1e-10  # of a mel without a logarithm, before one is taken


class Tables(NamedTuple):
    """Constants that turn bands into bins of the spectrum, and bins into lags."""

    low: Tensor
    """(bins,), int64: the band below each bin."""
    high: Tensor
    """(bins,), int64: the band above it."""
    weight: Tensor
    """(bins,): weight of the band below."""
    offset: Tensor
    """(bins,): added to the log-power."""
    cosines: Tensor
    """(bins, P + 1)."""


class Envelope:
    """Turns log-mels of one `MelConfig` into autocorrelations.

    Parameters
    ----------
    config : MelConfig
    order : int
        Coefficients P.

    Raises
    ------
    WavearError
        If a mel band contains no bin of the Fourier transform, so that there is no envelope.
    """

    def __init__(self, config: MelConfig, order: int):
        self.config, self.order = config, order
        self.tables = _tables(config, order)

    def autocorrelation(self, mel: Tensor) -> Tensor:
        """Return lags 0 to P, (B, P + 1, F), float64, of mels (B, M, F), in full scale squared."""
        low, high, weight, offset, cosines = (table.to(mel.device) for table in self.tables)
        factor, shift = self.log_power
        density = (self.logarithm(mel).double() - shift) * factor
        spectrum = density[:, low] * weight[:, None] + density[:, high] * (1 - weight)[:, None]
        return cosines.T @ (spectrum + offset[:, None]).clamp(min=LEAST_LOG_DENSITY).exp()

    def logarithm(self, mel: Tensor) -> Tensor:
        """Return the mel itself if it is logarithmic, otherwise its logarithm."""
        if self.config.log_base != "none":
            return mel
        least = max(self.config.floor, _LEAST_PLAIN)
        return ((mel - self.config.shift) / self.config.scale).clamp(min=least).log()

    @property
    def log_power(self) -> tuple[float, float]:
        """(factor, shift): the log-power of a band is factor * (logarithm - shift)."""
        config = self.config
        if config.log_base == "none":
            return 2 / config.power, 0.0
        bases = {"e": 1.0, "10": math.log(10), "db": math.log(10) * config.power / 20}
        return bases[config.log_base] * 2 / config.power / config.scale, config.shift


@functools.lru_cache(maxsize=8)
def _tables(config: MelConfig, order: int) -> Tables:
    filters = mel_filter_bank(config).numpy()
    area = filters.sum(1)
    if (area == 0).any():
        raise WavearError(
            f"mel band {int(np.argmin(area))} of {config.bands} holds no bin of an n_fft of "
            f"{config.n_fft}, so there is no spectral envelope: use a larger n_fft or fewer bands"
        )
    bins = np.arange(config.n_fft // 2 + 1)
    centres = (filters * bins).sum(1) / area
    # Linear interpolation of the logarithms between the centres of the bands, as numpy.interp.
    low = np.clip(np.searchsorted(centres, bins, side="right") - 1, 0, max(config.bands - 2, 0))
    high = np.minimum(low + 1, config.bands - 1)
    gap = np.where(high > low, centres[high] - centres[low], 1.0)
    weight = 1 - np.clip((bins - centres[low]) / gap, 0.0, 1.0)
    # Band value = sum of W |X|^power over its bins: divided by the area it is a mean over bins.
    log_area = np.log(area)
    offset = -(weight * log_area[low] + (1 - weight) * log_area[high]) * 2 / config.power
    top = int(centres[-1])
    offset[top:] -= 2 * TOP_FALL * (bins[top:] - top) / max(bins[-1] - top, 1)
    offset -= math.log(_window_energy(config))
    # Power per bin -> autocorrelation: the inverse transform of the symmetric spectrum, and the lag
    # window.
    share = np.full(len(bins), 2.0 / config.n_fft)
    share[0] /= 2
    if config.n_fft % 2 == 0:
        share[-1] /= 2
    lags = np.arange(order + 1)
    cosines = np.cos(2 * np.pi * np.outer(bins, lags) / config.n_fft) * share[:, None]
    cosines *= np.exp(-0.5 * (2 * np.pi * LAG_WINDOW_HZ * lags / config.sample_rate) ** 2)
    bands = (low.astype(np.int64), high.astype(np.int64))
    return Tables(*map(torch.from_numpy, (*bands, weight, offset, np.ascontiguousarray(cosines))))


def _window_energy(config: MelConfig) -> float:
    """Sum of the window's squares: a bin's power over it is the power density of the waveform."""
    from wavear.mel.spectrogram import filters_and_window

    return float(filters_and_window(config, torch.device("cpu"), torch.float64)[1].square().sum())


def predictor(autocorrelation: Tensor, gain: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Solve for the prediction of each frame or sub-frame.

    Parameters
    ----------
    autocorrelation : Tensor, shape (B, P + 1, F), float64
    gain : float or Tensor
        Factor on the residual's scale.

    Returns
    -------
    Tensor, shape (B, F, P), float32: a[1] to a[P]
    Tensor, shape (B, F), float32: the scale s of the residual, at least `LEAST_SCALE`
    """
    r = autocorrelation.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    # As tensors: an exported graph has plain numbers in float32, which moves the coefficients.
    raised, rounding = (torch.tensor(x, dtype=r.dtype) for x in (1 + WHITE_NOISE, ROUNDING_POWER))
    r[..., 0] = r[..., 0] * raised + rounding
    a, error = levinson(r)
    return a[..., 1:].float(), (error.sqrt() * gain).clamp(min=LEAST_SCALE).float()


def levinson(r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of autocorrelations by the Levinson-Durbin recursion.

    On the CPU in compiled code, row by row: a row has the same bits in any batch.

    Parameters
    ----------
    r : Tensor, shape (..., P + 1), float64

    Returns
    -------
    Tensor, shape (..., P + 1): the predictor's coefficients a, a[0] = 1
    Tensor, shape (...): the power of the prediction's error

    Examples
    --------
    >>> a, error = levinson(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    >>> a.tolist(), error.item()
    ([1.0, -0.5, -0.0], 0.75)
    """
    if r.device.type == "cpu" and not torch.compiler.is_exporting():
        rows = r.reshape(-1, r.shape[-1]).contiguous().numpy()
        a, error = np.empty_like(rows), np.empty(len(rows))
        _compiled_levinson()(rows, a, error)
        return torch.from_numpy(a).view(r.shape), torch.from_numpy(error).view(r.shape[:-1])
    a = torch.zeros_like(r)
    a[..., 0] = 1
    error = r[..., 0].clone()
    for i in range(1, r.shape[-1]):
        k = -(a[..., :i] * r[..., 1 : i + 1].flip(-1)).sum(-1) / error
        a[..., 1 : i + 1] += k[..., None] * a[..., :i].flip(-1)
        error = error * (1 - k * k)
    return a, error


def _levinson(r, a, error):
    """`levinson` of each row, written out."""
    order = r.shape[1] - 1
    for row in range(r.shape[0]):
        left = r[row, 0]
        a[row, :] = 0.0
        a[row, 0] = 1.0
        for i in range(1, order + 1):
            total = 0.0
            for j in range(i):
                total += a[row, j] * r[row, i - j]
            k = -total / left
            for j in range(1, i // 2 + 1):
                low, high = a[row, j], a[row, i - j]
                a[row, j] = low + k * high
                a[row, i - j] = high + k * low
            a[row, i] = k
            left *= 1 - k * k
        error[row] = left


@functools.cache
def _compiled_levinson() -> Any:
    from wavear.common.compiled import compiled

    return compiled(_levinson, "void(float64[:, ::1], float64[:, ::1], float64[::1])")
