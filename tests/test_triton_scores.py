"""The Triton engine in the interpreter: scores, batches, states."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_interpreted(name: str, markers: str = "not slow") -> None:
    """Run a file of tests in a process of its own, which imports Triton with its interpreter."""
    file = Path(__file__).parent / name
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([*command, str(file)], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert re.search(r"\d passed", found.stdout)


@pytest.mark.slow
def test_scores_batches_and_states():
    run_interpreted("interpreted_triton.py")


@pytest.mark.slow
def test_scores_of_every_shape_in_every_precision():
    run_interpreted("interpreted_triton.py", "slow")
