"""The Triton engine in Triton's CPU interpreter: draws. See `interpreted_triton`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted_triton import SHAPES, TOLERANCE, _inference, inputs, make

from wavear.generation.cuda.triton import TritonEngine
from wavear.generation.reference import ReferenceEngine

__all__ = ["_inference"]  # these tests use this fixture too


@pytest.mark.parametrize("shape", ["kernel 3, speakers", "many classes", "tiles of channels"])
def test_free_running_codes_equal_the_reference(shape):
    model = make(**SHAPES[shape])
    _, uniforms, cond = inputs(model, 5, 12)
    logs, expected_logs = np.empty_like(uniforms), np.empty_like(uniforms)
    temperature = np.random.default_rng(1).uniform(0.5, 1.5, uniforms.shape)
    found = TritonEngine(model, 5).generate(uniforms, cond, temperature, log_probability=logs)
    expected = ReferenceEngine(model, 5).generate(
        uniforms, cond, temperature, log_probability=expected_logs
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(logs, expected_logs, atol=TOLERANCE)
    assert len(np.unique(found)) > 10


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ({"top_k": 1}, 32),
        ({"top_k": 5}, 200),
        ({"top_p": 0.5}, 200),
        ({"top_p": 1.0}, 32),
        ({"top_k": 6, "top_p": 0.8, "temperature": 0.7}, 200),
    ],
    ids=str,
)
def test_truncated_draws_equal_the_reference(settings, classes):
    model = make(layers=1, stacks=1, classes=classes)
    with torch.no_grad():  # equal logits, where the lower code wins, next to others
        weights = model.state_dict()
        weights["head.3.bias"].zero_()
        weights["head.3.weight"][: classes // 2] = weights["head.3.weight"][0]
    _, uniforms, _ = inputs(model, 16, 2)
    found = TritonEngine(model, 16).generate(uniforms, None, **settings)
    expected = ReferenceEngine(model, 16).generate(uniforms, None, **settings)
    np.testing.assert_array_equal(found, expected)


def test_codes_without_probability_are_never_drawn():
    model = make(layers=1, stacks=1, classes=7)
    logits = np.full(7, -np.inf)
    logits[[2, 4]] = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.state_dict()["head.3.bias"].copy_(torch.from_numpy(logits))
    ends = np.array([[0.0, 2.0**-53, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53]])
    assert TritonEngine(model, 1).generate(ends, None).tolist() == [[2, 2, 2, 4, 4]]


def test_non_finite_logits_are_an_error():
    model = make()
    codes, uniforms, _ = inputs(model, 2, 3)
    with torch.no_grad():
        model.blocks[1].dilated.bias[3] = torch.nan
    with pytest.raises(ValueError, match="sample 0 of this call are infinite or NaN"):
        TritonEngine(model, 2).generate(uniforms, None)
    with pytest.raises(ValueError, match="infinite or NaN"):
        TritonEngine(model, 2).score(codes, None)
