"""The voice that comes with wavear: one command to hear it, and training from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import config_of

import wavear
from wavear import TrainConfig, WavearError, audio
from wavear.cli.arguments import checkpoint_and_inputs
from wavear.cli.commands import main
from wavear.generation.jobs import plan
from wavear.models.checkpoint import SHIPPED, VOICE

RATE = 22050


@pytest.fixture(scope="module")
def voice() -> wavear.PredictiveWaveNet:
    return wavear.load()


@pytest.fixture
def buzz(tmp_path: Path) -> Path:
    """A recording: a quarter of a second of a pulse train with noise."""
    rng = np.random.default_rng(0)
    x = 0.01 * rng.standard_normal(RATE // 4)
    x[::100] += 0.4
    path = tmp_path / "buzz.wav"
    audio.write(path, x.astype(np.float32), RATE)
    return path


def test_the_voice_has_the_mels_of_hifigan_and_fits_in_two_megabytes(voice):
    hifigan = wavear.MelConfig.preset("hifigan")
    assert voice.config.mel == dataclasses.replace(hifigan, power_offset=0.0)  # there 1e-9
    assert voice.config.speakers == 0
    assert sum(p.stat().st_size for p in (SHIPPED / VOICE).iterdir()) < 2_000_000
    assert wavear.load("voice").config == voice.config


def test_the_voice_follows_a_sentence_it_was_not_trained_on(voice):
    """The mel of the generated audio is compared with the one given.

    The mean log of another part of the sentence is 2 nats away; two draws of noise are 0.36.
    """
    with np.load(SHIPPED / VOICE / "sentence.npz") as file:
        mel = torch.from_numpy(file["mel"].astype(np.float32))[:, 40:160]
    made = wavear.log_mel(wavear.generate(voice, mel, seed=0), voice.config.mel)[0]
    distance = float((made[:, : mel.shape[1]] - mel).abs().mean())
    shifted = float((made[:, 20 : mel.shape[1]] - mel[:, :-20]).abs().mean())
    assert distance < 0.7
    assert distance < shifted / 2


def test_one_command_writes_next_to_the_input_and_scores(buzz, capsys):
    assert main(["synthesize", str(buzz)]) == 0
    made = buzz.with_name("buzz-synthesized.wav")
    assert len(audio.read(made)) == RATE // 4 // 256 * 256
    assert "bits per sample" in capsys.readouterr().err
    assert main(["synthesize", str(buzz)]) == 1
    assert "exists: choose a folder to write to with --out" in capsys.readouterr().err
    assert main(["synthesize", str(buzz.parent), "--overwrite"]) == 0
    assert sorted(p.name for p in buzz.parent.iterdir()) == ["buzz-synthesized.wav", "buzz.wav"]


def test_resume_needs_a_folder(buzz, capsys):
    assert main(["synthesize", str(buzz), "--resume"]) == 1
    assert "pass --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.wav"], ("voice", ["a.wav"])),
        (["a.wav", "b.npy"], ("voice", ["a.wav", "b.npy"])),
        (["missing.wav", "a.wav"], ("voice", ["missing.wav", "a.wav"])),
        (["mels"], ("voice", ["mels"])),
        (["-"], ("voice", ["-"])),
        (["voice", "a.wav"], ("voice", ["a.wav"])),
        (["run/best", "a.wav"], ("run/best", ["a.wav"])),
        (["owner/name", "a.wav"], ("owner/name", ["a.wav"])),
        (["run", "a.wav"], ("run", ["a.wav"])),  # `load` then names run/best
    ],
)
def test_a_checkpoint_may_lead_the_inputs(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.wav").touch()
    Path("b.npy").touch()
    Path("mels").mkdir()
    Path("run/best").mkdir(parents=True)
    Path("run/best/config.json").touch()
    checkpoint, inputs = checkpoint_and_inputs([Path(a) for a in arguments])
    assert (checkpoint, [str(p) for p in inputs]) == expected


@pytest.mark.parametrize("name", ["voice", "run/best"])
def test_a_checkpoint_without_inputs_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run/best").mkdir(parents=True)
    Path("run/best/config.json").touch()
    with pytest.raises(WavearError, match="name the audio or mels"):
        checkpoint_and_inputs([Path(name)])


def test_files_of_one_folder_that_would_become_one_are_refused(tmp_path):
    for name in ("a.wav", "a.flac"):
        (tmp_path / name).touch()
    with pytest.raises(WavearError, match="would both become"):
        plan([tmp_path], None, ".wav")


# --- training from a checkpoint


def test_the_checkpoint_sets_model_rate_and_mels():
    config = TrainConfig(data="data", out="run", from_checkpoint="voice")
    voice = wavear.load()
    assert (config.family, config.sample_rate, config.mel) == (
        "predictive",
        RATE,
        voice.config.mel,
    )
    assert config.model_config() == voice.config
    assert config.resolved().segment == 32 * voice.config.mel.hop_length


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_rate": 16000}, "sample_rate is 16000, and voice has 22050"),
        ({"layers": 3}, "layers is 3, and voice has 4"),
        ({"family": "wavenet"}, "family is 'wavenet', and voice has 'predictive'"),
        ({"mel_bands": 60}, "mel_bands is 60, and voice has 80"),
        ({"mel_preset": "espnet"}, "mel_preset is 'espnet', and voice has None"),
        ({"unconditional": True}, "unconditional is True"),
    ],
)
def test_settings_that_the_checkpoint_contradicts_are_refused(settings, words):
    with pytest.raises(WavearError, match=words):
        TrainConfig(data="data", out="run", from_checkpoint="voice", **settings)


def test_training_begins_with_the_weights_of_the_checkpoint(tmp_path):
    rng = np.random.default_rng(1)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        audio.write(
            data / f"{number}.wav", 0.1 * rng.standard_normal(6000).astype(np.float32), 8000
        )
    first = wavear.train(config_of(data, tmp_path / "first", max_steps=30, learning_rate=0.01))
    settings = dict.fromkeys(("layers", "stacks", "residual_channels", "skip_channels"))
    settings |= dict.fromkeys(("classes", "head_channels", "conditioning_channels"))
    settings |= {"from_checkpoint": str(first.last), "max_steps": 1}
    second = wavear.train(config_of(data, tmp_path / "second", **settings))
    assert second.bits_before == pytest.approx(first.bits_final, abs=1e-4)
    assert second.bits_before < first.bits_before - 0.1
    record = json.loads((tmp_path / "second" / "train.json").read_text())
    assert record["model"] == json.loads((first.last / "config.json").read_text())["config"]
    for path in data.iterdir():
        audio.write(path, 4 * audio.read(path).numpy(), 8000)
    louder = wavear.train(config_of(data, tmp_path / "louder", **settings))
    before, after = (wavear.load(run.last).conditioning for run in (first, louder))
    assert torch.equal(before.mel_mean, after.mel_mean), "the weights expect these statistics"
