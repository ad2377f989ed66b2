"""`wavear compare`: differences, the table of models, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_cases import FAST, FLAGS, RATE, changed, clip, command, outside, refused
from evaluate_cases import here as here
from evaluate_cases import made as made
from evaluate_cases import stubs as stubs

import wavear
from wavear import Evaluation, audio, compare, compare_models
from wavear.evaluation import model_table, run
from wavear.evaluation.comparison import paired
from wavear.evaluation.pictures import costs


def test_a_model_equals_itself(made: Evaluation, tmp_path: Path):
    found = compare(made.folder, made.folder / "evaluation.json", tmp_path / "c").record
    for entry in (found["bits"], *found["measures"].values()):
        clips = entry["difference"]["clips"]
        assert entry["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "clips": clips}
        assert entry["a"] == entry["b"]


def test_differences_are_paired_by_clip(made: Evaluation):
    """A gain of 0.1 bits in every clip has an interval of zero width, although the clips differ."""

    def shift(record: dict[str, Any]) -> None:
        for row in record["clips"]:
            row["bits"]["model"] -= 0.1
            if "measures" in row:
                row["measures"]["model"]["mcd"] += 1.5

    found = paired(made.record, changed(made, shift).record)
    same = {"mean": -0.1, "low": -0.1, "high": -0.1, "clips": 3}
    assert found["bits"]["difference"] == pytest.approx(same)
    assert found["bits"]["a"]["high"] - found["bits"]["a"]["low"] > 1e-3
    assert found["bits"]["better"] == 3
    assert found["measures"]["mcd"]["difference"]["mean"] == pytest.approx(1.5)
    assert found["measures"]["mcd"]["better"] == 0
    assert found["bits"]["b"]["mean"] == pytest.approx(made.bits["model"] - 0.1)


def test_two_checkpoints_on_the_command_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A clip that cannot be used makes the exit status 1."""
    data = shutil.copytree(here / "held", tmp_path / "held")
    (data / "words.wav").write_text("no audio")
    flags = ("--clips", "1", "--seconds", "0.3", *FLAGS)
    a, b, out = here / "mel", here / "other", tmp_path / "c"
    assert command("compare", a, b, "--data", data, "--out", out, *flags) == 1
    printed = capsys.readouterr()
    one, two = Evaluation.read(out / "a"), Evaluation.read(out / "b")
    difference = two.bits["model"] - one.bits["model"]
    record = json.loads((out / "compare.json").read_text())
    assert record["bits"]["difference"]["mean"] == pytest.approx(difference)
    assert f"b less a {difference:+.4f}" in printed.out
    assert "words.wav: " in printed.err
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert outside(page) == []
    assert page.count("<audio") == 3
    assert str(b) in page
    assert f"report: {out / 'compare.html'}" in printed.out
    side = (out / "compare.json", out / "a", "--out", tmp_path / "d")
    assert "compare.json is not an evaluation of one model" in refused(capsys, "compare", *side)


def test_models_that_cannot_be_compared_are_refused_before_the_work(
    here: Path, made: Evaluation, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(here)
    monkeypatch.setattr(run, "measure_everything", lambda *_, **__: pytest.fail("the work began"))
    out, data = tmp_path / "c", ("--data", "held")
    with pytest.raises(ValueError, match="a has 256 mu-law codes and b has 64"):
        compare("mel", "coarse", out, "held")
    for words, arguments in {
        "two models or more": ("mel", *data),
        "are of 4000 and 8000 Hz": ("mel", "free", "slow", *data),
        "pass --data": ("out", "mel"),
        "need no --data": ("out", "out", *data),
        "nowhere: no such directory": ("out", "nowhere", *data),
        "nowhere.json: no such evaluation": ("out", "nowhere.json"),
    }.items():
        assert words in refused(capsys, "compare", *arguments, "--out", out)
    (tmp_path / "more").mkdir()
    audio.write(tmp_path / "more" / "9.wav", clip(9), RATE)
    with pytest.raises(ValueError, match=r"was evaluated on other clips than those of .*more"):
        compare_models([made.folder, "coarse", "free"], out, tmp_path / "more")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"2\.wav is a clip of a only", lambda r: r["clips"].pop()),
        (r"0\.wav is not the same audio", lambda r: r["clips"][0].update(digest="0")),
        ("in different orders", lambda r: r["clips"].reverse()),
        ("up to 0.6 s of each clip and b up to 3 s", lambda r: r["settings"].update(seconds=3.0)),
        (
            "a has 8000 Hz and b has 16000",
            lambda r: r["checkpoint"]["config"].update(sample_rate=16000),
        ),
    ],
)
def test_records_of_other_clips_are_not_paired(made: Evaluation, words: str, change: Any):
    with pytest.raises(ValueError, match=words):
        paired(made.record, changed(made, change).record)


def test_different_settings_are_noted(made: Evaluation):
    other = changed(made, lambda r: r["settings"].update(temperature=0.8, particles=4))
    old = changed(made, lambda r: r["settings"].pop("particles"))  # before there were particles
    end = "in b: the model is not the only difference"
    notes = paired(old.record, other.record)["notes"]
    assert notes == [f"temperature is 1.0 in a and 0.8 {end}", f"particles is 1 in a and 4 {end}"]


# ---- the table of models


def test_models_of_any_quantisation_are_in_one_table(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out, names = tmp_path / "table", ["mel", "mixture", "coarse", "free"]
    sources = [here / name for name in names]
    words = ("--clips", "1", "--seconds", "0.1", *FLAGS)
    assert command("compare", *sources, "--data", here / "held", "--out", out, *words) == 0
    assert "mixture: " in capsys.readouterr().out
    record = json.loads((out / "models.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["models"]}
    assert list(rows) == names
    assert rows["mixture"]["grid"] == "16-bit linear"
    assert rows["mixture"]["common_bits"] == rows["mixture"]["bits"]
    assert rows["mel"]["mulaw_bits"] == rows["mel"]["bits"]
    assert rows["mixture"]["mulaw_bits"]["mean"] < rows["mixture"]["bits"]["mean"] - 2
    finer = rows["coarse"]["mulaw_bits"]["mean"] - rows["coarse"]["bits"]["mean"]
    assert 1 < finer < np.log2(10)  # each of the 64 codes covers 2 to 10 of the 256
    assert rows["mel"]["common_bits"]["mean"] > rows["mel"]["bits"]["mean"] + 2
    assert rows["free"]["multiply_adds"] == wavear.load(sources[3]).multiply_adds
    assert all(row["speed"]["reference"] > 0 and row["speed"]["numba"] > 0 for row in rows.values())
    page = (out / "models.html").read_text(encoding="utf-8")
    assert outside(page) == []
    head = re.search(r"<thead>(.*?)</thead>", page, re.DOTALL)
    assert head is not None
    assert re.findall(r"<th[^>]*>(.*?)</th>", head.group(1))[2:] == [
        "256 mu-law codes",
        "16-bit linear",
        "64 mu-law codes",
        "on 16-bit samples",
        "on 256 mu-law codes",
    ]
    whole = audio.read(out / "strip" / "recording.wav")
    prime = round(record["strip"]["prime_seconds"] * RATE)
    for n in range(4):
        made = audio.read(out / "strip" / f"{n}.wav")
        assert made.numel() == whole.numel()
        assert torch.equal(made[:prime], whole[:prime])
        assert not torch.equal(made[prime:], whole[prime:])
    # Finished evaluations give no strip; --models makes a table of two models on one grid.
    again = tmp_path / "again"
    assert command("compare", out / "1", out / "4", "--models", "--out", again) == 0
    assert json.loads((again / "models.json").read_text(encoding="utf-8"))["strip"] is None


def test_a_table_of_different_clips_is_refused(made: Evaluation):
    def renamed(record: dict[str, Any]) -> None:
        for row in record["clips"]:
            row["name"] = f"other/{row['name']}"

    def coarse(record: dict[str, Any]) -> None:
        record["checkpoint"]["grid"] = "64 mu-law codes"
        record["clips"][0]["digest"] = "0"  # the digest of other codes

    def trimmed(record: dict[str, Any]) -> None:
        record["data"]["treated"] = ["ends 40 dB down cut"]
        record["clips"][0]["samples"] -= 100

    def check(change: Callable[[dict[str, Any]], object]) -> list[str]:
        return model_table.check_same_clips(["a", "b"], [made, changed(made, change)])

    assert model_table.check_same_clips([], []) == check(lambda _: None) == check(coarse) == []
    with pytest.raises(ValueError, match=r"evaluated on other clips \(0\.wav, other/0\.wav"):
        check(renamed)
    with pytest.raises(ValueError, match=r"1\.wav is not the same audio in the evaluations of a"):
        check(lambda r: r["clips"][1].update(samples=7))
    with pytest.raises(ValueError, match=r"2\.wav is not the same audio"):
        check(lambda r: r["clips"][2].update(digest="0"))
    missing = "b: its numbers are without 0.wav, which others have"
    assert check(lambda r: r["clips"].pop(0)) == [missing]
    (note,) = check(trimmed)
    start = "b (ends 40 dB down cut) and a (untreated) were not evaluated on the same audio"
    assert note.startswith(start)


def test_a_plot_escapes_names_that_are_not_unicode(made: Evaluation):
    other = changed(made, lambda r: r["checkpoint"].update(source="runs/caf\udce9/best"))
    names = model_table.name_models([made, other], ["mel", "runs/caf\udce9/best"])
    assert names == ["mel", "caf\\udce9"]
    assert costs([model_table.row(name, made, None) for name in names]) is not None


def test_bits_of_pre_emphasised_codes_have_their_own_column(made: Evaluation):
    other = changed(made, lambda r: r["checkpoint"]["config"].update(pre_emphasis=0.85))
    grids = [model_table.row("x", each, None)["grid"] for each in (made, other)]
    assert grids == ["256 mu-law codes", "256 mu-law codes, pre-emphasis 0.85"]


def test_a_table_without_a_strip_gives_the_reason(here: Path, made: Evaluation, tmp_path: Path):
    """Frames coincide only after more than two seconds, or clips are shorter than 0.25 s."""
    reason = str(model_table.find_beginning(here / "held", RATE, [275, 256]))
    assert reason == "mel frames of 256, 275 samples end together only after 8.8 s"
    found = model_table.find_beginning(here / "held", RATE, [64, 40])
    assert isinstance(found, model_table.Beginning)
    assert found.waveform.numel() % 320 == 0
    assert found.prime in (RATE // 2, found.waveform.numel() // 2)
    audio.write(tmp_path / "short.wav", clip(0)[:1500], RATE)
    assert "none of the clips can be used" in str(model_table.find_beginning(tmp_path, RATE, [64]))
    table = model_table.side_by_side([made, made], ["a", "b"], reason, tmp_path, FAST)
    assert table["strip"] is None
    assert f"there is no continuation of one beginning: {reason}" in table["notes"]
