"""Mel frames from a pipe, as they come: raw float32, or a .npy array."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from wavear.common.errors import WavearError

_MAGIC = b"\x93NUMPY"


def read_frames(source: io.BufferedReader, bands: int) -> Iterator[np.ndarray]:
    """Yield mel frames as they come, (M, n) each, float32.

    Parameters
    ----------
    source : binary file, with `read1`
        Raw little-endian float32, frame after frame, each with its M bands; or one `.npy` array,
        (F, M), or (M, F) as `numpy.save` writes a mel (which is read whole, because its frames lie
        apart). An array with F = M counts as (M, F).
    bands : int
        M.

    Raises
    ------
    WavearError
        If it ends within a frame, has none, or is an array of another shape or type.
    """
    buffered = _Buffered(source)
    dtype, total, across = np.dtype("<f4"), None, False
    if buffered.peek(len(_MAGIC)) == _MAGIC:
        dtype, total, across = _npy_header(buffered, bands)
    if total == 0:
        raise WavearError("stdin held no mel frames")
    if across:
        assert total is not None
        values = np.frombuffer(buffered.take(total * bands * dtype.itemsize), dtype)
        if values.size < total * bands:
            raise WavearError(
                f"the array on stdin ends after {values.size} of {total * bands} numbers"
            )
        yield values.reshape(bands, total).astype(np.float32)
        return
    size = bands * dtype.itemsize
    count = 0
    while total is None or count < total:
        data = buffered.some(size, None if total is None else (total - count) * size)
        if not data:
            break
        if len(data) % size:
            raise WavearError(
                f"stdin ended within frame {count + len(data) // size}: it had {len(data) % size}"
                f" of {size} bytes; expected {bands} bands of {dtype.name} for each frame"
            )
        frames = np.frombuffer(data, dtype).reshape(-1, bands)
        bad = np.flatnonzero(~np.isfinite(frames).all(axis=1))
        if bad.size:
            raise WavearError(f"frame {count + bad[0]} of stdin holds NaN or infinity")
        count += len(frames)
        yield np.array(frames.T, np.float32, order="C")
    if total is not None and count < total:
        raise WavearError(f"the array on stdin ends after {count} of {total} frames")
    if not count:
        raise WavearError("stdin held no mel frames")


def _npy_header(buffered: _Buffered, bands: int) -> tuple[np.dtype, int, bool]:
    """Return type, number of frames, and whether the array holds band after band."""
    start = buffered.take(8)
    wide = 2 if start[6:7] == b"\x01" else 4
    length = buffered.take(wide)
    header = io.BytesIO(length + buffered.take(int.from_bytes(length, "little")))
    read = np.lib.format.read_array_header_1_0 if wide == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(header)
    except ValueError as error:
        raise WavearError(f"the array on stdin has a damaged header: {error}") from None
    if dtype.kind != "f":
        raise WavearError(f"the array on stdin is {dtype}, expected floating point")
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) != 2 or bands not in shape:
        raise WavearError(
            f"the array on stdin has shape {shape}, expected (frames, {bands}) or ({bands}, frames)"
        )
    bands_first = shape[0] == bands
    return dtype, shape[1] if bands_first else shape[0], bands_first != fortran


class _Buffered:
    """Bytes as they come, without waiting for more than is asked for."""

    def __init__(self, source: io.BufferedReader):
        self.source = source
        self.held = bytearray()

    def peek(self, count: int) -> bytes:
        """Return `count` bytes without taking them, fewer only at the end."""
        while len(self.held) < count and (data := self.source.read1(1 << 16)):
            self.held += data
        return bytes(self.held[:count])

    def take(self, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end."""
        data = self.peek(count)
        del self.held[:count]
        return data

    def some(self, unit: int, most: int | None) -> bytes:
        """Return the bytes that are there in whole units, at least one; at the end, the rest."""
        self.peek(unit)
        count = len(self.held) // unit * unit or len(self.held)
        return self.take(count if most is None else min(count, most))
