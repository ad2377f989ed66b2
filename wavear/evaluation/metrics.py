"""Measures of copy synthesis: distances of a waveform from the recording that it should equal.

Both waveforms are (T,), aligned, and of one sample rate in Hz; time is not warped. A measure that a
clip does not allow (too short, no voice in it, a package that is not installed) raises
`NotMeasured` with the reason. The definitions, with references, are in docs/evaluation.md.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from wavear import audio
from wavear.audio.periods import measure_period
from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig, log_mel

# (n_fft, hop, window) in samples: Yamamoto, Song and Kim, "Parallel WaveGAN" (2020), table 1, there
# at 24 kHz.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_LEAST_POWER = 1e-7  # of a bin before the logarithm, as in public implementations of that distance
CEPSTRUM_ORDER = 24
PITCH_RANGE = (65.0, 1000.0)  # Hz
SILENCE_DB = 40.0  # below the loudest frame of the recording
_LEAST_DB = -120.0  # of full scale: the level of digital silence
_FRAME_SECONDS = 0.02  # of a level
_PESQ_SECONDS = 30.0  # P.862 is for passages of some seconds, and the package's tables are as long
HNR_BANDS = {
    "hnr_low": (50.0, 1000.0),
    "hnr_middle": (1000.0, 3000.0),
    "hnr_high": (3000.0, 8000.0),
}  # Hz
VOICED = 0.75  # correlation one period apart above which a block counts as voiced
GROSS = 0.05  # a period that is off by more than this share counts as a gross error
_PERIOD_RANGE = (50.0, 550.0)  # Hz
_BLOCK_SECONDS, _WINDOW_SECONDS = 64 / 22050, 512 / 22050


class NotMeasured(WavearError):
    """The measure has no value for this clip; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Measure:
    """One column of the tables."""

    title: str
    unit: str
    better: str
    """"lower" or "higher"; "near" where the recording's own value is best."""
    decimals: int

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return self.title + (f", {self.unit}" if self.unit else "")


MEASURES = {
    "log_mel": Measure("Log-mel distance", "", "lower", 3),
    "stft_distance": Measure("STFT distance", "", "lower", 3),
    "mcd": Measure("Mel-cepstral distortion", "dB", "lower", 2),
    "f0_rmse": Measure("Log-F0 RMSE", "cents", "lower", 0),
    "voicing_error": Measure("Voicing error", "%", "lower", 1),
    "period_error": Measure("Period error, median", "cents", "lower", 1),
    "gross_period_error": Measure("Gross period errors", "%", "lower", 1),
    "hnr_low": Measure("Harmonic-to-noise ratio, 50-1000 Hz", "dB", "near", 1),
    "hnr_middle": Measure("Harmonic-to-noise ratio, 1-3 kHz", "dB", "near", 1),
    "hnr_high": Measure("Harmonic-to-noise ratio, 3-8 kHz", "dB", "near", 1),
    "pesq": Measure("PESQ", "MOS-LQO", "higher", 2),
    "stoi": Measure("STOI", "", "higher", 3),
    "noise_floor": Measure("Noise floor in silence", "dBFS", "near", 1),
}
NEAR = tuple(name for name, about in MEASURES.items() if about.better == "near")
"""Measures that a recording has itself; a signal should come near that value."""


def measure(
    reference: np.ndarray,
    signal: np.ndarray,
    rate: int,
    reference_pitch: np.ndarray | None = None,
    names: Collection[str] = tuple(MEASURES),
) -> tuple[dict[str, float], dict[str, str]]:
    """Take measures of `signal` against `reference`.

    Parameters
    ----------
    reference, signal : array, shape (T,), floating point in [-1, 1]
    rate : int
        Hz.
    reference_pitch : array, optional
        `pitch` of the reference, if it is known: it takes longer than the rest.
    names : collection of str
        Measures to take.

    Returns
    -------
    dict: values, by the keys of `MEASURES`
    dict: reasons, for those without a value
    """
    x, y = reference, signal
    pitches = functools.cache(lambda: pitch_error(x, y, rate, reference_pitch))
    periods = functools.cache(lambda: period_error(x, y, rate))

    def pitch_rmse() -> float:
        if math.isnan(pitches()[0]):
            raise NotMeasured("no frame is voiced in both")
        return pitches()[0]

    ways: dict[str, Callable[[], float]] = {
        "log_mel": lambda: log_mel_distance(x, y, rate),
        "stft_distance": lambda: stft_distance(x, y),
        "mcd": lambda: mel_cepstral_distortion(x, y, rate),
        "f0_rmse": pitch_rmse,
        "voicing_error": lambda: pitches()[1],
        "period_error": lambda: periods()[0],
        "gross_period_error": lambda: periods()[1],
        "pesq": lambda: pesq(x, y, rate),
        "stoi": lambda: stoi(x, y, rate),
        "noise_floor": lambda: noise_floor(x, y, rate),
    }
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            if name in HNR_BANDS:
                value = harmonic_to_noise_ratio(x, y, rate, HNR_BANDS[name])
            else:
                value = ways[name]()
            if not math.isfinite(value):
                raise NotMeasured(f"it is {value}")
            values[name] = value
        except NotMeasured as reason:
            missing[name] = str(reason)
    return values, missing


def stft_distance(reference: np.ndarray, signal: np.ndarray) -> float:
    """Return the multi-resolution STFT distance sc + mag, mean of three resolutions.

        sc = norm(|S| - |S'|) / norm(|S|)        mag = mean(abs(log |S| - log |S'|))

    with S of the recording, Frobenius norms, natural logarithms and Hann windows; powers are at
    least 1e-7.

    Examples
    --------
    >>> noise = np.random.default_rng(0).normal(size=4000)
    >>> stft_distance(noise, noise), round(stft_distance(noise, 2 * noise), 6)  # 1 + log(2)
    (0.0, 1.693147)
    """
    pair = _pair(reference, signal)
    _check_length(pair[0], max(n_fft for n_fft, _, _ in RESOLUTIONS) // 2 + 1)
    _check_sound(pair[0])
    total = 0.0
    for n_fft, hop, length in RESOLUTIONS:
        window = torch.hann_window(length, dtype=torch.float64)
        spectrum = torch.stft(
            torch.from_numpy(pair), n_fft, hop, length, window, return_complex=True
        )
        power = (spectrum.real.square() + spectrum.imag.square()).clamp(min=_LEAST_POWER)
        true, found = power.sqrt()
        convergence = torch.linalg.norm(true - found) / torch.linalg.norm(true)
        total += float(convergence + (true.log() - found.log()).abs().mean())
    return total / len(RESOLUTIONS)


def mel_cepstrum(waveform: np.ndarray, rate: int, order: int = CEPSTRUM_ORDER) -> np.ndarray:
    """Return the mel-cepstrum c of the log-mel L.

        L[m] = c[0] + sum over n of c[n] cos(pi n (m + 1/2) / M)

    L has M = 80 bands of magnitudes from 0 to 8 kHz (or half of the rate) on Slaney's scale, from
    Hann windows of 46 ms (1024 samples at 22.05 kHz) every quarter of that. The result has shape
    (order + 1, frames).
    """
    from scipy.fft import dct

    # With this norm, 1 / M sum x[m] cos(...) without the factor 2 of all coefficients but c[0].
    cepstrum = 2 * np.asarray(dct(_log_mel(waveform, rate), axis=0, norm="forward"))[: order + 1]
    cepstrum[0] /= 2
    return cepstrum


def mels_at(rate: int) -> MelConfig:
    """Return the mels that measures use at a rate in Hz: HiFi-GAN's at 22.05 kHz."""
    n_fft = 2 ** math.ceil(math.log2(0.046 * rate))
    return MelConfig(
        sample_rate=rate,
        n_fft=n_fft,
        window_length=n_fft,
        hop_length=n_fft // 4,
        bands=min(80, n_fft // 4),
        fmax=min(8000.0, rate / 2),
    )


def _log_mel(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Return natural-log mel magnitudes (bands, frames)."""
    config = mels_at(rate)
    _check_length(waveform, config.n_fft)
    return log_mel(torch.from_numpy(np.asarray(waveform, np.float64))[None], config)[0].numpy()


def log_mel_distance(reference: np.ndarray, signal: np.ndarray, rate: int) -> float:
    """Return the mean absolute difference of the log-mels, in nats, over bands and frames.

    The mel is that of `mel_cepstrum`; its magnitudes are at least 1e-5, and silence counts.
    """
    x, y = _pair(reference, signal)
    return float(np.abs(_log_mel(x, rate) - _log_mel(y, rate)).mean())


def mel_cepstral_distortion(
    reference: np.ndarray, signal: np.ndarray, rate: int, order: int = CEPSTRUM_ORDER
) -> float:
    """Return the mel-cepstral distortion in dB, the mean over frames of

        10 / ln(10) * sqrt(2 * sum over n = 1 .. order of (c[n] - c'[n])**2)

    with `mel_cepstrum` c: the RMS difference in dB of the two smoothed spectra, without their
    levels c[0]. All frames count, silence too.
    """
    x, y = _pair(reference, signal)
    difference = (mel_cepstrum(x, rate, order) - mel_cepstrum(y, rate, order))[1:]
    return float(10 / math.log(10) * np.sqrt(2 * np.square(difference).sum(0)).mean())


def _periods(waveform: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the period in samples of blocks of 2.9 ms, and the correlation at it."""
    low, high = _PERIOD_RANGE
    block, window = max(round(_BLOCK_SECONDS * rate), 1), round(_WINDOW_SECONDS * rate)
    lags, correlation = measure_period(
        waveform, max(round(rate / high), 2), round(rate / low), block, window
    )
    if not lags.size:
        raise NotMeasured(f"{waveform.size} samples are too short to have a period")
    return lags, correlation


def period_error(reference: np.ndarray, signal: np.ndarray, rate: int) -> tuple[float, float]:
    """Compare the periods of blocks of 2.9 ms that are voiced in both.

    Voiced: correlated by more than 0.75, one period apart.

    Returns
    -------
    float
        The median of the difference, in cents.
    float
        Per cent of the blocks whose period is off by more than 5 % (85 cents).
    """
    x, y = _pair(reference, signal)
    (true, voiced), (found, also) = _periods(x, rate), _periods(y, rate)
    both = (voiced > VOICED) & (also > VOICED)
    if not both.any():
        raise NotMeasured("no block is voiced in both")
    off = np.abs(np.log2(found[both] / true[both]))
    return float(1200 * np.median(off)), float(100 * (off > math.log2(1 + GROSS)).mean())


def harmonic_to_noise_ratio(
    reference: np.ndarray, signal: np.ndarray, rate: int, band: tuple[float, float]
) -> float:
    """Return the harmonic-to-noise ratio of a band of `signal`, in dB.

    It is the mean over the blocks voiced in `reference`. With c the largest normalised correlation
    of the band with itself one lag of 50 to 550 Hz before, the ratio of a block is
    10 log10(c / (1 - c)) (Boersma, 1993), c within 0.01 and 0.999.
    The band is cut out by a Butterworth filter of order 4.
    """
    from scipy.signal import butter, sosfilt

    x, y = _pair(reference, signal)
    low, high = band[0], min(band[1], 0.49 * rate)
    if high <= 1.2 * low:
        raise NotMeasured(f"the band from {low:g} Hz is beyond half of the rate")
    voiced = _periods(x, rate)[1] > VOICED
    if not voiced.any():
        raise NotMeasured("no block is voiced")
    filtered = sosfilt(butter(4, [low, high], "band", fs=rate, output="sos"), y)
    c = np.clip(_periods(np.asarray(filtered), rate)[1][voiced], 0.01, 0.999).astype(np.float64)
    return float((10 * np.log10(c / (1 - c))).mean())


def pitch_error(
    reference: np.ndarray, signal: np.ndarray, rate: int, reference_pitch: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the RMSE of the logarithm of the pitch, and the share of frames whose voicing differs.

    Pitch and voicing are those of `librosa.pyin` (Mauch and Dixon, "pYIN", 2014), 65 to 1000 Hz, in
    frames of at least four periods of the lowest pitch, every quarter of a frame.

    Returns
    -------
    float
        Cents (1200 times the logarithm to base 2), over the frames that are voiced in both; NaN
        without such frames.
    float
        Per cent of all frames.
    """
    x, y = _pair(reference, signal)
    true = pitch(x, rate) if reference_pitch is None else reference_pitch
    found = pitch(y, rate)
    both = np.isfinite(true) & np.isfinite(found)
    cents = 1200 * np.log2(found[both] / true[both])
    rmse = float(np.sqrt(np.square(cents).mean())) if both.any() else math.nan
    return rmse, float(100 * (np.isfinite(true) != np.isfinite(found)).mean())


def pitch(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Return the pitch of each frame in Hz, NaN where there is none; see `pitch_error`."""
    from wavear.common.compiled import prepare_numba

    prepare_numba()
    import librosa

    low, high = PITCH_RANGE
    frame = 2 ** math.ceil(math.log2(4 * rate / low))
    _check_length(waveform, frame)
    x = np.asarray(waveform, np.float64)
    return librosa.pyin(x, fmin=low, fmax=min(high, rate / 4), sr=rate, frame_length=frame)[0]


def silent_frames(reference: np.ndarray, rate: int) -> np.ndarray:
    """Return which frames of 20 ms are silence, (frames,) bool.

    They and their neighbours lie 40 dB or more below the loudest frame.
    """
    level = frame_levels(reference, rate)
    if not level.size:
        return np.zeros(0, bool)
    quiet = np.pad(level <= level.max() - SILENCE_DB, 1, constant_values=True)
    return quiet[:-2] & quiet[1:-1] & quiet[2:]


def frame_levels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Return the RMS of frames of 20 ms about their mean, in dB of full scale, at least -120."""
    size = round(_FRAME_SECONDS * rate)
    frames = np.asarray(waveform, np.float64)[: len(waveform) // size * size].reshape(-1, size)
    return 10 * np.log10(np.maximum(frames.var(axis=1), 10 ** (_LEAST_DB / 10)))


def noise_floor(reference: np.ndarray, signal: np.ndarray, rate: int) -> float:
    """Return the level of `signal` in the `silent_frames` of `reference`, in dB of full scale.

    It is 10 log10 of the mean power. The mean of each frame is subtracted: a constant is inaudible.
    """
    x, y = _pair(reference, signal)
    silent = silent_frames(x, rate)
    if not silent.any():
        raise NotMeasured(f"no stretch of it is {SILENCE_DB:g} dB below its loudest")
    return float(10 * np.log10(np.mean(10 ** (frame_levels(y, rate)[silent] / 10))))


def pesq(reference: np.ndarray, signal: np.ndarray, rate: int) -> float:
    """Return PESQ by the package of that name, MOS-LQO.

    It is wide band at 16 kHz (ITU-T P.862.2), or of rates below 16 kHz narrow band at 8 kHz
    (P.862.1), resampled. Of long clips, the first 30 seconds count.
    """
    try:
        import pesq as package
    except ImportError:
        raise _missing("pesq") from None
    if rate < 8000:
        raise NotMeasured(f"{rate} Hz is below the 8000 Hz it needs")
    wanted = 16000 if rate >= 16000 else 8000
    pair = _pair(reference, signal)[:, : round(_PESQ_SECONDS * rate)]
    if not pair.any(axis=1).all():
        raise NotMeasured("silence has no PESQ")
    x, y = audio.resample(pair, rate, wanted).astype(np.float32)
    try:
        return float(package.pesq(wanted, x, y, "wb" if wanted == 16000 else "nb"))
    except package.PesqError as error:
        reason = error.args[0] if error.args else type(error).__name__
        reason = reason.decode() if isinstance(reason, bytes) else str(reason)
        raise NotMeasured(f"PESQ: {reason}") from None


def stoi(reference: np.ndarray, signal: np.ndarray, rate: int) -> float:
    """Return the short-time objective intelligibility by the package pystoi, up to 1."""
    try:
        import pystoi
    except ImportError:
        raise _missing("pystoi") from None
    x, y = _pair(reference, signal)
    _check_sound(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(x, y, rate))
        except RuntimeWarning as warning:
            raise NotMeasured(f"STOI: {str(warning).split('.')[0]}") from None
        except ValueError:  # it makes no frames at all of what is shorter than one
            raise NotMeasured("STOI: not enough frames") from None


def _missing(package: str) -> NotMeasured:
    return NotMeasured(f"the package {package} is not installed: pip install 'wavear[evaluate]'")


def _check_length(waveform: np.ndarray, least: int) -> None:
    if waveform.size < least:
        raise NotMeasured(f"{waveform.size} samples are too short: {least} are needed")


def _check_sound(recording: np.ndarray) -> None:
    if not recording.any():
        raise NotMeasured("the recording is silent")


def _pair(reference: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """Return both, (2, T) float64."""
    x, y = np.asarray(reference, np.float64), np.asarray(signal, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise WavearError(
            f"the recording has shape {x.shape} and the signal {y.shape};"
            " both must be (T,) of one length"
        )
    return np.stack([x, y])
