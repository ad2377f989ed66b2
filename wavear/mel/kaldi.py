"""Mels in Kaldi's files: archives of matrices (.ark), and lists of places in them (.scp).

They are read here, not by the package kaldiio, which runs commands (`cat x |`) and unpickles where
a file asks for it. An entry is a path `feats.ark:OFFSET`, as in Kaldi.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from wavear.common.errors import WavearError

SUFFIXES = (".scp", ".ark")
_ENTRY = re.compile(r"(.+\.ark):(\d{1,18})", re.IGNORECASE)
_LONGEST_NAME = 1000  # bytes
_LARGEST = 2**30  # bytes of a matrix: see mel_files.LARGEST_ARRAY


def entries(path: Path) -> dict[str, Path]:
    """Return the entries of an archive or a list, by name.

    The archives of a list lie in its folder or below; one that was moved there is found by name.

    Raises
    ------
    WavearError
        If the file is damaged, or an entry is anything but `NAME PATH.ark:OFFSET`.
    """
    found: dict[str, Path] = {}
    for name, entry in _listed(path) if path.suffix.lower() == ".scp" else _scanned(path):
        if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
            raise WavearError(f"{path}: the name {name!r:.60} cannot be that of a file")
        if name in found:
            raise WavearError(f"{path} holds {name!r:.60} twice")
        found[name] = entry
    if not found:
        raise WavearError(f"{path} holds no matrices")
    return found


def split_entry(path: str | Path) -> tuple[Path, int] | None:
    """Return archive and offset of an entry, or None if the path is not one.

    Examples
    --------
    >>> split_entry("feats.ark:17")[1], split_entry("feats.ark"), split_entry("cat x.ark:17 |")
    (17, None, None)
    """
    match = _ENTRY.fullmatch(os.fspath(path))
    return (Path(match[1]), int(match[2])) if match else None


def read_matrix(archive: Path, offset: int) -> np.ndarray:
    """Return the matrix (rows, columns), float32, that begins at a byte of an archive."""
    with open(archive, "rb") as file:
        file.seek(offset)
        kind, rows, columns, size, low, span = _header(file, archive)
        data = file.read(size)
    if kind in ("FM", "DM"):
        values = np.frombuffer(data, "<f4" if kind == "FM" else "<f8")
        return values.reshape(rows, columns).astype(np.float32)
    if kind != "CM":
        wide = kind == "CM2"
        values = np.frombuffer(data, "<u2" if wide else "u1").reshape(rows, columns)
        return (low + span / (65535 if wide else 255) * values).astype(np.float32)
    # The percentiles 0, 25, 75 and 100 of each column, and where between them each value lies.
    knots = low + span / 65535 * np.frombuffer(data, "<u2", 4 * columns).reshape(columns, 4)
    places = np.frombuffer(data, "u1", offset=8 * columns).reshape(columns, rows)
    curves = zip(places, knots, strict=True)
    return np.stack([np.interp(p, (0, 64, 192, 255), k) for p, k in curves], 1).astype(np.float32)


def _header(file: BinaryIO, path: Path) -> tuple[str, int, int, int, float, float]:
    """Return kind, rows, columns, bytes of data, least value and range of a matrix."""
    mark = file.read(5)
    kind = mark[2:].decode("latin-1")
    if kind in ("CM2", "CM3"):
        kind += file.read(1).decode("latin-1")
    low, span = 0.0, 0.0
    rest = file.read(16 if kind.startswith("CM") else 10)
    if mark[:2] != b"\0B" or kind not in ("FM ", "DM ", "CM ", "CM2 ", "CM3 "):
        raise WavearError(
            f"{path} holds something else than binary matrices (it begins with {mark!r})"
        )
    kind = kind.strip()
    if kind.startswith("CM") and len(rest) == 16:
        low, span = np.frombuffer(rest, "<f4", 2).tolist()
        rows, columns = np.frombuffer(rest, "<i4", 2, 8).tolist()
    elif len(rest) == 10 and rest[0] == rest[5] == 4:
        rows, columns = (int.from_bytes(rest[at : at + 4], "little", signed=True) for at in (1, 6))
    else:
        raise WavearError(f"{path} is damaged: a matrix without a size")
    size = rows * columns * {"FM": 4, "DM": 8, "CM": 1, "CM2": 2, "CM3": 1}[kind]
    size += 8 * columns * (kind == "CM")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if rows < 0 or columns < 0 or size > min(left, _LARGEST):
        raise WavearError(
            f"{path} is damaged: a matrix of {rows} by {columns} ({size} bytes), and {left} follow"
        )
    return kind, rows, columns, size, low, span


def _scanned(path: Path) -> list[tuple[str, Path]]:
    found = []
    with open(path, "rb") as file:
        while name := _token(file, path):
            found.append((name, Path(f"{path}:{file.tell()}")))
            file.seek(_header(file, path)[3], os.SEEK_CUR)
    return found


def _token(file: BinaryIO, path: Path) -> str:
    """Return the name before the next matrix, or "" at the end."""
    start = file.tell()
    name, space, _ = file.read(_LONGEST_NAME).partition(b" ")
    if not name:
        return ""
    file.seek(start + len(name) + 1)
    try:
        if space:
            return name.decode()
    except UnicodeDecodeError:
        pass
    raise WavearError(f"{path} is damaged or not an archive of Kaldi")


def _listed(path: Path) -> list[tuple[str, Path]]:
    folder, found = path.resolve().parent, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise WavearError(f"{path} is not a list of Kaldi: it is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        name, place = [*line.split(None, 1), "", ""][:2]
        if not name:
            continue
        entry = split_entry(place.strip())
        if entry is None or re.search(r"[|\[\]\0]", place):
            raise WavearError(
                f"{path}:{number}: {place!r:.60}: expected PATH.ark:OFFSET; commands and ranges are"
                " not followed"
            )
        archive, offset = entry
        if not archive.resolve().is_relative_to(folder) or not archive.is_file():
            archive = path.parent / archive.name
        if not archive.resolve().is_relative_to(folder) or not archive.is_file():
            raise WavearError(
                f"{path}:{number}: {entry[0]} is not below {path.parent}: move it there, or name"
                " the .ark files themselves"
            )
        found.append((name, Path(f"{archive}:{offset}")))
    return found
