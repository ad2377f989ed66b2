"""Compile kernels with Numba and keep the machine code on disk between processes."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from wavear.common.atomic import locked, replace_file
from wavear.common.log import get_logger

logger = get_logger(__name__)

_lock = threading.RLock()


def cache_directory() -> Path:
    """Return the folder of compiled code.

    It is `NUMBA_CACHE_DIR` if that is set, else the user's cache folder, else a temporary folder if
    that one cannot be written (no home, a read-only home, an unknown user).
    """
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    return _user_directory() or _temporary_directory()


def _user_directory() -> Path | None:
    """Return the user's cache folder if there is one that can be written."""
    try:
        folder = user_cache_path("wavear", appauthor=False)
        if not folder.is_absolute():  # older platformdirs: "~" of an unknown user
            return None
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):
        return None
    return folder


@functools.cache
def _temporary_directory() -> Path:
    # Compiled code is unpickled, so a folder that another user could write is unsafe.
    user = getattr(os, "getuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"wavear-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="wavear-"))


def prepare_numba() -> None:
    """Point Numba at a writable cache where it would find none; call it before importing librosa.

    Importing librosa fails if neither its own folder nor the user's cache folder can be written,
    unless `NUMBA_CACHE_DIR` is set. This sets it, and only in that case.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or _user_directory():
        return
    os.environ["NUMBA_CACHE_DIR"] = str(_temporary_directory())
    if "numba" in sys.modules:  # it has already read the environment
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


# At the top of a file; parsing the sources would take as long as loading the compiled code.
_IMPORT = re.compile(r"^from wavear\.?([\w.]*) import ([^(\n]+|\([^)]*\))", re.MULTILINE)


def source_key(path: Path) -> str:
    """Return a key that changes with the compiler and with every source that a file imports.

    Numba's own key covers the processor and the file of the compiled function, but not the kernels
    that it calls in other files of this package.
    """
    import llvmlite
    import numba

    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for source in sorted(_sources(path)):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _sources(path: Path) -> set[Path]:
    """Return a file and the files of this package that it imports at its top, recursively."""
    root = Path(__file__).resolve().parent.parent
    found, waiting = set(), [path.resolve()]
    while waiting:
        source = waiting.pop()
        found.add(source)
        for parts, names in _IMPORT.findall(source.read_text("utf-8")):
            module = root.joinpath(*parts.split("."))
            files = [module.with_suffix(".py")]
            files += [module / f"{name}.py" for name in re.findall(r"\w+", names)]
            waiting += [file for file in files if file.is_file() and file not in found]
    return found


def compiled(function, signature: Any, callback: bool = False, **options: Any) -> Any:
    """Compile a function for one signature, or load it from the cache.

    The signature is a text, or Numba's type. Called from Python, the result releases the GIL; a
    `callback` is called by its `address` from other compiled code. `options` are Numba's, such as
    `error_model`. Cached code whose checksum does not match, or that cannot be loaded, is removed
    and compiled again.
    """
    with _lock:
        try:
            key = source_key(Path(function.__code__.co_filename))
            directory = cache_directory() / f"kernels-{key}"
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
            # One process compiles, the others then load what it has kept.
            with locked(directory / f"{function.__name__}.lock"):
                return _cached(function, signature, callback, directory, options)
        except Exception as error:  # a cache that fails for any reason must not stop the engine
            _warn_once(error)
            return _compile(function, signature, callback, None, options)


def _cached(
    function, signature: Any, callback: bool, directory: Path, options: dict[str, Any]
) -> Any:
    """Compile or load a function; remove its files from the cache first if they are damaged."""
    # Numba names its files like this.
    qualified = function.__qualname__.replace("<", "").replace(">", "")
    name = f"*.{qualified}-{function.__code__.co_firstlineno}.*.nb[ic]"
    sums = directory / f"{function.__name__}-{function.__code__.co_firstlineno}.sums"
    before = _checksums(directory, name)
    if before != _read_sums(sums):
        _remove(directory, name)
        _announce()
    try:
        result = _compile(function, signature, callback, directory, options)
    except Exception:  # whatever unpickling raises
        _remove(directory, name)
        result = _compile(function, signature, callback, directory, options)
    after = _checksums(directory, name)
    if after != _read_sums(sums):
        replace_file(sums, lambda path: path.write_text(json.dumps(after), "utf-8"))
    return result


def _checksums(directory: Path, name: str) -> dict[str, str]:
    paths = sorted(directory.rglob(name))
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def _read_sums(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _remove(directory: Path, name: str) -> None:
    for path in directory.rglob(name):
        path.unlink(missing_ok=True)


@functools.cache
def _announce() -> None:
    logger.info("compiling kernels, once per machine: this takes up to half a minute")


_warned = False


def _warn_once(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled code is not kept ({error}), so every process compiles for some seconds; "
            "set NUMBA_CACHE_DIR to a directory that can be written",
            stacklevel=2,
        )


@functools.cache
def _name_uniquely(process: int) -> None:
    """Begin Numba's numbers of functions at random, once in each process, forked ones too.

    They are part of the symbols' names. Code of several processes meets in one. A function for two
    layouts of records, each compiled first by another process, would have one name, and the one
    that is loaded first serve both: WaveNet's kernel and the GRU's crashed so.
    """
    from numba.core.bytecode import FunctionIdentity

    FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6), "big"))


def _compile(
    function, signature: Any, callback: bool, directory: Path | None, options: dict[str, Any]
):
    import numba

    _name_uniquely(os.getpid())
    if callback:
        compiler = numba.cfunc(signature, cache=bool(directory), **options)
    else:
        compiler = numba.njit(signature, nogil=True, cache=bool(directory), **options)
    # Numba reads the cache folder from its configuration when it creates a function's cache.
    before = numba.config.CACHE_DIR
    if directory:
        numba.config.CACHE_DIR = str(directory)
    try:
        return compiler(function)
    finally:
        numba.config.CACHE_DIR = before
