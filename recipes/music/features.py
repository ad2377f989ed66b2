"""Write features of recordings to steer a model by: loudness, pitch, voicing, and the folder.

    python recipes/music/features.py my/sounds --out my/features

For each recording, sub/x.wav, sub/x.npy: float32 (channels, frames), one frame per `--hop` samples.

    0    loudness, dB of full scale (RMS of 64 ms around the middle of the frame), -80 at least
    1    pitch, octaves above 55 Hz, interpolated where there is none (pYIN, 65 to 1000 Hz)
    2    1 where there is a pitch, 0 elsewhere
    3... one channel for each folder of the first level, 1 in those of its own, if there are several
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import librosa
import numpy as np

from wavear import WavearError, audio

SILENCE = -80.0
"""dB of full scale."""
WINDOW = 0.064
"""Seconds: a period of 65 Hz fits four times."""
LOWEST, HIGHEST = 65.0, 1000.0
"""Hz."""


def features(x: np.ndarray, rate: int, hop: int) -> np.ndarray:
    """Return loudness, pitch and voicing of a waveform (T,), float32 (3, frames).

    Examples
    --------
    >>> t = np.arange(8000) / 16000
    >>> found = features(0.5 * np.sin(2 * np.pi * 220 * t), 16000, 256)
    >>> found.shape, found[:, 15].round(1).tolist()
    ((3, 32), [-9.0, 2.0, 1.0])
    """
    frames, window = -(-len(x) // hop), 2 * round(WINDOW * rate / 2)
    # Window f is around the middle of samples [f * hop, (f + 1) * hop).
    before = (window - hop) // 2
    padded = np.pad(x, (before, window + frames * hop - len(x)))
    rms = librosa.feature.rms(y=padded, frame_length=window, hop_length=hop, center=False)[0]
    loudness = 20 * np.log10(np.maximum(rms[:frames], 10 ** (SILENCE / 20)))
    pitch = librosa.pyin(
        padded,
        fmin=LOWEST,
        fmax=HIGHEST,
        sr=rate,
        frame_length=window,
        hop_length=hop,
        center=False,
    )[0][:frames]
    voiced = np.isfinite(pitch)
    octaves = np.zeros(frames)
    if voiced.any():
        there = np.flatnonzero(voiced)
        octaves = np.interp(np.arange(frames), there, np.log2(pitch[there] / 55))
    return np.stack([loudness, octaves, voiced]).astype(np.float32)


def labelled(found: np.ndarray, label: int, labels: int) -> np.ndarray:
    """Append a channel for each label, 1 in that of `label`; none for a single one."""
    if labels < 2:
        return found
    ones = np.zeros((labels, found.shape[1]), np.float32)
    ones[label] = 1
    return np.concatenate([found, ones])


def write(
    data: Path, out: Path, rate: int, hop: int, overwrite: bool = False
) -> tuple[int, Sequence[str]]:
    """Write the features of all recordings of a folder; return their number and the labels.

    Raises
    ------
    WavearError
        If there is no recording, or a file exists already and `overwrite` is false.
    """
    if not data.is_dir():
        raise WavearError(f"{data} is not a folder: give one with recordings")
    paths = [p for p in sorted(data.rglob("*")) if p.suffix.lower() in audio.SUFFIXES]
    if not paths:
        raise WavearError(f"{data} has no recordings")
    inside = [path.relative_to(data) for path in paths]
    folders = sorted({path.parts[0] for path in inside if len(path.parts) > 1})
    for path, name in zip(paths, inside, strict=True):
        target = (out / name).with_suffix(".npy")
        if target.exists() and not overwrite:
            raise WavearError(f"{target} exists: choose another --out, or pass --overwrite")
        found = features(audio.read(path, rate).numpy(), rate, hop)
        label = folders.index(name.parts[0]) if len(name.parts) > 1 else -1
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, labelled(found, label, len(folders)))
        print(target, flush=True)
    return len(paths), folders


def main() -> int:
    """Write the files and print what they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of recordings")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rate", type=int, default=16000, help="of the model, in Hz (16000)")
    parser.add_argument("--hop", type=int, default=256, help="samples per frame (256)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    arguments = parser.parse_args()
    try:
        count, labels = write(
            arguments.data, arguments.out, arguments.rate, arguments.hop, arguments.overwrite
        )
    except (WavearError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    print(f"{count} files in {arguments.out}, a frame per {arguments.hop} samples")
    names = ["loudness", "pitch", "voiced", *(labels if len(labels) > 1 else [])]
    print("channels: " + ", ".join(f"{n} {name}" for n, name in enumerate(names)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
