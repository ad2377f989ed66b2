"""Files that appear whole or not at all, and lines that name them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


def printable(line: str) -> str:
    """A line with what stdout cannot take escaped, as stderr does of itself: names of files that are no Unicode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def say(line: str) -> None:
    """Print such a line at once."""
    print(printable(line), flush=True)


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then move it into place.

    Whatever goes wrong, `path` holds what it held, or nothing, and the temporary file is gone. The
    folder is not made.

    Parameters
    ----------
    path : str or Path
    write : callable
        Takes the temporary file's name; the file exists and is empty.

    Raises
    ------
    OSError
        What `write` raised, or the move.
    """
    path = Path(path)
    temporary = path.parent / f".wavear-{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(
                file.fileno()
            )  # a crash after the move must not leave an empty file under the name
        os.chmod(temporary, mode)  # some libraries write files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(path: str | Path, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, all of them.

    Parameters
    ----------
    path : str or Path
        A file for this purpose; it is made, and stays.
    wait : callable
        Called if another process is at it, before waiting for that.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(
        path, "a+b", buffering=0
    ) as file:  # to read and write: so a pipe of that name does not block
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing it opens the lock
