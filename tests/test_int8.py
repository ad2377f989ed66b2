"""int8 weights: zeros, non-finite weights, equal audio of generate and streams, engines."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    WAVENET,
    conditioning,
    make_wavenet,
    parallel,
    random_codes,
    random_uniforms,
    tolerance,
)

import wavear
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.cpu.wavenet_plan import input_steps
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine


def rounded_in_int8(model: Any) -> Any:
    """Return the network of int8 by its definition: rounded weights, and inputs of matrices.

    Inputs are multiples of a power of two, the finest that holds all values that can occur.
    """
    model, config = copy.deepcopy(model), model.config

    def steps(bound: torch.Tensor) -> float:
        largest = max(1.01 * float(bound.max()), 1.0)
        return 2.0 ** math.floor(math.log2(int(32767 / largest)))

    def on_steps(x: torch.Tensor, steps: float) -> torch.Tensor:
        return (x * steps).clamp(-32767, 32767).round() / steps

    def round_inputs(layer: Any, steps: float) -> None:
        layer.register_forward_pre_hook(lambda _, x: (on_steps(x[0], steps),))

    signal = model.embedding.table().abs().amax(dim=0)
    skips, skip_bias = torch.zeros(config.skip_channels), torch.zeros(config.skip_channels)
    for i, block in enumerate(model.blocks):
        if i > 0 or config.classes > 4096:  # otherwise the first layer is a table
            round_inputs(block.dilated, steps(signal))
        if block.conditioning is not None:
            round_inputs(block.conditioning, 2**10)
        skips, skip_bias = skips + block.skip.weight.abs().sum(dim=1), skip_bias + block.skip.bias
        block.register_forward_hook(lambda _, x, y: (y[0], on_steps(y[1], 2**15)))
        if block.residual is not None:
            round_inputs(block.residual, 2**15)
            signal = signal + block.residual.weight.abs().sum(dim=1) + block.residual.bias.abs()
    skips = skips + skip_bias.abs()
    first, last = model.head[1], model.head[3]
    round_inputs(first, steps(skips))
    round_inputs(last, steps(first.weight.abs() @ skips + first.bias.abs()))
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2 and name.startswith(("blocks", "head")):
            taps = config.kernel_size if name.endswith("dilated.weight") else 1
            rows = matrix.view(len(matrix), taps, -1)
            step = rows.abs().amax(dim=2, keepdim=True) / 127
            rows.copy_((rows / step).round() * step)
    return model


@pytest.mark.parametrize(
    "config", [{}, {"kernel_size": 3, "residual_channels": 37, "speakers": 2, "classes": 5000}]
)
@torch.no_grad()
def test_int8_equals_the_network_of_rounded_weights_and_inputs(config):
    model = make_wavenet(**config)
    rounded, uniforms = rounded_in_int8(model), random_uniforms(3, 200)
    codes, cond = random_codes(model, 3, 200), conditioning(model, 3, 200)
    scores = NumbaEngine(model, 3, weights="int8").score(codes, cond)
    off = np.abs(parallel(rounded, codes, cond) - scores)
    # Where an input lies between two steps, float32 may select the other one.
    assert np.median(off) < 1e-6
    assert off.max() < tolerance(WAVENET, "int8")
    drawn = NumbaEngine(model, 3, weights="int8").generate(uniforms, cond)
    found = ReferenceEngine(rounded, 3).generate(uniforms, cond)
    # Where a uniform lies on an edge between codes the futures differ.
    assert np.median((drawn == found).cumprod(axis=1).sum(axis=1)) >= 30
    for layer in (*rounded.blocks, *(block.dilated for block in rounded.blocks)):
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()
    without = np.abs(parallel(rounded, codes, cond) - scores)
    assert np.median(without) > 1e-4  # so that rounded inputs are what is tested


@torch.no_grad()
def test_the_steps_of_inputs_hold_every_value():
    """Weights and units that all push one way reach the bound, and are not clipped."""
    model = make_wavenet(layers=6, stacks=1, residual_channels=40)
    for block in model.blocks:
        block.dilated.weight.zero_()
        block.dilated.bias.fill_(20)  # units of one
        if block.residual is not None:
            block.residual.weight.fill_(1.3)
            block.residual.bias.fill_(1.3)
        block.skip.weight.fill_(0.9)
    steps, skip_steps, head_steps = input_steps(model)
    seen: list[float] = []
    for layer in (*(block.dilated for block in model.blocks), model.head[1], model.head[3]):
        layer.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].abs().max())))
    model(torch.from_numpy(random_codes(model, 1, 40)))
    reached = np.multiply(seen, [*steps, skip_steps, head_steps])
    assert (reached <= 32767).all()
    assert (reached[1:-1] > 32767 / 4).all()  # and half a step finer would not hold them


@pytest.mark.parametrize("batch", [1, 3])
def test_non_finite_conditioning_is_an_error(batch):
    model = make_wavenet(speakers=2)
    cond = conditioning(model, batch, 10)
    cond[-1, 3, 7] = torch.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        NumbaEngine(model, batch, weights="int8").score(random_codes(model, batch, 10), cond)


@pytest.mark.parametrize("batch", [1, 4])
def test_channels_of_zeros_stay_zero(batch):
    model = make_wavenet(speakers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")) and parameter.dim() == 2:
                parameter[::3] = 0
        model.blocks[1].dilated.weight.zero_()
    codes, cond = random_codes(model, batch, 60), conditioning(model, batch, 60)
    engine = NumbaEngine(model, batch, weights="int8")
    expected = parallel(engine._as_run(), codes, cond)
    off = np.abs(engine.score(codes, cond) - expected)
    assert np.median(off) < 1e-6
    assert off.max() < tolerance(WAVENET, "int8")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_non_finite_weights_are_an_error(batch, wrong):
    model = make_wavenet()
    with torch.no_grad():
        model.state_dict()["head.3.weight"][7, 3] = wrong
    engine = NumbaEngine(model, batch, weights="int8")
    with pytest.raises(ValueError, match="infinite or NaN"):
        engine.generate(np.full((batch, 10), 0.5), None)


def test_generate_and_streams_are_equal_and_differ_from_float32():
    model = make_wavenet()
    whole = wavear.generate(model, weights="int8", samples=300, seed=3)
    stream = wavear.Stream(model, weights="int8", seed=3)
    assert torch.equal(torch.cat([stream.pull(n) for n in (1, 99, 200)]), whole[0])
    together = wavear.generate(model, weights="int8", samples=300, seed=[1, 2, 3])
    assert torch.equal(together[2], whole[0])
    exact, rounded = (
        wavear.score(model, whole, engine="numba", weights=w) for w in ("float32", "int8")
    )
    assert not torch.equal(exact, rounded)
    assert stream.description == "numba with int8 weights"


def test_only_the_compiled_engine_supports_int8():
    for engine in ("reference", "auto"):
        model = make_wavenet().to("cpu" if engine == "reference" else "meta")
        with pytest.raises(ValueError, match="needs engine 'numba'"):
            make_engine(model, 1, engine, weights="int8")
