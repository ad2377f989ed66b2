"""The programs in bench/ that measure training: their forms are one function, their pages keep what others wrote."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig, audio

BENCH = Path(wavear.__file__).parents[1] / "bench"
RATE = 8000


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_all_forms_of_a_layer_are_the_models_own_function(program: Any, kernel_size: int):
    """In float64: losses and gradients to 1e-10."""
    forms = program("forms")
    torch.manual_seed(0)
    config = WaveNetConfig(
        layers=6, stacks=2, kernel_size=kernel_size, residual_channels=5, skip_channels=7, classes=16, mel=MelConfig()
    )
    model = WaveNet(config).double()
    codes = torch.randint(0, 16, (2, 40))
    cond = torch.randn(2, config.conditioning_channels, 40, dtype=torch.float64)
    weights = [p for name, p in model.named_parameters() if not name.startswith("conditioning.")]
    own = torch.nn.functional.cross_entropy(model(codes, cond), codes, reduction="none")
    gradient = torch.autograd.grad(own.sum(), weights)
    for form in forms.FORMS:
        # `loss` takes logits to float32, as the loss of bf16 layers is: its rounding is all that may differ.
        nats = forms.loss(model, codes, cond, form)
        torch.testing.assert_close(nats.double(), own, atol=1e-6, rtol=1e-6)
        for found, expected in zip(torch.autograd.grad(nats.sum(), weights), gradient, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_section_is_replaced_and_the_rest_stays(program: Any, tmp_path: Path):
    pages = program("pages")
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nText.\n")
    pages.write_section(page, "one", "first \\1")
    pages.write_section(page, "two", "second")
    pages.write_section(page, "one", "third")
    assert page.read_text() == (
        "# Title\n\nText.\n\n<!-- begin one -->\n\nthird\n\n<!-- end one -->\n\n"
        "<!-- begin two -->\n\nsecond\n\n<!-- end two -->\n"
    )
    before = page.read_text()
    pages.write_section(page, "two", "second")  # what is there already is not put there twice
    assert page.read_text() == before


def test_tables_of_engines_leave_what_others_and_people_wrote(program: Any, tmp_path: Path):
    generation = program("generation")
    page = tmp_path / "page.md"
    generation.write(page, ["# Title", "", "| a table |", ""])
    assert page.read_text() == "# Title\n\n| a table |\n"
    section = "<!-- begin one -->\n\nfirst\n\n<!-- end one -->\n"
    for behind in (section, f"{generation.LIMITS}\nBy hand.\n\n{section}"):
        page.write_text("# Title\n\n| a table |\n\n" + behind)
        generation.write(page, ["# Title", "", "| another |", ""])
        assert page.read_text() == "# Title\n\n| another |\n\n" + behind


def test_options_of_another_shape_are_not_taken_for_those_asked_for(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options, out = program("options"), tmp_path / "runs"
    config = wavear.TrainConfig(
        data="data", out=str(out / "plain"), family="wavenet", layers=10, learning_rate=1e-3
    ).resolved()
    (out / "plain").mkdir(parents=True)
    (out / "plain" / "train.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    begin = ["options.py", "--out", str(out), "--steps", "2", "--learning-rate", "0.001"]
    for words, told in {
        ("--data", "data", "--layers", "20"): "with layers 10, now 20",
        ("--data", "more", "--layers", "10"): "with data data, now more",
        ("--data", "data", "--validation", "dev", "--layers", "10"): "with validation None, now dev",
    }.items():
        monkeypatch.setattr(sys, "argv", [*begin, *words])
        with pytest.raises(SystemExit, match=f"plain is a run {told}: choose another --out"):
            options.main()
    monkeypatch.setattr(sys, "argv", [*begin, "--data", "data", "--layers", "10"])
    with pytest.raises(FileNotFoundError, match="data: no such folder"):
        options.main()


def test_options_are_trained_measured_and_not_repeated(tmp_path: Path):
    """Two options on noise, some steps: a table, and the second time nothing but the table."""
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(6):
        noise: Any = lfilter([0.05], [1, -0.9], generator.standard_normal(6400))
        noise[:1600] *= 1e-3  # a pause, so that there is a noise floor
        audio.write(tmp_path / "data" / f"{number}.wav", noise, RATE)
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    words = f"--data {tmp_path / 'data'} --out {tmp_path / 'runs'} --page {page} --steps 2 --options plain level"
    words += " --layers 4 --stacks 2 --residual-channels 8 --skip-channels 8 --segment 512 --sample-rate 8000"
    command = [sys.executable, str(BENCH / "options.py"), *words.split(), "--clips", "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parent)}

    def run() -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "level normalisation, rms: 2 steps" in run()
    text = page.read_text()
    assert text.startswith("# Page\n")
    assert text.count("level normalisation, rms") == 2  # its means, and what it changes
    assert "2 steps each" in text
    found = json.loads((tmp_path / "runs" / "level.json").read_text())["clips"]
    first = next(iter(found.values()))
    assert set(first) == {"bits", "stft", "mcd", "floor"}
    assert 7 < first["bits"] < 9  # of 256 codes, hardly trained
    again = run()
    assert "steps" not in again
    assert page.read_text() == text
