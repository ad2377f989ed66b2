"""Find the most hidden units with which a GRU runs at 22,050 samples per second on one core.

    python bench/gru.py                # about a minute
    python bench/gru.py --seconds 10 --sizes 256 512 --weights int8

Sizes are measured in turn, again and again, and each is judged by the fastest of its runs: so they
compare although the machine's speed drifts. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from wavear import GRU, GRUConfig, MelConfig
from wavear.benchmark import speed
from wavear.benchmark.ceiling import cost
from wavear.generation.engines import make_engine

RATE = 22050
SAMPLES = 1024  # per run, some hundredths of a second: short enough to run undisturbed
SIZES = {
    "float32": (256, 320, 336, 352, 368, 384, 416),
    "bfloat16": (384, 448, 480, 512, 544, 576),
    "int8": (512, 640, 672, 704, 736, 768),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The largest GRU that runs in real time on one core."
    )
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="to measure each precision for (default 15)"
    )
    parser.add_argument(
        "--weights", nargs="+", default=list(SIZES), choices=list(SIZES), help="precisions"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, help="hidden units to try (default: around the limit)"
    )
    parser.add_argument("--layers", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{speed.machine()}\n")
    print("| weights | units | parameters | MB read per sample | samples/s | x real time |")
    print("|---|---:|---:|---:|---:|---:|")
    for weights in arguments.weights:
        measure(weights, arguments.sizes or SIZES[weights], arguments.layers, arguments.seconds)


def measure(weights: str, sizes: tuple[int, ...], layers: int, seconds: float) -> None:
    """Print a row for each size, and which is the largest that is live."""
    uniforms, cond = np.random.default_rng(0).random((1, SAMPLES)), torch.randn(1, 80, SAMPLES)
    models = [
        GRU(GRUConfig(channels=size, layers=layers, mel=MelConfig())).eval() for size in sizes
    ]
    engines = [make_engine(model, 1, "numba", weights=weights, threads=1)[1] for model in models]
    best = dict.fromkeys(sizes, 0.0)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for size, engine in zip(sizes, engines, strict=True):
            engine.generate(uniforms[:, :64], cond[:, :, :64])  # its weights come into the cache
            start = time.perf_counter()
            engine.generate(uniforms, cond)
            best[size] = max(best[size], SAMPLES / (time.perf_counter() - start))
    for size, model in zip(sizes, models, strict=True):
        read = cost(model.config, weights).hot_bytes / 1e6
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {weights} | {size} | {count:,} | {read:.2f} | {best[size]:,.0f} | "
            f"{best[size] / RATE:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
