"""Parse text that others wrote, and detect changes in files of tensors."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON in UTF-8.

    Raises
    ------
    ValueError
        If it is not JSON, or nested too deep for Python.

    Examples
    --------
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested too deep
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """Return the CRC-32 of a text and tensors: safetensors detects short files, not changed bytes.

    It detects damage. A file that somebody changed on purpose can have the right one.
    """
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        content: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(content.numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"
