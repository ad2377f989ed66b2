"""Several processes, started by torchrun or srun, train like one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_training import assert_same, config_of, record_of, state_of

import wavear
from wavear import TrainConfig, train
from wavear.cli.training import run_training
from wavear.training.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

# Breaks the loss of one process at the third step if it is asked to.
SCRIPT = """
import json, math, os, sys
import torch
from wavear import TrainConfig, train
from wavear.training import module

real, calls = module.crop_loss, []

def broken(*arguments):
    losses, mask = real(*arguments)
    calls.append(1)
    bad = len(calls) == 3 and os.environ.get("RANK") == "1" and sys.argv[2] == "broken"
    return (losses * torch.tensor([[1.0], [math.nan]]) if bad else losses), mask

if __name__ == "__main__":
    module.crop_loss = broken
    train(TrainConfig(**json.loads(sys.argv[1])))
"""
TORCHRUN = ("-m", "torch.distributed.run")
TWO = (*TORCHRUN, "--standalone", "--nproc-per-node=2")


def start(
    config: TrainConfig, folder: Path, *launcher: str, kind: str = "sound", **variables: str
) -> subprocess.Popen:
    script = folder / "script" / "run.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    root = str(Path(wavear.__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | variables
    values = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, *launcher, str(script), values, kind]
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def finish(*jobs: subprocess.Popen) -> None:
    for job in jobs:
        _, errors = job.communicate(timeout=400)
        assert job.returncode == 0, errors[-2000:]


def assert_alike(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Compare runs, up to the order of float32 sums."""
    a, b = state_of(one)["state_dict"], state_of(other)["state_dict"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4)
    histories = (record_of(out)["history"] for out in (one, other))
    for entry, same in zip(*histories, strict=True):
        assert entry["bits"] == pytest.approx(same["bits"], abs=1e-3)
        assert entry["level"] == pytest.approx(same["level"], abs=1e-3)


def slurm_task(rank: int, world: int, port: str) -> dict[str, str]:
    """Return the variables of srun for one task per node, all on this machine."""
    names = {"NTASKS": world, "NNODES": world, "NTASKS_PER_NODE": 1, "PROCID": rank}
    names |= {"NODEID": rank, "LOCALID": 0, "JOB_ID": 1234, "JOB_NAME": "train"}
    variables = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return variables | {"SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


# --- the environment


ENVIRONMENT = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes()),
        (ENVIRONMENT, Processes(3, 4, 2, "torchrun")),
        (SLURM, Processes(1, 4, 2, "slurm")),
        (SLURM | ENVIRONMENT, Processes(3, 4, 2, "torchrun")),  # srun torchrun ...
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, Processes()),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Processes(0, 1, 1, "slurm")),
    ],
    ids=["none", "torchrun", "srun", "torchrun in srun", "interactive", "one task"],
)
def test_processes_follow_the_environment(environment: dict[str, str], expected: Processes):
    assert Processes.here(environment) == expected
    assert expected.nodes == (2 if expected.world == 4 else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_NTASKS_PER_NODE": ""}, "SLURM_NTASKS_PER_NODE is '', expected a whole number"),
        ({"SLURM_NTASKS": "5"}, "SLURM has 5 tasks on 2 nodes with 2 on each"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID is 'first', expected a whole number"),
    ],
)
def test_inconsistent_environments_are_refused(change: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Processes.here(SLURM | change)
    without = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
    with pytest.raises(ValueError, match="sbatch --ntasks-per-node"):
        Processes.here(without)


# --- runs


def test_only_one_process_prints_the_result(monkeypatch, capsys):
    """The others have no final scores: theirs would be other figures."""
    result = SimpleNamespace(
        held_out={}, bits_best=1.0, bits_before=2.0, steps=3, seconds=4.0, stopped_by="steps",
        best="best",
    )  # fmt: skip
    monkeypatch.setattr("wavear.training.run.train", lambda _: result)
    for rank, lines in (("0", 3), ("1", 0)):
        for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert run_training(None) == 0
        assert capsys.readouterr().out.count("\n") == lines


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [("adamw", 1e-5), pytest.param("muon", 1e-3, marks=pytest.mark.slow)],
)
def test_two_processes_train_like_one(tones, tmp_path, optimizer, tolerance):
    """The processes use Lightning's DDP over gloo.

    Muon rounds the gradient to bfloat16, so its last bit can change an update by a part in 256.
    """
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "validate_every": 2}
    config = config_of(tones, tmp_path / "two", optimizer=optimizer, **settings)
    job = start(config, tmp_path, *TWO)
    train(dataclasses.replace(config, out=str(tmp_path / "one")))
    finish(job)
    assert_alike(tmp_path / "one", tmp_path / "two", tolerance)


@pytest.mark.slow
def test_non_finite_loss_in_one_process_stops_both_before_the_step(tones, tmp_path):
    """Neither process hangs, and the run saves the batch with the non-finite loss."""
    out = tmp_path / "run"
    job = start(config_of(tones, out, batch_size=4), tmp_path, *TWO, kind="broken")
    _, errors = job.communicate(timeout=240)
    assert job.returncode != 0
    assert "step 3: the loss became" in errors
    assert state_of(out)["global_step"] == 0  # the state before step 3 is ruined
    kept = {}
    for path in out.glob("bad-step-00000003-process-*"):
        with safe_open(path, framework="pt") as file:
            kept[path.stem[-1]] = file.get_tensor("nats").isfinite().tolist()
    assert kept["1"] == [True, False]
    assert kept.get("0", [True, True]) == [True, True]


@pytest.mark.slow
def test_resumed_processes_equal_uninterrupted_ones(tones, tmp_path):
    config = config_of(tones, tmp_path / "run", batch_size=4)
    start(config, tmp_path, *TWO, kind="broken").communicate(timeout=240)
    finish(start(dataclasses.replace(config, resume=True), tmp_path, *TWO))
    finish(start(dataclasses.replace(config, out=str(tmp_path / "straight")), tmp_path, *TWO))
    a, b = state_of(tmp_path / "run"), state_of(tmp_path / "straight")
    assert a["global_step"] == 4
    assert_same(a["state_dict"], b["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_train_like_one_process(tones, tmp_path, launcher):
    """Two nodes are two tasks of srun, or two torchruns."""
    held = str(shutil.copytree(tones, tmp_path / "held"))
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "validate_every": 2}
    two = config_of(tones, tmp_path / "two", validation=held, **settings)
    port = free_port()
    if launcher == "srun":
        jobs = [start(two, tmp_path, **slurm_task(n, 2, port)) for n in range(2)]
    else:
        words = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
        words.append(f"--master-port={port}")
        jobs = [start(two, tmp_path, *words, f"--node-rank={n}") for n in range(2)]
    train(dataclasses.replace(two, out=str(tmp_path / "one")))
    finish(*jobs)
    assert_alike(tmp_path / "one", tmp_path / "two")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"held", "one", "two", "script"}  # nothing next to the run
    assert record_of(tmp_path / "two")["steps"] == 3


@pytest.mark.slow
def test_slurm_task_saves_on_its_signal_and_resumes(tones, tmp_path):
    """The signal is that of `sbatch --signal=USR1@120`."""
    out = tmp_path / "run"
    settings: dict[str, Any] = dict.fromkeys(("max_steps", "checkpoint_every"), 4000)
    settings["validate_every"] = 4000
    job = start(config_of(tones, out, **settings), tmp_path, **slurm_task(0, 1, free_port()))
    metrics = out / "metrics.csv"
    while not metrics.exists() or b"\n10," not in metrics.read_bytes():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    finish(job)
    steps = record_of(out)["steps"]
    assert 10 <= steps < 4000
    train(config_of(tones, out, **settings | {"max_steps": steps + 1}, resume=True))
    assert record_of(out)["steps"] == steps + 1
