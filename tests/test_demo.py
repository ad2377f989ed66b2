"""The demo: sounds have their pitch, the check detects a wrong one, and the files exist."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from wavear import audio
from wavear.cli.commands import main
from wavear.demo import job
from wavear.demo.job import CENTS, VALUES, Heard, compare_pitch
from wavear.demo.sounds import notes, string, voice

RATE = VALUES.sample_rate
QUICK = dataclasses.replace(
    VALUES,
    layers=2,
    residual_channels=4,
    skip_channels=4,
    head_channels=4,
    conditioning_channels=4,
    max_steps=2,
    max_minutes=None,
    progress=False,
)


@pytest.mark.parametrize("frequency", [110.0, 233.3, 440.0])
@pytest.mark.parametrize("instrument", [string, voice])
def test_sounds_have_their_pitch(instrument, frequency: float):
    """A parabola refines the peak of the autocorrelation; stiffness adds at most 5 cents."""
    rate = 16000
    settings = {"vibrato_cents": 0.0} if instrument is voice else {}
    x = instrument(frequency, 0.6, rate, **settings)[rate // 10 : rate // 2].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(x)] / np.arange(len(x), 0, -1)
    around = round(rate / frequency)
    lag = around - 5 + int(np.argmax(correlation[around - 5 : around + 6]))
    below, peak, above = correlation[lag - 1 : lag + 2]
    period = lag + 0.5 * (below - above) / (below - 2 * peak + above)
    assert abs(1200 * np.log2(rate / period / frequency)) < 5


def test_notes_are_repeatable_distinct_and_in_range():
    made, again, other = notes(0.2, RATE), notes(0.2, RATE), notes(0.2, RATE, seed=1)
    assert all(np.array_equal(a.waveform, b.waveform) for a, b in zip(made, again, strict=True))
    assert not any(np.array_equal(a.waveform, b.waveform) for a, b in zip(made, other, strict=True))
    assert len({note.name for note in made}) == len(made) == 144
    assert all(
        0.3 < np.abs(note.waveform).max() < 0.9 and note.waveform.dtype == np.float32
        for note in made
    )


def test_held_out_notes_differ_from_training_notes():
    """Each shares pitch and instrument with training notes, but has another waveform."""
    made, held_out = notes(0.2, RATE), notes(0.2, RATE, held_out=True)
    assert sorted(note.instrument for note in held_out) == ["string"] * 3 + ["voice"] * 3
    for held in held_out:
        same = [note for note in made if note.name.rsplit("-", 1)[0] == held.name]
        assert len(same) == 12
        assert all(note.frequency == held.frequency for note in same)
        # The correlation would be 1 if only the loudness differed, and 0.9975 if the noise differed
        # as well. Most takes also have another timbre.
        alike = [np.corrcoef(note.waveform, held.waveform)[0, 1] for note in same]
        assert max(alike) < 0.999
        assert np.median(alike) < 0.995


@pytest.mark.parametrize("cents", [0.0, 20.0, -20.0, 80.0, -120.0, 1200.0])
def test_the_check_measures_the_pitch(cents: float):
    """It is accurate to 12 cents, since a period has 10 samples; errors above 50 cents fail."""
    for note in notes(1.0, RATE, held_out=True):
        make = string if note.instrument == "string" else voice
        waveform = make(note.frequency * 2 ** (cents / 1200), 1.0, RATE)
        measured, steady = compare_pitch(waveform, note, RATE)
        assert abs(measured - cents) < 12
        assert Heard(note, waveform, measured, steady).in_tune == (abs(cents) <= CENTS)


def test_the_check_rejects_noise_and_silence():
    draw = np.random.default_rng(0)
    for note in notes(1.0, RATE, held_out=True):
        for waveform in (
            draw.normal(0, 0.1, RATE).astype(np.float32),
            np.full(RATE, 1e-4, np.float32),
        ):
            assert not Heard(note, waveform, *compare_pitch(waveform, note, RATE)).in_tune


def test_the_check_rejects_a_note_that_changes_its_pitch():
    """Only the first half is in tune, so the median may be right although the note is wrong."""
    note = notes(1.0, RATE, held_out=True)[-1]
    assert Heard(note, note.waveform, 0.0, 0.5).in_tune is False
    astray = note.waveform.copy()
    astray[4 * RATE // 10 :] = voice(note.frequency * 1.5, 1.0, RATE)[4 * RATE // 10 :]
    assert not Heard(note, astray, 0.0, compare_pitch(astray, note, RATE)[1]).in_tune


def test_the_demo_writes_all_files_and_reports_wrong_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """After only two training steps the notes are noise, and the demo reports it."""
    result = job.run(tmp_path / "demo", config=QUICK)
    out = tmp_path / "demo"
    assert len(list((out / "sounds").glob("*.wav"))) == 144
    names = sorted(path.name for path in (out / "held_out").glob("*.wav"))
    assert len(names) == 6
    assert names == sorted(path.name for path in (out / "synthesized").glob("*.wav"))
    for name in names:
        assert audio.info(out / "synthesized" / name) == audio.info(out / "held_out" / name)
    assert (out / "demo.png").read_bytes()[1:4] == b"PNG"
    assert (out / "run" / "best" / "model.safetensors").is_file()
    assert not result.in_tune
    record = json.loads((out / "demo.json").read_text())
    assert set(record["held_out_bits"]) == {"model", "uniform", "unigram", "markov"}
    assert record["held_out_bits"]["uniform"] == 8
    assert abs(record["bits_before"] - 8) < 0.2
    printed = capsys.readouterr().out
    assert "notes have the wrong pitch" in printed
    assert "before training" in printed
    assert "engine" in printed

    with pytest.raises(FileExistsError, match="--overwrite"):
        job.run(out, config=QUICK)
    assert main(["demo", "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_exit_status_is_1_if_a_pitch_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for right in (True, False):
        result = type("Result", (), {"in_tune": right})
        monkeypatch.setattr(job, "run", lambda *_, result=result, **__: result)
        assert main(["demo", "--out", str(tmp_path / "x")]) == (0 if right else 1)


def test_overwrite_replaces_only_a_demo(tmp_path: Path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "sounds").mkdir()
    with pytest.raises(FileExistsError, match="holds no demo"):
        job.run(tmp_path, config=QUICK, overwrite=True)
    (tmp_path / "demo.json").write_text("{}")
    job._make_folder(tmp_path, overwrite=True)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "sounds").exists()
