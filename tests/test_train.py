"""Training: settings, what is refused, what a run learns and reports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import (
    RATE,
    config_of,
    record_of,
    rows_of,
)

import wavear
from wavear import MelConfig, audio, train
from wavear.common.errors import WavearError
from wavear.data.corpus import open_corpus
from wavear.evaluation.held_out import held_out_bits

pytestmark = pytest.mark.usefixtures("one_thread")


# --- settings


def test_config_is_flat_and_replaceable():
    config = wavear.TrainConfig("recordings", "runs/mine", max_steps=7)
    assert (config.data, config.out, config.max_steps) == ("recordings", "runs/mine", 7)
    assert dataclasses.replace(config, max_steps=5).max_steps == 5
    assert {"data", "layers", "learning_rate", "hold", "out"} <= dataclasses.asdict(config).keys()
    paths: Any = {"data": Path("a"), "out": Path("b")}
    assert wavear.TrainConfig(**paths).data == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "5"}, "max_steps is '5', expected a whole number"),
        ({"max_steps": True}, "max_steps is True, expected a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number"),
        ({"progress": 1}, "progress is 1, expected True or False"),
        ({"data": 5}, "data is 5, expected text"),
        ({"segment": float("nan")}, "segment is nan"),
        ({"max_steps": None}, "the run needs an end"),
        ({"max_steps": 0}, "max_steps is 0, expected 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected more than 0"),
        ({"batch_size": 3, "accumulate": 2}, "a batch of 3 does not divide into 2 parts"),
        ({"accumulate": 3}, "a batch of 2 does not divide into 3 parts"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"hold": 1.0}, "hold is 1.0, expected 0 to less than 1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected adamw or muon"),
        ({"validation_fraction": 1.5}, "validation_fraction is 1.5, expected between 0 and 1"),
        ({"layers": 5}, "5 layers do not divide into 2 stacks"),
        ({"conditioning_dropout": 0.1, "unconditional": True}, "have no mels: drop conditioning_d"),
        ({"mel_preset": "r9y9"}, "mel_preset 'r9y9' sets the mels: drop mel_bands"),
        ({"criterion": "bic"}, "the family wavenet has no criterion"),
        ({"pre_emphasis": -0.1}, r"pre_emphasis is -0\.1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(**{"data": "-", "out": "-"} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99" if torch.cuda.is_available() else "cuda"])
def test_missing_device_is_refused(tones: Path, tmp_path: Path, device: str):
    with pytest.raises(WavearError, match=f"device is '{device}'"):
        train(config_of(tones, tmp_path / "run", device=device))


# --- a run


def test_training_learns_and_writes_its_numbers(tones, tmp_path, capfd):
    settings: dict[str, Any] = {"max_steps": 80, "validate_every": 40, "batch_size": 4}
    shutil.copytree(tones, tmp_path / "held")
    config = config_of(
        tones, tmp_path / "run", validation=str(tmp_path / "held"), learning_rate=2e-2, **settings
    )
    result = train(config)
    assert result.bits_before == pytest.approx(5.0, abs=0.6)  # log2 of 32 classes, more or less
    assert result.bits_best < result.held_out["unigram"] - 1.5 < result.held_out["uniform"] - 2 == 3
    # All 3 s of it are on the curve.
    assert result.held_out["model"] == pytest.approx(result.bits_best, abs=1e-6)
    assert (result.steps, result.stopped_by) == (80, "steps")
    out = tmp_path / "run"
    assert wavear.load(out / "best").config == wavear.load(out / "last").config
    assert wavear.load(out / "best").config == config.model_config()
    record = record_of(out)
    assert [entry["step"] for entry in record["history"]] == [0, 40, 80]
    assert record["held_out"] == result.held_out
    assert record["data"]["train"]["recordings"] == record["data"]["validation"]["recordings"] == 8
    rows = rows_of(out / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["validation_bits"]] == [0, 40, 80]
    assert [int(row["step"]) for row in rows if row["train_bits"]] == list(range(10, 81, 10))
    board = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    for name in ("train_bits", "validation_bits", "learning_rate", "samples_per_second"):
        assert name.encode() in board
    assert capfd.readouterr() == ("", "")  # progress=False: neither wavear nor Lightning prints


def test_time_ends_a_run(tones, tmp_path):
    result = train(config_of(tones, tmp_path / "run", max_steps=None, max_minutes=0.01))
    assert result.stopped_by == "time"
    assert result.seconds >= 0.6
    assert result.steps >= 1


def test_unreadable_files_are_reported_and_skipped(tones, tmp_path, lines):
    data = tmp_path / "data"
    shutil.copytree(tones, data)
    (data / "text.wav").write_text("no audio")
    result = train(config_of(data, tmp_path / "run", max_steps=2, progress=True))
    assert set(result.skipped) == {"text.wav"}
    assert "skipped text.wav: is not audio" in lines()


@pytest.mark.parametrize("family", ["wavenet", pytest.param("gru", marks=pytest.mark.slow)])
def test_unreadable_held_out_file_is_reported_and_skipped(tones, tmp_path, family):
    held = tmp_path / "held"
    held.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        audio.write(held / f"{name}.wav", np.full(40000, 0.1 * number), RATE, "float32")
    content = bytearray((held / "b.wav").read_bytes())
    content[-40000:-39996] = np.float32("nan").tobytes()
    (held / "b.wav").write_bytes(content)
    config = config_of(tones, tmp_path / "run", family=family, validation=str(held), max_steps=1)
    result = train(config)
    assert list(result.skipped) == ["b.wav"]
    assert "NaN" in result.skipped["b.wav"]
    assert math.isfinite(result.held_out["model"])
    # The readable part counts; for a model that carries its state, up to the unreadable sample.
    recordings = open_corpus(str(tones), sample_rate=RATE, validation=str(held)).validation
    (b,) = (n for n, recording in enumerate(recordings) if recording.name == "b.wav")
    counted = held_out_bits(wavear.load(result.best), recordings).samples
    assert counted[b] == 16384 if family == "gru" else 20000 < counted[b] < 30000
    assert sorted(counted)[1:] == [40000, 40000]
    for name in ("a.wav", "c.wav"):
        (held / name).unlink()
    (held / "b.wav").write_bytes(content[:-160000] + np.float32("nan").tobytes() * 40000)
    with pytest.raises(ValueError, match=r"not one held-out sample can be read \(b\.wav: "):
        train(dataclasses.replace(config, out=str(tmp_path / "none")))


def test_missing_speaker_labels_are_refused(tones, tmp_path):
    rows = [f"{path}" for path in sorted(tones.rglob("*.wav"))]
    (tmp_path / "list.csv").write_text("\n".join(["path", *rows]) + "\n")
    for settings, flag in (
        ({"speakers": True}, "--speakers"),
        ({"normalize": "rms", "normalize_by": "speaker"}, "--normalize-by"),
    ):
        with pytest.raises(WavearError, match=rf"list\.csv names no speaker: .* or drop {flag}$"):
            train(config_of(tmp_path / "list.csv", tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_speakers_are_numbered_and_named(tones, tmp_path, lines):
    config = config_of(tones, tmp_path / "run", speakers=True, unconditional=True, max_steps=2)
    config = dataclasses.replace(config, progress=True, validation_fraction=0.01)
    model = wavear.load(train(config).best)
    counts = re.findall(r"(?:on|out) (\d+) recordings?, .*, (\d) speakers?\n", lines())
    assert counts == [("7", "2"), ("1", "1")]
    assert model.config.speakers == 2
    assert wavear.generate(model, samples=10, speaker=1, engine="reference").shape == (1, 10)
    described = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert described["training"]["speakers"] == ["speaker0", "speaker1"]


def test_mel_statistics_are_those_of_the_training_data(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", max_steps=1)
    conditioning = wavear.load(train(config).best).conditioning
    assert isinstance(config.mel, MelConfig)
    waveforms = [audio.read(r.path)[None] for r in open_corpus(tones, sample_rate=RATE).train]
    mels = torch.cat([wavear.log_mel(w, config.mel)[0] for w in waveforms], dim=1)
    # From 64 crops of a tenth of a second: within a third of a deviation.
    assert ((conditioning.mel_mean - mels.mean(1)).abs() < mels.std(1) / 3).all()
    torch.testing.assert_close(conditioning.mel_deviation, mels.std(1), atol=0, rtol=0.35)


def test_existing_directories_are_refused_or_replaced(tones, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for settings, error, message in (
        ({}, FileExistsError, "is not empty: choose another directory, or give --resume"),
        ({"overwrite": True}, FileExistsError, r"is not a run \(no train.json\)"),
        ({"resume": True}, FileNotFoundError, "holds no run to resume"),
    ):
        with pytest.raises(error, match=message):
            train(config_of(tones, out, **settings))
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    train(config_of(tones, out, max_steps=2))
    assert train(config_of(tones, out, max_steps=3, overwrite=True)).steps == 3
    with pytest.raises(WavearError, match=r"model: layers 4, now 6; .* repeated: layers is 4$"):
        train(config_of(tones, out, layers=6, max_steps=9, resume=True))
    with pytest.raises(WavearError, match="is a run with seed 0, now 1"):
        train(config_of(tones, out, seed=1, resume=True))


@pytest.mark.slow
def test_names_that_are_not_unicode_are_reported(tones, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tones, data)
    for folder in ("speaker0", "held"):
        (data / folder).mkdir(exist_ok=True)
        (data / folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"RIFF")
    audio.write(data / "held" / "a.wav", np.zeros(4000), RATE)
    config = config_of(data, tmp_path / "run", validation=str(data / "held"), progress=True)
    values = json.dumps(dataclasses.asdict(config))
    program = (
        "import json, sys, wavear; from wavear.common.log import setup_logging; setup_logging();"
        " wavear.train(wavear.TrainConfig(**json.loads(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(wavear.__file__).parents[1])}
    command = [sys.executable, "-c", program, values]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rb"caf\udce9.wav" in done.stderr
    assert any("caf" in name for name in record_of(tmp_path / "run")["skipped"])
