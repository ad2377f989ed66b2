"""The free run of held-out clips: what it measures, and that it chooses the best model of a run."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import MelConfig, TrainConfig, WaveNet, WaveNetConfig, audio, train
from wavear.data.corpus import Recording, open_corpus
from wavear.evaluation.metrics import HNR_BANDS, harmonic_to_noise_ratio, log_mel_distance
from wavear.training import callbacks
from wavear.training.free_run import CLIPS, HNR_WEIGHT, FreeRun, free_run

RATE = 8000
GENERATION = importlib.import_module(
    "wavear.generation.sampler"
)  # `wavear.generate` is the function
SECONDS = 128 * 64 / RATE  # whole frames
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000.0)


def voice(seconds: float, period: int = 50, noise: float = 0.002, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=round(seconds * RATE)) * noise
    x[::period] += 0.5
    return x.astype(np.float32)


@pytest.fixture
def recordings(tmp_path: Path) -> list[Recording]:
    """Six of two speakers; one is no audio."""
    for n in range(6):
        path = tmp_path / "held" / ("ann", "bob")[n % 2] / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        audio.write(path, voice(SECONDS, 50 + n, seed=n), RATE)
    found = list(
        open_corpus(tmp_path / "held", sample_rate=RATE, validation=tmp_path / "held").validation
    )
    found[1].path.write_bytes(b"broken")  # type: ignore[union-attr]
    return [
        dataclasses.replace(recording, speaker=recording.name.split("/")[0]) for recording in found
    ]


def model(**settings: Any) -> WaveNet:
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
    )
    return WaveNet(
        WaveNetConfig(layers=2, stacks=1, sample_rate=RATE, mel=MEL, **sizes, **settings)
    ).eval()


def generated(recordings: list[Recording], change: Any, calls: list[Any]) -> Any:
    """Stands for `generate`: makes the recordings that can be read, changed, and notes how it was called."""

    def generate(model: Any, mels: Any, **settings: Any) -> torch.Tensor:
        calls.append((mels, settings))
        rows = [audio.read(r.path).numpy() for n, r in enumerate(recordings) if n != 1][: len(mels)]
        return torch.from_numpy(np.stack([change(row) for row in rows]).astype(np.float32))

    return generate


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_score_of_a_gain_is_its_logarithm(recordings, monkeypatch, gain):
    """It leaves the harmonic-to-noise ratios; nothing is 0 for what equals the recordings."""
    monkeypatch.setattr(GENERATION, "generate", generated(recordings, lambda x: gain * x, []))
    found = free_run(model(), recordings, SECONDS)
    assert found is not None
    assert found.score == pytest.approx(-math.log(gain), abs=0.02)
    assert found.measures["period_error"] == found.measures["gross_period_error"] == 0
    for name in HNR_BANDS:
        if name in found.measures:
            assert found.measures[name] == pytest.approx(
                found.measures[f"{name}_recorded"], abs=0.01
            )


def test_score_is_the_log_mel_distance_and_what_harmonicity_differs(recordings, monkeypatch):
    rng = np.random.default_rng(0)
    made = generated(recordings, lambda x: x + 0.02 * rng.normal(size=x.size), [])
    monkeypatch.setattr(GENERATION, "generate", made)
    found = free_run(model(), recordings, SECONDS)
    assert found is not None
    assert len(found.clips) == CLIPS
    distances = [log_mel_distance(x, y, RATE) for x, y in found.clips]
    bands = HNR_BANDS.values()  # the third is cut at half of the rate
    gaps = [
        abs(harmonic_to_noise_ratio(x, y, RATE, band) - harmonic_to_noise_ratio(x, x, RATE, band))
        for x, y in found.clips
        for band in bands
    ]
    assert np.mean(gaps) > 3
    assert found.score == pytest.approx(np.mean(distances) + 0.02 * np.mean(gaps), rel=1e-6)
    assert HNR_WEIGHT == 0.02
    assert found.measures["log_mel"] == pytest.approx(np.mean(distances))


def test_clips_are_made_in_one_call_of_the_first_recordings_that_can_be_read(
    recordings, monkeypatch
):
    calls: list[Any] = []
    monkeypatch.setattr(GENERATION, "generate", generated(recordings, lambda x: x, calls))
    names = sorted({recording.speaker for recording in recordings if recording.speaker})
    found = free_run(model(speakers=2), recordings, SECONDS, names)
    assert found is not None
    ((mels, settings),) = calls
    readable = [recording for n, recording in enumerate(recordings) if n != 1][:CLIPS]
    assert settings["speaker"] == [names.index(recording.speaker or "") for recording in readable]
    assert len(set(settings["speaker"])) == 2
    for mel, (x, _), recording in zip(mels, found.clips, readable, strict=True):
        assert np.array_equal(x, audio.read(recording.path).numpy())
        assert torch.equal(mel, wavear.log_mel(torch.from_numpy(x)[None], MEL)[0])


def test_without_a_readable_recording_there_is_none(recordings):
    assert free_run(model(), recordings[1:2], SECONDS) is None


# ---- in training


def config(tmp_path: Path, **settings: Any) -> TrainConfig:
    sizes: dict[str, Any] = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels"), 8
    )
    given: dict[str, Any] = {
        "family": "wavenet", "layers": 2, "stacks": 1, "classes": 32, "sample_rate": RATE, "mel_bands": 8,
        "mel_hop_length": 64, "segment": 256, "max_steps": 6, "validate_every": 1, "sample_seconds": 0.2,
        "progress": False, "device": "cpu", "precision": "32", "workers": 0, "validation": str(tmp_path / "held"),
    }  # fmt: skip
    return TrainConfig(
        data=str(tmp_path / "data"), out=str(tmp_path / "run"), **sizes | given | settings
    )


@pytest.fixture
def scores(recordings, tmp_path, monkeypatch) -> list[float]:
    """Of the free runs of a run, one after the other: what it finds is prescribed."""
    recordings[1].path.unlink()  # type: ignore[union-attr]
    (tmp_path / "data").mkdir()
    audio.write(tmp_path / "data" / "0.wav", voice(1.0, 60, 0.05), RATE)
    prescribed: list[float] = []

    def found(*_: Any) -> FreeRun:
        score, clip = prescribed.pop(0), voice(0.1)
        return FreeRun(
            {"score": score, "log_mel": score}, [(clip, clip * np.float32(score / 10))] * 2
        )

    monkeypatch.setattr(callbacks, "free_run", found)
    return prescribed


def record_of(out: Path) -> tuple[list[dict[str, Any]], int]:
    """The curve, and the step of the best checkpoint."""
    best = json.loads((out / "best" / "config.json").read_text())["training"]["step"]
    return json.loads((out / "train.json").read_text())["history"], best


def test_the_best_has_the_least_score_not_the_fewest_bits(scores, tmp_path, capsys):
    scores += [3.0, 1.0, 2.0, 1.5, 1.0, 4.0]
    train(config(tmp_path, learning_rate=1e-2, progress=True))
    history, best = record_of(tmp_path / "run")
    assert best == 2  # the first of the least
    assert min(history, key=lambda entry: entry["bits"])["step"] != 2
    assert [entry["free_run"]["score"] for entry in history[1:]] == [3.0, 1.0, 2.0, 1.5, 1.0, 4.0]
    assert "free_run" not in history[0]  # nothing is learned yet
    printed = capsys.readouterr().out + capsys.readouterr().err
    assert "bits; free run: score 1.000, log_mel 1.000 (best so far)" in printed
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        column = [row["free_run_score"] for row in csv.DictReader(file) if row["validation_bits"]]
    assert column == ["", "3.0", "1.0", "2.0", "1.5", "1.0", "4.0"]
    with open(tmp_path / "run" / "validation.csv", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["measure"] == "free run" and row["group"] == "score"
        ]
    assert [float(row["value"]) for row in rows] == [3.0, 1.0, 2.0, 1.5, 1.0, 4.0]


def test_samples_are_those_of_the_newest_validations_and_an_overwrite_drops_them(scores, tmp_path):
    scores += [3.0, 1.0, 2.0, 1.5, 1.0, 4.0]
    train(config(tmp_path))
    folder = tmp_path / "run" / "samples"
    kept = [f"step-{step:08}-{clip}.wav" for step in range(2, 7) for clip in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "recorded-0.wav",
        "recorded-1.wav",
        *kept,
    ]
    found = audio.read(folder / "step-00000006-0.wav").numpy()
    assert np.abs(found - 0.4 * voice(0.1)).max() < 1e-4
    scores += [1.0]
    train(config(tmp_path, max_steps=1, overwrite=True))
    assert len(list(folder.iterdir())) == 4


def test_resume_of_a_run_without_scores_chooses_by_the_free_run_from_then_on(scores, tmp_path):
    train(config(tmp_path, max_steps=3, sample_seconds=0.0, learning_rate=1e-2))
    history, best = record_of(tmp_path / "run")
    assert best == min(history, key=lambda entry: entry["bits"])["step"]
    scores += [5.0, 4.0, 6.0]
    train(config(tmp_path, resume=True, learning_rate=1e-2))
    history, best = record_of(tmp_path / "run")
    assert best == 5
    assert ["free_run" in entry for entry in history] == [False] * 4 + [True] * 3


def test_unconditional_models_are_chosen_by_bits(scores, tmp_path):
    train(config(tmp_path, unconditional=True, learning_rate=1e-2))
    history, best = record_of(tmp_path / "run")
    assert best == min(history, key=lambda entry: entry["bits"])["step"]
    assert not any("free_run" in entry for entry in history)
    assert not (tmp_path / "run" / "samples").exists()


def test_a_resumed_run_has_the_scores_of_an_uninterrupted_one(recordings, tmp_path, monkeypatch):
    """The real free run, to the bit."""
    recordings[1].path.unlink()  # type: ignore[union-attr]
    (tmp_path / "data").mkdir()
    audio.write(tmp_path / "data" / "0.wav", voice(1.0, 60, 0.05), RATE)
    train(config(tmp_path, max_steps=4))
    expected, _ = record_of(tmp_path / "run")
    ends = callbacks.Run.on_train_batch_end

    def interrupted(self: Any, trainer: Any, *arguments: Any) -> None:
        self._interrupted = trainer.global_step == 2
        ends(self, trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Run, "on_train_batch_end", interrupted)
        assert train(config(tmp_path, max_steps=4, overwrite=True)).stopped_by == "interrupt"
    train(config(tmp_path, max_steps=4, resume=True))
    found, _ = record_of(tmp_path / "run")
    scores = {entry["step"]: entry["free_run"] for entry in expected if "free_run" in entry}
    resumed = {entry["step"]: entry["free_run"] for entry in found if "free_run" in entry}
    assert set(scores) == {1, 2, 3, 4}
    assert {3, 4} <= set(resumed)
    assert all(scores[step] == values for step, values in resumed.items())
