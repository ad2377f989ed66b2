"""The CUDA graph engine, replayed by a stand-in, and on a GPU if there is one.

The stand-in calls the captured steps again on the same buffers. So these tests cover everything
except the capture: fixed addresses, the counter on the device, several samples per replay, streams
that leave, states in and out.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import test_families
import test_predictive
import torch
from engine_cases import make_gru, make_wavenet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wavear
from wavear import WaveNet, WaveNetConfig
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.cuda import choice, graph
from wavear.generation.cuda.graph import CudaGraphEngine, plain_runner, tensors_of
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine
from wavear.models.base import AutoregressiveModel
from wavear.models.sampling import uniforms

# Nats, for float32 models: the sums of a batch round differently from those of one stream.
TOLERANCE = 1e-4
CHUNK, RUN = 40, 8  # shorter than the engine's default, so that a short test has several


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(graph, "CHUNK", CHUNK)
    monkeypatch.setattr(graph, "RUN", RUN)


def make(family: str) -> tuple[AutoregressiveModel, int]:
    """Return a model and its number of conditioning channels.

    The model is in float64, so that no uniform lies on a boundary between codes.
    """
    if family == "gru":
        return make_gru(channels=12, classes=16).double(), 0
    small: dict[str, Any] = {"residual_channels": 6, "skip_channels": 8, "head_channels": 9}
    if family == "conditioned":
        small |= {"speakers": 2, "kernel_size": 3, "classes": 300}
    model = make_wavenet(gain=3.0, **small)
    return model.double(), 80 if family == "conditioned" else 0


FAMILIES = ["gru", "wavenet", "conditioned"]
every_family = pytest.mark.parametrize(
    "config", test_families.EVERY.values(), ids=test_families.EVERY.keys()
)


@every_family
def test_draws_of_every_family_and_distribution_equal_the_reference(config):
    """In float64, draws, log-probabilities and states equal the reference engine's."""
    model = test_families.make(config)
    cond = test_families.conditioning(model, 2, 61)
    draws = np.stack([uniforms(seed, 0, 61) for seed in (1, 2)])
    found, expected = np.empty((2, 61)), np.empty((2, 61))
    engine, reference = CudaGraphEngine(model, 2), ReferenceEngine(model, 2)
    codes = engine.generate(draws, cond, log_probability=found)
    assert (codes == reference.generate(draws, cond, log_probability=expected)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    for name, tensor in reference.state(1).items():
        torch.testing.assert_close(engine.state(1)[name], tensor, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        CudaGraphEngine(model, 2).score(codes, cond), expected, rtol=1e-8, atol=1e-8
    )


class Counting:
    """Stand-in that counts its captures and replays."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, steps):
        self.captures += 1
        replay = plain_runner(steps)

        def counted():
            self.replays += 1
            replay()

        return counted


def draws(batch: int, samples: int, channels: int = 0) -> tuple[np.ndarray, Tensor | None]:
    uniforms = np.random.default_rng(0).random((batch, samples))
    return uniforms, torch.randn(
        batch, channels, samples, dtype=torch.float64
    ) if channels else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"top_k": 5, "top_p": 0.7, "temperature": 1.5}], ids=str
)
@torch.inference_mode()
def test_codes_and_log_probabilities_equal_the_reference(family, settings):
    model, channels = make(family)
    samples = 2 * RUN + 5
    uniforms, cond = draws(3, samples, channels)
    logs, expected_logs = np.empty((3, samples)), np.empty((3, samples))
    found = CudaGraphEngine(model, 3).generate(uniforms, cond, log_probability=logs, **settings)
    expected = ReferenceEngine(model, 3).generate(
        uniforms, cond, log_probability=expected_logs, **settings
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(logs, expected_logs, atol=TOLERANCE)
    scores = CudaGraphEngine(model, 3).score(expected, cond)
    np.testing.assert_allclose(scores, expected_logs, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_audio_does_not_depend_on_the_cuts_between_calls(family):
    model, channels = make(family)
    samples = CHUNK + RUN + 3
    uniforms, cond = draws(2, samples, channels)
    temperature = np.random.default_rng(1).uniform(0.5, 1.5, (2, samples))
    whole = CudaGraphEngine(model, 2).generate(uniforms, cond, temperature)
    engine = CudaGraphEngine(model, 2)
    cuts = [0, 1, RUN - 1, RUN, 3 * RUN + 2, CHUNK + 1, samples]
    parts = [
        engine.generate(
            uniforms[:, a:b], None if cond is None else cond[:, :, a:b], temperature[:, a:b]
        )
        for a, b in pairwise(cuts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@torch.inference_mode()
def test_constant_conditioning_equals_the_reference():
    model, channels = make("conditioned")
    uniforms, _ = draws(2, RUN + 1)
    cond = torch.randn(2, channels, 1, dtype=torch.float64)
    engine = CudaGraphEngine(model, 2)
    expected = ReferenceEngine(model, 2)
    for part in (cond, cond.flip(0)):  # the captured graph reads the conditioning of each call
        np.testing.assert_array_equal(
            engine.generate(uniforms, part), expected.generate(uniforms, part)
        )


@torch.inference_mode()
def test_a_run_of_samples_is_one_replay_and_captured_once():
    model, _ = make("wavenet")
    runner = Counting()
    engine = CudaGraphEngine(model, 2, runner=runner)
    engine.generate(draws(2, 3 * RUN)[0], None)
    assert (runner.captures, runner.replays) == (1, 3)
    engine.generate(draws(2, 2 * RUN + 4)[0], None, 0.7)  # temperature is an input of the graph
    assert (runner.captures, runner.replays) == (2, 3 + 2 + 4)
    engine.generate(draws(2, RUN)[0], None, top_k=2)
    assert runner.captures == 3
    engine.resized(1).generate(draws(1, RUN)[0], None)
    assert runner.captures == 4


@torch.inference_mode()
def test_no_memory_moves_and_no_step_reads_back():
    """Replays need the same addresses, and a graph cannot read a value back."""
    model, channels = make("conditioned")
    engine = CudaGraphEngine(model, 2)
    uniforms, cond = draws(2, RUN, channels)
    engine.generate(uniforms, cond)

    def addresses() -> list[int]:
        made = engine._codes, engine._scores, engine._previous, engine._clock
        given = engine._uniforms, engine._temperatures, engine._cond[True]
        return [t.data_ptr() for t in (*made, *given, *tensors_of(engine._state))]

    before = addresses()
    engine.generate(uniforms, cond)
    engine.load_state(0, engine.state(1))
    engine.fill(1, np.arange(5), torch.randn(1, channels, 5, dtype=torch.float64))
    assert addresses() == before

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function)  # called by .item(), int() and bool()
            return function(*args, **(kwargs or {}))

    with Asked():
        engine._step(True, False, 3, 0.9, True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_states_resume_on_other_engines_and_return(family):
    model, channels = make(family)
    uniforms, cond = draws(3, 30, channels)

    def part(a: int, b: int, rows: Any = slice(None)):
        return uniforms[rows, a:b], None if cond is None else cond[rows, :, a:b]

    expected = ReferenceEngine(model, 3).generate(uniforms, cond)
    engine = CudaGraphEngine(model, 3)
    np.testing.assert_array_equal(engine.generate(*part(0, 11)), expected[:, :11])
    others: list[Any] = [
        ReferenceEngine(model, 1),
        *([NumbaEngine(model, 1)] if isinstance(model, WaveNet) else []),
    ]
    for other in others:
        other.load_state(0, engine.state(1))
        np.testing.assert_array_equal(
            other.generate(*part(11, 20, slice(1, 2))), expected[1:2, 11:20]
        )
        back = CudaGraphEngine(model, 2)  # at another place, next to a stream that begins
        back.load_state(1, other.state(0))
        rows = [0, 1]
        np.testing.assert_array_equal(back.generate(*part(20, 30, rows))[1], expected[1, 20:])


@torch.inference_mode()
def test_loading_a_stream_leaves_the_others_unchanged():
    model, _ = make("wavenet")
    uniforms, _ = draws(3, 30)
    expected = ReferenceEngine(model, 3).generate(uniforms, None)
    engine = CudaGraphEngine(model, 3)
    beginning = engine.state(0)
    engine.generate(uniforms[:, :17], None)
    engine.load_state(1, beginning)
    mixed = uniforms[:, 17:].copy()
    mixed[1] = uniforms[1, :13]
    found = engine.generate(mixed, None)
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2], 17:])
    np.testing.assert_array_equal(found[1], expected[1, :13])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_ended_streams_leave(family):
    model, channels = make(family)
    uniforms, cond = draws(4, 40, channels)
    expected = ReferenceEngine(model, 4).generate(uniforms, cond)
    engine = CudaGraphEngine(model, 4)
    engine.generate(uniforms[:, :25], None if cond is None else cond[:, :, :25])
    rest = engine.keep([3, 1])
    found = rest.generate(uniforms[[3, 1], 25:], None if cond is None else cond[[3, 1], :, 25:])
    np.testing.assert_array_equal(found, expected[[3, 1], 25:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_stream_moves_past_a_recording(family):
    model, channels = make(family)
    codes = np.random.default_rng(0).integers(0, model.config.classes, 70)
    uniforms, cond = draws(2, 20, channels)
    given = torch.randn(1, channels, 70, dtype=torch.float64) if channels else None
    found, expected = CudaGraphEngine(model, 2), ReferenceEngine(model, 2)
    for engine in (found, expected):
        engine.fill(1, codes, given)
    np.testing.assert_array_equal(found.generate(uniforms, cond), expected.generate(uniforms, cond))


@torch.inference_mode()
def test_weights_changed_in_place_take_effect_at_once():
    model, _ = make("wavenet")
    engine = CudaGraphEngine(model, 1)
    engine.generate(draws(1, RUN)[0], None)
    with torch.no_grad():
        model.state_dict()["head.3.bias"][7] += 1000
    assert (engine.generate(draws(1, RUN)[0], None) == 7).all()


def on_stand_in(monkeypatch) -> None:
    """Let `wavear.generate` and streams run the engine on the CPU, which they refuse."""
    monkeypatch.setattr(
        choice, "make", lambda model, batch, engine, weights: CudaGraphEngine(model, batch)
    )


def test_utterances_of_different_lengths_equal_the_reference(monkeypatch):
    """In `wavear.generate`, shorter utterances leave the batch early."""
    mel = wavear.MelConfig(
        sample_rate=8000, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0
    )
    config = WaveNetConfig(
        layers=2, stacks=1, residual_channels=6, skip_channels=6, sample_rate=8000, mel=mel,
        speakers=2,
    )  # fmt: skip
    model = WaveNet(config).eval()
    monkeypatch.setattr(sys.modules["wavear.generation.progress"].chunks, "__defaults__", (30,))
    mels = [torch.randn(5, frames) for frames in (2, 9, 4, 1)]
    arguments: dict[str, Any] = {
        "seed": [1, 2, 3, 4],
        "speaker": [0, 1, 0, 1],
        "return_log_probability": True,
    }
    expected, expected_logs = wavear.generate(model, mels, engine="reference", **arguments)
    on_stand_in(monkeypatch)
    sizes = []
    keep = CudaGraphEngine.keep
    monkeypatch.setattr(
        CudaGraphEngine, "keep", lambda self, s: sizes.append(len(s)) or keep(self, s)
    )
    found, logs = wavear.generate(model, mels, engine="cuda-graph", **arguments)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logs, expected_logs, rtol=0, atol=TOLERANCE)
    assert sizes == [3, 2, 1]


def test_streams_and_primes_equal_the_reference(monkeypatch):
    model, _ = make("wavenet")
    prime = torch.rand(40) * 2 - 1
    expected = wavear.generate(model, samples=30, prime=prime, best_of=2, engine="reference")
    streamed = wavear.Stream(model, seed=3, engine="reference").pull(50)
    on_stand_in(monkeypatch)
    found = wavear.generate(model, samples=30, prime=prime, best_of=2, engine="cuda-graph")
    assert torch.equal(found, expected)
    batch = wavear.StreamBatch(model, engine="cuda-graph")
    first = batch.add(seed=3)
    batch.pull(first, 20)
    made = [batch.step()[first]]
    other = batch.add(seed=4)
    batch.pull(first, 30)
    batch.pull(other, 12)
    made.append(batch.step()[first])
    assert torch.equal(torch.cat(made), streamed)


@pytest.mark.parametrize("name", ["causal", "kernel 5, two periods"])
@torch.inference_mode()
def test_predictive_states_cuts_and_primes_equal_the_reference(name):
    model = test_predictive.make(test_predictive.CONFIGS[name])
    u, cond = draws(3, 107)[0], test_predictive.conditioning(model, 3, 5)[:, :, :107]
    nats = np.empty((2, 3, 107))
    expected = ReferenceEngine(model, 3).generate(u, cond, 0.8, log_probability=nats[0])
    engine = CudaGraphEngine(model, 3)
    parts = [engine.generate(u[:, a:b], cond[:, :, a:b], 0.8, log_probability=nats[1, :, a:b])
             for a, b in pairwise([0, 1, 53, 107])]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    np.testing.assert_allclose(nats[1], nats[0], rtol=0, atol=1e-9)
    other = ReferenceEngine(model, 1)
    other.load_state(0, engine.state(2))
    back = CudaGraphEngine(model, 2)
    back.load_state(1, other.state(0))
    for key, tensor in engine.state(2).items():
        assert torch.equal(back.state(1)[key], tensor)
    filled, by_steps = CudaGraphEngine(model, 3), CudaGraphEngine(model, 3)
    by_steps.score(expected[:, :60], cond[:, :, :60])
    for stream in range(3):
        filled.fill(stream, expected[stream, :60], cond[stream : stream + 1, :, :60])
    found = filled.keep([2, 0]).generate(u[[2, 0], 60:], cond[torch.tensor([2, 0]), :, 60:], 0.8)
    np.testing.assert_array_equal(found, expected[[2, 0], 60:])
    np.testing.assert_array_equal(
        by_steps.generate(u[:, 60:], cond[:, :, 60:], 0.8), expected[:, 60:]
    )


def test_predictive_streams_equal_the_reference(monkeypatch):
    model = test_predictive.make(test_predictive.small(speakers=2))
    mels = [test_predictive.random_mel(model, 1, frames)[0] for frames in (4, 9)]
    expected = wavear.generate(model, mels, seed=[1, 2], speaker=[0, 1], engine="reference")
    on_stand_in(monkeypatch)
    monkeypatch.setattr(sys.modules["wavear.generation.progress"].chunks, "__defaults__", (30,))
    assert torch.equal(
        wavear.generate(model, mels, seed=[1, 2], speaker=[0, 1], engine="cuda-graph"), expected
    )
    stream = wavear.Stream(model, seed=2, speaker=1, engine="cuda-graph")
    assert torch.equal(
        torch.cat([stream.push(mels[1][:, :6]), stream.push(mels[1][:, 6:]), stream.flush()]),
        expected[1],
    )


@torch.inference_mode()
def test_unusable_arguments_are_refused():
    model, channels = make("conditioned")
    with pytest.raises(ValueError, match="needs a model on a CUDA device, this one is on cpu"):
        make_engine(model, 1, "cuda-graph")
    with pytest.raises(ValueError, match="engine 'triton' cannot run: the model is on cpu"):
        make_engine(model, 1, "triton")
    with pytest.raises(ValueError, match="serves WaveNet, not GRU: use engine 'cuda-graph'"):
        make_engine(make("gru")[0], 1, "triton")
    with pytest.raises(ValueError, match="weights='float16' needs engine 'triton'"):
        make_engine(model, 1, "cuda-graph", weights="float16")
    with pytest.raises(ValueError, match="batch is 0"):
        CudaGraphEngine(model, 0)
    uniforms, cond = draws(2, 5, channels)
    assert cond is not None
    for arguments, message in (
        ((uniforms[:1], cond), r"shape \(1, 5\) for 2 streams"),
        ((uniforms, None), "the model is conditioned"),
        ((uniforms, cond[:, :, :4]), "cond has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            CudaGraphEngine(model, 2).generate(*arguments)
    with pytest.raises(TypeError, match="cannot hold 3"):
        tensors_of({"time": 3})


@torch.inference_mode()
def test_non_finite_logits_are_an_error():
    model, _ = make("wavenet")
    engine = CudaGraphEngine(model, 2)
    engine.generate(draws(2, 3)[0], None)
    with torch.no_grad():
        model.state_dict()["head.3.bias"][3] = torch.nan
    with pytest.raises(ValueError, match="sample 0 of this call are infinite or NaN"):
        engine.generate(draws(2, 3)[0], None)
    with pytest.raises(ValueError, match="infinite or NaN"):
        engine.score(np.zeros((2, 3), np.int64), None)


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_codes_on_a_gpu_equal_the_reference(family):
    model, channels = make(family)
    model = model.float().cuda()
    samples = CHUNK + RUN + 5
    uniforms, cond = draws(3, samples, channels)
    cond = None if cond is None else cond.float().cuda()
    for settings in ({}, {"top_k": 5, "top_p": 0.7, "temperature": 1.5}):
        found = CudaGraphEngine(model, 3).generate(uniforms, cond, **settings)
        expected = ReferenceEngine(model, 3).generate(uniforms, cond, **settings)
        # Once a uniform lies on the boundary between two codes, the sequences diverge.
        assert (found == expected).mean() > 0.5
    logs = ReferenceEngine(model, 3).score(expected, cond)
    np.testing.assert_allclose(
        CudaGraphEngine(model, 3).score(expected, cond), logs, atol=TOLERANCE
    )
    engine = CudaGraphEngine(model, 3)
    first = engine.generate(uniforms[:, :40], None if cond is None else cond[:, :, :40])
    kept = engine.keep([2]).generate(
        uniforms[2:, 40:80], None if cond is None else cond[2:, :, 40:80]
    )
    again = CudaGraphEngine(model, 3).generate(
        uniforms[:, :80], None if cond is None else cond[:, :, :80]
    )
    np.testing.assert_array_equal(again[:, :40], first)
    np.testing.assert_array_equal(kept[0], again[2, 40:])
