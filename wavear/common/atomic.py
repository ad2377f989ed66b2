"""Replace files atomically and lock them between processes."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def printable(line: str) -> str:
    """Escape the characters that stdout cannot encode, such as file names that are not Unicode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def say(line: str) -> None:
    """Print a line with unencodable characters escaped, and flush."""
    print(printable(line), flush=True)


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file next to `path`, then move it into place.

    If anything fails, `path` is unchanged and the temporary file is removed. The folder must exist.

    Parameters
    ----------
    path : str or Path
    write : callable
        Receives the path of the temporary file, which exists and is empty.

    Raises
    ------
    OSError
        If the file cannot be written or moved. Exceptions of `write` pass through.
    """
    path = Path(path)
    temporary = path.parent / f".wavear-{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        write(temporary)
        # Without fsync, a crash after the move could leave an empty file under the final name.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # some libraries create files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        raise


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a file to write before the work: a folder, its own source, or one that exists.

    Its folder may be missing, if it can be made.

    Raises
    ------
    OSError
        The file exists, and `overwrite` is false or it is the `source`; or it cannot be written.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: name a file")
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise FileExistsError(f"{out} is the input itself: choose another name")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or pass --overwrite")
    check_writable(out.parent)


def check_writable(folder: str | Path) -> None:
    """Raise an `OSError` if no file can be made in a folder, or in the nearest one above it."""
    above = (Path(folder), *Path(folder).absolute().parents)
    existing = next(part for part in above if part.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {existing}: {error.strerror}") from None


def replace_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors in safetensors' format, as `replace_file` does.

    Raises
    ------
    OSError
        If the file cannot be written, such as on a full disk; safetensors has an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = dict(tensors)
    try:
        replace_file(path, lambda temporary: save_file(held, temporary, metadata=metadata))
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


@contextlib.contextmanager
def locked(path: str | Path, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock between processes; without support in the file system, hold none.

    Parameters
    ----------
    path : str or Path
        The lock file; it is created, and stays.
    wait : callable
        Called before waiting for another process.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with contextlib.suppress(OSError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
