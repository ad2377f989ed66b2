"""Fixtures for all tests: seeds, a private cache, and real recordings if they are available."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wavear import audio

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- for libraries that use the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache untouched, and let subprocesses buffer output as for a user.

    Without this, an error on flushing a closed pipe would not show.
    """
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("WAVEAR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return a folder of real recordings: WAVEAR_TEST_DATA, or ../shared/data."""
    given = os.environ.get("WAVEAR_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real recordings: {folder} is not a folder; set WAVEAR_TEST_DATA")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that results do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight noisy tones at 8 kHz from two speakers."""
    root = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    for number in range(8):
        time = np.arange(3000 + 64 * number) / 8000
        tone = 0.5 * np.sin(2 * np.pi * (200 + 50 * number) * time)
        path = root / f"speaker{number % 2}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, tone + 0.01 * generator.standard_normal(time.size), 8000)
    return root


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns what wavear has logged so far."""
    caplog.set_level(logging.INFO, "wavear")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)
