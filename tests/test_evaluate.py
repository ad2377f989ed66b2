"""`wavear evaluate`: correct numbers, a self-contained page, and refusals."""

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
from evaluate_cases import (
    BITS,
    FAST,
    FLAGS,
    MEL,
    RATE,
    REAL,
    SHOWN,
    changed,
    clip,
    command,
    outside,
    refused,
)
from evaluate_cases import here as here
from evaluate_cases import made as made
from evaluate_cases import stubs as stubs

import wavear
from wavear import EvaluateConfig, Evaluation, audio, compare, evaluate
from wavear.evaluation import metrics, model_table, run
from wavear.evaluation.comparison import paired
from wavear.evaluation.metrics import measure

# ---- the numbers


def test_bits_equal_score_over_all_samples(here: Path, made: Evaluation):
    model = wavear.load(here / "mel")
    bits, samples = 0.0, 0
    for row in made.clips:
        nats = wavear.score(model, audio.read(here / "held" / row.name))
        assert row.bits["model"] == pytest.approx(float(-nats.mean()) / np.log(2))
        bits, samples = bits - float(nats.sum()) / np.log(2), samples + nats.numel()
    assert made.bits["model"] == pytest.approx(bits / samples)
    assert set(made.bits) == {"model", "linear", "markov", "unigram", "uniform"}
    assert made.bits["uniform"] == 8


def test_audio_equals_generate_and_measures_equal_the_packages(here: Path, tmp_path: Path):
    """The only test with the real pYIN, PESQ and STOI."""
    with pytest.MonkeyPatch.context() as real:
        for name, value in REAL.items():
            real.setattr(metrics, name, value)
        real.setattr(run, "pitch", REAL["pitch"])
        made = evaluate(here / "mel", here / "held", tmp_path / "out", FAST)
        model = wavear.load(here / "mel")
        rows = [row for row in made.clips if row.audio]
        assert [row.name for row in rows] == ["0.wav", "2.wav"]  # two of three, evenly
        for row in rows:
            assert row.audio is not None
            x = audio.read(here / "held" / row.name)[: round(FAST.seconds * RATE) // 64 * 64]
            assert row.synthesized_samples == x.numel()
            alone = wavear.generate(model, wavear.log_mel(x[None], MEL), seed=0)[0]
            written = audio.read(made.folder / row.audio["model"])
            assert torch.allclose(written, alone, atol=1.01 / 32768, rtol=0)
            assert torch.allclose(audio.read(made.folder / row.audio["original"]), x, atol=1e-6)
            values, missing = measure(x.numpy(), alone.numpy(), RATE)
            assert row.measured == pytest.approx(values)
            assert (row.not_measured or {}).get("model", {}) == missing
    for name, found in made.record["measures"].items():
        for system, entry in found.items():
            each = [(row.measures or {})[system] for row in rows]
            if all(name in values for values in each):
                mean = np.mean([values[name] for values in each])
                assert entry["mean"] == pytest.approx(mean)


def test_particles_are_those_of_generate(here: Path, tmp_path: Path):
    config = dataclasses.replace(FAST, clips=1, particles=3)
    made = evaluate(here / "mel", here / "held", tmp_path / "out", config)
    (row,) = [row for row in made.clips if row.audio]
    x = audio.read(here / "held" / row.name)[: round(FAST.seconds * RATE) // 64 * 64]
    model, mel = wavear.load(here / "mel"), wavear.log_mel(x[None], MEL)
    assert row.audio is not None
    written = audio.read(made.folder / row.audio["model"])
    three, one = (wavear.generate(model, mel, seed=0, particles=n)[0] for n in (3, 1))
    assert torch.allclose(written, three, atol=1.01 / 32768, rtol=0)
    assert not torch.allclose(written, one, atol=1e-2, rtol=0)


def test_the_record_has_the_bounds_of_each_measure(made: Evaluation):
    found = made.record["measures"]
    for name in ("stft_distance", "mcd"):
        assert set(found[name]) == {"mulaw", "model", "griffin_lim"}
        assert found[name]["mulaw"]["mean"] < found[name]["model"]["mean"]
    assert set(found["noise_floor"]) == {"original", "mulaw", "model", "griffin_lim"}
    assert found["noise_floor"]["original"]["mean"] == pytest.approx(-80, abs=2)
    assert found["noise_floor"]["model"]["mean"] > -40  # the model is untrained


def test_verdict_compares_the_means_with_griffin_lim(tmp_path: Path):
    measures = {
        "pesq": {"model": {"mean": 2.0}, "griffin_lim": {"mean": 1.5}},  # higher is better
        "stoi": {"model": {"mean": 0.8}, "griffin_lim": {"mean": 0.9}},
        "mcd": {"model": {"mean": 4.0}, "griffin_lim": {"mean": 5.0}},  # lower is better
        "log_mel": {"model": {"mean": 0.4}, "griffin_lim": {"mean": 0.4}},
        "hnr_low": {"model": {"mean": 1.0}, "griffin_lim": {"mean": 2.0}},  # neither
    }
    expected = (
        "compared with Griffin-Lim: better on PESQ, Mel-cepstral distortion; worse on STOI; equal"
        " on Log-mel distance"
    )
    assert Evaluation({"measures": measures}, tmp_path).verdict == expected
    assert Evaluation({"measures": {}}, tmp_path).verdict == ""


def test_verdict_is_at_the_top_of_page_and_summary(made: Evaluation):
    assert made.verdict.startswith("compared with Griffin-Lim: ")
    assert made.summary()[0] == made.verdict
    page = made.page.read_text(encoding="utf-8")
    assert page.index(made.verdict[1:]) < page.index("Bits per sample")


def test_the_same_seed_gives_the_same_evaluation(here: Path, made: Evaluation, tmp_path: Path):
    again = evaluate(here / "mel", here / "held", tmp_path / "again", SHOWN)
    varying = ("created", "command", "generation")
    first, second = ({k: v for k, v in e.record.items() if k not in varying} for e in (made, again))
    assert first == second
    read = Evaluation.read(tmp_path / "again")
    assert read.record == json.loads(json.dumps(again.record))
    assert read.clips[0].to_dict() == read.record["clips"][0]


# ---- the page


def test_the_page_is_self_contained(made: Evaluation):
    page = made.page.read_text(encoding="utf-8")
    assert outside(page) == []
    assert made.record["command"] in page
    assert f"{made.bits['model']:.3f}".replace(".", '</span><span class="f">.') in page
    assert page.count("<audio") == 2 * 4
    assert page.count("data:image/png") == 2 * 2  # there is no metrics.csv
    rows = sorted(
        (row for row in made.clips if row.audio), key=lambda row: row.measured["stft_distance"]
    )
    paths = [(row.audio or {})[s] for row in rows for s in run.SYSTEMS]
    sounds = re.findall(r"data:audio/flac;base64,([^\"]+)", page)
    for sound, path in zip(sounds, paths, strict=True):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")
        assert rate == RATE
        assert np.array_equal(samples, soundfile.read(made.folder / path, dtype="int16")[0])


def test_markup_in_names_is_escaped(made: Evaluation, tmp_path: Path):
    from wavear.evaluation import pages

    name = "<b>&amp;'\".wav"

    def rename(record: dict[str, Any]) -> None:
        for row in record["clips"]:
            row["name"] = name
        record["checkpoint"]["source"] = record["data"]["source"] = record["command"] = name
        record["by_speaker"] = {name: {"samples": 1, "bits": record["bits"]}}
        record["failed"], record["notes"] = {name: name}, [name]
        del record["measures"]["pesq"], record["measures"]["stoi"]

    bad = changed(made, rename)
    compared = paired(bad.record, bad.record)
    for side in ("a", "b"):
        compared[side]["source"] = name
    table = {"data": name, "models": [model_table.row(name, bad, None)], "notes": [name]}
    table |= {"strip": None, "command": name}
    report = pages.report(bad.record, bad.folder, None)
    assert re.search(r"Not measured: .*PESQ,\s+STOI \(see the clips", report, re.DOTALL)
    for page in (
        report,
        pages.comparison(compared | {"command": name}, bad, bad),
        pages.model_table(table, bad.folder),
    ):
        assert "<b>&" not in page
        assert "&lt;b&gt;&amp;amp;&#39;&#34;.wav" in page


def test_training_curves_are_in_the_page(here: Path, tmp_path: Path):
    kept = tmp_path / "run" / "kept" / "7"  # one level deeper than best/
    shutil.copytree(here / "mel", kept)
    with (tmp_path / "run" / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "train_bits", "validation_bits", "something_new"])
        rows.writerows(
            [[step, 8 - step / 100, "" if step % 10 else 8 - step / 90, "x"] for step in range(50)]
        )
        file.write("50,7.")  # cut short
    found = evaluate(kept, here / "held", tmp_path / "out", BITS)
    page = found.page.read_text(encoding="utf-8")
    assert "<h2>Training</h2>" in page
    assert page.count("data:image/png") == 1
    assert found.record["measures"] == {}


# ---- other models and data


def test_names_that_are_not_unicode_are_escaped(here: Path, tmp_path: Path, capsys):
    """The record still restores the original name."""
    name = "caf\udce9.wav"
    try:
        shutil.copytree(here / "held", tmp_path / "held")
        shutil.copy(here / "held" / "0.wav", tmp_path / "held" / name)
    except OSError:
        pytest.skip("the file system refuses such names")
    out = tmp_path / "out"
    words = ("--clips", "2", "--seconds", "0.1", *FLAGS)
    assert command("evaluate", here / "mel", tmp_path / "held", "--out", out, *words) == 0
    assert name in [row.name for row in Evaluation.read(out).clips]
    assert "caf\\udce9.wav" in (out / "report.html").read_text(encoding="utf-8")
    compare(out, out, tmp_path / "c")
    assert "caf\\udce9.wav" in (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")


def test_scoring_uses_the_given_threads_and_restores_them(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before, seen, score = torch.get_num_threads(), [], run.score_recording
    torch.set_num_threads(2)

    def scored(*given: Any) -> Any:
        seen.append(torch.get_num_threads())
        return score(*given)

    monkeypatch.setattr(run, "score_recording", scored)
    try:
        evaluate(here / "mel", here / "held", tmp_path / "out", BITS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1]


def test_a_model_without_mels_has_bits_and_free_samples(here: Path, tmp_path: Path):
    config = dataclasses.replace(FAST, seconds=0.05)
    found = evaluate(here / "free", here / "held", tmp_path / "out", config)
    assert found.record["measures"] == {}
    assert [entry["seed"] for entry in found.record["free"]] == [0, 1]
    alone = wavear.generate(wavear.load(here / "free"), samples=400, seed=1)[0]
    written = audio.read(found.folder / "audio" / "free-1.wav")
    assert torch.allclose(written, alone, atol=1.01 / 32768, rtol=0)
    page = found.page.read_text(encoding="utf-8")
    assert "not conditioned on mels" in page
    assert page.count("<audio") == 2


def test_speakers_come_from_folder_names(here: Path, tmp_path: Path):
    data = shutil.copytree(here / "by_speaker", tmp_path / "data")
    (data / "eve").mkdir()
    audio.write(data / "eve" / "0.wav", clip(0), RATE)
    config = dataclasses.replace(FAST, clips=1, seconds=0.1)
    found = evaluate(here / "speakers", data, tmp_path / "out", config).record
    assert found["failed"] == {"eve/0.wav": "its speaker is 'eve'; the model has ann, bob"}
    assert set(found["by_speaker"]) == {"ann", "bob"}
    model = wavear.load(here / "speakers")
    for number, name in enumerate(("ann", "bob")):
        paths = (data / name).glob("*")
        nats = [wavear.score(model, audio.read(path), speaker=number) for path in paths]
        bits = -sum(float(n.sum()) for n in nats) / sum(n.numel() for n in nats) / np.log(2)
        assert found["by_speaker"][name]["bits"]["model"]["mean"] == pytest.approx(bits)


def test_unusable_clips_are_named_and_other_rates_resampled(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = shutil.copytree(here / "held", tmp_path / "clips")
    (folder / "words.wav").write_text("no audio")
    audio.write(folder / "brief.wav", np.full(20, 0.1, np.float32), RATE)
    audio.write(folder / "high.wav", audio.resample(clip(5), RATE, 16000), 16000)
    out = tmp_path / "out"
    words = ("--clips", "4", "--seconds", "0.1", *FLAGS)
    assert command("evaluate", here / "mel", folder, "--out", out, *words) == 1
    err = capsys.readouterr().err
    found = Evaluation.read(out).record
    assert set(found["failed"]) == {"words.wav", "brief.wav"}
    assert re.findall(r"wavear: warning: (\S+): ", err) == ["brief.wav", "words.wav"]
    assert [row["name"] for row in found["clips"]] == ["0.wav", "1.wav", "2.wav", "high.wav"]
    assert "1 of 4 clips are resampled to 8000 Hz (from 16000 Hz)" in err
    assert re.findall(r"(.*): no PESQ: ", err) == ["4 clips"]  # one reason for all
    assert all({"pesq", "stoi"} <= set(row["not_measured"]["model"]) for row in found["clips"])


def test_quick_takes_ten_clips_and_two_measures(here: Path, tmp_path: Path):
    for number in range(13):
        noise = np.random.default_rng(number).normal(0, 0.1, 4000 if number else 6 * RATE)
        audio.write(tmp_path / f"{number:02}.wav", noise.astype(np.float32), RATE)
    out = tmp_path / "out"
    assert command("evaluate", here / "mel", tmp_path, "--out", out, "--quick", *FLAGS) == 0
    found = Evaluation.read(out).record
    assert [row["name"] for row in found["clips"]][::9] == ["00.wav", "12.wav"]  # evenly
    assert len(found["clips"]) == found["generation"]["clips"] == 10
    assert found["clips"][0]["synthesized_samples"] == 5 * RATE
    assert found["clips"][0]["samples"] == 6 * RATE
    first, second = (row["measures"]["model"] for row in found["clips"][:2])
    assert (set(first), set(second)) == ({"stoi", "mcd"}, {"mcd"})  # too short for STOI
    assert found["clips"][1]["not_measured"]["model"].keys() == {"stoi"}
    assert "Noise floor in silence (--quick)." in (out / "report.html").read_text()


def test_only_held_out_rows_of_a_manifest_are_evaluated(here: Path, tmp_path: Path):
    rows = [
        "path,split,speaker",
        "held/0.wav,train,ann",
        "held/1.wav,dev,bob",
        "held/2.wav,test,bob",
    ]
    (here / "list.csv").write_text("\n".join(rows))
    found = evaluate(here / "mel", here / "list.csv", tmp_path / "o", BITS)
    assert [row.name for row in found.clips] == ["held/1.wav", "held/2.wav"]
    assert list(found.record["by_speaker"]) == ["bob"]


# ---- refusals


def test_refusals(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(here)
    (here / "void").mkdir(exist_ok=True)
    out = tmp_path / "out"
    for words, arguments in {
        "nowhere: no such directory": ("nowhere", "held"),
        "no such folder or manifest": ("mel", "nowhere"),
        "void holds no audio files": ("mel", "void"),
        "speaker is 1; the model was trained without": ("mel", "held", "--speaker", "1"),
        "speaker is 2; the model has 0 to 1, or a name: ann, bob": (
            "speakers",
            "held",
            "--speaker",
            "2",
        ),
        "0.wav has no speaker. Put it into a sub-folder": ("speakers", "held"),
        "particles need a model of logarithmic mels": ("free", "held", "--particles", "2"),
        "engine is 'steam'": ("mel", "held", "--engine", "steam"),
        "weights is 'int3'": ("mel", "held", "--weights", "int3"),
        "has only the evaluated clips": ("mel", "held", "--train-data", "held"),
    }.items():
        assert words in refused(capsys, "evaluate", *arguments, "--out", out)
        assert not out.exists()
    for words, flags in {
        "device is 'abacus'": ("--device", "abacus"),
        "clips is -1": ("--clips", "-1"),
        "particles is 0": ("--particles", "0"),
        "seconds is 0": ("--seconds", "0"),
    }.items():
        assert words in refused(capsys, "evaluate", "mel", "held", "--out", out, *flags, status=2)


def test_only_overwrite_replaces_an_evaluation(here: Path, tmp_path: Path, capsys):
    checkpoint, out = here / "mel", tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    words = ("evaluate", checkpoint, here / "held", "--out")
    assert "out is not empty" in refused(capsys, *words, out)
    assert "has no evaluation.json" in refused(capsys, *words, out, "--overwrite")
    assert "is a file" in refused(capsys, *words, out / "precious.txt")
    config = dataclasses.replace(FAST, clips=1, seconds=0.1, overwrite=True)
    (out / "evaluation.json").write_text("{}")  # as after an interruption
    evaluate(checkpoint, here / "held", out, config)
    capsys.readouterr()
    inside = out / "audio"
    message = refused(capsys, "evaluate", checkpoint, inside, "--out", out, "--overwrite")
    assert "which the evaluation replaces" in message
    # An evaluation that cannot begin leaves the earlier one.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="holds no audio"):
        evaluate(checkpoint, tmp_path / "void", out, config)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    evaluate(checkpoint, here / "held" / "1.wav", out, config)
    assert (out / "precious.txt").read_text() == "mine"
    assert [path.name for path in inside.iterdir()] == ["0000-1"]
    assert len(Evaluation.read(out).clips) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it is not JSON"),
        ("{}", "not a finished evaluation"),
        ('{"bits": {}, "format": 99}', "has format 99"),
        ('{"bits": {}, "format": 1}', "not an evaluation of one model"),
    ],
)
def test_damaged_evaluations_are_refused_with_a_reason(tmp_path: Path, content: str, words: str):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        Evaluation.read(tmp_path)


def test_the_command_in_the_page_repeats_the_evaluation():
    config = EvaluateConfig(train_data="a b", clips=3, temperature=0.7, overwrite=True)
    flags = ["--train-data", "a b", "--clips", "3", "--temperature", "0.7", "--overwrite"]
    assert config.flags() == flags
