"""Training: it learns, its numbers are what they say, and a run that stops goes on as if it had not."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import wavear
from wavear import audio
from wavear.data.corpus import Recording, open_corpus
from wavear.data.crops import Order, Segments, collate
from wavear.evaluation.held_out import held_out_bits
from wavear.models.crop_loss import layout_of
from wavear.training.config import TrainConfig
from wavear.training.run import train

RATE = 8000
TIMES = ("seconds", "samples_per_second", "data_wait")
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
    "warmup_steps": 2,
    "validate_every": 1000,
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
def tones(tmp_path_factory):
    """Tones of two speakers, each with a little noise."""
    root = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    for number in range(8):
        time = np.arange(3000 + 64 * number) / RATE
        tone = 0.5 * np.sin(
            2 * np.pi * (200 + 50 * number) * time
        ) + 0.01 * generator.standard_normal(time.size)
        path = root / f"speaker{number % 2}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, tone, RATE)
    return root


def config_of(tones, tmp_path, **settings: Any) -> TrainConfig:
    merged: dict[str, Any] = TINY | {"max_steps": 4} | settings
    return TrainConfig(data=str(tones), out=str(tmp_path / "run"), **merged)


def state_of(out: Path) -> dict:
    from wavear.training.state import load_state
    from wavear.training.states import state_paths

    return load_state(state_paths(out)[0])


def assert_same_state(a: dict, b: dict) -> None:
    """Bit for bit: weights, their average, optimizer, step."""
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    both = (s["optimizer_states"][0] for s in (a, b))
    for part, other in zip(*(o.get("parts", [o]) for o in both), strict=True):
        moments, others = part["state"], other["state"]
        assert moments.keys() == others.keys()
        for key in moments:
            assert moments[key].keys() == others[key].keys()
            for name in moments[key]:
                assert torch.equal(moments[key][name], others[key][name]), (key, name)


# --- a run


def test_training_learns_and_says_so(tones, tmp_path, capfd, monkeypatch):
    from wavear.training import callbacks

    # The compiled engine would take longer to compile than this test takes.
    monkeypatch.setattr(callbacks, "probe", functools.partial(callbacks.probe, engine="reference"))
    settings = {
        "max_steps": 80,
        "learning_rate": 2e-2,
        "validate_every": 40,
        "batch_size": 4,
        "sample_seconds": 0.02,
    }
    shutil.copytree(tones, tmp_path / "held")
    result = train(config_of(tones, tmp_path, validation=str(tmp_path / "held"), **settings))
    assert result.bits_before == pytest.approx(5.0, abs=0.6)  # log2 of 32 classes, more or less
    assert result.bits_best < result.held_out["unigram"] - 1.5 < result.held_out["uniform"] - 2 == 3
    assert result.held_out["model"] == pytest.approx(
        result.bits_best, abs=1e-6
    )  # all 3 s of it are on the curve
    assert (result.steps, result.stopped_by) == (80, "steps")
    out = tmp_path / "run"
    for name in ("best", "last"):
        model = wavear.load(out / name)
        assert model.config == config_of(tones, tmp_path).model_config()
    record = json.loads((out / "train.json").read_text())
    assert [entry["step"] for entry in record["history"]] == [0, 40, 80]
    assert record["held_out"] == result.held_out
    assert record["data"]["train"]["recordings"] == record["data"]["validation"]["recordings"] == 8
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["validation_bits"]] == [0, 40, 80]
    assert [int(row["step"]) for row in rows if row["train_bits"]] == list(range(10, 81, 10))
    assert float(rows[-2]["samples_per_second"]) > 0
    board = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    for name in (
        b"train_bits",
        b"validation_bits",
        b"learning_rate",
        b"samples_per_second",
        b"sample/generated",
    ):
        assert name in board
    assert capfd.readouterr() == ("", "")  # progress=False: neither we nor Lightning say a word


def test_the_same_run_twice_is_the_same(tones, tmp_path):
    for name in "ab":
        train(config_of(tones, tmp_path / name))
    assert_same_state(state_of(tmp_path / "a" / "run"), state_of(tmp_path / "b" / "run"))


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_a_resumed_run_equals_one_never_stopped(tones, tmp_path, accumulate, optimizer):
    settings = {
        "batch_size": 4,
        "accumulate": accumulate,
        "max_steps": 6,
        "unconditional": accumulate == 2,
    }
    settings["optimizer"] = optimizer
    train(config_of(tones, tmp_path / "straight", **settings))
    # The learning rate looks at max_steps, so the first part is interrupted rather than shorter.
    with interrupt_at_step(3):
        part = train(config_of(tones, tmp_path / "parts", **settings))
    assert (part.stopped_by, part.steps) == ("interrupt", 3)
    assert part.held_out == {}
    resumed = train(config_of(tones, tmp_path / "parts", resume=True, workers=1, **settings))
    assert (resumed.stopped_by, resumed.steps) == ("steps", 6)
    assert_same_state(state_of(tmp_path / "straight" / "run"), state_of(tmp_path / "parts" / "run"))
    record = json.loads((tmp_path / "parts" / "run" / "train.json").read_text())
    assert [entry["step"] for entry in record["history"]] == [0, 6]
    assert timeless_rows(tmp_path / "straight" / "run") == timeless_rows(tmp_path / "parts" / "run")


def timeless_rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def state_names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "states").iterdir())


def test_killed_runs_end_as_one_never_killed():
    """SIGKILL at random moments, in a process of its own: the program that makes the figure of docs/training.md."""
    program = Path(wavear.__file__).parents[1] / "bench" / "kills.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[1])}
    command = [sys.executable, str(program), "--kills", "3", "--per-run", "3", "--steps", "14"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "3 kills" in done.stdout
    assert "equal to the uninterrupted one" in done.stdout
    assert "differs" not in done.stdout


def test_workers_end_with_a_run_that_is_killed_while_they_start():
    """The loader's own watch begins after the workers have, and would never end: they held the pipe of a CI run."""
    program = """if True:
        import os, time, torch
        from wavear.training.loop import _begin_worker
        def begin(worker, main=os.getpid()):
            time.sleep(1)
            _begin_worker(main, worker)
        batches = iter(torch.utils.data.DataLoader(range(1000), num_workers=2, worker_init_fn=begin))
        print("workers started", flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "workers started\n"
        run.kill()
        rest, _ = run.communicate(timeout=60)  # the end of the pipe: nobody holds it any more
    assert rest == ""


@pytest.mark.parametrize("family", ["wavenet", "gru", "linear"])
def test_a_held_out_file_that_cannot_be_read_is_named_and_stops_nothing(tones, tmp_path, family):
    held = tmp_path / "held"
    held.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        audio.write(held / f"{name}.wav", np.full(40000, 0.1 * number), RATE, "float32")
    content = bytearray((held / "b.wav").read_bytes())
    content[-40000:-39996] = np.float32("nan").tobytes()
    (held / "b.wav").write_bytes(content)
    settings = {"family": family, "validation": str(held)}
    if family == "linear":
        fixed = {"sample_rate": RATE, "progress": False}
        result = train(TrainConfig(data=str(tones), out=str(tmp_path / "run"), **settings, **fixed))
    elif family == "gru":
        own = dict.fromkeys(("layers", "stacks", "residual_channels", "skip_channels"))
        result = train(config_of(tones, tmp_path, **settings, **own, channels=8))
    else:
        result = train(config_of(tones, tmp_path, **settings))
    assert list(result.skipped) == ["b.wav"]
    assert "NaN" in result.skipped["b.wav"]
    assert math.isfinite(result.held_out["model"])
    # What can be read of it counts; of a model that carries its state up to there, for what follows
    # has no past.
    held_out = open_corpus(str(tones), sample_rate=RATE, validation=str(held)).validation
    (b,) = (n for n, recording in enumerate(held_out) if recording.name == "b.wav")
    counted = held_out_bits(wavear.load(result.best), held_out).samples
    assert counted[b] == 16384 if family == "gru" else 20000 < counted[b] < 30000
    assert sorted(counted)[1:] == [40000, 40000]
    for name in ("a.wav", "c.wav"):
        (held / name).unlink()
    (held / "b.wav").write_bytes(content[:-160000] + np.float32("nan").tobytes() * 40000)
    with pytest.raises(ValueError, match=r"not one held-out sample can be read \(b\.wav: "):
        train(dataclasses.replace(config_of(tones, tmp_path / "none"), validation=str(held)))


def test_speakers_that_nobody_names_are_refused(tones, tmp_path):
    rows = [f"{path}" for path in sorted(tones.rglob("*.wav"))]
    (tmp_path / "list.csv").write_text("\n".join(["path", *rows]) + "\n")
    for settings in ({"speakers": True}, {"normalise": "rms", "normalise_by": "speaker"}):
        with pytest.raises(
            ValueError, match=r"list\.csv names no speakers: a manifest does in a column 'speaker'"
        ):
            train(config_of(tmp_path / "list.csv", tmp_path, **settings))
    assert not (tmp_path / "run").exists()


def test_the_best_is_chosen_by_the_held_out_recordings_of_today(tones, tmp_path, capsys):
    """Silence is easy to predict: a run that goes on without it would keep its first `best` for ever."""
    for name, level in (("easy", 0.0), ("hard", 0.3)):
        noise = np.random.default_rng(0).standard_normal(4000)
        (tmp_path / name).mkdir()
        audio.write(tmp_path / name / f"{name}.wav", np.clip(level * noise, -1, 1), RATE)
    settings = {"max_steps": 6, "validate_every": 2, "learning_rate": 1e-2}
    with interrupt_at_step(3):
        train(config_of(tones, tmp_path, validation=str(tmp_path / "easy"), **settings))
    other = config_of(tones, tmp_path, validation=str(tmp_path / "hard"), resume=True, **settings)
    result = train(dataclasses.replace(other, progress=True))
    assert "the held-out recordings are others than before" in capsys.readouterr().out
    history = json.loads((tmp_path / "run" / "train.json").read_text())["history"]
    assert len({entry["held_out"] for entry in history}) == 2
    own = [entry for entry in history if entry["held_out"] == history[-1]["held_out"]]
    assert result.bits_best == min(entry["bits"] for entry in own) > history[0]["bits"]
    best = json.loads((tmp_path / "run" / "best" / "config.json").read_text())["training"]
    assert best["step"] in [entry["step"] for entry in own]


def test_a_damaged_last_state_is_named_and_the_one_before_it_taken(tones, tmp_path, capsys):
    settings = {"max_steps": 9, "checkpoint_every": 2, "validate_every": 4, "keep_last": 2}
    train(config_of(tones, tmp_path / "straight", **settings))
    straight = tmp_path / "straight" / "run"
    assert state_names(straight) == [
        "step-00000008.safetensors",
        "step-00000009.safetensors",
    ]  # two, and no more
    with interrupt_at_step(7):
        train(config_of(tones, tmp_path / "parts", **settings))
    out = tmp_path / "parts" / "run"
    last = out / "states" / "step-00000007.safetensors"
    whole = bytearray(last.read_bytes())
    whole[-200] ^= 1  # one bit, which safetensors itself does not notice
    last.write_bytes(whole)
    with (out / "metrics.csv").open("a") as file:
        file.write("8,1.0,2.0,,0.1,0.1,5.0\n5")  # rows after the state, the last half-written
    (out / "states" / ".wavear-0.tmp").write_text("half a state")
    (out / "last" / "model.safetensors").unlink()
    capsys.readouterr()
    train(config_of(tones, tmp_path / "parts", resume=True, **settings | {"progress": True}))
    said = capsys.readouterr().out
    assert "step-00000007.safetensors is damaged: its bytes are not those that were written" in said
    assert "going on from step 6" in said
    assert_same_state(state_of(straight), state_of(out))
    assert timeless_rows(straight) == timeless_rows(out)
    assert state_names(out) == state_names(straight)
    expected, found = (
        json.loads((o / "train.json").read_text())["history"] for o in (straight, out)
    )
    assert [(e["step"], e["bits"]) for e in expected] == [(e["step"], e["bits"]) for e in found]
    for name in ("best", "last"):
        assert (out / name / "model.safetensors").read_bytes() == (
            straight / name / "model.safetensors"
        ).read_bytes()


def test_a_run_of_the_first_layout_is_resumed(tones, tmp_path):
    train(config_of(tones, tmp_path / "straight", max_steps=6))
    with interrupt_at_step(3):
        train(config_of(tones, tmp_path / "parts", max_steps=6))
    out = tmp_path / "parts" / "run"
    from wavear.training.state import load_state, save_state

    (path,) = [p for p in (out / "states").iterdir() if "3" in p.name]
    old = load_state(path)
    del old["run"]
    save_state(old, out / "resume.safetensors")
    for path in (out / "states").iterdir():
        path.unlink()
    train(config_of(tones, tmp_path / "parts", max_steps=6, resume=True, keep_last=1))
    assert_same_state(state_of(tmp_path / "straight" / "run"), state_of(out))
    assert not (out / "resume.safetensors").exists()  # `keep_last` counts it


def test_a_run_killed_before_its_first_state_begins_anew(tones, tmp_path):
    train(config_of(tones, tmp_path / "straight", max_steps=3))
    train(config_of(tones, tmp_path / "killed", max_steps=3))
    out = tmp_path / "killed" / "run"
    for path in (out / "states").iterdir():
        path.unlink()
    train(config_of(tones, tmp_path / "killed", max_steps=3, resume=True))
    assert_same_state(state_of(tmp_path / "straight" / "run"), state_of(out))
    assert timeless_rows(tmp_path / "straight" / "run") == timeless_rows(out)


def test_what_is_random_in_a_step_depends_on_seed_and_step(tones, tmp_path, monkeypatch):
    """Dropout, say, which draws from torch's own generator; and the caller's generator is as it was."""
    from wavear.training import module

    real = module.crop_loss

    def dropping(*arguments):
        losses, mask = real(*arguments)
        return torch.nn.functional.dropout(losses, 0.5), mask

    monkeypatch.setattr(module, "crop_loss", dropping)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(config_of(tones, tmp_path / "straight"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with interrupt_at_step(2):
        train(config_of(tones, tmp_path / "parts"))
    train(config_of(tones, tmp_path / "parts", resume=True))
    assert_same_state(state_of(tmp_path / "straight" / "run"), state_of(tmp_path / "parts" / "run"))


class interrupt_at_step:
    """Ctrl-C while the given step is being taken."""

    def __init__(self, step: int):
        self.step = step

    def __enter__(self):
        from wavear.training.module import TrainingModule

        self.module, self.real = TrainingModule, TrainingModule.update_average

        def update(module: TrainingModule) -> None:
            self.real(module)
            if module.global_step == self.step:
                signal.raise_signal(signal.SIGINT)

        TrainingModule.update_average = update  # type: ignore

    def __exit__(self, *_):
        self.module.update_average = self.real


def test_an_interrupt_saves_says_how_to_go_on_and_gives_the_signal_back(tones, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at_step(2):
        result = train(config_of(tones, tmp_path, max_steps=50, progress=True))
    assert (result.stopped_by, result.steps) == ("interrupt", 2)
    assert signal.getsignal(signal.SIGINT) is before
    assert "--resume" in capsys.readouterr().out
    assert wavear.load(result.last).config == wavear.load(result.best).config
    assert state_of(tmp_path / "run")["global_step"] == 2


def test_a_run_trains_outside_the_main_thread(tones, tmp_path):
    """Where no signal can be caught."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(config_of(tones, tmp_path, max_steps=2)))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_time_ends_a_run(tones, tmp_path):
    result = train(config_of(tones, tmp_path, max_steps=None, max_minutes=0.01))
    assert result.stopped_by == "time"
    assert result.seconds >= 0.6
    assert result.steps >= 1


def test_a_directory_with_something_in_it_is_refused(tones, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(
        FileExistsError, match="is not empty: choose another directory, or give --resume"
    ):
        train(config_of(tones, tmp_path))
    with pytest.raises(FileExistsError, match=r"holds no run of ours \(no train.json\)"):
        train(config_of(tones, tmp_path, overwrite=True))
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(config_of(tones, tmp_path, resume=True))
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    train(config_of(tones, tmp_path, max_steps=2))
    result = train(config_of(tones, tmp_path, max_steps=3, overwrite=True))
    assert result.steps == 3
    with pytest.raises(ValueError, match=r"is a run of another model: layers 4, now 6"):
        train(config_of(tones, tmp_path, layers=6, resume=True))
    with pytest.raises(ValueError, match="is a run with seed 0, now 1"):
        train(config_of(tones, tmp_path, seed=1, resume=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": None}, "the run needs an end"),
        ({"max_steps": 0}, "max_steps is 0, expected 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected more than 0"),
        ({"batch_size": 3, "accumulate": 2}, "a batch of 3 does not divide into 2 parts"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"hold": 1.0}, "hold is 1.0, expected 0 to less than 1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected adamw or muon"),
        ({"muon_learning_rate": 0.0}, "muon_learning_rate is 0.0, expected more than 0"),
        ({"accumulate": 3}, "a batch of 2 does not divide into 3 parts"),
        ({"validation_fraction": 1.5}, "validation_fraction is 1.5"),
        ({"layers": 5}, "5 layers do not divide into 2 stacks"),
        ({"segment": float("nan")}, "segment is nan"),
    ],
)
def test_nonsense_is_refused(tones, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(tones, tmp_path, **settings)


@pytest.mark.parametrize("device", ["gpu", "cuda:99" if torch.cuda.is_available() else "cuda"])
def test_a_device_that_is_not_there_is_refused(tones, tmp_path, device):
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        train(config_of(tones, tmp_path, device=device))


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_no_number_ends_the_run_before_it(
    tones, tmp_path, monkeypatch, gradient_only
):
    from wavear.training import module

    real = module.crop_loss

    def broken(model, batch, *others):
        losses, mask = real(model, batch, *others)
        calls.append(batch)
        factor = (
            torch.tensor([[1.0], [math.nan]]) if len(calls) == 3 else 1.0
        )  # the second crop of step 3
        if gradient_only and len(calls) == 3:
            losses.register_hook(lambda gradient: gradient * math.inf)
            factor = 1.0
        return losses * factor, mask

    calls = []
    monkeypatch.setattr(module, "crop_loss", broken)
    with pytest.raises(
        ValueError, match=r"step 3: the loss became .*lower learning rate"
    ) as caught:
        train(config_of(tones, tmp_path, max_steps=6))
    out = tmp_path / "run"
    assert (
        state_of(out)["global_step"] == 2
    )  # which reads it, and so knows that all weights are numbers
    for name in ("best", "last"):
        wavear.load(out / name)  # likewise
    (path,) = out.glob("bad-step-*")
    assert path.name == "bad-step-00000003.safetensors"
    with safe_open(path, framework="pt") as file:
        crops = json.loads(file.metadata()["crops"])
        assert torch.equal(file.get_tensor("padded_waveform"), calls[-1].waveform)
        assert file.get_tensor("codes").shape == file.get_tensor("waveform").shape
        source, start = file.get_tensor("source").tolist(), file.get_tensor("start").tolist()
    recordings = open_corpus(tones, sample_rate=RATE).train
    names = [
        f"{recordings[n].name} at {at / RATE:.2f} s" for n, at in zip(source, start, strict=True)
    ]
    assert sorted(crop.split(" (")[0] for crop in crops) == sorted(names)
    assert all(crop in str(caught.value) for crop in crops)
    if not gradient_only:
        assert crops[0] == f"{names[1]} (nan bits)"  # the culprit first
    monkeypatch.setattr(module, "crop_loss", real)
    train(config_of(tones, tmp_path, max_steps=6, resume=True))
    train(config_of(tones, tmp_path / "straight", max_steps=6))
    assert_same_state(state_of(out), state_of(tmp_path / "straight" / "run"))


def test_a_leap_of_the_loss_is_named_once(tones, tmp_path, monkeypatch, capsys):
    from wavear.training import module

    real, calls = module.crop_loss, []

    def leaping(model, batch, *others):
        losses, mask = real(model, batch, *others)
        calls.append(batch)
        return losses * (torch.tensor([[1.0], [9.0]]) if len(calls) in (25, 26, 29) else 1.0), mask

    monkeypatch.setattr(module, "crop_loss", leaping)
    train(config_of(tones, tmp_path, max_steps=30, progress=True))
    spikes = json.loads((tmp_path / "run" / "train.json").read_text())["spikes"]
    assert [spike["step"] for spike in spikes] == [25, 29]
    recordings = open_corpus(tones, sample_rate=RATE).train
    worst = recordings[int(calls[24].source[1])].name
    assert spikes[0]["crops"][0].startswith(f"{worst} at ")
    said = capsys.readouterr().out
    assert said.count("the loss leaps") == 2
    assert f"step 25: the loss leaps to {spikes[0]['bits']:.2f}" in said


def test_bad_files_are_told_and_the_run_goes_on(tones, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in tones.rglob("*.wav"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "text.wav").write_text("no audio")
    result = train(config_of(data, tmp_path, max_steps=2, progress=True))
    assert set(result.skipped) == {"text.wav"}
    assert "skipped text.wav: is not audio" in capsys.readouterr().out


def test_speakers_are_numbered_and_their_names_kept(tones, tmp_path):
    result = train(config_of(tones, tmp_path, speakers=True, unconditional=True, max_steps=2))
    model = wavear.load(result.best)
    assert model.config.speakers == 2
    assert wavear.generate(model, samples=10, speaker=1, engine="reference").shape == (1, 10)
    described = json.loads((result.best / "config.json").read_text())
    assert described["training"]["speakers"] == ["speaker0", "speaker1"]


def test_bands_are_scaled_by_the_training_data(tones, tmp_path):
    config = config_of(tones, tmp_path, max_steps=1)
    conditioning = wavear.load(train(config).best).conditioning
    assert config.mel is not None
    waveforms = [audio.read(r.path)[None] for r in open_corpus(tones, sample_rate=RATE).train]
    mels = torch.cat([wavear.log_mel(w, config.mel)[0] for w in waveforms], dim=1)
    # Of 64 crops of a tenth of a second: to a third of a deviation. (Unscaled, the means are 3 to 7
    # below zero.)
    assert ((conditioning.mel_mean - mels.mean(1)).abs() < mels.std(1) / 3).all()
    torch.testing.assert_close(conditioning.mel_deviation, mels.std(1), atol=0, rtol=0.35)


# --- its parts


def test_the_moving_average_is_what_its_formula_says(tones, tmp_path):
    weights, averages = [], []
    from wavear.training.module import TrainingModule

    real = TrainingModule.update_average

    def record(module: TrainingModule) -> None:
        weights.append(module.model.get_parameter("embedding.weight").detach().clone())
        real(module)
        averages.append(module.average.get_parameter("embedding.weight").detach().clone())

    TrainingModule.update_average = record  # type: ignore
    try:
        result = train(config_of(tones, tmp_path, max_steps=5, ema_decay=0.3))
    finally:
        TrainingModule.update_average = real
    expected = averages[0]
    for n in range(2, 6):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights[n - 1]
    torch.testing.assert_close(averages[-1], expected)
    assert torch.equal(wavear.load(result.last).embedding.weight, averages[-1])
    assert not torch.allclose(weights[-1], averages[-1], atol=1e-4)


def test_the_learning_rate_rises_and_falls():
    from wavear.training.module import learning_rate

    rates = [learning_rate(step, step / 1000, 0.5, 100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.5 / 100, rel=1e-3)
    assert np.argmax(rates) in range(95, 101)
    assert rates[500] == pytest.approx(0.5 * 0.51)
    assert rates[1000] == pytest.approx(0.5 * 0.02)
    assert (np.diff(rates[100:]) < 0).all()


def gradients(tones, accumulate: int, world: int) -> list[torch.Tensor]:
    """Of the first batch, as `training_step` sums it up over parts, averaged over processes as DDP does."""
    from wavear.models.crop_loss import crop_loss, layout_of

    config = TrainConfig(data=str(tones), out="-", max_steps=1, batch_size=4, **TINY)
    torch.manual_seed(0)
    model = wavear.WaveNet(config.model_config()).double()
    layout = layout_of(model, 512)
    stream = Segments(open_corpus(tones, sample_rate=RATE).train, layout)
    found = []
    for rank in range(world):
        batch = collate([stream[i] for i in next(iter(Order(4, 0, rank, world)))])
        for part in batch.split(accumulate):
            losses, _ = crop_loss(model, part, layout)
            total = losses.sum() / (len(batch.source) * layout.segment) / world
            found.append(torch.autograd.grad(total, list(model.parameters())))
    return [torch.stack(terms).sum(0) for terms in zip(*found, strict=True)]


@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_parts_and_processes_do_not_change_the_gradient(tones, accumulate, world):
    """To 1e-12 in float64: the same terms, summed in another order."""
    for a, b in zip(gradients(tones, 1, 1), gradients(tones, accumulate, world), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_parts_do_not_change_the_run(tones, tmp_path):
    """With clipping, which scales gradients in place; to the rounding of float32 sums."""
    for accumulate in (1, 4):
        settings = {
            "batch_size": 4,
            "max_steps": 3,
            "gradient_clip": 0.01,
            "accumulate": accumulate,
        }
        train(config_of(tones, tmp_path / str(accumulate), **settings))
    a, b = (state_of(tmp_path / name / "run")["state_dict"] for name in "14")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
    rows = [(tmp_path / name / "run" / "metrics.csv").read_text().splitlines() for name in "14"]
    norms = [
        [float(row["gradient_norm"]) for row in csv.DictReader(lines) if row["gradient_norm"]]
        for lines in rows
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # clipping and Adam would hide a factor


def test_bf16_trains_on_the_same_gradient_but_for_its_rounding(tones, tmp_path):
    from wavear.models.crop_loss import crop_loss, layout_of

    config = config_of(tones, tmp_path)
    torch.manual_seed(0)
    model = wavear.WaveNet(config.model_config())
    layout = layout_of(model, 512)
    batch = collate(
        [Segments(open_corpus(tones, sample_rate=RATE).train, layout)[i] for i in range(4)]
    )
    parameters = [p for p in model.parameters() if p.dim() > 1]
    found = []
    for dtype in (None, torch.bfloat16):
        losses, mask = crop_loss(model, batch, layout, dtype)
        assert losses.dtype == torch.float32
        gradient = torch.autograd.grad(losses.sum() / mask.sum(), parameters)
        assert all(g.dtype == torch.float32 for g in gradient)
        found.append((losses.sum().item(), torch.cat([g.flatten() for g in gradient])))
    assert found[1][0] == pytest.approx(found[0][0], rel=5e-3)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99
    assert found[0][0] != found[1][0]
    result = train(dataclasses.replace(config, precision="bf16", max_steps=20, learning_rate=1e-2))
    assert result.bits_final < result.bits_before - 0.2
    assert wavear.load(result.best).embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_two_processes_train_like_one(tones, tmp_path, optimizer, tolerance):
    """Lightning DDP over gloo, as torchrun starts it: the weights of one process, but for the order of float32 sums.

    Muon rounds the gradient to bfloat16, so that a last bit of it can become one of 256 parts of an
    update.
    """
    settings = {"max_steps": 3, "batch_size": 4, "validate_every": 2, "optimizer": optimizer}
    train(config_of(tones, tmp_path / "one", **settings))
    two = dataclasses.asdict(config_of(tones, tmp_path / "two", **settings))
    program = "import sys, json; from wavear.train import *; train(TrainConfig(**json.loads(sys.argv[1])))"
    script = tmp_path / "run.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(wavear.__file__).parents[1]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(
        [*command, json.dumps(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (state_of(tmp_path / name / "run")["state_dict"] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4)
    records = [
        json.loads((tmp_path / name / "run" / "train.json").read_text()) for name in ("one", "two")
    ]
    for one, other in zip(*(record["history"] for record in records), strict=True):
        assert one["bits"] == pytest.approx(other["bits"], abs=10 * tolerance)


# --- bits


@pytest.mark.parametrize("chunk", [64, 500, 100000])
@pytest.mark.parametrize("world", [1, 3])
def test_held_out_bits_are_those_of_score(tones, monkeypatch, chunk, world):
    """Per recording; the lengths are whole frames, as `score` extends what is not. To 1e-4 of a sum of thousands."""
    from wavear.evaluation import held_out

    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", chunk)
    torch.manual_seed(0)
    model = wavear.WaveNet(
        TrainConfig(data="-", out="-", max_steps=1, **TINY).model_config()
    ).double()
    recordings = [
        dataclasses.replace(r, frames=r.frames // 64 * 64)
        for r in open_corpus(tones, sample_rate=RATE).train
    ]
    found = [
        held_out.held_out_bits(model, recordings, rank=rank, world=world) for rank in range(world)
    ]
    total, samples = (
        np.sum([f.total for f in found], axis=0),
        np.sum([f.samples for f in found], axis=0),
    )
    for number, recording in enumerate(recordings):
        waveform = audio.read(recording.path, frames=recording.frames)
        expected = -wavear.score(model, waveform).sum().item() / math.log(2)
        assert samples[number] == recording.frames
        assert total[number] == pytest.approx(expected, rel=1e-6)
    assert found[0].per_sample == pytest.approx(found[0].total.sum() / found[0].samples.sum())


def test_baselines_of_a_known_chain():
    """Codes from a Markov chain: the unigram comes to the entropy of its law, order 1 to the chain's entropy rate."""
    from wavear.evaluation.held_out import Counts, baselines

    generator = np.random.default_rng(0)
    chain = np.array(
        [[0.9, 0.1, 0.0, 0.0], [0.2, 0.5, 0.3, 0.0], [0.0, 0.3, 0.4, 0.3], [0.0, 0.0, 0.6, 0.4]]
    )

    def counts(length: int) -> Counts:
        codes = [0]
        for u in generator.random(length):
            codes.append(min(int(np.searchsorted(np.cumsum(chain[codes[-1]]), u)), 3))
        pairs = np.zeros((4, 4), dtype=np.int64)
        np.add.at(pairs, (codes[:-1], codes[1:]), 1)
        return Counts(np.bincount(codes[1:], minlength=4), pairs)

    found = baselines(counts(60000), counts(60000))
    values, vectors = np.linalg.eig(chain.T)
    law = np.real(vectors[:, np.argmax(np.real(values))])
    law /= law.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = -(law[:, None] * np.nan_to_num(chain * np.log2(chain), neginf=0.0)).sum()
    assert found["uniform"] == 2
    assert found["unigram"] == pytest.approx(-(law * np.log2(law)).sum(), abs=0.02)
    assert found["markov"] == pytest.approx(rate, abs=0.02)


def test_counts_are_of_the_codes(tones, monkeypatch):
    from wavear import mulaw_encode
    from wavear.evaluation import held_out

    monkeypatch.setattr(
        held_out, "_READ_SECONDS", 0.05
    )  # so that a recording is read in several blocks
    recordings = open_corpus(tones, sample_rate=RATE).train
    model = wavear.WaveNet(TrainConfig(data="-", out="-", max_steps=1, **TINY).model_config())
    counted = held_out.Counts.of(recordings, layout_of(model, 64), model.grid)
    single, pairs = np.zeros(32, dtype=int), np.zeros((32, 32), dtype=int)
    for recording in recordings:
        codes = mulaw_encode(audio.read(recording.path), 32).numpy()[: recording.frames // 64 * 64]
        for a, b in zip([16, *codes[:-1]], codes, strict=True):
            single[b] += 1
            pairs[a, b] += 1
    assert np.array_equal(counted.single, single)
    assert counted.pairs is not None
    assert np.array_equal(counted.pairs, pairs)


def test_baselines_of_codes_never_seen_are_finite():
    from wavear.evaluation.held_out import Counts, baselines

    train_counts = Counts(np.array([5, 0, 0]), np.array([[5, 0, 0], [0, 0, 0], [0, 0, 0]]))
    held_out = Counts(np.array([1, 1, 1]), np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    assert all(math.isfinite(bits) for bits in baselines(train_counts, held_out).values())


# --- the state on disk


def test_a_state_comes_back_as_it_was(tmp_path):
    from wavear.training.state import load_state, save_state

    tensor = torch.randn(3, 2)
    state = {
        "int keys": {0: {"step": torch.tensor(3.0)}, 1: []},
        "bf16": tensor.bfloat16(),
        "shared": [tensor, tensor, tensor.t()],
        "numbers": (1, 2.5, float("inf"), True, None, "text"),
        "empty": {},
    }
    save_state(state, tmp_path / "s.safetensors")
    found = load_state(tmp_path / "s.safetensors")
    assert found["numbers"] == state["numbers"]
    assert list(found["int keys"]) == [0, 1]
    assert found["int keys"][0]["step"].item() == 3
    assert torch.equal(found["bf16"], state["bf16"])
    assert torch.equal(found["shared"][2], tensor.t())
    assert found["empty"] == {}


def test_what_a_state_cannot_hold_is_named_and_leaves_the_old_one(tmp_path):
    from wavear.training.state import load_state, save_state

    path = tmp_path / "s.safetensors"
    save_state({"a": 1}, path)
    with pytest.raises(
        TypeError, match=r"state\.outer\.1 is of type Path|state\.outer\.1 is of type PosixPath"
    ):
        save_state({"outer": [1, Path("x")]}, path)
    with pytest.raises(TypeError, match="state has a key of type tuple"):
        save_state({(1, 2): 3}, path)  # type: ignore
    assert load_state(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_a_damaged_state_is_refused(tones, tmp_path):
    train(config_of(tones, tmp_path, max_steps=1))
    first, path = [tmp_path / "run" / "states" / f"step-0000000{n}.safetensors" for n in (0, 1)]
    first.unlink()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError,
        match=r"holds no good state .*step-00000001\.safetensors is damaged or no training",
    ):
        train(config_of(tones, tmp_path, max_steps=2, resume=True))
    path.write_bytes((tmp_path / "run" / "last" / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"step-00000001\.safetensors is no training state: weights only"
    ):
        train(config_of(tones, tmp_path, max_steps=2, resume=True))


def test_a_picture_shows_low_frequencies_at_the_bottom():
    from wavear.training.probes import spectrogram

    tone = 0.5 * torch.sin(2 * torch.pi * 300 * torch.arange(RATE) / RATE)
    picture = spectrogram(tone, RATE).astype(int).sum(2)
    assert picture.sum(1).argmax() > 0.8 * picture.shape[0]


def test_a_probe_is_of_the_loudest_part_and_of_the_quietest(tmp_path):
    from wavear.training.probes import probe

    waveform = 0.1 * (-1.0) ** np.arange(4096)
    waveform[1024:2048] /= 100
    waveform[2048:2688] *= 5
    audio.write(tmp_path / "a.wav", waveform, RATE, "float32")
    recording = Recording(tmp_path / "a.wav", "a", 0, 4096, RATE)
    model = wavear.WaveNet(TrainConfig(data="-", out="-", max_steps=1, **TINY).model_config())
    made = probe(model, recording, 0.08, [], engine="reference")
    assert made.original.shape == made.generated.shape == (640,)
    assert np.allclose(made.original, waveform[2048:2688], atol=1e-6)
    assert model.config.mel is not None
    mel = wavear.log_mel(made.original[None], model.config.mel)
    assert torch.equal(made.generated, wavear.generate(model, mel, seed=0, engine="reference")[0])
    level = 10 * math.log10(np.var(made.generated.numpy()) / np.var(waveform[2048:2688]))
    assert made.measures["level_error"] == pytest.approx(level, abs=1e-4)
    assert made.measures["noise_floor_recorded"] == pytest.approx(-60, abs=0.1)
    assert made.measures["noise_floor"] > -20  # a model that knows nothing makes noise of a pause


def test_input_noise_is_on_the_past_alone(tones):
    """A model that hears nothing of the past has the loss it has without noise; one that does hears the noise."""
    from wavear.models.crop_loss import crop_loss, layout_of

    config = TrainConfig(data=str(tones), out="-", max_steps=1, **TINY)
    torch.manual_seed(0)
    model = wavear.WaveNet(config.model_config())
    layout = layout_of(model, 512)
    batch = collate([Segments(open_corpus(tones, sample_rate=RATE).train, layout)[0]])

    def loss(seed: int | None, codes: float = 3.0) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return crop_loss(model, batch, layout, None, generator, codes)[0]

    clean = loss(None)
    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    assert not torch.equal(loss(1), clean)
    assert torch.equal(loss(1, 0.0), clean)
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert torch.equal(loss(1), loss(None))


def test_a_long_recording_is_validated_in_part():
    """A file of an hour would otherwise be scored whole at every validation."""
    from wavear.evaluation.held_out import subset

    recordings = [
        Recording(Path(name), name, 7, frames, RATE)
        for name, frames in (("a", 100_000), ("b", 3000))
    ]
    assert [(r.name, r.start, r.frames) for r in subset(recordings, 50_000)] == [("a", 7, 50_000)]
    assert [r.frames for r in subset(recordings, 10)] == [4096]
    assert [r.frames for r in subset(recordings, 101_000)] == [100_000]
    assert subset(recordings, 103_000) == recordings == subset(recordings, 1e9)
    assert subset(recordings[::-1], 10)[0].frames == 3000


def test_a_name_that_is_no_unicode_stops_nothing(tones, tmp_path):
    """A broken file of such a name is skipped in training and in what is held out, said, and written down."""
    data = tmp_path / "data"
    shutil.copytree(tones, data)
    for folder in ("speaker0", "held"):
        (data / folder).mkdir(exist_ok=True)
        (data / folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"RIFF")
    audio.write(data / "held" / "a.wav", np.zeros(4000), RATE)
    config = config_of(data, tmp_path, validation=str(data / "held"))
    program = f"import json, wavear; wavear.train(wavear.TrainConfig(**json.loads({json.dumps(vars(config))!r})))"
    environment = os.environ | {
        "PYTHONPATH": str(Path(wavear.__file__).parents[1]),
        "PYTHONIOENCODING": "utf-8:strict",
    }
    program = program.replace('"progress": false', '"progress": true')
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert rb"caf\udce9.wav" in done.stdout
    assert any(
        "caf" in name
        for name in json.loads((tmp_path / "run" / "train.json").read_text())["skipped"]
    )
