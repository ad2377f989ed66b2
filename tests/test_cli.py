"""The command line: output, refusals and their messages; nothing is overwritten or lost."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MEL, tiny

import wavear
from wavear import audio
from wavear.cli.commands import main
from wavear.generation.files import synthesize
from wavear.generation.jobs import plan
from wavear.generation.settings import Sampling


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints mel, free and speakers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny(mel=MEL).save(folder / "mel")
    tiny().save(folder / "free")
    tiny(speakers=3).save(folder / "speakers", training={"speakers": ["p1", "p226", "1034"]})
    return folder


@pytest.fixture
def here(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with checkpoints, recordings and mels."""
    monkeypatch.chdir(tmp_path)
    for name in ("mel", "free", "speakers"):
        os.symlink(checkpoints / name, tmp_path / name)
    noise = np.random.default_rng(0).normal(0, 0.1, 1234).astype(np.float32)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    audio.write("in/a.wav", noise[:410], 8000)
    audio.write("in/sub/a.wav", noise[:250], 8000)
    audio.write("in/sub/b.flac", noise, 22050)
    np.save("good.npy", np.random.default_rng(1).normal(size=(10, 7)).astype(np.float32))
    return tmp_path


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit status, stdout and stderr."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err  # type: ignore[return-value]


def refused(capsys: pytest.CaptureFixture, *arguments: str, status: int = 1) -> str:
    """Run a command that is refused; return the only line on stderr."""
    got, _, err = run(capsys, *arguments)
    assert got == status, err
    assert err.startswith("wavear: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


# ---- output


def test_synthesize_folder(here: Path, capsys: pytest.CaptureFixture):
    """Audio equals that of `generate` up to the rounding to 16 bits."""
    options = ("--engine", "reference", "--seed", "7", "--temperature", "0.8")
    status, out, err = run(capsys, "synthesize", "mel", "in", "good.npy", "--out", "out", *options)
    assert status == 0, err
    made = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    assert made == ["a.wav", "good.wav", "sub/a.wav", "sub/b.wav"]
    # F * hop samples: 410 // 40 frames, 7 frames, 250 // 40, round(1234 * 8000 / 22050) // 40.
    lengths = [audio.info(Path("out", name)).frames for name in made]
    assert lengths == [400, 280, 240, 440]
    assert err.count("resampled") == 1
    assert "22050 Hz" in err
    assert err.count(" -> ") == 4
    assert "4 files, 0.17 s of audio in" in out
    assert "x real time, engine reference" in out
    mel = torch.from_numpy(np.load("good.npy"))
    settings = {"temperature": 0.8, "engine": "reference"}
    alone, other = (
        wavear.generate(wavear.load("mel"), mel, seed=seed, **settings)[0] for seed in (7, 8)
    )
    assert torch.allclose(audio.read("out/good.wav"), alone, atol=1 / 32768, rtol=0)
    assert not torch.allclose(alone, other, atol=1e-2)


def test_synthesis_from_a_mel_file_equals_that_from_its_recording(
    here: Path, capsys: pytest.CaptureFixture
):
    """`wavear synthesize` computes the same mel from a recording as `wavear mel` writes."""
    assert run(capsys, "mel", "in", "--out", "mels", "--checkpoint", "mel")[0] == 0
    with np.load("mels/sub/b.npz", allow_pickle=False) as archive:
        assert json.loads(str(archive["config"])) == MEL.to_dict()
        assert archive["mel"].shape == (10, 11)
        assert archive["mel"].dtype == np.float32
    for source, out in (("mels", "a"), ("in", "b")):
        assert (
            run(capsys, "synthesize", "mel", source, "--out", out, "--engine", "reference")[0] == 0
        )
    for name in ("a.wav", "sub/a.wav", "sub/b.wav"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_mel_of_another_configuration_is_refused_by_field(
    here: Path, capsys: pytest.CaptureFixture
):
    flags = ("--sample-rate", "8000", "--fmax", "4000", "--hop-length", "50", "--bands", "10")
    flags += ("--n-fft", "128", "--window-length", "128")
    assert run(capsys, "mel", "in/a.wav", "--out", "mels", *flags)[0] == 0
    message = refused(
        capsys, "synthesize", "mel", "mels/a.npz", "--out", "out", "--engine", "reference"
    )
    assert "hop_length 50, the model 40" in message
    assert "bands" not in message
    assert not Path("out").exists()


def test_generate(here: Path, capsys: pytest.CaptureFixture):
    command = shlex.split("generate free --seconds 0.05 --out new/x.wav --engine reference")
    status, out, err = run(capsys, *command)
    assert status == 0, err
    assert audio.info("new/x.wav").frames == 400
    assert "1 file, 0.05 s of audio" in out
    first = Path("new/x.wav").read_bytes()
    assert "exists" in refused(capsys, *command, "--seed", "1")
    assert Path("new/x.wav").read_bytes() == first
    assert run(capsys, *command, "--seed", "1", "--overwrite")[0] == 0
    assert Path("new/x.wav").read_bytes() != first


def test_speakers_by_name(here: Path, capsys: pytest.CaptureFixture):
    """A name selects its speaker, also one of digits that is beyond the numbers."""
    command = shlex.split("generate speakers --seconds 0.02 --engine reference")
    for given in ("0", "p1", "1", "p226", "2", "1034"):
        assert run(capsys, *command, "--speaker", given, "--out", f"{given}.wav")[0] == 0
    made = {path.stem: path.read_bytes() for path in Path().glob("*.wav")}
    assert made["p1"] == made["0"] != made["1"]
    assert made["p226"] == made["1"]
    assert made["1034"] == made["2"]
    model = wavear.load("speakers")
    torch.manual_seed(1)
    wavear.WaveNet(model.config).save(Path("digits"), training={"speakers": ["1", "0", "7"]})
    digits = wavear.load("digits")
    for given, number in {"1": 0, "0": 1, "7": 2, "2": 2}.items():  # a name comes first
        arguments = shlex.split(f"--seconds 0.02 --engine reference --speaker {given} --out d.wav")
        assert run(capsys, "generate", "digits", *arguments, "--overwrite")[0] == 0
        made = wavear.generate(digits, samples=160, speaker=number, engine="reference")
        assert np.abs(audio.read("d.wav").numpy() - made[0].numpy()).max() < 1e-4
    named = wavear.generate(model, samples=50, speaker=["p226", 2], engine="reference")
    assert torch.equal(
        named, wavear.generate(model, samples=50, speaker=[1, 2], engine="reference")
    )


def test_bench_prints_its_table(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Without a shape, and with an engine that has one kind of weights only."""
    monkeypatch.setattr("wavear.benchmark.speed.ENGINES", {"cpu": ("reference",)})
    for more in ([], ["--engines", "reference"]):
        command = shlex.split("bench --layers 2 --stacks 1 --seconds 0.01")
        status, out, err = run(capsys, *command, *more)
        assert status == 0, err
        assert out.count("| reference | float32 | 1 |") == 1


def test_info(here: Path, capsys: pytest.CaptureFixture):
    status, out, _ = run(capsys, "info", "mel")
    assert status == 0
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    parameters = sum(p.numel() for p in wavear.load("mel").parameters())
    assert rows["parameters"].strip() == f"{parameters:,}"
    assert rows["receptive field"].strip().startswith("4 samples")
    assert rows["mel hop_length"].strip() == "40"


# ---- refusals


def test_usage_errors_exit_with_status_2(here: Path, capsys: pytest.CaptureFixture):
    for words, arguments in {
        "--bogus": ("synthesize", "mel", "good.npy", "--out", "o", "--bogus", "1"),
        "'many'": ("generate", "free", "--seconds", "many", "--out", "x.wav"),
        "more than fmin": ("mel", "in", "--out", "o", "--sample-rate", "8000"),
        "bench": (),
    }.items():
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert words in err
        assert "--help" in err


def test_audio_of_a_seed_next_to_its_input_is_not_an_input(here: Path):
    (job,) = plan(["in/a.wav"], None, ".wav", ending="-seed1")
    assert job.target == Path("in/a-seed1-synthesized.wav")
    audio.write(job.target, torch.zeros(400), 8000)
    assert job.target not in [each.source for each in plan(["in"], None, ".wav")]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate free --seconds 0.05 --out {}/x.wav", "x{}.wav"),
        ("synthesize mel in --out {}", "sub/a{}.wav"),
    ],
)
def test_several_seeds_give_the_files_of_single_runs(here, capsys, command, name):
    command += " --engine reference"
    assert run(capsys, *f"{command} --seeds 4:6".format("new").split())[0] == 0
    several = [Path("new", name.format(f"-seed{seed}")).read_bytes() for seed in (4, 5)]
    for seed, content in zip((4, 5), several, strict=True):
        assert run(capsys, *f"{command} --seed {seed}".format(f"alone{seed}").split())[0] == 0
        assert Path(f"alone{seed}", name.format("")).read_bytes() == content
    assert several[0] != several[1]
    status, _, errors = run(capsys, *f"{command} --seeds 5,6".format("new").split())
    assert (status, "exists" in errors) == (1, True)
    assert not Path("new", name.format("-seed6")).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("synthesize x --temperature abc", "--temperature is 'abc'; it must be a number"),
        ("synthesize x --threads abc", "--threads is 'abc'; it must be a number"),
        ("synthesize x --tempraturee 2", "Unrecognized options: --tempraturee, 2; Perhaps"),
        ("generate", "Missing from wavear generate: CHECKPOINT --out FILE"),
        ("generate --seconds", "Missing value for argument '--seconds'. Expected 1 values"),
        ("synthesize x --format aiff", "--format is 'aiff'; it must be one of wav, wav24,"),
        ("mel x --out y --hop-length 9999", "--hop-length is 9999, expected 1 to --window-length"),
        ("train x --out y --family z", "--family is 'z', it must be one of predictive,"),
    ],
)
def test_usage_errors_are_one_line(arguments: str, message: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    err = refused(capsys, *arguments.split(), status=2)
    assert err.startswith(f"wavear: error: {message}")
    assert err.endswith(f": wavear {arguments.split()[0]} --help lists the options\n")
    assert os.environ["COLUMNS"] == "40"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--argmax --top-k 3", "argmax takes the likeliest code: drop --top-k and --top-p"),
        ("--particles 2 --best-of 2", "--particles is 2: drop --best-of 2"),
        ("--temperature 0", "--temperature is 0.0; it must be 1e-06 to 1e+06"),
        ("--seed -1", "--seed is -1; it must be a whole number, 0 to 2**64 - 1"),
        ("--weights int9", "--weights is 'int9'; it must be one of"),
        ("--engine x", "--engine is 'x'; it must be one of"),
        ("--weights float16", "--engine 'numba' has no --weights='float16': use --engine 'triton'"),
    ],
)
def test_refused_settings_are_named_as_flags(here: Path, flags: str, message: str, capsys):
    err = refused(capsys, *f"synthesize mel good.npy --out o {flags}".split())
    assert err.startswith(f"wavear: error: {message}")


def test_files_named_like_parameters_keep_their_names(here: Path, capsys: pytest.CaptureFixture):
    Path("top_k.txt").touch()
    assert "top_k.txt is not an audio" in refused(capsys, "synthesize", "mel", "top_k.txt")
    Path("seed").touch()
    assert ": seed is not an audio" in refused(capsys, "synthesize", "mel", "seed")


def test_messages_name_flags(here: Path, capsys: pytest.CaptureFixture):
    arguments = shlex.split("train x --out o --from voice --mel-bands 60")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "--mel-bands is 60, and voice has 80: drop --mel-bands," in " ".join(err.split())
    assert "_" not in err


def test_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture):
    _, _, err = run(capsys, "trian")
    assert err == (
        "wavear: error: there is no command trian: did you mean train? wavear --help lists all\n"
    )


def test_existing_output_is_refused_before_the_work(here: Path, capsys: pytest.CaptureFixture):
    Path("out/sub").mkdir(parents=True)
    Path("out/sub/b.wav").write_text("precious")  # the last of the three
    message = refused(capsys, "synthesize", "mel", "in", "--out", "out", "--engine", "reference")
    assert "out/sub/b.wav exists" in message
    assert "--overwrite" in message
    assert Path("out/sub/b.wav").read_text() == "precious"
    assert not Path("out/a.wav").exists()


def test_an_input_is_never_overwritten(here: Path, capsys: pytest.CaptureFixture):
    before = Path("in/a.wav").read_bytes()
    message = refused(capsys, "synthesize", "mel", "in/a.wav", "--out", "in", "--overwrite")
    assert "is an input itself" in message
    assert Path("in/a.wav").read_bytes() == before


def test_output_among_the_inputs_is_not_read_as_input(here: Path, capsys: pytest.CaptureFixture):
    command = ("synthesize", "mel", "in", "--out", "in/made", "--engine", "reference")
    assert run(capsys, *command)[0] == 0
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert len(list(Path("in/made").rglob("*.wav"))) == 3


def test_inputs_with_the_same_output_are_refused(here: Path, capsys: pytest.CaptureFixture):
    message = refused(capsys, "synthesize", "mel", "in/a.wav", "in/sub/a.wav", "--out", "out")
    assert "in/a.wav and in/sub/a.wav would both become out/a.wav" in message
    assert message.endswith("or give the folder above\n")
    Path("in/a.flac").write_bytes(b"")
    message = refused(capsys, "synthesize", "mel", "in/a.wav", "in/a.flac", "--out", "out")
    assert message.endswith("or rename one\n")
    assert len(plan(["in/a.wav", "in/../in/a.wav"], "out", ".wav")) == 1  # the same file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("synthesize mel no.wav --out o", "no.wav: no such file or folder"),
        ("synthesize mel in --out good.npy", "good.npy is a file"),
        ("synthesize mel in --out good.npy/deeper", "good.npy is a file"),
        ("synthesize mel void --out o", "void holds no audio or mel files"),
        ("synthesize --out o", "there is no input"),
        ("mel --out o", "there is no input"),
        ("synthesize mel --out o", "mel is a checkpoint: name the audio or mels"),
        ("synthesize nowhere good.npy --out o", "nowhere: no such directory"),
        ("synthesize good.npy --out o", "has 10 bands"),  # the voice has 80
        ("synthesize free good.npy --out o", "not conditioned on mels"),
        ("synthesize mel good.npy --out o --engine reference --temperature 0", "temperature is 0"),
        ("synthesize mel good.npy --out o --engine reference --seed -1", "seed is -1"),
        ("synthesize mel good.npy --out o --engine steam", "engine is 'steam'"),
        ("synthesize mel good.npy --out o --weights int3", "weights is 'int3'"),
        ("synthesize mel good.npy --out o --engine reference --speaker 1", "trained without any"),
        ("synthesize mel good.npy --out o --device abacus", "'abacus'"),
        ("synthesize mel good.npy --out o --device mps", "'mps'; it must be cpu, cuda"),
        ("synthesize mel good.npy --out o --device cpu:x", "'cpu:x'; it must be cpu, cuda"),
        ("synthesize mel good.npy --out o --temperature 1e-310", "it must be 1e-06 to 1e+06"),
        ("synthesize mel - --stream --resume", "--resume"),
        ("bench mel --layers 10", "mel sets the network: drop --layers"),
        ("bench mel --unconditional", "mel sets the network: drop --unconditional"),
        ("bench --shape r9y9 --classes 1024", "r9y9 sets the network: drop --classes"),
        ("generate mel --seconds 1 --out x.wav", "wavear synthesize"),
        ("generate free --seconds 0 --out x.wav", "seconds is 0"),
        ("generate free --seconds 1 --out x.wav --seeds 3:3", "such as 0:8"),
        ("generate free --seconds 1 --out x.wav --seeds 0:99999", "of at most 10000 seeds"),
        ("generate free --seconds 1 --out x.wav --seeds 0:2 --seed 4", "drop one"),
        ("synthesize mel in --out new --seeds 0:2 --resume", "drop --seeds"),
        ("generate free --seconds -1 --out x.wav", "seconds is -1"),
        ("generate free --seconds nan --out x.wav", "seconds is nan"),
        ("generate free --seconds 1e9 --out x.wav", "at most 86400"),
        ("generate free --seconds 1 --out x.mp3", "takes a .flac, .ogg, .opus, .wav file"),
        ("generate free --seconds 1 --out in", "in is not an audio file"),
        ("generate speakers --seconds 1 --engine reference --out x.wav", "needs a speaker, 0 to 2"),
        ("generate speakers --seconds 1 --out x.wav --speaker p9", "or a name: p1, p226, 1034"),
        (
            "generate speakers --seconds 1 --engine reference --out x.wav --speaker 3",
            "speaker is 3",
        ),
        ("generate free --seconds 0.01 --engine reference --out good.npy/x.wav", "good.npy"),
        ("mel good.npy --out o", "good.npy is not an audio file"),
        ("mel in --out o --checkpoint mel --bands 4", "drop the flags on mels"),
        ("mel in --out o --checkpoint free", "not conditioned on mels"),
        ("info in", "config.json is missing"),
        ("train nowhere --out o --max-steps 1", "nowhere: no such folder"),
        ("train void --out o --max-steps 1", "void holds no audio"),
        ("train void --out o --max-steps 1 --normalise peak", "void holds no audio"),
        ("train void --out o --family gru --unconditional --mel-bands 40", "drop --mel-bands 40"),
        ("train void --out o --family linear --learning-rate 0.1", "drop --learning-rate 0.1"),
        ("train void --out o --family linear --max-minutes 1", "drop --max-minutes 1.0"),
        ("train void --out o --validation in --validation-fraction 0.1", "drop --validation-frac"),
        ("train void --out o --normalize-by speaker", "drop --normalize-by 'speaker'"),
        ("train void --out o --family gru --muon-learning-rate 1", "drop --muon-learning-rate 1.0"),
        ("synthesize mel in --out o --mel-preset ln", "their mels fit the model: drop"),
        ("synthesize mel in --out o --force", "their mels fit the model: drop"),
        ("demo --out o --minutes nan", "--minutes is nan; it must be above 0"),
        ("synthesize void/a.m4a", "ffmpeg -i a.m4a a.wav"),
        ("demo --out in", "in is not empty"),
        ("demo --out in --overwrite", "in is not empty and has no"),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture, arguments: str, words: str):
    Path("void").mkdir()
    Path("void/a.m4a").touch()
    assert words in refused(capsys, *arguments.split())
    assert not Path("o").exists() or not any(Path("o").iterdir())
    assert not Path("x.wav").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_printing(here: Path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "wavear", "info", "mel"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


def test_write_failure_stops_and_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Synthesis stops at the first write that fails, since the next one would fail too."""
    calls = []

    def full(path, waveform, rate, encoding=None):
        calls.append(path)
        raise OSError(28, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(audio, "write", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize(wavear.load("mel"), plan(["in"], "out", ".wav"), Sampling(engine="reference"))
    assert len(calls) == 1


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs an unwritable folder")
def test_an_unwritable_folder_is_refused_before_the_work(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "wavear.generation.files.generate_with", lambda *_, **__: pytest.fail("the work began")
    )
    assert "cannot write to /proc" in refused(
        capsys, "synthesize", "mel", "in", "--out", "/proc/made"
    )
    command = shlex.split("generate free --seconds 1 --out /proc/made/x.wav --engine reference")
    assert "cannot write to /proc" in refused(capsys, *command)


def test_bugs_keep_their_traceback(here: Path, monkeypatch: pytest.MonkeyPatch):
    """A ValueError other than `WavearError` is a bug, not a mistake of the user."""
    monkeypatch.setattr("wavear.models.info.describe", lambda source: np.zeros(3).reshape(2, 2))
    with pytest.raises(ValueError, match="cannot reshape"):
        main(["info", "mel"])


def test_interrupt(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("wavear.models.info.describe", interrupted)
    status, _, err = run(capsys, "info", "mel")
    assert status == 130
    assert err == "wavear: interrupted\n"


def test_version(capsys: pytest.CaptureFixture):
    assert run(capsys, "--version") == (0, f"wavear {wavear.__version__}\n", "")


def test_a_closed_pipe_prints_no_traceback(here: Path):
    """`wavear info mel | true` prints no traceback, not even from Python's exit."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "wavear", "info", "mel"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
