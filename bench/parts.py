"""Where the time of a sample goes in the CPU engine: each part of the network left out in turn, in one run.

    python bench/parts.py                              # shape A, one stream on one core, every precision
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
from wavear.benchmark import speed
from wavear.generation.cpu import ceiling, products, simd
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.models.sampling import uniforms


def without(engine: NumbaEngine, part: str) -> None:
    """Leave a part out of an engine's plan: matrices of no blocks, gates of no vectors, a law of one block."""
    for group in engine._groups:
        packed, net = group.packed, group.net
        now, outwards, skips = ([layer[k] for layer in packed.now] for k in range(3))
        matrices = {
            "current sample": now,
            "residual and skip": [*outwards, *skips],
            "past taps": [number for taps in packed.past for number in taps],
            "conditioning": packed.conditions,
            "head": [packed.head1, packed.head2],
        }
        if part == "products":
            packed.table[:, products.M_BLOCKS] = 0
        elif part == "gates":
            net[products.N_GATE_VECTORS] = 0
        elif part == "softmax and draw":
            net[products.N_LOGIT_BLOCKS], net[products.N_CLASSES] = 1, simd.BLOCK
        elif part != "nothing":
            packed.table[
                [number for number in matrices[part] if number >= 0], products.M_BLOCKS
            ] = 0


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
    """Microseconds per sample of all streams together without each part: the best of rounds over all parts."""
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
            f"| {part} | {' | '.join(format(best['nothing'] - best[part], '.2f') for _, best in rows)} |"
        )
    lines.append(
        f"| whole without all products | {' | '.join(format(best['products'], '.2f') for _, best in rows)} |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Where the time of a sample goes in the CPU engine."
    )
    parser.add_argument("shape", nargs="?", default="nv-wavenet", choices=list(speed.SHAPES))
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
    config = speed.SHAPES[arguments.shape][1]
    if not isinstance(config, WaveNetConfig):
        parser.error(f"{arguments.shape} is not a WaveNet: use the shape of one")
    model = WaveNet(config).eval()
    print(speed.machine())
    core = ceiling.measure()
    for weights in arguments.weights:
        cost = ceiling.cost(model.config, weights)
        print(f"{weights}: multiplying {cost.multiply_adds / core.multiply_adds * 1e6:.1f} us per sample, reading "
              f"{cost.hot_bytes / core.read_rate(cost.hot_bytes) * 1e6:.1f} us, as this core does at best")  # fmt: skip
    with torch.inference_mode():
        shape = arguments.batch, arguments.threads, arguments.samples, arguments.seconds
        rows = [(weights, measure(model, weights, *shape)) for weights in arguments.weights]
    print(
        f"{arguments.shape}, {arguments.batch} streams on {arguments.threads} cores\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
