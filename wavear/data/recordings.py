"""Many recordings in little memory: rows of arrays and one string of names, and a `Recording` when one is asked for."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from wavear.audio import Member

SPLIT_NAMES = ("train", "validation", "test")  # by their number; -1 where nothing is said


@dataclass(frozen=True, slots=True)
class Recording:
    """A stretch of an audio file."""

    path: Path | Member
    """The file; or the member of an archive."""
    name: str
    """Path relative to the data, with forward slashes; `#seconds` follows where it does not begin with the file."""
    start: int = 0
    """Where in the file it begins, in samples at the model's rate."""
    frames: int = -1
    """Samples, at the model's rate; -1 until `open_corpus` has read the file's header."""
    sample_rate: int = 0
    """Of the file, in Hz; 0 until then."""
    speaker: str | None = None
    split: str | None = None
    """ "train", "validation" or "test" where a manifest says so."""
    gain: float = 1.0
    """Factor on the samples, from level normalisation."""
    span: tuple[float, float | None] = (0.0, None)
    """Start and duration in seconds, as a manifest gave them."""


def name_hash(name: str | bytes) -> bytes:
    """8 bytes, even over all values, the same on every machine."""
    return hashlib.blake2b(
        name if isinstance(name, bytes) else encoded(name), digest_size=8
    ).digest()


def encoded(name: str) -> bytes:
    """A file's name in bytes; names that are no Unicode come back as they were."""
    return name.encode("utf-8", "surrogateescape")


@dataclass
class Listing:
    """What a folder, a manifest or shards list, one row per recording: nothing of it looked at yet."""

    root: Path
    """Paths are relative to it."""
    text: np.ndarray
    """uint8: all names, one behind the other."""
    ends: np.ndarray
    """(n,) int64: where each name ends."""
    keys: np.ndarray
    """(n,) uint64: hash of each file's name, the same for all stretches of a file."""
    speaker: np.ndarray
    """(n,) int32: a number in `speakers`, or -1."""
    split: np.ndarray
    """(n,) int8: a number in `SPLIT_NAMES`, or -1."""
    span: np.ndarray | None = None
    """(n, 2) float64: start and duration in seconds, the latter NaN for up to the end; None: all are whole."""
    speakers: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    """What could not be listed: name and reason."""
    archives: list[str] = field(default_factory=list)
    """Tar files, relative to `root`, where the rows are members of them."""
    member: np.ndarray | None = None
    """(n, 3) int64: the archive's number, where in it the member's bytes begin, and how many they are."""

    def __post_init__(self) -> None:
        self._folder = os.fspath(self.root)

    def __len__(self) -> int:
        return len(self.ends)

    def base(self, row: int) -> str:
        """Name of the file of a row."""
        begin = int(self.ends[row - 1]) if row else 0
        return self.text[begin : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def name(self, row: int) -> str:
        """Name of a row."""
        start = self.start(row)
        return self.base(row) + (f"#{start:g}" if start else "")

    def start(self, row: int) -> float:
        """Where a row begins in its file, in seconds."""
        return 0.0 if self.span is None else float(self.span[row, 0])

    def path(self, row: int) -> Path | Member:
        """The file of a row."""
        base = self.base(row)
        if self.member is not None:
            archive, offset, size = self.member[row].tolist()
            holder = self.archives[archive]
            return Member(os.path.join(self._folder, holder), offset, size, base[len(holder) + 1 :])
        return Path(self.file(row))

    def file(self, row: int) -> str:
        """The path of the file of a row, which is no member of an archive."""
        base = self.base(row)
        return os.path.join(
            self._folder, os.path.expanduser(base) if base.startswith("~") else base
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it but `root`, for `wavear.data.arrays`."""
        found = {name: getattr(self, name) for name in ("text", "ends", "keys", "speaker", "split")}
        found |= {
            name: array for name in ("span", "member") if (array := getattr(self, name)) is not None
        }
        for name in ("speakers", "archives"):
            found[name] = np.frombuffer(b"\0".join(map(encoded, getattr(self, name))), np.uint8)
        found["bad"] = np.frombuffer(json.dumps(self.bad).encode(), np.uint8)
        return found

    @classmethod
    def of_arrays(cls, root: Path, arrays: dict[str, np.ndarray]) -> Listing:
        """The inverse of `arrays`."""
        names = {
            name: [part.decode("utf-8", "surrogateescape") for part in text.split(b"\0")]
            if text
            else []
            for name in ("speakers", "archives")
            for text in (arrays[name].tobytes(),)
        }
        bad = [tuple(pair) for pair in json.loads(arrays["bad"].tobytes())]
        return cls(root, **(arrays | names | {"bad": bad}))  # type: ignore[arg-type]

    def same(self, other: Listing) -> bool:
        """Whether both list the same rows."""
        mine, others = self.arrays(), other.arrays()
        return mine.keys() == others.keys() and all(
            np.array_equal(mine[name], others[name], equal_nan=name == "span") for name in mine
        )

    def recording(self, row: int, **known: Any) -> Recording:
        """One row."""
        duration = (
            None if self.span is None or np.isnan(self.span[row, 1]) else float(self.span[row, 1])
        )
        return Recording(
            self.path(row),
            known.pop("name", self.name(row)),
            speaker=self.speakers[self.speaker[row]] if self.speaker[row] >= 0 else None,
            split=SPLIT_NAMES[self.split[row]] if self.split[row] >= 0 else None,
            span=(self.start(row), duration),
            **known,
        )


class ListingBuilder:
    """Puts a `Listing` together, row by row, in compact memory."""

    def __init__(self, root: Path):
        self.root = root
        self.text, self.ends, self.hashes = bytearray(), array("q"), bytearray()
        self.speaker, self.split = array("i"), array("b")
        self.starts, self.durations = array("d"), array("d")
        self.speakers: dict[str, int] = {}
        self.bad: list[tuple[str, str]] = []
        self.archives: list[str] = []
        self.members = array("q")

    def add(
        self,
        base: str,
        speaker: str | None = None,
        split: int = -1,
        start: float = 0.0,
        duration: float | None = None,
        member: tuple[int, int, int] | None = None,
    ) -> None:
        """One more row."""
        name = encoded(base)
        self.text += name
        self.ends.append(len(self.text))
        self.hashes += name_hash(name)
        self.speaker.append(
            -1 if speaker is None else self.speakers.setdefault(speaker, len(self.speakers))
        )
        self.split.append(split)
        if (start or duration is not None) and not self.starts:
            self.starts.frombytes(bytes(8 * (len(self.ends) - 1)))
            self.durations.extend([float("nan")] * (len(self.ends) - 1))
            self.starts.append(start)
            self.durations.append(float("nan") if duration is None else duration)
        elif self.starts:
            self.starts.append(start)
            self.durations.append(float("nan") if duration is None else duration)
        if member is not None:
            self.members.extend(member)

    def done(self) -> Listing:
        """All rows."""
        spans = (
            np.stack([np.array(self.starts), np.array(self.durations)], 1) if self.starts else None
        )
        return Listing(
            self.root,
            np.frombuffer(self.text, np.uint8),
            np.array(self.ends, np.int64),
            np.frombuffer(bytes(self.hashes), ">u8").astype(np.uint64),
            np.array(self.speaker, np.int32),
            np.array(self.split, np.int8),
            spans,
            list(self.speakers),
            self.bad,
            self.archives,
            np.array(self.members, np.int64).reshape(-1, 3) if self.members else None,
        )


class Recordings(Sequence[Recording]):
    """Some rows of a listing whose headers have been read.

    Takes about 30 bytes per recording beside what the listing takes; as a sequence it is what a
    list of `Recording` would be.
    """

    def __init__(
        self,
        listing: Listing,
        rows: np.ndarray,
        start: np.ndarray,
        frames: np.ndarray,
        rate: np.ndarray,
        gain: np.ndarray | None = None,
        suffix: str = "",
    ):
        self.listing, self.rows = listing, rows
        self.start, self.frames, self.rate, self.gain = start, frames, rate, gain
        self.suffix = suffix
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray | slice) -> Recordings:
        """A part of them, by numbers, a mask or a slice."""
        gain = None if self.gain is None else self.gain[chosen]
        arrays = (self.rows[chosen], self.start[chosen], self.frames[chosen], self.rate[chosen])
        return Recordings(self.listing, *arrays, gain, self.suffix)

    @overload
    def __getitem__(self, index: int) -> Recording: ...
    @overload
    def __getitem__(self, index: slice) -> Recordings: ...
    def __getitem__(self, index: int | slice) -> Recording | Recordings:
        if isinstance(index, slice):
            return self.take(index)
        row = int(self.rows[index])
        return self.listing.recording(
            row,
            name=self.listing.name(row) + self.suffix,
            start=int(self.start[index]),
            frames=int(self.frames[index]),
            sample_rate=int(self.rate[index]),
            gain=1.0 if self.gain is None else float(self.gain[index]),
        )

    def __iter__(self) -> Iterator[Recording]:
        return (self[n] for n in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(map(operator.eq, self, other))
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[Recording]) -> list[Recording]:
        return [*self, *other]

    def __repr__(self) -> str:
        return f"Recordings({len(self)} of {self.listing.root})"

    @property
    def speaker(self) -> np.ndarray:
        """(n,) int32: numbers in `listing.speakers`, -1 without one."""
        return self.listing.speaker[self.rows]

    def speakers(self) -> set[str]:
        """Names of the speakers."""
        return {self.listing.speakers[n] for n in np.unique(self.speaker).tolist() if n >= 0}

    def fingerprint(self) -> str:
        """Of what the order of the data depends on: names, stretches, gains, speakers."""
        if self._fingerprint is None:
            digest, listing = hashlib.sha256(), self.listing
            starts, frames, rows = self.start.tolist(), self.frames.tolist(), self.rows.tolist()
            for n, row in enumerate(rows):
                gain = 1.0 if self.gain is None else float(self.gain[n])
                speaker = (
                    listing.speakers[listing.speaker[row]] if listing.speaker[row] >= 0 else None
                )
                name = listing.name(row) + self.suffix
                digest.update(encoded(f"{name}|{starts[n]}|{frames[n]}|{gain!r}|{speaker}\n"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def frames_of(recordings: Sequence[Recording]) -> np.ndarray:
    """(n,) int64: samples of each."""
    if isinstance(recordings, Recordings):
        return recordings.frames
    return np.array([r.frames for r in recordings], dtype=np.int64)


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Of what the order of the data depends on.

    Examples
    --------
    >>> fingerprint([Recording(Path("a.wav"), "a.wav", frames=100)])
    'bd9ac693d5d6cdda'
    """
    if isinstance(recordings, Recordings):
        return recordings.fingerprint()
    digest = hashlib.sha256()
    for r in recordings:
        digest.update(encoded(f"{r.name}|{r.start}|{r.frames}|{r.gain!r}|{r.speaker}\n"))
    return digest.hexdigest()[:16]
