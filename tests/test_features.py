"""Models conditioned on features from files: numbers or codes in place of mels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import RATE, assert_same_run, config_of, interrupt_at_step, record_of

import wavear
from wavear import WavearError, audio, train
from wavear.cli.commands import main
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate, mel_of
from wavear.data.file_mels import MelFolder
from wavear.mel.conventions import frames_from_dict
from wavear.mel.features import FeatureConfig
from wavear.models.crop_loss import layout_of
from wavear.models.info import describe

pytestmark = pytest.mark.usefixtures("one_thread")

HOP, CLASSES = 50, 3


def written(tones: Path, out: Path, codes: bool) -> Path:
    """Write two channels of features per recording: where frame f is, and noise; or codes."""
    random = np.random.default_rng(1)
    for path in tones.rglob("*.wav"):
        frames = audio.info(path).frames // HOP
        rows = np.stack([np.arange(frames) % CLASSES, random.integers(0, CLASSES, frames)])
        target = (out / path.relative_to(tones)).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, rows if codes else rows.astype(np.float32))
    return out


def settings_of(tones: Path, out: Path, codes: bool, **more: Any) -> dict[str, Any]:
    folder = written(tones, out, codes)
    own = {"features": folder, "feature_hop": HOP, "feature_classes": CLASSES if codes else 0}
    return own | {"mel_bands": 80, "mel_hop_length": None} | more


def test_crops_have_the_frames_of_the_file(tones, tmp_path):
    given = settings_of(tones, tmp_path, codes=True)
    config = config_of(tones, "out", **given)
    model = wavear.WaveNet(config.model_config())
    own = FeatureConfig(sample_rate=RATE, hop_length=HOP, channels=2, classes=CLASSES)
    assert config.mel == own == frames_from_dict(own.to_dict())
    folder = MelFolder(tmp_path, own)
    corpus = open_corpus(tones, sample_rate=RATE, least_samples=HOP, mels=folder)
    layout = layout_of(model, 512)
    segments = Segments(corpus.train, layout, seed=3)
    for index in range(20):
        hot = mel_of(collate([segments[index]]), layout)[0]
        assert hot.shape[0] == 2 * CLASSES
        assert torch.equal(hot.sum(0), torch.full_like(hot[0], 2))
        inside = hot[:CLASSES].argmax(0)
        moves = (inside[1:] - inside[:-1]) % CLASSES  # the first channel counts, except at the ends
        assert set(moves.tolist()) <= {0, 1}
        assert moves.float().mean() > 0.7


@pytest.mark.parametrize(
    ("family", "codes"), [("wavenet", False), ("wavenet", True), ("gru", True), ("transformer", 0)]
)
def test_a_trained_model_follows_a_file(tones, tmp_path, family, codes):
    """The engine makes what the reference makes, streams too, and other features, other audio."""
    given = settings_of(tones, tmp_path / "features", bool(codes), family=family)
    result = train(config_of(tones, tmp_path / "run", max_steps=2, **given))
    model = wavear.load(result.best)
    path = next((tmp_path / "features").rglob("*.npy"))
    frames = np.load(path)[:, :6]
    made = wavear.generate(model, frames, seed=1)
    assert made.shape == (1, 6 * HOP)
    assert torch.equal(made, wavear.generate(model, frames, seed=1, engine="reference"))
    assert not torch.equal(made, wavear.generate(model, frames[:, ::-1].copy(), seed=1))
    stream = wavear.Stream(model, seed=1)
    parts = [stream.push(frames[:, a : a + 2]) for a in (0, 2, 4)] + [stream.flush()]
    assert np.array_equal(np.concatenate(parts), made[0].numpy())
    out = tmp_path / "x.wav"
    assert main(["generate", str(result.best), "--features", str(path), "--out", str(out)]) == 0
    assert audio.info(out).frames == np.load(path).shape[1] * HOP
    rows = dict(describe(result.best))
    assert rows["features"].endswith(f"a frame per {HOP} samples (6.2 ms)")
    assert not any(name.startswith("mel") for name in rows)


def test_best_is_chosen_by_bits(tones, tmp_path):
    """Features leave most of the sound open: the best model need not come near the recording."""
    given = settings_of(tones, tmp_path / "features", codes=False, sample_seconds=0.3)
    result = train(config_of(tones, tmp_path / "run", validate_every=1, max_steps=3, **given))
    history = record_of(tmp_path / "run")["history"][1:]
    assert all("log_mel" in e["free_run"] and "score" not in e["free_run"] for e in history)
    best = min(history, key=lambda entry: entry["bits"])
    described = json.loads((result.best / "config.json").read_text())
    assert described["training"]["step"] == best["step"]


def test_a_resumed_run_equals_an_uninterrupted_one_and_can_be_fine_tuned(tones, tmp_path):
    given = settings_of(tones, tmp_path / "features", codes=True)
    whole = train(config_of(tones, tmp_path / "a", **given))
    with interrupt_at_step(2):
        train(config_of(tones, tmp_path / "b", **given))
    assert train(config_of(tones, tmp_path / "b", resume=True, **given)).steps == 4
    assert_same_run(tmp_path / "a", tmp_path / "b")
    start: dict[str, Any] = {
        "from_checkpoint": str(whole.best),
        "features": str(tmp_path / "features"),
    }
    tuned = wavear.TrainConfig(
        str(tones), str(tmp_path / "c"), max_steps=1, progress=False, **start
    )
    assert tuned.mel == wavear.load(train(tuned).best).config.mel
    with pytest.raises(WavearError, match="takes features: pass --features"):
        wavear.TrainConfig(str(tones), "c", from_checkpoint=str(whole.best))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_classes": 2}, "has codes from 0 to 2, the model takes 0 to 1"),
        ({"feature_classes": 0}, "int64, expected floating point; for codes, state their number"),
        ({"family": "predictive"}, "a predictive model needs mels: drop --features"),
        ({"features": "nowhere"}, "nowhere: no such folder of features"),
        ({"features": None}, "there are no features: drop feature_hop 50"),
        ({"mel_bands": 8}, "the model takes features, not mels: drop mel_bands 8"),
        ({"feature_hop": 0}, "feature_hop is 0, expected 1 or more"),
        ({"unconditional": True}, "unconditional models have no mels: drop features"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tones, tmp_path, change, message):
    given = settings_of(tones, tmp_path, codes=True) | change
    with pytest.raises((WavearError, FileNotFoundError), match=message):
        wavear.TrainConfig(str(tones), "out", **{"sample_rate": RATE} | given)


@pytest.mark.parametrize(
    "wrong", [{"channels": 0}, {"classes": -1}, {"channels": 70, "classes": 70}]
)
def test_configurations_out_of_range_are_refused(wrong):
    """A checkpoint may hold any."""
    with pytest.raises(WavearError, match=r"FeatureConfig: (channels|classes|bands) is"):
        FeatureConfig(**wrong)


def test_audio_does_not_stand_for_features(tones):
    config = FeatureConfig(sample_rate=RATE, hop_length=HOP, channels=2)
    model = wavear.WaveNet(wavear.WaveNetConfig(sample_rate=RATE, mel=config, layers=2))
    with pytest.raises(
        WavearError, match=r"features from files .--features., which audio does not"
    ):
        wavear.score(model, torch.zeros(1, 500))
    with pytest.raises(WavearError, match="needs features: 2 channels, one frame per 50 samples"):
        wavear.generate(model)
    with pytest.raises(WavearError, match=r"shape \(3, 4\), expected \(2 channels, frames\)"):
        wavear.generate(model, np.zeros((3, 4), np.float32))
