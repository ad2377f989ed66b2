"""Checkpoints and runs of older versions, whose mels have fewer fields; presets in training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MEL, SIZES, tiny

import wavear
from wavear import MelConfig, TrainConfig, audio, log_mel


def test_a_checkpoint_of_an_older_version_loads(tmp_path: Path):
    """Neither file of an older checkpoint has `floor_mode`."""
    model = tiny(mel=MEL)
    model.save(tmp_path / "old")
    described = json.loads((tmp_path / "old" / "config.json").read_text())
    assert described["config"]["mel"].pop("floor_mode") == "clip"
    text = json.dumps(described, indent=2)
    (tmp_path / "old" / "config.json").write_text(text)
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"wavear": text})
    loaded = wavear.load(tmp_path / "old")
    assert loaded.config == model.config
    mel = torch.zeros(10, 4)
    assert torch.equal(
        wavear.generate(loaded, mel, engine="reference"),
        wavear.generate(model, mel, engine="reference"),
    )


def test_an_added_floor_is_added():
    config = MelConfig(floor_mode="add", floor=1e-3, log_base="10")
    wave = torch.randn(1, 5000, dtype=torch.float64) * 0.01
    bare = log_mel(wave, MelConfig(log_base="none", floor=0.0))
    torch.testing.assert_close(log_mel(wave, config), torch.log10(bare + 1e-3), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="floor_mode is 'max', expected 'clip' or 'add'"):
        MelConfig(floor_mode="max")  # pyright: ignore[reportArgumentType]


def settings(tmp_path: Path, **more: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "layers": 2,
        "stacks": 1,
        "segment": 512,
        "batch_size": 1,
        "device": "cpu",
        **SIZES,
    }
    small["family"] = "wavenet"
    small |= {
        "sample_seconds": 0.0,
        "progress": False,
        "data": str(tmp_path / "data"),
        "out": str(tmp_path / "run"),
    }
    return TrainConfig(**{**small, **more})


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    for number in range(3):
        audio.write(tmp_path / "data" / f"{number}.wav", noise, 22050)
    return tmp_path


def test_training_with_a_preset(recordings: Path):
    result = wavear.train(settings(recordings, mel_preset="torchaudio-tacotron2", max_steps=1))
    assert wavear.load(result.best).config.mel == MelConfig.preset("torchaudio-tacotron2")


def test_a_run_of_an_older_version_resumes(recordings: Path):
    wavear.train(settings(recordings, max_steps=1))
    record = recordings / "run" / "train.json"
    described = json.loads(record.read_text())
    del described["model"]["mel"]["floor_mode"]
    record.write_text(json.dumps(described))
    assert wavear.train(settings(recordings, max_steps=2, resume=True)).steps == 2


def test_a_preset_excludes_other_mel_settings(tmp_path: Path):
    with pytest.raises(ValueError, match="mel_preset 'r9y9' sets the mels: drop mel_bands"):
        settings(tmp_path, mel_preset="r9y9", mel_bands=40)
    with pytest.raises(ValueError, match="the mel is of 24000 Hz audio and the model of 22050 Hz"):
        settings(tmp_path, mel_preset="espnet-24k")
    with pytest.raises(ValueError, match="there is no mel preset 'r9y8': did you mean 'r9y9'"):
        settings(tmp_path, mel_preset="r9y8")


UNUSUAL = {
    "n_fft": 512,
    "window_length": 400,
    "window": "blackman",
    "hop_length": 80,
    "centre": "start",
    "padding": "zeros",
    "bands": 30,
    "fmin": 20.0,
    "fmax": 3000.0,
    "mel_scale": "htk",
    "norm": None,
    "power": 2.0,
    "power_offset": 1e-9,
    "power_floor": 1e-8,
    "floor": 1e-7,
    "floor_mode": "add",
    "log_base": "10",
    "scale": 0.5,
    "shift": 0.1,
    "clip": (-8.0, 3.0),
}


def test_training_accepts_every_field_of_a_mel(recordings: Path):
    assert MelConfig(**UNUSUAL).to_dict().keys() == {"sample_rate", *UNUSUAL}
    own = {f"mel_{name}": value for name, value in UNUSUAL.items()} | {"mel_norm": "none"}
    result = wavear.train(settings(recordings, **own, max_steps=1))
    assert wavear.load(result.best).config.mel == MelConfig(**UNUSUAL)
    default = dataclasses.fields(MelConfig)
    assert all(getattr(MelConfig(), f.name) != UNUSUAL.get(f.name, 0) for f in default)


def test_a_clip_is_two_numbers(tmp_path: Path):
    with pytest.raises(ValueError, match="mel_clip is 5, expected two numbers"):
        settings(tmp_path, mel_clip=5)
