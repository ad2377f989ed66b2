"""`wavear evaluate` and `wavear compare`: what they write is true, whole and needs nothing else; what they refuse."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import wavear
from wavear import (
    EvaluateConfig,
    Evaluation,
    MelConfig,
    WaveNet,
    WaveNetConfig,
    audio,
    compare,
    evaluate,
)
from wavear.cli.commands import main
from wavear.demo.sounds import string, voice
from wavear.evaluation.comparison import paired
from wavear.evaluation.metrics import MEASURES, measure, pitch

RATE = 8000
MEL = MelConfig(
    sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=20, fmax=4000.0
)
FAST = EvaluateConfig(clips=2, seconds=0.6, threads=1, resamples=200, shown=0)
SHOWN = dataclasses.replace(FAST, shown=8)


SHORT = dataclasses.replace(FAST, seconds=0.2)


def tiny(seed: int = 0, **settings: Any) -> WaveNet:
    torch.manual_seed(seed)
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
    )
    return WaveNet(WaveNetConfig(layers=3, stacks=1, sample_rate=RATE, **sizes, **settings)).eval()


def clip(n: int, seconds: float = 0.7) -> np.ndarray:
    make = string if n % 2 else voice
    x = np.concatenate([np.zeros(RATE // 5), make(200.0 + 30 * n, seconds, RATE)])
    return (0.5 * x + np.random.default_rng(n).normal(0, 1e-4, x.size)).astype(np.float32)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/{mel,other,coarse,free,mixture,slow,speakers}/best, held/ with three clips, by_speaker/."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny(mel=MEL).save(folder / "runs" / "mel" / "best", training={"step": 7})
    tiny(1, mel=MEL).save(folder / "runs" / "other" / "best")
    tiny(mel=MEL, classes=64).save(folder / "runs" / "coarse" / "best")
    tiny().save(folder / "runs" / "free" / "best")
    tiny(law="logistic_mixture", mixtures=2, mel=MEL).save(folder / "runs" / "mixture" / "best")
    slow = dataclasses.replace(tiny().config, sample_rate=4000)
    WaveNet(slow).save(folder / "runs" / "slow" / "best")
    tiny(mel=MEL, speakers=2).save(
        folder / "runs" / "speakers" / "best", training={"speakers": ["ann", "bob"]}
    )
    for n in range(3):
        for path in (
            folder / "held" / f"{n}.wav",
            folder / "by_speaker" / ("ann", "bob", "ann")[n] / f"{n}.wav",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            audio.write(path, clip(n), RATE)
    return folder


@pytest.fixture(scope="module")
def made(here: Path) -> Evaluation:
    return evaluate(here / "runs" / "mel" / "best", here / "held", here / "out", SHOWN)


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path, status: int = 1) -> str:
    """The one line on stderr of a command that is refused."""
    try:
        got = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == status, err
    assert err.startswith("wavear: error: ")
    assert "Traceback" not in err
    return err


# ---- what is true of an evaluation


def test_bits_are_those_of_score_over_all_samples(here: Path, made: Evaluation):
    model = wavear.load(here / "runs" / "mel" / "best")
    bits, samples = 0.0, 0
    for row in made.record["clips"]:
        nats = wavear.score(model, audio.read(here / "held" / row["name"]))
        assert row["bits"]["model"] == pytest.approx(float(-nats.mean()) / np.log(2))
        bits, samples = bits - float(nats.sum()) / np.log(2), samples + nats.numel()
    assert made.bits["model"] == pytest.approx(bits / samples)
    assert set(made.bits) == {"model", "linear", "markov", "unigram", "uniform"}
    assert made.bits["uniform"] == 8


def test_the_audio_is_that_of_generate_and_the_measures_are_of_it(here: Path, made: Evaluation):
    model = wavear.load(here / "runs" / "mel" / "best")
    rows = [row for row in made.record["clips"] if "measures" in row]
    assert [row["name"] for row in rows] == ["0.wav", "2.wav"]  # two of three, evenly
    for row in rows:
        x = audio.read(here / "held" / row["name"])[: round(FAST.seconds * RATE) // 64 * 64]
        assert row["synthesized_samples"] == x.numel()
        alone = wavear.generate(model, wavear.log_mel(x[None], MEL), seed=0)[0]
        written = audio.read(made.folder / row["audio"]["model"])
        assert torch.allclose(written, alone, atol=1.01 / 32768, rtol=0)
        assert torch.allclose(audio.read(made.folder / row["audio"]["original"]), x, atol=1e-6)
        values, missing = measure(x.numpy(), alone.numpy(), RATE, pitch(x.numpy(), RATE))
        assert row["measures"]["model"] == pytest.approx(values)
        assert row["not_measured"].get("model", {}) == missing
    for name, found in made.record["measures"].items():
        for system, entry in found.items():
            values = [row["measures"][system].get(name) for row in rows]
            if None not in values:
                assert entry["mean"] == pytest.approx(np.mean(values))


def test_bounds_stand_beside_the_model(made: Evaluation):
    found = made.record["measures"]
    for name in ("stft_distance", "mcd", "voicing_error"):
        assert set(found[name]) == {"mulaw", "model", "griffin_lim"}
        assert found[name]["mulaw"]["mean"] < found[name]["model"]["mean"]
    assert set(found["noise_floor"]) == {"original", "mulaw", "model", "griffin_lim"}
    assert found["noise_floor"]["original"]["mean"] == pytest.approx(-80, abs=2)
    assert found["noise_floor"]["model"]["mean"] > -40  # a model that has learnt nothing


def test_loudness_adds_up(made: Evaluation):
    levels = made.record["by_level"]
    samples = sum(entry["samples"] for entry in levels)
    bits = sum(entry["samples"] * entry["bits"] for entry in levels if entry["samples"])
    assert samples == sum(row["samples"] // 160 * 160 for row in made.record["clips"])
    assert bits / samples == pytest.approx(made.bits["model"], rel=0.01)


def test_the_same_seed_gives_the_same_evaluation(here: Path, made: Evaluation):
    again = evaluate(here / "runs" / "mel" / "best", here / "held", here / "again", SHOWN)
    varying = ("created", "command", "generation")
    first, second = ({k: v for k, v in e.record.items() if k not in varying} for e in (made, again))
    assert first == second
    assert Evaluation.read(here / "again").record == json.loads(json.dumps(again.record))


# ---- the page


def test_the_page_needs_nothing_else(here: Path, made: Evaluation):
    page = made.page.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert not re.search(r"https?://|url\(|@import|<script", page)
    assert made.record["command"] in page.replace("&#x27;", "'")
    assert f"{made.bits['model']:.3f}".replace(".", '</span><span class="f">.') in page
    assert page.count("<audio") == 2 * 4
    assert page.count("data:image/png") == 2 * 2  # there is no metrics.csv
    for sound, path in zip(
        re.findall(r"data:audio/flac;base64,([^\"]+)", page), _played(made), strict=True
    ):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")
        assert rate == RATE
        assert np.array_equal(samples, soundfile.read(made.folder / path, dtype="int16")[0])


def _played(made: Evaluation) -> list[str]:
    """Files in the order of the page: from the least to the largest distance."""
    rows = [row for row in made.record["clips"] if "audio" in row]
    rows.sort(key=lambda row: row["measures"]["model"]["stft_distance"])
    return [
        row["audio"][system]
        for row in rows
        for system in ("original", "mulaw", "model", "griffin_lim")
    ]


def test_markup_in_names_stays_text(here: Path, tmp_path: Path):
    name = "<b>&amp;'\".wav"
    (tmp_path / "clips").mkdir()
    for n, each in enumerate((name, "b.wav")):
        audio.write(tmp_path / "clips" / each, clip(n), RATE)
    found = evaluate(
        here / "runs" / "mel" / "best",
        tmp_path / "clips",
        tmp_path / "out",
        dataclasses.replace(FAST, clips=0),
    )
    page = found.page.read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;amp;&#x27;&quot;.wav" in page


def test_training_curves_are_shown_where_there_are_some(here: Path, tmp_path: Path):
    shutil.copytree(
        here / "runs" / "mel" / "best", tmp_path / "run" / "kept" / "7"
    )  # one level deeper than best/
    with (tmp_path / "run" / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "train_bits", "validation_bits", "something_new"])
        rows.writerows(
            [[step, 8 - step / 100, "" if step % 10 else 8 - step / 90, "x"] for step in range(50)]
        )
        file.write("50,7.")  # cut short
    config = dataclasses.replace(FAST, clips=0)
    found = evaluate(tmp_path / "run" / "kept" / "7", here / "held", tmp_path / "out", config)
    page = found.page.read_text(encoding="utf-8")
    assert "<h2>Training</h2>" in page
    assert page.count("data:image/png") == 1
    assert found.record["measures"] == {}


# ---- what it is fitted to, and what has been trained on


def run_of(here: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint beside a train.json."""
    shutil.copytree(here / "runs" / "mel" / "best", folder / "best")
    (folder / "train.json").write_text(json.dumps({"config": settings}))
    return folder / "best"


def test_clips_that_were_trained_on_are_told(here: Path, tmp_path: Path):
    other = shutil.copytree(here / "held", tmp_path / "other")
    checkpoint = run_of(here, tmp_path / "run", data=str(here / "held"), validation=str(other))
    said: list[str] = []
    config = dataclasses.replace(FAST, clips=0)
    found = evaluate(checkpoint, here / "held", tmp_path / "out", config, say=said.append)
    assert [row["trained_on"] for row in found.record["clips"]] == [True] * 3
    assert any("3 of 3 clips were trained on" in line for line in said)
    assert "3 of 3 clips were trained on" in found.page.read_text(encoding="utf-8")
    assert found.record["baselines"]["fitted_to"] == "the clips themselves, each half for the other"


def test_baselines_are_fitted_to_the_training_data_or_to_what_is_given(here: Path, tmp_path: Path):
    (tmp_path / "train").mkdir()
    for n in range(4):
        audio.write(tmp_path / "train" / f"{n}.wav", clip(10 + n), RATE)
    checkpoint = run_of(
        here, tmp_path / "run", data=str(tmp_path / "train"), validation=str(here / "held")
    )
    config = dataclasses.replace(FAST, clips=0)
    known = evaluate(checkpoint, here / "held", tmp_path / "a", config).record
    given = evaluate(
        here / "runs" / "mel" / "best",
        here / "held",
        tmp_path / "b",
        dataclasses.replace(config, train_data=str(tmp_path / "train")),
    ).record
    assert str(tmp_path / "train") in known["baselines"]["fitted_to"]
    assert [row["trained_on"] for row in known["clips"]] == [False] * 3
    assert known["bits"] == given["bits"]
    assert known["baselines"]["linear"] == given["baselines"]["linear"]


def test_halves_of_the_clips_serve_each_other(here: Path, made: Evaluation, tmp_path: Path):
    """The bits of the second clip come from a fit to the first and the third."""
    (tmp_path / "train").mkdir()
    for name in ("0.wav", "2.wav"):
        shutil.copy(here / "held" / name, tmp_path / "train" / name)
    config = dataclasses.replace(FAST, clips=0, train_data=str(tmp_path / "train"))
    found = evaluate(
        here / "runs" / "mel" / "best", here / "held" / "1.wav", tmp_path / "out", config
    )
    assert found.record["clips"][0]["bits"] == pytest.approx(made.record["clips"][1]["bits"])


def test_one_clip_alone_has_no_baselines(here: Path, tmp_path: Path):
    config = dataclasses.replace(FAST, clips=0)
    found = evaluate(
        here / "runs" / "mel" / "best", here / "held" / "1.wav", tmp_path / "out", config
    )
    assert set(found.bits) == {"model", "uniform"}
    assert any("--train-data" in note for note in found.record["notes"])
    assert found.record["bits"]["model"]["low"] is None


def test_levels_are_treated_as_in_training(here: Path, tmp_path: Path):
    checkpoint = run_of(here, tmp_path / "run", data="gone", normalise="peak", trim_silence=40.0)
    config = dataclasses.replace(FAST, clips=1)
    found = evaluate(checkpoint, here / "held", tmp_path / "out", config)
    assert any(
        "treated as in training: level by peak, ends 40 dB" in note
        for note in found.record["notes"]
    )
    row = next(row for row in found.record["clips"] if "audio" in row)
    heard = audio.read(found.folder / row["audio"]["original"])
    assert (
        row["samples"] < clip(0).size - RATE // 20
    )  # of a fifth of a second of silence, and a fade
    assert float(heard.abs().max()) == pytest.approx(0.9, abs=0.1)


def test_a_damaged_recording_for_the_baselines_is_passed_over(here: Path, tmp_path: Path):
    (tmp_path / "train").mkdir()
    for n in range(3):
        x = clip(10 + n)
        x[500] = np.nan if n == 1 else x[500]
        soundfile.write(tmp_path / "train" / f"{n}.wav", x, RATE, "FLOAT")
    config = dataclasses.replace(FAST, clips=0, train_data=str(tmp_path / "train"))
    found = evaluate(here / "runs" / "mel" / "best", here / "held", tmp_path / "out", config).record
    assert set(found["bits"]) == {"model", "linear", "markov", "unigram", "uniform"}
    assert any(note.startswith("the baselines pass over 1.wav: ") for note in found["notes"])
    assert found["baselines"]["seconds"] == pytest.approx((clip(10).size + clip(12).size) / RATE)
    for n in range(3):
        (tmp_path / "train" / f"{n}.wav").write_bytes((tmp_path / "train" / "1.wav").read_bytes())
    with pytest.raises(ValueError, match="none of the recordings for the baselines can be read"):
        evaluate(here / "runs" / "mel" / "best", here / "held", tmp_path / "none", config)
    assert not (tmp_path / "none").exists()


def test_what_earlier_reports_hold_is_no_clip(here: Path, tmp_path: Path):
    """Their sound, and the strip of a table of models; folders of these names beside no report are data."""
    shutil.copytree(here / "held", tmp_path / "audio")
    config, model = dataclasses.replace(FAST, clips=1), here / "runs" / "mel" / "best"
    first = evaluate(model, tmp_path, tmp_path / "reports" / "1", config).record
    (tmp_path / "table" / "strip").mkdir(parents=True)
    shutil.copy(here / "held" / "0.wav", tmp_path / "table" / "strip")
    (tmp_path / "table" / "models.json").write_text("{}")
    second = evaluate(model, tmp_path, tmp_path / "reports" / "2", config).record
    assert [row["name"] for row in second["clips"]] == [f"audio/{n}.wav" for n in range(3)]
    assert second["clips"] == first["clips"]
    assert "5 files are passed over: they are of earlier reports" in second["notes"]
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(ValueError, match="no recordings but those of earlier reports"):
        evaluate(model, tmp_path, tmp_path / "reports" / "3", config)
    config = dataclasses.replace(config, clips=0)
    asked = evaluate(model, tmp_path / "reports" / "1" / "audio", tmp_path / "asked", config).record
    assert len(asked["clips"]) == 4


def test_names_that_are_no_unicode(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Printed, in the page and, so that they come back, in the record."""
    name = "caf\udce9.wav"
    try:
        shutil.copytree(here / "held", tmp_path / "held")
        shutil.copy(here / "held" / "0.wav", tmp_path / "held" / name)
    except OSError:
        pytest.skip("the file system takes no such names")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr("sys.stdout", printed)
    monkeypatch.setattr(
        "sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    )
    words = (
        "evaluate",
        here / "runs" / "mel" / "best",
        tmp_path / "held",
        "--out",
        tmp_path / "out",
    )
    assert (
        main(
            [
                *map(str, words),
                "--clips",
                "4",
                "--seconds",
                "0.1",
                "--threads",
                "1",
                "--resamples",
                "200",
            ]
        )
        == 0
    )
    assert name in [row["name"] for row in Evaluation.read(tmp_path / "out").record["clips"]]
    assert "caf\\udce9.wav" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "caf\\udce9.wav: no PESQ" in printed.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    compare(tmp_path / "out", tmp_path / "out", tmp_path / "c")
    assert "caf\\udce9.wav" in (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")


def test_scoring_keeps_to_the_threads(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from wavear.evaluation import run

    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def scored(*given: Any) -> Any:
        seen.append(torch.get_num_threads())
        return bits(*given)

    bits = run.score_recording
    monkeypatch.setattr(run, "score_recording", scored)
    try:
        evaluate(
            here / "runs" / "mel" / "best",
            here / "held",
            tmp_path / "out",
            dataclasses.replace(FAST, clips=0),
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"normalise": "rms"}, "level by rms"), ({"trim_silence": 30.0}, "ends 30 dB down cut")],
    ids=["level", "ends"],
)
def test_levels_and_ends_are_treated_alone(
    here: Path, tmp_path: Path, settings: dict[str, Any], says: str
):
    checkpoint = run_of(here, tmp_path / "run", data="gone", **settings)
    found = evaluate(
        checkpoint, here / "held", tmp_path / "out", dataclasses.replace(FAST, clips=0)
    )
    assert f"treated as in training: {says}" in found.record["notes"]


def test_levels_by_speaker_are_those_of_training(here: Path, tmp_path: Path):
    """Of the speakers that the run knew; of the others by these clips, and the report says so."""
    checkpoint = run_of(
        here, tmp_path / "run", data="gone", normalise="peak", normalise_by="speaker"
    )
    path = tmp_path / "run" / "train.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": {"gains": {"ann": 0.25}}}))
    for data, says in {
        "by_speaker": "the speakers' gains are those of the training for 1 of 2 and of these clips for the others",
        "held": "but one gain for all, since no speakers are named",
    }.items():
        out = tmp_path / data
        config = dataclasses.replace(SHORT, clips=3)
        found = evaluate(checkpoint, here / data, out, config).record
        assert f"treated as in training: level by peak for each speaker; {says}" in found["notes"]
        peaks = {
            n: 0.9 / float(audio.read(here / "held" / f"{n}.wav").abs().max()) for n in range(3)
        }
        gains = [0.25, 0.25, peaks[1]] if data == "by_speaker" else [min(peaks.values())] * 3
        for row, gain in zip(found["clips"], gains, strict=True):
            x = audio.read(here / data / row["name"])[: row["synthesized_samples"]] * gain
            assert torch.allclose(
                audio.read(out / row["audio"]["original"]), x, atol=2 / 32768, rtol=0
            )
    path.write_text(json.dumps(record))
    config = dataclasses.replace(FAST, clips=0, train_data=str(here / "by_speaker"))
    (tmp_path / "two" / "ann").mkdir(parents=True)
    audio.write(tmp_path / "two" / "ann" / "0.wav", clip(7), RATE)
    found = evaluate(checkpoint, tmp_path / "two", tmp_path / "out", config).record
    assert any("those of the training are not known" in note for note in found["notes"])


def test_recordings_for_baselines_have_gains_by_speaker(here: Path):
    from wavear.evaluation.clips import Preparation, open_clips_for_fitting

    prepared = Preparation("peak", "speaker", gains={"bob": 0.5})
    found = open_clips_for_fitting(str(here / "by_speaker"), RATE, 1, prepared)
    assert [r.speaker for r in found] == ["ann", "ann", "bob"]
    assert found[0].gain == found[1].gain != found[2].gain == 0.5


def test_clips_of_the_training_are_found_in_shards_and_data_that_are_gone_are_told(
    here: Path, tmp_path: Path
):
    from wavear.data.shards import write_shards

    shards = write_shards(here / "held", tmp_path / "shards")
    assert len(shards.shards) == 1
    pattern, config = str(tmp_path / "shards" / "*.tar"), dataclasses.replace(FAST, clips=0)
    checkpoint = run_of(here, tmp_path / "run", data=pattern, validation=str(here / "held"))
    found = evaluate(checkpoint, pattern, tmp_path / "a", config).record
    assert [row["trained_on"] for row in found["clips"]] == [True] * 3
    checkpoint = run_of(here, tmp_path / "moved", data="data/elsewhere")
    found = evaluate(checkpoint, here / "held", tmp_path / "b", config).record
    assert (
        "whether clips were trained on is not known: of its data, data/elsewhere is not here"
        in found["notes"]
    )


# ---- other kinds of models and data


def test_a_model_without_mels_has_bits_and_free_samples(here: Path, tmp_path: Path):
    config = dataclasses.replace(FAST, seconds=0.05)
    found = evaluate(here / "runs" / "free" / "best", here / "held", tmp_path / "out", config)
    assert found.record["measures"] == {}
    assert any("not conditioned on mels" in note for note in found.record["notes"])
    assert [entry["seed"] for entry in found.record["free"]] == [0, 1]
    model = wavear.load(here / "runs" / "free" / "best")
    alone = wavear.generate(model, samples=400, seed=1)[0]
    assert torch.allclose(
        audio.read(found.folder / "audio" / "free-1.wav"), alone, atol=1.01 / 32768, rtol=0
    )
    assert "not conditioned on mels" in found.page.read_text(encoding="utf-8")


def test_speakers_go_by_their_folders(here: Path, tmp_path: Path):
    found = evaluate(
        here / "runs" / "speakers" / "best", here / "by_speaker", tmp_path / "out", SHORT
    ).record
    model = wavear.load(here / "runs" / "speakers" / "best")
    assert set(found["by_speaker"]) == {"ann", "bob"}
    for name, number in (("ann", 0), ("bob", 1)):
        nats = [
            wavear.score(model, audio.read(p), speaker=number)
            for p in (here / "by_speaker" / name).glob("*")
        ]
        bits = -sum(float(n.sum()) for n in nats) / sum(n.numel() for n in nats) / np.log(2)
        assert found["by_speaker"][name]["bits"]["model"]["mean"] == pytest.approx(bits)
    (tmp_path / "more" / "eve").mkdir(parents=True)
    shutil.copytree(here / "by_speaker", tmp_path / "more", dirs_exist_ok=True)
    audio.write(tmp_path / "more" / "eve" / "0.wav", clip(0), RATE)
    config = dataclasses.replace(FAST, clips=0)
    found = evaluate(
        here / "runs" / "speakers" / "best", tmp_path / "more", tmp_path / "out2", config
    ).record
    assert found["failed"] == {"eve/0.wav": "its speaker is 'eve', the model knows ann, bob"}
    assert len(found["clips"]) == 3


def test_bad_clips_are_named_and_others_are_resampled(here: Path, tmp_path: Path):
    folder = tmp_path / "clips"
    shutil.copytree(here / "held", folder)
    (folder / "words.wav").write_text("no audio")
    audio.write(folder / "brief.wav", np.full(20, 0.1, np.float32), RATE)
    audio.write(folder / "high.wav", audio.resample(clip(5), RATE, 16000), 16000)
    said: list[str] = []
    complaints: list[str] = []
    found = evaluate(
        here / "runs" / "mel" / "best",
        folder,
        tmp_path / "out",
        dataclasses.replace(FAST, clips=4, seconds=0.1),  # too short for PESQ, say
        say=said.append,
        complain=complaints.append,
    ).record
    assert set(found["failed"]) == {"words.wav", "brief.wav"}
    assert {line.split(":")[0] for line in complaints} == {"words.wav", "brief.wav"}
    assert [row["name"] for row in found["clips"]] == ["0.wav", "1.wav", "2.wav", "high.wav"]
    assert any("1 of 4 clips are resampled to 8000 Hz (from 16000 Hz)" in line for line in said)
    assert any(line.startswith("0.wav: no PESQ: ") for line in said)
    assert all({"pesq", "stoi"} <= set(row["not_measured"]["model"]) for row in found["clips"])


def test_of_a_manifest_what_is_not_for_training_counts(here: Path, tmp_path: Path):
    rows = [
        "path,split,speaker",
        "held/0.wav,train,ann",
        "held/1.wav,dev,bob",
        "held/2.wav,test,bob",
    ]
    (here / "list.csv").write_text("\n".join(rows))
    found = evaluate(
        here / "runs" / "mel" / "best",
        here / "list.csv",
        tmp_path / "o",
        dataclasses.replace(FAST, clips=0),
    )
    assert [row["name"] for row in found.record["clips"]] == ["held/1.wav", "held/2.wav"]
    assert list(found.record["by_speaker"]) == ["bob"]


# ---- what is refused


def test_refusals(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(here)
    (here / "void").mkdir(exist_ok=True)
    good, out = "runs/mel/best", tmp_path / "out"
    for words, arguments in {
        "nowhere: no such directory": ("nowhere", "held"),
        "no such folder or manifest": (good, "nowhere"),
        "void holds no audio files": (good, "void"),
        "speaker is 1, and the model was trained without": (good, "held", "--speaker", "1"),
        "speaker is 2, the model knows 0 to 1": (
            "runs/speakers/best",
            "by_speaker",
            "--speaker",
            "2",
        ),
        "lies in no sub-folder": ("runs/speakers/best", "held"),
        "engine is 'steam'": (good, "held", "--engine", "steam"),
        "weights is 'int3'": (good, "held", "--weights", "int3"),
        "nothing but the evaluated clips": (good, "held", "--train-data", "held"),
    }.items():
        assert words in refused(capsys, "evaluate", *arguments, "--out", out)
        assert not out.exists()
    assert "device is 'abacus'" in refused(
        capsys, "evaluate", good, "held", "--out", out, "--device", "abacus", status=2
    )
    assert "clips is -1" in refused(
        capsys, "evaluate", good, "held", "--out", out, "--clips", "-1", status=2
    )
    assert "seconds is 0" in refused(
        capsys, "evaluate", good, "held", "--out", out, "--seconds", "0", status=2
    )


def test_nothing_is_overwritten_unasked(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    checkpoint, out = here / "runs" / "mel" / "best", tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "out is not empty" in refused(
        capsys, "evaluate", checkpoint, here / "held", "--out", out
    )
    said = refused(capsys, "evaluate", checkpoint, here / "held", "--out", out, "--overwrite")
    assert "holds nothing of ours" in said
    assert "is a file" in refused(
        capsys, "evaluate", checkpoint, here / "held", "--out", out / "precious.txt"
    )
    config = dataclasses.replace(FAST, clips=1, overwrite=True)
    (out / "evaluation.json").write_text("{}")  # one that was cut short
    evaluate(checkpoint, here / "held", out, config)
    inside = out / "audio"
    assert "which the evaluation replaces" in refused(
        capsys, "evaluate", checkpoint, inside, "--out", out, "--overwrite"
    )
    evaluate(checkpoint, here / "held" / "1.wav", out, config)
    assert (out / "precious.txt").read_text() == "mine"
    assert [path.name[:4] for path in inside.iterdir()] == ["0000"]
    assert len(Evaluation.read(out).record["clips"]) == 1


def test_an_evaluation_that_cannot_begin_leaves_the_earlier_one(here: Path, tmp_path: Path):
    shutil.copytree(here / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "void").mkdir()
    config = dataclasses.replace(FAST, overwrite=True)
    with pytest.raises(ValueError, match="holds no audio"):
        evaluate(here / "runs" / "mel" / "best", tmp_path / "void", tmp_path / "out", config)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


# ---- compare


def test_a_model_is_no_different_from_itself(here: Path, made: Evaluation, tmp_path: Path):
    found = compare(here / "out", here / "out" / "evaluation.json", tmp_path / "c").record
    for entry in (found["bits"], *found["measures"].values()):
        assert entry["difference"] == {
            "mean": 0.0,
            "low": 0.0,
            "high": 0.0,
            "clips": entry["difference"]["clips"],
        }
        assert entry["a"] == entry["b"]


def test_differences_are_of_pairs(made: Evaluation):
    """b is 0.1 bits better in each clip, by whatever clips differ among themselves: the interval has no width."""
    other = json.loads(json.dumps(made.record))
    for row in other["clips"]:
        row["bits"]["model"] -= 0.1
        if "measures" in row:
            row["measures"]["model"]["mcd"] += 1.5
    found = paired(made.record, other)
    assert found["bits"]["difference"] == pytest.approx(
        {"mean": -0.1, "low": -0.1, "high": -0.1, "clips": 3}
    )
    assert found["bits"]["a"]["high"] - found["bits"]["a"]["low"] > 1e-3
    assert found["bits"]["better"] == 3
    assert found["measures"]["mcd"]["difference"]["mean"] == pytest.approx(1.5)
    assert found["measures"]["mcd"]["better"] == 0
    assert found["bits"]["b"]["mean"] == pytest.approx(made.bits["model"] - 0.1)


def test_two_checkpoints_on_the_command_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ("--clips", "1", "--seconds", "0.3", "--threads", "1")
    a, b, out = here / "runs" / "mel" / "best", here / "runs" / "other" / "best", tmp_path / "c"
    assert (
        main([str(w) for w in ("compare", a, b, "--data", here / "held", "--out", out, *flags)])
        == 0
    )
    printed = capsys.readouterr().out
    one, two = Evaluation.read(out / "a"), Evaluation.read(out / "b")
    difference = two.bits["model"] - one.bits["model"]
    record = json.loads((out / "compare.json").read_text())
    assert record["bits"]["difference"]["mean"] == pytest.approx(difference)
    assert f"b less a {difference:+.4f}" in printed
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    assert page.count("<audio") == 3
    assert str(b) in page
    assert f"report: {out / 'compare.html'}" in printed


def test_what_cannot_be_compared_is_refused(
    here: Path,
    made: Evaluation,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(here)
    out = tmp_path / "c"
    coarse = ("compare", "runs/mel/best", "runs/coarse/best", "--data", "held", "--out", out)
    monkeypatch.setattr(
        "wavear.evaluation.run.measure_everything", lambda *_, **__: pytest.fail("it began to work")
    )
    with pytest.raises(ValueError, match="a has 256 mu-law codes and b has 64"):
        compare(*coarse[1:3], out, "held")
    assert "two models or more" in refused(
        capsys, "compare", "runs/mel/best", "--data", "held", "--out", out
    )
    assert "are of 4000 and 8000 Hz" in refused(
        capsys,
        "compare",
        "runs/mel/best",
        "runs/free/best",
        "runs/slow/best",
        "--data",
        "held",
        "--out",
        out,
    )
    assert "pass --data" in refused(capsys, "compare", "out", "runs/mel/best", "--out", out)
    assert "need no --data" in refused(
        capsys, "compare", "out", "out", "--data", "held", "--out", out
    )
    assert "nowhere: no such directory" in refused(
        capsys, "compare", "out", "nowhere", "--data", "held", "--out", out
    )
    assert "nowhere.json: no such evaluation" in refused(
        capsys, "compare", "out", "nowhere.json", "--out", out
    )
    assert not out.exists()

    def changed(change: Any) -> dict[str, Any]:
        record = json.loads(json.dumps(made.record))
        change(record)
        return record

    for words, change in {
        "2.wav is a clip of a alone": lambda r: r["clips"].pop(),
        "0.wav is not the same audio": lambda r: r["clips"][0].update(digest="0"),
        "in different orders": lambda r: r["clips"].reverse(),
        "up to 0.6 s of each clip and b up to 3 s": lambda r: r["settings"].update(seconds=3.0),
        "a has 8000 Hz and b has 16000": lambda r: r["checkpoint"]["config"].update(
            sample_rate=16000
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            paired(made.record, changed(change))
    noted = paired(made.record, changed(lambda r: r["settings"].update(temperature=0.8)))["notes"]
    assert noted == ["temperature is 1.0 in a and 0.8 in b: it differs besides the model"]


# ---- models of any quantisation


def test_bits_on_the_common_grid_are_those_of_16_bit_samples(here: Path, made: Evaluation):
    """Counted one by one: P(16-bit value) = P(its mu-law code) / how many values have that code."""
    model = wavear.load(here / "runs" / "mel" / "best")
    every = wavear.mulaw_encode(torch.arange(-32768, 32768) / 32768)
    found, samples = 0.0, 0
    for row in made.record["clips"]:
        x = audio.read(here / "held" / row["name"])
        alike = torch.tensor([int((every == code).sum()) for code in wavear.mulaw_encode(x)[:500]])
        nats = wavear.score(model, x)[0]
        brute = -nats[:500] / np.log(2) + torch.log2(alike.double())
        counts = torch.bincount(every, minlength=256).double().log2()
        whole = -nats / np.log(2) + counts[wavear.mulaw_encode(x)]
        torch.testing.assert_close(whole[:500], brute)
        assert row["common_bits"] == pytest.approx(float(whole.mean()))
        found, samples = found + float(whole.sum()), samples + x.numel()
    assert made.record["common_bits"]["mean"] == pytest.approx(found / samples)


def test_models_of_any_quantisation_stand_in_one_table(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wavear.evaluation.model_table._SPEED_SECONDS", 0.05)
    out = tmp_path / "table"
    sources = [str(here / "runs" / name / "best") for name in ("mel", "mixture", "coarse", "free")]
    words = ["--clips", "1", "--seconds", "0.3", "--resamples", "200"]
    assert main(["compare", *sources, "--data", str(here / "held"), "--out", str(out), *words]) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "models.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["models"]}
    assert list(rows) == ["mel", "mixture", "coarse", "free"]
    assert rows["mixture"]["grid"] == "16-bit linear"
    assert rows["mixture"]["common_bits"] == rows["mixture"]["bits"]
    assert rows["mel"]["mulaw_bits"] == rows["mel"]["bits"]
    assert rows["mixture"]["mulaw_bits"]["mean"] < rows["mixture"]["bits"]["mean"] - 2
    finer = rows["coarse"]["mulaw_bits"]["mean"] - rows["coarse"]["bits"]["mean"]
    assert 1 < finer < np.log2(10)  # 2 to 10 of the 256 codes lie in one of the 64
    assert rows["mel"]["common_bits"]["mean"] > rows["mel"]["bits"]["mean"] + 2
    assert rows["free"]["multiply_adds"] == wavear.load(sources[3]).multiply_adds
    assert all(row["speed"]["reference"] > 0 and row["speed"]["numba"] > 0 for row in rows.values())
    page = (out / "models.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) == []
    head = re.search(r"<thead>(.*?)</thead>", page).group(1)  # type: ignore[union-attr]
    titles = re.findall(r"<th[^>]*>(.*?)</th>", head)
    assert titles[2:] == [
        "256 mu-law codes",
        "16-bit linear",
        "64 mu-law codes",
        "on 16-bit samples",
        "on 256 mu-law codes",
    ]
    assert "mixture: " in printed
    whole = audio.read(out / "strip" / "recording.wav")
    for n in range(4):
        made = audio.read(out / "strip" / f"{n}.wav")
        assert made.numel() == whole.numel()
        prime = round(record["strip"]["prime_seconds"] * RATE)
        assert torch.equal(made[:prime], whole[:prime])
        assert not torch.equal(made[prime:], whole[prime:])
    # From evaluations alone: no strip, and two of one grid where the table is asked for.
    again = tmp_path / "again"
    assert main(["compare", str(out / "1"), str(out / "4"), "--models", "--out", str(again)]) == 0
    assert json.loads((again / "models.json").read_text(encoding="utf-8"))["strip"] is None


def test_a_table_is_of_the_same_clips(here: Path, made: Evaluation):
    from wavear.evaluation.model_table import check_same_clips

    def changed(change: Any) -> Evaluation:
        record = json.loads(json.dumps(made.record))
        change(record)
        return Evaluation(record, made.folder)

    def renamed(record: dict[str, Any]) -> None:
        for row in record["clips"]:
            row["name"] = f"other/{row['name']}"

    def coarse(record: dict[str, Any]) -> None:
        record["checkpoint"]["grid"] = "64 mu-law codes"
        record["clips"][0]["digest"] = "0"  # of other codes

    def trimmed(record: dict[str, Any]) -> None:
        record["data"]["treated"] = ["ends 40 dB down cut"]
        record["clips"][0]["samples"] -= 100

    assert check_same_clips([], []) == check_same_clips(["a", "b"], [made, made]) == []
    assert check_same_clips(["a", "b"], [made, changed(coarse)]) == []
    for words, change in {
        r"evaluated on other clips \(0\.wav, other/0\.wav": renamed,
        r"1\.wav is not the same audio in the evaluations of a and b": lambda r: r["clips"][
            1
        ].update(samples=7),
        r"2\.wav is not the same audio": lambda r: r["clips"][2].update(digest="0"),
    }.items():
        with pytest.raises(ValueError, match=words):
            check_same_clips(["a", "b"], [made, changed(change)])
    notes = check_same_clips(["a", "b"], [made, changed(lambda r: r["clips"].pop(0))])
    assert notes == ["b: its numbers are without 0.wav, which others have"]
    (note,) = check_same_clips(["a", "b"], [made, changed(trimmed)])
    assert note.startswith(
        "b (ends 40 dB down cut) and a (untreated) were not evaluated on the same audio"
    )


def test_a_run_whose_name_is_no_unicode_stands_in_the_plot(made: Evaluation):
    from wavear.evaluation.model_table import name_models, row
    from wavear.evaluation.pictures import costs

    record = json.loads(json.dumps(made.record))
    record["checkpoint"]["source"] = "runs/caf\udce9/best"
    names = name_models([made, Evaluation(record, made.folder)], ["mel", "runs/caf\udce9/best"])
    assert names == ["mel", "caf\\udce9"]
    assert costs([row(name, made, None) for name in names]) is not None


def test_bits_of_pre_emphasised_codes_have_a_column_of_their_own(made: Evaluation):
    from wavear.evaluation.model_table import row

    record = json.loads(json.dumps(made.record))
    record["checkpoint"]["config"]["pre_emphasis"] = 0.85
    grids = [
        row("x", evaluation, None)["grid"] for evaluation in (made, Evaluation(record, made.folder))
    ]
    assert grids == ["256 mu-law codes", "256 mu-law codes, pre-emphasis 0.85"]


def test_a_table_of_other_clips_is_refused_before_the_work(
    here: Path, made: Evaluation, tmp_path: Path, monkeypatch
):
    from wavear.evaluation.evaluation import compare_models

    monkeypatch.setattr(
        "wavear.evaluation.run.measure_everything", lambda *_, **__: pytest.fail("it began to work")
    )
    (tmp_path / "more").mkdir()
    audio.write(tmp_path / "more" / "9.wav", clip(9), RATE)
    sources = [made.folder, here / "runs" / "coarse" / "best", here / "runs" / "free" / "best"]
    with pytest.raises(ValueError, match=r"was evaluated on other clips than .*more holds"):
        compare_models(sources, tmp_path / "out", tmp_path / "more")
    assert not (tmp_path / "out").exists()


def test_a_table_without_a_strip_where_none_can_be_made(here: Path, tmp_path: Path, monkeypatch):
    """Frames that end together after more than the strip's two seconds; clips below a quarter of a second."""
    from wavear.evaluation.evaluation import compare_models
    from wavear.evaluation.model_table import Beginning, find_beginning

    assert "mel frames of 256, 275 samples end together after 8.8 s" in str(
        find_beginning(here / "held", RATE, [275, 256])
    )
    found = find_beginning(here / "held", RATE, [64, 40])
    assert isinstance(found, Beginning)
    assert found.waveform.numel() % 320 == 0
    assert found.prime == RATE // 2 or found.prime == found.waveform.numel() // 2
    monkeypatch.setattr("wavear.evaluation.model_table._SPEED_SECONDS", 0.05)
    (tmp_path / "short").mkdir()
    for n in range(2):
        audio.write(tmp_path / "short" / f"{n}.wav", clip(n)[RATE // 5 : RATE // 5 + 1500], RATE)
    sources = [here / "runs" / name / "best" for name in ("mel", "coarse")]
    config = dataclasses.replace(FAST, clips=0)
    table = compare_models(sources, tmp_path / "out", tmp_path / "short", config)
    assert table.record["strip"] is None
    assert any(
        note.startswith("nothing was made after the same beginning: ")
        for note in table.record["notes"]
    )
    assert "nothing was made after the same beginning" in (
        tmp_path / "out" / "models.html"
    ).read_text("utf-8")


def test_a_comparison_is_no_evaluation(
    here: Path, made: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture
):
    compare(here / "out", here / "out", tmp_path / "side")
    said = refused(
        capsys, "compare", tmp_path / "side" / "compare.json", here / "out", "--out", tmp_path / "c"
    )
    assert "compare.json is no evaluation of one model" in said


def test_clips_that_were_passed_over_show_in_the_status(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(here / "held", tmp_path / "held")
    (tmp_path / "held" / "words.wav").write_text("no audio")
    flags = ("--clips", "0", "--threads", "1", "--resamples", "200")
    a, b = here / "runs" / "mel" / "best", here / "runs" / "other" / "best"
    words = [str(w) for w in ("evaluate", a, tmp_path / "held", "--out", tmp_path / "a", *flags)]
    assert main(words) == 1
    assert "words.wav: " in capsys.readouterr().err
    words = [
        str(w)
        for w in ("compare", a, b, "--data", tmp_path / "held", "--out", tmp_path / "c", *flags)
    ]
    assert main(words) == 1
    assert (tmp_path / "c" / "compare.html").is_file()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it is not JSON"),
        ("{}", "no finished evaluation"),
        ('{"bits": {}, "format": 99}', "has format 99"),
    ],
)
def test_damaged_evaluations_are_named(tmp_path: Path, content: str, words: str):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        Evaluation.read(tmp_path)


def test_the_command_that_is_shown_makes_it_again():
    config = EvaluateConfig(train_data="a b", clips=3, temperature=0.7, overwrite=True)
    assert config.flags() == [
        "--train-data",
        "a b",
        "--clips",
        "3",
        "--temperature",
        "0.7",
        "--overwrite",
    ]
    assert set(MEASURES) >= {
        "stft_distance",
        "mcd",
        "f0_rmse",
        "voicing_error",
        "pesq",
        "stoi",
        "noise_floor",
    }
