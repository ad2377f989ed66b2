"""The CPU engine of the transformer is the reference: by score, by code, by state, whatever its shapes."""

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch

from wavear import Stream, Transformer, TransformerConfig, WaveNet, WaveNetConfig
from wavear.generation.cpu import transformer_plan
from wavear.generation.cpu.transformer import NumbaTransformer
from wavear.generation.cpu.transformer_plan import as_run
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine

# Channels that are no multiple of a vector, windows that are no multiple of a block, and some that
# are.
SHAPES = {
    "odd": TransformerConfig(
        layers=2, channels=12, heads=2, window=5, patch=3, sample_channels=5, head_channels=7
    ),
    "whole vectors": TransformerConfig(
        layers=1, channels=64, heads=2, window=32, patch=2, head_channels=32
    ),
    "wide heads": TransformerConfig(
        layers=1, channels=520, heads=2, window=19, patch=4, head_channels=9
    ),
    "long window": TransformerConfig(
        layers=1, channels=8, heads=1, window=211, patch=1, head_channels=9
    ),
    "one head of two": TransformerConfig(
        layers=2, channels=2, heads=1, window=1, patch=1, head_channels=1
    ),
    "few classes": TransformerConfig(
        layers=1, channels=20, heads=2, window=9, patch=2, classes=3, head_channels=9
    ),
    "many classes": TransformerConfig(
        layers=1, channels=8, heads=2, window=4, patch=2, classes=1000, head_channels=9
    ),
    "speakers": TransformerConfig(
        layers=2, channels=24, heads=3, window=7, patch=4, speakers=3, head_channels=24
    ),
    "mixture": TransformerConfig(
        layers=1, channels=24, heads=3, window=7, patch=4, law="logistic_mixture"
    ),
    "gaussian": TransformerConfig(
        layers=1, channels=8, heads=1, window=7, patch=2, law="gaussian", coarse_classes=16
    ),
    "laplace": TransformerConfig(
        layers=1, channels=8, heads=1, window=7, patch=1, law="laplace", speakers=2
    ),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def make(config) -> Any:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        if config.law == "categorical":
            model.head.out.weight *= 4
        if model.head.place is not None:
            model.head.place.weight.normal_()
    return model


def make_codes(config, batch, total):
    spread = min(config.classes, 2000)
    return (
        np.random.default_rng(0).integers(0, spread, (batch, total))
        + (config.classes - spread) // 2
    )


def make_cond(model, batch, total, constant) -> Any:
    if not model.conditioned:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        batch, model.config.conditioning_channels, 1 if constant else total, generator=generator
    )


def both(model, batch, **settings):
    return NumbaTransformer(model, batch, **settings), ReferenceEngine(model, batch)


@shapes
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])
@torch.inference_mode()
def test_scores_are_those_of_the_reference(config, constant):
    """Teacher-forced beyond the window, both in float32; on values up to 10 nats."""
    model = make(config)
    total = min(2 * config.window * config.patch + 7, 230)
    codes, cond = make_codes(config, 2, total), make_cond(model, 2, total, constant)
    engine, reference = both(model, 2)
    torch.testing.assert_close(
        engine.score(codes, cond), reference.score(codes, cond), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("config", [SHAPES["odd"], SHAPES["speakers"]], ids=["odd", "speakers"])
@torch.inference_mode()
def test_products_are_the_same_with_and_without_tables(config, monkeypatch):
    model = make(config)
    codes, cond = make_codes(config, 1, 60), make_cond(model, 1, 60, False)
    tabled = NumbaTransformer(model, 1).score(codes, cond)
    monkeypatch.setattr(transformer_plan, "_TABLES", 0)
    torch.testing.assert_close(
        NumbaTransformer(model, 1).score(codes, cond), tabled, rtol=0, atol=1e-5
    )


@shapes
@torch.inference_mode()
def test_codes_are_those_of_the_reference(config):
    model = make(config)
    uniforms, cond = np.random.default_rng(1).random((2, 60)), make_cond(model, 2, 60, False)
    (found, other), scores = (
        (e.generate(uniforms, cond, 0.9) for e in both(model, 2)),
        np.empty((2, 60)),
    )
    if config.law == "categorical":
        # At most a uniform in 10^5 lies within rounding of the boundary between two codes.
        assert (found == other).all()
    else:
        # The value is the uniform's place in a law off by float32 rounding: codes of 2^-15 beside
        # each other, and the past that follows is another one.
        assert np.abs(found - other).max() <= 40
    engine = NumbaTransformer(model, 2)
    assert (engine.generate(uniforms, cond, 0.9, log_probability=scores) == found).all()
    torch.testing.assert_close(
        scores, NumbaTransformer(model, 2).score(found, cond), rtol=0, atol=0
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (3, None), (None, 0.5), (5, 0.9)])
@torch.inference_mode()
def test_truncation_is_that_of_the_reference(top_k, top_p):
    uniforms = np.random.default_rng(1).random((1, 80))
    found, other = (
        e.generate(uniforms, None, 1.2, top_k=top_k, top_p=top_p)
        for e in both(make(SHAPES["whole vectors"]), 1)
    )
    assert (found == other).all()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_bits_do_not_depend_on_batch_threads_or_cuts(weights):
    config = SHAPES["speakers"]
    model = make(config)
    uniforms, cond = np.random.default_rng(1).random((5, 90)), make_cond(model, 5, 90, False)
    engine = NumbaTransformer(model, 5, weights=weights, threads=2)
    cuts = [0, 1, 2, 30, 33, 90]
    parts = [
        engine.generate(uniforms[:, a:b], cond[:, :, a:b]) for a, b in itertools.pairwise(cuts)
    ]
    alone = [
        NumbaTransformer(model, 1, weights=weights).generate(uniforms[b : b + 1], cond[b : b + 1])
        for b in range(5)
    ]
    assert (np.concatenate(parts, axis=1) == np.concatenate(alone)).all()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@torch.inference_mode()
def test_the_matrices_are_rounded_and_nothing_else(weights):
    """Against the reference on a model whose matrices are rounded, written out once more."""
    model = make(SHAPES["speakers"])
    codes, cond = make_codes(model.config, 1, 60), make_cond(model, 1, 60, False)
    found = NumbaTransformer(model, 1, weights=weights).score(codes, cond)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith(
            ("conditioning.", "embedding.", "head.place")
        ):
            if weights == "bfloat16":
                parameter.data = parameter.bfloat16().float()
            else:
                step = parameter.double().abs().amax(dim=1, keepdim=True) / 127
                parameter.data = ((parameter / step).round() * step).float()
    torch.testing.assert_close(
        found, ReferenceEngine(model, 1).score(codes, cond), rtol=1e-5, atol=2e-5
    )
    run = dict(as_run(make(model.config), weights).named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run[name], parameter, rtol=1e-6, atol=1e-8)


@shapes
@pytest.mark.parametrize("time", [0, 1, 7, 44])
@torch.inference_mode()
def test_states_are_those_of_the_reference(config, time):
    """Either engine goes on from the state of the other; its own comes back to the bit."""
    model = make(config)
    codes, cond = make_codes(config, 1, time + 30), make_cond(model, 1, time + 30, True)
    engine, reference = both(model, 1)
    for one in (engine, reference):
        one.score(codes[:, :time], cond)
    ours, theirs = engine.state(0), reference.state(0)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4, check_dtype=True)
    expected = reference.score(codes[:, time:], cond)
    torch.testing.assert_close(engine.score(codes[:, time:], cond), expected, rtol=1e-5, atol=2e-5)
    again = NumbaTransformer(model, 2)
    again.load_state(1, ours)
    assert all(torch.equal(again.state(1)[name], tensor) for name, tensor in ours.items())
    again = again.resized(1)
    again.load_state(0, theirs)
    torch.testing.assert_close(again.score(codes[:, time:], cond), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_filled_states_go_on_like_scored_ones(weights):
    config = SHAPES["speakers"]
    model = make(config)
    codes, cond = make_codes(config, 1, 90), make_cond(model, 1, 90, False)
    filled, scored = (NumbaTransformer(model, 1, weights=weights) for _ in range(2))
    filled.fill(0, codes[0, :50], cond[:, :, :50])
    scored.score(codes[:, :50], cond[:, :, :50])
    found, expected = (e.score(codes[:, 50:], cond[:, :, 50:]) for e in (filled, scored))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_it_is_the_engine_of_choice_on_the_cpu():
    name, engine = make_engine(make(SHAPES["odd"]), 1)
    assert (name, type(engine)) == ("numba", NumbaTransformer)
    assert Stream(make(SHAPES["mixture"])).engine == "numba"


@torch.inference_mode()
def test_an_engine_runs_the_weights_it_was_made_with():
    model = make(SHAPES["odd"])
    codes = make_codes(model.config, 1, 20)
    before = NumbaTransformer(model, 1).score(codes, None)
    model.blocks[0].up.weight *= 1.5
    after = NumbaTransformer(model, 1).score(codes, None)
    assert np.abs(before - after).max() > 1e-3
    torch.testing.assert_close(
        after, ReferenceEngine(model, 1).score(codes, None), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: NumbaTransformer(m, 0), "batch is 0"),
        (lambda m: NumbaTransformer(m, 1, weights="int4"), "weights is 'int4'"),
        (lambda m: NumbaTransformer(m, 1, threads=0), "threads is 0"),
        (
            lambda m: NumbaTransformer(cast(Any, WaveNet(WaveNetConfig(layers=1, stacks=1))), 1),
            "serves a Transformer, not WaveNet",
        ),
        (
            lambda m: NumbaTransformer(m, 2).generate(np.zeros((1, 3)), None),
            r"shape \(1, 3\) for 2 streams",
        ),
        (
            lambda m: NumbaTransformer(m, 1).generate(np.zeros((1, 3)), torch.zeros(1, 80, 3)),
            "unconditional",
        ),
        (lambda m: NumbaTransformer(m, 1).score(np.array([[256]]), None), "reach from 256 to 256"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(SHAPES["odd"]))


@pytest.mark.parametrize("config", [SHAPES["odd"], SHAPES["mixture"]], ids=["odd", "mixture"])
def test_weights_that_are_no_numbers_are_said(config):
    model = make(config)
    with torch.no_grad():
        model.head.hidden.bias[2] = float("nan")
    with pytest.raises(ValueError, match="sample 0 of this call are infinite or NaN"):
        NumbaTransformer(model, 1).generate(np.full((1, 3), 0.5), None)
