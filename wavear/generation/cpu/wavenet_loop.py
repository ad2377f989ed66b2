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
    CONSTANT_CONDITION,
    MATRIX,
    Place,
    array_of,
    as_input,
    in_lines,
    in_panels,
    multiply_row,
    multiply_streams,
    project,
    read_out,
    record,
    rectified,
    seat,
    start_constants,
    start_span,
    to_panels,
)
from wavear.generation.cpu.sampling import settle

# Of a layer: sizes; numbers of matrices (`past` is the first of the past taps, the oldest; `mix` of
# what the gated units add to the signal and the skips); addresses. `ahead`: samples that the past
# taps are computed ahead; `slots`: length of the ring; `mix_at`: the first vector that the mix
# writes, 0, or behind the signal, which the last layer leaves alone.
LAYER = record("dilation ahead slots past now mix mix_at condition bias mix_bias ring z constant")
# Of a network, for one group of streams: sizes (vectors of a row, bytes of a row), numbers of
# matrices, addresses of weights (`table`: of the first layer's products, or 0) and of memory. The
# rows of `x` are the signal and behind it the skips, `out_vectors` in all.
PLAN = record(
    "taps law mixtures classes first streams rows span time "
    "x_vectors out_vectors gate_vectors skip_vectors head_vectors condition_vectors "
    "z_row logit_row logit_blocks head1 head2 multiply sparse "
    "embedding table skip_bias head1_bias head2_bias zeros "
    "x h head logits weights sums values offsets panels condition_panels integers"
)


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
            x = as_input(matrix, layer.ring + slot * x_row, vectors, net.integers)
            multiply_row(matrix, x, net.zeros, z, z)
            continue
        before = min(count, slots - slot)
        first = layer.ring + slot * streams * x_row
        to_panels(matrix, first, x_row, before * streams, vectors, net.panels, 0)
        after = (count - before) * streams
        to_panels(matrix, layer.ring, x_row, after, vectors, net.panels, before * streams)
        project(net, matrix, net.panels, vectors, count * streams, z, net.z_row, z)


@numba.njit
def _head(net, matrices):
    """From the skips to the logits."""
    first, rows = matrices[net.head1], net.rows
    vector = rows * VECTOR_BYTES
    skips = net.x + net.x_vectors * vector
    if net.sparse:
        rectified(net, first, skips, net.head1_bias, net.head)
    else:
        simd.relu(net.x, net.x, (net.streams + rows - 1) // rows * net.out_vectors * rows)
        multiply_streams(net, first, skips, net.skip_vectors, net.out_vectors * vector, net.zeros,
                         Place(net.head1_bias, 0, VECTOR_BYTES, 0),
                         in_panels(net.head, rows, net.head_vectors))  # fmt: skip
    read_out(net, matrices[net.head2])


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
    start_constants(net, layers, matrices, condition, call.mode)
    position, left = net.span, 0
    for t in range(samples):
        if position == net.span:
            position, left = 0, min(net.span, samples - t)
            start_span(net, layers, matrices, condition + t * condition_row, stream_bytes,
                       call.mode, left)  # fmt: skip
        for s in range(streams):
            row = seat(net.x, s, rows, net.out_vectors)
            embedding = net.embedding + previous[s, taps - 1] * x_vectors * VECTOR_BYTES
            simd.copy(embedding, VECTOR_BYTES, row, vector, x_vectors)
            simd.copy(net.skip_bias, VECTOR_BYTES, row + x_vectors * vector, vector,
                      net.out_vectors - x_vectors)  # fmt: skip
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
                x_row = x_vectors * VECTOR_BYTES
                slot = layer.ring + (net.time % layer.slots) * streams * x_row
                for s in range(streams):
                    simd.copy(seat(net.x, s, rows, net.out_vectors), vector, slot + s * x_row,
                              VECTOR_BYTES, x_vectors)  # fmt: skip
                place = in_lines(z, rows, net.z_row)
                multiply_streams(net, matrices[layer.now], net.x, x_vectors,
                                 net.out_vectors * vector, net.zeros, place, place)  # fmt: skip
            for s in range(streams):
                filters = z + s * net.z_row
                gates = filters + net.gate_vectors * VECTOR_BYTES
                h = seat(net.h, s, rows, net.gate_vectors)
                simd.gate(filters, gates, h, net.gate_vectors, vector)
            mix_at, panel = layer.mix_at * vector, net.out_vectors * vector
            place = Place(net.x + mix_at, VECTOR_BYTES, vector, panel)
            multiply_streams(net, matrices[layer.mix], net.h, net.gate_vectors,
                             net.gate_vectors * vector, layer.mix_bias, place, place)  # fmt: skip
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
