"""This machine: its processor, its cores and the versions that determine its speed."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import version


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the processor's name, its cores, and the versions of Python, torch, numba, wavear."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        name = next(models, name)
    torch = version("torch").split("+")[0]
    versions = f"Python {platform.python_version()}, torch {torch}, numba {version('numba')}"
    return f"{name}, {available_cores()} cores; {versions}, wavear {version('wavear')}"
