"""Measure whether a long synthesis drifts: one stream of some minutes, a line for each of them.

    python bench/long.py voice --data held_out --minutes 10

The recordings are repeated, one after another, until they fill the time, and synthesized from their
mel as one stream, whose state is never reset. If errors grew with time, the last lines would be
worse than the first ones. Peak: the largest sample of the minute, generated and recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import wavear
from wavear import audio
from wavear.audio import SUFFIXES
from wavear.common.machine import machine
from wavear.evaluation.metrics import measure

COLUMNS = {"log_mel": "log-mel L1", "mcd": "MCD, dB", "noise_floor": "floor in silence, dB"}


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of recordings")
    parser.add_argument("--minutes", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = wavear.load(options.checkpoint)
    rate, hop = model.config.sample_rate, model.config.mel.hop_length
    files = [p for p in sorted(options.data.rglob("*")) if p.suffix.lower() in SUFFIXES]
    if not files:
        sys.exit(f"{options.data} holds no recordings")
    once = np.concatenate([audio.read(path, rate).numpy() for path in files])
    samples = 60 * options.minutes * rate // hop * hop
    x = np.resize(once, samples).astype(np.float32)
    mel = wavear.log_mel(torch.from_numpy(x)[None], model.config.mel)
    y = wavear.generate(model, mel, seed=0, threads=1)[0].numpy()
    print(f"{machine()}; {options.checkpoint}; {len(files)} recordings of {options.data.name},")
    print(f"{once.size / rate:.0f} s, repeated in one stream of {options.minutes} minutes\n")
    titles = ["minute", "level, dB", *COLUMNS.values(), "peak", "of the recording"]
    print("| " + " | ".join(titles) + " |\n|" + "---:|" * len(titles))
    for minute in range(options.minutes):
        part = slice(60 * minute * rate, 60 * (minute + 1) * rate)
        values, _ = measure(x[part], y[part], rate, names=tuple(COLUMNS))
        own, _ = measure(x[part], x[part], rate, names=("noise_floor",))
        values["noise_floor"] -= own["noise_floor"]
        level = 20 * np.log10(np.std(y[part]) / np.std(x[part]))
        cells = [f"{minute + 1}", f"{level:+.2f}", *(f"{values[name]:.3f}" for name in COLUMNS)]
        peaks = [f"{np.abs(each[part]).max():.3f}" for each in (y, x)]
        print("| " + " | ".join([*cells, *peaks]) + " |", flush=True)


if __name__ == "__main__":
    main()
