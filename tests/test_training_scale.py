"""What makes training fit a machine, or several, leaves the numbers as they are: memory, compiling, processes."""

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
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import audio
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate
from wavear.models.crop_loss import crop_loss, layout_of
from wavear.training.config import TrainConfig
from wavear.training.processes import Processes
from wavear.training.run import train

RATE = 8000
TINY: dict[str, Any] = {
    "family": "wavenet",
    "layers": 4,
    "stacks": 2,
    "kernel_size": 3,
    "residual_channels": 8,
    "skip_channels": 8,
    "head_channels": 16,
    "conditioning_channels": 6,
    "classes": 32,
    "sample_rate": RATE,
    "mel_bands": 8,
    "mel_hop_length": 64,
    "segment": 512,
    "batch_size": 4,
    "max_steps": 3,
    "warmup_steps": 2,
    "validate_every": 2,
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
    root = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    for number in range(6):
        time = np.arange(3000) / RATE
        tone = 0.5 * np.sin(
            2 * np.pi * (200 + 50 * number) * time
        ) + 0.01 * generator.standard_normal(3000)
        audio.write(root / f"{number}.wav", tone, RATE)
    return root


def config_of(tones: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(data=str(tones), out=str(out), **TINY | settings)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    from wavear.training.state import load_state
    from wavear.training.states import state_paths

    return load_state(state_paths(out)[0])["state_dict"]


def gradients(
    tones: Path, model: wavear.WaveNet, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int]:
    """Of one batch, and the bytes that were kept for the backward pass."""
    layout = layout_of(model, 512)
    batch = collate(
        [Segments(open_corpus(tones, sample_rate=RATE).train, layout)[i] for i in range(2)]
    )
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = crop_loss(model, batch, layout, dtype)
    found = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found]), sum(kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("unconditional", [False, True], ids=["mel", "free"])
def test_checkpointed_activations_give_the_same_gradient_for_less(
    tones: Path, tmp_path: Path, dtype, unconditional
):
    """To the bit: the same operations on the same numbers."""
    torch.manual_seed(0)
    model = wavear.WaveNet(
        config_of(tones, tmp_path, layers=8, unconditional=unconditional).model_config()
    )
    plain, most = gradients(tones, model, dtype)
    model.activation_checkpointing = True
    again, least = gradients(tones, model, dtype)
    assert torch.equal(plain, again)
    assert least < 0.6 * most


def test_a_run_with_checkpointed_activations_is_the_same_run(tones: Path, tmp_path: Path):
    for name, settings in {"a": {}, "b": {"activation_checkpointing": True}}.items():
        train(config_of(tones, tmp_path / name, **settings))
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_gradient_of_the_plain_ones(tones: Path, tmp_path: Path):
    """To the rounding of float32: kernels are fused, and sums may be taken in another order."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    config = config_of(tones, tmp_path, layers=6, compile=True)
    model = wavear.WaveNet(config.model_config())
    plain, _ = gradients(tones, model)
    names = list(model.state_dict())
    counters.clear()
    model.compile_layers()
    compiled, _ = gradients(tones, model)
    torch.testing.assert_close(compiled, plain, atol=2e-6, rtol=1e-4)
    assert (
        counters["stats"]["unique_graphs"] == 2
    )  # the layers are one kernel, and the last is another
    assert list(model.state_dict()) == names


def test_without_a_compiler_compiling_is_refused(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and there is none here"):
        train(config_of(tones, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_a_family_that_cannot_checkpoint_is_named(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wavear.WaveNet, "activation_checkpointing", None)
    with pytest.raises(ValueError, match="activation_checkpointing is not made for WaveNet"):
        train(config_of(tones, tmp_path / "run", activation_checkpointing=True))


# --- what goes wrong leaves nothing behind


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ({}, {}, "holds no audio files"),
        ({"a.wav": b"no audio"}, {}, "none of the files can be used"),
        (None, {}, "no such folder or manifest"),
        ("tones", {"device": "abacus"}, "device is 'abacus'"),
        ("tones", {"wandb": "mine"}, "that package is not installed"),
    ],
    ids=["empty", "damaged", "missing", "device", "wandb"],
)
def test_a_run_that_cannot_begin_leaves_no_folder(
    tones, tmp_path, monkeypatch, content, settings, message
):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    data = tones if content == "tones" else tmp_path / "data"
    if isinstance(content, dict):
        data.mkdir()
        for name, what in content.items():
            (data / name).write_bytes(what)
    with pytest.raises((ValueError, OSError), match=message):
        train(config_of(data, tmp_path / "deep" / "run", **settings))
    assert not (tmp_path / "deep").exists()


def test_a_run_that_cannot_begin_leaves_the_one_it_was_to_replace(tones: Path, tmp_path: Path):
    train(config_of(tones, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no audio files"):
        train(config_of(tmp_path / "empty", tmp_path / "run", overwrite=True))
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    train(config_of(tones, tmp_path / "run", overwrite=True, max_steps=1))
    assert json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "metrics.csv").read_text().count(
        "validation_bits"
    ) == 1  # the old one is gone


# --- processes


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
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
        (TORCHRUN, Processes(3, 4, 2, "torchrun")),
        (SLURM, Processes(1, 4, 2, "slurm")),
        (SLURM | TORCHRUN, Processes(3, 4, 2, "torchrun")),  # srun torchrun ...
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, Processes()),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Processes(0, 1, 1, "slurm")),
    ],
    ids=["none", "torchrun", "srun", "torchrun in srun", "interactive", "one task"],
)
def test_processes_are_as_the_environment_says(environment: dict[str, str], expected: Processes):
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
def test_an_environment_that_makes_no_sense_is_refused(change: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Processes.here(SLURM | change)
    with pytest.raises(ValueError, match="give sbatch --ntasks-per-node"):
        Processes.here(
            {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
        )


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(
    config: TrainConfig, script: Path, environment: dict[str, str], *launcher: str
) -> subprocess.Popen:
    script.write_text(
        "import sys, json\nfrom wavear.train import *\n"
        "if __name__ == '__main__':\n    train(TrainConfig(**json.loads(sys.argv[1])))\n"
    )
    path = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(wavear.__file__).parents[1])}
    command = [sys.executable, *launcher, str(script), json.dumps(dataclasses.asdict(config))]
    return subprocess.Popen(
        command,
        env=os.environ | path | environment,
        cwd=script.parent,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_alike(one: Path, other: Path) -> None:
    """But for the order of float32 sums."""
    a, b = weights_of(one), weights_of(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def slurm_task(rank: int, world: int, port: str) -> dict[str, str]:
    """What srun sets, one task per node; the nodes are this machine."""
    return {
        "SLURM_NTASKS": str(world),
        "SLURM_NNODES": str(world),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": port,
    }


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_train_like_one_process(tones: Path, tmp_path: Path, launcher: str):
    """The environment of `srun` with two tasks, and two `torchrun`s, each a node: the global batch is shared."""
    held = shutil.copytree(tones, tmp_path / "held")
    train(config_of(tones, tmp_path / "one", validation=str(held)))
    two, port = (
        config_of(tones, tmp_path / "two", validation=str(held)),
        free_port(),
    )  # six crops to score, shared
    if launcher == "srun":
        jobs = [start(two, tmp_path / f"{n}.py", slurm_task(n, 2, port)) for n in range(2)]
    else:
        words = [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--master-port={port}",
        ]
        words += ["--master-addr=127.0.0.1"]
        jobs = [start(two, tmp_path / f"{n}.py", {}, *words, f"--node-rank={n}") for n in range(2)]
    for job in jobs:
        _, said = job.communicate(timeout=240)
        assert job.returncode == 0, said[-2000:]
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {
        "held",
        "one",
        "two",
        "0.py",
        "1.py",
    }  # nothing beside the run
    records = [json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two")]
    assert [record["steps"] for record in records] == [3, 3]
    for one, other in zip(*(record["history"] for record in records), strict=True):
        assert one["bits"] == pytest.approx(other["bits"], abs=1e-3)
        assert one["level"] == pytest.approx(other["level"], abs=1e-3)


def test_one_task_of_slurm_saves_on_its_signal_and_goes_on(tones: Path, tmp_path: Path):
    """`sbatch --signal=USR1@120`: the run ends with its state saved, and can be resumed."""
    settings: dict[str, Any] = {"max_steps": 4000, "checkpoint_every": 4000, "validate_every": 4000}
    environment = slurm_task(0, 1, free_port())
    job = start(config_of(tones, tmp_path / "run", **settings), tmp_path / "run.py", environment)
    while (
        not (tmp_path / "run" / "metrics.csv").exists()
        or b"\n10," not in (tmp_path / "run" / "metrics.csv").read_bytes()
    ):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0, said[-2000:]
    steps = json.loads((tmp_path / "run" / "train.json").read_text())["steps"]
    assert 10 <= steps < 4000
    train(config_of(tones, tmp_path / "run", **settings | {"max_steps": steps + 1}, resume=True))
    assert json.loads((tmp_path / "run" / "train.json").read_text())["steps"] == steps + 1
