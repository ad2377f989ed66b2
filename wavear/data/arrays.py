"""Arrays on disk that are mapped into memory instead of read: a safetensors file with a checksum. No pickle."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavear.common.atomic import replace_file

_DTYPES = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "U64": "<u8", "F64": "<f8"}
_SUM, _ABOUT = "wavear_crc32", "wavear_about"
_LARGEST_HEADER = 1 << 20  # bytes; ours have a few hundred


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], about: str) -> None:
    """Write arrays; `path` holds the old ones or the new ones, at any moment.

    Parameters
    ----------
    path : str or Path
    arrays : of uint8, int8, int32, int64, uint64 or float64
    about : str
        What they are; `map_arrays` has to be told the same.
    """
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {_ABOUT: about, _SUM: f"{_checksum(contiguous):08x}"}
    replace_file(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def map_arrays(path: str | Path, about: str) -> dict[str, np.ndarray]:
    """The arrays of a file, read-only and mapped: what is not looked at takes no memory that cannot be given back.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would block
        raise FileNotFoundError(f"{path}: no such file")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError("it is cut short, or no such file")
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata[_ABOUT] != about:
            raise ValueError(f"it holds {metadata[_ABOUT]!r}, expected {about!r}")
        data = (
            np.memmap(path, np.uint8, "r", offset=8 + length)
            if size > 8 + length
            else np.zeros(0, np.uint8)
        )
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= data.size:
                raise ValueError("it is cut short")
            arrays[name] = (
                data[begin:end]
                .view(_DTYPES[entry["dtype"]])
                .reshape(entry["shape"])
                .view(np.ndarray)
            )
        if f"{_checksum(arrays):08x}" != metadata[_SUM]:
            raise ValueError("its bytes are not those that were written (CRC-32)")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    value = 0
    for name in sorted(arrays):
        content: Any = arrays[name].reshape(-1).view(np.uint8)
        value = zlib.crc32(content, zlib.crc32(f"{name} {arrays[name].shape}".encode(), value))
    return value
