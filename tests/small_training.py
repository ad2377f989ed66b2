"""Small training runs for tests: settings, interrupts, and comparisons of what a run wrote."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wavear import TrainConfig
from wavear.training.module import TrainingModule
from wavear.training.state import load_state, state_paths

RATE = 8000
TIMES = ("seconds", "samples_per_second", "data_wait")
RUN: dict[str, Any] = {
    "classes": 32,
    "head_channels": 16,
    "conditioning_channels": 6,
    "sample_rate": RATE,
    "mel_bands": 8,
    "mel_hop_length": 64,
    "segment": 512,
    "warmup_steps": 2,
    "max_steps": 4,
    "validate_every": 1000,
    "sample_seconds": 0.0,
    "progress": False,
    "device": "cpu",
    "precision": "32",
    "workers": 0,
}
SMALL: dict[str, dict[str, Any]] = {
    "wavenet": {"layers": 4, "stacks": 2, "residual_channels": 8, "skip_channels": 8},
    "gru": {"channels": 8, "input_channels": 8},
    "transformer": {
        "layers": 1, "channels": 8, "heads": 2, "window": 8, "patch": 4, "sample_channels": 4,
    },
}  # fmt: skip


def config_of(data: Any, out: Path | str, **settings: Any) -> TrainConfig:
    """Return the settings of a small run, by default of a WaveNet on the CPU."""
    family = settings.setdefault("family", "wavenet")
    return TrainConfig(**{"data": data, "out": out} | RUN | SMALL[family] | settings)


def state_of(out: Path) -> dict[str, Any]:
    """Return the last state of a run."""
    return load_state(state_paths(out)[0])


def record_of(out: Path) -> dict[str, Any]:
    """Return the train.json of a run."""
    return json.loads((out / "train.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timeless_rows(out: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without times."""
    rows = rows_of(out / "metrics.csv")
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    """Compare the last states of two runs bit for bit: weights, average, optimizer, step."""
    one, other = state_of(a), state_of(b)
    for state in (one, other):
        del state["seconds"], state["run"]
        state.pop("loops")  # times of Lightning
    assert_same(one, other)
    assert timeless_rows(a) == timeless_rows(b)


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Compare two nests of dictionaries, lists and tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    else:
        assert a == b, where


@contextlib.contextmanager
def interrupt_at_step(step: int) -> Iterator[None]:
    """Raise Ctrl-C during a step."""
    real = TrainingModule.update_average

    def update(module: TrainingModule) -> None:
        real(module)
        if module.global_step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingModule, "update_average", update)
        yield
