"""Fitting a linear model: one pass over any number of recordings, in bounded memory.

    recordings -> codes -+-> sums of products (`wavear.models.lpc`) -> coefficients --+
                         +-> pieces spread over all of them -> residuals -> scale by maximum
                         likelihood -> Linear

The coefficients minimise the residual energy, whatever distribution follows. The scale maximises
the likelihood of the codes themselves, integrated over their intervals: a minimum of one variable,
found on at most a quarter of a million samples, pieces spread evenly over the recordings.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wavear.audio.grid import Grid
from wavear.audio.scale import limited
from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError, require
from wavear.models import lpc
from wavear.models.linear import DOMAINS, LAWS, Linear, LinearConfig

METHODS = (*lpc.EDGES, "burg")
MAX_ORDER = 64
_ENCODED = 2**20  # samples of a recording that are encoded at once
_PIECE = 8  # consecutive samples: few, since loud stretches last long and neighbours are alike
_PIECES = 2**15  # at most, of the recordings

Order = int | Literal["aic", "bic"]


def fit_linear(
    recordings: Tensor | np.ndarray | Iterable[Tensor | np.ndarray],
    *,
    sample_rate: int,
    order: Order = 32,
    max_order: int = MAX_ORDER,
    differencing: int = 0,
    law: str = "auto",
    domain: str = "linear",
    grid: str = "mulaw",
    classes: int = 0,
    method: str = "covariance",
    constant: bool = False,
    ridge: float = lpc.RIDGE,
    stabilise: bool = False,
) -> Linear:
    """Fit an AR(p) or ARI(p, d) model to recordings, in closed form.

    Parameters
    ----------
    recordings : Tensor or array, shape (T,) or (B, T), or an iterable of them, shape (T_i,)
        In [-1, 1], read once, one in memory at a time. They are seen through the codes of `grid`,
        as the model sees them.
    sample_rate : int
        Of the recordings, in Hz.
    order : int, "aic" or "bic"
        Lags p; or the best by an information criterion, up to `max_order` (for long recordings
        mostly `max_order`: sound is not an autoregressive process, and every lag helps a little).
    max_order : int
        The largest order that a criterion may choose.
    differencing : int
        Order d of the differences that are predicted.
    law : "laplace", "gaussian" or "auto"
        Distribution of the residual; auto: the likelier one.
    domain : "linear", "companded" or "auto"
        Signal that is predicted, samples or mu-law companded values; auto: the likelier one.
    grid : "mulaw" or "linear"
    classes : int
        Codes; 0: 256 of mu-law, 65536 linear ones (16 bits).
    method : str
        "covariance": least squares over the samples with a whole past, as statsmodels' `AutoReg`.
        "silence": over all of them, silence before the first, as the model is scored.
        "autocorrelation": Yule-Walker, always stable. "burg": of one recording, always stable.
    constant : bool
        Fit a constant too.
    ridge : float
        On the diagonal of the normal equations, as a share of the mean power.
    stabilise : bool
        Move poles outside the unit circle inside, to 1 / conj(pole). Otherwise warn about them.

    Returns
    -------
    Linear

    Raises
    ------
    WavearError
        If an argument is out of range, or there is nothing to fit to.

    Examples
    --------
    >>> x = np.sin(np.arange(8000) / 5) / 2
    >>> model = fit_linear(x, sample_rate=8000, order=2)
    >>> (model.coefficients / 2).tolist()  # cos(1 / 5) = 0.980 and -0.5 but for the codes
    [0.97..., -0.49...]
    """
    fitter = Fitter(
        Grid(grid, classes or (65536 if grid == "linear" else 256)),  # type: ignore[arg-type]  # it checks both
        order=order,
        max_order=max_order,
        differencing=differencing,
        law=law,
        domain=domain,
        method=method,
        constant=constant,
        ridge=ridge,
    )
    for recording in _each(recordings):
        fitter.begin()
        for start in range(0, len(recording), _ENCODED):
            fitter.push(fitter.grid.encode(recording[start : start + _ENCODED]))
        fitter.end()
    fitted = fitter.fit(sample_rate, stabilise=stabilise)
    if fitted.unstable:
        warnings.warn(f"{fitted.unstable}; stabilise=True moves them inside", stacklevel=2)
    return fitted.model


@dataclass(frozen=True)
class Fitted:
    """A model, and how well it fits."""

    model: Linear
    nats: float
    """Mean negative log-probability of the codes it was fitted to (of pieces of them)."""
    samples: int
    """Samples that the coefficients were fitted to."""
    criteria: np.ndarray | None
    """The information criterion of each order from 0 on, if one was asked for."""
    unstable: str
    """A warning about poles outside the unit circle; empty without any."""


class Fitter:
    """Sums over recordings, and pieces for the scale, collected in one pass. See `fit_linear`.

    Call `begin`, `push` with the codes of a recording block by block, and `end`, for each
    recording; then `fit`.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        order: Order = 32,
        max_order: int = MAX_ORDER,
        differencing: int = 0,
        law: str = "auto",
        domain: str = "linear",
        method: str = "covariance",
        constant: bool = False,
        ridge: float = lpc.RIDGE,
    ):
        named = {
            "law": (law, (*LAWS, "auto")),
            "domain": (domain, (*DOMAINS, "auto")),
            "method": (method, METHODS),
        }
        for name, (value, known) in named.items():
            if value not in known:
                raise WavearError(f"{name} is {value!r}, it must be one of {', '.join(known)}")
        if isinstance(order, str) and order not in ("aic", "bic"):
            raise WavearError(f"order is {order!r}, it must be a whole number, aic or bic")
        if not 0 <= ridge < math.inf:
            raise WavearError(f"ridge is {ridge!r}, it must be 0 or more")
        if method == "burg" and constant:
            raise WavearError(
                "method 'burg' has no constant: leave constant False, or choose another method"
            )
        self.grid, self.order, self.differencing = grid, order, differencing
        self.method, self.constant, self.ridge = method, constant, ridge
        self.laws = LAWS if law == "auto" else (law,)
        if domain == "auto":
            domains = DOMAINS if grid.kind == "mulaw" else ("linear",)
        else:
            domains = (domain,)
        lags = max_order if isinstance(order, str) else order
        edges: Any = "covariance" if method == "burg" else method
        self._values, self._sums = {}, {}
        for name in domains:
            # Its configuration checks the remaining arguments.
            values = Linear(self._config(lags, self.laws[0], name)).values.numpy()
            self._values[name] = values
            silence = float(values[grid.silence])
            self._sums[name] = lpc.Statistics(lags, edges, differencing, silence)
        self._pieces = _Pieces(lags + differencing, grid)
        self._adding: list[lpc.Adding] = []
        self._signal: list[np.ndarray] = []  # codes of the one recording, for Burg's method
        self._recordings = 0

    def _config(self, order: int, law: str, domain: str, sample_rate: int = 22050) -> LinearConfig:
        return LinearConfig(
            order=order,
            differencing=self.differencing,
            law=law,
            domain=domain,
            grid=self.grid.kind,
            classes=self.grid.classes,
            sample_rate=sample_rate,
        )

    def begin(self) -> None:
        """Begin a recording."""
        self._recordings += 1
        if self.method == "burg" and self._recordings > 1:
            raise WavearError(
                "method 'burg' is for one recording: choose covariance or autocorrelation"
            )
        self._adding = [sums.begin() for sums in self._sums.values()]
        self._pieces.begin()

    def push(self, codes: np.ndarray | Tensor) -> None:
        """Add its next codes (n,)."""
        codes = np.asarray(codes)
        for adding, values in zip(self._adding, self._values.values(), strict=True):
            adding.push(values[codes])
        self._pieces.push(codes)
        if self.method == "burg":
            self._signal.append(codes)

    def end(self) -> None:
        """End the recording."""
        for adding in self._adding:
            adding.close()
        self._pieces.end()

    def fit(self, sample_rate: int = 22050, *, stabilise: bool = False) -> Fitted:
        """Return the likeliest model of the recordings.

        Raises
        ------
        WavearError
            If there were no samples, or too few.
        """
        found = [
            self._fit(domain, law, sample_rate, stabilise)
            for domain in self._sums
            for law in self.laws
        ]
        return min(found, key=lambda fitted: fitted.nats)

    def _fit(self, domain: str, law: str, sample_rate: int, stabilise: bool) -> Fitted:
        coefficients, constant, criteria = self._coefficients(domain)
        sizes = np.abs(lpc.poles(coefficients))
        outside, unstable = int((sizes > 1).sum()), ""
        if outside and stabilise:
            coefficients = lpc.reflected(coefficients)
        elif outside:
            unstable = (
                f"{outside} of {len(coefficients)} poles lie outside the unit circle, the largest "
                f"at {sizes[0]:.4f}: generated audio may grow until it is clipped"
            )
        model = Linear(self._config(len(coefficients), law, domain, sample_rate))
        model.set(coefficients, constant, 1.0)
        values = self._values[domain]
        predictions, codes = self._pieces.predicted(values, model.taps().detach().numpy(), constant)
        scale, nats = _likeliest_scale(model, predictions, codes, values)
        model.set(coefficients, constant, scale)
        return Fitted(model.eval(), nats, self._sums[domain].count, criteria, unstable)

    def _coefficients(self, domain: str) -> tuple[np.ndarray, float, np.ndarray | None]:
        """Return coefficients, constant, and the criteria of all orders if one was asked for."""
        sums, criteria, signal = self._sums[domain], None, np.zeros(0)
        order = sums.lags if isinstance(self.order, str) else self.order
        if self.method == "burg":
            signal = self._values[domain][np.concatenate([np.zeros(0, np.int64), *self._signal])]
            signal = np.diff(signal, n=self.differencing)
        if isinstance(self.order, str):
            if self.method == "burg":
                energies, count = lpc.burg(signal, order)[1] * len(signal), len(signal)
            else:
                energies = sums.energies(constant=self.constant, ridge=self.ridge)
                count = sums.count
            criteria = lpc.criterion(energies, count, self.order, constant=self.constant)  # type: ignore[arg-type]
            least = 0 if self.differencing else 1  # a model sees some of the past
            order = least + int(np.argmin(criteria[least:]))
        if self.method == "burg":
            return lpc.burg(signal, order)[0], 0.0, criteria
        return *sums.solve(order, constant=self.constant, ridge=self.ridge), criteria


class _Pieces:
    """Codes of evenly spread pieces of recordings, each with its past; at most `_PIECES`.

    Piece i of all is kept where i is a multiple of a stride, which doubles when there are too many.
    """

    def __init__(self, past: int, grid: Grid):
        self.past, self.grid = past, grid
        self.small = np.uint8 if grid.classes <= 256 else np.uint16
        self.kept: list[np.ndarray] = []
        self.stride, self.seen = 1, 0
        self._waiting = np.zeros(0, self.small)

    def begin(self) -> None:
        self._waiting = np.full(self.past, self.grid.silence, self.small)

    def push(self, codes: np.ndarray) -> None:
        joined = np.concatenate([self._waiting, codes.astype(self.small)])
        whole = max((len(joined) - self.past) // _PIECE, 0)
        n = -self.seen % self.stride
        while n < whole:
            self._keep(joined[n * _PIECE : (n + 1) * _PIECE + self.past])
            n += self.stride  # a multiple also of a stride that has just doubled: `_PIECES` is even
        self.seen += whole
        self._waiting = joined[whole * _PIECE :].copy()

    def end(self) -> None:
        if len(self._waiting) > self.past:
            if self.seen % self.stride == 0:
                self._keep(self._waiting)
            self.seen += 1

    def _keep(self, piece: np.ndarray) -> None:
        self.kept.append(piece.copy())
        if len(self.kept) > _PIECES:
            self.kept, self.stride = self.kept[::2], 2 * self.stride

    def predicted(
        self, values: np.ndarray, taps: np.ndarray, constant: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return prediction and code of every sample of the pieces, (n,) each."""
        if not self.kept:
            raise WavearError("there are no samples to fit to")
        predictions = [
            constant + np.convolve(values[piece[self.past - len(taps) : -1]], taps, "valid")
            for piece in self.kept
        ]
        codes = [piece[self.past :] for piece in self.kept]
        return np.concatenate(predictions), np.concatenate(codes).astype(np.int64)


def _likeliest_scale(
    model: Linear, predictions: np.ndarray, codes: np.ndarray, values: np.ndarray
) -> tuple[float, float]:
    """Return the scale of maximum likelihood, and the mean negative log-probability in nats."""
    from scipy.optimize import minimize_scalar

    given, means, law = torch.from_numpy(codes)[None], torch.from_numpy(predictions), model.law

    def nats(log_scale: float) -> float:
        parameters = torch.stack([means, torch.full_like(means, log_scale)])[None]
        return -float(law.log_prob(parameters, given).mean())

    spread = float(np.abs(values[codes] - predictions).mean())
    middle = math.log(max(spread, model.predicted_grid.finest / 10))
    # A scale off by 0.1 % costs less than a millionth of a bit.
    found: Any = minimize_scalar(
        nats, bounds=(middle - 4, middle + 4), method="bounded", options={"xatol": 5e-4}
    )
    return math.exp(found.x), float(found.fun)


def _each(recordings: Any) -> Iterator[Tensor]:
    """Yield every recording as a tensor (T,)."""
    if isinstance(recordings, Tensor | np.ndarray):
        recordings = [recordings] if recordings.ndim == 1 else recordings
    expected = "a tensor or array (T,) or (B, T), or an iterable of them"
    require(recordings, Iterable, "recordings", expected)
    for number, recording in enumerate(recordings):
        waveform = as_tensor(recording, f"recording {number}").cpu()
        if waveform.dim() != 1:
            raise WavearError(
                f"recording {number} has shape {tuple(waveform.shape)}, expected (T,)"
            )
        if not waveform.is_floating_point():
            raise WavearError(
                f"recording {number} is {waveform.dtype}, expected floating point in [-1, 1]"
            )
        yield limited(waveform, f"recording {number}", warnings.warn)
