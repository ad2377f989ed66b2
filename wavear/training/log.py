"""Where the numbers of a run go: metrics.csv, validation.csv and TensorBoard always, Weights & Biases if asked for."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from wavear.common.atomic import replace_file
from wavear.training.probes import spectrogram

METRICS, VALIDATION = "metrics.csv", "validation.csv"
COLUMNS = {
    METRICS: [
        "step",
        "seconds",
        "train_bits",
        "validation_bits",
        "free_run_score",
        "learning_rate",
        "gradient_norm",
        "average_distance",
        "samples_per_second",
        "data_wait",
    ],
    VALIDATION: ["step", "measure", "group", "value", "samples"],
}
_UNSEEN = ("step", "seconds")  # columns that are no curves


class Log:
    """Writes rows to everything that shows them. For the process that writes.

    Parameters
    ----------
    out : Path
        Folder of the run.
    """

    def __init__(self, out: Path):
        self.out = out

    def metrics(self, trainer: L.Trainer, step: int, row: Mapping[str, Any]) -> None:
        """A row of metrics.csv, and points of curves."""
        self._append(METRICS, row)
        self._points(
            trainer, step, {name: value for name, value in row.items() if name not in _UNSEEN}
        )

    def validation(
        self, trainer: L.Trainer, step: int, rows: Iterable[tuple[str, str, float, int | None]]
    ) -> None:
        """Rows (measure, group, value, samples) of validation.csv, and points of the curves "measure/group"."""
        rows = list(rows)
        for measure, group, value, samples in rows:
            row = {"step": step, "measure": measure, "group": group, "value": round(value, 5)}
            self._append(VALIDATION, row | ({} if samples is None else {"samples": samples}))
        self._points(
            trainer, step, {f"{measure}/{group}": value for measure, group, value, _ in rows}
        )

    def sound(
        self, trainer: L.Trainer, step: int, name: str, waveform: torch.Tensor, rate: int
    ) -> None:
        """A waveform (T,) to be heard and, as a spectrogram, seen."""
        picture = spectrogram(waveform, rate)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_audio(name, waveform, step, sample_rate=rate)
                logger.experiment.add_image(name, picture, step, dataformats="HWC")
            else:
                there: Any = logger
                there.log_audio(name, [waveform.numpy()], step=step, sample_rate=[rate])
                there.log_image(f"{name}/spectrogram", [picture], step=step)

    def trim(self, step: int) -> None:
        """Drop rows of steps that are to be taken again, and one that was being written when the run was killed."""
        for name, columns in COLUMNS.items():
            path = self.out / name
            if path.exists():
                _trim(path, step, columns)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.out / name
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS[name])
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def _points(self, trainer: L.Trainer, step: int, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, value in values.items():
                    logger.experiment.add_scalar(name, value, step)
            else:
                logger.log_metrics(values, step)


def _trim(path: Path, step: int, columns: list[str]) -> None:
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
    whole = csv.DictReader(line for line in lines if line.endswith("\n"))
    rows = [row for row in whole if row["step"].isdigit() and int(row["step"]) <= step]

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def loggers(
    out: str, wandb: str | None, record: dict[str, Any], purge_step: int | None
) -> list[Logger]:
    """TensorBoard's, and that of Weights & Biases where `wandb` names a project.

    The run there is named in `record`, so that a resumed run goes on with it.

    Parameters
    ----------
    purge_step : int, optional
        TensorBoard hides points of this step and later ones: they are to be taken again.

    Raises
    ------
    ValueError
        If the package wandb is not installed.
    """
    hidden: Any = {} if purge_step is None else {"purge_step": purge_step}
    found: list[Logger] = [TensorBoardLogger(out, name="tensorboard", version="", **hidden)]
    if wandb is not None:
        import secrets

        from lightning.pytorch.loggers import WandbLogger

        number = record.setdefault("wandb", secrets.token_hex(8))
        try:
            found.append(WandbLogger(project=wandb, name=Path(out).name, id=number, save_dir=out))
        except ModuleNotFoundError:
            raise ValueError(
                f"wandb is {wandb!r}, and that package is not installed: pip install wandb"
            ) from None
    return found


def tell(trainer: L.Trainer, config: Any) -> None:
    """The settings of the run, to Weights & Biases; TensorBoard has them beside it, in train.json."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dataclasses.asdict(config))


def finish(trainer: L.Trainer) -> None:
    """Close the run at Weights & Biases: the next one in this process is another."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            there: Any = logger
            there.experiment.finish()
