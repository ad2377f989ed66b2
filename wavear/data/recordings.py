"""Many recordings in little memory: numpy columns, and a `Recording` object for a row on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from wavear.audio import Member

SPLIT_NAMES = ("train", "validation", "test")  # by number; -1 stands for none
MelReader = Callable[[np.ndarray], np.ndarray]
"""Returns the frames (M, n) with these numbers (n,) of a file's mel."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A stretch of an audio file."""

    path: Path | Member
    """The file, or the member of an archive."""
    name: str
    """Path relative to the data, with forward slashes, and `#seconds` if it starts later than 0."""
    start: int = 0
    """First sample in the file, at the model's rate."""
    frames: int = -1
    """Samples, at the model's rate; -1 until `open_corpus` has read the file's header."""
    sample_rate: int = 0
    """Rate of the file, in Hz; 0 until its header has been read."""
    speaker: str | None = None
    split: str | None = None
    """ "train", "validation" or "test" if a manifest sets it."""
    gain: float = 1.0
    """Factor on the samples, from level normalisation."""
    span: tuple[float, float | None] = (0.0, None)
    """Start and duration in seconds, as in the manifest."""
    mel: MelReader | None = None
    """Reads the file's mel where a run conditions on mels from files (`wavear.data.file_mels`)."""


def encoded(name: str) -> bytes:
    """Return a file name in bytes; one that is not Unicode keeps its original bytes."""
    return name.encode("utf-8", "surrogateescape")


def decoded(name: bytes) -> str:
    """Return the inverse of `encoded`."""
    return name.decode("utf-8", "surrogateescape")


_COLUMNS = (
    "begin", "end", "key", "speaker", "split", "span", "member", "start", "frames", "rate", "gain",
    "beyond",
)  # fmt: skip


@dataclass(eq=False)
class Recordings(Sequence[Recording]):
    """A sequence of `Recording`, stored as columns: about 50 bytes per row and the file's name."""

    root: Path
    """File names are relative to it."""
    text: bytes
    """The names of all files, one after the other; parts of a sequence share it."""
    begin: np.ndarray
    """(n,) int64: where in `text` the file's name begins."""
    end: np.ndarray
    """(n,) int64: where it ends."""
    key: np.ndarray
    """(n,) uint64: hash of the file's name, the same for all stretches of a file."""
    speaker: np.ndarray
    """(n,) int32: a number in `speaker_names`, or -1."""
    split: np.ndarray
    """(n,) int8: a number in `SPLIT_NAMES`, or -1."""
    start: np.ndarray
    """(n,) int64: first sample in the file, at the model's rate."""
    frames: np.ndarray
    """(n,) int64: samples at the model's rate; -1 until the header has been read."""
    rate: np.ndarray
    """(n,) int64: sample rate of the file in Hz; 0 until the header has been read."""
    gain: np.ndarray | None = None
    """(n,) float64: factors on the samples; None: all 1."""
    beyond: np.ndarray | None = None
    """(n,) float64: share of the file's samples that exceed full scale; None: not known."""
    span: np.ndarray | None = None
    """(n, 2) float64: start and duration in seconds, NaN for up to the end; None: all whole."""
    member: np.ndarray | None = None
    """(n, 3) int64: number in `archives`, first byte and size; None: ordinary files."""
    archives: list[str] = field(default_factory=list)
    """Tar files, relative to `root`, that the rows are members of."""
    speaker_names: list[str] = field(default_factory=list)
    suffix: str = ""
    """Ends every name."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Entries that could not be listed: name and reason."""
    mels: Callable[[str], MelReader] | None = None
    """Returns the reader of a file's mel; None: mels are computed from the audio."""

    def __len__(self) -> int:
        return len(self.end)

    def file(self, row: int) -> str:
        """Return the name of a row's file."""
        return decoded(self.text[self.begin[row] : self.end[row]])

    def name(self, row: int) -> str:
        """Return `Recording.name` of a row."""
        start = 0.0 if self.span is None else float(self.span[row, 0])
        return self.file(row) + (f"#{start:g}" if start else "") + self.suffix

    def source(self, row: int) -> str | Member:
        """Return where to read a row from: a path, or a member of an archive."""
        folder, name = os.fspath(self.root), self.file(row)
        if self.member is None:
            return os.path.join(folder, os.path.expanduser(name) if name[:1] == "~" else name)
        number, offset, size = self.member[row].tolist()
        archive = self.archives[number]
        return Member(os.path.join(folder, archive), offset, size, name[len(archive) + 1 :])

    def take(self, rows: np.ndarray | slice | list[int]) -> Recordings:
        """Return some rows, by numbers, a mask or a slice."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        chosen = {
            name: None if column is None else column[rows] for name, column in columns.items()
        }
        return dataclasses.replace(self, **chosen)

    @overload
    def __getitem__(self, index: int) -> Recording: ...
    @overload
    def __getitem__(self, index: slice) -> Recordings: ...
    def __getitem__(self, index: int | slice) -> Recording | Recordings:
        if isinstance(index, slice):
            return self.take(index)
        source, speaker, split = self.source(index), self.speaker[index], self.split[index]
        start, duration = (0.0, None) if self.span is None else self.span[index].tolist()
        return Recording(
            Path(source) if isinstance(source, str) else source,
            self.name(index),
            int(self.start[index]),
            int(self.frames[index]),
            int(self.rate[index]),
            self.speaker_names[speaker] if speaker >= 0 else None,
            SPLIT_NAMES[split] if split >= 0 else None,
            1.0 if self.gain is None else float(self.gain[index]),
            (start, None if duration is None or np.isnan(duration) else duration),
            None if self.mels is None else self.mels(self.file(index)),
        )

    def __iter__(self) -> Iterator[Recording]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[Recording]) -> list[Recording]:
        return [*self, *other]

    def __repr__(self) -> str:
        return f"Recordings({len(self)} of {self.root})"

    def speakers(self) -> set[str]:
        """Return the names of the speakers that occur."""
        return {self.speaker_names[number] for number in np.unique(self.speaker) if number >= 0}


class Builder:
    """Builds `Recordings` row by row in compact memory."""

    def __init__(self, root: Path):
        self.root = root
        self.text, self.end, self.hashes = bytearray(), array("q"), bytearray()
        self.speaker, self.split = array("i"), array("b")
        self.spans, self.whole = array("d"), True
        self.speakers: dict[str, int] = {}
        self.bad: list[tuple[str, str]] = []
        self.archives: list[str] = []
        self.members = array("q")

    def add(
        self,
        file: str,
        speaker: str | None = None,
        split: str | None = None,
        start: float = 0.0,
        duration: float | None = None,
        member: tuple[int, int, int] | None = None,
    ) -> None:
        """Append a row."""
        name = encoded(file)
        self.text += name
        self.end.append(len(self.text))
        self.hashes += hashlib.blake2b(name, digest_size=8).digest()
        number = -1 if speaker is None else self.speakers.setdefault(speaker, len(self.speakers))
        self.speaker.append(number)
        self.split.append(-1 if split is None else SPLIT_NAMES.index(split))
        self.spans.extend((start, np.nan if duration is None else duration))
        self.whole = self.whole and not start and duration is None
        self.members.extend(member or ())

    def done(self) -> Recordings:
        """Return all rows."""
        end = np.array(self.end, np.int64)
        return Recordings(
            self.root,
            bytes(self.text),
            np.concatenate([np.zeros(min(len(end), 1), np.int64), end[:-1]]),
            end,
            np.frombuffer(bytes(self.hashes), ">u8").astype(np.uint64),
            np.array(self.speaker, np.int32),
            np.array(self.split, np.int8),
            start=np.zeros(len(end), np.int64),
            frames=np.full(len(end), -1, np.int64),
            rate=np.zeros(len(end), np.int64),
            span=None if self.whole else np.array(self.spans).reshape(-1, 2),
            member=np.array(self.members, np.int64).reshape(-1, 3) if self.archives else None,
            archives=self.archives,
            speaker_names=list(self.speakers),
            bad=self.bad,
        )


def frames_of(recordings: Sequence[Recording]) -> np.ndarray:
    """Return the samples of each recording, (n,) int64."""
    if isinstance(recordings, Recordings):
        return recordings.frames
    return np.array([r.frames for r in recordings], dtype=np.int64)


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Hash all that the drawn crops depend on: names, stretches, gains, speakers and their order.

    Examples
    --------
    >>> fingerprint([Recording(Path("a.wav"), "a.wav", frames=100)])
    'bd9ac693d5d6cdda'
    """
    digest = hashlib.sha256()
    for r in recordings:
        digest.update(encoded(f"{r.name}|{r.start}|{r.frames}|{r.gain!r}|{r.speaker}\n"))
    return digest.hexdigest()[:16]
