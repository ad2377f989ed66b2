"""Memory: how much this process can have, and failed allocations as `MemoryError`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

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


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes that this process can still have on a device; None if unknown.

    On a CPU: what the system has free or can free, within the limits of the process (`ulimit -v`)
    and of its control group (containers).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    known = [*_of_system(), *_of_process(), *_of_group()]
    return max(min(known), 0) if known else None


def _of_system() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield next(int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:"))
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_process() -> Iterator[int]:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not POSIX, or not Linux
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield limit - pages * resource.getpagesize()


def _of_group() -> Iterator[int]:
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            yield int((group / limit).read_text()) - int((group / used).read_text())
