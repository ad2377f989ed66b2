"""The predictive WaveNet on the CPU engine: distribution, streams, states, primes."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import test_predictive
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_predictive import random_codes, random_mel, small

import wavear
from wavear import Stream, StreamBatch, generate, score
from wavear.generation.cpu.predictive import NumbaPredictiveEngine
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine
from wavear.generation.settings import candidate_seeds
from wavear.models.sampling import uniforms

# In nats. Sums of about ten float32 products round to 1e-7 of their size.
TOLERANCE = 1e-5
HOP = 24
WIDE = {
    "residual_channels": 20,
    "skip_channels": 33,
    "head_channels": 18,
    "mixtures": 6,
    "layers": 3,
}

CONFIGS = {
    "kernel 3": small(),
    "kernel 2, wider than a vector": small(kernel_size=2, **WIDE),
    "kernel 5, two periods": small(kernel_size=5, period_layers=2),
    "no period": small(period_layers=0, residual_channels=16),
    "causal, speakers": small(causal=True, speakers=3, **WIDE),
    "hop that sub-frames do not divide": small(hop=25, sub_frames=4),
    "44.1 kHz": small(44100, 110, **test_predictive.AUTOMATIC),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
few = settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
ROUNDED = ["float32", "bfloat16", "int8"]
ENGINES = [("reference", "float32"), *(("numba", weights) for weights in ROUNDED)]


def make(config: Any = CONFIGS["kernel 3"], dtype: torch.dtype = torch.float32) -> Any:
    return test_predictive.make(config, dtype)


def conditioning(model: Any, batch: int, samples: int) -> Any:
    frames = -(-samples // model.config.mel.hop_length)
    return test_predictive.conditioning(model, batch, frames)[:, :, :samples]


def codes_of(model: Any, batch: int, samples: int) -> np.ndarray:
    codes = random_codes(model, batch, samples).numpy()
    # Clipped residuals, and the ends of the grid.
    codes[:, samples // 2] = 0, 65535, 32768, 1000, 60000
    return codes


def draws(batch: int, samples: int) -> np.ndarray:
    return np.stack([uniforms(seed, 0, samples) for seed in range(batch)])


@torch.inference_mode()
def parallel(model: Any, codes: np.ndarray, cond: Any) -> np.ndarray:
    given = torch.from_numpy(codes)
    return model.law.log_prob(model(given, cond).double(), given).numpy()


# ---- against the reference


@configs
def test_scores_equal_forward_for_any_cuts(config):
    model = make(config)
    codes, cond = codes_of(model, 5, 311), conditioning(model, 5, 311)
    engine = NumbaPredictiveEngine(model, 5, threads=1)
    cuts = pairwise([0, 1, 2, 100, 311])
    found = [engine.score(codes[:, a:b], cond[:, :, a:b]) for a, b in cuts]
    # Unlikely samples cost many nats, so the tolerance is relative: 1e-6.
    np.testing.assert_allclose(
        np.concatenate(found, axis=1), parallel(model, codes, cond), atol=TOLERANCE, rtol=1e-6
    )


@configs
def test_the_same_uniforms_select_the_codes_of_the_reference(config):
    """Each uniform selects its code from the distribution of forward, to a step of the grid."""
    model = make(config)
    with torch.inference_mode():
        u, cond = draws(1, 300), conditioning(model, 1, 300)
        temperature = np.where(np.arange(300) < 150, 0.7, 1.0)[None]
        nats = np.empty((2, 1, 300))
        found = NumbaPredictiveEngine(model, 1).generate(
            u, cond, temperature, log_probability=nats[0]
        )
        expected = ReferenceEngine(model, 1).generate(u, cond, temperature, log_probability=nats[1])
        parameters = model(torch.from_numpy(found), cond).double()
        law = [
            model.law.sample(
                parameters[:, :, t], torch.from_numpy(u[:, t]), torch.from_numpy(temperature[:, t])
            )
            for t in range(300)
        ]
    off = np.abs(found - torch.stack(law, dim=1).numpy())
    assert off.max() <= 1
    assert (off == 0).mean() > 0.98
    # float32 moves a mean by about 1e-7 of full scale. Once in a few hundred samples a uniform
    # lies that near to an edge of a code; from then on the pasts differ by a step of the grid.
    same = (found == expected).cumprod(axis=1)
    assert same.mean() > 0.3
    np.testing.assert_allclose(nats[0][same == 1], nats[1][same == 1], atol=1e-4)
    np.testing.assert_allclose(nats[0], parallel(model, found, cond), atol=TOLERANCE, rtol=1e-6)
    assert len(np.unique(found)) > 100


def test_scores_do_not_depend_on_the_chunks_of_the_parallel_pass(monkeypatch):
    model = make(CONFIGS["kernel 3"], torch.float64)
    waveform, mel = model.grid.decode(random_codes(model, 1, 700)), random_mel(model, 1, 30)
    whole = score(model, waveform, mel)
    monkeypatch.setattr(sys.modules["wavear.generation.scoring"], "PARALLEL_CHUNK", 61)
    torch.testing.assert_close(score(model, waveform, mel), whole, rtol=1e-9, atol=1e-9)


def rounded_in_int8(model: Any) -> Any:
    """Return the network of int8 by its definition: rounded weights, and inputs of the layers."""
    model = copy.deepcopy(model)

    def round_inputs(matrix: Any, steps: int) -> None:
        matrix.register_forward_pre_hook(
            lambda _, x: (x[0] * steps).clamp(-32767, 32767).round() / steps
        )

    with torch.no_grad():
        for name, matrix in model.named_parameters():
            if matrix.dim() == 2 and not name.startswith("conditioning."):
                step = matrix.abs().amax(dim=1, keepdim=True) / 127
                matrix.copy_((matrix / step).round() * step)
    for block in model.blocks:
        round_inputs(block.taps, 2**10)
        if block.residual is not None:
            round_inputs(block.residual, 2**15)
    round_inputs(model.skip, 2**15)
    return model


@configs
@torch.inference_mode()
def test_int8_equals_the_network_of_rounded_weights_and_activations(config):
    model = make(config)
    rounded = rounded_in_int8(model)
    codes, cond = random_codes(model, 3, 400).numpy(), conditioning(model, 3, 400)
    scores = NumbaPredictiveEngine(model, 3, weights="int8").score(codes, cond)
    expected = parallel(rounded, codes, cond)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE, rtol=5e-6)
    for block in (rounded.skip, *(block.taps for block in rounded.blocks)):
        block._forward_pre_hooks.clear()
    off, without = (
        np.abs(found - scores).mean() for found in (expected, parallel(rounded, codes, cond))
    )
    assert without > 5 * off  # so that rounded activations are what is tested


@configs
@torch.inference_mode()
def test_int8_selects_the_codes_of_the_network_of_rounded_weights_and_activations(config):
    model = make(config)
    u, cond = draws(3, 150), conditioning(model, 3, 150)
    found = NumbaPredictiveEngine(model, 3, weights="int8").generate(u, cond)
    expected = ReferenceEngine(rounded_in_int8(model), 3).generate(u, cond)
    # Where a uniform lies on an edge between codes the pasts differ from then on by a step.
    same = (found == expected).cumprod(axis=1)
    assert (same.sum(axis=1) >= 30).all()
    assert same.mean() > 0.6
    assert np.abs(found - expected).max() < 30


def test_a_mel_of_silence_gives_finite_quiet_audio():
    """In digital silence the scale is a step of the grid, and nothing divides by zero."""
    model = make()
    mel = wavear.log_mel(torch.zeros(1, 15 * HOP), model.config.mel)
    for engine in ("numba", "reference"):
        audio = generate(model, mel, engine=engine)
        assert torch.isfinite(audio).all()
        assert audio.abs().max() < 0.02


# ---- bit for bit


@few
@given(
    cuts=st.lists(st.integers(0, 30), max_size=6),
    causal=st.booleans(),
    speakers=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    engine=st.sampled_from(ENGINES),
)
@example([1, 2, 3, 4, 5, 6, 7], True, False, 1, ("numba", "float32"))
@example([0, 0, 13, 30], False, True, 2, ("numba", "int8"))
@example([5, 6], False, False, 3, ("reference", "float32"))
def test_the_parts_of_a_stream_equal_the_whole(cuts, causal, speakers, seed, engine):
    model = make(small(causal=causal, speakers=2 if speakers else 0))
    frames = 7 if engine[0] == "reference" else 30
    mel = random_mel(model, 1, frames)[0]
    given: dict[str, Any] = {"seed": seed, "speaker": 1 if speakers else None, "temperature": 0.9}
    given |= {"engine": engine[0], "weights": engine[1]}
    whole = generate(model, mel, **given)[0]
    stream = Stream(model, **given)
    bounds = [0, *sorted(min(cut, frames) for cut in cuts), frames]
    parts = [stream.push(mel[:, a:b]) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat([*parts, stream.flush()]), whole)
    assert len(whole.unique()) > 50


def test_a_causal_model_needs_no_future_frames():
    model = make(small(causal=True))
    stream = Stream(model)
    block = stream.latency
    assert block == 5  # frames of 24 samples: one block of generation, and no look-ahead
    mel = random_mel(model, 1, 20)[0]
    assert [len(stream.push(mel[:, f])) for f in range(10)] == [0, 0, 0, 0, 120] * 2


@few
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["add", "push", "push", "flush", "step", "move"]), st.integers(0, 99)
        ),
        max_size=25,
    ),
    weights=st.sampled_from(ROUNDED),
    threads=st.sampled_from([1, 2]),
)
@example(
    [("add", 0), ("push", 8), ("add", 0), ("step", 0), ("push", 4), ("push", 5), ("step", 0)],
    "float32",
    1,
)
@example(
    [("add", 0), ("push", 11), ("step", 0), ("add", 0), ("push", 13), ("push", 10), ("move", 0)],
    "int8",
    2,
)
def test_members_of_a_batch_have_the_bits_of_single_streams(events, weights, threads):
    """Members join and leave at different places of their frames."""
    model, frames = make(small(speakers=3)), 26
    batch = StreamBatch(model, engine="numba", weights=weights, threads=threads)
    found: dict[int, list[torch.Tensor]] = {}
    who: dict[int, int] = {}
    at: dict[int, int] = {}
    ended: set[int] = set()

    def collect() -> None:
        for member, audio in batch.step().items():
            found[who[member]].append(audio)

    for what, number in [*events, ("step", 0)]:
        members = [member for member, utterance in who.items() if utterance not in ended]
        if what == "add" or not members:
            utterance = len(at)
            who[batch.add(seed=utterance, speaker=utterance % 3)] = utterance
            at[utterance], found[utterance] = 0, []
            continue
        member = members[number % len(members)]
        utterance = who[member]
        if what == "push":
            part = random_mel(model, 1, frames, utterance)[
                0, :, at[utterance] : at[utterance] + number % 14
            ]
            batch.push(member, part)
            at[utterance] += part.shape[1]
        elif what == "flush":
            batch.flush(member)
            ended.add(utterance)
        elif what == "move":
            state = batch.state(member)
            batch.remove(member)
            del who[member]
            who[batch.add(state=state)] = utterance
        else:
            collect()
    for member, utterance in who.items():
        if utterance not in ended:
            batch.flush(member)
    collect()
    for utterance, parts in found.items():
        assert sum(len(part) for part in parts) == at[utterance] * HOP
        if at[utterance]:
            mel = random_mel(model, 1, frames, utterance)[0, :, : at[utterance]]
            given: dict[str, Any] = {"seed": utterance, "speaker": utterance % 3, "engine": "numba"}
            assert torch.equal(torch.cat(parts), generate(model, mel, weights=weights, **given)[0])


def test_members_at_different_places_of_a_frame_share_an_engine():
    """The lengths of the primes are not whole numbers of frames."""
    model = make(small(speakers=3))
    primes = [model.grid.decode(random_codes(model, 1, n, seed=n))[0] for n in (1, 37, 250)]
    mels = [random_mel(model, 1, 20, seed=n)[0] for n in range(3)]
    batch = StreamBatch(model, engine="numba")
    members = [batch.add(seed=n, speaker=n, prime=prime) for n, prime in enumerate(primes)]
    for member, mel in zip(members, mels, strict=True):
        batch.push(member, mel)
    made = batch.step()
    for n, member in enumerate(members):
        alone = generate(model, mels[n], seed=n, speaker=n, prime=primes[n], engine="numba")[0]
        assert torch.equal(made[member], alone[: len(made[member])])
        assert len(made[member]) > 100


# ---- states


@pytest.mark.parametrize(("cut", "causal"), [(0, False), (9, True), (20, False), (33, True)])
def test_resume_equals_uninterrupted(tmp_path, cut, causal):
    model = make(small(speakers=2, causal=causal))
    mel = random_mel(model, 1, 33)[0]
    whole = generate(model, mel, seed=7, speaker=1)[0]
    stream = Stream(model, seed=7, speaker=1)
    begin = stream.push(mel[:, :cut])
    path = stream.save(tmp_path / "state.safetensors")
    later, fork, other = Stream.load(model, path), stream.fork(), stream.fork(seed=8)
    for each in (later, fork, stream):
        assert torch.equal(torch.cat([begin, each.push(mel[:, cut:]), each.flush()]), whole)
    rest = torch.cat([other.push(mel[:, cut:]), other.flush()])
    assert cut == 33 or not torch.equal(rest, whole[len(begin) :])
    if cut == 20:  # on the reference engine, up to rounding
        reference = Stream.load(model, path, engine="reference")
        found = torch.cat([begin, reference.push(mel[:, cut:]), reference.flush()])
        assert (found - whole).abs().mean() < 1e-3


@pytest.mark.parametrize(("engine", "weights"), ENGINES)
def test_a_prime_continues_like_the_recording(engine, weights):
    """The prime is the start of a generated recording; the parallel pass fills in its state."""
    model = make(small(speakers=2))
    mel = random_mel(model, 1, 13)
    given: dict[str, Any] = {"seed": 5, "speaker": 1, "engine": engine, "weights": weights}
    whole = generate(model, mel, **given)
    for length in (1, 200):
        rest = generate(model, mel, prime=whole[:, :length], **given)
        # The queues differ by rounding, 1e-7. Where a uniform lies that near to an edge, the
        # samples differ by a step of the grid.
        same = (rest == whole[:, length:]).long().cumprod(1)
        assert same.float().mean() > 0.3
        assert same[0, 0]
        stream = Stream(model, prime=whole[0, :length], **given)
        parts = [stream.push(mel[0, :, :6]), stream.push(mel[0, :, 6:]), stream.flush()]
        assert torch.equal(torch.cat(parts), rest[0])


# ---- generation


def test_utterances_of_a_batch_equal_single_ones():
    """The batch has different lengths, candidates, log-probabilities and temperatures."""
    model = make(small(speakers=3))
    mels = [random_mel(model, 1, frames, seed=frames)[0] for frames in (9, 21, 14)]
    given: dict[str, Any] = {"return_log_probability": True, "best_of": 3, "temperature": 1.1}
    audio, nats = generate(model, mels, seed=[1, 2, 3], speaker=[2, 0, 1], **given)
    chosen = []
    for b, mel in enumerate(mels):
        length = mel.shape[1] * HOP
        alone, own = generate(model, mel, seed=b + 1, speaker=[2, 0, 1][b], **given)
        assert torch.equal(audio[b, :length], alone[0])
        assert torch.equal(nats[b, :length], own[0])
        assert not audio[b, length:].any()
        assert not nats[b, length:].any()
        candidates = [
            generate(model, mel, seed=s, speaker=[2, 0, 1][b], **{**given, "best_of": 1})
            for s in candidate_seeds(b + 1, 3)
        ]
        totals = [float(log.sum()) for _, log in candidates]
        chosen.append(int(np.argmax(totals)))
        assert torch.equal(candidates[chosen[-1]][0], alone)
        scores = score(model, alone, mel, speaker=[2, 0, 1][b])
        torch.testing.assert_close(own, scores, rtol=1e-6, atol=TOLERANCE)
    assert any(chosen)  # so that the best candidate is not always the first


def test_a_lower_temperature_is_nearer_to_the_prediction():
    model, mel = make(), random_mel(make(), 1, 30)
    cold, warm, hot = (
        generate(model, mel, temperature=t, return_log_probability=True)[1].mean()
        for t in (0.3, 1, 2)
    )
    assert cold > warm > hot
    ramp = np.linspace(0.5, 1.5, 30 * HOP)
    found = generate(model, mel, temperature=ramp)
    with torch.inference_mode():
        cond = model.condition(mel)
        expected = NumbaPredictiveEngine(model, 1).generate(
            uniforms(0, 0, 30 * HOP)[None], cond, ramp[None]
        )
    assert torch.equal(found, model.grid.decode(torch.from_numpy(expected)))


# ---- what cannot be


@pytest.mark.parametrize("engine", ["numba", "reference"])
@pytest.mark.parametrize("choice", [{"argmax": True}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_choosing_among_codes_is_refused_in_one_line(engine, choice):
    model = make()
    with pytest.raises(ValueError, match=r"logistic_mixture: use temperature$"):
        generate(model, random_mel(model, 1, 3), engine=engine, **choice)
    if "argmax" not in choice:
        with pytest.raises(ValueError, match="use temperature"):
            NumbaPredictiveEngine(model, 1).generate(
                np.zeros((1, 5)), conditioning(model, 1, 5), **choice
            )


def test_triton_refuses_the_family_in_one_line():
    with pytest.raises(
        ValueError,
        match=r"'triton' serves WaveNet, not PredictiveWaveNet: use engine 'cuda-graph'$",
    ):
        make_engine(make(), 1, "triton")
    with pytest.raises(ValueError, match="engine 'cuda-graph' needs a model on a CUDA device"):
        make_engine(make(), 1, "cuda-graph")
    with pytest.raises(ValueError, match="weights='float16'"):
        make_engine(make(), 1, "numba", weights="float16")


def test_unusable_conditioning_is_refused_by_name():
    model = make()
    cond = conditioning(model, 2, 10)
    for condition, message in (
        (None, "cond is None, expected the conditioning of 2 streams of 10 samples"),
        (cond.dense(), r"cond is \(2, 45, 10\)"),
        (cond[:, :, :9], r"cond is \(2, 45, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            NumbaPredictiveEngine(model, 2).generate(np.zeros((2, 10)), condition)


NAMED = ["blocks.0.taps.weight", "output.bias", "conditioning.gain", "conditioning.first.weight"]
NAMED += ["conditioning.period.voicing.bias", "conditioning.period.lag.weight", "input.bias"]


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("part", NAMED)
def test_non_finite_weights_are_an_error(part, weights):
    model = make()
    model.state_dict()[part].fill_(torch.nan)
    with pytest.raises(
        ValueError, match="sample 0 of this call are infinite or NaN: check the model's weights"
    ):
        NumbaPredictiveEngine(model, 1, weights=weights).generate(
            np.zeros((1, 10)), conditioning(model, 1, 10)
        )


def test_a_non_finite_lag_is_an_error_at_its_sample():
    """Such a lag would be an address outside of the arrays."""
    model = make()
    cond = conditioning(model, 2, 60)
    cond.lag[1, 33] = torch.nan
    with pytest.raises(ValueError, match="sample 33 of this call"):
        NumbaPredictiveEngine(model, 2).score(random_codes(model, 2, 60).numpy(), cond)
