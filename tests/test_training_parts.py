"""Runs of two parts: by the likelihood, then, from its best, by the free run too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import assert_same_run, interrupt_at_step, record_of
from test_predictive import make, small

import wavear
from wavear import TrainConfig, train
from wavear.training import callbacks, parts
from wavear.training.config import FREE_RUN_DEFAULTS, FREE_RUN_SHARE
from wavear.training.free_run import FreeRun
from wavear.training.processes import Processes

CLIP = np.zeros(800, np.float32)


@pytest.fixture
def settings(tones: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a run of two steps by the likelihood and one by the free run."""
    data = tmp_path / "data"
    data.symlink_to(tones)
    start = make(small(8000, 64), torch.float32).save(tmp_path / "start")
    return {
        "data": data, "from_checkpoint": str(start), "segment": 512, "batch_size": 4,
        "accumulate": 4, "max_steps": 3, "free_run": 0.34, "validate_every": 1000,
        "sample_seconds": 0.0, "progress": False, "device": "cpu", "precision": "32", "workers": 0,
    }  # fmt: skip


@pytest.fixture
def fitted(monkeypatch) -> list[TrainConfig]:
    """Return the list to which each part adds its settings, instead of training."""
    seen: list[TrainConfig] = []

    def fit(config: TrainConfig, _: Any) -> wavear.TrainResult:
        seen.append(config)
        best = config.out + "/best"
        return wavear.TrainResult(3, 2, 2, {}, 1, 1, "time", best, best)  # pyright: ignore

    monkeypatch.setattr("wavear.training.run._train", fit)
    return seen


def test_a_killed_run_of_two_parts_resumes_exactly_in_either(settings, tmp_path):
    result = train(TrainConfig(out=tmp_path / "straight", **settings))
    assert result.steps == 3
    assert result.best == tmp_path / "straight" / "best"
    config = TrainConfig(out=tmp_path / "parts", **settings)
    again = dataclasses.replace(config, resume=True)
    with interrupt_at_step(1):
        stopped = train(config)
        assert stopped.stopped_by == "interrupt"
        assert not (tmp_path / "parts" / "train.json").exists()
        train(again)  # ends the first part; the only step of the second is interrupted
    train(again)
    for part in ("", "likelihood"):
        assert_same_run(tmp_path / "straight" / part, tmp_path / "parts" / part)
    first, second = (wavear.load(tmp_path / "parts" / part / "best") for part in ("likelihood", ""))
    assert not torch.equal(first.hidden.weight, second.hidden.weight)


def test_a_run_of_two_parts_is_replaced_as_a_whole(settings, tmp_path):
    config = TrainConfig(out=tmp_path / "run", **settings)
    train(config)
    with pytest.raises(FileExistsError, match="not empty"):
        train(config)
    with interrupt_at_step(1):
        train(dataclasses.replace(config, overwrite=True))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"likelihood"}
    train(dataclasses.replace(config, resume=True))
    assert record_of(tmp_path / "run")["steps"] == 1
    mine = tmp_path / "run" / "likelihood" / "mine.txt"
    mine.touch()
    train(dataclasses.replace(config, overwrite=True, free_run=0.0))
    assert list((tmp_path / "run" / "likelihood").iterdir()) == [mine]


def test_parts_share_steps_and_minutes_and_the_second_has_its_own_optimizer(settings, fitted):
    sizes = {"max_steps": 10, "max_minutes": 20.0, "free_run": 0.4, "learning_rate": 0.5}
    first, second = _trained(fitted, settings | sizes)
    assert (first.max_steps, second.max_steps) == (6, 4)
    assert (first.max_minutes, second.max_minutes) == (12, 8)
    assert (first.free_run, second.free_run) == (0, 1)
    assert (first.learning_rate, first.batch_size) == (0.5, 4)
    assert second.learning_rate == FREE_RUN_DEFAULTS.learning_rate
    assert (second.batch_size, second.accumulate) == (FREE_RUN_DEFAULTS.batch_size, 1)
    assert second.from_checkpoint == first.out + "/best"


def test_a_run_of_minutes_has_two_parts_and_a_run_of_steps_one(settings, fitted, monkeypatch):
    settings = settings | {"free_run": None}
    (only,) = _trained(fitted, settings)
    assert not only.free_run
    timed = settings | {"max_minutes": 10.0, "max_steps": None}
    (only,) = _trained(fitted, timed | {"max_minutes": 9.9})
    assert (only.free_run, only.max_minutes) == (1, 9.9)
    assert only.optimizer == FREE_RUN_DEFAULTS.optimizer
    first, second = _trained(fitted, timed)
    assert second.free_run == 1
    timed |= {"from_checkpoint": None, "accumulate": 1}
    first, second = _trained(fitted, timed)
    assert (first.max_minutes, second.max_minutes) == (
        10 * (1 - FREE_RUN_SHARE),
        10 * FREE_RUN_SHARE,
    )
    (only,) = _trained(fitted, timed | {"max_minutes": 9.9})
    assert not only.free_run
    monkeypatch.setattr(Processes, "here", classmethod(lambda _: Processes(world=2)))
    (only,) = _trained(fitted, timed)
    assert not only.free_run
    with pytest.raises(ValueError, match="two parts has one process"):
        _trained(fitted, timed | {"free_run": 0.5})


@pytest.mark.parametrize("free_run", [None, 1.0])
def test_a_run_of_one_part_resumes_with_it_whatever_its_new_length(settings, fitted, free_run):
    config = TrainConfig(
        out=settings["data"].parent / "run",
        **settings | {"free_run": None, "max_minutes": 20.0, "resume": True},
    )
    Path(config.out).mkdir()
    record = {"config": {"free_run": free_run}}
    (Path(config.out) / "train.json").write_text(json.dumps(record), encoding="utf-8")
    train(config)
    (only,) = fitted
    assert only.free_run == free_run
    assert only.max_minutes == 20


def test_a_run_of_two_parts_resumes_in_the_second_whatever_its_new_length(settings, fitted):
    out = settings["data"].parent / "run"
    make(small(8000, 64), torch.float32).save(out / "likelihood" / "best")
    for folder in (out, out / "likelihood"):
        (folder / "train.json").write_text('{"config": {}}', encoding="utf-8")
    changes = {"free_run": None, "max_minutes": 5.0, "resume": True}
    train(TrainConfig(out=out, **settings | changes))
    (second,) = fitted
    assert (second.free_run, second.resume) == (1, True)


def test_a_part_without_steps_is_refused(settings, fitted):
    with pytest.raises(ValueError, match=r"free_run is 0\.1 of max_steps 3.*without steps"):
        _trained(fitted, settings | {"free_run": 0.1})


@pytest.mark.parametrize("last", [0.4, 0.6])
def test_best_is_of_the_part_whose_free_run_is_better(settings, tmp_path, monkeypatch, last):
    scores = iter((0.5, 0.5, last))  # at the end of the first part, and both ends of the second
    monkeypatch.setattr(
        callbacks, "free_run", lambda *_: FreeRun({"score": next(scores)}, [(CLIP, CLIP)], {})
    )
    train(TrainConfig(out=tmp_path / "run", **settings | {"sample_seconds": 0.1}))
    parts = (tmp_path / "run" / "likelihood" / "best", tmp_path / "run" / "last")
    best, first, second = map(wavear.load, (tmp_path / "run" / "best", *parts))
    better = second if last < 0.5 else first
    assert torch.equal(best.hidden.weight, better.hidden.weight)
    assert not torch.equal(first.hidden.weight, second.hidden.weight)


def _trained(fitted: list[TrainConfig], settings: dict[str, Any]) -> list[TrainConfig]:
    """Return the settings of the parts of a run."""
    fitted.clear()
    out = str(Path(settings["data"]).parent / "run")
    make(small(8000, 64), torch.float32).save(out + "/likelihood/best", overwrite=True)
    config = TrainConfig(out=out, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "open_directory", lambda *_, **__: {})
        train(config)
    return list(fitted)
