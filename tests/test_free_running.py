"""Training by the free run: differentiable generation, and the energy distance of spectra."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_training import assert_same_run, config_of, interrupt_at_step
from test_predictive import (
    conditioning,
    configs,
    frames_for,
    long_enough,
    make,
    random_codes,
    random_mel,
    random_speakers,
    small,
)

import wavear
from wavear import TrainConfig, train
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate
from wavear.models import compiled_rollout
from wavear.models import rollout as rollout_module
from wavear.models.crop_loss import layout_of
from wavear.models.energy_distance import energy_distance, free_run_losses, window_lengths
from wavear.models.rollout import past_of, rollout


@configs
def test_a_rollout_draws_what_forward_predicts(config: Any):
    """With one component, a sample is mean + scale * logit(u), of `forward` given those before."""
    model = make(dataclasses.replace(config, mixtures=1))
    begin, total = 60, 60 + long_enough(config)
    cond = conditioning(model, 2, frames_for(config, total))[:, :, :total]
    codes = random_codes(model, 2, begin)
    with torch.no_grad():
        past = past_of(model, codes, cond[:, :, :begin])
        made = []
        for start, stop in ((begin, begin + 37), (begin + 37, total)):
            generator = torch.Generator().manual_seed(start)
            x, past = rollout(model, past, cond[:, :, start:stop], generator)
            made.append(x)
        x = torch.cat(made, dim=1)
        u = [
            torch.rand(2, 2, n, generator=torch.Generator().manual_seed(seed))[1]
            for n, seed in ((37, begin), (total - begin - 37, begin + 37))
        ]
        logistic = torch.logit(torch.cat(u, dim=1).clamp(1e-5, 1 - 1e-5)).double()
        whole = torch.cat([model.value(codes), x], dim=1)
        model.value = lambda samples: samples  # what was drawn is not rounded to codes
        _, mean, scale = model(whole, cond)[:, :, begin:].unbind(1)
    torch.testing.assert_close(x, mean + scale.exp() * logistic, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_rollout_equal_finite_differences():
    config = small(mixtures=1)
    model = make(config)
    cond = conditioning(model, 1, frames_for(config, 110))
    past = past_of(model, random_codes(model, 1, 40), cond[:, :, :40]).map(
        lambda x: x.double() if x.is_floating_point() else x
    )

    def energy() -> torch.Tensor:
        x, _ = rollout(model, past, cond[:, :, 40:110], torch.Generator().manual_seed(0))
        return x.double().square().sum()

    weights = [model.hidden.weight, model.blocks[0].taps.weight, model.input.weight]
    gradients = torch.autograd.grad(energy(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn_like(weight)
        step = 1e-5 / direction.norm()
        with torch.no_grad():
            weight.add_(step * direction)
            above = energy()
            weight.sub_(2 * step * direction)
            below = energy()
            weight.add_(step * direction)
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-3, atol=1e-6)


def rollouts(
    model: Any, batch: int, stretches: tuple[int, ...] = (37, 61), code: int | None = None
):
    """Return samples, the past after them and gradients: of the kernel, and of torch in float64."""
    config, begin = model.config, 60
    total = begin + sum(stretches)
    mel = random_mel(model, batch, frames_for(config, total) + 1)
    speaker, codes = random_speakers(model, batch), random_codes(model, batch, begin)
    if code is not None:
        codes[:, -1] = code
    seen = []
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        # Streams begin at different places of a frame.
        cond = model.condition(mel.to(dtype), speaker)
        cond = dataclasses.replace(
            cond, offset=torch.arange(batch) % config.mel.hop_length, samples=total
        )
        with torch.no_grad():
            past = past_of(model, codes, cond[:, :, :begin])
        made, start = [], begin
        for number, length in enumerate(stretches):
            generator = torch.Generator().manual_seed(number)
            x, past = rollout(model, past, cond[:, :, start : start + length], generator)
            made.append(x)
            start += length
        x = torch.cat(made, dim=1)
        weight = torch.linspace(-1, 2, x.shape[1], dtype=x.dtype)
        model.zero_grad()
        (100 * x.square() * weight + x).sum().backward()
        # The period network is trained on its own; `past_of` has rounded samples in either case.
        gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        seen.append((x.detach(), past, gradients))
        assert compiled_rollout.usable(model, cond) == (dtype == torch.float32)
    return seen


def check_rollouts(model: Any, batch: int, **settings: Any) -> None:
    found, wanted = rollouts(model, batch, **settings)
    (x, past, gradients), (expected, past_expected, gradients_expected) = found, wanted
    torch.testing.assert_close(x, expected.float(), rtol=0, atol=1e-4)
    tensors: list[list[torch.Tensor]] = [[], []]
    for each, found in ((past, tensors[0]), (past_expected, tensors[1])):
        each.map(lambda t, found=found: found.append(t) or t)
    for tensor, other in zip(*tensors, strict=True):
        torch.testing.assert_close(tensor, other.to(tensor.dtype), rtol=1e-2, atol=1e-2)
    assert gradients.keys() == gradients_expected.keys()
    for name, gradient in gradients.items():
        difference = (gradient - gradients_expected[name]).norm()
        assert difference <= 1e-3 * gradients_expected[name].norm() + 1e-6, name


@configs
def test_the_kernel_equals_torch(config: Any):
    """Samples, the past after them, and every gradient; streams begin within their frames."""
    check_rollouts(make(config, torch.float32), 3)


def test_the_kernel_equals_torch_for_the_shipped_voice():
    check_rollouts(wavear.load().train(), 4)


def test_the_kernel_equals_torch_at_full_scale():
    check_rollouts(make(small(), torch.float32), 3, stretches=(5, 4), code=0)


@pytest.mark.parametrize("growth", [0.05, 0.5])
def test_gradients_that_grow_are_clipped(growth, monkeypatch):
    """Alike in the kernel and in torch; a growth of 100 clips nothing here."""
    model = make(small(), torch.float32)
    free = rollouts(model, 3)[0][2]
    monkeypatch.setattr(rollout_module, "GRADIENT_GROWTH", growth)
    check_rollouts(model, 3)
    clipped = rollouts(model, 3)[0][2]
    assert any((clipped[name] - free[name]).norm() > 0.01 * free[name].norm() for name in free)


def test_the_energy_distance_is_least_at_the_right_distribution():
    """Noise of another level or another spectrum is farther; so is a copy without variation."""
    torch.manual_seed(0)
    noise = lambda: torch.randn(64, 1600) * 0.1  # noqa: E731
    x, y, z = noise(), noise(), noise()

    def mean(y: torch.Tensor, z: torch.Tensor) -> float:
        return float(energy_distance(x, y, z, 22050).mean())

    right = mean(y, z)
    assert mean(0.8 * y, 0.8 * z) > 1.02 * right
    assert mean(1.25 * y, 1.25 * z) > 1.02 * right
    smooth = lambda x: (x + x.roll(1, 1)) / 2**0.5  # noqa: E731
    assert mean(smooth(y), smooth(z)) > 1.02 * right
    assert mean(y, y) > 1.5 * right
    assert mean(x, x) == 0


def test_windows_follow_the_rate():
    assert window_lengths(44100)[-1] == 1544


def test_training_by_the_free_run_lowers_the_energy_distance(tones):
    """Eight steps on one batch; the draws of both measurements are the same."""
    model = make(small(8000, 64), torch.float32)
    layout = layout_of(model, 256)
    segments = Segments(open_corpus(tones, sample_rate=8000).train, layout)
    batch = collate([segments[i] for i in range(4)])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)

    def distance(seed: int, learn: bool = False) -> float:
        total = 0.0
        for loss in free_run_losses(model, batch, layout, torch.Generator().manual_seed(seed)):
            total += loss.item()
            if learn:
                loss.backward()
        return total

    before = distance(99)
    for step in range(8):
        optimizer.zero_grad()
        distance(step, learn=True)
        optimizer.step()
    assert distance(99) < 0.9 * before


def test_a_run_by_the_free_run_resumes_exactly_and_differs_from_one_without(tones, tmp_path):
    make(small(8000, 64), torch.float32).save(tmp_path / "start")
    settings: dict[str, Any] = {
        "data": tones, "from_checkpoint": str(tmp_path / "start"), "segment": 256, "batch_size": 4,
        "accumulate": 2, "max_steps": 4, "validate_every": 1000, "sample_seconds": 0.0,
        "progress": False, "device": "cpu", "precision": "32", "workers": 0,
    }  # fmt: skip
    train(TrainConfig(out=tmp_path / "straight", free_run=1.0, **settings))
    with interrupt_at_step(2):
        train(TrainConfig(out=tmp_path / "parts", free_run=1.0, **settings))
    train(TrainConfig(out=tmp_path / "parts", free_run=1.0, resume=True, **settings))
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    same = {"optimizer": "adamw", "learning_rate": 3e-4, "hold": 0.4, "ema_decay": 0.99}
    train(TrainConfig(out=tmp_path / "plain", **same, **settings))
    plain, straight = (wavear.load(tmp_path / name / "last") for name in ("plain", "straight"))
    assert not torch.equal(plain.hidden.weight, straight.hidden.weight)


def test_other_families_refuse_the_free_run(tones, tmp_path):
    with pytest.raises(ValueError, match="the family gru has no training by the free run"):
        config_of(tones, tmp_path / "run", family="gru", free_run=1.0)
