"""The directory of a run: open it, empty it, write its train.json."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from wavear.common.atomic import check_writable, replace_file
from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.training.config import TrainConfig

RECORD = "train.json"
FIRST_PART = "likelihood"
"""Folder, in that of the run, of the part before the free run."""
_FOLDERS = ("best", "last", "states", "tensorboard", "wandb", "samples")
_FILES = ("resume.safetensors", "metrics.csv", "validation.csv", "loss.png", RECORD)


def open_directory(config: TrainConfig, writes: bool) -> dict[str, Any]:
    """Check that `out` can be used; return its record if the run is resumed. Changes nothing."""
    out = Path(config.out)
    record = out / RECORD
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose a directory for the run")
    if config.resume:
        if not record.is_file():
            raise FileNotFoundError(f"{out} holds no run to resume (no train.json)")
        try:
            return parse_json(record.read_bytes())
        except ValueError as error:
            raise WavearError(f"{record} is damaged, it is not JSON: {error}") from None
    if writes:
        # A run that is killed before its first file leaves temporary files and claims only.
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if is_second_part(config):
            names.discard(FIRST_PART)
        filled = not all(name.startswith(".wavear-") for name in names)
        if filled and not config.overwrite:
            raise FileExistsError(
                f"{out} is not empty: choose another directory, or give --resume or --overwrite"
            )
        if filled and not (record.is_file() or (out / FIRST_PART / RECORD).is_file()):
            raise FileExistsError(f"{out} is not a run (no train.json): choose another directory")
        check_writable(out)
    return {"history": []}


def is_second_part(config: TrainConfig) -> bool:
    """Return whether a run begins from the best of its own first part."""
    return config.from_checkpoint == str(Path(config.out) / FIRST_PART / "best")


def make_directory(config: TrainConfig, whole: Path | None = None) -> None:
    """Make `out`, empty unless the run is resumed; so too the run `whole` that it is a part of."""
    out = Path(config.out)
    if config.resume:
        return
    for folder in (out, whole) if whole else (out,):
        if folder.is_dir():
            _empty(folder)
    if not is_second_part(config) and (out / FIRST_PART).is_dir():
        _empty(out / FIRST_PART)
        with contextlib.suppress(OSError):  # what someone else put there stays
            (out / FIRST_PART).rmdir()
    out.mkdir(parents=True, exist_ok=True)


def _empty(run: Path) -> None:
    """Remove what a run wrote."""
    for name in _FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)
    # The record is the last: without it the rest would not be a run.
    for path in (*run.glob("bad-step-*.safetensors"), *(run / name for name in _FILES)):
        path.unlink(missing_ok=True)


def write_record(config: TrainConfig, record: dict[str, Any]) -> None:
    """Write train.json, in ASCII: names of files need not be valid Unicode."""
    text = json.dumps(record, indent=2) + "\n"
    replace_file(Path(config.out) / RECORD, lambda path: path.write_text(text, encoding="utf-8"))
