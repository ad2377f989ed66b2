"""This machine: its processor, its cores and the versions that determine its speed."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import version
from pathlib import Path


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes of memory that are free for this process; None where that is not known.

    The smaller of Linux's MemAvailable and what its control group leaves.
    """
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            folder = Path("/sys/fs/cgroup")
            numbers = [int((folder / name).read_text()) for name in (limit, used)]
            found.append(max(numbers[0] - numbers[1], 0))
    return min(found, default=None)


def machine() -> str:
    """Return the processor's name, its cores, and the versions of Python, torch, numba, wavear."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        name = next(models, name)
    torch = version("torch").split("+")[0]
    versions = f"Python {platform.python_version()}, torch {torch}, numba {version('numba')}"
    return f"{name}, {available_cores()} cores; {versions}, wavear {version('wavear')}"
