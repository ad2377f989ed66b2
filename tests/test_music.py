"""The recipe for music: what its program measures, on sounds whose tempo and key are known."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import tiny
from test_recipes import RECIPES, module

import wavear
from wavear import GRU, GRUConfig, Transformer, TransformerConfig, audio

RATE = 16000
MEASURE = module(RECIPES.parent / "bench" / "music.py")
FEATURES = module(RECIPES / "music" / "features.py")
INSTRUMENT = module(RECIPES / "music" / "instrument.py")


def notes(pitches: list[int], seconds: float) -> np.ndarray:
    """Return notes of MIDI numbers one after another, each with three partials and a decay."""
    t = np.arange(round(seconds * RATE)) / RATE
    tones = [
        sum(np.sin(2 * np.pi * k * 440 * 2 ** ((p - 69) / 12) * t) / k for k in (1, 2, 3))
        * np.exp(-5 * t)
        for p in pitches
    ]
    return 0.2 * np.concatenate(tones).astype(np.float32)


def test_context_exceeds_two_seconds():
    values = module(RECIPES / "music" / "train.py").VALUES
    assert values.model_config().receptive_field > 2 * values.sample_rate
    assert 32 * values.segment > 2 * values.sample_rate  # of a stretch in training (lanes.VISIT)


def of_family(family: str) -> wavear.AutoregressiveModel:
    torch.manual_seed(0)
    if family == "wavenet":
        return tiny(layers=4)
    if family == "gru":
        return GRU(GRUConfig(channels=8, sample_rate=8000)).eval()
    return Transformer(
        TransformerConfig(layers=2, channels=16, heads=2, window=8, patch=4, sample_rate=8000)
    ).eval()


@pytest.mark.parametrize("family", ["wavenet", "gru", "transformer"])
def test_bits_by_context_are_scores_after_silence(family: str):
    """Equal the end of `wavear.score` of a waveform that is cut at the beginning of the context."""
    model = of_family(family)
    rows = 0.3 * torch.randn(3, 400, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    bits = MEASURE.bits_by_context(model, rows, [10, 50, 300], scored=40)
    for column, context in enumerate([10, 50, 300]):
        scores = wavear.score(model, rows[:, -context - 40 :])[:, -40:]
        expected = -scores.mean(dim=1) / math.log(2)
        assert bits[:, column] == pytest.approx(expected.numpy(), abs=1e-6)  # float32
    assert (bits[:, 0] != bits[:, 1]).all()


def test_tempo_and_key_of_known_music():
    c_major, e_minor = [60, 64, 67, 72, 65, 69, 67, 71, 60], [64, 67, 71, 76, 69, 72, 71, 66, 64]
    for scale, expected in ((c_major, 0), (e_minor, 12 + 4)):
        assert MEASURE.key(MEASURE.chroma(notes(scale, 0.5), RATE)) == expected
    fast = notes([60] * 16, 60 / 140)
    assert MEASURE.tempo(fast, RATE) == pytest.approx(140, rel=0.04)
    assert not MEASURE.same_tempo(MEASURE.tempo(fast, RATE), 100)
    assert MEASURE.tempo(np.zeros(RATE, np.float32), RATE) == 0


def test_kept_compares_with_own_and_with_other_primes():
    pieces = [notes([60, 64, 67, 72] * 3, 60 / 100), notes([66, 70, 73, 78] * 3, 60 / 140)]
    sources = np.arange(2)
    own = MEASURE.kept(pieces, pieces, sources, RATE)
    crossed = MEASURE.kept(pieces, pieces[::-1], sources, RATE)
    for (same, other), (swapped, back) in zip(own, crossed, strict=True):
        assert (same, other) == (back, swapped)
        assert same == pytest.approx(1)
        assert other < 0.5


def test_program_prints_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    of_family("transformer").save(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for number, pitch in enumerate((60, 66)):
        audio.write(tmp_path / "data" / f"{number}.wav", notes([pitch] * 10, 0.45)[::2], 8000)
    program = ["music.py", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    small = ["--stretches", "2", "--primes", "1", "--seconds", "1"]
    monkeypatch.setattr("sys.argv", [*program, *small])
    assert MEASURE.main() == 0
    out = capsys.readouterr().out
    assert "4 stretches of 0.1 s" in out
    assert "2 continuations of 1 s after 1 s, of 2 recordings" in out
    monkeypatch.setattr("sys.argv", [*program, *small, "--seconds", "60"])
    assert MEASURE.main() == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has no recording of 120 s" in err


def test_features_are_those_of_made_sounds(tmp_path: Path):
    t = np.arange(RATE) / RATE
    for folder, hertz in (("low", 110), ("high", 440)):
        tone = 0.1 * np.sin(2 * np.pi * hertz * t).astype(np.float32)
        (tmp_path / folder).mkdir()
        audio.write(tmp_path / folder / "x.wav", np.concatenate([tone, np.zeros(RATE)]), RATE)
    assert FEATURES.write(tmp_path, tmp_path / "f", RATE, 256) == (2, ["high", "low"])
    for folder, octaves, label in (("low", 1, [0, 1]), ("high", 3, [1, 0])):
        found = np.load(tmp_path / "f" / folder / "x.npy")
        assert found.shape == (5, 125)
        assert found.dtype == np.float32
        tone, silence = found[:, 10:50], found[:, 70:]
        level = 20 * math.log10(0.1 / math.sqrt(2))
        assert tone[0] == pytest.approx(level, abs=0.3)
        assert found[0, 62] == pytest.approx(level - 3, abs=0.3)  # the tone ends in its middle
        assert tone[1] == pytest.approx(octaves, abs=0.03)
        assert (tone[2] == 1).all()
        assert (silence[0] == -80).all()
        assert (silence[2] == 0).all()
        assert found[3:, 0].tolist() == label
    with pytest.raises(wavear.WavearError, match="exists"):
        FEATURES.write(tmp_path, tmp_path / "f", RATE, 256)


def test_following_compares_loudness_pitch_and_voicing():
    asked = np.array([[-20.0, -20, -70, -20], [1, 2, 2, 2], [1, 1, 0, 0]])
    found = np.array([[-26.0, -22, -10, -21, 0], [1 + 0.04, 2.05, 3, 3, 0], [1, 1, 1, 0, 0]])
    assert MEASURE.followed(asked, found) == pytest.approx((3, 0.5, 0.75))
    silent = np.array([[-80.0], [0], [0]])
    loudness, pitch, voicing = MEASURE.followed(silent, silent)
    assert math.isnan(loudness)
    assert math.isnan(pitch)
    assert voicing == 1


def test_program_compares_sounds_with_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The stand-in plays a tone of the pitch that it is asked for, 6 dB too low."""
    for number, hertz in enumerate((110, 200, 330)):
        tone = 0.2 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)
        (tmp_path / "data").mkdir(exist_ok=True)
        audio.write(tmp_path / "data" / f"{number}.wav", tone.astype(np.float32), RATE)
    FEATURES.write(tmp_path / "data", tmp_path / "features", RATE, 256)
    mel = wavear.FeatureConfig(channels=3, hop_length=256, sample_rate=RATE)
    config = TransformerConfig(
        layers=1, channels=16, heads=2, window=4, patch=4, mel=mel, sample_rate=RATE
    )
    Transformer(config).save(tmp_path / "model")

    def play(model: Transformer, asked: torch.Tensor, **settings: object) -> torch.Tensor:
        t = torch.arange(asked.shape[2] * 256) / RATE
        return 0.1 * torch.sin(2 * math.pi * 55 * 2 ** float(asked[0, 1, 20]) * t)[None]

    monkeypatch.setattr(wavear, "generate", play)
    program = ["music.py", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", [*program, "--features", str(tmp_path / "features")])
    assert MEASURE.main() == 0
    assert "| 6.0 (6.0) | 1.00 (0.00) | 1.00 (1.00) |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*program, "--features", str(tmp_path / "nothing")])
    assert MEASURE.main() == 1
    assert "nothing" in capsys.readouterr().err
    of_family("transformer").save(tmp_path / "plain")
    words = [str(tmp_path / "plain"), "--data", str(tmp_path), "--features", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["music.py", *words])
    assert MEASURE.main() == 1
    assert "plain is not a model of features" in capsys.readouterr().err


# ---- instrument.py


def glide(path: Path, hertz: float, level: float) -> None:
    """Write a second of harmonics whose pitch rises by two semitones, at a level that falls."""
    t = np.arange(22050) / 22050
    phase = 2 * np.pi * np.cumsum(hertz * 2 ** (t / 6)) / 22050
    sound = sum(np.sin(k * phase) / k for k in range(1, 12))
    noise = np.random.default_rng(0).normal(0, 1e-3, t.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, (level * np.exp(-t) * sound + noise).astype(np.float32), 22050)


def test_plain_harmonics_have_their_pitch_and_level():
    mel = wavear.MelConfig()
    harmonics, noise = INSTRUMENT.plain(mel)
    for number in (60, 180):  # octaves of 60 steps above 55 Hz
        x = torch.zeros(22050)
        x[:: round(22050 / (55 * 2 ** (number / 60)))] = 1.0  # a train of impulses
        train = wavear.log_mel((x / x.square().mean().sqrt())[None], mel)[0].mean(1)
        distances = (harmonics - train)[:, 1:].abs().mean(1)  # the train has a mean, too
        assert abs(int(distances.argmin()) - number) <= 1
        assert (noise - train)[1:].abs().mean() > 2 * distances.min()


def test_an_instrument_learns_and_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        glide(Path("data") / f"{number}.wav", 110 + 20 * number, 0.1 + 0.02 * number)
    FEATURES.write(Path("data"), Path("features"), 22050, 256)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["instrument.py", *words])
        status = INSTRUMENT.main()
        output = capsys.readouterr()
        return status, output.out + output.err

    words = ["train", "data", "--features", "features", "--out", "run", "--steps"]
    status, printed = run(*words, "100")
    assert status == 0
    rows = re.findall(r"step \d+: (\S+), held out (\S+)\n", printed)
    errors = [[float(value) for value in row] for row in rows]
    assert errors[-1][0] < 0.7 * errors[0][0]
    made, voice = INSTRUMENT.load(Path("run"))
    asked = INSTRUMENT.read_features(Path("features/0.npy"))
    (given, wanted), *_ = INSTRUMENT.pairs(Path("data"), Path("features"), voice.config.mel)
    assert INSTRUMENT.error(made, [(given, wanted)]) == pytest.approx(
        min(held for _, held in errors), abs=1e-3
    )

    status, printed = run("play", "run", "features/0.npy", "--out", "x.wav", "--seed", "3")
    assert (status, printed) == (0, "x.wav  1.01 s\n")
    heard = audio.read("x.wav")
    assert torch.allclose(heard, INSTRUMENT.play(made, voice, asked, seed=3), atol=1e-4)
    # The pitch of the voice is that which was asked for, an octave higher as well.
    for octave in (0, 1):
        asked[1] += octave
        found = FEATURES.features(INSTRUMENT.play(made, voice, asked).numpy(), 22050, 256)
        _, pitch, voicing = MEASURE.followed(asked.numpy(), found)
        assert min(pitch, voicing) > 0.8, octave

    with_labels = INSTRUMENT.labelled(asked, 5, 4, Path("x.npy"))
    assert with_labels[3:, 0].tolist() == [0, 1]
    assert torch.equal(INSTRUMENT.labelled(asked, 3, None, Path("x.npy")), asked)
    for channels, label, reason in (
        (5, None, "--label 3 to 4"),
        (5, 5, "--label 3"),
        (3, 3, "drop"),
    ):
        with pytest.raises(wavear.WavearError, match=reason):
            INSTRUMENT.labelled(asked, channels, label, Path("x.npy"))

    for name, text in (
        ("hub", '{"channels": 3, "voice": "hf:owner/name"}'),
        ("gone", '{"channels": 3, "voice": "nowhere"}'),
        ("wide", '{"channels": 3, "voice": "voice", "width": 64}'),
        ("odd", '{"channels": 3}'),
        ("none", "{"),
    ):
        shutil.copytree("run", name)
        (Path(name) / "instrument.json").write_text(text)
    np.save("four.npy", np.zeros((4, 9)))
    np.save("two.npy", np.zeros((2, 9)))
    np.save("nan.npy", np.full((3, 9), np.nan))
    np.save("features/9.npy", np.zeros((3, 9)))
    for wrong, reason in (
        (["play", "run", "features/0.npy", "--out", "x.wav"], "x.wav exists"),
        (["play", "run", "two.npy", "--out", "y.wav"], "(2, 9): expected (3 or more, frames)"),
        (["play", "run", "four.npy", "--out", "y.wav"], "4 channels: expected 3, as in training"),
        (["play", "run", "nan.npy", "--out", "y.wav"], "NaN"),
        (["play", "nowhere", "nan.npy", "--out", "y.wav"], "instrument.json is missing: run train"),
        (["play", "hub", "features/0.npy", "--out", "y.wav"], "owner/name: pass it with --voice"),
        (["play", "gone", "features/0.npy", "--out", "y.wav"], "nowhere"),
        (["play", "wide", "features/0.npy", "--out", "y.wav"], "no instrument that fits"),
        (["play", "odd", "features/0.npy", "--out", "y.wav"], "odd holds no instrument"),
        (["play", "none", "features/0.npy", "--out", "y.wav"], "none holds no instrument"),
        ([*words, "8"], "instrument.json exists"),
        ([*words, "8", "--out", "z"], "run features.py with --rate 22050 --hop 256"),
        ([*words, "0", "--out", "z"], "--steps is 0"),
    ):
        status, printed = run(*wrong)
        assert status == 1
        assert reason in printed
        assert printed.count("\n") == 1
