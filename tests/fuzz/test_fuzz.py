"""Some hundred changed files in seconds; `make fuzz` runs for as long as wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from limits import AVAILABLE

from fuzz.harness import Fuzzer
from fuzz.targets import TARGETS

CASES = {"audio": 200, "mels": 100, "checkpoints": 60, "states": 30, "manifests": 60, "shards": 40}


@pytest.mark.skipif(not AVAILABLE, reason="memory is bounded by Linux")
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(tmp_path: Path, name: str):
    fuzzer = Fuzzer(TARGETS[name], tmp_path / "fuzz")
    for seed in range(CASES.get(name, 40)):
        print(f"case {seed} of {name}")  # shown if it fails
        fuzzer.run(seed)
