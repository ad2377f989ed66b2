"""Linear prediction that adapts from sample to sample, for lossless coding without a checkpoint.

    x -> recursive least squares -> residual -> normalised LMS -> residual -> normalised LMS

Each stage predicts what the ones before leave over. Each sum of the first stages is the mean of
four logistic distributions, whose scales follow the size of the errors. A mixture of all of them
codes the sample; the weights are those of Bayes' rule with a fixed share (Herbster and Warmuth,
1998). All of it is float64 in a fixed order, and depends on past samples only.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu.coding import DECODE, ENCODE, exp, settle_value
from wavear.generation.cpu.distributions import LOGISTIC_MIXTURE
from wavear.generation.cpu.sampling import CODED_CALL, Call

ORDER, FORGETTING = 20, 0.998  # of the least squares
LONGEST_INVERSE = 1e8  # in silence the inverse correlation grows: above this it starts again
ORDERS, STEPS = (256, 16), (0.003, 0.008)  # of each LMS stage
SCALES = (0.35, 0.5, 0.8, 1.2)  # of the mean size of the errors: recent, long, recent, long
RECENT, LONG = 0.05, 0.005  # share of the newest error in its mean size
FIXED_SHARE = 0.02  # of the weights that is divided evenly after each sample
LEAST_SCALE = 2e-6  # a fifteenth of a 16-bit step
CLASSES = 65536

_MEANS = len(ORDERS) + 1
_COMPONENTS = _MEANS * len(SCALES)
_LONGEST = max(ORDERS)


class Adaptive:
    """The state of `batch` streams of 16-bit codes.

    Parameters
    ----------
    batch : int
        Streams, such as the channels of a recording; each is coded as if it were alone.
    """

    def __init__(self, batch: int):
        self.edges = np.concatenate([[-np.inf], np.arange(1, CLASSES) - 0.5, [np.inf]])
        self.edges = (self.edges - CLASSES // 2) / (CLASSES // 2)
        self._state = (
            np.zeros((batch, 2, ORDER)),  # past samples, newest first, and their weights
            np.tile(np.eye(ORDER), (batch, 1, 1)),  # inverse of their correlation
            np.zeros((batch, len(ORDERS), 2, _LONGEST)),  # past inputs of a stage, and weights
            np.full((batch, _MEANS, 2), 1e-3),  # mean sizes of errors
            np.full((batch, _COMPONENTS), 1 / _COMPONENTS),  # weights of the mixture
        )

    def code(
        self,
        codes: np.ndarray,
        cond: None,
        coders: np.ndarray,
        streams: np.ndarray,
        decode: bool = False,
    ) -> np.ndarray:
        """See `wavear.generation.cpu.compiled_engine.CompiledEngine.code`."""
        scores, none = np.empty(codes.shape), np.empty((len(codes), 1))
        call = Call(
            none, none, codes, scores, True, False, CLASSES, 1.0, np.empty(3 * _COMPONENTS), 0, 0,
            DECODE if decode else ENCODE, coders, streams, self.edges,
        )  # fmt: skip
        _kernel()(*self._state, call)
        return scores


@numba.njit
def _predict(squares, stages, means):
    """Write the sums of the first stages' predictions."""
    total = 0.0
    for i in range(ORDER):
        total += squares[1, i] * squares[0, i]
    means[0] = total
    for s in range(len(ORDERS)):
        for i in range(ORDERS[s]):
            total += stages[s, 1, i] * stages[s, 0, i]
        means[s + 1] = total


@numba.njit
def _learn_squares(squares, inverse, gain, x, error):
    """Move the weights of the least squares, and append x."""
    divisor = FORGETTING
    for i in range(ORDER):
        gain[i] = 0.0
        for j in range(ORDER):
            gain[i] += inverse[i, j] * squares[0, j]
        divisor += squares[0, i] * gain[i]
    largest = 0.0
    for i in range(ORDER):
        squares[1, i] += gain[i] / divisor * error
        for j in range(i + 1):
            inverse[i, j] = (inverse[i, j] - gain[i] * gain[j] / divisor) / FORGETTING
            inverse[j, i] = inverse[i, j]
        largest = max(largest, inverse[i, i])
    if not largest < LONGEST_INVERSE:
        inverse[:] = 0.0
        for i in range(ORDER):
            inverse[i, i] = 1.0
    for i in range(ORDER - 1, 0, -1):
        squares[0, i] = squares[0, i - 1]
    squares[0, 0] = x


@numba.njit
def _learn_stage(inputs, weights, order, step, new, error):
    """Move the weights of an LMS stage, and append its input."""
    power = 1e-9
    for i in range(order):
        power += inputs[i] * inputs[i]
    rate = step * error / power
    for i in range(order):
        weights[i] += rate * inputs[i]
    for i in range(order - 1, 0, -1):
        inputs[i] = inputs[i - 1]
    inputs[0] = new


@numba.njit
def _learn_shares(shares, heap, x):
    """Move the weights of the mixture by Bayes' rule."""
    total = 0.0
    for k in range(_COMPONENTS):
        scale = heap[2 * _COMPONENTS + k]
        away = abs(x - heap[_COMPONENTS + k]) / scale
        # F(a) - F(b) = F(a) F(-b) (1 - exp(b - a)); the last factor is common to all x
        half = 1.0 / (CLASSES * scale)
        one, other = exp(-abs(away - half)), exp(-away - half)
        inside = (1.0 if away < half else one) / ((1.0 + one) * (1.0 + other))
        shares[k] *= inside * (1.0 - exp(-2.0 * half)) + 1e-30
        total += shares[k]
    for k in range(_COMPONENTS):
        shares[k] = (1.0 - FIXED_SHARE) * shares[k] / total + FIXED_SHARE / _COMPONENTS


def _run(squares, inverses, stages, sizes, shares, call):
    """Encode or decode the next samples of every stream."""
    means, gain, heap = np.empty(_MEANS), np.empty(ORDER), call.heap
    for b in range(call.codes.shape[0]):
        for t in range(call.codes.shape[1]):
            _predict(squares[b], stages[b], means)
            for k in range(_COMPONENTS):
                m, j = k // len(SCALES), k % len(SCALES)
                heap[k] = shares[b, k]
                heap[_COMPONENTS + k] = means[m]
                heap[2 * _COMPONENTS + k] = max(sizes[b, m, j % 2] * SCALES[j], LEAST_SCALE)
            code = settle_value(LOGISTIC_MIXTURE, _COMPONENTS, call, b, t)
            x = (code - CLASSES // 2) / (CLASSES // 2)
            _learn_shares(shares[b], heap, x)
            for m in range(_MEANS):
                error = abs(x - means[m])
                sizes[b, m, 0] += (error - sizes[b, m, 0]) * RECENT
                sizes[b, m, 1] += (error - sizes[b, m, 1]) * LONG
            _learn_squares(squares[b], inverses[b], gain, x, x - means[0])
            for s in range(len(ORDERS)):
                _learn_stage(
                    stages[b, s, 0], stages[b, s, 1], ORDERS[s], STEPS[s],
                    x - means[s], x - means[s + 1],
                )  # fmt: skip
    return 0


@functools.cache
def _kernel() -> Any:
    """Compile `_run` at the first call, or read it from the cache."""
    three, four = types.float64[:, :, ::1], types.float64[:, :, :, ::1]
    signature: Any = types.int64(three, three, four, three, types.float64[:, ::1], CODED_CALL)
    return compiled(_run, signature)
