"""Optimizers of a run: the weights each one steps, learning rates, states, families' defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import config_of, record_of, rows_of, state_of
from torch import nn

from wavear import TrainConfig, train
from wavear.cli import commands
from wavear.models.families import FAMILIES
from wavear.training.config import TRAINING_DEFAULTS, TrainingDefaults, family_defaults
from wavear.training.module import learning_rate
from wavear.training.optimizers import Both, body_matrices, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family][0](config_of("-", "-", family=family, **settings).model_config())


def names_of(model: nn.Module, parameters: list[torch.Tensor]) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


# --- which weights


LAYER = ("dilated", "conditioning", "skip", "residual")
HEAD = ("position", "samples", "conditioning", "hidden")
BODY = {
    "wavenet": {f"blocks.{n}.{name}.weight" for n in range(4) for name in LAYER}
    - {"blocks.3.residual.weight"}
    | {"head.1.weight"},
    "gru": {"condition_input.weight", "head.first.weight", "head.conditioning.weight"},
    "transformer": {f"blocks.0.{name}.weight" for name in ("qkv", "out", "up", "down")}
    | {f"head.{name}.weight" for name in HEAD}
    | {"enter.weight", "enter_conditioning.weight"},
}


@pytest.mark.parametrize("family", BODY)
def test_muon_steps_the_matrices_of_the_body_only(family: str):
    model = model_of(family)
    assert names_of(model, body_matrices(model)) == BODY[family]


def test_embedding_of_values_is_not_in_the_body():
    model = model_of("wavenet", law="laplace", classes=65536, coarse_classes=16)
    assert not {n for n in names_of(model, body_matrices(model)) if n.startswith("embedding")}


def test_model_can_name_its_matrices():
    model = model_of("wavenet")
    model.muon_parameters = lambda: [model.blocks[0].dilated.weight]
    assert names_of(model, body_matrices(model)) == {"blocks.0.dilated.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_is_stepped_by_one_optimizer(name: str):
    model = model_of("wavenet")
    config = config_of("-", "-", optimizer=name, weight_decay=0.25).resolved()
    optimizer, peaks = make_optimizer(model, config)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped})
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters()}
    assert peaks == ([1e-2] if name == "muon" else []) + [2e-3, 2e-3]
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.25 if p.dim() > 1 else 0.0) for p in group["params"])


# --- one step of both


def test_both_equals_its_parts():
    """Also with learning rates set through `param_groups`, and after a state is loaded."""

    def parts(a: nn.Parameter, b: nn.Parameter) -> list[torch.optim.Optimizer]:
        muon = torch.optim.Muon([a], lr=1.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW([b], lr=1.0)]

    def start() -> tuple[nn.Parameter, nn.Parameter]:
        return nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.ones(4))

    (a, b), (c, d) = start(), start()
    separate, both = parts(a, b), Both(*parts(c, d))
    for step in range(1, 6):
        for weight in (a, b, c, d):
            weight.grad = torch.linspace(-1, step, weight.numel()).reshape(weight.shape)
        for optimizer, rate in zip(separate, (0.1, 0.2), strict=True):
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
    assert c.grad is d.grad is None
    with pytest.raises(ValueError, match="the state is of one and not of 2 optimizers"):
        both.load_state_dict(torch.optim.AdamW([a, b]).state_dict())


# --- a run


def test_muon_run_counts_steps_once_and_learns(tones, tmp_path):
    """Lightning counts the steps of every optimizer; the run has one."""
    settings: dict[str, Any] = {"max_steps": 40, "batch_size": 4, "warmup_steps": 5}
    rates = {"learning_rate": 2e-2, "muon_learning_rate": 5e-2, "ema_decay": 0.9}
    result = train(config_of(tones, tmp_path / "run", optimizer="muon", **settings, **rates))
    assert result.steps == 40
    assert result.bits_final < result.bits_before - 1
    rows = [row for row in rows_of(tmp_path / "run" / "metrics.csv") if row["train_bits"]]
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    muon, adamw = state_of(tmp_path / "run")["optimizer_states"][0]["parts"]
    assert muon["param_groups"][0]["lr"] == pytest.approx(learning_rate(39, 39 / 40, 5e-2, 5))
    assert adamw["param_groups"][0]["lr"] == pytest.approx(learning_rate(39, 39 / 40, 2e-2, 5))
    assert float(rows[-1]["learning_rate"]) == adamw["param_groups"][0]["lr"]


def test_resume_with_another_optimizer_is_refused(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", max_steps=1)
    train(config)
    message = "with the optimizer adamw, now muon: resume with --optimizer adamw"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, optimizer="muon", resume=True))


# --- the families' defaults


def test_run_records_its_defaults(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", max_steps=1, segment=None)
    train(config)
    found = record_of(tmp_path / "run")["config"]
    expected = dataclasses.asdict(TrainingDefaults())
    assert expected.pop("segment_frames") == 0
    assert {name: found[name] for name in expected} == expected
    assert found == dataclasses.asdict(config.resolved())


@pytest.mark.parametrize(
    ("rate", "segment"), [(22050, 8192), (16000, 8192), (8000, 4096), (44100, 16384)]
)
def test_predictive_family_has_its_own_defaults(rate: int, segment: int):
    config = TrainConfig(data="-", out="-", family="predictive", sample_rate=rate)
    assert config.learning_rate is None
    found = dataclasses.asdict(config.resolved())
    expected = {
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "muon_learning_rate": 1e-2,
        "hold": 0.3,
        "weight_decay": 0.0,
        "warmup_steps": 100,
        "gradient_clip": 1.0,
        "segment": segment,
        "batch_size": 3,
        "input_noise": 0.5,
        "ema_decay": 0.9,
    }
    assert {name: found[name] for name in expected} == expected
    given: dict[str, Any] = {"learning_rate": 1e-3, "input_noise": 0.0, "segment": 100}
    resolved = dataclasses.replace(config, **given, optimizer="adamw").resolved()
    assert {name: getattr(resolved, name) for name in given} == given
    assert resolved.optimizer == "adamw"
    with pytest.raises(ValueError, match="a batch of 3 does not divide into 2 parts"):
        dataclasses.replace(config, accumulate=2)


def test_defaults_belong_to_families_and_to_fields_that_are_none():
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    for field in dataclasses.fields(TrainingDefaults):
        assert field.name == "segment_frames" or fields[field.name] is None
    assert set(TRAINING_DEFAULTS) <= set(FAMILIES)


def test_help_and_docs_state_the_families_defaults(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        commands.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    for name, text in family_defaults().items():
        assert f"(default: {text})" in shown
        classic, predictive = text.split("; predictive: ")
        assert f"| `--{name.replace('_', '-')}` | {classic} | {predictive} |" in page
