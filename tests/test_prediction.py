"""Linear prediction from a mel: the formula, scipy's Toeplitz solver, a known process."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import test_predictive
import torch

from wavear import MelConfig, log_mel
from wavear.mel.presets import PRESETS
from wavear.mel.spectrogram import mel_filter_bank
from wavear.models.prediction import LEAST_SCALE, Envelope, levinson, predictor

MELS = {
    **{name: MelConfig.preset(name) for name in PRESETS},
    "16 kHz, powers": MelConfig(
        sample_rate=16000,
        hop_length=200,
        n_fft=512,
        window_length=400,
        bands=40,
        power=2.0,
        floor=1e-10,
    ),
    "44.1 kHz, htk": MelConfig(
        sample_rate=44100,
        n_fft=2048,
        window_length=2048,
        hop_length=512,
        mel_scale="htk",
        norm=None,
        fmax=None,
    ),
    "no logarithm": MelConfig(log_base="none", floor=0.0, scale=3.0, shift=0.5, bands=60),
    "no logarithm of powers": MelConfig(
        log_base="none", floor=1e-6, power=2.0, window="hamming", bands=60
    ),
    "floor added, base 2": MelConfig(floor_mode="add", floor=1e-4, scale=1 / np.log(2), shift=-3.0),
    "odd transform, short window": MelConfig(
        n_fft=1023, window_length=701, bands=40, fmin=50.0, window="blackman"
    ),
    "one band": MelConfig(bands=1, fmin=20.0),
}
mels = pytest.mark.parametrize("config", MELS.values(), ids=MELS.keys())


def colour() -> np.ndarray:
    """Return the coefficients of an all-pole filter with two resonances and a spectral tilt."""
    poles = [0.5]
    for angle, radius in ((0.2, 0.7), (0.8, 0.6)):
        poles += [radius * np.exp(1j * angle), radius * np.exp(-1j * angle)]
    return np.poly(poles).real


def process(samples: int, level: float = 0.002, seed: int = 0) -> np.ndarray:
    """Return noise of deviation `level` through that filter."""
    noise = level * np.random.default_rng(seed).normal(size=samples)
    return np.asarray(scipy.signal.lfilter([1.0], colour(), noise))


def written_out(mel: np.ndarray, config: MelConfig, order: int) -> np.ndarray:
    """Compute the autocorrelation (order + 1, F) of a mel (M, F) with NumPy."""
    value = (mel - config.shift) / config.scale
    if config.log_base == "none":
        value = np.log(np.maximum(value, max(config.floor, 1e-10)))
    elif config.log_base == "10":
        value = value * np.log(10)
    elif config.log_base == "db":
        value = value * np.log(10) / (20 / config.power)
    filters = mel_filter_bank(config).numpy()
    bins = np.arange(config.n_fft // 2 + 1)
    centres = (filters * bins).sum(1) / filters.sum(1)
    amplitude = (
        value - np.log(filters.sum(1))[:, None]
    ) / config.power  # of the mean magnitude, or the mean power
    envelope = np.stack([np.interp(bins, centres, column) for column in amplitude.T], 1)
    top = int(centres[-1])
    envelope[top:] -= 2.0 * ((bins[top:] - top) / (bins[-1] - top))[:, None]
    window = scipy.signal.get_window(
        "boxcar" if config.window == "rectangular" else config.window, config.window_length
    )
    power = np.exp(2 * envelope) / np.square(np.asarray(window)).sum()
    lags = np.arange(order + 1)
    r = np.fft.irfft(power, config.n_fft, axis=0)[: order + 1]
    return r * np.exp(-0.5 * (2 * np.pi * 40 * lags / config.sample_rate) ** 2)[:, None]


@mels
def test_the_autocorrelation_equals_the_formula(config):
    mel = log_mel(torch.from_numpy(process(16 * config.hop_length))[None], config)
    found = Envelope(config, 20).autocorrelation(mel)[0].numpy()
    expected = written_out(mel[0].numpy(), config, 20)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_levinson_equals_scipys_toeplitz_solver():
    """Sums of decaying cosines are well conditioned, like those of envelopes: hence 1e-9."""
    random = np.random.default_rng(0)
    for order in (1, 2, 7, 32, 64):
        lags = np.arange(order + 1)
        rows = []
        for _ in range(4):
            decay, pitch = random.uniform(0.8, 0.99, 5), random.uniform(0, np.pi, 5)
            levels, cosines = random.uniform(0.1, 1, 5), np.cos(pitch[:, None] * lags)
            r = (levels[:, None] * decay[:, None] ** lags * cosines).sum(0)
            r[0] *= 1 + 1e-3
            rows.append(r)
        r = np.stack(rows).reshape(2, 2, -1)
        a, error = levinson(torch.from_numpy(r.copy()))
        assert (a.shape, error.shape) == ((2, 2, order + 1), (2, 2))
        for i in np.ndindex(2, 2):
            expected = -scipy.linalg.solve_toeplitz(r[i][:-1], r[i][1:])
            np.testing.assert_allclose(a[i][1:].numpy(), expected, rtol=1e-9, atol=1e-9)
            assert a[i][0] == 1
            np.testing.assert_allclose(error[i], r[i][0] + expected @ r[i][1:], rtol=1e-9)


@pytest.mark.cuda
def test_levinson_on_a_card_equals_the_compiled_one():
    r = Envelope(MelConfig(), 32).autocorrelation(torch.randn(2, 80, 9) - 4)
    r = r.transpose(1, 2).contiguous()
    r[..., 0] *= 1 + 1e-4
    for found, expected in zip(levinson(r.cuda()), levinson(r), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-7, atol=1e-9)


def test_rows_solved_together_have_the_bits_of_single_ones():
    r = Envelope(MelConfig(), 32).autocorrelation(torch.randn(2, 80, 9) - 4)
    coefficients, scale = predictor(r, 0.3)
    for b, f in np.ndindex(2, 9):
        one = predictor(r[b : b + 1, :, f : f + 1], 0.3)
        assert torch.equal(one[0][0, 0], coefficients[b, f])
        assert torch.equal(one[1][0, 0], scale[b, f])


def test_predictor_does_not_change_its_argument():
    """This includes a single frame, whose transpose is not a copy."""
    for frames in (1, 3):
        r = Envelope(MelConfig(), 4).autocorrelation(torch.randn(1, 80, frames) - 4)
        before = r.clone()
        predictor(r)
        assert torch.equal(r, before)


@mels
def test_a_process_is_whitened_to_unit_scale_for_every_mel(config):
    """The scale is in physical units, so that one gain fits all mel configurations.

    A mel of magnitudes has their mean instead of their root mean square, which is 1.13 times as
    large. A single band determines only a level.
    """
    rate, level = config.sample_rate, 0.003
    x = process(rate, level)
    mel = log_mel(torch.from_numpy(x)[None], config)
    frames = mel.shape[2]
    coefficients, scale = predictor(Envelope(config, 32).autocorrelation(mel))
    a, s = coefficients[0].double().numpy(), scale[0].double().numpy()
    residual = []
    for t in range(1000, frames * config.hop_length):
        f = t // config.hop_length
        residual.append((x[t] + a[f] @ x[t - 1 : t - 33 : -1]) / s[f])
    residual = np.array(residual)
    if config.bands == 1:
        assert 0.1 < residual.std() < 3
        return
    assert 0.9 < residual.std() < 1.15
    # The residual has the level of the noise, and is white.
    assert (residual * np.repeat(s, config.hop_length)[1000:]).std() < 1.05 * level
    assert abs(np.corrcoef(residual[1:], residual[:-1])[0, 1]) < 0.2
    assert np.corrcoef(x[1:], x[:-1])[0, 1] > 0.9


def test_the_scale_follows_the_level_down_to_a_step_of_the_grid():
    config = MelConfig()
    wave = torch.from_numpy(process(4096, 0.001))[None]
    envelope = Envelope(config, 32)
    scale, louder = (
        predictor(envelope.autocorrelation(log_mel(gain * wave, config)))[1] for gain in (1.0, 8.0)
    )
    torch.testing.assert_close(louder / scale, torch.full_like(scale, 8.0), rtol=0.02, atol=0)
    half = predictor(envelope.autocorrelation(log_mel(wave, config)), 0.5)[1]
    torch.testing.assert_close(half, scale / 2)
    assert (
        predictor(envelope.autocorrelation(log_mel(1e-4 * wave, config)), 1e-3)[1] == LEAST_SCALE
    ).all()


@mels
def test_digital_silence_has_a_finite_predictor(config):
    mel = log_mel(torch.zeros(1, 8 * config.hop_length), config)
    coefficients, scale = predictor(Envelope(config, 32).autocorrelation(mel))
    assert torch.isfinite(coefficients).all()
    assert (scale >= LEAST_SCALE).all()
    assert (scale < 0.1).all()
    # A mel that no sound can have has one, too.
    coefficients, scale = predictor(
        Envelope(config, 32).autocorrelation(torch.full_like(mel, -1e4))
    )
    assert torch.isfinite(coefficients).all()
    assert (scale >= LEAST_SCALE).all()


@pytest.mark.filterwarnings("ignore:mel bands")
def test_a_band_without_a_bin_is_refused():
    config = MelConfig(n_fft=256, window_length=256, bands=80)
    with pytest.raises(
        ValueError,
        match=r"mel band \d+ of 80 holds no bin of an n_fft of 256.*larger n_fft or fewer",
    ):
        Envelope(config, 8)
    from wavear import PredictiveWaveNet, PredictiveWaveNetConfig

    with pytest.raises(ValueError, match="holds no bin"):
        PredictiveWaveNet(PredictiveWaveNetConfig(mel=config))


@pytest.mark.parametrize(
    "name",
    ["kernel 3", "hop that sub-frames do not divide", "a sub-frame for each sample", "causal"],
)
@torch.no_grad()
def test_residuals_equal_a_loop_over_samples(name):
    """p[t] = -sum of a[k] x[t - k], with the coefficients of the interpolated sub-frame."""
    config = test_predictive.CONFIGS[name]
    model = test_predictive.make(config)
    mel = test_predictive.random_mel(model, 1, 7)
    cond = model.condition(mel)
    codes = test_predictive.random_codes(model, 1, cond.samples)
    residual, scale = model.residuals(codes, cond)
    x = (codes[0].numpy() - 32768) / 32768
    hop, subs, order = config.mel.hop_length, config.sub_frames, config.prediction_order  # type: ignore[union-attr]
    r = written_out(mel[0].numpy(), config.mel, order)  # type: ignore[arg-type]
    # In frames; a causal frame is complete at its end.
    centres = np.arange(7) + (1.0 if config.causal else 0.5)
    at = (np.arange(7 * subs) + 0.5) / subs
    r = np.stack([np.interp(at, centres, row) for row in r])
    r[0] = r[0] * (1 + 1e-4) + 2.0**-30 / 12
    for t in range(cond.samples):
        sub = t // hop * subs + t % hop * subs // hop
        a = -scipy.linalg.solve_toeplitz(r[:-1, sub], r[1:, sub])
        error = r[0, sub] + a @ r[1:, sub]
        s = max(0.7 * np.sqrt(error), 2.0**-15)  # these models have the gain 0.7
        p = -sum(a[k] * x[t - 1 - k] for k in range(order) if t - 1 - k >= 0)
        assert abs(scale[0, t] - s) < 1e-6 * s
        assert abs(residual[0, t] - (x[t] - p) / s) < 1e-5  # coefficients are float32
