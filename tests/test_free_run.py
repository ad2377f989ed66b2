"""Free-running synthesis of held-out clips: its measures, and the choice of the best model."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import RATE, config_of, interrupt_at_step, record_of, rows_of

import wavear
from wavear import MelConfig, TrainConfig, WaveNet, WaveNetConfig, audio, train
from wavear.common.errors import WavearError
from wavear.data.corpus import Recording, open_corpus
from wavear.evaluation.metrics import HNR_BANDS, harmonic_to_noise_ratio, log_mel_distance
from wavear.training import callbacks
from wavear.training.free_run import CLIPS, HNR_WEIGHT, FreeRun, free_run

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLER = importlib.import_module("wavear.generation.sampler")
SECONDS = 128 * 64 / RATE  # whole frames
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000.0)
SCORES = (3.0, 1.0, 2.0, 1.5, 1.0, 4.0)


def voice(seconds: float, period: int = 50, noise: float = 0.002, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=round(seconds * RATE)) * noise
    x[::period] += 0.5
    return x.astype(np.float32)


@pytest.fixture
def recordings(tmp_path: Path) -> list[Recording]:
    """Write six recordings of two speakers; the second cannot be read."""
    held = tmp_path / "held"
    for n in range(6):
        path = held / ("ann", "bob")[n % 2] / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        audio.write(path, voice(SECONDS, 50 + n, seed=n), RATE)
    found = list(open_corpus(held, sample_rate=RATE, validation=held).validation)
    found[1].path.write_bytes(b"broken")  # type: ignore[union-attr]
    return [dataclasses.replace(r, speaker=r.name.split("/")[0]) for r in found]


def model(mel: MelConfig | None = MEL, **settings: Any) -> WaveNet:
    sizes = ("residual_channels", "skip_channels", "head_channels", "conditioning_channels")
    settings |= dict.fromkeys(sizes, 4)
    config = WaveNetConfig(layers=2, stacks=1, sample_rate=RATE, mel=mel, **settings)
    return WaveNet(config).eval()


def replace_generate(
    monkeypatch: pytest.MonkeyPatch, recordings: list[Recording], change: Any
) -> list[Any]:
    """Make `generate` return the readable recordings, changed; return the list of its calls."""
    calls: list[Any] = []

    def generate(model: Any, mels: Any, **settings: Any) -> torch.Tensor:
        calls.append((mels, settings))
        rows = [audio.read(r.path).numpy() for n, r in enumerate(recordings) if n != 1][: len(mels)]
        return torch.from_numpy(np.stack([change(row) for row in rows]).astype(np.float32))

    monkeypatch.setattr(SAMPLER, "generate", generate)
    return calls


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_score_of_a_gain_is_its_logarithm(recordings, monkeypatch, gain):
    """A gain leaves the harmonic-to-noise ratios unchanged; a gain of 1 scores 0."""
    replace_generate(monkeypatch, recordings, lambda x: gain * x)
    found = free_run(model(), recordings, SECONDS)
    assert found is not None
    assert found.score == pytest.approx(-math.log(gain), abs=0.02)
    assert found.measures["period_error"] == found.measures["gross_period_error"] == 0
    for name in HNR_BANDS.keys() & found.measures.keys():
        recorded = found.measures[f"{name}_recorded"]
        assert found.measures[name] == pytest.approx(recorded, abs=0.01)
    assert found.probe["level_error"] == pytest.approx(20 * math.log10(gain), abs=1e-3)


def test_score_is_log_mel_distance_plus_differences_of_harmonicity(recordings, monkeypatch):
    rng = np.random.default_rng(0)
    replace_generate(monkeypatch, recordings, lambda x: x + 0.02 * rng.normal(size=x.size))
    found = free_run(model(), recordings, SECONDS)
    assert found is not None
    assert len(found.clips) == CLIPS
    distances = [log_mel_distance(x, y, RATE) for x, y in found.clips]
    gaps = [
        abs(harmonic_to_noise_ratio(x, y, RATE, band) - harmonic_to_noise_ratio(x, x, RATE, band))
        for x, y in found.clips
        for band in HNR_BANDS.values()  # the third ends at half of the rate
    ]
    assert np.mean(gaps) > 3
    assert found.score == pytest.approx(np.mean(distances) + 0.02 * np.mean(gaps), rel=1e-6)
    assert HNR_WEIGHT == 0.02
    assert found.measures["log_mel"] == pytest.approx(np.mean(distances))


def test_one_call_generates_the_clips_of_all_readable_recordings(recordings, monkeypatch):
    calls = replace_generate(monkeypatch, recordings, lambda x: x)
    names = sorted({recording.speaker for recording in recordings if recording.speaker})
    found = free_run(model(speakers=2), recordings, SECONDS, names)
    assert found is not None
    ((mels, settings),) = calls
    readable = [recording for n, recording in enumerate(recordings) if n != 1][:CLIPS]
    numbers = [names.index(recording.speaker or "") for recording in readable]
    assert settings["speaker"] == [*numbers, numbers[0]]
    assert len(set(numbers)) == 2
    for mel, (x, _), recording in zip(mels[:CLIPS], found.clips, readable, strict=True):
        assert np.array_equal(x, audio.read(recording.path).numpy())
        assert torch.equal(mel, wavear.log_mel(torch.from_numpy(x)[None], MEL)[0])
    assert free_run(model(), recordings[1:2], SECONDS) is None


@pytest.mark.parametrize("unconditional", [False, True])
def test_probe_measures_the_loudest_and_the_quietest_part(tmp_path, monkeypatch, unconditional):
    waveform = 0.1 * (-1.0) ** np.arange(4096)
    waveform[1024:2048] /= 100
    waveform[2048:2688] *= 5
    audio.write(tmp_path / "a.wav", waveform, RATE, "float32")
    recording = Recording(tmp_path / "a.wav", "a", 0, 4096, RATE)
    real = SAMPLER.generate

    def reference(*arguments: Any, **settings: Any) -> Any:
        return real(*arguments, **settings, engine="reference")

    monkeypatch.setattr(SAMPLER, "generate", reference)
    network = model(None if unconditional else MEL)
    made = free_run(network, [recording], 0.08)
    assert made is not None
    ((original, generated),) = made.clips
    assert original.shape == generated.shape == (640,)
    assert np.allclose(original, waveform[2048:2688], atol=1e-6)
    mel = None if unconditional else wavear.log_mel(torch.from_numpy(original)[None], MEL)
    samples = 640 if unconditional else None
    expected = reference(network, mel, samples=samples, seed=0)[0]
    assert np.array_equal(generated, expected.numpy())
    level = 10 * math.log10(np.var(generated) / np.var(waveform[2048:2688]))
    assert made.probe["level_error"] == pytest.approx(level, abs=1e-4)
    assert ("noise_floor" in made.probe) == (not unconditional)
    if unconditional:
        assert made.measures == {}
        return
    assert made.probe["noise_floor_recorded"] == pytest.approx(-60, abs=0.1)
    assert made.probe["noise_floor"] > -20  # an untrained model turns a pause into noise


# --- in training


def config(folder: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {"max_steps": 6, "validate_every": 1, "sample_seconds": 0.2}
    given |= {"layers": 2, "stacks": 1, "segment": 256, "validation": str(folder / "held")}
    return config_of(folder / "data", folder / "run", **given | settings)


@pytest.fixture
def data(recordings, tmp_path) -> None:
    """Write training data, and make all held-out recordings readable."""
    recordings[1].path.unlink()  # type: ignore[union-attr]
    (tmp_path / "data").mkdir()
    audio.write(tmp_path / "data" / "0.wav", voice(1.0, 60, 0.05), RATE)


@pytest.fixture
def scores(data, monkeypatch) -> list[float]:
    """Return a list; the free runs of a training run get its scores in order."""
    prescribed: list[float] = []

    def found(*_: Any) -> FreeRun:
        score, clip = prescribed.pop(0), voice(0.1)
        clips = [(clip, clip * np.float32(score / 10))] * 2
        return FreeRun({"score": score, "log_mel": score}, clips, {})

    monkeypatch.setattr(callbacks, "free_run", found)
    return prescribed


def best_step(out: Path) -> int:
    return json.loads((out / "best" / "config.json").read_text())["training"]["step"]


def test_best_has_the_lowest_score_and_new_samples_are_kept(scores, tmp_path, caplog):
    caplog.set_level(logging.INFO, "wavear")
    scores += SCORES
    out = tmp_path / "run"
    train(config(tmp_path, learning_rate=1e-2, progress=True))
    history = record_of(out)["history"]
    assert best_step(out) == 2  # the first step with the lowest score
    assert min(history, key=lambda entry: entry["bits"])["step"] != 2
    assert [entry["free_run"]["score"] for entry in history[1:]] == list(SCORES)
    assert "free_run" not in history[0]  # the model is untrained
    assert "bits; free run: score 1.000, log_mel 1.000 (best so far)" in caplog.text
    column = [row["free_run_score"] for row in rows_of(out / "metrics.csv")]
    assert [float(value) for value in column if value] == list(SCORES)
    rows = [row for row in rows_of(out / "validation.csv") if row["measure"] == "free run"]
    assert [float(row["value"]) for row in rows if row["group"] == "score"] == list(SCORES)
    kept = [f"step-{step:08}-{clip}.wav" for step in range(2, 7) for clip in range(2)]
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["recorded-0.wav", "recorded-1.wav", *kept]
    found = audio.read(out / "samples" / "step-00000006-0.wav").numpy()
    assert np.abs(found - 0.4 * voice(0.1)).max() < 1e-4
    scores += [1.0]
    train(config(tmp_path, max_steps=1, overwrite=True))
    assert len(list((out / "samples").iterdir())) == 4


def test_a_training_continues_after_a_free_run_that_failed(scores, tmp_path, caplog, monkeypatch):
    scores += SCORES
    found = callbacks.free_run

    def second_fails(*arguments: Any) -> Any:
        made = found(*arguments)
        if len(scores) == len(SCORES) - 2:
            raise WavearError("the logits of sample 7 are not finite")
        return made

    monkeypatch.setattr(callbacks, "free_run", second_fails)
    out = tmp_path / "run"
    train(config(tmp_path, learning_rate=1e-2, progress=True))
    assert (
        "step 2: the free run failed, the training continues: the logits of sample 7" in caplog.text
    )
    found_at = ["free_run" in entry for entry in record_of(out)["history"]]
    assert found_at == [False, True, False, True, True, True, True]
    assert best_step(out) == 1 + min(range(6), key=lambda n: (n == 1, SCORES[n]))


def test_resume_of_a_run_without_scores_chooses_by_scores(scores, tmp_path):
    out = tmp_path / "run"
    train(config(tmp_path, max_steps=3, sample_seconds=0.0, learning_rate=1e-2))
    history = record_of(out)["history"]
    assert best_step(out) == min(history, key=lambda entry: entry["bits"])["step"]
    scores += [5.0, 4.0, 6.0]
    train(config(tmp_path, resume=True, learning_rate=1e-2))
    assert best_step(out) == 5
    found = ["free_run" in entry for entry in record_of(out)["history"]]
    assert found == [False] * 4 + [True] * 3


def test_the_best_unconditional_model_has_the_fewest_bits(data, tmp_path, monkeypatch):
    clips = [(voice(0.1), voice(0.1))]
    monkeypatch.setattr(callbacks, "free_run", lambda *_: FreeRun({}, clips, {"level_error": 0.0}))
    out = tmp_path / "run"
    train(config(tmp_path, unconditional=True, learning_rate=1e-2))
    history = record_of(out)["history"]
    assert best_step(out) == min(history, key=lambda entry: entry["bits"])["step"]
    assert not any("free_run" in entry for entry in history)
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["recorded-0.wav", *(f"step-{step:08}-0.wav" for step in range(2, 7))]
    assert {row["measure"] for row in rows_of(out / "validation.csv")} == {"bits by level", "probe"}


@pytest.mark.slow
def test_resumed_run_has_the_scores_of_an_uninterrupted_one(data, tmp_path):
    """The real free run resumes bit for bit."""
    out = tmp_path / "run"
    train(config(tmp_path, max_steps=4))
    expected = record_of(out)["history"]
    with interrupt_at_step(2):
        assert train(config(tmp_path, max_steps=4, overwrite=True)).stopped_by == "interrupt"
    train(config(tmp_path, max_steps=4, resume=True))
    found = {e["step"]: e["free_run"] for e in record_of(out)["history"] if "free_run" in e}
    assert {3, 4} <= set(found)
    assert all(found[e["step"]] == e["free_run"] for e in expected if e["step"] in found)
