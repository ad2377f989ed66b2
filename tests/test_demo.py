"""The demo: sounds have their pitch, fine-tuning is judged by what was heard, the files exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import stubs as stubs

import wavear
from wavear import audio
from wavear.cli.commands import main
from wavear.demo import job
from wavear.demo.job import DemoResult
from wavear.demo.sounds import notes, string, voice

RATE = 22050


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
    assert len({note.name for note in made}) == len(made) == 36
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
        assert len(same) == 3
        assert all(note.frequency == held.frequency for note in same)
        # The correlation would be 1 if only the loudness differed, and 0.9975 if the noise differed
        # as well. Most takes also have another timbre.
        alike = [np.corrcoef(note.waveform, held.waveform)[0, 1] for note in same]
        assert max(alike) < 0.999
        assert np.median(alike) < 0.995


@pytest.mark.parametrize(
    ("bits", "log_mel", "better"), [(-0.1, -0.1, True), (0.1, -0.1, False), (-0.1, 0.1, False)]
)
def test_fine_tuning_is_better_if_bits_and_log_mel_distance_fall(
    bits: float, log_mel: float, better: bool
):
    found = {"bits": {"difference": {"mean": bits}}}
    found |= {"measures": {"log_mel": {"difference": {"mean": log_mel}}}}
    compared: Any = type("Compared", (), {"record": found})
    training: Any = None
    assert DemoResult(training, compared, 1.0).better == better


def test_the_demo_writes_all_files_and_compares_before_with_after(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "NOTE_SECONDS", 0.4)
    monkeypatch.setattr(job, "notes", lambda *given, **more: notes(*given, **more)[::3])
    out = tmp_path / "demo"
    result = job.run(out, minutes=0.1)
    assert len(list((out / "sounds").glob("*.wav"))) == 12
    assert len(list((out / "held_out").glob("*.wav"))) == 2
    spoken = audio.read(out / "voice.wav", RATE)
    assert len(spoken) > 4 * RATE
    assert 0.01 < float(spoken.square().mean().sqrt()) < 0.3
    for which, name in (("a", "before"), ("b", "after")):
        parts = [
            audio.read(path, RATE) for path in sorted(out.glob(f"report/{which}/audio/*/model.wav"))
        ]
        assert len(parts) == 2
        heard = audio.read(out / f"{name}.wav", RATE)
        assert np.array_equal(heard.numpy(), np.concatenate([part.numpy() for part in parts]))
    assert b"<audio" in (out / "report" / "compare.html").read_bytes()
    assert wavear.load(out / "run" / "best").config == wavear.load("voice").config
    record = json.loads((out / "demo.json").read_text())
    assert record["bits"]["a"]["mean"] > record["bits"]["b"]["mean"]  # even after some steps
    assert record["better"] == result.better
    printed = capsys.readouterr().out
    assert "voice.wav: 4.7 s of speech" in printed
    assert f"bits per sample: a {record['bits']['a']['mean']:.4f}, b " in printed

    with pytest.raises(FileExistsError, match="--overwrite"):
        job.run(out)
    assert main(["demo", "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_exit_status_is_1_if_nothing_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for right in (True, False):
        result = type("Result", (), {"better": right})
        monkeypatch.setattr(job, "run", lambda *_, result=result, **__: result)
        assert main(["demo", "--out", str(tmp_path / "x")]) == (0 if right else 1)


def test_overwrite_replaces_only_a_demo(tmp_path: Path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "sounds").mkdir()
    with pytest.raises(FileExistsError, match="not empty and has no"):
        job.run(tmp_path, overwrite=True)
    (tmp_path / "demo.json").write_text("{}")
    job._make_folder(tmp_path, overwrite=True)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "sounds").exists()
