"""The programs in bench/ that measure training and quality, and the pages they write."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from small_models import MEL, RATE, tiny

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig, audio

BENCH = Path(wavear.__file__).parents[1] / "bench"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """Import a module of bench/, which is not a package."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_all_forms_of_a_layer_equal_the_models_own(program: Any, kernel_size: int):
    """Compare losses and gradients for a model in float64."""
    forms = program("forms")
    torch.manual_seed(0)
    config = WaveNetConfig(
        layers=6, stacks=2, kernel_size=kernel_size, residual_channels=5, skip_channels=7,
        classes=16, mel=MelConfig(),
    )  # fmt: skip
    model = WaveNet(config).double()
    codes = torch.randint(0, 16, (2, 40))
    cond = torch.randn(2, config.conditioning_channels, 40, dtype=torch.float64)
    weights = [p for name, p in model.named_parameters() if not name.startswith("conditioning.")]
    own = torch.nn.functional.cross_entropy(model(codes, cond), codes, reduction="none")
    gradient = torch.autograd.grad(own.sum(), weights)
    for form in forms.FORMS:
        # `loss` rounds logits to float32, as the loss of bf16 layers does; only this rounding may
        # differ.
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
    pages.write_section(page, "two", "second")  # a section that exists is not added twice
    assert page.read_text() == before


def test_tables_of_engines_keep_the_rest_of_a_page(program: Any, tmp_path: Path):
    generation = program("generation")
    page = tmp_path / "page.md"
    generation.write(page, ["# Title", "", "| a table |", ""])
    assert page.read_text() == "# Title\n\n| a table |\n"
    section = "<!-- begin one -->\n\nfirst\n\n<!-- end one -->\n"
    for behind in (section, f"{generation.LIMITS}\nBy hand.\n\n{section}"):
        page.write_text("# Title\n\n| a table |\n\n" + behind)
        generation.write(page, ["# Title", "", "| another |", ""])
        assert page.read_text() == "# Title\n\n| another |\n\n" + behind


def test_options_of_another_shape_are_refused(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options, out = program("options"), tmp_path / "runs"
    config = wavear.TrainConfig(
        data="data", out=str(out / "plain"), family="wavenet", layers=10, learning_rate=1e-3
    ).resolved()
    (out / "plain").mkdir(parents=True)
    (out / "plain" / "train.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    begin = ["options.py", "--out", str(out), "--steps", "2", "--learning-rate", "0.001"]
    for words, message in {
        "--data data --layers 20": "with layers 10, now 20",
        "--data more --layers 10": "with data data, now more",
        "--data data --validation dev --layers 10": "with validation None, now dev",
    }.items():
        monkeypatch.setattr(sys, "argv", [*begin, *words.split()])
        with pytest.raises(SystemExit, match=f"plain is a run {message}: choose another --out"):
            options.main()
    monkeypatch.setattr(sys, "argv", [*begin, "--data", "data", "--layers", "10"])
    with pytest.raises(FileNotFoundError, match="data: no such folder"):
        options.main()


@pytest.mark.slow
def test_options_are_trained_measured_and_reused(tmp_path: Path):
    """Two options on noise, a few steps each; the second run only prints the table."""
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(6):
        noise: Any = lfilter([0.05], [1, -0.9], generator.standard_normal(6400))
        noise[:1600] *= 1e-3  # a pause, so that there is a noise floor
        audio.write(tmp_path / "data" / f"{number}.wav", noise, RATE)
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    words = f"--data {tmp_path / 'data'} --out {tmp_path / 'runs'} --page {page} --steps 2"
    words += " --options plain level --layers 4 --stacks 2 --residual-channels 8"
    words += " --skip-channels 8 --segment 512 --sample-rate 8000 --clips 2 --device cpu"
    command = [sys.executable, str(BENCH / "options.py"), *words.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parent)}

    def run() -> str:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "level normalisation, rms: 2 steps" in run()
    text = page.read_text()
    assert text.startswith("# Page\n")
    assert text.count("level normalisation, rms") == 2  # its means, and the fields that it changes
    assert "2 steps each" in text
    found = json.loads((tmp_path / "runs" / "level.json").read_text())["clips"]
    first = next(iter(found.values()))
    assert set(first) == {"bits", "stft", "mcd", "floor"}
    assert 7 < first["bits"] < 9  # of 256 codes, hardly trained
    again = run()
    assert "steps" not in again
    assert page.read_text() == text


def test_quality_is_one_table_of_any_families(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    quality = program("quality")
    generator = np.random.default_rng(0)
    (tmp_path / "held" / "ann").mkdir(parents=True)
    for number in range(2):
        noise: Any = lfilter([0.05], [1, -0.9], generator.standard_normal(6400))
        audio.write(tmp_path / "held" / "ann" / f"{number}.wav", noise, RATE)
    wavenet = tiny(mel=MEL)
    wavenet.save(tmp_path / "runs" / "wavenet" / "best", training={"step": 1234})
    history = {"history": [{"step": 0, "seconds": 0.0}, {"step": 1234, "seconds": 150.0}]}
    (tmp_path / "runs" / "wavenet" / "train.json").write_text(json.dumps(history))
    emphasised = tiny(mel=MEL, speakers=2, pre_emphasis=0.5)
    emphasised.save(tmp_path / "runs" / "emphasis" / "last", training={"speakers": ["bob", "ann"]})
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    runs, pictures = tmp_path / "runs", tmp_path / "pictures"
    words = [
        str(runs / "wavenet" / "best"),
        str(runs / "emphasis" / "last"),
        "--data",
        str(tmp_path / "held"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["quality.py", *words, "--out", str(page), "--pictures", str(pictures)]
    )
    asked: list[int] = []
    generate = wavear.generate
    monkeypatch.setattr(
        wavear, "generate", lambda *a, **k: asked.append(k["speaker"]) or generate(*a, **k)
    )
    quality.main()
    printed = capsys.readouterr().out
    assert f"<!-- begin quality -->\n\n{printed}" in page.read_text()
    assert page.read_text().startswith("# Page\n")
    assert quality.machine() in printed
    head, _, first, second = [
        line.strip("| ").split(" | ") for line in printed.splitlines() if line[0:1] == "|"
    ]
    rows = [dict(zip(head, line, strict=True)) for line in (first, second)]
    assert rows[0]["run"] == "wavenet"
    assert rows[0]["minutes"] == "2.5"
    assert rows[0]["steps"] == "1,234"
    waveforms = [audio.read(path) for path in sorted((tmp_path / "held" / "ann").glob("*.wav"))]
    bits = [-float(wavear.score(wavenet, x, grid="linear").mean()) / np.log(2) for x in waveforms]
    assert rows[0]["bits, 16-bit grid"].split(" (")[0] == f"{np.mean(bits):.3f}"
    assert rows[1]["run"] == "emphasis"
    assert rows[1]["bits, 16-bit grid"] == ""  # of pre-emphasised codes
    assert float(rows[1]["log-mel L1"].split(" ")[0]) > 0
    assert float(rows[1]["x real time"]) > 0
    assert asked == [None] * 3 + [1] * 3  # speaker ann, from the folder
    assert sorted(path.name for path in pictures.iterdir()) == [
        *(f"{run}-{number}.png" for run in ("emphasis", "wavenet") for number in range(2))
    ]


def test_quality_trains_with_the_command_it_prints(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    quality = program("quality")
    called: list[Any] = []
    monkeypatch.setattr(
        quality.subprocess, "run", lambda command, **more: called.append((command, more))
    )
    options = quality.argparse.Namespace(
        runs=tmp_path, name="minutes-", data_train=tmp_path / "my data", flags=["--seed", "3"]
    )
    assert quality.train(4.0, options) == tmp_path / "minutes-4" / "best"
    ((command, more),) = called
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("$ OMP_NUM_THREADS=1 wavear train ")
    assert shlex.split(printed)[3:] == command[3:]
    assert command[:3] == [sys.executable, "-m", "wavear"]
    assert more["env"]["OMP_NUM_THREADS"] == "1"
    (tmp_path / "minutes-4" / "best").mkdir(parents=True)
    quality.train(4.0, options)
    assert len(called) == 1  # the trained model exists


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to measure"),
        (["--train", "4,25"], "--train needs --data-train"),
        (["free"], "free is not conditioned on mels"),
    ],
)
def test_quality_refuses_unusable_options(
    program: Any, tmp_path: Path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    audio.write(tmp_path / "held" / "0.wav", np.zeros(800), RATE)
    tiny().save("free")
    monkeypatch.setattr(sys, "argv", ["quality.py", *words, "--data", "held"])
    with pytest.raises(SystemExit, match=message):
        program("quality").main()
