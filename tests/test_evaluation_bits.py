"""Bits per sample are exact, whatever the length; the laws they are compared with are what they say."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from wavear import MelConfig, WaveNet, WaveNetConfig, audio, mulaw_encode, score
from wavear.data import open_corpus
from wavear.evaluation import linear
from wavear.evaluation.bits import LEVELS, Baselines, score_recording, scored_blocks
from wavear.evaluation.linear import LinearPredictor, edges, log_mass
from wavear.evaluation.statistics import bootstrap
from wavear.grid import Grid
from wavear.segments import Layout
from wavear.training import bits as training_bits
from wavear.training.bits import held_out_bits

RATE = 8000
MEL = MelConfig(sample_rate=RATE, n_fft=128, window_length=128, hop_length=40, bands=10, fmax=4000.0)


def tiny(**settings: Any) -> WaveNet:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4)
    return WaveNet(WaveNetConfig(layers=4, stacks=1, sample_rate=RATE, **sizes, **settings)).eval()


def sounds(seconds: float, seed: int = 0) -> np.ndarray:
    """Filtered noise that swells."""
    x = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    x = np.convolve(x, [1, 1.2, 0.6], mode="same") * np.linspace(0.002, 0.2, x.size)
    return x.clip(-1, 1).astype(np.float32)


@pytest.fixture
def recordings(tmp_path: Path):
    """Three, held out, of lengths that are no multiple of the hop."""
    (tmp_path / "clips").mkdir()
    for n, seconds in enumerate((0.5, 0.7031, 0.3)):
        audio.write(tmp_path / "clips" / f"{n}.wav", sounds(seconds, n), RATE)
    found = open_corpus(tmp_path / "clips", sample_rate=RATE, validation=tmp_path / "clips")
    return found.validation


# ---- the model


@pytest.mark.parametrize(
    ("settings", "speaker"),
    [({"mel": MEL}, None), ({}, None), ({"mel": MEL, "speakers": 3}, 2)],
    ids=["mel", "free", "speakers"],
)
def test_bits_are_those_of_score_to_the_last_sample(recordings, settings, speaker):
    model = tiny(**settings)
    for recording in recordings:
        nats = -score(model, audio.read(recording.path), speaker=speaker)
        found = score_recording(model, recording, speaker)
        assert found.samples == nats.numel() == recording.frames
        assert found.bits["model"] == pytest.approx(float(nats.sum()) / math.log(2), rel=1e-12)


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.333])
@pytest.mark.parametrize(
    ("settings", "speaker"),
    [({"mel": MEL}, None), ({}, None), ({"mel": MEL, "speakers": 3}, 1)],
    ids=["mel", "free", "speakers"],
)
def test_blocks_are_scored_as_in_the_whole(recordings, settings, speaker, seconds):
    """To float32 rounding: every block has the past, and the mel of the whole with all its conditioning looks at."""
    model = tiny(**settings)
    for recording in recordings:
        whole = -score(model, audio.read(recording.path), speaker=speaker)[0].numpy()
        blocks = list(scored_blocks(model, recording, speaker, seconds=seconds))
        assert len(blocks) == math.ceil(recording.frames / (math.ceil(seconds * RATE / 40) * 40))
        assert np.abs(np.concatenate([nats for _, nats in blocks]) - whole).max() < 1e-5
        waveform = np.concatenate([waveform for waveform, _ in blocks])
        assert np.array_equal(waveform, audio.read(recording.path).numpy())


def test_bits_are_those_of_training(tmp_path: Path):
    """Of whole frames; training leaves out what follows them."""
    audio.write(tmp_path / "a.wav", sounds(0.5), RATE)
    clip = open_corpus(tmp_path, sample_rate=RATE, validation=tmp_path).validation[0]
    model = tiny(mel=MEL)
    found = score_recording(model, clip, None)
    assert found.bits["model"] / found.samples == pytest.approx(held_out_bits(model, [clip]).per_sample, rel=1e-6)


def test_bits_by_level_add_up_and_lie_where_the_sound_is(tmp_path: Path):
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


def test_digest_tells_recordings_apart_by_their_codes(tmp_path: Path):
    """To the last sample."""
    x = sounds(0.3)
    y = x.copy()
    y[-1] = 0.9
    for n, waveform in enumerate((x, y, x)):
        audio.write(tmp_path / f"{n}.wav", waveform, RATE)
    clips = open_corpus(tmp_path, sample_rate=RATE, validation=tmp_path).validation
    a, b, c = (score_recording(tiny(), clip, None).digest for clip in clips)
    assert a == c != b


# ---- laws without a model


def test_baselines_are_those_of_training_and_cover_every_sample(recordings, monkeypatch):
    model = tiny(mel=MEL)
    layout = Layout.of(model, 1)
    fitted = Baselines.fit([recordings[0], recordings[2]], layout, Grid("mulaw", 256))
    whole = fitted.bits(recordings[1], layout, Grid("mulaw", 256))
    monkeypatch.setattr(training_bits, "_READ_SECONDS", 0.013)  # blocks much shorter than the recording
    blocks = fitted.bits(recordings[1], layout, Grid("mulaw", 256))
    assert set(whole) == {"uniform", "unigram", "markov", "linear"}
    assert whole == pytest.approx(blocks, rel=1e-12)
    assert whole["uniform"] == 8 * recordings[1].frames
    assert recordings[1].frames % MEL.hop_length
    assert whole["uniform"] > whole["unigram"] > whole["linear"]


@pytest.mark.parametrize("law", ["laplace", "normal"])
def test_mass_is_that_of_scipy_in_the_middle_and_in_both_tails(law):
    theirs: Any = {"laplace": stats.laplace, "normal": stats.norm}[law]
    low = np.array([-3.0, -0.5, 0.2, 1.0, -np.inf, 2.0])
    high = np.array([-2.0, 0.7, 0.3, 4.0, 0.5, np.inf])
    assert log_mass(low, high, law) == pytest.approx(np.log(theirs.cdf(high) - theirs.cdf(low)), rel=1e-9)
    # Far out, where 1 - cdf is 0: the mass is that above its lower end, less a share that is known.
    far = log_mass(np.array([30.0, -31.0]), np.array([31.0, -30.0]), law)
    assert far == pytest.approx(theirs.logsf(30) + np.log1p(-np.exp(theirs.logsf(31) - theirs.logsf(30))), rel=1e-9)


@pytest.mark.parametrize("law", ["laplace", "normal"])
@pytest.mark.parametrize("domain", ["linear", "companded"])
def test_probabilities_of_all_codes_add_up_to_one(law, domain):
    limits = edges(Grid("mulaw", 64), domain)
    for prediction in (-2.0, -0.3, 0.0, 0.004, 0.9):
        mass = np.exp(log_mass((limits[:-1] - prediction) / 0.05, (limits[1:] - prediction) / 0.05, law))
        assert mass.sum() == pytest.approx(1, abs=1e-9)


def test_edges_lie_where_the_code_changes():
    limits = edges(Grid("mulaw", 256), "linear")[1:-1]
    assert np.array_equal(mulaw_encode(limits * (1 + 1e-5) + 1e-9, 256), np.arange(1, 256) - (limits < 0))
    assert np.array_equal(mulaw_encode(limits * (1 - 1e-5) - 1e-9, 256), np.arange(0, 255) + (limits < 0))


@pytest.mark.parametrize("law", ["laplace", "normal"])
def test_predictor_finds_the_process_and_its_entropy(law):
    """x[t] = 1.6 x[t-1] - 0.8 x[t-2] + e: its weights, its law, and h(e) - E log2(width of the interval) bits."""
    random, scale, classes = np.random.default_rng(0), 0.01, 16384
    e = random.laplace(0, scale, 60000) if law == "laplace" else random.normal(0, scale, 60000)
    x = np.zeros(60000)
    for t in range(2, x.size):
        x[t] = 1.6 * x[t - 1] - 0.8 * x[t - 2] + e[t]
    codes = mulaw_encode(x, classes)
    half = x.size // 2
    fitted = LinearPredictor.fit([codes[:half]], Grid("mulaw", classes))
    assert (fitted.law, fitted.domain) == (law, "linear")
    assert fitted.weights[-2:] == pytest.approx([-0.8, 1.6], abs=0.03)
    assert fitted.scale == pytest.approx(scale, rel=0.02)
    entropy = math.log2(2 * math.e * scale) if law == "laplace" else 0.5 * math.log2(2 * math.pi * math.e * scale**2)
    width = np.diff(edges(Grid("mulaw", classes), "linear"))[codes[half:]]
    assert fitted.bits(codes[half:]).mean() == pytest.approx(entropy - np.log2(width).mean(), abs=0.02)


def test_predictor_sees_the_past_only_and_blocks_change_nothing(monkeypatch):
    codes = mulaw_encode(sounds(0.5), 256)
    fitted = LinearPredictor.fit([codes], Grid("mulaw", 256))
    bits = fitted.bits(codes)
    changed = codes.copy()
    changed[2000:] = 255 - changed[2000:]
    assert np.array_equal(fitted.bits(changed)[:2000], bits[:2000])
    monkeypatch.setattr(linear, "_BLOCK", 77)
    assert fitted.bits(codes) == pytest.approx(bits, rel=1e-12)
    assert LinearPredictor.fit([codes], Grid("mulaw", 256)).weights == pytest.approx(fitted.weights, rel=1e-6)


def test_predictor_takes_the_domain_that_fits():
    """A walk over codes is linear in companded values."""
    random = np.random.default_rng(0)
    codes = (128 + 60 * np.sin(np.arange(20000) / 50) + random.laplace(0, 1.5, 20000)).round().astype(np.int64)
    assert LinearPredictor.fit([codes.clip(0, 255)], Grid("mulaw", 256)).domain == "companded"


def test_nothing_to_fit_to_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        LinearPredictor.fit([], Grid("mulaw", 256))


# ---- intervals


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_clips():
    x = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(x, resamples=4000)
    error = x.std() / math.sqrt(x.size)
    assert found.mean == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_weights_are_resampled_with_their_clips():
    """A clip of weight 0 changes neither mean nor interval but by being drawn instead of others."""
    found = bootstrap([1.0, 3.0], [1.0, 3.0], resamples=4000)
    assert (found.mean, found.low, found.high) == (2.5, 1.0, 3.0)
    assert bootstrap([1.0]).low is None
    assert bootstrap([1.0, 2.0, 4.0], seed=3) == bootstrap([1.0, 2.0, 4.0], seed=3)
