"""This machine: its processor, its cores and the versions that make its speed."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import version


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the processor as its system names it, its cores, and the versions of what makes the speed."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), name
        )
    versions = f"Python {platform.python_version()}, torch {version('torch').split('+')[0]}, numba {version('numba')}"
    return f"{name}, {available_cores()} cores; {versions}, wavear {version('wavear')}"
