"""Detection of defects in generated audio: the ways in which autoregressive models fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from wavear.audio.waveforms import as_tensor, check_rate
from wavear.common.errors import WavearError
from wavear.mel.conversion import per_neper
from wavear.mel.spectrogram import MelConfig, check_config, log_mel

Kind = Literal["silence", "constant", "loop", "noise", "clipping", "quieter", "louder"]

_FRAME_SECONDS = 0.02
_SILENT = 1e-3  # full scale: -60 dB; the steps of 256 mu-law codes around silence are 1.7e-4
_OFFSET = 0.01  # a constant further from zero than this is not silence
_EXTREME = 0.999  # the first and the last code; the next of 256 decodes to 0.957
_LOUD_NOISE = 0.05  # root mean square, -26 dB
_WHITE = 0.4  # spectral flatness: 0.56 of white noise, below 0.3 of fricatives and cymbals
_APART = 2.5  # nepers between the loudness of the mel given and that of the audio: 22 dB

_ADVICE: dict[Kind, str] = {
    "silence": "try another seed, a temperature nearer to 1, no --argmax, a larger --top-p; or"
    " train on less silence",
    "constant": "try another seed, a temperature nearer to 1, no --argmax; or train longer",
    "loop": "try a temperature nearer to 1, no --argmax, a larger --top-k or --top-p",
    "noise": "try another seed, --temperature 0.8 or --top-p 0.95; or train longer, with"
    " --input-noise",
    "clipping": "try a lower temperature, --top-p 0.95, or train with --normalize peak",
    "quieter": "check that the mel is the one the model expects (--mel-preset); try another seed,"
    " no --argmax",
    "louder": "check that the mel is the one the model expects (--mel-preset); try"
    " --temperature 0.8",
}


@dataclass(frozen=True)
class Finding:
    """A defect of a waveform."""

    kind: Kind
    start: float
    """Seconds."""
    stop: float
    """Seconds."""
    what: str
    """A description."""

    @property
    def advice(self) -> str:
        """The remedies to try."""
        return _ADVICE[self.kind]

    def __str__(self) -> str:
        return f"{self.what} from {self.start:.2f} to {self.stop:.2f} s: {self.advice}"


def watch(
    waveform: torch.Tensor | np.ndarray,
    sample_rate: int,
    *,
    mel: torch.Tensor | np.ndarray | None = None,
    config: MelConfig | None = None,
) -> list[Finding]:
    """Return the defects of generated audio that its samples show.

    - "silence": below -60 dB for 1 s to the end, or for 3 s anywhere (not with a mel);
    - "constant": no movement, away from zero, for 0.25 s;
    - "loop": the last second or more repeats itself exactly;
    - "noise": white and loud for 0.5 s;
    - "clipping": more than one sample in 2000 at the end of the scale;
    - "quieter", "louder": for 0.25 s, 22 dB away from the mel that it was made from.

    Parameters
    ----------
    waveform : Tensor or array, shape (T,), in [-1, 1]
    sample_rate : int
        Hz.
    mel : Tensor or array, shape (M, F), optional
        The mel that the audio was made from.
    config : MelConfig, optional
        Of `mel`.

    Returns
    -------
    list of Finding
        In the order of time: the longest of each kind, and one for all clipping.

    Raises
    ------
    WavearError
        If an argument has another shape or type, or holds NaN or infinity.

    Examples
    --------
    >>> [finding.kind for finding in watch(torch.zeros(22050), 22050)]
    ['silence']
    """
    x = as_tensor(waveform, "waveform").cpu().double().numpy()
    if x.ndim != 1 or not x.size:
        raise WavearError(f"waveform has shape {x.shape}, expected (T,) with T of 1 or more")
    if not np.isfinite(x).all():
        raise WavearError("waveform holds NaN or infinity")
    sample_rate = check_rate(sample_rate)
    if mel is not None and config is not None:
        check_config(config, "config")
        mel = as_tensor(mel, "mel")
        if mel.ndim != 2 or mel.shape[0] != config.bands:
            raise WavearError(f"mel has shape {tuple(mel.shape)}, expected ({config.bands}, F)")
    found = [
        *_standstill(x, sample_rate, mel is not None),
        *_noise(x, sample_rate),
        *_clipping(x, sample_rate),
    ]
    if mel is not None and config is not None:
        found += _against_mel(x, torch.as_tensor(mel), config)
    if not any(finding.kind in ("silence", "constant") for finding in found):
        found += _loop(x, sample_rate)
    return sorted(found, key=lambda finding: finding.start)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return [first, last) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _longest(flags: np.ndarray, least: int) -> tuple[int, int] | None:
    runs = [run for run in _runs(flags) if run[1] - run[0] >= least]
    return max(runs, key=lambda run: run[1] - run[0], default=None)


def _standstill(x: np.ndarray, rate: int, told: bool) -> list[Finding]:
    """Find silence (unless a mel determines it) and constants."""
    size = max(int(rate * _FRAME_SECONDS), 1)
    count = len(x) // size
    if count == 0:
        return []
    frames = x[: count * size].reshape(count, size)
    still = np.ptp(frames, axis=1) < 2 * _SILENT
    level = np.abs(np.median(frames, axis=1))
    found = []
    seconds = size / rate
    silent = still & (level < _OFFSET)
    if not told:
        runs = [
            (a, b)
            for a, b in _runs(silent)
            if (b - a) * seconds >= 3 or (b == count and (b - a) * seconds >= 0.98)
        ]
        if runs:
            a, b = max(runs, key=lambda run: run[1] - run[0])
            found.append(Finding("silence", a * seconds, b * seconds, "silence"))
    if run := _longest(still & (level >= _OFFSET), math.ceil(0.25 / seconds)):
        a, b = run
        value = float(np.median(frames[a:b]))
        found.append(Finding("constant", a * seconds, b * seconds, f"a constant ({value:.2f})"))
    return found


def _noise(x: np.ndarray, rate: int) -> list[Finding]:
    size = 2 ** round(math.log2(max(rate * 0.04, 16)))
    count = len(x) // size
    if count == 0:
        return []
    frames = x[: count * size].reshape(count, size)
    rms = np.sqrt((frames**2).mean(axis=1))
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1))[:, 2:-2] ** 2 + 1e-12
    flatness = np.exp(np.log(power).mean(axis=1)) / power.mean(axis=1)
    run = _longest((rms > _LOUD_NOISE) & (flatness > _WHITE), math.ceil(0.5 * rate / size))
    if run is None:
        return []
    level = 20 * math.log10(float(np.sqrt((rms[run[0] : run[1]] ** 2).mean())))
    return [
        Finding(
            "noise", run[0] * size / rate, run[1] * size / rate, f"white noise ({level:.0f} dB)"
        )
    ]


def _clipping(x: np.ndarray, rate: int) -> list[Finding]:
    at = np.flatnonzero(np.abs(x) >= _EXTREME)
    if len(at) < max(10, len(x) / 2000):
        return []
    text = f"clipping, {len(at) / len(x):.2%} of the samples at the end of the scale,"
    return [Finding("clipping", float(at[0]) / rate, float(at[-1] + 1) / rate, text)]


def _loop(x: np.ndarray, rate: int) -> list[Finding]:
    """Find an end that repeats itself exactly, with a period of at most a quarter of a second."""
    if len(x) < rate:
        return []
    tail = x[-rate:]
    spectrum = np.fft.rfft(tail - tail.mean(), 2 * len(tail))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: rate // 4]
    if correlation[0] <= 0:
        return []
    # Exactly periodic: all but the samples that the shift leaves out correlate fully.
    expected = correlation[0] * (1 - np.arange(len(correlation)) / len(tail))
    for lag in np.flatnonzero(correlation[1:] > 0.98 * expected[1:])[:50] + 1:
        if np.array_equal(tail[lag:], tail[:-lag]):
            same = np.flatnonzero(x[lag:] != x[:-lag])
            first = int(same[-1]) + 1 if same.size else 0
            what = f"a loop of {1000 * lag / rate:.1f} ms, repeated exactly"
            return [Finding("loop", first / rate, len(x) / rate, what)]
    return []


def _against_mel(x: np.ndarray, mel: torch.Tensor, config: MelConfig) -> list[Finding]:
    frames = min(len(x) // config.hop_length, mel.shape[1])
    if frames == 0 or config.log_base == "none":
        return []
    unit = per_neper(config)

    def loudness(values: torch.Tensor) -> np.ndarray:
        """Return nepers per frame, all bands together: those near the floor hardly count."""
        return (
            0.5
            * torch.logsumexp(
                (values.double() - config.shift) / unit * (2 / config.power), dim=0
            ).numpy()
        )

    own = log_mel(torch.from_numpy(x)[None], config)[0, :, :frames]
    apart = loudness(own) - loudness(mel[:, :frames].cpu())
    seconds = config.hop_length / config.sample_rate
    least = math.ceil(0.25 / seconds)
    found = []
    directions: tuple[tuple[Kind, int], ...] = (("quieter", -1), ("louder", 1))
    for kind, sign in directions:
        if run := _longest(sign * apart > _APART, least):
            decibels = 20 / math.log(10) * abs(float(apart[run[0] : run[1]].mean()))
            text = f"{decibels:.0f} dB {kind} than the mel"
            found.append(Finding(kind, run[0] * seconds, run[1] * seconds, text))
    return found
