"""Pre-emphasis: all codes are those of x[t] - a x[t-1], and output is de-emphasised exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

import wavear
from wavear import (
    GRU,
    GRUConfig,
    MelConfig,
    Stream,
    StreamBatch,
    Transformer,
    TransformerConfig,
    WaveNet,
    WaveNetConfig,
    audio,
    generate,
    mulaw_decode,
    mulaw_encode,
)
from wavear.audio.emphasis import Deemphasis, emphasised
from wavear.data.corpus import Recording
from wavear.data.crops import Segments, collate, read_crop
from wavear.evaluation import bits, held_out
from wavear.models.crop_loss import crop_loss, inputs, layout_of

A = 0.85
RATE = 8000
SMALL: dict[str, Any] = {
    "layers": 4,
    "stacks": 2,
    "residual_channels": 8,
    "skip_channels": 8,
    "head_channels": 8,
    "conditioning_channels": 4,
    "sample_rate": RATE,
}
MEL = MelConfig(sample_rate=RATE, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0)


def network(mel: MelConfig | None = None, a: float = A) -> WaveNet:
    torch.manual_seed(0)
    return WaveNet(WaveNetConfig(mel=mel, pre_emphasis=a, **SMALL)).eval()


def speech_like(samples: int) -> np.ndarray:
    """Return noise of mostly low frequencies, with no sample near full scale."""
    noise = np.random.default_rng(0).standard_normal(samples)
    smooth = lfilter([0.02], [1, -0.95], noise)
    return np.clip(smooth, -0.5, 0.5).astype(np.float32)


def test_the_filters_equal_scipy_and_are_inverse():
    x = torch.from_numpy(speech_like(500)).double()
    y = emphasised(x, A)
    np.testing.assert_allclose(y.numpy(), lfilter([1, -A], [1], x.numpy()), atol=1e-15)
    np.testing.assert_allclose(Deemphasis(A)(y).numpy(), x.numpy(), atol=1e-7)
    assert emphasised(x, 0) is x
    assert Deemphasis(0.0)(x) is x


def test_deemphasis_in_pieces_equals_the_whole():
    # Loud enough to be clipped after the filter.
    y = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32))
    whole = Deemphasis(A)(y)
    back = Deemphasis(A)
    assert torch.equal(torch.cat([back(part) for part in y.split([1, 0, 300, 7, 692])]), whole)
    assert float(whole.abs().max()) == 1
    expected = lfilter([1], [1, -A], y.double().numpy())
    np.testing.assert_allclose(whole.numpy(), np.clip(expected, -1, 1), atol=1e-6)


def codes_of(x: np.ndarray) -> torch.Tensor:
    """Return the codes by definition."""
    return mulaw_encode(
        torch.from_numpy(x - np.float32(A) * np.concatenate([[np.float32(0)], x[:-1]])), 256
    )


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    x = speech_like(2000)
    audio.write(tmp_path / "a.wav", x, RATE, "float32")
    return Recording(tmp_path / "a.wav", "a.wav", 0, 2000, RATE)


@pytest.mark.parametrize("mel", [None, MEL], ids=["free", "mel"])
def test_codes_of_crops_equal_those_of_the_whole(recording: Recording, mel: MelConfig | None):
    model = network(mel)
    layout = layout_of(model, 400)
    expected = codes_of(speech_like(2000))
    segments = Segments([recording], layout)
    for start, first, last in layout.cover(recording):
        batch = collate(
            [segments.item(recording, 0, start, first, last, read_crop(recording, layout, start))]
        )
        codes, _, _ = inputs(model, batch, layout)
        assert torch.equal(codes[0, :last], expected[start : start + last])


FAMILIES: dict[str, Any] = {
    "wavenet": network,
    "gru": lambda mel: GRU(GRUConfig(channels=8, input_channels=4, **common(mel))),
    "transformer": lambda mel: Transformer(
        TransformerConfig(layers=2, channels=8, heads=2, window=8, patch=4, **common(mel))
    ),
}


def common(mel: MelConfig | None) -> dict[str, Any]:
    names = ("head_channels", "conditioning_channels", "sample_rate")
    return {name: SMALL[name] for name in names} | {"mel": mel, "pre_emphasis": A}


@pytest.mark.parametrize("mel", [None, MEL], ids=["free", "mel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_is_that_of_the_emphasised_codes(
    recording: Recording, family: str, mel: Any, monkeypatch
):
    torch.manual_seed(0)
    model = FAMILIES[family](mel).double().eval()
    x, codes = speech_like(2000), codes_of(speech_like(2000))
    log_mels = None if mel is None else wavear.log_mel(torch.from_numpy(x)[None].double(), mel)
    with torch.no_grad():
        parameters = model(codes[None], None if log_mels is None else model.condition(log_mels))
        nats = -model.law.log_prob(parameters, codes[None])[0].numpy()
    expected = pytest.approx(nats.sum() / math.log(2), rel=1e-6)
    assert -wavear.score(model, x).sum().item() / math.log(2) == expected
    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", 300)
    assert held_out.held_out_bits(model, [recording]).total[0] == expected
    blocks = [block for _, block in bits.scored_blocks(model, recording, None, seconds=0.05)]
    assert len(blocks) > 3
    np.testing.assert_allclose(
        np.concatenate(blocks), nats, atol=1e-9 if mel is None and family == "wavenet" else 1e-5
    )
    monkeypatch.setattr(held_out, "_READ_SECONDS", 0.05)
    layout = dataclasses.replace(layout_of(model, 1), hop=1)
    counted = list(held_out.code_blocks(recording, layout, model.grid))
    assert np.array_equal(np.concatenate(counted), codes.numpy())


@pytest.mark.parametrize("mel", [None, MEL], ids=["free", "mel"])
@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_audio_of_emphasised_codes_scores_as_drawn_on_every_engine(family: str, mel: Any):
    torch.manual_seed(0)
    model = FAMILIES[family](mel).eval()
    with torch.no_grad():  # quiet, so that no sample is clipped
        (model.head.last if family == "gru" else model.head.out).bias[:] = (
            -0.02 * (torch.arange(256) - 128) ** 2
        )
    x = torch.from_numpy(speech_like(500))
    settings: dict[str, Any] = {"mel": wavear.log_mel(x[None], mel)} if mel else {"samples": 500}
    made, logs = generate(
        model, seed=3, return_log_probability=True, engine="reference", **settings
    )
    if mel is None:  # encoding the audio gives the codes drawn
        torch.testing.assert_close(wavear.score(model, made[0])[0], logs[0], atol=1e-5, rtol=0)
    assert torch.equal(made, generate(model, seed=3, engine="numba", **settings))


def test_emphasised_codes_have_no_bits_on_a_common_grid(recording: Recording):
    """The grid of 16-bit samples applies to the audio without pre-emphasis."""
    assert bits.score_recording(network(), recording, None).common == {}
    assert set(bits.score_recording(network(a=0.0), recording, None).common) == {"linear", "mulaw"}


def test_the_loss_of_a_crop_is_that_of_the_emphasised_codes(recording: Recording):
    model, layout = network(), layout_of(network(), 1500)
    batch = collate([Segments([recording], layout)[0]])
    losses, mask = crop_loss(model, batch, layout)
    start = int(batch.start[0])
    codes = codes_of(speech_like(2000))[start : start + layout.window]
    with torch.no_grad():
        logs = torch.log_softmax(model(codes[None]), 1).gather(1, codes[None, None])[0, 0]
    assert mask[0].any()
    torch.testing.assert_close(losses[0][mask[0]].detach(), -logs[mask[0]], atol=1e-5, rtol=1e-5)


def decoded(codes: torch.Tensor) -> np.ndarray:
    y = mulaw_decode(codes, 256).double().numpy()
    return np.clip(lfilter([1], [1, -A], y), -1, 1)


def test_generated_audio_is_the_deemphasised_codes():
    model = network()
    made = generate(model, samples=300, seed=[1, 2], engine="reference")
    plain = network(a=0.0)
    plain.load_state_dict(model.state_dict())
    # The same codes, without de-emphasis.
    codes = mulaw_encode(generate(plain, samples=300, seed=[1, 2], engine="reference"), 256)
    for row, expected in zip(made, codes, strict=True):
        np.testing.assert_allclose(row.numpy(), decoded(expected), atol=1e-6)


@pytest.mark.parametrize("mel", [None, MEL], ids=["free", "mel"])
def test_a_stream_that_is_cut_and_saved_equals_generate(mel: MelConfig | None, tmp_path: Path):
    model = network(mel)
    prime = speech_like(75)
    frames = None if mel is None else torch.randn(5, 15, generator=torch.Generator().manual_seed(0))
    whole = generate(
        model, frames, samples=None if mel else 225, seed=3, engine="reference", prime=prime
    )[0]

    def parts(stream: Stream) -> list[torch.Tensor]:
        made = [stream.pull(40), stream.pull(1)] if frames is None else [stream.push(frames[:, :9])]
        stream.save(tmp_path / "s.safetensors")
        again = Stream.load(model, tmp_path / "s.safetensors", engine="reference")
        if frames is None:
            return [*made, again.pull(184)]
        return [*made, again.push(frames[:, 9:]), again.flush()]

    found = torch.cat(parts(Stream(model, seed=3, engine="reference", prime=prime)))
    assert torch.equal(found, whole)


def test_a_stream_does_not_depend_on_its_batch():
    model, prime = network(), speech_like(75)
    whole = generate(model, samples=225, seed=3, engine="reference", prime=prime)[0]
    batch = StreamBatch(model, engine="reference")
    other, member = batch.add(seed=9), batch.add(seed=3, prime=prime)
    made = []
    for count in (50, 175):
        batch.pull(other, count)
        batch.pull(member, count)
        made.append(batch.step()[member])
    assert torch.equal(torch.cat(made), whole)


def test_a_prime_of_generated_audio_continues_it_exactly():
    model = network()
    with torch.no_grad():
        # Mostly quiet codes.
        model.get_parameter("head.3.bias").copy_(-(torch.arange(256.0) - 128).abs() / 8)
    whole = generate(model, samples=200, seed=4, engine="reference")[0]
    assert float(whole.abs().max()) < 1  # no sample is clipped, so the codes can be recovered
    rest = generate(model, samples=120, seed=4, engine="reference", prime=whole[:80])[0]
    assert torch.equal(rest, whole[80:])


def test_pre_emphasis_is_saved_and_zero_in_old_checkpoints(tmp_path: Path):
    network().save(tmp_path / "a")
    assert wavear.load(tmp_path / "a").config.pre_emphasis == A
    network(a=0.0).save(tmp_path / "old")
    from safetensors.torch import load_file, save_file

    described = json.loads((tmp_path / "old" / "config.json").read_text())
    del described["config"]["pre_emphasis"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(described))
    weights = tmp_path / "old" / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"wavear": json.dumps(described)})
    assert wavear.load(tmp_path / "old").config.pre_emphasis == 0


def test_the_round_trip_bound_includes_pre_emphasis():
    from wavear.audio.grid import Grid
    from wavear.evaluation.bounds import grid_round_trip

    x = torch.from_numpy(speech_like(4000))
    found = grid_round_trip(x, Grid("mulaw", 256), A)
    np.testing.assert_allclose(found.numpy(), decoded(codes_of(x.numpy())), atol=1e-6)
    high = [
        np.abs(np.fft.rfft((y - x).numpy()))[1500:].mean()
        for y in (found, grid_round_trip(x, Grid("mulaw", 256)))
    ]
    assert high[0] < high[1] / 1.5  # the purpose of pre-emphasis: less noise above 3 kHz


def test_invalid_and_mixed_pre_emphasis_is_refused():
    with pytest.raises(ValueError, match=r"pre_emphasis is 1\.0, it must be 0 to less than 1"):
        network(a=1.0)
    from wavear.evaluation.comparison import check_codes

    one, other = (dataclasses.asdict(network(a=a).config) for a in (A, 0.0))
    with pytest.raises(ValueError, match=r"a has 0\.85 of pre-emphasis and b has 0\.0"):
        check_codes(one, other)
