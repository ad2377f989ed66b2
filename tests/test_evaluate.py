"""`wavear evaluate` and `wavear compare`: correct numbers, self-contained pages, and refusals."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
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
    compare_models,
    evaluate,
)
from wavear.cli.commands import main
from wavear.demo.sounds import string, voice
from wavear.evaluation import metrics, model_table, run
from wavear.evaluation.clips import Preparation, open_clips, open_clips_for_fitting
from wavear.evaluation.comparison import paired
from wavear.evaluation.metrics import NotMeasured, measure
from wavear.evaluation.pictures import costs

RATE = 8000
MEL = MelConfig(
    sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=20, fmax=4000.0
)
FAST = EvaluateConfig(clips=2, seconds=0.6, threads=1, resamples=200, shown=0)
SHOWN = dataclasses.replace(FAST, shown=8)
BITS = dataclasses.replace(FAST, clips=0)
REAL = {name: getattr(metrics, name) for name in ("pitch", "pesq", "stoi")}
FLAGS = ("--threads", "1", "--resamples", "200", "--shown", "0")


def tiny(seed: int = 0, **settings: Any) -> WaveNet:
    torch.manual_seed(seed)
    sizes = dict.fromkeys(
        ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
    )
    settings = {"sample_rate": RATE, **sizes, **settings}
    return WaveNet(WaveNetConfig(layers=3, stacks=1, **settings)).eval()


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


def run_of(here: Path, folder: Path, gains: dict[str, float] | None = None, **config: Any) -> Path:
    """Return a checkpoint next to a train.json."""
    shutil.copytree(here / "mel", folder / "best")
    record = {"config": config, "data": {} if gains is None else {"gains": gains}}
    (folder / "train.json").write_text(json.dumps(record))
    return folder / "best"


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


def test_bits_on_the_common_grid_equal_those_of_16_bit_samples(here: Path, made: Evaluation):
    """P(16-bit value) = P(its mu-law code) / number of values with that code."""
    model = wavear.load(here / "mel")
    every = wavear.mulaw_encode(torch.arange(-32768, 32768) / 32768)
    counts = torch.bincount(every, minlength=256).double().log2()
    for row in made.clips:
        x = audio.read(here / "held" / row.name)
        whole = -wavear.score(model, x)[0] / np.log(2) + counts[wavear.mulaw_encode(x)]
        assert row.common_bits == pytest.approx(float(whole.mean()))


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


def test_bits_by_loudness_add_up(made: Evaluation):
    levels = made.record["by_level"]
    samples = sum(entry["samples"] for entry in levels)
    bits = sum(entry["samples"] * entry["bits"] for entry in levels if entry["samples"])
    assert samples == sum(row.samples // 160 * 160 for row in made.clips)
    assert bits / samples == pytest.approx(made.bits["model"], rel=0.01)


def test_the_same_seed_gives_the_same_evaluation(here: Path, made: Evaluation, tmp_path: Path):
    again = evaluate(here / "mel", here / "held", tmp_path / "again", SHOWN)
    varying = ("created", "command", "generation")
    first, second = ({k: v for k, v in e.record.items() if k not in varying} for e in (made, again))
    assert first == second
    read = Evaluation.read(tmp_path / "again")
    assert read.record == json.loads(json.dumps(again.record))
    assert read.clips[0].to_dict() == read.record["clips"][0]


# ---- the page


def outside(page: str) -> list[str]:
    """Return a page's references to anything outside it."""
    return re.findall(r'(?:src|href)="(?!data:)[^"]*"|https?://|url\(|@import|<script', page)


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


# ---- data for the baselines, and clips used in training


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


def test_a_single_clip_has_no_baselines(here: Path, tmp_path: Path):
    found = evaluate(here / "mel", here / "held" / "1.wav", tmp_path / "out", BITS)
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
        "engine is 'steam'": ("mel", "held", "--engine", "steam"),
        "weights is 'int3'": ("mel", "held", "--weights", "int3"),
        "has only the evaluated clips": ("mel", "held", "--train-data", "held"),
    }.items():
        assert words in refused(capsys, "evaluate", *arguments, "--out", out)
        assert not out.exists()
    for words, flags in {
        "device is 'abacus'": ("--device", "abacus"),
        "clips is -1": ("--clips", "-1"),
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


# ---- compare


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
    other = changed(made, lambda r: r["settings"].update(temperature=0.8))
    notes = paired(made.record, other.record)["notes"]
    assert notes == ["temperature is 1.0 in a and 0.8 in b: the model is not the only difference"]


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
