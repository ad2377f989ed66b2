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
from wavear.generation.cpu.simd import DOTS, HEIGHTS, STORED, TALLEST, WEIGHT_BYTES, WIDEST

LINE = 64  # bytes of a cache line
_HUGE = 2 << 20
SPARSE_WIDTH = 0  # the width of a matrix for `simd.sparse`, see `pack`
# Of inputs of integers, the steps in 1: of units between -1 and 1, and where the range is unknown.
UNIT_STEPS, SIGNAL_STEPS = 32768, 1024


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

    def matrix(
        self,
        array: np.ndarray,
        width: int,
        stored: str | None = None,
        scales: np.ndarray | None = None,
        steps: int = 0,
    ) -> int:
        """Return the number of a matrix (outputs, inputs) in `matrices`; arguments as of `pack`."""
        stored = stored or self.weights
        kind = STORED[stored]
        packed, blocks, vectors = pack(array, LANES, width, stored, scales, steps)
        row = products().row(vectors, kind) if vectors <= WIDEST else 0
        size, step = packed.nbytes // blocks, vectors * LANES * WEIGHT_BYTES[kind]
        inputs = -(-array.shape[1] // (4 if kind == DOTS else 1))
        self._rows.append((self.put(packed), inputs, blocks, vectors, kind, row, size, step, steps))
        return len(self._rows) - 1

    def __len__(self) -> int:
        return len(self._rows)

    def vector(self, plan: Any, field: str, array: np.ndarray, vectors: int, fill: float = 0.0):
        """Point a field of a plan to the rows of `array`, each padded to `vectors`."""
        rows = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
        rows[..., : array.shape[-1]] = array
        self.point(plan, field, self.put(rows))

    def room(self, outputs: int, width: int, stored: str | None = None) -> int:
        """Return the vectors that a product of `outputs` elements writes."""
        blocks, vectors = vectors_of(outputs, LANES, width, stored or self.weights)
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


def padded(array: np.ndarray, *shape: int) -> np.ndarray:
    """Return an array with zeros behind its own values on each axis; -1: as it is."""
    sizes = [own if size < 0 else size for own, size in zip(array.shape, shape, strict=True)]
    found = np.zeros(sizes, np.float32)
    found[tuple(slice(own) for own in array.shape)] = array
    return found


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


def round_inputs(layer: nn.Module, steps: int) -> None:
    """Round what a layer reads as `simd.quantise` does."""
    layer.register_forward_pre_hook(lambda _, x: (on_steps(x[0], steps), *x[1:]))


def on_steps(x: Tensor, steps: int) -> Tensor:
    """Return x as integers of 16 bits times 1 / steps."""
    return (x * steps).clamp(-32767, 32767).round() / steps


def vectors_of(outputs: int, lanes: int, width: int, stored: str) -> tuple[int, int]:
    """Return (blocks, vectors in each) for `outputs`: equal blocks, at most `width` wide."""
    vectors = -(-outputs // lanes)
    if width == SPARSE_WIDTH:
        # Blocks of 8, or of 4 where that wastes less.
        each = 8 if -(-vectors // 8) * 2 == -(-vectors // 4) else 4
        return -(-vectors // each), each
    if width <= 4:
        # The kernels for several rows come in these widths only.
        each = 1 if stored == "dots" else width
        return -(-vectors // each), each
    blocks = -(-vectors // width)
    each = -(-vectors // blocks)
    return blocks, each + each % 2 if stored == "bfloat16" else each


def pack(
    matrix: np.ndarray,
    lanes: int,
    width: int,
    stored: str,
    scales: np.ndarray | None = None,
    steps: int = 0,
) -> tuple[np.ndarray, int, int]:
    """Pack a matrix (outputs, inputs) for the kernels of `simd`.

    Parameters
    ----------
    lanes : int
        Floats in a vector.
    width : int
        Vectors in a block, at most; for several rows the `width_for` them; `SPARSE_WIDTH` for
        `simd.sparse`.
    stored : str
        A name in `simd.STORED`.
    scales : array (outputs,), optional
        Of integers; by default what each output needs.
    steps : int
        For "dots": the steps of its inputs in 1.

    Returns
    -------
    array of uint8 (blocks, bytes), number of blocks, vectors in each
    """
    outputs, inputs = matrix.shape
    blocks, vectors = vectors_of(outputs, lanes, width, stored)
    numbers = padded(matrix, blocks * vectors * lanes, -1)
    parts = []
    if stored in ("int8", "dots"):
        given = None if scales is None else np.pad(scales, (0, len(numbers) - outputs))
        numbers, scales = quantise(numbers, given)
        numbers = numbers.astype(np.int8)
        parts = [scales / np.float32(steps or 1)]
    if stored == "dots":
        numbers = np.pad(numbers, ((0, 0), (0, -inputs % 4)))
        parts.append(-128 * numbers.sum(axis=1, dtype=np.int32))
        numbers = numbers.view(np.int32)
    if stored == "bfloat16":
        bits = round_to_bfloat16(numbers).reshape(-1, 2, lanes, inputs)
        numbers = bits[:, 0] | (bits[:, 1] << np.uint32(16))
    parts.append(numbers.reshape(blocks, -1, numbers.shape[-1]).transpose(0, 2, 1))
    rows = [np.ascontiguousarray(part).view(np.uint8).reshape(blocks, -1) for part in parts]
    return np.concatenate(rows, axis=1), blocks, vectors


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
    packer.matrix(matrix, width)
    x = packer.put(padded(rows, -1, x_vectors * LANES))
    row = packer.room(len(matrix), width) * VECTOR_BYTES
    panels, zeros = packer.reserve(TALLEST * x_vectors * VECTOR_BYTES), packer.reserve(row)
    out = packer.reserve(len(rows) * row)
    base = packer.allocate()
    products().tabulate(
        products().multiply, packer.matrices.ctypes.data, len(rows), base + x, x_vectors,
        base + panels, base + zeros, base + out, row,
    )  # fmt: skip
    return packer.floats(base + out, len(rows), row // 4)[:, : len(matrix)].copy()
