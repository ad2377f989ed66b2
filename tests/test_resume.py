"""Runs that are interrupted, killed, damaged or diverge, and resume exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
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
from small_training import (
    RATE,
    assert_same,
    assert_same_run,
    config_of,
    interrupt_at_step,
    record_of,
    state_of,
)

import wavear
from wavear import audio, train
from wavear.common.errors import WavearError, one_line
from wavear.data.corpus import open_corpus
from wavear.training import callbacks, loop
from wavear.training import module as training_module
from wavear.training.state import save_state, state_paths

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
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
