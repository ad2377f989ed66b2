"""The index file: an SQLite database of file headers, levels and the members of tar shards.

The file may come from somebody else, next to their data. So before SQLite opens it, the file and
its journal are checked to be regular files of this format, then its schema, its structure and
every row that is read. Nothing in it is executed.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from wavear.data.levels import Found, Looked
from wavear.data.recordings import decoded, encoded
from wavear.data.shards import Entry

FILE = "index.sqlite3"
_APPLICATION, _VERSION = 0x77766172, 2  # in SQLite's header; "wvar"
_CHUNK = 1 << 16  # rows read at a time, which bounds memory
_LOCK_SECONDS = 600.0  # to wait for another process that reads or commits
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def _table(table: str, /, **types: str) -> str:
    """Return the statement that creates a table; `?` after a type allows NULL.

    The checks are for reading: `quick_check` evaluates them on every row.
    """
    columns = []
    for column, given in types.items():
        type_ = given.rstrip("?")
        allowed = f"'{type_}', 'null'" if given != type_ else f"'{type_}'"
        columns.append(f"{column} {type_} CHECK (typeof({column}) IN ({allowed}))")
    return f"CREATE TABLE {table} ({', '.join(columns)})"


_LOOK = {"start": "integer", "frames": "integer", "rate": "integer", "gain": "real"}
_PLACE = {"name": "blob", "offset": "integer", "size": "integer"}
_TEXTS = dict.fromkeys(("speaker", "split", "fault"), "blob?")
_SCHEMA = (
    _table("look", setting="text", key="integer", **_LOOK, error="blob?", seal="integer"),
    _table("member", shard="integer", state="integer", **_PLACE, **_TEXTS, seal="integer"),
    "CREATE INDEX members ON member (shard)",
)


class DamagedError(ValueError):
    """A file that is not an intact index."""


class Store:
    """An open index file.

    Parameters
    ----------
    path : Path
        It is created if it does not exist.

    Raises
    ------
    DamagedError
        If the file is not an intact index.
    sqlite3.Error, OSError
        If it cannot be opened or created.
    """

    def __init__(self, path: Path):
        self.path = path
        new = not os.path.lexists(path)
        if not new:
            _check_file(path)
        self.db = sqlite3.connect(path, timeout=_LOCK_SECONDS)
        try:
            # A power failure may damage the file, which is then rebuilt; a killed process may not.
            self.db.execute("PRAGMA synchronous = OFF")
            if new:
                with self.db:
                    for statement in _SCHEMA:
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA application_id = {_APPLICATION}")
                    self.db.execute(f"PRAGMA user_version = {_VERSION}")
            self._check()
        except BaseException as error:
            self.db.close()
            if type(error) is sqlite3.DatabaseError:  # OperationalError: locked, not readable
                raise DamagedError(str(error)) from None
            raise

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def _check(self) -> None:
        schema = [sql for (sql,) in self.db.execute("SELECT sql FROM sqlite_master")]
        if schema != list(_SCHEMA):
            raise DamagedError("it has other tables")
        ((state,),) = self.db.execute("PRAGMA quick_check(1)")
        if state != "ok":
            raise DamagedError(state)

    def recall(
        self, setting: str, keys: np.ndarray, found: Found, missing: np.ndarray
    ) -> list[int]:
        """Fill in what is known of missing keys, and return the ids of rows of other keys.

        Parameters
        ----------
        setting : str
            What was measured: "" for headers.
        keys : (n,) uint64, sorted, distinct
        found : of n files
        missing : (n,) bool
            Cleared where a key is known.
        """
        stale: list[int] = []
        for rows in self._rows("SELECT rowid, * FROM look WHERE setting = ?", (setting,)):
            ids, _, key, start, frames, rate, gain, error, _ = zip(*rows, strict=True)
            key, start, frames, rate = np.array([key, start, frames, rate], np.int64)
            key = key.view(np.uint64)
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            known = keys[at] == key
            stale += np.array(ids)[~known].tolist()
            at, known = at[known], np.flatnonzero(known)
            found.start[at], found.frames[at], found.rate[at] = (
                start[known],
                frames[known],
                rate[known],
            )
            found.gain[at] = np.array(gain)[known]
            found.error[at] = [error[n] if error[n] is None else decoded(error[n]) for n in known]
            missing[at] = False
        return stale

    def add(self, setting: str, keys: np.ndarray, looked: Sequence[Looked]) -> None:
        """Append what came of a block of files, in one transaction; passing errors are left out."""
        rows = [
            (
                setting,
                key,
                one.start,
                one.frames,
                one.rate,
                one.gain,
                one.error and encoded(one.error),
            )
            for key, one in zip(keys.view(np.int64).tolist(), looked, strict=True)
            if one.lasting
        ]
        self._insert("look", rows)

    def forget(self, ids: Sequence[int]) -> None:
        """Delete rows that `recall` returned."""
        with self.db:
            self.db.executemany("DELETE FROM look WHERE rowid = ?", ((number,) for number in ids))

    def clear(self) -> None:
        """Delete all rows."""
        with self.db:
            self.db.execute("DELETE FROM look")
            self.db.execute("DELETE FROM member")

    def knows(self, shard: int, state: int) -> bool:
        """Return whether the members of a shard in a state of its file are stored."""
        query = "SELECT 1 FROM member WHERE shard = ? AND state = ?"
        return self.db.execute(query, (shard, state)).fetchone() is not None

    def members(self, shard: int, state: int) -> list[Entry]:
        """Return the stored members of a shard in a state of its file."""
        query = "SELECT rowid, * FROM member WHERE shard = ? AND state = ? ORDER BY rowid"
        entries = []
        for rows in self._rows(query, (shard, state)):
            for _, _, _, name, offset, size, *texts, _ in rows:
                entries.append(
                    Entry(decoded(name), offset, size, *(t and decoded(t) for t in texts))
                )
        return entries

    def add_members(self, shard: int, state: int, entries: Sequence[Entry]) -> None:
        """Replace the members of a shard."""
        with self.db:
            self.db.execute("DELETE FROM member WHERE shard = ?", (shard,))
        rows = [
            (shard, state, *(encoded(v) if isinstance(v, str) else v for v in astuple(entry)))
            for entry in entries
        ]
        self._insert("member", rows)

    def _rows(self, query: str, values: tuple[Any, ...]) -> Iterator[list[tuple[Any, ...]]]:
        """Yield rows in chunks, checked against their seals."""
        try:
            cursor = self.db.execute(query, values)
            while rows := cursor.fetchmany(_CHUNK):
                if any(row[-1] != _seal(row[1:-1]) for row in rows):
                    raise DamagedError("a row is not what was written (CRC-32)")
                yield rows
        except sqlite3.DatabaseError as error:
            raise DamagedError(str(error)) from None

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        marks = ", ".join("?" * (len(rows[0]) + 1))
        with self.db:
            self.db.executemany(
                f"INSERT INTO {table} VALUES ({marks})", ((*row, _seal(row)) for row in rows)
            )


def remove(path: Path) -> None:
    """Delete an index file and its journal."""
    for name in (path, _journal(path)):
        name.unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _seal(row: tuple[Any, ...]) -> int:
    return zlib.crc32(repr(row).encode())


def _check_file(path: Path) -> None:
    """Refuse a file that SQLite must not open: a pipe would block, a link leads elsewhere."""
    journal = _journal(path)
    for name in (path, journal):
        if os.path.lexists(name) and not stat.S_ISREG(os.lstat(name).st_mode):
            raise DamagedError(f"{name.name} is not a regular file")
    with open(path, "rb") as file:
        head = file.read(100)
    numbers = [int.from_bytes(head[at : at + 4], "big") for at in (60, 68)]
    # Bytes 18 and 19 are 1 unless the file uses a write-ahead log, which this format does not.
    if head[:16] != b"SQLite format 3\0" or head[18:20] != b"\1\1":
        raise DamagedError("it is not an index")
    if numbers != [_VERSION, _APPLICATION]:
        raise DamagedError("it is not an index of this version")
    if journal.exists():
        with open(journal, "rb") as file:
            file.seek(max(journal.stat().st_size - 8, 0))
            # Such a journal names another file, which SQLite may delete. Ours never do.
            if file.read(8) == _JOURNAL_MAGIC:
                raise DamagedError("its journal names another file")
