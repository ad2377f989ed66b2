"""Audio files for tests: sound, encoded in any format, and changed copies of such files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from wavear.audio import reading

RATE = 22050
KINDS = ["wav", "flac", "ogg", "mp3", "aiff", "opus"]
LOSSLESS = {"wav", "flac", "aiff"}


def sound(samples: int = 40_000, seed: int = 0) -> np.ndarray:
    """Return a swept tone over noise, on the grid of 16-bit PCM."""
    time = np.arange(samples) / RATE
    noise = np.random.default_rng(seed).standard_normal(samples)
    x = 0.5 * np.sin(2 * np.pi * (200 * time + 900 * time**2)) + 0.01 * noise
    return (np.rint(x * 32768) / 32768).astype(np.float32)


def encode(path: Path, waveform: np.ndarray | None = None, rate: int = RATE, **options) -> Path:
    """Write with libsndfile, in the format of the file's suffix."""
    waveform = sound() if waveform is None else waveform
    form = next(name for name, endings in reading.ENDINGS.items() if path.suffix in endings)
    if path.suffix == ".opus":
        soundfile.write(path, waveform, 24000, format="OGG", subtype="OPUS")
    elif path.suffix == ".mp3":
        options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5, **options}
        soundfile.write(path, waveform, rate, format="MP3", **options)
    else:
        soundfile.write(path, waveform, rate, **{"format": form, **options})
    return path


def damage(path: Path, change: Callable[[bytearray], bytes | bytearray | None]) -> Path:
    """Write a changed copy of a file under a new name."""
    data = bytearray(path.read_bytes())
    changed = change(data)
    new = path.with_name(f"damaged{path.suffix}")
    new.write_bytes(data if changed is None else changed)
    return new


def put(offset_of: bytes, distance: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        at = data.index(offset_of) + distance
        data[at : at + len(value)] = value

    return change


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Drop the rights of root, who may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
