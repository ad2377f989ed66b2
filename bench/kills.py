"""Kill training and synthesis at random moments, resume them, and compare with uninterrupted ones.

    make soak                                        # 100 kills: 67 in training, 33 in synthesis
    python bench/kills.py --kills 50 --synthesis-kills 25

Synthesis: `wavear synthesize --resume`; after every kill, each file that is there must be whole.

Training. Compared, bit for bit: the last state (weights, optimizer, moving average, Lightning's
loops, losses not yet written), `best/` and `last/`, and metrics.csv but for its columns of times.
Every attempt reads its data with another number of workers. A run that is done before its kills are
used up is followed by another one in a fresh folder.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: dict[str, Any] = {
    "family": "wavenet",
    "layers": 4,
    "stacks": 2,
    "residual_channels": 8,
    "skip_channels": 8,
    "head_channels": 16,
    "conditioning_channels": 6,
    "classes": 32,
    "sample_rate": 8000,
    "mel_bands": 8,
    "mel_hop_length": 64,
    "segment": 512,
    "warmup_steps": 10,
    "input_noise": 1.0,
    "sample_seconds": 0.0,
    "validation_seconds": 0.2,
    "final_seconds": 0.2,
    "baseline_seconds": 0.2,
    "progress": False,
    "device": "cpu",
    "precision": "32",
}
TIMES = ("seconds", "samples_per_second", "data_wait")


def tones(folder: Path) -> Path:
    """Six short tones with noise."""
    from wavear import audio

    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        at = np.arange(3000) / 8000
        tone = 0.5 * np.sin(
            2 * np.pi * (200 + 50 * number) * at
        ) + 0.01 * generator.standard_normal(at.size)
        audio.write(folder / f"{number}.wav", tone, 8000)
    return folder


def attempt(settings: dict[str, Any]) -> None:
    """One process: start the run, or resume it."""
    import torch

    from wavear import TrainConfig, train

    torch.set_num_threads(1)
    train(TrainConfig(**settings, resume=(Path(settings["out"]) / "train.json").exists()))


def timeless(value: Any) -> Any:
    """Return a state without its times."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def mels_and_model(root: Path) -> None:
    """Write a tiny model and 60 mels of several lengths."""
    import torch

    import wavear
    from wavear import MelConfig, WaveNet, WaveNetConfig

    mel = MelConfig(
        sample_rate=8000, n_fft=128, window_length=128, hop_length=64, bands=8, fmax=None
    )
    torch.manual_seed(0)
    sizes: Any = {"layers": 4, "stacks": 2, "residual_channels": 8, "skip_channels": 8}
    WaveNet(WaveNetConfig(sample_rate=8000, mel=mel, **sizes)).save(root / "model")
    generator = np.random.default_rng(0)
    (root / "mels").mkdir()
    for number in range(60):
        frames = int(generator.integers(20, 200))
        noise = torch.from_numpy(0.1 * generator.standard_normal((1, 64 * frames)))
        np.save(root / "mels" / f"{number:02}.npy", wavear.log_mel(noise.float(), mel)[0].numpy())


def kill_synthesis(root: Path, kills: int, random: np.random.Generator) -> int:
    """Kill syntheses, print the figure, and return how many files differ or were not whole."""
    mels_and_model(root)

    def start(out: Path) -> subprocess.Popen:
        words = ["synthesize", str(root / "model"), str(root / "mels"), "--out", str(out)]
        command = [sys.executable, "-m", "wavear", *words, "--resume"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def sounds(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.glob("*.wav")}

    for name in ("first", "whole"):  # the first one compiles
        began = time.monotonic()
        status = start(root / name).wait()
        taken = time.monotonic() - began
    expected = sounds(root / "whole")
    if status != 0 or len(expected) != 60:
        print(f"the uninterrupted synthesis ended with {status} and {len(expected)} files")
        return 1
    done = runs = wrong = between = 0
    while done < kills:
        out, here = root / f"sounds{runs}", 0
        while True:
            child = start(out)
            try:
                # Imports take about half of the time.
                limit = random.uniform(0.3, 1.0) * taken if done < kills and here < 5 else None
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                found = sounds(out)
                wrong += sum(expected[name] != content for name, content in found.items())
                between += 0 < len(found) < len(expected)
                here, done = here + 1, done + 1
                continue
            if status != 0:
                print(f"a synthesis ended with {status}")
                return 1
            break
        wrong += sounds(out) != expected
        left = [path.name for path in out.iterdir() if path.name.startswith(".wavear-claim")]
        wrong += bool(left)
        runs += 1
        shutil.rmtree(out)
    print(
        f"{done} kills in synthesis ({between} with a part of the files) in {runs} runs of 60"
        f" files: {'all equal to the uninterrupted one' if not wrong else f'{wrong} differences'}"
    )
    return wrong


def differences(a: Path, b: Path) -> list[str]:
    """Return the differences of two finished runs."""
    import torch

    from wavear.training.state import encode, load_state, state_paths

    found = []
    texts, tensors = [], []
    for out in (a, b):
        tensors.append({})
        texts.append(encode(timeless(load_state(state_paths(out)[0])), tensors[-1]))
    if texts[0] != texts[1]:
        found.append("the numbers of the state")
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        one, other = tensors[0].get(name), tensors[1].get(name)
        if one is None or other is None or not torch.equal(one, other):
            found.append(name)
    for name in (
        "best/model.safetensors",
        "best/config.json",
        "last/model.safetensors",
        "last/config.json",
    ):
        if (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    tables = []
    for out in (a, b):
        with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
            tables.append(
                [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
            )
    if tables[0] != tables[1]:
        found.append("metrics.csv")
    if [p.name for p in state_paths(a)] != [p.name for p in state_paths(b)]:
        found.append("the states kept")
    return found


def main() -> int:
    """Print a line per run and the figure; 1 if anything differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in training")
    parser.add_argument("--synthesis-kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument(
        "--per-run", type=int, default=10, help="kills before a run is left to finish"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="start no further run after this time; 0: no limit",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="wavear-kills-"))
    # Children are forked from a process that has imported everything and computed nothing: kills
    # fall into the run.
    import torch.utils.tensorboard  # noqa: F401

    import wavear.training.loop  # noqa: F401

    context = multiprocessing.get_context("fork")
    random = np.random.default_rng(arguments.seed)
    try:
        settings = SETTINGS | {
            "data": str(tones(root / "data")),
            "max_steps": arguments.steps,
            "checkpoint_every": 2,
            "validate_every": 6,
            "precision": arguments.precision,
        }

        def start(out: Path, workers: int) -> Any:
            child = context.Process(
                target=attempt, args=(settings | {"out": str(out), "workers": workers},)
            )
            child.start()
            return child

        began = time.monotonic()
        child = start(root / "straight", 0)
        child.join()
        taken = time.monotonic() - began
        print(f"uninterrupted: {taken:.1f} s", flush=True)
        if child.exitcode != 0:
            return 1
        kills = writing = resumed = runs = unequal = 0
        while kills < arguments.kills:
            if arguments.seconds and time.monotonic() - began > arguments.seconds:
                break
            out, here, tries = root / f"killed{runs}", 0, 0
            while True:
                child = start(out, tries % 3)
                tries += 1
                spare = here < arguments.per_run and kills < arguments.kills
                child.join(random.uniform(0, 0.6 * taken) if spare else None)
                if child.exitcode is None:
                    child.kill()
                    child.join()
                    here, kills = here + 1, kills + 1
                    resumed += (out / "train.json").exists()
                    writing += any(out.rglob(".wavear-*.tmp"))
                elif child.exitcode == 0:
                    break
                else:
                    print(f"run {runs}: a process ended with {child.exitcode}")
                    return 1
            found = differences(root / "straight", out)
            unequal += bool(found)
            print(
                f"run {runs}: {here} kills, "
                f"{'differs in ' + ', '.join(found[:5]) if found else 'equal'}",
                flush=True,
            )
            runs += 1
            shutil.rmtree(out)
        print(
            f"{kills} kills in training ({writing} while a file was being written, {resumed} with"
            f" a run to resume) in {runs} runs of {arguments.steps} steps: {runs - unequal} of"
            f" {runs} equal to the uninterrupted one, bit for bit"
        )
        if arguments.synthesis_kills:
            unequal += kill_synthesis(root, arguments.synthesis_kills, random)
        return 1 if unequal else 0
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
