"""The loop over samples of a GRU, as it is compiled; see `gru`."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import numba
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.distributions import CATEGORICAL
from wavear.generation.cpu.emitter import VECTOR_BYTES
from wavear.generation.cpu.products import (
    CONSTANT_CONDITION,
    MATRIX,
    array_of,
    copy_row,
    in_lines,
    in_panels,
    multiply,
    multiply_streams,
    read_out,
    record,
    seat,
    start_constants,
    start_span,
)
from wavear.generation.cpu.sampling import settle

# Of a layer: numbers of matrices (of the first layer `input` is -1 where there is a table; only it
# has `condition`), addresses.
LAYER = record("input hidden condition bias h z constant")
# Of a network, for one group of streams: sizes (vectors of a row, bytes of a row), numbers of
# matrices, addresses of weights (`table`: of the first layer's products with the input, or 0) and
# of memory. For laws over values: the value of each code in float32, the row of the table of each
# code, and the product of the first layer's input matrix with a value of one.
PLAN = record(
    "law mixtures classes first streams rows span x_vectors h_vectors head_vectors "
    "condition_vectors z_row logit_row logit_blocks head1 head2 multiply sparse "
    "embedding table code_values code_rows line head2_bias zeros "
    "x head logits weights sums values offsets condition_panels integers"
)


@numba.njit
def _multiply_turned(net, matrix, x, z, backwards):
    """z += matrix @ x for one row, the blocks in the order of memory or from the last to the first.

    A turn reads first what the sample before read last, which the cache still has: weights larger
    than the cache, always read in one order, would find nothing of themselves there.
    """
    block = matrix.vectors * VECTOR_BYTES
    for i in range(matrix.blocks):
        k = matrix.blocks - 1 - i if backwards != 0 else i
        out = z + k * block
        weights = matrix.address + k * matrix.size
        simd.call6(matrix.row, weights, matrix.inputs, x, net.zeros, out, out)


@numba.njit
def _into(net, matrix, x, x_vectors, z, backwards):
    """Add matrix @ x of every stream to its row of pre-activations, from `z` on; x is in panels."""
    if net.streams == 1:
        _multiply_turned(net, matrix, x, z, backwards)
    else:
        place = in_lines(z, net.rows, net.z_row)
        multiply(net, matrix, net.streams, net.rows, in_panels(x, net.rows, x_vectors), net.zeros,
                 place, place)  # fmt: skip


@numba.njit
def _input(net, layer, matrices, previous, z):
    """Add the product of the first layer's input matrix with the input."""
    if net.table == 0:
        vectors = net.x_vectors
        for s in range(net.streams):
            row = net.embedding + previous[s, 0] * vectors * VECTOR_BYTES
            simd.copy(row, VECTOR_BYTES, seat(net.x, s, net.rows, vectors),
                      net.rows * VECTOR_BYTES, vectors)  # fmt: skip
        _into(net, matrices[layer.input], net.x, vectors, z, 0)
        return
    gates = 3 * net.h_vectors
    for s in range(net.streams):
        code, out = previous[s, 0], z + s * net.z_row
        entry = code if net.law == CATEGORICAL else simd.load_int(net.code_rows + 8 * code)
        simd.add(net.table + entry * gates * VECTOR_BYTES, out, gates)
        if net.law != CATEGORICAL:
            simd.add_scaled(net.line, out, gates, simd.load_float(net.code_values + 4 * code))


def _run(plan, layers, matrices, previous, call):
    """Loop over samples, for one group of streams: see `wavenet_loop._run`."""
    net = plan[0]
    streams, rows, samples = net.streams, net.rows, call.codes.shape[1]
    h_vectors = net.h_vectors
    gap, gates = h_vectors * VECTOR_BYTES, net.head_vectors * VECTOR_BYTES
    z_row = net.z_row
    condition_row = net.condition_vectors * VECTOR_BYTES
    stream_bytes = condition_row if call.mode == CONSTANT_CONDITION else samples * condition_row
    condition = call.condition + net.first * stream_bytes
    start_constants(net, layers[0:1], matrices, condition, call.mode)
    for t in range(samples):
        position = t % net.span
        if position == 0:
            start_span(net, layers[0:1], matrices, condition + t * condition_row, stream_bytes,
                       call.mode, min(net.span, samples - t))  # fmt: skip
        z0 = layers[0].z + position * streams * z_row
        for i in range(layers.shape[0]):
            layer = layers[i]
            z, h = z0 + gates, layer.h
            if i == 0:
                _input(net, layer, matrices, previous, z)
            else:
                z = layer.z + gates
                for s in range(streams):
                    copy_row(layer.bias + gates, z + s * z_row, 4 * h_vectors)
                _into(net, matrices[layer.input], layers[i - 1].h, h_vectors, z, t & 1)
            _into(net, matrices[layer.hidden], h, h_vectors, z + gap, t & 1)
            for s in range(streams):
                simd.cell(z + s * z_row, gap, seat(h, s, rows, h_vectors), h_vectors,
                          rows * VECTOR_BYTES)  # fmt: skip
        h, head = layers[layers.shape[0] - 1].h, in_panels(net.head, rows, net.head_vectors)
        multiply_streams(net, matrices[net.head1], h, h_vectors, rows * gap, net.zeros,
                         in_lines(z0, rows, z_row), head)  # fmt: skip
        read_out(net, matrices[net.head2])
        for s in range(streams):
            code = settle(net, net.logits + s * net.logit_row, call, net.first + s, t)
            if code < 0:
                return t
            previous[s, 0] = code
    return -1


@functools.cache
def run(call: Any) -> Any:
    """Compile `_run` for a type of call at the first one, or read it from the cache."""
    plans = array_of(PLAN), array_of(LAYER), array_of(MATRIX)
    signature: Any = types.int64(*plans, types.int64[:, ::1], call)
    return compiled(_run, signature)
