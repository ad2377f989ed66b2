"""The period of a waveform, measured by normalised cross-correlation."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

_BETTER = 0.02  # by which the correlation at a longer lag must exceed that at a shorter one: else twice the period wins
_SILENCE = 1e-9  # least energy of a window


def measure_period(
    waveform: np.ndarray, shortest: int, longest: int, block: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the period of each block of a waveform.

    The correlation of the `window` samples around the middle of the block with those one lag before, divided by the
    root of both energies (Talkin, 1995, "A robust algorithm for pitch tracking"). The lag is the first maximum that no
    longer lag exceeds by 0.02, refined by the parabola through its neighbours.

    Parameters
    ----------
    waveform : ndarray, shape (T,), floating point
    shortest, longest : int
        The range of the lags, in samples.
    block : int
        Samples per result.
    window : int
        Samples that are compared.

    Returns
    -------
    lags : ndarray of float32, shape (T // block,), in samples
    correlation : ndarray of float32, shape (T // block,), 0 to 1
        0, with the shortest lag, where the window or what it is compared with reaches beyond the waveform.

    Examples
    --------
    >>> lags, correlation = measure_period(np.sin(2 * np.pi * np.arange(4000) / 100.25), 40, 440, 64, 512)
    >>> round(float(lags[30]), 1), round(float(correlation[30]), 3)
    (100.3, 1.0)
    """
    x = np.ascontiguousarray(waveform, np.float32)
    count = len(x) // block
    lags, correlation = np.full(count, shortest, np.float32), np.zeros(count, np.float32)
    _kernel()(x, np.ascontiguousarray(x[::-1]), shortest, longest, block, window, lags, correlation)
    return lags, correlation


def _run(x, backwards, shortest, longest, block, window, lags, correlation):
    """`backwards` is x from its end, so that the lags of one sample lie in rising order."""
    count = longest + 2 - shortest
    products, values = np.zeros(count, np.float32), np.zeros(count)
    total = x.shape[0]
    for b in range(lags.shape[0]):
        begin = b * block + block // 2 - window // 2
        end = begin + window
        if begin < longest + 1 or end > total:
            continue
        own = 1e-9
        for i in range(begin, end):
            own += np.float64(x[i]) * np.float64(x[i])
        products[:] = 0
        for i in range(begin, end):
            value, first = x[i], total - 1 - i + shortest
            row = backwards[first : first + count]
            for k in range(count):
                products[k] += value * row[k]
        other = 1e-9
        for i in range(begin - shortest, end - shortest):
            other += np.float64(x[i]) * np.float64(x[i])
        best, at = -1.0, 0
        for k in range(count):
            values[k] = products[k] / np.sqrt(own * max(other, _SILENCE))
            if k < count - 1 and values[k] > best + _BETTER:
                best, at = values[k], k
            first, last = begin - shortest - k - 1, end - shortest - k - 1
            other += np.float64(x[first]) ** 2 - np.float64(x[last]) ** 2
        while at < count - 2 and values[at + 1] > values[at]:
            at += 1
        lags[b] = shortest + at
        if 0 < at < count - 2:
            bend = values[at - 1] - 2 * values[at] + values[at + 1]
            if bend < -1e-9:
                lags[b] += max(-0.5, min(0.5, 0.5 * (values[at - 1] - values[at + 1]) / bend))
        correlation[b] = min(max(values[at], 0.0), 1.0)


@functools.cache
def _kernel() -> Any:
    from wavear.compiled import compiled

    signature = "void(float32[::1], float32[::1], int64, int64, int64, int64, float32[::1], float32[::1])"
    return compiled(_run, signature, error_model="numpy")
