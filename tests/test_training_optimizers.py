"""Optimizers of a run: which weights each of them steps, its learning rate, its state, and the families' defaults."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wavear import audio
from wavear.cli import commands
from wavear.models.families import FAMILIES
from wavear.training.config import TRAINING_DEFAULTS, TrainConfig, TrainingDefaults, family_defaults
from wavear.training.module import learning_rate
from wavear.training.optimizers import Both, body_matrices, make_optimizer
from wavear.training.run import train
from wavear.training.state import load_state
from wavear.training.states import state_paths

RATE = 8000
SHARED: dict[str, Any] = {
    "head_channels": 16, "conditioning_channels": 6, "classes": 32, "sample_rate": RATE, "mel_bands": 8,
    "mel_hop_length": 64, "segment": 512, "warmup_steps": 2, "validate_every": 1000, "sample_seconds": 0.0,
    "progress": False, "device": "cpu", "precision": "32", "workers": 0, "max_steps": 4,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "wavenet": {"layers": 3, "stacks": 1, "residual_channels": 8, "skip_channels": 8},
    "gru": {"channels": 8, "input_channels": 8},
    "transformer": {
        "layers": 1,
        "channels": 8,
        "heads": 2,
        "window": 8,
        "patch": 4,
        "sample_channels": 4,
    },
}
WAVENET: dict[str, Any] = SHARED | SMALL["wavenet"] | {"family": "wavenet"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for number in range(6):
        time = np.arange(3000 + 64 * number) / RATE
        tone = 0.5 * np.sin(
            2 * np.pi * (200 + 50 * number) * time
        ) + 0.01 * generator.standard_normal(time.size)
        audio.write(root / f"{number}.wav", tone, RATE)
    return root


def config_of(tones: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(data=str(tones), out=str(out), **WAVENET | settings)


def model_of(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = TrainConfig(data="-", out="-", family=family, **SHARED | SMALL[family] | settings)
    return FAMILIES[family][0](config.model_config())


def names_of(model: nn.Module, parameters: list[torch.Tensor]) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def recorded(out: Path) -> dict[str, Any]:
    return json.loads((out / "train.json").read_text())


# --- which weights


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "wavenet",
            {
                f"blocks.{n}.{name}.weight"
                for n in range(3)
                for name in ("dilated", "conditioning", "skip", "residual")
            }
            - {"blocks.2.residual.weight"}
            | {"head.1.weight"},
        ),
        ("gru", {"condition_input.weight", "head.first.weight", "head.conditioning.weight"}),
        (
            "transformer",
            {f"blocks.0.{name}.weight" for name in ("qkv", "out", "up", "down")}
            | {f"head.{name}.weight" for name in ("position", "samples", "conditioning", "hidden")}
            | {"enter.weight", "enter_conditioning.weight"},
        ),
    ],
)
def test_muon_steps_the_matrices_of_the_body_only(family: str, expected: set[str]):
    model = model_of(family)
    assert names_of(model, body_matrices(model)) == expected


def test_the_line_of_a_value_input_is_not_of_the_body():
    model = model_of("wavenet", law="laplace", classes=65536, coarse_classes=16)
    assert not {n for n in names_of(model, body_matrices(model)) if n.startswith("embedding")}


def test_a_model_names_its_matrices_itself():
    model = model_of("wavenet")
    model.muon_parameters = lambda: [model.blocks[0].dilated.weight]
    assert names_of(model, body_matrices(model)) == {"blocks.0.dilated.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_is_stepped_by_one_optimizer(name: str):
    model = model_of("wavenet")
    config = config_of(Path(), Path(), optimizer=name, weight_decay=0.25).resolved()
    optimizer, peaks = make_optimizer(model, config)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped})
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters()}
    assert peaks == ([1e-2] if name == "muon" else []) + [2e-3, 2e-3]
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.25 if p.dim() > 1 else 0.0) for p in group["params"])


# --- one step of both


def test_both_equals_its_parts_stepped_by_themselves():
    """With learning rates set through `param_groups`, and after a state was read."""

    def parts(a: nn.Parameter, b: nn.Parameter) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Muon([a], lr=1.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([b], lr=1.0),
        ]

    def start() -> tuple[nn.Parameter, nn.Parameter]:
        return nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.ones(4))

    (a, b), (c, d) = start(), start()
    alone, both = parts(a, b), Both(*parts(c, d))
    for step in range(1, 6):
        for weights in ((a, b), (c, d)):
            for weight in weights:
                weight.grad = torch.linspace(-1, step, weight.numel()).reshape(weight.shape)
        for optimizer, rate in zip(alone, (0.1, 0.2), strict=True):
            optimizer.param_groups[0]["lr"] = rate / step
            optimizer.step()
        for group, rate in zip(both.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = rate / step
        both.step()
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        if step == 3:
            state = both.state_dict()
            both = Both(*parts(c, d))
            both.load_state_dict(state)
            assert [group["lr"] for group in both.param_groups] == [0.1 / 3, 0.2 / 3]
    both.zero_grad()
    assert c.grad is None
    assert d.grad is None


def test_a_state_of_another_optimizer_is_refused():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    both = Both(torch.optim.Muon([a]), torch.optim.AdamW([b]))
    with pytest.raises(ValueError, match="the state is of one and not of 2 optimizers"):
        both.load_state_dict(torch.optim.AdamW([a, b]).state_dict())


# --- a run


def test_a_step_with_muon_is_one_step_and_learns(tones: Path, tmp_path: Path):
    """Lightning counts the steps of every optimizer; the run has one."""
    settings: dict[str, Any] = {
        "max_steps": 40,
        "batch_size": 4,
        "warmup_steps": 5,
        "ema_decay": 0.9,
    }
    rates = {"learning_rate": 2e-2, "muon_learning_rate": 5e-2}
    result = train(config_of(tones, tmp_path / "run", optimizer="muon", **settings, **rates))
    assert result.steps == 40
    assert result.bits_final < result.bits_before - 1
    with open(tmp_path / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train_bits"]]
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    state = load_state(state_paths(tmp_path / "run")[0])["optimizer_states"]
    muon, adamw = state[0]["parts"]
    assert muon["param_groups"][0]["lr"] == pytest.approx(learning_rate(39, 39 / 40, 5e-2, 5))
    assert adamw["param_groups"][0]["lr"] == pytest.approx(learning_rate(39, 39 / 40, 2e-2, 5))
    assert float(rows[-1]["learning_rate"]) == adamw["param_groups"][0]["lr"]


def test_a_run_with_another_optimizer_is_not_resumed(tones: Path, tmp_path: Path):
    config = config_of(tones, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(
        ValueError,
        match="is a run with the optimizer adamw, now muon: resume with --optimizer adamw",
    ):
        train(dataclasses.replace(config, optimizer="muon", resume=True))


def test_the_learning_rate_is_constant_for_the_share_held():
    rates = [learning_rate(step, step / 1000, 0.5, 100, 0.3) for step in range(1001)]
    assert rates[99:301] == [0.5] * 202
    assert (np.diff(rates[301:]) < 0).all()
    assert rates[650] == pytest.approx(0.5 * 0.51)  # in the middle of the cosine
    assert rates[1000] == pytest.approx(0.5 * 0.02)


# --- the families' defaults


def test_a_run_records_the_defaults_that_it_took(tones: Path, tmp_path: Path):
    config = config_of(tones, tmp_path / "run", max_steps=1, segment=None)
    train(config)
    found = recorded(tmp_path / "run")["config"]
    expected = dataclasses.asdict(TrainingDefaults())
    assert expected.pop("segment_frames") == 0
    assert {name: found[name] for name in expected} == expected
    assert found == dataclasses.asdict(config.resolved())


@pytest.mark.parametrize(
    ("rate", "segment"), [(22050, 8192), (16000, 8192), (8000, 4096), (44100, 16384)]
)
def test_the_predictive_family_has_its_own_defaults(rate: int, segment: int):
    config = TrainConfig(data="-", out="-", family="predictive", sample_rate=rate)
    assert config.learning_rate is None
    found = config.resolved()
    assert (found.optimizer, found.learning_rate, found.muon_learning_rate) == ("muon", 4e-3, 1e-2)
    assert (found.hold, found.weight_decay, found.warmup_steps, found.gradient_clip) == (
        0.3,
        0.0,
        100,
        1.0,
    )
    assert (found.segment, found.batch_size, found.input_noise, found.ema_decay) == (
        segment,
        3,
        0.5,
        0.9,
    )
    given = dataclasses.replace(
        config, learning_rate=1e-3, input_noise=0.0, segment=100, optimizer="adamw"
    ).resolved()
    assert (given.learning_rate, given.input_noise, given.segment, given.optimizer) == (
        1e-3,
        0.0,
        100,
        "adamw",
    )
    with pytest.raises(ValueError, match="a batch of 3 does not divide into 2 parts"):
        dataclasses.replace(config, accumulate=2)


def test_defaults_of_families_are_of_families_and_of_fields_that_are_none():
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(TrainingDefaults):
        assert field.name == "segment_frames" or fields[field.name] is None
    assert set(TRAINING_DEFAULTS) <= {*FAMILIES, "predictive"}


def test_help_and_docs_state_the_defaults_of_the_families(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        commands.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    for name, text in family_defaults().items():
        assert f"(default: {text})" in shown
        classic, predictive = text.split("; predictive: ")
        assert f"| `--{name.replace('_', '-')}` | {classic} | {predictive} |" in page
