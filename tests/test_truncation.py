"""Truncated sampling, log-probabilities and candidates, on both engines with one result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig, mulaw_encode
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.settings import candidate_seeds
from wavear.models.sampling import sample, uniforms

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0)
ENGINES = pytest.mark.parametrize("engine", ["reference", "numba"])
TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 9, "top_p": 0.7, "temperature": 1.4},
    {"top_p": 0.95, "temperature": 0.7},
    {"top_k": 1},
    {"top_k": 1000, "top_p": 1.0},
]
truncations = pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)


def make(gain: float = 6.0, **settings: Any) -> WaveNet:
    torch.manual_seed(0)
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 10
    )
    fields = {"layers": 4, "stacks": 2, "classes": 40, "sample_rate": 8000, **sizes, **settings}
    model = WaveNet(WaveNetConfig(**fields)).eval()
    with torch.no_grad():
        model.head[3].weight.mul_(gain)  # type: ignore[union-attr]
    return model


def constant(logits: list[float]) -> WaveNet:
    """Return a model with these logits at every sample."""
    model = make(classes=len(logits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.head[3].bias.copy_(torch.tensor(logits))  # type: ignore[union-attr]
    return model


@truncations
def test_compiled_draw_equals_the_definition_on_given_logits(truncation):
    """The logits are constant, so one code at an edge does not change later ones."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(5)) * 2
    logits[[3, 17, 30]] = logits.max()  # ties at the top
    model = constant(logits.tolist())
    draws = uniforms(11, 0, 20_000)[None]
    ours = NumbaEngine(model, 1).generate(draws, None, **truncation)[0]
    temperature = truncation.get("temperature", 1.0)
    cut = {name: value for name, value in truncation.items() if name != "temperature"}
    theirs = sample(logits.expand(20_000, 40), torch.from_numpy(draws[0]), temperature, **cut)
    assert (ours == theirs.numpy()).mean() > 0.9999  # one uniform in a million lies at an edge


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@truncations
def test_a_stream_has_the_same_bits_in_every_batch_and_cut(truncation, weights):
    model = make(mel=MEL)
    cond = torch.randn(13, 10, 150, generator=torch.Generator().manual_seed(1))
    draws = np.stack([uniforms(seed, 0, 150) for seed in range(13)])
    scores = np.empty((13, 150))
    engine = NumbaEngine(model, 13, weights=weights, threads=2)
    together = engine.generate(draws, cond, log_probability=scores, **truncation)
    for b in (0, 5, 12):
        alone = NumbaEngine(model, 1, weights=weights)
        for start, stop in ((0, 1), (1, 70), (70, 150)):
            part = np.empty((1, stop - start))
            codes = alone.generate(
                draws[b : b + 1, start:stop],
                cond[b : b + 1, :, start:stop],
                log_probability=part,
                **truncation,
            )
            assert (codes[0] == together[b, start:stop]).all()
            assert (part[0] == scores[b, start:stop]).all()


@ENGINES
def test_log_probabilities_do_not_change_samples(engine):
    model = make()
    plain = wavear.generate(model, samples=200, seed=[1, 2], engine=engine)
    asked, scores = wavear.generate(
        model, samples=200, seed=[1, 2], engine=engine, return_log_probability=True
    )
    assert torch.equal(plain, asked)
    assert scores.shape == (2, 200)


@ENGINES
@pytest.mark.parametrize(
    "drawn", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.5, "temperature": 1.5}], ids=str
)
def test_log_probability_ignores_truncation(engine, drawn):
    """For any temperature and truncation it equals `score`."""
    model = make(mel=MEL)
    mel = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))
    waveform, scores = wavear.generate(
        model, mel, seed=[3, 4], engine=engine, return_log_probability=True, **drawn
    )
    # float32 logits of two implementations: 1e-4 nats, as for `score`.
    torch.testing.assert_close(scores, wavear.score(model, waveform, mel), rtol=0, atol=1e-4)


@ENGINES
def test_log_probability_ends_with_the_utterance(engine):
    model = make(mel=MEL)
    mels = [torch.zeros(5, 6), torch.zeros(5, 3)]
    _, scores = wavear.generate(model, mels, engine=engine, return_log_probability=True)
    assert not scores[1, 60:].any()
    assert (scores[1, :60] < 0).all()


@ENGINES
def test_argmax_is_the_likeliest_code_for_every_seed_and_warns(engine):
    model = make()
    with pytest.warns(UserWarning, match="collapses to silence or to a tone"):
        made = wavear.generate(model, samples=120, seed=[1, 2], argmax=True, engine=engine)
    assert torch.equal(made[0], made[1])
    codes = mulaw_encode(made[:1], 40)
    with torch.no_grad():
        assert torch.equal(model(codes).argmax(dim=1), codes)
    with pytest.warns(UserWarning, match="collapses"):
        assert torch.equal(
            wavear.generate(model, samples=120, seed=1, top_k=1, engine=engine), made[:1]
        )


def test_best_of_with_a_temperature_per_sample():
    model = make()
    curve = np.stack([np.full(60, 0.5), np.full(60, 2.0)])
    best = wavear.generate(model, samples=60, seed=[1, 2], temperature=curve, best_of=3)
    alone = wavear.generate(model, samples=60, seed=2, temperature=2.0, best_of=3)
    assert torch.equal(best[1:], alone)


def test_candidates_have_seeds_of_their_own():
    seeds = [s for seed in (0, 1, 2, 2**64 - 1) for s in candidate_seeds(seed, 50)]
    assert len(set(seeds)) == 200
    assert all(0 <= s < 2**64 for s in seeds)
    assert candidate_seeds(9, 3)[0] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k is 0; it must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        (
            {"argmax": True, "top_p": 0.5},
            "argmax takes the likeliest code: drop top_k and top_p",
        ),
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 2, "argmax": True}, "best_of is 2, and there is one argmax"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        wavear.generate(make(), samples=10, **arguments)
