"""Recordings with their speakers, and crops of them."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear import MelConfig, WavearError, audio, log_mel

HELD_OUT = 10  # of a folder, every tenth clip of a speaker, the first among them


@dataclass(frozen=True)
class Recording:
    """A file, its speaker, and whether it is held out."""

    path: Path
    speaker: str
    held_out: bool


def listed(data: str) -> list[Recording]:
    """Return the recordings of a manifest (path, speaker, split), or of a folder per speaker."""
    source = Path(data)
    if source.is_dir():
        found = []
        for folder in sorted(path for path in source.iterdir() if path.is_dir()):
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in audio.SUFFIXES)
            found += [Recording(p, folder.name, i % HELD_OUT == 0) for i, p in enumerate(files)]
    else:
        with open(source, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and not {"path", "speaker", "split"} <= set(rows[0]):
            raise WavearError(f"{data}: expected a CSV table with the columns path, speaker, split")
        found = [
            Recording(source.parent / row["path"], row["speaker"], row["split"] != "train")
            for row in rows
        ]
    if all(each.held_out for each in found):
        raise WavearError(
            f"{data}: nothing to train on. Expected a folder with a sub-folder per speaker, or a"
            " table with path, speaker and split (train or validation)"
        )
    stems = Counter(each.path.stem for each in found)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise WavearError(f"{data}: two recordings are named {twice[0]}: rename one")
    return found


@dataclass(frozen=True)
class Clip:
    """A recording in memory."""

    recording: Recording
    waveform: np.ndarray
    """(F * hop,), int16."""
    mel: np.ndarray
    """(M, F), float16."""
    mean: Tensor
    """(M,): over the frames."""

    @property
    def frames(self) -> int:
        """Mel frames."""
        return self.mel.shape[1]


def read_mel(path: Path, config: MelConfig) -> tuple[Tensor, Tensor]:
    """Return the waveform (F * hop,) of a file, without the last part of a frame, and its mel."""
    waveform = audio.read(path, config.sample_rate).clamp(-1, 1)
    if len(waveform) < 2 * config.n_fft:
        raise WavearError(f"{path} has {len(waveform)} samples: at least {2 * config.n_fft} needed")
    waveform = waveform[: len(waveform) // config.hop_length * config.hop_length]
    return waveform, log_mel(waveform[None], config)[0]


def read(
    recordings: list[Recording], config: MelConfig, seconds: float = math.inf
) -> Iterator[Clip]:
    """Yield the clips of recordings, of each speaker until `seconds` are reached."""
    so_far: Counter[str] = Counter()
    for each in recordings:
        if so_far[each.speaker] >= seconds * config.sample_rate:
            continue
        waveform, mel = read_mel(each.path, config)
        so_far[each.speaker] += len(waveform)
        whole = (waveform * 32767).round().to(torch.int16).numpy()
        yield Clip(each, whole, mel.half().numpy(), mel.mean(1))


class Crops:
    """Random crops of clips: speakers by the root of their time, places evenly.

    Parameters
    ----------
    clips : list of Clip
        Those shorter than a crop are left out.
    speakers : tuple of str
    frames : int
        Of a crop.
    """

    def __init__(self, clips: list[Clip], speakers: tuple[str, ...], frames: int, seed: int):
        self.clips = [clip for clip in clips if clip.frames >= frames]
        if not self.clips:
            raise WavearError(f"no recording to train on has {frames} frames: give longer ones")
        self.speakers, self.frames = speakers, frames
        self.generator = np.random.default_rng(seed)
        time: Counter[str] = Counter()
        for clip in self.clips:
            time[clip.recording.speaker] += clip.frames
        weight = [c.frames / math.sqrt(time[c.recording.speaker]) for c in self.clips]
        self.chance = np.array(weight) / sum(weight)

    def draw(self, count: int) -> dict[str, Any]:
        """Return mel (B, M, F), mean (B, M), speaker (B,), waveform (B, F * hop) of crops."""
        chosen = self.generator.choice(len(self.clips), count, p=self.chance)
        mels, waveforms = [], []
        for clip in (self.clips[i] for i in chosen):
            hop = len(clip.waveform) // clip.frames
            first = int(self.generator.integers(clip.frames - self.frames + 1))
            last = first + self.frames
            mels.append(torch.from_numpy(clip.mel[:, first:last].astype(np.float32)))
            part = clip.waveform[first * hop : last * hop].astype(np.float32) / 32767
            waveforms.append(torch.from_numpy(part))
        names = [self.clips[i].recording.speaker for i in chosen]
        return {
            "mel": torch.stack(mels),
            "mean": torch.stack([self.clips[i].mean for i in chosen]),
            "speaker": torch.tensor([self.speakers.index(name) for name in names]),
            "waveform": torch.stack(waveforms),
        }
