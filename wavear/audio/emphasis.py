"""Pre-emphasis: the model's codes are of y[t] = x[t] - a x[t-1], and what it makes is x[t] = y[t] + a x[t-1].

The rounding of the codes is noise that is as strong at every frequency. Taking the emphasis off
again makes its amplitude 1 / |1 - a exp(-iw)|, louder below and softer above, where speech is soft
and the noise is heard. (Makhoul and Berouti, "Adaptive noise spectral shaping and entropy coding in
predictive coding of speech", 1979; with mu-law codes in LPCNet, Valin and Skoglund, 2019,
https://arxiv.org/abs/1810.11846, section 3.1, a = 0.85.)

Everything else in wavear is of x: mels, levels, measures. Codes alone, and so bits and
log-probabilities, are of y.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def coefficient(config: Any) -> float:
    """Of a model's configuration; 0 for those that know none."""
    return float(getattr(config, "pre_emphasis", 0.0))


def emphasised(waveform: Tensor, a: float, before: Tensor | None = None) -> Tensor:
    """What the codes are of: x[t] - a x[t-1]. It may leave [-1, 1], where the codes end.

    Parameters
    ----------
    waveform : Tensor, shape (..., T), floating point
    a : float
        0 leaves the waveform as it is.
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
    """The way back, in pieces of any length: in float64, sample by sample, so that pieces are to the bit the whole.

    Parameters
    ----------
    a : float
    memory : float
        The last sample so far, before it was clipped to [-1, 1].

    Examples
    --------
    >>> back = Deemphasis(0.5)
    >>> back(torch.tensor([0.5, 0.25])), back(torch.tensor([-0.25]))
    (tensor([0.5000, 0.5000]), tensor([0.]))
    """

    def __init__(self, a: float, memory: float = 0.0):
        self.a, self.memory = a, memory

    def __call__(self, decoded: Tensor) -> Tensor:
        """What the next decoded codes (T,) sound like: (T,), float32 in [-1, 1]."""
        if self.a == 0 or not decoded.numel():
            return decoded
        from scipy.signal import lfilter

        # Direct form II transposed: x[t] = y[t] + z, z = a x[t], the same two operations wherever a
        # piece begins.
        given = decoded.detach().cpu().numpy().astype(np.float64)
        made: Any = lfilter([1.0], [1.0, -self.a], given, zi=np.array([self.a * self.memory]))[0]
        self.memory = float(made[-1])
        return torch.from_numpy(made.astype(np.float32)).clamp(-1.0, 1.0)
