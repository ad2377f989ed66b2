"""int8 weights: exactly the model of the dequantised weights, near the model itself, its cost measured."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import wavear
from wavear import WaveNet, WaveNetConfig
from wavear.benchmark import speed
from wavear.generation.cpu.ceiling import cost
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.engines import make_engine

TOLERANCE = 1e-4  # nats: sums of some hundred float32 products round to about 1e-6 of their size


def make(**config) -> WaveNet:
    """A model whose weights are so large that its logits differ, as those of a trained one do."""
    torch.manual_seed(0)
    model = WaveNet(
        WaveNetConfig(
            **{"layers": 4, "stacks": 2, "residual_channels": 16, "skip_channels": 32, **config}
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(2.0)
    return model.eval()


def dequantised(model: WaveNet) -> WaveNet:
    """By definition: of every output of a matrix (of every tap of a convolution) the largest magnitude is 127 steps.

    Written here once more, in float64, so that a fault in the packing is none in what it is
    compared with.
    """
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith(("blocks", "head")):
            taps = model.config.kernel_size if "dilated" in name else 1
            matrices = parameter.detach().numpy().reshape(len(parameter), taps, -1)
            step = (np.abs(matrices).max(axis=2, keepdims=True) / np.float32(127)).astype(
                np.float64
            )
            numbers = np.rint(matrices / np.where(step > 0, step, 1).astype(np.float32))
            parameter.data.copy_(torch.from_numpy(numbers * step).reshape(parameter.shape))
    return model


@torch.inference_mode()
def parallel(model: WaveNet, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
    """Log-probabilities (B, T) of codes by the model's forward pass."""
    given = torch.from_numpy(codes)
    logs = torch.log_softmax(model(given, cond).double(), dim=1)
    return logs.gather(1, given[:, None])[:, 0].numpy()


def inputs(model: WaveNet, batch: int, samples: int) -> tuple[np.ndarray, Tensor | None]:
    codes = np.random.default_rng(0).integers(0, model.config.classes, (batch, samples))
    return codes, torch.randn(
        batch, model.config.conditioning_channels, samples
    ) if model.conditioned else None


small = st.integers(1, 40)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    stacks=st.integers(1, 3),
    depth=st.integers(1, 7),
    kernel=st.integers(2, 5),
    residual=small,
    skip=small,
    head=small,
    classes=st.sampled_from([2, 3, 17, 256, 1024, 5003]),
    speakers=st.sampled_from([0, 3]),
    channels=small,
    batch=st.sampled_from([1, 2, 3, 5, 13, 30]),
    samples=st.integers(1, 150),
    threads=st.sampled_from([1, 2]),
)
@example(3, 8, 2, 64, 128, 256, 256, 3, 80, 1, 700, 1)
@example(2, 5, 3, 128, 96, 100, 512, 3, 31, 7, 150, 2)
@example(2, 5, 3, 33, 47, 29, 50, 3, 31, 1, 150, 2)
@example(1, 1, 2, 1, 1, 1, 2, 0, 1, 1, 5, 1)
def test_scores_equal_the_forward_pass_of_the_dequantised_weights(
    stacks,
    depth,
    kernel,
    residual,
    skip,
    head,
    classes,
    speakers,
    channels,
    batch,
    samples,
    threads,
):
    model = make(
        layers=stacks * depth, stacks=stacks, kernel_size=kernel, residual_channels=residual, skip_channels=skip,
        head_channels=head, classes=classes, speakers=speakers, conditioning_channels=channels,
    )  # fmt: skip
    codes, cond = inputs(model, batch, samples)
    found = NumbaEngine(model, batch, weights="int8", threads=threads).score(codes, cond)
    expected = parallel(dequantised(model), codes, cond)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_channels_of_zeros_stay_zero(batch):
    model = make(speakers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")) and parameter.dim() == 2:
                parameter[::3] = 0
        model.blocks[1].dilated.weight.zero_()
    codes, cond = inputs(model, batch, 60)
    found = NumbaEngine(model, batch, weights="int8").score(codes, cond)
    np.testing.assert_allclose(found, parallel(dequantised(model), codes, cond), atol=TOLERANCE)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_an_error(batch, wrong):
    model = make()
    with torch.no_grad():
        model.state_dict()["head.3.weight"][7, 3] = wrong
    with pytest.raises(ValueError, match="infinite or NaN"):
        NumbaEngine(model, batch, weights="int8").generate(np.full((batch, 10), 0.5), None)


def test_the_model_itself_is_near_and_is_not_touched():
    model = make(kernel_size=3, speakers=2)
    before = copy.deepcopy(model.state_dict())
    codes, cond = inputs(model, 2, 200)
    found = NumbaEngine(model, 2, weights="int8").score(codes, cond)
    error = np.abs(found - parallel(model, codes, cond)).max()
    assert 1e-3 < error < 0.2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_past_given_in_parallel_is_the_past_stepped_through():
    """`fill` runs the model of the dequantised weights."""
    model = make(kernel_size=3, speakers=2, residual_channels=21)
    codes, cond = inputs(model, 1, 90)
    assert cond is not None
    with torch.inference_mode():
        stepped, filled = (NumbaEngine(model, 1, weights="int8") for _ in range(2))
        stepped.score(codes[:, :50], cond[:, :, :50])
        filled.fill(0, codes[0, :50], cond[:, :, :50])
        for name, tensor in stepped.state(0).items():
            torch.testing.assert_close(filled.state(0)[name], tensor, rtol=0, atol=1e-5)
        found, expected = (
            engine.score(codes[:, 50:], cond[:, :, 50:]) for engine in (filled, stepped)
        )
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_same_audio_from_generate_and_a_stream_and_another_law_than_float32():
    model = make()
    whole = wavear.generate(model, weights="int8", samples=300, seed=3)
    stream = wavear.Stream(model, weights="int8", seed=3)
    assert torch.equal(torch.cat([stream.pull(n) for n in (1, 99, 200)]), whole[0])
    together = wavear.generate(model, weights="int8", samples=300, seed=[1, 2, 3])
    assert torch.equal(together[2], whole[0])
    waveform = wavear.generate(model, samples=300, seed=3)
    exact, rounded = (
        wavear.score(model, waveform, engine="numba", weights=w) for w in ("float32", "int8")
    )
    assert not torch.equal(exact, rounded)
    assert stream.description == "numba with int8 weights"


def test_only_the_compiled_engine_serves_it():
    for engine in ("reference", "auto"):
        model = make() if engine == "reference" else make().to(torch.device("meta"))
        with pytest.raises(ValueError, match="needs engine 'numba'"):
            make_engine(model, 1, engine, weights="int8")


def test_a_byte_for_every_weight_and_a_scale_for_every_output():
    config = WaveNetConfig(layers=2, stacks=1, kernel_size=3, residual_channels=8, skip_channels=9, head_channels=10,
                           classes=16)  # fmt: skip
    outputs = 2 * 3 * 16 + 8 + 2 * 9 + 10 + 16  # taps, one residual, skips, head
    asked, whole = cost(config, "int8"), cost(config)
    assert asked.multiply_adds == whole.multiply_adds
    assert asked.weight_bytes == whole.weight_bytes // 4 + 4 * outputs
    # One layer is a table, and the other's two past taps are read every second sample.
    assert asked.hot_bytes == 8 * 16 + 4 * 16 + (8 * 16 + 4 * 16) + 8 * 8 + 4 * 8 + 2 * (
        8 * 9 + 4 * 9
    ) + (9 * 10 + 4 * 10 + 10 * 16 + 4 * 16)


def test_bench_measures_its_cost():
    model = make()
    found = speed.measure(model, "numba", weights="int8", seconds=0.01)
    rounded = speed.measure(model, "numba", weights="bfloat16", seconds=0.01)
    assert rounded.error < found.error < 0.2
    # What is lost on audio drawn from the model is the divergence of the laws: zero or more, but
    # for the noise.
    assert -1e-3 < found.cost < 0.01
    assert f"{found.cost:+.5f}" in speed.table([found])
