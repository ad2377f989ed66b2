"""The index of a corpus: what its files' headers say, kept on disk so that only new and changed files are looked into.

It lies in the user's cache, or beside the data where somebody put one there (`wavear index
--beside`), and knows a file by name, size and time of change: an index that is out of date is
brought up to date, and one that is damaged is made again. Nothing in it depends on a model, so
every run shares it; measured levels are kept per setting.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavear.common.atomic import locked
from wavear.data import levels
from wavear.data.arrays import map_arrays, save_arrays
from wavear.data.levels import Looked
from wavear.data.listing import listed
from wavear.data.recordings import Listing, encoded
from wavear.data.shards import (
    default_folder,
    expand,
    is_shards,
    list_shards,
    local_shards,
    shard_root,
    state_of,
)

KEEP_FROM = 1000  # files: fewer are looked into in the time that it takes to find their index
_PROCESSES_FROM = {
    "header": 4000,
    "level": 64,
}  # new files: fewer are done by threads before a process has started
_BLOCK = {"header": 1024, "level": 32}  # files between two writes of what has been found
_STAT_BLOCK = 4096
_ABOUT = {"header": "wavear index of headers 1", "level": "wavear index of levels 1"}
_RECORD = np.dtype([("key", "<u8"), ("a", "<i8"), ("b", "<i8"), ("c", "<f8"), ("error", "<i4")])
_BLOCK_HEAD = struct.Struct("<4sIII")  # mark, records, bytes of messages, CRC-32

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass
class Found:
    """What is known of each of some files, in their order."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    errors: dict[int, str]
    """Why it failed, by number."""
    new: int = 0
    """Files that were looked into."""


@dataclass
class _Store:
    """What is known, by key: sorted, mapped into memory."""

    key: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    error: np.ndarray
    """A number in `messages`, or -1."""
    messages: list[str]

    @classmethod
    def read(cls, path: Path, kind: str) -> _Store:
        arrays = map_arrays(path, _ABOUT[kind])
        text, ends = arrays["text"].tobytes(), arrays["ends"].tolist()
        messages = [
            text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)
        ]  # the last is the end of all
        return cls(arrays["key"], arrays["a"], arrays["b"], arrays["c"], arrays["error"], messages)

    def write(self, path: Path, kind: str) -> None:
        texts = [encoded(message) for message in self.messages]
        arrays = {"key": self.key, "a": self.a, "b": self.b, "c": self.c, "error": self.error}
        arrays["text"] = np.frombuffer(b"".join(texts), np.uint8)
        arrays["ends"] = np.cumsum([len(t) for t in texts], dtype=np.int64)
        save_arrays(path, arrays, _ABOUT[kind])

    def tell(self, keys: np.ndarray, found: Found, missing: np.ndarray) -> None:
        """Fill `found` in where `missing` and known; clear `missing` there."""
        if not self.key.size:
            return
        wanted = np.flatnonzero(missing)
        at = np.minimum(np.searchsorted(self.key, keys[wanted]), self.key.size - 1)
        known = self.key[at] == keys[wanted]
        wanted, at = wanted[known], at[known]
        found.a[wanted], found.b[wanted], found.c[wanted] = self.a[at], self.b[at], self.c[at]
        for n in np.flatnonzero(self.error[at] >= 0):
            found.errors[int(wanted[n])] = self.messages[self.error[at[n]]]
        missing[wanted] = False


def beside(data: str | Path) -> Path:
    """Where an index beside the data is: hidden, in the folder or next to the manifest.

    Examples
    --------
    >>> beside("corpus/train.csv").as_posix()
    'corpus/.train.csv.wavear-index'
    """
    if is_shards(data):
        return Path(expand(data)[0]).parent / ".wavear-index"
    data = Path(data)
    return data / ".wavear-index" if data.is_dir() else data.parent / f".{data.name}.wavear-index"


def cached(data: str | Path) -> Path:
    """Where the index of data is in the cache.

    The name ends in a hash of the data's real path.
    """
    real = os.path.realpath(data)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", os.path.basename(real))[:40]
    return (
        default_folder()
        / "index"
        / f"{name}-{hashlib.blake2b(encoded(real), digest_size=8).hexdigest()}"
    )


def mixed(keys: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Hash of keys together with columns of whole numbers, row by row (the finaliser of SplitMix64, once per column).

    Examples
    --------
    >>> mixed(np.array([1, 1], np.uint64), np.array([5, 6])).tolist()
    [17519071339639777313, 1635312068028924514]
    """
    x = keys.astype(np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            x = (x + np.uint64(0x9E3779B97F4A7C15)) ^ column.astype(np.int64).view(np.uint64)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return x


@dataclass
class Index:
    """What is known of the files of some data, wherever it is kept.

    Parameters
    ----------
    data : str or Path
        Folder, manifest or pattern of shards: its name says where the index is.
    keep : bool, optional
        Whether to keep it; by default where there are many files.
    put_beside : bool
        Keep it beside the data rather than in the cache.
    processes : int, optional
        To look into files with; by default one per core.
    progress : callable, optional
        As of `wavear.data.corpus.open_corpus`.
    """

    data: str | Path
    keep: bool | None = None
    put_beside: bool = False
    processes: int | None = None
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    """What a user should know."""

    def listing(self, speakers: bool = False) -> Listing:
        """What the data list; mapped from a copy in the index where that is kept, so that processes share it.

        A folder is walked through every time, a manifest read again if it has changed.
        """
        data, about = Path(self.data), "wavear listing 1"
        shards = local_shards(self.data, self.progress) if is_shards(self.data) else []
        if shards or data.is_file():
            if shards:
                about += f" of shards {state_of(shards)}, speakers {speakers}"
            else:
                status = os.stat(data)
                about += f" of {status.st_size} bytes of {status.st_mtime_ns}"
            root = shard_root(shards) if shards else data.parent
            for folder in self._folders():
                if (known := _read_listing(folder, root, about)) is not None:
                    return known
        found = (
            list_shards(shards, speakers, self._shard_folder())
            if shards
            else listed(data, speakers)
        )
        if not self._kept(len(found)) or (folder := self.writable()) is None:
            return found
        root = found.root
        known = _read_listing(folder, root, about)
        if known is None or not known.same(found):
            try:
                save_arrays(folder / "listing.safetensors", found.arrays(), about)
            except OSError as error:
                self.notes.append(f"the index of {self.data} is not kept: {error}")
            known = _read_listing(folder, root, about)
        return known or found

    def _shard_folder(self) -> Path | None:
        """Where to keep what shards hold: reading them through takes long, so always."""
        return None if self.keep is False else self.writable()

    def _kept(self, count: int) -> bool:
        return count >= KEEP_FROM if self.keep is None else self.keep

    def find(
        self,
        kind: str,
        keys: np.ndarray,
        item: Callable[[int], Sequence[Any]],
        name: str = "headers",
        text: str = "",
    ) -> Found:
        """What is known of files, and a look into those of which nothing is.

        Parameters
        ----------
        kind : "header" or "level"
        keys : (n,) uint64
            Of each file, by all that its answer depends on.
        item : callable
            Makes the question for file n.
        name : str
            Of the index's file.
        text : str
            What to call it in the progress bar.
        """
        count = len(keys)
        found = Found(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count), {})
        missing = np.ones(count, bool)
        if not self._kept(count):
            self._look(kind, np.arange(count), keys, item, found, None, text)
            return found
        self._read(kind, name, keys, found, missing)
        if missing.any():
            folder = self.writable()
            with contextlib.ExitStack() as stack:
                if folder is not None:
                    stack.enter_context(locked(folder / f"{name}.lock", self._wait))
                    self._read(
                        kind, name, keys, found, missing
                    )  # what another process has found meanwhile
                if missing.any():
                    self._look(
                        kind,
                        np.flatnonzero(missing),
                        keys,
                        item,
                        found,
                        folder and folder / name,
                        text,
                    )
                    self._write(kind, name, keys, found, folder)
        return found

    def _wait(self) -> None:
        if self.progress is not None:
            print(f"another process is looking into {self.data}: waiting for it", flush=True)

    def _folders(self) -> list[Path]:
        return [beside(self.data), cached(self.data)]

    def writable(self) -> Path | None:
        """Where to write: beside the data if it is there or asked for, else the cache; None where nothing can be."""
        first, second = self._folders()
        if self.put_beside:
            first.mkdir(parents=True, exist_ok=True)
            return first
        for folder in [first] * first.is_dir() + [second]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".wavear-{uuid.uuid4().hex}.tmp"
                probe.touch()
                probe.unlink()
                return folder
            except OSError as error:
                last = error
        self.notes.append(f"the index of {self.data} is not kept: {last}")
        return None

    def _read(
        self, kind: str, name: str, keys: np.ndarray, found: Found, missing: np.ndarray
    ) -> None:
        for folder in self._folders():
            path = folder / f"{name}.safetensors"
            try:
                if path.is_file():
                    _Store.read(path, kind).tell(keys, found, missing)
            except (ValueError, OSError) as error:
                note = f"{error}; it is made again"
                if note not in self.notes:
                    self.notes.append(note)
            for journal in _journals(folder, name):
                _read_journal(journal).tell(keys, found, missing)
            if not missing.any():
                return

    def _look(
        self,
        kind: str,
        numbers: np.ndarray,
        keys: np.ndarray,
        item: Callable[[int], Sequence[Any]],
        found: Found,
        journal: Path | None,
        text: str,
    ) -> None:
        """Look into files, several ways at once, and note down what is found as it comes."""
        found.new = len(numbers)
        block = _BLOCK[kind]
        starts = range(0, len(numbers), block)
        few = len(numbers) < _PROCESSES_FROM[kind]
        todo = (
            (numbers[at : at + block], [item(int(n)) for n in numbers[at : at + block]])
            for at in starts
        )

        def answers() -> Iterator[tuple[np.ndarray, list[Looked]]]:
            if few:
                for mark, items in todo:
                    yield mark, list(levels.look_here(kind, items))
            else:
                yield from levels.look_in_processes(
                    kind, todo, self.processes or levels.default_processes()
                )

        def noted() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                file = None
                if journal is not None:
                    path = journal.with_name(f"{journal.name}-{uuid.uuid4().hex}.journal")
                    file = stack.enter_context(open(path, "ab"))
                for mark, answered in answers():
                    for n, one in zip(mark.tolist(), answered, strict=True):
                        found.a[n], found.b[n], found.c[n] = one.a, one.b, one.c
                        if one.error is not None:
                            found.errors[n] = one.error
                        if not one.lasting:
                            self._passing.add(n)
                        yield
                    if file is not None:
                        file.write(_journal_block(keys[mark], answered))
                        file.flush()

        self._passing: set[int] = set()
        steps: Iterable[Any] = noted()
        if self.progress is not None:
            steps = self.progress(steps, len(numbers), text or f"reading {name_of(kind)}")
        for _ in steps:
            pass

    def _write(
        self, kind: str, name: str, keys: np.ndarray, found: Found, folder: Path | None
    ) -> None:
        """All that is known now of these files; of files that are no longer there nothing is kept."""
        if folder is None:
            return
        journals = _journals(folder, name)
        kept = np.ones(len(keys), bool)
        kept[list(self._passing)] = False
        kept = np.flatnonzero(kept)
        order = kept[np.argsort(keys[kept], kind="stable")]
        if order.size:
            order = order[np.concatenate([[True], keys[order][1:] != keys[order][:-1]])]
        numbers: dict[str, int] = {}
        error = np.full(len(keys), -1, np.int32)
        for n, message in found.errors.items():
            error[n] = numbers.setdefault(message, len(numbers))
        store = _Store(
            keys[order], found.a[order], found.b[order], found.c[order], error[order], list(numbers)
        )
        try:
            store.write(folder / f"{name}.safetensors", kind)
        except OSError as error_:
            self.notes.append(f"the index of {self.data} is not kept: {error_}")
            return
        for journal in journals:
            journal.unlink(missing_ok=True)


def _read_listing(folder: Path, root: Path, about: str) -> Listing | None:
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError):  # then it is written again
        return Listing.of_arrays(root, map_arrays(folder / "listing.safetensors", about))
    return None


def name_of(kind: str) -> str:
    """For a progress bar."""
    return {"header": "headers", "level": "levels"}[kind]


def _journals(folder: Path, name: str) -> list[Path]:
    """Those of this index; `levels-22050-rms-40.0-...` is none of `levels-22050-rms`."""
    own = re.compile(re.escape(name) + r"-[0-9a-f]{32}\.journal")
    return sorted(
        path for path in folder.glob("*.journal") if own.fullmatch(path.name) and path.is_file()
    )


def _journal_block(keys: np.ndarray, answered: Sequence[Looked]) -> bytes:
    """What has been found of some files, as it is appended to a journal."""
    messages: dict[str, int] = {}
    lasting = [n for n, one in enumerate(answered) if one.lasting]
    records = np.zeros(len(lasting), _RECORD)
    for at, n in enumerate(lasting):
        one = answered[n]
        number = -1 if one.error is None else messages.setdefault(one.error, len(messages))
        records[at] = (keys[n], one.a, one.b, one.c, number)
    text = b"\0".join(map(encoded, messages))
    content = records.tobytes() + text
    return _BLOCK_HEAD.pack(b"wvjr", len(lasting), len(text), zlib.crc32(content)) + content


def _read_journal(path: Path) -> _Store:
    """All blocks of a journal that are whole."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    at, blocks, messages = 0, [np.zeros(0, _RECORD)], []
    while at + _BLOCK_HEAD.size <= len(data):
        mark, count, length, checksum = _BLOCK_HEAD.unpack_from(data, at)
        at += _BLOCK_HEAD.size
        content = data[at : at + count * _RECORD.itemsize + length]
        if mark != b"wvjr" or zlib.crc32(content) != checksum:
            break
        at += len(content)
        records = np.frombuffer(content, _RECORD, count).copy()
        records["error"] += np.where(records["error"] >= 0, len(messages), 0).astype(np.int32)
        if length:
            messages += [
                part.decode("utf-8", "surrogateescape") for part in content[-length:].split(b"\0")
            ]
        blocks.append(records)
    records = np.concatenate(blocks)
    records = records[np.argsort(records["key"], kind="stable")]
    key, a, b, c, error = (
        np.ascontiguousarray(records[name]) for name in ("key", "a", "b", "c", "error")
    )
    return _Store(key, a, b, c, error, messages)


@dataclass
class Files:
    """The distinct files of a listing, in the order of their hashes."""

    row: np.ndarray
    """A row of each."""
    of: np.ndarray
    """(rows,): the file of each row."""
    key: np.ndarray
    """By name, size and time of change."""

    @classmethod
    def of_listing(cls, listing: Listing) -> Files:
        """With a look at the size and time of each; of one that is not there these are -1."""
        names = (
            listing.keys
            if listing.member is None
            else mixed(listing.keys, *listing.member[:, :2].T)
        )
        names, row, of = np.unique(names, return_index=True, return_inverse=True)
        holders = listing.archives if listing.member is not None else None
        count = len(row) if holders is None else len(holders)
        size, changed = np.full(count, -1, np.int64), np.full(count, -1, np.int64)

        def look(first: int) -> None:
            for n in range(first, min(first + _STAT_BLOCK, count)):
                path = listing.file(int(row[n])) if holders is None else listing.root / holders[n]
                with contextlib.suppress(OSError, ValueError):
                    status = os.stat(path)
                    size[n], changed[n] = status.st_size, status.st_mtime_ns

        with ThreadPoolExecutor(levels.THREADS) as pool:
            list(pool.map(look, range(0, count, _STAT_BLOCK)))
        if listing.member is None:
            return cls(row, of, mixed(names, size, changed))
        archive, offset, length = listing.member[row].T
        return cls(row, of, mixed(names, size[archive], changed[archive], offset, length))
