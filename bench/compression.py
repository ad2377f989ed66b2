"""Measure lossless compression: bits per sample, next to other coders, and the time it takes.

    python bench/compression.py ../shared/data --checkpoints voice runs/plain/best

Every clip is compressed, restored and compared sample for sample. Clips: the first files of each
folder by name, a channel's first seconds, as 16-bit WAV. FLAC is libsndfile's at its highest level,
libFLAC's 8. WavPack and TTA are measured where the programs wavpack and ffmpeg are found.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
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
CODERS = {
    "WavPack, -hh -x6": ("wavpack -q -y -hh -x6 x.wav x.wv", "wvunpack -q -y x.wv -o y.wav"),
    "TTA": ("ffmpeg -v error -y -i x.wav x.tta", "ffmpeg -v error -y -i x.tta y.wav"),
}
"""Commands of other programs: to compress x.wav, to restore y.wav."""


def clip(path: Path, seconds: float, out: Path) -> int:
    """Write a clip of a recording's first channel, and return its rate."""
    rate = soundfile.info(path).samplerate
    samples, _ = soundfile.read(path, frames=round(seconds * rate), dtype="int16", always_2d=True)
    soundfile.write(out, samples[:, 0], rate, subtype="PCM_16")
    return rate


def coded(place: Path, name: str, pcm: np.ndarray) -> int:
    """Compress x.wav by another program, and return the bits of its file."""
    for command in CODERS[name]:
        subprocess.run(command.split(), cwd=place, check=True, stdin=subprocess.DEVNULL)
    if not np.array_equal(pcm, soundfile.read(place / "y.wav", dtype="int16")[0]):
        raise SystemExit(f"{name} is not exact")
    return 8 * (place / CODERS[name][0].split()[-1]).stat().st_size


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
            found["FLAC, level 8"] += 8 * packed.stat().st_size
            for name, (command, _) in CODERS.items():
                if shutil.which(command.split()[0]):
                    found[name] += coded(Path(place), name, pcm)
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


def title(name: str) -> str:
    """Return what the table calls a checkpoint: `plain` for runs/plain/best."""
    path = Path(name)
    return f"`{(path.parent if path.name in ('best', 'last') else path).name}`"


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
    kinds = ["FLAC, level 8", *(n for n, c in CODERS.items() if shutil.which(c[0].split()[0]))]
    kinds += models
    for name, count in FOLDERS.items():
        found = measure(arguments.data / name, models, arguments.seconds, count)
        for key, value in found.items():
            total[key] += value
        cells = [f"{found[k] / found['samples']:.3f}" if found[k] else "" for k in kinds]
        rate = round(found["samples"] / found["seconds"] / 1000, 2)
        rows.append(f"| {name} | {rate:g} | {found['clips']:.0f} | {' | '.join(cells)} |")
    titles = " | ".join(title(name) if models.get(name) else name for name in kinds)
    text = [
        f"{total['clips']:.0f} clips, {total['seconds']:.0f} s, every one restored exactly."
        " Bits per sample, headers and stored mels included:",
        "",
        f"| recordings | kHz | clips | {titles} |",
        "|---|---:|---:|" + "---:|" * len(kinds),
        *rows,
        "",
        "| processor seconds per second of audio | compress | decompress |",
        "|---|---:|---:|",
    ]
    for name in models:
        times = [total[name, what] / total[name, "seconds"] for what in ("compress", "decompress")]
        text.append(
            f"| {title(name) if models[name] else name} | {times[0]:.2f} | {times[1]:.2f} |"
        )
    print("\n".join([machine(), "", *text]))
    if arguments.page:
        write_section(arguments.page, "compression", "\n".join([*text, "", machine()]))


if __name__ == "__main__":
    main()
