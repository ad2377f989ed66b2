"""The draw of the CPU engine where it is truncated, or its log-probability is asked for.

A call without either does not come here. `request` makes what the compiled code reads, `draw` is
part of its loop.
"""

from __future__ import annotations

import numba
import numpy as np

from wavear.generation.cpu import simd

# A request: float64 numbers. TOP_K is the number of classes, and TOP_P is 1, where nothing is cut
# off.
TOP_K, TOP_P, SCORED, HEAP = range(4)


def request(classes: int, top_k: int | None, top_p: float | None, scored: bool) -> np.ndarray:
    """What is asked for, with memory to work in for one thread; empty where that is nothing."""
    if top_k is None and top_p is None and not scored:
        return np.empty(0)
    made = np.zeros(HEAP + classes)
    made[TOP_K] = classes if top_k is None else min(top_k, classes)
    made[TOP_P] = 1.0 if top_p is None else top_p
    made[SCORED] = scored
    return made


@numba.njit
def truncates(asked, classes):
    """Whether a request cuts anything off."""
    return asked.shape[0] > 0 and (np.int64(asked[TOP_K]) < classes or asked[TOP_P] < 1.0)


@numba.njit
def _before(logits, one, other):
    """Whether a code is likelier than another: by its logit, and of equal ones the lower."""
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
    """Take the likeliest of `size` codes off the heap."""
    code = np.int64(heap[0])
    heap[0] = heap[size - 1]
    _sift(heap, logits, 0, size - 1)
    return code


@numba.njit
def _fill(heap, logits, classes):
    """All codes, as a heap."""
    for code in range(classes):
        heap[code] = code
    for root in range(classes // 2 - 1, -1, -1):
        _sift(heap, logits, root, classes)


@numba.njit
def _cutoff(logits, weights, heap, classes, total, top_k, top_p):
    """The least likely code that stays, and the weight of all that stay, likeliest first."""
    if top_p < 1.0 and top_k < classes:
        # The share is one of what top_k leaves: that is summed up first.
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
def truncated(logits, classes, weights, total, uniform, asked):
    """The code of a uniform among those that stay, in the order of codes.

    `weights` are exp((logits - largest) / temperature), as addresses of float32; `asked` a request.
    """
    heap = asked[HEAP:]
    last = _cutoff(logits, weights, heap, classes, total, np.int64(asked[TOP_K]), asked[TOP_P])
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


@numba.njit
def draw(logits, blocks, classes, weights, sums, uniform, temperature, asked):
    """The code of a uniform; -1 if the logits are not numbers. `weights` become those of this temperature."""
    largest = simd.largest(logits, blocks)
    total = simd.exponentials(logits, blocks, weights, sums, largest, np.float32(1.0 / temperature))
    if not total > 0.0 or total == np.inf:
        return -1
    return truncated(logits, classes, weights, total, uniform, asked)
