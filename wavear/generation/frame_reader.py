"""Mel frames from a pipe: raw float32 as it comes, or a .npy array."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from wavear.common.errors import WavearError, one_line
from wavear.mel.mel_files import array_of

_MAGIC = b"\x93NUMPY"


def read_frames(source: io.BufferedReader, bands: int) -> Iterator[np.ndarray]:
    """Yield mel frames, (M, n) each, float32.

    Raw little-endian float32, frame after frame, each with its M bands, is yielded as it comes. A
    `.npy` array, (F, M), or (M, F) as `numpy.save` writes a mel, is read whole first; with F = M it
    counts as (M, F).
    """
    size, count, held, ended = bands * 4, 0, b"", False
    while not ended:
        data = source.read1(1 << 16)
        held, ended = held + data, not data
        if not count and (held[:6] == _MAGIC or (len(held) < 6 and not ended)):
            if held[:6] == _MAGIC:
                yield _mel_of_array(held + source.read(), bands)
                return
            continue
        if ended and len(held) % size:
            raise WavearError(
                f"stdin ended within frame {count + len(held) // size}: it had {len(held) % size}"
                f" of {size} bytes; expected {bands} bands of float32 for each frame"
            )
        whole = len(held) // size * size
        if whole:
            yield _finite(np.frombuffer(held[:whole], "<f4").reshape(-1, bands).T, count)
        count, held = count + whole // size, held[whole:]
    if not count:
        raise WavearError("stdin held no mel frames")


def _mel_of_array(data: bytes, bands: int) -> np.ndarray:
    """Return the mel (M, F) of a .npy file."""
    try:
        array = array_of(data)
    except (ValueError, EOFError, OverflowError) as error:
        raise WavearError(f"the array on stdin is damaged: {one_line(error)}") from None
    if array.dtype.kind != "f":
        raise WavearError(f"the array on stdin is {array.dtype}, expected floating point")
    mel = array[0] if array.ndim == 3 and len(array) == 1 else array
    if mel.ndim != 2 or bands not in mel.shape:
        raise WavearError(
            f"the array on stdin has shape {mel.shape}, expected (frames, {bands}) or"
            f" ({bands}, frames)"
        )
    mel = mel if len(mel) == bands else mel.T
    if not mel.size:
        raise WavearError("stdin held no mel frames")
    return _finite(mel, 0)


def _finite(mel: np.ndarray, first: int) -> np.ndarray:
    """Return frames as float32, the first of which is number `first` on stdin."""
    bad = np.flatnonzero(~np.isfinite(mel).all(axis=0))
    if bad.size:
        raise WavearError(f"frame {first + bad[0]} of stdin holds NaN or infinity")
    return np.array(mel, np.float32, order="C")
