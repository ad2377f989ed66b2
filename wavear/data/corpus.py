"""Recordings: a folder or a manifest -> which stretch of which file is for training and which is held out.

`wavear.data.listing` lists a folder or reads a manifest, `open_corpus` looks into the header of
every file (or finds in the index what was there, `wavear.data.indexing`), names those that cannot
be used, and splits the rest. Nothing is decoded here unless levels or silence have to be measured.
All of it are arrays with a row per recording, so a million will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wavear import audio
from wavear.data.indexing import Files, Index, mixed
from wavear.data.levels import Normalise, level, why
from wavear.data.listing import SUFFIXES, listed
from wavear.data.recordings import (
    SPLIT_NAMES,
    Listing,
    ListingBuilder,
    Recording,
    Recordings,
    frames_of,
)
from wavear.data.shards import is_shards, list_shards, local_shards

__all__ = [
    "SUFFIXES",
    "Corpus",
    "IndexReport",
    "Normalise",
    "Recording",
    "Recordings",
    "find",
    "index",
    "open_corpus",
    "split",
]

_TRAIN, _VALIDATION, _TEST = range(3)  # of `SPLIT_NAMES`


@dataclass(frozen=True)
class Corpus:
    """What there is to train on and to validate on."""

    train: Recordings
    validation: Recordings
    speakers: list[str]
    """Names in the order of their numbers; empty without speakers."""
    bad: list[tuple[str, str]]
    """Files that cannot be used: name and reason."""
    notes: list[str]
    """What a user should know, one line each."""


def find(data: str | Path, speakers: bool = False) -> list[Recording]:
    """Recordings of a folder (at any depth, sorted by name) or of a manifest, their headers not yet read.

    Parameters
    ----------
    data : str or Path
        A folder with WAV, FLAC, OGG, MP3 or AIFF files (hidden ones are passed over), one such
        file, tar shards (`shards/{000..012}.tar`, `shards/*.tar`: see `wavear.data.shards`), or a
        manifest: CSV with a header, or JSON lines (`.jsonl`, `.json`). A manifest has `path`
        (relative to the manifest), and optionally `start` and `duration` in seconds, `speaker`, and
        `split` (train, validation or dev, test). A CSV without a header whose lines read
        `path|text` is taken as well.
    speakers : bool
        A folder's first level of sub-folders names the speakers. (A manifest's column `speaker`
        always counts.)

    Raises
    ------
    FileNotFoundError
        If `data` does not exist.
    ValueError
        If there is no audio in it, or the manifest cannot be read; the message names the line.
    """
    listing = (
        list_shards(local_shards(data), speakers, None)
        if is_shards(data)
        else listed(data, speakers)
    )
    return [listing.recording(row) for row in range(len(listing))]


def open_corpus(
    data: str | Path,
    *,
    sample_rate: int,
    validation: str | Path | None = None,
    validation_fraction: float = 0.05,
    speakers: bool = False,
    least_samples: int = 1,
    normalise: Normalise = "none",
    normalise_by: Literal["file", "speaker"] = "file",
    trim_silence: float | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> Corpus:
    """Look into every file and split them.

    Files are held out by the hash of their name, so a file stays where it is when others come or
    go; at least one is held out and at least one is trained on. A single file is cut: its end is
    held out. Where a manifest has a column `split` that holds anything out, or `validation` is
    given, that decides alone.

    Parameters
    ----------
    data, validation : str or Path
        See `find`; `validation` is a second folder or manifest, all of it held out.
    sample_rate : int
        Of the model, in Hz. Files of another rate are resampled as they are read; a note says so,
        once.
    validation_fraction : float
        Share of the files to hold out.
    speakers : bool
        See `find`.
    least_samples : int
        Shorter files cannot be used (one mel frame, say).
    normalise : "none", "peak" or "rms"
        Gain that brings the peak to 0.9 or the RMS to -23 dB of full scale (and no peak over 1).
        Decodes every file.
    normalise_by : "file" or "speaker"
        One gain per file, or one per speaker, which keeps the differences between the files of a
        speaker.
    trim_silence : float, optional
        Cut the ends that are this many dB below the file's peak, in blocks of 10 ms, up to 50 ms.
        Decodes every file.
    progress : callable, optional
        Wraps an iterable, with its length and a description, to show how far it is.

    Raises
    ------
    ValueError
        If not one file can be used; the message gives the first reason.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction!r}, expected more than 0 and less than 1"
        )
    bad: list[tuple[str, str]] = []
    notes: list[str] = []
    parts = []
    for source in (data, *([] if validation is None else [validation])):
        index = Index(source, progress=progress)
        part = _opened(index.listing(speakers), index, sample_rate, least_samples, source, bad)
        if normalise != "none" or trim_silence is not None:
            part = _leveled(part, index, sample_rate, normalise, trim_silence, source, bad)
        if normalise_by == "speaker" and normalise != "none":
            part.gain = _speaker_gains(part)
        parts.append(part)
        notes += index.notes
    rates = np.concatenate([part.rate for part in parts])
    if others := sorted(set(np.unique(rates).tolist()) - {sample_rate}):
        text = ", ".join(map(str, others))
        count = int((rates != sample_rate).sum())
        notes.append(
            f"{count} of {len(rates)} files are resampled to {sample_rate} Hz (from {text} Hz)"
        )
    good = parts[0]
    splits = good.listing.split[good.rows]
    if validation is None:
        train, kept = _split(good, splits, validation_fraction, least_samples)
    else:
        train, kept = good.take((splits < 0) | (splits == _TRAIN)), parts[1]
        if not len(train):
            raise ValueError(
                f"{data}: every recording is held out by its 'split', none is left to train on"
            )
        if (twice := overlapping(train, kept)).any():
            notes.append(
                f"{twice.sum()} recordings of {data} are held out, for they are in {validation} too"
            )
            train = train.take(~twice)
    names = sorted(train.speakers() | kept.speakers())
    if names:
        for part in (train, kept):
            if (lone := np.flatnonzero(part.speaker < 0)).size:
                raise ValueError(
                    f"{data}: {part[int(lone[0])].name} has no speaker and others have: name all of them, or none"
                )
    return Corpus(train, kept, names, bad, notes)


@dataclass(frozen=True)
class IndexReport:
    """What `index` found."""

    recordings: int
    files: int
    """Distinct ones."""
    new: int
    """Files that were looked into: those that the index did not know."""
    bad: list[tuple[str, str]]
    """Files that cannot be used: name and reason."""
    seconds: float
    """Of audio, in all files that can be used."""
    rates: list[int]
    """Sample rates that occur, Hz."""
    folder: Path | None
    """Where the index is kept; None if nothing can be written there."""
    notes: list[str]
    """What a user should know, one line each."""


def index(
    data: str | Path,
    *,
    beside: bool = False,
    processes: int | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> IndexReport:
    """Make the index of some data, or bring it up to date: what `train` does by itself where there are many files.

    Files are known by name, size and time of change. What is found is written down as it comes: an
    index that was stopped, however, goes on where it was. A file that cannot be used is named and
    stops nothing.

    Parameters
    ----------
    data : str or Path
        As of `find`.
    beside : bool
        Keep the index beside the data, for everybody who reads them there, rather than in the cache
        of the user (`WAVEAR_CACHE`, or `XDG_CACHE_HOME/wavear`, or `~/.cache/wavear`).
    processes : int, optional
        To look into files with; by default one per core, up to 16.
    progress : callable, optional
        As of `open_corpus`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `find`.
    OSError
        If `beside` is set and nothing can be written there.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes!r}, expected 1 or more")
    kept = Index(data, keep=True, put_beside=beside, processes=processes, progress=progress)
    listing = kept.listing()
    files = Files.of_listing(listing)
    found = kept.find("header", files.key, lambda n: _question(listing, int(files.row[n])))
    seconds = float((found.a / np.maximum(found.b, 1)).sum())
    bad = listing.bad + [
        (listing.base(int(files.row[n])), told) for n, told in sorted(found.errors.items())
    ]
    rates = np.unique(found.b[found.b > 0]).tolist()
    return IndexReport(
        len(listing),
        len(files.row),
        found.new,
        bad,
        seconds,
        rates,
        kept.writable(),
        list(kept.notes),
    )


def _question(listing: Listing, row: int) -> list[Any]:
    """What a process is told of a file."""
    if listing.member is None:
        return [listing.file(row)]
    return [list(dataclasses.astuple(listing.path(row)))]  # type: ignore[arg-type]


def _opened(
    listing: Listing,
    index: Index,
    rate: int,
    least_samples: int,
    source: str | Path,
    bad: list[tuple[str, str]],
) -> Recordings:
    """The rows of a listing that can be used, with start and length; the others go to `bad`."""
    files = Files.of_listing(listing)
    found = index.find("header", files.key, lambda n: _question(listing, int(files.row[n])))
    frames, own_rate = found.a[files.of], np.maximum(found.b[files.of], 1)
    whole = (2 * frames * rate + own_rate) // (2 * own_rate)  # rounded, as `audio.read` does
    start, left = np.zeros(len(listing), np.int64), whole
    if listing.span is not None:
        start = np.rint(listing.span[:, 0] * rate).astype(np.int64)
        duration = listing.span[:, 1]
        left = whole - start
        left = np.where(
            np.isnan(duration), left, np.minimum(left, np.rint(np.nan_to_num(duration) * rate))
        )
        left = left.astype(np.int64)
    failed = np.zeros(len(files.row), bool)
    failed[list(found.errors)] = True
    failed = failed[files.of]
    usable = ~failed & (left >= max(least_samples, 1)) & (start < whole)
    mine = []
    for row in np.flatnonzero(~usable).tolist():
        if failed[row]:
            told = found.errors[int(files.of[row])]
        elif start[row] >= whole[row]:
            seconds = frames[row] / own_rate[row]
            told = f"it is to be read from {listing.start(row):g} s on, and ends at {seconds:g} s"
        else:
            told = (
                f"{left[row]} samples at {rate} Hz are too few: at least {least_samples} are needed"
            )
        mine.append((listing.name(row), told))
    bad += listing.bad + mine
    if not usable.any():
        raise ValueError(
            f"{source}: none of the files can be used; the first: {mine[0][0]}: {mine[0][1]}"
        )
    rows = np.flatnonzero(usable)
    return Recordings(listing, rows, start[rows], left[rows], own_rate[rows])


def _leveled(
    recordings: Recordings,
    index: Index,
    rate: int,
    normalise: Normalise,
    trim: float | None,
    source: str | Path,
    bad: list[tuple[str, str]],
) -> Recordings:
    """With a gain from their levels, and without their silent ends; those that cannot be decoded go to `bad`."""
    listing = recordings.listing
    files = Files.of_listing(listing)
    keys = mixed(files.key[files.of[recordings.rows]], recordings.start, recordings.frames)

    def item(n: int) -> list[Any]:
        (path,) = _question(listing, int(recordings.rows[n]))
        return [path, rate, int(recordings.start[n]), int(recordings.frames[n]), normalise, trim]

    settings = f"{rate}-{normalise}" + ("" if trim is None else f"-{trim!r}")
    found = index.find("level", keys, item, f"levels-{settings}", "measuring levels")
    mine = [(recordings[n].name, told) for n, told in sorted(found.errors.items())]
    bad += mine
    good = np.ones(len(recordings), bool)
    good[list(found.errors)] = False
    if not good.any():
        raise ValueError(
            f"{source}: none of the files can be used; the first: {mine[0][0]}: {mine[0][1]}"
        )
    return Recordings(listing, recordings.rows, found.a, found.b, recordings.rate, found.c).take(
        good
    )


def _open(recording: Recording, rate: int, least_samples: int) -> Recording:
    """With start and length, from the file's header."""
    info = audio.info(recording.path)
    whole = (2 * info.frames * rate + info.sample_rate) // (
        2 * info.sample_rate
    )  # rounded, as `audio.read` does
    start, duration = round(recording.span[0] * rate), recording.span[1]
    if start >= whole:
        raise ValueError(
            f"it is to be read from {recording.span[0]:g} s on, and ends at {info.seconds:g} s"
        )
    frames = whole - start if duration is None else min(whole - start, round(duration * rate))
    if frames < least_samples:
        raise ValueError(
            f"{frames} samples at {rate} Hz are too few: at least {least_samples} are needed"
        )
    return dataclasses.replace(recording, start=start, frames=frames, sample_rate=info.sample_rate)


def _measured(
    recording: Recording, rate: int, normalise: Normalise, trim: float | None
) -> Recording:
    """With a gain from its level, and without its silent ends."""
    found = level(recording.path, rate, recording.start, recording.frames, normalise, trim)
    return dataclasses.replace(recording, start=found.start, frames=found.frames, gain=found.gain)


def _level_by_speaker(recordings: list[Recording]) -> list[Recording]:
    """One gain for all recordings of a speaker: the least of theirs, so that none is clipped."""
    gains: dict[str | None, list[float]] = {}
    for recording in recordings:
        gains.setdefault(recording.speaker, []).append(recording.gain)
    return [dataclasses.replace(r, gain=min(gains[r.speaker])) for r in recordings]


def _speaker_gains(recordings: Recordings) -> np.ndarray:
    """One gain for all recordings of a speaker: the least of theirs, so that none is clipped."""
    assert recordings.gain is not None
    least = np.full(len(recordings.listing.speakers) + 1, np.inf)
    np.minimum.at(least, recordings.speaker, recordings.gain)  # no speaker is -1: the last
    return least[recordings.speaker]


def split(
    recordings: Sequence[Recording], fraction: float
) -> tuple[list[Recording], list[Recording]]:
    """(train, validation): by the column `split` where it holds anything out, else by the hash of the name.

    Raises
    ------
    ValueError
        If `fraction` is not between 0 and 1, or nothing is left to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation_fraction is {fraction!r}, expected more than 0 and less than 1"
        )
    builder = ListingBuilder(Path())
    for r in recordings:
        start = f"#{r.span[0]:g}" if r.span[0] else ""
        builder.add(
            r.name.removesuffix(start), split=-1 if r.split is None else SPLIT_NAMES.index(r.split)
        )
    listing = builder.done()
    numbers = np.arange(len(recordings))
    rows = Recordings(listing, numbers, numbers, frames_of(recordings), numbers)
    train, held = _split(rows, listing.split, fraction, 1)
    if len(train) == len(held) == 1 and train.rows[0] == held.rows[0]:  # a single file, cut
        whole, at = recordings[int(train.rows[0])], int(train.frames[0])
        rest = {"start": whole.start + at, "frames": whole.frames - at}
        return [dataclasses.replace(whole, frames=at)], [
            dataclasses.replace(
                whole, name=f"{whole.name}#end", start=rest["start"], frames=rest["frames"]
            )
        ]
    return [recordings[n] for n in train.rows.tolist()], [recordings[n] for n in held.rows.tolist()]


def _split(
    recordings: Recordings, splits: np.ndarray, fraction: float, least: int
) -> tuple[Recordings, Recordings]:
    """See `split`; `splits` are the numbers that the column `split` says, -1 where nothing, `least` samples of use."""
    chosen = recordings.take(splits != _TEST)
    splits = splits[splits != _TEST]
    held = splits == _VALIDATION
    if held.all():
        raise ValueError("every recording is held out by its 'split', none is left to train on")
    if held.any():
        return chosen.take(~held), chosen.take(held)
    if len(chosen) == 1:
        return _cut(chosen, fraction, least)
    # Stretches of one file stay together: the file's name is hashed, not the stretch's.
    groups = chosen.listing.keys[chosen.rows]
    names = np.unique(groups)
    if len(names) == 1:
        count = max(1, min(round(len(chosen) * fraction), len(chosen) - 1))
        return chosen.take(slice(None, -count)), chosen.take(slice(-count, None))
    chance = names.astype(np.float64) / 2**64
    most = names[max(int((chance < fraction).sum()), 1) - 1 :][0]  # at least one file is held out,
    most = min(most, names[-2])  # and at least one is not
    held = groups <= most
    return chosen.take(~held), chosen.take(held)


def _cut(recordings: Recordings, fraction: float, least: int) -> tuple[Recordings, Recordings]:
    """The beginning of a single file and its end, each of at least so many samples."""
    frames = int(recordings.frames[0])
    at = min(round(frames * (1 - fraction)), frames - least)
    if at < least:
        raise ValueError(
            f"{recordings[0].name} is the only recording, and too short to hold out a part of it"
        )
    begin, end = recordings.take(slice(None)), recordings.take(slice(None))
    begin.frames = np.array([at])
    end.start, end.frames, end.suffix = end.start + at, np.array([frames - at]), "#end"
    return begin, end


def overlapping(recordings: Sequence[Recording], others: Sequence[Recording]) -> np.ndarray:
    """(n,) bool: which recordings share samples of a file with one of the others."""
    spans: dict[Any, list[tuple[int, int]]] = {}
    for other in others:
        spans.setdefault(other.path.resolve(), []).append((other.start, other.start + other.frames))
    names = {path.name for path in spans}  # few files have to be looked up on the disk
    return np.array(
        [
            r.path.name in names
            and any(
                r.start < stop and start < r.start + r.frames
                for start, stop in spans.get(r.path.resolve(), ())
            )
            for r in recordings
        ],
        bool,
    )


def reason(error: Exception, recording: Recording) -> str:
    """One line that says why a file cannot be used, without its name."""
    return why(error, recording.path)
