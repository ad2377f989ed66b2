"""Means over clips with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds 95 % of the means of resampled clips."""

    mean: float
    low: float | None
    high: float | None
    """None for fewer than two clips."""
    clips: int

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields for JSON."""
        return asdict(self)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean over clips with its percentile interval, by `scipy.stats.bootstrap`.

    Clips are drawn with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13). The interval shows how the mean would vary with other clips of the kind, not with
    another seed of the generation or of the training.

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
    from scipy.stats import bootstrap as resample

    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    mean = float(np.average(x, weights=w))
    if len(x) < 2:
        return Interval(mean, None, None, len(x))
    found = resample(
        (x, w),
        lambda x, w, axis: (x * w).sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(x))
