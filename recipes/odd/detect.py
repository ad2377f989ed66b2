"""Make the sounds of a machine, some with faults, and find these by likelihood ratios.

    python recipes/odd/detect.py --out runs/odd

A linear model is fitted to normal sounds. Each test sound gets four scores: the ratio of the
likelihoods under this model and under linear prediction that adapts to the sound itself, as a mean
and of the oddest 0.1 s; the likelihood under this model by itself; and the distance of the level
from that of normal sounds.
The table has the area under the ROC curve of each: 1 if every fault scores worse than every normal
sound, 0.5 by chance. The level of every sound is random, as of a microphone that moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.signal import lfilter
from scipy.stats import mannwhitneyu

from wavear import TrainConfig, audio, likelihood_ratios, load, train

RATE, SECONDS = 16000, 2.0


def hum(generator: np.random.Generator, detune: float = 1.0) -> np.ndarray:
    """Return a motor: eight harmonics of about 60 Hz in noise through a resonance at 900 Hz."""
    t = np.arange(round(RATE * SECONDS)) / RATE
    base = generator.uniform(57, 63) * (1 + 0.002 * np.sin(2 * np.pi * generator.uniform(1, 3) * t))
    phase = 2 * np.pi * np.cumsum(base) / RATE
    tones = np.sum(
        [
            np.sin(k * (detune if k == 5 else 1) * phase + generator.uniform(0, 6)) / k
            for k in range(1, 9)
        ],
        axis=0,
    )
    pole = 0.97 * np.exp(2j * np.pi * 900 / RATE)
    noise = lfilter([1], [1, -2 * pole.real, abs(pole) ** 2], generator.normal(0, 0.02, len(t)))
    return tones + np.asarray(noise)


def clicks(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add the clicks of a bearing, about 17 a second, that ring at 4 kHz."""
    pulses = np.zeros(len(x))
    pulses[generator.integers(0, 900) :: round(RATE / generator.uniform(15, 19))] = 1
    pole = 0.93 * np.exp(2j * np.pi * 4000 / RATE)
    return x + 0.12 * np.asarray(lfilter([1], [1, -2 * pole.real, abs(pole) ** 2], pulses))


def hiss(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add a leak: noise above 5 kHz, for a quarter of the time."""
    noise = np.asarray(lfilter([1, -1.6, 0.8], [1], generator.normal(0, 0.02, len(x))))
    start = generator.integers(0, len(x) * 3 // 4)
    noise[:start] = noise[start + len(x) // 4 :] = 0
    return x + noise


def rub(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Modulate it in amplitude: a part that rubs once per turn, 5 to 8 times a second."""
    t = np.arange(len(x)) / RATE
    return x * (1 + 0.6 * np.sin(2 * np.pi * generator.uniform(5, 8) * t))


FAULTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "clicks": clicks,
    "hiss": hiss,
    "rub": rub,
}


def make(folder: Path, count: int, seed: int, fault: str | None = None) -> None:
    """Write sounds of random level, quantised to 16 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        x = hum(generator)
        x = x if fault is None else FAULTS[fault](x, generator)
        gain = 0.1 * 10 ** (generator.uniform(-6, 6) / 20) / x.std()
        audio.write(folder / f"{number:03d}.wav", (gain * x).clip(-1, 1).astype(np.float32), RATE)


def level(path: Path) -> float:
    """Return the level of a recording in dB."""
    return 20 * np.log10(float(audio.read(path).square().mean().sqrt()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Find made faults by likelihood ratios.")
    parser.add_argument("--out", type=Path, default=Path("runs/odd"), help="folder to write to")
    parser.add_argument("--count", type=int, default=40, help="sounds of each kind (40)")
    parser.add_argument("--checkpoint", help="a model of normal sounds, instead of a linear one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, count, seed = arguments.out, arguments.count, 1000 * arguments.seed
    make(out / "train", count, seed)
    make(out / "normal", count, seed + 1)
    for number, fault in enumerate(FAULTS):
        make(out / fault, count, seed + 2 + number, fault)
    if arguments.checkpoint is None:
        settings = {"family": "linear", "unconditional": True, "grid": "linear", "order": 32}
        train(
            TrainConfig(
                data=str(out / "train"), out=str(out / "model"), sample_rate=RATE, **settings
            )
        )
    model = load(arguments.checkpoint or out / "model" / "best")
    usual = np.median([level(path) for path in sorted((out / "train").glob("*.wav"))])
    scores = {}
    for kind in ("normal", *FAULTS):
        found = likelihood_ratios(model, out / kind)
        windows, oddest = found.of_recordings(), {}
        for w in found.windows:
            oddest[w.path] = min(w.ratio, oddest.get(w.path, np.inf))
        levels = [-abs(level(out / kind / w.path) - usual) for w in windows]
        means, bits = [w.ratio for w in windows], [-w.bits for w in windows]
        scores[kind] = [means, list(oddest.values()), bits, levels]
    print("| fault | ratio | ratio, oddest | likelihood | level |\n|---|---:|---:|---:|---:|")
    for fault in FAULTS:
        pairs = zip(scores["normal"], scores[fault], strict=True)
        areas = [mannwhitneyu(good, bad).statistic / (len(good) * len(bad)) for good, bad in pairs]
        print(f"| {fault} | " + " | ".join(f"{area:.3f}" for area in areas) + " |")


if __name__ == "__main__":
    main()
