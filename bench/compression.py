"""Measure lossless compression: bits per sample, next to FLAC's level 8, and the time it takes.

    python bench/compression.py ../shared/data --page docs/likelihood.md

Every clip is compressed, restored and compared sample for sample. Clips: the first files of each
folder by name, a channel's first seconds, as 16-bit WAV; FLAC by libsndfile at its highest level,
which is libFLAC's 8.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
from pages import write_section

import wavear
from wavear.benchmark.speed import machine
from wavear.generation.compression import compress, decompress

FOLDERS = {
    "kerstin_de/dev": 25,
    "ljspeech_mini": 15,
    "cmu_arctic_slt": 10,
    "vctk_mini": 10,
    "fsdd": 10,
    "salamander_piano": 10,
    "sms_tools_sounds": 10,
    "vocobox_sung_notes": 10,
}


def clip(path: Path, seconds: float, out: Path) -> int:
    """Write a clip of a recording's first channel, and return its rate."""
    rate = soundfile.info(path).samplerate
    samples, _ = soundfile.read(path, frames=round(seconds * rate), dtype="int16", always_2d=True)
    soundfile.write(out, samples[:, 0], rate, subtype="PCM_16")
    return rate


def measure(folder: Path, models: dict[str, object], seconds: float, count: int) -> dict:
    """Return the sums over the clips of a folder: of bits and seconds by method, of samples."""
    found: dict = defaultdict(float)
    ends = (".wav", ".flac", ".ogg")
    paths = sorted(p for p in folder.rglob("*") if p.suffix in ends)[:count]
    with tempfile.TemporaryDirectory() as place:
        source, packed, back = (Path(place) / name for name in ("x.wav", "x.wvr", "y.wav"))
        for path in paths:
            rate = clip(path, seconds, source)
            pcm = soundfile.read(source, dtype="int16")[0]
            found["clips"] += 1
            found["samples"] += len(pcm)
            found["seconds"] += len(pcm) / rate
            soundfile.write(packed, pcm, rate, format="FLAC", compression_level=1.0)
            found["flac"] += 8 * packed.stat().st_size
            for name, model in models.items():
                if model is not None and model.config.sample_rate != rate:  # type: ignore[attr-defined]
                    continue
                began = time.process_time()
                found[name] += 8 * compress(source, packed, model, overwrite=True).size  # type: ignore[arg-type]
                middle = time.process_time()
                decompress(packed, back, model, overwrite=True)  # type: ignore[arg-type]
                found[name, "seconds"] += len(pcm) / rate
                found[name, "compress"] += middle - began
                found[name, "decompress"] += time.process_time() - middle
                if not np.array_equal(pcm, soundfile.read(back, dtype="int16")[0]):
                    raise SystemExit(f"{path}: {name} is not exact")
    print(f"{folder}: {found['clips']:.0f} clips are exact", flush=True)
    return found


def main() -> None:
    """Print a table, or write it into a page."""
    parser = argparse.ArgumentParser(description="Measure lossless compression.")
    parser.add_argument("data", type=Path, help="folder with the recordings of the tests")
    parser.add_argument("--checkpoints", nargs="*", default=["voice"], help="models (voice)")
    parser.add_argument("--seconds", type=float, default=2.5, help="most of each clip (2.5)")
    parser.add_argument("--page", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    models = {"adaptive": None, **{c: wavear.load(c) for c in arguments.checkpoints}}
    rows, total = [], defaultdict(float)
    for model in models.values():  # compiles
        measure(arguments.data / next(iter(FOLDERS)), {"warm": model}, 0.1, 1)
    for name, count in FOLDERS.items():
        found = measure(arguments.data / name, models, arguments.seconds, count)
        for key, value in found.items():
            total[key] += value
        cells = [f"{found[key] / found['samples']:.3f}" for key in ("flac", *models) if found[key]]
        cells += [""] * (1 + len(models) - len(cells))
        rate = round(found["samples"] / found["seconds"] / 1000, 2)
        rows.append(f"| {name} | {rate:g} | {found['clips']:.0f} | {' | '.join(cells)} |")
    titles = " | ".join(f"`{Path(name).name}`" if models[name] else name for name in models)
    text = [
        f"{total['clips']:.0f} clips, {total['seconds']:.0f} s, every one restored exactly."
        " Bits per sample, headers and stored mels included:",
        "",
        f"| recordings | kHz | clips | FLAC, level 8 | {titles} |",
        "|---|---:|---:|" + "---:|" * (1 + len(models)),
        *rows,
        "",
        "| processor seconds per second of audio | compress | decompress |",
        "|---|---:|---:|",
    ]
    for name in models:
        times = [total[name, what] / total[name, "seconds"] for what in ("compress", "decompress")]
        text.append(f"| {name} | {times[0]:.2f} | {times[1]:.2f} |")
    print("\n".join([machine(), "", *text]))
    if arguments.page:
        write_section(arguments.page, "compression", "\n".join([*text, "", machine()]))


if __name__ == "__main__":
    main()
