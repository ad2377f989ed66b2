"""Matrix products of the CPU engines: one row or many at a time, zeros left out; and plans.

A plan is a NumPy record with named fields (`record`), which Numba reads in place. Everything here
is compiled into the loops that use it, but for three functions that are compiled once and called by
address (`products`): Numba would compile the vector kernels once more into every function that
multiplies.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.emitter import I64, VECTOR_BYTES
from wavear.generation.cpu.simd import DOTS_HEIGHTS, HEIGHTS, TALLEST

# Conditioning of a call: none, one vector for all samples, or one for each.
NO_CONDITION, CONSTANT_CONDITION, CONDITION = range(3)


def record(names: str) -> np.dtype:
    """Return the type of a plan: an int64 field for each name."""
    return np.dtype([(name, np.int64) for name in names.split()])


def array_of(dtype: np.dtype) -> Any:
    """Return Numba's type of a contiguous array of records."""
    return numba.from_dtype(dtype)[::1]


# A packed matrix: address of the weights, inputs, blocks, vectors in a block, how the weights are
# stored, address of the kernel for one row, bytes of a block, bytes of one input in a block; for
# `simd.DOTS`, whose inputs are integers, their steps in 1, else 0.
MATRIX = record("address inputs blocks vectors kind row size step steps")
_MATRIX = numba.from_dtype(MATRIX)


@intrinsic
def _address(context, matrix):
    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(matrix), codegen


@intrinsic
def _matrix(context, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(_MATRIX))

    return _MATRIX(address), codegen


class Place(NamedTuple):
    """Where the rows of a product lie: strides in bytes to the next row, vector and panel."""

    address: int
    row: int
    vector: int
    panel: int


@numba.njit
def in_panels(address, rows, vectors):
    """Panels of `rows` rows of `vectors` vectors."""
    return Place(address, VECTOR_BYTES, rows * VECTOR_BYTES, vectors * rows * VECTOR_BYTES)


@numba.njit
def in_lines(address, rows, row_bytes):
    """Rows `row_bytes` apart, `rows` of which correspond to a panel."""
    return Place(address, row_bytes, VECTOR_BYTES, rows * row_bytes)


@numba.njit
def seat(address, stream, rows, vectors):
    """Return the address of a stream's row in panels."""
    return address + ((stream // rows) * vectors * rows + stream % rows) * VECTOR_BYTES


@numba.njit
def copy_row(source, out, vectors):
    """Copy contiguous vectors."""
    simd.copy(source, VECTOR_BYTES, out, VECTOR_BYTES, vectors)


@numba.njit
def input_vectors(matrix, vectors):
    """Return the vectors of a row as input of a matrix: half of them in bytes."""
    return (vectors + 1) // 2 if matrix.steps else vectors


@numba.njit
def copy_input(matrix, x, x_vector, out, out_vector, vectors):
    """Copy a row as input of a matrix; `..._vector`: bytes to the next vector."""
    if matrix.steps:
        simd.quantise(x, x_vector, out, out_vector, vectors, np.float32(matrix.steps))
    else:
        simd.copy(x, x_vector, out, out_vector, vectors)


@numba.njit
def as_input(matrix, x, vectors, memory):
    """Return the address of a contiguous row as input of a matrix: `x` if it is, else `memory`."""
    if not matrix.steps:
        return x
    copy_input(matrix, x, VECTOR_BYTES, memory, VECTOR_BYTES, vectors)
    return memory


_TALL1 = DOTS_HEIGHTS
_TALL2 = HEIGHTS[2]
_TALL4 = HEIGHTS[4]


@numba.njit
def _height(rows, vectors):
    """Rows of the tallest tile kernel of that width that `rows` rows fill."""
    if vectors == 1:
        for height in _TALL1:
            if height <= rows:
                return height
    if vectors == 2:
        for height in _TALL2:
            if height <= rows:
                return height
    if vectors == 4:
        for height in _TALL4:
            if height <= rows:
                return height
    return 1


def _multiply_rows(address, rows, panel_rows, x, x_block, x_panel, bias, init, init_row,
                   init_vector, init_panel, out, out_row, out_vector, out_panel):  # fmt: skip
    """See `multiply`."""
    matrix = _matrix(address)
    weights, vectors = matrix.address, matrix.vectors
    kind = 16 * vectors + 256 * matrix.kind
    for _ in range(matrix.blocks):
        done = 0
        panel = 0
        while done < rows:
            last = min(panel_rows, rows - done)
            row = 0
            while row < last:
                height = _height(last - row, vectors)
                simd.tile(
                    height + kind, weights, matrix.inputs,
                    x + panel * x_panel + row * VECTOR_BYTES, x_block, bias,
                    init + panel * init_panel + row * init_row, init_row, init_vector,
                    out + panel * out_panel + row * out_row, out_row, out_vector,
                )  # fmt: skip
                row += height
            done += last
            panel += 1
        weights += matrix.size
        bias += vectors * VECTOR_BYTES
        init += vectors * init_vector
        out += vectors * out_vector


@numba.njit
def multiply(net, matrix, rows, panel_rows, x, bias, init, out):
    """out = init + bias + matrix @ x for rows in panels of `panel_rows`; reads each weight once."""
    simd.call15(net.multiply, _address(matrix), rows, panel_rows, x.address, x.vector, x.panel,
                bias, init.address, init.row, init.vector, init.panel,
                out.address, out.row, out.vector, out.panel)  # fmt: skip


@numba.njit
def multiply_row(matrix, x, bias, init, out):
    """out = init + bias + matrix @ x for one row, everything contiguous."""
    weights, inputs, kernel, size = matrix.address, matrix.inputs, matrix.row, matrix.size
    block = matrix.vectors * VECTOR_BYTES
    for _ in range(matrix.blocks):
        simd.call6(kernel, weights, inputs, x, bias, init, out)
        weights += size
        bias += block
        init += block
        out += block


def _multiply_sparse(address, count, values, offsets, init, out, unused):
    """out = init + matrix @ x for one row, given by its entries above zero."""
    matrix = _matrix(address)
    weights, vectors = matrix.address, matrix.vectors
    kind = vectors + 256 * matrix.kind
    for _ in range(matrix.blocks):
        simd.sparse(kind, weights, count, values, offsets, init, out)
        weights += matrix.size
        init += vectors * VECTOR_BYTES
        out += vectors * VECTOR_BYTES


@numba.njit
def multiply_entries(net, matrix, count, init, out):
    """out = init + matrix @ x for one row, whose entries lie at `net.values`, `net.offsets`."""
    simd.call7(net.sparse, _address(matrix), count, net.values, net.offsets, init, out, 0)


@numba.njit
def rectified(net, matrix, x, init, out):
    """out = init + matrix @ relu(x) for one row: omits zeros, about half, and their weights."""
    count = simd.entries(x, matrix.inputs, matrix.step, net.values, net.offsets)
    multiply_entries(net, matrix, count, init, out)


@numba.njit
def multiply_streams(net, matrix, x, x_vectors, x_panel, bias, init, out):
    """out = init + bias + matrix @ x for all streams; x in panels of `net.rows` rows."""
    streams, rows = net.streams, net.rows
    if streams == 1:
        x = as_input(matrix, x, x_vectors, net.integers)
        multiply_row(matrix, x, bias, init.address, out.address)
        return
    vector = rows * VECTOR_BYTES
    place = Place(x, VECTOR_BYTES, vector, x_panel)
    if matrix.steps:
        vectors = input_vectors(matrix, x_vectors)
        place = in_panels(net.integers, rows, vectors)
        for s in range(streams):
            row = x + (s // rows) * x_panel + s % rows * VECTOR_BYTES
            out_row = seat(net.integers, s, rows, vectors)
            copy_input(matrix, row, vector, out_row, vector, x_vectors)
    multiply(net, matrix, streams, rows, place, bias, init, out)


@numba.njit
def read_out(net, matrix):
    """Compute the logits of all streams from the hidden units of the head before their ReLU."""
    rows, vectors = net.rows, net.head_vectors
    if net.sparse:
        rectified(net, matrix, net.head, net.head2_bias, net.logits)
        return
    simd.relu(net.head, net.head, (net.streams + rows - 1) // rows * vectors * rows)
    multiply_streams(net, matrix, net.head, vectors, vectors * rows * VECTOR_BYTES, net.zeros,
                     Place(net.head2_bias, 0, VECTOR_BYTES, 0),
                     in_lines(net.logits, rows, net.logit_row))  # fmt: skip


@numba.njit
def to_panels(matrix, first, row_bytes, rows, vectors, panels, done):
    """Copy rows of inputs, `row_bytes` apart, to row `done` and later of panels of TALLEST."""
    for r in range(rows):
        out = seat(panels, done + r, TALLEST, input_vectors(matrix, vectors))
        source = first + r * row_bytes
        copy_input(matrix, source, VECTOR_BYTES, out, TALLEST * VECTOR_BYTES, vectors)


@numba.njit
def project(net, matrix, panels, vectors, rows, init, init_row, out):
    """Rows gathered in panels of TALLEST times a matrix, to rows of the pre-activations."""
    panels = in_panels(panels, TALLEST, input_vectors(matrix, vectors))
    multiply(net, matrix, rows, TALLEST, panels, net.zeros, in_lines(init, TALLEST, init_row),
             in_lines(out, TALLEST, net.z_row))  # fmt: skip


@numba.njit
def start_constants(net, layers, matrices, condition, mode):
    """Write bias and constant conditioning of every layer and stream."""
    vectors = net.condition_vectors
    if mode == CONSTANT_CONDITION:
        to_panels(matrices[layers[0].condition], condition, vectors * VECTOR_BYTES, net.streams,
                  vectors, net.condition_panels, 0)  # fmt: skip
    for i in range(layers.shape[0]):
        constant = layers[i].constant
        for s in range(net.streams):
            copy_row(layers[i].bias, constant + s * net.z_row, net.z_row // VECTOR_BYTES)
        if mode == CONSTANT_CONDITION:
            project(net, matrices[layers[i].condition], net.condition_panels, vectors, net.streams,
                    constant, net.z_row, constant)  # fmt: skip


@numba.njit
def start_span(net, layers, matrices, condition, stream_bytes, mode, count):
    """Write bias and conditioning of the next `count` samples of every layer and stream.

    The conditioning of a stream begins `stream_bytes` after that of the stream before.
    """
    streams, vectors = net.streams, net.condition_vectors
    rows, row = streams * net.z_row, vectors * VECTOR_BYTES
    if mode == CONDITION:
        for t in range(count):
            for s in range(streams):
                to_panels(matrices[layers[0].condition], condition + s * stream_bytes + t * row,
                          row, 1, vectors, net.condition_panels, t * streams + s)  # fmt: skip
    for i in range(layers.shape[0]):
        z = layers[i].z
        for t in range(count):
            copy_row(layers[i].constant, z + t * rows, rows // VECTOR_BYTES)
        if mode == CONDITION:
            project(net, matrices[layers[i].condition], net.condition_panels, vectors,
                    count * streams, z, net.z_row, z)  # fmt: skip


def _tabulate(multiply, address, rows, x, x_vectors, panels, zeros, out, out_row):
    """out = matrix @ x for rows of float32, `x_vectors` wide, by way of one panel of TALLEST."""
    done, matrix = 0, _matrix(address)
    x_row = x_vectors * VECTOR_BYTES
    while done < rows:
        count = min(TALLEST, rows - done)
        to_panels(matrix, x + done * x_row, x_row, count, x_vectors, panels, 0)
        simd.call15(
            multiply, address, count, TALLEST, panels, TALLEST * VECTOR_BYTES, 0, zeros, zeros, 0,
            VECTOR_BYTES, 0, out + done * out_row, out_row, VECTOR_BYTES, 0,
        )  # fmt: skip
        done += count


def _row_address(vectors, kind):
    return simd.row_address(vectors, kind)


@dataclass(frozen=True)
class Products:
    """Parts that are compiled separately: addresses, and functions to call from Python."""

    multiply: int
    sparse: int
    row: Any
    """`row(vectors, kind)`: the address of the kernel for one row."""
    tabulate: Any


@functools.cache
def products() -> Products:
    """Compile at the first call, or read from the cache."""
    multiply_rows = compiled(_multiply_rows, _void(15), callback=True)
    multiply_sparse = compiled(_multiply_sparse, _void(7), callback=True)
    _kept.extend([multiply_rows, multiply_sparse])
    return Products(
        multiply_rows.address,
        multiply_sparse.address,
        compiled(_row_address, "int64(int64, int64)"),
        compiled(_tabulate, _void(9)),
    )


_kept: list = []  # the code at an address lives as long as its object


def _void(arguments: int) -> str:
    return f"void({', '.join(['int64'] * arguments)})"
