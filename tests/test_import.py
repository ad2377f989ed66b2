"""`import wavear` and `wavear --help` are fast, and change nothing global."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wavear
import wavear.cli
from wavear.cli.commands import COMMANDS

# Slow or rarely needed packages, imported inside the functions that use them.
HEAVY = {"torchaudio", "numba", "librosa", "lightning", "matplotlib", "scipy", "tensorboard"}

# Seconds of `import wavear` and of `wavear --help`, the best of five. Measured 0.02 and 0.05 on a
# busy machine, 2.5 and 3.1 with torch.
IMPORT_SECONDS, HELP_SECONDS = 0.3, 0.5
ATTEMPTS = 5  # stops at the first success

PROGRAM = """
import time
start = time.perf_counter()
import wavear
wavear_seconds = time.perf_counter() - start

import sys
first_modules = sorted({name.split(".")[0] for name in sys.modules})

import torch
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
public = {name: getattr(wavear, name).__doc__ for name in wavear.__all__}
after = surroundings()

print(json.dumps({
    "wavear_seconds": wavear_seconds,
    "first_modules": first_modules,
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "changed": [name for name in before if before[name] != after[name]],
    "public": public,
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


def test_import_loads_neither_torch_nor_numpy(imported):
    assert "wavear" in imported["first_modules"]
    assert set(imported["first_modules"]) & (HEAVY | {"torch", "numpy", "tyro"}) == set()


def test_public_names_load_no_heavy_package(imported):
    assert {"wavear", "torch"} <= set(imported["modules"])
    assert set(imported["modules"]) & HEAVY == set()


def test_import_is_fast(imported):
    seconds = [imported["wavear_seconds"]]
    while min(seconds) > IMPORT_SECONDS and len(seconds) < ATTEMPTS:
        seconds.append(import_in_fresh_interpreter()["wavear_seconds"])
    assert min(seconds) <= IMPORT_SECONDS


def test_list_of_commands_is_fast():
    seconds = [float("inf")]
    while min(seconds) > HELP_SECONDS and len(seconds) <= ATTEMPTS:
        start = time.perf_counter()
        listed = subprocess.run([sys.executable, "-m", "wavear", "--help"], capture_output=True)
        seconds.append(time.perf_counter() - start)
        assert b"synthesize" in listed.stdout
    assert min(seconds) <= HELP_SECONDS


def test_help_of_every_command_imports_no_torch():
    program = (
        "import sys, contextlib\nfrom wavear.cli.commands import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n        main([name, '--help'])\n"
        "    assert 'torch' not in sys.modules, name"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: wavear ") == len(COMMANDS)


def test_names_for_type_checkers_are_those_at_run_time():
    """`from wavear import *` gives the names in the stub's `__all__`."""
    for module in (wavear, wavear.cli):
        tree = ast.parse(Path(str(module.__file__) + "i").read_text(encoding="utf-8"))
        (names,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
        assert sorted(names) == sorted(module.__all__)
        assert set(names) <= set(dir(module))


def test_import_changes_no_global_state(imported):
    assert imported["changed"] == []


def test_every_public_name_exists_and_is_documented(imported):
    assert imported["public"]
    assert [name for name, text in imported["public"].items() if not text] == []
