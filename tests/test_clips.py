"""Clips of an evaluation: treated as in training, marked if trained on, data of the baselines."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluate_cases import BITS, FAST, RATE, clip
from evaluate_cases import here as here
from evaluate_cases import made as made
from evaluate_cases import stubs as stubs

from wavear import Evaluation, audio, evaluate
from wavear.evaluation.clips import Preparation, open_clips, open_clips_for_fitting


def run_of(here: Path, folder: Path, gains: dict[str, float] | None = None, **config: Any) -> Path:
    """Return a checkpoint next to a train.json."""
    shutil.copytree(here / "mel", folder / "best")
    record = {"config": config, "data": {} if gains is None else {"gains": gains}}
    (folder / "train.json").write_text(json.dumps(record))
    return folder / "best"


def test_training_clips_are_marked(here: Path, tmp_path: Path, caplog):
    other = shutil.copytree(here / "held", tmp_path / "other")
    checkpoint = run_of(here, tmp_path / "run", data=str(here / "held"), validation=str(other))
    with caplog.at_level(logging.INFO, "wavear"):
        found = evaluate(checkpoint, here / "held", tmp_path / "out", BITS)
    assert [row.trained_on for row in found.clips] == [True] * 3
    assert "3 of 3 clips were trained on" in caplog.text
    assert "3 of 3 clips were trained on" in found.page.read_text(encoding="utf-8")
    assert found.record["baselines"]["fitted_to"] == "the clips themselves, each half for the other"


def test_baselines_are_fitted_to_the_training_data_or_to_the_given_data(here: Path, tmp_path: Path):
    train = tmp_path / "train"
    train.mkdir()
    for n in range(3):
        audio.write(train / f"{n}.wav", clip(10 + n), RATE)
    checkpoint = run_of(here, tmp_path / "run", data=str(train), validation=str(here / "held"))
    given = dataclasses.replace(BITS, train_data=str(train))
    known = evaluate(checkpoint, here / "held", tmp_path / "a", BITS).record
    asked = evaluate(here / "mel", here / "held", tmp_path / "b", given).record
    assert str(train) in known["baselines"]["fitted_to"]
    assert [row["trained_on"] for row in known["clips"]] == [False] * 3
    assert known["bits"] == asked["bits"]
    assert known["baselines"]["linear"] == asked["baselines"]["linear"]
    # An unreadable recording is skipped.
    soundfile.write(train / "1.wav", np.full(4000, np.nan), RATE, "FLOAT")
    left = evaluate(here / "mel", here / "held", tmp_path / "c", given).record
    assert any(note.startswith("the baselines skip 1.wav: ") for note in left["notes"])
    assert left["baselines"]["seconds"] == pytest.approx(2 * clip(0).size / RATE)


def test_baselines_of_a_clip_are_fitted_to_the_other_half(
    here: Path, made: Evaluation, tmp_path: Path
):
    """The baselines of the second clip are fitted to the first and the third."""
    (tmp_path / "train").mkdir()
    for name in ("0.wav", "2.wav"):
        shutil.copy(here / "held" / name, tmp_path / "train" / name)
    config = dataclasses.replace(BITS, train_data=str(tmp_path / "train"))
    found = evaluate(here / "mel", here / "held" / "1.wav", tmp_path / "out", config)
    assert found.clips[0].bits == pytest.approx(made.clips[1].bits)


def test_a_single_clip_has_no_baselines(here: Path, tmp_path: Path, lines: Any):
    found = evaluate(here / "mel", here / "held" / "1.wav", tmp_path / "out", BITS)
    assert "baselines fitted to nothing, as a single clip has no other half" in lines()
    assert set(found.bits) == {"model", "uniform"}
    assert any("--train-data" in note for note in found.record["notes"])
    assert found.record["bits"]["model"]["low"] is None


@pytest.mark.parametrize("name", ["normalize", "normalise"])  # the second: in earlier runs
def test_levels_and_ends_are_treated_as_in_training(here: Path, tmp_path: Path, name: str):
    trained: Any = {"data": "gone", "trim_silence": 40.0, name: "peak"}
    checkpoint = run_of(here, tmp_path / "run", **trained)
    config = dataclasses.replace(FAST, clips=1)
    found = evaluate(checkpoint, here / "held", tmp_path / "out", config)
    notes = found.record["notes"]
    assert "treated as in training: level by peak, ends 40 dB down cut" in notes
    assert (
        "whether clips were trained on is not known: of the training data, gone is not here"
        in notes
    )
    row = next(row for row in found.clips if row.audio)
    heard = audio.read(found.folder / (row.audio or {})["original"])
    assert row.samples < clip(0).size - RATE // 20  # the clip ends in 0.2 s of silence and a fade
    assert float(heard.abs().max()) == pytest.approx(0.9, abs=0.1)
    assert Preparation(normalize="rms").words == ["level by rms"]
    assert Preparation(trim_silence=30.0).words == ["ends 30 dB down cut"]


def test_levels_by_speaker_equal_those_of_training(here: Path):
    """Speakers outside the training data get the levels of these clips, with a note."""
    peaks = [0.9 / float(audio.read(here / "held" / f"{n}.wav").abs().max()) for n in range(3)]
    start = "treated as in training: level by peak for each speaker; "
    for data, gains, expected, note in (
        (
            "by_speaker",
            {"ann": 0.25},
            [0.25, 0.25, peaks[1]],
            "the speakers' gains are those of the training for 1 of 2"
            " and of these clips for the others",
        ),
        ("held", {}, [min(peaks)] * 3, "but one gain for all, since no speakers are named"),
        (
            "by_speaker",
            {},
            [min(peaks[0], peaks[2])] * 2 + [peaks[1]],
            "the speakers' gains are of these clips, those of the training are unknown",
        ),
    ):
        prepared = Preparation("peak", "speaker", gains=gains)
        found = open_clips(here / data, RATE, 1, prepared, False)
        assert [each.gain for each in found.good] == pytest.approx(expected)
        assert found.notes == [start + note]
    prepared = Preparation("peak", "speaker", gains={"bob": 0.5})
    fitting = open_clips_for_fitting(str(here / "by_speaker"), RATE, 1, prepared)
    assert [each.speaker for each in fitting] == ["ann", "ann", "bob"]
    assert fitting[0].gain == fitting[1].gain != fitting[2].gain == 0.5


def test_clips_of_training_shards_are_marked(here: Path, tmp_path: Path):
    from wavear.data.shards import write_shards

    write_shards(here / "held", tmp_path / "shards")
    pattern = str(tmp_path / "shards" / "*.tar")
    checkpoint = run_of(here, tmp_path / "run", data=pattern, validation=str(here / "held"))
    found = evaluate(checkpoint, pattern, tmp_path / "a", BITS)
    assert [row.trained_on for row in found.clips] == [True] * 3


def test_audio_of_earlier_reports_is_skipped(here: Path, tmp_path: Path):
    """A folder of the same name without a report next to it is data."""
    shutil.copytree(here / "held", tmp_path / "audio")
    for folder, record in (("r/1/audio/0", "r/1/evaluation.json"), ("t/strip", "t/models.json")):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(here / "held" / "0.wav", tmp_path / folder / "model.wav")
        (tmp_path / record).write_text("{}")
    found = open_clips(tmp_path, RATE, 1, Preparation(), False)
    assert [each.name for each in found.good] == [f"audio/{n}.wav" for n in range(3)]
    assert found.notes == ["skipped 2 files of earlier reports"]
    asked = open_clips(tmp_path / "r" / "1" / "audio", RATE, 1, Preparation(), False)
    assert [each.name for each in asked.good] == ["0/model.wav"]
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(ValueError, match="no recordings other than those of earlier reports"):
        open_clips(tmp_path, RATE, 1, Preparation(), False)
