"""Claim files and folders, so that two processes do not write the same ones."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from wavear.common.atomic import locked, replace_file
from wavear.common.compiled import cache_directory
from wavear.common.errors import WavearError

# The loader workers of a killed training inherit its lock, and end within a moment.
_PATIENCE = 2.0  # seconds
_MARK = ".wavear-claim-"


@contextlib.contextmanager
def claimed(targets: Iterable[str | Path], folder: str | Path | None = None) -> Iterator[None]:
    """Claim files for this process until the end of the block.

    A claim is two files in `folder`: a lock, which the system releases when this process ends in
    whatever way, and the names of the targets. Claims of ended processes are removed. Where
    `folder` cannot be made or locked, there is no claim.

    Parameters
    ----------
    targets : iterable of str or Path
        They need not exist.
    folder : str or Path, optional
        By default the one above all targets. It is made, and removed again if it stays empty.

    Raises
    ------
    WavearError
        If another process has claimed one of them; the message has its number.
    """
    from filelock import FileLock, Timeout

    names = {str(Path(target).resolve()) for target in targets}
    if not names:
        yield
        return
    root = Path(folder or os.path.commonpath([Path(name).parent for name in names])).resolve()
    # A claim lies in the folder that its process was given, which may be above or below this one.
    places = {root, *root.parents, *(Path(name).parent for name in names)}
    path = root / f"{_MARK}{os.getpid()}-{uuid.uuid4().hex}.lock"
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = FileLock(path)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError, Timeout), _alone():
            for place in places:
                _refuse_overlap(place, names)
            root.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            stack.callback(_remove, path)
            lock.acquire(blocking=False)
            stack.callback(lock.release)
            text = json.dumps(_Claim(os.getpid(), platform.node(), sorted(names))._asdict())
            replace_file(path.with_suffix(".json"), lambda to: to.write_text(text, "utf-8"))
        yield


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one process of the user look and claim at a time."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with locked(cache_directory() / "claims.lock"):
        yield


def _refuse_overlap(place: Path, names: set[str]) -> None:
    """Raise if a living process has a claim in a folder on one of `names`; remove other claims."""
    from filelock import FileLock, Timeout

    for path in place.glob(f"{_MARK}*.lock") if place.is_dir() else ():
        with contextlib.suppress(OSError):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size:  # nothing that is a lock
                continue
            claim = _read(path.with_suffix(".json"))
            both = sorted(names & set(claim.targets))
            lock = FileLock(path)
            try:
                lock.acquire(timeout=_PATIENCE if both else 0)
            except Timeout:
                if not both:
                    continue
                raise WavearError(
                    f"{both[0]} is being written by process {claim.pid} on {claim.host}: wait for"
                    " it, or choose another --out"
                ) from None
            lock.release()
            _remove(path)


class _Claim(NamedTuple):
    pid: int
    host: str
    targets: list[str]


def _read(path: Path) -> _Claim:
    try:
        record = json.loads(path.read_text("utf-8"))
        return _Claim(int(record["pid"]), str(record["host"]), list(map(str, record["targets"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _Claim(0, "", [])  # of a process that was killed before it wrote this


def _remove(lock: Path) -> None:
    for path in (lock.with_suffix(".json"), lock):
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
