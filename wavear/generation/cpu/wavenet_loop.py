"""The loop over samples of the CPU engine, as it is compiled: layers, head, draw."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from wavear.common.compiled import compiled
from wavear.generation.cpu import distributions, sampling, simd
from wavear.generation.cpu.products import (
    CONDITION,
    CONSTANT_CONDITION,
    N_CLASSES,
    N_CONDITION_PANELS,
    N_CONDITION_VECTORS,
    N_EMBEDDING,
    N_FIRST,
    N_FUSED,
    N_GATE_VECTORS,
    N_GIVE_WAY,
    N_H,
    N_H_OFFSET,
    N_H_VECTORS,
    N_HEAD,
    N_HEAD1,
    N_HEAD1_BIAS,
    N_HEAD2,
    N_HEAD2_BIAS,
    N_HEAD_ALL,
    N_HEAD_PLACE,
    N_HEAD_SHARE,
    N_HEAD_VECTORS,
    N_LAW,
    N_LOGIT_ALL,
    N_LOGIT_BLOCKS,
    N_LOGIT_PLACE,
    N_LOGIT_ROW,
    N_LOGIT_SHARE,
    N_LOGITS,
    N_MINE,
    N_MIXTURES,
    N_PANELS,
    N_PARTS,
    N_ROWS,
    N_SEQUENCE,
    N_SKIP,
    N_SKIP_ALL,
    N_SKIP_BIAS,
    N_SKIP_PLACE,
    N_SKIP_SHARE,
    N_SKIP_VECTORS,
    N_SPAN,
    N_SPARSE,
    N_STREAMS,
    N_SUMS,
    N_TABLE,
    N_TAPS,
    N_THEIRS,
    N_TIME,
    N_WEIGHTS,
    N_X,
    N_X_VECTORS,
    N_Z_ROW,
    N_ZEROS,
    multiply,
    multiply_row,
    project,
    rectified,
    to_panels,
    void,
)
from wavear.generation.cpu.simd import BLOCK, TALLEST, VECTOR_BYTES

# Fields of a layer; matrices by their number. PAST is the first of the past taps, the oldest.
(L_DILATION, L_AHEAD, L_SLOTS, L_RING, L_PAST, L_NOW, L_SKIP, L_RESIDUAL, L_CONDITION, L_BIAS, L_RESIDUAL_BIAS, L_Z,
 L_CONSTANT, L_FIELDS) = range(14)  # fmt: skip


@numba.njit
def _prepare_constants(net, layers, condition, mode):
    """Bias and constant conditioning of every layer and stream, where the pre-activations start."""
    streams = net[N_STREAMS]
    if mode == CONSTANT_CONDITION:
        to_panels(condition, net[N_CONDITION_VECTORS] * VECTOR_BYTES, streams, net[N_CONDITION_VECTORS],
                   net[N_CONDITION_PANELS], 0)  # fmt: skip
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONSTANT_CONDITION:
            project(net, layer[L_CONDITION], net[N_CONDITION_PANELS], net[N_CONDITION_VECTORS], streams,
                     net[N_ZEROS], layer[L_BIAS], 0, layer[L_CONSTANT])  # fmt: skip
        else:
            for s in range(streams):
                simd.copy(layer[L_BIAS], VECTOR_BYTES, layer[L_CONSTANT] + s * net[N_Z_ROW], VECTOR_BYTES,
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
                to_panels(condition + s * condition_row + t * row, row, 1, vectors, net[N_CONDITION_PANELS],
                           t * streams + s)  # fmt: skip
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONDITION:
            project(net, layer[L_CONDITION], net[N_CONDITION_PANELS], net[N_CONDITION_VECTORS],
                     count * streams, net[N_ZEROS], layer[L_BIAS], 0, layer[L_Z])  # fmt: skip
        else:
            vectors = streams * net[N_Z_ROW] // VECTOR_BYTES
            for t in range(count):
                simd.copy(
                    layer[L_CONSTANT],
                    VECTOR_BYTES,
                    layer[L_Z] + t * streams * net[N_Z_ROW],
                    VECTOR_BYTES,
                    vectors,
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
        # Tap 0 is the oldest, (taps - 1) * dilation samples back: the slot that the current sample
        # will take.
        slot = (time + tap * layer[L_DILATION]) % slots
        matrix = layer[L_PAST] + tap
        ring = layer[L_RING]
        if streams * count == 1:
            multiply_row(net, matrix, ring + slot * x_row, net[N_ZEROS], z, z)
            continue
        before = min(count, slots - slot)
        panels = net[N_PANELS]
        to_panels(ring + slot * streams * x_row, x_row, before * streams, vectors, panels, 0)
        to_panels(ring, x_row, (count - before) * streams, vectors, panels, before * streams)
        project(net, matrix, panels, vectors, count * streams, net[N_ZEROS], z, net[N_Z_ROW], z)


@numba.njit
def _skip(net, matrix, h, skip):
    """Add a layer's outputs to the skips."""
    if net[N_STREAMS] == 1:
        multiply_row(net, matrix, h, net[N_ZEROS], skip, skip)
        return
    rows, h_vectors, skip_vectors = net[N_ROWS], net[N_H_VECTORS], net[N_SKIP_VECTORS]
    vector = rows * VECTOR_BYTES
    multiply(net, matrix, net[N_STREAMS], rows, h, vector, h_vectors * vector, net[N_ZEROS],
              skip, VECTOR_BYTES, vector, skip_vectors * vector,
              skip, VECTOR_BYTES, vector, skip_vectors * vector)  # fmt: skip


@numba.njit
def _exchange(net, values, place, vectors, sequence):
    """Put this core's values to their place in memory of both, and wait for the other's."""
    simd.copy(values, VECTOR_BYTES, place, VECTOR_BYTES, vectors)
    simd.publish(net[N_MINE], sequence)
    simd.wait(net[N_THEIRS], sequence, net[N_GIVE_WAY])


@numba.njit
def _sample(net, logits, uniform, temperature):
    """The smallest code whose cumulative probability exceeds the uniform; -1 if the logits are not numbers."""
    blocks = net[N_LOGIT_BLOCKS]
    largest = simd.largest(logits, blocks)
    total = simd.exponentials(
        logits, blocks, net[N_WEIGHTS], net[N_SUMS], largest, np.float32(1.0 / temperature)
    )
    if not total > 0.0 or total == np.inf:
        return -1
    threshold = uniform * total
    before = 0.0
    block = 0
    while block < blocks - 1:
        after = before + simd.load_double(net[N_SUMS] + 8 * block)
        if after > threshold:
            break
        before = after
        block += 1
    code = block * BLOCK
    last = min(code + BLOCK, net[N_CLASSES]) - 1
    while code < last:
        before += simd.load_float(net[N_WEIGHTS] + 4 * code)
        if before > threshold:
            break
        code += 1
    return code


@numba.njit
def _log_probability(net, logits, code):
    if net[N_LAW] != distributions.CATEGORICAL:
        return distributions.log_probability(
            net[N_LAW], net[N_MIXTURES], net[N_CLASSES], logits, code
        )
    blocks = net[N_LOGIT_BLOCKS]
    largest = simd.largest(logits, blocks)
    total = simd.exponentials(logits, blocks, net[N_WEIGHTS], net[N_SUMS], largest, np.float32(1.0))
    return np.float64(simd.load_float(logits + 4 * code)) - np.float64(largest) - np.log(total)


def _run(
    net, layers, previous, uniforms, temperatures, codes, scores, condition, mode, scoring, asked
):
    """The loop over samples, for one group of streams.

    Parameters
    ----------
    net, layers : int64 arrays
        The plan: see the fields above. `net[N_TIME]` is advanced.
    previous : int64 array (G, K)
        The codes before the first sample, the last one last; `classes` stands for none. Becomes the
        last codes.
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
    # In a panel of `rows` rows: next row, next vector of channels; next panel, by its number of
    # vectors.
    vector = rows * VECTOR_BYTES
    x, skip, head, logits = net[N_X], net[N_SKIP], net[N_HEAD], net[N_LOGITS]
    shared = net[N_PARTS] > 1
    fused = net[N_FUSED] != 0
    gate_vectors = net[N_GATE_VECTORS]
    condition_row = net[N_CONDITION_VECTORS] * VECTOR_BYTES
    stream_bytes = condition_row if mode == CONSTANT_CONDITION else samples * condition_row
    condition += first * stream_bytes
    _prepare_constants(net, layers, condition, mode)
    truncating = sampling.truncates(asked, net[N_CLASSES])
    scored = asked.shape[0] > 0 and asked[sampling.SCORED] > 0.0
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
            simd.copy(net[N_EMBEDDING] + previous[s, taps - 1] * x_vectors * VECTOR_BYTES, VECTOR_BYTES,
                       x + panel * x_vectors * vector + row, vector, x_vectors)  # fmt: skip
            simd.copy(
                net[N_SKIP_BIAS],
                VECTOR_BYTES,
                skip + panel * skip_vectors * vector + row,
                vector,
                skip_vectors,
            )
        h = net[N_H]
        sequence = net[N_SEQUENCE]
        for i in range(count):
            layer = layers[i]
            z = layer[L_Z] + position * streams * z_row
            if i == 0 and net[N_TABLE]:
                for s in range(streams):
                    for tap in range(taps):
                        entry = tap * (net[N_CLASSES] + 1) + previous[s, tap]
                        simd.add(net[N_TABLE] + entry * z_row, z + s * z_row, 2 * gate_vectors)
            else:
                ahead = layer[L_AHEAD]
                if position % ahead == 0:
                    _add_past(net, layer, time, position, min(ahead, left - position))
                ring = layer[L_RING] + (time % layer[L_SLOTS]) * streams * x_vectors * VECTOR_BYTES
                for s in range(streams):
                    simd.copy(x + (s // rows) * x_vectors * vector + (s % rows) * VECTOR_BYTES, vector,
                               ring + s * x_vectors * VECTOR_BYTES, VECTOR_BYTES, x_vectors)  # fmt: skip
                if streams == 1:
                    multiply_row(net, layer[L_NOW], x, zeros, z, z)
                else:
                    multiply(net, layer[L_NOW], streams, rows, x, vector, x_vectors * vector, zeros,
                              z, z_row, VECTOR_BYTES, rows * z_row, z, z_row, VECTOR_BYTES, rows * z_row)  # fmt: skip
            for s in range(streams):
                simd.gate(z + s * z_row, z + s * z_row + gate_vectors * VECTOR_BYTES,
                           h + net[N_H_OFFSET] + (s // rows) * h_vectors * vector + (s % rows) * VECTOR_BYTES,
                           gate_vectors, vector)  # fmt: skip
            if shared:
                # While the other core finishes its half of this layer, the skips of the one before.
                sequence += 1
                simd.publish(net[N_MINE], sequence)
                if i > 0:
                    _skip(net, layers[i - 1, L_SKIP], h - h_vectors * vector, skip)
                simd.wait(net[N_THEIRS], sequence, net[N_GIVE_WAY])
            if i < count - 1:
                if streams == 1:
                    # If fused, the skips ride along: their matrix and their sums follow those of
                    # the residual.
                    multiply_row(net, layer[L_RESIDUAL], h, layer[L_RESIDUAL_BIAS], x, x)
                else:
                    multiply(net, layer[L_RESIDUAL], streams, rows, h, vector, h_vectors * vector,
                              layer[L_RESIDUAL_BIAS], x, VECTOR_BYTES, vector, x_vectors * vector,
                              x, VECTOR_BYTES, vector, x_vectors * vector)  # fmt: skip
            if not (shared or fused) or i == count - 1:
                _skip(net, layer[L_SKIP], h, skip)
            if shared:
                h += h_vectors * vector
        if dense:
            simd.relu(skip, skip, panel_count * skip_vectors * rows)
            multiply(net, net[N_HEAD1], streams, rows, skip, vector, skip_vectors * vector, zeros,
                      net[N_HEAD1_BIAS], 0, VECTOR_BYTES, 0,
                      head, VECTOR_BYTES, vector, head_vectors * vector)  # fmt: skip
            simd.relu(head, head, panel_count * head_vectors * rows)
            multiply(net, net[N_HEAD2], streams, rows, head, vector, head_vectors * vector, zeros,
                      net[N_HEAD2_BIAS], 0, VECTOR_BYTES, 0,
                      logits, net[N_LOGIT_ROW], VECTOR_BYTES, rows * net[N_LOGIT_ROW])  # fmt: skip
        elif shared:
            _exchange(net, skip, net[N_SKIP_PLACE], net[N_SKIP_SHARE], sequence + 1)
            rectified(net, net[N_HEAD1], net[N_SKIP_ALL], net[N_HEAD1_BIAS], head)
            _exchange(net, head, net[N_HEAD_PLACE], net[N_HEAD_SHARE], sequence + 2)
            rectified(net, net[N_HEAD2], net[N_HEAD_ALL], net[N_HEAD2_BIAS], logits)
            _exchange(net, logits, net[N_LOGIT_PLACE], net[N_LOGIT_SHARE], sequence + 3)
            net[N_SEQUENCE] = sequence + 3
        else:
            rectified(net, net[N_HEAD1], skip, net[N_HEAD1_BIAS], head)
            rectified(net, net[N_HEAD2], head, net[N_HEAD2_BIAS], logits)
        for s in range(streams):
            row = net[N_LOGIT_ALL] + s * net[N_LOGIT_ROW]
            if scoring:
                code = codes[first + s, t]
                scores[first + s, t] = _log_probability(net, row, code)
            else:
                if net[N_LAW] != distributions.CATEGORICAL:
                    code = distributions.draw_value(net[N_LAW], net[N_MIXTURES], net[N_CLASSES], row,
                                                 uniforms[first + s, t], temperatures[first + s, t])  # fmt: skip
                elif truncating:
                    code = sampling.draw(row, net[N_LOGIT_BLOCKS], net[N_CLASSES], net[N_WEIGHTS], net[N_SUMS],
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


def _tabulate(multiply, matrix, rows, x, x_vectors, panels, zeros, out, out_row, start, unused):
    """out = matrix @ x for rows of float32, `x_vectors` wide, through `panels` of TALLEST rows."""
    done = start
    x_row = x_vectors * VECTOR_BYTES
    while done < rows:
        count = min(TALLEST, rows - done)
        to_panels(x + done * x_row, x_row, count, x_vectors, panels, 0)
        simd.call15(multiply, matrix, count, TALLEST, panels, TALLEST * VECTOR_BYTES, 0, zeros, zeros, 0, VECTOR_BYTES, 0,  # noqa: E501
                     out + done * out_row, out_row, VECTOR_BYTES, 0)  # fmt: skip
        done += count


_SIGNATURE = (
    "int64(int64[::1], int64[:,::1], int64[:,::1], float64[:,::1], float64[:,::1], int64[:,::1], "
    "float64[:,::1], int64, int64, int64, float64[::1])"
)


@dataclass(frozen=True)
class Kernels:
    """What is compiled, for Python to call."""

    run: Any
    tabulate: Any


@functools.cache
def kernels() -> Kernels:
    """Compiled at the first call, or read from the cache."""
    return Kernels(compiled(_run, _SIGNATURE), compiled(_tabulate, void(11)))
