"""The free run of held-out clips, which chooses the best model of a run: bits with the true past do not.

A model that is told the true past can have fewer bits and sound worse when it hears only itself. So
at every validation it synthesizes the loudest stretches of a few held-out recordings from their
mels, in one batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavear.data.corpus import Recording
from wavear.data.crops import read_span
from wavear.evaluation.metrics import HNR_BANDS, measure
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of
from wavear.training.probes import stretch

CLIPS = 4
HNR_WEIGHT = 0.02
"""Nats of log-mel distance that a dB of missing or surplus harmonicity counts as."""
_SEARCHED_SECONDS = 60  # of each recording
_TAKEN = ("log_mel", "period_error", "gross_period_error", *HNR_BANDS, "pesq", "stoi")


@dataclass(frozen=True)
class FreeRun:
    """What a model made of held-out clips."""

    measures: dict[str, float]
    """Means over the clips of the measures that all of them have; `hnr_..._recorded` are those of the recordings, and
    `score` is what the best model has least of."""
    clips: list[tuple[np.ndarray, np.ndarray]]
    """Recorded and generated waveforms, (T,) each."""

    @property
    def score(self) -> float:
        """Log-mel distance, plus 0.02 for each dB of the mean difference of the harmonic-to-noise ratios."""
        return self.measures["score"]


@torch.no_grad()
def free_run(
    model: AutoregressiveModel,
    recordings: Sequence[Recording],
    seconds: float,
    speakers: Sequence[str] = (),
) -> FreeRun | None:
    """Synthesize the loudest `seconds` of the first recordings that can be read, and measure them.

    Parameters
    ----------
    model : AutoregressiveModel
        Conditioned on mels.
    recordings : sequence of Recording
    seconds : float
        Of each of up to `CLIPS` recordings.
    speakers : sequence of str
        Names in the order of their numbers.

    Returns
    -------
    FreeRun, or None if no recording can be read and measured
    """
    from wavear.generation.sampler import generate

    layout, rate = layout_of(model, 1), model.config.sample_rate
    originals: list[np.ndarray] = []
    numbers: list[int] = []
    for recording in recordings:
        try:
            whole = read_span(
                recording, rate, 0, min(layout.length(recording), round(_SEARCHED_SECONDS * rate))
            )
        except (ValueError, OSError):
            continue  # the held-out bits name it
        originals.append(stretch(whole, seconds * rate, layout.hop, loudest=True))
        numbers.append(
            list(speakers).index(recording.speaker or "") if model.config.speakers else 0
        )
        if len(originals) == CLIPS:
            break
    if not originals or layout.mel is None:
        return None
    mels = [log_mel(torch.from_numpy(x)[None], layout.mel)[0] for x in originals]
    made = generate(model, mels, speaker=numbers if model.config.speakers else None, seed=0)
    clips = [(x, y[: x.size].numpy()) for x, y in zip(originals, made, strict=True)]
    rows = []
    for x, y in clips:
        values, _ = measure(x, y, rate, names=_TAKEN)
        recorded, _ = measure(x, x, rate, names=HNR_BANDS)
        rows.append(values | {f"{name}_recorded": value for name, value in recorded.items()})
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    measures = {name: statistics.fmean(row[name] for row in rows) for name in shared}
    if "log_mel" not in measures:
        return None
    gaps = [
        abs(row[n] - row[f"{n}_recorded"])
        for row in rows
        for n in HNR_BANDS
        if {n, f"{n}_recorded"} <= row.keys()
    ]
    measures["score"] = measures["log_mel"] + HNR_WEIGHT * (statistics.fmean(gaps) if gaps else 0.0)
    return FreeRun(measures, clips)
