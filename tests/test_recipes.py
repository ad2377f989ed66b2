"""Recipes: values that a run accepts, each of them a flag, and a manifest that a run can read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_training import record_of
from test_corpora import MINIATURES

import wavear
from wavear import TrainConfig, audio, cli
from wavear.generation.tacotron import BUNDLES
from wavear.models.checkpoint import SHIPPED, VOICE

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/train.py"))
CHANNELS = ("residual_channels", "skip_channels", "head_channels", "conditioning_channels")
SIZES: dict[str, Any] = dict.fromkeys(CHANNELS, 4)
FLAGS = {**SIZES, "layers": 2, "segment": 256, "max_steps": 2, "sample_seconds": 0}
FLAGS |= {"device": "cpu", "workers": 0}
SMALL = [part for n, v in FLAGS.items() for part in (f"--{n.replace('_', '-')}", str(v))]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs a recipe with flags in a temporary folder, for its status."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: ModuleType, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        corpus, program = getattr(recipe, "CORPUS", None), getattr(recipe, "run", None)
        with pytest.raises(SystemExit) as stop:
            cli.recipe(recipe.VALUES, recipe.__doc__, corpus, program)
        return int(stop.value.code or 0)

    return run


def test_there_are_recipes():
    published = {"cmu_arctic", "digits", "libritts", "ljspeech", "tts", "vctk", "yesno"}
    assert set(NAMES) == published | {"demo", "families", "folder", "music", "voice", "vqvae"}
    assert set(MINIATURES) == published


@pytest.mark.parametrize("name", NAMES)
def test_readme_states_the_requirements(name: str):
    text = (RECIPES / name / "README.md").read_text(encoding="utf-8")
    for word in ("**Data**", "**Licence**", "**Size**", "**Command**", "**Expected**"):
        assert word in text


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("families", "vqvae")])
def test_values_are_flags(name: str, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch):
    """The run has the recipe's values, except for those given as flags."""
    trained: list[TrainConfig] = []
    monkeypatch.setattr(
        "wavear.cli.training.run_training", lambda config: trained.append(config) or 0
    )
    recipe = module(RECIPES / name / "train.py")
    sizes = {"wavenet": "stacks", "predictive": "period_layers", "transformer": "window"}
    size = sizes.get(str(recipe.VALUES.family), "")
    Path("elsewhere").write_text("path\nsome.wav\n")  # a manifest, which every recipe accepts
    fine_tuned = recipe.VALUES.from_checkpoint is not None  # which sets the sizes
    flags = () if fine_tuned else ("--layers", "6", f"--{size.replace('_', '-')}", "3")
    assert start(recipe, "--data", "elsewhere", "--seed", "5", *flags) == 0
    (config,) = trained
    assert (config.data, config.seed, config.family) == ("elsewhere", 5, recipe.VALUES.family)
    if not fine_tuned:
        assert config.layers == 6
        assert getattr(config, size) == 3
    assert config.sample_rate == recipe.VALUES.sample_rate
    assert config.segment == recipe.VALUES.segment
    assert start(recipe, "--kernel-size", "1") == 2


@pytest.mark.slow
def test_folder_recipe_trains(tmp_path: Path):
    """Start the script like a user."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    (tmp_path / "data").mkdir()
    for number in range(3):
        audio.write(tmp_path / "data" / f"{number}.wav", noise, 8000)
    command = [sys.executable, str(RECIPES / "folder" / "train.py"), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--sample-rate", "8000", "--family", "wavenet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out bits per sample: model" in done.stdout
    assert (tmp_path / "runs" / "folder" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name",
    [n if n == "digits" else pytest.param(n, marks=pytest.mark.slow) for n in sorted(MINIATURES)],
)
def test_recipe_trains_on_its_corpus(
    name: str, start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Use all of the recipe's values except sizes, on a miniature of the corpus."""
    recipe = module(RECIPES / name / "train.py")
    MINIATURES[name](tmp_path / recipe.VALUES.data)
    status = start(recipe, *SMALL, "--stacks", "1", "--batch-size", "2")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "held-out bits per sample: model" in printed.out
    trained = wavear.load(tmp_path / "runs" / name / "best")
    assert trained.config.sample_rate == recipe.VALUES.sample_rate
    assert trained.config.speakers == {"vctk": 4, "digits": 2}.get(name, 0)
    assert (tmp_path / "runs" / f"{name}.csv").is_file()


def test_voice_recipe_holds_out_voices_and_repeats_small_folders(tmp_path: Path):
    recipe = module(RECIPES / "voice" / "train.py")
    for name in (
        "kerstin_de/dev/a.flac", "kerstin_de/train/b.flac", "kerstin_de/more/c.flac",
        "ljspeech_mini/wavs/LJ001-0028.wav", "ljspeech_mini/wavs/LJ001-0029.wav",
        "vctk_mini/p225/p225_1.wav", "vctk_mini/p227/p227_1.wav",
        "librivox_fr_multi/x.mp3", "librivox_fr_multi/y.mp3",
        "cmu_arctic_slt/wav/s.wav",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = tmp_path / "librivox_fr_multi" / "speakers.csv"
    table.write_text("file,reader\nx.mp3,Margot\ny.mp3,Cocotte\n")
    counts = Counter((clip.path.stem, clip.split) for clip in recipe.Voices().clips(tmp_path))
    held_out = {"a", "LJ001-0029", "p227_1", "y"}
    training = {"b": 1, "c": 1, "LJ001-0028": 4, "p225_1": 4, "x": 1, "s": 2}
    assert counts == {(name, "validation"): 1 for name in held_out} | {
        (name, "train"): times for name, times in training.items()
    }
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"speakers\.csv is missing"):
        recipe.Voices().clips(tmp_path)


@pytest.mark.slow
def test_families_recipe_trains_missing_models_and_writes_a_table(
    start: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    t = np.arange(6000) / 8000
    (tmp_path / "data").mkdir()
    for number in range(4):
        tone = 0.3 * np.sin(2 * np.pi * 100 * (number + 2) * t)
        audio.write(tmp_path / "data" / f"{number}.wav", tone, 8000)
    recipe = module(RECIPES / "families" / "train.py")
    models = {
        "linear": {"family": "linear", "order": 4},
        "wavenet": {"family": "wavenet", "layers": 2, "stacks": 1, **SIZES},
        "gru": {"family": "gru", "channels": 8, "head_channels": 4, "segment": 128},
    }
    monkeypatch.setattr(recipe, "MODELS", models)
    flags = "--data data --sample-rate 8000 --minutes 0.01 --device cpu --clips 1 --seconds 0.2"
    for turn in range(2):
        status = start(recipe, *flags.split(), "--models", *models)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert ("gru: runs/families/gru is there already" in printed.out) == (turn == 1)
    out = tmp_path / "runs" / "families"
    record = json.loads((out / "table" / "models.json").read_text(encoding="utf-8"))
    assert [row["family"] for row in record["models"]] == ["linear", "wavenet", "gru"]
    assert all(row["common_bits"] for row in record["models"])
    held_out = (out / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == record_of(out / "gru")["data"]["validation"]["recordings"]
    assert start(recipe, "--models", "rnn") == 2
    assert "wavenet-16-bit" in capsys.readouterr().err


def test_families_recipe_refuses_shards_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    recipe = module(RECIPES / "families" / "train.py")
    monkeypatch.setattr(recipe, "train_one", lambda *_: pytest.fail("it trains"))
    message = r"s/\{000\.\.012\}\.tar: .*: give --validation"
    with pytest.raises(ValueError, match=message):
        recipe.run(recipe.Families(data="s/{000..012}.tar", out=str(tmp_path)))


def test_music_recipe_trains(start: Callable[..., int], tmp_path: Path):
    """Train on stereo files of another rate without mels, then on features."""
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 4000, 2)).astype(np.float32)
    album = tmp_path / "data" / "music" / "album"
    features = tmp_path / "features" / "album"
    for folder in (album, features):
        folder.mkdir(parents=True)
    for number in range(3):
        soundfile.write(album / f"{number}.flac", noise[number], 44100)
        np.save(features / f"{number}.npy", np.ones((3, 6), np.float32))
    recipe = module(RECIPES / "music" / "train.py")
    own = {"layers": 2, "channels": 8, "heads": 2, "head-channels": 4, "window": 8, "patch": 4}
    own |= {"segment": 256, "max-steps": 2, "sample-seconds": 0, "device": "cpu", "workers": 0}
    flags = [part for name, value in own.items() for part in (f"--{name}", str(value))]
    assert start(recipe, *flags) == 0
    trained = wavear.load(tmp_path / "runs" / "music" / "best")
    assert trained.config.mel is None
    assert trained.config.sample_rate == 16000
    steered = ["--no-unconditional", "--features", "features", "--feature-hop", "256"]
    assert start(recipe, *flags, *steered, "--out", "steered") == 0
    assert wavear.load("steered/best").config.mel == wavear.FeatureConfig(
        sample_rate=16000, hop_length=256, channels=3
    )


# --- text to speech


@pytest.fixture(scope="module")
def tacotron() -> tuple[Any, Any]:
    """Return torchaudio's text processor, and a small Tacotron 2 with random weights."""
    import torchaudio

    torch.manual_seed(0)
    names = ("symbol_embedding_dim", "encoder_embedding_dim", "attention_rnn_dim", "prenet_dim")
    names += ("attention_hidden_dim", "decoder_rnn_dim", "postnet_embedding_dim")
    network = torchaudio.models.Tacotron2(
        n_symbol=38,
        encoder_n_convolution=1,
        attention_location_n_filter=2,
        attention_location_kernel_size=3,
        decoder_max_step=12,
        postnet_n_convolution=2,
        **dict.fromkeys(names, 8),
    ).eval()
    with torch.no_grad():  # around the middle of a mel's range
        network.decoder.linear_projection.bias.fill_(-5.0)
    return torchaudio.pipelines.TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH.get_text_processor(), network


def vocoder(folder: Path, preset: str) -> str:
    mel = wavear.MelConfig.preset(preset)
    wavear.WaveNet(wavear.WaveNetConfig(layers=2, stacks=1, mel=mel, **SIZES)).save(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:Reached max decoder steps")
def test_text_to_speech(tmp_path: Path, tacotron: tuple[Any, Any]):
    """Text passes through torchaudio's processor and Tacotron 2, and the mel through a vocoder."""
    tts = module(RECIPES / "tts" / "speak.py")
    checkpoint, out = vocoder(tmp_path / "vocoder", "torchaudio-tacotron2"), tmp_path / "hello.wav"
    given = tts.Speak(checkpoint, "Hello, world!", out=out, engine="reference", seed=3)
    voice = wavear.Tacotron(wavear.load(checkpoint), given.bundle, *tacotron)
    mel = voice.predict("Hello, world!", seed=3)
    assert torch.equal(voice.mel("Hello, world!", seed=3), mel)
    with pytest.raises(wavear.WavearError, match="no letters"):
        voice.mel("漢字")
    assert mel.shape[0] == 80
    waveform, rate = tts.speak(given, *tacotron)
    assert rate == 22050
    assert waveform.shape == (mel.shape[1] * 256,)
    expected = wavear.generate(wavear.load(checkpoint), mel, seed=3, engine="reference")[0]
    assert torch.equal(waveform, expected)
    assert audio.info(out).frames == len(waveform)
    with pytest.raises(FileExistsError, match="--overwrite"):
        tts.speak(given, *tacotron)


@pytest.mark.filterwarnings("ignore:Reached max decoder steps")
@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("torchaudio-tacotron2-wavernn", "hop_length 256, the model 275"),
        ("r9y9", "fmin 0.0, the model 125.0"),
    ],
)
def test_text_to_speech_refuses_the_wrong_vocoder(
    tmp_path: Path, tacotron: tuple[Any, Any], preset: str, message: str
):
    tts = module(RECIPES / "tts" / "speak.py")
    checkpoint = vocoder(tmp_path / "vocoder", preset)
    given = tts.Speak(checkpoint, "Hello!", out=tmp_path / "x.wav", engine="reference")
    with pytest.raises(ValueError, match=message):
        tts.speak(given, *tacotron)
    assert not (tmp_path / "x.wav").exists()


def test_voice_speaks_the_mel_of_a_text_to_speech_front_end(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A stub stands in for Tacotron 2: its mel is that of a sentence, and so is the audio."""
    with np.load(SHIPPED / VOICE / "sentence.npz") as file:
        sentence = torch.from_numpy(file["mel"]).float()[:, :40]

    class FrontEnd:
        def infer(self, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[Any, ...]:
            padded = torch.nn.functional.pad(sentence[None], (0, 3), value=-11.5)
            return padded, torch.tensor([sentence.shape[1]]), None

    tts = module(RECIPES / "tts" / "speak.py")
    out = tmp_path / "speech.wav"
    given = tts.Speak("voice", "Hello!", out=out, seed=3)
    waveform, rate = tts.speak(given, lambda text: (torch.tensor([[1]]), None), FrontEnd())
    assert capsys.readouterr().err == ""  # neither the mel check nor the watch complains
    assert rate == audio.info(out).sample_rate == 22050
    assert torch.equal(waveform, wavear.generate(wavear.load(), sentence, seed=3)[0])
    heard = wavear.log_mel(waveform[None], wavear.load().config.mel)[0]
    assert (heard - sentence).abs().mean() < 0.7  # unrelated speech differs by above 1.5


def test_speaking_without_torchaudio_is_one_line_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    tts = module(RECIPES / "tts" / "speak.py")
    checkpoint = vocoder(tmp_path / "vocoder", "torchaudio-tacotron2")
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert tts.main([checkpoint, "Hello!", "--out", str(tmp_path / "x.wav")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert 'pip install "wavear[tts]"' in err


def test_every_bundle_of_the_recipe_is_torchaudios():
    import torchaudio

    known = {name for name in dir(torchaudio.pipelines) if name.startswith("TACOTRON2_")}
    assert set(BUNDLES) == known
    for preset in BUNDLES.values():
        wavear.MelConfig.preset(preset)
