"""Train the universal voice that comes with wavear. Every value below is a flag too."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from wavear import TrainConfig, corpora
from wavear.cli import recipe

HELD_OUT_READERS = ("Cocotte", "VioletBleu")
HELD_OUT_LJ = ("LJ001-0029", "LJ001-0030", "LJ001-0031", "LJ001-0032")
HELD_OUT_SPEAKER = "p227"


@dataclass(frozen=True)
class Voices(corpora.PublishedCorpus):
    """Five folders of speech, in which some clips and some voices are held out."""

    title = "the speech of wavear's voice"
    get = "see recipes/voice/README.md"

    # The recordings of each folder, and how often its clips are listed, so that the small ones are
    # drawn more often.
    FOLDERS = {  # noqa: RUF012 (not a field)
        "kerstin_de": (("dev/*.flac", "train/*.flac", "more/*.flac"), 1),
        "ljspeech_mini": (("wavs/*.wav",), 4),
        "vctk_mini": (("p*/*.wav",), 4),
        "librivox_fr_multi": (("*.mp3",), 1),
        "cmu_arctic_slt": (("wav/*.wav",), 2),
    }

    def parts(self) -> tuple[str, ...]:
        return tuple(self.FOLDERS)

    def folder(self, part: str) -> str:
        return part

    def dataset(self, data: Path, part: str, download: bool = False) -> list[Path]:
        patterns, _ = self.FOLDERS[part]
        return [path for pattern in patterns for path in sorted((data / part).glob(pattern))]

    def clips_of(self, dataset: list[Path], part: str) -> Iterator[corpora.Clip]:
        readers = _readers(dataset[0].parent) if part == "librivox_fr_multi" and dataset else {}
        for path in dataset:
            held_out = (
                path.parent.name in ("dev", HELD_OUT_SPEAKER)
                or path.stem in HELD_OUT_LJ
                or readers.get(path.name) in HELD_OUT_READERS
            )
            times = 1 if held_out else self.FOLDERS[part][1]
            yield from [corpora.Clip(path, "validation" if held_out else "train")] * times

    def clips(self, data: str | Path) -> list[corpora.Clip]:
        """Return all clips, first one held-out clip of each folder: validations synthesize four."""
        found = super().clips(data)
        held: dict[str, list[corpora.Clip]] = {}
        for clip in found:
            if clip.split == "validation":
                held.setdefault(clip.path.relative_to(data).parts[0], []).append(clip)
        turns = zip_longest(*held.values())
        first = [clip for turn in turns for clip in turn if clip is not None]
        return first + [clip for clip in found if clip.split == "train"]


def _readers(folder: Path) -> dict[str, str]:
    """Return the reader of each file of the French recordings."""
    with open(folder / "speakers.csv", encoding="utf-8", newline="") as file:
        return {row["file"]: row["reader"] for row in csv.DictReader(file)}


VALUES = TrainConfig(
    data="data",
    out="runs/voice",
    sample_rate=22050,  # with the default mels, those of HiFi-GAN
    period_residuals=8,
    max_steps=None,
    max_minutes=60.0,
    validate_seconds=600.0,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, Voices())
