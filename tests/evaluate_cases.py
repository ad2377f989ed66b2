"""Checkpoints, clips and an evaluation for the tests of `wavear evaluate` and `wavear compare`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from small_models import RATE

from wavear import EvaluateConfig, Evaluation, MelConfig, audio, evaluate
from wavear.cli.commands import main
from wavear.demo.sounds import string, voice
from wavear.evaluation import metrics, model_table, run
from wavear.evaluation.metrics import NotMeasured

MEL = MelConfig(
    sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=20, fmax=4000.0
)
FAST = EvaluateConfig(clips=2, seconds=0.6, threads=1, resamples=200, shown=0)
SHOWN = dataclasses.replace(FAST, shown=8)
BITS = dataclasses.replace(FAST, clips=0)
tiny = partial(small_models.tiny, layers=3)
REAL = {name: getattr(metrics, name) for name in ("pitch", "pesq", "stoi")}
FLAGS = ("--threads", "1", "--resamples", "200", "--shown", "0")


def clip(n: int, seconds: float = 0.7) -> np.ndarray:
    make = string if n % 2 else voice
    x = np.concatenate([np.zeros(RATE // 5), make(200.0 + 30 * n, seconds, RATE)])
    return (0.5 * x + np.random.default_rng(n).normal(0, 1e-4, x.size)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def stubs() -> Iterator[pytest.MonkeyPatch]:
    """Replace pYIN, PESQ and STOI, which take most of the time, by quick stand-ins."""

    def score(reference: np.ndarray, signal: np.ndarray, rate: int) -> float:
        if len(reference) < rate // 2:
            raise NotMeasured("too short")
        return float(np.mean(np.square(signal)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "pesq", score)
        patch.setattr(metrics, "stoi", score)
        for module in (metrics, run):
            patch.setattr(module, "pitch", lambda x, rate: np.full(1 + len(x) // 512, 200.0))
        patch.setattr(model_table, "_SPEED_SECONDS", 0.02)
        yield patch


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of checkpoints, three clips in `held`, and by speaker in `by_speaker`."""
    folder = tmp_path_factory.mktemp("evaluate")
    models = {
        "mel": tiny(mel=MEL),
        "other": tiny(1, mel=MEL),
        "coarse": tiny(mel=MEL, classes=64),
        "free": tiny(),
        "mixture": tiny(law="logistic_mixture", mixtures=2, mel=MEL),
        "slow": tiny(sample_rate=4000),
        "speakers": tiny(mel=MEL, speakers=2),
    }
    for name, model in models.items():
        model.save(folder / name, training={"step": 7, "speakers": ["ann", "bob"]})
    for n, speaker in enumerate(("ann", "bob", "ann")):
        for path in (folder / "held", folder / "by_speaker" / speaker):
            path.mkdir(parents=True, exist_ok=True)
            audio.write(path / f"{n}.wav", clip(n), RATE)
    return folder


@pytest.fixture(scope="module")
def made(here: Path) -> Evaluation:
    return evaluate(here / "mel", here / "held", here / "out", SHOWN)


def changed(evaluation: Evaluation, change: Callable[[dict[str, Any]], object]) -> Evaluation:
    record = json.loads(json.dumps(evaluation.record))
    change(record)
    return Evaluation(record, evaluation.folder)


def command(*words: str | Path) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture, *words: str | Path, status: int = 1) -> str:
    """Run a command that is refused; return its message on stderr, out of the parser's box."""
    try:
        got = command(*words)
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == status, err
    assert "Traceback" not in err
    if status == 2:
        return " ".join(err.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    assert err.startswith("wavear: error: ")
    return err


def outside(page: str) -> list[str]:
    """Return a page's references to anything outside it."""
    return re.findall(r'(?:src|href)="(?!data:)[^"]*"|https?://|url\(|@import|<script', page)
