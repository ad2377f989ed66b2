"""Write the part on training of docs/benchmarks.md: samples/s, memory, the wait for data.

    python bench/training.py                 # on the CPU: all shapes, a quarter of an hour
    python bench/training.py --device cuda
    python bench/training.py --shapes A --variants bf16 bf16+compile --steps 12

Every figure is of `wavear.train` as it is, in a process of its own, on noise in FLAC files written
for it. The variants of a shape take turns, `--rounds` times. What was measured before, on the same
machine, stays in the table: so it can be made in parts (`--results` holds the numbers).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pages import write_section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
RATE = 22050
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "A": (
        "20 layers, 2 stacks, kernel 2, 64 residual, 128 skip",
        {"layers": 20, "stacks": 2, "residual_channels": 64, "skip_channels": 128},
    ),
    "B2": (
        "30 layers, 3 stacks, kernel 2, 128 residual, 128 skip",
        {"layers": 30, "stacks": 3, "residual_channels": 128, "skip_channels": 128},
    ),
    "B3": (
        "30 layers, 3 stacks, kernel 3, 128 residual, 128 skip",
        {
            "layers": 30,
            "stacks": 3,
            "kernel_size": 3,
            "residual_channels": 128,
            "skip_channels": 128,
        },
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "32"},
    "bf16": {"precision": "bf16"},
    "bf16+compile": {"precision": "bf16", "compile": True},
    "bf16+checkpointing": {"precision": "bf16", "activation_checkpointing": True},
}
BATCH = {"cpu": 2, "cuda": 16}
SEGMENT = 8192
_WARM = 2  # steps that are not counted: memory is found, kernels are compiled
_LOADED = 32  # crops that the loader's rate is measured on


def recordings(folder: Path) -> Path:
    """Write a minute of noise as FLAC."""
    from wavear import audio

    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        audio.write(folder / f"{number}.flac", 0.1 * generator.standard_normal(10 * RATE), RATE)
    return folder


def measure(
    data: str, out: str, shape: str, variant: str, device: str, steps: int, results: Any
) -> None:
    """In a process of its own: train for some steps, and say how fast and in how much memory."""
    import torch

    from wavear import TrainConfig, WaveNet, train
    from wavear.data.corpus import open_corpus
    from wavear.data.crops import Segments, collate
    from wavear.models.crop_loss import layout_of
    from wavear.training import callbacks

    callbacks.LOG_EVERY = 1
    settings = SHAPES[shape][1] | VARIANTS[variant]
    config = TrainConfig(
        family="wavenet",
        data=data,
        out=out,
        batch_size=BATCH[device],
        segment=SEGMENT,
        max_steps=steps + _WARM,
        validate_every=10**6,
        validation_seconds=0.01,
        final_seconds=0.01,
        baseline_seconds=1.0,
        sample_seconds=0.0,
        device=device,
        progress=False,
        **settings,
    )
    layout = layout_of(WaveNet(config.model_config()), SEGMENT)
    segments = Segments(open_corpus(data, sample_rate=RATE).train, layout)
    collate([segments[0]])
    began = time.perf_counter()
    for index in range(_LOADED):
        segments[index]
    loader = _LOADED * SEGMENT / (time.perf_counter() - began)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    train(config)
    with open(Path(out) / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train_bits"]][_WARM:]
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    results.put(
        {
            "speeds": [float(row["samples_per_second"]) for row in rows],
            "waits": [float(row["data_wait"]) for row in rows],
            "memory": [memory],
            "loader": [loader],
        }
    )


def machine(device: str) -> str:
    """Return the name and versions of the machine."""
    import torch

    from wavear.benchmark.speed import machine

    told = f"{torch.cuda.get_device_name()}; {machine()}" if device == "cuda" else machine()
    return f"{told}; {torch.get_num_threads()} threads of torch"


def table(results: dict[str, Any], device: str) -> str:
    """Return the section of the page."""
    lines = [
        f"## Training, {'GPU' if device == 'cuda' else 'CPU'}",
        "",
        f"Written by `python bench/training.py --device {device}`, on {results['machine']}. "
        "Batches of"
        f" {BATCH[device]} crops of {SEGMENT} samples and the receptive field before them, mels "
        "and all.",
        "",
        "- **samples/s**: of loss; median over the steps of all rounds but the first two of each.",
        "- **memory**: "
        + (
            "most that tensors took on the device."
            if device == "cuda"
            else "most that the process grew by."
        ),
        "- **waiting**: share of the time from the end of a step to the beginning of the next, "
        "most of it for data.",
        "- **loader**: samples of loss per second that one process reads, crops and decodes: "
        "FLAC, no resampling.",
    ]
    for shape, (text, _) in SHAPES.items():
        found = {
            variant: results[key]
            for variant in VARIANTS
            if (key := f"{shape} {variant}") in results
        }
        if not found:
            continue
        lines += [
            "",
            f"{text[0].upper()}{text[1:]}:",
            "",
            "| | samples/s | memory, MiB | waiting | loader |",
        ]
        lines.append("|---|---:|---:|---:|---:|")
        for variant, row in found.items():
            speed, wait = statistics.median(row["speeds"]), statistics.median(row["waits"])
            memory, loader = max(row["memory"]) / 2**20, statistics.median(row["loader"])
            lines.append(
                f"| {variant} | {speed:,.0f} | {memory:,.0f} | {100 * wait:.1f} % | {loader:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(BATCH), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=8, help="of each run that count")
    parser.add_argument("--rounds", type=int, default=2, help="how often the variants take turns")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench-training.json"),
        help="numbers so far (default here)",
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="page to write (default docs/benchmarks.md)"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.results.exists():
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    here = machine(arguments.device)
    if results.get("machine") != here:
        results = {"machine": here}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="wavear-bench-") as folder:
        data = recordings(Path(folder) / "data")
        for shape in arguments.shapes:
            for turn in range(arguments.rounds):
                for variant in arguments.variants:
                    queue = context.Queue()
                    out = str(Path(folder) / f"{shape}-{turn}-{variant}")
                    given = (
                        str(data),
                        out,
                        shape,
                        variant,
                        arguments.device,
                        arguments.steps,
                        queue,
                    )
                    child = context.Process(target=measure, args=given)
                    child.start()
                    child.join()
                    if child.exitcode != 0:
                        raise SystemExit(
                            f"{shape} {variant}: the process ended with {child.exitcode}"
                        )
                    found = queue.get()
                    row = results.setdefault(f"{shape} {variant}", {name: [] for name in found})
                    for name, values in found.items():
                        row[name] += values
                    print(
                        f"{shape} {variant}: {statistics.median(found['speeds']):,.0f} samples/s",
                        flush=True,
                    )
                    arguments.results.write_text(json.dumps(results), encoding="utf-8")
    write_section(arguments.out, f"training-{arguments.device}", table(results, arguments.device))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
