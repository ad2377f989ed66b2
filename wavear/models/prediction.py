"""Linear prediction from a mel, nothing trained: spectral envelope -> autocorrelation -> coefficients and scale.

A mel is a smoothed power spectrum. Its inverse Fourier transform is an autocorrelation, and the
predictor that fits an autocorrelation best is the solution of the normal equations (Makhoul, 1975,
"Linear prediction: a tutorial review"). With x the samples of the past:

    p[t] = -sum over k = 1 .. P of a[k] x[t - k]        prediction
    e[t] = (x[t] - p[t]) / s[t]                         residual, of about unit scale
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.mel.spectrogram import MelConfig, mel_filter_bank

LAG_WINDOW_HZ = 40.0
"""Width of the Gaussian that smooths the spectrum: harmonics that a fine mel resolves are not to be predicted."""
WHITE_NOISE = 1e-4
"""Of the power, added to it: limits the range of the envelope to 40 dB below its mean (and the coefficients)."""
TOP_FALL = 2.0
"""Nats of amplitude that the envelope falls by between the centre of the last band and half of the sample rate."""
LEAST_SCALE = 2.0**-15
"""A step of the 16-bit grid: the least scale of the residual."""
_ROUNDING_POWER = LEAST_SCALE**2 / 12  # of the noise that 16-bit samples have from their rounding
_LEAST_LOG_DENSITY = -32.0  # nats of power: -139 dB of full scale per bin
_LEAST_PLAIN = 1e-10  # of a mel without a logarithm, before one is taken


class Envelope:
    """Turns log-mels of one `MelConfig` into autocorrelations.

    Parameters
    ----------
    config : MelConfig
    order : int
        Coefficients P.

    Raises
    ------
    ValueError
        If the mel fixes no envelope: a band that holds no bin of the Fourier transform.
    """

    def __init__(self, config: MelConfig, order: int):
        self.config, self.order = config, order
        self._low, self._weight, self._offset, self._cosines = _tables(config, order)

    def autocorrelation(self, mel: Tensor) -> Tensor:
        """Return lags 0 to P, (B, P + 1, F), float64, of mels (B, M, F), in units of full scale squared."""
        low, weight, offset, cosines = (
            t.to(mel.device) for t in (self._low, self._weight, self._offset, self._cosines)
        )
        factor, shift = self._to_log_power
        density = (self.logarithm(mel).double() - shift) * factor
        below, above = density[:, low], density[:, (low + 1).clamp(max=self.config.bands - 1)]
        spectrum = (
            below * weight[:, None] + above * (1 - weight)[:, None] + offset[:, None]
        ).clamp(min=_LEAST_LOG_DENSITY)
        return cosines.T @ spectrum.exp()

    def logarithm(self, mel: Tensor) -> Tensor:
        """The mel itself, or if it is none its logarithm."""
        if self.config.log_base != "none":
            return mel
        value = ((mel - self.config.shift) / self.config.scale).clamp(
            min=max(self.config.floor, _LEAST_PLAIN)
        )
        return value.log()

    @property
    def _to_log_power(self) -> tuple[float, float]:
        """(factor, shift): the natural logarithm of a band's power is factor * (logarithm - shift)."""
        config = self.config
        if config.log_base == "none":
            return 2 / config.power, 0.0
        base = {"e": 1.0, "10": math.log(10), "db": math.log(10) * config.power / 20}[
            config.log_base
        ]
        return base * 2 / config.power / config.scale, config.shift

    @property
    def compiled(self) -> tuple[Any, ...]:
        """What `wavear.models.frame_kernel` takes: both bands, weights, logarithm, offset, cosines, floor."""
        low = self._low.numpy()
        high = np.minimum(low + 1, self.config.bands - 1)
        return (
            low,
            high,
            self._weight.numpy(),
            self._to_log_power,
            self._offset.numpy(),
            self._cosines.numpy(),
            _LEAST_LOG_DENSITY,
        )


@functools.lru_cache(maxsize=8)
def _tables(config: MelConfig, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower band of each bin, its weight, offset (bins,) from bands to bins; cosines (bins, P + 1) to lags."""
    filters = mel_filter_bank(config).numpy()
    area = filters.sum(1)
    if (area == 0).any():
        raise ValueError(
            f"mel band {int(np.argmin(area))} of {config.bands} holds no bin of an n_fft of {config.n_fft}, so the mel"
            " fixes no spectral envelope: use a larger n_fft or fewer bands"
        )
    bins = np.arange(config.n_fft // 2 + 1)
    centres = (filters * bins).sum(1) / area
    # Linear interpolation of the logarithms between the centres of the bands, as numpy.interp has
    # it.
    low = np.clip(np.searchsorted(centres, bins, side="right") - 1, 0, max(config.bands - 2, 0))
    high = np.minimum(low + 1, config.bands - 1)
    gap = np.where(high > low, centres[high] - centres[low], 1.0)
    weight = 1 - np.clip((bins - centres[low]) / gap, 0.0, 1.0)
    # Band value = sum of W |X|^power over its bins: divided by the area it is a mean over bins.
    log_area = np.log(area)
    offset = -(weight * log_area[low] + (1 - weight) * log_area[high]) * 2 / config.power
    top = int(centres[-1])
    offset[top:] -= 2 * TOP_FALL * (bins[top:] - top) / max(bins[-1] - top, 1)
    window = _window_energy(config)
    offset -= math.log(window)
    # Power per bin -> autocorrelation: the inverse transform of the symmetric spectrum, and the lag
    # window.
    share = np.full(len(bins), 2.0 / config.n_fft)
    share[0] /= 2
    if config.n_fft % 2 == 0:
        share[-1] /= 2
    lags = np.arange(order + 1)
    cosines = np.cos(2 * np.pi * np.outer(bins, lags) / config.n_fft) * share[:, None]
    cosines *= np.exp(-0.5 * (2 * np.pi * LAG_WINDOW_HZ * lags / config.sample_rate) ** 2)
    found = (low.astype(np.int64), weight, offset, np.ascontiguousarray(cosines))
    return tuple(torch.from_numpy(array) for array in found)  # type: ignore[return-value]


def _window_energy(config: MelConfig) -> float:
    """Sum of the squares of the window: the power of a bin over it is the power spectral density of the waveform."""
    from wavear.mel.spectrogram import _filters_and_window

    return float(_filters_and_window(config, torch.device("cpu"), torch.float64)[1].square().sum())


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
    r[..., 0] = r[..., 0] * (1 + WHITE_NOISE) + _ROUNDING_POWER
    a, error = levinson(r)
    return a[..., 1:].float(), (error.sqrt() * gain).clamp(min=LEAST_SCALE).float()


def levinson(r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of autocorrelations by the Levinson-Durbin recursion.

    On the CPU in compiled code: one row after the other, so that a row is the same to the bit
    whatever is beside it.

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
    if r.device.type == "cpu":
        rows = r.reshape(-1, r.shape[-1]).contiguous().numpy()
        a, error = np.empty_like(rows), np.empty(len(rows))
        _compiled_levinson()(rows, a, error)
        return torch.from_numpy(a).view(r.shape), torch.from_numpy(error).view(r.shape[:-1])
    order = r.shape[-1] - 1
    a = torch.zeros_like(r)
    a[..., 0] = 1
    error = r[..., 0].clone()
    for i in range(1, order + 1):
        k = -(a[..., :i] * r[..., 1 : i + 1].flip(-1)).sum(-1) / error
        a = torch.cat(
            [
                a[..., :1],
                a[..., 1:i] + k[..., None] * a[..., 1:i].flip(-1),
                k[..., None],
                a[..., i + 1 :],
            ],
            -1,
        )
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
