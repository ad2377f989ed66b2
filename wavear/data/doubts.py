"""Doubts about recordings that can be read: each kind of fault is one line with its numbers.

Clipping, low rates and resampling by wavear concern all recordings. The others are measured on up
to 32 recordings, 10 s of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wavear import audio
from wavear.data.recordings import Recordings

_EXAMINED, _SECONDS = 32, 10.0  # recordings, and seconds of each
_SILENT = 1e-3  # peak, of full scale: -60 dB
_OFFSET = 0.01  # mean, of full scale: -40 dB
_CANCELLED = 0.1  # RMS of the mean of the channels over that of the channels: -20 dB
_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000)  # Hz, from which audio is upsampled
_CLIFF = 30.0  # dB between the bands just below and just above half of such a rate
_SHARE = 0.25  # of the examined recordings from which on they count as upsampled
_FFT = 1024


def doubts(recordings: Recordings, sample_rate: int) -> list[str]:
    """Return warnings about recordings, as `prepare` opens them, for a model's sample rate."""
    return [*_of_headers(recordings, sample_rate), *_of_samples(recordings, sample_rate)]


def _of_headers(recordings: Recordings, sample_rate: int) -> list[str]:
    found, count = [], len(recordings)
    beyond = np.zeros(count) if recordings.beyond is None else recordings.beyond
    if recordings.gain is None and (beyond > 0).any():
        worst = int(np.argmax(beyond))
        found.append(
            f"{(beyond > 0).sum()} of {count} recordings exceed full scale and are clipped, in up"
            f" to {max(beyond[worst], 1e-4):.2%} of the samples ({recordings.name(worst)}): scale"
            " them, or pass --normalize peak"
        )
    if (lower := recordings.rate < sample_rate).any():
        least = int(recordings.rate[lower].min())
        found.append(
            f"{lower.sum()} of {count} recordings have a lower rate than the model's {sample_rate}"
            f" Hz, down to {least} Hz: above {least // 2} Hz they are empty. Leave them out, or"
            f" train with --sample-rate {least}"
        )
    return found


@dataclass(frozen=True)
class _Measured:
    peak: float
    offset: float
    """Largest mean of a channel."""
    cancelled: float
    """RMS of the mono mix over that of the channels."""
    upsampled_from: int
    """Rate above whose half the spectrum is empty, Hz; 0 if there is none."""


def _of_samples(recordings: Recordings, sample_rate: int) -> list[str]:
    rows = np.unique(np.linspace(0, len(recordings) - 1, _EXAMINED).astype(int)).tolist()
    measured: dict[int, _Measured] = {}
    for row in rows:
        recording = recordings[row]
        own = recording.sample_rate
        first = recording.start * own // sample_rate
        frames = min(recording.frames * own // sample_rate, round(_SECONDS * own))
        try:
            samples = audio.read_channels(recording.path, first, max(frames, 1))
        except (ValueError, OSError):  # training reports it where it reads it
            continue
        measured[row] = _measure(samples, own, sample_rate)
    total, found = len(measured), []
    silent = [m for m in measured.values() if m.peak < _SILENT]
    if silent and 2 * len(silent) > total:
        found.append(
            f"{len(silent)} of {total} examined recordings are silent (peaks up to"
            f" {_decibels(max(m.peak for m in silent))})"
        )

    def some(rows: list[int], text: str) -> None:
        if rows:
            name = recordings.name(rows[0])
            found.append(f"{len(rows)} of {total} examined recordings {text} (such as {name})")

    offset = [row for row, m in measured.items() if m.offset > _OFFSET]
    largest = max((measured[row].offset for row in offset), default=0.0)
    some(offset, f"have a DC offset of up to {largest:.3f} of full scale")
    lost = [row for row, m in measured.items() if m.cancelled < _CANCELLED]
    least = min((measured[row].cancelled for row in lost), default=1.0)
    text = f"have stereo in antiphase: the mono mix is at {_decibels(least)} of the channels' level"
    some(lost, text)
    upsampled = [row for row, m in measured.items() if m.upsampled_from]
    upsampled = upsampled if len(upsampled) >= _SHARE * total else []  # a few tones have a cliff
    rates = sorted({measured[row].upsampled_from for row in upsampled})
    edges, text = (", ".join(f"{rate / factor:g}" for rate in rates) for factor in (2, 1))
    some(upsampled, f"are empty above {edges} Hz, as if upsampled from {text} Hz")
    return found


def _measure(samples: np.ndarray, own: int, sample_rate: int) -> _Measured:
    """Measure samples (T, C) at the rate `own`."""
    wide = samples.astype(np.float64)
    level, mono = np.sqrt(np.square(wide).mean()), wide.mean(1)
    silent = level < _SILENT / 10
    return _Measured(
        float(np.abs(samples).max()),
        float(np.abs(wide.mean(0)).max()),
        1.0 if silent else float(np.sqrt(np.square(mono).mean()) / level),
        0 if silent else _upsampled_from(mono, own, sample_rate),
    )


def _upsampled_from(mono: np.ndarray, own: int, sample_rate: int) -> int:
    """Return the rate at whose half the spectrum ends in a cliff, below the model's rate; or 0."""
    count = len(mono) // _FFT
    if count < 4:
        return 0
    blocks = mono[: count * _FFT].reshape(count, _FFT) * np.hanning(_FFT)
    power = np.square(np.abs(np.fft.rfft(blocks))).mean(0) + 1e-20

    def level(low: float, high: float) -> float:
        band = power[round(low / own * _FFT) : round(high / own * _FFT) + 1]
        return 10 * float(np.log10(band.mean()))

    for rate in _RATES:
        edge = rate / 2
        if rate > 0.8 * min(own, sample_rate):
            break
        below, above = level(0.9 * edge, 0.97 * edge), level(1.03 * edge, 1.1 * edge)
        rest = level(1.03 * edge, own / 2)
        if below - max(above, rest) > _CLIFF:
            return rate
    return 0


def _decibels(level: float) -> str:
    return f"{20 * np.log10(level):.0f} dB" if level > 0 else "minus infinity dB"
