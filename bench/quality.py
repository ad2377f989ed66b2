"""How good models sound: copy synthesis of recordings they were not trained on, in one table.

    python bench/quality.py runs/mine/best --data held_out
    python bench/quality.py --train 4 --train 25 --train-data my/recordings --data held_out --runs runs/quality

`--train MINUTES` trains a model first, on one core, with the command that it prints. Bits are per sample on the grid of
16-bit samples, with the true past; all else is measured on audio that the model made of the recordings' mels, at
temperature 1. The definitions are in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wavear
from wavear import audio
from wavear.bench import machine
from wavear.checkpoint import read_config
from wavear.evaluation.metrics import HNR_BANDS, MEASURES, measure
from wavear.grid import Grid
from wavear.listing import SUFFIXES

COLUMNS = {
    "pesq": "PESQ",
    "stoi": "STOI",
    "mcd": "MCD, dB",
    "log_mel": "log-mel L1",
    "period_error": "period error, cents",
    "gross_period_error": "gross, %",
    "hnr_low": "HNR 50-1000 Hz, dB",
    "hnr_middle": "1-3 kHz",
    "hnr_high": "3-8 kHz",
    "noise_floor": "floor in silence, dB",
}
_NEAR = (*HNR_BANDS, "noise_floor")  # shown as a difference from the recording


def bits_16(model: Any, waveform: np.ndarray, speaker: int | None) -> float:
    """Return the bits per sample of a waveform (T,) on the grid of 16-bit samples, with the true past."""
    x = torch.from_numpy(waveform)[None]
    nats = wavear.score(model, x, speaker=speaker)[0]
    bits = -nats.numpy() / math.log(2)
    finer = Grid("linear", 65536)
    if model.grid != finer:
        refinement = model.grid.refinement(finer)
        if refinement is None:
            return math.nan
        bits = bits + refinement[model.grid.encode(waveform)]
    return float(bits.mean())


def evaluate(checkpoint: Path, files: list[Path], weights: str, pictures: Path | None) -> dict[str, Any]:
    """Measure one checkpoint on recordings; the mean of each column over the clips that have it, and its deviation."""
    model = wavear.load(checkpoint)
    rate, hop = model.config.sample_rate, model.config.mel.hop_length
    speaker = 0 if model.config.speakers else None
    clips = []
    spent, made_samples = 0.0, 0
    for number, path in enumerate(files):
        x = audio.read(path, rate).numpy()
        x = x[: len(x) // hop * hop].astype(np.float32)
        mel = wavear.log_mel(torch.from_numpy(x)[None], model.config.mel)
        if number == 0:  # compiled and in the caches
            wavear.generate(model, mel[:, :, :8], speaker=speaker, weights=weights, threads=1)
        began = time.perf_counter()
        y = wavear.generate(model, mel, speaker=speaker, seed=number, weights=weights, threads=1)[0].numpy()
        spent, made_samples = spent + time.perf_counter() - began, made_samples + len(y)
        values, missing = measure(x, y, rate, names=tuple(COLUMNS))
        for name, why in missing.items():
            print(f"{path.name}: no {MEASURES[name].title}: {why}", file=sys.stderr)
        recorded, _ = measure(x, x, rate, names=_NEAR)
        values |= {n: values[n] - recorded[n] for n in _NEAR if n in values and n in recorded}
        clips.append(values | {"bits": bits_16(model, x, speaker)})
        if pictures is not None and number < 3:
            draw(x, y, rate, pictures / f"{checkpoint.parent.name}-{path.stem}.png")
    columns: dict[str, Any] = {"real_time": made_samples / rate / spent}
    for name in ("bits", *COLUMNS):
        found = np.array([clip[name] for clip in clips if name in clip])
        if found.size:
            spread = 1.96 * found.std(ddof=1) / math.sqrt(found.size) if found.size > 1 else 0.0
            columns[name] = (float(found.mean()), float(spread))
    return columns


def draw(recorded: np.ndarray, generated: np.ndarray, rate: int, path: Path) -> None:
    """Draw the spectrograms of a recording and of what was made of it, one above the other."""
    from wavear.training.probes import spectrogram

    images = [spectrogram(torch.from_numpy(x), rate) for x in (recorded, generated)]
    import matplotlib.image

    path.parent.mkdir(parents=True, exist_ok=True)
    gap = np.full((8, images[0].shape[1], 3), 255, np.uint8)
    matplotlib.image.imsave(path, np.concatenate([images[0], gap, images[1]]))


def train(minutes: float, options: argparse.Namespace) -> Path:
    """Train a model on one core for so many minutes, and return its best checkpoint."""
    out = Path(options.runs) / f"{options.name}{minutes:g}"
    command = ["train", str(options.train_data), "--out", str(out), "--max-minutes", f"{minutes:g}", *options.flags]
    print("$ OMP_NUM_THREADS=1 wavear " + shlex.join(command), flush=True)
    if not (out / "best").is_dir():
        subprocess.run(
            [sys.executable, "-m", "wavear", *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    return out / "best"


def row(checkpoint: Path, columns: dict[str, Any]) -> str:
    """Return a line of the table."""
    trained = read_config(checkpoint).get("training", {})
    cells = [str(checkpoint.parent.name), f"{trained.get('step', '')}"]
    for name in ("bits", *COLUMNS):
        if name not in columns:
            cells.append("")
            continue
        mean, spread = columns[name]
        digits = 3 if name in ("bits", "stoi", "log_mel") else 2 if name in ("pesq", "mcd") else 1
        sign = "+" if name in _NEAR else ""
        interval = f" ± {spread:.{digits}f}" if name in ("pesq", "log_mel") else ""
        cells.append(f"{mean:{sign}.{digits}f}{interval}")
    return "| " + " | ".join([*cells, f"{columns['real_time']:.1f}"]) + " |"


def main() -> None:
    """Parse the command line, train what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of recordings to synthesize")
    parser.add_argument("--clips", type=int, default=10, help="of these, in the order of their names")
    parser.add_argument("--train", type=float, action="append", default=[], metavar="MINUTES")
    parser.add_argument("--train-data", type=Path, help="recordings to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--name", default="minutes-", help="begin the names of runs with this")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of wavear train, the last")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--pictures", type=Path, help="write spectrograms of three clips here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [p for p in sorted(options.data.rglob("*")) if p.suffix.lower() in SUFFIXES][: options.clips]
    if not files:
        sys.exit(f"{options.data} holds no recordings")
    if options.train and options.train_data is None:
        sys.exit("--train needs --train-data")
    checkpoints = [*options.checkpoints, *(train(minutes, options) for minutes in options.train)]
    print(f"{machine()}; one core; {len(files)} clips of {options.data.name}, {options.weights}")
    titles = ["run", "steps", "bits, 16-bit grid", *COLUMNS.values(), "x real time"]
    print("| " + " | ".join(titles) + " |\n|---|" + "---:|" * (len(titles) - 1))
    for checkpoint in checkpoints:
        print(row(checkpoint, evaluate(checkpoint, files, options.weights, options.pictures)), flush=True)


if __name__ == "__main__":
    main()
