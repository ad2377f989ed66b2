"""Log-likelihood ratios over time: how much better one model predicts a stretch than another.

A model's likelihood falls with every noise and every rise of the level. Compared with that of
another model of the same samples, what remains is how well the sound is of the kind that the model
was trained on (Ren et al., 2019, https://arxiv.org/abs/1906.02845; with a compressor as the other
one, Serra et al., 2020, https://arxiv.org/abs/1909.11480).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.audio.grid import COMMON_GRIDS
from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError
from wavear.data.corpus import Treatment, find, prepare, reason
from wavear.data.recordings import Recording
from wavear.evaluation.bits import scored_blocks
from wavear.models.base import AutoregressiveModel

LINEAR = "linear"
_GRID = COMMON_GRIDS["linear"]
_COLUMNS = ("path", "start", "bits", "against", "ratio")


@dataclass(frozen=True)
class Window:
    """A stretch of a recording; all numbers in bits per 16-bit sample."""

    path: str
    start: float
    """Seconds."""
    bits: float
    """-log2 P under the model."""
    against: float
    """The same under the other model."""

    @property
    def ratio(self) -> float:
        """log2 of the ratio of their likelihoods: low where the sound is odd to the model."""
        return self.against - self.bits


@dataclass(frozen=True)
class Ratios:
    """The windows of all recordings, in their order, and those that cannot be used."""

    windows: list[Window]
    failed: list[tuple[str, str]]
    """Name and reason."""

    def of_recordings(self) -> list[Window]:
        """Return one window for each recording: its mean, from 0 s on."""
        parts: dict[str, list[Window]] = {}
        for window in self.windows:
            parts.setdefault(window.path, []).append(window)
        return [
            Window(path, 0.0, *np.mean([(w.bits, w.against) for w in own], axis=0).tolist())
            for path, own in parts.items()
        ]

    def write(self, path: str | Path) -> None:
        """Write all windows as a table, replacing an older one."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_COLUMNS)
        for w in self.windows:
            numbers = (w.bits, w.against, w.ratio)
            table.writerow((w.path, f"{w.start:.3f}", *(f"{n:.4f}" for n in numbers)))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))


def likelihood_ratios(
    model: AutoregressiveModel,
    data: str | Path,
    against: AutoregressiveModel | None = None,
    *,
    every: float = 0.1,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> Ratios:
    """Return the bits of recordings under two models, window by window.

    Parameters
    ----------
    model : AutoregressiveModel
        Without speakers; one with mels gets those of the recordings.
    data : str or Path
        Recordings, as `wavear.data.corpus.find` lists them.
    against : AutoregressiveModel, optional
        Another one of the same rate; None: linear prediction that adapts to each recording, as in
        `wavear compress`.
    every : float
        Seconds of a window; a shorter rest counts to the last one.
    progress : callable, optional

    Raises
    ------
    WavearError
        If the models do not fit each other, or `every` is out of range.
    """
    rate = model.config.sample_rate
    if not 1 <= every * rate < math.inf:
        raise WavearError(f"every is {every} s, expected a sample ({1 / rate:.2g} s) or more")
    for each in (model, against):
        if each is not None and each.config.speakers:
            raise WavearError("a model with speakers cannot score: the recordings name none")
    if against is not None and against.config.sample_rate != rate:
        raise WavearError(
            f"the models have rates of {rate} and {against.config.sample_rate} Hz: they must agree"
        )
    recordings, bad = prepare(find(data), Treatment(rate))
    found = Ratios([], list(bad))
    shown = recordings if progress is None else progress(recordings, len(recordings), "scoring")
    for recording in shown:
        try:
            rows = [_bits(each, model, recording) for each in (model, against)]
        except (ValueError, OSError, MemoryError) as error:
            found.failed.append((recording.name, reason(error, recording)))
            continue
        size = round(every * rate)
        starts = np.arange(max(len(rows[0]) // size, 1)) * size
        counts = np.diff([*starts, len(rows[0])])
        means = [np.add.reduceat(row, starts) / counts for row in rows]
        for start, bits, other in zip(starts, *means, strict=True):
            place = recording.start + int(start)
            found.windows.append(Window(recording.name, place / rate, float(bits), float(other)))
    return found


def _bits(
    model: AutoregressiveModel | None, other: AutoregressiveModel, recording: Recording
) -> np.ndarray:
    """Return -log2 P of every 16-bit sample."""
    if model is not None:
        blocks = scored_blocks(model, recording, None, grids=[_GRID])
        return np.concatenate([rows[0] for _, rows in blocks]) / math.log(2)
    return np.concatenate([*_adaptive(recording, other.config.sample_rate)]) / math.log(2)


def _adaptive(recording: Recording, rate: int) -> Iterator[np.ndarray]:
    """Yield -log P under adaptive linear prediction, block by block."""
    from wavear.data.crops import read_span
    from wavear.generation.cpu import coding
    from wavear.generation.cpu.adaptive import Adaptive

    engine, block = Adaptive(1), 30 * rate
    for start in range(0, recording.frames, block):
        waveform = read_span(recording, rate, start, min(start + block, recording.frames))
        codes = _GRID.encode(torch.from_numpy(waveform)).numpy()[None]
        room = np.zeros((1, coding.MOST_BYTES * codes.size + 16), np.uint8)
        yield -engine.code(codes, None, coding.new_coder()[None], room)[0]
