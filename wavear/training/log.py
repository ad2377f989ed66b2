"""The numbers of a run: metrics.csv, validation.csv, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import dataclasses
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError
from wavear.evaluation.pictures import mel_pixels
from wavear.training.config import TrainConfig

COLUMNS = {
    "metrics.csv": (
        *("step", "seconds", "train_bits", "validation_bits", "free_run_score", "learning_rate"),
        *("gradient_norm", "average_distance", "samples_per_second", "data_wait"),
    ),
    "validation.csv": ("step", "measure", "group", "value", "samples"),
}


class Log:
    """Writes rows to the CSV files in `out` and curves to Lightning's loggers, in process 0."""

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def metrics(self, trainer: L.Trainer, step: int, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.csv, and its values to the curves."""
        self._append("metrics.csv", {"step": step, **row})
        _points(trainer, step, {name: value for name, value in row.items() if name != "seconds"})

    def validation(
        self, trainer: L.Trainer, step: int, measure: str, values: Mapping[str, tuple[float, Any]]
    ) -> None:
        """Append the (value, samples) of groups to validation.csv and to curves "measure/group"."""
        for group, (value, samples) in values.items():
            row = {"measure": measure, "group": group, "value": round(value, 5), "samples": samples}
            self._append("validation.csv", {"step": step} | row)
        _points(
            trainer, step, {f"{measure}/{group}": value for group, (value, _) in values.items()}
        )

    def sound(
        self, trainer: L.Trainer, step: int, name: str, waveform: np.ndarray, rate: int
    ) -> None:
        """Show a waveform (T,) as sound and as a spectrogram."""
        picture = mel_pixels(waveform, rate)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_audio(name, waveform, step, sample_rate=rate)
                logger.experiment.add_image(name, picture, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_audio(name, [waveform], step=step, sample_rate=[rate])
                logger.log_image(f"{name}/spectrogram", [picture], step=step)

    def trim(self, step: int) -> None:
        """Drop rows of steps after `step`, and a row that is cut short because a run was killed."""
        for name, columns in COLUMNS.items():
            path = self.out / name
            if path.exists():
                text = path.read_bytes().decode("utf-8", errors="replace")
                lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
                rows = [row for row in csv.DictReader(lines) if row["step"].isdigit()]
                kept = [row for row in rows if int(row["step"]) <= step]
                replace_file(path, lambda temporary: _write(temporary, columns, kept))  # noqa: B023

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.out / name
        if not path.exists():
            _write(path, COLUMNS[name], [])
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS[name]).writerow(row)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _points(trainer: L.Trainer, step: int, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step)


def loggers(config: TrainConfig, record: dict[str, Any], purge_step: int | None) -> list[Logger]:
    """Return TensorBoard's logger, and that of Weights & Biases if `wandb` names a project.

    `record` keeps the name of the run there, so that a resumed run continues it. TensorBoard hides
    points from `purge_step` on, which are taken again.
    """
    found: list[Logger] = [
        TensorBoardLogger(config.out, name="tensorboard", version="", purge_step=purge_step)
    ]
    if config.wandb is not None:
        number = record.setdefault("wandb", secrets.token_hex(8))
        name = Path(config.out).name
        try:
            found.append(
                WandbLogger(project=config.wandb, name=name, id=number, save_dir=config.out)
            )
        except ModuleNotFoundError:
            raise WavearError(
                f"wandb is {config.wandb!r}, and that package is not installed: pip install wandb"
            ) from None
    return found


def log_settings(trainer: L.Trainer, config: TrainConfig) -> None:
    """Log the settings to Weights & Biases; next to TensorBoard's files there is train.json."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(dataclasses.asdict(config))


def finish(trainer: L.Trainer) -> None:
    """Close the run at Weights & Biases, so that this process can begin another one."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()
