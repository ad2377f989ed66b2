"""Linear prediction in closed form: x[t] = c + a[1] x[t-1] + ... + a[p] x[t-p] + e[t].

Least squares over any number of recordings from sufficient statistics, sums of products of a signal
with itself that are added up block by block in float64; or, for one signal, Burg's method. The
edges define which samples are predicted, and the values beyond the ends, hence which method of the
literature it is (Makhoul, 1975, "Linear prediction: a tutorial review"; P: the longest lag):

- "covariance": every sample that has P samples before it. Ordinary least squares, as statsmodels'
  `AutoReg`.
- "autocorrelation": zeros on both sides, and all samples that see any of the signal. The
  Yule-Walker equations, whose solution is always stable.
- "silence": every sample, the first ones after silence, as a model that begins in silence is
  scored.

The sums over t of x[t-i] x[t-j], for all i and j up to P, follow from those with i = 0 and from the
P first and the P last samples of each recording, without rounding but that of the additions:

    C[i, j] = sum over t = P ... N-1 of x[t-i] x[t-j]
    C[i+1, j+1] = C[i, j] + x[P-1-i] x[P-1-j] - x[N-1-i] x[N-1-j]

So a block costs P + 1 inner products (or one correlation by FFT), and a recording P * P operations
more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from wavear.common.errors import WavearError

Edges = Literal["covariance", "autocorrelation", "silence"]
EDGES: tuple[str, ...] = get_args(Edges)
RIDGE = 1e-9
"""Share of the mean power, on the diagonal: less than the noise of rounding loud sound to 16 bits,
enough for signals that one lag less predicts exactly."""
_BLOCK = 2**16  # samples at once


class Statistics:
    """Sums over recordings from which the predictors of all orders up to `lags` follow.

    Parameters
    ----------
    lags : int
        The longest lag P, 0 or more.
    edges : str
        "covariance", "autocorrelation" or "silence": see above.
    differencing : int
        Predict the d-th difference of the signal, x[t] - x[t-1] for 1, from its own past.
    silence : float
        Value before the first sample with the edges "silence".

    Examples
    --------
    >>> x = np.sin(np.arange(1000) / 5)
    >>> once, twice = Statistics(2), Statistics(2)
    >>> once.add(x)
    >>> twice.add([x[:400], x[400:]])  # one recording in blocks
    >>> bool(np.allclose(once.products(), twice.products()))
    True
    >>> coefficients, constant = once.solve(2)
    >>> bool(np.allclose(coefficients, [2 * np.cos(1 / 5), -1], atol=1e-4))
    True
    """

    def __init__(
        self, lags: int, edges: Edges = "covariance", differencing: int = 0, silence: float = 0.0
    ):
        if edges not in EDGES:
            raise WavearError(f"edges is {edges!r}, it must be one of {', '.join(EDGES)}")
        self.lags, self.edges, self.differencing, self.silence = lags, edges, differencing, silence
        self.count = 0
        """Samples predicted."""
        self._row = np.zeros(lags + 1)  # C[0, j]
        self._steps = np.zeros((lags, lags))  # C[i+1, j+1] - C[i, j]
        self._sum = 0.0  # of x[t]
        self._sum_steps = np.zeros(lags)  # that of x[t-i-1] less that of x[t-i]

    def begin(self) -> Adding:
        """Begin to add a recording that comes in blocks."""
        return Adding(self)

    def add(self, signal: np.ndarray | Iterable[np.ndarray]) -> None:
        """Add a recording.

        Parameters
        ----------
        signal : array, shape (T,), or an iterable of arrays, shape (T_i,)
            The whole, or its consecutive blocks: memory is needed for one of them.

        Raises
        ------
        WavearError
            If a sample is NaN or infinite; nothing is added then.
        """
        adding = self.begin()
        for block in [signal] if isinstance(signal, np.ndarray) else signal:
            adding.push(block)
        adding.close()

    def products(self) -> np.ndarray:
        """Return the sums of x[t-i] x[t-j], (P + 1, P + 1)."""
        size = self.lags + 1
        found = np.empty((size, size))
        found[0] = self._row
        found[:, 0] = self._row
        for i in range(self.lags):
            found[i + 1, 1:] = found[i, :-1] + self._steps[i]
        return found

    def sums(self) -> np.ndarray:
        """Return the sums of x[t-i], (P + 1,)."""
        return self._sum + np.concatenate([[0.0], np.cumsum(self._sum_steps)])

    def solve(
        self, order: int, *, constant: bool = False, ridge: float = RIDGE
    ) -> tuple[np.ndarray, float]:
        """Return the predictor of least residual energy, over the samples that all P lags see.

        Parameters
        ----------
        order : int
            0 to P.
        constant : bool
            Fit c too; otherwise it is 0.
        ridge : float
            Share of the mean power of the lags, added on the diagonal.

        Returns
        -------
        array, shape (order,)
            a, that of the sample before first.
        float
            c.

        Raises
        ------
        WavearError
            If there are no samples, or the equations have no single solution and `ridge` is 0.
        """
        left, right = self._equations(order, constant, ridge)
        try:
            solution = np.linalg.solve(left, right)
        except np.linalg.LinAlgError:
            raise _singular(order) from None
        return solution[int(constant) :], float(solution[0]) if constant else 0.0

    def energies(self, *, constant: bool = False, ridge: float = RIDGE) -> np.ndarray:
        """Return the residual energy of the best predictors of all orders, (P + 1,).

        From one Cholesky decomposition: with G = L L' for the equations G a = g of the highest
        order, those of order k are its first rows, and the energy that the first k lags take away
        is that of the first k elements of inverse(L) g.
        """
        left, right = self._equations(self.lags, constant, ridge)
        try:
            taken = np.linalg.solve(np.linalg.cholesky(left), right) ** 2 if len(right) else right
        except np.linalg.LinAlgError:
            raise _singular(self.lags) from None
        found = self._row[0] - np.concatenate([[0.0], np.cumsum(taken)])
        return np.maximum(found[int(constant) :], 1e-30)

    def _equations(self, order: int, constant: bool, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the normal equations, those of the constant first."""
        if not self.count:
            raise WavearError(
                f"there are no samples to fit to: no recording is longer than {self.lags} samples"
            )
        lags, products = slice(1, order + 1), self.products()
        left, right = products[lags, lags].copy(), products[lags, 0].copy()
        left += ridge * max(float(np.trace(left)) / max(order, 1), 1e-30) * np.eye(order)
        if constant:
            sums = self.sums()
            left = np.block(
                [[np.full((1, 1), self.count), sums[None, lags]], [sums[lags, None], left]]
            )
            right = np.concatenate([sums[:1], right])
        return left, right


def _singular(order: int) -> WavearError:
    return WavearError(
        f"fewer than {order} lags predict these recordings exactly: give a ridge above 0"
    )


class Adding:
    """A recording in blocks, added to `Statistics` when it is closed."""

    def __init__(self, statistics: Statistics):
        self._to = statistics
        self._before = np.zeros(0)  # the last samples, from which the next differences are made
        self._past = np.zeros(0)  # the last differences
        self._first: np.ndarray | None = None  # the P first of them
        self._count, self._row, self._sum = 0, np.zeros(statistics.lags + 1), 0.0
        if statistics.edges == "silence":
            self.push(np.full(statistics.lags + statistics.differencing, statistics.silence))
        elif statistics.edges == "autocorrelation":
            self._take(np.zeros(statistics.lags))

    def push(self, block: np.ndarray) -> None:
        """Add the next samples (n,)."""
        block, order = np.asarray(block, dtype=np.float64), self._to.differencing
        if order:
            joined = np.concatenate([self._before, block])
            self._before = joined[max(len(joined) - order, 0) :]
            block = np.diff(joined, n=order) if len(joined) > order else joined[:0]
        self._take(block)

    def _take(self, block: np.ndarray) -> None:
        from scipy.signal import correlate

        lags = self._to.lags
        for start in range(0, len(block), _BLOCK):
            new = block[start : start + _BLOCK]
            joined = np.concatenate([self._past, new])
            self._past = joined[max(len(joined) - lags, 0) :]
            if self._first is None:
                if len(joined) < lags:
                    continue
                self._first, new = joined[:lags], joined[lags:]
            if len(new):
                # The sums over t of x[t] x[t-j] for j = 0 ... P, by inner products or by FFT.
                self._row += correlate(joined, new, "valid")[::-1]
                self._sum += float(new.sum())
                self._count += len(new)

    def close(self) -> None:
        """End the recording.

        Raises
        ------
        WavearError
            If a sample is NaN or infinite; nothing is added then.
        """
        to = self._to
        if to.edges == "autocorrelation":
            self._take(np.zeros(to.lags))
        if not (np.isfinite(self._row).all() and np.isfinite(self._past).all()):
            raise WavearError("the signal holds NaN or infinity")
        if self._first is None or not self._count:
            return  # it is shorter than the longest lag: no sample can be predicted
        first, last = self._first[::-1], self._past[::-1]  # x[P-1-i], x[N-1-i]
        to.count += self._count
        to._row += self._row
        to._steps += np.outer(first, first) - np.outer(last, last)
        to._sum += self._sum
        to._sum_steps += first - last


def criterion(
    energies: np.ndarray, count: int, kind: Literal["aic", "bic"], *, constant: bool = False
) -> np.ndarray:
    """Return an information criterion of each order, of a normal distribution; less is better.

    count * log(energy / count) + penalty * (order + 1 for the scale + 1 for a constant), with a
    penalty of 2 (Akaike, 1974) or log(count) (Schwarz, 1978); terms that all orders share are left
    out.

    Parameters
    ----------
    energies : array, shape (P + 1,)
        Residual energy of the best predictor of each order over the same samples:
        `Statistics.energies`.
    count : int
        Samples predicted.
    """
    penalty = {"aic": 2.0, "bic": float(np.log(count))}[kind]
    return count * np.log(energies / count) + penalty * (np.arange(len(energies)) + 1 + constant)


def burg(signal: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit one signal by Burg's method ("Maximum entropy spectral analysis", 1975).

    Always stable, and sharp on short signals; it needs the whole signal at once, and order times
    its length operations. librosa.lpc finds the same coefficients, but not the energies of all
    orders, which the information criteria need.

    Parameters
    ----------
    signal : array, shape (T,)
        Longer than `order`.
    order : int

    Returns
    -------
    array, shape (order,)
        Coefficients, that of the sample before first.
    array, shape (order + 1,)
        Mean residual energy of each order.

    Raises
    ------
    WavearError
        If the signal is too short.
    """
    forward = backward = np.asarray(signal, dtype=np.float64)
    if len(forward) <= order:
        raise WavearError(
            f"the signal has {len(forward)} samples, order {order} needs more than that"
        )
    energies = [float(forward @ forward) / len(forward)]
    coefficients = np.zeros(0)
    for _ in range(order):
        forward, backward = forward[1:], backward[:-1]
        both = float(forward @ forward + backward @ backward)
        reflection = 2 * float(forward @ backward) / both if both > 0 else 0.0
        coefficients = np.append(coefficients - reflection * coefficients[::-1], reflection)
        forward, backward = forward - reflection * backward, backward - reflection * forward
        energies.append(energies[-1] * max(1 - reflection**2, 0.0))
    return coefficients, np.maximum(energies, 1e-30)


def poles(coefficients: np.ndarray) -> np.ndarray:
    """Return the poles of the recursion, largest first: stable if all are in the unit circle.

    Examples
    --------
    >>> poles(np.array([1.5, -0.5])).tolist()
    [1.0, 0.5]
    """
    found = np.roots(np.concatenate([[1.0], -np.asarray(coefficients)]))
    return found[np.argsort(-np.abs(found), kind="stable")]


def reflected(coefficients: np.ndarray) -> np.ndarray:
    """Return the coefficients with each pole p outside the unit circle moved to 1 / conj(p).

    The recursion's spectrum keeps its shape; its level changes by the product of abs(p). Each such
    pole is divided out and its reflection multiplied in, one by one; the others stay untouched.

    Examples
    --------
    >>> reflected(np.array([2.5, -1.0])).round(6).tolist()  # poles 2 and 0.5
    [1.0, -0.25]
    """
    from scipy.signal import lfilter

    # 1 - a[1] / z - a[2] / z^2 - ..., in powers of 1 / z
    polynomial = np.concatenate([[1.0], -np.asarray(coefficients)]).astype(complex)
    for pole in poles(coefficients):
        if abs(pole) <= 1:
            break
        # polynomial = quotient * (1 - pole / z), from the highest power down: errors shrink by
        # abs(pole) at each step.
        quotient = np.asarray(lfilter([-1 / pole], [1, -1 / pole], polynomial[:0:-1]))[::-1]
        polynomial = np.convolve(quotient, [1, -1 / np.conj(pole)])
    return -np.real(polynomial)[1:]
