"""Choose the recordings of an evaluation, and those to fit baselines to."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.common.words import counted
from wavear.data.corpus import Treatment, find, open_corpus, prepare
from wavear.data.doubts import doubts
from wavear.data.duplicates import overlapping
from wavear.data.file_mels import MelFolder
from wavear.data.recordings import Recording, Recordings
from wavear.data.shards import is_shards, refuse_remote
from wavear.evaluation.held_out import subset
from wavear.evaluation.records import RECORD, SOUNDS, STRIP, TABLE_RECORD

# Settings of earlier runs.
_RENAMED = {"normalise": "normalize", "normalise_by": "normalize_by"}
_REPORTS = {SOUNDS: RECORD, STRIP: TABLE_RECORD}  # folders of audio, and the files next to them


@dataclass
class Clips:
    """Recordings to evaluate."""

    good: list[Recording]
    failed: dict[str, str] = field(default_factory=dict)
    """Clips that cannot be used, and why."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Preparation:
    """The treatment of levels and ends in a model's training."""

    normalize: Any = "none"
    normalize_by: Any = "file"
    trim_silence: float | None = None
    gains: dict[str, float] = field(default_factory=dict)
    """Gains of its speakers, with `normalize_by` "speaker"; empty if the run has none."""

    @property
    def by_speaker(self) -> bool:
        """True if every speaker has one gain."""
        return self.normalize != "none" and self.normalize_by == "speaker"

    @property
    def words(self) -> list[str]:
        """A description for a report; empty where samples are those of the file."""
        by = " for each speaker" if self.by_speaker else ""
        found = [] if self.normalize == "none" else [f"level by {self.normalize}{by}"]
        if self.trim_silence is not None:
            found.append(f"ends {self.trim_silence:g} dB down cut")
        return found


def training_record(checkpoint: str | Path) -> dict[str, Any]:
    """Return the `config` of the run's train.json, with the `gains` of its speakers.

    Empty without a readable one.
    """
    path = of_run(checkpoint, "train.json")
    if path is None:
        return {}
    try:
        record = parse_json(path.read_bytes())
        config: dict[str, Any] = record.get("config", {})
        for name in config.keys() & _RENAMED.keys():
            config[_RENAMED[name]] = config.pop(name)
        return config | {"gains": record.get("data", {}).get("gains", {})}
    except (ValueError, OSError, AttributeError, TypeError):
        return {}


def of_run(checkpoint: str | Path, name: str) -> Path | None:
    """Return a file of the run that a checkpoint belongs to, one or two levels above it."""
    if not Path(checkpoint).is_dir():
        return None
    above = list(Path(checkpoint).resolve().parents)[:2]
    return next((folder / name for folder in above if (folder / name).is_file()), None)


def preparation(trained: dict[str, Any]) -> Preparation:
    """Return the treatment that a `training_record` describes."""
    names = [f.name for f in dataclasses.fields(Preparation) if f.name in trained]
    return Preparation(**{name: trained[name] for name in names})


def none_usable(data: str | Path, failed: dict[str, str]) -> WavearError:
    """Return the error for data without a usable clip."""
    name, why = next(iter(failed.items()))
    return WavearError(f"{data}: none of the clips can be used; the first: {name}: {why}")


def open_clips(
    data: str | Path,
    rate: int,
    least: int,
    prepared: Preparation,
    speakers: bool,
    mels: MelFolder | None = None,
) -> Clips:
    """Open the recordings of a folder or manifest; with a column `split`, the held-out ones.

    The audio of earlier reports below the folder is left out. With `mels`, a recording without a
    mel fails.

    Raises
    ------
    FileNotFoundError, ValueError
        As `wavear.data.corpus.find`; and if no clip can be used.
    """
    clips = Clips([])
    found = _find(data, speakers, prepared, clips.notes)
    if len(held := found.take(found.split > 0)):  # not for training
        if len(held) < len(found):
            clips.notes.append(
                f"{len(held)} of {len(found)} recordings: those not for training by their split"
            )
        found = held
    clips.good, clips.failed, doubtful = _open_each(found, rate, least, prepared, mels)
    clips.notes += doubtful
    if not clips.good:
        raise none_usable(data, clips.failed)
    by = ""
    if prepared.by_speaker:
        clips.good, by = _speaker_levels(clips.good, prepared.gains)
    if other := [r.sample_rate for r in clips.good if r.sample_rate != rate]:
        listed = ", ".join(map(str, sorted(set(other))))
        clips.notes.append(
            f"{len(other)} of {len(clips.good)} clips are resampled to {rate} Hz (from {listed} Hz)"
        )
    if prepared.words:
        clips.notes.append(f"treated as in training: {', '.join(prepared.words)}{by}")
    return clips


def open_clips_for_fitting(
    data: str, rate: int, least: int, prepared: Preparation
) -> list[Recording]:
    """Open recordings to fit to; of a manifest with a column `split`, those for training."""
    found = _find(data, False, prepared, [])
    found = found.take(found.split <= 0)
    if not len(found):
        raise WavearError(
            f"{data}: every recording is held out by its 'split'; pass recordings for training"
        )
    good, failed, _ = _open_each(found, rate, least, prepared)
    if not good:
        raise none_usable(data, failed)
    return _speaker_levels(good, prepared.gains)[0] if prepared.by_speaker else good


def _open_each(
    recordings: Recordings,
    rate: int,
    least: int,
    prepared: Preparation,
    mels: MelFolder | None = None,
) -> tuple[list[Recording], dict[str, str], list[str]]:
    """Return the usable recordings, the reasons for the others, and doubts about the usable."""
    treatment = Treatment(
        rate, least, prepared.normalize, prepared.normalize_by, prepared.trim_silence
    )
    good, bad = prepare(recordings, treatment)
    failed = dict(bad[len(recordings.bad) :])
    if mels is not None and len(good):
        good, missing = mels.pair(good)
        failed |= dict.fromkeys(missing, f"{mels.folder} has no mel of it")
    return list(good), failed, doubts(good, rate) if len(good) else []


def _find(data: str | Path, speakers: bool, prepared: Preparation, notes: list[str]) -> Recordings:
    """Find recordings, with speakers where these have gains, without those of earlier reports."""
    try:
        found = find(data, speakers or prepared.by_speaker)
    except ValueError:
        if speakers or not prepared.by_speaker:
            raise
        found = find(data)  # a folder without sub-folders has no speakers
    if not Path(data).is_dir():
        return found
    exists = functools.cache(lambda folder, name: (Path(data, folder) / name).is_file())

    def of_report(name: str) -> bool:
        folders = name.split("/")[:-1]
        return any(
            part in _REPORTS and exists("/".join(folders[:n]), _REPORTS[part])
            for n, part in enumerate(folders)
        )

    left = found.take(np.array([not of_report(found.file(row)) for row in range(len(found))], bool))
    if not len(left):
        raise WavearError(f"{data} has no recordings other than those of earlier reports")
    if len(left) < len(found):
        notes.append(f"skipped {counted(len(found) - len(left), 'file')} of earlier reports")
    return left


def _speaker_levels(
    recordings: list[Recording], gains: dict[str, float]
) -> tuple[list[Recording], str]:
    """Give each speaker one gain, the training's where it is known; return a description too."""
    found = [
        dataclasses.replace(r, gain=gains[r.speaker]) if r.speaker in gains else r
        for r in recordings
    ]
    speakers = {r.speaker for r in recordings}
    known = len(speakers & gains.keys())
    if speakers == {None}:
        return found, "; but one gain for all, since no speakers are named"
    if not known:
        return found, "; the speakers' gains are of these clips, those of the training are unknown"
    rest = f" for {known} of {len(speakers)} and of these clips for the others"
    which = "" if known == len(speakers) else rest
    return found, f"; the speakers' gains are those of the training{which}"


@dataclass
class Fitting:
    """Recordings that the baselines are fitted to."""

    recordings: list[Recording]
    """Empty: each half of the clips serves the other."""
    origin: str
    """A description of where they come from."""
    trained_on: set[str] = field(default_factory=set)
    """Names of clips that the model was trained on."""
    note: str | None = None
    """The reason where these are not known."""


def fitting_data(
    clips: Sequence[Recording],
    rate: int,
    least: int,
    trained: dict[str, Any],
    prepared: Preparation,
    train_data: str | None,
    seconds: float,
) -> Fitting:
    """Choose recordings for the baselines, without the clips.

    Clips that the model was trained on are found too.

    Raises
    ------
    FileNotFoundError, ValueError
        If `train_data` cannot be used, or has only the clips.
    """
    corpus: Sequence[Recording] = []
    source, unknown = trained.get("data"), None
    held = trained.get("validation")
    if isinstance(source, str) and (Path(source).exists() or is_shards(source)):
        try:
            for data in (source, *([] if held is None else [held])):
                refuse_remote(data, "its train.json")
            corpus = open_corpus(
                source,
                sample_rate=rate,
                validation=held,
                validation_fraction=trained.get("validation_fraction", 0.05),
                least_samples=least,
                normalize=prepared.normalize,
                normalize_by=prepared.normalize_by,
                speakers=bool(trained.get("speakers")) or prepared.normalize_by == "speaker",
                trim_silence=prepared.trim_silence,
            ).train
        except (ValueError, OSError) as error:  # the data changed since the training
            unknown = str(error)
    elif isinstance(source, str):
        unknown = f"{source} is not here"
    seen = overlapping(clips, corpus)
    origin = f"{source}, the model's training data"
    if train_data is not None:
        corpus, origin = open_clips_for_fitting(train_data, rate, least, prepared), train_data
    twice = overlapping(corpus, clips)
    left = [r for r, held_out in zip(corpus, twice, strict=True) if not held_out]
    if train_data is not None and not left:
        raise WavearError(
            f"{train_data} has only the evaluated clips: pass other recordings to fit baselines to"
        )
    random.Random(0).shuffle(left)
    chosen = subset(left, seconds * rate) if left else []
    if not chosen:
        halves = "the clips themselves, each half for the other"
        origin = halves if len(clips) > 1 else "nothing, as a single clip has no other half"
    note = None
    if unknown is not None:
        note = f"whether clips were trained on is not known: of the training data, {unknown}"
    names = {clip.name for clip, known in zip(clips, seen, strict=True) if known}
    return Fitting(chosen, origin, names, note)
