"""Files to change, and what reads them. Each target yields cases: a file's name and its bytes."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save

import wavear
from fuzz.mutate import mutated, mutated_json
from wavear import MelConfig, Stream, audio
from wavear.audio import headers
from wavear.common.errors import WavearError
from wavear.common.untrusted import checksum
from wavear.data.corpus import open_corpus
from wavear.data.levels import Stretch, look
from wavear.generation.frame_reader import read_frames
from wavear.mel.mel_files import read_mel
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.predictive import PredictiveWaveNet, PredictiveWaveNetConfig
from wavear.models.transformer import Transformer, TransformerConfig
from wavear.models.wavenet import WaveNet, WaveNetConfig
from wavear.training.state import load_state, save_state

RATE = 8000
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000.0)
_SIZES: Any = {"sample_rate": RATE, "head_channels": 4}
_MODELS: list[Callable[[], Any]] = [
    lambda: WaveNet(
        WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4, mel=MEL, **_SIZES)
    ),
    lambda: PredictiveWaveNet(
        PredictiveWaveNetConfig(layers=1, residual_channels=4, skip_channels=4, mel=MEL, **_SIZES)
    ),
    lambda: GRU(GRUConfig(channels=4, input_channels=4, speakers=2, **_SIZES)),
    lambda: Transformer(TransformerConfig(channels=8, heads=2, layers=1, window=8, **_SIZES)),
    lambda: Linear(LinearConfig(order=3, sample_rate=RATE)),
]


def _waveform(seconds: float = 0.6) -> np.ndarray:
    return 0.3 * np.random.default_rng(0).standard_normal(round(RATE * seconds)).clip(-3, 3)


def _sound(kind: str, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, _waveform(), RATE, format=kind, subtype=subtype)
    return stream.getvalue()


_SOUNDS = {
    "a.wav": ("WAV", None), "b.wav": ("WAV", "FLOAT"), "c.wav": ("WAV", "IMA_ADPCM"),
    "d.wav": ("WAV", "GSM610"), "a.rf64.wav": ("RF64", None), "a.flac": ("FLAC", None),
    "a.ogg": ("OGG", "VORBIS"), "b.ogg": ("OGG", "OPUS"), "a.mp3": ("MP3", None),
    "a.aiff": ("AIFF", None), "a.caf": ("CAF", "ALAC_16"), "a.au": ("AU", None),
    "a.w64": ("W64", None),
}  # fmt: skip


class Audio:
    """Recordings: header, samples, a resampled part, level."""

    def __init__(self, folder: Path):
        self.sounds = {name: _sound(*kind) for name, kind in _SOUNDS.items()}

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a changed file; in an Ogg, with the right checksums half of the time."""
        name = rng.choice(list(self.sounds))
        data = mutated(self.sounds[name], rng)
        if name.endswith("ogg") and rng.random() < 0.7:
            data = _sealed(data)
        (folder / name).write_bytes(data)
        return folder / name

    def run(self, path: Path) -> None:
        """Read it in each way, whether or not another way refuses it."""
        for read in (
            lambda: audio.info(path),
            lambda: audio.read(path),
            lambda: audio.read(path, 11025, start=100, frames=1000),
        ):
            try:
                read()
            except (WavearError, OSError):
                continue
        look(path, Stretch(RATE, 0, 2**40, "rms", 40.0))


def _sealed(data: bytes) -> bytes:
    """Return Ogg pages with the right checksums."""
    content, at = bytearray(data), data.find(b"OggS")
    while at >= 0:
        end = headers._ogg_page_end(bytes(content), at)
        if end > len(content):
            break
        checked = headers._ogg_checksum(bytes(content[at:end]))
        content[at + 22 : at + 26] = checked.to_bytes(4, "little")
        at = content.find(b"OggS", end)
    return bytes(content)


class Mels:
    """Mels in files and on stdin."""

    def __init__(self, folder: Path):
        mel = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) - 5
        config = json.dumps(MEL.to_dict())
        self.files: dict[str, bytes] = {"a.safetensors": save({"mel": mel}, {"config": config})}
        for name, write in {
            "a.npy": lambda file: np.save(file, mel.numpy()),
            "a.npz": lambda file: np.savez(file, mel=mel.numpy(), config=np.array(config)),
            "b.npz": lambda file: np.savez_compressed(file, mel=mel.numpy()),
            "a.pt": lambda file: torch.save({"mel": mel, "hop": 64}, file),
            "b.pt": lambda file: torch.save(mel, file, _use_new_zipfile_serialization=False),
        }.items():
            stream = io.BytesIO()
            write(stream)
            self.files[name] = stream.getvalue()

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a changed file; in a zip archive, change a member half of the time."""
        name = rng.choice(list(self.files))
        data = self.files[name]
        if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.7:
            data = _in_zip(data, rng)
        else:
            data = mutated(data, rng)
        (folder / name).write_bytes(data)
        return folder / name

    def run(self, path: Path) -> None:
        """Read it as a file; a .npy from stdin too."""
        try:
            read_mel(path, MEL, force=True)
        finally:
            if path.suffix == ".npy":
                list(read_frames(io.BufferedReader(io.BytesIO(path.read_bytes())), 8))  # type: ignore[arg-type]


def _in_zip(data: bytes, rng: random.Random) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = rng.choice(old.namelist())
        for entry in old.infolist():
            content = old.read(entry)
            content = mutated(content, rng) if entry.filename == chosen else content
            new.writestr(entry.filename, content, compress_type=entry.compress_type)
    return stream.getvalue()


class Checkpoints:
    """Checkpoints: the configuration, the header, the weights; what loads makes some audio."""

    def __init__(self, folder: Path):
        self.saved = []
        for number, make in enumerate(_MODELS):
            torch.manual_seed(0)
            path = make().save(folder / str(number))
            self.saved.append(
                [(path / n).read_bytes() for n in ("config.json", "model.safetensors")]
            )
            self.run(path)  # compiles what it needs, which takes its time

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a checkpoint whose configuration is changed in both files, or bytes in one."""
        config, weights = rng.choice(self.saved)
        if rng.random() < 0.6:
            described = mutated_json(json.loads(config), rng)
            config = json.dumps(described).encode()
            weights = _with_metadata(weights, {"wavear": config.decode()}, rng)
        elif rng.random() < 0.3:
            config = mutated(config, rng)
        else:
            weights = mutated(weights, rng)
        path = folder / "checkpoint"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_bytes(config)
        (path / "model.safetensors").write_bytes(weights)
        return path

    def run(self, path: Path) -> None:
        """Load it, and generate."""
        model = wavear.load(path)
        layout = model.config.mel
        mel = None if layout is None else torch.zeros(layout.bands, 1) - 5
        samples = 20 if layout is None else min(20, layout.hop_length)
        speaker = 0 if model.config.speakers else None
        wavear.generate(model, mel, samples=samples, speaker=speaker, engine="reference")


def _with_metadata(data: bytes, metadata: dict[str, str], rng: random.Random) -> bytes:
    """Return a safetensors file with other metadata, and now and then a changed header."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = metadata
    if rng.random() < 0.2:
        header = mutated_json(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


class States:
    """States of streams, with the right checksum half of the time; what loads is resumed."""

    def __init__(self, folder: Path):
        self.models, self.states = [], []
        for make in _MODELS:
            torch.manual_seed(0)
            model = make()
            stream = Stream(model, engine="reference", speaker=0 if model.config.speakers else None)
            stream.pull(20) if model.config.mel is None else stream.push(torch.randn(8, 12) - 5)
            self.models.append(model)
            self.states.append(stream.save(folder / "state").read_bytes())

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a state whose description, tensors or bytes are changed."""
        number = rng.randrange(len(self.states))
        data, path = self.states[number], folder / f"{number}.state"
        path.write_bytes(data)
        if rng.random() < 0.7:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["wavear_stream"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if rng.random() < 0.3:
                name = rng.choice(list(tensors))
                tensors[name] = _changed_tensor(tensors[name], rng)
            else:
                about = mutated_json(about, rng)
            text = json.dumps(about)
            data = save(tensors, {"wavear_stream": text, "wavear_crc32": checksum(text, tensors)})
        else:
            data = mutated(data, rng)
        path.write_bytes(data)
        return path

    def run(self, path: Path) -> None:
        """Resume it, and make some samples."""
        model = self.models[int(path.stem)]
        stream = Stream.load(model, path, engine="reference")
        if stream._utterance.ready > 1000:
            return  # audio that a state asks for, up to a day of it, takes its time
        stream.pull(5) if model.config.mel is None else stream.push(torch.zeros(8, 3) - 5)


def _changed_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kind = rng.randrange(4)
    if kind == 0:
        return tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
    if kind == 1:
        return tensor.to(rng.choice([torch.float16, torch.int8, torch.complex64, torch.bool]))
    changed = tensor.clone().reshape(-1)
    if changed.numel():
        changed[rng.randrange(len(changed))] = rng.choice([-1, 0, 5, 300, 2**30, 2**62])
    return changed.reshape(tensor.shape)


class TrainingStates:
    """States of trainings."""

    def __init__(self, folder: Path):
        state = {"state_dict": {"a": torch.zeros(3)}, "loops": [1, (2, None)], "global_step": 3}
        save_state(state, folder / "state")
        self.data = (folder / "state").read_bytes()

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write one without a checksum, or with changed bytes."""
        path = folder / "step.safetensors"
        size = int.from_bytes(self.data[:8], "little")
        metadata = json.loads(self.data[8 : 8 + size])["__metadata__"]
        about = mutated_json(json.loads(metadata["wavear_state"]), rng)
        changed = _with_metadata(self.data, {"wavear_state": json.dumps(about)}, rng)
        path.write_bytes(changed if rng.random() < 0.7 else mutated(self.data, rng))
        return path

    def run(self, path: Path) -> None:
        """Load it."""
        load_state(path)


class Manifests:
    """Lists of recordings: CSV, tabs, bars, JSON lines."""

    def __init__(self, folder: Path):
        rows = [
            {"path": f"{n}.wav", "start": 0.1 * n, "duration": 0.2, "speaker": "a", "split": split}
            for n, split in enumerate(["train", "train", "validation", ""])
        ]
        self.lists: dict[str, bytes] = {
            "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "b.csv": "".join(f"{n}.wav|some text\n" for n in range(4)).encode(),
        }
        self.rows = rows
        for name, mark in (("c.csv", ","), ("d.tsv", "\t"), ("e.txt", "|")):
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
            self.lists[name] = text.getvalue().encode()

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a changed list next to four recordings."""
        for n in range(4):
            if not (folder / f"{n}.wav").exists():
                audio.write(folder / f"{n}.wav", _waveform(), RATE)
        if rng.random() < 0.3:
            lines = [json.dumps(mutated_json(row, rng)) for row in self.rows]
            name, data = "f.jsonl", "\n".join(lines).encode()
        else:
            name = rng.choice(list(self.lists))
            data = mutated(self.lists[name], rng)
        (folder / name).write_bytes(data)
        return folder / name

    def run(self, path: Path) -> None:
        """Open it as a training does."""
        open_corpus(path, sample_rate=RATE, normalize="peak")


class Shards:
    """Tar files of recordings and notes."""

    def __init__(self, folder: Path):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for n in range(4):
                note = json.dumps({"speaker": "é" * 30, "split": "train"}).encode()
                for name, content in ((f"{'é' * n}{n}.wav", _sound("WAV")), (f"{n}.json", note)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        self.data = stream.getvalue()

    def case(self, rng: random.Random, folder: Path) -> Path:
        """Write a changed shard; of a member's header, with the right checksum half of the time."""
        content = bytearray(self.data)
        if rng.random() < 0.6:
            at = 512 * rng.randrange(len(content) // 512)
            block = mutated(bytes(content[at : at + 512]), rng)[:512].ljust(512, b"\0")
            if rng.random() < 0.5:
                total = sum(block[:148]) + 8 * 32 + sum(block[156:])
                block = block[:148] + b"%06o\0 " % total + block[156:]
            content[at : at + 512] = block
        else:
            content = bytearray(mutated(bytes(content), rng))
        (folder / "a.tar").write_bytes(content)
        return folder / "a.tar"

    def run(self, path: Path) -> None:
        """Open it as a training does."""
        open_corpus(path, sample_rate=RATE, normalize="peak")


TARGETS: dict[str, type[Any]] = {
    "audio": Audio,
    "mels": Mels,
    "checkpoints": Checkpoints,
    "states": States,
    "training-states": TrainingStates,
    "manifests": Manifests,
    "shards": Shards,
}
