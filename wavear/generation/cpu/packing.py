"""Weights and state as the CPU engines read them: packed matrices in memory on huge pages."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.products import MATRIX, products
from wavear.generation.cpu.simd import DOTS, HEIGHTS, KINDS, TALLEST, WEIGHT_BYTES, WIDEST

LINE = 64  # bytes of a cache line
_HUGE = 2 << 20
SPARSE_WIDTH = 0  # the width of a matrix for `simd.sparse`, see `pack`


class Region:
    """Memory for many arrays, reserved first and then allocated in one piece.

    The piece is aligned to, and advised for, huge pages: with small ones the physical addresses of
    2 MB of weights fall unevenly on the sets of an L2 cache of 2 MB, which then holds two thirds of
    them.
    """

    def __init__(self):
        self.size = self.address = 0
        self._filled: list[tuple[int, np.ndarray]] = []
        self._fields: list[tuple[Any, str]] = []

    def reserve(self, nbytes: int) -> int:
        """Return the offset of a new array, aligned to a cache line."""
        offset = self.size
        self.size += -(-nbytes // LINE) * LINE
        return offset

    def put(self, array: np.ndarray) -> int:
        """Return the offset of a copy of `array`, made by `allocate`."""
        offset = self.reserve(array.nbytes)
        self._filled.append((offset, array))
        return offset

    def point(self, plan: Any, field: str, offset: int) -> None:
        """Set a field of a plan to an offset, which `allocate` makes an address."""
        plan[field] = offset
        self._fields.append((plan, field))

    def space(self, plan: Any, field: str, vectors: int) -> None:
        """Reserve vectors, and point a field of a plan to them."""
        self.point(plan, field, self.reserve(int(vectors) * VECTOR_BYTES))

    def allocate(self) -> int:
        """Return the address of the whole region, zero except for `put`.

        Kernels may read a cache line beyond its end.
        """
        length = self.size + _HUGE + 4096
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Private: shared memory, the default, gets huge pages on few systems.
            self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self._memory = mmap.mmap(-1, length)
        whole = np.frombuffer(self._memory, np.uint8)
        start = -whole.ctypes.data % _HUGE
        self.bytes = whole[start : start + self.size]
        for offset, array in self._filled:
            self.bytes[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._filled.clear()
        self.address = whole.ctypes.data + start
        for plan, field in self._fields:
            plan[field] += self.address
        self._fields.clear()
        return self.address

    def floats(self, address: int, *shape: int) -> np.ndarray:
        """Return the float32 array at an address, not a copy."""
        offset = int(address) - self.address
        nbytes = 4 * int(np.prod(shape))
        return self.bytes[offset : offset + nbytes].view(np.float32).reshape(shape)


class Packer(Region):
    """The weights of a network: matrices by number, vectors padded with zeros.

    Parameters
    ----------
    weights : str
        "float32", "bfloat16" or "int8": how matrices are stored, unless stated otherwise.
    """

    def __init__(self, weights: str):
        super().__init__()
        self.weights = weights
        self._rows: list[tuple[int, ...]] = []

    def matrix(self, array: np.ndarray, width: int, weights: str | None = None) -> int:
        """Return the number of a matrix (outputs, inputs) in `matrices`; `width` as in `pack`."""
        weights = weights or self.weights
        packed, blocks, vectors = pack(array, LANES, width, weights)
        return self._add(packed, array.shape[1], blocks, vectors, KINDS[weights])

    def dots(self, array: np.ndarray, width: int, scales: np.ndarray, step: float) -> int:
        """Return the number of a matrix in bytes; its inputs are integers times `step`."""
        packed, blocks, vectors = pack_dots(array, LANES, width, scales, step)
        return self._add(packed, -(-array.shape[1] // 4), blocks, vectors, DOTS)

    def _add(self, packed: np.ndarray, inputs: int, blocks: int, vectors: int, kind: int) -> int:
        row = products().row(vectors, kind) if vectors <= WIDEST else 0
        size, step = packed.nbytes // blocks, vectors * LANES * WEIGHT_BYTES[kind]
        self._rows.append((self.put(packed), inputs, blocks, vectors, kind, row, size, step))
        return len(self._rows) - 1

    def __len__(self) -> int:
        return len(self._rows)

    def vector(self, plan: Any, field: str, array: np.ndarray, vectors: int, fill: float = 0.0):
        """Point a field of a plan to the rows of `array`, each padded to `vectors`."""
        padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
        padded[..., : array.shape[-1]] = array
        self.point(plan, field, self.put(padded))

    def room(self, outputs: int, width: int, weights: str | None = None) -> int:
        """Return the vectors that a product of `outputs` elements writes."""
        even = (weights or self.weights) == "bfloat16"
        blocks, vectors = vectors_of(outputs, LANES, width, even)
        return blocks * vectors

    def allocate(self) -> int:
        """See `Region.allocate`."""
        base = super().allocate()
        self.matrices = np.array(self._rows, MATRIX)
        self.matrices["address"] += base
        return base


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a parameter, on any device and of any precision, as contiguous float32."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def vectors_for(channels: int) -> int:
    """Return the vectors that so many channels fill."""
    return -(-channels // LANES)


def width_for(rows: int) -> int:
    """Return the vectors in a block of a matrix that multiplies `rows` rows at a time."""
    return WIDEST if rows == 1 else 4 if rows < 4 else 2


def ahead_of(reach: int) -> int:
    """Return for how many samples products of inputs `reach` samples ago are computed at once."""
    return next(height for height in HEIGHTS[2] if height <= reach)


def power_of_two(number: int) -> int:
    """Return the largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def vectors_of(outputs: int, lanes: int, width: int, even: bool) -> tuple[int, int]:
    """Return (blocks, vectors in each) for `outputs`: equal blocks, at most `width` wide."""
    vectors = -(-outputs // lanes)
    if width == SPARSE_WIDTH:
        # Blocks of 8, or of 4 where that wastes less.
        each = 8 if -(-vectors // 8) * 2 == -(-vectors // 4) else 4
        return -(-vectors // each), each
    if width <= 4:
        # The kernels for several rows come in these widths only.
        return -(-vectors // width), width
    blocks = -(-vectors // width)
    each = -(-vectors // blocks)
    if even:
        each += each % 2
    return blocks, each


def pack(matrix: np.ndarray, lanes: int, width: int, weights: str) -> tuple[np.ndarray, int, int]:
    """Pack a matrix (outputs, inputs) for the kernels of `simd`.

    Parameters
    ----------
    matrix : ndarray of float32, shape (outputs, inputs)
    lanes : int
        Floats in a vector.
    width : int
        Vectors in a block, at most; 0 for `simd.sparse`.
    weights : str
        "float32", "bfloat16" or "int8".

    Returns
    -------
    packed : ndarray
        Of shape (blocks, inputs, vectors in a block * lanes), or half as many words for bfloat16;
        for int8 bytes (blocks, n): of each block its scales in float32, then (inputs, vectors *
        lanes).
    blocks, vectors : int
    """
    outputs, inputs = matrix.shape
    blocks, vectors = vectors_of(outputs, lanes, width, weights == "bfloat16")
    scales = np.zeros(blocks * vectors * lanes, np.float32)
    if weights == "int8":
        matrix, scales[:outputs] = quantise(matrix)
    columns = np.zeros((inputs, blocks * vectors * lanes), np.float32)
    columns[:, :outputs] = matrix.T
    packed = columns.reshape(inputs, blocks, vectors * lanes).transpose(1, 0, 2)
    if weights == "bfloat16":
        bits = round_to_bfloat16(packed).reshape(blocks, inputs, vectors // 2, 2, lanes)
        packed = bits[:, :, :, 0] | (bits[:, :, :, 1] << np.uint32(16))
        packed = packed.reshape(blocks, inputs, -1)
    if weights == "int8":
        parts = scales.view(np.uint8), packed.astype(np.int8).view(np.uint8)
        packed = np.concatenate([part.reshape(blocks, -1) for part in parts], axis=1)
    return np.ascontiguousarray(packed), blocks, vectors


def pack_dots(
    matrix: np.ndarray, lanes: int, width: int, scales: np.ndarray, step: float
) -> tuple[np.ndarray, int, int]:
    """Pack a matrix (outputs, inputs) for the kernels of `simd.DOTS`; returns as `pack`."""
    outputs, inputs = matrix.shape
    blocks, vectors = vectors_of(outputs, lanes, width, False)
    each = vectors * lanes
    numbers = np.zeros((blocks * each, -(-inputs // 4) * 4), np.int32)
    numbers[:outputs, :inputs] = quantise(matrix, scales)[0]
    steps = np.zeros(blocks * each, np.float32)
    steps[:outputs] = scales * np.float32(step)
    corrections = (-128 * numbers.sum(axis=1)).astype(np.int32)
    quads = numbers.reshape(blocks, each, -1, 4).transpose(0, 2, 1, 3).astype(np.int8)
    parts = [part.view(np.uint8).reshape(blocks, -1) for part in (steps, corrections)]
    packed = np.concatenate([*parts, quads.reshape(blocks, -1).view(np.uint8)], axis=1)
    return packed, blocks, vectors


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 rounded to nearest, ties to even, as uint32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded)


def quantise(values: np.ndarray, given: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return integers from -127 to 127, as float32, and a scale for each row of the last axis.

    Other scales can be `given`, such as those of a larger matrix.

    Their product is near `values`. A row of zeros has the scale zero. The scale of a row with a NaN
    or an infinity is one too, and so is its product.
    """
    own = (np.abs(values).max(axis=-1) / np.float32(127)).astype(np.float32)
    scales = own if given is None else given
    usable = np.where(np.isfinite(scales) & (scales > 0), scales, np.float32(1))
    numbers = np.rint(np.where(np.isfinite(values), values, 0) / usable[..., None])
    # The rounding of subnormal scales is so coarse that a quotient may be far beyond 127.
    return np.clip(numbers, -127, 127).astype(np.float32), scales


def as_packed(matrix: np.ndarray, weights: str) -> np.ndarray:
    """Return the matrix (..., inputs) of float32 that the kernels multiply with."""
    if weights == "bfloat16":
        return (round_to_bfloat16(matrix) << np.uint32(16)).view(np.float32)
    if weights == "int8":
        numbers, scales = quantise(matrix)
        with np.errstate(invalid="ignore"):
            return numbers * scales[..., None]
    return matrix


def rounded(model: Any, weights: str, matrices: Callable[[Any], Iterable[Tensor]]) -> Any:
    """Return the model that an engine runs: in float32 or more, its matrices rounded as packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.copy_(torch.from_numpy(as_packed(to_numpy(matrix), weights)))
    return model


def named_matrices(model: nn.Module, *prefixes: str) -> Iterable[tuple[str, Tensor]]:
    """Yield the names and values of the matrices below some modules."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith(prefixes):
            yield name, parameter


def multiplied(rows: np.ndarray, matrix: np.ndarray, weights: str = "float32") -> np.ndarray:
    """Return rows (n, inputs) @ matrix (outputs, inputs).T, summed by the engine's own kernel.

    A library of linear algebra may sum in another order with another number of threads.
    """
    packer = Packer(weights)
    x_vectors, width = vectors_for(rows.shape[1]), width_for(TALLEST)
    padded = np.zeros((len(rows), x_vectors * LANES), np.float32)
    padded[:, : rows.shape[1]] = rows
    packer.matrix(matrix, width)
    x = packer.put(padded)
    row = packer.room(len(matrix), width) * VECTOR_BYTES
    panels, zeros = packer.reserve(TALLEST * x_vectors * VECTOR_BYTES), packer.reserve(row)
    out = packer.reserve(len(rows) * row)
    base = packer.allocate()
    products().tabulate(
        products().multiply, packer.matrices.ctypes.data, len(rows), base + x, x_vectors,
        base + panels, base + zeros, base + out, row,
    )  # fmt: skip
    return packer.floats(base + out, len(rows), row // 4)[:, : len(matrix)].copy()
