"""From the parameters of a sample's law to its code and log-probability, in compiled code."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types

from wavear.generation.cpu import coding, distributions, simd
from wavear.generation.cpu.simd import BLOCK


class Call(NamedTuple):
    """The input and output of one call of an engine, for its compiled loop."""

    uniforms: Any
    """float64 (B, n), or empty if `scoring`."""
    temperatures: Any
    """float64 (B, n), or empty if `scoring`."""
    codes: Any
    """int64 (B, n): written, or read if `scoring`."""
    scores: Any
    """float64 (B, n): written if `scoring` or `scored`."""
    scoring: bool
    """True if the codes are given."""
    scored: bool
    """True if the log-probabilities of new codes are wanted."""
    top_k: int
    """The number of classes where nothing is cut off."""
    top_p: float
    """1 where nothing is cut off."""
    heap: Any
    """float64 (classes,): memory of one thread for a draw."""
    condition: int
    """Address of float32 (B, n, padded C), or (B, 1, padded C)."""
    mode: int
    """NO_CONDITION, CONSTANT_CONDITION or CONDITION."""
    coding: Any = None
    """ENCODE or DECODE: codes are read from or written to `codes`, by the range coders below; None,
    as these, for a call that does neither, so that its kernel is compiled without them."""
    coders: Any = None
    """uint64 (B, 3): states of range coders."""
    streams: Any = None
    """uint8 (B, bytes): what they write or read."""
    edges: Any = None
    """float64 (classes + 1,): bounds of the codes' intervals, for laws over values."""


_table, _none = types.float64[:, ::1], types.none
_FIELDS = (
    _table, _table, types.int64[:, ::1], _table, types.boolean, types.boolean, types.int64,
    types.float64, types.float64[::1], types.int64, types.int64,
)  # fmt: skip
CALL = types.NamedTuple((*_FIELDS, _none, _none, _none, _none), Call)
CODED_CALL = types.NamedTuple(
    (*_FIELDS, types.int64, types.uint64[:, ::1], types.uint8[:, ::1], types.float64[::1]), Call
)


def type_of(call: Call) -> Any:
    """Return Numba's type of a call, for which a kernel is compiled."""
    return CALL if call.coders is None else CODED_CALL


@numba.njit(forceinline=True)
def settle(net, row, call, b, t):
    """Return the code of sample t of stream b, drawn or given; -1 if `row` is not finite.

    `row` is the address of what the network puts out. `net` has `law`, `mixtures`, `classes`, and
    for a categorical law `logit_blocks` and memory for as many `weights` and `sums`.
    """
    return _settle(net, row, call, call.coders, b, t)


@numba.njit(forceinline=True)
def _settle(net, row, call, coders, b, t):
    if coders is not None:
        return coding.settle_coded(net, row, call, b, t)
    if call.scoring:
        code = call.codes[b, t]
    else:
        uniform, temperature = call.uniforms[b, t], call.temperatures[b, t]
        if net.law != distributions.CATEGORICAL:
            code = distributions.draw_value(
                net.law, net.mixtures, net.classes, row, uniform, temperature, call.heap
            )
        elif call.top_k < net.classes or call.top_p < 1.0:
            code = _draw_truncated(
                net, row, uniform, temperature, call.top_k, call.top_p, call.heap
            )
        else:
            code = _draw(net, row, uniform, temperature)
        if code < 0:
            return code
        call.codes[b, t] = code
    if call.scoring or call.scored:
        call.scores[b, t] = _log_probability(net, row, code)
    return code


@numba.njit
def _draw(net, logits, uniform, temperature):
    """Return the smallest code whose cumulative probability exceeds the uniform."""
    blocks = net.logit_blocks
    total = _exponentials(net, logits, np.float32(1.0 / temperature))
    if not total > 0.0 or total == np.inf:
        return -1
    threshold = uniform * total
    before = 0.0
    block = 0
    while block < blocks - 1:
        after = before + simd.load_double(net.sums + 8 * block)
        if after > threshold:
            break
        before = after
        block += 1
    code = block * BLOCK
    last = min(code + BLOCK, net.classes) - 1
    while code < last:
        before += simd.load_float(net.weights + 4 * code)
        if before > threshold:
            break
        code += 1
    return code


@numba.njit
def _exponentials(net, logits, sharpness):
    largest = simd.largest(logits, net.logit_blocks)
    return simd.exponentials(logits, net.logit_blocks, net.weights, net.sums, largest, sharpness)


@numba.njit
def _log_probability(net, logits, code):
    if net.law != distributions.CATEGORICAL:
        return distributions.log_probability(net.law, net.mixtures, net.classes, logits, code)
    total = _exponentials(net, logits, np.float32(1.0))
    largest = np.float64(simd.largest(logits, net.logit_blocks))
    return np.float64(simd.load_float(logits + 4 * code)) - largest - np.log(total)


@numba.njit
def _before(logits, one, other):
    """Return whether a code is likelier than another; of equal logits the lower code is."""
    first, second = simd.load_float(logits + 4 * one), simd.load_float(logits + 4 * other)
    return first > second or (first == second and one < other)


@numba.njit
def _sift(heap, logits, root, size):
    """Restore the heap below `root`: no code is likelier than the one above it."""
    code = heap[root]
    while 2 * root + 1 < size:
        child = 2 * root + 1
        if child + 1 < size and _before(logits, np.int64(heap[child + 1]), np.int64(heap[child])):
            child += 1
        if not _before(logits, np.int64(heap[child]), np.int64(code)):
            break
        heap[root] = heap[child]
        root = child
    heap[root] = code


@numba.njit
def _pop(heap, logits, size):
    """Remove and return the likeliest of `size` codes."""
    code = np.int64(heap[0])
    heap[0] = heap[size - 1]
    _sift(heap, logits, 0, size - 1)
    return code


@numba.njit
def _fill(heap, logits, classes):
    """Order all codes as a heap."""
    for code in range(classes):
        heap[code] = code
    for root in range(classes // 2 - 1, -1, -1):
        _sift(heap, logits, root, classes)


@numba.njit
def _cutoff(logits, weights, heap, classes, total, top_k, top_p):
    """Return the least likely code that stays."""
    if top_p < 1.0 and top_k < classes:
        # The share is of what top_k leaves: sum that first.
        total = 0.0
        _fill(heap, logits, classes)
        for taken in range(top_k):
            total += np.float64(simd.load_float(weights + 4 * _pop(heap, logits, classes - taken)))
    _fill(heap, logits, classes)
    reached = 0.0
    last = np.int64(0)
    for taken in range(top_k):
        last = _pop(heap, logits, classes - taken)
        reached += np.float64(simd.load_float(weights + 4 * last))
        if top_p < 1.0 and reached >= top_p * total:
            break
    return last


@numba.njit
def _draw_truncated(net, logits, uniform, temperature, top_k, top_p, heap):
    """Return the code of a uniform among those that stay, in the order of codes; or -1."""
    weights, classes = net.weights, net.classes
    total = _exponentials(net, logits, np.float32(1.0 / temperature))
    if not total > 0.0 or total == np.inf:
        return -1
    last = _cutoff(logits, weights, heap, classes, total, top_k, top_p)
    total = 0.0
    for code in range(classes):
        if code == last or _before(logits, code, last):
            total += np.float64(simd.load_float(weights + 4 * code))
    threshold = uniform * total
    before = 0.0
    drawn = last
    for code in range(classes):
        if code == last or _before(logits, code, last):
            weight = np.float64(simd.load_float(weights + 4 * code))
            before += weight
            if weight > 0.0:
                drawn = code
                if before > threshold:
                    break
    return drawn
