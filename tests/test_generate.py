"""`generate` and `score`: the reference, shapes, independence of streams, refusals."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig, mulaw_decode, mulaw_encode
from wavear.generation import conditioner, scoring
from wavear.generation.conditioner import Conditioner, UtteranceConditioner
from wavear.generation.engines import ENGINES
from wavear.models.sampling import uniforms

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0)
SMALL: dict[str, Any] = {
    "residual_channels": 6,
    "skip_channels": 7,
    "head_channels": 9,
    "conditioning_channels": 5,
    "sample_rate": 8000,
}


def make(**settings) -> Any:
    torch.manual_seed(0)
    return WaveNet(WaveNetConfig(**{"layers": 4, "stacks": 2, "classes": 32, **SMALL, **settings}))


def mels(batch, frames):
    return torch.randn(batch, 5, frames, generator=torch.Generator().manual_seed(1))


def test_generation_follows_the_distribution_of_forward():
    """Each uniform selects its code under `forward`, given all earlier codes."""
    model = make(mel=MEL, speakers=2).double()
    mel = mels(1, 10).double()
    waveform = wavear.generate(model, mel, speaker=1, seed=9, engine="reference")
    assert waveform.shape == (1, 200)
    assert waveform.dtype == torch.float32
    codes = mulaw_encode(waveform, 32)
    assert torch.equal(mulaw_decode(codes, 32), waveform)
    with torch.no_grad():
        cumulative = (
            model(codes, model.condition(mel, torch.tensor([1]))).softmax(dim=1).cumsum(dim=1)
        )
    draws = torch.from_numpy(uniforms(9, 0, 200))
    inverse = (cumulative[0] <= draws).sum(dim=0)
    assert torch.equal(inverse, codes[0])


def test_shorter_mels_are_padded_with_silence():
    model = make(mel=MEL)
    long, short = mels(1, 9)[0], mels(1, 4)[0]
    batch = wavear.generate(model, [long, short], seed=[1, 2], engine="reference")
    assert batch.shape == (2, 180)
    assert torch.equal(batch[1, :80], wavear.generate(model, short, seed=2, engine="reference")[0])
    assert not batch[1, 80:].any()


def test_fewer_samples_equal_the_beginning_of_the_whole():
    model = make(mel=MEL)
    whole = wavear.generate(model, mels(1, 10), seed=3, engine="reference")
    part = wavear.generate(model, mels(1, 10), seed=3, samples=77, engine="reference")
    assert torch.equal(part, whole[:, :77])


@pytest.mark.parametrize("hop", [1, 3, 20, 256, 300])
def test_conditioning_does_not_depend_on_the_cuts(hop):
    mel = MelConfig(
        sample_rate=8000, n_fft=1024, window_length=1024, hop_length=hop, bands=5, fmax=4000.0
    )
    model = make(mel=mel, speakers=2)
    frames = 1000 // hop + 3
    x = list(mels(2, frames))
    with torch.no_grad():
        whole: Any = Conditioner(model, x, [0, 1]).span(0, frames * hop)
        expected = model.condition(torch.stack(x), torch.tensor([0, 1]))
        # float32 sums in another order.
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
        pieces: Any = Conditioner(model, x, [0, 1])
        alone: Any = Conditioner(model, x[1:], [1]).span(0, frames * hop)
        cuts = [0, 1, 100, 511, 512, 513, 777, frames * hop]
        parts = [pieces.span(a, b) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts, dim=2), whole)
        assert torch.equal(alone[0], whole[1])


def test_conditioning_is_computed_in_one_shape(monkeypatch):
    """All batches share one shape, since libraries may round differently for other shapes."""
    shapes = set()
    condition = WaveNet.condition

    def spy(self, mel, speaker=None, *, padded=False):
        shapes.add((mel.shape, padded))
        return condition(self, mel, speaker, padded=padded)

    monkeypatch.setattr(WaveNet, "condition", spy)
    model = make(mel=MEL)
    for batch, frames, samples in [(1, 3, 60), (3, 40, 700), (2, 103, 2060)]:
        wavear.score(model, torch.zeros(batch, samples), mels(batch, frames))
    assert len(shapes) == 1


def test_score_is_the_cross_entropy_of_forward(monkeypatch):
    monkeypatch.setattr(scoring, "PARALLEL_CHUNK", 64)  # several chunks
    model, mel = make(mel=MEL, speakers=2).double(), mels(2, 10).double()
    waveform = torch.randn(2, 200, dtype=torch.float64).clamp(-1, 1)
    codes = mulaw_encode(waveform, 32)
    with torch.no_grad():
        logits = model(codes, model.condition(mel, torch.tensor([1, 0])))
    expected = -torch.nn.functional.cross_entropy(logits, codes, reduction="none")
    found = wavear.score(model, waveform, mel, speaker=[1, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_score_is_a_distribution():
    """The probabilities of all continuations of two samples sum to one."""
    model = make(classes=4).double()
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    scores = wavear.score(model, mulaw_decode(pairs, 4))
    assert abs(scores.sum(dim=1).exp().sum().item() - 1) < 1e-12


def test_score_computes_the_mel_of_the_waveform():
    model = make(mel=MEL)
    waveform = torch.randn(1, 210).clamp(-1, 1) * 0.1
    padded = torch.nn.functional.pad(waveform, (0, 10))
    expected = wavear.score(model, waveform, wavear.log_mel(padded, MEL))
    assert torch.equal(wavear.score(model, waveform), expected)


def test_temperature_per_sample():
    model = make()
    plain = wavear.generate(model, samples=60, engine="reference")
    ones = wavear.generate(model, samples=60, temperature=np.ones(60), engine="reference")
    assert torch.equal(plain, ones)
    later = np.where(np.arange(60) < 30, 1.0, 0.01)
    mixed = wavear.generate(model, samples=60, temperature=later, engine="reference")
    assert torch.equal(mixed[:, :30], plain[:, :30])
    assert not torch.equal(mixed[:, 30:], plain[:, 30:])


def test_new_weights_are_used_at_once():
    model = make()
    before = wavear.generate(model, samples=50, engine="reference")
    with torch.no_grad():
        model.head[3].bias[7] += 100
    assert (mulaw_encode(wavear.generate(model, samples=50, engine="reference"), 32) == 7).all()
    with torch.no_grad():
        model.head[3].bias[7] -= 100
    assert torch.equal(wavear.generate(model, samples=50, engine="reference"), before)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"mel": MEL}, {}, "needs a mel: 5 bands, one frame per 20 samples"),
        (
            {"mel": MEL},
            {"mel": torch.zeros(1, 6, 10)},
            "mel has 6 bands, the model was trained on 5",
        ),
        ({"mel": MEL}, {"mel": torch.zeros(10, 5)}, "mel has 10 bands.*transposed"),
        ({"mel": MEL}, {"mel": torch.zeros(5)}, r"mel has shape \(5,\)"),
        ({"mel": MEL}, {"mel": torch.zeros(5, 0)}, "no frames"),
        ({"mel": MEL}, {"mel": torch.full((5, 2), torch.nan)}, "NaN"),
        (
            {"mel": MEL},
            {"mel": torch.zeros(5, 2), "samples": 41},
            "the frames cover 40 samples, and 41 are asked for",
        ),
        ({}, {"mel": torch.zeros(5, 2)}, "takes no mel"),
        ({}, {}, "samples is needed"),
        ({}, {"samples": 0}, "samples is 0"),
        ({}, {"samples": 5, "seed": -1}, "seed is -1"),
        ({}, {"samples": 5, "seed": 2**64}, "seed is 18446744073709551616"),
        ({}, {"samples": 5, "temperature": 0}, "temperature is 0"),
        ({}, {"samples": 5, "temperature": "a"}, "temperature is 'a'; it must be a number"),
        ({}, {"samples": 5, "temperature": float("nan")}, "temperature is nan"),
        ({}, {"samples": 5, "speaker": 0}, "trained without any"),
        ({"speakers": 2}, {"samples": 5}, "needs a speaker, 0 to 1"),
        ({"speakers": 2}, {"samples": 5, "speaker": 2}, "speaker is 2; the model has 0 to 1"),
        (
            {"speakers": 2},
            {"samples": 5, "speaker": [0, 1], "seed": [1, 2, 3]},
            "2 speakers, 3 utterances",
        ),
        (
            {},
            {"samples": 5, "engine": "warp"},
            f"engine is 'warp'; it must be one of {', '.join(ENGINES)}",
        ),
        ({}, {"samples": 5, "weights": "int3"}, "weights is 'int3'"),
        ({}, {"samples": 5, "engine": "reference", "weights": "bfloat16"}, "needs engine 'numba'"),
        ({}, {"samples": 5, "engine": "reference", "weights": "int8"}, "needs engine 'numba'"),
        ({}, {"samples": 5, "threads": 0}, "threads is 0"),
    ],
)
def test_unusable_arguments_are_refused(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        wavear.generate(make(**settings), **arguments)


def test_score_refuses_a_mel_that_is_too_short():
    with pytest.raises(ValueError, match="the mel covers 40 samples and the waveform has 41"):
        wavear.score(make(mel=MEL), torch.zeros(1, 41), torch.zeros(1, 5, 2))


def test_conditioning_of_many_utterances_uses_one_batch_size(monkeypatch):
    """Each call has a constant number of blocks, as on a GPU: bits do not depend on the batch."""
    model, frames = make(mel=MEL, speakers=2), [mels(1, n)[0] for n in (9, 4, 25)]
    single: list[Any] = [
        Conditioner(model, [mel], [b % 2]).span(0, 80) for b, mel in enumerate(frames)
    ]
    monkeypatch.setitem(conditioner._TOGETHER, "cpu", 4)
    sizes = set()
    condition = WaveNet.condition

    def spy(self, mel, *rest, **named):
        sizes.add(len(mel))
        return condition(self, mel, *rest, **named)

    monkeypatch.setattr(WaveNet, "condition", spy)
    together: Any = Conditioner(model, frames, [0, 1, 0])
    parts: list[Any] = [together.span(0, 33), together.span(33, 80)]
    found: Any = torch.cat(parts, dim=2)
    assert sizes == {4}
    torch.testing.assert_close(found, torch.cat(single), rtol=0, atol=1e-5)
    for b, mel in enumerate(frames):
        alone: Any = Conditioner(model, [mel], [b % 2])
        assert torch.equal(alone.span(0, 80), found[b : b + 1])
        growing: Any = UtteranceConditioner(model, b % 2)
        growing.push(mel)
        growing.close()
        assert torch.equal(growing.span(0, 80), found[b : b + 1])
    together.keep([2, 0])
    assert torch.equal(together.span(0, 80), found[[2, 0]])


@pytest.mark.slow
def test_candidates_share_their_conditioning(monkeypatch):
    """The mel is processed once for all `best_of` candidates."""
    model = make(mel=MEL, layers=2, stacks=1, classes=16).eval()
    calls = []
    real = model.condition
    monkeypatch.setattr(model, "condition", lambda *a, **k: calls.append(1) or real(*a, **k))
    counts = []
    for best_of in (1, 4):
        calls.clear()
        wavear.generate(model, torch.randn(5, 130), best_of=best_of, engine="reference")
        counts.append(len(calls))
    assert counts[0] == counts[1] > 10
