"""Train the universal voice that wavear ships. Every value below is a flag too."""

import csv
import dataclasses
from pathlib import Path

from wavear import TrainConfig, corpora, train
from wavear.cli import recipe

VALUES = TrainConfig(
    data="data",
    out="runs/voice",
    sample_rate=22050,  # with 80 HiFi-GAN mels, the default
    max_steps=None,
    max_minutes=60.0,
    validate_seconds=600.0,
)

REPEATS = {"ljspeech_mini": 4, "vctk_mini": 4, "cmu_arctic_slt": 2}
"""Times that the clips of a small folder are listed, so that training draws them that often."""

HELD_OUT_READERS = ("Cocotte", "VioletBleu")
HELD_OUT_LJ = ("LJ001-0029", "LJ001-0030", "LJ001-0031", "LJ001-0032")
HELD_OUT_SPEAKER = "p227"


def clips(data: Path) -> list[corpora.Clip]:
    """Return the clips of the five speech folders, with what is held out."""
    readers = {}
    with open(data / "librivox_fr_multi" / "speakers.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            readers[row["file"]] = row["reader"]
    held_out = {
        "kerstin_de": lambda path: path.parent.name == "dev",
        "ljspeech_mini": lambda path: path.stem in HELD_OUT_LJ,
        "vctk_mini": lambda path: path.parent.name == HELD_OUT_SPEAKER,
        "librivox_fr_multi": lambda path: readers[path.name] in HELD_OUT_READERS,
        "cmu_arctic_slt": lambda path: False,
    }
    patterns = {
        "kerstin_de": ("dev/*.flac", "train/*.flac", "more/*.flac"),
        "ljspeech_mini": ("wavs/*.wav",),
        "vctk_mini": ("p*/*.wav",),
        "librivox_fr_multi": ("*.mp3",),
        "cmu_arctic_slt": ("wav/*.wav",),
    }
    found: list[corpora.Clip] = []
    held: list[list[corpora.Clip]] = []
    for folder, globs in patterns.items():
        paths = [path for pattern in globs for path in sorted((data / folder).glob(pattern))]
        if not paths:
            raise FileNotFoundError(
                f"{data / folder} has no recordings: see recipes/voice/README.md"
            )
        held.append([corpora.Clip(p, "validation") for p in paths if held_out[folder](p)])
        training = [corpora.Clip(p, "train") for p in paths if not held_out[folder](p)]
        found += training * REPEATS.get(folder, 1)
    # One clip of each voice after the other: validations synthesize the first four.
    turns = range(max(map(len, held)))
    return [clips[turn] for turn in turns for clips in held if turn < len(clips)] + found


def run(config: TrainConfig) -> int:
    """List the clips next to the run, and train on them."""
    manifest = Path(config.out).with_suffix(".csv")
    if not (config.resume and manifest.is_file()):
        corpora.write_manifest(manifest, clips(Path(config.data)), config.overwrite)
    result = train(dataclasses.replace(config, data=str(manifest)))
    print(f"checkpoint: {result.best}")
    return 130 if result.stopped_by == "interrupt" else 0


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
