"""Compiled code kept on disk between processes."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

_lock = threading.RLock()


def cache_directory() -> Path:
    """Where compiled code lies: `NUMBA_CACHE_DIR` if set, else the user's cache directory."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wavear"


def source_key(path: Path) -> str:
    """Changes with every source of this package that the code of a file is compiled from, and with the compiler.

    Numba itself looks at the file of the compiled function alone, and the kernels it calls lie in
    others: here every file is read that this one imports, and those that they do. (That the
    processor is the same is part of Numba's own key.)
    """
    import llvmlite
    import numba

    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for source in sorted(_sources(path)):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _sources(path: Path) -> set[Path]:
    """A file, and the files of this package that it imports at its top, and so on."""
    root = Path(__file__).resolve().parent.parent
    found, waiting = set(), [path.resolve()]
    while waiting:
        source = waiting.pop()
        found.add(source)
        for statement in ast.parse(source.read_bytes()).body:
            if isinstance(statement, ast.ImportFrom) and f"{statement.module}.".startswith(
                "wavear."
            ):
                module = root.joinpath(*str(statement.module).split(".")[1:])
                files = [
                    module.with_suffix(".py"),
                    *(module / f"{alias.name}.py" for alias in statement.names),
                ]
                waiting += [file for file in files if file.is_file() and file not in found]
    return found


def compiled(function, signature: str, callback: bool = False, **options: Any) -> Any:
    """`function` compiled for one signature, from the cache if it is there.

    Called from Python it releases the GIL; as a `callback` it is called by its `address` from other
    compiled code. `options` are Numba's, such as `error_model`.
    """
    with _lock:
        try:
            directory = (
                cache_directory() / f"kernels-{source_key(Path(function.__code__.co_filename))}"
            )
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
            return _compile(function, signature, callback, directory, options)
        except Exception as error:  # whatever is wrong with a cache, the engine works without
            _warn_once(error)
            return _compile(function, signature, callback, None, options)


_warned = False


def _warn_once(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled code is not kept ({error}), so every process compiles anew, for some seconds; "
            "set NUMBA_CACHE_DIR to a directory that can be written",
            stacklevel=2,
        )


def _compile(
    function, signature: str, callback: bool, directory: Path | None, options: dict[str, Any]
):
    import numba

    compiler = numba.cfunc(signature, cache=bool(directory), **options) if callback else None
    compiler = compiler or numba.njit(signature, nogil=True, cache=bool(directory), **options)
    # Where to cache is read when the cache of a function is made, and is no argument.
    before = numba.config.CACHE_DIR
    if directory:
        numba.config.CACHE_DIR = str(directory)
    try:
        return compiler(function)
    finally:
        numba.config.CACHE_DIR = before
