"""Compare fillings of gaps of 5, 20 and 100 ms: a model's, and linear prediction from both sides.

    python bench/infilling.py ../shared/data/kerstin_de/dev --page docs/likelihood.md

Of each clip a loud stretch is taken out. Columns: the ratio of signal to error in the gap, which
counts phase; the distance of the log-spectra of the gap and 10 ms on each side (RMS over bins up to
8 kHz, in dB); the level of the filling compared with the original's; log P of the seam.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from pages import write_section

import wavear
from wavear.benchmark.speed import machine
from wavear.generation.infilling import infill, janssen, seam_of

GAPS = (0.005, 0.02, 0.1)


def spectrum(x: np.ndarray) -> np.ndarray:
    """Return the log-spectrum in dB."""
    power = np.abs(np.fft.rfft(x * np.hanning(len(x)))) ** 2
    return 10 * np.log10(power + 1e-7)


def compare(x: torch.Tensor, y: torch.Tensor, gap: tuple[int, int], rate: int) -> list[float]:
    """Return signal-to-error ratio, spectral distance and level difference, in dB."""
    a, b = (z[slice(*gap)].double().numpy() for z in (x, y))
    margin = round(0.01 * rate)
    wide = slice(gap[0] - margin, gap[1] + margin)
    s, t = (spectrum(z[wide].double().numpy()) for z in (x, y))
    last = round(8000 / rate * 2 * len(s))
    distance = float(np.sqrt(np.mean((s[:last] - t[:last]) ** 2)))
    energy, error = (a**2).sum() + 1e-9, ((a - b) ** 2).sum() + 1e-9
    return [
        10 * np.log10(energy / error),
        distance,
        10 * np.log10(((b**2).sum() + 1e-9) / energy),
    ]


def main() -> None:
    """Print a table, or write it into a page."""
    parser = argparse.ArgumentParser(description="Compare fillings of gaps.")
    parser.add_argument("data", type=Path, help="folder of recordings")
    parser.add_argument("--checkpoint", default="voice")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--page", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    model = wavear.load(arguments.checkpoint)
    rate = model.config.sample_rate
    rows, spent, filled = {}, 0.0, 0.0
    for path in sorted(arguments.data.glob("*.*"))[: arguments.clips]:
        x = wavear.audio.read(path, rate)
        # The loudest stretch begins a gap; the first and last half second stay.
        levels = x.unfold(0, rate // 10, rate // 100).square().sum(1)[50:-60]
        start = (50 + int(levels.argmax())) * (rate // 100)
        for seconds in GAPS:
            gap = start, start + round(seconds * rate)
            began = time.perf_counter()
            result = infill(model, x, *gap, candidates=arguments.candidates, seed=3)
            spent, filled = spent + time.perf_counter() - began, filled + seconds
            fillings = {
                "original": (x, seam_of(model, x, *gap)),
                "model": (result.waveform, result.seam),
            }
            fillings["linear prediction"] = (y := janssen(x, *gap), seam_of(model, y, *gap))
            for name, (y, seam) in fillings.items():
                found = [*compare(x, y, gap, rate), seam]
                rows.setdefault((seconds, name), []).append(found)
            rows.setdefault((seconds, "model, no right side"), []).append(
                [np.nan] * 3 + [result.first_seam]
            )
        print(path.name, flush=True)
    text = [
        f"{arguments.clips} clips, {arguments.candidates} candidates, means; {spent:.0f} s for"
        f" {arguments.clips * len(GAPS)} gaps.",
        "",
        "| gap | filling | signal to error, dB | spectral distance, dB | level, dB | seam, nats |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (seconds, name), found in rows.items():
        means = np.mean(found, axis=0)
        cells = ["" if np.isnan(m) or name == "original" else f"{m:.1f}" for m in means[:3]]
        text.append(f"| {1000 * seconds:.0f} ms | {name} | {' | '.join(cells)} | {means[3]:.3f} |")
    print("\n".join(text))
    if arguments.page:
        write_section(arguments.page, "infilling", "\n".join([*text, "", machine()]))


if __name__ == "__main__":
    main()
