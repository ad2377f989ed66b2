"""Writes docs/benchmarks.md: how fast each engine generates, for the shapes of the field.

    python bench/generation.py                # all shapes, three rounds, about ten minutes
    python bench/generation.py --device cuda  # writes docs/benchmarks_cuda.md
    python bench/generation.py --seconds 0.5 --rounds 1

Run it on a machine that does nothing else. The section "What limits it" of the page is written by
hand, from `bench/parts.py`, and stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wavear.benchmark import networks, speed
from wavear.common.atomic import replace_file

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"cpu": DOCS / "benchmarks.md", "cuda": DOCS / "benchmarks_cuda.md"}

# Shape, engines, precisions, (streams, cores).
PLAN = [
    (
        "nv-wavenet",
        ("numba", "reference"),
        ("float32", "bfloat16", "int8"),
        ((1, 1), (12, 1), (24, 2)),
    ),
    ("nv-wavenet-free", ("numba",), ("float32", "bfloat16", "int8"), ((1, 1),)),
    ("small", ("numba",), ("float32", "bfloat16", "int8"), ((1, 1), (24, 2))),
    ("r9y9", ("numba",), ("float32", "bfloat16", "int8"), ((1, 1), (16, 2))),
    ("ibab", ("numba",), ("float32", "bfloat16", "int8"), ((1, 1),)),
]

LIMITS = "## What limits it\n"
# On a card: shape, (engine, precisions, streams).
ALL = ("float32", "bfloat16", "float16")
CUDA_PLAN = [
    (
        "nv-wavenet",
        (
            ("triton", ALL, (1, 16, 128, 1024, 8192)),
            ("cuda-graph", ("float32",), (1, 16, 128, 1024)),
            ("reference", ("float32",), (1,)),
        ),
    ),
    ("nv-wavenet-free", (("triton", ALL, (1, 1024)),)),
    ("wide", (("triton", ALL, (1, 256)), ("cuda-graph", ("float32",), (256,)))),
    ("r9y9", (("triton", ALL, (1, 1024)),)),
    ("kan-bayashi", (("triton", ("float32", "float16"), (1, 256)),)),
]

CUDA_HEAD = """# Benchmarks on a CUDA card

Written by `python bench/generation.py --device cuda`; `wavear bench --device cuda` does the same
for one network.

- **samples/s**: of all streams together, uniforms, conditioning and engine. The fastest of several
  runs.
- **of the limit**: samples/s over what the card allows (`wavear/benchmark/card.py`): every
  program of the kernel, with up to 16 streams, reads all weights for every sample at 64 bytes a
  cycle; all programs share the rate of the second-level cache, measured in the same run; tensor
  cores multiply as fast as in a large product, also measured.
- **error**: the largest difference of a log-probability from `forward` in float64, teacher-forced,
  over 1,024 samples of 4 streams. **cost**: bits per sample lost against float64 on audio drawn
  from the model.
"""

HEAD = """# Benchmarks

Written by `python bench/generation.py`; `wavear bench` measures one network in the same way.

- **samples/s**: of all streams together, with uniforms, conditioning and engine. The fastest of
  many calls in several rounds.
- **of the limit**: samples/s over what this machine allows. A stream reads the weights that several
  samples cannot share once per sample, at the rate at which this core reads a working set of that
  size (measured in the same run). A batch shares each read and is bound by the multiply-adds of a
  core. Embedding tables and skipped zeros can carry an engine past the limit.
- **error**: the largest difference of a log-probability from `forward` in float64, over 1,024
  samples of 4 streams. **cost**: bits per sample lost against float64 on audio drawn from the
  model. The weights are random here; `wavear bench CHECKPOINT` measures trained ones.
- Compare figures of one run only: the speed of a virtual machine drifts, here by a factor of up to
  1.6.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md, or benchmarks_cuda.md.")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="to measure each row for, at least (default 3)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="through all shapes, on the CPU (default 3)"
    )
    parser.add_argument("--device", choices=PAGES, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--out", type=Path, help="page to write (default docs/benchmarks.md, or benchmarks_cuda.md)"
    )
    arguments = parser.parse_args()
    page = arguments.out or PAGES[arguments.device]
    lines = (
        on_card(arguments.seconds)
        if arguments.device == "cuda"
        else on_cpu(arguments.seconds, arguments.rounds)
    )
    write(page, lines)
    print(f"wrote {page}")


def write(page: Path, lines: Sequence[str]) -> None:
    """Put the tables into a page, and keep the sections behind them (see `pages`)."""
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    begin = min(
        (at for at in (whole.find(LIMITS), whole.find("<!-- begin ")) if at >= 0),
        default=len(whole),
    )
    text = "\n".join([*lines, whole[begin:]]).rstrip() + "\n"
    replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))


def section(name: str, costs: Sequence[str], rows: Sequence[speed.Measurement]) -> list[str]:
    """Return the page's lines about a network."""
    text = networks.SHAPES[name][0]
    lines = [f"## {name}", "", f"{text[0].upper()}{text[1:]}.", ""]
    if costs:
        lines += [*(f"- {line}" for line in costs), ""]
    return [*lines, speed.table(rows), ""]


def on_card(seconds: float) -> list[str]:
    """Return the page's lines."""
    lines = [CUDA_HEAD]
    for name, engines in CUDA_PLAN:
        rows = []
        for engine, weights, batches in engines:
            for batch in batches:
                report = speed.measure_all(
                    shape=name, engines=(engine,), weights=weights, batches=(batch,),
                    device="cuda", seconds=seconds,
                )  # fmt: skip
                rows += report.rows
        if name == CUDA_PLAN[0][0]:
            lines += ["## Machine", "", f"{report.machine}.", "", f"{report.core}.", ""]
        lines += section(name, (), rows)
        print(f"{name}\n{speed.table(rows)}", flush=True)
    return lines


def on_cpu(seconds: float, rounds: int) -> list[str]:
    """Return the page's lines."""
    first: dict[str, speed.Report] = {}
    rows = {name: [] for name, *_ in PLAN}
    for number in range(rounds):
        for name, engines, weights, batches in PLAN:
            reports = [
                speed.measure_all(
                    shape=name, engines=engines if batch == 1 else ("numba",), weights=weights,
                    batches=(batch,), threads=threads, seconds=seconds,
                )
                for batch, threads in batches
            ]  # fmt: skip
            first[name] = reports[0]
            rows[name].append([row for report in reports for row in report.rows])
            print(
                f"{name}, round {number + 1} of {rounds}\n{speed.table(rows[name][-1])}", flush=True
            )
    report = first[PLAN[0][0]]
    core = f"{report.core[0].upper()}{report.core[1:]} (in the last round)."
    lines = [HEAD, "## Machine", "", f"{report.machine}.", "", core, ""]
    for name, report in first.items():
        best = [fastest(same) for same in zip(*rows[name], strict=True)]
        lines += section(name, report.costs, best)
    return lines


def fastest(rounds: Sequence[speed.Measurement]) -> speed.Measurement:
    """Return the fastest of equal measurements, over the highest of their limits."""
    best = max(rounds, key=lambda row: row.samples_per_second)
    limits = [row.samples_per_second / row.share for row in rounds if row.share is not None]
    return replace(best, share=best.samples_per_second / max(limits)) if limits else best


if __name__ == "__main__":
    main()
