"""Published corpora, as torchaudio's data sets lay them out: which file is whose, and what is held out.

Each class says where a corpus lies below a data folder, how large it is, how torchaudio downloads
it, and how its clips are split: officially where there is an official split, by a stated rule else.
`listed` turns one into the manifest that a run reads. torchaudio's items decode audio; what is used
of it here is its lists.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from wavear.common.atomic import replace_file


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file of a corpus."""

    path: Path
    split: str
    """ "train", "validation" or "test"."""
    speaker: str = ""
    """Empty where the corpus has one speaker."""


@contextlib.contextmanager
def _unpacked_inside() -> Iterator[None]:
    """Let tar archives be unpacked only below their folder: torchaudio checks those it downloads, not one it finds."""
    if not hasattr(tarfile, "data_filter"):
        raise OSError(
            f"Python {sys.version.split()[0]} unpacks tar archives unsafely: update it to its last patch release"
        )
    before = tarfile.TarFile.__dict__.get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        if before is None:
            del tarfile.TarFile.extraction_filter
        else:
            tarfile.TarFile.extraction_filter = before


class PublishedCorpus:
    """A published corpus of one or more parts (voices, subsets), each a folder below the data folder."""

    title: ClassVar[str]
    get: ClassVar[str | None] = None
    """How to get it, for a corpus that torchaudio does not download."""

    def parts(self) -> Sequence[str]:
        """Names of the parts, held-out ones included."""
        return ("",)

    def folder(self, part: str) -> str:
        """Of a part, below the data folder."""
        raise NotImplementedError

    def gigabytes(self, part: str) -> float:
        """To download for a part; unpacked it takes up to twice as much again."""
        raise NotImplementedError

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        """torchaudio's data set of a part.

        Raises
        ------
        OSError
            If a file is missing, or the download fails.
        RuntimeError
            If the download is damaged.
        """
        raise NotImplementedError

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        """The clips of a part."""
        raise NotImplementedError

    def missing(self, data: str | Path) -> list[str]:
        """Parts that are not there."""
        return [part for part in self.parts() if not (Path(data) / self.folder(part)).is_dir()]

    def size(self, parts: Iterable[str]) -> str:
        """To download, in words."""
        gigabytes = sum(self.gigabytes(part) for part in parts)
        return f"{gigabytes:.2g} GB" if gigabytes >= 0.95 else f"{1000 * gigabytes:.3g} MB"

    def clips(self, data: str | Path) -> list[Clip]:
        """Every clip of every part, below the folder `data`.

        Raises
        ------
        FileNotFoundError
            If a part is missing, with how to get it and its size, or lacks what lists it.
        ValueError
            If a part lists nothing, or nothing of it can be listed.
        """
        data = Path(data)
        if lacking := self.missing(data):
            folders = ", ".join(self.folder(part) for part in lacking)
            how = self.get or f"--download gets it, {self.size(lacking)}"
            raise FileNotFoundError(
                f"{data} holds no {folders} ({self.title}): {how}; or --data names the folder that holds it"
            )
        found: list[Clip] = []
        for part in self.parts():
            folder = data / self.folder(part)
            try:
                clips = list(self.clips_of(self.dataset(data, part), part))
            except FileNotFoundError as error:
                lost = error.filename or error
                raise FileNotFoundError(
                    f"{folder} is not laid out as {self.title} is, or not all there: {lost} is missing"
                    " (recordings in folders of your own: recipes/folder)"
                ) from None
            if not clips:
                raise ValueError(f"{folder} ({self.title}) lists no recordings: is it unpacked?")
            found += clips
        return found

    def download(self, data: str | Path) -> list[Path]:
        """Get the parts that are missing into the folder `data`; a part is unpacked as a whole or not at all.

        Returns
        -------
        list of Path: the folders of the parts

        Raises
        ------
        OSError
            If the download fails or is damaged, or torchaudio has no download of this corpus.
        """
        data = Path(data)
        if self.get is not None:
            raise OSError(f"torchaudio has no download of {self.title}: {self.get}")
        data.mkdir(parents=True, exist_ok=True)
        for part in self.missing(data):
            try:
                with _unpacked_inside():
                    self.dataset(data, part, download=True)
            except BaseException as error:
                # It was not there before, and torchaudio would take what is there now for all of
                # it. The archive stays.
                shutil.rmtree(data / self.folder(part), ignore_errors=True)
                if isinstance(error, (OSError, RuntimeError, EOFError, tarfile.TarError)):
                    raise OSError(
                        f"{self.title} cannot be downloaded to {data}: {error}"
                    ) from error
                raise
        return [data / self.folder(part) for part in self.parts()]


@dataclass(frozen=True)
class LJSpeech(PublishedCorpus):
    """The LJ Speech Dataset 1.1. No split is official: the first 25 clips of LJ001 and of LJ002 are held out."""

    title: ClassVar[str] = "LJ Speech 1.1"

    def folder(self, part: str) -> str:
        return "LJSpeech-1.1"

    def gigabytes(self, part: str) -> float:
        return 2.7

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        from torchaudio.datasets import LJSPEECH

        return LJSPEECH(data, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for name, *_ in dataset._flist:
            chapter, number = name.split("-")
            held_out = chapter in ("LJ001", "LJ002") and int(number) <= 25
            yield Clip(Path(dataset._path, f"{name}.wav"), "validation" if held_out else "train")


@dataclass(frozen=True)
class CMUArctic(PublishedCorpus):
    """CMU ARCTIC. No split is official: sentences whose number divides by 20 are held out, of every voice."""

    voices: tuple[str, ...] = ("slt",)
    """Of aew, ahw, aup, awb, axb, bdl, clb, eey, fem, gka, jmk, ksp, ljm, lnh, rms, rxr, slp, slt."""

    title: ClassVar[str] = "CMU ARCTIC"
    _VOICES: ClassVar[tuple[str, ...]] = (
        *("aew", "ahw", "aup", "awb", "axb", "bdl", "clb", "eey", "fem"),
        *("gka", "jmk", "ksp", "ljm", "lnh", "rms", "rxr", "slp", "slt"),
    )

    def __post_init__(self) -> None:
        _check("voices", self.voices, self._VOICES)

    def parts(self) -> Sequence[str]:
        return self.voices

    def folder(self, part: str) -> str:
        return f"ARCTIC/cmu_us_{part}_arctic"

    def gigabytes(self, part: str) -> float:
        return 0.12

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        from torchaudio.datasets import CMUARCTIC

        return CMUARCTIC(data, url=part, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for (line,) in dataset._walker:
            if line.strip():
                name = line.split()[
                    1
                ]  # ( arctic_a0001 "Author of the danger trail, Philip Steels, etc." )
                yield Clip(
                    Path(dataset._path, "wav", f"{name}.wav"), _every_20th(int(name[-4:])), part
                )


@dataclass(frozen=True)
class VCTK(PublishedCorpus):
    """VCTK 0.92. No split is official: of every speaker, the sentences whose number divides by 20 are held out.

    Speakers are not: a model cannot be told to be one that it has not heard.
    """

    microphone: str = "mic1"
    """mic1 (omni-directional) or mic2 (condenser; lacks speakers p280 and p315)."""

    title: ClassVar[str] = "VCTK 0.92"

    def __post_init__(self) -> None:
        _check("microphone", (self.microphone,), ["mic1", "mic2"])

    def folder(self, part: str) -> str:
        return "VCTK-Corpus-0.92"

    def gigabytes(self, part: str) -> float:
        return 11.7

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        from torchaudio.datasets import VCTK_092

        return VCTK_092(os.fspath(data), mic_id=self.microphone, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for speaker, number in dataset._sample_ids:
            path = Path(
                dataset._audio_dir,
                speaker,
                f"{speaker}_{number}_{self.microphone}{dataset._audio_ext}",
            )
            yield Clip(path, _every_20th(int(number)), speaker)


@dataclass(frozen=True)
class YesNo(PublishedCorpus):
    """YesNo. No split is official: every tenth recording is held out, in the order of the names."""

    title: ClassVar[str] = "YesNo"

    def folder(self, part: str) -> str:
        return "waves_yesno"

    def gigabytes(self, part: str) -> float:
        return 0.0047

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        from torchaudio.datasets import YESNO

        return YESNO(data, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for index, name in enumerate(dataset._walker):
            yield Clip(
                Path(dataset._path, f"{name}.wav"), "validation" if index % 10 == 9 else "train"
            )


@dataclass(frozen=True)
class LibriTTS(PublishedCorpus):
    """LibriTTS, with its official split: dev-clean is held out, and its readers are nowhere else."""

    subsets: tuple[str, ...] = ("train-clean-100",)
    """To train on: train-clean-100, train-clean-360, train-other-500."""

    title: ClassVar[str] = "LibriTTS"
    _GIGABYTES: ClassVar[dict[str, float]] = {
        "train-clean-100": 7.7,
        "train-clean-360": 27.5,
        "train-other-500": 44.0,
        "dev-clean": 1.2,
    }

    def __post_init__(self) -> None:
        _check(
            "subsets", self.subsets, [name for name in self._GIGABYTES if name.startswith("train")]
        )

    def parts(self) -> Sequence[str]:
        return (*self.subsets, "dev-clean")

    def folder(self, part: str) -> str:
        return f"LibriTTS/{part}"

    def gigabytes(self, part: str) -> float:
        return self._GIGABYTES[part]

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        from torchaudio.datasets import LIBRITTS

        return LIBRITTS(data, url=part, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for name in dataset._walker:
            reader, chapter, *_ = name.split("_")
            path = Path(dataset._path, reader, chapter, f"{name}.wav")
            yield Clip(path, "validation" if part == "dev-clean" else "train", reader)


@dataclass(frozen=True)
class Digits(PublishedCorpus):
    """Spoken digits as in the Free Spoken Digit Dataset: `recordings/DIGIT_SPEAKER_INDEX.wav`.

    The indices 0 to 4 are its official test set, on which nothing is trained or chosen; 5 to 9 are
    held out.
    """

    title: ClassVar[str] = "the Free Spoken Digit Dataset"
    get: ClassVar[str | None] = (
        "git clone https://github.com/Jakobovski/free-spoken-digit-dataset gets it (21 MB of recordings)"
    )

    def folder(self, part: str) -> str:
        return "recordings"

    def gigabytes(self, part: str) -> float:
        return 0.021

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        return sorted((data / "recordings").glob("*.wav"))

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for path in dataset:
            digit, _, rest = path.stem.partition("_")
            speaker, _, index = rest.rpartition("_")
            if not (digit.isdigit() and speaker and index.isdigit()):
                raise ValueError(
                    f"{path} is not named as digits are: DIGIT_SPEAKER_INDEX.wav, such as 7_jackson_32.wav"
                )
            yield Clip(
                path,
                "test" if int(index) < 5 else "validation" if int(index) < 10 else "train",
                speaker,
            )


def _check(field: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise ValueError(f"{field} is empty, expected at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{field}: {name!r} is none of {', '.join(known)}")


def _every_20th(number: int) -> str:
    return "validation" if number % 20 == 0 else "train"


def write_manifest(manifest: Path, clips: list[Clip], overwrite: bool) -> None:
    text = _table(clips, os.path.realpath(manifest.parent))
    if manifest.exists() and not overwrite:
        if manifest.read_text(encoding="utf-8") == text:
            return
        raise FileExistsError(
            f"{manifest} exists and lists something else: --resume goes on with it, --overwrite replaces it, or choose"
            " another --out"
        )
    manifest.parent.mkdir(parents=True, exist_ok=True)
    replace_file(manifest, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))


def _table(clips: list[Clip], base: str) -> str:
    """CSV, with paths relative to the folder `base` so that data and runs can move together."""
    columns = ["path", "split", *(["speaker"] if any(clip.speaker for clip in clips) else [])]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for clip in clips:
        path = Path(os.path.relpath(clip.path, base))
        writer.writerow([path.as_posix(), clip.split, clip.speaker][: len(columns)])
    return table.getvalue()
