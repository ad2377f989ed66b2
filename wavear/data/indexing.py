"""The index of some data: which headers and levels are known, so that only new files are read.

It lies in the user's cache, or next to the data (`wavear index --beside`). A file is known by name,
size and time of change. No entry depends on a model, so all runs share an index; levels are kept
per setting.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavear.common.atomic import locked
from wavear.common.log import get_logger
from wavear.data import shards, workers
from wavear.data.levels import Found, Looked
from wavear.data.listing import listed
from wavear.data.recordings import Recordings, encoded
from wavear.data.shards import Entry
from wavear.data.store import FILE, DamagedError, Store, remove

logger = get_logger(__name__)

KEEP_FROM = 1000  # files: reading the headers of fewer takes less time than opening an index
_STAT_BLOCK = 4096  # files per task

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Work:
    """How a kind of look is divided."""

    block: int
    """Files per task and per transaction of the index."""
    processes_from: int
    """New files: fewer are done in threads before a process has started."""
    text: str
    """For the progress bar."""


HEADERS = Work(256, 4000, "reading headers")
LEVELS = Work(32, 64, "measuring levels")


def beside(data: str | Path) -> Path:
    """Return the hidden folder of an index next to the data.

    Examples
    --------
    >>> beside("corpus/train.csv").as_posix()
    'corpus/.train.csv.wavear-index'
    """
    if shards.is_shards(data):
        return Path(shards.expand(data)[0]).parent / ".wavear-index"
    data = Path(data)
    return data / ".wavear-index" if data.is_dir() else data.parent / f".{data.name}.wavear-index"


def cached(data: str | Path) -> Path:
    """Return the folder of an index in the cache, named after a hash of the data's real path."""
    real = os.path.realpath(data)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", os.path.basename(real))[:40]
    digest = hashlib.blake2b(encoded(real), digest_size=8).hexdigest()
    return shards.cache_folder() / "index" / f"{name}-{digest}"


def mixed(keys: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Hash keys together with columns of integers, row by row (SplitMix64's finaliser per column).

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
class Files:
    """The distinct files of recordings, in the order of their hashes."""

    row: np.ndarray
    """The first row of each file."""
    of: np.ndarray
    """(rows,): the file of each row."""
    key: np.ndarray
    """(files,) uint64: hash of name, size and time of change."""

    @classmethod
    def of_recordings(cls, recordings: Recordings) -> Files:
        """Look up size and time of change of each file; both count as -1 if it is missing."""
        member, names = recordings.member, recordings.key
        if member is not None:
            names = mixed(names, *member[:, :2].T)
        names, row, of = np.unique(names, return_index=True, return_inverse=True)
        if member is None:
            return cls(
                row, of, mixed(names, *_states(len(row), lambda n: recordings.source(row[n])))
            )
        root, archives = recordings.root, recordings.archives
        size, changed = _states(len(archives), lambda n: root / archives[n])
        archive, offset, length = member[row].T
        return cls(row, of, mixed(names, size[archive], changed[archive], offset, length))


def _states(count: int, path: Callable[[int], Any]) -> np.ndarray:
    """Return sizes and times of change of files, (2, count) int64."""
    found = np.full((2, count), -1, np.int64)

    def look(first: int) -> None:
        for n in range(first, min(first + _STAT_BLOCK, count)):
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(path(n))
                found[:, n] = status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(workers.THREADS) as pool:
        list(pool.map(look, range(0, count, _STAT_BLOCK)))
    return found


@dataclass
class Index:
    """The index of some data, in its folders.

    Parameters
    ----------
    data : str or Path
        Folder, manifest or pattern of shards; its name determines the folders.
    keep : bool, optional
        Whether to keep what is found; by default for `KEEP_FROM` files or more.
    put_beside : bool
        Keep it next to the data, not in the cache.
    processes : int, optional
        To read files with; by default one per core.
    progress : callable, optional
        See `wavear.data.corpus.open_corpus`.
    """

    data: str | Path
    keep: bool | None = None
    put_beside: bool = False
    processes: int | None = None
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""

    def recordings(self, speakers: bool = False) -> Recordings:
        """List the data; what shards contain is remembered, since reading them through is slow."""
        if not shards.is_shards(self.data):
            return listed(self.data, speakers)
        paths = shards.local_shards(self.data, self.progress)
        if self.keep is False:
            return shards.list_shards(paths, speakers)
        with self._writing() as store:
            return shards.list_shards(paths, speakers, lambda there: self._scanned(store, there))

    def _scanned(self, store: Store | None, paths: Sequence[str]) -> Iterator[list[Entry]]:
        """Yield the members of each shard, from the index if they are known."""
        size, changed = _states(len(paths), lambda n: paths[n])
        names = [hashlib.blake2b(encoded(os.path.realpath(path)), digest_size=8) for path in paths]
        keys = np.array([int.from_bytes(name.digest(), "big") for name in names], np.uint64)
        states = mixed(keys, size, changed)
        pairs = np.stack([keys, states], 1).view(np.int64).tolist()
        known = [store is not None and store.knows(*pair) for pair in pairs]
        scans = shards.scan_all(
            [path for path, is_known in zip(paths, known, strict=True) if not is_known]
        )
        for path, pair, is_known in zip(paths, pairs, known, strict=True):
            entries = None
            if store is not None and is_known:
                with self._reading(store):
                    entries = store.members(*pair)
            if entries is None:
                entries = shards.scan(path) if is_known else next(scans)
                if store is not None:
                    self._keeping(store.add_members, *pair, entries)
            yield entries

    def find(
        self,
        keys: np.ndarray,
        question: Callable[[int], tuple[Any, ...]],
        work: Work = HEADERS,
        setting: str = "",
    ) -> Found:
        """Return what is known of files, after a look into those that are not known.

        Parameters
        ----------
        keys : (n,) uint64
            A hash of all that the answer for a file depends on.
        question : callable
            Returns the arguments of `wavear.data.levels.look` for file n.
        work : Work
        setting : str
            Distinguishes answers to other questions; "" for headers.
        """
        names, first, of = np.unique(keys, return_index=True, return_inverse=True)
        found, missing = Found(len(names)), np.ones(len(names), bool)

        def look(store: Store | None) -> None:
            def keep(some: np.ndarray, looked: list[Looked]) -> None:
                if store is not None:
                    self._keeping(store.add, setting, some, looked)

            numbers = np.flatnonzero(missing)
            self._look(numbers, names, lambda n: question(first[n]), work, found, keep)

        if not (self.keep or (self.keep is None and len(keys) >= KEEP_FROM)):
            look(None)
            return found.take(of)
        for folder in self._folders():
            with self._opened(folder / FILE) as store:
                if store is not None:
                    with self._reading(store):
                        store.recall(setting, names, found, missing)
        if missing.any():
            with self._writing() as store:
                stale: list[int] = []
                if store is not None:
                    with self._reading(store, True):  # another process may have found more
                        stale = store.recall(setting, names, found, missing)
                look(store)
                if store is not None:
                    self._keeping(store.forget, stale)
        return found.take(of)

    def _look(
        self,
        numbers: np.ndarray,
        names: np.ndarray,
        question: Callable[[int], tuple[Any, ...]],
        work: Work,
        found: Found,
        keep: Callable[[np.ndarray, list[Looked]], object],
    ) -> None:
        """Look into files, in threads or processes, and keep each block as it comes."""
        found.new = len(numbers)
        parts = [numbers[at : at + work.block] for at in range(0, len(numbers), work.block)]
        blocks = ((part, [question(n) for n in part.tolist()]) for part in parts)

        def steps() -> Iterator[None]:
            if len(numbers) < work.processes_from:
                answers = ((part, workers.look_here(items)) for part, items in blocks)
            else:
                count = self.processes or workers.default_processes()
                answers = workers.look_in_processes(blocks, count)
            for part, looked in answers:
                for n, one in zip(part.tolist(), looked, strict=True):
                    found.put(n, one)
                    yield
                keep(names[part], looked)

        shown = (
            steps() if self.progress is None else self.progress(steps(), len(numbers), work.text)
        )
        for _ in shown:
            pass

    def _folders(self) -> list[Path]:
        return [beside(self.data), cached(self.data)]

    def folder(self) -> Path | None:
        """Return the folder to write to, which is created; None if none can be written.

        It is the one next to the data if that exists or is asked for, else the cache.
        """
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
        self._note(f"the index of {self.data} is not kept: {last}")
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Store | None]:
        """Hold the index open for writing by this process only; None if none can be written."""
        if (folder := self.folder()) is None:
            yield None
            return
        with locked(folder / "index.lock", self._wait), self._opened(folder / FILE, True) as store:
            yield store

    @contextlib.contextmanager
    def _opened(self, path: Path, create: bool = False) -> Iterator[Store | None]:
        """Open an index file; None if there is none, or it cannot be used and not be rebuilt."""
        store = None
        if create or os.path.lexists(path):
            try:
                store = Store(path)
            except DamagedError as error:
                self._note(f"{path} is damaged: {error}; it is rebuilt")
                if create:
                    store = self._keeping(lambda: (remove(path), Store(path))[1])
            except (sqlite3.Error, OSError) as error:
                self._note(f"the index {path} is not used: {error}")
        with contextlib.closing(store) if store is not None else contextlib.nullcontext() as opened:
            yield opened

    @contextlib.contextmanager
    def _reading(self, store: Store, writable: bool = False) -> Iterator[None]:
        """Note a damaged row and, if the store may be written, empty it."""
        try:
            yield
        except DamagedError as error:
            self._note(f"{store.path} is damaged: {error}; it is rebuilt")
            if writable:
                self._keeping(store.clear)

    def _keeping(self, write: Callable[..., Any], *arguments: Any) -> Any:
        """Write to the index; if that fails, note it and continue without."""
        try:
            return write(*arguments)
        except (sqlite3.Error, OSError) as error:
            self._note(f"the index of {self.data} is not kept: {error}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _wait(self) -> None:
        if self.progress is not None:
            logger.info(f"another process is indexing {self.data}: waiting for it")
