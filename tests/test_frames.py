"""Conditioning at the frame rate: indexed like its tensor; compiled code equals torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import test_predictive
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wavear.generation.conditioner import Conditioner, UtteranceConditioner
from wavear.models import frame_kernel
from wavear.models.frames import (
    FrameConditioning,
    dense,
    interpolated,
    interpolation_weights,
    joined,
    stacked,
)

few = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)


def random_frames(
    batch: int = 2, frames: int = 6, hop: int = 7, subs: int = 3, seed: int = 0
) -> FrameConditioning:
    draw = torch.Generator().manual_seed(seed)
    return FrameConditioning(
        torch.randn(batch, frames, 5, 3, generator=draw),
        torch.randn(batch, frames * subs, 4, generator=draw),
        torch.rand(batch, frames * subs, generator=draw),
        torch.rand(batch, frames * hop, generator=draw),
        torch.rand(batch, frames * hop, generator=draw),
        torch.zeros(batch, dtype=torch.long),
        frames * hop,
        interpolation_weights(hop),
    )


# ---- indexing


def test_dense_equals_the_definition_at_every_sample():
    cond = random_frames()
    found = cond.dense()
    assert tuple(found.shape) == cond.shape == (2, 12, 42)
    assert cond.dim() == found.dim()
    assert len(cond) == 2
    for t in range(42):
        frame, phase = divmod(t, 7)
        w = cond.weights[:, phase].float()
        sub = frame * 3 + phase * 3 // 7  # of seven samples: 0 to 2, 3 and 4, 5 and 6
        rows = [
            (cond.gates[:, frame] * w).sum(-1),
            cond.coefficients[:, sub],
            cond.scale[:, sub, None],
        ]
        rows += [cond.lag[:, t, None], cond.voicing[:, t, None]]
        torch.testing.assert_close(found[:, :, t], torch.cat(rows, dim=1))
    assert torch.equal(cond.gates_at(1, 3).transpose(1, 2), found[:, 1:3])


@few
@given(
    cuts=st.lists(st.tuples(st.integers(0, 41), st.integers(1, 42)), min_size=1, max_size=3),
    row=st.integers(0, 1),
)
def test_slices_of_slices_equal_those_of_the_tensor(cuts, row):
    cond = random_frames()
    tensor = cond.dense()
    for a, b in cuts:
        b = min(max(a + 1, b), cond.samples)
        a = min(a, b - 1)
        cond, tensor = cond[:, :, a:b], tensor[:, :, a:b]
        assert cond.shape == tuple(tensor.shape)
        assert torch.equal(cond.dense(), tensor)
    one, two = cond[row : row + 1, :, :], tensor[row : row + 1]
    assert torch.equal(one.dense(), two)
    for t in (0, cond.samples - 1, -1, -cond.samples):
        assert torch.equal(one[:, :, t], two[:, :, t])
        assert torch.equal(cond[torch.tensor([1, 0]), :, t], tensor[[1, 0], :, t])
    assert torch.equal(dense(cond), dense(tensor))
    assert one.gates.shape[1] <= (one.samples + 5) // 7 + 1  # every frame has a sample


def test_a_sample_beyond_the_end_is_refused():
    for t in (42, -43):
        with pytest.raises(IndexError):
            random_frames()[:, :, t]


def test_joined_blocks_and_stacked_streams_equal_tensors():
    cond = random_frames()
    tensor = cond.dense()
    blocks = [cond[:, :, :14], cond[:, :, 14:21], cond[:, :, 21:]]
    assert torch.equal(joined(blocks).dense(), tensor)
    assert joined(blocks[:1]) is blocks[0]
    # They begin at different places of a frame, so some have one frame more.
    spans = [(0, 9), (6, 15), (13, 22), (33, 42), (7, 16)]
    rows = [cond[:1, :, a:b] for a, b in spans]
    assert len({row.gates.shape[1] for row in rows}) > 1
    both: Any = stacked(rows)
    expected = torch.cat([tensor[:1, :, a:b] for a, b in spans])
    assert torch.equal(both.dense(), expected)
    assert torch.equal(both[:, :, 2:8].dense(), expected[:, :, 2:8])
    assert torch.equal(both[1:3, :, 5], expected[1:3, :, 5])
    assert stacked(rows[:1]) is rows[0]
    tensors = [torch.randn(1, 3, 4), torch.randn(1, 3, 4)]
    assert torch.equal(stacked(tensors), torch.cat(tensors))
    assert torch.equal(joined(tensors), torch.cat(tensors, dim=2))


def test_a_cast_keeps_the_precision_of_the_prediction():
    cond = random_frames().to(torch.bfloat16)
    assert cond.gates.dtype == torch.bfloat16
    assert {cond.coefficients.dtype, cond.scale.dtype, cond.lag.dtype, cond.voicing.dtype} == {
        torch.float32
    }
    found = cond.dense()  # as `step` of a bfloat16 model gets it
    assert torch.equal(found[:, 5:9].transpose(1, 2), cond.per_sample()[0])


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_interpolation_equals_numpys(steps):
    frames = np.random.default_rng(0).normal(size=9)
    at = (np.arange(7 * steps) + 0.5) / steps
    for causal, centres in ((False, np.arange(-1, 8) + 0.5), (True, np.arange(-1, 8) + 1.0)):
        weights = interpolation_weights(steps, causal)
        found = interpolated(torch.from_numpy(frames), weights)
        np.testing.assert_allclose(found.numpy(), np.interp(at, centres, frames), atol=1e-12)
        assert (weights[2] == 0).all() or not causal


# ---- compiled conditioning

NAMES = [
    "kernel 3",
    "causal",
    "speakers",
    "wide context",
    "hop that sub-frames do not divide",
    "24 kHz",
    "44.1 kHz",
]


def both_ways(
    model: Any, mel: Tensor, speaker: Tensor | None, padded: bool = False
) -> list[FrameConditioning]:
    """Return compiled conditioning and that of torch, which runs if gradients are enabled."""
    with torch.no_grad():
        compiled = model.condition(mel, speaker, padded=padded)
    with torch.enable_grad():
        plain = model.condition(mel, speaker, padded=padded)
    assert plain.gates.requires_grad
    assert not compiled.gates.requires_grad
    return [compiled, plain]


def assert_alike(found: FrameConditioning, expected: FrameConditioning) -> None:
    """Check equality up to rounding: float32 sums in another order, lags by exp."""
    assert found.samples == expected.samples
    torch.testing.assert_close(found.gates, expected.gates.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.voicing, expected.voicing, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.lag, expected.lag, rtol=0, atol=1e-3)
    assert torch.equal(found.offset, expected.offset)
    assert torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 2, 31])
def test_compiled_conditioning_equals_torch(name, frames):
    model = test_predictive.make(test_predictive.CONFIGS[name], torch.float32)
    with torch.no_grad():
        model.conditioning.period.lag.weight.mul_(0.2)  # so that rounding does not change a maximum
    mel = test_predictive.random_mel(model, 1, frames)
    speaker = torch.tensor([1]) if model.config.speakers else None
    assert_alike(*both_ways(model, mel, speaker))
    padded = test_predictive.random_mel(model, 1, frames + model.lookback + model.lookahead)
    assert_alike(*both_ways(model, padded, speaker, padded=True))


@pytest.mark.parametrize("name", ["no logarithm", "fatchord", "librosa-default", "espnet"])
def test_compiled_prediction_equals_torch_for_every_kind_of_mel(name):
    import test_prediction

    config = test_prediction.MELS[name]
    sizes = {**test_predictive.SMALL, "prediction_order": 16, "longest_period": 300}
    model: Any = test_predictive.PredictiveWaveNet(
        test_predictive.PredictiveWaveNetConfig(sample_rate=config.sample_rate, mel=config, **sizes)
    ).eval()
    wave = torch.from_numpy(test_prediction.process(6 * config.hop_length, 0.01)).float()
    assert_alike(*both_ways(model, test_prediction.log_mel(wave[None], config), None))


@pytest.mark.parametrize("name", ["kernel 3", "causal", "speakers", "44.1 kHz"])
@torch.no_grad()
def test_compiled_frames_do_not_depend_on_the_block_size(name):
    """Frames arrive one at a time, as in a stream, several at a time, or all at once."""
    model = test_predictive.make(test_predictive.CONFIGS[name], torch.float32)
    mel = test_predictive.random_mel(model, 1, 20)
    speaker = torch.tensor([1]) if model.config.speakers else None
    whole = model.condition(mel, speaker).dense()
    around = [mel[:, :, :1]] * model.lookback + [mel] + [mel[:, :, -1:]] * model.lookahead
    padded, hop = torch.cat(around, dim=2), model.config.mel.hop_length
    for size in (1, 3, 7):
        for first in range(0, 20, size):
            last = min(first + size, 20)
            window = padded[:, :, first : last + model.lookback + model.lookahead]
            part = model.condition(window, speaker, padded=True).dense()
            assert torch.equal(part, whole[:, :, first * hop : last * hop])


@torch.no_grad()
def test_generation_on_the_cpu_uses_the_compiled_code(monkeypatch):
    """Training, other precisions and batches use torch."""
    model = test_predictive.make(test_predictive.CONFIGS["kernel 3"], torch.float32)
    calls = []
    run = frame_kernel.condition
    monkeypatch.setattr(frame_kernel, "condition", lambda *a: calls.append(a[-1]) or run(*a))
    mel = test_predictive.random_mel(model, 1, 12)
    conditioner = Conditioner(model, [mel[0]], None)
    conditioner.span(0, 12 * 24)
    assert sum(calls) == 15  # in whole blocks of 5 frames
    calls.clear()
    model.condition(mel.expand(2, -1, -1))
    model.double().condition(mel.double())
    with torch.enable_grad():
        model.float().condition(mel)
    assert calls == []


@few
@given(cuts=st.lists(st.integers(1, 287), max_size=5), speakers=st.booleans(), causal=st.booleans())
def test_spans_of_a_conditioner_equal_the_whole(cuts, speakers, causal):
    """Equal bit for bit, for a growing mel with forgotten frames and for different lengths."""
    with torch.inference_mode():
        config = test_predictive.small(speakers=2 if speakers else 0, causal=causal)
        model = test_predictive.make(config, torch.float32)
        mel = test_predictive.random_mel(model, 2, 12)
        speaker = [0, 1] if speakers else None
        rows = [
            model.condition(mel[b : b + 1], torch.tensor([b]) if speakers else None).dense()
            for b in range(2)
        ]
        bounds = sorted({0, 288, *cuts})
        together = Conditioner(model, [mel[0], mel[1]], speaker)
        growing = UtteranceConditioner(model, 1 if speakers else None)
        pushed = 0
        for a, b in pairwise(bounds):
            span = together.span(a, b)
            assert torch.equal(span.dense(), torch.cat(rows)[:, :, a:b])
            while growing.certain < b:
                if pushed == 12:
                    growing.close()
                else:
                    growing.push(mel[1, :, pushed : pushed + 1])
                    pushed += 1
            assert torch.equal(growing.span(a, b).dense(), rows[1][:, :, a:b])
            growing.forget(b)
        shorter = Conditioner(model, [mel[0, :, :5], mel[1]], speaker).span(0, 288).dense()
        assert torch.equal(
            shorter[0, :, : 5 * 24 - 24 * model.lookahead],
            rows[0][0, :, : 5 * 24 - 24 * model.lookahead],
        )
        assert torch.equal(shorter[1:], rows[1])
