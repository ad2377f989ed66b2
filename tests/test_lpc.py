"""Sums and solutions of linear prediction equal statsmodels, scipy and the definition."""

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from wavear import Linear, fit_linear, generate
from wavear.audio.grid import Grid
from wavear.models import fitting, lpc

AR4 = np.array([1.9, -1.5, 0.7, -0.2])  # stable: its poles lie at 0.79 and 0.57


def process(
    coefficients: np.ndarray, samples: int, scale: float, law: str = "gaussian", seed: int = 0
) -> np.ndarray:
    """Return x[t] = sum of coefficients[k-1] * x[t-k] + e[t]."""
    random = np.random.default_rng(seed)
    e = random.laplace(0, scale, samples) if law == "laplace" else random.normal(0, scale, samples)
    made: Any = scipy.signal.lfilter([1.0], np.concatenate([[1.0], -np.asarray(coefficients)]), e)
    return made


def windows(
    signals: list[np.ndarray], lags: int, edges: str, differencing: int, silence: float
) -> np.ndarray:
    """Return each predicted sample and the P before it, (n, P + 1), newest first."""
    found = []
    for x in signals:
        x = np.concatenate([np.full(lags + differencing, silence), x]) if edges == "silence" else x
        x = np.diff(x, n=differencing)
        x = np.concatenate([np.zeros(lags), x, np.zeros(lags)]) if edges == "autocorrelation" else x
        if len(x) > lags:
            found.append(np.lib.stride_tricks.sliding_window_view(x, lags + 1)[:, ::-1])
    return np.concatenate(found)


@pytest.mark.parametrize("edges", lpc.EDGES)
@pytest.mark.parametrize(("lags", "differencing"), [(0, 2), (1, 0), (7, 1), (64, 2), (150, 0)])
def test_sums_equal_sums_over_all_windows_for_any_blocks(edges, differencing, lags):
    """For whole recordings and for blocks, by inner products and by the FFT."""
    x = process(AR4, 900, 1.0) + 0.3
    signals = [x, x[:100], x[5 : 6 + lags + differencing], x[300:700]]
    expected = windows(signals, lags, edges, differencing, 0.1)
    whole, pieces = (lpc.Statistics(lags, edges, differencing, 0.1) for _ in range(2))
    for signal in signals:
        whole.add(signal)
    pieces.add(x[n : n + 7] for n in range(0, 900, 7))
    pieces.add([x[:3], x[3:3], x[3:100]])
    for signal in signals[2:]:
        pieces.add(signal)
    for found in (whole, pieces):
        assert found.count == len(expected)
        assert found.products() == pytest.approx(expected.T @ expected, rel=1e-9, abs=1e-8)
        assert found.sums() == pytest.approx(expected.sum(0), rel=1e-9, abs=1e-9)


def test_a_non_finite_signal_is_refused_and_changes_nothing():
    sums = lpc.Statistics(2)
    sums.add(np.arange(9.0))
    before = sums.products()
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            sums.add([np.arange(5.0), np.array([1.0, wrong, 2.0]), np.arange(5.0)])
    assert (sums.products() == before).all()
    assert sums.count == 7


# ---- other libraries


@pytest.mark.parametrize("constant", [False, True], ids=["no constant", "constant"])
@pytest.mark.parametrize("differencing", [0, 1])
def test_coefficients_equal_those_of_statsmodels(constant, differencing):
    """`AutoReg` is ordinary least squares, like the covariance method."""
    autoreg = pytest.importorskip(
        "statsmodels.tsa.ar_model", reason="needs statsmodels, of the extra dev"
    ).AutoReg
    x = process(AR4, 4000, 0.01) + 0.2
    theirs = autoreg(np.diff(x, n=differencing), 6, trend="c" if constant else "n").fit()
    sums = lpc.Statistics(6, "covariance", differencing)
    sums.add(x)
    coefficients, c = sums.solve(6, constant=constant, ridge=0.0)
    ours = np.concatenate([[c], coefficients]) if constant else coefficients
    assert ours == pytest.approx(np.asarray(theirs.params), rel=1e-8, abs=1e-10)
    energy = sums.energies(constant=constant, ridge=0.0)[6]
    assert energy == pytest.approx(float((theirs.resid**2).sum()), rel=1e-8)


@pytest.mark.parametrize("kind", ["aic", "bic"])
@pytest.mark.parametrize("constant", [False, True], ids=["no constant", "constant"])
def test_criteria_equal_those_of_statsmodels(kind, constant):
    others = pytest.importorskip(
        "statsmodels.tsa.ar_model", reason="needs statsmodels, of the extra dev"
    )
    x = process(AR4, 800, 1.0)
    theirs = getattr(others.ar_select_order(x, 9, ic=kind, trend="c" if constant else "n"), kind)
    theirs = {len(lags) if lags else 0: float(np.ravel(value)[0]) for lags, value in theirs.items()}
    expected = np.array([theirs[order] for order in range(10)])
    sums = lpc.Statistics(9)
    sums.add(x)
    found = lpc.criterion(
        sums.energies(constant=constant, ridge=0.0), sums.count, kind, constant=constant
    )
    assert found - found[0] == pytest.approx(expected - expected[0], rel=1e-8, abs=1e-6)


def test_the_autocorrelation_method_solves_yule_walker():
    """scipy solves the Toeplitz equations of the autocorrelation of the whole signal."""
    x = process(AR4, 500, 1.0)
    r = np.correlate(x, x, "full")[len(x) - 1 :][:9]
    sums = lpc.Statistics(8, "autocorrelation")
    sums.add(x)
    assert sums.solve(8, ridge=0.0)[0] == pytest.approx(
        scipy.linalg.solve_toeplitz(r[:8], r[1:]), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("order", [2, 5, 33, 64])
def test_reflection_keeps_the_shape_of_the_spectrum(order):
    """With poles inside and outside, the magnitude changes by one factor at all frequencies."""
    random = np.random.default_rng(order)
    radius, angle = random.uniform(0.5, 1.15, order // 2), random.uniform(0.1, 3.0, order // 2)
    radius[0] = 1.1
    roots = np.concatenate(
        [radius * np.exp(1j * angle), radius * np.exp(-1j * angle), [1.05] * (order % 2)]
    )
    coefficients = -np.poly(roots).real[1:]
    moved = lpc.reflected(coefficients)
    assert np.abs(lpc.poles(coefficients)).max() > 1 > np.abs(lpc.poles(moved)).max()
    ratio = [
        scipy.signal.freqz([1.0], np.concatenate([[1.0], -a]).tolist(), 64)[1]
        for a in (coefficients, moved)
    ]
    ratio = np.abs(ratio[0]) / np.abs(ratio[1])
    assert ratio == pytest.approx(ratio[0], rel=1e-4)
    stable = -np.poly(roots * 0.9 / np.maximum(np.abs(roots), 0.9)).real[1:]
    assert (lpc.reflected(stable) == stable).all()


def unstable_model(stabilise: bool) -> Linear:
    """Fit a growing oscillation, whose best predictor has poles outside the unit circle."""
    n = np.arange(400)
    x = 1e-3 * 1.01**n * np.cos(0.3 * n)
    assert 0.01 < np.abs(x).max() < 1
    return fit_linear(
        x, sample_rate=8000, order=2, grid="linear", stabilise=stabilise, law="laplace"
    )


def test_poles_outside_the_unit_circle_are_reported_and_reflected_on_request():
    with pytest.warns(
        UserWarning, match=r"2 of 2 poles lie outside the unit circle, the largest at 1\.01"
    ):
        grows = unstable_model(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stays = unstable_model(True)
    outside, inside = grows.poles(), stays.poles()
    assert np.abs(outside) == pytest.approx([1.01, 1.01], abs=2e-3)
    assert sorted(inside, key=np.imag) == pytest.approx(
        sorted(1 / np.conj(outside), key=np.imag), abs=1e-9
    )
    # Audio of the stabilised model stays within the fitted level; the other one's exceeds it.
    loud = [
        generate(model, samples=8000, seed=3, engine="numba").abs().max()
        for model in (grows, stays)
    ]
    assert loud[0] > 0.99
    assert loud[1] < 0.9


def test_pieces_are_few_and_evenly_spread(monkeypatch):
    monkeypatch.setattr(fitting, "_PIECES", 40)
    grid = Grid("mulaw", 256)
    pieces = fitting._Pieces(3, grid)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 256, length) for length in (100, 5, 3000, 1, 800, 16)]
    for row in rows:
        pieces.begin()
        for start in range(0, len(row), 37):
            pieces.push(row[start : start + 37])
        pieces.end()
    every = []
    for row in rows:
        padded = np.concatenate([np.full(3, grid.silence), row])
        every += [padded[n : n + 3 + fitting._PIECE] for n in range(0, len(row), fitting._PIECE)]
    assert 20 < len(pieces.kept) <= 40
    expected = every[:: pieces.stride]
    assert [piece.tolist() for piece in pieces.kept] == [piece.tolist() for piece in expected]
