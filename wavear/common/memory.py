"""Failed allocations as `MemoryError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `MemoryError` where torch raises a `RuntimeError` because memory is exhausted."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError from error
        raise
