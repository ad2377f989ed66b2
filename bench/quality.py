"""Measure how good models sound: copy synthesis of held-out recordings, in one table.

    python bench/quality.py runs/mine/best --data held_out
    python bench/quality.py --train 4,25 --data-train recordings --data held_out --out page.md

`--train MINUTES` trains a model first, on one core, with the command that it prints. Bits are per
sample on the grid of 16-bit samples, with the true past; the other columns are of audio that the
model made from the recordings' mels, at temperature 1. Means over clips, with 95 % intervals by
bootstrap over clips. The definitions are in docs/evaluation.md; "MCD of 13" is of 13 coefficients
instead of 24, as many publications have it.
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
from wavear.audio import SUFFIXES
from wavear.audio.emphasis import coefficient
from wavear.audio.grid import COMMON_GRIDS
from wavear.common.machine import machine
from wavear.evaluation.clips import of_run
from wavear.evaluation.metrics import MEASURES, NEAR, measure, mel_cepstral_distortion
from wavear.evaluation.pictures import mel_pixels
from wavear.evaluation.statistics import Interval, bootstrap
from wavear.models.checkpoint import read_config
from wavear.models.distributions import converts
from wavear.training.run_directory import FIRST_PART

COLUMNS = {  # those of NEAR are differences from the recording
    "pesq": "PESQ",
    "stoi": "STOI",
    "mcd": "MCD, dB",
    "mcd_13": "MCD of 13, dB",
    "log_mel": "log-mel L1",
    "period_error": "period error, cents",
    "gross_period_error": "gross, %",
    "hnr_low": "HNR 50-1000 Hz, dB",
    "hnr_middle": "1-3 kHz",
    "hnr_high": "3-8 kHz",
    "noise_floor": "floor in silence, dB",
}
_DIGITS = {"bits": 3, "stoi": 3, "log_mel": 3, "pesq": 2, "mcd": 2, "mcd_13": 2}
_PICTURES = 3


def bits_16(model: Any, waveform: np.ndarray, speaker: int | None) -> float | None:
    """Return the bits per sample of a waveform (T,) on the grid of 16-bit samples, or None.

    A model has none if its codes are of pre-emphasised audio, or finer in places.
    """
    if coefficient(model.config) or not converts(model.grid, COMMON_GRIDS["linear"]):
        return None
    nats = wavear.score(model, torch.from_numpy(waveform)[None], speaker=speaker, grid="linear")
    return -float(nats.mean()) / math.log(2)


def evaluate(
    checkpoint: Path, files: list[Path], weights: str, particles: int, pictures: Path | None
) -> tuple[dict[str, Interval], float]:
    """Return the mean of each column over the clips that have it, and the speed of one core.

    The speed is in seconds of audio per second.
    """
    model = wavear.load(checkpoint)
    if model.config.mel is None:
        sys.exit(f"{checkpoint} is not conditioned on mels: leave it out")
    rate, hop = model.config.sample_rate, model.config.mel.hop_length
    names = read_config(checkpoint).get("training", {}).get("speakers", [])
    clips: list[dict[str, float]] = []
    spent, made_samples = 0.0, 0
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
        settings: Any = {"speaker": speaker, "weights": weights, "threads": 1}
        settings["particles"] = particles
        if not clips:  # so that compilation is not timed
            wavear.generate(model, mel[:, :, :8], **settings)
        began = time.perf_counter()
        y = wavear.generate(model, mel, seed=number, **settings)[0].numpy()
        spent, made_samples = spent + time.perf_counter() - began, made_samples + len(y)
        values, missing = measure(x, y, rate, names=[n for n in COLUMNS if n in MEASURES])
        values["mcd_13"] = mel_cepstral_distortion(x, y, rate, 13)
        for name, why in missing.items():
            print(f"{path.name}: no {MEASURES[name].title}: {why}", file=sys.stderr)
        recorded, _ = measure(x, x, rate, names=NEAR)
        values |= {n: values[n] - recorded[n] for n in NEAR if n in values and n in recorded}
        bits = bits_16(model, x, speaker)
        if pictures is not None and len(clips) < _PICTURES:
            draw(x, y, rate, pictures / f"{run_name(checkpoint)}-{path.stem}.png")
        clips.append(values if bits is None else values | {"bits": bits})
    if not clips:
        sys.exit(f"none of the recordings holds a frame of the mel of {checkpoint}")
    found = {name: [c[name] for c in clips if name in c] for name in ("bits", *COLUMNS)}
    columns = {name: bootstrap(values) for name, values in found.items() if values}
    return columns, made_samples / rate / spent


def run_name(checkpoint: Path) -> str:
    """Return the name of the run that a checkpoint is of."""
    path = checkpoint.resolve()
    if checkpoint.name not in ("best", "last"):
        return checkpoint.name
    run = path.parent
    return f"{run.parent.name}, {FIRST_PART}" if run.name == FIRST_PART else run.name


def draw(recorded: np.ndarray, generated: np.ndarray, rate: int, path: Path) -> None:
    """Draw the spectrograms of a recording and of its copy, one above the other."""
    import matplotlib.image

    above, below = (mel_pixels(x, rate) for x in (recorded, generated))
    path.parent.mkdir(parents=True, exist_ok=True)
    gap = np.full((8, above.shape[1], 3), 255, np.uint8)
    matplotlib.image.imsave(path, np.concatenate([above, gap, below]))


def train(minutes: float, options: argparse.Namespace) -> Path:
    """Train a model on one core for some minutes, and return its best checkpoint."""
    out = Path(options.runs) / f"{options.name}{minutes:g}"
    command = ["train", str(options.data_train), "--out", str(out)]
    command += ["--max-minutes", f"{minutes:g}", *options.flags]
    print("$ OMP_NUM_THREADS=1 wavear " + shlex.join(command), flush=True)
    if not (out / "best").is_dir():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "wavear", *command], check=True, env=environment)
    return out / "best"


def row(checkpoint: Path, particles: int, columns: dict[str, Interval], speed: float) -> str:
    """Return a line of the table."""
    step = read_config(checkpoint).get("training", {}).get("step")
    record, history = of_run(checkpoint, "train.json"), []
    if record is not None:
        history = json.loads(record.read_text(encoding="utf-8")).get("history", [])
    seconds = next((entry["seconds"] for entry in history if entry["step"] == step), None)
    first = None if record is None else record.parent / FIRST_PART / record.name
    if seconds is not None and first is not None and first.is_file():
        before = json.loads(first.read_text(encoding="utf-8"))
        seconds, step = seconds + before["seconds"], step + before["steps"]
    cells = [run_name(checkpoint) + (f", {particles} particles" if particles > 1 else "")]
    cells += ["" if seconds is None else f"{seconds / 60:.1f}", "" if step is None else f"{step:,}"]
    cells += [shown(name, columns[name]) if name in columns else "" for name in ("bits", *COLUMNS)]
    return "| " + " | ".join([*cells, f"{speed:.1f}"]) + " |"


def shown(name: str, value: Interval) -> str:
    """Return a mean and its interval as text."""
    form = f"{'+' if name in NEAR else ''}.{_DIGITS.get(name, 1)}f"
    if value.low is None or value.high is None:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


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
    """Parse the command line, train the models asked for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path)
    add("--data", type=Path, required=True, help="folder of recordings to synthesize")
    add("--clips", type=int, default=10, help="number of these, in the order of their names")
    add("--train", type=minutes_of, action="extend", default=[], metavar="MINUTES[,MINUTES...]")
    add("--data-train", "--train-data", type=Path, help="recordings to train on")
    add("--out", type=Path, help="write the table into this page too, between two comments")
    add("--runs", type=Path, default=Path("runs/quality"))
    add("--name", default="minutes-", help="begin the names of runs with this")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="flags of wavear train, the last")
    add("--weights", default="float32")
    add("--particles", type=int, nargs="+", default=[1], help="a row for each number of particles")
    add("--pictures", type=Path, help="write spectrograms of three clips here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [p for p in sorted(options.data.rglob("*")) if p.suffix.lower() in SUFFIXES]
    files = found[: options.clips]
    if not files:
        sys.exit(f"{options.data} holds no recordings")
    if options.train and options.data_train is None:
        sys.exit("--train needs --data-train, recordings to train on")
    if not options.checkpoints and not options.train:
        sys.exit("there is nothing to measure: name checkpoints, or train with --train MINUTES")
    checkpoints = [*options.checkpoints, *(train(minutes, options) for minutes in options.train)]
    lines = [f"{machine()}; one core; {len(files)} clips of {options.data.name}, {options.weights}"]
    lines += ["", "Means over clips, 95 % intervals by bootstrap over clips."]
    titles = ["run", "minutes", "steps", "bits, 16-bit grid", *COLUMNS.values(), "x real time"]
    lines += ["", "| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    print("\n".join(lines), flush=True)
    for checkpoint in checkpoints:
        for count in options.particles:
            pictures = options.pictures if count == options.particles[0] else None
            columns, speed = evaluate(checkpoint, files, options.weights, count, pictures)
            lines.append(row(checkpoint, count, columns, speed))
            print(lines[-1], flush=True)
    if options.out is not None:
        write_section(options.out, "quality", "\n".join(lines))


if __name__ == "__main__":
    main()
