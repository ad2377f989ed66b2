"""Arithmetic coding of codes by the distribution of each sample, in compiled code.

A range coder (Martin, 1979) with 64-bit arithmetic: `low` and `range` delimit an interval; a code
takes the part from C(code) to C(code + 1) out of 2^32, where C is the cumulative distribution,
rounded down to whole numbers, plus 2 for each code, so that every code can be coded. The decoder
must find the same C. So all of this is IEEE additions, multiplications and divisions in a fixed
order, and `exp` is our own: a library's may differ in the last bit from machine to machine. (The
normal distribution uses the C library's erfc.)
"""

from __future__ import annotations

import math

import numba
import numpy as np

from wavear.generation.cpu import simd
from wavear.generation.cpu.distributions import (
    CATEGORICAL,
    GAUSSIAN,
    LAPLACE,
    LARGEST_LOG_SCALE,
    LOGISTIC_MIXTURE,
    SHARPEST,
)

ENCODE, DECODE = range(2)
LOW, RANGE, POSITION = range(3)  # of a coder; LOW holds the decoder's distance from `low`
LEAST_SHARE = 2.0 / 2**32  # of a code
MOST_LEVEL = 127  # of a quantised mel
MOST_BYTES = 4  # that one code can take

_U8, _U32, _U56 = np.uint64(8), np.uint64(32), np.uint64(56)
_LEAST_RANGE, _ALL = np.uint64(2**48), np.uint64(2**32)
_LOG_2_HIGH, _LOG_2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_POWERS = 2.0 ** np.arange(-1010, 1011)
_TAYLOR = tuple(1.0 / math.factorial(i) for i in range(13, -1, -1))
_ROOT_HALF = math.sqrt(0.5)


def new_coder() -> np.ndarray:
    """Return the state of an encoder, uint64 (3,)."""
    return np.array([0, 2**64 - 1, 0], np.uint64)


def new_decoder(stream: np.ndarray) -> np.ndarray:
    """Return the state of a decoder of bytes (n,), of which the last 8 or more are zeros."""
    return np.array([int.from_bytes(stream[:8].tobytes(), "big"), 2**64 - 1, 8], np.uint64)


def finished(coder: np.ndarray, stream: np.ndarray) -> bytes:
    """Return the bytes of an encoder: those written, and two that place a number in its range."""
    # The range is 2^48 or more, so a multiple of 2^48 lies in it.
    value = int(coder[LOW]) + 2**48 - 1 >> 48 << 48
    total = int.from_bytes(stream[: int(coder[POSITION])].tobytes(), "big") + (value >> 64)
    data = total.to_bytes(int(coder[POSITION]), "big") + (value % 2**64).to_bytes(8, "big")[:2]
    return data.rstrip(b"\0")


@numba.njit
def narrow(coder, stream, start, size):
    """Encode the part of the range from `start` on, `size` of 2^32."""
    step = coder[RANGE] >> _U32
    before = coder[LOW]
    coder[LOW] = before + step * start
    coder[RANGE] = step * size
    at = np.int64(coder[POSITION])
    if coder[LOW] < before:  # a carry into the bytes that are written
        i = at - 1
        while stream[i] == 255:
            stream[i] = 0
            i -= 1
        stream[i] += np.uint8(1)
    while coder[RANGE] < _LEAST_RANGE:
        stream[at] = np.uint8(coder[LOW] >> _U56)
        at += 1
        coder[LOW] <<= _U8
        coder[RANGE] <<= _U8
    coder[POSITION] = np.uint64(at)


@numba.njit
def target(coder):
    """Return the number, of 2^32, in whose part of the range the decoder is."""
    return min(coder[LOW] // (coder[RANGE] >> _U32), _ALL - np.uint64(1))


@numba.njit
def advance(coder, stream, start, size):
    """Move a decoder past a part of the range."""
    step = coder[RANGE] >> _U32
    coder[LOW] -= step * start
    coder[RANGE] = step * size
    at = np.int64(coder[POSITION])
    while coder[RANGE] < _LEAST_RANGE:
        byte = stream[at] if at < stream.shape[0] else np.uint8(0)
        coder[LOW] = (coder[LOW] << _U8) | np.uint64(byte)
        coder[RANGE] <<= _U8
        at += 1
    coder[POSITION] = np.uint64(at)


@numba.njit
def settle_coded(net, row, call, b, t):
    """Encode or decode sample t of stream b where `sampling.settle` draws it; return its code."""
    if net.law == CATEGORICAL:
        return _categorical(net, row, call, b, t)
    k, heap = net.mixtures, call.heap
    for i in range(3 * k if net.law == LOGISTIC_MIXTURE else 2):
        if not math.isfinite(_at(row, i)):
            return -1
    if net.law != LOGISTIC_MIXTURE:
        heap[0], heap[1] = 1.0, _at(row, 0)
        heap[2] = _scale(_at(row, 1), net.classes)
        return settle_value(net.law, 1, call, b, t)
    largest, total = -math.inf, 0.0
    for i in range(k):
        largest = max(largest, _at(row, i))
    for i in range(k):
        heap[i] = exp(_at(row, i) - largest)
        heap[k + i] = _at(row, k + i)
        heap[2 * k + i] = _scale(_at(row, 2 * k + i), net.classes)
        total += heap[i]
    for i in range(k):
        heap[i] /= total
    return settle_value(net.law, k, call, b, t)


@numba.njit
def settle_value(kind, mixtures, call, b, t):
    """Encode or decode a value.

    `call.heap` has the weights of the components, which add up to 1, their means and scales.
    """
    coder, stream = call.coders[b], call.streams[b]
    if call.coding == DECODE:
        wanted = target(coder)
        code, above = _bracket(kind, mixtures, call, wanted)
        while above - code > 1:
            middle = (code + above) // 2
            if _bound(kind, mixtures, call, middle) <= wanted:
                code = middle
            else:
                above = middle
        call.codes[b, t] = code
    code = call.codes[b, t]
    start = _bound(kind, mixtures, call, code)
    _take(call, coder, stream, b, t, start, _bound(kind, mixtures, call, code + 1) - start)
    return code


@numba.njit
def _bracket(kind, mixtures, call, wanted):
    """Return codes with C(code) <= wanted < C(above), searched from the mean on."""
    classes, mean, reach = call.edges.shape[0] - 1, 0.0, 0.0
    for i in range(mixtures):
        mean += call.heap[i] * call.heap[mixtures + i]
        reach += call.heap[i] * call.heap[2 * mixtures + i]
    code = min(max(np.searchsorted(call.edges, mean) - 1, 0), classes - 1)
    step = max(np.int64(reach * classes / 2.0), 1)
    if _bound(kind, mixtures, call, code) <= wanted:
        while True:
            above = min(code + step, classes)
            if above == classes or _bound(kind, mixtures, call, above) > wanted:
                return code, above
            code, step = above, 2 * step
    while True:
        above, code = code, max(code - step, 0)
        if code == 0 or _bound(kind, mixtures, call, code) <= wanted:
            return code, above
        step *= 2


@numba.njit
def _bound(kind, mixtures, call, code):
    """Return C(code)."""
    classes, edge = call.edges.shape[0] - 1, call.edges[code]
    if code == 0 or code == classes:
        return _ALL if code else np.uint64(0)
    below = 0.0
    for i in range(mixtures):
        x = (edge - call.heap[mixtures + i]) / call.heap[2 * mixtures + i]
        tail = exp(-abs(x)) if kind != GAUSSIAN else 0.0
        if kind == LOGISTIC_MIXTURE:
            part = (tail if x < 0.0 else 1.0) / (1.0 + tail)
        elif kind == LAPLACE:
            part = 0.5 * tail if x < 0.0 else 1.0 - 0.5 * tail
        else:
            part = 0.5 * math.erfc(-x * _ROOT_HALF)
        below += call.heap[i] * part
    return _whole(min(below, 1.0), code, classes)


@numba.njit
def _whole(below, code, classes):
    return np.uint64(below * (2.0**32 - 2.0 * classes)) + np.uint64(2 * code)


@numba.njit
def _categorical(net, logits, call, b, t):
    coder, stream, classes = call.coders[b], call.streams[b], net.classes
    largest = simd.largest(logits, net.logit_blocks)
    simd.exponentials(logits, net.logit_blocks, net.weights, net.sums, largest, np.float32(1.0))
    total = 0.0
    for code in range(classes):
        total += np.float64(simd.load_float(net.weights + 4 * code))
    if not (total > 0.0 and total < math.inf):
        return -1
    decoding = call.coding == DECODE
    wanted = target(coder) if decoding else np.uint64(0)
    below, start, end, code = 0.0, np.uint64(0), np.uint64(0), 0
    for code in range(classes):
        below += np.float64(simd.load_float(net.weights + 4 * code))
        end = _ALL if code == classes - 1 else _whole(below / total, code + 1, classes)
        if end > wanted if decoding else code == call.codes[b, t]:
            break
        start = end
    call.codes[b, t] = code
    _take(call, coder, stream, b, t, start, end - start)
    return code


@numba.njit
def _take(call, coder, stream, b, t, start, size):
    """Encode or decode a part of the range; its logarithm is the score."""
    call.scores[b, t] = math.log(np.float64(size) / 2.0**32)
    if call.coding == DECODE:
        advance(coder, stream, start, size)
    else:
        narrow(coder, stream, start, size)


@numba.njit
def settle_evenly(coders, streams, numbers, counts, coding):
    """Encode or decode numbers (B, n) that are equally likely among as many as `counts` (B, n)."""
    for b in range(numbers.shape[0]):
        for t in range(numbers.shape[1]):
            count = np.uint64(counts[b, t])
            if coding == DECODE:
                numbers[b, t] = np.int64((target(coders[b]) * count) >> _U32)
            start = ((np.uint64(numbers[b, t]) << _U32) + count - np.uint64(1)) // count
            end = ((np.uint64(numbers[b, t] + 1) << _U32) + count - np.uint64(1)) // count
            if coding == DECODE:
                advance(coders[b], streams[b], start, end - start)
            else:
                narrow(coders[b], streams[b], start, end - start)


@numba.njit
def settle_levels(coder, stream, levels, coding):
    """Encode or decode a quantised mel (M, F), whole numbers of at most `MOST_LEVEL`.

    Each is predicted from the frame before and the band below; the difference has adaptive counts,
    by how much the band below has changed.
    """
    bands, frames = levels.shape
    counts = np.empty((3, 4 * MOST_LEVEL + 1), np.int64)
    for i in range(counts.shape[1]):
        counts[:, i] = max(1, 64 >> min(abs(i - 2 * MOST_LEVEL), 6))
    for t in range(frames):
        for m in range(bands):
            turn = (levels[m - 1, t] if m else 0) - (levels[m - 1, t - 1] if m and t else 0)
            guess = turn if t == 0 else levels[m, t - 1] + (7 * turn + 5) // 10
            guess = min(max(guess, -MOST_LEVEL), MOST_LEVEL)
            own = counts[min(abs(turn), 2)]
            total = np.uint64(own.sum())
            wanted = target(coder) if coding == DECODE else np.uint64(0)
            symbol = levels[m, t] - guess + 2 * MOST_LEVEL
            below, start, end = 0, np.uint64(0), np.uint64(0)
            for i in range(len(own)):
                below += own[i]
                end = (np.uint64(below) << _U32) // total
                if end > wanted if coding == DECODE else i == symbol:
                    symbol = i
                    break
                start = end
            levels[m, t] = symbol + guess - 2 * MOST_LEVEL
            own[symbol] += 24
            if own[symbol] > 2**14:
                for i in range(len(own)):
                    own[i] = (own[i] + 1) // 2
            if coding == DECODE:
                advance(coder, stream, start, end - start)
            else:
                narrow(coder, stream, start, end - start)


@numba.njit
def _at(row, index):
    return np.float64(simd.load_float(row + 4 * index))


@numba.njit
def _scale(log_scale, classes):
    return max(exp(min(log_scale, LARGEST_LOG_SCALE)), SHARPEST * 2 / classes)


@numba.njit
def exp(x):
    """e^x to about 1e-16 of it, by IEEE additions and multiplications only.

    x = n ln 2 + r, |r| <= ln(2) / 2, and e^r by its Taylor series.
    """
    if x < -700.0:
        return 0.0
    n = math.floor(min(x, 700.0) * (1.0 / (_LOG_2_HIGH + _LOG_2_LOW)) + 0.5)
    r = (min(x, 700.0) - n * _LOG_2_HIGH) - n * _LOG_2_LOW
    total = 0.0
    for i in range(14):
        total = total * r + _TAYLOR[i]
    return total * _POWERS[np.int64(n) + 1010]
