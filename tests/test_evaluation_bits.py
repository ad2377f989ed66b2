"""Bits per sample are exact at any length; the baselines have their known values."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import soundfile
import torch
from small_models import MEL, RATE

from wavear import (
    GRU,
    GRUConfig,
    Transformer,
    TransformerConfig,
    audio,
    mulaw_encode,
    score,
)
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.data.corpus import open_corpus
from wavear.data.crops import read_span
from wavear.evaluation import held_out as training_bits
from wavear.evaluation.bits import (
    LEVELS,
    Baselines,
    bits_of,
    fit_predictor,
    score_recording,
    scored_blocks,
)
from wavear.evaluation.statistics import bootstrap
from wavear.models.crop_loss import layout_of

tiny = partial(small_models.tiny, layers=4)


def sounds(seconds: float, seed: int = 0) -> np.ndarray:
    """Return filtered noise with a rising level."""
    x = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    x = np.convolve(x, [1, 1.2, 0.6], mode="same") * np.linspace(0.002, 0.2, x.size)
    return x.clip(-1, 1).astype(np.float32)


@pytest.fixture
def recordings(tmp_path: Path):
    """Return three held-out recordings whose lengths are not multiples of the hop."""
    (tmp_path / "clips").mkdir()
    for n, seconds in enumerate((0.5, 0.7031, 0.3)):
        audio.write(tmp_path / "clips" / f"{n}.wav", sounds(seconds, n), RATE)
    found = open_corpus(tmp_path / "clips", sample_rate=RATE, validation=tmp_path / "clips")
    return found.validation


# ---- the model


@pytest.mark.parametrize(
    "settings", [{}, {"law": "logistic_mixture"}, {"law": "gaussian"}], ids=["own", "mix", "gauss"]
)
def test_bits_on_common_grids_equal_those_of_score(recordings, settings):
    """This holds in blocks too; one of the two grids is the model's own."""
    model = tiny(mel=MEL, **settings)
    recording = recordings[0]
    x = audio.read(recording.path)
    found = score_recording(model, recording, None)
    per_grid = {
        name: -float(score(model, x, grid=name).sum()) / math.log(2) for name in ("linear", "mulaw")
    }
    assert found.common == pytest.approx(per_grid, rel=1e-9)
    assert found.bits["model"] == found.common["linear" if settings else "mulaw"]
    assert per_grid["linear"] > per_grid["mulaw"]
    grids = list(COMMON_GRIDS.values())
    blocks = scored_blocks(model, recording, None, seconds=0.1, grids=grids)
    rows = np.concatenate([nats for _, nats in blocks], 1)
    assert rows.sum(1) / math.log(2) == pytest.approx(list(per_grid.values()), rel=1e-6)


def test_score_on_mulaw_codes_sums_the_16_bit_values_of_each_code():
    """P(code | past) is the sum over its 16-bit values under the distribution of `forward`."""
    model = tiny(law="logistic_mixture")
    x = torch.from_numpy(sounds(0.01))
    x = model.grid.decode(model.grid.encode(x))
    found = score(model, x, grid="mulaw")[0]
    with torch.inference_mode():
        parameters = model(model.grid.encode(x)[None]).double()
    code_of = mulaw_encode(torch.from_numpy(model.grid.values().copy()))
    for t in range(0, x.numel(), 26):
        values = torch.nonzero(code_of == mulaw_encode(x[t])).T
        each = model.law.log_prob(
            parameters[:, :, t : t + 1].expand(-1, -1, values.shape[1]), values
        )
        assert float(found[t]) == pytest.approx(float(torch.logsumexp(each[0], 0)), abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({}, {"grid": "16"}, "grid is '16'; it must be linear or mulaw"),
        ({}, {"grid": "linear", "engine": "reference"}, "needs engine 'parallel'"),
        ({"pre_emphasis": 0.5}, {"grid": "linear"}, "pre-emphasised"),
        ({"law": "gaussian", "classes": 256}, {"grid": "mulaw"}, "each is the finer grid"),
    ],
)
def test_grids_without_bits_are_refused(settings, arguments, words):
    with pytest.raises(ValueError, match=words):
        score(tiny(**settings), sounds(0.01), **arguments)


@pytest.mark.parametrize(
    ("settings", "speaker"),
    [
        pytest.param({"mel": MEL}, None, marks=pytest.mark.slow, id="mel"),
        pytest.param({}, None, id="free"),
        pytest.param({"mel": MEL, "speakers": 3}, 1, id="speakers"),
    ],
)
def test_bits_equal_score_to_the_last_sample_in_blocks_too(recordings, settings, speaker):
    """Blocks equal the whole to float32 rounding, since each has its context and the whole mel."""
    model = tiny(**settings)
    for recording in recordings:
        whole = -score(model, audio.read(recording.path), speaker=speaker)[0].numpy()
        found = score_recording(model, recording, speaker)
        assert found.samples == whole.size == recording.frames
        assert found.bits["model"] == pytest.approx(whole.sum() / math.log(2), rel=1e-12)
        for seconds in (0.05, 0.333):
            blocks = list(scored_blocks(model, recording, speaker, seconds=seconds))
            length = math.ceil(seconds * RATE / 40) * 40
            assert len(blocks) == math.ceil(recording.frames / length)
            assert np.abs(np.concatenate([nats for _, nats in blocks]) - whole).max() < 1e-5
            waveform = np.concatenate([waveform for waveform, _ in blocks])
            assert np.array_equal(waveform, audio.read(recording.path).numpy())


CARRYING: dict[str, Any] = {
    "gru": GRU(GRUConfig(channels=16, input_channels=8, sample_rate=RATE, mel=MEL)),
    "gru, speakers": GRU(GRUConfig(channels=16, input_channels=8, sample_rate=RATE, speakers=3)),
    "transformer": Transformer(
        TransformerConfig(
            layers=2, channels=8, heads=2, window=4, patch=7, sample_rate=RATE, mel=MEL
        )
    ),
}


@pytest.mark.parametrize("model", CARRYING.values(), ids=CARRYING.keys())
def test_blocks_of_models_that_carry_a_state_equal_the_whole(recordings, model, monkeypatch):
    """Each read covers at most one block and the samples under its mel."""
    model, speaker = model.eval(), 2 if model.config.speakers else None
    for recording in recordings:
        whole = -score(model, audio.read(recording.path), speaker=speaker)[0].numpy()
        read: list[int] = []

        def reads(recording, rate, first, last, read=read):
            read.append(last - first)
            return read_span(recording, rate, first, last)

        monkeypatch.setattr("wavear.evaluation.bits.read_span", reads)
        blocks = list(scored_blocks(model, recording, speaker, seconds=0.1))
        assert np.abs(np.concatenate([nats for _, nats in blocks]) - whole).max() < 1e-5
        assert max(read) < 0.2 * RATE
        waveform = np.concatenate([waveform for waveform, _ in blocks])
        assert np.array_equal(waveform, audio.read(recording.path).numpy())


def test_bits_by_level_add_up_and_match_the_level_of_the_sound(tmp_path: Path):
    quiet, loud = 0.0005, 0.05  # -66 and -26 dB
    x = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    x[: RATE // 2] *= quiet
    x[RATE // 2 :] *= loud
    audio.write(tmp_path / "a.wav", x, RATE)
    clip = open_corpus(tmp_path, sample_rate=RATE, validation=tmp_path).validation[0]
    found = score_recording(tiny(), clip, None)
    levels = dict(zip(itertools.pairwise(LEVELS), found.level_samples.tolist(), strict=True))
    assert levels[-70.0, -60.0] == levels[-30.0, -20.0] == RATE // 2
    assert found.level_samples.sum() == RATE
    assert found.level_bits.sum() == pytest.approx(found.bits["model"], rel=1e-12)


def test_recordings_that_differ_in_the_last_code_have_different_digests(tmp_path: Path):
    x = sounds(0.3)
    y = x.copy()
    y[-1] = 0.9
    for n, waveform in enumerate((x, y, x)):
        audio.write(tmp_path / f"{n}.wav", waveform, RATE)
    clips = open_corpus(tmp_path, sample_rate=RATE, validation=tmp_path).validation
    a, b, c = (score_recording(tiny(), clip, None).digest for clip in clips)
    assert a == c != b


# ---- baselines


def test_baselines_cover_every_sample_in_blocks_of_any_length(recordings, monkeypatch):
    model = tiny(mel=MEL)
    layout = layout_of(model, 1)
    fitted = Baselines.fit([recordings[0], recordings[2]], layout, Grid("mulaw", 256))
    whole = fitted.bits(recordings[1], layout, Grid("mulaw", 256))
    monkeypatch.setattr(training_bits, "_READ_SECONDS", 0.013)
    blocks = fitted.bits(recordings[1], layout, Grid("mulaw", 256))
    assert set(whole) == {"uniform", "unigram", "markov", "linear"}
    assert whole == pytest.approx(blocks, rel=1e-12)
    assert whole["uniform"] == 8 * recordings[1].frames
    assert recordings[1].frames % MEL.hop_length
    assert whole["uniform"] > whole["unigram"] > whole["linear"]


def test_the_baselines_skip_recordings_that_cannot_be_read(tmp_path: Path):
    """One has a non-finite sample, one is shorter than its header states."""
    for n in range(4):
        x = sounds(0.3, n)
        x[1000] = math.nan if n == 1 else x[1000]
        soundfile.write(tmp_path / f"{n}.wav", x, RATE, "FLOAT")
    data = (tmp_path / "2.wav").read_bytes()
    recordings = open_corpus(tmp_path, sample_rate=RATE, validation=tmp_path).validation
    (tmp_path / "2.wav").write_bytes(data[: len(data) // 2])
    layout, grid = layout_of(tiny(), 1), Grid("mulaw", 256)
    found = Baselines.fit(recordings, layout, grid)
    good = Baselines.fit([recordings[0], recordings[3]], layout, grid)
    assert list(found.failed) == ["1.wav", "2.wav"]
    assert "truncated" in found.failed["2.wav"]
    assert found.bits(recordings[0], layout, grid) == good.bits(recordings[0], layout, grid)
    with pytest.raises(
        ValueError, match=r"none of the recordings for the baselines can be read; the first: 1\.wav"
    ):
        Baselines.fit(recordings[1:3], layout, grid)


@pytest.mark.parametrize("law", ["laplace", "gaussian"])
def test_predictor_finds_the_process_and_its_entropy(law):
    """The process x[t] = 1.6 x[t-1] - 0.8 x[t-2] + e has h(e) - E log2(code width) bits."""
    random, scale, grid = np.random.default_rng(0), 0.01, Grid("mulaw", 16384)
    e = random.laplace(0, scale, 60000) if law == "laplace" else random.normal(0, scale, 60000)
    x = np.zeros(60000)
    for t in range(2, x.size):
        x[t] = 1.6 * x[t - 1] - 0.8 * x[t - 2] + e[t]
    codes = grid.encode(x)
    half = x.size // 2
    fitted = fit_predictor([codes[:half]], grid)
    assert (fitted.config.law, fitted.config.domain) == (law, "linear")
    assert fitted.taps()[:2].tolist() == pytest.approx([1.6, -0.8], abs=0.03)
    assert fitted.scale().item() == pytest.approx(scale, rel=0.02)
    entropy = (
        math.log2(2 * math.e * scale)
        if law == "laplace"
        else 0.5 * math.log2(2 * math.pi * math.e * scale**2)
    )
    width = np.diff(grid.edges())[codes[half:]]
    assert bits_of(fitted, codes[half:]).mean() == pytest.approx(
        entropy - np.log2(width).mean(), abs=0.02
    )


def test_predictor_sees_only_the_past_and_blocks_equal_the_whole():
    codes = mulaw_encode(sounds(0.5), 256)
    fitted = fit_predictor([codes], Grid("mulaw", 256))
    bits = bits_of(fitted, codes)
    assert bits.shape == codes.shape
    changed = codes.copy()
    changed[2000:] = 255 - changed[2000:]
    assert np.array_equal(bits_of(fitted, changed)[:2000], bits[:2000])
    order = fitted.receptive_field
    assert order is not None
    later = bits_of(fitted, codes[500 - order :], first=order)
    assert later == pytest.approx(bits[500:], rel=1e-12)


def test_predictor_chooses_the_domain_that_fits():
    """A process on codes is linear in companded values."""
    random = np.random.default_rng(0)
    codes = (
        (128 + 60 * np.sin(np.arange(20000) / 50) + random.laplace(0, 1.5, 20000))
        .round()
        .astype(np.int64)
    )
    assert fit_predictor([codes.clip(0, 255)], Grid("mulaw", 256)).config.domain == "companded"


# ---- intervals


def test_bootstrap_interval_of_many_clips_equals_the_normal_interval():
    x = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(x, resamples=4000)
    error = x.std() / math.sqrt(x.size)
    assert found.mean == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_weights_are_resampled_with_their_clips():
    found = bootstrap([1.0, 3.0], [1.0, 3.0], resamples=4000)
    assert (found.mean, found.low, found.high) == (2.5, 1.0, 3.0)
    assert bootstrap([1.0]).low is None
    assert bootstrap([1.0, 2.0, 4.0], seed=3) == bootstrap([1.0, 2.0, 4.0], seed=3)
