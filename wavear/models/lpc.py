"""Linear prediction in closed form: x[t] = c + a[1] x[t-1] + ... + a[p] x[t-p] + e[t].

Least squares over any number of recordings from sufficient statistics, sums of products of a signal
with itself that are added up block by block in float64; or, for one signal, Burg's method. Which
samples are predicted, and what stands beyond the ends, is the edge of the problem, and decides
which method of the literature it is (Makhoul, 1975, "Linear prediction: a tutorial review"; P: the
longest lag):

- "covariance": every sample that has P samples before it, and nothing is made up. Ordinary least
  squares, as
  statsmodels' `AutoReg`.
- "autocorrelation": zeros on both sides, and all samples that see any of the signal. The
  Yule-Walker equations, whose
  solution is always stable.
- "silence": every sample, the first ones after silence. What a model that begins in silence is
  scored on.

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

Edges = Literal["covariance", "autocorrelation", "silence"]
EDGES: tuple[str, ...] = get_args(Edges)
RIDGE = 1e-9
"""Of the mean power, on the diagonal: less than what rounding to 16 bits adds to loud sound, enough for signals that
one lag less predicts exactly."""
_BLOCK = 2**16  # samples at once
_DIRECT = 64  # lags up to which inner products are faster than the FFT


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
        What stands before the first sample with the edges "silence".

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
        if lags < 0 or differencing < 0:
            raise ValueError(
                f"lags is {lags} and differencing {differencing}, they must be 0 or more"
            )
        if edges not in EDGES:
            raise ValueError(f"edges is {edges!r}, it must be one of {', '.join(EDGES)}")
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
        ValueError
            If a sample is NaN or infinite; nothing is added then.
        """
        adding = self.begin()
        for block in [signal] if isinstance(signal, np.ndarray) else signal:
            adding.push(block)
        adding.close()

    def __iadd__(self, other: Statistics) -> Statistics:
        """Add what others have summed up over other recordings."""
        ours, theirs = ((s.lags, s.edges, s.differencing, s.silence) for s in (self, other))
        if ours != theirs:
            raise ValueError(
                f"these are sums of another kind: (lags, edges, differencing, silence) {theirs}, not {ours}"
            )
        self.count += other.count
        self._row += other._row
        self._steps += other._steps
        self._sum += other._sum
        self._sum_steps += other._sum_steps
        return self

    def products(self) -> np.ndarray:
        """The sums of x[t-i] x[t-j], (P + 1, P + 1)."""
        size = self.lags + 1
        found = np.empty((size, size))
        found[0] = self._row
        found[:, 0] = self._row
        for i in range(self.lags):
            found[i + 1, 1:] = found[i, :-1] + self._steps[i]
        return found

    def sums(self) -> np.ndarray:
        """The sums of x[t-i], (P + 1,)."""
        return self._sum + np.concatenate([[0.0], np.cumsum(self._sum_steps)])

    def solve(
        self, order: int, *, constant: bool = False, ridge: float = RIDGE
    ) -> tuple[np.ndarray, float]:
        """The predictor of so many lags that leaves the least energy, over the samples that all lags up to P see.

        Parameters
        ----------
        order : int
            0 to P.
        constant : bool
            Fit c too; otherwise it is 0.
        ridge : float
            Of the mean power of the lags, added on the diagonal.

        Returns
        -------
        array, shape (order,)
            a, that of the sample before first.
        float
            c.

        Raises
        ------
        ValueError
            If there are no samples, or the equations have no single solution and `ridge` is 0.
        """
        left, right = self._equations(order, constant)
        places = np.arange(int(constant), order + int(constant))
        left[places, places] += ridge * max(
            float(left[places, places].sum()) / max(order, 1), 1e-30
        )
        try:
            solution = np.linalg.solve(left, right)
        except np.linalg.LinAlgError:
            raise ValueError(
                f"fewer than {order} lags predict these recordings exactly: give a ridge above 0"
            ) from None
        return solution[int(constant) :], float(solution[0]) if constant else 0.0

    def energy(self, coefficients: np.ndarray, constant: float = 0.0) -> float:
        """The sum of the squares of what a predictor leaves over."""
        order = len(coefficients)
        weights = np.concatenate([[1.0], -np.asarray(coefficients)])
        left = float(weights @ self.products()[: order + 1, : order + 1] @ weights)
        linear = float(weights @ self.sums()[: order + 1])
        return max(left - 2 * constant * linear + self.count * constant**2, 0.0)

    def energies(self, *, constant: bool = False, ridge: float = RIDGE) -> np.ndarray:
        """`energy` of the best predictors of all orders, (P + 1,), from one Cholesky decomposition.

        With G = L L' for the equations G a = g of the highest order, those of order k are its first
        rows, and the energy that the first k lags take away is that of the first k elements of
        inverse(L) g.
        """
        left, right = self._equations(self.lags, constant)
        places = np.arange(int(constant), len(right))
        left[places, places] += ridge * max(
            float(left[places, places].sum()) / max(self.lags, 1), 1e-30
        )
        try:
            taken = np.linalg.solve(np.linalg.cholesky(left), right) ** 2 if len(right) else right
        except np.linalg.LinAlgError:
            raise ValueError(
                f"fewer than {self.lags} lags predict these recordings exactly: raise the ridge"
            ) from None
        found = self._row[0] - np.concatenate([[0.0], np.cumsum(taken)])
        return np.maximum(found[int(constant) :], 1e-30)

    def _equations(self, order: int, constant: bool) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= order <= self.lags:
            raise ValueError(f"order is {order}, and products were summed up to lag {self.lags}")
        if not self.count:
            raise ValueError(
                f"there are no samples to fit to: no recording is longer than {self.lags} samples"
            )
        products = self.products()
        left, right = (
            products[1 : order + 1, 1 : order + 1].copy(),
            products[1 : order + 1, 0].copy(),
        )
        if constant:
            sums = self.sums()
            left = np.block(
                [
                    [np.array([[float(self.count)]]), sums[None, 1 : order + 1]],
                    [sums[1 : order + 1, None], left],
                ]
            )
            right = np.concatenate([sums[:1], right])
        return left, right


class Adding:
    """A recording on its way into `Statistics`, block by block: they take it in when it is closed."""

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
        """The next samples (n,)."""
        block, order = np.asarray(block, dtype=np.float64), self._to.differencing
        if order:
            joined = np.concatenate([self._before, block])
            self._before = joined[max(len(joined) - order, 0) :]
            block = np.diff(joined, n=order) if len(joined) > order else joined[:0]
        self._take(block)

    def _take(self, block: np.ndarray) -> None:
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
                self._row += _inner_products(joined, new)
                self._sum += float(new.sum())
                self._count += len(new)

    def close(self) -> None:
        """The recording has ended.

        Raises
        ------
        ValueError
            If a sample is NaN or infinite; nothing is added then.
        """
        to = self._to
        if to.edges == "autocorrelation":
            self._take(np.zeros(to.lags))
        if not (np.isfinite(self._row).all() and np.isfinite(self._past).all()):
            raise ValueError("the signal holds NaN or infinity")
        if self._first is None or not self._count:
            return  # it is shorter than the longest lag: no sample can be predicted
        first, last = self._first[::-1], self._past[::-1]  # x[P-1-i], x[N-1-i]
        to.count += self._count
        to._row += self._row
        to._steps += np.outer(first, first) - np.outer(last, last)
        to._sum += self._sum
        to._sum_steps += first - last


def _inner_products(joined: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The sums over t of x[t] x[t-j] for j = 0 ... P, of a block (n,) and it with the P samples before it (P + n,)."""
    lags = len(joined) - len(block)
    if lags <= _DIRECT:
        return np.correlate(joined, block, "valid")[::-1]
    from scipy.signal import correlate

    return correlate(joined, block, "valid", method="fft")[::-1]


def criterion(
    energies: np.ndarray, count: int, kind: Literal["aic", "bic"], *, constant: bool = False
) -> np.ndarray:
    """An information criterion of each order, the less the better: of a normal law, up to what all orders share.

    count * log(energy / count) + penalty * (order + 1 for the scale + 1 for a constant), with a
    penalty of 2 (Akaike, 1974) or log(count) (Schwarz, 1978).

    Parameters
    ----------
    energies : array, shape (P + 1,)
        What the best predictor of each order leaves over, summed over the same samples:
        `Statistics.energies`.
    count : int
        Samples predicted.
    """
    penalty = {"aic": 2.0, "bic": float(np.log(count))}[kind]
    return count * np.log(energies / count) + penalty * (np.arange(len(energies)) + 1 + constant)


def burg(signal: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Burg's method for one signal: each further lag is the one that the errors forward and backward agree on.

    Always stable, and sharp on short signals; it needs the whole signal at once, and order times
    its length operations. (Burg, 1975, "Maximum entropy spectral analysis".)

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
        Mean energy left over by each order.

    Raises
    ------
    ValueError
        If the signal is too short.
    """
    forward = backward = np.asarray(signal, dtype=np.float64)
    if len(forward) <= order:
        raise ValueError(
            f"the signal has {len(forward)} samples, order {order} needs more than that"
        )
    energies = [float(forward @ forward) / len(forward)]
    coefficients = np.zeros(0)
    for _ in range(order):
        forward, backward = forward[1:], backward[:-1]
        both = float(forward @ forward + backward @ backward)
        reflection = 2 * float(forward @ backward) / both if both > 0 else 0.0
        coefficients = np.concatenate(
            [coefficients - reflection * coefficients[::-1], [reflection]]
        )
        forward, backward = forward - reflection * backward, backward - reflection * forward
        energies.append(energies[-1] * max(1 - reflection**2, 0.0))
    return coefficients, np.maximum(energies, 1e-30)


def poles(coefficients: np.ndarray) -> np.ndarray:
    """Poles of the recursion, the largest first: it is stable where all of them lie inside the unit circle.

    Examples
    --------
    >>> poles(np.array([1.5, -0.5])).tolist()
    [1.0, 0.5]
    """
    found = np.roots(np.concatenate([[1.0], -np.asarray(coefficients)]))
    return found[np.argsort(-np.abs(found), kind="stable")]


def reflected(coefficients: np.ndarray) -> np.ndarray:
    """The coefficients with each pole p outside the unit circle moved inside, to 1 / conj(p).

    The spectrum of what the recursion makes keeps its shape; its level changes by the product of
    abs(p).

    Each such pole is divided out and its reflection multiplied in, by itself; the others are not
    touched.

    Examples
    --------
    >>> reflected(np.array([2.5, -1.0])).round(6).tolist()  # poles 2 and 0.5
    [1.0, -0.25]
    """
    # 1 - a[1] / z - a[2] / z^2 - ..., in powers of 1 / z
    polynomial = np.concatenate([[1.0], -np.asarray(coefficients, dtype=np.float64)]).astype(
        complex
    )
    for pole in poles(coefficients):
        if abs(pole) <= 1:
            break
        # polynomial = quotient * (1 - pole / z), from the highest power down: errors shrink by
        # abs(pole) at each step.
        quotient = np.zeros(len(polynomial) - 1, dtype=complex)
        carried = 0j
        for k in range(len(quotient) - 1, -1, -1):
            carried = (carried - polynomial[k + 1]) / pole
            quotient[k] = carried
        polynomial = np.convolve(quotient, [1, -1 / np.conj(pole)])
    return -np.real(polynomial)[1:]
