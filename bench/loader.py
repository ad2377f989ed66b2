"""Measure the loader's crops per second and training's wait; write it into docs/data.md.

    python bench/loader.py --out docs/data.md

Formats are measured in turn with 0, 2 and 4 workers; then a network of 20 layers is trained from
the loader, and the share of the time in which it waits for the next batch. `rates` and
`waiting` are for other programs to call.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from index import _processor
from pages import write_section

import wavear
from wavear import audio
from wavear.data.corpus import open_corpus
from wavear.data.crops import Batch, Order, Segments, collate
from wavear.data.shards import write_shards
from wavear.models.crop_loss import crop_loss, layout_of

RATE = 22050
SEGMENT = 8192
_CLIPS, _SECONDS = 60, 6  # of each format


def clips(root: Path) -> dict[str, str]:
    """Yield the same clips in several forms: name and source."""
    generator = np.random.default_rng(0)
    for number in range(_CLIPS):
        white = generator.standard_normal(_SECONDS * 44100 + 8)
        sound = (0.3 * np.convolve(white, np.ones(9) / 9, "valid")).clip(-1, 1).astype(np.float32)
        for form, rate, suffix in (
            ("wav", RATE, "wav"),
            ("flac", RATE, "flac"),
            ("ogg", RATE, "ogg"),
            ("flac at 44.1 kHz", 44100, "flac"),
        ):
            path = root / form / f"{number}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            audio.write(path, sound[: _SECONDS * rate], rate)
    write_shards(root / "flac", root / "shards", megabytes=4)
    found = {form: str(root / form) for form in ("wav", "flac", "ogg", "flac at 44.1 kHz")}
    return found | {"flac in tar shards": str(root / "shards" / "*.tar")}


def loader_of(segments: Segments, batch_size: int, workers: int) -> torch.utils.data.DataLoader:
    """As a run makes it."""
    return torch.utils.data.DataLoader(
        segments,
        batch_sampler=Order(batch_size),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def rates(
    segments: Segments, batch_size: int, workers: Sequence[int] = (0, 2, 4), seconds: float = 1.5
) -> list[float]:
    """Return the crops per second of each number of workers, without the start of the workers."""
    found = []
    for number in workers:
        batches = iter(loader_of(segments, batch_size, number))
        for _ in range(2 + 4 * number):  # what was made ahead while the workers started
            next(batches)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            count += len(next(batches).source)
        found.append(count / (time.perf_counter() - began))
        del batches
    return found


def waiting(
    model: wavear.AutoregressiveModel, segments: Segments, batch_size: int, workers: int, steps: int
) -> tuple[float, float]:
    """Return the seconds of a step, and the share of all time spent waiting for a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    waited = worked = 0.0
    batches = iter(loader_of(segments, batch_size, workers))
    batch: Batch
    for step in range(steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        losses, mask = crop_loss(model, batch, segments.layout)
        (losses.sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first waits for the workers to start
            waited, worked = waited + got - began, worked + time.perf_counter() - got
    return worked / steps, waited / (waited + worked)


def main() -> None:
    """Measure, print, and write the page's section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="page to write to")
    parser.add_argument("--seconds", type=float, default=1.5, help="to measure each rate for")
    parser.add_argument("--steps", type=int, default=8, help="to train for the share of waiting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers = (0, 2, 4)
    root = Path(tempfile.mkdtemp(prefix="wavear-loader-"))
    os.environ["WAVEAR_CACHE"] = str(root / "cache")
    try:
        mel = wavear.MelConfig()
        model = wavear.WaveNet(wavear.WaveNetConfig(mel=mel))
        layout = layout_of(model, SEGMENT)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        lines = [
            f"On {cores} cores of {_processor()}, torch {torch.__version__}: crops per second "
            f"of {layout.segment}"
            f" samples of loss and {layout.context} of context at {RATE} Hz, from clips of "
            f"{_SECONDS} s in the page"
            " cache, in batches of 8; each worker is one process. The load of the machine was"
            f" {os.getloadavg()[0]:.0f} when it began.",
            "",
            "| | " + " | ".join(f"{n} workers" for n in workers) + " | samples/s, 0 workers |",
            "|---|" + "---:|" * (len(workers) + 1),
        ]
        kept = None
        for form, data in clips(root).items():
            segments = Segments(open_corpus(data, sample_rate=RATE).train, layout)
            kept = segments if form == "flac" else kept
            found = rates(segments, 8, workers, arguments.seconds)
            lines.append(
                f"| {form} | {' | '.join(f'{rate:,.0f}' for rate in found)} | "
                f"{found[0] * layout.segment:,.0f} |"
            )
            print(lines[-1], flush=True)
        assert kept is not None
        config = model.config
        lines += [
            "",
            f"Training {config.layers} layers of {config.residual_channels} residual and "
            f"{config.skip_channels} skip"
            " channels from the FLAC clips, 2 crops a step, float32, one thread:",
            "",
            "| workers | a step | waiting for data |",
            "|---:|---:|---:|",
        ]
        for number in itertools.islice(workers, 2):
            step, share = waiting(model, kept, 2, number, arguments.steps)
            lines.append(f"| {number} | {step:.2f} s | {100 * share:.2f} % |")
            print(lines[-1], flush=True)
        if arguments.out:
            write_section(arguments.out, "loader", "\n".join(lines))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
