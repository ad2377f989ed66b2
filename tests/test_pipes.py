"""`wavear synthesize - --stream`: frames from a pipe, latency, sound devices, refusals."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stream import BANDS, hypothesis, make, quiet, random_mel

import wavear
from wavear import Stream
from wavear.cli.commands import main
from wavear.generation import pipes
from wavear.generation.frame_reader import read_frames
from wavear.generation.pipes import pcm16
from wavear.generation.settings import Sampling


class Pieces:
    """A pipe that delivers its data piece by piece."""

    def __init__(self, *data: bytes):
        self.data = list(data)

    def read(self) -> bytes:
        rest, self.data = b"".join(self.data), []
        return rest

    def read1(self, size: int) -> bytes:
        return self.data.pop(0) if self.data else b""


class Kept:
    def __init__(self):
        self.written: list[bytes] = []

    def write(self, pcm: bytes) -> None:
        self.written.append(pcm)

    def close(self) -> None:
        pass


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[k : k + size] for k in range(0, len(data), size)]


@hypothesis
@given(
    kind=st.sampled_from(
        ["raw", "rows", "columns", "fortran rows", "fortran columns", "batch of one", "float64"]
    ),
    frames=st.integers(1, 40),
    size=st.integers(1, 300),
)
def test_frames_are_read_from_any_pieces(kind, frames, size):
    mel = random_mel(frames).numpy()
    data = {
        "raw": mel.T.astype("<f4").tobytes(),
        "rows": npy(np.ascontiguousarray(mel.T)),
        "columns": npy(np.ascontiguousarray(mel)),
        "fortran rows": npy(np.asfortranarray(mel.T)),
        "fortran columns": npy(np.asfortranarray(mel)),
        "batch of one": npy(np.ascontiguousarray(mel)[None]),
        "float64": npy(mel.T.astype(">f8")),
    }[kind]
    source: Any = Pieces(*cut(data, size))
    found = list(read_frames(source, BANDS))
    if frames == BANDS and kind in ("rows", "fortran rows", "float64"):
        mel = mel.T  # as many frames as bands: read as bands first, as everywhere
    np.testing.assert_array_equal(np.concatenate(found, axis=1), mel)
    assert all(part.flags.writeable for part in found)


def test_frames_are_returned_as_soon_as_they_are_complete():
    data = random_mel(6).numpy().T.astype("<f4").tobytes()
    source: Any = Pieces(*cut(data, 30))  # a frame has 20 bytes
    frames = read_frames(source, BANDS)
    assert [(next(frames).shape[1], len(source.data)) for _ in range(3)] == [(1, 3), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no mel frames"),
        (b"\0" * 59, "within frame 2: it had 19 of 20 bytes; expected 5 bands of float32"),
        (np.full(10, np.nan, "<f4").tobytes(), "frame 0 of stdin holds NaN"),
        (
            npy(np.zeros((3, 4), np.float32)),
            r"shape \(3, 4\), expected \(frames, 5\) or \(5, frames\)",
        ),
        (npy(np.zeros((3, 5), np.int32)), "int32, expected floating point"),
        (npy(np.zeros((3, 5), np.float32))[:-20], "damaged"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"x" * 16, "damaged"),
        (npy(np.array([{}], dtype=object)), "damaged"),
        (npy(np.zeros((5, 0), np.float32)), "no mel frames"),
        (npy(np.zeros((0, 5), np.float32)), "no mel frames"),
    ],
)
def test_frames_of_the_wrong_form_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(read_frames(Pieces(*cut(data, 7)), BANDS))  # type: ignore[arg-type]


def test_pcm_equals_that_of_a_file(tmp_path):
    audio = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([0.5 / 32768, 1.5 / 32768])])
    wavear.audio.write(tmp_path / "x.wav", audio, 8000)
    assert (
        pcm16(audio.numpy())
        == soundfile.read(tmp_path / "x.wav", dtype="int16")[0].astype("<i2").tobytes()
    )


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "wavear")
    return caplog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that serving reads, in seconds; it moves only when a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pipes, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_serving_logs_latency_and_underruns(logged, clock):
    model, mel = make(20), random_mel(120)

    class Late(Pieces):
        def read1(self, size: int) -> bytes:
            clock.now += 0.4 if len(self.data) == 3 else 0.0
            return super().read1(size)

    # 20 frames, 50 ms, in each of six pieces
    source: Any = Late(*cut(mel.numpy().T.astype("<f4").tobytes(), 400))
    sink = Kept()
    report = pipes.serve(model, source, sink, Sampling(seed=5))
    assert b"".join(sink.written) == pcm16(wavear.generate(model, mel, seed=5)[0].numpy())
    first, sound, underrun, last = logged.messages
    assert "first sound after 9 frames (22 ms of mel, 3 of them look-ahead)" in first
    assert "first sound 0 ms after the first frame came" in sound
    # Three reads delivered 60 frames of 2.5 ms, and 54 were played in the pause of 400 ms.
    assert report.gaps_waiting == pytest.approx(0.4 - 54 * 0.0025)
    assert report.gaps_computing == 0
    assert underrun == "underrun of 265 ms after 0.14 s: the mel came late"
    assert "1 underrun of 0.27 s in all" in last
    assert report.samples == 2400


def test_slow_computation_and_a_late_mel_are_reported_separately(monkeypatch, logged, clock):
    model, mel = make(20), random_mel(40)
    push = Stream.push

    def slow(self, mel):
        clock.now += 0.05
        return push(self, mel)

    monkeypatch.setattr(Stream, "push", slow)
    source: Any = Pieces(mel.numpy().T.astype("<f4").tobytes())
    report = pipes.serve(model, source, Kept())
    assert report.gaps_waiting == 0
    assert report.gaps_computing == pytest.approx(0.09)  # 20 ms after 50 of each of four pushes
    assert "computed at 0." in logged.messages[2]


def test_an_incomplete_frame_is_an_error_after_the_earlier_sound():
    """A read with an error pushes none of its frames; frames of earlier reads become sound."""
    good, sink = random_mel(20).numpy().T.astype("<f4").tobytes(), Kept()
    source: Any = Pieces(good, b"\0" * 3)
    with pytest.raises(ValueError, match="within frame 20: it had 3 of 20 bytes"):
        pipes.serve(make(20), source, sink)
    assert sum(map(len, sink.written)) == 2 * 20 * 12


def test_sound_begins_before_the_end_of_a_long_mel():
    model, mel = make(20), random_mel(400)
    sink = Kept()
    source: Any = Pieces(npy(mel.numpy()))
    pipes.serve(model, source, sink)
    assert len(sink.written) > 40
    assert max(map(len, sink.written)) <= 2 * 20 * (8 + 2 * 9)


def test_frames_of_another_convention_are_converted_one_by_one():
    model, mel = make(20), random_mel(8) - 5.0
    common = mel / np.log(10)
    source: Any = Pieces(*cut(common.numpy().T.astype("<f4").tobytes(), 60))
    sink = Kept()
    pipes.serve(model, source, sink, Sampling(engine="reference"), mel_source="log10")
    known = wavear.adapt_mel(common, model, "log10")
    assert not torch.equal(known, common)
    assert b"".join(sink.written) == pcm16(
        wavear.generate(model, known, engine="reference")[0].numpy()
    )


@pytest.mark.parametrize("frames", [450, 60], ids=["after a second", "at the end"])
def test_wrong_frames_cause_one_warning(frames, monkeypatch, logged):
    """The sound continues after the warning; correct frames cause none."""
    model, mel = make(20), random_mel(frames) - 5.0
    judged = []
    monkeypatch.setattr(
        pipes, "judge_mel", lambda mel, model: judged.append(mel) or wavear.judge_mel(mel, model)
    )
    for values, wrong in ((mel, False), (mel * 20 / np.log(10), True)):
        logged.clear()
        sink = Kept()
        source: Any = Pieces(*cut(values.numpy().T.astype("<f4").tobytes(), 4000))
        pipes.serve(model, source, sink)
        warned = [record for record in logged.records if record.levelname == "WARNING"]
        assert len(warned) == wrong
        assert sum(map(len, sink.written)) == 2 * frames * 20
    assert len(judged) == 2


def test_a_closed_stdin_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="stdin or stdout is closed"):
        pipes.run(make(100), "-", Sampling())


# ---- the command, in real pipes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make(20).save(folder / "model")
    make().save(folder / "free")
    return folder / "model"


def begin(checkpoint: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "wavear", "synthesize", str(checkpoint), "-", "--stream"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # Tests in the background ignore Ctrl-C, and a child process would inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*command, "--engine", "reference", *flags], bufsize=0, **pipes)


def read_line(process: subprocess.Popen) -> str:
    assert process.stderr
    return process.stderr.readline().decode()


def test_the_command_works_in_a_pipe(checkpoint):
    """Bytes arrive in odd pieces, and the first sound before the end of the mel."""
    mel = random_mel(30)
    with begin(checkpoint, "--seed", "8") as process:
        assert process.stdin
        assert process.stdout
        assert "first sound after 9 frames" in read_line(process)
        data = mel.numpy().T.astype("<f4").tobytes()
        process.stdin.write(data[:187])
        process.stdin.write(data[187:333])
        # 16 frames have arrived, enough for the blocks of the first 13.
        first = process.stdout.read(12)
        process.stdin.write(data[333:])
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(60) == 0
        assert first + rest == pcm16(
            wavear.generate(wavear.load(checkpoint), mel, seed=8)[0].numpy()
        )


def test_a_closed_pipe_ends_it_quietly(checkpoint):
    with begin(checkpoint) as process:
        assert process.stdin
        assert process.stdout
        read_line(process)
        process.stdin.write(random_mel(12).numpy().T.astype("<f4").tobytes())
        process.stdout.read(10)
        process.stdout.close()
        process.stdin.write(random_mel(30).numpy().T.astype("<f4").tobytes())
        process.stdin.close()
        assert process.wait(60) == 0
        assert "rror" not in process.stderr.read().decode()  # type: ignore[union-attr]


def test_ctrl_c_ends_it_quietly(checkpoint):
    with begin(checkpoint) as process:
        read_line(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        printed = process.stderr.read().decode()  # type: ignore[union-attr]
        assert "Traceback" not in printed
        assert printed.endswith("wavear: interrupted\n")


class Played:
    """Stand-in for sounddevice.RawOutputStream that keeps what it plays."""

    heard = b""

    def __init__(self, samplerate: int, channels: int, dtype: str, device: Any):
        if device == "broken":
            raise OSError("no such device")
        Played.heard = f"{samplerate} {channels} {dtype} {device} ".encode()

    def start(self) -> None:
        Played.heard += b"start "

    def write(self, data: Any) -> bool:
        Played.heard += bytes(data)
        return False

    def stop(self) -> None:
        Played.heard += b" stop"

    def close(self) -> None: ...


def test_a_sound_device_plays_the_stream(checkpoint, monkeypatch):
    fake: Any = ModuleType("sounddevice")
    fake.RawOutputStream, fake.PortAudioError = Played, OSError
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    mel = random_mel(12)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(npy(mel.numpy()))))
    flags = ("--stream", "--engine", "reference", "--out", "device:2")
    assert main(["synthesize", str(checkpoint), "-", *flags]) == 0
    expected = pcm16(wavear.generate(wavear.load(checkpoint), mel, engine="reference")[0].numpy())
    assert Played.heard == b"8000 1 int16 2 start " + expected + b" stop"
    with pytest.raises(ValueError, match="cannot open the sound device broken"):
        pipes.Device(8000, "broken")


def test_a_device_without_the_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match="pip install sounddevice"):
        pipes.Device(8000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("synthesize model - --out x", "pass --stream"),
        ("synthesize model x.npy --stream", "its one input is -"),
        ("synthesize model - --stream --out folder", "--out is folder; with --stream it is -"),
        ("synthesize free - --stream", "not conditioned on mels"),
        ("synthesize model - --stream --fade 10", "drop --format, --normalize, --fade"),
        ("synthesize model - --stream --format flac", "drop --format, --normalize, --fade"),
        ("synthesize model - --stream --mel-seconds 1", "--mel-seconds"),
        ("synthesize model - --stream --mel-preset r9yy9", "no mel preset 'r9yy9'"),
        ("synthesize model - --stream --best-of 2", "--best-of compares whole utterances"),
        ("synthesize model - --stream --argmax --top-k 3", "drop --top-k and --top-p"),
        ("synthesize model - --stream --argmax --top-p 0.5", "drop --top-k and --top-p"),
        ("synthesize model - --stream --top-p 2", "--top-p is 2.0;"),
    ],
)
def test_commands_that_cannot_stream_are_refused(
    checkpoint, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(checkpoint.parent)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(arguments.split()) == 1
    assert message in capsys.readouterr().err


@quiet
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (("--argmax",), {"argmax": True}),
        (("--top-k", "3"), {"top_k": 3}),
        (("--top-p", "0.5", "--temperature", "1.2"), {"top_p": 0.5, "temperature": 1.2}),
    ],
    ids=str,
)
def test_flags_of_sampling_reach_the_stream(checkpoint, flags, given, monkeypatch):
    mel = random_mel(12)
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(npy(mel.numpy()))))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink))
    assert (
        main(("synthesize", str(checkpoint), "-", "--stream", "--engine", "reference", *flags)) == 0
    )
    model = wavear.load(checkpoint)
    made = wavear.generate(model, mel, engine="reference", **given)[0]
    assert sink.getvalue() == pcm16(made.numpy())
    assert not torch.equal(made, wavear.generate(model, mel, engine="reference")[0])
