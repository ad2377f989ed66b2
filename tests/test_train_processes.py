"""Two processes, as torchrun starts them, when something goes wrong in one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import wavear
from wavear import audio
from wavear.training.state import load_state
from wavear.training.states import state_paths

RATE = 8000
SETTINGS: dict[str, Any] = {
    "family": "wavenet", "layers": 2, "stacks": 1, "residual_channels": 4, "skip_channels": 4, "head_channels": 4,
    "classes": 16, "conditioning_channels": 4, "sample_rate": RATE, "mel_bands": 8, "mel_hop_length": 64,
    "segment": 256,
    "warmup_steps": 1, "validate_every": 1000, "sample_seconds": 0.0, "progress": False, "device": "cpu",
    "precision": "32", "max_steps": 5, "workers": 0, "batch_size": 4,
}  # fmt: skip

SCRIPT = """
import json, math, os, sys
import torch
from wavear.train import TrainConfig, train
from wavear.training import module

real, calls = module.crop_loss, []

def broken(model, batch, *others, **more):
    losses, mask = real(model, batch, *others, **more)
    calls.append(batch)
    bad = len(calls) == 3 and os.environ["RANK"] == "1" and sys.argv[2] == "nan"
    return (losses * torch.tensor([[1.0], [math.nan]]) if bad else losses), mask

if __name__ == "__main__":
    module.crop_loss = broken
    train(TrainConfig(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def tones(tmp_path):
    for number in range(6):
        time = np.arange(3000 + 64 * number) / RATE
        path = tmp_path / "tones" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, 0.5 * np.sin(2 * np.pi * (200 + 50 * number) * time), RATE)
    return tmp_path / "tones"


def run(script: Path, config: dict[str, Any], kind: str) -> subprocess.CompletedProcess[str]:
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
    return subprocess.run(
        [*command, json.dumps(config), kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_loss_that_is_no_number_in_one_process_stops_both_before_the_step(tones, tmp_path):
    """Nothing hangs; the batch of the process it happened to is kept; a resumed run is one that was never stopped."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    config = SETTINGS | {"data": str(tones), "out": str(tmp_path / "run")}
    stopped = run(script, config, "nan")
    assert stopped.returncode != 0
    assert "step 3: the loss became" in stopped.stderr
    (last, *_) = state_paths(tmp_path / "run")
    assert load_state(last)["global_step"] == 2
    kept = {}
    for path in (tmp_path / "run").glob("bad-step-00000003-process-*"):
        with safe_open(path, framework="pt") as file:
            kept[path.stem[-1]] = file.get_tensor("nats").isfinite().tolist()
    assert kept["1"] == [True, False]
    assert kept.get("0", [True, True]) == [True, True]
    resumed = run(script, config | {"resume": True}, "sound")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    straight = run(script, config | {"out": str(tmp_path / "straight")}, "sound")
    assert straight.returncode == 0, straight.stderr[-2000:]
    a, b = (load_state(state_paths(tmp_path / name)[0]) for name in ("run", "straight"))
    assert a["global_step"] == b["global_step"] == 5
    for name, tensor in a["state_dict"].items():
        assert tensor.equal(b["state_dict"][name]), name
