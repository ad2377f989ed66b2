"""Open data for training: read the headers, measure levels if asked, and hold a part out.

`wavear.data.listing` and `wavear.data.shards` list the files; an index remembers their headers and
levels (`wavear.data.indexing`). Audio is decoded here only to measure levels or silence.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wavear.common.errors import WavearError
from wavear.common.words import counted
from wavear.data.duplicates import contents, overlapping
from wavear.data.file_mels import MelFolder
from wavear.data.gains import Normalize
from wavear.data.indexing import LEVELS, Files, Index, mixed
from wavear.data.levels import Stretch, why
from wavear.data.recordings import SPLIT_NAMES, Recording, Recordings

_SHORT = 0.1  # seconds: durations in manifests are rounded
_TRAIN, _VALIDATION, _TEST = range(len(SPLIT_NAMES))
Bad = list[tuple[str, str]]
"""Files that cannot be used: name and reason."""


@dataclass(frozen=True)
class Corpus:
    """Recordings for training and for validation."""

    train: Recordings
    validation: Recordings
    speakers: list[str]
    """Names in the order of their numbers; empty without speakers."""
    bad: Bad
    """Files that cannot be used: name and reason."""
    notes: list[str]
    """Notes for the user, one line each."""
    without_mel: list[str]
    """Names of recordings that are skipped since the folder of mels has none of theirs."""


@dataclass(frozen=True)
class Treatment:
    """How recordings are opened; see `open_corpus`."""

    sample_rate: int
    least_samples: int = 1
    normalize: Normalize = "none"
    normalize_by: Literal["file", "speaker"] = "file"
    trim_silence: float | None = None

    @property
    def measures(self) -> bool:
        """True if the audio has to be decoded."""
        return self.normalize != "none" or self.trim_silence is not None


def find(data: str | Path, speakers: bool = False) -> Recordings:
    """List the recordings of a folder (at any depth, sorted by name) or of a manifest.

    Headers are not read: `frames` is -1.

    Parameters
    ----------
    data : str or Path
        A folder with audio files (`wavear.audio.SUFFIXES`; hidden ones are skipped), one such file,
        tar shards (`shards/{000..012}.tar`, `shards/*.tar`: see `wavear.data.shards`), or a
        manifest: a table with a header whose columns are separated by commas, semicolons, tabs or
        bars, or JSON lines (`.jsonl`, `.ndjson`, `.json`). A manifest has `path` (or
        `audio_filepath`, or `file_name`), relative to the manifest, and optionally `start` (or
        `offset`), `duration` or `end` in seconds, `speaker`, and `split` (train, validation or dev,
        test). A list without a header whose lines read `path|text` works too; an id for a path, as
        in LJ Speech's `metadata.csv`, is a file in the folder `wavs` next to the list.
    speakers : bool
        A folder's first level of sub-folders names the speakers. (A manifest's column `speaker`
        always counts.)

    Raises
    ------
    FileNotFoundError
        If `data` does not exist.
    WavearError
        If it contains no audio, or the manifest cannot be read; the message names the line.
    """
    return Index(data, keep=False).recordings(speakers)


def open_corpus(
    data: str | Path,
    *,
    sample_rate: int,
    validation: str | Path | None = None,
    validation_fraction: float = 0.05,
    speakers: bool = False,
    least_samples: int = 1,
    normalize: Normalize = "none",
    normalize_by: Literal["file", "speaker"] = "file",
    trim_silence: float | None = None,
    mels: MelFolder | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> Corpus:
    """Read the header of every file and hold a part of the recordings out.

    The hash of a file's name decides whether it is held out, so it stays in its split when others
    are added or removed; at least one file is on each side. Links to a file and copies of it stay
    with it. A single file is cut: its end is held out. A manifest's column `split` that holds
    anything out, or `validation`, decides instead; then copies are not trained on.

    Parameters
    ----------
    data, validation : str or Path
        See `find`; `validation` is a second folder or manifest, all of it held out.
    sample_rate : int
        Of the model, in Hz. Files at other rates are resampled as they are read; a note counts
        them.
    validation_fraction : float
        Share of the files to hold out.
    speakers : bool
        See `find`.
    least_samples : int
        Shorter files cannot be used (one mel frame, say).
    normalize : "none", "peak" or "rms"
        Gain that brings the peak to 0.9 or the RMS to -23 dB of full scale (and no peak over 1).
        Decodes every file.
    normalize_by : "file" or "speaker"
        One gain per file, or one per speaker, which keeps the differences between the files of a
        speaker.
    trim_silence : float, optional
        Cut the ends that are this many dB below the file's peak, in blocks of 10 ms, up to 50 ms.
        Decodes every file.
    mels : MelFolder, optional
        Mels from files; recordings without one are skipped.
    progress : callable, optional
        Wraps an iterable, with its length and a description, to show progress.

    Raises
    ------
    FileNotFoundError
        If there are no such data.
    WavearError
        If no file can be used; the message gives the first reason.
    """
    if not 0 < validation_fraction < 1:
        raise WavearError(
            f"validation_fraction is {validation_fraction!r}, expected more than 0 and less than 1"
        )
    how = Treatment(sample_rate, least_samples, normalize, normalize_by, trim_silence)
    bad: Bad = []
    notes: list[str] = []
    without_mel: list[str] = []
    parts, indexes = [], []
    for source in (data, *([] if validation is None else [validation])):
        index = Index(source, progress=progress)
        part, unusable = prepare(index.recordings(speakers), how, index)
        if not len(part):
            name, told = unusable[len(part.bad) :][0]
            missing = told == os.strerror(errno.ENOENT)
            where = f"; paths are relative to {part.root}" if missing else ""
            raise WavearError(
                f"{source}: none of the files can be used; the first: {name}: {told}{where}"
            )
        if part.span is not None and trim_silence is None:
            short = part.frames / sample_rate + _SHORT < part.span[:, 1]  # NaN: up to the end
            if short.any():
                notes.append(
                    f"{source}: {counted(short.sum(), 'recording')} shorter than it states; the"
                    f" first: {part.name(int(np.argmax(short)))}"
                )
        if mels is not None:
            part, missing = mels.pair(part, progress)
            without_mel += missing
        parts.append(part)
        indexes.append(index)
        bad += unusable
    rates = np.concatenate([part.rate for part in parts])
    if others := sorted(set(np.unique(rates).tolist()) - {sample_rate}):
        count, text = int((rates != sample_rate).sum()), ", ".join(map(str, others))
        notes.append(
            f"{count} of {len(rates)} files are resampled to {sample_rate} Hz (from {text} Hz)"
        )
    _check_left(parts[0].take(parts[0].split <= _TRAIN), data)
    if validation is not None:
        train, held = parts[0].take(parts[0].split <= _TRAIN), parts[1]
        train = _without(train, held, f"{data} are also in {validation}", notes)
    elif (parts[0].split == _VALIDATION).any():
        train, held = split(parts[0], validation_fraction, least_samples)
        away = parts[0].take(parts[0].split > _TRAIN)
        train = _without(train, away, f"{data} are also held out by the column `split`", notes)
        _check_left(train, data)
    else:
        keyed = dataclasses.replace(parts[0], key=contents(parts[0], indexes[0]))
        if copies := len(np.unique(parts[0].key)) - len(np.unique(keyed.key)):
            notes.append(
                f"{copies} of {len(np.unique(parts[0].key))} files are links to others or copies of"
                " them: they stay on the same side of the split"
            )
        train, held = split(keyed, validation_fraction, least_samples)
    notes += [note for index in indexes for note in index.notes]
    names = sorted(train.speakers() | held.speakers())
    for part in (train, held):
        if names and (part.speaker < 0).any():
            name = part.name(int(np.argmin(part.speaker)))
            raise WavearError(
                f"{data}: {name} has no speaker, and others have. Name all speakers, or none."
            )
    if mels is not None:
        train, held = mels.on_frames(train), mels.on_frames(held)
    return Corpus(train, held, names, bad, notes, without_mel)


@dataclass(frozen=True)
class IndexReport:
    """The result of `index`."""

    recordings: int
    files: int
    """Distinct ones."""
    new: int
    """Files that were read, since the index did not contain them."""
    bad: list[tuple[str, str]]
    """Files that cannot be used: name and reason."""
    seconds: float
    """Seconds of audio, in all files that can be used."""
    rates: list[int]
    """Sample rates that occur, Hz."""
    folder: Path | None
    """Folder of the index; None if it cannot be written."""
    notes: list[str]
    """Notes for the user, one line each."""


def index(
    data: str | Path,
    *,
    beside: bool = False,
    processes: int | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> IndexReport:
    """Create or update the index of some data, as `train` does by itself for many files.

    A file is known by name, size and time of change. Results are stored as they come: an
    interrupted index resumes. A file that cannot be used is named and skipped.

    Parameters
    ----------
    data : str or Path
        See `find`.
    beside : bool
        Keep the index next to the data, for everybody who reads them there, not in the user's cache
        (`WAVEAR_CACHE`, or the system's cache folder).
    processes : int, optional
        To read files with; by default one per core, up to 16.
    progress : callable, optional
        See `open_corpus`.

    Returns
    -------
    IndexReport

    Raises
    ------
    FileNotFoundError, WavearError
        As `find`.
    OSError
        If `beside` is set and nothing can be written there.
    """
    if processes is not None and processes < 1:
        raise WavearError(f"processes is {processes!r}, expected 1 or more")
    kept = Index(data, keep=True, put_beside=beside, processes=processes, progress=progress)
    listed = kept.recordings()
    files = Files.of_recordings(listed)
    found = kept.find(files.key, lambda n: (listed.source(files.row[n]),))
    failed = np.flatnonzero(found.failed)
    return IndexReport(
        recordings=len(listed),
        files=len(files.row),
        new=found.new,
        bad=listed.bad + [(listed.file(files.row[n]), found.error[n]) for n in failed],
        seconds=float((found.frames / np.maximum(found.rate, 1)).sum()),
        rates=np.unique(found.rate[found.rate > 0]).tolist(),
        folder=kept.folder(),
        notes=kept.notes,
    )


def prepare(
    listed: Recordings, how: Treatment, index: Index | None = None
) -> tuple[Recordings, Bad]:
    """Read headers, measure levels if asked, and return what can be used and what cannot.

    Parameters
    ----------
    listed : Recordings
        As of `find`.
    how : Treatment
    index : Index, optional
        Remembers headers and levels.
    """
    index = index or Index("", keep=False)
    files = Files.of_recordings(listed)
    found = index.find(files.key, lambda n: (listed.source(files.row[n]),)).take(files.of)
    rate, own = how.sample_rate, np.maximum(found.rate, 1)
    whole = (2 * found.frames * rate + own) // (2 * own)  # rounded, as `audio.read` does
    start, frames = np.zeros(len(listed), np.int64), whole
    if listed.span is not None:
        start = np.rint(listed.span[:, 0] * rate).astype(np.int64)
        asked = np.rint(listed.span[:, 1] * rate)
        frames = np.fmin(whole - start, asked).astype(np.int64)  # NaN: up to the end
    usable = ~found.failed & (frames >= max(how.least_samples, 1)) & (start < whole)
    bad = list(listed.bad)
    for row in np.flatnonzero(~usable).tolist():
        reason: str | None = found.error[row]
        if reason is None and start[row] >= whole[row]:
            asked = 0.0 if listed.span is None else listed.span[row, 0]
            reason = (
                f"starts at {asked:g} s, but the file ends at {found.frames[row] / own[row]:g} s"
            )
        elif reason is None:
            reason = f"has {frames[row]} samples at {rate} Hz, fewer than {how.least_samples}"
        bad.append((listed.name(row), reason))
    beyond = 1 - found.gain
    opened = dataclasses.replace(listed, start=start, frames=frames, rate=own, beyond=beyond)
    opened = opened.take(usable)
    if not how.measures or not len(opened):
        return opened, bad
    keys = mixed(files.key[files.of[usable]], opened.start, opened.frames)
    return _leveled(opened, keys, how, index, bad), bad


def _leveled(
    opened: Recordings, keys: np.ndarray, how: Treatment, index: Index, bad: Bad
) -> Recordings:
    """Set gains from levels and cut silent ends; files that cannot be decoded go to `bad`."""

    def question(n: int) -> tuple[Any, Stretch]:
        start, frames = int(opened.start[n]), int(opened.frames[n])
        asked = Stretch(how.sample_rate, start, frames, how.normalize, how.trim_silence)
        return opened.source(n), asked

    setting = f"{how.sample_rate} {how.normalize} {how.trim_silence}"
    found = index.find(keys, question, LEVELS, setting)
    bad += [(opened.name(n), found.error[n]) for n in np.flatnonzero(found.failed).tolist()]
    leveled = dataclasses.replace(
        opened, start=found.start, frames=found.frames, gain=found.gain
    ).take(~found.failed)
    if how.normalize_by == "speaker" and how.normalize != "none":
        # The least of a speaker's gains, so that none of the files is clipped. -1 is the last.
        least = np.full(len(leveled.speaker_names) + 1, np.inf)
        np.minimum.at(least, leveled.speaker, found.gain[~found.failed])
        leveled.gain = least[leveled.speaker]
    return leveled


def split(
    recordings: Recordings, fraction: float, least_samples: int = 1
) -> tuple[Recordings, Recordings]:
    """Split into train and validation, by the column `split` if it holds anything out.

    Otherwise the hash of the file's name decides, so that stretches of a file stay together. A
    single recording is cut into parts of at least `least_samples`.

    Raises
    ------
    WavearError
        If nothing is left to train on.
    """
    chosen = recordings.take(recordings.split != _TEST)
    held = chosen.split == _VALIDATION
    _check_left(chosen.take(~held), recordings.root)
    if held.any():
        return chosen.take(~held), chosen.take(held)
    if len(chosen) == 1:
        return _cut(chosen, fraction, least_samples)
    names = np.unique(chosen.key)
    if len(names) == 1:
        count = max(1, min(round(len(chosen) * fraction), len(chosen) - 1))
        held = chosen.take(slice(-count, None))
        train = chosen.take(~overlapping(chosen, held))
        return (train, held) if len(train) else _cut_copies(chosen, fraction, least_samples)
    chance = names.astype(np.float64) / 2**64
    count = min(max(int((chance < fraction).sum()), 1), len(names) - 1)
    held = chosen.key <= names[count - 1]
    return chosen.take(~held), chosen.take(held)


def _without(train: Recordings, held: Recordings, where: str, notes: list[str]) -> Recordings:
    """Return the training recordings without those that are held out too, with a note.

    Where nothing but copies would be left, somebody validates on the training data on purpose.
    """
    twice = overlapping(train, held)
    if len(train) and twice.all() and not overlapping(train, held, copies=False).any():
        notes.append(
            f"{counted(len(train), 'recording')} of {where}, and none else, as copies: trained on,"
            " so held-out scores are those of the training data"
        )
        return train
    if twice.any():
        notes.append(f"{counted(twice.sum(), 'recording')} of {where}: held out, not trained on")
    return train.take(~twice)


def _check_left(train: Recordings, data: str | Path) -> None:
    if not len(train):
        raise WavearError(
            f"{data}: no training recordings. The column `split` holds all of them out."
        )


def _cut_copies(
    copies: Recordings, fraction: float, least_samples: int
) -> tuple[Recordings, Recordings]:
    """Hold out the end of the last of some recordings that overlap, and cut it off the others."""
    one, end = _cut(copies.take(slice(-1, None)), fraction, least_samples)
    others = copies.take(slice(None, -1))
    others = dataclasses.replace(others, frames=np.minimum(others.frames, one.frames))
    others = others.take(~overlapping(others, end))
    return (others if len(others) else one), end


def _cut(whole: Recordings, fraction: float, least_samples: int) -> tuple[Recordings, Recordings]:
    frames = int(whole.frames[0])
    at = min(round(frames * (1 - fraction)), frames - least_samples)
    if at < least_samples:
        raise WavearError(
            f"{whole.name(0)} is the only recording, and too short to hold out a part of it"
        )
    train = dataclasses.replace(whole, frames=np.array([at]))
    end = dataclasses.replace(
        whole, start=whole.start + at, frames=np.array([frames - at]), suffix="#end"
    )
    return train, end


def reason(error: Exception, recording: Recording) -> str:
    """Return why a file cannot be used, in one line without its name."""
    return why(error, recording.path)
