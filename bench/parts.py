"""Measure each part of the CPU engine's time per sample, by omitting each part in turn.

    python bench/parts.py                  # one stream on one core, every precision
    python bench/parts.py r9y9 --weights bfloat16 int8 --batch 16 --threads 2

A part is left out in the plan of the network that the compiled loop reads, so the code that runs is
the engine's own. The output is not audio then. The time of a part is what is gained without it:
parts overlap in the core, and share its caches, so their sum is not the whole.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from wavear import WaveNet, WaveNetConfig
from wavear.benchmark import ceiling, networks, speed
from wavear.generation.cpu import simd
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.models.sampling import uniforms

# The layers' or the network's numbers of the matrices of each part.
MATRICES = {
    "current sample": ("now",),
    "residual and skip": ("mix",),
    "conditioning": ("condition",),
    "head": ("head1", "head2"),
}


def without(engine: NumbaEngine, part: str) -> None:
    """Leave a part out of an engine's plan: no blocks, no vectors, a law of one block."""
    for group in engine._groups:
        net, layers, blocks = group.net, group.layers, group.packed.matrices["blocks"]
        if part == "products":
            blocks[:] = 0
        elif part == "gates":
            net["gate_vectors"] = 0
        elif part == "softmax and draw":
            net["logit_blocks"], net["classes"] = 1, simd.BLOCK
        elif part == "past taps":
            for layer in layers[1 if net["table"] else 0 :]:
                blocks[layer["past"] : layer["past"] + net["taps"] - 1] = 0
        elif part != "nothing":
            for field in MATRICES[part]:
                numbers = np.atleast_1d(net[field] if part == "head" else layers[field])
                blocks[numbers[numbers >= 0]] = 0


PARTS: tuple[str, ...] = (
    "nothing",
    "current sample",
    "residual and skip",
    "past taps",
    "conditioning",
    "head",
    "gates",
    "softmax and draw",
    "products",
)


def runner(
    model: WaveNet, weights: str, batch: int, threads: int, samples: int, part: str
) -> Callable[[], object]:
    """Return a call that makes `samples` samples of every stream without a part."""
    engine = NumbaEngine(model, batch, weights=weights, threads=threads)
    without(engine, part)
    draws = np.stack([uniforms(b, 0, samples) for b in range(batch)])
    cond = (
        torch.zeros(batch, model.config.conditioning_channels, samples)
        if model.conditioned
        else None
    )
    return lambda: engine.generate(draws, cond)


def measure(
    model: WaveNet, weights: str, batch: int, threads: int, samples: int, seconds: float
) -> dict[str, float]:
    """Return the microseconds per sample of all streams without each part, the best of rounds."""
    calls = {part: runner(model, weights, batch, threads, samples, part) for part in PARTS}
    best = dict.fromkeys(PARTS, np.inf)
    began, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - began < seconds:
        for part, call in calls.items():
            start = time.perf_counter()
            call()
            best[part] = min(best[part], (time.perf_counter() - start) / samples / batch * 1e6)
        rounds += 1
    return best


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """As Markdown: microseconds per sample that each part costs, by name."""
    lines = [
        f"| microseconds per sample | {' | '.join(name for name, _ in rows)} |",
        f"|---|{'---:|' * len(rows)}",
    ]
    lines.append(f"| whole | {' | '.join(format(best['nothing'], '.2f') for _, best in rows)} |")
    for part in PARTS[1:-1]:
        lines.append(
            f"| {part} | "
            f"{' | '.join(format(best['nothing'] - best[part], '.2f') for _, best in rows)} |"
        )
    lines.append(
        "| whole without all products | "
        f"{' | '.join(format(best['products'], '.2f') for _, best in rows)} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Where the time of a sample goes in the CPU engine."
    )
    parser.add_argument("shape", nargs="?", default="nv-wavenet", choices=list(networks.SHAPES))
    parser.add_argument(
        "--weights", nargs="+", default=["float32", "bfloat16", "int8"], choices=speed.WEIGHTS
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--samples", type=int, default=2048, help="per call; fewer on a busy machine (default 2048)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each precision, at least (default 5)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = networks.SHAPES[arguments.shape][1]
    if not isinstance(config, WaveNetConfig):
        parser.error(f"{arguments.shape} is not a WaveNet")
    model = WaveNet(config).eval()
    print(speed.machine())
    core = ceiling.measure()
    for weights in arguments.weights:
        cost = ceiling.cost(model.config, weights)
        multiplying = cost.multiply_adds / core.multiply_adds * 1e6
        reading = cost.hot_bytes / core.read_rate(cost.hot_bytes) * 1e6
        print(
            f"{weights}: multiplying {multiplying:.1f} us per sample, reading {reading:.1f} us, "
            "as this core does at best"
        )
    with torch.inference_mode():
        shape = arguments.batch, arguments.threads, arguments.samples, arguments.seconds
        rows = [(weights, measure(model, weights, *shape)) for weights in arguments.weights]
    print(
        f"{arguments.shape}, {arguments.batch} streams on {arguments.threads} "
        f"cores\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
