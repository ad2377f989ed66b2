"""Recipes: values that a run accepts, each of them a flag, and a manifest that a run can read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from test_corpora import MINIATURES

import wavear
from wavear import audio
from wavear.cli import commands
from wavear.training.config import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/train.py"))


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_there_are_recipes():
    published = {"cmu_arctic", "digits", "libritts", "ljspeech", "tts", "vctk", "yesno"}
    assert set(NAMES) == published | {"demo", "families", "folder", "music"}
    assert set(MINIATURES) == published


@pytest.mark.parametrize("name", NAMES)
def test_readme_says_what_is_needed(name: str):
    text = (RECIPES / name / "README.md").read_text(encoding="utf-8")
    for word in ("**Data**", "**Licence**", "**Size**", "**Command**", "**Expected**"):
        assert word in text


@pytest.mark.parametrize("name", [name for name in NAMES if name != "families"])
def test_values_are_flags(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is trained with is the recipe's values, except for those given as flags."""
    monkeypatch.chdir(tmp_path)
    trained: list[TrainConfig] = []
    monkeypatch.setattr("wavear.cli.training.run_training", lambda config: trained.append(config) or 0)
    recipe = module(RECIPES / name / "train.py")
    size = {"wavenet": ["--stacks", "3"], "predictive": ["--period-layers", "2"]}[
        recipe.VALUES.family
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "elsewhere", "--layers", "6", *size])
    Path("elsewhere").write_text("path\nsome.wav\n")  # a manifest, which every recipe takes
    corpus = getattr(recipe, "CORPUS", None)
    with pytest.raises(SystemExit) as stop:
        commands.recipe(recipe.VALUES, recipe.__doc__, corpus)
    assert stop.value.code == 0
    (config,) = trained
    assert (config.data, config.layers, config.family) == ("elsewhere", 6, recipe.VALUES.family)
    assert (config.stacks, config.period_layers) in ((3, None), (None, 2))
    assert config.sample_rate == recipe.VALUES.sample_rate
    assert config.segment == recipe.VALUES.segment
    monkeypatch.setattr(sys, "argv", ["train.py", "--kernel-size", "1"])
    with pytest.raises(SystemExit) as stop:
        commands.recipe(recipe.VALUES, recipe.__doc__, corpus)
    assert stop.value.code == 2


def test_folder_recipe_trains(tmp_path: Path):
    """The script itself, as a user starts it."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    (tmp_path / "data").mkdir()
    for number in range(3):
        audio.write(tmp_path / "data" / f"{number}.wav", noise, 8000)
    sizes = ("residual", "skip", "head", "conditioning")
    small = [part for size in sizes for part in (f"--{size}-channels", "4")]
    small += ["--layers", "2", "--sample-rate", "8000", "--segment", "256", "--max-steps", "2"]
    command = [
        sys.executable,
        str(RECIPES / "folder" / "train.py"),
        *small,
        "--sample-seconds",
        "0",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "held-out bits per sample: model" in done.stdout
    assert (tmp_path / "runs" / "folder" / "best" / "model.safetensors").is_file()


SMALL = [
    part
    for size in ("residual", "skip", "head", "conditioning")
    for part in (f"--{size}-channels", "4")
]
SMALL += [
    "--layers",
    "2",
    "--stacks",
    "1",
    "--segment",
    "256",
    "--batch-size",
    "2",
    "--max-steps",
    "2",
]
SMALL += ["--sample-seconds", "0", "--device", "cpu", "--workers", "0"]


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_recipe_trains_on_its_corpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """All of the recipe's values but for sizes, on the corpus in miniature: two steps, and a checkpoint."""
    recipe = module(RECIPES / name / "train.py")
    MINIATURES[name](tmp_path / recipe.VALUES.data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL])
    with pytest.raises(SystemExit) as stop:
        commands.recipe(recipe.VALUES, recipe.__doc__, recipe.CORPUS)
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "held-out bits per sample: model" in printed.out
    trained = wavear.load(tmp_path / "runs" / name / "best")
    assert trained.config.sample_rate == recipe.VALUES.sample_rate
    assert trained.config.speakers == {"vctk": 4, "digits": 2}.get(name, 0)
    assert (tmp_path / "runs" / f"{name}.csv").is_file()


def test_families_recipe_trains_what_is_missing_and_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    t = np.arange(6000) / 8000
    (tmp_path / "data").mkdir()
    for number in range(4):
        audio.write(
            tmp_path / "data" / f"{number}.wav",
            0.3 * np.sin(2 * np.pi * 100 * (number + 2) * t),
            8000,
        )
    recipe = module(RECIPES / "families" / "train.py")
    small = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
    )
    models = {
        "linear": {"family": "linear", "order": 4},
        "wavenet": {"family": "wavenet", "layers": 2, "stacks": 1, **small},
        "gru": {"family": "gru", "channels": 8, "head_channels": 4, "segment": 128},
    }
    monkeypatch.setattr(recipe, "MODELS", models)
    monkeypatch.chdir(tmp_path)
    begin = [
        "train.py",
        "--data",
        "data",
        "--sample-rate",
        "8000",
        "--minutes",
        "0.01",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(
        sys, "argv", [*begin, "--clips", "1", "--seconds", "0.2", "--models", *models]
    )
    for turn in range(2):
        with pytest.raises(SystemExit) as stop:
            commands.recipe(recipe.VALUES, recipe.__doc__, run=recipe.run)
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        assert ("gru: runs/families/gru is there already" in printed.out) == (turn == 1)
    record = json.loads(
        (tmp_path / "runs" / "families" / "table" / "models.json").read_text(encoding="utf-8")
    )
    assert [row["family"] for row in record["models"]] == ["linear", "wavenet", "gru"]
    assert all(row["common_bits"] for row in record["models"])
    held_out = (
        (tmp_path / "runs" / "families" / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    )
    trained = json.loads(
        (tmp_path / "runs" / "families" / "gru" / "train.json").read_text(encoding="utf-8")
    )
    assert len(held_out) == trained["data"]["validation"]["recordings"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--models", "rnn"])
    with pytest.raises(SystemExit) as stop:
        commands.recipe(recipe.VALUES, recipe.__doc__, run=recipe.run)
    assert stop.value.code == 2
    assert "wavenet-16-bit" in capsys.readouterr().err


def test_families_recipe_refuses_shards_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    recipe = module(RECIPES / "families" / "train.py")
    monkeypatch.setattr(recipe, "train_one", lambda *_: pytest.fail("it trains"))
    with pytest.raises(
        ValueError, match=r"s/\{000\.\.012\}\.tar: no manifest .*: give --validation"
    ):
        recipe.run(recipe.Families(data="s/{000..012}.tar", out=str(tmp_path)))


def test_music_recipe_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Stereo at another rate, and a model without mels."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 4000)).astype(np.float32)
    (tmp_path / "data" / "music" / "album").mkdir(parents=True)
    for number in range(3):
        soundfile.write(tmp_path / "data" / "music" / "album" / f"{number}.flac", noise.T, 44100)
    recipe = module(RECIPES / "music" / "train.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL])
    with pytest.raises(SystemExit) as stop:
        commands.recipe(recipe.VALUES, recipe.__doc__)
    assert stop.value.code == 0, capsys.readouterr().err
    trained = wavear.load(tmp_path / "runs" / "music" / "best")
    assert trained.config.mel is None
    assert trained.config.sample_rate == 16000


@pytest.fixture(scope="module")
def tacotron() -> tuple[Any, Any]:
    """torchaudio's text processor, and a Tacotron 2 of its own in small, with random weights."""
    import torchaudio

    torch.manual_seed(0)
    network = torchaudio.models.Tacotron2(
        n_symbol=38,
        symbol_embedding_dim=8,
        encoder_embedding_dim=8,
        encoder_n_convolution=1,
        attention_rnn_dim=8,
        attention_hidden_dim=8,
        attention_location_n_filter=2,
        attention_location_kernel_size=3,
        decoder_rnn_dim=8,
        decoder_max_step=12,
        prenet_dim=8,
        postnet_n_convolution=2,
        postnet_embedding_dim=8,
    ).eval()
    with torch.no_grad():  # around the middle of a mel's range
        network.decoder.linear_projection.bias.fill_(-5.0)
    return torchaudio.pipelines.TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH.get_text_processor(), network


def vocoder(folder: Path, preset: str) -> str:
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
    )
    wavear.WaveNet(
        wavear.WaveNetConfig(layers=2, stacks=1, mel=wavear.MelConfig.preset(preset), **sizes)
    ).save(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:Reached max decoder steps")
def test_text_to_speech(tmp_path: Path, tacotron: tuple[Any, Any]):
    """A text through torchaudio's processor and Tacotron 2, and its mel through a vocoder: sound as long as it."""
    tts = module(RECIPES / "tts" / "speak.py")
    checkpoint = vocoder(tmp_path / "vocoder", "torchaudio-tacotron2")
    given = tts.Speak(
        checkpoint, "Hello, world!", out=tmp_path / "hello.wav", engine="reference", seed=3
    )
    mel = tts.text_to_mel("Hello, world!", *tacotron, seed=3)
    assert mel.shape[0] == 80
    waveform, rate = tts.speak(given, *tacotron)
    assert rate == 22050
    assert waveform.shape == (mel.shape[1] * 256,)
    assert torch.equal(
        waveform, wavear.generate(wavear.load(checkpoint), mel, seed=3, engine="reference")[0]
    )
    assert audio.info(tmp_path / "hello.wav").frames == len(waveform)
    with pytest.raises(FileExistsError, match="--overwrite"):
        tts.speak(given, *tacotron)


@pytest.mark.filterwarnings("ignore:Reached max decoder steps")
@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("hifigan", "centre 'start', the model 'middle'"),
        ("torchaudio-tacotron2-wavernn", "hop_length 256, the model 275"),
        ("r9y9", "fmin 0.0, the model 125.0"),
    ],
)
def test_text_to_speech_through_the_wrong_vocoder(
    tmp_path: Path, tacotron: tuple[Any, Any], preset: str, said: str
):
    tts = module(RECIPES / "tts" / "speak.py")
    given = tts.Speak(
        vocoder(tmp_path / "vocoder", preset), "Hello!", out=tmp_path / "x.wav", engine="reference"
    )
    with pytest.raises(ValueError, match=said):
        tts.speak(given, *tacotron)
    assert not (tmp_path / "x.wav").exists()


def test_every_bundle_of_the_recipe_is_torchaudios():
    import torchaudio

    tts = module(RECIPES / "tts" / "speak.py")
    known = {name for name in dir(torchaudio.pipelines) if name.startswith("TACOTRON2_")}
    assert set(tts.BUNDLES) == known
    for preset in tts.BUNDLES.values():
        wavear.MelConfig.preset(preset)
