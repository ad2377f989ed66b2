"""Uniforms, and logits + one uniform -> one code: the definition that every engine follows.

    logits --temperature--> probabilities --top_k--> the k likeliest --top_p--> the nucleus
    --inverse CDF--> code

In this order; each step sees the result of the one before, renormalised. Of codes of equal logits
the lower one ranks as the likelier. The inverse CDF runs through the remaining codes in their own
order, so a neighbouring uniform gives a neighbouring sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_PER_BLOCK = 4  # Philox4x64 makes four 64-bit words from each value of its counter


def uniforms(seed: int, start: int, count: int) -> np.ndarray:
    """Return the uniforms of samples `start` to `start + count` of the utterance with this seed.

    They come from NumPy's Philox4x64 (Salmon et al., 2011, "Parallel random numbers: as easy as 1,
    2, 3"), a function of key and counter: sample t of a seed has the same uniform, in whatever
    chunks it is drawn.

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


def systematic(weights: np.ndarray, uniform: float) -> np.ndarray:
    """Draw streams in proportion to their weights, by systematic resampling (Kitagawa, 1996).

    One uniform number places all of them. Returns the streams (N,), in their order.

    Examples
    --------
    >>> systematic(np.array([1.0, 2.0, 1.0, 0.0]), 0.5).tolist()
    [0, 1, 1, 2]
    """
    places = (uniform + np.arange(len(weights))) / len(weights)
    return np.searchsorted(np.cumsum(weights / weights.sum())[:-1], places, side="right")


def kept(
    probabilities: Tensor, logits: Tensor, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return which codes truncation keeps.

    Parameters
    ----------
    probabilities, logits : Tensor, shape (..., Q)
        The likelier code is the one of the larger logit, or of equal ones the lower code.
    top_k : int, optional
        Keep the k likeliest codes.
    top_p : float, optional
        Of these, keep the smallest set of likeliest codes whose share of their probability is
        `top_p` or more (Holtzman et al., 2020, "The curious case of neural text degeneration").

    Returns
    -------
    Tensor of bool, shape (..., Q)
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    ranked = probabilities.gather(-1, order)
    stays = torch.ones_like(ranked, dtype=torch.bool)
    if top_k is not None:
        stays[..., top_k:] = False
    if top_p is not None:
        cumulative = torch.where(stays, ranked, 0.0).cumsum(dim=-1)
        # A code stays if those before it have not reached the share yet.
        stays &= F.pad(cumulative[..., :-1], (1, 0)) < top_p * cumulative[..., -1:]
    return torch.zeros_like(stays).scatter(-1, order, stays)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw the smallest code whose cumulative probability exceeds `uniform` (inverse CDF).

    Parameters
    ----------
    logits : Tensor, shape (B, Q)
    uniform : Tensor of float64, shape (B,), in [0, 1)
    temperature : float, or Tensor of shape (B,)
        Divides the logits; above 0. Below 1 likely codes become likelier (duller, cleaner), above 1
        less so (livelier, noisier).
    top_k, top_p : optional
        See `kept`. A `top_k` of 1 is the argmax.

    Returns
    -------
    Tensor of int64, shape (B,)

    Examples
    --------
    >>> sample(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75], dtype=torch.float64))
    tensor([1])
    >>> sample(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0.1], dtype=torch.float64), top_k=1)
    tensor([1])
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    weights = torch.softmax(logits.double() / temperature, dim=-1)
    if top_k is not None or top_p is not None:
        weights = torch.where(kept(weights, logits, top_k, top_p), weights, 0.0)
    cumulative = weights.cumsum(dim=-1)
    # The sum is one up to rounding: scale the uniform, so that every code can be drawn.
    threshold = uniform[:, None] * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Where rounding leads beyond the sum, take the last code that has any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(codes, last)
