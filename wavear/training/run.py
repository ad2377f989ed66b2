"""Training: `train`, which makes a model of recordings, and `write_held_out`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.common.atomic import replace_file
from wavear.common.claims import claimed
from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger
from wavear.common.progress import bar
from wavear.common.untrusted import parse_json
from wavear.common.words import counted
from wavear.data.corpus import Corpus, Recording, open_corpus
from wavear.data.doubts import doubts
from wavear.data.file_mels import MelFolder
from wavear.data.recordings import Recordings, fingerprint, frames_of
from wavear.data.shards import is_shards, refuse_remote
from wavear.mel.conventions import frames_from_dict
from wavear.models.checkpoint import LATER
from wavear.models.families import FAMILIES
from wavear.training.config import OutputSettings, TrainConfig, TrainResult
from wavear.training.parts import train_in_parts
from wavear.training.processes import Processes
from wavear.training.run_directory import RECORD, open_directory
from wavear.training.speakers import bound, named_speakers, start_state

logger = get_logger(__name__)

_NAMED = 20  # files that cannot be used, in the messages
# Settings that may differ in a resumed run without a message: the data count by their contents.
_FREE = {"data", "validation", "validation_fraction", "workers"}
_LENGTH = {"max_steps", "max_minutes"}
_FREE |= {field.name for field in dataclasses.fields(OutputSettings)}


def train(config: TrainConfig) -> TrainResult:
    """Train a model on recordings, or resume a training.

    With `free_run` between 0 and 1 a run has two parts; the first is in `out`/likelihood. Ctrl-C
    (or SIGTERM) ends the run after the current step, with everything saved; `resume` continues it.
    Under torchrun or srun each process trains on its share of every batch. With `config.progress`
    the run reports through `logging`, as "wavear.training".

    Parameters
    ----------
    config : TrainConfig

    Returns
    -------
    TrainResult

    Raises
    ------
    FileExistsError
        If `config.out` holds something and neither `resume` nor `overwrite` is given.
    FileNotFoundError
        If the data do not exist, or there is nothing to resume.
    WavearError
        If no file can be used, `resume` meets a run of another model, or another process trains in
        the same directory.
    """
    if Processes.here().rank > 0:
        return train_in_parts(config, _train)
    with claimed([config.out], config.out):
        return train_in_parts(config, _train)


def _train(config: TrainConfig, whole: Path | None) -> TrainResult:
    if config.family == "linear":
        from wavear.training.linear_run import fit
    else:
        from wavear.training.loop import fit  # before `_reporting`: Lightning sets its log levels
    writes = Processes.here().rank == 0
    visible = config.progress and writes
    record = open_directory(config, writes)
    with _reporting(visible), torch.random.fork_rng(devices=[]):
        if whole is not None or config.free_run == 1:
            how = "first part: by the likelihood" if whole else "by the likelihood and the free run"
            logger.info(how)
        corpus = _open(config, visible)
        speakers = bound(record, _speakers(config, corpus), config)
        _report_changes(record, config, corpus)
        _report_data(corpus, speakers, config.sample_rate, config.frames)
        for doubt in doubts(corpus.train, config.sample_rate) if visible else ():
            logger.warning(doubt)
        torch.manual_seed(config.seed)
        model = FAMILIES[str(config.family)][0](config.model_config(len(speakers)))
        if config.from_checkpoint is not None:
            model.load_state_dict(start_state(config.from_checkpoint, model))
        _check_same_run(record, config, model.config)
        by_speaker = config.normalize_by == "speaker"
        record |= {
            "config": dataclasses.asdict(config),
            "model": dataclasses.asdict(model.config),
            "data": {
                "train": _extent(corpus.train, config.sample_rate),
                "validation": _extent(corpus.validation, config.sample_rate),
                "fingerprint": fingerprint(corpus.train),
                "bad": dict(corpus.bad),
                "speakers": speakers,
                "gains": _gains(corpus.validation) | _gains(corpus.train) if by_speaker else {},
            },
        }
        return fit(config, corpus, speakers, model, record, whole)


def _open(config: TrainConfig, visible: bool) -> Corpus:
    corpus = open_corpus(
        config.data,
        sample_rate=config.sample_rate,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        speakers=config.speakers or config.normalize_by == "speaker",
        least_samples=config.mel.hop_length if config.mel else 2,
        normalize=config.normalize,
        normalize_by=config.normalize_by,
        trim_silence=config.trim_silence,
        mels=MelFolder(config.frames, config.mel) if config.frames and config.mel else None,
        progress=bar if visible else None,
    )
    if not len(corpus.train):
        raise WavearError(
            f"{config.data}: every recording is in {config.validation}, too; none is left to train"
            " on"
        )
    by_speaker = config.normalize_by == "speaker" and config.normalize != "none"
    if not corpus.speakers and (config.speakers or by_speaker):
        raise WavearError(
            f"{config.data} names no speaker: fill a column 'speaker', or make one sub-folder per"
            f" speaker, or drop {'--normalize-by' if by_speaker else '--speakers'}"
        )
    return corpus


def _speakers(config: TrainConfig, corpus: Corpus) -> list[str]:
    """Return the names of the speakers: of the checkpoint to fine-tune, then others of the data."""
    if not config.speakers:
        return []
    before = [] if config.from_checkpoint is None else named_speakers(config.from_checkpoint)
    return list(dict.fromkeys([*before, *corpus.speakers]))


def _check_same_run(record: dict[str, Any], config: TrainConfig, model: Any) -> None:
    """Refuse to resume a run of another model, optimizer or seed."""
    if record.get("model") is None:
        return
    out, old = config.out, record["config"]
    now = json.loads(json.dumps(dataclasses.asdict(model)))
    # Fields that came later than the run have their defaults.
    before = {name: value for name, value in LATER.items() if name in now} | record["model"]
    if isinstance(before.get("mel"), dict):
        before["mel"] = frames_from_dict(before["mel"]).to_dict()
    differ = [
        f"{name} {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if (family := old.get("family", "wavenet")) != config.family:
        raise WavearError(
            f"{out} is a run of the family {family}, now {config.family}: resume with the same"
        )
    if differ:
        settings = [
            f"{name} is {old[name]!r}"
            for name, value in dataclasses.asdict(config).items()
            if name in old.keys() - _FREE - _LENGTH and old[name] != value
        ]
        again = f"; its settings, to be repeated: {', '.join(settings)}" if settings else ""
        raise WavearError(f"{out} is a run of another model: {'; '.join(differ)}{again}")
    if (optimizer := old.get("optimizer", "adamw")) != config.optimizer:
        raise WavearError(
            f"{out} is a run with the optimizer {optimizer}, now {config.optimizer}: resume with"
            f" --optimizer {optimizer}"
        )
    if (seed := old.get("seed")) != config.seed:
        raise WavearError(f"{out} is a run with seed {seed}, now {config.seed}: resume with it")


def _report_changes(record: dict[str, Any], config: TrainConfig, corpus: Corpus) -> None:
    """Report why a resumed run differs from one that was never interrupted."""
    before, now = record.get("config", {}), dataclasses.asdict(config)
    for name in sorted(now.keys() & before.keys() - _FREE):
        if before[name] != now[name]:
            logger.info(f"{name} is now {now[name]!r}; it was {before[name]!r}")
    found = fingerprint(corpus.train)
    if record.get("data", {}).get("fingerprint", found) != found:
        logger.warning(
            "the training data have changed since the run began: it continues with these"
        )


def _report_data(corpus: Corpus, speakers: list[str], rate: int, frames: str | None) -> None:
    for name, why in corpus.bad[:_NAMED]:
        logger.warning(f"skipped {name}: {why}")
    if corpus.bad:
        more = len(corpus.bad) - _NAMED
        rest = f", {more} more than are named here" if more > 0 else ""
        logger.warning(f"{counted(len(corpus.bad), 'file')} cannot be used{rest}")
    if corpus.without_mel:
        count, first = counted(len(corpus.without_mel), "recording"), corpus.without_mel[0]
        logger.warning(f"{count} without a mel in {frames} skipped; the first: {first}")
    for note in corpus.notes:
        logger.info(note)
    for purpose, recordings in (("training on", corpus.train), ("holding out", corpus.validation)):
        extent = _extent(recordings, rate)
        count, seconds = extent["recordings"], extent["seconds"]
        length = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} s"
        voices = len(recordings.speakers()) if speakers else 0
        more = f", {counted(voices, 'speaker')}" if voices else ""
        logger.info(f"{purpose} {counted(count, 'recording')}, {length}{more}")


def _gains(recordings: Recordings) -> dict[str, float]:
    """Return the gain of each speaker; empty if levels are unchanged."""
    if recordings.gain is None:
        return {}
    numbers, rows = np.unique(recordings.speaker, return_index=True)
    names, gains = recordings.speaker_names, recordings.gain
    return {names[n]: float(gains[row]) for n, row in zip(numbers, rows, strict=True) if n >= 0}


def _extent(recordings: Sequence[Recording], rate: int) -> dict[str, Any]:
    seconds = round(int(frames_of(recordings).sum()) / rate, 2)
    return {"recordings": len(recordings), "seconds": seconds}


def write_held_out(run: str | os.PathLike[str], manifest: str | os.PathLike[str]) -> Path:
    """Write a manifest of the recordings that a run holds out, to evaluate models on.

    It has speakers where the run uses their labels, or a manifest named them. The choice depends
    on the names of the files: runs on the same data hold out the same.

    Parameters
    ----------
    run : str or Path
        Directory that `train` wrote.
    manifest : str or Path
        JSON lines to write; an existing file is replaced.

    Raises
    ------
    FileNotFoundError
        If the run or its data do not exist.
    WavearError
        If the held-out recordings lie in tar shards, whose members a manifest cannot name, or
        train.json names remote data.
    """
    record = Path(run) / RECORD
    if not record.is_file():
        raise FileNotFoundError(f"{run} holds no run (no train.json)")
    try:
        trained = parse_json(record.read_bytes())
        config, mel = trained["config"], trained["model"].get("mel")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WavearError(f"{record} is damaged: {one_line(error)}") from None
    for name in ("data", "validation"):
        if config[name] is not None:
            refuse_remote(config[name], record)
    if is_shards(held := config["validation"] or config["data"]):
        raise WavearError(
            f"{held}: what is held out lies in tar shards, whose members a manifest cannot name:"
            " keep it as files, in a second folder or manifest (validation)"
        )
    rate, frames = config["sample_rate"], config.get("features") or config.get("mels")
    corpus = open_corpus(
        config["data"],
        sample_rate=rate,
        validation=config["validation"],
        validation_fraction=config["validation_fraction"],
        speakers=config.get("speakers", False),
        least_samples=mel["hop_length"] if mel else 2,
        mels=MelFolder(frames, frames_from_dict(mel)) if frames else None,
    )
    lines = []
    for r in corpus.validation:
        path = str(Path(str(r.path)).resolve())
        row = {"path": path, "start": r.start / rate, "duration": r.frames / rate}
        lines.append(json.dumps(row | ({} if r.speaker is None else {"speaker": r.speaker})) + "\n")
    replace_file(Path(manifest), lambda path: path.write_text("".join(lines), encoding="utf-8"))
    return Path(manifest)


# Warnings of libraries that do not concern a run.
_IGNORED = (
    "The '.*' does not have many workers",  # few readers are enough, see docs
    "Consider setting `persistent_workers",  # where they are not forked; there is one epoch
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # lightning 2.6 with torch 2.14
    "Starting from v1.9.0, `tensorboardX`",
    ".*srun.*command is available",
    ".*GPU available but not used.*",
    ".*lightning.pytorch.loops.utilities.*",
    "The .grad attribute of a Tensor that is not a leaf",  # torch.compile, bf16 copies of weights
)


@contextlib.contextmanager
def _reporting(visible: bool) -> Iterator[None]:
    """Silence Lightning, which reports devices, workers and tips; and, unless visible, the run."""
    names = ("lightning", "lightning.pytorch", "lightning.fabric")
    levels: dict[str, int] = dict.fromkeys(names, logging.ERROR)
    levels["wavear.training"] = logging.NOTSET if visible else logging.CRITICAL
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    with warnings.catch_warnings():
        for known in _IGNORED:
            warnings.filterwarnings("ignore", message=known)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
