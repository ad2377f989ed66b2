"""Tar shards, as the package webdataset has them: which members are audio and where they lie, and how to make some.

A sample is all members whose names agree up to the first dot of their last part: an audio file, and
optionally a `.json` with `speaker` and `split`, or a `.speaker` with the speaker's name. A tar file
stores its members as they are, so one that is at hand is read at random like a file, and the order
of the data is what it is for a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wavear.common.atomic import locked, replace_file
from wavear.data.arrays import map_arrays, save_arrays
from wavear.data.listing import SPLITS, SUFFIXES, listed
from wavear.data.recordings import SPLIT_NAMES, Listing, ListingBuilder, encoded

_THREADS = 8  # shards that are read through at once: it waits for the disk
_FETCHES = 4  # shards at once
_LARGEST_NOTE = 1 << 20  # bytes of a .json
_SPEAKER_SUFFIXES = ("speaker", "speaker.txt", "spk")
_NUMBERS = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")


def default_folder() -> Path:
    """Where indexes are kept: WAVEAR_CACHE, or wavear in XDG_CACHE_HOME, or ~/.cache/wavear."""
    if given := os.environ.get("WAVEAR_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "wavear"


def is_shards(data: str | Path) -> bool:
    """Whether data are named as shards are: `a.tar`, `s/*.tar`, `s/{000..012}.tar`, a URL or a pipe.

    Examples
    --------
    >>> [is_shards(name) for name in ("shards/{000..012}.tar", "s/*.tar", "pipe:cat a.tar", "recordings", "list.csv")]
    [True, True, True, False, False]
    """
    text = os.fspath(data)
    return text.endswith(".tar") or is_remote(text)


def is_remote(data: str | Path) -> bool:
    """Whether a name stands for shards to fetch: a URL, or `pipe:` and a shell command."""
    text = os.fspath(data)
    return text.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def expand(data: str | Path) -> list[str]:
    """The names that a pattern stands for, in its order; `*` in that of the names.

    Raises
    ------
    ValueError
        If braces are left open, or the package that knows them is not installed.
    FileNotFoundError
        If `*` matches nothing.
    """
    text = os.fspath(data)
    names = [text]
    if _NUMBERS.search(text) and not os.path.exists(text):
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise ValueError(
                f'{text}: braces need the package webdataset: pip install "wavear[webdataset]"'
            ) from None
        try:
            names = list(braceexpand(text))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    found = []
    for name in names:
        matching = [name]
        if not os.path.exists(name):
            if is_remote(name):
                found.append(name)
                continue
            if glob.has_magic(name) and not (matching := sorted(glob.glob(name))):
                raise FileNotFoundError(f"{name}: no such shards")
        # A file on the disk can be named like a command, "pipe:rm x.tar". As a path it is none.
        found += [os.path.join(os.curdir, path) if is_remote(path) else path for path in matching]
    return found


def refuse_remote(data: str | Path, where: str | Path) -> None:
    """Refuse shards that a file names and that would have to be fetched: only a user may name a command or a URL.

    Parameters
    ----------
    data : str or Path
        As the file names them.
    where : str or Path
        The file, for the message.

    Raises
    ------
    ValueError
        If a name in the pattern `data` is a URL or a pipe.
    """
    if is_remote(data) or (is_shards(data) and any(map(is_remote, expand(data)))):
        raise ValueError(
            f"{where} names {data}, a command or a URL, which is not followed: pass it yourself (--train-data)"
        )


def local_shards(
    data: str | Path, progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None
) -> list[str]:
    """The shards of a pattern as files, in its order; those that are elsewhere are fetched into the cache first.

    Fetching is webdataset's: http(s), pipe: (a shell command), s3, gs and what else it knows. So
    `data` must come from the user; what a file names goes through `refuse_remote` first. A shard is
    fetched once; that it changes where it comes from is not noticed. Local shards that are missing
    are left in the list.

    Raises
    ------
    FileNotFoundError
        If not one of them is there.
    ValueError
        If something has to be fetched, and the package is not installed.
    OSError
        If a shard cannot be fetched.
    """
    names = expand(data)
    remote = [name for name in names if is_remote(name)]
    if remote:
        folder = default_folder() / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        places = {name: folder / _cache_name(name) for name in remote}
        with locked(folder / "fetching.lock"), ThreadPoolExecutor(_FETCHES) as pool:
            missing = [name for name in remote if not places[name].is_file()]
            todo: Iterable[Any] = pool.map(lambda name: _fetch(name, places[name]), missing)
            for _ in (
                progress(todo, len(missing), "fetching shards")
                if progress is not None and missing
                else todo
            ):
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
        raise ValueError(
            f'{name}: this needs the package webdataset: pip install "wavear[webdataset]"'
        ) from None

    def write(temporary: Path) -> None:
        with gopen(name, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if not temporary.stat().st_size:
            raise OSError("nothing came")

    try:
        replace_file(place, write)
    except Exception as error:  # of whatever program or library fetches it
        raise OSError(f"{name} cannot be fetched: {' '.join(str(error).split())}") from error


def shard_root(names: Sequence[str]) -> Path:
    """The folder that all shards lie in."""
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]))


def list_shards(names: Sequence[str], speakers: bool, folder: Path | None) -> Listing:
    """The audio members of local shards.

    Parameters
    ----------
    names : sequence of str
        As `local_shards` gives them.
    speakers : bool
        Where a sample does not say who speaks, the first folder of its name does.
    folder : Path, optional
        Where to keep what each shard holds, so that it is read through once.

    Raises
    ------
    ValueError
        If there is no audio in them, or `speakers` are to be told apart and one is not told.
    """
    there = [name for name in names if os.path.isfile(name)]
    root = shard_root(names)
    builder = ListingBuilder(root)
    builder.bad = [(name, "no such file") for name in names if name not in set(there)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, found in zip(
            there, pool.map(lambda path: _held(path, folder), there), strict=True
        ):
            name = Path(os.path.relpath(path, root)).as_posix()
            builder.bad += [(f"{name}/{inner}".rstrip("/"), why) for inner, why in found.bad]
            number = len(builder.archives)
            builder.archives.append(name)
            for row in range(len(found)):
                member = found.base(row)
                speaker = found.speakers[found.speaker[row]] if found.speaker[row] >= 0 else None
                if speakers and speaker is None:
                    speaker, slash, _ = member.partition("/")
                    if not slash:
                        raise ValueError(
                            f"{path}: {member} does not say who speaks, and lies in no folder"
                        )
                assert found.member is not None
                _, offset, size = found.member[row].tolist()
                builder.add(
                    f"{name}/{member}",
                    speaker,
                    int(found.split[row]),
                    member=(number, offset, size),
                )
    if not builder.ends:
        first = f"; {': '.join(builder.bad[0])}" if builder.bad else ""
        endings = ", ".join(s[1:] for s in SUFFIXES)
        raise ValueError(
            f"{there[0]}: no audio files ({endings}) in these {len(there)} shards{first}"
        )
    return builder.done()


def state_of(names: Sequence[str]) -> str:
    """Of which size and age shards are, in a hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        try:
            status = os.stat(name)
            digest.update(
                encoded(f"{os.path.basename(name)}|{status.st_size}|{status.st_mtime_ns}\n")
            )
        except OSError:
            digest.update(encoded(f"{name}|\n"))
    return digest.hexdigest()


def _held(path: str, folder: Path | None) -> Listing:
    """What a shard holds, from `folder` if that knows it."""
    if folder is None:
        return scan(path)
    status = os.stat(path)
    about = f"wavear shard 1 of {status.st_size} bytes of {status.st_mtime_ns}"
    name = hashlib.blake2b(encoded(os.path.realpath(path)), digest_size=8).hexdigest()
    kept = folder / f"shard-{name}.safetensors"
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # then it is read through, and written again
        return Listing.of_arrays(Path(path), map_arrays(kept, about))
    listing = scan(path)
    with contextlib.suppress(OSError):  # then it will be read through again
        save_arrays(kept, listing.arrays(), about)
    return listing


def scan(path: str | Path) -> Listing:
    """Read a shard through: its audio members, and in `bad` what is wrong with some ("" stands for the shard)."""
    builder = ListingBuilder(Path(path))
    bad = builder.bad
    found: list[tuple[str, str, int, int]] = []
    speaker: dict[str, str] = {}
    split: dict[str, int] = {}
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would remember all  # type: ignore[attr-defined]
                name = re.sub(r"^(\./)+", "", member.name)
                if not member.isreg() or os.path.basename(name).startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    bad.append((name, "truncated inside: the archive ends before it does"))
                    break
                key, ending = _key(name)
                if name.lower().endswith(SUFFIXES):
                    found.append((key, name, member.offset_data, member.size))
                elif ending in ("json", *_SPEAKER_SUFFIXES) and member.size <= _LARGEST_NOTE:
                    position = file.tell()
                    file.seek(member.offset_data)
                    content = file.read(member.size)
                    file.seek(position)
                    try:
                        _note(key, ending, content, speaker, split)
                    except ValueError as error:
                        bad.append((name, str(error)))
            else:
                file.seek(archive.offset)
                if (last := file.read(512)) and any(last):
                    bad.append(
                        ("", f"damaged: no member at byte {archive.offset}, what follows is lost")
                    )
                elif not last:
                    bad.append(("", "ends without the mark of its end: cut off?"))
    except (tarfile.TarError, EOFError) as error:
        bad.append(
            ("", f"is no tar archive, or damaged ({error}); compressed ones have to be unpacked")
        )
    for key, name, offset, length in found:
        builder.add(name, speaker.get(key), split.get(key, -1), member=(0, offset, length))
    listing = builder.done()
    if listing.member is None:
        listing.member = np.zeros((0, 3), np.int64)
    return listing


def _key(name: str) -> tuple[str, str]:
    """Key and ending of a member: its last part is divided at its first dot."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _note(
    key: str, ending: str, content: bytes, speaker: dict[str, str], split: dict[str, int]
) -> None:
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("is not text") from None
    if ending != "json":
        speaker[key] = text
        return
    try:
        told = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(told, dict):
        return
    if told.get("speaker") not in (None, ""):
        speaker[key] = str(told["speaker"])
    named = SPLITS.get(str(told.get("split") or "").strip().lower(), told.get("split"))
    if named is not None:
        if named not in SPLIT_NAMES:
            raise ValueError(f"split is {named!r}, expected train, validation, dev or test")
        split[key] = SPLIT_NAMES.index(named)


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What `write_shards` wrote."""

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
    """Put the files of a folder or a manifest into tar shards, `OUT/shard-000000.tar` and so on, byte for byte.

    Only regular files inside the folder, or inside that of the manifest, are packed; a link has to
    lead to one. A sample is KEY.wav (or .flac...) and, where a speaker or a split is known,
    KEY.json with these; KEY is the file's name with underscores for dots. The same data give the
    same shards to the byte. Each shard appears whole.

    Parameters
    ----------
    data : str or Path
        Folder or manifest of whole files.
    out : str or Path
        A folder that is empty, or not there yet.
    megabytes : float
        A shard is closed when it has so many (10**6 bytes).
    speakers : bool
        A folder's first level of sub-folders names the speakers.
    seed : int, optional
        Of the order of the files, which is shuffled so that each shard is a sample of all; None: by
        their names.
    progress : callable, optional
        Wraps an iterable, with its length and a description.

    Raises
    ------
    FileExistsError
        If there is something in `out`.
    ValueError
        If a manifest cuts files, or two files come to one key.
    """
    out = Path(out)
    if not megabytes > 0:
        raise ValueError(f"megabytes is {megabytes!r}, expected more than 0")
    if is_shards(data):
        raise ValueError(f"{data}: these are shards already")
    listing = listed(data, speakers)
    if listing.span is not None:
        raise ValueError(
            f"{data} cuts files by 'start' or 'duration': shards are made of whole files"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there and not empty: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(listing))
    if seed is not None:
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(listing))
    rows: Iterable[Any] = order.tolist()
    if progress is not None:
        rows = progress(rows, len(listing), "writing shards")
    shards: list[Path] = []
    failed = list(listing.bad)
    keys: set[bytes] = set()
    rows, written, total = iter(rows), 0, 0
    folder = os.path.realpath(listing.root)
    waiting: list[tuple[str, bytes]] | None = None
    while True:
        members: list[tuple[str, bytes]] = waiting or []
        waiting, size = None, sum(len(content) for _, content in members)
        for row in rows:
            if (why := _unfit(listing.file(row), folder)) is not None:
                failed.append((listing.base(row), why))
                continue
            try:
                sample = _sample(listing, row, keys)
            except OSError as error:
                failed.append((listing.base(row), f"cannot be read: {error.strerror}"))
                continue
            length = sum(len(content) for _, content in sample)
            if size and size + length > megabytes * 1e6:
                waiting = sample
                break
            members += sample
            size += length
        if not members:
            break
        path = out / f"shard-{len(shards):06}.tar"
        replace_file(path, lambda temporary, members=members: _write_tar(temporary, members))
        shards.append(path)
        written += sum(not name.endswith(".json") for name, _ in members)
        total += path.stat().st_size
        if waiting is None:
            break
    if not shards:
        raise ValueError(
            f"{data}: none of the files can be read; the first: {': '.join(failed[0])}"
        )
    return ShardReport(shards, written, total, failed)


def _unfit(path: str, folder: str) -> str | None:
    """Return why a file is not packed, or None: data made by others must not pack files of the user's."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(folder):
        return f"lies outside {folder}: copy it into that folder to pack it"
    if os.path.exists(real) and not os.path.isfile(real):
        return "is not a regular file"
    return None


def _sample(listing: Listing, row: int, keys: set[bytes]) -> list[tuple[str, bytes]]:
    """Names and contents of a sample's members."""
    base = listing.base(row)
    stem, dot, ending = base.lstrip("/").rpartition(".")
    key = re.sub(
        r"\.", "_", "/".join(part for part in stem.split("/") if part not in ("..", "~", ""))
    )
    hashed = hashlib.blake2b(encoded(key), digest_size=8).digest()
    if hashed in keys:
        raise ValueError(
            f"{base}: two files come to the key {key} (dots become underscores): rename one"
        )
    keys.add(hashed)
    with open(listing.file(row), "rb") as file:
        sample = [(f"{key}{dot}{ending.lower()}", file.read())]
    note = {}
    if listing.speaker[row] >= 0:
        note["speaker"] = listing.speakers[listing.speaker[row]]
    if listing.split[row] >= 0:
        note["split"] = SPLIT_NAMES[listing.split[row]]
    return [*sample, (f"{key}.json", json.dumps(note).encode())] if note else sample


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
