"""States of streams: they resume exactly, on any engine, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from limits import AVAILABLE, bounded
from safetensors.torch import save_file
from test_size import SMALL
from test_stream import ENGINES, hypothesis, make, quiet, random_mel, truncations

import wavear
from wavear import Stream, StreamBatch, StreamState
from wavear.common.errors import WavearError


@hypothesis
@given(
    hop=st.sampled_from([0, 1, 20, 256]),
    kernel=st.sampled_from([2, 3]),
    layers=st.sampled_from([1, 4]),
    speakers=st.sampled_from([0, 2]),
    cut=st.integers(0, 150),
    engine=st.sampled_from(ENGINES),
)
@example(20, 2, 4, 0, 0, ("numba", "float32"))
@example(20, 3, 4, 2, 150, ("numba", "bfloat16"))
def test_resume_equals_uninterrupted(tmp_path_factory, hop, kernel, layers, speakers, cut, engine):
    model = make(hop, kernel_size=kernel, layers=layers, stacks=min(layers, 2), speakers=speakers)
    runs = {"engine": engine[0], "weights": engine[1]}
    mel = random_mel(150 // hop + 5) if hop else None
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    given = {"seed": 7, "speaker": 0 if speakers else None, "temperature": 1.1}

    def first(stream: Stream) -> torch.Tensor:
        return stream.pull(cut) if mel is None else stream.push(mel[:, :cut])

    def second(stream: Stream) -> torch.Tensor:
        return (
            stream.pull(160 - cut)
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


# ---- changed on purpose

bounds = pytest.mark.skipif(not AVAILABLE, reason="memory is bounded by Linux")


@pytest.fixture(params=SMALL)
def stream(request: pytest.FixtureRequest) -> Stream:
    torch.manual_seed(0)
    model = SMALL[request.param]()
    stream = Stream(model, engine="reference")
    if model.config.mel is None:
        stream.pull(20)
    else:
        stream.push(torch.randn(8, 12) - 5)
    return stream


def resume(stream: Stream, state: Any) -> None:
    """Resume a state, and make some audio."""
    model = stream._utterance.model
    resumed = Stream.load(model, state, engine="reference")
    if model.config.mel is None:
        resumed.pull(5)
    else:
        resumed.push(torch.zeros(8, 3))


CHANGES: list[dict[str, Any]] = [
    {"position": 2**61}, {"position": -1}, {"position": 1.5}, {"position": True},
    {"asked": -1}, {"asked": "20"}, {"seed": -1}, {"seed": 2**64}, {"speaker": [0]},
    {"speaker": 2**61}, {"temperature": "1"}, {"temperature": None}, {"temperature": 0.0},
    {"top_k": "2"}, {"top_k": -1}, {"top_p": {}}, {"top_p": 2.0}, {"first_frame": -1},
    {"closed": 1}, {"closed": None}, {"model": []}, {"model": {"family": 1}},
    {"deemphasis": "x"}, {"deemphasis": float("nan")}, {"format": "1"},
]  # fmt: skip


@bounds
def test_a_state_with_changed_metadata_is_refused(tmp_path: Path, stream: Stream):
    """Also with the right checksum, as somebody would write it on purpose."""
    state = stream.state()
    unconditional = stream._utterance.model.config.mel is None
    for change in [*CHANGES, {"asked": 2**61} if unconditional else {"first_frame": 2**40}]:
        StreamState(state.tensors, state.about | change).save(tmp_path / "a")
        with bounded(300, 10), pytest.raises(WavearError):
            resume(stream, tmp_path / "a")


def test_a_changed_byte_of_a_state_is_detected(tmp_path: Path, stream: Stream):
    whole = stream.save(tmp_path / "a").read_bytes()
    seed = whole.replace(b'seed\\": 0', b'seed\\": 1')
    for changed in (seed, whole[:-1] + bytes([whole[-1] ^ 1])):
        assert changed != whole
        (tmp_path / "a").write_bytes(changed)
        with pytest.raises(WavearError, match="CRC-32"):
            StreamState.load(tmp_path / "a")


def test_a_state_with_changed_tensors_is_refused(stream: Stream):
    state = stream.state()
    for name, tensor in state.tensors.items():
        changed = [tensor.to(torch.float8_e5m2), tensor.to(torch.complex64), tensor.reshape(-1)[:0]]
        if name in ("lags", "previous", "codes", "past"):
            changed += [tensor.clone().fill_(10**9), tensor.clone().fill_(-1)]
        if name == "time":
            changed.append(tensor.clone().fill_(-1))
        for other in changed:
            with pytest.raises(WavearError, match="the state is damaged"):
                resume(stream, StreamState(state.tensors | {name: other}, state.about))
