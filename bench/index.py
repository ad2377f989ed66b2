"""Measure the time and memory to index and open a large corpus; write it into docs/data.md.

    python bench/index.py --out docs/data.md

A folder of real tiny WAV files (hard links to a few), and a manifest of a million stretches of
them. Every measurement is a process of its own, whose peak memory the system reports; files are in
the page cache, so it is the work that is measured and not a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pages import write_section

RATE = 16000
_WAVS = 50  # distinct files; file systems allow some ten thousand links to one


def make(root: Path, files: int, rows: int) -> None:
    """`files` links to tiny WAVs, and a manifest of `rows` stretches of them."""
    import numpy as np

    from wavear import audio

    generator = np.random.default_rng(0)
    for number in range(_WAVS):
        waveform = generator.normal(0, 0.1, 16000 + 160 * number).astype(np.float32)
        audio.write(root / f"source-{number}.wav", waveform, RATE)
    names = []
    for number in range(files):
        folder = f"folder/reader-{number // 1000:03}/chapter-{number // 100 % 10}"
        name = f"{folder}/utterance-{number:07}.wav"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(root / f"source-{number % _WAVS}.wav", root / name)
        names.append(name)
    with open(root / "list.csv", "w", encoding="utf-8") as file:
        file.write("path,start,duration,speaker\n")
        for row in range(rows):
            part = row * files // rows
            file.write(f"{names[part]},{row % 20 * 0.04:.2f},0.20,reader-{part // 1000:03}\n")


def peak() -> float:
    """MB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1 << 20
    )


def processor_time() -> float:
    """Seconds that this process and those it has waited for have computed."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _index(data: str) -> dict[str, float]:
    import wavear

    report = wavear.index(data)
    return {"rows": report.recordings, "files": report.files, "new": report.new}


def _open(data: str) -> dict[str, float]:
    from wavear.data.corpus import open_corpus

    corpus = open_corpus(data, sample_rate=RATE)
    return {"rows": len(corpus.train) + len(corpus.validation)}


def _draw(data: str) -> dict[str, float]:
    import wavear
    from wavear.data.corpus import open_corpus
    from wavear.data.crops import Segments, collate
    from wavear.models.crop_loss import layout_of

    corpus = open_corpus(data, sample_rate=RATE)
    config = wavear.WaveNetConfig(
        layers=10, stacks=1, residual_channels=4, skip_channels=4, head_channels=4, sample_rate=RATE
    )
    segments = Segments(corpus.train, layout_of(wavear.WaveNet(config), 2048))
    taken = []
    for step in range(100):
        began = time.perf_counter()
        collate([segments[index] for index in range(16 * step, 16 * step + 16)])
        taken.append(time.perf_counter() - began)
    began = time.perf_counter()
    which = [
        int(segments.ends.searchsorted(n * 997 % segments.ends[-1], side="right"))
        for n in range(16000)
    ]
    for number in which:
        corpus.train[number]
    lookup = (time.perf_counter() - began) / 1000
    return {"batch": statistics.median(taken), "lookup": lookup, "rows": len(corpus.train)}


def _objects(data: str) -> dict[str, float]:
    """Measure the memory of a list of objects, for comparison."""
    from wavear.data.corpus import open_corpus

    train = open_corpus(data, sample_rate=RATE).train
    before, began = peak(), time.perf_counter()
    held = list(train[:50_000])
    return {"megabytes": peak() - before, "rows": len(held), "listed": time.perf_counter() - began}


WORK: dict[str, Callable[[str], dict[str, float]]] = {
    "index": _index,
    "open": _open,
    "draw": _draw,
    "objects": _objects,
}


def child(work: str, data: str) -> None:
    """Do one thing and print what it took."""
    import wavear  # noqa: F401

    before, began, used = peak(), time.perf_counter(), processor_time()
    found = WORK[work](data)
    taken = {
        "seconds": time.perf_counter() - began,
        "peak": peak(),
        "before": before,
        "cpu": processor_time() - used,
    }
    print(json.dumps(taken | found))


def measured(work: str, data: Path, cache: Path) -> dict[str, float]:
    """`child` in a process of its own."""
    environment = os.environ | {"WAVEAR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", work, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{work} {data.name}: {found}", flush=True)
    return found


def table(results: dict[str, dict[str, float]], files: int, rows: int, load: float) -> str:
    """Return the section of the page."""

    def row(text: str, name: str) -> str:
        r = results[name]
        memory = f"{r['peak'] - r['before']:.0f} MB"
        return f"| {text} | {r['seconds']:.1f} s | {r['cpu']:.1f} s | {memory} |"

    first = results["index folder"]
    new = first["new"] / first["seconds"]
    each = first["cpu"] / first["new"]
    draw, objects = results["draw manifest"], results["objects"]
    scaled = objects["megabytes"] * rows / objects["rows"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "\n".join(
        [
            f"Measured on {cores} cores of {_processor()}, Python {platform.python_version()}, "
            "files in the page cache."
            f" Memory is the peak of the main process above the {first['before']:.0f} MB of torch;"
            " each process that reads headers takes about as much as that. The load of the machine"
            f" was {load:.0f} when it began.",
            "",
            "| | time | computing | memory |",
            "|---|---:|---:|---:|",
            row(f"index a folder of {files:,} files, the first time", "index folder"),
            row(f"open that folder ({files:,} files), indexed", "open folder"),
            row(
                f"index a manifest of {rows:,} rows ({files:,} files), the first time",
                "index manifest",
            ),
            row(f"open that manifest ({rows:,} rows), indexed", "open manifest"),
            "",
            f"- The first time {new:,.0f} files a second are looked into, so a million files "
            "take about"
            f" {1e6 / new / 60:.0f} minutes, or {1e6 * each / 60:.0f} minutes of one core "
            "(extrapolated from"
            f" {files:,}).",
            f"- Drawing a batch of 16 crops from the {rows:,} rows takes "
            f"{1000 * draw['batch']:.1f} ms (median of 100),"
            f" of which finding and making the 16 recordings {1000 * draw['lookup']:.2f} ms; "
            "the process that draws"
            f" has held {draw['peak'] - draw['before']:.0f} MB at most.",
            f"- A list of as many Python objects would take {scaled:,.0f} MB or more "
            "(extrapolated from"
            f" {objects['rows']:,.0f}).",
        ]
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure, print, and write the page's part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="page to write to")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    load = os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="wavear-index-"))
    try:
        make(root, arguments.files, arguments.rows)
        cache, results = root / "cache", {}
        for name, work, data in (
            ("index folder", "index", root / "folder"),
            ("open folder", "open", root / "folder"),
            ("index manifest", "index", root / "list.csv"),
            ("open manifest", "open", root / "list.csv"),
            ("draw manifest", "draw", root / "list.csv"),
            ("objects", "objects", root / "list.csv"),
        ):
            results[name] = measured(work, data, cache)
        text = table(results, arguments.files, arguments.rows, load)
        print(text)
        if arguments.out:
            write_section(arguments.out, "index", text)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
