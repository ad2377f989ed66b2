"""Download LJSpeech (2.6 GB) with torchaudio, and list it in a manifest for `train.py`."""

import csv
import dataclasses
import sys
from pathlib import Path

import tyro

HELD_OUT = ("LJ001", "LJ002")  # chapters whose first clips are held out, as no split is official
HELD_OUT_CLIPS = 25  # of each


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Where the data go."""

    data: Path = Path("data")
    """Folder to download to: LJSpeech-1.1/ and ljspeech.csv are made in it."""
    download: bool = True
    """Download what is not there yet; else it has to be there."""


def write_manifest(prepare: Prepare) -> Path:
    """`ljspeech.csv` in the data folder, with path and split of every clip."""
    from torchaudio.datasets import LJSPEECH

    prepare.data.mkdir(parents=True, exist_ok=True)
    dataset = LJSPEECH(prepare.data, download=prepare.download)
    manifest = prepare.data / "ljspeech.csv"
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split"])
        for clip, *_ in dataset._flist:  # its items decode audio, its list does not
            chapter, number = clip.split("-")
            held_out = chapter in HELD_OUT and int(number) <= HELD_OUT_CLIPS
            writer.writerow([f"LJSpeech-1.1/wavs/{clip}.wav", "validation" if held_out else "train"])
    return manifest


if __name__ == "__main__":
    try:
        print(write_manifest(tyro.cli(Prepare, description=__doc__)))
    except (OSError, RuntimeError) as error:  # RuntimeError: torchaudio does not find it, or the download is damaged
        sys.exit(f"prepare.py: error: {error}")
