"""Infilling keeps what is outside of the gap, fits the right side, and repeats with its seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from engine_cases import make_wavenet
from scipy.signal import lfilter

import wavear
from wavear.cli import main
from wavear.common.errors import WavearError
from wavear.generation.infilling import infill, janssen, seam_of

RATE, GAP = 8000, (3000, 3240)


@pytest.fixture
def x() -> torch.Tensor:
    """Return a resonance that rings for longer than the seam, (T,)."""
    noise = np.random.default_rng(0).normal(0, 0.002, 8000)
    return torch.from_numpy(np.asarray(lfilter([1.0], [1.0, -1.9, 0.98], noise))).float()


@pytest.fixture
def model(x: torch.Tensor):
    return wavear.fit_linear(x, sample_rate=RATE, order=2, grid="linear")


def test_filling_fits_the_right_side_and_repeats(x, model):
    first = infill(model, x, *GAP, candidates=16, seed=3)
    again, other = (infill(model, x, *GAP, candidates=16, seed=seed) for seed in (3, 4))
    assert torch.equal(first.waveform, again.waveform)
    assert not torch.equal(first.waveform, other.waveform)
    outside = torch.ones(len(x), dtype=torch.bool)
    outside[slice(*GAP)] = False
    assert torch.equal(first.waveform[outside], x[outside])
    assert first.seam > first.first_seam + 0.1
    assert first.seam == pytest.approx(seam_of(model, first.waveform, *GAP), abs=1e-9)
    damaged = x.clone()
    damaged[slice(*GAP)] = 0.9
    assert torch.equal(infill(model, damaged, *GAP, candidates=16, seed=3).waveform, first.waveform)


def test_forking_the_likely_candidates_beats_the_best_of_as_many(x, model, monkeypatch):
    def seams(candidates: int) -> list[float]:
        return [infill(model, x, *GAP, candidates=candidates, seed=s).seam for s in range(32)]

    forked = seams(4)
    monkeypatch.setattr("wavear.generation.infilling.FORKS", ())
    assert np.mean(forked) > np.mean(seams(16)) + 0.02


def test_mel_does_not_hear_the_gap(x):
    model = make_wavenet(
        sample_rate=RATE,
        mel=wavear.MelConfig(sample_rate=RATE, hop_length=100, bands=12, fmax=None),
    )
    damaged = x.clone()
    damaged[slice(*GAP)] = 0.9
    fillings = [infill(model, y, *GAP, candidates=2).waveform[slice(*GAP)] for y in (x, damaged)]
    assert torch.equal(*fillings)


def test_linear_prediction_continues_tones_from_both_sides():
    t = torch.arange(8000) / RATE
    tones = 0.3 * torch.sin(2 * np.pi * 440 * t) + 0.2 * torch.sin(2 * np.pi * 1010 * t)
    damaged = tones.clone()
    damaged[slice(*GAP)] = 0
    filled = janssen(damaged, *GAP)
    assert (filled - tones)[slice(*GAP)].abs().max() < 0.01
    assert torch.equal(filled[: GAP[0]], tones[: GAP[0]])
    assert not janssen(torch.zeros(8000), *GAP).any()


def test_command_writes_sound_and_page(x, model, tmp_path: Path, capsys):
    model.save(tmp_path / "model")
    soundfile.write(tmp_path / "x.wav", x.numpy(), RATE, subtype="PCM_16")
    names = [str(tmp_path / name) for name in ("x.wav", "y.wav", "y.html", "model")]
    source, out, page, checkpoint = names
    command = ["infill", source, "--from", "0.3", "--to", "0.32", "--out", out]
    command += ["--checkpoint", checkpoint, "--page", page, "--candidates", "4"]
    assert main(command) == 0
    assert "log P of the seam" in capsys.readouterr().out
    assert (tmp_path / "y.html").read_text().count("<audio") == 3
    assert main(command) == 1  # they exist
    assert main([*command, "--overwrite", "--to", "2"]) == 1


def test_unsuited_gaps_are_refused(x, model):
    for gap in ((0, 9), (9, 9), (7990, 8000)):
        with pytest.raises(WavearError, match="it must begin and end inside"):
            infill(model, x, *gap)
    with pytest.raises(WavearError, match="candidates is 1"):
        infill(model, x, *GAP, candidates=1)
