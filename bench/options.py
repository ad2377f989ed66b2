"""Train a model with each option for the same steps; write the effects to docs/training.md.

    python bench/options.py --data train.csv --validation dev.csv --out runs/options --minutes 20
    python bench/options.py --data my/recordings --out runs/options --steps 3000 --layers 12
    --options plain noise

The same command resumes an interrupted run: a run that is done is not repeated, one that is
not is resumed.

Every option is measured against the same recordings, untreated: a model that is trained on levelled
audio is given the mel of the levelled clip, and what it makes is brought back to the clip's own
level. One seed; temperature 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import write_section

from wavear import MelConfig, TrainConfig, generate, load, log_mel, score, train
from wavear.audio.grid import Grid
from wavear.common.atomic import replace_file
from wavear.data.corpus import open_corpus
from wavear.data.crops import read_span
from wavear.evaluation.bounds import grid_round_trip
from wavear.evaluation.metrics import (
    NotMeasured,
    mel_cepstral_distortion,
    noise_floor,
    stft_distance,
)
from wavear.evaluation.statistics import Interval, bootstrap

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("none of them", {}),
    "noise": ("input noise, 2 codes", {"input_noise": 2.0}),
    "dropout": ("dropout of conditioning, 0.1", {"conditioning_dropout": 0.1}),
    "emphasis": ("pre-emphasis, 0.85", {"pre_emphasis": 0.85}),
    "trim": ("silence trimming, 40 dB", {"trim_silence": 40.0}),
    "level": ("level normalisation, rms", {"normalize": "rms"}),
}
OTHER_CODES = ("emphasis", "level")  # whose bits are of other codes than those of `plain`
MEASURES = {"bits": "bits", "stft": "STFT distance", "mcd": "MCD, dB", "floor": "noise floor, dBFS"}
DIGITS = {"bits": 3, "stft": 3, "mcd": 2, "floor": 1}
VALUES = (
    "layers",
    "stacks",
    "residual_channels",
    "skip_channels",
    "batch_size",
    "segment",
    "learning_rate",
    "sample_rate",
)
_CALIBRATION = 12  # steps that say how many fit into --minutes


def run(config: TrainConfig) -> bool:
    """Train, or resume, to the end; return whether it got there."""
    resume = (Path(config.out) / "train.json").exists()
    return train(dataclasses.replace(config, resume=resume)).stopped_by != "interrupt"


def check_runs(out: str, base: TrainConfig) -> None:
    """Exit if the folder holds runs of other data, or of another model."""
    for path in sorted(Path(out).glob("*/train.json")):
        before = json.loads(path.read_text(encoding="utf-8")).get("config", {})
        for name in ("data", "validation", *VALUES):
            if before and before.get(name) != getattr(base, name):
                now = getattr(base, name)
                sys.exit(
                    f"{path.parent} is a run with {name} {before.get(name)}, now {now}: choose "
                    "another --out"
                )


def steps_of(arguments: argparse.Namespace, config: TrainConfig) -> int:
    """Return the steps: given, or as many as fit into the minutes; equal on resuming."""
    if arguments.steps is not None:
        return arguments.steps
    path = Path(arguments.out) / "steps.json"
    if not path.exists():
        trial = dataclasses.replace(
            config,
            out=str(Path(arguments.out) / "calibration"),
            max_steps=_CALIBRATION,
            overwrite=True,
            progress=False,
        )
        trial = dataclasses.replace(
            trial, overwrite=Path(trial.out).exists(), validation_seconds=0.1, final_seconds=0.1
        )
        result = train(trial)
        seconds = (
            (json.loads((Path(trial.out) / "train.json").read_text())["history"])[-1]["seconds"]
            / result.steps
        )
        text = json.dumps(
            {"steps": max(round(60 * arguments.minutes / seconds), 1), "seconds_per_step": seconds}
        )
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))["steps"]


def clips_of(
    config: TrainConfig, count: int, seconds: float
) -> list[tuple[str, np.ndarray, float]]:
    """Return held-out clips, evenly spread: name, waveform of whole frames, gain in training."""
    corpus = open_corpus(
        config.data,
        sample_rate=config.sample_rate,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        normalize=config.normalize,
        normalize_by=config.normalize_by,
    )
    assert config.mel is not None
    hop, held = config.mel.hop_length, corpus.validation
    chosen = [held[round(k)] for k in np.linspace(0, len(held) - 1, min(count, len(held)))]
    found = []
    for recording in chosen:
        frames = min(recording.frames, round(seconds * config.sample_rate)) // hop * hop
        plain = dataclasses.replace(recording, gain=1.0)
        found.append(
            (recording.name, read_span(plain, config.sample_rate, 0, frames), recording.gain)
        )
    return found


def against(x: np.ndarray, y: np.ndarray, rate: int) -> dict[str, float]:
    """Return the measures of y compared with the recording x."""
    values = {}
    for name, way in {
        "stft": lambda: stft_distance(x, y),
        "mcd": lambda: mel_cepstral_distortion(x, y, rate),
        "floor": lambda: noise_floor(x, y, rate),
    }.items():
        try:
            values[name] = way()
        except NotMeasured as why:
            print(f"    not measured: {name}: {why}")
    return values


def measure(config: TrainConfig, count: int, seconds: float) -> dict[str, Any]:
    """Return the bits and measures of each clip, of the last state of a run."""
    model = load(Path(config.out) / "last")
    clips, rate = clips_of(config, count, seconds), config.sample_rate
    assert isinstance(config.mel, MelConfig)
    heard = [torch.from_numpy(np.clip(x * np.float32(gain), -1, 1)) for _, x, gain in clips]
    made = generate(model, [log_mel(x[None], config.mel)[0] for x in heard], seed=0)
    rows = {}
    for (name, x, gain), levelled, row in zip(clips, heard, made, strict=True):
        bits = float(-score(model, levelled).mean()) / math.log(2)
        rows[name] = {"bits": bits} | against(x, row[: x.size].numpy() / gain, rate)
    return rows


def bounds(config: TrainConfig, count: int, seconds: float) -> dict[str, Any]:
    """Return the measures of the recordings, and of the mu-law round trip."""
    found: dict[str, Any] = {"recording": {}, "mulaw": {}}
    for name, x, _ in clips_of(config, count, seconds):
        found["recording"][name] = against(x, x, config.sample_rate)
        back = grid_round_trip(torch.from_numpy(x), Grid("mulaw", config.classes or 256)).numpy()
        found["mulaw"][name] = against(x, back, config.sample_rate)
    return found


def shown(interval: Interval, digits: int, sign: str = "") -> str:
    """Mean and interval."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{sign}.{digits}f}"
    low, high = f"{interval.low:{sign}.{digits}f}", f"{interval.high:{sign}.{digits}f}"
    return f"{interval.mean:{sign}.{digits}f} ({low} to {high})"


def table(found: dict[str, Any], steps: int, about: str) -> str:
    """Markdown: the means, and what each option changes, clip by clip."""
    plain, bound = found["plain"], found["bounds"]
    lines = [
        f"Written by `bench/options.py`. {about[:1].upper()}{about[1:]}, {steps:,} steps each, "
        f"{len(plain)} held-out"
        " clips.",
        "Means over clips, and 95 % intervals by bootstrap over clips, which say nothing of "
        "another seed or run.",
        "",
        f"| | {' | '.join(MEASURES.values())} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, text in {"recording": "the recordings", "mulaw": "mu-law round trip"}.items():
        cells = []
        for measure in MEASURES:
            values = [row[measure] for row in bound[name].values() if measure in row]
            known = values and not (name == "recording" and measure != "floor")
            cells.append(f"{np.mean(values):.{DIGITS[measure]}f}" if known else "")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    done = [name for name in OPTIONS if name in found]
    for name in done:
        cells = []
        for measure, digits in DIGITS.items():
            values = [row[measure] for row in found[name].values() if measure in row]
            note = " (a)" if measure == "bits" and name in OTHER_CODES else ""
            cells.append(shown(bootstrap(values), digits) + note if values else "")
        lines.append(f"| {OPTIONS[name][0]} | {' | '.join(cells)} |")
    lines += [
        "",
        "The option less none of them, clip by clip; bold where the interval has no 0 in it:",
        "",
    ]
    lines += [f"| | {' | '.join(MEASURES.values())} |", "|---|---:|---:|---:|---:|"]
    for name in done[1:]:
        cells = []
        for measure, digits in DIGITS.items():
            pairs = [
                row[measure] - plain[clip][measure]
                for clip, row in found[name].items()
                if measure in row and measure in plain[clip]
            ]
            if not pairs or (measure == "bits" and name in OTHER_CODES):
                cells.append("(a)" if pairs else "")
                continue
            interval = bootstrap(pairs)
            text = shown(interval, digits, "+")
            sure = (
                interval.low is not None
                and interval.high is not None
                and interval.low * interval.high > 0
            )
            cells.append(f"**{text}**" if sure else text)
        lines.append(f"| {OPTIONS[name][0]} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "(a) Of other codes (pre-emphasised, or levelled): not to be compared."]
    )


def main() -> int:
    """Run the options one after the other, and write the table of those that are done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="recordings: folder or manifest")
    parser.add_argument("--validation", help="held-out ones; by default a part of the data")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument(
        "--minutes",
        type=float,
        help="of each run, in place of --steps: as many steps as fit, the same for all",
    )
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--clips", type=int, default=16, help="held-out clips to measure")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each clip, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--about", help="what the data are, for the page")
    parser.add_argument("--page", type=Path, default=PAGE)
    defaults = TrainConfig(data="", out="", family="wavenet").resolved()
    for name in VALUES:
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int if value is None else type(value), default=value
        )
    arguments = parser.parse_args()
    if (arguments.steps is None) == (arguments.minutes is None):
        parser.error("give --steps or --minutes")
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    base = TrainConfig(
        family="wavenet",
        data=arguments.data,
        validation=arguments.validation,
        out=os.path.join(arguments.out, "plain"),
        device=arguments.device,
        sample_seconds=0.0,
        validate_seconds=600.0,
        final_seconds=1.0,  # what is measured here is measured below
        baseline_seconds=1.0,
        progress=sys.stdout.isatty(),
        **{name: getattr(arguments, name) for name in VALUES},
    )
    check_runs(arguments.out, base)
    steps = steps_of(arguments, base)
    found: dict[str, Any] = {"bounds": bounds(base, arguments.clips, arguments.seconds)}
    asked = {"steps": steps, "clips": arguments.clips, "seconds": arguments.seconds}
    for name, (text, settings) in OPTIONS.items():
        path = Path(arguments.out) / f"{name}.json"
        if (
            path.exists()
            and (kept := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked
        ):
            found[name] = kept["clips"]
        elif name in arguments.options:
            print(f"{text}: {steps} steps", flush=True)
            config = dataclasses.replace(
                base, out=os.path.join(arguments.out, name), max_steps=steps, **settings
            )
            if not run(config):
                print("stopped: the same command resumes")
                return 130
            found[name] = measure(config, arguments.clips, arguments.seconds)
            content = json.dumps({"asked": asked, "clips": found[name]}, indent=1)
            replace_file(
                path,
                lambda temporary, content=content: temporary.write_text(content, encoding="utf-8"),
            )
    if "plain" in found:
        made = base.model_config()
        shape = (
            f"{made.layers} layers, {made.stacks} stacks, {made.residual_channels} residual, "
            f"{made.skip_channels} skip"
        )
        data = arguments.about or Path(arguments.data).name
        about = f"{data}; {shape}, batches of {base.batch_size} x {base.segment}"
        write_section(arguments.page, "options", table(found, steps, about))
        print(f"wrote {arguments.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
