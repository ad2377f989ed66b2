"""The two parts of a run: by the likelihood, then, from its best, by the free run too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wavear.common.errors import WavearError
from wavear.training.config import (
    FREE_RUN_LEAST_MINUTES,
    FREE_RUN_SHARE,
    TrainConfig,
    TrainingDefaults,
    TrainResult,
)
from wavear.training.processes import Processes
from wavear.training.run_directory import FIRST_PART, RECORD, open_directory


def train_in_parts(
    config: TrainConfig, fit: Callable[[TrainConfig, Path | None], TrainResult]
) -> TrainResult:
    """Train the one or two parts of a run.

    Parameters
    ----------
    config : TrainConfig
    fit : callable
        Trains with the resolved settings of a part; the second argument is the folder of the run
        for a first part, otherwise None.
    """
    out, share = Path(config.out), _share(config)
    began = config.resume and (out / RECORD).is_file()
    if share in (0, 1) or (began and not (out / FIRST_PART).is_dir()):
        given = None if config.free_run is None else 0.0
        only = dataclasses.replace(config, free_run=1.0 if share == 1 else given)
        return fit(only.resolved(), None)
    if Processes.here().world > 1:
        raise WavearError(
            f"free_run is {share:g}, and a run in two parts has one process: give 0 or 1"
        )
    first, second = _lengths(config, share)
    before = None
    if not began:
        before = fit(_first(config, first), out)
        if before.stopped_by == "interrupt":
            return before
    result = fit(_second(config, second, began), None)
    if before is None:
        return result
    return dataclasses.replace(
        result,
        bits_before=before.bits_before,
        bits_best=min(before.bits_best, result.bits_best),
        steps=before.steps + result.steps,
        seconds=before.seconds + result.seconds,
        skipped=before.skipped | result.skipped,
    )


def _share(config: TrainConfig) -> float:
    """Return the share of the second part; a resumed run has the parts that it began with."""
    out = Path(config.out)
    if config.free_run is not None:
        return config.free_run
    if config.resume and (out / FIRST_PART / RECORD).is_file():
        return FREE_RUN_SHARE
    if config.resume:
        return float(bool(open_directory(config, writes=False)["config"].get("free_run")))
    minutes = config.max_minutes or 0.0
    if config.family != "predictive" or minutes == 0 or Processes.here().world > 1:
        return 0.0
    if minutes >= FREE_RUN_LEAST_MINUTES:
        return FREE_RUN_SHARE
    return 0.0 if config.from_checkpoint is None else 1.0


def _lengths(config: TrainConfig, share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return steps and minutes of both parts."""
    steps, minutes = config.max_steps, config.max_minutes
    first, second = {}, {}
    if minutes is not None:
        first["max_minutes"], second["max_minutes"] = (1 - share) * minutes, share * minutes
    if steps is not None:
        first["max_steps"] = round((1 - share) * steps)
        second["max_steps"] = steps - first["max_steps"]
        if not 0 < first["max_steps"] < steps:
            raise WavearError(
                f"free_run is {share:g} of max_steps {steps}, which leaves a part without steps:"
                " give 0 or 1, or more steps"
            )
    return first, second


def _first(config: TrainConfig, length: dict[str, Any]) -> TrainConfig:
    """Return the settings of the first part, if `out` can hold the run."""
    out = Path(config.out)
    if not (config.resume and (out / FIRST_PART / RECORD).is_file()):
        open_directory(config, writes=True)
    own = {"out": str(out / FIRST_PART), "free_run": 0.0}
    return dataclasses.replace(config, **own | length).resolved()


def _second(config: TrainConfig, length: dict[str, Any], resume: bool) -> TrainConfig:
    """Return the settings of the second part: those of the optimizer step are its defaults."""
    own = {field.name: None for field in dataclasses.fields(TrainingDefaults)}
    del own["segment_frames"]
    return dataclasses.replace(
        config,
        **own | length | {"input_noise": config.input_noise},
        from_checkpoint=str(Path(config.out) / FIRST_PART / "best"),
        accumulate=1,
        free_run=1.0,
        resume=resume,
        overwrite=False,
    ).resolved()
