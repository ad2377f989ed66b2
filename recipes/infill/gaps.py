"""Make the conditioning of a WaveNet that fills gaps: frames of both sides, and a mask.

    python recipes/infill/gaps.py make my/recordings my/held-out --out runs/gaps
    python recipes/infill/gaps.py widen runs/wavenet/best --out runs/gaps/start
    python recipes/infill/gaps.py one speech.wav --from 1.20 --to 1.25 --out gap.npy

`make` copies the recordings, several times if asked, and writes the features of each copy: its
mel, in which frames that a gap touches are interpolated, and a channel that marks these. The gaps
lie at random places, 3 to 150 ms long (their logarithm is uniform). `widen` turns a WaveNet of
mels into one of these features that does the same, to start from. `one` writes the features of a
recording with a gap, for `wavear infill`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from wavear import FeatureConfig, MelConfig, WavearError, WaveNet, audio, gap_features, load

MEL = MelConfig()
SHORTEST, LONGEST = 0.003, 0.15  # seconds of a gap
APART = (0.2, 0.8)  # seconds between two gaps


def random_gaps(samples: int, rate: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Return gaps inside a recording, in samples."""
    gaps, at = [], 0.0
    while True:
        start = at + generator.uniform(*APART)
        at = start + np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST)))
        if at + APART[0] > samples / rate:
            return gaps
        gaps.append((round(start * rate), round(at * rate)))


def make(folders: list[Path], out: Path, copies: int, seed: int) -> None:
    """Write copies of the recordings and their features."""
    for part, folder in zip(("train", "held-out"), folders, strict=False):
        sources = sorted(p for p in folder.rglob("*") if p.suffix.lower() in audio.SUFFIXES)
        if not sources:
            raise WavearError(f"{folder} holds no recordings: name a folder of audio files")
        for copy in range(copies if part == "train" else 1):
            for number, source in enumerate(sources):
                waveform = audio.read(source, MEL.sample_rate)
                generator = np.random.default_rng([seed, copy, number, part == "train"])
                gaps = random_gaps(len(waveform), MEL.sample_rate, generator)
                place = Path(f"{part}-{copy}") / source.relative_to(folder)
                recording, features = out / part / place, out / "features" / place
                for path in (recording, features):
                    path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, recording)
                values = gap_features(waveform, gaps, MEL)[:, : len(waveform) // MEL.hop_length]
                np.save(features.with_suffix(".npy"), values.half().numpy())
        print(f"{out / part}  {len(sources)} recordings")


def widen(checkpoint: str, out: Path) -> None:
    """Write a model of mels and a mask that ignores the mask."""
    model = load(checkpoint)
    if model.config.mel != MEL:
        raise WavearError(f"{checkpoint} is not trained on wavear's default mels, as it has to be")
    if not isinstance(model, WaveNet):
        raise WavearError(
            f"{checkpoint} is a {type(model).__name__}: give a model of --family wavenet"
        )
    features = FeatureConfig(
        sample_rate=MEL.sample_rate, hop_length=MEL.hop_length, channels=MEL.bands + 1
    )
    wide = type(model)(dataclasses.replace(model.config, mel=features))
    own = model.state_dict()
    grown = {}
    for name, tensor in wide.state_dict().items():
        grown[name] = torch.zeros_like(tensor) if name.endswith("frames.weight") else tensor.clone()
        grown[name][tuple(slice(size) for size in own[name].shape)] = own[name]
    wide.load_state_dict(grown)
    wide.save(out)


def one(source: Path, begin: float, end: float, out: Path) -> None:
    """Write the features of a recording with a gap, whose ends are in seconds."""
    waveform, rate = audio.read(source, MEL.sample_rate), MEL.sample_rate
    gap = round(begin * rate), round(end * rate)
    values = gap_features(waveform, [gap], MEL).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as file:
        np.save(file, values)


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description="Make the conditioning of a WaveNet for gaps.")
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("make", help="recordings with random gaps to train on")
    each.add_argument("folders", type=Path, nargs="+", help="recordings; those to hold out")
    each.add_argument(
        "--copies", type=int, default=2, help="of each recording, with other gaps (2)"
    )
    each.add_argument("--seed", type=int, default=0)
    each.add_argument("--out", type=Path, required=True)
    each = commands.add_parser("widen", help="a WaveNet of mels, as a start")
    each.add_argument("checkpoint")
    each.add_argument("--out", type=Path, required=True)
    each = commands.add_parser("one", help="features of a recording with a gap")
    each.add_argument("source", type=Path)
    each.add_argument("--from", dest="begin", type=float, required=True, help="seconds")
    each.add_argument("--to", dest="end", type=float, required=True, help="seconds")
    each.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        if given.command == "make":
            make(given.folders, given.out, given.copies, given.seed)
        elif given.command == "widen":
            widen(given.checkpoint, given.out)
        else:
            one(given.source, given.begin, given.end, given.out)
    except (WavearError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
