"""Run code within bounds of memory and time, and measure both (Linux)."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AVAILABLE = sys.platform == "linux"
MIB = 2**20
_BUSY = 3  # times as long, as other work may run


class TooSlow(BaseException):
    """Time is up. Not an Exception: no handler may swallow it."""


@dataclass
class Cost:
    """What a block of code took."""

    seconds: float = 0.0
    """Of the processor: other work on the machine does not count."""
    mebibytes: float = 0.0
    """Peak of the resident memory above that before."""


@contextlib.contextmanager
def bounded(mebibytes: int = 1024, seconds: float = 20.0) -> Iterator[Cost]:
    """Let allocations of more memory fail, and end what takes longer; yield the cost, set at last.

    The bound is of the address space (RLIMIT_AS): memory that is asked for counts, used or not.
    """
    cost, before = Cost(), resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resident, address = _status("VmRSS"), _status("VmSize")
    old = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, _BUSY * seconds)
    resource.setrlimit(resource.RLIMIT_AS, (address + mebibytes * MIB, before[1]))
    began = time.process_time()
    try:
        yield cost
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)
        cost.seconds = time.process_time() - began
        cost.mebibytes = (_status("VmHWM") - resident) / MIB


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _out_of_time(*_: object) -> None:
    raise TooSlow
