"""Training: `train`, which makes a model of recordings."""

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
from wavear.common.atomic import say as say_line
from wavear.data.corpus import Corpus, Recording, open_corpus
from wavear.data.recordings import Recordings, fingerprint, frames_of
from wavear.data.shards import is_shards, refuse_remote
from wavear.mel.spectrogram import MelConfig
from wavear.models.checkpoint import LATER
from wavear.models.families import FAMILIES
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.run_directory import open_directory


def train(config: TrainConfig) -> TrainResult:
    """Make a model of recordings, or go on making it.

    Ctrl-C (or SIGTERM) ends the run after the step it is at, with everything saved; `resume` goes
    on. Under torchrun or srun each process takes its share of every batch.

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
        If there are no such data, or nothing to resume.
    ValueError
        If no file can be used, or `resume` meets a run of another model.
    """
    config = config.resolved()
    if config.family == "linear":
        from wavear.training.linear_run import fit
    else:
        from wavear.training.loop import fit
    from wavear.training.processes import Processes

    writes = Processes.here().rank == 0
    say = say_line if config.progress and writes else _silence
    record = open_directory(config, writes)
    corpus = open_corpus(
        config.data,
        sample_rate=config.sample_rate,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        speakers=config.speakers or config.normalise_by == "speaker",
        least_samples=config.mel.hop_length if config.mel else 2,
        normalise=config.normalise,
        normalise_by=config.normalise_by,
        trim_silence=config.trim_silence,
        progress=_bar if config.progress and writes else None,
    )
    if not len(corpus.train):
        raise ValueError(
            f"{config.data}: every recording is in {config.validation} too, none is left to train on"
        )
    by_speaker = config.normalise_by == "speaker" and config.normalise != "none"
    if not corpus.speakers and (config.speakers or by_speaker):
        raise ValueError(
            f"{config.data} names no speakers: a manifest does in a column 'speaker', a folder by a folder for each;"
            " else leave --speakers and --normalise-by away"
        )
    speakers = corpus.speakers if config.speakers else []
    _tell_changes(record, config, corpus, say)
    _describe(corpus, speakers, config.sample_rate, say)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = FAMILIES[str(config.family)][0](config.model_config(len(speakers)))
    _check_same_model(record, config, model.config)
    record |= {
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(model.config),
        "data": {
            "train": _extent(corpus.train, config.sample_rate),
            "validation": _extent(corpus.validation, config.sample_rate),
            "fingerprint": fingerprint(corpus.train),
            "bad": dict(corpus.bad),
            "speakers": speakers,
            "gains": _gains(corpus.validation) | _gains(corpus.train)
            if config.normalise_by == "speaker"
            else {},
        },
    }
    with _quiet(), torch.random.fork_rng(devices=[]):
        return fit(config, corpus, speakers, model, record, say)


def _check_same_model(record: dict[str, Any], config: TrainConfig, model: Any) -> None:
    """A resumed run has the model it began with."""

    if record.get("model") is None:
        return
    if (family := record["config"].get("family", "wavenet")) != config.family:
        raise ValueError(
            f"{config.out} is a run of the family {family}, now {config.family}: resume with the same"
        )
    before = record["model"]
    now = json.loads(json.dumps(dataclasses.asdict(model)))
    before = {name: value for name, value in LATER.items() if name in now} | before
    if isinstance(
        before.get("mel"), dict
    ):  # an older version's, without the fields that came later
        before = before | {"mel": MelConfig.from_dict(before["mel"]).to_dict()}
    if different := [
        f"{name} {before.get(name)!r}, now {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]:
        raise ValueError(f"{config.out} is a run of another model: {'; '.join(different)}")
    if (optimizer := record["config"].get("optimizer", "adamw")) != config.optimizer:
        raise ValueError(
            f"{config.out} is a run with the optimizer {optimizer}, now {config.optimizer}: resume with --optimizer"
            f" {optimizer}"
        )
    if (seed := record["config"].get("seed")) != config.seed:
        raise ValueError(
            f"{config.out} is a run with seed {seed}, now {config.seed}: resume with the same"
        )


_FREE = {
    "out",
    "resume",
    "overwrite",
    "progress",
    "workers",
    "keep_last",
    "checkpoint_every",
    "wandb",
}
_FREE |= {
    name for name in TrainConfig.__dataclass_fields__ if name.startswith(("validat", "sample_s"))
}
_FREE |= {"data", "final_seconds", "baseline_seconds"}  # the data count by what is in them


def _tell_changes(record: dict[str, Any], config: TrainConfig, corpus: Corpus, say: Any) -> None:
    """Say what makes a resumed run another one than the run it goes on with."""
    before, now = record.get("config", {}), dataclasses.asdict(config)
    for name in sorted(now.keys() & before.keys() - _FREE):
        if before[name] != now[name]:
            say(f"from here on {name} is {now[name]!r}; it was {before[name]!r}")
    if record.get("data", {}).get("fingerprint", fingerprint(corpus.train)) != fingerprint(
        corpus.train
    ):
        say(
            "the training data are not those that the run began with: from here on it draws from these"
        )


def _describe(corpus: Corpus, speakers: list[str], rate: int, say: Any) -> None:
    for name, why in corpus.bad[:20]:
        say(f"skipped {name}: {why}")
    if len(corpus.bad) > 20:
        say(f"... and {len(corpus.bad) - 20} more")
    if corpus.bad:
        say(f"{len(corpus.bad)} files cannot be used")
    for note in corpus.notes:
        say(note)
    told = f", {len(speakers)} speakers" if speakers else ""
    for purpose, recordings in (("training on", corpus.train), ("holding out", corpus.validation)):
        extent = _extent(recordings, rate)
        say(
            f"{purpose} {extent['recordings']} recordings, {extent['seconds'] / 60:.1f} minutes{told}"
        )


def _gains(recordings: Recordings) -> dict[str, float]:
    """Of each speaker, which has one; empty where levels are as they were."""
    if recordings.gain is None:
        return {}
    numbers, rows = np.unique(recordings.speaker, return_index=True)
    names = recordings.speaker_names
    return {
        names[n]: float(recordings.gain[row])
        for n, row in zip(numbers, rows, strict=True)
        if n >= 0
    }


def _extent(recordings: Sequence[Recording], rate: int) -> dict[str, Any]:
    return {
        "recordings": len(recordings),
        "seconds": round(int(frames_of(recordings).sum()) / rate, 2),
    }


def write_held_out(run: str | os.PathLike[str], manifest: str | os.PathLike[str]) -> Path:
    """Write a manifest of the recordings that a run holds out, to evaluate models on; over one that is there.

    Speakers are named in it where the run tells them apart, or a manifest named them. The choice
    goes by the names of the files: runs on the same data hold out the same.

    Parameters
    ----------
    run : str or Path
        Directory that `train` wrote.
    manifest : str or Path
        JSON lines to write.

    Raises
    ------
    FileNotFoundError
        If there is no such run, or its data are gone.
    ValueError
        If what it holds out lies in tar shards, whose members a manifest cannot name, or its
        train.json names data that would have to be fetched.
    """
    record = Path(run) / "train.json"
    if not record.is_file():
        raise FileNotFoundError(f"{run} holds no run (no train.json)")
    trained = json.loads(record.read_text(encoding="utf-8"))
    config, mel = trained["config"], trained["model"].get("mel")
    for name in ("data", "validation"):
        if config[name] is not None:
            refuse_remote(config[name], record)
    if is_shards(held := config["validation"] or config["data"]):
        raise ValueError(
            f"{held}: what is held out lies in tar shards, whose members a manifest cannot name: keep it as files, in"
            " a second folder or manifest (validation)"
        )
    rate = config["sample_rate"]
    corpus = open_corpus(
        config["data"],
        sample_rate=rate,
        validation=config["validation"],
        validation_fraction=config["validation_fraction"],
        speakers=config.get("speakers", False),
        least_samples=mel["hop_length"] if mel else 2,
    )
    rows = [
        {
            "path": str(Path(str(r.path)).resolve()),
            "start": r.start / rate,
            "duration": r.frames / rate,
        }
        | ({} if r.speaker is None else {"speaker": r.speaker})
        for r in corpus.validation
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(Path(manifest), lambda path: path.write_text(text, encoding="utf-8"))
    return Path(manifest)


def _silence(*_: Any) -> None:
    pass


def _bar(items: Any, total: int, description: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, total=total, desc=description, dynamic_ncols=True, leave=False, delay=1.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning speaks of devices, workers and tips; we say ourselves what matters. Restored afterwards."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for known in (
            "The '.*' does not have many workers",  # few readers are enough, see docs
            "Consider setting `persistent_workers",  # where they are not forked; there is one epoch
            ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # lightning 2.6 with torch 2.14
            "Starting from v1.9.0, `tensorboardX`",
            ".*srun.*command is available",
            ".*GPU available but not used.*",
            ".*lightning.pytorch.loops.utilities.*",
            "The .grad attribute of a Tensor that is not a leaf",  # torch.compile looks at the bf16 copies of weights
        ):
            warnings.filterwarnings("ignore", message=known)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
