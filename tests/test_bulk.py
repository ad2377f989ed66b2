"""Audio of many inputs by several processes: complete, and resumed after one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import MelConfig, WaveNet, WaveNetConfig
from wavear.cli import commands
from wavear.generation import distributed
from wavear.generation.files import _batches, _Batching
from wavear.generation.jobs import Job, plan

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0)
OPTIONS = ["--engine", "reference", "--force"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint `model` and a folder `in` of mels of several lengths."""
    monkeypatch.chdir(tmp_path)
    model = WaveNet(
        WaveNetConfig(
            layers=2,
            stacks=1,
            residual_channels=4,
            skip_channels=4,
            sample_rate=8000,
            mel=MEL,
            classes=32,
        )
    )
    model.save(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for number in range(9):
        np.save(tmp_path / "in" / f"{number}.npy", torch.randn(5, 2 + number % 4).numpy())
    return tmp_path


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.wav")}


def expected() -> dict[str, bytes]:
    assert commands.main(["synthesize", "model", "in", "--out", "whole", *OPTIONS]) == 0
    return contents("whole")


def under_torchrun(processes: int, *arguments: str, **options: Any) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command += ["-m", "wavear", "synthesize", "model", "in", "--out", "out", *OPTIONS, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(wavear.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def test_shares_are_disjoint_complete_and_of_similar_size(here):
    jobs = plan(["in"], "out", ".wav")
    for world in (1, 2, 4, 20):
        shares = [distributed.share(jobs, rank, world) for rank in range(world)]
        assert sorted(job.target for share in shares for job in share) == sorted(
            job.target for job in jobs
        )
        again = [distributed.share(jobs[::-1], rank, world) for rank in range(world)]
        assert shares == again  # the order of the inputs does not matter
        sizes = [sum(job.source.stat().st_size for job in share) for share in shares]
        assert max(sizes) - min(sizes) <= max(job.source.stat().st_size for job in jobs)


def test_the_same_command_resumes_and_another_is_refused(here, capsys):
    whole = expected()
    command = ["synthesize", "model", "in", "--out", "out", "--resume", *OPTIONS]
    assert commands.main(command) == 0
    assert contents("out") == whole
    kept = {name: os.stat(here / "out" / name).st_mtime_ns for name in whole}
    for name in ("3.wav", "7.wav"):
        (here / "out" / name).unlink()
    capsys.readouterr()
    assert commands.main(command) == 0
    printed = capsys.readouterr().err
    assert "7 of 9 files exist already" in printed
    assert printed.count(" -> ") == 2
    assert contents("out") == whole
    stays = [name for name in whole if name not in ("3.wav", "7.wav")]
    assert all(os.stat(here / "out" / name).st_mtime_ns == kept[name] for name in stays)
    assert commands.main([*command, "--seed", "5"]) == 1
    assert (
        "audio of another run, with another seed: choose another folder" in capsys.readouterr().err
    )
    # The number of threads changes no sample.
    assert commands.main([*command, "--threads", "2"]) == 0
    assert commands.main([*command, "--seed", "5", "--overwrite"]) == 0
    assert contents("out").keys() == whole.keys()
    assert contents("out") != whole
    assert commands.main(command) == 1  # now the folder holds the run with seed 5
    (here / "out" / distributed.RECORD).unlink()
    assert commands.main(command) == 1
    assert "has no record of its run" in capsys.readouterr().err


def test_an_interrupted_overwriting_run_leaves_no_old_audio(here, monkeypatch):
    command = ["synthesize", "model", "in", "--out", "out", "--resume", *OPTIONS]
    assert commands.main(command) == 0
    real = distributed.synthesize_jobs

    def some(model, jobs, *rest, **options):
        return real(model, jobs[:3], *rest, **options)

    monkeypatch.setattr(distributed, "synthesize_jobs", some)
    assert commands.main([*command, "--seed", "5", "--overwrite"]) == 0
    assert len(contents("out")) == 3
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert commands.main([*command, "--seed", "5"]) == 0
    assert (
        commands.main(["synthesize", "model", "in", "--out", "whole", "--seed", "5", *OPTIONS]) == 0
    )
    assert contents("out") == contents("whole")


def test_audio_of_several_processes_equals_that_of_one(here):
    whole = expected()
    (here / "in" / "bad.npy").write_bytes(b"no array")
    process = under_torchrun(2)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 1, printed  # all processes finish, although one input is skipped
    assert contents("out") == whole, printed
    assert printed.count(" -> ") == 9, printed  # each is made once
    assert "9 files" in printed, printed
    assert "1 of 10 inputs could not be used" in printed, printed


@pytest.mark.slow
def test_running_again_completes_a_run_whose_process_was_killed(here):
    whole = expected()
    process = under_torchrun(2, "--best-of", "10")  # slow enough to be killed before the end
    while len(contents("out")) < 2 and process.poll() is None:
        time.sleep(0.01)
    victims = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(victims[0]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    done = contents("out")
    assert len(done) < len(whole)
    again = under_torchrun(3, "--best-of", "10")  # by another number of processes
    printed = again.communicate(timeout=240)[0]
    assert again.returncode == 0, printed
    made = contents("out")
    assert made.keys() == whole.keys(), printed
    assert {name: made[name] for name in done} == done
    assert printed.count(" -> ") == len(whole) - len(done), printed
    assert not list(Path("out").glob("*.tmp"))


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device("cuda") == "cuda"
    assert distributed.ranks() == (0, 1)
    for rank, device in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert distributed.own_device("cuda") == device
        assert distributed.own_device("cpu") == "cpu"
        assert distributed.own_device("cuda:1") == "cuda:1"


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / distributed.RECORD).write_text(json.dumps({"seed": 0})[:5])
    with pytest.raises(FileExistsError, match="is damaged"):
        distributed.claim(tmp_path, [Job(Path("a"), Path("b"))], {"seed": 0})


def test_batches_hold_similar_lengths():
    jobs: list = [(None, torch.zeros(1, frames)) for frames in [100, 99, 50, 49, 20] + [10] * 30]
    groups = [[mel.shape[1] for _, mel in group] for group in _batches(jobs, hop=1)]
    assert groups == [[100, 99], [50, 49], [20], [10] * 24, [10] * 6]
    assert [len(group) for group in _batches(jobs[:2], hop=2**24 // 100)] == [2]
    assert [len(group) for group in _batches(jobs[:2], hop=2**24 // 99)] == [1, 1]
    card = _Batching(window=99, most=99, samples=2**20, spread=2.0)
    assert [len(group) for group in _batches(jobs, 1, card)] == [3, 1, 31]
