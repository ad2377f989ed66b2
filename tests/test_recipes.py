"""Recipes: values that a run accepts, each of them a flag, and a manifest that a run can read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from wavear import audio, cli, data
from wavear.train import TrainConfig

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
    assert NAMES == ["demo", "folder", "ljspeech"]


@pytest.mark.parametrize("name", NAMES)
def test_readme_says_what_is_needed(name: str):
    text = (RECIPES / name / "README.md").read_text(encoding="utf-8")
    for word in ("**Data**", "**Licence**", "**Size**", "**Command**", "**Expected**"):
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_values_are_flags(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is trained with is the recipe's values, except for those given as flags."""
    monkeypatch.chdir(tmp_path)
    trained: list[TrainConfig] = []
    monkeypatch.setattr(cli, "run_training", lambda config: trained.append(config) or 0)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "elsewhere", "--layers", "6", "--stacks", "3"])
    recipe = module(RECIPES / name / "train.py")
    with pytest.raises(SystemExit) as stop:
        cli.recipe(recipe.VALUES, recipe.__doc__)
    assert stop.value.code == 0
    (config,) = trained
    assert (config.data, config.layers, config.stacks) == ("elsewhere", 6, 3)
    assert config.sample_rate == recipe.VALUES.sample_rate
    assert config.segment == recipe.VALUES.segment
    monkeypatch.setattr(sys, "argv", ["train.py", "--kernel-size", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.recipe(recipe.VALUES, recipe.__doc__)
    assert stop.value.code == 2


def test_folder_recipe_trains(tmp_path: Path):
    """The script itself, as a user starts it."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    (tmp_path / "data").mkdir()
    for number in range(3):
        audio.write(tmp_path / "data" / f"{number}.wav", noise, 8000)
    sizes = ("residual", "skip", "head", "conditioning")
    small = [part for size in sizes for part in (f"--{size}-channels", "4")]
    small += ["--layers", "2", "--stacks", "1", "--sample-rate", "8000", "--segment", "256", "--max-steps", "2"]
    command = [sys.executable, str(RECIPES / "folder" / "train.py"), *small, "--sample-seconds", "0", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "held-out bits per sample: model" in done.stdout
    assert (tmp_path / "runs" / "folder" / "best" / "model.safetensors").is_file()


def test_ljspeech_manifest(tmp_path: Path):
    """`prepare.py` on a miniature of the data set, read back as a run reads it."""
    prepare = module(RECIPES / "ljspeech" / "prepare.py")
    clips = ["LJ001-0001", "LJ001-0026", "LJ002-0025", "LJ050-0001"]
    (tmp_path / "LJSpeech-1.1" / "wavs").mkdir(parents=True)
    for clip in clips:
        audio.write(tmp_path / "LJSpeech-1.1" / "wavs" / f"{clip}.wav", np.full(4000, 0.1, np.float32), 22050)
    lines = "".join(f'{clip}|A "text, of sorts|a text\n' for clip in clips)
    (tmp_path / "LJSpeech-1.1" / "metadata.csv").write_text(lines, encoding="utf-8")
    manifest = prepare.write_manifest(prepare.Prepare(data=tmp_path, download=False))
    assert manifest == tmp_path / "ljspeech.csv"
    corpus = data.open_corpus(manifest, sample_rate=22050)
    held_out = [recording.name for recording in corpus.validation]
    assert held_out == ["LJSpeech-1.1/wavs/LJ001-0001.wav", "LJSpeech-1.1/wavs/LJ002-0025.wav"]
    assert len(corpus.train) == 2
    assert corpus.bad == []
