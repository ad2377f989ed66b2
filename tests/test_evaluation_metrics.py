"""The measures of copy synthesis equal formulas, librosa and the packages."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings

import librosa
import numpy as np
import pytest
import torch

from wavear import MelConfig, audio, log_mel
from wavear.audio.grid import Grid
from wavear.demo.sounds import voice
from wavear.evaluation import metrics
from wavear.evaluation.bounds import _uncompressed, grid_round_trip, griffin_lim
from wavear.evaluation.metrics import (
    HNR_BANDS,
    MEASURES,
    RESOLUTIONS,
    NotMeasured,
    frame_levels,
    harmonic_to_noise_ratio,
    log_mel_distance,
    measure,
    mel_cepstral_distortion,
    mel_cepstrum,
    noise_floor,
    period_error,
    pitch_error,
    stft_distance,
)

RATE = 16000
needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed: .[evaluate]"
    )
    for name in ("pesq", "pystoi")
}


def noise(samples: int, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return level * np.random.default_rng(seed).standard_normal(samples)


def vowel(frequency: float = 200.0, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * voice(frequency, seconds, rate, vibrato_cents=0.0).astype(np.float64)


def test_a_recording_has_distance_zero_from_itself():
    x = np.concatenate([vowel(), np.zeros(RATE // 2)]) + noise(RATE * 3 // 2, 1e-4)
    values, missing = measure(x, x.copy(), RATE)
    names = (
        "log_mel",
        "stft_distance",
        "mcd",
        "f0_rmse",
        "voicing_error",
        "period_error",
        "gross_period_error",
    )
    zero = {name: values[name] for name in names}
    assert zero == dict.fromkeys(zero, 0.0)
    assert values["noise_floor"] == pytest.approx(-80, abs=0.2)
    assert set(values) | set(missing) == set(MEASURES)
    assert set(missing) <= {"pesq", "stoi"}


# ---- multi-resolution STFT distance


def test_stft_distance_equals_that_of_librosa_spectra():
    assert RESOLUTIONS == ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # the paper's
    x, y = noise(5000), noise(5000, 0.3, seed=1)
    expected = []
    for n_fft, hop, length in RESOLUTIONS:
        sizes = {"n_fft": n_fft, "hop_length": hop, "win_length": length, "pad_mode": "reflect"}
        a, b = (np.maximum(np.abs(librosa.stft(s, **sizes)), 1e-7**0.5) for s in (x, y))
        expected.append(
            np.linalg.norm(a - b) / np.linalg.norm(a) + np.abs(np.log(a) - np.log(b)).mean()
        )
    assert stft_distance(x, y) == pytest.approx(np.mean(expected), rel=1e-9)
    assert stft_distance(x, y) != pytest.approx(
        stft_distance(y, x), rel=1e-3
    )  # the recording comes first


# ---- mel-cepstral distortion


def test_mel_cepstrum_is_the_cosine_series_of_the_log_mel():
    x = noise(4096)
    c = mel_cepstrum(x, RATE, order=79)
    config = MelConfig(sample_rate=RATE, n_fft=1024, window_length=1024, hop_length=256)
    mel = log_mel(torch.from_numpy(x)[None], config)[0].numpy()
    places = np.cos(math.pi * np.arange(80)[None] * (np.arange(80)[:, None] + 0.5) / 80)
    assert np.abs(places @ c - mel).max() < 1e-9


def test_mel_cepstral_distortion_is_the_rms_difference_of_the_spectra_in_db():
    """By Parseval's theorem, with all orders and without the level of each frame."""
    x = noise(8192)
    y = 3 * np.convolve(x, [1, -0.9], mode="same")
    config = MelConfig(sample_rate=RATE, n_fft=1024, window_length=1024, hop_length=256)
    a, b = (
        20 / math.log(10) * log_mel(torch.from_numpy(s)[None], config)[0].numpy() for s in (x, y)
    )
    difference = (a - b) - (a - b).mean(0)
    assert mel_cepstral_distortion(x, y, RATE, order=79) == pytest.approx(
        np.sqrt(np.square(difference).mean(0)).mean()
    )
    assert 0 < mel_cepstral_distortion(x, y, RATE) < mel_cepstral_distortion(x, y, RATE, order=79)


# ---- pitch


def test_pitch_errors_are_the_shift_and_the_share_of_unvoiced_frames():
    """The tolerance is pYIN's resolution, a tenth of a semitone."""
    x, shifted = vowel(200.0, 2.0), vowel(200.0 * 2 ** (-70 / 1200), 2.0)
    shifted[RATE : RATE * 3 // 2] = noise(RATE // 2)
    rmse, voicing = pitch_error(x, shifted, RATE)
    assert rmse == pytest.approx(70, abs=6)
    assert voicing == pytest.approx(25, abs=6)


# ---- log-mel distance


def test_log_mel_distance_equals_that_of_librosa_mels():
    """At 22.05 kHz the mel is HiFi-GAN's: 1024, 256, 80 bands to 8 kHz, at least 1e-5."""
    x, y = noise(8192), noise(8192, 0.3, seed=1)
    filters = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    mels = []
    for each in (x, y):
        padded = np.pad(each, 384, mode="reflect")
        magnitude = np.sqrt(
            np.abs(librosa.stft(padded, n_fft=1024, hop_length=256, center=False)) ** 2 + 1e-9
        )
        mels.append(np.log(np.maximum(filters @ magnitude, 1e-5)))
    assert log_mel_distance(x, y, 22050) == pytest.approx(
        np.abs(mels[0] - mels[1]).mean(), rel=1e-4
    )


# ---- period and harmonicity


def pulses(
    period: float, samples: int = 44100, noise_power: float = 1e-6, seed: int = 0
) -> np.ndarray:
    """Return pulses of unit energy, whose spectrum is flat, in white noise of power `noise_power`.

    The harmonic-to-noise ratio of every band is then 1 / (period * noise_power).
    """
    x = np.random.default_rng(seed).normal(size=samples) * math.sqrt(noise_power)
    x[np.round(np.arange(0, samples - 1, period)).astype(int)] += 1
    return 0.3 * x


@pytest.mark.parametrize(("period", "decibels"), [(100, 5.0), (147, 5.0), (100, 15.0)])
def test_harmonic_to_noise_ratio_equals_that_of_pulses_in_noise(period, decibels):
    """This holds in every band; choosing the best of many lags adds 0.8 dB at 5 dB."""
    clean, noisy = pulses(period), pulses(period, noise_power=10 ** (-decibels / 10) / period)
    for band in HNR_BANDS.values():
        assert harmonic_to_noise_ratio(clean, noisy, 22050, band) == pytest.approx(
            decibels, abs=0.9
        )
        assert harmonic_to_noise_ratio(clean, clean, 22050, band) > 25


def test_harmonic_to_noise_ratio_ignores_other_bands():
    from scipy.signal import butter, sosfilt

    clean, ratios = pulses(100), {}
    for kind, edge in (("low", 400), ("high", 5500)):
        added = sosfilt(butter(8, edge, kind, fs=22050, output="sos"), noise(clean.size, 0.1))
        ratios[kind] = [
            harmonic_to_noise_ratio(clean, clean + added, 22050, band)
            for band in HNR_BANDS.values()
        ]
    assert ratios["low"][0] < 3
    assert min(ratios["low"][1:]) > 15
    assert min(ratios["high"][:2]) > 20
    assert ratios["high"][2] < 0


def test_harmonic_to_noise_ratio_covers_blocks_voiced_in_the_recording():
    """Noise in the recording's unvoiced parts does not count."""
    x = np.concatenate([pulses(100), noise(44100, 0.02)])
    calm, hoarse = x.copy(), x.copy()
    calm[46000:] = noise(42200, 0.1, seed=1)
    hoarse[20000:40000] = noise(20000, 0.1, seed=1)
    true, calm, hoarse = (
        harmonic_to_noise_ratio(x, y, 22050, HNR_BANDS["hnr_low"]) for y in (x, calm, hoarse)
    )
    assert calm == pytest.approx(true, abs=0.2)
    assert hoarse < true - 5


def test_bands_above_half_of_the_rate_are_omitted():
    _, missing = measure(pulses(40), pulses(40), 4000, names=HNR_BANDS)
    assert missing == {"hnr_high": "the band from 3000 Hz is beyond half of the rate"}
    _, missing = measure(noise(8000), pulses(40, 8000), 22050, names=HNR_BANDS)
    assert missing == dict.fromkeys(HNR_BANDS, "no block is voiced")


def test_period_error_is_the_difference_in_cents():
    median, gross = period_error(pulses(100), pulses(98), 22050)
    assert median == pytest.approx(abs(1200 * math.log2(0.98)), abs=0.5)
    assert gross == 0


def test_gross_errors_are_periods_off_by_more_than_five_per_cent():
    """Only blocks voiced in both signals count; half of these are off by 6 %."""
    x = pulses(100, 66150)
    y = np.concatenate([pulses(100, 22050), pulses(106, 22050), noise(22050, 0.05)])
    _, gross = period_error(x, y, 22050)
    assert gross == pytest.approx(50, abs=3)
    near = np.concatenate([pulses(100, 22050), pulses(104, 22050), noise(22050, 0.05)])
    assert period_error(x, near, 22050)[1] < 1
    with pytest.raises(NotMeasured, match="no block is voiced in both"):
        period_error(x, noise(x.size), 22050)


# ---- noise floor


def test_noise_floor_is_the_level_of_noise_added_to_silence():
    level = -70.0
    x = np.concatenate([vowel(), np.zeros(RATE), vowel()])
    y = x + noise(x.size, 10 ** (level / 20)) + 0.01  # a constant is inaudible
    assert noise_floor(x, y, RATE) == pytest.approx(level, abs=0.3)
    assert noise_floor(x, x, RATE) == -120.0


def test_noise_floor_omits_frames_next_to_sound():
    """Frames 0-9 are sound, 10-19 silence; the signal rings into frame 10."""
    size = RATE // 50
    x = np.concatenate([noise(10 * size), np.zeros(10 * size)])
    y = x.copy()
    y[10 * size : 11 * size] = noise(size)
    assert noise_floor(x, y, RATE) == -120.0


def test_levels_are_in_db_of_full_scale():
    sine = np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)
    assert frame_levels(sine, RATE) == pytest.approx(np.full(50, 10 * math.log10(0.5)))


# ---- the packages


@needs["pesq"]
@pytest.mark.parametrize(("rate", "wanted", "mode"), [(22050, 16000, "wb"), (8000, 8000, "nb")])
def test_pesq_equals_the_package(rate, wanted, mode):
    import pesq

    x = np.concatenate(
        [vowel(seconds=0.7, rate=rate), np.zeros(rate // 5), vowel(150.0, 0.7, rate)]
    )
    y = x + noise(x.size, 0.01)
    a, b = (audio.resample(s, rate, wanted).astype(np.float32) for s in (x, y))
    assert metrics.pesq(x, y, rate) == pesq.pesq(wanted, a, b, mode)
    assert metrics.pesq(x, y, rate) < metrics.pesq(x, x, rate)


@needs["pystoi"]
def test_stoi_equals_the_package():
    import pystoi

    x = vowel(seconds=1.0) * (1 + np.sin(2 * np.pi * 4 * np.arange(RATE) / RATE))
    y = x + noise(x.size, 0.1)
    assert metrics.stoi(x, y, RATE) == pystoi.stoi(x, y, RATE)
    assert metrics.stoi(x, x, RATE) == pytest.approx(1)
    assert metrics.stoi(x, y, RATE) < 0.99


@pytest.mark.parametrize("name", ["pesq", "pystoi"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    way = metrics.pesq if name == "pesq" else metrics.stoi
    with pytest.raises(
        NotMeasured, match=rf"the package {name} is not installed: pip install 'wavear\[evaluate\]'"
    ):
        way(noise(RATE), noise(RATE), RATE)


# ---- clips without some measures


@pytest.mark.parametrize("samples", [1, 3000])
def test_short_clips_lack_values_with_reasons(samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pystoi warns, but returns a value
        values, missing = measure(noise(samples), noise(samples, seed=1), RATE)
    assert set(values) | set(missing) == set(MEASURES)
    assert {"pesq", "stoi", "f0_rmse"} <= set(missing)
    assert all(missing.values())
    assert samples < 3000 or "stft_distance" in values


def test_silence_lacks_values_with_reasons():
    values, missing = measure(np.zeros(RATE), noise(RATE), RATE)
    assert "silent" in missing["stft_distance"]
    assert values["voicing_error"] == 0.0
    assert {"pesq", "stoi", "f0_rmse", "noise_floor"} <= set(missing)


def test_signals_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"both must be \(T,\) of one length"):
        stft_distance(noise(3000), noise(3001))


# ---- the bounds


def test_round_trip_keeps_the_codes():
    from wavear import mulaw_encode

    x = torch.from_numpy(noise(1000).astype(np.float32))
    y = grid_round_trip(x, Grid("mulaw", 256))
    assert torch.equal(mulaw_encode(x, 256), mulaw_encode(y, 256))
    assert 0 < float((x - y).abs().max()) < 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"centre": "start", "hop_length": 200},
        {"power": 2.0, "log_base": "db", "scale": 0.5, "shift": 3.0},
        {"log_base": "10", "window_length": 512},
        {"log_base": "none", "norm": None},
    ],
    ids=["hifigan", "start", "decibels", "short window", "no logarithm"],
)
def test_griffin_lim_matches_the_mel_and_is_aligned_with_the_recording(settings):
    """A shift by half a hop increases the distance from the recording."""
    config = MelConfig(**{"sample_rate": RATE, "fmax": 8000.0, **settings})
    x = np.concatenate([np.zeros(4000), vowel(seconds=0.5), noise(3000, 0.05), vowel(300.0, 0.4)])
    x = (x + noise(x.size, 3e-3)).astype(np.float32)  # above the floor of every configuration
    mel = log_mel(torch.from_numpy(x)[None], config)[0].numpy()
    y = griffin_lim(mel, config)
    assert y.shape == (mel.shape[1] * config.hop_length,)
    again = log_mel(torch.from_numpy(y)[None], config)[0].numpy()
    given, found = (_uncompressed(each.astype(np.float64), config) for each in (mel, again))
    # 0.37 with a window of n_fft samples
    assert np.linalg.norm(found - given) < 0.3 * np.linalg.norm(given)
    plain = MelConfig(sample_rate=RATE, n_fft=512, window_length=512, hop_length=32, bands=20)

    def off(shift: int) -> float:
        moved = np.roll(y, shift)
        a, b = (log_mel(torch.from_numpy(s[: y.size].copy())[None], plain)[0] for s in (x, moved))
        return float((a - b)[:, 200:-50].abs().mean())

    assert off(0) < 0.3
    assert off(0) < min(off(config.hop_length // 2), off(-config.hop_length // 2))


# ---- known values

KNOWN = {
    "log_mel": 2.872472,
    "stft_distance": 3.840979,
    "mcd": 10.999873,
    "period_error": 0.109281,
    "gross_period_error": 0.0,
    "hnr_low": 28.575299,
    "hnr_middle": 18.433691,
    "hnr_high": -6.044666,
    "noise_floor": -40.139528,
}


def test_values_of_a_fixed_signal_do_not_change():
    """The first version of these measures computed the expected values."""
    x = np.concatenate([vowel(), np.zeros(RATE // 2)]) + noise(RATE * 3 // 2, 1e-4)
    y = 0.9 * np.convolve(x, [0.2, 0.7, 0.1], "same") + noise(x.size, 0.01, seed=1)
    values, _ = measure(x, y, RATE, names=KNOWN)
    assert values == pytest.approx(KNOWN, rel=1e-4)
