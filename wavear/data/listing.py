"""What there is: a folder, a manifest or one file -> a `Listing`, in as little memory as its names take."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wavear.data.recordings import SPLIT_NAMES, Listing, ListingBuilder

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
SPLITS |= {"dev": "validation", "test": "test", "": None}
_COLUMNS = ("path", "start", "duration", "speaker", "split")


def listed(data: str | Path, speakers: bool = False) -> Listing:
    """The rows of a folder, a manifest, or one audio file; see `wavear.data.corpus.find`."""
    data = Path(data)
    if data.is_dir():
        return _folder(data, speakers)
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such folder or manifest")
    if data.suffix.lower() in SUFFIXES:
        builder = ListingBuilder(data.parent)
        builder.add(data.name)
        return builder.done()
    return _manifest(data)


def _folder(folder: Path, speakers: bool) -> Listing:
    builder = ListingBuilder(folder)
    for name in _walk(os.fspath(folder), "", (), builder.bad):
        first, slash, _ = name.partition("/")
        if speakers and not slash:
            raise ValueError(
                f"{folder / name} lies in no sub-folder: speakers are named by the first level of folders"
            )
        builder.add(name, first if speakers else None)
    if not builder.ends:
        if builder.bad:
            raise ValueError(
                f"{folder} holds no audio files that can be listed: {': '.join(builder.bad[0])}"
            )
        raise ValueError(
            f"{folder} holds no audio files ({', '.join(s[1:] for s in SUFFIXES)}), at any depth"
        )
    return builder.done()


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], bad: list[tuple[str, str]]
) -> Iterator[str]:
    """Names of audio files below a folder, relative and sorted, whatever the number: one folder's names at a time.

    A folder sorts as its name with a slash, so the names come out as if all of them had been
    sorted.
    """
    try:
        here = os.stat(folder)
        with os.scandir(folder) as found:
            entries = []
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    entries.append(entry.name + "/")
                elif entry.name.lower().endswith(SUFFIXES):
                    entries.append(entry.name)
    except OSError as error:
        bad.append((prefix or folder, f"cannot be listed: {error.strerror}"))
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that it lies in
        return
    for name in sorted(entries):
        if name.endswith("/"):
            yield from _walk(f"{folder}/{name[:-1]}", prefix + name, (*above, identity), bad)
        else:
            yield prefix + name


def _manifest(path: Path) -> Listing:
    builder = ListingBuilder(path.parent)
    try:
        for line, values, columns in _rows(path):
            if not isinstance(values[0], str) or not values[0]:
                raise ValueError(
                    f"{path}:{line} has no 'path'; its columns are {', '.join(columns) or 'none'}"
                )
            _add(builder, path, line, *values)
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is neither audio by its name ({', '.join(SUFFIXES)}) nor a text manifest"
        ) from None
    if not builder.ends:
        raise ValueError(f"{path} lists no recordings")
    return builder.done()


def _rows(path: Path) -> Iterator[tuple[int, tuple[Any, ...], Iterable[str]]]:
    """The line, the values of `_COLUMNS` (None where there is none) and the names of all columns of each recording."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
            for line, content in enumerate(file, 1):
                if not content.strip():
                    continue
                try:
                    row = json.loads(content)
                except ValueError as error:
                    raise ValueError(f"{path}:{line} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{line} is no JSON object: {content.strip():.60}")
                yield line, tuple(map(row.get, _COLUMNS)), row
            return
        first = file.readline().rstrip("\r\n")
        file.seek(0)
        if "|" in first and "path" not in first.split("|"):  # LJSpeech's list: path|text|...
            for line, content in enumerate(file, 1):
                if content.strip():
                    yield line, (content.rstrip("\r\n").split("|")[0], *[None] * 4), ()
            return
        reader = csv.reader(file, delimiter=max(",;\t|", key=first.count), skipinitialspace=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            places = [header.index(name) if name in header else len(header) for name in _COLUMNS]
            for row in reader:
                if any(row):
                    row += [""] * (len(header) + 1 - len(row))
                    row[len(header)] = ""  # what stands for a column that there is not
                    yield reader.line_num, tuple(row[n] for n in places), filter(None, header)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} is no CSV: {error}") from None


def _add(
    builder: ListingBuilder,
    manifest: Path,
    line: int,
    base: str,
    start: Any,
    duration: Any,
    speaker: Any,
    split: Any,
) -> None:
    def number(key: str, value: Any) -> float | None:
        if value is None or value == "":
            return None
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = float("nan")
        if not 0.0 <= seconds < float("inf"):
            raise ValueError(f"{manifest}:{line}: {key} is {value!r}, expected seconds, 0 or more")
        return seconds

    start, duration = number("start", start) or 0.0, number("duration", duration)
    named = SPLITS.get(str(split or "").strip().lower(), split)
    if named is not None and named not in SPLIT_NAMES:
        raise ValueError(
            f"{manifest}:{line}: split is {split!r}, expected train, validation, dev or test"
        )
    speaker = "" if speaker is None else str(speaker).strip()
    if os.sep != "/" or "//" in base or "./" in base or base[-1:] in "./" or base[:1] == ".":
        base = Path(base).as_posix()
    builder.add(
        base, speaker or None, -1 if named is None else SPLIT_NAMES.index(named), start, duration
    )
