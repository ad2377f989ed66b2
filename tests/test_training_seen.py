"""Reports of a run: bits by loudness and speaker, the average's distance, waits, loggers."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import RATE, config_of, record_of, rows_of, state_of

import wavear
from wavear import audio, train, write_held_out
from wavear.data.corpus import Recording, open_corpus
from wavear.data.crops import Segments, collate
from wavear.data.shards import write_shards
from wavear.evaluation import held_out
from wavear.evaluation.bits import score_recording
from wavear.evaluation.clips import open_clips, preparation, training_record
from wavear.evaluation.pictures import mel_pixels
from wavear.models.crop_loss import crop_loss, inputs, layout_of
from wavear.models.families import FAMILIES
from wavear.training import callbacks
from wavear.training.free_run import FreeRun
from wavear.training.log import Log
from wavear.training.validation import ByLevel, interleave_speakers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def fading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write fading tones of the speakers a and b."""
    root = tmp_path_factory.mktemp("fading")
    generator = np.random.default_rng(0)
    for number in range(6):
        t = np.arange(3000 + 50 * number) / RATE
        tone = 0.5 * np.exp(-20 * t) * np.sin(2 * np.pi * (200 + 50 * number) * t)
        path = root / "ab"[number % 2] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, tone + 0.0005 * generator.standard_normal(t.size), RATE)
    return root


# --- bits by group


@pytest.mark.parametrize(
    ("family", "world", "unconditional"),
    [("wavenet", 1, False), ("wavenet", 3, True), ("gru", 3, False), ("transformer", 1, True)],
)
def test_bits_by_level_equal_those_of_evaluate(fading, monkeypatch, family, world, unconditional):
    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", 500)  # crops end within the 20 ms
    torch.manual_seed(0)
    config = config_of("-", "-", family=family, unconditional=unconditional)
    model = FAMILIES[family][0](config.model_config()).double()
    hop = 1 if unconditional else 64
    corpus = open_corpus(fading, sample_rate=RATE).train[:3]
    recordings = [Recording(r.path, r.name, 0, r.frames // hop * hop, RATE) for r in corpus]
    levels = ByLevel(RATE)
    for rank in range(world):
        held_out.held_out_bits(model, recordings, rank=rank, world=world, note=levels.add)
    scores = [score_recording(model, recording, None) for recording in recordings]
    expected = np.sum([s.level_samples for s in scores], axis=0)
    np.testing.assert_array_equal(levels.samples, expected)
    bits = np.sum([s.level_bits for s in scores], axis=0)
    np.testing.assert_allclose(levels.bits, bits, rtol=1e-6)
    assert np.count_nonzero(levels.samples) > 2
    name, (mean, count) = next(iter(levels.named().items()))
    first = int(np.argmax(levels.samples > 0))
    assert name == "-70 to -60"
    assert count == levels.samples[first]
    assert mean == pytest.approx(levels.bits[first] / levels.samples[first])


def test_run_writes_bits_by_level_and_by_speaker(fading, tmp_path):
    out, held = tmp_path / "run", shutil.copytree(fading, tmp_path / "held")
    settings: dict[str, Any] = {"max_steps": 10, "validate_every": 5, "speakers": True}
    train(config_of(fading, out, validation=str(held), **settings))
    rows = rows_of(out / "validation.csv")
    assert sorted({int(row["step"]) for row in rows}) == [0, 5, 10]
    last = {(row["measure"], row["group"]): row for row in rows if row["step"] == "10"}
    entry = record_of(out)["history"][-1]
    model = wavear.load(out / "last")
    recordings = open_corpus(fading, sample_rate=RATE, validation=held, speakers=True).validation
    for name in "ab":
        own = [recording for recording in recordings if recording.speaker == name]
        expected = held_out.held_out_bits(model, own, ["a", "b"])
        row = last["bits by speaker", name]
        assert float(row["value"]) == pytest.approx(expected.per_sample, abs=1e-4)
        assert int(row["samples"]) == expected.samples.sum()
        assert entry["speaker"][name] == pytest.approx(expected.per_sample, abs=1e-4)
    groups = {group: row for (measure, group), row in last.items() if measure == "bits by level"}
    total = sum(float(row["value"]) * int(row["samples"]) for row in groups.values())
    count = sum(int(row["samples"]) for row in groups.values())
    assert total / count == pytest.approx(entry["bits"], abs=0.1)  # except rests below 20 ms
    board = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"bits by speaker/a" in board
    assert b"average_distance" in board


def test_speakers_take_turns():
    recordings = [Recording(Path(n), n, speaker=n[0]) for n in ("a1", "a2", "a3", "b1", "c1", "c2")]
    names = [recording.name for recording in interleave_speakers(recordings)]
    assert names == ["a1", "b1", "c1", "a2", "c2", "a3"]
    nameless = [Recording(Path(n), n) for n in "xyz"]
    assert interleave_speakers(nameless) == nameless


# --- metrics.csv


@pytest.mark.slow
def test_distance_of_the_average_and_waits_are_written(fading, tmp_path, monkeypatch):
    real = Segments.__getitem__

    def slow(self: Segments, index: int) -> Any:
        time.sleep(0.1)
        return real(self, index)

    out = tmp_path / "run"
    train(config_of(fading, out, max_steps=10))
    state = state_of(out)["state_dict"]
    names = dict(wavear.load(out / "last").named_parameters())
    pairs = [(state[f"model.{n}"].double(), state[f"average.{n}"].double()) for n in names]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(a.square().sum()) for a, _ in pairs)
    (row,) = [row for row in rows_of(out / "metrics.csv") if row["average_distance"]]
    assert float(row["average_distance"]) == pytest.approx(math.sqrt(apart / norm), rel=1e-3)
    assert float(row["data_wait"]) < 0.9
    monkeypatch.setattr(Segments, "__getitem__", slow)
    train(config_of(fading, tmp_path / "slow", max_steps=10))
    (slowed,) = [row for row in rows_of(tmp_path / "slow" / "metrics.csv") if row["data_wait"]]
    wait = float(slowed["data_wait"])
    assert wait <= 1
    assert wait * float(slowed["seconds"]) > 20 * 0.1 * 0.9  # twenty crops of 0.1 s


def test_rows_of_repeated_steps_are_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,train_bits\n10,1.0,3.5\n20,2.0,3.0\n3")
    header = "step,measure,group,value,samples\n"
    (tmp_path / "validation.csv").write_text(header + "10,probe,x,1.0,\n20,probe,x,2.0,\n")
    Log(tmp_path).trim(10)
    (row,) = rows_of(tmp_path / "metrics.csv")  # of an older version, with fewer columns
    assert (row["step"], row["train_bits"], row["data_wait"]) == ("10", "3.5", "")
    assert [row["value"] for row in rows_of(tmp_path / "validation.csv")] == ["1.0"]


def test_picture_has_low_frequencies_at_the_bottom():
    tone = 0.5 * torch.sin(2 * torch.pi * 300 * torch.arange(RATE) / RATE)
    picture = mel_pixels(tone.numpy(), RATE).astype(int).sum(2)
    assert picture.sum(1).argmax() > 0.8 * picture.shape[0]


# --- Weights & Biases


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Replace the package, as far as Lightning's logger uses it; return the recorded calls."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def __init__(self, **settings: Any):
            calls.append(("init", settings))
            self.id, self.name = settings["id"], settings["name"]
            update = lambda values, **_: calls.append(("config", values))  # noqa: E731
            self.config = types.SimpleNamespace(update=update)

        def log(self, values: dict[str, Any]) -> None:
            calls.append(("log", values))

        def define_metric(self, *names: Any, **settings: Any) -> None:
            pass

        def finish(self) -> None:
            calls.append(("finish", None))

    modules: dict[str, Any] = {
        name: types.ModuleType(name)
        for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")
    }
    modules["wandb"].run, modules["wandb"].init = None, Run
    modules["wandb"].Audio = lambda data, **settings: ("audio", data, settings)
    modules["wandb"].Image = lambda data, **_: ("image", data)
    modules["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})
    modules["wandb.wandb_run"].Run = Run
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_weights_and_biases_receives_the_metrics_of_tensorboard(
    fading, tmp_path, wandb_calls, monkeypatch
):
    clip = np.zeros(200, np.float32)
    free = FreeRun({"score": 1.0, "log_mel": 1.0}, [(clip, clip)], {"level_error": 0.5})
    monkeypatch.setattr(callbacks, "free_run", lambda *_: free)
    out = tmp_path / "run"
    settings: dict[str, Any] = {"wandb": "voices", "sample_seconds": 0.02, "validate_every": 5}
    config = config_of(fading, out, max_steps=10, **settings)
    train(config)
    (init,) = [values for kind, values in wandb_calls if kind == "init"]
    assert (init["project"], init["name"], init["dir"]) == ("voices", "run", str(out))
    logged = [values for kind, values in wandb_calls if kind == "log"]
    curves = {(name, values["trainer/global_step"]) for values in logged for name in values}
    assert {("train_bits", 10), ("gradient_norm", 10), ("validation_bits", 0)} <= curves
    assert {("probe/level_error", 5), ("free run/score", 10), ("validation_bits", 10)} <= curves
    assert any(name.startswith("bits by level/") for name, _ in curves)
    sounds = [values["sample/generated"] for values in logged if "sample/generated" in values]
    assert sounds[0][0][0] == "audio"
    assert sounds[0][0][2] == {"sample_rate": RATE}
    assert [kind for kind, _ in wandb_calls][-1] == "finish"
    (values,) = [values for kind, values in wandb_calls if kind == "config"]
    assert values["learning_rate"] == config.resolved().learning_rate
    wandb_calls.clear()
    train(config_of(fading, out, max_steps=12, resume=True, **settings))
    (again,) = [values for kind, values in wandb_calls if kind == "init"]
    assert again["id"] == init["id"]  # the same run of Weights & Biases


# --- dropout of conditioning


def test_hidden_frames_become_the_mean_and_others_stay(fading, monkeypatch):
    torch.manual_seed(0)
    model = wavear.WaveNet(config_of("-", "-").model_config())
    assert model.conditioning is not None
    mean = model.conditioning.mel_mean
    layout = layout_of(model, 4096)
    segments = Segments(open_corpus(fading, sample_rate=RATE).train, layout)
    batch = collate([segments[i] for i in range(5)])
    seen: list[torch.Tensor] = []
    real = model.condition

    def condition(mel: torch.Tensor, *others: Any, **more: Any) -> Any:
        seen.append(mel)
        return real(mel, *others, **more)

    monkeypatch.setattr(model, "condition", condition)
    mean.copy_(torch.arange(8.0) + 100)
    inputs(model, batch, layout)
    inputs(model, batch, layout, torch.Generator().manual_seed(0), 0.3)
    clean, dropped = seen
    hidden = (dropped == mean[:, None]).all(1)
    assert 0.2 < hidden.float().mean() < 0.4
    assert torch.equal(dropped.transpose(1, 2)[~hidden], clean.transpose(1, 2)[~hidden])
    assert not (clean == mean[:, None]).any()

    def loss(seed: int, dropout: float) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        return crop_loss(model, batch, layout, None, noise, dropout=dropout)[0]

    assert torch.equal(loss(0, 0.0), crop_loss(model, batch, layout)[0])
    assert torch.equal(loss(1, 0.3), loss(1, 0.3))
    assert not torch.equal(loss(1, 0.3), loss(2, 0.3))


def test_frames_are_hidden_in_training_only(fading, tmp_path):
    """A learning rate near 0 keeps the initial weights, and with them the held-out bits."""
    settings: dict[str, Any] = {"learning_rate": 1e-30, "weight_decay": 0.0, "max_steps": 10}
    bits, losses = [], []
    for share in (0.0, 0.5):
        out = tmp_path / str(share)
        result = train(config_of(fading, out, conditioning_dropout=share, **settings))
        bits.append(result.bits_final)
        losses.append([row["train_bits"] for row in rows_of(out / "metrics.csv")])
    assert bits[0] == pytest.approx(bits[1], abs=1e-6)
    assert losses[0] != losses[1]


# --- for the evaluation


def test_held_out_manifest_has_the_recordings_of_the_run(fading, tmp_path):
    """The manifest omits files too short for a mel frame; tar shards are refused."""
    data, out, manifest = tmp_path / "data", tmp_path / "run", tmp_path / "held.jsonl"
    shutil.copytree(fading, data)
    for number in range(40):  # short ones, of which some would be held out by their names
        audio.write(data / "a" / f"short-{number}.wav", np.full(20, 0.1), RATE)
    train(config_of(data, out, max_steps=1, speakers=True, validation_fraction=0.3))
    record = record_of(out)
    lines = write_held_out(out, manifest).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == record["data"]["validation"]["recordings"]
    assert all(Path(row["path"]).parent == data / row["speaker"] for row in rows)
    write_shards(fading, tmp_path / "shards")
    record["config"]["data"] = str(tmp_path / "shards" / "*.tar")
    (out / "train.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="held out lies in tar shards"):
        write_held_out(out, manifest)


def test_gains_of_speakers_are_recorded_for_the_evaluation(fading, tmp_path):
    settings: dict[str, Any] = {"max_steps": 1, "normalize": "peak", "normalize_by": "speaker"}
    train(config_of(fading, tmp_path / "run", **settings))
    prepared = preparation(training_record(tmp_path / "run" / "last"))
    for name in "ab":
        paths = (fading / name).glob("*.wav")
        gain = min(0.9 / float(audio.read(path).abs().max()) for path in paths)
        assert prepared.gains[name] == pytest.approx(gain)
    single = tmp_path / "single" / "a" / "0.wav"
    single.parent.mkdir(parents=True)
    shutil.copy(fading / "a" / "4.wav", single)
    found = open_clips(tmp_path / "single", RATE, 1, prepared, False)
    assert found.good[0].gain == prepared.gains["a"]
    assert found.notes[-1].endswith("the speakers' gains are those of the training")
