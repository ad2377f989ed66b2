"""The precision of a run: limits of the model, the measurement, and resumed runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from small_training import assert_same_run, config_of, interrupt_at_step, record_of

import wavear
from wavear import train
from wavear.training import precision
from wavear.training.module import TrainingModule
from wavear.training.precision import bf16_speedup, choose

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda threads: speedup)


def choice(model: Any = None, recorded: str | None = None, **settings: Any) -> tuple[str, str]:
    config = config_of("-", "-", **{"precision": "auto"} | settings)
    return choose(config, model or wavear.WaveNet(config.model_config()), "cpu", recorded)


# --- the choice


@pytest.mark.parametrize(("speedup", "expected"), [(2.5, "bf16"), (1.05, "32"), (0.4, "32")])
def test_auto_uses_bf16_where_the_cpu_gains(monkeypatch, speedup: float, expected: str):
    measured(monkeypatch, speedup)
    assert choice() == (expected, f"bf16 products are {speedup:.1f} times as fast here")


def test_requested_precision_is_used(monkeypatch):
    measured(monkeypatch, 2.5)
    assert choice(precision="32")[0] == "32"
    measured(monkeypatch, 0.4)
    assert choice(precision="bf16")[0] == "bf16"


def test_distribution_over_values_needs_float32_unless_the_model_allows_bf16(monkeypatch):
    measured(monkeypatch, 2.5)
    settings: dict[str, Any] = {"law": "laplace", "classes": 65536}
    model: Any = wavear.WaveNet(config_of("-", "-", **settings).model_config())
    assert choice(model, **settings)[0] == "32"
    message = "bf16 has 8 bits, too few for the values of the law laplace: use precision"
    with pytest.raises(ValueError, match=message):
        choice(model, precision="bf16", **settings)
    model.bf16 = True
    assert choice(model, **settings)[0] == "bf16"
    assert choice(model, precision="bf16", **settings)[0] == "bf16"
    model = wavear.WaveNet(config_of("-", "-").model_config())
    model.bf16 = False
    assert choice(model)[0] == "32"


@pytest.mark.parametrize("recorded", ["bf16", "32"])
def test_auto_keeps_the_recorded_precision(monkeypatch, recorded: str):
    measured(monkeypatch, 2.5 if recorded == "32" else 0.4)
    assert choice(recorded=recorded)[0] == recorded
    assert choice(recorded=recorded, precision="32")[0] == "32"


# --- the measurement


def test_speedup_is_measured_once_and_draws_nothing():
    bf16_speedup.cache_clear()
    before = torch.get_rng_state()
    found = bf16_speedup(1)
    assert 0.01 < found < 100
    assert bf16_speedup(1) == found
    assert (bf16_speedup.cache_info().misses, bf16_speedup.cache_info().hits) == (1, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_speedup_is_the_ratio_of_product_times(monkeypatch):
    """The clock shows 3 s for each float32 product and 2 s for each bf16 product."""
    ticks: list[float] = []
    real = torch.nn.functional.linear

    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ticks.append(3.0 if x.dtype == torch.float32 else 2.0)
        return real(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: sum(ticks))
    bf16_speedup.cache_clear()
    assert bf16_speedup(1) == 1.5
    bf16_speedup.cache_clear()


# --- a run


def test_run_records_and_logs_its_precision(tones, tmp_path, monkeypatch, caplog):
    measured(monkeypatch, 1.86)
    caplog.set_level(logging.INFO, "wavear")
    settings: dict[str, Any] = {"precision": "auto", "progress": True, "optimizer": "muon"}
    train(config_of(tones, tmp_path / "run", max_steps=1, **settings))
    assert record_of(tmp_path / "run")["precision"] == "bf16"
    expected = "AdamW for the rest, 0.002; bf16 (bf16 products are 1.9 times as fast here)"
    assert expected in caplog.text


@pytest.mark.parametrize("speedup", [2.0, 0.5])
def test_resume_keeps_the_precision_and_equals_uninterrupted(
    tones, tmp_path, monkeypatch, speedup: float
):
    """Bit for bit, also if the resumed run would measure another speedup."""
    settings: dict[str, Any] = {"precision": "auto", "optimizer": "muon"}
    measured(monkeypatch, speedup)
    train(config_of(tones, tmp_path / "straight", **settings))
    with interrupt_at_step(2):
        part = train(config_of(tones, tmp_path / "parts", **settings))
    assert part.stopped_by == "interrupt"
    measured(monkeypatch, 1 / speedup)
    train(config_of(tones, tmp_path / "parts", resume=True, **settings))
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_run_uses_the_precision_of_the_first_process(tones, tmp_path, monkeypatch):
    """Every process measures, and all use the result of the first."""
    measured(monkeypatch, 2.0)
    real, step = SingleDeviceStrategy.broadcast, TrainingModule.training_step
    used: list[torch.dtype | None] = []

    def broadcast(self: Any, value: Any, src: int = 0) -> Any:
        return None if value is torch.bfloat16 else real(self, value, src)

    def record(module: TrainingModule, *arguments: Any) -> None:
        used.append(module.compute_dtype)
        step(module, *arguments)

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    monkeypatch.setattr(TrainingModule, "training_step", record)
    train(config_of(tones, tmp_path / "run", max_steps=1, precision="auto"))
    assert used == [None]
