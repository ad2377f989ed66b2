"""Free-running probes: the model makes a little audio by itself while it trains, which is heard, seen and measured.

Held-out bits are of a model that is told the true past. What it makes of its own can be noise all
the same: in a pause, say, where a code off by one is off by much. So a probe has two parts of a
held-out recording, the loudest and the quietest, made side by side by the fast engine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wavear.data.corpus import Recording
from wavear.data.crops import read_span
from wavear.evaluation.metrics import NotMeasured, stft_distance
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of

_SEARCHED_SECONDS = 60  # of the recording
_QUIET_SECONDS = 0.25  # of the quiet part: pauses of speech are short
_LEAST_DB = -120.0  # of full scale: what digital silence is said to have


@dataclass(frozen=True)
class Probe:
    """What was made of a held-out recording."""

    original: torch.Tensor
    """(T,), the loudest part."""
    generated: torch.Tensor
    """(T,), what the model made of its mel; of a model without mels, what it made by itself."""
    measures: dict[str, float]
    """`level_error`: level of the loud part over the recording's, dB. `stft_distance`: of the loud part from the
    recording's. `noise_floor` and `noise_floor_recorded`: level of the quiet part, dB of full
    scale. Of a model without mels the first alone."""


@torch.no_grad()
def probe(
    model: AutoregressiveModel,
    recording: Recording,
    seconds: float,
    speakers: Sequence[str],
    engine: str = "auto",
) -> Probe:
    """Let `model` make the loudest `seconds` of a recording, and its quietest quarter of a second, from their mels."""
    from wavear.generation.sampler import generate

    layout, rate = layout_of(model, 1), model.config.sample_rate
    whole = read_span(recording, rate, 0, min(layout.length(recording), _SEARCHED_SECONDS * rate))
    loud = stretch(whole, seconds * rate, layout.hop, loudest=True)
    quiet = stretch(whole, min(seconds, _QUIET_SECONDS) * rate, layout.hop, loudest=False)
    speaker = list(speakers).index(recording.speaker or "") if model.config.speakers else None
    if layout.mel is None:
        made = generate(model, samples=loud.size, speaker=speaker, seed=0, engine=engine)[0]
        return Probe(
            torch.from_numpy(loud), made, {"level_error": _level(made.numpy()) - _level(loud)}
        )
    mels = [log_mel(torch.from_numpy(part)[None], layout.mel)[0] for part in (loud, quiet)]
    both = generate(model, mels, speaker=speaker, seed=0, engine=engine)
    made, pause = both[0, : loud.size], both[1, : quiet.size]
    measures = {"level_error": _level(made.numpy()) - _level(loud)}
    with contextlib.suppress(NotMeasured):  # too short, or silent
        measures["stft_distance"] = stft_distance(loud, made.numpy())
    measures |= {"noise_floor": _level(pause.numpy()), "noise_floor_recorded": _level(quiet)}
    return Probe(torch.from_numpy(loud), made, measures)


def stretch(whole: np.ndarray, samples: float, hop: int, loudest: bool) -> np.ndarray:
    """Return so many samples, whole frames of them, where the energy is greatest or least."""
    length = min(math.ceil(samples / hop) * hop, whole.size)
    energy = np.concatenate([[0.0], np.cumsum(np.square(whole, dtype=np.float64))])
    found = energy[length:] - energy[: energy.size - length]
    start = int(np.argmax(found) if loudest else np.argmin(found))
    return whole[start : start + length]


def _level(waveform: np.ndarray) -> float:
    """RMS about the mean, in dB of full scale, at least -120."""
    return max(10 * math.log10(max(float(np.var(waveform, dtype=np.float64)), 1e-30)), _LEAST_DB)


def spectrogram(waveform: torch.Tensor, rate: int) -> np.ndarray:
    """Log-mel picture of a waveform (T,), (height, width, 3) uint8, low frequencies at the bottom, 80 dB deep."""
    import matplotlib

    n_fft = 2 ** round(math.log2(rate / 22050 * 1024))
    hop = n_fft // 8
    if waveform.numel() < hop:
        waveform = torch.nn.functional.pad(waveform, (0, hop - waveform.numel()))
    config = MelConfig(
        sample_rate=rate,
        n_fft=n_fft,
        window_length=n_fft,
        hop_length=hop,
        bands=min(80, n_fft // 8),
        fmax=None,
    )
    decibels = log_mel(waveform[None], config)[0].flip(0).numpy() * (20 / math.log(10))
    shade = np.clip((decibels - decibels.max()) / 80 + 1, 0, 1)
    picture = (matplotlib.colormaps["magma"](shade)[..., :3] * 255).astype(np.uint8)
    return picture.repeat(2, axis=0).repeat(2, axis=1)
