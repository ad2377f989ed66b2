"""Likelihood ratios: the means of each window, and a low ratio where the sound is odd."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import lfilter

import wavear
from wavear.cli import main
from wavear.common.errors import WavearError
from wavear.evaluation.ratios import likelihood_ratios

RATE = 8000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of two recordings, of which the second has white noise from 0.5 to 0.6 s."""
    (tmp_path / "data").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).normal(0, 0.01, RATE)
        x = np.asarray(lfilter([1.0], [1.0, -1.8, 0.9], noise))
        if number:
            x[4000:4800] = np.random.default_rng(9).normal(0, x.std(), 800)
        soundfile.write(tmp_path / "data" / f"{number}.wav", x, RATE, subtype="PCM_16")
    return tmp_path / "data"


@pytest.fixture
def model(data: Path):
    x = wavear.audio.read(data / "0.wav")
    return wavear.fit_linear(x, sample_rate=RATE, order=4, grid="linear")


@pytest.mark.parametrize("against", ["linear", "model"])
def test_the_oddest_window_is_that_of_the_fault(against, data, model, tmp_path, capsys):
    model.save(tmp_path / "model")
    other = wavear.fit_linear(torch.randn(RATE) * 0.03, sample_rate=RATE, order=1, grid="linear")
    other.save(tmp_path / "other")
    named = "linear" if against == "linear" else str(tmp_path / "other")
    table = tmp_path / "x.csv"
    arguments = [str(tmp_path / "model"), str(data), "--against", named, "--csv", str(table)]
    assert main(["score", *arguments]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [len([row for row in rows if row["path"] == f"{n}.wav"]) for n in range(2)] == [10, 10]
    oddest = min(rows, key=lambda row: float(row["ratio"]))
    assert (oddest["path"], oddest["start"]) == ("1.wav", "0.500")
    assert "1.wav at 0.50 s" in capsys.readouterr().out
    assert main(["score", *arguments]) == 1  # the table exists


def test_no_table_is_written_of_nothing(model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    soundfile.write(tmp_path / "empty" / "x.wav", torch.zeros(0).numpy(), RATE)
    table = tmp_path / "new" / "x.csv"
    given = [str(tmp_path / "model"), str(tmp_path / "empty"), "--csv", str(table)]
    assert main(["score", *given]) == 1
    assert not table.exists()


def test_windows_have_the_bits_of_score(data, model):
    found = [
        w for w in likelihood_ratios(model, data, model, every=0.3).windows if w.path == "0.wav"
    ]
    x = wavear.audio.read(data / "0.wav")
    bits = -wavear.score(model, x, grid="linear")[0].numpy() / math.log(2)
    assert [w.start for w in found] == pytest.approx([0, 0.3, 0.6])
    expected = [bits[:2400].mean(), bits[2400:4800].mean(), bits[4800:].mean()]
    assert [w.bits for w in found] == pytest.approx(expected, abs=1e-9)
    assert {w.ratio for w in found} == {0.0}


def test_models_that_do_not_fit_are_refused(data, model):
    with pytest.raises(WavearError, match="rates of 8000 and 16000 Hz"):
        likelihood_ratios(model, data, wavear.fit_linear(torch.randn(900) / 9, sample_rate=16000))
    with pytest.raises(WavearError, match=r"every is 1e-06 s"):
        likelihood_ratios(model, data, every=1e-6)
