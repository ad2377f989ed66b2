"""This machine: its processor, its cores and the versions that determine its speed."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
# Control groups of version 2 and 1.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
)


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes of memory that are free for this process; None where that is not known.

    The smaller of Linux's MemAvailable and what its control group leaves; both count the cache of
    files as free.
    """
    found = []
    with contextlib.suppress(OSError, KeyError):
        found.append(_numbers(_MEMINFO)["MemAvailable:"] * 1024)
    for folder, limit, used, prefix in _GROUPS:
        with contextlib.suppress(OSError, KeyError, ValueError):
            parts = _numbers(folder / "memory.stat")
            cache = parts[f"{prefix}active_file"] + parts[f"{prefix}inactive_file"]
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            found.append(max(most - now + cache, 0))
    return min(found, default=None)


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines are a name and a number."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def machine() -> str:
    """Return the processor's name, its cores, and the versions of Python, torch, numba, wavear."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
        name = next(models, name)
    torch = version("torch").split("+")[0]
    versions = f"Python {platform.python_version()}, torch {torch}, numba {version('numba')}"
    return f"{name}, {available_cores()} cores; {versions}, wavear {version('wavear')}"
