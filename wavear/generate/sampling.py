"""Uniforms, and logits + one uniform -> one code."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words from each value of its counter


def uniforms(seed: int, start: int, count: int) -> np.ndarray:
    """The uniforms of samples `start` to `start + count` of the utterance with this seed.

    They come from NumPy's Philox4x64 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function
    of key and counter: sample t of a seed has its uniform whatever was drawn before, in whatever chunks.

    Parameters
    ----------
    seed : int, 0 to 2**64 - 1
    start : int
        Index of the first sample, 0 or more.
    count : int

    Returns
    -------
    ndarray of float64, shape (count,), in [0, 1), multiples of 2**-53

    Examples
    --------
    >>> bool((uniforms(7, 0, 10)[3:] == uniforms(7, 3, 7)).all())
    True
    """
    block, offset = divmod(start, _PER_BLOCK)
    words = np.random.Philox(key=seed, counter=block).random_raw(offset + count)[offset:]
    return (words >> np.uint64(11)) * 2.0**-53


def probabilities(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last axis, in float64.

    Parameters
    ----------
    logits : Tensor, shape (..., Q)
    temperature : float or Tensor that broadcasts against (..., 1)
        Above 0. Below 1 the likely codes become likelier (duller, cleaner), above 1 less so (livelier, noisier).
    """
    return torch.softmax(logits.double() / temperature, dim=-1)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Inverse-CDF sampling: the smallest code whose cumulative probability exceeds `uniform`.

    Parameters
    ----------
    logits : Tensor, shape (B, Q)
    uniform : Tensor of float64, shape (B,), in [0, 1)
    temperature : float, or Tensor of shape (B,)

    Returns
    -------
    Tensor of int64, shape (B,)

    Examples
    --------
    >>> sample(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75], dtype=torch.float64))
    tensor([1])
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    cumulative = probabilities(logits, temperature).cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]  # the sum is one up to rounding; so no code is out of reach
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
