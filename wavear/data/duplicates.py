"""Find files of the same content: links to one file, and copies of it.

Two files are the same if they have the same bytes. Only files of equal size are read: first a block
from the middle, and if that is equal too, the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wavear.audio import AudioPath, Member
from wavear.data.indexing import HEADERS, Files, Index
from wavear.data.levels import Digest, look
from wavear.data.recordings import Recording, Recordings
from wavear.data.workers import THREADS

Digests = Callable[[np.ndarray, Digest], tuple[np.ndarray, np.ndarray]]
"""Returns a number for each of some files, equal for equal bytes, and which cannot be read."""


def numbered(sources: Sequence[AudioPath], digests: Digests | None = None) -> np.ndarray:
    """Return a number for each file, the same for files of the same content, (n,) int64.

    Parameters
    ----------
    sources : sequence of path or Member
    digests : callable, optional
        By default the files are read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        states = np.array(list(pool.map(_state, sources)), np.int64).reshape(-1, 2)

        def read(rows: np.ndarray, question: Digest) -> tuple[np.ndarray, np.ndarray]:
            found = list(pool.map(lambda n: look(sources[n], question), rows.tolist()))
            failed = [one.error is not None for one in found]
            return np.array([one.start for one in found], np.int64), np.array(failed, bool)

        digests = digests or read
        _, first, number = np.unique(states, axis=0, return_index=True, return_inverse=True)
        number = number.reshape(-1)
        alike = np.zeros((len(first), 3), np.int64)  # size, digest of the middle, of the whole
        alike[:, 0] = states[first, 0]
        for column, question in ((1, Digest(whole=False)), (2, Digest(whole=True))):
            rows = np.flatnonzero(_shared(alike[:, :column]))
            if rows.size:
                digest, failed = digests(first[rows], question)
                alike[rows, column] = np.where(failed, rows + 1, digest)
    return np.unique(alike, axis=0, return_inverse=True)[1].reshape(-1)[number]


def _nothing_read(rows: np.ndarray, _: Digest) -> tuple[np.ndarray, np.ndarray]:
    return rows, np.ones(len(rows), bool)


def _shared(rows: np.ndarray) -> np.ndarray:
    """Return which rows occur more than once, (n,) bool."""
    _, number, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return count[number.reshape(-1)] > 1


def _state(source: AudioPath) -> tuple[int, int]:
    """Return the size of a file, and a number of its place on the disk."""
    member = isinstance(source, Member)
    place: tuple[object, ...] = (os.fspath(source.archive if member else source),)
    size = source.size if member else -1
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(source.archive if member else source)
        place = (status.st_dev, status.st_ino)
        size = source.size if member else status.st_size
    place += (source.offset,) if member else ()
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return size, int.from_bytes(digest, "big", signed=True)


def overlapping(
    recordings: Sequence[Recording], others: Sequence[Recording], copies: bool = True
) -> np.ndarray:
    """Return which recordings share samples of a file with one of the others.

    With `copies`, files of the same bytes are the same file, otherwise only links are.

    Returns
    -------
    array, shape (n,), bool
    """
    paths = {source: _state(source)[0] for source in {r.path for r in recordings}}
    other_paths = {source: _state(source)[0] for source in {r.path for r in others}}
    sizes = set(other_paths.values())
    # Few files have to be read: those of a size that occurs on both sides.
    asked = [p for p, size in (paths | other_paths).items() if size in sizes]
    digests = None if copies else _nothing_read
    number = dict(zip(asked, numbered(asked, digests).tolist(), strict=True))
    spans: dict[int, list[tuple[int, int]]] = {}
    for other in others:
        span = (other.start, other.start + other.frames)
        spans.setdefault(number[other.path], []).append(span)

    def overlaps(r: Recording) -> bool:
        taken = spans.get(number.get(r.path, -1), ())
        return any(r.start < stop and start < r.start + r.frames for start, stop in taken)

    return np.array([overlaps(r) for r in recordings], bool)


def contents(recordings: Recordings, index: Index) -> np.ndarray:
    """Return the `key` of each recording's content: the least key of the files that have it.

    Digests are remembered in the index.
    """
    files = Files.of_recordings(recordings)

    def digests(some: np.ndarray, question: Digest) -> tuple[np.ndarray, np.ndarray]:
        found = index.find(
            files.key[some],
            lambda n: (recordings.source(int(files.row[some[n]])), question),
            HEADERS,
            "whole" if question.whole else "middle",
        )
        return found.start, found.failed

    number = numbered([recordings.source(row) for row in files.row.tolist()], digests)
    least = np.full(len(number), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, number, recordings.key[files.row])
    return least[number][files.of]
