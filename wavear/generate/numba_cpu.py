"""The CPU engine: WaveNet's whole loop over samples in compiled code, one call per chunk.

What it does that the plain loop does not:

- weights are packed for the vector kernels of `_simd` and read once per sample, shared by the streams of a group;
- the past of each layer lies in a ring buffer; a layer of dilation d knows its past taps d samples ahead, so their
  products are made for several samples at once and their weights read once for all of them;
- the conditioning of all layers is projected ahead for blocks of samples in the same way.

Every output element is one chain of fused multiply-adds in a fixed order: bias, conditioning, past taps from the
oldest on, current sample. So a stream's audio has the same bits whatever the batch, the grouping, the number of
threads and the cuts between calls.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from wavear.generate import _simd, numba_sampling
from wavear.generate._simd import BLOCK, HEIGHTS, LANES, TALLEST, VECTOR_BYTES, WIDEST
from wavear.generate.compiled import compiled
from wavear.generate.packing import LINE, Region, pack, to_numpy, vectors_of
from wavear.generate.reference import ReferenceEngine
from wavear.models.wavenet import WaveNet

_GROUP = 3 * TALLEST  # streams that one thread runs side by side, at most
_SIZES = (1, 3, TALLEST, _GROUP)  # of groups that `NumbaEngine.resized` packs weights for
_AHEAD = 64  # samples that past taps are computed ahead, at most, for one stream
_SPAN = 64  # samples that the conditioning is projected ahead, for one stream
_TABLE = 4096  # classes up to which the first layer's products with the embedding are tabulated

# Fields of a matrix: address of the packed weights, inputs, blocks, vectors in a block, 1 if bfloat16, and the address
# of the kernel for one row.
M_ADDRESS, M_INPUTS, M_BLOCKS, M_VECTORS, M_HALF, M_ROW, M_FIELDS = range(7)

# Fields of a layer; matrices by their number. PAST is the first of the past taps, the oldest.
(L_DILATION, L_AHEAD, L_SLOTS, L_RING, L_PAST, L_NOW, L_SKIP, L_RESIDUAL, L_CONDITION, L_BIAS, L_RESIDUAL_BIAS, L_Z,
 L_CONSTANT, L_FIELDS) = range(14)  # fmt: skip

# Fields of the network for one group of streams.
(N_TAPS, N_CLASSES, N_STREAMS, N_ROWS, N_SPAN, N_X_VECTORS, N_H_VECTORS, N_SKIP_VECTORS, N_HEAD_VECTORS, N_Z_ROW,
 N_LOGIT_ROW, N_LOGIT_BLOCKS, N_EMBEDDING, N_CONDITION_CHANNELS, N_CONDITION_VECTORS, N_HEAD1, N_HEAD2, N_HEAD1_BIAS,
 N_HEAD2_BIAS, N_SKIP_BIAS, N_ZEROS, N_X, N_H, N_SKIP, N_HEAD, N_LOGITS, N_WEIGHTS, N_SUMS, N_PANELS,
 N_CONDITION_PANELS, N_TIME, N_FIRST, N_MULTIPLY, N_MATRICES, N_SPARSE,
 N_TABLE, N_VALUES, N_OFFSETS, N_PARTS, N_GATE_VECTORS, N_H_OFFSET, N_SKIP_SHARE, N_SKIP_PLACE, N_SKIP_ALL,
 N_HEAD_SHARE, N_HEAD_PLACE, N_HEAD_ALL, N_LOGIT_SHARE, N_LOGIT_PLACE, N_LOGIT_ALL, N_MINE, N_THEIRS, N_SEQUENCE,
 N_GIVE_WAY, N_FUSED, N_FIELDS) = range(56)  # fmt: skip

NO_CONDITION, CONSTANT_CONDITION, CONDITION = range(3)

_TALL2 = HEIGHTS[2]
_TALL4 = HEIGHTS[4]


@numba.njit
def _height(rows, vectors):
    """Rows of the tallest tile kernel of that width that `rows` rows fill."""
    if vectors == 2:
        for height in _TALL2:
            if height <= rows:
                return height
    if vectors == 4:
        for height in _TALL4:
            if height <= rows:
                return height
    return 1


def _multiply_rows(matrix, rows, panel_rows, x, x_block, x_panel, bias, init, init_row, init_vector, init_panel, out,
                   out_row, out_vector, out_panel):  # fmt: skip
    """out = init + bias + matrix @ x for `rows` rows in panels of `panel_rows`; each weight is read once.

    `matrix` is the address of its fields. This is compiled on its own and called by address: Numba would otherwise
    compile the vector kernels once more into every function that multiplies.
    """
    weights = _simd.load_int(matrix + 8 * M_ADDRESS)
    inputs = _simd.load_int(matrix + 8 * M_INPUTS)
    vectors = _simd.load_int(matrix + 8 * M_VECTORS)
    half = _simd.load_int(matrix + 8 * M_HALF)
    kind = 16 * vectors + 256 * half
    size = inputs * vectors * VECTOR_BYTES
    if half:
        size //= 2
    for _ in range(_simd.load_int(matrix + 8 * M_BLOCKS)):
        done = 0
        panel = 0
        while done < rows:
            last = min(panel_rows, rows - done)
            row = 0
            while row < last:
                height = _height(last - row, vectors)
                _simd.tile(
                    height + kind, weights, inputs, x + panel * x_panel + row * VECTOR_BYTES, x_block, bias,
                    init + panel * init_panel + row * init_row, init_row, init_vector,
                    out + panel * out_panel + row * out_row, out_row, out_vector,
                )  # fmt: skip
                row += height
            done += last
            panel += 1
        weights += size
        bias += vectors * VECTOR_BYTES
        init += vectors * init_vector
        out += vectors * out_vector


@numba.njit
def _multiply(net, matrix, rows, panel_rows, x, x_block, x_panel, bias, init, init_row, init_vector, init_panel, out,
              out_row, out_vector, out_panel):  # fmt: skip
    """`_multiply_rows`, by the number of the matrix."""
    _simd.call15(net[N_MULTIPLY], net[N_MATRICES] + 8 * M_FIELDS * matrix, rows, panel_rows, x, x_block, x_panel, bias,
                 init, init_row, init_vector, init_panel, out, out_row, out_vector, out_panel)  # fmt: skip


@numba.njit
def _multiply_row(net, matrix, x, bias, init, out):
    """out = init + bias + matrix @ x for one row, everything contiguous."""
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    weights = _simd.load_int(address + 8 * M_ADDRESS)
    inputs = _simd.load_int(address + 8 * M_INPUTS)
    kernel = _simd.load_int(address + 8 * M_ROW)
    block = _simd.load_int(address + 8 * M_VECTORS) * VECTOR_BYTES
    size = inputs * block
    if _simd.load_int(address + 8 * M_HALF):
        size //= 2
    for _ in range(_simd.load_int(address + 8 * M_BLOCKS)):
        _simd.call6(kernel, weights, inputs, x, bias, init, out)
        weights += size
        bias += block
        init += block
        out += block


def _multiply_sparse(matrix, count, values, offsets, init, out, unused):
    """out = init + matrix @ x for one row, given by its entries above zero."""
    weights = _simd.load_int(matrix + 8 * M_ADDRESS)
    inputs = _simd.load_int(matrix + 8 * M_INPUTS)
    vectors = _simd.load_int(matrix + 8 * M_VECTORS)
    half = _simd.load_int(matrix + 8 * M_HALF)
    row = vectors * VECTOR_BYTES
    if half:
        row //= 2
    for _ in range(_simd.load_int(matrix + 8 * M_BLOCKS)):
        _simd.sparse(vectors + 256 * half, weights, count, values, offsets, init, out)
        weights += inputs * row
        init += vectors * VECTOR_BYTES
        out += vectors * VECTOR_BYTES


@numba.njit
def _rectified(net, matrix, x, bias, out):
    """out = bias + matrix @ relu(x) for one row, whose zeros, about half, are not multiplied nor their weights read."""
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    row = _simd.load_int(address + 8 * M_VECTORS) * VECTOR_BYTES
    if _simd.load_int(address + 8 * M_HALF):
        row //= 2
    count = _simd.entries(x, _simd.load_int(address + 8 * M_INPUTS), row, net[N_VALUES], net[N_OFFSETS])
    _simd.call7(net[N_SPARSE], address, count, net[N_VALUES], net[N_OFFSETS], bias, out, 0)


@numba.njit
def _to_panels(first, row_bytes, rows, vectors, panels, done):
    """Copy rows of channels, `row_bytes` apart, to the rows from `done` on of panels of TALLEST rows."""
    for r in range(rows):
        panel = (done + r) // TALLEST
        row = (done + r) % TALLEST
        _simd.copy(
            first + r * row_bytes,
            VECTOR_BYTES,
            panels + (panel * vectors * TALLEST + row) * VECTOR_BYTES,
            TALLEST * VECTOR_BYTES,
            vectors,
        )


@numba.njit
def _project(net, matrix, panels, vectors, rows, bias, init, init_row, out):
    """Rows gathered in panels of TALLEST times a matrix, to rows of the pre-activations."""
    row = net[N_Z_ROW]
    _multiply(net, matrix, rows, TALLEST, panels, TALLEST * VECTOR_BYTES, vectors * TALLEST * VECTOR_BYTES, bias,
              init, init_row, VECTOR_BYTES, TALLEST * init_row, out, row, VECTOR_BYTES, TALLEST * row)  # fmt: skip


@numba.njit
def _prepare_constants(net, layers, condition, mode):
    """Bias and constant conditioning of every layer and stream, where the pre-activations start."""
    streams = net[N_STREAMS]
    if mode == CONSTANT_CONDITION:
        _to_panels(condition, net[N_CONDITION_VECTORS] * VECTOR_BYTES, streams, net[N_CONDITION_VECTORS],
                   net[N_CONDITION_PANELS], 0)  # fmt: skip
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONSTANT_CONDITION:
            _project(net, layer[L_CONDITION], net[N_CONDITION_PANELS], net[N_CONDITION_VECTORS], streams,
                     net[N_ZEROS], layer[L_BIAS], 0, layer[L_CONSTANT])  # fmt: skip
        else:
            for s in range(streams):
                _simd.copy(layer[L_BIAS], VECTOR_BYTES, layer[L_CONSTANT] + s * net[N_Z_ROW], VECTOR_BYTES,
                           2 * net[N_GATE_VECTORS])  # fmt: skip


@numba.njit
def _start_span(net, layers, condition, condition_row, mode, count):
    """Bias and conditioning of the next `count` samples of every layer and stream."""
    streams = net[N_STREAMS]
    if mode == CONDITION:
        vectors = net[N_CONDITION_VECTORS]
        row = vectors * VECTOR_BYTES
        for t in range(count):
            for s in range(streams):
                _to_panels(condition + s * condition_row + t * row, row, 1, vectors, net[N_CONDITION_PANELS],
                           t * streams + s)  # fmt: skip
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONDITION:
            _project(net, layer[L_CONDITION], net[N_CONDITION_PANELS], net[N_CONDITION_VECTORS],
                     count * streams, net[N_ZEROS], layer[L_BIAS], 0, layer[L_Z])  # fmt: skip
        else:
            vectors = streams * net[N_Z_ROW] // VECTOR_BYTES
            for t in range(count):
                _simd.copy(
                    layer[L_CONSTANT], VECTOR_BYTES, layer[L_Z] + t * streams * net[N_Z_ROW], VECTOR_BYTES, vectors
                )


@numba.njit
def _add_past(net, layer, time, position, count):
    """Add the past taps of the next `count` samples of a layer; all of them are in its ring."""
    streams = net[N_STREAMS]
    vectors = net[N_X_VECTORS]
    x_row = vectors * VECTOR_BYTES
    slots = layer[L_SLOTS]
    taps = net[N_TAPS]
    z = layer[L_Z] + position * streams * net[N_Z_ROW]
    for tap in range(taps - 1):
        # Tap 0 is the oldest, (taps - 1) * dilation samples back: the slot that the current sample will take.
        slot = (time + tap * layer[L_DILATION]) % slots
        matrix = layer[L_PAST] + tap
        ring = layer[L_RING]
        if streams * count == 1:
            _multiply_row(net, matrix, ring + slot * x_row, net[N_ZEROS], z, z)
            continue
        before = min(count, slots - slot)
        panels = net[N_PANELS]
        _to_panels(ring + slot * streams * x_row, x_row, before * streams, vectors, panels, 0)
        _to_panels(ring, x_row, (count - before) * streams, vectors, panels, before * streams)
        _project(net, matrix, panels, vectors, count * streams, net[N_ZEROS], z, net[N_Z_ROW], z)


@numba.njit
def _skip(net, matrix, h, skip):
    """Add a layer's outputs to the skips."""
    if net[N_STREAMS] == 1:
        _multiply_row(net, matrix, h, net[N_ZEROS], skip, skip)
        return
    rows, h_vectors, skip_vectors = net[N_ROWS], net[N_H_VECTORS], net[N_SKIP_VECTORS]
    vector = rows * VECTOR_BYTES
    _multiply(net, matrix, net[N_STREAMS], rows, h, vector, h_vectors * vector, net[N_ZEROS],
              skip, VECTOR_BYTES, vector, skip_vectors * vector,
              skip, VECTOR_BYTES, vector, skip_vectors * vector)  # fmt: skip


@numba.njit
def _exchange(net, values, place, vectors, sequence):
    """Put this core's values to their place in memory of both, and wait for the other's."""
    _simd.copy(values, VECTOR_BYTES, place, VECTOR_BYTES, vectors)
    _simd.publish(net[N_MINE], sequence)
    _simd.wait(net[N_THEIRS], sequence, net[N_GIVE_WAY])


@numba.njit
def _sample(net, logits, uniform, temperature):
    """The smallest code whose cumulative probability exceeds the uniform; -1 if the logits are not numbers."""
    blocks = net[N_LOGIT_BLOCKS]
    largest = _simd.largest(logits, blocks)
    total = _simd.exponentials(logits, blocks, net[N_WEIGHTS], net[N_SUMS], largest, np.float32(1.0 / temperature))
    if not total > 0.0 or total == np.inf:
        return -1
    threshold = uniform * total
    before = 0.0
    block = 0
    while block < blocks - 1:
        after = before + _simd.load_double(net[N_SUMS] + 8 * block)
        if after > threshold:
            break
        before = after
        block += 1
    code = block * BLOCK
    last = min(code + BLOCK, net[N_CLASSES]) - 1
    while code < last:
        before += _simd.load_float(net[N_WEIGHTS] + 4 * code)
        if before > threshold:
            break
        code += 1
    return code


@numba.njit
def _log_probability(net, logits, code):
    blocks = net[N_LOGIT_BLOCKS]
    largest = _simd.largest(logits, blocks)
    total = _simd.exponentials(logits, blocks, net[N_WEIGHTS], net[N_SUMS], largest, np.float32(1.0))
    return np.float64(_simd.load_float(logits + 4 * code)) - np.float64(largest) - np.log(total)


def _run(net, layers, previous, uniforms, temperatures, codes, scores, condition, mode, scoring, asked):
    """The loop over samples, for one group of streams.

    Parameters
    ----------
    net, layers : int64 arrays
        The plan: see the fields above. `net[N_TIME]` is advanced.
    previous : int64 array (G, K)
        The codes before the first sample, the last one last; `classes` stands for none. Becomes the last codes.
    uniforms, temperatures : float64 arrays (B, n)
    codes : int64 array (B, n)
        Written, or read if `scoring`.
    scores : float64 array (B, n)
        Written if `scoring`, or if a request asks for them.
    condition : int64
        Address of float32 (B, n, padded C), or (B, 1, padded C).
    mode : int64
        NO_CONDITION, CONSTANT_CONDITION or CONDITION.
    scoring : int64
    asked : float64 array
        A request of `numba_sampling`, or empty.

    Returns
    -------
    int64
        The first sample whose logits are no numbers, or -1.
    """
    streams = net[N_STREAMS]
    rows = net[N_ROWS]
    first = net[N_FIRST]
    samples = codes.shape[1]
    count = layers.shape[0]
    taps = net[N_TAPS]
    dense = net[N_SPARSE] == 0
    x_vectors = net[N_X_VECTORS]
    h_vectors = net[N_H_VECTORS]
    skip_vectors = net[N_SKIP_VECTORS]
    head_vectors = net[N_HEAD_VECTORS]
    z_row = net[N_Z_ROW]
    zeros = net[N_ZEROS]
    panel_count = (streams + rows - 1) // rows
    # In a panel of `rows` rows: next row, next vector of channels; next panel, by its number of vectors.
    vector = rows * VECTOR_BYTES
    x, skip, head, logits = net[N_X], net[N_SKIP], net[N_HEAD], net[N_LOGITS]
    shared = net[N_PARTS] > 1
    fused = net[N_FUSED] != 0
    gate_vectors = net[N_GATE_VECTORS]
    condition_row = net[N_CONDITION_VECTORS] * VECTOR_BYTES
    stream_bytes = condition_row if mode == CONSTANT_CONDITION else samples * condition_row
    condition += first * stream_bytes
    _prepare_constants(net, layers, condition, mode)
    truncating = numba_sampling.truncates(asked, net[N_CLASSES])
    scored = asked.shape[0] > 0 and asked[numba_sampling.SCORED] > 0.0
    position = net[N_SPAN]
    left = 0
    for t in range(samples):
        time = net[N_TIME]
        if position == net[N_SPAN]:
            position = 0
            left = min(net[N_SPAN], samples - t)
            _start_span(net, layers, condition + t * condition_row, stream_bytes, mode, left)
        for s in range(streams):
            panel = s // rows
            row = (s % rows) * VECTOR_BYTES
            _simd.copy(net[N_EMBEDDING] + previous[s, taps - 1] * x_vectors * VECTOR_BYTES, VECTOR_BYTES,
                       x + panel * x_vectors * vector + row, vector, x_vectors)  # fmt: skip
            _simd.copy(net[N_SKIP_BIAS], VECTOR_BYTES, skip + panel * skip_vectors * vector + row, vector, skip_vectors)
        h = net[N_H]
        sequence = net[N_SEQUENCE]
        for i in range(count):
            layer = layers[i]
            z = layer[L_Z] + position * streams * z_row
            if i == 0 and net[N_TABLE]:
                for s in range(streams):
                    for tap in range(taps):
                        entry = tap * (net[N_CLASSES] + 1) + previous[s, tap]
                        _simd.add(net[N_TABLE] + entry * z_row, z + s * z_row, 2 * gate_vectors)
            else:
                ahead = layer[L_AHEAD]
                if position % ahead == 0:
                    _add_past(net, layer, time, position, min(ahead, left - position))
                ring = layer[L_RING] + (time % layer[L_SLOTS]) * streams * x_vectors * VECTOR_BYTES
                for s in range(streams):
                    _simd.copy(x + (s // rows) * x_vectors * vector + (s % rows) * VECTOR_BYTES, vector,
                               ring + s * x_vectors * VECTOR_BYTES, VECTOR_BYTES, x_vectors)  # fmt: skip
                if streams == 1:
                    _multiply_row(net, layer[L_NOW], x, zeros, z, z)
                else:
                    _multiply(net, layer[L_NOW], streams, rows, x, vector, x_vectors * vector, zeros,
                              z, z_row, VECTOR_BYTES, rows * z_row, z, z_row, VECTOR_BYTES, rows * z_row)  # fmt: skip
            for s in range(streams):
                _simd.gate(z + s * z_row, z + s * z_row + gate_vectors * VECTOR_BYTES,
                           h + net[N_H_OFFSET] + (s // rows) * h_vectors * vector + (s % rows) * VECTOR_BYTES,
                           gate_vectors, vector)  # fmt: skip
            if shared:
                # While the other core finishes its half of this layer, the skips of the one before.
                sequence += 1
                _simd.publish(net[N_MINE], sequence)
                if i > 0:
                    _skip(net, layers[i - 1, L_SKIP], h - h_vectors * vector, skip)
                _simd.wait(net[N_THEIRS], sequence, net[N_GIVE_WAY])
            if i < count - 1:
                if streams == 1:
                    # If fused, the skips ride along: their matrix and their sums follow those of the residual.
                    _multiply_row(net, layer[L_RESIDUAL], h, layer[L_RESIDUAL_BIAS], x, x)
                else:
                    _multiply(net, layer[L_RESIDUAL], streams, rows, h, vector, h_vectors * vector,
                              layer[L_RESIDUAL_BIAS], x, VECTOR_BYTES, vector, x_vectors * vector,
                              x, VECTOR_BYTES, vector, x_vectors * vector)  # fmt: skip
            if not (shared or fused) or i == count - 1:
                _skip(net, layer[L_SKIP], h, skip)
            if shared:
                h += h_vectors * vector
        if dense:
            _simd.relu(skip, skip, panel_count * skip_vectors * rows)
            _multiply(net, net[N_HEAD1], streams, rows, skip, vector, skip_vectors * vector, zeros,
                      net[N_HEAD1_BIAS], 0, VECTOR_BYTES, 0,
                      head, VECTOR_BYTES, vector, head_vectors * vector)  # fmt: skip
            _simd.relu(head, head, panel_count * head_vectors * rows)
            _multiply(net, net[N_HEAD2], streams, rows, head, vector, head_vectors * vector, zeros,
                      net[N_HEAD2_BIAS], 0, VECTOR_BYTES, 0,
                      logits, net[N_LOGIT_ROW], VECTOR_BYTES, rows * net[N_LOGIT_ROW])  # fmt: skip
        elif shared:
            _exchange(net, skip, net[N_SKIP_PLACE], net[N_SKIP_SHARE], sequence + 1)
            _rectified(net, net[N_HEAD1], net[N_SKIP_ALL], net[N_HEAD1_BIAS], head)
            _exchange(net, head, net[N_HEAD_PLACE], net[N_HEAD_SHARE], sequence + 2)
            _rectified(net, net[N_HEAD2], net[N_HEAD_ALL], net[N_HEAD2_BIAS], logits)
            _exchange(net, logits, net[N_LOGIT_PLACE], net[N_LOGIT_SHARE], sequence + 3)
            net[N_SEQUENCE] = sequence + 3
        else:
            _rectified(net, net[N_HEAD1], skip, net[N_HEAD1_BIAS], head)
            _rectified(net, net[N_HEAD2], head, net[N_HEAD2_BIAS], logits)
        for s in range(streams):
            row = net[N_LOGIT_ALL] + s * net[N_LOGIT_ROW]
            if scoring:
                code = codes[first + s, t]
                scores[first + s, t] = _log_probability(net, row, code)
            else:
                if truncating:
                    code = numba_sampling.draw(row, net[N_LOGIT_BLOCKS], net[N_CLASSES], net[N_WEIGHTS], net[N_SUMS],
                                               uniforms[first + s, t], temperatures[first + s, t], asked)  # fmt: skip
                else:
                    code = _sample(net, row, uniforms[first + s, t], temperatures[first + s, t])
                if code < 0:
                    return t
                codes[first + s, t] = code
                if scored:
                    scores[first + s, t] = _log_probability(net, row, code)
            for tap in range(taps - 1):
                previous[s, tap] = previous[s, tap + 1]
            previous[s, taps - 1] = code
        net[N_TIME] = time + 1
        position += 1
    return -1


def _simd_row_address(vectors, half):
    return _simd.row_address(vectors, half)


def _tabulate(multiply, matrix, rows, x, x_vectors, panels, zeros, out, out_row, start, unused):
    """out = matrix @ x for rows of float32, `x_vectors` wide, through `panels` of TALLEST rows."""
    done = start
    x_row = x_vectors * VECTOR_BYTES
    while done < rows:
        count = min(TALLEST, rows - done)
        _to_panels(x + done * x_row, x_row, count, x_vectors, panels, 0)
        _simd.call15(multiply, matrix, count, TALLEST, panels, TALLEST * VECTOR_BYTES, 0, zeros, zeros, 0, VECTOR_BYTES, 0,  # noqa: E501
                     out + done * out_row, out_row, VECTOR_BYTES, 0)  # fmt: skip
        done += count


_SIGNATURE = (
    "int64(int64[::1], int64[:,::1], int64[:,::1], float64[:,::1], float64[:,::1], int64[:,::1], "
    "float64[:,::1], int64, int64, int64, float64[::1])"
)


@dataclass(frozen=True)
class Kernels:
    """What is compiled: functions for Python, and addresses for compiled code."""

    run: Any
    tabulate: Any
    row: Any
    multiply: int
    sparse: int


@functools.cache
def kernels() -> Kernels:
    """Compiled at the first call, or read from the cache."""
    multiply = compiled(_multiply_rows, _void(15), callback=True)
    sparse = compiled(_multiply_sparse, _void(7), callback=True)
    run, tabulate = compiled(_run, _SIGNATURE), compiled(_tabulate, _void(11))
    row = compiled(_simd_row_address, "int64(int64, int64)")
    _kept.extend([multiply, sparse])
    return Kernels(run, tabulate, row, multiply.address, sparse.address)


_kept: list = []  # the code at an address lives as long as its object


def _void(arguments: int) -> str:
    return f"void({', '.join(['int64'] * arguments)})"


class _Weights:
    """The packed weights of a model and the plan of its network, shared by all groups of streams.

    With two `parts` (for one stream on two cores) each has half of the outputs of every matrix, but all of the residual
    ones: each core computes the whole input of the next layer, which costs less than another exchange.
    """

    def __init__(self, model: WaveNet, group: int, weights: str, part: int = 0, parts: int = 1):
        config = model.config
        self.region = region = Region()
        self.matrices: list[list[int]] = []
        self.weights = weights
        self.half = weights == "bfloat16"
        residual, skip, head = config.residual_channels, config.skip_channels, config.head_channels
        taps = config.kernel_size
        self.ahead = [_ahead(dilation, group) for dilation in config.dilations]
        self.span = max([_power(_SPAN // group), *self.ahead])
        width = _width(group)
        z_rows = []

        def matrix(array: np.ndarray, rows: int, width: int | None = None) -> int:
            packed, blocks, vectors = pack(array, LANES, _width(rows) if width is None else width, weights)
            row = kernels().row(vectors, int(self.half)) if vectors <= WIDEST else 0
            self.matrices.append([region.put(packed), array.shape[1], blocks, vectors, int(self.half), row])
            return len(self.matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            return region.put(padded)

        def total(outputs: int, rows: int, width: int | None = None) -> int:
            blocks, vectors = vectors_of(outputs, LANES, _width(rows) if width is None else width, self.half)
            return blocks * vectors

        def bounds(outputs: int) -> tuple[int, int]:
            """First and last vector of this part."""
            vectors = -(-outputs // LANES)
            return vectors * part // parts, vectors * (part + 1) // parts

        def share(array: np.ndarray) -> np.ndarray:
            """The outputs of this part."""
            first, last = bounds(len(array))
            return array[first * LANES : last * LANES]

        head_width = 0 if group == 1 else None
        self.part, self.parts = part, parts
        fused = self.fused = group == 1 and parts == 1
        self.sparse = group == 1
        self.tabulated = config.classes <= _TABLE

        self.h_vectors = -(-residual // LANES)
        # The input of a layer, and for one stream on one core the sums of the skips behind it.
        self.residual_vectors = -(-residual // LANES)
        self.x_vectors = self.residual_vectors if fused else total(residual, group)
        self.skip_bounds, self.head_bounds, self.logit_bounds = bounds(skip), bounds(head), bounds(config.classes)
        self.gate_first, gate_last = bounds(residual)
        self.gate_vectors = gate_last - self.gate_first
        self.skip_vectors = total(_size(self.skip_bounds), group)
        self.out_vectors = self.x_vectors
        if fused:
            self.out_vectors = max(
                total((self.x_vectors + -(-skip // LANES)) * LANES, 1), self.x_vectors + self.skip_vectors
            )
        self.head_vectors = total(_size(self.head_bounds), group, head_width)
        logits = total(_size(self.logit_bounds), group, head_width)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        self.condition_channels = config.conditioning_channels if model.conditioning is not None else 0
        self.condition_vectors = -(-self.condition_channels // LANES)
        gate_rows = 2 * self.gate_vectors * LANES
        z_rows = [
            total(gate_rows, rows) for rows in (group, TALLEST, self.span * group, *(a * group for a in self.ahead))
        ]
        self.z_vectors = max(z_rows)

        def gates(array: np.ndarray) -> np.ndarray:
            """Of outputs (2R, ...) this part of both halves, padded to whole vectors."""
            padded = np.zeros((2, self.gate_vectors * LANES, *array.shape[1:]), np.float32)
            for half, outputs in zip(padded, np.split(array, 2), strict=True):
                mine = share(outputs)
                half[: len(mine)] = mine
            return padded.reshape(gate_rows, *array.shape[1:])

        def outwards(block: nn.Module, name: str) -> np.ndarray:
            """Of a layer the weight or bias of the residual, and behind it, if both are one matrix, of the skip.

            (Its bias is added once, in `skip_bias`.)
            """
            residuals = to_numpy(getattr(block.residual, name))
            if not fused:
                return residuals
            skips = share(to_numpy(getattr(block.skip, name)))
            padded = np.zeros((self.residual_vectors * LANES + len(skips), *residuals.shape[1:]), np.float32)
            padded[:residual] = residuals
            if name == "weight":
                padded[self.residual_vectors * LANES :] = skips
            return padded

        dilated = [to_numpy(block.dilated.weight).reshape(2 * residual, taps, residual) for block in model.blocks]
        past, conditions = [], []
        now = []
        # What every sample reads lies together, in the order of reading; what is read seldom follows.
        for block, taps_of in zip(model.blocks, dilated, strict=True):
            table = self.tabulated and not now
            now.append(
                (
                    matrix(gates(taps_of[:, -1]), TALLEST if table else group),
                    -1 if block.residual is None else matrix(outwards(block, "weight"), group),
                    -1 if fused and block.residual is not None else matrix(share(to_numpy(block.skip.weight)), group),
                )
            )
        readout: Any = model.head
        self.head1 = matrix(share(to_numpy(readout[1].weight)), group, head_width)
        self.head2 = matrix(share(to_numpy(readout[3].weight)), group, head_width)
        for taps_of, ahead in zip(dilated, self.ahead, strict=True):
            table = self.tabulated and not past
            past.append([matrix(gates(taps_of[:, k]), TALLEST if table else ahead * group) for k in range(taps - 1)])
        for block in model.blocks:
            if block.conditioning is None:
                conditions.append(-1)
            else:
                conditions.append(matrix(gates(to_numpy(block.conditioning.weight)), self.span * group))
        self.biases = [vector(gates(to_numpy(block.dilated.bias)), self.z_vectors) for block in model.blocks]
        self.residual_biases = [
            0 if block.residual is None else vector(outwards(block, "bias"), self.out_vectors) for block in model.blocks
        ]
        skip_bias: Any = np.sum([to_numpy(block.skip.bias) for block in model.blocks], axis=0, dtype=np.float64)
        self.skip_bias = vector(share(skip_bias.astype(np.float32)), self.skip_vectors)
        self.head1_bias = vector(share(to_numpy(readout[1].bias)), self.head_vectors)
        # Outputs beyond the last class are never drawn.
        self.head2_bias = vector(share(to_numpy(readout[3].bias)), self.logit_vectors, fill=-np.inf)
        self.embedding = vector(to_numpy(model.embedding.table()), self.x_vectors)
        widest = max(self.z_vectors, self.skip_vectors, self.head_vectors, self.logit_vectors, self.out_vectors)
        self.zeros = region.reserve(widest * VECTOR_BYTES)
        entries = taps * (config.classes + 1) if self.tabulated else 0
        self.first_table = region.reserve(entries * self.z_vectors * VECTOR_BYTES)
        panels = region.reserve(TALLEST * self.x_vectors * VECTOR_BYTES)
        base = region.allocate()
        self.table = np.array(self.matrices, dtype=np.int64)
        self.table[:, M_ADDRESS] += base
        self.now, self.past, self.conditions, self.width = now, past, conditions, width
        self.taps, self.classes, self.dilations = taps, config.classes, config.dilations
        for tap in range(taps if self.tabulated else 0):
            # The row after the last class stays zero: the past before the first sample.
            number = now[0][0] if tap == taps - 1 else past[0][tap]
            row = self.z_vectors * VECTOR_BYTES
            out = base + self.first_table + tap * (config.classes + 1) * row
            kernels().tabulate(kernels().multiply, self.table.ctypes.data + 8 * M_FIELDS * number, config.classes,
                               base + self.embedding, self.x_vectors, base + panels, base + self.zeros, out, row, 0, 0)  # fmt: skip  # noqa: E501


def _size(bounds: tuple[int, int]) -> int:
    """Outputs between two vectors."""
    return (bounds[1] - bounds[0]) * LANES


def _power(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _ahead(dilation: int, group: int) -> int:
    """Samples that the past taps of a layer are computed ahead."""
    return min(dilation, _power(_AHEAD * 2 // group) if group > 1 else _AHEAD)


def _width(rows: int) -> int:
    """Vectors in a block of a matrix that is multiplied with `rows` rows at a time."""
    return WIDEST if rows == 1 else 4 if rows < 4 else 2


class _Group:
    """The state of some streams that one thread runs side by side, and the plan of the network for them."""

    def __init__(self, packed: _Weights, first: int, streams: int, start_code: int, shared: _Shared | None = None):
        region = Region()
        base = packed.region.address
        panels = -(-streams // TALLEST)
        rows = -(-streams // panels)
        padded = panels * rows
        z_row = packed.z_vectors * VECTOR_BYTES
        layers = np.zeros((len(packed.dilations), L_FIELDS), np.int64)
        own = (L_RING, L_Z, L_CONSTANT)
        for i, dilation in enumerate(packed.dilations):
            slots = (packed.taps - 1) * dilation
            layers[i, L_DILATION] = dilation
            layers[i, L_AHEAD] = packed.ahead[i]
            layers[i, L_SLOTS] = slots
            layers[i, L_PAST] = packed.past[i][0]
            layers[i, L_NOW], layers[i, L_RESIDUAL], layers[i, L_SKIP] = packed.now[i]
            layers[i, L_CONDITION] = packed.conditions[i]
            layers[i, L_BIAS] = packed.biases[i] + base
            layers[i, L_RESIDUAL_BIAS] = packed.residual_biases[i] + base
            layers[i, L_RING] = region.reserve(slots * streams * packed.x_vectors * VECTOR_BYTES)
            layers[i, L_Z] = region.reserve(packed.span * streams * z_row)
            layers[i, L_CONSTANT] = region.reserve(streams * z_row)
        net = np.zeros(N_FIELDS, np.int64)
        net[N_TAPS] = packed.taps
        net[N_CLASSES] = packed.classes
        net[N_STREAMS] = streams
        net[N_ROWS] = rows
        net[N_SPAN] = packed.span
        net[N_X_VECTORS] = packed.x_vectors
        net[N_H_VECTORS] = packed.h_vectors
        net[N_SKIP_VECTORS] = packed.skip_vectors
        net[N_HEAD_VECTORS] = packed.head_vectors
        net[N_Z_ROW] = z_row
        net[N_LOGIT_ROW] = packed.logit_vectors * VECTOR_BYTES
        net[N_LOGIT_BLOCKS] = -(-packed.classes // BLOCK)
        net[N_CONDITION_CHANNELS] = packed.condition_channels
        net[N_CONDITION_VECTORS] = packed.condition_vectors
        net[N_HEAD1], net[N_HEAD2] = packed.head1, packed.head2
        for field, offset in (
            (N_EMBEDDING, packed.embedding),
            (N_HEAD1_BIAS, packed.head1_bias),
            (N_HEAD2_BIAS, packed.head2_bias),
            (N_SKIP_BIAS, packed.skip_bias),
            (N_ZEROS, packed.zeros),
        ):
            net[field] = offset + base
        ahead = -(-max(packed.ahead) * streams // TALLEST) * TALLEST
        span = -(-packed.span * streams // TALLEST) * TALLEST
        vectors = {
            N_X: padded * packed.out_vectors,
            N_H: padded * packed.h_vectors,
            N_SKIP: padded * packed.skip_vectors,
            N_HEAD: padded * packed.head_vectors,
            N_LOGITS: streams * packed.logit_vectors,
            N_WEIGHTS: packed.parts * packed.logit_vectors,
            N_SUMS: 2 * packed.parts * packed.logit_vectors,
            N_PANELS: ahead * packed.x_vectors,
            N_CONDITION_PANELS: span * packed.condition_vectors,
            N_VALUES: packed.parts * (max(packed.skip_vectors, packed.head_vectors) + 1),
            N_OFFSETS: packed.parts * (2 * max(packed.skip_vectors, packed.head_vectors) + 2),
        }
        for field, count in vectors.items():
            net[field] = region.reserve(count * VECTOR_BYTES)
        net[N_FIRST] = first
        net[N_MATRICES] = packed.table.ctypes.data
        net[N_MULTIPLY] = kernels().multiply
        net[N_SPARSE] = kernels().sparse if packed.sparse else 0
        net[N_TABLE] = base + packed.first_table if packed.tabulated else 0
        region.allocate()
        layers[:, own] += region.address
        net[list(vectors)] += region.address
        net[N_FUSED] = packed.fused
        if packed.fused:
            net[N_SKIP] = net[N_X] + packed.x_vectors * VECTOR_BYTES
        net[N_PARTS] = packed.parts
        net[N_GATE_VECTORS] = packed.gate_vectors
        net[N_LOGIT_ALL] = net[N_LOGITS]
        if shared:
            shared.plan(net, packed)
        self.net, self.layers, self.region = net, layers, region
        self.packed, self.shared = packed, shared  # the plan holds addresses in them
        self.previous = np.full((streams, packed.taps), packed.classes, np.int64)
        self.previous[:, -1] = start_code


class _Shared:
    """What the two cores of one stream write for each other."""

    def __init__(self, model: WaveNet):
        config = model.config
        self.region = region = Region()
        self.flags = [region.reserve(2 * LINE) for _ in range(2)]
        self.h = region.reserve(config.layers * -(-config.residual_channels // LANES) * VECTOR_BYTES)
        sizes = (config.skip_channels, config.head_channels, config.classes)
        padded = [-(-size // BLOCK) * BLOCK * 4 for size in sizes]
        self.all = [region.reserve(size) for size in padded]
        region.allocate()
        region.view(self.all[2], padded[2]).view(np.float32)[:] = -np.inf

    def plan(self, net: np.ndarray, packed: _Weights) -> None:
        """Fill in the fields of the exchange."""
        base = self.region.address
        net[N_H] = base + self.h
        net[N_H_OFFSET] = packed.gate_first * VECTOR_BYTES
        net[N_MINE], net[N_THEIRS] = (base + self.flags[p] for p in (packed.part, 1 - packed.part))
        net[N_GIVE_WAY] = _address_of_sleep()
        for fields, whole, (first, last) in zip(
            ((N_SKIP_ALL, N_SKIP_PLACE, N_SKIP_SHARE), (N_HEAD_ALL, N_HEAD_PLACE, N_HEAD_SHARE),
             (N_LOGIT_ALL, N_LOGIT_PLACE, N_LOGIT_SHARE)),
            self.all, (packed.skip_bounds, packed.head_bounds, packed.logit_bounds), strict=True,
        ):  # fmt: skip
            net[list(fields)] = base + whole, base + whole + first * VECTOR_BYTES, last - first


def _address_of_sleep() -> int:
    """Of the C function `usleep`, by which a core that waits in vain leaves its place to the other thread; or 0."""
    if os.name != "posix":
        return 0
    return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0


class NumbaEngine:
    """Runs `batch` streams of a WaveNet in compiled code.

    The weights are packed when it is made: an engine made after the model changed runs the model as it then is.

    Parameters
    ----------
    model : WaveNet
        On any device, of any precision.
    batch : int
        Streams, at least 1.
    weights : str
        "float32", or "bfloat16": the matrices rounded once to nearest, half the bytes to read; arithmetic in float32.
    threads : int, optional
        Cores to use; by default all that the process may run on, each for streams of its own. One stream runs on two
        cores only if it is asked for: they wait for each other some twenty times per sample, which pays on an idle
        machine, and costs more than it gains where another program takes one of the cores.
    packings : dict, optional
        Weights that are packed already, by the size of the groups they serve: see `resized`.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """

    def __init__(
        self,
        model: WaveNet,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, _Weights] | None = None,
    ):
        if not isinstance(model, WaveNet):
            raise ValueError(f"engine 'numba' serves WaveNet, not {type(model).__name__}: use engine 'reference'")
        if weights not in ("float32", "bfloat16"):
            raise ValueError(f"weights is {weights!r}, it must be float32 or bfloat16")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self._asked_threads = threads
        self._packings: dict[int, _Weights] = {} if packings is None else packings
        cores = threads or available_cores()
        self.classes = model.config.classes
        if batch == 1 and threads is not None and threads > 1 and _divides(model) and packings is None:
            self.threads = 2
            shared = _Shared(model)
            halves = [_Weights(model, 1, weights, part, 2) for part in range(2)]
            self._packed = halves[0]
            self._groups = [_Group(half, 0, 1, model.start_code, shared) for half in halves]
            self._pool = ThreadPoolExecutor(2)
            return
        self.threads = min(cores, batch)
        groups = -(-batch // _GROUP)
        groups = min(batch, -(-groups // self.threads) * self.threads)
        bounds = [batch * g // groups for g in range(groups + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        size = max(sizes) if packings is None else next(size for size in _SIZES if size >= max(sizes))
        if size not in self._packings:
            self._packings[size] = _Weights(model, size, weights)
        self._packed = self._packings[size]
        self._groups = [
            _Group(self._packed, first, size, model.start_code) for first, size in zip(bounds, sizes, strict=False)
        ]
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def generate(
        self,
        uniforms: np.ndarray,
        cond: Tensor | None,
        temperature: float | np.ndarray = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        log_probability: np.ndarray | None = None,
    ) -> np.ndarray:
        """The next samples of every stream.

        Parameters
        ----------
        uniforms : ndarray of float64 in [0, 1), shape (B, n)
        cond : Tensor, shape (B, C, n) or (B, C, 1), or None
        temperature : float, or ndarray of shape (B, n)
        top_k, top_p : optional
            See `wavear.sampling`.
        log_probability : ndarray of float64, shape (B, n), optional
            Filled with that of each code, in nats, by the model's own law: without temperature and truncation.

        Returns
        -------
        ndarray of int64, shape (B, n): codes

        Raises
        ------
        ValueError
            If a shape does not fit, or the logits become infinite or NaN.
        """
        uniforms = np.require(uniforms, np.float64, ["C", "W"])
        temperatures = np.require(np.broadcast_to(temperature, uniforms.shape), np.float64, ["C", "W"])
        codes = np.empty(uniforms.shape, np.int64)
        scores = np.empty((1, 1) if log_probability is None else codes.shape)
        asked = (top_k, top_p, log_probability is not None)
        self._run(uniforms, temperatures, codes, scores, cond, scoring=False, asked=asked)
        if log_probability is not None:
            log_probability[...] = scores
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """Log-probabilities, in nats, of the next samples of every stream being `codes`; float64, shape (B, n)."""
        codes = np.require(codes, np.int64, ["C", "W"])
        if codes.size and not 0 <= codes.min() <= codes.max() < self.classes:
            raise ValueError(f"codes reach from {codes.min()} to {codes.max()}, expected 0 to {self.classes - 1}")
        scores = np.empty(codes.shape)
        none = np.empty((1, 1))
        self._run(none, none, codes, scores, cond, scoring=True)
        return scores

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        from wavear.generate.numba_state import export_state

        return export_state(self, stream)

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        from wavear.generate.numba_state import load_state

        load_state(self, stream, state)

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        from wavear.generate.numba_state import as_run

        runner = ReferenceEngine(as_run(self.model, self.weights), 1)
        runner.load_state(0, self.state(stream))
        runner.fill(0, codes, cond if cond is None else cond.to(next(runner.model.parameters()).dtype))
        self.load_state(stream, runner.state(0))

    def resized(self, batch: int) -> NumbaEngine:
        """See `Engine.resized`."""
        threads = self._asked_threads
        return NumbaEngine(self.model, batch, weights=self.weights, threads=threads, packings=self._packings)

    def _run(self, uniforms, temperatures, codes, scores, cond, scoring: bool, asked=(None, None, False)) -> None:
        if codes.ndim != 2 or codes.shape[0] != self.batch:
            raise ValueError(f"shape {codes.shape} for {self.batch} streams: expected ({self.batch}, n)")
        condition, mode = self._condition(cond, codes.shape[1])
        run = kernels().run

        def one(group: _Group) -> int:
            return run(group.net, group.layers, group.previous, uniforms, temperatures, codes, scores,
                       condition.ctypes.data, mode, int(scoring),
                       numba_sampling.request(self.classes, *asked))  # fmt: skip

        results = list(self._pool.map(one, self._groups)) if self._pool else [one(group) for group in self._groups]
        bad = [t for t in results if t >= 0]
        if bad:
            raise ValueError(
                f"the logits of sample {min(bad)} of this call are infinite or NaN: check the model's weights"
            )

    def _condition(self, cond: Tensor | None, samples: int) -> tuple[np.ndarray, int]:
        """Conditioning as (B, n or 1, padded C), and its mode."""
        channels = self._packed.condition_channels
        if cond is None:
            if channels:
                raise ValueError(
                    f"the model is conditioned: cond must have shape ({self.batch}, {channels}, {samples})"
                )
            return np.empty(0, np.float32), NO_CONDITION
        if not channels:
            raise ValueError("the model is unconditional, and cond is given")
        shape = tuple(cond.shape)
        if len(shape) != 3 or shape[:2] != (self.batch, channels) or shape[2] not in (1, samples):
            raise ValueError(f"cond has shape {shape}, expected ({self.batch}, {channels}, {samples}) or (.., .., 1)")
        rows = np.zeros((self.batch, shape[2], self._packed.condition_vectors * LANES), np.float32)
        rows[:, :, :channels] = cond.detach().to("cpu", torch.float32).transpose(1, 2).numpy()
        return rows, CONSTANT_CONDITION if shape[2] == 1 else CONDITION


def _divides(model: WaveNet) -> bool:
    """Whether two cores can share one stream: every layer has a vector for each of them."""
    config = model.config
    sizes = (config.residual_channels, config.skip_channels, config.head_channels, config.classes)
    return min(sizes) > LANES


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
