"""Published corpora as torchaudio lays them out: the speaker and the split of each file.

Each class gives a corpus's folder, its size, torchaudio's data set of it, and its split: the
official one, or else a stated rule. `wavear.training.corpus_run.listed` writes the manifest of a
run. torchaudio's items decode audio; only its lists are used here.
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
from wavear.common.errors import WavearError, one_line


@dataclass(frozen=True, slots=True)
class Clip:
    """One audio file of a corpus."""

    path: Path
    split: str
    """ "train", "validation" or "test"."""
    speaker: str = ""
    """Empty where the corpus has one speaker."""


def _datasets() -> Any:
    """Return the module `torchaudio.datasets`."""
    try:
        from torchaudio import datasets
    except (ImportError, OSError) as error:  # an OSError where its libraries do not fit torch's
        raise WavearError(
            "published corpora need torchaudio, which cannot be imported"
            f' ({one_line(error)}): pip install "wavear[corpora]"'
        ) from None
    return datasets


@contextlib.contextmanager
def _unpacked_inside() -> Iterator[None]:
    """Unpack tar archives below their folder only: torchaudio does not check one that it finds."""
    if not hasattr(tarfile, "data_filter"):
        raise OSError(
            f"Python {sys.version.split()[0]} unpacks tar archives unsafely. Update it to the last"
            " patch release."
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
    """A published corpus of parts (voices, subsets), each a folder below the data folder."""

    title: ClassVar[str]
    get: ClassVar[str | None] = None
    """How to get a corpus that torchaudio does not download."""

    def parts(self) -> Sequence[str]:
        """Return the names of the parts, held-out ones included."""
        return ("",)

    def folder(self, part: str) -> str:
        """Return the folder of a part, below the data folder."""
        raise NotImplementedError

    def gigabytes(self, part: str) -> float:
        """Return the download size of a part; unpacked it takes up to twice as much again."""
        raise NotImplementedError

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        """Return torchaudio's data set of a part.

        Raises
        ------
        OSError
            If a file is missing, or the download fails.
        RuntimeError
            If the download is damaged.
        """
        raise NotImplementedError

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        """Yield the clips of a part."""
        raise NotImplementedError

    def missing(self, data: str | Path) -> list[str]:
        """Return the parts that are missing below the folder `data`."""
        return [part for part in self.parts() if not (Path(data) / self.folder(part)).is_dir()]

    def size(self, parts: Iterable[str]) -> str:
        """Return the download size of parts, with its unit."""
        gigabytes = sum(self.gigabytes(part) for part in parts)
        return f"{gigabytes:.2g} GB" if gigabytes >= 0.95 else f"{1000 * gigabytes:.3g} MB"

    def clips(self, data: str | Path) -> list[Clip]:
        """Return every clip of every part below the folder `data`.

        Raises
        ------
        FileNotFoundError
            If a part or its list is missing; the message gives its size and how to get it.
        WavearError
            If a part lists no recordings, or a file name has another form.
        """
        data = Path(data)
        if lacking := self.missing(data):
            folders = ", ".join(self.folder(part) for part in lacking)
            how = self.get or f"get it with --download, {self.size(lacking)}"
            raise FileNotFoundError(
                f"{data} has no folder {folders} ({self.title}): {how}. If it is elsewhere, pass"
                " its parent folder as --data."
            )
        found: list[Clip] = []
        for part in self.parts():
            folder = data / self.folder(part)
            try:
                clips = list(self.clips_of(self.dataset(data, part), part))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{folder} is not a complete {self.title}: {error.filename or error} is"
                    " missing. For your own recordings use recipes/folder."
                ) from None
            if not clips:
                raise WavearError(f"{folder} ({self.title}) lists no recordings: is it unpacked?")
            found += clips
        return found

    def download(self, data: str | Path) -> list[Path]:
        """Download the missing parts into the folder `data`, each whole or not at all.

        Returns
        -------
        list of Path
            The folders of the parts.

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
                # torchaudio would treat a part of the folder as all of it. The archive stays.
                shutil.rmtree(data / self.folder(part), ignore_errors=True)
                if isinstance(error, (OSError, RuntimeError, EOFError, tarfile.TarError)):
                    message = f"{self.title} cannot be downloaded to {data}: {error}"
                    raise OSError(message) from error
                raise
        return [data / self.folder(part) for part in self.parts()]


@dataclass(frozen=True)
class LJSpeech(PublishedCorpus):
    """The LJ Speech Dataset 1.1. Without an official split, 50 clips are held out.

    They are the first 25 clips of LJ001 and of LJ002.
    """

    title: ClassVar[str] = "LJ Speech 1.1"

    def folder(self, part: str) -> str:
        return "LJSpeech-1.1"

    def gigabytes(self, part: str) -> float:
        return 2.7

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        return _datasets().LJSPEECH(data, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for name, *_ in dataset._flist:
            chapter, number = name.split("-")
            held_out = chapter in ("LJ001", "LJ002") and int(number) <= 25
            yield Clip(Path(dataset._path, f"{name}.wav"), "validation" if held_out else "train")


@dataclass(frozen=True)
class CMUArctic(PublishedCorpus):
    """CMU ARCTIC. Without an official split, every 20th sentence is held out, of every voice."""

    voices: tuple[str, ...] = ("slt",)
    """Some of aew, ahw, aup, awb, axb, bdl, clb, eey, fem, gka, jmk, ksp, ljm, lnh, rms, rxr,
    slp, slt."""

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
        return _datasets().CMUARCTIC(data, url=part, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for (line,) in dataset._walker:
            if line.strip():
                name = line.split()[1]  # ( arctic_a0001 "Author of the danger trail, ..." )
                path = Path(dataset._path, "wav", f"{name}.wav")
                yield Clip(path, _every_20th(int(name[-4:])), part)


@dataclass(frozen=True)
class VCTK(PublishedCorpus):
    """VCTK 0.92. Without an official split, every 20th sentence of each speaker is held out.

    Speakers are not held out, since a model has no number for a speaker that it was not trained on.
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
        return _datasets().VCTK_092(os.fspath(data), mic_id=self.microphone, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for speaker, number in dataset._sample_ids:
            name = f"{speaker}_{number}_{self.microphone}{dataset._audio_ext}"
            path = Path(dataset._audio_dir, speaker, name)
            yield Clip(path, _every_20th(int(number)), speaker)


@dataclass(frozen=True)
class YesNo(PublishedCorpus):
    """YesNo. Without an official split, every tenth recording is held out, in order of names."""

    title: ClassVar[str] = "YesNo"

    def folder(self, part: str) -> str:
        return "waves_yesno"

    def gigabytes(self, part: str) -> float:
        return 0.0047

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        return _datasets().YESNO(data, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for index, name in enumerate(dataset._walker):
            split = "validation" if index % 10 == 9 else "train"
            yield Clip(Path(dataset._path, f"{name}.wav"), split)


@dataclass(frozen=True)
class LibriTTS(PublishedCorpus):
    """LibriTTS with its official split: dev-clean is held out; its readers occur nowhere else."""

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
        _check("subsets", self.subsets, [name for name in self._GIGABYTES if name[:5] == "train"])

    def parts(self) -> Sequence[str]:
        return (*self.subsets, "dev-clean")

    def folder(self, part: str) -> str:
        return f"LibriTTS/{part}"

    def gigabytes(self, part: str) -> float:
        return self._GIGABYTES[part]

    def dataset(self, data: Path, part: str, download: bool = False) -> Any:
        return _datasets().LIBRITTS(data, url=part, download=download)

    def clips_of(self, dataset: Any, part: str) -> Iterator[Clip]:
        for name in dataset._walker:
            reader, chapter, *_ = name.split("_")
            path = Path(dataset._path, reader, chapter, f"{name}.wav")
            yield Clip(path, "validation" if part == "dev-clean" else "train", reader)


@dataclass(frozen=True)
class Digits(PublishedCorpus):
    """Spoken digits as in the Free Spoken Digit Dataset: `recordings/DIGIT_SPEAKER_INDEX.wav`.

    The indices 0 to 4 are its official test set, for neither training nor selection; 5 to 9 are
    held out.
    """

    title: ClassVar[str] = "the Free Spoken Digit Dataset"
    get: ClassVar[str | None] = (
        "get it by git clone https://github.com/Jakobovski/free-spoken-digit-dataset (21 MB)"
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
                raise WavearError(
                    f"{path} has another form than DIGIT_SPEAKER_INDEX.wav (7_jackson_32.wav)"
                )
            number = int(index)
            split = "test" if number < 5 else "validation" if number < 10 else "train"
            yield Clip(path, split, speaker)


def _check(field: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise WavearError(f"{field} is empty, expected at least one of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise WavearError(f"{field} has {name!r}, expected one of {', '.join(known)}")


def _every_20th(number: int) -> str:
    return "validation" if number % 20 == 0 else "train"


def write_manifest(manifest: Path, clips: list[Clip], overwrite: bool) -> None:
    """Write a CSV manifest, with paths relative to it so that data and runs can move together.

    Raises
    ------
    FileExistsError
        If the manifest exists with other contents, and `overwrite` is not set.
    """
    base = os.path.realpath(manifest.parent)
    columns = ["path", "split", *(["speaker"] if any(clip.speaker for clip in clips) else [])]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for clip in clips:
        path = Path(os.path.relpath(clip.path, base))
        writer.writerow([path.as_posix(), clip.split, clip.speaker][: len(columns)])
    text = table.getvalue()
    if manifest.exists() and not overwrite:
        if manifest.read_text(encoding="utf-8") == text:
            return
        raise FileExistsError(
            f"{manifest} exists with other contents. Use it with --resume, replace it with"
            " --overwrite, or choose another --out."
        )
    manifest.parent.mkdir(parents=True, exist_ok=True)
    replace_file(manifest, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
