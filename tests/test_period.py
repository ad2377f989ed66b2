"""`wavear.audio.periods` measures the period by cross-correlation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wavear.audio.periods import measure_period

SIZES = (40, 441, 64, 512)


def reference(
    x: np.ndarray, shortest: int, longest: int, block: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the definition, in float64 and without shortcuts."""
    x = np.asarray(x, np.float64)
    lags, correlation = np.full(len(x) // block, float(shortest)), np.zeros(len(x) // block)
    for b in range(len(lags)):
        start = b * block + block // 2 - window // 2
        if start - longest < 0 or start + window > len(x):
            continue
        own = x[start : start + window]
        c = np.empty(longest - shortest + 1)
        for k, lag in enumerate(range(shortest, longest + 1)):
            past = x[start - lag : start - lag + window]
            c[k] = (own @ past) / math.sqrt(max(own @ own, 1e-9) * max(past @ past, 1e-9))
        best, at = -1.0, 0
        for k, value in enumerate(c):
            if value > best + 0.02:
                best, at = value, k
        while at + 1 < len(c) and c[at + 1] > c[at]:
            at += 1
        lags[b], correlation[b] = shortest + at, c[at]
        if 0 < at < len(c) - 1:
            bend = c[at - 1] - 2 * c[at] + c[at + 1]
            if bend < -1e-9:
                shift = np.clip(0.5 * (c[at - 1] - c[at + 1]) / bend, -0.5, 0.5)
                lags[b] += shift
    return lags, np.clip(correlation, 0, 1)


def voice(period: float, samples: int, noise: float, seed: int = 0) -> np.ndarray:
    """Return harmonics of one period and white noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples)
    x = sum(
        np.cos(2 * np.pi * k * t / period + rng.uniform(0, 6)) / k
        for k in range(1, int(period / 2))
    )
    return (0.1 * (x + noise * rng.normal(size=samples))).astype(np.float32)


@pytest.mark.parametrize(
    ("period", "noise", "sizes"),
    [
        (100.5, 0.1, SIZES),
        (61.3, 1.0, SIZES),
        (333.3, 0.3, SIZES),
        (100.5, 0.3, (14, 160, 23, 186)),
        (20, 0, (3, 30, 7, 21)),
    ],
)
def test_kernel_equals_reference(period, noise, sizes):
    x = voice(period, 4001, noise)
    x[1500:2200] = 0
    lags, correlation = measure_period(x, *sizes)
    true_lags, true_correlation = reference(x, *sizes)
    assert lags.dtype == correlation.dtype == np.float32
    # float32 sums of 512 products are accurate to 1e-6; a tie between two lags may then fall either
    # way, in few blocks.
    np.testing.assert_allclose(correlation, true_correlation, atol=2e-5)
    assert (np.abs(lags - true_lags) < 0.02).mean() > 0.98
    assert correlation[len(lags) // 4] > 0.3


def test_measured_blocks_are_those_whose_window_and_longest_lag_fit():
    x = voice(100.0, 64 * 30, 0.0)
    _, correlation = measure_period(x, *SIZES)
    fits = np.array([b * 64 - 224 - 441 >= 0 and b * 64 - 224 + 512 <= len(x) for b in range(30)])
    np.testing.assert_array_equal(correlation > 0.5, fits)


@pytest.mark.parametrize("period", [41.7, 100.0, 100.5, 219.9])
def test_period_of_harmonics_is_found_to_a_few_cents(period):
    lags, correlation = measure_period(voice(period, 8000, 0.01), *SIZES)
    found = lags[correlation > 0]
    assert np.abs(1200 * np.log2(found / period)).max() < 5
    assert correlation[correlation > 0].min() > 0.95


def test_period_of_a_sweep_is_that_at_the_middle_of_the_block():
    t = np.arange(22050)
    frequency = 100 * 2 ** (t / 22050)
    x = np.sin(2 * np.pi * np.cumsum(frequency) / 22050)
    lags, correlation = measure_period(x, *SIZES)
    b = np.flatnonzero(correlation)
    # The two windows are centred on the middle of the block minus half of the lag.
    middle = b * 64 + 32 - lags[b] / 2
    assert np.abs(1200 * np.log2(22050 / lags[b] / np.interp(middle, t, frequency))).max() < 6


def test_correlation_is_the_share_of_harmonic_power():
    x = voice(100.0, 60000, 0.0).astype(np.float64)
    noise = np.random.default_rng(1).normal(size=x.size) * x.std()
    for ratio in (1.0, 4.0):
        _, correlation = measure_period(x * math.sqrt(ratio) + noise, *SIZES)
        assert correlation[correlation > 0].mean() == pytest.approx(
            ratio / (1 + ratio), abs=0.05
        )  # the maximum over many lags is slightly higher


def test_silence_and_short_input_have_no_period():
    for x in (np.zeros(5000), np.zeros(0), np.ones(63), voice(100.0, 500, 0.0)):
        lags, correlation = measure_period(x, *SIZES)
        assert len(lags) == len(correlation) == len(x) // 64
        assert (lags == 40).all()
        assert (correlation == 0).all()


def test_loud_sound_before_silence_leaves_no_trace():
    x = np.concatenate([voice(100.0, 100000, 0.0) * 10, np.zeros(5000, np.float32)])
    _, correlation = measure_period(x, *SIZES)
    assert (correlation[-60:] == 0).all()


def test_scaling_leaves_the_period():
    x = voice(100.5, 4000, 0.2)
    lags, correlation = measure_period(x, *SIZES)
    quiet = measure_period(x * 0.01, *SIZES)
    np.testing.assert_allclose(quiet[0], lags, atol=0.01)
    np.testing.assert_allclose(quiet[1], correlation, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((2, 10), SIZES, "one channel"),
        ((10,), (0, 10, 4, 8), "from 0 to 10"),
        ((10,), (9, 8, 4, 8), "from 9 to 8"),
        ((10,), (4, 8, 0, 8), "block is 0"),
        ((10,), (4, 8, 8, 4), "window 4"),
    ],
)
def test_inconsistent_sizes_are_refused(shape, sizes, words):
    with pytest.raises(ValueError, match=words):
        measure_period(np.zeros(shape), *sizes)
