"""Infilling keeps what is outside of the gap, fits the right side, and repeats with its seed."""

from __future__ import annotations

import importlib.util
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
from wavear.generation.infilling import gap_features, infill, janssen, seam_of

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


@pytest.mark.parametrize("gap", [GAP, (50, 300), (7700, 7990)])
def test_mel_does_not_hear_the_gap(gap, x):
    model = make_wavenet(
        sample_rate=RATE,
        mel=wavear.MelConfig(sample_rate=RATE, hop_length=100, bands=12, fmax=None),
    )
    damaged = x.clone()
    damaged[slice(*gap)] = 0.9
    fillings = [infill(model, y, *gap, candidates=2).waveform[slice(*gap)] for y in (x, damaged)]
    assert torch.equal(*fillings)


def test_gap_features_are_the_mel_outside_and_a_line_inside(x):
    config = wavear.MelConfig(sample_rate=RATE, hop_length=100, bands=12, fmax=None)
    mel, found = wavear.log_mel(x, config), gap_features(x, [GAP, (7000, 7100)], config)
    inside = found[-1] == 1
    assert torch.equal(found[:-1, ~inside], mel[:, ~inside])
    left, right = config.window_span
    heard = [
        any(100 * f + right > a and 100 * f - left < b for a, b in (GAP, (7000, 7100)))
        for f in range(80)
    ]
    assert inside.tolist() == heard
    first = heard.index(True) - 1
    last = heard.index(False, first + 1)
    bend = found[:-1, first : last + 1].diff(n=2, dim=1)
    assert bend.abs().max() < 1e-4
    with pytest.raises(WavearError, match="touches all of 80 frames"):
        gap_features(x, [(1, 7999)], config)
    assert gap_features(x, [(0, 100), (7900, 8000)], config)[-1, [0, -1]].tolist() == [1, 1]
    for gap in ((-1, 9), (9, 9), (7990, 8001)):
        with pytest.raises(WavearError, match="it must be a part of it"):
            gap_features(x, [gap], config)


def test_linear_prediction_continues_tones_from_both_sides():
    t = torch.arange(8000) / RATE
    tones = 0.3 * torch.sin(2 * np.pi * 440 * t) + 0.2 * torch.sin(2 * np.pi * 1010 * t)
    damaged = tones.clone()
    damaged[slice(*GAP)] = 0
    filled = janssen(damaged, *GAP)
    assert (filled - tones)[slice(*GAP)].abs().max() < 0.01
    assert torch.equal(filled[: GAP[0]], tones[: GAP[0]])
    assert not janssen(torch.zeros(8000), *GAP).any()


@pytest.mark.parametrize("rate", [11025, 16000, 5000])
def test_at_another_rate_only_the_gap_changes(model, rate):
    """Below the model's Nyquist frequency it fills, above linear prediction does."""
    gap = rate * 3 // 8, rate * 2 // 5
    t = torch.arange(rate) / rate
    noise = np.random.default_rng(1).normal(0, 0.002, rate)
    x = torch.from_numpy(np.asarray(lfilter([1.0], [1.0, -1.9, 0.98], noise))).float()
    x += 0.05 * torch.sin(2 * np.pi * 0.45 * rate * t)
    found = [infill(model, x, *gap, sample_rate=rate, candidates=4, seed=s) for s in (3, 3, 4)]
    filled, again, other = (each.waveform for each in found)
    assert torch.equal(filled, again)
    changed = (filled != x).nonzero()[:, 0]
    assert gap[0] <= int(changed.min()) <= int(changed.max()) < gap[1]
    assert (filled - other)[slice(*gap)].abs().max() > 1e-3
    damaged = x.clone()
    damaged[slice(*gap)] = 0.9
    again = infill(model, damaged, *gap, sample_rate=rate, candidates=4, seed=3).waveform
    torch.testing.assert_close(again, filled)
    if rate == 16000:  # the tone of 7.2 kHz, which the model cannot hear
        high = [
            lfilter([1, -3, 3, -1], [8], each[gap[0] + 9 : gap[1]].numpy()) for each in (filled, x)
        ]
        assert np.std(high[0]) == pytest.approx(np.std(high[1]), rel=0.2)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_command_keeps_samples_bit_by_bit(subtype, x, model, tmp_path: Path):
    model.save(tmp_path / "model")
    soundfile.write(tmp_path / "x.wav", x.numpy(), 16000, subtype=subtype)
    command = ["infill", str(tmp_path / "x.wav"), "--from", "0.2", "--to", "0.21"]
    assert main([*command, "--checkpoint", str(tmp_path / "model"), "--candidates", "2"]) == 0
    before, after = (
        soundfile.read(tmp_path / name, dtype="int32" if subtype != "FLOAT" else "float32")[0]
        for name in ("x.wav", "x-infilled.wav")
    )
    changed = np.flatnonzero(before != after)
    assert 3200 <= changed.min() <= changed.max() < 3360


def test_command_writes_sound_and_page(x, model, tmp_path: Path, capsys):
    model.save(tmp_path / "model")
    soundfile.write(tmp_path / "x.wav", x.numpy(), RATE, subtype="PCM_16")
    names = [str(tmp_path / name) for name in ("x.wav", "y.wav", "y.html", "model")]
    source, out, page, checkpoint = names
    command = ["infill", source, "--from", "0.3", "--to", "0.32", "--out", out]
    command += ["--checkpoint", checkpoint, "--page", page, "--candidates", "4"]
    assert main(command) == 0
    assert "log P of the seam" in capsys.readouterr().out
    text = (tmp_path / "y.html").read_text()
    assert text.count("<audio") == 3
    assert "data:image/png" in text
    assert main(command) == 1  # they exist
    assert main([*command, "--overwrite", "--to", "2"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--from nan", "--from is nan; it must be a time"),
        ("--to inf", "--to is inf; it must be a time"),
        ("--out {}/y.txt", "y.txt is not an audio file by its name"),
        ("--out {0}/d.wav", "d.wav is a folder: name a file"),
        ("--page {}", "is a folder: name a file"),
        ("--overwrite --out {}/x.wav", "x.wav is the input itself: choose another name"),
    ],
)
def test_command_refuses_arguments_before_the_work(flags, message, x, tmp_path: Path, capsys):
    soundfile.write(tmp_path / "x.wav", x.numpy(), RATE, subtype="PCM_16")
    (tmp_path / "d.wav").mkdir()
    command = ["infill", str(tmp_path / "x.wav"), "--from", "0.3", "--to", "0.32"]
    # The checkpoint does not exist: it is not read.
    command += ["--checkpoint", "nowhere", *flags.format(tmp_path).split()]
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_unsuited_gaps_are_refused(x, model):
    for gap in ((0, 9), (9, 9), (7990, 8000)):
        with pytest.raises(WavearError, match="it must begin and end inside"):
            infill(model, x, *gap)
    with pytest.raises(WavearError, match="candidates is 1"):
        infill(model, x, *GAP, candidates=1)


def test_recipe_trains_a_network_conditioned_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = Path(wavear.__file__).parents[1] / "recipes" / "infill" / "gaps.py"
    spec = importlib.util.spec_from_file_location("recipe_gaps", path)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config, generator = wavear.MelConfig(), np.random.default_rng(0)
    for name in ("data/a", "data/b", "held/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise = generator.normal(0, 0.1, 33_000)
        soundfile.write(tmp_path / f"{name}.wav", noise, config.sample_rate)
    plain = make_wavenet(mel=config)
    with torch.no_grad():
        plain.conditioning.mel_mean.fill_(-4.0)
    plain.save(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["gaps.py", *words])
        return recipe.main()

    assert run("make", "data", "held", "--out", "gaps", "--copies", "2") == 0
    assert run("widen", "plain", "--out", "start") == 0
    one = ["one", "held/c.wav", "--from", "0.7", "--out", "gap.npy", "--to"]
    assert run(*one, "0.72") == 0
    capsys.readouterr()
    wavear.Linear(wavear.LinearConfig(order=2)).save(tmp_path / "linear")
    for words, reason in (
        ([*one, "9"], "0.7 to 9 s of 1.4966 s: it must be a part of it"),
        ([*one, "0.6"], "0.7 to 0.6 s of"),
        (["one", "none.wav", *one[2:], "0.8"], "none.wav"),
        (["make", "nowhere", "--out", "x"], "nowhere holds no recordings"),
        (["widen", "linear", "--out", "x"], "linear is not trained on wavear's default mels"),
        (["widen", "voice", "--out", "x"], "voice"),
    ):
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    features = np.load("gap.npy")
    wide, codes = wavear.load("start"), torch.randint(0, 256, (1, 2560))
    both = [
        model(codes, model.condition(torch.from_numpy(x[None, :, 40:50])))
        for model, x in ((wide, features), (plain, features[:-1]))
    ]
    torch.testing.assert_close(*both)  # the mask does nothing before training
    made = sorted(Path("gaps").rglob("*.npy"))
    assert [str(p.relative_to("gaps/features").with_suffix("")) for p in made] == [
        "held-out-0/c", "train-0/a", "train-0/b", "train-1/a", "train-1/b",
    ]  # fmt: skip
    first, second = (np.load(p) for p in made[1::2][:2])
    assert first.shape == (81, 128)
    assert 0.05 < first[-1].mean() < 0.8
    assert (first[-1] != second[-1]).any()  # other gaps in the other copy
    wavear.train(
        wavear.TrainConfig(
            data="gaps/train", validation="gaps/held-out", features="gaps/features", out="run",
            from_checkpoint="start", max_steps=2, segment=512, batch_size=1, sample_seconds=0,
            validation_seconds=0.1, final_seconds=0.1, baseline_seconds=0.1, progress=False,
        )
    )  # fmt: skip
    command = ["infill", "held/c.wav", "--from", "0.7", "--to", "0.72", "--checkpoint", "run/best"]
    command += ["--candidates", "2", "--overwrite"]
    assert main(command) == 1  # without features
    assert main([*command, "--features", "gap.npy"]) == 0
    np.save("short.npy", features[:, :99])
    assert main([*command, "--features", "short.npy"]) == 1
