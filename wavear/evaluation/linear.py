"""A linear predictor as a law over codes: what a model has to beat to have learnt more than linear prediction.

The prediction of sample t is a weighted sum of the 32 samples before it, as the codes give them; the weights are the
least squares solution over the training recordings (normal equations, the covariance method). What it leaves over
follows a Laplace or a normal law of one scale, integrated over the interval of each code:

    P(c | past) = F((upper(c) - prediction) / scale) - F((lower(c) - prediction) / scale)

The intervals meet half a code from each code, the first and the last are open. Prediction is tried on the samples
themselves and on their companded values (mu-law's y, evenly spaced codes), each with both laws, the scale by maximum
likelihood; what is likeliest on the training recordings is taken. So it sees what the model sees and no more, and is
measured in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wavear.grid import Grid

ORDER = 32
_BLOCK = 2**18  # samples at once
_SCALE_SAMPLES = 200_000  # of the training recordings, for the scale
_RIDGE = 1e-9  # of the mean power, on the diagonal: for recordings that one frequency predicts

Domain = Literal["linear", "companded"]
Law = Literal["laplace", "normal"]


@dataclass(frozen=True)
class LinearPredictor:
    """The predictor and the law of its residual."""

    weights: np.ndarray
    """(order,), oldest sample first."""
    domain: Domain
    """Whether samples or companded values are predicted."""
    law: Law
    scale: float
    """Mean absolute residual (laplace) or deviation (normal), in units of full scale."""
    grid: Grid

    @classmethod
    def fit(cls, codes: Sequence[np.ndarray], grid: Grid, order: int = ORDER) -> LinearPredictor:
        """The likeliest of the four (on an even grid, which has no companded values, of the two) that fit these.

        Parameters
        ----------
        codes : sequence of arrays, shape (T_i,), integers in [0, Q)
        grid : Grid
        order : int
            Samples of the past.

        Raises
        ------
        ValueError
            If there are no samples.
        """
        from scipy.optimize import minimize_scalar

        if not sum(len(row) for row in codes):
            raise ValueError("there are no samples to fit a linear predictor to")
        candidates: list[tuple[float, LinearPredictor]] = []
        domains: tuple[Domain, ...] = ("linear", "companded") if grid.kind == "mulaw" else ("linear",)
        for domain in domains:
            table = _values(grid, domain)
            weights = _solve(codes, table, order)
            past, given = _sampled(codes, table, order)
            prediction = past @ weights
            spread = float(np.abs(table[given] - prediction).mean()) or 1e-6
            for law in ("laplace", "normal"):

                def bits(log_scale: float, fitted: Any = (prediction, given, domain, law)) -> float:
                    prediction, given, domain, law = fitted
                    return float(_bits(prediction, given, domain, law, math.exp(log_scale), grid).mean())

                middle = math.log(spread)
                found: Any = minimize_scalar(bits, bounds=(middle - 4, middle + 4), method="bounded")
                candidates.append((found.fun, cls(weights, domain, law, math.exp(found.x), grid)))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """-log2 P of every code given those before it; the first ones follow silence.

        Parameters
        ----------
        codes : array, shape (T,), integers in [0, Q)

        Returns
        -------
        array, shape (T,), float64
        """
        table, order = _values(self.grid, self.domain), len(self.weights)
        found = np.empty(len(codes))
        for start, stop, windows in _windows(codes, table, order):
            prediction = windows[:, :-1] @ self.weights
            found[start:stop] = _bits(prediction, codes[start:stop], self.domain, self.law, self.scale, self.grid)
        return found


def edges(grid: Grid, domain: Domain) -> np.ndarray:
    """Where the intervals of the codes meet, (Q + 1,): -inf, half way between codes 0 and 1 as the grid sees it...

    Examples
    --------
    >>> edges(Grid("mulaw", 4), "companded").round(3).tolist()
    [-inf, -0.667, 0.0, 0.667, inf]
    """
    if domain == "linear":
        return grid.edges()
    y = (np.arange(1, grid.classes) - 0.5) / (grid.classes - 1) * 2 - 1
    return np.concatenate([[-np.inf], y, [np.inf]])


def log_mass(lower: np.ndarray, upper: np.ndarray, law: Law) -> np.ndarray:
    """log(F(upper) - F(lower)) of the law of scale 1 (laplace: exp(-|x|) / 2; normal), exact in both tails."""
    flip = lower + upper > 0  # the laws are symmetric: everything is computed in the lower tail
    a, b = np.where(flip, -upper, lower), np.where(flip, -lower, upper)
    if law == "normal":
        from scipy.special import log_ndtr

        top = log_ndtr(b)
        return top + np.log(-np.expm1(np.minimum(log_ndtr(a) - top, -1e-300)))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        below = b - math.log(2) + np.log(-np.expm1(a - b))
        across = np.log(-(np.expm1(a) + np.expm1(-b)) / 2)
    return np.where(b <= 0, below, across)


def _bits(prediction: np.ndarray, codes: np.ndarray, domain: Domain, law: Law, scale: float, grid: Grid) -> np.ndarray:
    limits = edges(grid, domain)
    lower, upper = (limits[codes] - prediction) / scale, (limits[codes + 1] - prediction) / scale
    return -log_mass(lower, upper, law) / math.log(2)


def _values(grid: Grid, domain: Domain) -> np.ndarray:
    """What each code stands for, (Q,)."""
    return grid.values() if domain == "linear" else np.arange(grid.classes) / (grid.classes - 1) * 2 - 1


def _windows(codes: np.ndarray, table: np.ndarray, order: int):
    """(start, stop, (stop - start, order + 1)) of each block: the samples before each one, oldest first, and itself."""
    before = np.full(order, table[len(table) // 2])
    for start in range(0, len(codes), _BLOCK):
        stop = min(start + _BLOCK, len(codes))
        past = table[codes[max(start - order, 0) : stop]]
        past = np.concatenate([before[: max(order - start, 0)], past])
        yield start, stop, np.lib.stride_tricks.sliding_window_view(past, order + 1)


def _solve(codes: Sequence[np.ndarray], table: np.ndarray, order: int) -> np.ndarray:
    """Weights by least squares."""
    products = np.zeros((order + 1, order + 1))
    for row in codes:
        for _, _, windows in _windows(row, table, order):
            block = np.ascontiguousarray(windows)
            products += block.T @ block
    left, right = products[:order, :order], products[:order, order]
    ridge = _RIDGE * max(np.trace(left) / order, 1e-30)
    return np.linalg.solve(left + ridge * np.eye(order), right)


def _sampled(codes: Sequence[np.ndarray], table: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, order) pasts and (n,) codes of samples spread evenly over the recordings."""
    step = max(sum(len(row) for row in codes) // _SCALE_SAMPLES, 1)
    pasts, given = [], []
    for row in codes:
        for start, stop, windows in _windows(row, table, order):
            pasts.append(windows[::step, :-1])
            given.append(row[start:stop:step])
    return np.concatenate(pasts), np.concatenate(given).astype(np.int64)
