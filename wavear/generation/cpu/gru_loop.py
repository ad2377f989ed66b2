"""The loop of the CPU engine of a GRU over samples, compiled; see `numba_gru`."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools

import numba

from wavear.common.compiled import compiled
from wavear.generation.cpu import sampling, simd
from wavear.generation.cpu.distributions import CATEGORICAL, draw_value
from wavear.generation.cpu.products import (
    M_ADDRESS,
    M_BLOCKS,
    M_FIELDS,
    M_INPUTS,
    M_ROW,
    M_SIZE,
    M_VECTORS,
    N_CLASSES,
    N_CONDITION_CHANNELS,
    N_CONDITION_PANELS,
    N_CONDITION_VECTORS,
    N_EMBEDDING,
    N_FIELDS,
    N_FIRST,
    N_H_VECTORS,
    N_HEAD,
    N_HEAD1,
    N_HEAD2,
    N_HEAD2_BIAS,
    N_HEAD_VECTORS,
    N_LAW,
    N_LOGIT_BLOCKS,
    N_LOGIT_ROW,
    N_LOGITS,
    N_MATRICES,
    N_MIXTURES,
    N_ROWS,
    N_SPAN,
    N_STREAMS,
    N_SUMS,
    N_TABLE,
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
from wavear.generation.cpu.simd import VECTOR_BYTES
from wavear.generation.cpu.wavenet_loop import (
    CONDITION,
    CONSTANT_CONDITION,
    Kernels,
    _log_probability,
    _sample,
    _tabulate,
)

# Fields of a layer: numbers of its matrices (of the first layer the input's is -1 where there is a
# table), addresses.
C_INPUT, C_HIDDEN, C_BIAS, C_H, C_Z, C_CONSTANT, C_FIELDS = range(7)

# Further fields of the network, for laws over values: the value of each code in float32, the row of
# the table of each code, and the product of the first layer's input matrix with a value of one.
G_VALUES, G_ROWS, G_LINE, G_FIELDS = range(N_FIELDS, N_FIELDS + 4)


@numba.njit
def _start(net, layer, condition, mode):
    """Bias and constant conditioning of every stream, where the first layer's pre-activations start."""
    for s in range(net[N_STREAMS]):
        simd.copy(layer[C_BIAS], VECTOR_BYTES, layer[C_CONSTANT] + s * net[N_Z_ROW], VECTOR_BYTES,
                   net[N_Z_ROW] // VECTOR_BYTES)  # fmt: skip
    if mode == CONSTANT_CONDITION:
        vectors = net[N_CONDITION_VECTORS]
        to_panels(
            condition, vectors * VECTOR_BYTES, net[N_STREAMS], vectors, net[N_CONDITION_PANELS], 0
        )
        project(net, net[N_CONDITION_CHANNELS], net[N_CONDITION_PANELS], vectors, net[N_STREAMS], net[N_ZEROS],
                 layer[C_CONSTANT], net[N_Z_ROW], layer[C_CONSTANT])  # fmt: skip


@numba.njit
def _start_span(net, layer, condition, condition_row, mode, count):
    """Bias and conditioning of the next `count` samples of every stream."""
    streams = net[N_STREAMS]
    for t in range(count):
        simd.copy(layer[C_CONSTANT], VECTOR_BYTES, layer[C_Z] + t * streams * net[N_Z_ROW], VECTOR_BYTES,
                   streams * net[N_Z_ROW] // VECTOR_BYTES)  # fmt: skip
    if mode == CONDITION:
        vectors = net[N_CONDITION_VECTORS]
        row = vectors * VECTOR_BYTES
        for t in range(count):
            for s in range(streams):
                to_panels(condition + s * condition_row + t * row, row, 1, vectors, net[N_CONDITION_PANELS],
                           t * streams + s)  # fmt: skip
        project(net, net[N_CONDITION_CHANNELS], net[N_CONDITION_PANELS], vectors, count * streams, net[N_ZEROS],
                 layer[C_Z], net[N_Z_ROW], layer[C_Z])  # fmt: skip


@numba.njit
def _multiply_turned(net, matrix, x, bias, init, out, backwards):
    """`multiply_row`, whose blocks come in the order of memory or, `backwards`, from the last to the first.

    What the sample before read last is then read first, while the cache still has it: weights that
    are larger than the cache, and always read in one order, would find nothing of themselves there.
    """
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    weights = simd.load_int(address + 8 * M_ADDRESS)
    inputs = simd.load_int(address + 8 * M_INPUTS)
    kernel = simd.load_int(address + 8 * M_ROW)
    blocks = simd.load_int(address + 8 * M_BLOCKS)
    block = simd.load_int(address + 8 * M_VECTORS) * VECTOR_BYTES
    size = simd.load_int(address + 8 * M_SIZE)
    for i in range(blocks):
        k = blocks - 1 - i if backwards != 0 else i
        simd.call6(
            kernel,
            weights + k * size,
            inputs,
            x,
            bias + k * block,
            init + k * block,
            out + k * block,
        )


@numba.njit
def _into(net, matrix, x, x_vectors, z, backwards):
    """Add matrix @ x of every stream to its row of pre-activations, from `z` on; x lies in panels."""
    if net[N_STREAMS] == 1:
        _multiply_turned(net, matrix, x, net[N_ZEROS], z, z, backwards)
    else:
        rows, z_row = net[N_ROWS], net[N_Z_ROW]
        vector = rows * VECTOR_BYTES
        multiply(net, matrix, net[N_STREAMS], rows, x, vector, x_vectors * vector, net[N_ZEROS],
                  z, z_row, VECTOR_BYTES, rows * z_row, z, z_row, VECTOR_BYTES, rows * z_row)  # fmt: skip


@numba.njit
def _input(net, layer, previous, z):
    """Add the product of the first layer's input matrix with the input."""
    streams, rows = net[N_STREAMS], net[N_ROWS]
    if net[N_TABLE]:
        gates = 3 * net[N_H_VECTORS]
        for s in range(streams):
            entry = (
                previous[s]
                if net[N_LAW] == CATEGORICAL
                else simd.load_int(net[G_ROWS] + 8 * previous[s])
            )
            simd.add(net[N_TABLE] + entry * gates * VECTOR_BYTES, z + s * net[N_Z_ROW], gates)
            if net[N_LAW] != CATEGORICAL:
                value = simd.load_float(net[G_VALUES] + 4 * previous[s])
                simd.add_scaled(net[G_LINE], z + s * net[N_Z_ROW], gates, value)
        return
    vectors = net[N_X_VECTORS]
    vector = rows * VECTOR_BYTES
    for s in range(streams):
        simd.copy(net[N_EMBEDDING] + previous[s] * vectors * VECTOR_BYTES, VECTOR_BYTES,
                   net[N_X] + (s // rows) * vectors * vector + (s % rows) * VECTOR_BYTES, vector, vectors)  # fmt: skip
    _into(net, layer[C_INPUT], net[N_X], vectors, z, 0)


@numba.njit
def _head(net, h, z):
    """Hidden units, and the head's part of the pre-activations -> logits."""
    streams, rows, z_row = net[N_STREAMS], net[N_ROWS], net[N_Z_ROW]
    head, logits, zeros = net[N_HEAD], net[N_LOGITS], net[N_ZEROS]
    if streams == 1:
        multiply_row(net, net[N_HEAD1], h, zeros, z, head)
        rectified(net, net[N_HEAD2], head, net[N_HEAD2_BIAS], logits)
        return
    vector = rows * VECTOR_BYTES
    head_vectors = net[N_HEAD_VECTORS]
    multiply(net, net[N_HEAD1], streams, rows, h, vector, net[N_H_VECTORS] * vector, zeros,
              z, z_row, VECTOR_BYTES, rows * z_row, head, VECTOR_BYTES, vector, head_vectors * vector)  # fmt: skip
    simd.relu(head, head, (streams + rows - 1) // rows * head_vectors * rows)
    multiply(net, net[N_HEAD2], streams, rows, head, vector, head_vectors * vector, zeros,
              net[N_HEAD2_BIAS], 0, VECTOR_BYTES, 0,
              logits, net[N_LOGIT_ROW], VECTOR_BYTES, rows * net[N_LOGIT_ROW])  # fmt: skip


def _run(
    net, layers, previous, uniforms, temperatures, codes, scores, condition, mode, scoring, asked
):
    """The loop over samples, for one group of streams: as `numba_cpu._run`, but for `previous`, int64 (G,)."""
    streams, rows, first, samples = net[N_STREAMS], net[N_ROWS], net[N_FIRST], codes.shape[1]
    h_vectors = net[N_H_VECTORS]
    vector = rows * VECTOR_BYTES
    gap = h_vectors * VECTOR_BYTES
    gates = net[N_HEAD_VECTORS] * VECTOR_BYTES
    z_row = net[N_Z_ROW]
    condition_row = net[N_CONDITION_VECTORS] * VECTOR_BYTES
    stream_bytes = condition_row if mode == CONSTANT_CONDITION else samples * condition_row
    condition += first * stream_bytes
    _start(net, layers[0], condition, mode)
    truncating = sampling.truncates(asked, net[N_CLASSES])
    scored = asked.shape[0] > 0 and asked[sampling.SCORED] > 0.0
    for t in range(samples):
        position = t % net[N_SPAN]
        if position == 0:
            _start_span(net, layers[0], condition + t * condition_row, stream_bytes, mode,
                        min(net[N_SPAN], samples - t))  # fmt: skip
        z0 = layers[0, C_Z] + position * streams * z_row
        for i in range(layers.shape[0]):
            layer = layers[i]
            z = z0 + gates
            if i == 0:
                _input(net, layer, previous, z)
            else:
                z = layer[C_Z] + gates
                for s in range(streams):
                    simd.copy(
                        layer[C_BIAS] + gates,
                        VECTOR_BYTES,
                        z + s * z_row,
                        VECTOR_BYTES,
                        4 * h_vectors,
                    )
                _into(net, layer[C_INPUT], layers[i - 1, C_H], h_vectors, z, t & 1)
            h = layer[C_H]
            _into(net, layer[C_HIDDEN], h, h_vectors, z + gap, t & 1)
            for s in range(streams):
                simd.cell(z + s * z_row, gap, h + (s // rows) * h_vectors * vector + (s % rows) * VECTOR_BYTES,
                           h_vectors, vector)  # fmt: skip
        _head(net, layers[layers.shape[0] - 1, C_H], z0)
        for s in range(streams):
            row = net[N_LOGITS] + s * net[N_LOGIT_ROW]
            if scoring:
                code = codes[first + s, t]
                scores[first + s, t] = _log_probability(net, row, code)
            else:
                if net[N_LAW] != CATEGORICAL:
                    code = draw_value(net[N_LAW], net[N_MIXTURES], net[N_CLASSES], row, uniforms[first + s, t],
                                      temperatures[first + s, t])  # fmt: skip
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
            previous[s] = code
    return -1


_SIGNATURE = (
    "int64(int64[::1], int64[:,::1], int64[::1], float64[:,::1], float64[:,::1], int64[:,::1], "
    "float64[:,::1], int64, int64, int64, float64[::1])"
)


@functools.cache
def kernels() -> Kernels:
    """Compiled at the first call, or read from the cache."""
    return Kernels(compiled(_run, _SIGNATURE), compiled(_tabulate, void(11)))
