"""The directory of a run: open it, refuse what is not ours, empty it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from wavear.training.config import TrainConfig


def open_directory(config: TrainConfig, writes: bool) -> dict[str, Any]:
    """Refuse an `out` that cannot be used; what its `train.json` says if the run is resumed. Nothing is changed yet."""
    from wavear.generation.jobs import check_writable

    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose a directory for the run")
    # What a run killed before its first file leaves is nothing.
    filled = out.is_dir() and any(
        not re.fullmatch(r"\.wavear-.*\.tmp", path.name) for path in out.iterdir()
    )
    if config.resume:
        if not (out / "train.json").is_file():
            raise FileNotFoundError(f"{out} holds no run to resume (no train.json)")
        try:
            return json.loads((out / "train.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{out / 'train.json'} is damaged, it is not JSON: {error}") from None
    if filled and writes:
        if not config.overwrite:
            raise FileExistsError(
                f"{out} is not empty: choose another directory, or give --resume or --overwrite"
            )
        if not (out / "train.json").is_file():
            raise FileExistsError(
                f"{out} holds no run of ours (no train.json): choose another directory"
            )
    if writes:
        check_writable(out)
    return {"history": []}


def make_directory(config: TrainConfig) -> None:
    """Make `out`, empty, for a run that is about to begin: until then there is nothing new, and nothing is gone."""
    out = Path(config.out)
    if config.resume:
        return
    if out.is_dir():
        for name in ("best", "last", "states", "tensorboard", "wandb", "samples"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("resume.safetensors", "metrics.csv", "validation.csv"):
            (out / name).unlink(missing_ok=True)
        for path in out.glob("bad-step-*.safetensors"):
            path.unlink()
        (out / "train.json").unlink(
            missing_ok=True
        )  # the last: without it the rest would be no run of ours
    out.mkdir(parents=True, exist_ok=True)
