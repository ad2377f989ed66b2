"""Compare fillings of gaps of 5, 20 and 100 ms: of models, and of linear prediction.

    python bench/infilling.py ../shared/data/kerstin_de/dev --page docs/likelihood.md \\
        --checkpoints voice runs/wavenet/best runs/gaps/run/best

Of each clip a stretch is taken out at random where it is louder than its median. Columns: the ratio
of signal to error in the gap, which counts phase; the distance of the log-spectra of the gap and 10
ms on each side (RMS over bins up to 8 kHz, in dB); the level of the filling compared with the
original's; log P of the 20 ms behind the gap under one judge, the first checkpoint, which gets mels
in which the gap is not heard; processor seconds to fill a gap. A checkpoint of features is one of
recipes/infill. "No right side" is the mean candidate before any was forked.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from compression import title
from pages import write_section

import wavear
from wavear import MelConfig
from wavear.benchmark.speed import machine
from wavear.generation.infilling import gap_features, infill, janssen, seam_of

GAPS = (0.005, 0.02, 0.1)
SIDE = 0.5  # seconds on each side of a gap, at least


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


def stretch(x: torch.Tensor, rate: int, generator: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Return a part of a clip, and where its gap begins: a place louder than the clip's median."""
    step, side = rate // 100, round(SIDE * rate)
    levels = x.unfold(0, round(GAPS[-1] * rate), step).square().mean(1)
    places = torch.arange(len(levels)) * step
    inside = (places >= side) & (places + round(GAPS[-1] * rate) + side <= len(x))
    places = places[inside & (levels > levels.median())]
    start = int(places[generator.integers(len(places))])
    first = (start - side) // 256 * 256
    return x[first : start + round(GAPS[-1] * rate) + side], start - first


def main() -> None:
    """Print a table, or write it into a page."""
    parser = argparse.ArgumentParser(description="Compare fillings of gaps.")
    parser.add_argument("data", type=Path, help="folder of recordings")
    parser.add_argument("--checkpoints", nargs="+", default=["voice"])
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--page", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    models = {name: wavear.load(name) for name in arguments.checkpoints}
    judge = next(iter(models.values()))
    rate, generator = judge.config.sample_rate, np.random.default_rng(0)
    rows, own, first = defaultdict(list), "", 0.0
    for path in sorted(arguments.data.glob("*.*"))[: arguments.clips]:
        x, start = stretch(wavear.audio.read(path, rate), rate, generator)
        for seconds in GAPS:
            gap = start, start + round(seconds * rate)
            began = time.process_time()
            fillings = {"original": x, "linear prediction": janssen(x, *gap)}
            spent = dict.fromkeys(fillings, time.process_time() - began)
            for name, model in models.items():
                began, mel = time.process_time(), model.config.mel
                known = None if isinstance(mel, MelConfig) else gap_features(x, [gap], MelConfig())
                result = infill(
                    model, x, *gap, features=known, candidates=arguments.candidates, seed=3
                )
                fillings[title(name)] = result.waveform
                if model is judge:
                    own, first = title(name), result.first_seam
                spent[title(name)] = time.process_time() - began
            for name, y in fillings.items():
                found = [*compare(x, y, gap, rate), seam_of(judge, y, *gap), spent[name]]
                rows[seconds, name].append(found)
            rows[seconds, f"{own}, no right side"].append([np.nan] * 3 + [first, np.nan])
        print(path.name, flush=True)
    text = [
        f"{arguments.clips} clips, {arguments.candidates} candidates, means; ± is the standard"
        " error.",
        "",
        "| gap | filling | signal to error, dB | spectral distance, dB | level, dB | seam, nats"
        " | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (seconds, name), found in rows.items():
        means, errors = np.mean(found, axis=0), np.std(found, axis=0) / len(found) ** 0.5
        cells = [f"{m:.1f} ± {e:.1f}" for m, e in zip(means[:3], errors[:3], strict=True)]
        cells += [f"{means[3]:.3f}", f"{means[4]:.2f}"]
        if name == "original" or np.isnan(means[0]):
            cells = ["", "", "", cells[3], ""]
        text.append(f"| {1000 * seconds:.0f} ms | {name} | {' | '.join(cells)} |")
    print("\n".join(text))
    if arguments.page:
        write_section(arguments.page, "infilling", "\n".join([*text, "", machine()]))


if __name__ == "__main__":
    main()
