"""Pre-emphasis: codes are of y[t] = x[t] - a x[t-1], and the output is x[t] = y[t] + a x[t-1].

The rounding of the codes is white noise. De-emphasis shapes its amplitude by 1 / |1 - a exp(-iw)|:
louder at low frequencies and quieter at high ones, where speech is weak and noise is audible.
(Makhoul and Berouti, "Adaptive noise spectral shaping and entropy coding in predictive coding of
speech", 1979; with mu-law codes in LPCNet, Valin and Skoglund, 2019,
https://arxiv.org/abs/1810.11846, section 3.1, a = 0.85.)

Mels, levels and measures are of x. Only codes, and so bits and log-probabilities, are of y.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def coefficient(config: Any) -> float:
    """Return a model configuration's coefficient; 0 if it has no such field."""
    return float(getattr(config, "pre_emphasis", 0.0))


def emphasised(waveform: Tensor, a: float, before: Tensor | None = None) -> Tensor:
    """Return x[t] - a x[t-1], which the codes represent. It may exceed [-1, 1].

    Parameters
    ----------
    waveform : Tensor, shape (..., T), floating point
    a : float
        0 returns the waveform itself.
    before : Tensor, shape (...), optional
        The sample before the first; 0 if None.

    Examples
    --------
    >>> emphasised(torch.tensor([0.5, 0.5, 0.0]), 0.5)
    tensor([ 0.5000,  0.2500, -0.2500])
    """
    if a == 0:
        return waveform
    first = torch.zeros_like(waveform[..., 0]) if before is None else before
    return waveform - a * torch.cat([first[..., None], waveform[..., :-1]], dim=-1)


class Deemphasis:
    """Undo `emphasised` in pieces of any length; the pieces equal the whole bit for bit.

    Parameters
    ----------
    a : float
    memory : float
        The previous output sample, before it was clipped to [-1, 1].

    Examples
    --------
    >>> back = Deemphasis(0.5)
    >>> back(torch.tensor([0.5, 0.25])), back(torch.tensor([-0.25]))
    (tensor([0.5000, 0.5000]), tensor([0.]))
    """

    def __init__(self, a: float, memory: float = 0.0):
        self.a, self.memory = a, memory

    def __call__(self, decoded: Tensor) -> Tensor:
        """Return the output (T,), float32 in [-1, 1], for the next decoded codes (T,)."""
        if self.a == 0 or not decoded.numel():
            return decoded
        from scipy.signal import lfilter

        # Direct form II transposed in float64: x[t] = y[t] + z, z = a x[t], the same two operations
        # wherever a piece begins.
        y = decoded.detach().cpu().numpy().astype(np.float64)
        x: Any = lfilter([1.0], [1.0, -self.a], y, zi=np.array([self.a * self.memory]))[0]
        self.memory = float(x[-1])
        return torch.from_numpy(x.astype(np.float32)).clamp(-1.0, 1.0)
