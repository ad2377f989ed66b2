"""Download LJSpeech (2.6 GB) with torchaudio, and list it in a manifest for `train.py`."""

import csv
import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Where the data go."""

    data: Path = Path("data")
    """Folder to download to: LJSpeech-1.1/ is made in it."""
    download: bool = True
    """Download what is not there yet; else it has to be there."""


def write_manifest(prepare: Prepare) -> Path:
    """`ljspeech.csv` in the data folder: path, speaker, split. The first clips of two chapters are held out.

    LJ001 and LJ002 go to the validation (up to clip 25 each), as no split is official: 50 clips, about five minutes.
    """
    from torchaudio.datasets import LJSPEECH

    prepare.data.mkdir(parents=True, exist_ok=True)
    dataset = LJSPEECH(prepare.data, download=prepare.download)
    manifest = prepare.data / "ljspeech.csv"
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "speaker", "split"])
        for row in dataset._flist:  # (clip, text, normalised text): the listing itself, no audio is decoded
            clip = row[0]
            chapter, number = clip.split("-")
            held_out = chapter in ("LJ001", "LJ002") and int(number) <= 25
            path = f"LJSpeech-1.1/wavs/{clip}.wav"
            writer.writerow([path, "LJ", "validation" if held_out else "train"])
    return manifest


if __name__ == "__main__":
    print(write_manifest(tyro.cli(Prepare, description=__doc__)))
