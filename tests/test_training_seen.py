"""What a run shows: bits by loudness and speaker, the distance of the average, waits; and where that is written."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import audio
from wavear.data.corpus import Recording, open_corpus
from wavear.data.crops import Segments, collate
from wavear.models.crop_loss import crop_loss, inputs, layout_of
from wavear.training.config import TrainConfig
from wavear.training.run import train

RATE = 8000
TINY: dict[str, Any] = {
    "family": "wavenet",
    "layers": 4,
    "stacks": 2,
    "residual_channels": 8,
    "skip_channels": 8,
    "head_channels": 16,
    "conditioning_channels": 6,
    "classes": 32,
    "sample_rate": RATE,
    "mel_bands": 8,
    "mel_hop_length": 64,
    "segment": 512,
    "max_steps": 10,
    "warmup_steps": 2,
    "validate_every": 5,
    "sample_seconds": 0.0,
    "progress": False,
    "device": "cpu",
    "precision": "32",
    "workers": 0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones that swell, of two speakers."""
    root = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    for number in range(6):
        time = np.arange(3000 + 50 * number) / RATE
        tone = 0.5 * np.exp(-20 * time) * np.sin(2 * np.pi * (200 + 50 * number) * time)
        path = root / "ab"[number % 2] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, tone + 0.0005 * generator.standard_normal(time.size), RATE)
    return root


def config_of(tones: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(data=str(tones), out=str(out), **TINY | settings)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _carrying(family: str, mel: wavear.MelConfig | None) -> Any:
    if family == "gru":
        return wavear.GRU(
            wavear.GRUConfig(channels=16, input_channels=8, sample_rate=RATE, mel=mel)
        )
    return wavear.Transformer(
        wavear.TransformerConfig(
            layers=2, channels=8, heads=2, window=4, patch=4, sample_rate=RATE, mel=mel
        )
    )


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("family", ["wavenet", "gru", "transformer"])
@pytest.mark.parametrize("unconditional", [False, True], ids=["mel", "free"])
def test_bits_by_level_are_those_of_evaluate(
    tones: Path, tmp_path: Path, monkeypatch, world: int, family: str, unconditional: bool
):
    from wavear.evaluation import held_out
    from wavear.evaluation.bits import score_recording
    from wavear.training.groups import ByLevel

    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", 500)  # crops end within the 20 ms
    torch.manual_seed(0)
    config = config_of(tones, tmp_path, unconditional=unconditional)
    wavenet = family == "wavenet"
    model = (
        wavear.WaveNet(config.model_config()) if wavenet else _carrying(family, config.mel)
    ).double()
    recordings = open_corpus(tones, sample_rate=RATE).train
    hop = 1 if unconditional else 64
    recordings = [Recording(r.path, r.name, 0, r.frames // hop * hop, RATE) for r in recordings]
    levels = ByLevel(RATE)
    for rank in range(world):
        held_out.held_out_bits(model, recordings, rank=rank, world=world, note=levels.add)
    expected = [score_recording(model, recording, None) for recording in recordings]
    np.testing.assert_array_equal(
        levels.samples, np.sum([s.level_samples for s in expected], axis=0)
    )
    np.testing.assert_allclose(
        levels.bits, np.sum([s.level_bits for s in expected], axis=0), rtol=1e-6
    )
    assert np.count_nonzero(levels.samples) > 2
    name, (mean, count) = next(iter(levels.named().items()))
    first = int(np.argmax(levels.samples > 0))
    assert name == "-70 to -60"
    assert (mean, count) == (
        pytest.approx(levels.bits[first] / levels.samples[first]),
        levels.samples[first],
    )


def test_a_run_writes_them_by_level_and_by_speaker(tones: Path, tmp_path: Path):
    from wavear.evaluation.held_out import held_out_bits

    held = shutil.copytree(tones, tmp_path / "held")
    config = config_of(tones, tmp_path / "run", validation=str(held), speakers=True)
    train(config)
    rows = rows_of(tmp_path / "run" / "validation.csv")
    assert sorted({int(row["step"]) for row in rows}) == [0, 5, 10]
    last = {(row["measure"], row["group"]): row for row in rows if row["step"] == "10"}
    history = json.loads((tmp_path / "run" / "train.json").read_text())["history"]
    model = wavear.load(tmp_path / "run" / "last")
    recordings = open_corpus(tones, sample_rate=RATE, validation=held, speakers=True).validation
    for name in "ab":
        own = [recording for recording in recordings if recording.speaker == name]
        expected = held_out_bits(model, own, ["a", "b"])
        row = last["bits by speaker", name]
        assert float(row["value"]) == pytest.approx(expected.per_sample, abs=1e-4)
        assert int(row["samples"]) == expected.samples.sum()
        assert history[-1]["speaker"][name] == pytest.approx(expected.per_sample, abs=1e-4)
    groups = {group: row for (measure, group), row in last.items() if measure == "bits by level"}
    total = sum(float(row["value"]) * int(row["samples"]) for row in groups.values())
    count = sum(int(row["samples"]) for row in groups.values())
    assert total / count == pytest.approx(history[-1]["bits"], abs=0.1)  # but for rests below 20 ms
    board = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"bits by speaker/a" in board
    assert b"bits by level/-20" not in board
    assert b"average_distance" in board


def test_speakers_take_turns_on_the_curve():
    from wavear.training.groups import turn_about

    recordings = [Recording(Path(n), n, speaker=n[0]) for n in ("a1", "a2", "a3", "b1", "c1", "c2")]
    assert [r.name for r in turn_about(recordings)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    nameless = [Recording(Path(n), n) for n in "xyz"]
    assert turn_about(nameless) == nameless


def test_the_distance_of_the_average_and_the_waits_are_told(
    tones: Path, tmp_path: Path, monkeypatch
):
    import time

    from wavear.training.state import load_state

    real = Segments.__getitem__

    def slow(self: Segments, index: int) -> Any:
        time.sleep(0.1)
        return real(self, index)

    train(config_of(tones, tmp_path / "run"))
    state = load_state(tmp_path / "run" / "states" / "step-00000010.safetensors")["state_dict"]
    names = dict(wavear.load(tmp_path / "run" / "last").named_parameters())  # not what is fixed
    apart = sum(
        float((state[f"model.{n}"] - state[f"average.{n}"]).double().square().sum()) for n in names
    )
    norm = sum(float(state[f"model.{n}"].double().square().sum()) for n in names)
    (row,) = [row for row in rows_of(tmp_path / "run" / "metrics.csv") if row["average_distance"]]
    assert float(row["average_distance"]) == pytest.approx(math.sqrt(apart / norm), rel=1e-3)
    monkeypatch.setattr(Segments, "__getitem__", slow)
    train(config_of(tones, tmp_path / "slow"))
    (slowed,) = [row for row in rows_of(tmp_path / "slow" / "metrics.csv") if row["data_wait"]]
    assert float(row["data_wait"]) < 0.9
    assert (
        float(slowed["data_wait"]) * float(slowed["seconds"]) > 10 * 2 * 0.1 * 0.9
    )  # twenty crops of 0.1 s
    assert float(slowed["data_wait"]) <= 1


def test_rows_of_steps_taken_again_are_dropped(tmp_path: Path):
    from wavear.training.log import Log

    (tmp_path / "metrics.csv").write_text(
        "step,seconds,train_bits\n10,1.0,3.5\n20,2.0,3.0\n3"
    )  # of an older version
    (tmp_path / "validation.csv").write_text(
        "step,measure,group,value,samples\n10,probe,x,1.0,\n20,probe,x,2.0,\n"
    )
    Log(tmp_path).trim(10)
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert (row["step"], row["train_bits"], row["data_wait"]) == ("10", "3.5", "")
    assert [row["value"] for row in rows_of(tmp_path / "validation.csv")] == ["1.0"]


# --- Weights & Biases


def stand_in(told: list[tuple[str, Any]]) -> types.ModuleType:
    """Of the package, as far as Lightning's logger uses it: notes what it is told."""
    wandb = types.ModuleType("wandb")

    class Run:
        def __init__(self, **settings: Any):
            told.append(("init", settings))
            self.id, self.name = settings["id"], settings["name"]
            self.config = types.SimpleNamespace(
                update=lambda values, **_: told.append(("config", values))
            )

        def log(self, values: dict[str, Any]) -> None:
            told.append(("log", values))

        def define_metric(self, *names: Any, **settings: Any) -> None:
            pass

        def finish(self) -> None:
            told.append(("finish", None))

    parts: dict[str, Any] = {"run": None, "init": lambda **settings: Run(**settings)}
    parts |= {
        "Audio": lambda data, **settings: ("audio", data, settings),
        "Image": lambda data, **_: ("image", data),
    }
    for name, part in parts.items():
        setattr(wandb, name, part)
    inner = {
        name: types.ModuleType(name) for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")
    }
    inner["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})  # type: ignore[attr-defined]
    inner["wandb.wandb_run"].Run = Run  # type: ignore[attr-defined]
    sys.modules.update(inner | {"wandb": wandb})
    return wandb


@pytest.fixture
def wandb_told(monkeypatch: pytest.MonkeyPatch):
    told: list[tuple[str, Any]] = []
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "wandb"}
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    stand_in(told)
    yield told
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_weights_and_biases_is_told_what_tensorboard_is(
    tones: Path, tmp_path: Path, wandb_told, monkeypatch
):
    import functools

    from wavear.training import callbacks

    monkeypatch.setattr(callbacks, "probe", functools.partial(callbacks.probe, engine="reference"))
    config = config_of(tones, tmp_path / "run", wandb="voices", sample_seconds=0.02)
    train(config)
    (init,) = [values for kind, values in wandb_told if kind == "init"]
    assert (init["project"], init["name"], init["dir"]) == ("voices", "run", str(tmp_path / "run"))
    logged = [values for kind, values in wandb_told if kind == "log"]
    curves = {(name, values["trainer/global_step"]) for values in logged for name in values}
    assert {
        ("train_bits", 10),
        ("gradient_norm", 10),
        ("validation_bits", 0),
        ("validation_bits", 10),
    } <= curves
    assert any(name.startswith("bits by level/") for name, _ in curves)
    sounds = [values["sample/generated"] for values in logged if "sample/generated" in values]
    assert sounds[0][0][0] == "audio"
    assert sounds[0][0][2] == {"sample_rate": RATE}
    assert [kind for kind, _ in wandb_told][-1] == "finish"
    (settings,) = [values for kind, values in wandb_told if kind == "config"]
    assert settings["learning_rate"] == config.resolved().learning_rate
    wandb_told.clear()
    train(config_of(tones, tmp_path / "run", wandb="voices", max_steps=12, resume=True))
    (again,) = [values for kind, values in wandb_told if kind == "init"]
    assert again["id"] == init["id"]  # the same run there


# --- dropout of conditioning


def test_hidden_frames_are_the_mean_and_no_others(tones: Path, tmp_path: Path):
    config = config_of(tones, tmp_path)
    model = wavear.WaveNet(config.model_config())
    assert model.conditioning is not None
    mean = model.conditioning.mel_mean
    layout = layout_of(model, 4096)
    segments = Segments(open_corpus(tones, sample_rate=RATE).train, layout)
    batch = collate([segments[i] for i in range(6)])
    seen: list[torch.Tensor] = []
    real = model.condition
    model.condition = lambda mel, *others, **more: (seen.append(mel), real(mel, *others, **more))[1]  # type: ignore
    mean.copy_(torch.arange(8.0) + 100)
    inputs(model, batch, layout)
    inputs(model, batch, layout, torch.Generator().manual_seed(0), 0.3)
    clean, dropped = seen
    hidden = (dropped == mean[:, None]).all(1)
    assert 0.2 < hidden.float().mean() < 0.4
    assert torch.equal(dropped.transpose(1, 2)[~hidden], clean.transpose(1, 2)[~hidden])
    assert not (clean == mean[:, None]).any()
    noise = torch.Generator().manual_seed(0)
    assert torch.equal(
        crop_loss(model, batch, layout, None, noise, dropout=0.0)[0],
        crop_loss(model, batch, layout)[0],
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    a, b, c = (
        crop_loss(model, batch, layout, None, generator, dropout=0.3)[0] for generator in generators
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_run_hides_frames_in_training_alone(tones: Path, tmp_path: Path):
    """With a learning rate of nothing the held-out bits are those of the first weights, whatever is hidden."""
    settings: dict[str, Any] = {"learning_rate": 1e-30, "weight_decay": 0.0}
    results = [
        train(config_of(tones, tmp_path / name, conditioning_dropout=share, **settings))
        for name, share in {"a": 0.0, "b": 0.5}.items()
    ]
    assert results[0].bits_final == pytest.approx(results[1].bits_final, abs=1e-6)
    losses = [
        [r["train_bits"] for r in rows_of(tmp_path / name / "metrics.csv") if r["train_bits"]]
        for name in "ab"
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioning_dropout": 1.0}, r"conditioning_dropout is 1\.0, expected 0 to less than 1"),
        (
            {"conditioning_dropout": 0.1, "unconditional": True},
            "hides mel frames, and the model is unconditional",
        ),
        ({"pre_emphasis": -0.1}, r"pre_emphasis is -0\.1, it must be 0 to less than 1"),
    ],
)
def test_nonsense_is_refused(tones: Path, tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_of(tones, tmp_path, **settings)


def test_held_out_recordings_are_those_of_the_run_with_their_speakers(tones: Path, tmp_path: Path):
    """A file too short for a mel frame is none of them; tar shards are refused."""
    from wavear.data.shards import write_shards
    from wavear.training.run import write_held_out

    data = tmp_path / "data"
    shutil.copytree(tones, data)
    for number in range(40):  # short ones, by whose names some would be held out
        audio.write(data / "a" / f"short-{number}.wav", np.full(20, 0.1), RATE)
    train(config_of(data, tmp_path / "run", max_steps=1, speakers=True, validation_fraction=0.3))
    record = json.loads((tmp_path / "run" / "train.json").read_text(encoding="utf-8"))
    found = write_held_out(tmp_path / "run", tmp_path / "held.jsonl")
    rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == record["data"]["validation"]["recordings"]
    assert all(Path(row["path"]).parent == data / row["speaker"] for row in rows)
    write_shards(tones, tmp_path / "shards")
    record["config"]["data"] = str(tmp_path / "shards" / "*.tar")
    (tmp_path / "run" / "train.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="held out lies in tar shards"):
        write_held_out(tmp_path / "run", tmp_path / "held.jsonl")


def test_a_run_writes_down_the_gains_of_its_speakers(tones: Path, tmp_path: Path):
    """Which its evaluation takes."""
    from wavear.evaluation.clips import open_clips, preparation, training_record

    settings: dict[str, Any] = {"max_steps": 1, "normalise": "peak", "normalise_by": "speaker"}
    train(config_of(tones, tmp_path / "run", **settings))
    prepared = preparation(training_record(tmp_path / "run" / "last"))
    peaks = {
        n: [0.9 / float(audio.read(path).abs().max()) for path in (tones / n).glob("*.wav")]
        for n in "ab"
    }
    assert prepared.gains == pytest.approx({name: min(gains) for name, gains in peaks.items()})
    alone = tmp_path / "alone" / "a" / "0.wav"
    alone.parent.mkdir(parents=True)
    shutil.copy(tones / "a" / "4.wav", alone)
    found = open_clips(tmp_path / "alone", RATE, 1, prepared, False)
    assert found.good[0].gain == prepared.gains["a"]
    assert found.notes[-1].endswith("the speakers' gains are those of the training")
