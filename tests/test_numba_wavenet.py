"""The CPU engine of WaveNet and GRU over random shapes, the draw, and narrower vectors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine_cases import (
    GRU_CASE,
    WAVENET,
    Case,
    conditioning,
    make_wavenet,
    parallel,
    random_codes,
    random_uniforms,
    scored_in_parts,
    tolerance,
)
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from wavear import WaveNet
from wavear.generation.cpu.emitter import machine_features
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.reference import ReferenceEngine

small = st.integers(1, 40)
classes_ = st.sampled_from([2, 3, 17, 256, 1024, 5003])
batches = st.sampled_from([1, 2, 3, 5, 13, 30])
# No shrinking: it takes minutes, and the first failing example is enough.
phases = [Phase.explicit, Phase.generate]
few = settings(max_examples=12, deadline=None, derandomize=True, phases=phases)


def check(case: Case, config: dict, batch, samples, cut, constant, threads, weights="float32"):
    model = case.make(**config)
    codes, cond = random_codes(model, batch, samples), conditioning(model, batch, samples, constant)
    engine = case.engine(model, batch, weights=weights, threads=threads)
    found = scored_in_parts(engine, codes, cond, sorted({0, min(cut, samples), samples}))
    expected = parallel(engine._as_run(), codes, cond)
    if weights == "int8":  # an input near the middle of two steps moves all samples that see it
        off = np.abs(found - expected)
        assert np.quantile(off, 0.1) < case.tolerance
        assert np.sqrt(np.mean(off**2)) < tolerance(case, weights)
        return
    np.testing.assert_allclose(found, expected, atol=case.tolerance, rtol=1e-6)


@few
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(2, 5)),
    channels=st.tuples(small, small, small, small),
    classes=classes_,
    speakers=st.sampled_from([0, 3]),
    batch=batches,
    samples=st.integers(1, 150),
    cut=st.integers(0, 150),
    constant=st.booleans(),
    threads=st.sampled_from([1, 2]),
    weights=st.sampled_from(["float32", "int8"]),
)
@example((3, 8, 2), (64, 128, 256, 80), 256, 3, 1, 700, 333, False, 1, "float32")
@example((2, 5, 3), (128, 96, 100, 31), 512, 3, 7, 150, 1, False, 2, "float32")
@example((2, 5, 3), (33, 47, 29, 31), 50, 3, 1, 150, 0, False, 2, "int8")
@example((1, 1, 2), (1, 1, 1, 1), 2, 0, 1, 5, 2, False, 1, "int8")
def test_scores_of_any_wavenet_equal_forward(
    shape, channels, classes, speakers, batch, samples, cut, constant, threads, weights
):
    names = ("residual_channels", "skip_channels", "head_channels", "conditioning_channels")
    config = dict(zip(names, channels, strict=True)) | {"classes": classes, "speakers": speakers}
    config |= {"layers": shape[0] * shape[1], "stacks": shape[0], "kernel_size": shape[2]}
    check(WAVENET, config, batch, samples, cut, constant, threads, weights)


@few
@given(
    layers=st.integers(1, 3),
    channels=st.tuples(small, small, small, small),
    classes=classes_,
    speakers=st.sampled_from([0, 3]),
    batch=batches,
    samples=st.integers(1, 150),
    cut=st.integers(0, 150),
    constant=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(1, (256, 128, 256, 80), 256, 3, 1, 500, 333, False, 1)
@example(2, (96, 31, 100, 31), 5003, 3, 7, 150, 1, False, 2)
@example(1, (1, 1, 1, 1), 2, 0, 1, 5, 2, False, 1)
def test_scores_of_any_gru_equal_forward(
    layers, channels, classes, speakers, batch, samples, cut, constant, threads
):
    names = ("channels", "input_channels", "head_channels", "conditioning_channels")
    config = dict(zip(names, channels, strict=True))
    config |= {"layers": layers, "classes": classes, "speakers": speakers}
    check(GRU_CASE, config, batch, samples, cut, constant, threads)


@pytest.mark.parametrize("classes", [2, 65536])
def test_the_fewest_and_the_most_classes(classes):
    model = make_wavenet(classes=classes)
    codes, uniforms = random_codes(model, 2, 50), random_uniforms(2, 50)
    codes[0, -2:] = classes - 1
    found = NumbaEngine(model, 2).score(codes, None)
    np.testing.assert_allclose(found, parallel(model, codes, None), atol=1e-4, rtol=1e-6)
    expected = ReferenceEngine(model, 2).generate(uniforms, None)
    np.testing.assert_array_equal(NumbaEngine(model, 2).generate(uniforms, None), expected)


def with_bias_only(logits: list[float]) -> WaveNet:
    """Return a model whose distribution is the softmax of `logits` at every sample."""
    one = dict.fromkeys(("layers", "stacks", "residual_channels", "skip_channels"), 1)
    model = make_wavenet(**one, head_channels=1, classes=len(logits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.state_dict()["head.3.bias"].copy_(torch.tensor(logits))
    return model


def test_a_million_draws_follow_the_distribution():
    logits = np.random.default_rng(0).normal(0, 2, 200)
    model, draws = with_bias_only(logits.tolist()), 1_000_000
    codes = NumbaEngine(model, 100).generate(random_uniforms(100, draws // 100), None)
    law = np.exp(logits - logits.max())
    expected = draws * law / law.sum()
    counts = np.bincount(codes.ravel(), minlength=len(logits))
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Both tails: too good a fit is as wrong as a bad one.
    assert 1e-4 < chi2.sf(statistic, len(logits) - 1) < 1 - 1e-4


@pytest.mark.parametrize(
    ("first", "second", "classes"), [(2, 4, 7), (2, 20, 40), (20, 37, 40), (16, 32, 64)]
)
def test_codes_without_probability_are_never_drawn(first, second, classes):
    """Also by uniforms exactly on a boundary, within a block of the sums or between two."""
    logits = np.full(classes, -300.0)
    logits[[0, -1]] = -np.inf
    logits[[first, second]] = 0.0
    ends = np.array([[0.0, 2.0**-53, 0.25, 0.5 - 2.0**-53, 0.5, 0.75, 1 - 2.0**-53]])
    codes = NumbaEngine(with_bias_only(logits.tolist()), 1).generate(ends, None)
    assert codes.tolist() == [[first] * 4 + [second] * 3]


def test_a_state_of_another_embedding_is_refused():
    state = NumbaEngine(make_wavenet(kernel_size=3), 1).state(0)
    state["queue.0"] = state["queue.0"] + 1
    with pytest.raises(ValueError, match="the state is of another model"):
        NumbaEngine(make_wavenet(kernel_size=3), 1).load_state(0, state)


_ON_ANOTHER_PROCESSOR = """
import numpy as np
import torch
from wavear import GRU, GRUConfig, WaveNet, WaveNetConfig
from wavear.generation.cpu import emitter, gru_loop, wavenet_loop
from wavear.generation.engines import make_engine
assert wavenet_loop.run.cache_info().currsize == 0  # importing compiles nothing
assert gru_loop.run.cache_info().currsize == 0
torch.manual_seed(0)
models = [
    WaveNet(WaveNetConfig(layers=4, stacks=2, residual_channels=24, skip_channels=20)),
    GRU(GRUConfig(layers=2, channels=24, head_channels=20)),
]
codes = np.random.default_rng(0).integers(0, 256, (5, 40))
print(emitter.LANES)
for model in models:
    print(*{make_engine(model, b, 'numba')[1].score(codes[:b], None)[0].tobytes().hex()
            for b in (1, 2, 5)})
"""


@pytest.mark.slow
def test_narrower_vectors_give_the_same_bits():
    """A processor with AVX2 and without AVX-512 has such vectors."""
    have = {name for name, present in machine_features()[1].items() if present}
    if not {"avx2", "fma"} <= have:
        pytest.skip("needs a processor with AVX2")
    avx2 = "+avx2,+avx,+fma,+sse4.2,+bmi,+bmi2,+popcnt"
    outputs = []
    for features in (None, avx2):
        narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features} if features else {}
        command = [sys.executable, "-c", _ON_ANOTHER_PROCESSOR]
        environment = {**os.environ, **narrow}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        outputs.append(found.stdout.splitlines())
    assert outputs[1][0] == "8"
    assert outputs[0][1:] == outputs[1][1:]
    assert all(len(line.split()) == 1 for line in outputs[0][1:])
