"""Streams: parts equal the whole bit for bit, states resume on any engine, and pipes."""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import wavear
from wavear import MelConfig, Stream, StreamBatch, StreamState, WaveNet, WaveNetConfig
from wavear.generation import pipes, streams
from wavear.generation.conditioner import UtteranceConditioner
from wavear.generation.frame_reader import read_frames
from wavear.generation.pipes import pcm16
from wavear.generation.settings import Sampling

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
NAMES = [f"{engine} {weights}" for engine, weights in ENGINES]
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
    for k in range(300):
        stream.push(random_mel(3, seed=k))
        held.append(stream.state().tensors["mel"].shape[1])
    # The context of a block on both sides, the rest of the block, and the pushed frames.
    assert max(held) <= stream_block(model) + 2 * model.lookahead + 3
    assert stream.position > 600 * hop


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
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, r"seed is \[1, 2\]"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": np.ones(1)}, "one number"),
        ({"speaker": 0}, "trained without any"),
        ({"engine": "warp"}, "engine is 'warp'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_invalid_arguments_of_a_stream_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stream(make(20), **arguments)
    if set(arguments) <= {"top_k", "top_p"}:
        with pytest.raises(ValueError, match=message):
            StreamBatch(make(), engine="reference", **arguments)


# ---- states


@hypothesis
@given(
    hop=st.sampled_from([0, 1, 20, 256]),
    kernel=st.sampled_from([2, 3]),
    layers=st.sampled_from([1, 4]),
    speakers=st.sampled_from([0, 2]),
    cut=st.integers(0, 300),
    engine=st.sampled_from(ENGINES),
)
@example(20, 2, 4, 0, 0, ("numba", "float32"))
@example(20, 3, 4, 2, 300, ("numba", "bfloat16"))
def test_resume_equals_uninterrupted(tmp_path_factory, hop, kernel, layers, speakers, cut, engine):
    model = make(hop, kernel_size=kernel, layers=layers, stacks=min(layers, 2), speakers=speakers)
    runs = {"engine": engine[0], "weights": engine[1]}
    mel = random_mel(300 // hop + 9) if hop else None
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    given = {"seed": 7, "speaker": 0 if speakers else None, "temperature": 1.1}

    def first(stream: Stream) -> torch.Tensor:
        return stream.pull(cut) if mel is None else stream.push(mel[:, :cut])

    def second(stream: Stream) -> torch.Tensor:
        return (
            stream.pull(310 - cut)
            if mel is None
            else torch.cat([stream.push(mel[:, cut:]), stream.flush()])
        )

    whole = Stream(model, **given, **runs)
    expected = torch.cat([first(whole), second(whole)])
    stopped = Stream(model, **given, **runs)
    begin = first(stopped)
    assert stopped.save(path) == path
    later = Stream.load(model, path, **runs)
    assert later.position == len(begin)
    assert torch.equal(torch.cat([begin, second(later)]), expected)
    # The saved stream itself continues, too.
    assert torch.equal(torch.cat([begin, second(stopped)]), expected)


@quiet
@truncations
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_a_state_keeps_the_truncation(tmp_path, truncation, engine):
    """Loaded, forked, or in a batch, the stream equals an uninterrupted one."""
    model = make()
    stream = Stream(model, seed=5, engine=engine, **truncation)
    begin = stream.pull(40)
    path = stream.save(tmp_path / "state.safetensors")
    about = StreamState.load(path).about
    assert {name: about[name] for name in ("top_k", "top_p")} == {
        "top_k": None,
        "top_p": None,
        **truncation,
    }
    whole = wavear.generate(model, samples=200, seed=5, engine=engine, **truncation)[0]
    batch = StreamBatch(model, engine=engine, **truncation)
    member = batch.add(state=path)
    batch.pull(member, 160)
    later = [
        Stream.load(model, path, engine=engine).pull(160),
        stream.fork().pull(160),
        batch.step()[member],
    ]
    # The states of a batch's members keep it, too.
    other = batch.add(seed=5)
    batch.pull(other, 40)
    assert torch.equal(batch.step()[other], begin)
    later.append(Stream.load(model, batch.state(other), engine=engine).pull(160))
    for rest in later:
        assert torch.equal(torch.cat([begin, rest]), whole)


def test_a_state_of_float64_loses_nothing(tmp_path):
    """Compare states: with few classes the samples hardly reveal a rounded state."""
    model = make(20).double()
    stream = Stream(model, engine="reference")
    stream.push(random_mel(20))
    path = stream.save(tmp_path / "state.safetensors")
    again = Stream.load(model, path, engine="reference").state()
    assert again.tensors["queue.1"].dtype == torch.float64
    assert all(
        torch.equal(again.tensors[name], tensor) for name, tensor in stream.state().tensors.items()
    )


def test_one_beginning_has_two_futures():
    model = make()
    stream = Stream(model, seed=1)
    begin = stream.pull(50)
    same, other = stream.fork(), stream.fork(seed=2)
    futures = [s.pull(100) for s in (stream, same, other)]
    assert torch.equal(
        torch.cat([begin, futures[0]]), wavear.generate(model, samples=150, seed=1)[0]
    )
    assert torch.equal(futures[0], futures[1])
    assert not torch.equal(futures[0], futures[2])
    # The other future has the uniforms of its own seed, from its current sample on.
    again = stream.fork(seed=2)
    assert again.position == 150


def test_a_state_of_another_model_is_refused_with_the_difference(tmp_path):
    model = make(20)
    stream = Stream(model)
    stream.push(random_mel(20))
    path = stream.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="kernel_size is 2 there, 3 here"):
        Stream.load(make(20, kernel_size=3), path)
    with pytest.raises(ValueError, match=r"mel.hop_length is 20 there, 40 here"):
        Stream.load(make(40), path)
    other = make(20)
    with torch.no_grad():
        other.blocks[1].dilated.bias[2] += 1e-6
    with pytest.raises(ValueError, match=r"other weights.*blocks\.1\.dilated\.bias differ$"):
        Stream.load(other, path)
    Stream.load(make(20).double(), path)  # the same values in float64


def test_files_without_a_state_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = make()
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        Stream.load(model, tmp_path / "none.safetensors")
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    with pytest.raises(ValueError, match="noise is damaged"):
        Stream.load(model, tmp_path / "noise")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not of a stream's state"):
        Stream.load(model, tmp_path / "foreign")
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "newer", metadata={"wavear_stream": '{"format": 2}'}
    )
    with pytest.raises(
        ValueError, match="newer has format 2, this version of wavear reads format 1"
    ):
        Stream.load(model, tmp_path / "newer")
    save_file({"x": torch.zeros(1)}, tmp_path / "poor", metadata={"wavear_stream": '{"format": 1}'})
    with pytest.raises(ValueError, match="poor is damaged: it lacks asked, closed"):
        Stream.load(model, tmp_path / "poor")
    state = Stream(model).state()
    short = {name: t[:-1] if name == "queue.1" else t for name, t in state.tensors.items()}
    one = torch.tensor([64])
    for tensors in (
        short,
        {**state.tensors, "previous": one},
        {**state.tensors, "prime": one},
        {"mel": one},
    ):
        with pytest.raises(ValueError, match="damaged"):
            Stream.load(model, StreamState(tensors, state.about))


def test_states_with_values_out_of_range_are_refused():
    linear = wavear.Linear(wavear.LinearConfig(order=3, sample_rate=8000)).eval()
    config = wavear.TransformerConfig(layers=1, channels=8, heads=2, window=4, patch=2, classes=16)
    transformer = wavear.Transformer(config).eval()
    for model, name, value in (
        (linear, "past", 9999),
        (transformer, "codes", -1),
        (transformer, "time", -5),
    ):
        state = Stream(model, engine="reference").state()
        tensors = {**state.tensors, name: torch.full_like(state.tensors[name], value)}
        with pytest.raises(ValueError, match="damaged"):
            Stream.load(model, StreamState(tensors, state.about), engine="reference")


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


# ---- frames from a pipe


class Pieces:
    """A pipe that delivers its data piece by piece."""

    def __init__(self, *data: bytes):
        self.data = list(data)

    def read(self) -> bytes:
        rest, self.data = b"".join(self.data), []
        return rest

    def read1(self, size: int) -> bytes:
        return self.data.pop(0) if self.data else b""


class Kept:
    def __init__(self):
        self.written: list[bytes] = []

    def write(self, pcm: bytes) -> None:
        self.written.append(pcm)

    def close(self) -> None:
        pass


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[k : k + size] for k in range(0, len(data), size)]


@hypothesis
@given(
    kind=st.sampled_from(
        ["raw", "rows", "columns", "fortran rows", "fortran columns", "batch of one", "float64"]
    ),
    frames=st.integers(1, 40),
    size=st.integers(1, 300),
)
def test_frames_are_read_from_any_pieces(kind, frames, size):
    mel = random_mel(frames).numpy()
    data = {
        "raw": mel.T.astype("<f4").tobytes(),
        "rows": npy(np.ascontiguousarray(mel.T)),
        "columns": npy(np.ascontiguousarray(mel)),
        "fortran rows": npy(np.asfortranarray(mel.T)),
        "fortran columns": npy(np.asfortranarray(mel)),
        "batch of one": npy(np.ascontiguousarray(mel)[None]),
        "float64": npy(mel.T.astype(">f8")),
    }[kind]
    source: Any = Pieces(*cut(data, size))
    found = list(read_frames(source, BANDS))
    if frames == BANDS and kind in ("rows", "fortran rows", "float64"):
        mel = mel.T  # as many frames as bands: read as bands first, as everywhere
    np.testing.assert_array_equal(np.concatenate(found, axis=1), mel)
    assert all(part.flags.writeable for part in found)


def test_frames_are_returned_as_soon_as_they_are_complete():
    data = random_mel(6).numpy().T.astype("<f4").tobytes()
    source: Any = Pieces(*cut(data, 30))  # a frame has 20 bytes
    frames = read_frames(source, BANDS)
    assert [(next(frames).shape[1], len(source.data)) for _ in range(3)] == [(1, 3), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no mel frames"),
        (b"\0" * 59, "within frame 2: it had 19 of 20 bytes; expected 5 bands of float32"),
        (np.full(10, np.nan, "<f4").tobytes(), "frame 0 of stdin holds NaN"),
        (
            npy(np.zeros((3, 4), np.float32)),
            r"shape \(3, 4\), expected \(frames, 5\) or \(5, frames\)",
        ),
        (npy(np.zeros((3, 5), np.int32)), "int32, expected floating point"),
        (npy(np.zeros((3, 5), np.float32))[:-20], "damaged"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"x" * 16, "damaged"),
        (npy(np.array([{}], dtype=object)), "damaged"),
        (npy(np.zeros((5, 0), np.float32)), "no mel frames"),
        (npy(np.zeros((0, 5), np.float32)), "no mel frames"),
    ],
)
def test_frames_of_the_wrong_form_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(read_frames(Pieces(*cut(data, 7)), BANDS))  # type: ignore[arg-type]


def test_pcm_equals_that_of_a_file(tmp_path):
    import soundfile

    audio = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([0.5 / 32768, 1.5 / 32768])])
    wavear.audio.write(tmp_path / "x.wav", audio, 8000)
    assert (
        pcm16(audio.numpy())
        == soundfile.read(tmp_path / "x.wav", dtype="int16")[0].astype("<i2").tobytes()
    )


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "wavear")
    return caplog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that serving reads, in seconds; it moves only when a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pipes, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_serving_logs_latency_and_underruns(logged, clock):
    model, mel = make(20), random_mel(120)

    class Late(Pieces):
        def read1(self, size: int) -> bytes:
            clock.now += 0.4 if len(self.data) == 3 else 0.0
            return super().read1(size)

    # 20 frames, 50 ms, in each of six pieces
    source: Any = Late(*cut(mel.numpy().T.astype("<f4").tobytes(), 400))
    sink = Kept()
    report = pipes.serve(model, source, sink, Sampling(seed=5))
    assert b"".join(sink.written) == pcm16(wavear.generate(model, mel, seed=5)[0].numpy())
    first, sound, underrun, last = logged.messages
    assert "first sound after 9 frames (22 ms of mel, 3 of them look-ahead)" in first
    assert "first sound 0 ms after the first frame came" in sound
    # Three reads delivered 60 frames of 2.5 ms, and 54 were played in the pause of 400 ms.
    assert report.gaps_waiting == pytest.approx(0.4 - 54 * 0.0025)
    assert report.gaps_computing == 0
    assert underrun == "underrun of 265 ms after 0.14 s: the mel came late"
    assert "1 underrun of 0.27 s in all" in last
    assert report.samples == 2400


def test_slow_computation_and_a_late_mel_are_reported_separately(monkeypatch, logged, clock):
    model, mel = make(20), random_mel(40)
    push = Stream.push

    def slow(self, mel):
        clock.now += 0.05
        return push(self, mel)

    monkeypatch.setattr(Stream, "push", slow)
    source: Any = Pieces(mel.numpy().T.astype("<f4").tobytes())
    report = pipes.serve(model, source, Kept())
    assert report.gaps_waiting == 0
    assert report.gaps_computing == pytest.approx(0.09)  # 20 ms after 50 of each of four pushes
    assert "computed at 0." in logged.messages[2]


def test_sound_begins_before_the_end_of_a_long_mel():
    model, mel = make(20), random_mel(400)
    sink = Kept()
    source: Any = Pieces(npy(mel.numpy()))
    pipes.serve(model, source, sink)
    assert len(sink.written) > 40
    assert max(map(len, sink.written)) <= 2 * 20 * (8 + 2 * 9)


def test_frames_of_another_convention_are_converted_one_by_one():
    model, mel = make(20), random_mel(8) - 5.0
    common = mel / np.log(10)
    source: Any = Pieces(*cut(common.numpy().T.astype("<f4").tobytes(), 60))
    sink = Kept()
    pipes.serve(model, source, sink, Sampling(engine="reference"), mel_source="log10")
    known = wavear.adapt_mel(common, model, "log10")
    assert not torch.equal(known, common)
    assert b"".join(sink.written) == pcm16(
        wavear.generate(model, known, engine="reference")[0].numpy()
    )


@pytest.mark.parametrize("frames", [450, 60], ids=["after a second", "at the end"])
def test_wrong_frames_cause_one_warning(frames, monkeypatch, logged):
    """The sound continues after the warning; correct frames cause none."""
    model, mel = make(20), random_mel(frames) - 5.0
    judged = []
    monkeypatch.setattr(
        pipes, "judge_mel", lambda mel, model: judged.append(mel) or wavear.judge_mel(mel, model)
    )
    for values, wrong in ((mel, False), (mel * 20 / np.log(10), True)):
        logged.clear()
        sink = Kept()
        source: Any = Pieces(*cut(values.numpy().T.astype("<f4").tobytes(), 4000))
        pipes.serve(model, source, sink)
        warned = [record for record in logged.records if record.levelname == "WARNING"]
        assert len(warned) == wrong
        assert sum(map(len, sink.written)) == 2 * frames * 20
    assert len(judged) == 2


def test_a_stream_of_the_likeliest_code_warns():
    model = make()
    with pytest.warns(UserWarning, match="collapses to silence or to a tone"):
        Stream(model, top_k=1, engine="reference")
    with pytest.warns(UserWarning, match="collapses to silence or to a tone"):
        StreamBatch(model, top_k=1, engine="reference")


def test_a_closed_stdin_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="stdin or stdout is closed"):
        pipes.run(make(100), "-", Sampling())


# ---- the command, in real pipes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(20).save(folder / "model")
    make().save(folder / "free")
    return folder / "model"


def begin(
    checkpoint: Path, *flags: str, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "wavear",
        "synthesize",
        str(checkpoint),
        "-",
        "--stream",
        "--engine",
        "reference",
    ]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # Tests in the background ignore Ctrl-C, and a child process would inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*command, *flags], bufsize=0, env={**os.environ, **(environment or {})}, **pipes
    )


def read_line(process: subprocess.Popen) -> str:
    assert process.stderr
    return process.stderr.readline().decode()


def test_the_command_works_in_a_pipe(checkpoint):
    """Bytes arrive in odd pieces, and the first sound before the end of the mel."""
    mel = random_mel(30)
    with begin(checkpoint, "--seed", "8") as process:
        assert process.stdin
        assert process.stdout
        assert "first sound after 9 frames" in read_line(process)
        data = mel.numpy().T.astype("<f4").tobytes()
        process.stdin.write(data[:187])
        process.stdin.write(data[187:333])
        # 16 frames have arrived, enough for the blocks of the first 13.
        first = process.stdout.read(12)
        process.stdin.write(data[333:])
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(60) == 0
        assert first + rest == pcm16(
            wavear.generate(wavear.load(checkpoint), mel, seed=8)[0].numpy()
        )


def test_a_closed_pipe_ends_it_quietly(checkpoint):
    with begin(checkpoint) as process:
        assert process.stdin
        assert process.stdout
        read_line(process)
        process.stdin.write(random_mel(12).numpy().T.astype("<f4").tobytes())
        process.stdout.read(10)
        process.stdout.close()
        process.stdin.write(random_mel(30).numpy().T.astype("<f4").tobytes())
        process.stdin.close()
        assert process.wait(60) == 0
        assert "rror" not in process.stderr.read().decode()  # type: ignore[union-attr]


def test_ctrl_c_ends_it_quietly(checkpoint):
    with begin(checkpoint) as process:
        read_line(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        printed = process.stderr.read().decode()  # type: ignore[union-attr]
        assert "Traceback" not in printed
        assert printed.endswith("wavear: interrupted\n")


def test_an_incomplete_frame_is_an_error_after_the_earlier_sound(checkpoint):
    with begin(checkpoint) as process:
        good = random_mel(20).numpy().T.astype("<f4").tobytes()
        out, err = process.communicate(good + b"\0" * 3)
        assert process.returncode == 1
        # A read with an error pushes none of its frames; frames of earlier reads become sound.
        assert "within frame 20: it had 3 of 20 bytes" in err.decode()
        assert len(out) == 2 * 20 * 12


_FAKE = """
class PortAudioError(Exception):
    pass
class RawOutputStream:
    def __init__(self, samplerate, channels, dtype, device):
        if device == "broken":
            raise PortAudioError("no such device")
        self.file = open("played.raw", "wb")
        self.file.write(f"{samplerate} {channels} {dtype} {device} ".encode())
    def start(self):
        self.file.write(b"start ")
    def write(self, data):
        self.file.write(bytes(data))
        return False
    def stop(self):
        self.file.write(b" stop")
    def close(self):
        self.file.close()
"""


def test_a_sound_device_plays_the_stream(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "sounddevice.py").write_text(_FAKE)
    monkeypatch.chdir(tmp_path)
    mel = random_mel(12)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    if importlib.util.find_spec("wavear") and "PYTHONPATH" not in os.environ:
        paths += os.pathsep + str(Path(wavear.__file__).parents[1])
    with begin(checkpoint, "--out", "device:2", environment={"PYTHONPATH": paths}) as process:
        _, err = process.communicate(npy(mel.numpy()))
        assert process.returncode == 0, err
        expected = pcm16(wavear.generate(wavear.load(checkpoint), mel)[0].numpy())
        assert (
            tmp_path / "played.raw"
        ).read_bytes() == b"8000 1 int16 2 start " + expected + b" stop"
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
        with pytest.raises(ValueError, match="cannot open the sound device broken"):
            pipes.Device(8000, "broken")
        sys.modules.pop("sounddevice", None)


def test_a_device_without_the_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match="pip install sounddevice"):
        pipes.Device(8000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("synthesize model - --out x", "pass --stream"),
        ("synthesize model x.npy --stream", "its one input is -"),
        ("synthesize model - --stream --out folder", "--out is folder; with --stream it is -"),
        ("synthesize free - --stream", "not conditioned on mels"),
        ("synthesize model - --stream --fade 10", "drop --format, --normalize, --fade"),
        ("synthesize model - --stream --format flac", "drop --format, --normalize, --fade"),
        ("synthesize model - --stream --mel-seconds 1", "--mel-seconds"),
        ("synthesize model - --stream --mel-preset r9yy9", "no mel preset 'r9yy9'"),
        ("synthesize model - --stream --best-of 2", "best_of compares whole utterances"),
        ("synthesize model - --stream --argmax --top-k 3", "drop top_k and top_p"),
        ("synthesize model - --stream --argmax --top-p 0.5", "drop top_k and top_p"),
        ("synthesize model - --stream --top-p 2", "top_p is 2.0;"),
    ],
)
def test_commands_that_cannot_stream_are_refused(
    checkpoint, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(checkpoint.parent)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert wavear_main(arguments.split()) == 1
    assert message in capsys.readouterr().err


@quiet
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (("--argmax",), {"argmax": True}),
        (("--top-k", "1"), {"argmax": True}),
        (("--top-k", "3"), {"top_k": 3}),
        (("--top-p", "0.5", "--temperature", "1.2"), {"top_p": 0.5, "temperature": 1.2}),
    ],
    ids=str,
)
def test_flags_of_sampling_reach_the_stream(checkpoint, flags, given, monkeypatch):
    mel = random_mel(16)
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(npy(mel.numpy()))))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink))
    assert (
        wavear_main(
            ("synthesize", str(checkpoint), "-", "--stream", "--engine", "reference", *flags)
        )
        == 0
    )
    model = wavear.load(checkpoint)
    made = wavear.generate(model, mel, engine="reference", **given)[0]
    assert sink.getvalue() == pcm16(made.numpy())
    assert not torch.equal(made, wavear.generate(model, mel, engine="reference")[0])


def wavear_main(arguments: tuple[str, ...]) -> int:
    from wavear.cli.commands import main

    return main(arguments)
