"""The precision of a run: what a model allows, what is measured, and what a resumed run keeps."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import wavear
from wavear import audio
from wavear.training import precision
from wavear.training.config import TrainConfig
from wavear.training.module import TrainingModule
from wavear.training.precision import bf16_speedup, choose
from wavear.training.run import train
from wavear.training.state import encode, load_state
from wavear.training.states import state_paths

RATE = 8000
SETTINGS: dict[str, Any] = {
    "family": "wavenet", "layers": 3, "stacks": 1, "residual_channels": 8, "skip_channels": 8, "head_channels": 16,
    "classes": 32, "conditioning_channels": 6, "sample_rate": RATE, "mel_bands": 8, "mel_hop_length": 64,
    "segment": 512,
    "warmup_steps": 2, "validate_every": 1000, "sample_seconds": 0.0, "progress": False, "device": "cpu",
    "workers": 0, "max_steps": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    for number in range(6):
        time = np.arange(3000 + 64 * number) / RATE
        audio.write(
            root / f"{number}.wav", 0.5 * np.sin(2 * np.pi * (200 + 50 * number) * time), RATE
        )
    return root


def config_of(tones: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(data=str(tones), out=str(out), **SETTINGS | settings)


def model_of(**settings: Any) -> Any:
    return wavear.WaveNet(config_of(Path(), Path(), **settings).model_config())


def measured(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda threads: speedup)


def chosen(
    settings: dict[str, Any], model: Any, kind: str = "cpu", recorded: str | None = None
) -> str:
    return choose(config_of(Path(), Path(), **settings), model, kind, recorded)[0]


# --- the choice


@pytest.mark.parametrize(("speedup", "expected"), [(2.5, "bf16"), (1.05, "32"), (0.4, "32")])
def test_auto_takes_bf16_where_the_cpu_gains(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: str
):
    measured(monkeypatch, speedup)
    found, why = choose(config_of(Path(), Path()), model_of(), "cpu")
    assert found == expected
    assert f"{speedup:.1f} times as fast" in why


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    measured(monkeypatch, 2.5)
    assert chosen({"precision": "32"}, model_of()) == "32"
    measured(monkeypatch, 0.4)
    assert chosen({"precision": "bf16"}, model_of()) == "bf16"


def test_a_law_over_values_needs_float32_unless_the_model_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    measured(monkeypatch, 2.5)
    settings = {"law": "laplace", "classes": 65536}
    model = model_of(**settings)
    assert chosen(settings, model) == "32"
    with pytest.raises(
        ValueError,
        match="bf16 has 8 bits, too few for the values of the law laplace: use precision",
    ):
        chosen(settings | {"precision": "bf16"}, model)
    model.bf16 = True
    assert chosen(settings, model) == "bf16"
    assert chosen(settings | {"precision": "bf16"}, model) == "bf16"
    model = model_of()
    model.bf16 = False
    assert chosen({}, model) == "32"


@pytest.mark.parametrize("recorded", ["bf16", "32"])
def test_auto_keeps_what_a_resumed_run_recorded(monkeypatch: pytest.MonkeyPatch, recorded: str):
    measured(monkeypatch, 2.5 if recorded == "32" else 0.4)
    assert chosen({}, model_of(), recorded=recorded) == recorded
    assert chosen({"precision": "32"}, model_of(), recorded=recorded) == "32"


# --- the measurement


def test_the_speedup_is_measured_once_and_draws_nothing():
    bf16_speedup.cache_clear()
    before = torch.get_rng_state()
    found = bf16_speedup(1)
    assert 0.01 < found < 100
    assert bf16_speedup(1) == found
    assert (bf16_speedup.cache_info().misses, bf16_speedup.cache_info().hits) == (1, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_speedup_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch):
    """With a clock that shows 3 s for each float32 product and 2 s for each in bf16."""
    ticks: list[float] = []
    real = torch.nn.functional.linear

    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ticks.append(3.0 if x.dtype == torch.float32 else 2.0)
        return real(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: sum(ticks))
    bf16_speedup.cache_clear()
    assert bf16_speedup(1) == 1.5
    bf16_speedup.cache_clear()  # what the clock said is not for others


# --- a run


def test_a_run_records_and_prints_its_precision(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    measured(monkeypatch, 1.86)
    train(config_of(tones, tmp_path / "run", max_steps=1, progress=True, optimizer="muon"))
    assert json.loads((tmp_path / "run" / "train.json").read_text())["precision"] == "bf16"
    said = capsys.readouterr().out
    assert (
        "learning rate 0.01; AdamW for the rest, 0.002; bf16 (bf16 products are 1.9 times as fast here)"
        in said
    )


@pytest.mark.parametrize("speedup", [2.0, 0.5])
def test_resume_keeps_the_precision_and_equals_uninterrupted(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedup: float
):
    """Whatever would be measured by then: bit for bit."""
    measured(monkeypatch, speedup)
    train(config_of(tones, tmp_path / "straight", optimizer="muon"))
    real = TrainingModule.update_average

    def update(module: TrainingModule) -> None:
        real(module)
        if module.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "update_average", update)
        assert (
            train(config_of(tones, tmp_path / "parts", optimizer="muon")).stopped_by == "interrupt"
        )
    measured(monkeypatch, 1 / speedup)
    train(config_of(tones, tmp_path / "parts", optimizer="muon", resume=True))
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, into in zip(("straight", "parts"), tensors, strict=True):
        encode(load_state(state_paths(tmp_path / name)[0]), into)
    assert tensors[0].keys() == tensors[1].keys()
    assert any("momentum_buffer" in name for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


def test_a_run_takes_the_precision_of_the_first_process(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The processes measure each for itself; what the first one broadcasts counts."""
    measured(monkeypatch, 2.0)
    real = SingleDeviceStrategy.broadcast
    monkeypatch.setattr(
        SingleDeviceStrategy,
        "broadcast",
        lambda self, value, src=0: None if value is torch.bfloat16 else real(self, value, src),
    )
    used: list[torch.dtype | None] = []
    step = TrainingModule.training_step

    def record(module: TrainingModule, *arguments: Any) -> None:
        used.append(module.compute_dtype)
        step(module, *arguments)

    monkeypatch.setattr(TrainingModule, "training_step", record)
    train(config_of(tones, tmp_path / "run", max_steps=1))
    assert used == [None]
