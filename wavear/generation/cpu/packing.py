"""Weights and state as the CPU engine wants them: packed matrices in memory on huge pages."""

from __future__ import annotations

import mmap

import numpy as np
from torch import Tensor

LINE = 64
_HUGE = 2 << 20


class Region:
    """Memory for many arrays, reserved first and then allocated in one piece.

    The piece is aligned to, and advised for, huge pages: with small ones the physical addresses of
    2 MB of weights fall unevenly on the sets of an L2 cache of 2 MB, which then holds two thirds of
    them.
    """

    def __init__(self):
        self.size = 0
        self.address = 0
        self._filled: list[tuple[int, np.ndarray]] = []

    def reserve(self, nbytes: int) -> int:
        """Offset of a new array, aligned to a cache line."""
        offset = self.size
        self.size += -(-nbytes // LINE) * LINE
        return offset

    def put(self, array: np.ndarray) -> int:
        """Offset of a copy of `array`, made by `allocate`."""
        offset = self.reserve(array.nbytes)
        self._filled.append((offset, array))
        return offset

    def allocate(self) -> int:
        """Address of the whole region; what was not `put` is zero. A line is left over at the end to read beyond."""
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
            self.view(offset, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self._filled.clear()
        self.address = whole.ctypes.data + start
        return self.address

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        return self.bytes[offset : offset + nbytes]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Any parameter, on any device and of any precision, as contiguous float32."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def vectors_of(outputs: int, lanes: int, width: int, even: bool) -> tuple[int, int]:
    """(blocks, vectors in each) that hold `outputs`: blocks of equal size, at most `width` vectors wide."""
    vectors = -(-outputs // lanes)
    if width == 0:
        # For `_simd.sparse`: blocks of 8, or of 4 where that wastes less.
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
    """Pack a matrix (outputs, inputs) for the kernels of `_simd.tile`.

    Parameters
    ----------
    matrix : ndarray of float32, shape (outputs, inputs)
    lanes : int
        Floats in a vector.
    width : int
        Vectors in a block, at most; 0 for `_simd.sparse`.
    weights : str
        "float32", "bfloat16" or "int8".

    Returns ------- packed : ndarray, shape (blocks, inputs, vectors in a block * lanes), or half as
    many words for bfloat16; for int8
        bytes (blocks, n), each block its scales in float32 and then (inputs, vectors * lanes)
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
        packed = (bits[:, :, :, 0] | (bits[:, :, :, 1] << np.uint32(16))).reshape(
            blocks, inputs, -1
        )
    if weights == "int8":
        parts = scales.view(np.uint8), packed.astype(np.int8).view(np.uint8)
        packed = np.concatenate([part.reshape(blocks, -1) for part in parts], axis=1)
    return np.ascontiguousarray(packed), blocks, vectors


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values rounded to nearest, ties to even, as uint32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded)


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers from -127 to 127, as float32, and a scale for each row, the last axis: their product is near.

    A row of zeros has the scale zero. The scale of a row with a NaN or an infinity is one too, and
    so is its product.
    """
    scales = (np.abs(values).max(axis=-1) / np.float32(127)).astype(np.float32)
    usable = np.where(np.isfinite(scales) & (scales > 0), scales, np.float32(1))
    numbers = np.rint(np.where(np.isfinite(values), values, 0) / usable[..., None])
    # Of subnormal scales the rounding is so coarse that a quotient may be far beyond 127.
    return np.clip(numbers, -127, 127).astype(np.float32), scales


def as_packed(matrix: np.ndarray, weights: str) -> np.ndarray:
    """The matrix (..., inputs) of float32 that the kernels multiply with, once it is packed."""
    if weights == "bfloat16":
        return (round_to_bfloat16(matrix) << np.uint32(16)).view(np.float32)
    if weights == "int8":
        numbers, scales = quantise(matrix)
        with np.errstate(invalid="ignore"):
            return numbers * scales[..., None]
    return matrix
