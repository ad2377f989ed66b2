"""The CPU engine of the transformer equals the reference for models of any shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import conditioning, make_transformer, random_codes, random_uniforms

from wavear.generation.cpu import transformer_plan
from wavear.generation.cpu.transformer import NumbaTransformer
from wavear.generation.reference import ReferenceEngine

# Channels that are multiples of a vector and others; windows that are multiples of a block and
# others.
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {
        "channels": 12, "heads": 2, "window": 5, "patch": 3, "sample_channels": 5,
        "head_channels": 7,
    },
    "whole vectors": {
        "layers": 1, "channels": 64, "heads": 2, "window": 32, "patch": 2, "head_channels": 32,
    },
    "wide heads": {
        "layers": 1, "channels": 520, "heads": 2, "window": 19, "head_channels": 9,
    },
    "long window": {
        "layers": 1, "channels": 8, "heads": 1, "window": 211, "patch": 1, "head_channels": 9,
    },
    "one head of two": {
        "channels": 2, "heads": 1, "window": 1, "patch": 1, "head_channels": 1,
    },
    "few classes": {
        "layers": 1, "channels": 20, "heads": 2, "window": 9, "patch": 2, "classes": 3,
    },
    "many classes": {
        "layers": 1, "channels": 8, "heads": 2, "window": 4, "patch": 2, "classes": 1000,
    },
    "speakers": {"speakers": 3},
    "mixture": {"layers": 1, "law": "logistic_mixture"},
    "gaussian": {
        "layers": 1, "channels": 8, "heads": 1, "patch": 2, "law": "gaussian",
        "coarse_classes": 16,
    },
    "laplace": {
        "layers": 1, "channels": 8, "heads": 1, "patch": 1, "law": "laplace", "speakers": 2,
    },
}  # fmt: skip
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
close: Any = {"rtol": 1e-5, "atol": 2e-5}  # both in float32; on values up to 10 nats


@shapes
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])
@torch.inference_mode()
def test_scores_equal_the_reference_beyond_the_window(config, constant):
    model = make_transformer(**config)
    total = min(2 * model.config.window * model.config.patch + 7, 230)
    codes, cond = random_codes(model, 2, total), conditioning(model, 2, total, constant)
    expected = ReferenceEngine(model, 2).score(codes, cond)
    torch.testing.assert_close(NumbaTransformer(model, 2).score(codes, cond), expected, **close)


@pytest.mark.parametrize("name", ["odd", "speakers"])
@torch.inference_mode()
def test_scores_are_the_same_with_and_without_tables(name, monkeypatch):
    model = make_transformer(**SHAPES[name])
    codes, cond = random_codes(model, 1, 60), conditioning(model, 1, 60)
    expected = NumbaTransformer(model, 1).score(codes, cond)
    monkeypatch.setattr(transformer_plan, "_TABLES", 0)
    found = NumbaTransformer(model, 1).score(codes, cond)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@shapes
@torch.inference_mode()
def test_codes_equal_those_of_the_reference(config):
    model = make_transformer(**config)
    uniforms, cond = random_uniforms(2, 60, seed=1), conditioning(model, 2, 60)
    scores = np.empty((2, 60))
    found = NumbaTransformer(model, 2).generate(uniforms, cond, 0.9, log_probability=scores)
    expected = ReferenceEngine(model, 2).generate(uniforms, cond, 0.9)
    if model.law.truncates:
        # At most a uniform in 10^5 lies within rounding of the boundary between two codes.
        assert (found == expected).all()
    else:
        # float32 rounding of the distribution selects one of the neighbouring codes, 2^-15 apart,
        # and later samples then depend on another past.
        assert np.abs(found - expected).max() <= 40
    np.testing.assert_array_equal(scores, NumbaTransformer(model, 2).score(found, cond))


@shapes
@pytest.mark.parametrize("time", [0, 45])
@torch.inference_mode()
def test_states_are_those_of_the_reference(config, time):
    """Either engine resumes from the other's state, and restores its own bit for bit."""
    model = make_transformer(**config)
    codes, cond = random_codes(model, 1, time + 30), conditioning(model, 1, 1, True)
    engine, reference = NumbaTransformer(model, 1), ReferenceEngine(model, 1)
    for one in (engine, reference):
        one.score(codes[:, :time], cond)
    ours, theirs = engine.state(0), reference.state(0)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)
    expected = reference.score(codes[:, time:], cond)
    again = NumbaTransformer(model, 2)
    again.load_state(1, ours)
    assert all(torch.equal(again.state(1)[name], tensor) for name, tensor in ours.items())
    again = again.resized(1)
    again.load_state(0, theirs)
    torch.testing.assert_close(again.score(codes[:, time:], cond), expected, **close)
