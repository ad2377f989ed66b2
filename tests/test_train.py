"""Training: a run learns, reports its numbers, and resumes exactly."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from small_training import (
    RATE,
    assert_same,
    assert_same_run,
    config_of,
    interrupt_at_step,
    record_of,
    rows_of,
    state_of,
    timeless_rows,
)
from tqdm import tqdm

import wavear
from wavear import audio, train
from wavear.common.errors import WavearError, one_line
from wavear.data.corpus import Recording, open_corpus
from wavear.data.crops import Order, Segments, collate
from wavear.evaluation import held_out
from wavear.evaluation.held_out import Counts, baselines, held_out_bits, subset
from wavear.models.crop_loss import crop_loss, layout_of
from wavear.training import callbacks, loop
from wavear.training import module as training_module
from wavear.training.callbacks import ProgressBar
from wavear.training.module import TrainingModule, learning_rate
from wavear.training.state import load_state, save_state, state_paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns what wavear has logged so far."""
    caplog.set_level(logging.INFO, "wavear")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def settings_model(**settings: Any) -> wavear.WaveNet:
    torch.manual_seed(0)
    return wavear.WaveNet(config_of("-", "-", **settings).model_config())


def batch_of(tones: Path, model: wavear.WaveNet, count: int) -> Any:
    segments = Segments(open_corpus(tones, sample_rate=RATE).train, layout_of(model, 512))
    return collate([segments[i] for i in range(count)])


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
    for settings in ({"speakers": True}, {"normalize": "rms", "normalize_by": "speaker"}):
        with pytest.raises(WavearError, match=r"no speaker labels found in .*list\.csv"):
            train(config_of(tmp_path / "list.csv", tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_speakers_are_numbered_and_named(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", speakers=True, unconditional=True, max_steps=2)
    model = wavear.load(train(config).best)
    assert model.config.speakers == 2
    assert wavear.generate(model, samples=10, speaker=1, engine="reference").shape == (1, 10)
    described = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert described["training"]["speakers"] == ["speaker0", "speaker1"]


def test_mel_statistics_are_those_of_the_training_data(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", max_steps=1)
    conditioning = wavear.load(train(config).best).conditioning
    assert config.mel is not None
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
    with pytest.raises(WavearError, match=r"is a run of another model: layers 4, now 6"):
        train(config_of(tones, out, layers=6, resume=True))
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


# --- resume


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_resume_equals_uninterrupted(tones, tmp_path, accumulate, optimizer):
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 6, "optimizer": optimizer}
    settings |= {"accumulate": accumulate, "unconditional": accumulate == 2}
    train(config_of(tones, tmp_path / "straight", **settings))
    # The learning rate depends on max_steps, so the first part is interrupted, not shortened.
    with interrupt_at_step(3):
        part = train(config_of(tones, tmp_path / "parts", **settings))
    assert (part.stopped_by, part.steps, part.held_out) == ("interrupt", 3, {})
    workers = int(accumulate == 2)
    resumed = train(config_of(tones, tmp_path / "parts", resume=True, workers=workers, **settings))
    assert (resumed.stopped_by, resumed.steps) == ("steps", 6)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    assert [entry["step"] for entry in record_of(tmp_path / "parts")["history"]] == [0, 6]


def test_randomness_depends_on_seed_and_step_only(tones, tmp_path, monkeypatch):
    """Dropout, which draws from torch's global generator; the caller's generator is restored."""
    real = training_module.crop_loss

    def dropping(*arguments: Any) -> Any:
        losses, mask = real(*arguments)
        return torch.nn.functional.dropout(losses, 0.5), mask

    monkeypatch.setattr(training_module, "crop_loss", dropping)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(config_of(tones, tmp_path / "straight"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    with interrupt_at_step(2):
        train(config_of(tones, tmp_path / "parts"))
    train(config_of(tones, tmp_path / "parts", resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
def test_killed_runs_equal_uninterrupted():
    """Run the program behind the figure of docs/training.md: SIGKILL at random moments."""
    program = Path(wavear.__file__).parents[1] / "bench" / "kills.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[1])}
    command = [sys.executable, str(program), "--kills", "3", "--per-run", "3", "--steps", "14"]
    command += ["--synthesis-kills", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "3 kills in training" in done.stdout
    assert "2 kills in synthesis" in done.stdout
    assert "equal to the uninterrupted one" in done.stdout
    assert "differs" not in done.stdout


@pytest.mark.slow
def test_workers_end_with_a_run_killed_at_their_start():
    """The loader's own watchdog begins too late, after the workers, and would leave them alive."""
    program = """if True:
        import time, torch
        from wavear.training.loop import _begin_worker
        def begin(worker):
            time.sleep(1)
            _begin_worker(worker)
        loader = torch.utils.data.DataLoader(range(1000), num_workers=2, worker_init_fn=begin)
        batches = iter(loader)
        print("workers started", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "workers started\n"
        run.kill()
        rest, _ = run.communicate(timeout=60)  # the pipe ends once no process holds it
    assert rest == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of files is bounded by Linux")
def test_a_full_disk_ends_a_training_in_one_line_and_it_resumes(tones, tmp_path):
    """Bounding the size of files gives the same errors as a disk without space."""
    out = tmp_path / "run"
    settings: Any = {"max_steps": 2, "checkpoint_every": 1}
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    train(config_of(tones, tmp_path / "whole", **settings))
    sizes = [p.stat().st_size for p in state_paths(tmp_path / "whole")]
    after, before = sizes[-2:]  # the first state has no moments of the optimiser
    resource.setrlimit(resource.RLIMIT_FSIZE, ((before + after) // 2, bounds[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            train(config_of(tones, out, **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert one_line(caught.value).startswith(str(out / "states" / "step-00000001.safetensors: "))
    assert [p.name for p in state_paths(out)] == ["step-00000000.safetensors"]
    train(config_of(tones, out, **settings, resume=True))
    assert record_of(out)["steps"] == 2


def test_interrupt_saves_explains_resume_and_restores_the_signal(tones, tmp_path, lines):
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at_step(2):
        result = train(config_of(tones, tmp_path / "run", max_steps=50, progress=True))
    assert (result.stopped_by, result.steps) == ("interrupt", 2)
    assert signal.getsignal(signal.SIGINT) is before
    assert "--resume" in lines()
    assert wavear.load(result.last).config == wavear.load(result.best).config
    assert result.best == result.last  # not validated since the first step: nothing is the best
    assert not (tmp_path / "run" / "best").exists()
    assert state_of(tmp_path / "run")["global_step"] == 2


def test_signals_are_the_callers_in_and_after_the_last_scoring(tones, tmp_path, monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    found = []

    def scores(*arguments: Any) -> Any:
        found.append([signal.getsignal(number) for number in numbers])
        return {"model": 5.0}, {}

    monkeypatch.setattr(loop, "final_scores", scores)
    train(config_of(tones, tmp_path / "run", max_steps=2))
    assert [*found, [signal.getsignal(number) for number in numbers]] == [before, before]


def test_sigterm_in_the_last_validation_ends_the_run(tones, tmp_path, monkeypatch):
    real = callbacks.score_held_out

    def score(trainer: Any, *others: Any) -> Any:
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(trainer, *others)

    monkeypatch.setattr(callbacks, "score_held_out", score)
    result = train(config_of(tones, tmp_path / "run", max_steps=2))
    assert (result.stopped_by, result.steps, result.held_out) == ("interrupt", 2, {})
    assert state_of(tmp_path / "run")["global_step"] == 2
    monkeypatch.undo()
    assert train(config_of(tones, tmp_path / "run", max_steps=2, resume=True)).held_out


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_every_start_method_train_alike(tones, tmp_path, method):
    """Python 3.14 starts processes through a fork server."""
    train(config_of(tones, tmp_path / "none", max_steps=2))
    values = dataclasses.asdict(config_of(tones, tmp_path / method, max_steps=2, workers=1))
    program = tmp_path / "program.py"
    program.write_text(
        "import json, multiprocessing, sys, wavear\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    wavear.train(wavear.TrainConfig(**json.loads(sys.argv[1])))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(wavear.__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(program), json.dumps(values)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in state_of(tmp_path / "none")["state_dict"]:
        one, other = (state_of(tmp_path / n)["state_dict"][name] for n in ("none", method))
        assert torch.equal(one, other), name


def test_training_works_outside_the_main_thread(tones, tmp_path):
    results = []
    config = config_of(tones, tmp_path / "run", max_steps=2)
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_best_is_chosen_among_current_held_out_recordings(tones, tmp_path, lines):
    """Silence is easy to predict: a run resumed without it would never replace its first best."""
    for name, level in (("easy", 0.0), ("hard", 0.3)):
        noise = np.random.default_rng(0).standard_normal(4000)
        (tmp_path / name).mkdir()
        audio.write(tmp_path / name / f"{name}.wav", np.clip(level * noise, -1, 1), RATE)
    settings: dict[str, Any] = {"max_steps": 6, "validate_every": 2, "learning_rate": 1e-2}
    config = config_of(tones, tmp_path / "run", validation=str(tmp_path / "easy"), **settings)
    with interrupt_at_step(3):
        train(config)
    hard = str(tmp_path / "hard")
    result = train(dataclasses.replace(config, validation=hard, resume=True, progress=True))
    assert "the held-out recordings have changed" in lines()
    history = record_of(tmp_path / "run")["history"]
    assert len({entry["held_out"] for entry in history}) == 2
    own = [entry for entry in history if entry["held_out"] == history[-1]["held_out"]]
    assert result.bits_best == min(entry["bits"] for entry in own) > history[0]["bits"]
    best = json.loads((tmp_path / "run" / "best" / "config.json").read_text())["training"]
    assert best["step"] in [entry["step"] for entry in own]


def test_damaged_state_is_reported_and_the_previous_one_used(tones, tmp_path, lines):
    settings: dict[str, Any] = {"checkpoint_every": 2, "validate_every": 4, "keep_last": 2}
    settings["max_steps"] = 9
    straight, out = tmp_path / "straight", tmp_path / "parts"
    train(config_of(tones, straight, **settings))
    names = ["step-00000008.safetensors", "step-00000009.safetensors"]
    assert sorted(os.listdir(straight / "states")) == names
    with interrupt_at_step(7):
        train(config_of(tones, out, **settings))
    last = out / "states" / "step-00000007.safetensors"
    whole = bytearray(last.read_bytes())
    whole[-200] ^= 1  # one bit, which safetensors itself does not notice
    last.write_bytes(whole)
    with (out / "metrics.csv").open("a") as file:
        file.write("8,1.0,2.0,,0.1,0.1,5.0\n5")  # rows after the state, the last half-written
    (out / "states" / ".wavear-0.tmp").write_text("half a state")
    (out / "last" / "model.safetensors").unlink()
    train(config_of(tones, out, resume=True, **settings | {"progress": True}))
    assert "step-00000007.safetensors is damaged: its CRC-32 does not match" in lines()
    assert "resuming from step 6" in lines()
    assert_same_run(straight, out)
    assert sorted(os.listdir(out / "states")) == names
    curves = [[(e["step"], e["bits"]) for e in record_of(o)["history"]] for o in (straight, out)]
    assert curves[0] == curves[1]
    for name in ("best", "last"):
        file = Path(name) / "model.safetensors"
        assert (out / file).read_bytes() == (straight / file).read_bytes()


def test_run_of_the_first_layout_resumes(tones, tmp_path):
    """It has one state, without "run", and a record without later settings."""
    train(config_of(tones, tmp_path / "straight", max_steps=6))
    out = tmp_path / "parts"
    with interrupt_at_step(3):
        train(config_of(tones, out, max_steps=6))
    old = state_of(out)
    del old["run"]
    save_state(old, out / "resume.safetensors")
    for path in (out / "states").iterdir():
        path.unlink()
    record = record_of(out)
    for name in ("optimizer", "hold", "precision", "sample_seconds", "family"):
        del record["config"][name]
    (out / "train.json").write_text(json.dumps(record))
    train(config_of(tones, out, max_steps=6, resume=True, keep_last=1))
    names = ("state_dict", "optimizer_states")
    for name in names:
        assert_same(state_of(tmp_path / "straight")[name], state_of(out)[name])
    assert not (out / "resume.safetensors").exists()  # `keep_last` counts it


def test_run_killed_before_its_first_state_restarts(tones, tmp_path):
    for name in ("straight", "killed"):
        train(config_of(tones, tmp_path / name, max_steps=3))
    for path in (tmp_path / "killed" / "states").iterdir():
        path.unlink()
    train(config_of(tones, tmp_path / "killed", max_steps=3, resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


# --- faults


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_non_finite_step_ends_the_run_before_it(tones, tmp_path, monkeypatch, gradient_only):
    real, calls = training_module.crop_loss, []

    def broken(model: Any, batch: Any, *others: Any) -> Any:
        losses, mask = real(model, batch, *others)
        calls.append(batch)
        if len(calls) != 3:
            return losses, mask
        if gradient_only:
            losses.register_hook(lambda gradient: gradient * math.inf)
            return losses, mask
        return losses * torch.tensor([[1.0], [math.nan]]), mask  # the second crop of step 3

    monkeypatch.setattr(training_module, "crop_loss", broken)
    out = tmp_path / "run"
    with pytest.raises(WavearError, match=r"step 3: the loss became .*lower learning") as caught:
        train(config_of(tones, out, max_steps=6, checkpoint_every=1))
    # The weights after step 2 gave the non-finite loss: those after step 1 had a normal one.
    names = ["step-00000001.safetensors", "step-00000000.safetensors"]
    assert [path.name for path in state_paths(out)] == names
    assert state_of(out)["global_step"] == record_of(out)["steps"] == 1
    assert not (out / "best").exists()
    last = wavear.load(out / "last").state_dict()  # refuses non-finite weights
    for name, weight in last.items():
        assert torch.equal(weight, state_of(out)["state_dict"][f"average.{name}"]), name
    (path,) = out.glob("bad-step-*")
    assert path.name == "bad-step-00000003.safetensors"
    with safe_open(path, framework="pt") as file:
        crops = json.loads(file.metadata()["crops"])
        assert torch.equal(file.get_tensor("padded_waveform"), calls[-1].waveform)
        assert file.get_tensor("codes").shape == file.get_tensor("waveform").shape
        source, start = file.get_tensor("source").tolist(), file.get_tensor("start").tolist()
    recordings = open_corpus(tones, sample_rate=RATE).train
    places = zip(source, start, strict=True)
    names = [f"{recordings[n].name} at {at / RATE:.2f} s" for n, at in places]
    assert sorted(crop.split(" (")[0] for crop in crops) == sorted(names)
    assert all(crop in str(caught.value) for crop in crops)
    if not gradient_only:
        assert crops[0] == f"{names[1]} (nan bits)"  # the culprit first
        return
    monkeypatch.setattr(training_module, "crop_loss", real)
    train(config_of(tones, out, max_steps=6, resume=True))
    train(config_of(tones, tmp_path / "straight", max_steps=6))
    assert_same_run(out, tmp_path / "straight")


@pytest.mark.parametrize("rise", [9.0, 100.0], ids=["spike", "early"])
def test_divergence_falls_back_to_the_last_normal_state(tones, tmp_path, monkeypatch, rise):
    """The loss leaves its range at steps 24 and 25, both of them saved, and is NaN at step 26.

    A rise that is not yet a spike, for want of earlier steps, counts if it is far above the
    untrained model's loss.
    """
    first = 24 if rise == 9.0 else 4
    real, calls = training_module.crop_loss, []

    def diverging(model: Any, *others: Any) -> Any:
        losses, mask = real(model, *others)
        calls.append(1)
        factor = {first: rise, first + 1: rise, first + 2: math.nan}.get(len(calls), 1.0)
        return losses * factor, mask

    monkeypatch.setattr(training_module, "crop_loss", diverging)
    settings: dict[str, Any] = {"max_steps": 30, "checkpoint_every": 1, "keep_last": 1}
    out = tmp_path / "run"
    with pytest.raises(WavearError, match=f"the state to resume is that of step {first - 2}, "):
        train(config_of(tones, out, **settings))
    assert [state_of(out)["global_step"], len(state_paths(out))] == [first - 2, 1]
    settings |= {"learning_rate": 1e-4, "resume": True}
    assert train(config_of(tones, out, **settings)).steps == 30  # further calls are normal


def test_a_killed_run_resumes_from_its_last_state_and_remembers_the_normal_one(
    tones, tmp_path, monkeypatch
):
    """A kill in a spike resumes from the spike, exactly; the NaN after it falls back before it."""
    real, calls = training_module.crop_loss, []

    def diverging(model: Any, *others: Any) -> Any:
        losses, mask = real(model, *others)
        calls.append(1)
        factor = {24: 2.0, 25: 2.0, 26: math.nan}.get(len(calls), 1.0)
        return losses * factor, mask

    monkeypatch.setattr(training_module, "crop_loss", diverging)
    settings: dict[str, Any] = {"max_steps": 30, "checkpoint_every": 1, "keep_last": 1}
    out = tmp_path / "run"
    with interrupt_at_step(25):
        train(config_of(tones, out, **settings))
    assert [path.name for path in state_paths(out)] == [
        "step-00000025.safetensors", "step-00000022.safetensors"
    ]  # fmt: skip
    with pytest.raises(WavearError, match=r"step 26: .* state to resume is that of step 22, "):
        train(config_of(tones, out, resume=True, **settings))


def test_spike_of_the_loss_is_reported_once(tones, tmp_path, monkeypatch, lines):
    real, calls = training_module.crop_loss, []

    def spiking(model: Any, batch: Any, *others: Any) -> Any:
        losses, mask = real(model, batch, *others)
        calls.append(batch)
        return losses * (torch.tensor([[1.0], [9.0]]) if len(calls) in (25, 26, 29) else 1.0), mask

    monkeypatch.setattr(training_module, "crop_loss", spiking)
    train(config_of(tones, tmp_path / "run", max_steps=30, progress=True))
    spikes = record_of(tmp_path / "run")["spikes"]
    assert [spike["step"] for spike in spikes] == [25, 29]
    worst = open_corpus(tones, sample_rate=RATE).train[int(calls[24].source[1])].name
    assert spikes[0]["crops"][0].startswith(f"{worst} at ")
    assert lines().count("the loss spikes") == 2
    assert f"step 25: the loss spikes to {spikes[0]['bits']:.2f}" in lines()


# --- the step


def test_moving_average_follows_its_formula(tones, tmp_path, monkeypatch):
    weights, averages = [], []
    real = TrainingModule.update_average

    def record(module: TrainingModule) -> None:
        weights.append(module.model.get_parameter("embedding.weight").detach().clone())
        real(module)
        averages.append(module.average.get_parameter("embedding.weight").detach().clone())

    monkeypatch.setattr(TrainingModule, "update_average", record)
    result = train(config_of(tones, tmp_path / "run", max_steps=5, ema_decay=0.3))
    expected = averages[0]
    for n in range(2, 6):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights[n - 1]
    torch.testing.assert_close(averages[-1], expected)
    assert torch.equal(wavear.load(result.last).embedding.weight, averages[-1])
    assert not torch.allclose(weights[-1], averages[-1], atol=1e-4)


@pytest.mark.parametrize("hold", [0.0, 0.3])
def test_learning_rate_rises_holds_and_falls(hold):
    rates = [learning_rate(step, step / 1000, 0.5, 100, hold) for step in range(1001)]
    assert rates[0] == pytest.approx(0.5 / 100, rel=1e-3)
    assert np.argmax(rates) in range(95, 101)
    assert hold == 0 or rates[99:301] == [0.5] * 202
    middle = round(1000 * (1 + hold) / 2)
    assert rates[middle] == pytest.approx(0.5 * 0.51)
    assert rates[1000] == pytest.approx(0.5 * 0.02)
    assert (np.diff(rates[301:]) < 0).all()


def gradients(tones: Path, accumulate: int, world: int) -> list[torch.Tensor]:
    """Return the gradient of a batch, summed as `training_step` does, averaged as DDP does."""
    model = settings_model().double()
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


@pytest.mark.parametrize(("accumulate", "world"), [(4, 1), (2, 2)])
def test_parts_and_processes_do_not_change_the_gradient(tones, accumulate, world):
    """To 1e-12 in float64: the same terms, summed in another order."""
    for a, b in zip(gradients(tones, 1, 1), gradients(tones, accumulate, world), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_parts_do_not_change_the_run(tones, tmp_path):
    """With clipping, which scales gradients in place; to the rounding of float32 sums."""
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "gradient_clip": 0.01}
    for accumulate in (1, 4):
        train(config_of(tones, tmp_path / str(accumulate), accumulate=accumulate, **settings))
    a, b = (state_of(tmp_path / name)["state_dict"] for name in "14")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
    # Clipping and Adam would hide a factor.
    norms = [[row["gradient_norm"] for row in timeless_rows(tmp_path / name)] for name in "14"]
    values = [[float(norm) for norm in column if norm] for column in norms]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_bf16_gradient_is_that_of_float32_up_to_rounding(tones, tmp_path):
    model = settings_model()
    batch, layout = batch_of(tones, model, 4), layout_of(model, 512)
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
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-2}
    result = train(config_of(tones, tmp_path / "run", precision="bf16", **settings))
    assert result.bits_final < result.bits_before - 0.2
    assert wavear.load(result.best).embedding.weight.dtype == torch.float32


def test_input_noise_affects_the_past_only(tones):
    """Noise does not change the loss of a model whose past has no weight."""
    model = settings_model()
    batch, layout = batch_of(tones, model, 1), layout_of(model, 512)

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


# --- bits


@pytest.mark.parametrize(("chunk", "world"), [(64, 1), (500, 3), (100000, 1)])
def test_held_out_bits_equal_score(tones, monkeypatch, chunk, world):
    """Per recording; the lengths are whole frames, since `score` extends others."""
    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", chunk)
    model = settings_model().double()
    corpus = open_corpus(tones, sample_rate=RATE).train[:3]
    recordings = [dataclasses.replace(r, frames=r.frames // 64 * 64) for r in corpus]
    found = [held_out_bits(model, recordings, rank=n, world=world) for n in range(world)]
    total = np.sum([f.total for f in found], axis=0)
    samples = np.sum([f.samples for f in found], axis=0)
    for number, recording in enumerate(recordings):
        waveform = audio.read(recording.path, frames=recording.frames)
        expected = -wavear.score(model, waveform).sum().item() / math.log(2)
        assert samples[number] == recording.frames
        assert total[number] == pytest.approx(expected, rel=1e-6)
    assert found[0].per_sample == pytest.approx(found[0].total.sum() / found[0].samples.sum())


def test_baselines_of_a_known_chain():
    """The unigram equals the entropy of the chain's distribution, order 1 its entropy rate."""
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
    logarithms = np.log2(chain, out=np.zeros_like(chain), where=chain > 0)
    assert found["uniform"] == 2
    assert found["unigram"] == pytest.approx(-(law * np.log2(law)).sum(), abs=0.02)
    assert found["markov"] == pytest.approx(-(law @ (chain * logarithms)).sum(), abs=0.02)
    unseen = Counts(np.array([1, 1, 1]), np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    seen = Counts(np.array([5, 0, 0]), np.array([[5, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert all(math.isfinite(bits) for bits in baselines(seen, unseen).values())


def test_counts_equal_a_loop_over_codes(tones, monkeypatch):
    monkeypatch.setattr(held_out, "_READ_SECONDS", 0.05)  # recordings are read in several blocks
    recordings = open_corpus(tones, sample_rate=RATE).train
    model = settings_model()
    counted = Counts.of(recordings, layout_of(model, 64), model.grid)
    single, pairs = np.zeros(32, dtype=int), np.zeros((32, 32), dtype=int)
    for recording in recordings:
        codes = wavear.mulaw_encode(audio.read(recording.path), 32).numpy()
        codes = codes[: recording.frames // 64 * 64]
        np.add.at(single, codes, 1)
        np.add.at(pairs, (np.concatenate([[16], codes[:-1]]), codes), 1)
    assert np.array_equal(counted.single, single)
    assert counted.pairs is not None
    assert np.array_equal(counted.pairs, pairs)


def test_long_recordings_are_validated_in_part():
    sizes = (("a", 100_000), ("b", 3000))
    recordings = [Recording(Path(name), name, 7, frames, RATE) for name, frames in sizes]
    assert [(r.name, r.start, r.frames) for r in subset(recordings, 50_000)] == [("a", 7, 50_000)]
    assert [r.frames for r in subset(recordings, 10)] == [4096]
    assert [r.frames for r in subset(recordings, 101_000)] == [100_000]
    assert subset(recordings, 103_000) == recordings == subset(recordings, 1e9)
    assert subset(recordings[::-1], 10)[0].frames == 3000


# --- the state on disk


def test_state_round_trips(tmp_path):
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
    assert_same(found, state)
    assert isinstance(found["numbers"], tuple)


def test_unsupported_values_are_named_and_leave_the_old_state(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state({"a": 1}, path)
    with pytest.raises(TypeError, match=r"state\.outer\.1 is of type (Posix|Windows)?Path"):
        save_state({"outer": [1, Path("x")]}, path)
    with pytest.raises(TypeError, match="state has a key of type tuple"):
        save_state({(1, 2): 3}, path)  # type: ignore
    assert load_state(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_damaged_states_are_refused(tones, tmp_path):
    out = tmp_path / "run"
    train(config_of(tones, out, max_steps=1))
    path, first = state_paths(out)
    first.unlink()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WavearError, match=r"holds no good state .*1\.safetensors is damaged or"):
        train(config_of(tones, out, max_steps=2, resume=True))
    path.write_bytes((out / "last" / "model.safetensors").read_bytes())
    with pytest.raises(WavearError, match=r"1\.safetensors is not a training state: weights only"):
        train(config_of(tones, out, max_steps=2, resume=True))


def test_a_damaged_held_out_file_has_no_unigram_bits(tones, tmp_path):
    """Its codes cannot be counted: -0.000 bits would be a number of nothing."""
    held = tmp_path / "held"
    held.mkdir()
    waveform = np.full(40000, 0.1, np.float32)
    waveform[30000] = np.nan
    soundfile.write(held / "a.wav", waveform, RATE, "FLOAT")
    result = train(config_of(tones, tmp_path / "run", validation=str(held), max_steps=1))
    assert result.held_out.keys() == {"model", "uniform"}


def test_progress_is_the_share_of_the_run_and_resumes(monkeypatch: pytest.MonkeyPatch):
    """Half of the run was done before; 10 s then took it to three quarters: 10 s are left."""
    monkeypatch.setattr("wavear.training.callbacks._training", lambda module: module)
    bar: Any = ProgressBar(SimpleNamespace(shown={"loss": "1"}))  # type: ignore[arg-type]
    bar._trainer = trainer = SimpleNamespace(global_step=100, is_global_zero=True)
    module = SimpleNamespace(progress=0.5)
    bar.on_train_start(trainer, module)
    bar.on_train_epoch_start(trainer, module)
    module.progress = 0.75
    bar.on_train_batch_end(trainer, module, None, None, 0)
    shown = bar.train_progress_bar.format_dict | {"elapsed": 10.0}
    text = tqdm.format_meter(**shown)
    assert "training:  75%" in text
    assert "00:10 left" in text
    assert "step=100" in text
