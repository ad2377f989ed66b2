"""Free-running synthesis of held-out clips, to hear, to measure, and to select the best model.

Held-out bits are conditioned on the true past. A model can have fewer bits and still sound worse
when it hears only itself: in a pause, for example, a code that is off by one matters. So every
validation synthesizes the loudest stretches of a few held-out recordings, and the quietest of the
first.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavear.data.corpus import Recording
from wavear.data.crops import Layout, file_mel, read_span
from wavear.evaluation.metrics import HNR_BANDS, NotMeasured, measure, stft_distance
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of

_Clip = tuple[np.ndarray, torch.Tensor]  # waveform and mel, which is empty for models without
CLIPS = 4
HNR_WEIGHT = 0.02
"""Nats of log-mel distance per dB of missing or surplus harmonicity."""
_SEARCHED_SECONDS = 60  # of each recording
_QUIET_SECONDS = 0.25  # of the quiet stretch: pauses of speech are short
_LEAST_DB = -120.0  # of full scale: the level of digital silence
_MEASURES = ("log_mel", "period_error", "gross_period_error", *HNR_BANDS, "pesq", "stoi")


@dataclass(frozen=True)
class FreeRun:
    """Clips that a model has synthesized, and their measures."""

    measures: dict[str, float]
    """Means over the clips of the measures that all of them have; `hnr_..._recorded` are those of
    the recordings. Empty for a model without mels."""
    clips: list[tuple[np.ndarray, np.ndarray]]
    """Recorded and generated waveforms, (T,) each."""
    probe: dict[str, float]
    """Measures of the first clip: `level_error`, its level over the recording's in dB, and
    `stft_distance`. Of the quiet stretch: `noise_floor` and `noise_floor_recorded`, levels in dB
    of full scale. A model without mels has only the first."""

    @property
    def score(self) -> float | None:
        """Return the log-mel distance plus 0.02 per dB of the mean difference in harmonicity.

        None for a model of features: they leave most of the sound open, so the best model need not
        come near the recording.
        """
        return self.measures.get("score")


@torch.no_grad()
def free_run(
    model: AutoregressiveModel,
    recordings: Sequence[Recording],
    seconds: float,
    speakers: Sequence[str] = (),
) -> FreeRun | None:
    """Synthesize the loudest `seconds` of the first four readable recordings, and measure them.

    A model without mels generates one clip freely. Returns None if no recording can be read.
    """
    from wavear.generation.sampler import generate

    layout, rate = layout_of(model, 1), model.config.sample_rate
    louds: list[_Clip] = []
    numbers: list[int] = []
    quiet: list[_Clip] = []
    for recording in recordings:
        length = min(layout.length(recording), _SEARCHED_SECONDS * rate)
        try:
            whole = read_span(recording, rate, 0, length)
            loud = _stretch(recording, whole, seconds * rate, layout, loudest=True)
            if not louds:
                quiet_length = min(seconds, _QUIET_SECONDS) * rate
                quiet = [_stretch(recording, whole, quiet_length, layout, loudest=False)]
        except (ValueError, OSError, MemoryError):
            continue  # the held-out bits report it
        louds.append(loud)
        numbers.append(
            list(speakers).index(recording.speaker or "") if model.config.speakers else 0
        )
        if len(louds) == (CLIPS if layout.mel else 1):
            break
    if not louds:
        return None
    speaker = [*numbers, numbers[0]] if model.config.speakers else None
    if layout.mel is None:
        first = speaker and speaker[0]
        made = generate(model, samples=louds[0][0].size, speaker=first, seed=0)
    else:
        made = generate(model, [mel for _, mel in (*louds, *quiet)], speaker=speaker, seed=0)
    clips = [(x, y[: x.size].numpy()) for (x, _), y in zip(louds, made, strict=False)]
    probe = {"level_error": _level(clips[0][1]) - _level(clips[0][0])}
    if layout.mel is None:
        return FreeRun({}, clips, probe)
    with contextlib.suppress(NotMeasured):  # too short, or silent
        probe["stft_distance"] = stft_distance(*clips[0])
    ((silence, _),) = quiet
    probe["noise_floor"] = _level(made[-1, : silence.size].numpy())
    probe["noise_floor_recorded"] = _level(silence)
    return FreeRun(_measures(clips, rate, isinstance(layout.mel, MelConfig)), clips, probe)


def _measures(
    clips: list[tuple[np.ndarray, np.ndarray]], rate: int, scored: bool
) -> dict[str, float]:
    rows = []
    for recorded, generated in clips:
        values, _ = measure(recorded, generated, rate, names=_MEASURES)
        own, _ = measure(recorded, recorded, rate, names=HNR_BANDS)
        rows.append(values | {f"{name}_recorded": value for name, value in own.items()})
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    means = {name: statistics.fmean(row[name] for row in rows) for name in shared}
    gaps = [
        abs(row[name] - row[f"{name}_recorded"])
        for row in rows
        for name in HNR_BANDS
        if {name, f"{name}_recorded"} <= row.keys()
    ]
    if scored and "log_mel" in means:
        gap = statistics.fmean(gaps) if gaps else 0.0
        means["score"] = means["log_mel"] + HNR_WEIGHT * gap
    return means


def _stretch(
    recording: Recording, whole: np.ndarray, samples: float, layout: Layout, loudest: bool
) -> _Clip:
    """Return the stretch of `samples`, in whole frames, with most or least energy, and its mel."""
    hop = layout.hop
    length = min(math.ceil(samples / hop) * hop, whole.size)
    energy = np.concatenate([[0.0], np.cumsum(np.square(whole, dtype=np.float64))])
    step = 1 if recording.mel is None else hop  # the frames of a file lie where they lie
    found = (energy[length:] - energy[: energy.size - length])[::step]
    start = int(np.argmax(found) if loudest else np.argmin(found)) * step
    clip = whole[start : start + length]
    if layout.mel is None:
        return clip, torch.zeros(0)
    mel = file_mel(recording, layout, start // hop, (start + length) // hop)
    if mel is None:
        assert isinstance(layout.mel, MelConfig)  # features are always from files
        return clip, log_mel(torch.from_numpy(clip)[None], layout.mel)[0]
    return clip, torch.from_numpy(mel)


def _level(waveform: np.ndarray) -> float:
    """Return the RMS around the mean, in dB of full scale, at least -120."""
    return max(10 * math.log10(max(float(np.var(waveform, dtype=np.float64)), 1e-30)), _LEAST_DB)
