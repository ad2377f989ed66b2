"""Which recordings are evaluated, which the baselines are fitted to, and which of them the model has seen."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavear.data.corpus import Treatment, find, open_corpus, overlapping, prepare
from wavear.data.recordings import Recording, Recordings
from wavear.data.shards import is_shards, refuse_remote
from wavear.evaluation.held_out import subset

_REPORTS = {
    "audio": "evaluation.json",
    "strip": "models.json",
}  # folders of sound, and what lies beside them


@dataclass
class Clips:
    """What is evaluated."""

    good: list[Recording]
    failed: dict[str, str] = field(default_factory=dict)
    """Clips that cannot be used, and why."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Preparation:
    """What training did to the level and the ends of recordings."""

    normalise: Any = "none"
    normalise_by: Any = "file"
    trim_silence: float | None = None
    gains: dict[str, float] = field(default_factory=dict)
    """Of the speakers in training, with `normalise_by` "speaker"; empty where the run did not write them down."""

    @property
    def by_speaker(self) -> bool:
        """Whether every speaker has one gain."""
        return self.normalise != "none" and self.normalise_by == "speaker"

    @property
    def words(self) -> list[str]:
        """What it does, for a report."""
        by = " for each speaker" if self.by_speaker else ""
        found = [] if self.normalise == "none" else [f"level by {self.normalise}{by}"]
        return found + (
            [] if self.trim_silence is None else [f"ends {self.trim_silence:g} dB down cut"]
        )

    def treatment(self, rate: int, least: int) -> Treatment:
        """As the corpus takes it."""
        return Treatment(rate, least, self.normalise, self.normalise_by, self.trim_silence)

    @property
    def does_something(self) -> bool:
        """Whether samples differ from the file's."""
        return bool(self.words)


def training_record(checkpoint: str | Path) -> dict[str, Any]:
    """The `config` of the train.json of the run that a checkpoint is of, and the `gains` of its speakers where it has
    some; empty without one that can be read."""
    path = of_run(checkpoint, "train.json")
    if path is None:
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record.get("config", {}) | {"gains": record.get("data", {}).get("gains", {})}
    except (ValueError, OSError, AttributeError, TypeError):
        return {}


def of_run(checkpoint: str | Path, name: str) -> Path | None:
    """A file of the run that a checkpoint's folder lies in, one or two levels above it."""
    if not Path(checkpoint).is_dir():
        return None
    above = list(Path(checkpoint).resolve().parents)[:2]
    return next((folder / name for folder in above if (folder / name).is_file()), None)


def preparation(trained: dict[str, Any]) -> Preparation:
    """As `training_record` says."""
    return Preparation(
        **{f.name: trained[f.name] for f in dataclasses.fields(Preparation) if f.name in trained}
    )


def open_clips(
    data: str | Path, rate: int, least: int, prepared: Preparation, speakers: bool
) -> Clips:
    """The recordings of a folder or a manifest, of the latter what is not for training where a column `split` says so.

    What earlier reports below the folder hold is no recording.

    Raises
    ------
    FileNotFoundError, ValueError
        As `wavear.data.corpus.find`; and if not one can be used.
    """
    clips = Clips([])
    found = _found(data, speakers, prepared, clips.notes)
    if len(held := found.take(found.split > 0)):  # not for training
        if len(held) < len(found):
            clips.notes.append(
                f"{len(held)} of {len(found)} recordings: those not for training by their split"
            )
        found = held

    good, bad = prepare(found, prepared.treatment(rate, least))
    clips.good, clips.failed = list(good), dict(bad[len(found.bad) :])
    if not clips.good:
        name, why = next(iter(clips.failed.items()))
        raise ValueError(f"{data}: none of the clips can be used; the first: {name}: {why}")
    by = ""
    if prepared.by_speaker:
        clips.good, by = _speaker_levels(clips.good, prepared.gains)
    if rates := sorted({r.sample_rate for r in clips.good} - {rate}):
        count = sum(r.sample_rate != rate for r in clips.good)
        listed = ", ".join(map(str, rates))
        clips.notes.append(
            f"{count} of {len(clips.good)} clips are resampled to {rate} Hz (from {listed} Hz)"
        )
    if prepared.does_something:
        clips.notes.append(f"treated as in training: {', '.join(prepared.words)}{by}")
    return clips


def _found(data: str | Path, speakers: bool, prepared: Preparation, notes: list[str]) -> Recordings:
    """As `wavear.data.corpus.find`, with speakers where they have gains, and without the sound of earlier reports."""
    try:
        found = find(data, speakers or prepared.by_speaker)
    except ValueError:
        if speakers or not prepared.by_speaker:
            raise
        found = find(data)  # a folder without sub-folders names nobody
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
        raise ValueError(f"{data} holds no recordings but those of earlier reports")
    if len(left) < len(found):
        notes.append(f"{len(found) - len(left)} files are passed over: they are of earlier reports")
    return left


def _speaker_levels(
    recordings: list[Recording], gains: dict[str, float]
) -> tuple[list[Recording], str]:
    """With one gain per speaker, that of the training where it is known, else by these; and what was done, in words."""
    found = [
        dataclasses.replace(r, gain=gains[r.speaker]) if r.speaker in gains else r
        for r in recordings
    ]
    speakers = {r.speaker for r in recordings}
    if speakers == {None}:
        return found, "; but one gain for all, since no speakers are named"
    if known := len(speakers & gains.keys()):
        rest = (
            ""
            if known == len(speakers)
            else f" for {known} of {len(speakers)} and of these clips for the others"
        )
        return found, f"; the speakers' gains are those of the training{rest}"
    return found, "; the speakers' gains are of these clips, those of the training are not known"


@dataclass
class Fitting:
    """What the baselines are fitted to."""

    recordings: list[Recording]
    """Empty: the clips serve each other by halves."""
    says: str
    """Where they come from."""
    trained_on: set[str] = field(default_factory=set)
    """Names of clips that the model was trained on."""
    note: str | None = None
    """What is to be said where it is not known which these are."""


def fitting_data(
    clips: Sequence[Recording],
    rate: int,
    least: int,
    trained: dict[str, Any],
    prepared: Preparation,
    train_data: str | None,
    seconds: float,
) -> Fitting:
    """Recordings for the baselines, none of them a clip; and the clips the model was trained on, where that is known.

    Raises
    ------
    FileNotFoundError, ValueError
        If `train_data` cannot be used, or is nothing but the clips.
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
                normalise=prepared.normalise,
                normalise_by=prepared.normalise_by,
                speakers=bool(trained.get("speakers")) or prepared.normalise_by == "speaker",
                trim_silence=prepared.trim_silence,
            ).train
        except (ValueError, OSError) as error:  # it has changed since: then it says nothing
            unknown = str(error)
    elif isinstance(source, str):
        unknown = f"{source} is not here"
    seen = overlapping(clips, corpus)
    says = f"{source}, that the model was trained on"
    if train_data is not None:
        corpus = open_clips_for_fitting(train_data, rate, least, prepared)
        says = train_data
    twice = overlapping(corpus, clips)
    left = [r for r, held_out in zip(corpus, twice, strict=True) if not held_out]
    if train_data is not None and not left:
        raise ValueError(
            f"{train_data} holds nothing but the evaluated clips: baselines need other recordings"
        )
    random.Random(0).shuffle(left)
    chosen = subset(left, seconds * rate) if left else []
    if not chosen:
        says = "the clips themselves, each half for the other"
    names = {clip.name for clip, known in zip(clips, seen, strict=True) if known}
    note = (
        None
        if unknown is None
        else f"whether clips were trained on is not known: of its data, {unknown}"
    )
    return Fitting(chosen, says, names, note)


def open_clips_for_fitting(
    data: str, rate: int, least: int, prepared: Preparation
) -> list[Recording]:
    """Recordings to fit to: of a manifest with a column `split`, those for training."""
    found = _found(data, False, prepared, [])
    found = found.take(found.split <= 0)
    if not len(found):
        raise ValueError(
            f"{data}: every recording is held out by its 'split', none is left to fit to"
        )
    good = list(prepare(found, prepared.treatment(rate, least))[0])
    if not good:
        raise ValueError(f"{data}: none of the recordings can be used")
    return _speaker_levels(good, prepared.gains)[0] if prepared.by_speaker else good
