"""The GRU on the CPU engine against its forward and the reference loop, and against itself, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavear import GRU, GRUConfig, Stream, generate
from wavear.benchmark import speed
from wavear.generation.cpu.ceiling import Ceiling
from wavear.generation.cpu.gru import NumbaGRUEngine
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine

# Nats. Sums of some hundred float32 products round to about 1e-6 of their size.
TOLERANCE = 1e-4


def make(seed: int = 0, **config) -> GRU:
    """A model whose head is so large that its logits differ, as those of a trained one do."""
    large = 4.0 if config.get("law", "categorical") == "categorical" else 1.0
    torch.manual_seed(seed)
    model = GRU(
        GRUConfig(
            **{"layers": 2, "channels": 24, "head_channels": 20, "input_channels": 10, **config}
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("gru", "head")):
                parameter.mul_(1.5 if name.startswith("gru") else large)
    return model.eval()


def conditioning(model: GRU, batch: int, samples: int) -> Tensor | None:
    return (
        torch.randn(batch, model.config.conditioning_channels, samples)
        if model.conditioned
        else None
    )


def piece(cond: Tensor | None, start: int, stop: int) -> Tensor | None:
    return cond if cond is None or cond.shape[2] == 1 else cond[:, :, start:stop]


@torch.inference_mode()
def parallel(model: GRU, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
    """Log-probabilities (B, T) of codes by the model's forward pass."""
    given = torch.from_numpy(codes)
    return model.law.log_prob(model(given, cond).double(), given).numpy()


def random_codes(model: GRU, batch: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.classes, (batch, samples))


def random_uniforms(batch: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, samples))


small = st.integers(1, 40)


# Shrinking a failure takes minutes; the example found says enough.
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    layers=st.integers(1, 3),
    channels=small,
    inputs=small,
    head=small,
    classes=st.sampled_from([2, 3, 17, 256, 1024, 5003]),
    speakers=st.sampled_from([0, 3]),
    conditions=small,
    batch=st.sampled_from([1, 2, 3, 5, 13, 30]),
    samples=st.integers(1, 150),
    cut=st.integers(0, 150),
    constant=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(1, 256, 128, 256, 256, 3, 80, 1, 500, 333, False, 1)
@example(2, 96, 31, 100, 5003, 3, 31, 7, 150, 1, False, 2)
@example(1, 1, 1, 1, 2, 0, 1, 1, 5, 2, False, 1)
def test_scores_equal_the_forward_pass(
    layers,
    channels,
    inputs,
    head,
    classes,
    speakers,
    conditions,
    batch,
    samples,
    cut,
    constant,
    threads,
):
    model = make(
        layers=layers, channels=channels, input_channels=inputs, head_channels=head, classes=classes,
        speakers=speakers, conditioning_channels=conditions,
    )  # fmt: skip
    codes = random_codes(model, batch, samples)
    cond = conditioning(model, batch, 1 if constant else samples)
    engine = NumbaGRUEngine(model, batch, threads=min(threads, batch))
    cut = min(cut, samples)
    found = [
        engine.score(codes[:, a:b], piece(cond, a, b))
        for a, b in ((0, cut), (cut, samples))
        if b > a
    ]
    expected = parallel(model, codes, None if cond is None else cond.expand(-1, -1, samples))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=TOLERANCE, rtol=1e-6)


# Of laws over values: what the network puts out is in units of full scale, and a code is narrower
# than float32's rounding of the sum that makes a mean is small, so the error counts in deviations.
# They are about e^-2 and e^-3 here.
VALUES = [
    {"law": "logistic_mixture", "mixtures": 3, "speakers": 2},
    {"law": "logistic_mixture", "mixtures": 10, "layers": 1, "coarse_classes": 64},
    {"law": "gaussian", "classes": 512, "coarse_classes": 3, "speakers": 2},
    {"law": "gaussian", "layers": 1},
    {"law": "laplace", "classes": 256},
]
values = pytest.mark.parametrize(
    "config", VALUES, ids=["mixture", "10, coarse", "512, coarse", "gaussian", "laplace"]
)


def near_codes(model: GRU, batch: int, samples: int) -> np.ndarray:
    """Codes about silence, where the laws of fresh models are."""
    classes = model.config.classes
    levels = np.random.default_rng(0).normal(0, 0.1, (batch, samples))
    return np.clip(np.round(levels * classes / 2).astype(np.int64) + classes // 2, 0, classes - 1)


@values
@pytest.mark.parametrize("batch", [1, 5])
def test_scores_of_laws_over_values_equal_the_forward_pass(config, batch):
    model = make(**config)
    codes, cond = near_codes(model, batch, 150), conditioning(model, batch, 150)
    codes[0, [3, 60]] = 0, model.config.classes - 1
    engine = NumbaGRUEngine(model, batch)
    found = [engine.score(codes[:, a:b], piece(cond, a, b)) for a, b in ((0, 70), (70, 150))]
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), parallel(model, codes, cond), atol=TOLERANCE, rtol=1e-5
    )


@values
def test_draws_of_laws_over_values_are_those_of_the_law(config):
    """Of the law that the forward pass gives at each sample, the value that the uniform selects, to a code."""
    model = make(**config)
    uniforms, cond = random_uniforms(3, 400), conditioning(model, 3, 400)
    temperature = np.where(np.arange(400) < 200, 0.6, 1.0)[None].repeat(3, axis=0)
    nats = np.empty((3, 400))
    found = NumbaGRUEngine(model, 3).generate(uniforms, cond, temperature, log_probability=nats)
    with torch.inference_mode():
        parameters = model(torch.from_numpy(found), cond).double()
        draws = [
            model.law.sample(
                parameters[:, :, t],
                torch.from_numpy(uniforms[:, t]),
                torch.from_numpy(temperature[:, t]),
            )
            for t in range(400)
        ]
        law = torch.stack(draws, dim=1).numpy()
    off = np.abs(found - law)
    # float32 moves a mean by about 1e-7 of full scale: of the codes of 16 bits, 3e-5 wide, some in
    # a thousand are at an edge. Where a uniform falls to the very end of a mixture's component, its
    # value hangs on the last bits.
    assert (off > 1).mean() < 0.003
    assert (off == 0).mean() > 0.98
    assert len(np.unique(found)) > 50
    np.testing.assert_allclose(nats, parallel(model, found, cond), atol=TOLERANCE, rtol=1e-5)
    with pytest.raises(ValueError, match="categorical"):
        NumbaGRUEngine(model, 3).generate(uniforms, cond, top_k=3)


def assert_codes_follow(
    model: GRU, codes: np.ndarray, uniforms: np.ndarray, cond: Tensor | None, tolerance: float
):
    """Every code is the one its uniform selects from the law of the forward pass, or the uniform lies within
    `tolerance` of a boundary between the two."""
    with torch.inference_mode():
        law = (
            torch.softmax(model(torch.from_numpy(codes), cond).double(), dim=1)
            .cumsum(dim=1)
            .numpy()
        )
    upper = np.take_along_axis(law, codes[:, None], axis=1)[:, 0]
    lower = np.take_along_axis(law, np.maximum(codes - 1, 0)[:, None], axis=1)[:, 0] * (codes > 0)
    assert (uniforms >= lower - tolerance).all()
    assert (uniforms < upper + tolerance).all()


@pytest.mark.parametrize(
    "config",
    [{"layers": 1, "channels": 64}, {"layers": 3, "channels": 21, "speakers": 2, "classes": 1024}],
    ids=["one layer", "three layers, conditioned, 1024 classes"],
)
def test_free_running_codes_equal_the_reference(config):
    model = make(**config)
    batch, samples = 2, 1500
    uniforms, cond = random_uniforms(batch, samples), conditioning(model, batch, samples)
    with torch.inference_mode():
        found = NumbaGRUEngine(model, batch).generate(uniforms, cond)
        expected = ReferenceEngine(model, batch).generate(uniforms, cond)
    # Rounding moves a boundary by about 1e-7; a uniform that near selects another code, and then
    # another future.
    assert_codes_follow(model, found, uniforms, cond, 1e-5)
    for row in range(batch):
        # The first code that differs: the reference's, too, is within tolerance of being drawn.
        differ = np.flatnonzero(found[row] != expected[row])
        part = slice(0, differ[0] + 1 if differ.size else samples)
        rows = slice(row, row + 1)
        assert_codes_follow(
            model,
            expected[rows, part],
            uniforms[rows, part],
            None if cond is None else cond[rows, :, part],
            1e-5,
        )
    assert (found == expected).mean() > 0.5
    assert len(np.unique(found)) > 20


GROUPINGS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (5, 2), (12, 1), (13, 1), (29, 2), (75, 2)]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers": 1, "channels": 37, "speakers": 2},
        {"classes": 5000, "layers": 3},
        {"law": "logistic_mixture", "mixtures": 3, "coarse_classes": 20, "speakers": 2},
    ],
)
def test_a_stream_has_the_same_bits_in_every_batch_grouping_and_cut(config, weights):
    model = make(**config)
    samples, most = 120, max(batch for batch, _ in GROUPINGS)
    uniforms, codes = random_uniforms(most, samples), random_codes(model, most, samples)
    cond = conditioning(model, most, samples)
    temperatures = np.random.default_rng(1).uniform(0.5, 1.5, (most, samples))
    generated, scored = {}, {}
    for number, (batch, threads) in enumerate(GROUPINGS):
        # Other streams in other places: every seventh, beginning with the number of the grouping.
        chosen = (np.arange(batch) * 7 + number) % most
        cuts = [0, *sorted({1, 17 + number, 64, 64 + 3 * number}), samples]
        rows = None if cond is None else cond[chosen]
        runner = NumbaGRUEngine(model, batch, weights=weights, threads=threads)
        scorer = NumbaGRUEngine(model, batch, weights=weights, threads=threads)
        found, scores = [], []
        for start, stop in pairwise(cuts):
            part = slice(start, stop)
            found.append(
                runner.generate(
                    uniforms[chosen, part], piece(rows, start, stop), temperatures[chosen, part]
                )
            )
            scores.append(scorer.score(codes[chosen, part], piece(rows, start, stop)))
        for place, stream in enumerate(chosen):
            generated.setdefault(stream, set()).add(np.concatenate(found, axis=1)[place].tobytes())
            scored.setdefault(stream, set()).add(np.concatenate(scores, axis=1)[place].tobytes())
    assert len(generated) == most
    assert all(len(found) == 1 for found in generated.values())
    assert all(len(found) == 1 for found in scored.values())


def test_constant_conditioning_has_the_bits_of_the_same_for_every_sample():
    model = make(speakers=2)
    cond, codes = torch.randn(3, model.config.conditioning_channels, 1), random_codes(model, 3, 140)
    constant = NumbaGRUEngine(model, 3).score(codes, cond)
    repeated = NumbaGRUEngine(model, 3).score(codes, cond.expand(-1, -1, 140))
    np.testing.assert_array_equal(constant, repeated)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights_are_those_of_a_model_with_rounded_matrices(weights):
    """Of what a sample reads: all but the first layer's input, which is a table."""
    model = make(speakers=2)
    codes, cond = random_codes(model, 2, 80), torch.randn(2, model.config.conditioning_channels, 80)
    found = NumbaGRUEngine(model, 2, weights=weights).score(codes, cond)
    assert np.abs(found - NumbaGRUEngine(model, 2).score(codes, cond)).max() > 1e-3
    names = [
        "gru.weight_hh_l0",
        "gru.weight_ih_l1",
        "gru.weight_hh_l1",
        "head.first.weight",
        "head.last.weight",
    ]
    with torch.no_grad():
        for name in names:
            matrix = model.get_parameter(name)
            if weights == "bfloat16":
                matrix.copy_(matrix.bfloat16().float())
            else:
                step = matrix.abs().amax(dim=1, keepdim=True) / 127
                matrix.copy_(torch.round(matrix / step) * step)
    exact = NumbaGRUEngine(model, 2).score(codes, cond)
    if weights == "bfloat16":
        np.testing.assert_array_equal(found, exact)
    else:  # a scale multiplies the sum instead of each weight
        np.testing.assert_allclose(found, exact, atol=TOLERANCE)


def test_temperature_top_k_and_top_p_are_those_of_the_reference():
    model, uniforms = make(), random_uniforms(1, 200)
    temperature = np.where(np.arange(200) < 100, 0.25, 2.0)[None]
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 9, "top_p": 0.6},
    )
    for options in cases:
        scores = np.empty((2, 1, 200))
        with torch.inference_mode():
            found = NumbaGRUEngine(model, 1).generate(
                uniforms, None, temperature, log_probability=scores[0], **options
            )
            expected = ReferenceEngine(model, 1).generate(
                uniforms, None, temperature, log_probability=scores[1], **options
            )
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores[0], scores[1], atol=TOLERANCE)


@pytest.mark.parametrize("speakers", [0, 2])
def test_the_state_goes_on_on_any_engine(speakers):
    model = make(speakers=speakers)
    uniforms, cond = random_uniforms(3, 150), conditioning(model, 3, 150)
    with torch.inference_mode():
        numba, reference = NumbaGRUEngine(model, 3), ReferenceEngine(model, 3)
        whole = numba.generate(uniforms, cond)
        np.testing.assert_array_equal(whole, reference.generate(uniforms, cond))
        first = NumbaGRUEngine(model, 3)
        first.generate(uniforms[:, :70], piece(cond, 0, 70))
        for other in (
            NumbaGRUEngine(model, 3, threads=1),
            first.resized(3),
            ReferenceEngine(model, 3),
        ):
            for place, stream in enumerate((2, 0, 1)):
                other.load_state(place, first.state(stream))
            order = [2, 0, 1]
            rest = other.generate(
                uniforms[order, 70:], None if cond is None else cond[order, :, 70:]
            )
            np.testing.assert_array_equal(rest, whole[order, 70:])
        # What the reference exports the engine reads, and the formats are one.
        found, expected = numba.state(1), reference.state(1)
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
            n: (t.shape, t.dtype) for n, t in expected.items()
        }
        torch.testing.assert_close(found["h"], expected["h"], rtol=0, atol=1e-5)
        second = NumbaGRUEngine(model, 1)
        second.load_state(0, expected)
        after = ReferenceEngine(model, 1)
        after.load_state(0, expected)
        codes = random_codes(model, 1, 40)
        np.testing.assert_allclose(
            second.score(codes, None if cond is None else cond[:1, :, :40]),
            after.score(codes, None if cond is None else cond[:1, :, :40]),
            atol=TOLERANCE,
        )


def test_a_state_is_a_copy():
    model = make()
    engine = NumbaGRUEngine(model, 2)
    engine.generate(random_uniforms(2, 20), None)
    state = engine.state(1)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    engine.generate(random_uniforms(2, 20), None)
    assert all(bool((state[name] == kept[name]).all()) for name in kept)
    assert not bool((engine.state(1)["h"] == kept["h"]).all())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_filling_is_scoring(weights):
    model = make(speakers=2)
    codes, cond = (
        random_codes(model, 2, 300),
        torch.randn(2, model.config.conditioning_channels, 300),
    )
    with torch.inference_mode():
        filled, scored = (NumbaGRUEngine(model, 2, weights=weights) for _ in range(2))
        for stream in range(2):
            filled.fill(stream, codes[stream, :200], cond[stream : stream + 1, :, :200])
        scored.score(codes[:, :200], cond[:, :, :200])
        torch.testing.assert_close(filled.state(1)["h"], scored.state(1)["h"], rtol=0, atol=1e-5)
        rest = [engine.score(codes[:, 200:], cond[:, :, 200:]) for engine in (filled, scored)]
        np.testing.assert_allclose(rest[0], rest[1], atol=TOLERANCE)


def test_weights_changed_in_place_loaded_or_swapped_are_the_ones_used():
    model, other = make(seed=0), make(seed=1)
    codes = random_codes(model, 1, 30)

    def agrees() -> bool:
        return (
            np.abs(NumbaGRUEngine(model, 1).score(codes, None) - parallel(model, codes, None)).max()
            < TOLERANCE
        )

    assert agrees()
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: [parameter.data.mul_(1.1) for parameter in model.parameters()],
    ):
        before = NumbaGRUEngine(model, 1).score(codes, None)
        change()
        assert np.abs(NumbaGRUEngine(model, 1).score(codes, None) - before).max() > 1e-3
        assert agrees()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision(precision):
    model = make(speakers=2).to(precision)
    codes, cond = (
        random_codes(model, 1, 40),
        torch.randn(1, model.config.conditioning_channels, 40).to(precision),
    )
    found = NumbaGRUEngine(model, 1).score(codes, cond)
    np.testing.assert_allclose(found, parallel(model.float(), codes, cond.float()), atol=TOLERANCE)


def test_what_cannot_be_run_is_refused_by_name():
    model = make(speakers=2)
    channels = model.config.conditioning_channels
    cond = torch.zeros(2, channels, 10)
    for batch, condition, weights, message in (
        (2, cond, "int4", "int4"),
        (0, cond, "float32", "batch is 0"),
        (3, cond, "float32", "for 3 streams"),
        (2, None, "float32", "conditioned"),
        (2, cond[:, :-1], "float32", f"expected \\(2, {channels}, 10\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            NumbaGRUEngine(model, batch, weights=weights).generate(np.zeros((2, 10)), condition)
    with pytest.raises(ValueError, match="expected 0 to 255"):
        NumbaGRUEngine(model, 2).score(np.full((2, 10), 256), cond)
    with pytest.raises(ValueError, match="reference"):
        NumbaGRUEngine(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_logits_that_are_no_numbers_are_an_error(batch):
    model = make()
    with torch.no_grad():
        model.gru.get_parameter("bias_hh_l1")[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        NumbaGRUEngine(model, batch).generate(random_uniforms(batch, 10), None)


def test_auto_takes_it_on_the_cpu():
    model = make()
    assert make_engine(model, 1)[0] == "numba"
    assert isinstance(make_engine(model, 2, weights="bfloat16")[1], NumbaGRUEngine)


def test_a_stream_is_the_recording():
    model = make(speakers=2)
    whole = generate(model, samples=3000, speaker=1, seed=5)[0]
    stream = Stream(model, seed=5, speaker=1)
    parts = [stream.pull(n) for n in (1, 700, 1300)]
    later = Stream.load(model, stream.state())
    np.testing.assert_array_equal(torch.cat([*parts, later.pull(999)]).numpy(), whole.numpy())


def test_wavear_bench_measures_it():
    model = make(speakers=2, layers=1)
    exact = speed.measure(
        model, batch=2, seconds=0.01, ceiling=Ceiling(1e9, {1000: 1e9, 10**8: 1e9})
    )
    rounded = speed.measure(model, weights="int8", seconds=0.01)
    assert exact.error < 1e-4 < rounded.error < 1
    assert exact.share is not None
    assert exact.share > 0


def test_other_threads_run_meanwhile():
    """The loop over samples holds no lock of the interpreter."""
    model: Any = make(channels=200, layers=2)
    engine = NumbaGRUEngine(model, 1, threads=1)
    engine.generate(random_uniforms(1, 10), None)
    turns, done = [0], threading.Event()
    runner = threading.Thread(
        target=lambda: (engine.generate(random_uniforms(1, 20000), None), done.set())
    )
    runner.start()
    while not done.is_set():
        turns[0] += 1
    runner.join()
    # With the lock held this thread would get a turn before the call and one after it.
    assert turns[0] > 1000


_ON_ANOTHER_PROCESSOR = """
import numpy as np
import torch
from wavear.generate import _simd
from wavear.generation.cpu.gru import NumbaGRUEngine
from wavear.generation.cpu.gru_loop import kernels
from wavear.models.gru import GRU, GRUConfig
assert kernels.cache_info().currsize == 0  # importing compiles nothing
torch.manual_seed(0)
model = GRU(GRUConfig(layers=2, channels=24, head_channels=20, speakers=2, conditioning_channels=7))
codes = np.random.default_rng(0).integers(0, 256, (5, 40))
cond = torch.randn(5, 7, 40)
scores = [NumbaGRUEngine(model, b).score(codes[:b], cond[:b])[0] for b in (1, 2, 5)]
print(_simd.LANES, *(row.tobytes().hex() for row in scores))
"""


def test_narrower_vectors_give_the_same_bits():
    """As on a processor with AVX2 and without AVX-512. (Compiles once, then comes from the cache.)"""
    from wavear.generation.cpu.simd import machine_features

    outputs = []
    narrow = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2,+bmi,+bmi2,+popcnt",
    }
    if not all(machine_features()[1].get(name) for name in ("avx2", "fma")):
        pytest.skip("needs a processor with AVX2")
    for environment in ({}, narrow):
        command = [sys.executable, "-c", _ON_ANOTHER_PROCESSOR]
        result = subprocess.run(command, capture_output=True, text=True, check=True,
                                env={**os.environ, **environment})  # fmt: skip
        outputs.append(result.stdout.split())
    assert outputs[1][0] == "8"
    assert len({row for found in outputs for row in found[1:]}) == 1
