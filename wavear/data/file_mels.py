"""Mels from files, to condition on instead of those of the recordings: find, check and read them.

The mel of `sub/x.wav` is `sub/x.npy` (or another ending) in the folder of mels, or `x.npy` if the
folder holds none by such a path. Frame f belongs to the samples [f * hop, (f + 1) * hop) of the
file. A mel is read when a crop needs it, so a folder may be larger than the memory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from wavear import audio
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.words import counted
from wavear.data.recordings import MelReader, Recordings
from wavear.mel import kaldi
from wavear.mel.conventions import Frames
from wavear.mel.detection import Expectation, MelVerdict, adapt_mel, judge_mel
from wavear.mel.features import FeatureConfig
from wavear.mel.mel_files import MEL_SUFFIXES, features_in, load_mel
from wavear.mel.spectrogram import MelConfig, log_mel

logger = get_logger(__name__)

_TOLERANCE = 2  # frames by which programs differ at the end of a recording
_JUDGED = 32  # mels whose values are judged
_JUDGED_SECONDS = 10


class MelFolder:
    """A folder of mels, or of features, of recordings.

    Mels are in the convention `config` unless a file has its own.

    Parameters
    ----------
    folder : str or Path
        Or an archive or list of Kaldi, whose entries are named as recordings are without ending.
    config : MelConfig
        The model's.
    """

    def __init__(self, folder: str | Path, config: Frames):
        self.folder, self.config = Path(folder), config
        self.flat = False
        self.entries: dict[str, Path] | None = None
        if self.folder.suffix.lower() in kaldi.SUFFIXES and self.folder.is_file():
            self.entries = kaldi.entries(self.folder)
        elif not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of mels")

    def __call__(self, file: str) -> MelReader:
        """Return the reader of the mel of a recording's file."""
        path = self.path(file)
        assert path is not None
        return functools.partial(_frames, path, self.config)

    def path(self, file: str) -> Path | None:
        """Return the mel of a recording's file, or None."""
        stem = PurePosixPath(file).with_suffix("")
        if self.entries is not None:
            return self.entries.get(stem.name)
        if self.flat:
            stem = PurePosixPath(stem.name)
        elif stem.is_absolute() or ".." in stem.parts:  # of a manifest: not in the folder of mels
            return None
        above = self.folder / stem
        found = [p for s in MEL_SUFFIXES if (p := above.with_name(above.name + s)).is_file()]
        if len(found) > 1:
            raise WavearError(f"{found[0]} and {found[1]} are mels of {file}: keep one of them")
        return found[0] if found else None

    def pair(
        self,
        recordings: Recordings,
        progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
    ) -> tuple[Recordings, list[str]]:
        """Return the recordings that have a mel, with it, and the names of the others.

        A recording that is longer than its mel by one or two frames loses them.

        Raises
        ------
        WavearError
            If no recording has a mel, two share one, or one is damaged or does not fit: its bands,
            its length, or the values of most of those that are judged.
        """
        rows, folder = range(len(recordings)), self
        paths = [folder.path(recordings.file(row)) for row in rows]
        if not any(paths):
            folder = copy.copy(self)
            folder.flat = True
            paths = [folder.path(recordings.file(row)) for row in rows]
        if not any(paths):
            example = PurePosixPath(recordings.file(0)).with_suffix(MEL_SUFFIXES[0])
            raise WavearError(
                f"{self.folder} holds no mel of any recording, such as {example}: name them after"
                f" the recordings ({', '.join(MEL_SUFFIXES)})"
            )
        frames, owners = recordings.frames.copy(), dict[Path, int]()
        paired = [row for row in rows if paths[row] is not None]
        judged: set[int] = set()
        statistics = None
        if isinstance(self.config, MelConfig):
            judged = set(paired[:: -(-len(paired) // _JUDGED)])
            statistics = _statistics(recordings, sorted(judged), self.config)
        verdicts: list[tuple[Path, MelVerdict]] = []
        shown = progress(paired, len(paired), "reading mels") if progress else paired
        for row in shown:
            path = paths[row]
            assert path is not None
            first = owners.setdefault(path, row)
            if recordings.key[first] != recordings.key[row]:
                raise WavearError(
                    f"{recordings.name(first)} and {recordings.name(row)} would share the mel"
                    f" {path}: put mels into the sub-folders of their recordings"
                )
            mel, own = load_mel(path, self.config)
            if isinstance(self.config, MelConfig):
                expected = Expectation(self.config, statistics)
                try:
                    adapt_mel(mel, expected, own or self.config, warn=lambda _: None)
                except WavearError as error:
                    raise WavearError(f"{path}: {error}") from None
                if row in judged and own is None:
                    verdicts.append((path, judge_mel(mel, expected)))
            frames[row] = self._common(recordings, row, mel.shape[1], path)
        _report(verdicts)
        with_mels = dataclasses.replace(recordings, frames=frames, mels=folder).take(paired)
        missing = [recordings.name(row) for row in rows if paths[row] is None]
        return self.on_frames(with_mels), missing

    def on_frames(self, recordings: Recordings) -> Recordings:
        """Return stretches that begin where a frame begins; samples before are left out."""
        hop = self.config.hop_length
        start = -(-recordings.start // hop) * hop
        frames = recordings.frames - (start - recordings.start)
        moved = dataclasses.replace(recordings, start=start, frames=frames)
        return moved.take(frames >= hop)

    @property
    def _flag(self) -> str:
        return "--mel-hop-length" if isinstance(self.config, MelConfig) else "--feature-hop"

    def _common(self, recordings: Recordings, row: int, found: int, path: Path) -> int:
        """Return the samples of a row that its mel covers; refuse a mel of another length."""
        hop, start = self.config.hop_length, int(recordings.start[row])
        stop = start + int(recordings.frames[row])
        to_the_end = recordings.span is None or np.isnan(recordings.span[row, 1])
        missing = stop // hop - found
        if missing > _TOLERANCE or (to_the_end and missing < -_TOLERANCE):
            raise WavearError(
                f"{path} has {counted(found, 'frame')}, and {recordings.name(row)} {stop} samples"
                f" at {self.config.sample_rate} Hz, {stop // hop} frames of {hop}: make the frames"
                f" of this very recording, and set the model's hop to theirs ({self._flag})"
            )
        return min(stop, found * hop) - start if missing > 0 else stop - start


def folder_features(folder: str | Path, sample_rate: int, hop: int, classes: int) -> FeatureConfig:
    """Return the settings of the features in a folder; the first file by name has the channels.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    WavearError
        If it holds no features, or the first file is damaged or of another type.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of features")
    found = (p for p in Path(folder).rglob("*") if p.suffix in MEL_SUFFIXES and p.is_file())
    if (first := min(found, default=None)) is None:
        raise WavearError(f"{folder} holds no features ({', '.join(MEL_SUFFIXES)})")
    return features_in(first, sample_rate, hop, classes)


def _statistics(recordings: Recordings, rows: list[int], config: MelConfig) -> Any:
    """Return mean and deviation of each band over some recordings, which mels of files resemble."""
    mels = []
    for row in rows:
        samples = min(int(recordings.frames[row]), _JUDGED_SECONDS * config.sample_rate)
        source, start = recordings.source(row), int(recordings.start[row])
        try:
            waveform = audio.read(source, config.sample_rate, start, samples)
        except (ValueError, OSError):
            continue  # reported when a crop of it is drawn
        mels.append(log_mel(waveform[None], config)[0])
    if not mels:
        return None
    joined = torch.cat(mels, dim=1)
    return SimpleNamespace(mel_mean=joined.mean(1), mel_deviation=joined.std(1).clamp(min=0.1))


def _report(verdicts: list[tuple[Path, MelVerdict]]) -> None:
    """Refuse mels most of which are wrong; log how many are doubtful."""
    odd = [(path, each) for path, each in verdicts if each.verdict != "fits"]
    wrong = [(path, each) for path, each in odd if each.verdict == "wrong"]
    for path, each in wrong or odd[:1]:
        reason = each.reason.partition(": pass --mel-preset")[0]
        text = f"{len(wrong or odd)} of {counted(len(verdicts), 'mel')} judged; {path}: {reason}"
        if 2 * len(wrong) > len(verdicts):
            raise WavearError(
                f"{text}. Set the model's mels to those of the files (--mel-preset, --mel-...), or"
                " write the files again as .npz with their config (docs/mels.md)."
            )
        logger.warning(text)
        break


def _frames(path: Path, config: Frames, numbers: np.ndarray) -> np.ndarray:
    """Return some frames of a file's mel, (M, n)."""
    file, _ = kaldi.split_entry(path) or (path, 0)
    about = file.stat()
    mel = _whole(path, config, (about.st_size, about.st_mtime_ns))
    if len(numbers) and int(numbers.max()) >= mel.shape[1]:
        raise WavearError(f"{path} has {mel.shape[1]} frames, fewer than when the run began")
    return mel[:, numbers]


@functools.lru_cache(maxsize=2)  # crops of held-out recordings come in order
def _whole(path: Path, config: Frames, version: tuple[int, int]) -> np.ndarray:
    mel, own = load_mel(path, config)
    if isinstance(config, FeatureConfig):
        return mel.numpy()
    return adapt_mel(mel, Expectation(config), own or config, warn=lambda _: None).numpy()
