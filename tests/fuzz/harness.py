"""Run one case: a result or a refusal, bounded memory and time, no file touched elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limits import bounded
from platformdirs import user_cache_path

from wavear.common.errors import WavearError

MEBIBYTES, SECONDS = 768, 20
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_watched: list[Path] = []
_touched: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _RUNS:
        _touched.append(f"{event} {arguments}")
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if not (writes or event in _CHANGES) or isinstance(arguments[0], int):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if path != os.devnull and not any(Path(path).is_relative_to(folder) for folder in _watched):
        _touched.append(f"{event} {path}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Raise AssertionError for files written outside folders, processes and connections."""
    _touched.clear()
    _watched[:] = [Path(os.path.abspath(folder)) for folder in folders]
    try:
        yield
    finally:
        _watched.clear()
    assert not _touched, _touched


class Fuzzer:
    """Cases of a target, each a function of a seed."""

    def __init__(self, target: type[Any], folder: Path):
        self.folder = folder
        (folder / "made").mkdir(parents=True)
        self.target = target(folder / "made")
        self.number = 0

    def run(self, seed: int) -> Path:
        """Write and run a case, and return its file; whatever violates the invariant is raised."""
        self.number += 1
        folder = self.folder / f"case-{self.number % 2}"
        folder.mkdir(exist_ok=True)
        path = self.target.case(random.Random(seed), folder)
        kernels = user_cache_path("wavear", appauthor=False)  # compiled code, of the first case
        with (
            bounded(MEBIBYTES, SECONDS),
            self._environment(),
            watched(self.folder, kernels),
            warnings.catch_warnings(),
            contextlib.suppress(WavearError, OSError),
        ):
            warnings.simplefilter("ignore")
            self.target.run(path)
        return path

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        """Keep temporary files and the cache in the folder, and log nothing."""
        logger, cache = logging.getLogger("wavear"), os.environ.get("WAVEAR_CACHE")
        before, tempfile.tempdir = (logger.level, tempfile.tempdir), str(self.folder)
        os.environ["WAVEAR_CACHE"] = str(self.folder / "cache")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            level, tempfile.tempdir = before
            logger.setLevel(level)
            del os.environ["WAVEAR_CACHE"]
            if cache is not None:
                os.environ["WAVEAR_CACHE"] = cache
