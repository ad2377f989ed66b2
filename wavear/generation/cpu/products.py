"""Matrix products of the CPU engines: a matrix by its fields, one row or many at a time, zeros left out.

Everything here is compiled into the loops that use it, but for two functions that are compiled once
and called by their address (`products`): Numba would compile the vector kernels once more into
every function that multiplies.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numba

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.simd import HEIGHTS, TALLEST, VECTOR_BYTES

# Fields of a matrix: address of the packed weights, inputs, blocks, vectors in a block, kind of the
# weights, address of the kernel for one row, bytes of a block, bytes of the weights of one input in
# a block.
M_ADDRESS, M_INPUTS, M_BLOCKS, M_VECTORS, M_KIND, M_ROW, M_SIZE, M_STEP, M_FIELDS = range(9)

# Fields of the network for one group of streams.
(N_TAPS, N_CLASSES, N_STREAMS, N_ROWS, N_SPAN, N_X_VECTORS, N_H_VECTORS, N_SKIP_VECTORS, N_HEAD_VECTORS, N_Z_ROW,
 N_LOGIT_ROW, N_LOGIT_BLOCKS, N_EMBEDDING, N_CONDITION_CHANNELS, N_CONDITION_VECTORS, N_HEAD1, N_HEAD2, N_HEAD1_BIAS,
 N_HEAD2_BIAS, N_SKIP_BIAS, N_ZEROS, N_X, N_H, N_SKIP, N_HEAD, N_LOGITS, N_WEIGHTS, N_SUMS, N_PANELS,
 N_CONDITION_PANELS, N_TIME, N_FIRST, N_MULTIPLY, N_MATRICES, N_SPARSE,
 N_TABLE, N_VALUES, N_OFFSETS, N_PARTS, N_GATE_VECTORS, N_H_OFFSET, N_SKIP_SHARE, N_SKIP_PLACE, N_SKIP_ALL,
 N_HEAD_SHARE, N_HEAD_PLACE, N_HEAD_ALL, N_LOGIT_SHARE, N_LOGIT_PLACE, N_LOGIT_ALL, N_MINE, N_THEIRS, N_SEQUENCE,
 N_GIVE_WAY, N_FUSED, N_LAW, N_MIXTURES, N_FIELDS) = range(58)  # fmt: skip

NO_CONDITION, CONSTANT_CONDITION, CONDITION = range(
    3
)  # whether there is one, of one sample for all or of each

KINDS = {"float32": simd.FLOAT32, "bfloat16": simd.BFLOAT16, "int8": simd.INT8}

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

    `matrix` is the address of its fields. This is compiled on its own and called by address: Numba
    would otherwise compile the vector kernels once more into every function that multiplies.
    """
    weights = simd.load_int(matrix + 8 * M_ADDRESS)
    inputs = simd.load_int(matrix + 8 * M_INPUTS)
    vectors = simd.load_int(matrix + 8 * M_VECTORS)
    kind = 16 * vectors + 256 * simd.load_int(matrix + 8 * M_KIND)
    size = simd.load_int(matrix + 8 * M_SIZE)
    for _ in range(simd.load_int(matrix + 8 * M_BLOCKS)):
        done = 0
        panel = 0
        while done < rows:
            last = min(panel_rows, rows - done)
            row = 0
            while row < last:
                height = _height(last - row, vectors)
                simd.tile(
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
def multiply(net, matrix, rows, panel_rows, x, x_block, x_panel, bias, init, init_row, init_vector, init_panel, out,
              out_row, out_vector, out_panel):  # fmt: skip
    """`_multiply_rows`, by the number of the matrix."""
    simd.call15(net[N_MULTIPLY], net[N_MATRICES] + 8 * M_FIELDS * matrix, rows, panel_rows, x, x_block, x_panel, bias,
                 init, init_row, init_vector, init_panel, out, out_row, out_vector, out_panel)  # fmt: skip


@numba.njit
def multiply_row(net, matrix, x, bias, init, out):
    """out = init + bias + matrix @ x for one row, everything contiguous."""
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    weights = simd.load_int(address + 8 * M_ADDRESS)
    inputs = simd.load_int(address + 8 * M_INPUTS)
    kernel = simd.load_int(address + 8 * M_ROW)
    block = simd.load_int(address + 8 * M_VECTORS) * VECTOR_BYTES
    size = simd.load_int(address + 8 * M_SIZE)
    for _ in range(simd.load_int(address + 8 * M_BLOCKS)):
        simd.call6(kernel, weights, inputs, x, bias, init, out)
        weights += size
        bias += block
        init += block
        out += block


def _multiply_sparse(matrix, count, values, offsets, init, out, unused):
    """out = init + matrix @ x for one row, given by its entries above zero."""
    weights = simd.load_int(matrix + 8 * M_ADDRESS)
    vectors = simd.load_int(matrix + 8 * M_VECTORS)
    kind = vectors + 256 * simd.load_int(matrix + 8 * M_KIND)
    size = simd.load_int(matrix + 8 * M_SIZE)
    for _ in range(simd.load_int(matrix + 8 * M_BLOCKS)):
        simd.sparse(kind, weights, count, values, offsets, init, out)
        weights += size
        init += vectors * VECTOR_BYTES
        out += vectors * VECTOR_BYTES


@numba.njit
def rectified(net, matrix, x, bias, out):
    """out = bias + matrix @ relu(x) for one row, whose zeros, about half, are not multiplied nor their weights read."""
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    row = simd.load_int(address + 8 * M_STEP)
    count = simd.entries(
        x, simd.load_int(address + 8 * M_INPUTS), row, net[N_VALUES], net[N_OFFSETS]
    )
    simd.call7(net[N_SPARSE], address, count, net[N_VALUES], net[N_OFFSETS], bias, out, 0)


@numba.njit
def to_panels(first, row_bytes, rows, vectors, panels, done):
    """Copy rows of channels, `row_bytes` apart, to the rows from `done` on of panels of TALLEST rows."""
    for r in range(rows):
        panel = (done + r) // TALLEST
        row = (done + r) % TALLEST
        simd.copy(
            first + r * row_bytes,
            VECTOR_BYTES,
            panels + (panel * vectors * TALLEST + row) * VECTOR_BYTES,
            TALLEST * VECTOR_BYTES,
            vectors,
        )


@numba.njit
def project(net, matrix, panels, vectors, rows, bias, init, init_row, out):
    """Rows gathered in panels of TALLEST times a matrix, to rows of the pre-activations."""
    row = net[N_Z_ROW]
    multiply(net, matrix, rows, TALLEST, panels, TALLEST * VECTOR_BYTES, vectors * TALLEST * VECTOR_BYTES, bias,
              init, init_row, VECTOR_BYTES, TALLEST * init_row, out, row, VECTOR_BYTES, TALLEST * row)  # fmt: skip


def _simd_row_address(vectors, kind):
    return simd.row_address(vectors, kind)


@dataclass(frozen=True)
class Products:
    """What is compiled on its own: addresses of functions, and one that gives the address of a kernel for one row."""

    multiply: int
    sparse: int
    row: Any


@functools.cache
def products() -> Products:
    """Compiled at the first call, or read from the cache."""
    multiply_rows = compiled(_multiply_rows, void(15), callback=True)
    multiply_sparse = compiled(_multiply_sparse, void(7), callback=True)
    _kept.extend([multiply_rows, multiply_sparse])
    row = compiled(_simd_row_address, "int64(int64, int64)")
    return Products(multiply_rows.address, multiply_sparse.address, row)


_kept: list = []  # the code at an address lives as long as its object


def void(arguments: int) -> str:
    return f"void({', '.join(['int64'] * arguments)})"
