"""Write features of recordings to steer a model by: loudness, pitch, voicing, and the folder.

    python recipes/music/features.py my/sounds --out my/features

For each recording, sub/x.wav, sub/x.npy: float32 (channels, frames), one frame per `--hop` samples.

    0      loudness, dB of full scale (RMS of 64 ms around the middle of the frame), -80 at least
    1-48   pitch (pYIN): a channel for each semitone from C2 to B5, shared by the nearest two in
           proportion; 0 where there is no pitch
    49...  one channel for each folder of the first level, 1 in those of its own, if there are
           several
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
NOTES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
SEMITONES = [f"{note}{octave}" for octave in range(2, 6) for note in NOTES]
C2 = 3 / 12
"""Octaves above 55 Hz."""


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


def channels(found: np.ndarray) -> np.ndarray:
    """Return channels for a model, float32 (49, frames), from loudness, pitch and voicing.

    A model learns each pitch sooner from a channel of its own than from one number for all.

    Examples
    --------
    >>> middle_c = np.array([[-20.0], [2 + 3 / 12], [1.0]])  # octaves above 55 Hz
    >>> found = channels(middle_c)[:, 0]
    >>> float(found[0]), SEMITONES[found[1:].argmax()]
    (-20.0, 'C4')
    """
    loudness, octaves, voiced = found
    semitone = np.clip((octaves - C2) * 12, 0, len(SEMITONES) - 1)
    away = np.abs(semitone - np.arange(len(SEMITONES))[:, None])
    return np.concatenate([loudness[None], voiced * np.maximum(1 - away, 0)]).astype(np.float32)


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
        found = channels(features(audio.read(path, rate).numpy(), rate, hop))
        label = folders.index(name.parts[0]) if len(name.parts) > 1 else -1
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, labelled(found, label, len(folders)))
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
    print(f"channels: 0 loudness, 1 to {len(SEMITONES)} pitches from C2 to B5", end="")
    after = enumerate(labels, len(SEMITONES) + 1) if len(labels) > 1 else ()
    print("".join(f", {n} {label}" for n, label in after))
    return 0


if __name__ == "__main__":
    sys.exit(main())
