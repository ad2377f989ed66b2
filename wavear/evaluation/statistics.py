"""Means over clips, and how far they can be trusted: the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds 95 % of the means of resampled clips."""

    mean: float
    low: float | None
    high: float | None
    """None for fewer than two clips, which say nothing about others."""
    clips: int

    def to_dict(self) -> dict[str, float | None]:
        """As JSON can hold it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "clips": self.clips}


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over clips with its percentile interval: clips are drawn with replacement, as many as there are.

    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.) It says how the mean
    would vary with other clips of the kind; not with another seed of the generation or of the
    training.

    Parameters
    ----------
    values : sequence of float
        One per clip, at least one.
    weights : sequence of float, optional
        Weight of each clip (its samples, say), resampled with it.
    resamples, seed : int

    Examples
    --------
    >>> bootstrap([1.0, 2.0, 3.0], [1, 1, 2]).mean
    2.25
    >>> bootstrap([5.0, 5.0]).to_dict()
    {'mean': 5.0, 'low': 5.0, 'high': 5.0, 'clips': 2}
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    mean = float((x * w).sum() / w.sum())
    if len(x) < 2:
        return Interval(mean, None, None, len(x))
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    means = (x * w)[draws].sum(1) / w[draws].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), len(x))
