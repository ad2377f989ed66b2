"""`import wavear` takes little longer than `import torch`, and changes nothing global."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Slow or rarely needed packages, imported inside the functions that use them.
HEAVY = {"torchaudio", "numba", "librosa", "lightning", "matplotlib", "scipy", "tensorboard"}

# The maximum time of `import wavear` after torch, as a share of the time of `import torch`.
# Both are timed in one process, so a busy machine slows down both. Measured 0.015; Lightning would
# add 1.9, scipy.signal 0.6.
ADDED_TIME = 0.15
ATTEMPTS = 5  # stops at the first success

PROGRAM = """
import time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start

import json, logging, os, random, signal, sys, warnings
import numpy

def surroundings():
    return {
        "random": str(hash(random.getstate())),
        "numpy random": str(numpy.random.get_state()),
        "torch random": torch.get_rng_state().tolist(),
        "numpy errors": numpy.geterr(),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        ],
        "warnings": str(warnings.filters),
        "logging": [logging.root.level, len(logging.root.handlers)],
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "path": list(sys.path),
        "exceptions": str(sys.excepthook),
    }

before = surroundings()
start = time.perf_counter()
import wavear
wavear_seconds = time.perf_counter() - start
after = surroundings()

print(json.dumps({
    "torch_seconds": torch_seconds,
    "wavear_seconds": wavear_seconds,
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "changed": [name for name in before if before[name] != after[name]],
    "public": {name: getattr(wavear, name).__doc__ for name in wavear.__all__},
}))
"""


def import_in_fresh_interpreter() -> dict:
    """Run `PROGRAM` in a new interpreter, where every warning is an error; return its output."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def imported() -> dict:
    return import_in_fresh_interpreter()


def test_import_loads_no_heavy_package(imported):
    assert {"wavear", "torch"} <= set(imported["modules"])
    assert set(imported["modules"]) & HEAVY == set()


def test_import_adds_at_most_15_percent_to_torch(imported):
    shares = [imported["wavear_seconds"] / imported["torch_seconds"]]
    while min(shares) > ADDED_TIME and len(shares) < ATTEMPTS:
        attempt = import_in_fresh_interpreter()
        shares.append(attempt["wavear_seconds"] / attempt["torch_seconds"])
    assert min(shares) <= ADDED_TIME


def test_import_changes_no_global_state(imported):
    assert imported["changed"] == []


def test_every_public_name_exists_and_is_documented(imported):
    assert imported["public"]
    assert [name for name, text in imported["public"].items() if not text] == []
