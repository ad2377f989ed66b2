"""Sounds to train on without a download: plucked strings and sung vowels, as sums of harmonics.

Both are physical models, so the pitch of every note is exact:

    string:  modes of a stiff string plucked at one point, each dying away at its own rate
    vowel:   a glottal source through the resonances (formants) of the mouth, with vibrato
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

# Frequencies of the first four formants, Hz: a tenor's, after Peterson and Barney (1952) and
# Sundberg (1987).
FORMANTS = {
    "a": (650, 1080, 2650, 2900),
    "e": (400, 1700, 2600, 3200),
    "i": (290, 1870, 2800, 3250),
    "o": (400, 800, 2600, 2800),
    "u": (350, 600, 2700, 2900),
}
_FORMANT_BANDWIDTHS = (80.0, 90.0, 120.0, 130.0)
# MIDI numbers of the notes of a C major chord.
SCALE = {"C4": 60, "E4": 64, "G4": 67}
KINDS = ("string", "a", "i", "o")
HELD_OUT = [
    ("string", "C4"),
    ("string", "E4"),
    ("string", "G4"),
    ("o", "C4"),
    ("a", "G4"),
    ("i", "E4"),
]
_TAKES = 3
_VIBRATO_CENTS = 10.0
BREATH = 0.05  # noise over sound, RMS: 26 dB below it
_LEAD_SECONDS = 0.03  # silence before a note


@dataclass(frozen=True)
class Note:
    """One note, its name and its pitch."""

    name: str
    """Instrument, pitch and vowel, fit for a file name."""
    instrument: str
    """"string" or "voice"."""
    frequency: float
    """Fundamental, Hz; of a voice, the mean of its vibrato."""
    waveform: np.ndarray
    """Shape (T,), float32 in [-1, 1]."""


def string(
    frequency: float,
    seconds: float,
    sample_rate: int,
    *,
    position: float = 0.2,
    brightness: float = 0.5,
) -> np.ndarray:
    """Return a plucked string, float32, peak 1.

    Mode k of a string plucked at a fraction p of its length (`position`) starts with amplitude
    sin(k pi p) / k**2; stiffness raises it to k f sqrt((1 + B k**2) / (1 + B)), so that mode 1 is
    at f; its decay time falls with its frequency (Fletcher and Rossing, The Physics of Musical
    Instruments, chapters 2 and 9). `brightness`, 0 to 1, is the share of the high modes that the
    plectrum excites, and their duration.

    Examples
    --------
    >>> string(220.0, seconds=0.5, sample_rate=16000).shape
    (8000,)
    """
    stiffness = 5e-5
    modes = np.arange(1, int(0.45 * sample_rate / frequency) + 1)
    frequencies = modes * frequency * np.sqrt((1 + stiffness * modes**2) / (1 + stiffness))
    modes, frequencies = (
        modes[frequencies < 0.45 * sample_rate],
        frequencies[frequencies < 0.45 * sample_rate],
    )
    amplitudes = np.sin(modes * np.pi * position) / modes ** (2.0 - brightness)
    decay_seconds = (
        0.7 * (220.0 / frequency) ** 0.5 / (1 + (frequencies / 1000.0) ** 1.5 * (1.5 - brightness))
    )
    time = np.arange(round(seconds * sample_rate)) / sample_rate - _LEAD_SECONDS
    rows = np.sin(2 * np.pi * frequencies[:, None] * time) * np.exp(-time / decay_seconds[:, None])
    return _finish(
        (amplitudes[:, None] * rows).sum(0), time, attack_seconds=0.002, release_seconds=0.05
    )


def voice(
    frequency: float,
    seconds: float,
    sample_rate: int,
    *,
    vowel: str = "a",
    mouth: float = 1.0,
    vibrato_cents: float = 25.0,
    vibrato_hz: float = 5.5,
) -> np.ndarray:
    """Return a sung vowel, float32, peak 1.

    The source falls by 12 dB an octave and the lips give 6 back; each formant of frequency F and
    bandwidth b is a resonance F**2 / (F**2 + i f b - f**2) (Fant, Acoustic Theory of Speech
    Production, 1960). Every harmonic follows the formants as the vibrato (cents up and down, Hz)
    moves it. A `mouth` above 1 raises the formants: it is smaller.

    Examples
    --------
    >>> voice(220.0, seconds=0.5, sample_rate=16000, vowel="i").shape
    (8000,)
    """
    time = np.arange(round(seconds * sample_rate)) / sample_rate - _LEAD_SECONDS
    fundamental = frequency * 2 ** (vibrato_cents / 1200 * np.sin(2 * np.pi * vibrato_hz * time))
    phase = 2 * np.pi * np.cumsum(fundamental) / sample_rate
    total = np.zeros_like(time)
    for harmonic in range(1, int(0.45 * sample_rate / fundamental.max()) + 1):
        f = harmonic * fundamental
        response = np.ones_like(f, dtype=complex) / harmonic
        for formant, bandwidth in zip(
            np.multiply(FORMANTS[vowel], mouth), _FORMANT_BANDWIDTHS, strict=True
        ):
            response *= formant**2 / (formant**2 + 1j * f * bandwidth - f**2)
        total += np.abs(response) * np.sin(harmonic * phase + np.angle(response))
    return _finish(total, time, attack_seconds=0.06, release_seconds=0.1)


def notes(seconds: float, sample_rate: int, *, seed: int = 0, held_out: bool = False) -> list[Note]:
    """Return the notes of `wavear demo`: a C major chord, by strings and sung on three vowels.

    Each is played three times, differently: plucked at another place and with another plectrum,
    sung by a larger or a smaller mouth, louder or softer. Held out is one more take of six of them.
    """
    draw = np.random.default_rng([seed, held_out])
    pairs = (
        HELD_OUT
        if held_out
        else [(kind, pitch) for kind in KINDS for pitch in SCALE for _ in range(_TAKES)]
    )
    made, counted = [], Counter()
    for kind, pitch in pairs:
        frequency = 440.0 * 2 ** ((SCALE[pitch] - 69) / 12)
        if kind == "string":
            colour = {"position": draw.uniform(0.12, 0.3), "brightness": draw.uniform(0.3, 0.6)}
            waveform = string(frequency, seconds, sample_rate, **colour)
        else:
            mouth, vibrato = draw.uniform(0.93, 1.07), draw.uniform(5.0, 6.0)
            waveform = voice(
                frequency,
                seconds,
                sample_rate,
                vowel=kind,
                mouth=mouth,
                vibrato_cents=_VIBRATO_CENTS,
                vibrato_hz=vibrato,
            )
        instrument = "string" if kind == "string" else "voice"
        counted[kind, pitch] += 1
        name = "-".join([instrument, *([] if kind == "string" else [kind]), pitch])
        name = name if held_out else f"{name}-{counted[kind, pitch]}"
        waveform = _with_breath(waveform, sample_rate, BREATH, draw)
        waveform *= np.float32(draw.uniform(0.4, 0.8) / np.abs(waveform).max())
        made.append(Note(name, instrument, frequency, waveform))
    return made


def _finish(
    waveform: np.ndarray, time: np.ndarray, attack_seconds: float, release_seconds: float
) -> np.ndarray:
    """Silence before time 0, smooth ends, peak 1."""
    attack = np.clip(time / attack_seconds, 0, 1)
    release = np.clip((time[-1] - time) / release_seconds, 0, 1)
    waveform = waveform * np.sin(np.pi / 2 * attack) ** 2 * np.sin(np.pi / 2 * release) ** 2
    return (waveform / np.abs(waveform).max()).astype(np.float32)


def _with_breath(
    waveform: np.ndarray, sample_rate: int, level: float, draw: np.random.Generator
) -> np.ndarray:
    """With white noise added, `level` times the RMS of the 20 ms around each sample.

    No recording is free of noise, and a model of noiseless sound never learns to see through its
    own: what it generates is noisy, as samples are drawn, and from there it would go astray.
    """
    window = np.ones(sample_rate // 50) / (sample_rate // 50)
    rms = np.sqrt(np.convolve(waveform.astype(np.float64) ** 2, window, mode="same").clip(min=0))
    return (waveform + level * rms * draw.standard_normal(len(waveform))).astype(np.float32)
