"""How good models sound: copy synthesis of recordings they were not trained on, in one table.

    python bench/quality.py runs/mine/best --data held_out python bench/quality.py --train 4,25
    --data-train my/recordings --data held_out --out docs/quality.md

`--train MINUTES` trains a model first, on one core, with the command that it prints. Bits are per
sample on the grid of 16-bit samples, with the true past; all else is measured on audio that the
model made of the recordings' mels, at temperature 1. Means over clips, with 95 % intervals by
bootstrap over clips. The definitions are in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
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
from pages import write_section

import wavear
from wavear import audio
from wavear.audio.emphasis import coefficient
from wavear.audio.grid import COMMON_GRIDS
from wavear.benchmark.speed import machine
from wavear.data.listing import SUFFIXES
from wavear.evaluation.clips import of_run
from wavear.evaluation.metrics import HNR_BANDS, MEASURES, measure
from wavear.evaluation.statistics import Interval, bootstrap
from wavear.models.checkpoint import read_config
from wavear.models.distributions import converts

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
_PICTURES = 3


def bits_16(model: Any, waveform: np.ndarray, speaker: int | None) -> float | None:
    """Return the bits per sample of a waveform (T,) on the grid of 16-bit samples, with the true past.

    None where the model has none there: its codes are of pre-emphasised audio, or finer in places.
    """
    if coefficient(model.config) or not converts(model.grid, COMMON_GRIDS["linear"]):
        return None
    nats = wavear.score(model, torch.from_numpy(waveform)[None], speaker=speaker, grid="linear")
    return -float(nats.mean()) / math.log(2)


def evaluate(
    checkpoint: Path, files: list[Path], weights: str, pictures: Path | None
) -> tuple[dict[str, Interval], float]:
    """Measure one checkpoint on recordings: the mean of each column over the clips that have it, and the speed.

    The speed is in seconds of audio per second, on one core.
    """
    model = wavear.load(checkpoint)
    if model.config.mel is None:
        sys.exit(
            f"{checkpoint} is not conditioned on mels: it has no recording to copy. Leave it out."
        )
    rate, hop = model.config.sample_rate, model.config.mel.hop_length
    names = read_config(checkpoint).get("training", {}).get("speakers", [])
    clips: list[dict[str, float]] = []
    spent, made_samples, drawn = 0.0, 0, 0
    for number, path in enumerate(files):
        x = audio.read(path, rate).numpy()
        x = x[: len(x) // hop * hop].astype(np.float32)
        if not x.size:
            print(f"{path.name}: shorter than a frame of the model's mel", file=sys.stderr)
            continue
        speaker = None
        if model.config.speakers:
            speaker = names.index(path.parent.name) if path.parent.name in names else 0
        mel = wavear.log_mel(torch.from_numpy(x)[None], model.config.mel)
        if not clips:  # compiled and in the caches
            wavear.generate(model, mel[:, :, :8], speaker=speaker, weights=weights, threads=1)
        began = time.perf_counter()
        y = wavear.generate(model, mel, speaker=speaker, seed=number, weights=weights, threads=1)[
            0
        ].numpy()
        spent, made_samples = spent + time.perf_counter() - began, made_samples + len(y)
        values, missing = measure(x, y, rate, names=tuple(COLUMNS))
        for name, why in missing.items():
            print(f"{path.name}: no {MEASURES[name].title}: {why}", file=sys.stderr)
        recorded, _ = measure(x, x, rate, names=_NEAR)
        values |= {n: values[n] - recorded[n] for n in _NEAR if n in values and n in recorded}
        bits = bits_16(model, x, speaker)
        clips.append(values if bits is None else values | {"bits": bits})
        if pictures is not None and drawn < _PICTURES:
            draw(x, y, rate, pictures / f"{run_name(checkpoint)}-{path.stem}.png")
            drawn += 1
    if not clips:
        sys.exit(f"none of the recordings holds a frame of the mel of {checkpoint}")
    columns = {}
    for name in ("bits", *COLUMNS):
        if found := [clip[name] for clip in clips if name in clip]:
            columns[name] = bootstrap(found)
    return columns, made_samples / rate / spent


def run_name(checkpoint: Path) -> str:
    """Return the name of the run that a checkpoint is of."""
    return (
        checkpoint.resolve().parent.name if checkpoint.name in ("best", "last") else checkpoint.name
    )


def draw(recorded: np.ndarray, generated: np.ndarray, rate: int, path: Path) -> None:
    """Draw the spectrograms of a recording and of what was made of it, one above the other."""
    from wavear.training.probes import spectrogram

    images = [spectrogram(torch.from_numpy(x), rate) for x in (recorded, generated)]
    import matplotlib.image

    path.parent.mkdir(parents=True, exist_ok=True)
    gap = np.full((8, images[0].shape[1], 3), 255, np.uint8)
    matplotlib.image.imsave(path, np.concatenate([images[0], gap, images[1]]))


def train(minutes: float, options: argparse.Namespace) -> Path:
    """Train a model on one core for some minutes, and return its best checkpoint."""
    out = Path(options.runs) / f"{options.name}{minutes:g}"
    command = [
        "train",
        str(options.data_train),
        "--out",
        str(out),
        "--max-minutes",
        f"{minutes:g}",
        *options.flags,
    ]
    print("$ OMP_NUM_THREADS=1 wavear " + shlex.join(command), flush=True)
    if not (out / "best").is_dir():
        subprocess.run(
            [sys.executable, "-m", "wavear", *command],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return out / "best"


def row(checkpoint: Path, columns: dict[str, Interval], speed: float) -> str:
    """Return a line of the table."""
    step = read_config(checkpoint).get("training", {}).get("step")
    record = of_run(checkpoint, "train.json")
    history = (
        [] if record is None else json.loads(record.read_text(encoding="utf-8")).get("history", [])
    )
    seconds = next((entry["seconds"] for entry in history if entry["step"] == step), None)
    cells = [run_name(checkpoint)]
    cells += ["" if seconds is None else f"{seconds / 60:.1f}", "" if step is None else f"{step:,}"]
    cells += [shown(name, columns[name]) if name in columns else "" for name in ("bits", *COLUMNS)]
    return "| " + " | ".join([*cells, f"{speed:.1f}"]) + " |"


def shown(name: str, value: Interval) -> str:
    """Return a mean and its interval."""
    digits = 3 if name in ("bits", "stoi", "log_mel") else 2 if name in ("pesq", "mcd") else 1
    sign = "+" if name in _NEAR else ""
    text = f"{value.mean:{sign}.{digits}f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} ({value.low:{sign}.{digits}f} to {value.high:{sign}.{digits}f})"


def minutes_of(text: str) -> list[float]:
    """Read numbers of minutes, separated by commas.

    Examples
    --------
    >>> minutes_of("4,25")
    [4.0, 25.0]
    """
    found = [float(part) for part in text.split(",")]
    if not all(0 < minutes < math.inf for minutes in found):
        raise ValueError("minutes must be above 0")
    return found


def main() -> None:
    """Parse the command line, train what is asked for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of recordings to synthesize"
    )
    parser.add_argument(
        "--clips", type=int, default=10, help="of these, in the order of their names"
    )
    parser.add_argument(
        "--train", type=minutes_of, action="extend", default=[], metavar="MINUTES[,MINUTES...]"
    )
    parser.add_argument("--data-train", "--train-data", type=Path, help="recordings to train on")
    parser.add_argument(
        "--out", type=Path, help="write the table into this page too, between two comments"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--name", default="minutes-", help="begin the names of runs with this")
    parser.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="further flags of wavear train, the last",
    )
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--pictures", type=Path, help="write spectrograms of three clips here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [p for p in sorted(options.data.rglob("*")) if p.suffix.lower() in SUFFIXES][
        : options.clips
    ]
    if not files:
        sys.exit(f"{options.data} holds no recordings")
    if options.train and options.data_train is None:
        sys.exit("--train needs --data-train, recordings to train on")
    if not options.checkpoints and not options.train:
        sys.exit(
            "there is nothing to measure: name checkpoints, or train some with --train MINUTES"
        )
    checkpoints = [*options.checkpoints, *(train(minutes, options) for minutes in options.train)]
    lines = [f"{machine()}; one core; {len(files)} clips of {options.data.name}, {options.weights}"]
    lines += ["", "Means over clips, 95 % intervals by bootstrap over clips."]
    titles = ["run", "minutes", "steps", "bits, 16-bit grid", *COLUMNS.values(), "x real time"]
    lines += ["", "| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    print("\n".join(lines), flush=True)
    for checkpoint in checkpoints:
        lines.append(
            row(checkpoint, *evaluate(checkpoint, files, options.weights, options.pictures))
        )
        print(lines[-1], flush=True)
    if options.out is not None:
        write_section(options.out, "quality", "\n".join(lines))


if __name__ == "__main__":
    main()
