"""What a file claims is not what it holds: refusals within bounds of memory and time."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from limits import AVAILABLE, MIB, bounded
from safetensors.torch import load_file, save, save_file
from small_training import config_of

import wavear
from wavear import (
    MelConfig,
    PredictiveWaveNet,
    PredictiveWaveNetConfig,
    WaveNet,
    WaveNetConfig,
    audio,
    train,
)
from wavear.audio import headers, reading
from wavear.common import machine
from wavear.common.errors import WavearError
from wavear.data.corpus import open_corpus
from wavear.data.levels import Stretch, look
from wavear.generation import files
from wavear.generation.frame_reader import read_frames
from wavear.generation.jobs import plan
from wavear.generation.settings import Sampling
from wavear.mel.mel_files import read_mel
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.transformer import Transformer, TransformerConfig
from wavear.training import memory

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="memory is bounded by Linux")

RATE = 8000
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000.0)
SMALL: dict[str, Any] = {
    "wavenet": lambda: WaveNet(
        WaveNetConfig(sample_rate=RATE, mel=MEL, layers=2, stacks=1, residual_channels=1)
    ),
    "predictive": lambda: PredictiveWaveNet(
        PredictiveWaveNetConfig(sample_rate=RATE, mel=MEL, layers=1, residual_channels=4)
    ),
    "gru": lambda: GRU(GRUConfig(sample_rate=RATE, channels=4)),
    "transformer": lambda: Transformer(TransformerConfig(sample_rate=RATE, channels=8, heads=2)),
    "linear": lambda: Linear(LinearConfig(sample_rate=RATE, order=2)),
}


# ---- checkpoints


def rewrite(folder: Path, change: Any, weights: Any = None) -> None:
    """Change the configuration of a checkpoint, in both files, and its weights."""
    described = json.loads((folder / "config.json").read_text())
    change(described["config"])
    text = json.dumps(described)
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    tensors = tensors if weights is None else weights(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"wavear": text})


HUGE = 10**9
LARGER = "is of a larger model than model.safetensors"
CONFIGS = [
    ("wavenet", {"residual_channels": HUGE}, LARGER),
    ("wavenet", {"layers": HUGE, "stacks": HUGE // 20}, LARGER),
    ("wavenet", {"speakers": 2**62}, LARGER),
    ("wavenet", {"conditioning_context": 2**70}, LARGER),
    ("wavenet", {"head_channels": 20_000}, LARGER),
    ("predictive", {"period_layers": HUGE}, LARGER),
    ("predictive", {"prediction_order": HUGE}, "prediction_order is 1000000000, expected at most"),
    ("predictive", {"period_channels": HUGE}, LARGER),
    ("predictive", {"mixtures": HUGE}, LARGER),
    ("gru", {"layers": HUGE}, LARGER),
    ("gru", {"channels": 50_000}, LARGER),
    ("transformer", {"window": HUGE}, "state has more than"),
    ("transformer", {"patch": HUGE}, LARGER),
    ("transformer", {"channels": HUGE}, LARGER),
    ("linear", {"order": HUGE}, LARGER),
    ("linear", {"differencing": HUGE}, "differencing is 1000000000, expected at most"),
]


@pytest.mark.parametrize(("family", "fields", "message"), CONFIGS)
def test_a_configuration_larger_than_its_weights_is_refused(
    tmp_path: Path, family: str, fields: dict, message: str
):
    SMALL[family]().save(tmp_path)
    rewrite(tmp_path, lambda config: config.update(fields))
    with bounded(300, 10) as cost, pytest.raises(WavearError, match=message):
        wavear.load(tmp_path)
    assert cost.mebibytes < 100


def test_dilations_beyond_all_use_are_refused(tmp_path: Path):
    config = WaveNetConfig(layers=24, stacks=1, residual_channels=8, skip_channels=1)
    WaveNet(config).save(tmp_path)
    with bounded(600, 10), pytest.raises(WavearError, match="state has more than"):
        wavear.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"n_fft": HUGE}, {"n_fft": 2**16, "bands": 20_000}, {"n_fft": HUGE, "hop_length": HUGE},
     {"fmin": 10**400}, {"n_fft": HUGE, "window_length": HUGE}],
)  # fmt: skip
def test_absurd_windows_and_hops_of_a_mel_are_refused(tmp_path: Path, fields: dict):
    SMALL["wavenet"]().save(tmp_path)
    rewrite(tmp_path, lambda config: config["mel"].update(fields))
    with bounded(300, 10), pytest.raises(WavearError, match="MelConfig: "):
        wavear.load(tmp_path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.uint8, torch.bool],
)
def test_weights_that_are_not_floats_are_refused(tmp_path: Path, dtype: torch.dtype):
    SMALL["wavenet"]().save(tmp_path)
    name = "blocks.0.skip.weight"
    rewrite(tmp_path, lambda _: None, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(WavearError, match=rf"{name} is .*, expected F32"):
        wavear.load(tmp_path)


# ---- JSON


def test_json_nested_too_deep_is_refused_everywhere(tmp_path: Path):
    from wavear.data.corpus import find
    from wavear.evaluation.clips import training_record
    from wavear.evaluation.evaluation import Evaluation
    from wavear.training.config import TrainConfig
    from wavear.training.run import write_held_out
    from wavear.training.run_directory import open_directory

    deep = "[" * 100_000 + "]" * 100_000
    SMALL["wavenet"]().save(tmp_path / "run" / "best")
    for name in ("run/best/config.json", "run/train.json", "list.jsonl", "evaluation.json"):
        (tmp_path / name).write_text(deep)
    resumed = TrainConfig(data="x", out=str(tmp_path / "run"), resume=True)
    for call in (
        lambda: wavear.load(tmp_path / "run" / "best"),
        lambda: write_held_out(tmp_path / "run", tmp_path / "held.jsonl"),
        lambda: open_directory(resumed, writes=False),
        lambda: find(tmp_path / "list.jsonl"),
        lambda: Evaluation.read(tmp_path / "evaluation.json"),
    ):
        with pytest.raises(WavearError, match="nested too deep"):
            call()
    assert training_record(tmp_path / "run" / "best") == {}


# ---- audio


def claiming(path: Path, samples: int) -> Path:
    """Write 10 s of Ogg Vorbis whose last page promises a number of samples."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE)
    soundfile.write(path, noise, RATE, format="OGG")
    data = bytearray(path.read_bytes())
    page = data.rindex(b"OggS")
    data[page + 6 : page + 14] = samples.to_bytes(8, "little")
    data[page + 22 : page + 26] = headers._ogg_checksum(bytes(data[page:])).to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("samples", [2**25, 2**33, 2**62, 2**63 - 1])
def test_an_ogg_that_promises_more_than_it_holds_is_refused(tmp_path: Path, samples: int):
    path = claiming(tmp_path / "a.ogg", samples)
    with bounded(200, 10) as cost, pytest.raises(audio.AudioError, match=r"a\.ogg: is damaged"):
        audio.read(path)
    assert cost.mebibytes < 50
    for rate in (RATE, 16000):  # in a data set it is skipped
        audio.write(tmp_path / "b.wav", np.zeros(RATE), RATE)
        assert len(open_corpus(tmp_path, sample_rate=rate, normalize="peak").bad) == 1


def _flac_of(junk: bytes) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(RATE), RATE, format="FLAC")
    data = bytearray(stream.getvalue())
    data[8 + 7 : 8 + 10] = b"\xff\xff\xff"  # the largest frame
    return bytes(data) + junk


RIFF = b"RIFF\xff\xff\xff\x7fWAVE"
LARGE = 64 * 2**20
HEADERS = {
    "zeros.wav": lambda: RIFF + bytes(LARGE),
    "empty-chunks.wav": lambda: RIFF + b"junk\0\0\0\0" * (LARGE // 8),
    "empty-chunks.aiff": lambda: b"FORM\x7f\xff\xff\xffAIFF" + b"junk\0\0\0\0" * (LARGE // 8),
    "tags.mp3": lambda: b"ID3\3\0\0\0\0\0\0" * (LARGE // 10),
    "ones.mp3": lambda: b"\xff\xfb\x90\0" + bytes(413) + b"\xff" * LARGE,
    "junk.flac": lambda: _flac_of(b"\xff\xf8\x59\x08" * (LARGE // 4)),
    "zeros.ogg": lambda: b"OggS" + bytes(LARGE),
    "zeros.caf": lambda: b"caff\0\1\0\0" + bytes(LARGE),
    "empty-chunks.caf": lambda: b"caff\0\1\0\0" + b"free\0\0\0\0\0\0\0\0" * (LARGE // 12),
    "empty-chunks.w64": lambda: headers._W64 + bytes(24) + (b"junk" + bytes(20)) * (LARGE // 24),
    "zeros.au": lambda: b".snd" + bytes(LARGE),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_long_file_of_little_audio_takes_little_time(tmp_path: Path, name: str):
    """The walk through 256 MiB of zeros as chunks of no length took 19 s."""
    (tmp_path / name).write_bytes(HEADERS[name]())
    refused = pytest.raises(audio.AudioError, match=re.escape(name))
    with bounded(400, 20) as cost, refused if name != "junk.flac" else contextlib.nullcontext():
        audio.read(tmp_path / name)
    assert cost.seconds < 3


def test_batches_that_memory_cannot_hold_are_refused_with_the_number_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    for name in ("a.wav", "b.wav"):
        audio.write(tmp_path / "data" / name, torch.rand(20_000) - 0.5, RATE)

    def attempt(mebibytes: int, **settings: Any) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda: mebibytes * MIB)
        train(config_of(tmp_path / "data", tmp_path / "run", max_steps=1, **settings))

    with pytest.raises(WavearError, match=r"batch_size is 4096: a step needs .* with acc") as found:
        attempt(100, batch_size=4096)
    numbers = re.search(r"; (\d+) fits, or 4096 with accumulate (\d+)", str(found.value))
    assert numbers is not None
    batch, parts = numbers.groups()
    assert 4096 % int(parts) == 0
    assert 4096 // int(parts) <= int(batch) < 4096
    with pytest.raises(WavearError, match=r"segment is 10{11}: .*; \d+ fits with a batch of 1"):
        attempt(100, segment=10**11)
    attempt(100, batch_size=int(batch))
    # Less is kept where the layers are computed again.
    large: Any = {"batch_size": 64, "segment": 4096, "overwrite": True}
    with pytest.raises(WavearError, match="batch_size is 64"):
        attempt(180, **large)
    attempt(180, **large, activation_checkpointing=True)
    monkeypatch.undo()
    assert (machine.available_memory() or MIB) >= MIB


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({"limit": "1000000", "used": "900000"}, 100_000 + 300_000),  # the cache of files is free
        ({"limit": "1000000", "used": "1300000"}, 0),
        ({"limit": "max", "used": "900000"}, 5 * 1024 * 1024),
        ({}, 5 * 1024 * 1024),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: dict[str, str], free: int
):
    (tmp_path / "meminfo").write_text("MemFree: 1024 kB\nMemAvailable: 5120 kB\nOther: 0\n")
    for name, text in group.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text("active_file 100000\ninactive_file 200000\nanon 5\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_GROUPS", ((tmp_path, "limit", "used", ""),))
    assert machine.available_memory() == free


@pytest.mark.parametrize("rate", [RATE, 12000])
@pytest.mark.parametrize(("normalize", "trim"), [("peak", None), ("rms", 40.0), ("none", 30.0)])
def test_levels_in_blocks_equal_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, normalize: Any, trim: float | None
):
    generator = np.random.default_rng(0)
    level = np.concatenate([np.full(3001, 1e-4), np.full(20_011, 0.1), np.full(5003, 1e-4)])
    audio.write(tmp_path / "a.flac", level * generator.standard_normal(len(level)), RATE)
    start, frames = 100, 25_000
    whole = audio.read(tmp_path / "a.flac", rate, start, frames)
    kept = whole
    if trim is not None:
        kept = audio.trim_silence(whole, top_db=trim, margin=round(0.05 * rate))
    peak, rms = float(kept.abs().max()), float(kept.double().square().mean().sqrt())
    gain = {"peak": 0.9 / peak, "rms": min(10 ** (-23 / 20) / rms, 1 / peak), "none": 1.0}
    asked = Stretch(rate, start, frames, normalize, trim)
    for block in (700, 2**20):
        monkeypatch.setattr(reading, "_BLOCK", block)
        assert torch.equal(audio.read(tmp_path / "a.flac", rate, start, frames), whole)
        found = look(tmp_path / "a.flac", asked)
        assert (found.start, found.frames) == (
            start + kept.storage_offset() - whole.storage_offset(),
            len(kept) if trim is not None else frames,
        )
        assert found.gain == pytest.approx(gain[normalize], rel=1e-12)  # sums in another order


def test_levels_of_a_long_recording_take_little_memory(tmp_path: Path):
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 44100, 2) as file:
        for _ in range(20):  # 8 minutes, 160 MiB decoded
            file.write(np.full((2**20, 2), 0.25, np.float32))
    look(tmp_path / "a.flac", Stretch(22050, 0, 2**20, "rms", 40.0))
    with bounded(400, 120) as cost:
        found = look(tmp_path / "a.flac", Stretch(22050, 0, 10 * 2**20, "rms", 40.0))
    assert found.error is None
    assert cost.mebibytes < 80


# ---- mels


def _compressed(shape: str, content: bytes) -> bytes:
    """Return an .npz archive whose array `mel` has a header with a shape."""
    stream, header = io.BytesIO(), io.BytesIO()
    fields = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(fields) + 1) + fields + b"\n")
    archive = zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("mel.npy", "w", force_zip64=True) as file:
        file.write(header.getvalue() + content)
        for _ in range(0 if content else 1100):  # 1.1 GiB
            file.write(bytes(2**20))
    return stream.getvalue()


def _saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def _pickled(text: bytes) -> bytes:
    """Return a `.pt` file with a pickle of its own."""
    stream = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(_saved(torch.zeros(8, 3))))
    with old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, text if name.endswith("data.pkl") else old.read(name))
    return stream.getvalue()


def _of_type(dtype: torch.dtype) -> bytes:
    return save({"mel": torch.zeros(8, 3).to(dtype)})


MELS = {
    "expanded.pt": lambda: _saved(torch.zeros(8, 1).expand(8, 10**9)),
    "in-a-dict.pt": lambda: _saved({"mel": torch.zeros(1, 1).expand(8, 10**9)}),
    "legacy.pt": lambda: _saved(
        torch.zeros(8, 1).expand(8, 10**9), _use_new_zipfile_serialization=False
    ),
    "legacy-claim.pt": lambda: _saved(
        torch.zeros(8, 300), _use_new_zipfile_serialization=False
    ).replace(b"M\x60\x09", b"J\xff\xff\xff\x7f"),  # of 2400 numbers, 2**31 - 1
    "bytearray.pt": lambda: _pickled(
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    ),
    "float8.pt": lambda: _saved(torch.zeros(8, 3).to(torch.float8_e4m3fn)),
    "complex.pt": lambda: _saved(torch.zeros(8, 3, dtype=torch.complex64)),
    "sparse.pt": lambda: _saved(torch.zeros(8, 3).to_sparse()),
    "bomb.npz": lambda: _compressed("(8, 3)", b""),
    "header.npz": lambda: _compressed("(8, 1000000000000)", bytes(96)),
    "negative.npz": lambda: _compressed("(-8, -3)", bytes(96)),
    "nested.npz": lambda: _compressed("(" * 3000, bytes(96)),
    "header.npy": lambda: b"\x93NUMPY\1\0" + struct.pack("<H", 72)
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 1000000000000), }".ljust(72),
    "complex.safetensors": lambda: _of_type(torch.complex64),
    "float8.safetensors": lambda: _of_type(torch.float8_e5m2),
}  # fmt: skip


@pytest.mark.parametrize("name", MELS)
def test_a_mel_larger_than_its_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(MELS[name]())
    with bounded(300, 10) as cost, pytest.raises(WavearError, match=re.escape(name)):
        read_mel(tmp_path / name, MEL)
    assert cost.mebibytes < 60


def test_an_array_on_stdin_that_promises_too_much_is_refused():
    for name in ("header.npy", "header.npz"):
        data = MELS[name]()
        data = zipfile.ZipFile(io.BytesIO(data)).read("mel.npy") if name[-1] == "z" else data
        with bounded(300, 10), pytest.raises(WavearError, match="promises"):
            list(read_frames(io.BufferedReader(io.BytesIO(data)), 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "suffix", ["pt", "legacy.pt", "npz", "compressed.npz", "npy", "safetensors"]
)
def test_a_mel_that_fits_its_file_is_read(tmp_path: Path, suffix: str):
    mel = torch.randn(1, 8, 40).sub(5).requires_grad_()
    path, array = tmp_path / f"a.{suffix}", mel.detach().numpy()
    if suffix.endswith("pt"):
        zipped = suffix == "pt"
        torch.save({"mel": mel, "other": mel[0, 0]}, path, _use_new_zipfile_serialization=zipped)
    elif suffix == "safetensors":
        save_file({"mel": mel.detach()}, path)
    elif suffix == "npy":
        np.save(path, np.asfortranarray(array.astype(np.float64)))
    else:
        save = np.savez if suffix == "npz" else np.savez_compressed
        save(path, mel=np.asfortranarray(array), config=np.array(json.dumps(MEL.to_dict())))
    found = read_mel(path, MEL, source=MEL, force=True)
    assert torch.equal(found, mel[0])
    assert not found.requires_grad


# ---- memory runs out


@pytest.mark.parametrize("error", [MemoryError, "DefaultCPUAllocator: can't allocate memory"])
def test_a_file_without_enough_memory_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
):
    """The batch of all three fails, then each by itself, of which one is too long."""
    generator = np.random.default_rng(0)
    for name, frames in (("a", 6), ("b", 7), ("c", 6)):
        audio.write(tmp_path / f"{name}.wav", generator.uniform(-0.1, 0.1, 64 * frames), RATE)
    original, batches = files.generate_with, []

    def generate_with(model: Any, sampling: Any, mels: list, **options: Any) -> Any:
        batches.append(len(mels))
        if sum(mel.shape[1] for mel in mels) > 6:
            raise MemoryError if error is MemoryError else RuntimeError(error)
        return original(model, sampling, mels, **options)

    monkeypatch.setattr(files, "generate_with", generate_with)
    model = SMALL["wavenet"]()
    jobs = plan(sorted(tmp_path.glob("*.wav")), tmp_path / "out", ".wav")
    report = files.synthesize(model, jobs, Sampling(engine="reference"))
    assert (batches, report.files) == ([3, 1, 1, 1], 2)
    assert report.failed == [
        (tmp_path / "b.wav", f"{tmp_path / 'b.wav'}: not enough memory for it")
    ]


def test_a_recording_that_does_not_fit_the_memory_is_skipped(tmp_path: Path):
    generator = np.random.default_rng(0)
    audio.write(tmp_path / "a.wav", generator.uniform(-0.1, 0.1, RATE), RATE)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", RATE, 1) as file:
        for _ in range(128):  # 4.6 hours, 512 MiB decoded
            file.write(np.zeros(2**20, np.float32))
    jobs = plan(sorted(tmp_path.glob("*.*")), tmp_path / "out", ".npy", mels=False)
    files.write_mels(jobs[:1], MEL)
    with bounded(400, 60):
        report = files.write_mels(jobs, MEL)
    assert report.files == 1
    assert report.failed == [
        (tmp_path / "long.flac", f"{tmp_path / 'long.flac'}: not enough memory for it")
    ]
