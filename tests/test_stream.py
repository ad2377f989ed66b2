"""Streams: parts equal the whole bit for bit, one by one and in batches."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import wavear
from wavear import MelConfig, Stream, StreamBatch, WaveNet, WaveNetConfig
from wavear.generation import streams
from wavear.generation.conditioner import UtteranceConditioner

BANDS = 5
TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 4},
    {"top_p": 0.6},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 1},
]
truncations = pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
quiet = pytest.mark.filterwarnings("ignore:argmax takes")
ENGINES = [("reference", "float32"), ("numba", "float32"), ("numba", "bfloat16"), ("numba", "int8")]
hypothesis = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)


def make(hop: int = 0, **config) -> Any:
    """Return a small model whose distributions vary by sample; `hop` 0 means no mels."""
    torch.manual_seed(0)
    shape = {
        "sample_rate": 8000,
        "n_fft": 1024,
        "window_length": 1024,
        "bands": BANDS,
        "fmax": 4000.0,
    }
    mel = MelConfig(hop_length=hop, **shape) if hop else None
    sizes = {
        "residual_channels": 6,
        "skip_channels": 7,
        "head_channels": 9,
        "conditioning_channels": 5,
    }
    values = {"layers": 4, "stacks": 2, "classes": 64, "sample_rate": 8000, "mel": mel, **sizes}
    model = WaveNet(WaveNetConfig(**{**values, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(2.5)
            # The initial linear interpolation has no weight for some frames.
            if name.startswith("conditioning.stages"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_mel(frames: int, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(BANDS, frames, generator=torch.Generator().manual_seed(seed))


def pieces(mel: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    bounds = [0, *sorted(min(cut, mel.shape[1]) for cut in cuts), mel.shape[1]]
    return [mel[:, a:b] for a, b in itertools.pairwise(bounds)]


# ---- the parts are the whole


@quiet
@hypothesis
@given(
    hop=st.sampled_from([1, 5, 100, 256]),
    context=st.sampled_from([0, 2]),
    kernel=st.sampled_from([2, 3]),
    layers=st.sampled_from([1, 4]),
    speakers=st.sampled_from([0, 2]),
    blocks=st.floats(0.01, 3.5),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    seed=st.integers(0, 2**64 - 1),
    engine=st.sampled_from(ENGINES),
    truncation=st.sampled_from([{}, *TRUNCATIONS]),
)
@example(1, 2, 3, 1, 2, 2.3, [1, 2, 128, 129, 132], 1, ("numba", "float32"), {"top_k": 4})
@example(5, 0, 2, 4, 0, 3.0, [0, 0, 30, 52], 2, ("numba", "bfloat16"), {})
@example(256, 2, 2, 4, 2, 1.0, [1, 2, 3, 4, 5], 3, ("reference", "float32"), {"top_p": 0.6})
def test_the_parts_of_a_stream_equal_the_whole(
    hop, context, kernel, layers, speakers, blocks, cuts, seed, engine, truncation
):
    """For any chunks, the stream equals `generate` bit for bit."""
    model = make(
        hop,
        conditioning_context=context,
        kernel_size=kernel,
        layers=layers,
        stacks=min(layers, 2),
        speakers=speakers,
    )
    mel = random_mel(max(1, int(blocks * max(1, 128 // hop)) + (5 if hop > 50 else 0)))
    given = {
        "seed": seed,
        "speaker": 1 if speakers else None,
        "engine": engine[0],
        "weights": engine[1],
    }
    whole = wavear.generate(model, mel, temperature=0.9, **given, **truncation)[0]
    stream = Stream(model, temperature=0.9, **given, **truncation)
    parts = [stream.push(piece) for piece in pieces(mel, cuts)]
    parts.append(stream.flush())
    assert all(part.dtype == torch.float32 and part.dim() == 1 for part in parts)
    assert torch.equal(torch.cat(parts), whole)
    assert stream.position == len(whole)
    assert truncation or len(whole) < 50 or len(whole.unique()) > 5


@pytest.mark.parametrize("hop", [1, 5, 86, 100, 256, 300])
def test_a_push_returns_exactly_the_determined_samples(hop):
    """A block and its look-ahead determine a sample, which is at most 192 samples late."""
    model = make(hop)
    mel = random_mel(500 // hop + 12)
    stream, block, made = Stream(model), stream_block(model), 0
    assert block * hop <= max(hop, 192)
    for frame in range(mel.shape[1]):
        made += len(stream.push(mel[:, frame]))
        assert made == max(0, (frame + 1 - model.lookahead) // block) * block * hop
        assert (made > 0) == (frame + 1 >= stream.latency)
    # One frame fewer is not enough: the last frame changes the last sample of the block.
    with torch.inference_mode():
        last = []
        for change in (0, 1):
            conditioner = UtteranceConditioner(model)
            conditioner.push(mel[:, : stream.latency - 1])
            conditioner.push(mel[:, stream.latency - 1 : stream.latency] + change)
            last.append(conditioner.span(0, block * hop)[:, :, -1])  # type: ignore[index]
    assert not torch.equal(last[0], last[1])


def stream_block(model: Any) -> int:
    return UtteranceConditioner(model).block


def test_long_pushes_are_cut_and_short_pushes_are_kept(monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 7)
    model = make(5)
    mel = random_mel(80)
    stream = Stream(model, seed=1)
    found = torch.cat([stream.push(mel), stream.flush()])
    assert torch.equal(found, wavear.generate(model, mel, seed=1)[0])


@pytest.mark.parametrize("hop", [1, 20, 256])
def test_frames_that_no_sample_needs_are_dropped(hop):
    model = make(hop)
    stream = Stream(model)
    held = []
    for k in range(100):
        stream.push(random_mel(3, seed=k))
        held.append(stream.state().tensors["mel"].shape[1])
    # The context of a block on both sides, the rest of the block, and the pushed frames.
    assert max(held) <= stream_block(model) + 2 * model.lookahead + 3
    assert stream.position > 200 * hop


def test_the_buffer_of_pushed_frames_can_be_reused():
    model = make(20)
    mel = random_mel(30)
    stream, buffer, parts = Stream(model), torch.empty(BANDS, 3), []
    for k in range(10):
        buffer[:] = mel[:, 3 * k : 3 * k + 3]
        parts.append(stream.push(buffer if k % 2 else buffer.numpy()))
    parts.append(stream.flush())
    assert torch.equal(torch.cat(parts), wavear.generate(model, mel)[0])


@pytest.mark.parametrize(
    ("hop", "act", "message"),
    [
        (
            20,
            lambda s: (s.push(random_mel(3)), s.flush(), s.push(random_mel(3))),
            "flushed and has ended",
        ),
        (20, lambda s: (s.flush(), s.flush()), "flushed before"),
        (20, lambda s: s.pull(5), "conditioned on mels: push"),
        (20, lambda s: s.push(torch.zeros(4, 3)), "mel has 4 bands, the model was trained on 5"),
        (20, lambda s: s.push(torch.zeros(3, 5)), "transposed"),
        (20, lambda s: s.push(torch.full((5, 2), torch.nan)), "NaN"),
        (20, lambda s: s.push(torch.zeros(5, 2, dtype=torch.int32)), "expected floating point"),
        (20, lambda s: s.push(torch.zeros(1, 5, 2)), r"shape \(1, 5, 2\), expected \(M, n\)"),
        (0, lambda s: s.push(torch.zeros(5, 2)), "takes no mel"),
        (0, lambda s: s.flush(), "nothing to flush"),
        (0, lambda s: s.pull(-1), "samples is -1"),
        (0, lambda s: s.pull(1.5), "samples is 1.5"),
    ],
)
def test_misuse_of_a_stream_is_refused(hop, act, message):
    with pytest.raises(ValueError, match=message):
        act(Stream(make(hop), engine="reference"))


def test_a_refused_push_changes_nothing():
    model, mel = make(20), random_mel(20)
    stream = Stream(model)
    first = stream.push(mel[:, :9])
    with pytest.raises(ValueError, match="NaN"):
        stream.push(torch.full((BANDS, 5), torch.nan))
    rest = [stream.push(mel[:, 9:]), stream.flush()]
    assert torch.equal(torch.cat([first, *rest]), wavear.generate(model, mel)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, r"seed is \[1, 2\]"),
        ({"temperature": np.ones(1)}, "one number"),
        ({"speaker": 0}, "trained without any"),
        ({"engine": "warp"}, "engine is 'warp'"),
    ],
)
def test_invalid_arguments_of_a_stream_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stream(make(20), **arguments)
    with pytest.raises(ValueError, match=r"top_p is 1\.5"):
        StreamBatch(make(), engine="reference", top_p=1.5)


# ---- a batch whose members come and go


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["add", "push", "push", "flush", "step", "move"]), st.integers(0, 99)
        ),
        max_size=30,
    ),
    engine=st.sampled_from(ENGINES),
    threads=st.sampled_from([1, 2]),
)
@example(
    [("add", 0), ("push", 8), ("add", 0), ("step", 0), ("push", 4), ("push", 5)],
    ("numba", "float32"),
    1,
)
def test_members_equal_single_streams(events, engine, threads):
    model, frames = make(20, speakers=3), 26
    batch = StreamBatch(
        model,
        engine=engine[0],
        weights=engine[1],
        threads=threads if engine[0] == "numba" else None,
    )
    found: dict[int, list[torch.Tensor]] = {}
    who: dict[int, int] = {}  # the utterance of each member
    at: dict[int, int] = {}  # the frames pushed of each utterance
    ended: set[int] = set()

    def collect() -> None:
        for member, audio in batch.step().items():
            found[who[member]].append(audio)

    for what, number in [*events, ("step", 0)]:
        open_members = [member for member, utterance in who.items() if utterance not in ended]
        if what == "add" or not open_members:
            utterance = len(at)
            who[batch.add(seed=utterance, speaker=utterance % 3)] = utterance
            at[utterance], found[utterance] = 0, []
            continue
        member = open_members[number % len(open_members)]
        utterance = who[member]
        if what == "push":
            mel = random_mel(frames, seed=utterance)[:, at[utterance] : at[utterance] + number % 14]
            batch.push(member, mel)
            at[utterance] += mel.shape[1]
        elif what == "flush":
            batch.flush(member)
            ended.add(utterance)
        elif what == "move":  # remove it, and add its state again
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
        assert sum(len(part) for part in parts) == at[utterance] * 20
        if at[utterance]:
            alone = wavear.generate(
                model,
                random_mel(frames, seed=utterance)[:, : at[utterance]],
                seed=utterance,
                speaker=utterance % 3,
                engine=engine[0],
                weights=engine[1],
            )
            assert torch.equal(torch.cat(parts), alone[0])


@quiet
@pytest.mark.parametrize("truncation", [{}, *TRUNCATIONS], ids=str)
def test_members_of_different_size_and_temperature(truncation):
    model = make()
    batch = StreamBatch(model, **truncation)
    asked = {batch.add(seed=k, temperature=0.5 + 0.1 * k): 3 + 40 * (k % 5) for k in range(15)}
    for member, samples in asked.items():
        batch.pull(member, samples)
    made = batch.step()
    assert len(batch) == 15
    batch.remove(3)
    with pytest.raises(ValueError, match="no member 3"):
        batch.pull(3, 1)
    for member in made:
        if member != 3:
            batch.pull(member, 30)
    more = batch.step()
    for member, samples in asked.items():
        if member != 3:
            alone = wavear.generate(
                model,
                samples=samples + 30,
                seed=member,
                temperature=0.5 + 0.1 * member,
                **truncation,
            )[0]
            assert torch.equal(torch.cat([made[member], more[member]]), alone)
    assert batch.step() == {}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"top_k": 3}),
        ({"top_k": 3}, {}),
        ({"top_k": 3}, {"top_k": 4}),
        ({"top_p": 0.5}, {"top_p": 0.6}),
    ],
    ids=str,
)
def test_a_batch_refuses_a_state_of_another_truncation(theirs, ours):
    """All members share one truncation, so the stream would continue with another one."""
    model = make()
    state = Stream(model, engine="reference", **theirs).state()
    batch = StreamBatch(model, engine="reference", **ours)
    there, here = ((given.get("top_k"), given.get("top_p")) for given in (theirs, ours))
    with pytest.raises(
        ValueError, match=re.escape(f"are {there} in the state and {here} in the batch")
    ):
        batch.add(state=state)
    assert len(batch) == 0
    assert batch.add(state=Stream(model, engine="reference", **ours).state()) == 0


def test_a_stream_of_the_likeliest_code_warns():
    model = make()
    with pytest.warns(UserWarning, match="collapses to silence or to a tone"):
        Stream(model, top_k=1, engine="reference")
    with pytest.warns(UserWarning, match="collapses to silence or to a tone"):
        StreamBatch(model, top_k=1, engine="reference")
