"""The period of a waveform, measured by normalised cross-correlation."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from wavear.common.errors import WavearError

# A longer lag must exceed the correlation at a shorter one by this, or twice the period would win.
_BETTER = 0.02
_SILENCE = 1e-9  # least energy of a window


def measure_period(
    waveform: np.ndarray, shortest: int, longest: int, block: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the period of each block of a waveform.

    Correlate the `window` samples around the middle of the block with those one lag earlier, and
    divide by the root of both energies (Talkin, 1995, "A robust algorithm for pitch tracking"). The
    lag is the first maximum that no longer lag exceeds by 0.02, refined by the parabola through its
    neighbours.

    Parameters
    ----------
    waveform : ndarray, shape (T,), floating point
    shortest, longest : int
        Range of the lags, samples.
    block : int
        Samples per result.
    window : int
        Samples that are compared.

    Returns
    -------
    lags : ndarray of float32, shape (T // block,), in samples
    correlation : ndarray of float32, shape (T // block,), 0 to 1
        0, with the shortest lag, where a window reaches beyond the waveform.

    Raises
    ------
    WavearError
        If the waveform is not one-dimensional, or the sizes do not fit.

    Examples
    --------
    >>> wave = np.sin(2 * np.pi * np.arange(4000) / 100.25)
    >>> lags, correlation = measure_period(wave, 40, 440, 64, 512)
    >>> round(float(lags[30]), 1), round(float(correlation[30]), 3)
    (100.3, 1.0)
    """
    x = np.ascontiguousarray(waveform, np.float32)
    if x.ndim != 1:
        raise WavearError(f"waveform has shape {x.shape}, expected (T,): pass one channel")
    if not 1 <= shortest <= longest:
        raise WavearError(f"lags from {shortest} to {longest}: expected 1 <= shortest <= longest")
    if not 1 <= block <= window:
        raise WavearError(f"block is {block} and window {window}: expected 1 <= block <= window")
    count = len(x) // block
    lags, correlation = np.full(count, shortest, np.float32), np.zeros(count, np.float32)
    # The window of block b begins at b block + offset, and the longest lag must fit before it.
    offset = block // 2 - window // 2
    first = max(-((offset - longest) // block), 0)
    last = min((len(x) - window - offset) // block + 1, count)
    if first < last:
        _kernel()(x, shortest, longest, block, window, offset, first, last, lags, correlation)
    return lags, correlation


def _run(x, shortest, longest, block, window, offset, first, last, lags, correlation):
    """Measure the blocks from `first` to before `last`.

    Windows overlap: the products of a stretch of `block` samples are summed once, and every window
    that contains the stretch adds that sum.
    """
    total, count = x.shape[0], longest + 1 - shortest
    backwards = np.empty(total, np.float32)  # so that the lags of one sample lie in rising order
    energy = np.zeros(total + 1)  # of all samples before
    for i in range(total):
        backwards[total - 1 - i] = x[i]
        energy[i + 1] = energy[i] + np.float64(x[i]) * np.float64(x[i])
    parts = window // block
    products = np.zeros((parts, count), np.float32)  # a ring: stretch s in row s % parts
    values = np.empty(count, np.float32)
    for stretch in range(first, last + parts - 1):
        sums = products[stretch % parts]
        sums[:] = 0
        start = stretch * block + offset
        for i in range(start, start + block):
            value, row = x[i], backwards[total - 1 - i + shortest : total - i + longest]
            for k in range(count):
                sums[k] += value * row[k]
        b = stretch - parts + 1
        if b < first:
            continue
        begin = b * block + offset
        end = begin + window
        values[:] = 0
        for part in range(parts):
            for k in range(count):
                values[k] += products[part, k]
        for i in range(begin + parts * block, end):  # the rest beyond whole stretches
            value, row = x[i], backwards[total - 1 - i + shortest : total - i + longest]
            for k in range(count):
                values[k] += value * row[k]
        own = max(energy[end] - energy[begin], _SILENCE)
        for k in range(count):
            other = max(energy[end - shortest - k] - energy[begin - shortest - k], _SILENCE)
            values[k] = np.float32(np.float64(values[k]) / np.sqrt(own * other))
        best, at = -1.0, 0
        for k in range(count):
            if values[k] > best + _BETTER:
                best, at = values[k], k
        while at < count - 1 and values[at + 1] > values[at]:
            at += 1
        lags[b] = shortest + at
        if 0 < at < count - 1:
            left, right = np.float64(values[at - 1]), np.float64(values[at + 1])
            bend = left - 2 * np.float64(values[at]) + right
            if bend < -1e-9:
                lags[b] += max(-0.5, min(0.5, 0.5 * (left - right) / bend))
        correlation[b] = min(max(values[at], np.float32(0)), np.float32(1))


@functools.cache
def _kernel() -> Any:
    from wavear.common.compiled import compiled

    integers, array = ", int64" * 7, "float32[::1]"
    return compiled(_run, f"void({array}{integers}, {array}, {array})", error_model="numpy")
