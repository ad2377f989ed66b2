"""Loop over samples of a WaveNet, as it is compiled: layers, head, draw."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import numba
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.emitter import VECTOR_BYTES
from wavear.generation.cpu.products import (
    CONDITION,
    CONSTANT_CONDITION,
    MATRIX,
    Place,
    array_of,
    condition_to_panels,
    copy_row,
    in_lines,
    in_panels,
    multiply,
    multiply_row,
    project,
    record,
    rectified,
    seat,
    to_panels,
)
from wavear.generation.cpu.sampling import settle

# Of a layer: sizes; numbers of matrices (`past` is the first of the past taps, the oldest);
# addresses. `ahead`: samples that the past taps are computed ahead; `slots`: length of the ring.
LAYER = record(
    "dilation ahead slots past now skip residual condition bias residual_bias ring z constant"
)
# Of a network, for one group of streams: sizes (vectors of a row, bytes of a row), numbers of
# matrices, addresses of weights (`table`: of the first layer's products, or 0) and of memory.
PLAN = record(
    "taps law mixtures classes first streams rows span time fused "
    "x_vectors h_vectors gate_vectors skip_vectors head_vectors condition_vectors "
    "z_row logit_row logit_blocks head1 head2 multiply sparse "
    "embedding table skip_bias head1_bias head2_bias zeros "
    "x h skips head logits weights sums values offsets panels condition_panels"
)


@numba.njit
def _start_constants(net, layers, matrices, condition, mode):
    """Write bias and constant conditioning of every layer and stream."""
    vectors = net.condition_vectors
    if mode == CONSTANT_CONDITION:
        row = vectors * VECTOR_BYTES
        to_panels(condition, row, net.streams, vectors, net.condition_panels, 0)
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONSTANT_CONDITION:
            project(net, matrices[layer.condition], net.condition_panels, vectors, net.streams,
                    layer.bias, 0, layer.constant)  # fmt: skip
        else:
            for s in range(net.streams):
                copy_row(layer.bias, layer.constant + s * net.z_row, 2 * net.gate_vectors)


@numba.njit
def _start_span(net, layers, matrices, condition, condition_row, mode, count):
    """Write bias and conditioning of the next `count` samples of every layer and stream."""
    rows = net.streams * net.z_row
    if mode == CONDITION:
        condition_to_panels(net, condition, condition_row, count)
    for i in range(layers.shape[0]):
        layer = layers[i]
        if mode == CONDITION:
            project(net, matrices[layer.condition], net.condition_panels, net.condition_vectors,
                    count * net.streams, layer.bias, 0, layer.z)  # fmt: skip
        else:
            for t in range(count):
                copy_row(layer.constant, layer.z + t * rows, rows // VECTOR_BYTES)


@numba.njit
def _add_past(net, layer, matrices, position, count):
    """Add the past taps of the next `count` samples of a layer; all of them are in its ring."""
    streams, vectors, slots = net.streams, net.x_vectors, layer.slots
    x_row = vectors * VECTOR_BYTES
    z = layer.z + position * streams * net.z_row
    for tap in range(net.taps - 1):
        # Tap 0 is the oldest, (taps - 1) * dilation samples back: the slot that the current sample
        # will take.
        slot = (net.time + tap * layer.dilation) % slots
        matrix = matrices[layer.past + tap]
        if streams * count == 1:
            multiply_row(matrix, layer.ring + slot * x_row, net.zeros, z, z)
            continue
        before = min(count, slots - slot)
        first = layer.ring + slot * streams * x_row
        to_panels(first, x_row, before * streams, vectors, net.panels, 0)
        after = (count - before) * streams
        to_panels(layer.ring, x_row, after, vectors, net.panels, before * streams)
        project(net, matrix, net.panels, vectors, count * streams, z, net.z_row, z)


@numba.njit
def _add_current(net, layer, matrices, z):
    """Store the input of a layer in its ring, and add its product."""
    streams, rows, vectors = net.streams, net.rows, net.x_vectors
    slot = layer.ring + (net.time % layer.slots) * streams * vectors * VECTOR_BYTES
    for s in range(streams):
        simd.copy(seat(net.x, s, rows, vectors), rows * VECTOR_BYTES,
                  slot + s * vectors * VECTOR_BYTES, VECTOR_BYTES, vectors)  # fmt: skip
    if streams == 1:
        multiply_row(matrices[layer.now], net.x, net.zeros, z, z)
    else:
        place = in_lines(z, rows, net.z_row)
        multiply(net, matrices[layer.now], streams, rows, in_panels(net.x, rows, vectors),
                 net.zeros, place, place)  # fmt: skip


@numba.njit
def _add_outputs(net, matrix, bias, out, vectors):
    """Add a layer's residual or skip outputs to panels of `vectors` vectors."""
    rows = net.rows
    if net.streams == 1:
        multiply_row(matrix, net.h, bias, out, out)
    else:
        place = in_panels(out, rows, vectors)
        multiply(net, matrix, net.streams, rows, in_panels(net.h, rows, net.h_vectors), bias,
                 place, place)  # fmt: skip


@numba.njit
def _head(net, matrices):
    """From the skips to the logits."""
    first, second = matrices[net.head1], matrices[net.head2]
    if net.sparse:
        rectified(net, first, net.skips, net.head1_bias, net.head)
        rectified(net, second, net.head, net.head2_bias, net.logits)
        return
    rows, streams = net.rows, net.streams
    panels = (streams + rows - 1) // rows
    skips = in_panels(net.skips, rows, net.skip_vectors)
    head = in_panels(net.head, rows, net.head_vectors)
    simd.relu(net.skips, net.skips, panels * net.skip_vectors * rows)
    bias = Place(net.head1_bias, 0, VECTOR_BYTES, 0)
    multiply(net, first, streams, rows, skips, net.zeros, bias, head)
    simd.relu(net.head, net.head, panels * net.head_vectors * rows)
    bias = Place(net.head2_bias, 0, VECTOR_BYTES, 0)
    multiply(net, second, streams, rows, head, net.zeros, bias,
             in_lines(net.logits, rows, net.logit_row))  # fmt: skip


def _run(plan, layers, matrices, previous, call):
    """Loop over samples, for one group of streams.

    Parameters
    ----------
    plan : array of one PLAN
        Its `time` is advanced.
    layers, matrices : arrays of LAYER and MATRIX
    previous : int64 array (G, K)
        The codes before the first sample, the last one last; `classes` stands for none. Becomes the
        last codes.
    call : Call

    Returns
    -------
    int64
        The first sample whose logits are not finite, or -1.
    """
    net = plan[0]
    streams, rows, taps, x_vectors = net.streams, net.rows, net.taps, net.x_vectors
    samples, count = call.codes.shape[1], layers.shape[0]
    vector = rows * VECTOR_BYTES
    condition_row = net.condition_vectors * VECTOR_BYTES
    stream_bytes = condition_row if call.mode == CONSTANT_CONDITION else samples * condition_row
    condition = call.condition + net.first * stream_bytes
    _start_constants(net, layers, matrices, condition, call.mode)
    position, left = net.span, 0
    for t in range(samples):
        if position == net.span:
            position, left = 0, min(net.span, samples - t)
            _start_span(net, layers, matrices, condition + t * condition_row, stream_bytes,
                        call.mode, left)  # fmt: skip
        for s in range(streams):
            simd.copy(net.embedding + previous[s, taps - 1] * x_vectors * VECTOR_BYTES,
                      VECTOR_BYTES, seat(net.x, s, rows, x_vectors), vector, x_vectors)  # fmt: skip
            simd.copy(net.skip_bias, VECTOR_BYTES, seat(net.skips, s, rows, net.skip_vectors),
                      vector, net.skip_vectors)  # fmt: skip
        for i in range(count):
            layer = layers[i]
            z = layer.z + position * streams * net.z_row
            if i == 0 and net.table:
                for s in range(streams):
                    for tap in range(taps):
                        entry = tap * (net.classes + 1) + previous[s, tap]
                        row = net.table + entry * net.z_row
                        simd.add(row, z + s * net.z_row, 2 * net.gate_vectors)
            else:
                if position % layer.ahead == 0:
                    _add_past(net, layer, matrices, position, min(layer.ahead, left - position))
                _add_current(net, layer, matrices, z)
            for s in range(streams):
                filters = z + s * net.z_row
                gates, h = (
                    filters + net.gate_vectors * VECTOR_BYTES,
                    seat(net.h, s, rows, net.h_vectors),
                )
                simd.gate(filters, gates, h, net.gate_vectors, vector)
            # If fused, the skips' matrix and sums follow those of the residual, in one.
            if i < count - 1:
                _add_outputs(net, matrices[layer.residual], layer.residual_bias, net.x, x_vectors)
            if not net.fused or i == count - 1:
                _add_outputs(net, matrices[layer.skip], net.zeros, net.skips, net.skip_vectors)
        _head(net, matrices)
        for s in range(streams):
            code = settle(net, net.logits + s * net.logit_row, call, net.first + s, t)
            if code < 0:
                return t
            for tap in range(taps - 1):
                previous[s, tap] = previous[s, tap + 1]
            previous[s, taps - 1] = code
        net.time += 1
        position += 1
    return -1


@functools.cache
def run(call: Any) -> Any:
    """Compile `_run` for a type of call at the first one, or read it from the cache."""
    plans = array_of(PLAN), array_of(LAYER), array_of(MATRIX)
    signature: Any = types.int64(*plans, types.int64[:, ::1], call)
    return compiled(_run, signature)
