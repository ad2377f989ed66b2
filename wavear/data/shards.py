"""Tar shards in the format of the package webdataset: find, fetch, read and write them.

A sample is the members whose names agree up to the first dot of their last part: an audio file, and
optionally a `.json` with `speaker` and `split`, or a `.speaker` with the speaker's name. A tar file
stores members as they are, so a member of a local shard is read at random like a file, and the
order of the data is the same as for a folder.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from wavear.audio import SUFFIXES
from wavear.common.atomic import locked, replace_file
from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.data.listing import listed, split_named
from wavear.data.recordings import SPLIT_NAMES, Builder, Recordings, encoded

_THREADS = 8  # shards that are read at once: reading waits for the disk
_FETCHES = 4  # shards that are fetched at once
_LARGEST_NOTE = 1 << 20  # bytes of a .json
_SPEAKER_SUFFIXES = ("speaker", "speaker.txt", "spk")
_BRACES = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")
_INSTALL = 'pip install "wavear[webdataset]"'


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a tar shard: an audio file, or a member that cannot be used."""

    name: str
    """Empty if a fault concerns the whole shard."""
    offset: int = 0
    """First byte in the shard."""
    size: int = 0
    """Bytes."""
    speaker: str | None = None
    split: str | None = None
    fault: str | None = None
    """Why it cannot be used."""


def cache_folder() -> Path:
    """Return the folder of indexes and fetched shards: `WAVEAR_CACHE`, or the user's cache."""
    if given := os.environ.get("WAVEAR_CACHE"):
        return Path(given).expanduser()
    return user_cache_path("wavear", appauthor=False)


def is_shards(data: str | Path) -> bool:
    """Return whether a name stands for shards: `a.tar`, `s/*.tar`, `s/{000..012}.tar`, URL or pipe.

    Examples
    --------
    >>> names = ("shards/{000..012}.tar", "s/*.tar", "pipe:cat a.tar", "recordings", "list.csv")
    >>> [is_shards(name) for name in names]
    [True, True, True, False, False]
    """
    return os.fspath(data).endswith(".tar") or is_remote(data)


def is_remote(data: str | Path) -> bool:
    """Return whether a name stands for shards to fetch: a URL, or `pipe:` and a shell command."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]+://", os.fspath(data)) is not None


def expand(data: str | Path) -> list[str]:
    """Return the names that a pattern stands for, in its order; `*` in the order of names.

    Raises
    ------
    WavearError
        If braces are left open, or the package that expands them is not installed.
    FileNotFoundError
        If `*` matches nothing.
    """
    text = os.fspath(data)
    names = [text]
    if _BRACES.search(text) and not os.path.exists(text):
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise WavearError(f"{text}: braces need the package webdataset: {_INSTALL}") from None
        try:
            names = list(braceexpand(text))
        except ValueError as error:
            raise WavearError(f"{text}: {error}") from None
    found: list[str] = []
    for name in names:
        matching = [name]
        if not os.path.exists(name):
            if is_remote(name):
                found.append(name)
                continue
            if glob.has_magic(name) and not (matching := sorted(glob.glob(name))):
                raise FileNotFoundError(f"{name}: no such shards")
        # A local file can have a name like "pipe:rm x.tar". With a folder in front it is a path.
        found += [os.path.join(os.curdir, path) if is_remote(path) else path for path in matching]
    return found


def refuse_remote(data: str | Path, where: str | Path) -> None:
    """Refuse shards to fetch that a file names: only a user may name a command or a URL.

    Parameters
    ----------
    data : str or Path
        The name in the file.
    where : str or Path
        The file, for the message.

    Raises
    ------
    WavearError
        If a name in the pattern `data` is a URL or a pipe.
    """
    if is_remote(data) or (is_shards(data) and any(map(is_remote, expand(data)))):
        raise WavearError(
            f"{where} names {data}, a command or a URL, which is not followed. Pass it yourself"
            " (--train-data)."
        )


def local_shards(
    data: str | Path, progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None
) -> list[str]:
    """Return the shards of a pattern as local files, in its order; remote ones are fetched first.

    webdataset fetches http(s), pipe: (a shell command), s3, gs and more. So `data` must come from
    the user; a name from a file goes through `refuse_remote` first. A shard is fetched once, into
    the cache; a later change at its source is not noticed. Missing local shards stay in the list.

    Raises
    ------
    FileNotFoundError
        If none of the shards exists.
    WavearError
        If the package that fetches is not installed.
    OSError
        If a shard cannot be fetched.
    """
    names = expand(data)
    remote = [name for name in names if is_remote(name)]
    if remote:
        folder = cache_folder() / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        places = {name: folder / _cache_name(name) for name in remote}
        with locked(folder / "fetching.lock"), ThreadPoolExecutor(_FETCHES) as pool:
            missing = [name for name in remote if not places[name].is_file()]
            fetched: Iterable[Any] = pool.map(lambda name: _fetch(name, places[name]), missing)
            if progress is not None and missing:
                fetched = progress(fetched, len(missing), "fetching shards")
            for _ in fetched:
                pass
        names = [os.fspath(places.get(name, name)) for name in names]
    if not any(map(os.path.isfile, names)):
        others = f", nor the {len(names) - 1} others" if len(names) > 1 else ""
        raise FileNotFoundError(f"{names[0]}: no such shard{others}")
    return names


def _cache_name(name: str) -> str:
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.rpartition("/")[2])[-40:]
    return f"{hashlib.blake2b(encoded(name), digest_size=8).hexdigest()}-{last}"


def _fetch(name: str, place: Path) -> None:
    try:
        from webdataset.gopen import gopen
    except ImportError:
        raise WavearError(f"{name}: fetching needs the package webdataset: {_INSTALL}") from None

    def write(temporary: Path) -> None:
        with gopen(name, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if not temporary.stat().st_size:
            raise OSError("it is empty")

    try:
        replace_file(place, write)
    except Exception as error:  # of any program or library that fetches
        raise OSError(f"{name} cannot be fetched: {' '.join(str(error).split())}") from error


def list_shards(
    names: Sequence[str],
    speakers: bool,
    scanned: Callable[[Sequence[str]], Iterator[list[Entry]]] | None = None,
) -> Recordings:
    """List the audio members of local shards.

    Parameters
    ----------
    names : sequence of str
        As `local_shards` returns them.
    speakers : bool
        Without a speaker in its notes, a sample has that of the first folder of its name.
    scanned : callable, optional
        Yields the members of each shard; by default `scan_all`.

    Raises
    ------
    WavearError
        If the shards contain no audio, or `speakers` is set and one has no speaker.
    """
    there = [name for name in names if os.path.isfile(name)]
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]))
    builder = Builder(root)
    builder.bad = [(name, "no such file") for name in names if name not in set(there)]
    for path, entries in zip(there, (scanned or scan_all)(there), strict=True):
        shard = Path(os.path.relpath(path, root)).as_posix()
        number = len(builder.archives)
        builder.archives.append(shard)
        for entry in entries:
            if entry.fault is not None:
                builder.bad.append((f"{shard}/{entry.name}".rstrip("/"), entry.fault))
                continue
            speaker = entry.speaker
            if speakers and speaker is None:
                speaker, slash, _ = entry.name.partition("/")
                if not slash:
                    raise WavearError(
                        f"{path}: {entry.name} has no speaker. Add a .json or .speaker member, put"
                        " it into a folder named after its speaker, or drop --speakers."
                    )
            member = (number, entry.offset, entry.size)
            builder.add(f"{shard}/{entry.name}", speaker, entry.split, member=member)
    if not builder.end:
        first = f"; {': '.join(builder.bad[0])}" if builder.bad else ""
        endings = ", ".join(s[1:] for s in SUFFIXES)
        raise WavearError(
            f"{there[0]}: no audio files ({endings}) in these {len(there)} shards{first}"
        )
    return builder.done()


def scan_all(paths: Sequence[str]) -> Iterator[list[Entry]]:
    """Scan shards in threads, and yield the members of each."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(scan, paths)


def scan(path: str | Path) -> list[Entry]:
    """Read a shard through, and return its audio members and its faults."""
    found: list[Entry] = []
    faults: list[Entry] = []
    notes: dict[str, dict[str, str]] = {}
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all  # type: ignore[attr-defined]
                name = re.sub(r"^(\./)+", "", member.name)
                if not member.isreg() or os.path.basename(name).startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    fault = "truncated inside: the archive ends before it does"
                    faults.append(Entry(name, fault=fault))
                    break
                key, ending = _key(name)
                if name.lower().endswith(SUFFIXES):
                    found.append(Entry(name, member.offset_data, member.size))
                elif ending in ("json", *_SPEAKER_SUFFIXES) and member.size <= _LARGEST_NOTE:
                    position = file.tell()
                    file.seek(member.offset_data)
                    content = file.read(member.size)
                    file.seek(position)
                    try:
                        notes.setdefault(key, {}).update(_note(ending, content))
                    except ValueError as error:
                        faults.append(Entry(name, fault=str(error)))
            else:
                file.seek(archive.offset)
                if (last := file.read(512)) and any(last):
                    fault = f"damaged: no member at byte {archive.offset}, what follows is lost"
                    faults.append(Entry("", fault=fault))
                elif not last:
                    faults.append(Entry("", fault="has no end mark: cut off?"))
    except (tarfile.TarError, EOFError) as error:
        fault = f"is not a tar archive, or damaged ({error}); unpack a compressed one"
        faults.append(Entry("", fault=fault))
    noted = [
        Entry(one.name, one.offset, one.size, **notes.get(_key(one.name)[0], {})) for one in found
    ]
    return faults + noted


def _key(name: str) -> tuple[str, str]:
    """Divide a member's name at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _note(ending: str, content: bytes) -> dict[str, str]:
    """Return the speaker and the split that a member gives, if any."""
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise WavearError("is not text") from None
    if ending != "json":
        return {"speaker": text}
    try:
        row = parse_json(text)
    except ValueError as error:
        raise WavearError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        return {}
    note = {} if row.get("speaker") in (None, "") else {"speaker": str(row["speaker"])}
    split = split_named(row.get("split"))
    return note if split is None else note | {"split": split}


@dataclass(frozen=True)
class ShardReport:
    """The result of `write_shards`."""

    shards: list[Path]
    files: int
    bytes: int
    failed: list[tuple[str, str]]
    """Files that were skipped: name and reason."""


def write_shards(
    data: str | Path,
    out: str | Path,
    *,
    megabytes: float = 256.0,
    speakers: bool = False,
    seed: int | None = 0,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> ShardReport:
    """Pack the files of a folder or a manifest into `OUT/shard-000000.tar` and so on, unchanged.

    Only regular files inside the folder, or the manifest's folder, are packed; a link must lead to
    one. A sample is KEY.wav (or .flac...) and, with a known speaker or split, KEY.json; KEY is the
    file's name with underscores for dots. The same data give the same bytes. Each shard appears
    whole.

    Parameters
    ----------
    data : str or Path
        Folder or manifest of whole files.
    out : str or Path
        A folder that is empty or does not exist.
    megabytes : float
        Size at which a shard is closed (10**6 bytes).
    speakers : bool
        A folder's first level of sub-folders names the speakers.
    seed : int, optional
        Of the order of the files, shuffled so that each shard is a sample of all; None: in the
        order of their names.
    progress : callable, optional
        Wraps an iterable, with its length and a description.

    Returns
    -------
    ShardReport

    Raises
    ------
    FileExistsError
        If `out` is not empty.
    WavearError
        If a manifest cuts files, two files have one key, or no file can be read.
    """
    out = Path(out)
    if not megabytes > 0:
        raise WavearError(f"megabytes is {megabytes!r}, expected more than 0")
    if is_shards(data):
        raise WavearError(f"{data}: these are shards already")
    files = listed(data, speakers)
    if files.span is not None:
        raise WavearError(f"{data} cuts files by start or duration: shards contain whole files")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(files))
    if seed is not None:
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(files))
    rows: Iterable[Any] = order.tolist()
    if progress is not None:
        rows = progress(rows, len(files), "writing shards")
    shards: list[Path] = []
    failed = list(files.bad)
    packed = total = size = 0
    members: list[tuple[str, bytes]] = []

    def close() -> None:
        nonlocal packed, total
        path = out / f"shard-{len(shards):06}.tar"
        replace_file(path, lambda temporary: _write_tar(temporary, members))
        shards.append(path)
        packed += sum(not name.endswith(".json") for name, _ in members)
        total += path.stat().st_size

    for name, sample in _samples(files, rows):
        if isinstance(sample, str):
            failed.append((name, sample))
            continue
        length = sum(len(content) for _, content in sample)
        if size and size + length > megabytes * 1e6:
            close()
            members, size = [], 0
        members += sample
        size += length
    if members:
        close()
    if not shards:
        first = ": ".join(failed[0])
        raise WavearError(f"{data}: none of the files can be read; the first: {first}")
    return ShardReport(shards, packed, total, failed)


def _samples(
    files: Recordings, rows: Iterable[int]
) -> Iterator[tuple[str, list[tuple[str, bytes]] | str]]:
    """Yield the name of each file, and the members of its sample or why it is not packed."""
    folder = os.path.realpath(files.root)
    keys: set[bytes] = set()
    for row in rows:
        name, path = files.file(row), str(files.source(row))
        real = os.path.realpath(path)
        # Data made by others must not pack files of the user's.
        if not Path(real).is_relative_to(folder):
            yield name, f"lies outside {folder}: copy it into that folder to pack it"
            continue
        if os.path.exists(real) and not os.path.isfile(real):
            yield name, "is not a regular file"
            continue
        stem, dot, ending = name.lstrip("/").rpartition(".")
        parts = [part for part in stem.split("/") if part not in ("..", "~", "")]
        key = "/".join(parts).replace(".", "_")
        hashed = hashlib.blake2b(encoded(key), digest_size=8).digest()
        if hashed in keys:
            raise WavearError(
                f"{name}: two files have the key {key} (dots become underscores): rename one"
            )
        keys.add(hashed)
        note = {}
        if files.speaker[row] >= 0:
            note["speaker"] = files.speaker_names[files.speaker[row]]
        if files.split[row] >= 0:
            note["split"] = SPLIT_NAMES[files.split[row]]
        try:
            sample = [(f"{key}{dot}{ending.lower()}", Path(path).read_bytes())]
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"
            continue
        yield name, sample + ([(f"{key}.json", json.dumps(note).encode())] if note else [])


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
