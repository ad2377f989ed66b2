"""The command line: flags on mels, sampling and output reach their settings; warnings are lines."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_models import MEL, tiny

import wavear
from wavear import MelConfig, audio
from wavear.cli.commands import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with checkpoints, a recording and mels."""
    monkeypatch.chdir(tmp_path)
    model = tiny(mel=MEL)
    wave = (
        torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 1200))
        * torch.linspace(0, 1, 1200) ** 2
    )
    mel = wavear.log_mel(wave[None], MEL)[0]
    conditioning: Any = model.conditioning
    conditioning.mel_mean.copy_(mel.mean(1))
    conditioning.mel_deviation.copy_(mel.std(1))
    model.save("mel")
    tiny().save("free")
    audio.write("a.wav", wave.float(), 8000)
    np.save("natural.npy", mel.float().numpy())
    np.save("common.npy", (mel / np.log(10)).float().numpy())
    np.save("decibels.npy", (mel * 20 / np.log(10)).float().numpy())
    return tmp_path


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err  # type: ignore[return-value]


def synthesize(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    return run(capsys, "synthesize", "mel", *arguments, "--engine", "reference")


def test_a_mel_in_decibels_is_refused_with_the_flag_that_converts_it(
    here: Path, capsys: pytest.CaptureFixture
):
    status, _, err = synthesize(capsys, "decibels.npy", "--out", "out")
    assert status == 1
    assert err.count("\n") == 1
    assert "decibels.npy: this looks like decibel mels (range -" in err
    assert "pass --mel-preset db (if all else is as the model's) to convert" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(("name", "preset"), [("decibels.npy", "db"), ("common.npy", "log10")])
def test_a_mel_is_converted_by_its_preset(
    here: Path, capsys: pytest.CaptureFixture, name: str, preset: str
):
    assert synthesize(capsys, name, "--out", "converted", "--mel-preset", preset)[0] == 0
    model = wavear.load("mel")
    mel = torch.from_numpy(np.load("natural.npy"))
    expected = wavear.generate(model, mel, engine="reference")[0]
    torch.testing.assert_close(
        audio.read(f"converted/{name[:-4]}.wav"), expected, rtol=0, atol=1 / 32768
    )


def test_force_accepts_a_wrong_mel_with_a_warning(here: Path, capsys: pytest.CaptureFixture):
    status, _, err = synthesize(capsys, "decibels.npy", "--out", "out", "--force")
    assert status == 0
    assert "wavear: warning: decibels.npy: this looks like decibel mels" in err


def test_wrong_or_unknown_presets_are_refused(here: Path, capsys: pytest.CaptureFixture):
    status, _, err = synthesize(capsys, "natural.npy", "--out", "out", "--mel-preset", "hifigan")
    assert status == 1
    assert "10 bands" in err or "bands 80, the model 10" in err
    status, _, err = synthesize(capsys, "natural.npy", "--out", "out", "--mel-preset", "hifigann")
    assert (status, err) == (
        1,
        "wavear: error: there is no mel preset 'hifigann': did you mean 'hifigan'?\n",
    )


def test_a_duration_that_does_not_match_the_hop_is_refused(
    here: Path, capsys: pytest.CaptureFixture
):
    assert synthesize(capsys, "natural.npy", "--out", "out", "--mel-seconds", "0.15")[0] == 0
    status, _, err = synthesize(capsys, "natural.npy", "--out", "out2", "--mel-seconds", "1")
    assert status == 1
    assert "30 frames for 1 s, 30.0 per second" in err
    assert "the model expects 200.0 per second (a hop of 40)" in err


def test_mels_of_presets(here: Path, capsys: pytest.CaptureFixture):
    assert run(capsys, "mel", "a.wav", "--out", "mels", "--preset", "fatchord")[0] == 0
    with np.load("mels/a.npz") as archive:
        assert MelConfig.from_dict(json.loads(str(archive["config"]))) == MelConfig.preset(
            "fatchord"
        )
        waveform = audio.read("a.wav", 22050)
        expected = wavear.log_mel(waveform[None], MelConfig.preset("fatchord"))[0]
        np.testing.assert_array_equal(archive["mel"], expected)
    assert run(capsys, "mel", "a.wav", "--out", "plain", "--checkpoint", "mel", "--npy")[0] == 0
    np.testing.assert_array_equal(
        np.load("plain/a.npy"), wavear.log_mel(audio.read("a.wav")[None], MEL)[0]
    )
    for extra in (("--bands", "4"), ("--checkpoint", "mel")):
        status, _, err = run(capsys, "mel", "a.wav", "--out", "x", "--preset", "fatchord", *extra)
        assert status == 1
        assert "--preset sets what the mels are" in err


def test_configuration_in_a_file_overrides_the_flag(here: Path, capsys: pytest.CaptureFixture):
    flags = shlex.split("--sample-rate 8000 --fmax 4000 --hop-length 40 --bands 10 --log-base 10")
    flags += ["--n-fft", "128", "--window-length", "128"]
    assert run(capsys, "mel", "a.wav", "--out", "mels", *flags)[0] == 0
    status, _, err = synthesize(capsys, "mels/a.npz", "--out", "one", "--mel-preset", "db")
    assert status == 0
    assert "mels/a.npz: its own mel configuration overrides the one given" in err
    assert synthesize(capsys, "a.wav", "--out", "two")[0] == 0
    one, two = audio.read("one/a.wav"), audio.read("two/a.wav")
    # Rounding may change codes: the mels have different logarithms, in float32.
    assert (one == two).float().mean() > 0.9


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (("--top-k", "3"), {"top_k": 3}),
        (("--top-p", "0.4"), {"top_p": 0.4}),
        (("--best-of", "3"), {"best_of": 3}),
    ],
    ids=str,
)
def test_sampling_flags(
    here: Path, capsys: pytest.CaptureFixture, flags: tuple[str, ...], settings: dict[str, Any]
):
    model = wavear.load("mel")
    mel = torch.from_numpy(np.load("natural.npy"))
    expected = wavear.generate(model, mel, seed=2, engine="reference", **settings)[0]
    assert synthesize(capsys, "natural.npy", "--out", "out", "--seed", "2", *flags)[0] == 0
    assert torch.allclose(audio.read("out/natural.wav"), expected, rtol=0, atol=1 / 32768)
    command = shlex.split("generate free --seconds 0.02 --out free.wav --engine reference --seed 2")
    assert run(capsys, *command, *flags)[0] == 0
    expected = wavear.generate(
        wavear.load("free"), samples=160, seed=2, engine="reference", **settings
    )[0]
    assert torch.allclose(audio.read("free.wav"), expected, rtol=0, atol=1 / 32768)


@pytest.mark.filterwarnings("default:argmax takes")
def test_argmax_warns_in_one_line(here: Path, capsys: pytest.CaptureFixture):
    command = shlex.split("generate free --seconds 0.02 --out free.wav --engine reference --argmax")
    status, _, err = run(capsys, *command)
    assert status == 0
    assert err.startswith("wavear: warning: argmax takes the likeliest code at every sample")
    assert err.count("\n") == 1


def test_defective_audio_causes_a_warning(here: Path, capsys: pytest.CaptureFixture):
    command = ("generate", "free", "--seconds", "1", "--out", "free.wav", "--engine", "numba")
    status, _, err = run(capsys, *command)
    assert status == 0
    lines = err.splitlines()
    assert any(
        line.startswith("wavear: warning: free.wav: white noise (") and "try another seed" in line
        for line in lines
    )
    assert any("clipping" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("wav", "natural.wav", ("WAV", "PCM_16")),
        ("wav24", "natural.wav", ("WAV", "PCM_24")),
        ("wavfloat", "natural.wav", ("WAV", "FLOAT")),
        ("flac", "natural.flac", ("FLAC", "PCM_16")),
        ("flac24", "natural.flac", ("FLAC", "PCM_24")),
        ("ogg", "natural.ogg", ("OGG", "VORBIS")),
        ("opus", "natural.opus", ("OGG", "OPUS")),
    ],
)
def test_formats(
    here: Path, capsys: pytest.CaptureFixture, name: str, file: str, expected: tuple[str, str]
):
    assert synthesize(capsys, "natural.npy", "--out", "out", "--format", name)[0] == 0
    found = soundfile.info(f"out/{file}")
    assert (found.format, found.subtype) == expected


def test_level_and_fade(here: Path, capsys: pytest.CaptureFixture):
    assert synthesize(capsys, "natural.npy", "--out", "plain", "--format", "wavfloat")[0] == 0
    flags = ("--format", "wavfloat", "--normalize", "-12", "--fade", "20")
    assert synthesize(capsys, "natural.npy", "--out", "shaped", *flags)[0] == 0
    plain, shaped = audio.read("plain/natural.wav"), audio.read("shaped/natural.wav")
    assert torch.equal(
        plain, wavear.generate(wavear.load("mel"), np.load("natural.npy"), engine="reference")[0]
    )
    expected = audio.fade(audio.normalize_peak(plain, -12.0), 8000, 20.0)
    torch.testing.assert_close(shaped, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("--format mp3", 2, "format is 'mp3'; it must"),
        ("--normalize 3", 2, "normalize is 3.0; it must"),
        ("--fade -1", 2, "fade is -1.0"),
        ("--top-p 1.5", 1, "--top-p is 1.5; it must be above 0 and at most 1"),
        ("--format flac", 1, "--format flac makes a file that ends in .flac, and --out is x.wav"),
    ],
)
def test_refusals(
    here: Path, capsys: pytest.CaptureFixture, arguments: str, status: int, words: str
):
    command = ("generate", "free", "--seconds", "0.1", "--out", "x.wav", "--engine", "reference")
    got, _, err = run(capsys, *command, *arguments.split())
    assert got == status, err
    if status == 1:
        assert err.startswith("wavear: error: ")
        assert err.count("\n") == 1
    assert words in err
    assert not Path("x.wav").exists()


def bad_mels(folder: Path) -> dict[str, str]:
    """Write one file for each kind of fault; return the words of its refusal by file name."""
    folder.mkdir()
    good = np.random.default_rng(0).normal(size=(10, 7)).astype(np.float32)
    np.save(folder / "bands.npy", np.zeros((80, 7), np.float32))
    np.save(folder / "transposed.npy", good.T)
    np.save(folder / "flat.npy", good[0])
    np.save(folder / "int.npy", np.ones((10, 7), np.int64))
    np.save(folder / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "frameless.npy", good[:, :0])
    good[3, 5] = np.nan
    np.save(folder / "nan.npy", good)
    whole = (folder / "bands.npy").read_bytes()
    (folder / "short.npy").write_bytes(whole[:-40])
    (folder / "greedy.npy").write_bytes(
        whole.replace(b"(80, 7), }   ", b"(10, 99999999999), }"[:20], 1)
    )
    (folder / "words.npy").write_text("not an array")
    (folder / "words2.npz").write_text("not an archive")
    (folder / "words3.safetensors").write_text("no tensors here")
    (folder / "zero.npy").write_bytes(b"")
    (folder / "words4.wav").write_text("RIFF? no, words")
    np.savez(folder / "many.npz", a=good, b=good)
    np.savez(
        folder / "config.npz", mel=np.zeros((10, 7), np.float32), config=np.array('{"bands": 10}')
    )
    torch.save([1, 2], folder / "list.pt")
    audio.write(folder / "brief.wav", np.full(39, 0.1, np.float32), 8000)
    return {
        "bands.npy": "80 bands, the model was trained on 10",
        "transposed.npy": "it seems transposed",
        "flat.npy": "shape (7,)",
        "int.npy": "expected floating point",
        "object.npy": "damaged or not a NumPy array",
        "frameless.npy": "no frames",
        "nan.npy": "NaN or infinity, first in frame 5",
        "short.npy": "damaged",
        "greedy.npy": "damaged",
        "words.npy": "damaged or not a NumPy array",
        "words2.npz": "not an .npz archive",
        "words3.safetensors": "not a safetensors file",
        "zero.npy": "empty (0 bytes)",
        "words4.wav": "not audio",
        "many.npz": "'a', 'b'",
        "config.npz": "lacks the fields",
        "list.pt": "holds a list",
        "brief.wav": "39 samples at 8000 Hz, less than one frame (40)",
    }


def test_unusable_inputs_are_named_counted_and_skipped(here: Path, capsys: pytest.CaptureFixture):
    expected = bad_mels(Path("bad"))
    np.save("bad/fine.npy", np.load("natural.npy"))
    status, out, err = run(
        capsys, "synthesize", "mel", "bad", "natural.npy", "--out", "out", "--engine", "reference"
    )
    assert status == 1
    *named, count = [line for line in err.splitlines() if "error:" in line]
    assert all(line.startswith("wavear: error: bad/") for line in named)
    lines = {Path(line.split()[2].rstrip(":")).name: line for line in named}
    assert sorted(lines) == sorted(expected)
    for name, words in expected.items():
        assert words in lines[name], lines[name]
    assert f"{len(expected)} of {len(expected) + 2} inputs could not be used" in count
    assert "2 files, " in out
    assert sorted(path.name for path in Path("out").iterdir()) == ["fine.wav", "natural.wav"]
