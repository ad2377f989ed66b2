"""int8 weights: zeros, non-finite weights, equal audio of generate and streams, engines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import conditioning, make_wavenet, parallel, random_codes

import wavear
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.engines import make_engine


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
    np.testing.assert_allclose(engine.score(codes, cond), expected, atol=1e-4)


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
