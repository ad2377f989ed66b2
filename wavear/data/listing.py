"""List the recordings of a folder, a manifest or one audio file, without opening the audio."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wavear.audio import SUFFIXES
from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.data.recordings import Builder, Recordings

_PATHS = ("path", "audio_filepath", "file_name")  # the last two: NeMo, Hugging Face
_MANIFESTS = ".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson"
_ROUNDING = 0.011  # seconds by which `duration` and `end` may differ: both may be rounded
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def listed(data: str | Path, speakers: bool = False) -> Recordings:
    """List a folder, a manifest or one audio file; see `wavear.data.corpus.find`."""
    data = Path(data)
    builder = Builder(data if data.is_dir() else data.parent)
    if data.is_dir():
        _add_folder(builder, data, speakers)
    elif not data.exists():
        raise FileNotFoundError(f"{data}: no such folder or manifest")
    elif data.suffix.lower() in SUFFIXES:
        builder.add(data.name)
    else:
        _add_manifest(builder, data)
    return builder.done()


def split_named(value: Any) -> str | None:
    """Return the split that a manifest's value stands for, or None if it is empty.

    Raises
    ------
    WavearError
        If it is not the name of a split.
    """
    if value is None or str(value).strip() == "":
        return None
    split = _SPLITS.get(str(value).strip().lower())
    if split is None:
        raise WavearError(f"split is {value!r}, expected {', '.join(_SPLITS)}")
    return split


def _add_folder(builder: Builder, folder: Path, speakers: bool) -> None:
    for name in _walk(os.fspath(folder), "", (), builder.bad):
        first, slash, _ = name.partition("/")
        if speakers and not slash:
            raise WavearError(
                f"{folder / name} has no speaker. Put it into a sub-folder named after its speaker,"
                " or drop --speakers."
            )
        builder.add(name, first if speakers else None)
    if not builder.end:
        endings = ", ".join(suffix[1:] for suffix in SUFFIXES)
        first = f"; {': '.join(builder.bad[0])}" if builder.bad else ""
        raise WavearError(f"{folder} holds no audio files ({endings}), at any depth{first}")


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], bad: list[tuple[str, str]]
) -> Iterator[str]:
    """Yield the audio files below a folder, sorted by relative name.

    A folder sorts as its name with a slash, so one folder at a time gives the order of all names.
    """
    try:
        here = os.stat(folder)
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not entry.name.startswith(".")]
        entries = [entry.name + "/" * entry.is_dir() for entry in visible]
    except OSError as error:
        bad.append((prefix or folder, f"cannot be listed: {error.strerror}"))
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    for name in sorted(entries):
        if name.endswith("/"):
            yield from _walk(f"{folder}/{name[:-1]}", prefix + name, (*above, identity), bad)
        elif name.lower().endswith(SUFFIXES):
            yield prefix + name


def _add_manifest(builder: Builder, manifest: Path) -> None:
    try:
        for line, row in _rows(manifest):
            try:
                _add_row(builder, row)
            except ValueError as error:
                raise WavearError(f"{manifest}:{line}: {error}") from None
    except UnicodeDecodeError as error:
        if manifest.suffix.lower() in _MANIFESTS:
            raise WavearError(
                f"{manifest} is not UTF-8 ({error.reason}): save it as UTF-8"
            ) from None
        raise WavearError(
            f"{manifest} is neither an audio file ({', '.join(SUFFIXES)}) nor a text manifest"
        ) from None
    if not builder.end:
        raise WavearError(f"{manifest} lists no recordings")


def _rows(manifest: Path) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """Yield line number, or "entry" and its number, and columns of each row."""
    with open(manifest, encoding="utf-8-sig", newline="") as file:
        if manifest.suffix.lower() in (".jsonl", ".json", ".ndjson"):
            if manifest.suffix.lower() == ".json" and file.read(99).lstrip().startswith("["):
                file.seek(0)
                yield from _json_array(manifest, file.read())
                return
            file.seek(0)
            for line, content in enumerate(file, 1):
                if content.strip():
                    yield line, _json_row(f"{manifest}:{line}", content)
            return
        first = file.readline().rstrip("\r\n")
        file.seek(0)
        names = {_value(name, True).lower() for name in first.split("|")}
        if "|" in first and names.isdisjoint(_PATHS):  # a list without a header: path|text|...
            by_id = _files_by_id(manifest.parent / "wavs")
            for line, content in enumerate(file, 1):
                if content.strip():
                    name = content.split("|")[0].strip()
                    yield line, {"path": by_id.get(name, name)}
            return
        separator = max(",;\t|", key=first.count)
        # A quotation mark in the text of such a list is an ordinary character.
        plain = separator in "\t|"
        quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        reader = csv.reader(
            file, delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True
        )
        last = 0
        try:
            header = [_value(name, plain).lower() for name in next(reader, [])]
            last = reader.line_num
            if twice := [name for name in _PATHS if header.count(name) > 1]:
                raise WavearError(f"{manifest}:{last}: the column `{twice[0]}` is there twice")
            for values in reader:
                last = reader.line_num
                if any(values):
                    row = [_value(value, plain) for value in values]
                    if any(row[len(header) :]):  # all after a separator too many would be shifted
                        raise WavearError(
                            f"{manifest}:{last}: has {len(row)} values for {len(header)} columns:"
                            f" {'remove' if plain else 'quote'} separators in a value"
                        )
                    yield last, dict(zip(header, row, strict=False))
        except csv.Error as error:
            # A quotation mark without its pair can begin many lines above the place of the error.
            raise WavearError(
                f"{manifest}:{last + 1}: {error}, up to line {reader.line_num}. Balance the"
                " quotation marks, or separate the columns by tabs, where they are characters."
            ) from None


def _files_by_id(folder: Path) -> dict[str, str]:
    """Return the audio files of a folder by their names without ending, as LJ Speech lists them."""
    if not folder.is_dir():
        return {}
    files = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES))
    return {os.path.splitext(name)[0]: f"{folder.name}/{name}" for name in files}


def _value(value: str, plain: bool) -> str:
    """Return a value without blanks around it and, where a list is `plain`, around quotes."""
    value = value.strip()
    if plain and len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1].replace('""', '"')
    return value


def _json_array(manifest: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_json(str(manifest), content), 1):
        yield f"entry {number}", _named(f"{manifest}:entry {number}", row)


def _json_row(place: str, content: str) -> dict[str, Any]:
    return _named(place, _json(place, content))


def _json(place: str, content: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise WavearError(f"{place} is not JSON: {error}") from None


def _named(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise WavearError(f"{place} is not a JSON object: {json.dumps(row):.60}")
    return {name.strip().lower(): value for name, value in row.items()}


def _add_row(builder: Builder, row: dict[str, Any]) -> None:
    columns = [name for name in _PATHS if name in row]
    if not columns:
        names = ", ".join(filter(None, row)) or "none"
        files = any(name.endswith(SUFFIXES) for name in row)
        header = " (the first line is the header)" if files else ""
        raise WavearError(f"no path. Add a column `path`; the columns are {names}{header}.")
    file = next((row[name] for name in columns if row[name]), row[columns[0]])
    if not isinstance(file, str) or not file:
        raise WavearError(f"{columns[0]} is {file!r}, expected the name of an audio file")
    if os.sep != "/" or "//" in file or "./" in file or file[-1] in "./" or file[0] == ".":
        file = Path(file).as_posix()
    speaker = "" if row.get("speaker") is None else str(row["speaker"]).strip()
    start, duration = _stretch(row)
    builder.add(file, speaker or None, split_named(row.get("split")), start, duration)


def _stretch(row: dict[str, Any]) -> tuple[float, float | None]:
    """Return start and duration in seconds of a row with `start` or `offset`, `duration`, `end`."""
    start, offset = _seconds(row, "start"), _seconds(row, "offset")
    if start is not None and offset is not None and start != offset:
        raise WavearError(f"start is {start:g} and offset {offset:g}: keep one of them")
    start = start or offset or 0.0
    duration, end = _seconds(row, "duration"), _seconds(row, "end")
    if end is None:
        return start, duration
    if end <= start:
        raise WavearError(f"end is {end:g}, expected more than the start, {start:g} s")
    if duration is not None and abs(start + duration - end) > _ROUNDING:
        raise WavearError(f"duration is {duration:g} and end {end:g}: keep one of them")
    return start, end - start


def _seconds(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise WavearError(f"{key} is {value!r}, expected seconds, 0 or more")
    return seconds
