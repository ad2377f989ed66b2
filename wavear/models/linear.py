"""Linear prediction as a distribution over codes: AR(p), and ARI(p, d), the same of differences.

    mean[t] = c + sum over k of taps[k] * value(code[t-k])
    P(code) = F((upper - mean) / scale) - F((lower - mean) / scale)

with F the normal or the Laplace distribution of the residual, integrated over the interval of each
code. So it is measured in the same bits per sample as the other families. It is fitted, not
trained: see `wavear.fit_linear`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wavear.audio.grid import Grid
from wavear.common.errors import WavearError
from wavear.models.base import AutoregressiveModel
from wavear.models.config import check_rate, check_whole
from wavear.models.distributions import Gaussian, Laplace, Law, _scale

LAWS = ("laplace", "gaussian")
DOMAINS = ("linear", "companded")
MAX_DIFFERENCING = 64


@dataclass(frozen=True)
class LinearConfig:
    """Configuration of a linear predictor; saved with its coefficients."""

    order: int = 32
    """Lags p of the signal (or of its differences), 0 or more."""
    differencing: int = 0
    """Order d of the differences that are predicted; 1 suits sounds that drift. `order` and it add
    up to 1 or more."""
    law: str = "laplace"
    """Distribution of the residual: laplace or gaussian."""
    grid: str = "mulaw"
    """Grid of the codes: mulaw, or linear (PCM)."""
    classes: int = 0
    """Codes Q, 2 to 65536; 0: 256 mu-law codes, 65536 linear values (16 bits)."""
    domain: str = "linear"
    """Signal that is predicted: samples (linear), or their mu-law companded values (companded),
    evenly spaced codes."""
    sample_rate: int = 22050
    """Rate of the audio, in Hz."""
    mel: None = None
    """It takes no mels."""
    speakers: int = 0
    """It does not distinguish speakers."""

    def __post_init__(self) -> None:
        check_whole(self, order=0, differencing=0)
        if self.order + self.differencing < 1:
            raise WavearError("order is 0 and differencing 0: together they must be 1 or more")
        if self.differencing > MAX_DIFFERENCING:
            raise WavearError(
                f"differencing is {self.differencing}, expected at most {MAX_DIFFERENCING}"
            )
        for name, known in (("law", LAWS), ("domain", DOMAINS)):
            if getattr(self, name) not in known:
                raise WavearError(
                    f"{name} is {getattr(self, name)!r}, it must be {' or '.join(known)}"
                )
        if self.classes == 0:
            object.__setattr__(self, "classes", 65536 if self.grid == "linear" else 256)
        Grid(self.grid, self.classes)  # type: ignore[arg-type]  # it checks both
        if self.domain == "companded" and self.grid != "mulaw":
            raise WavearError("domain is 'companded', the mu-law curve: it needs grid 'mulaw'")
        check_rate(self.sample_rate)
        if self.mel is not None or self.speakers != 0:
            raise WavearError(
                "a linear predictor takes neither mels nor speakers: leave mel None and speakers 0"
            )

    @property
    def receptive_field(self) -> int:
        """Past samples that the next one depends on."""
        return self.order + self.differencing


@dataclass(frozen=True)
class Companded(Grid):
    """The codes of a mu-law grid as companded values: evenly spaced from -1 to 1."""

    @property
    def finest(self) -> float:
        return 2 / (self.classes - 1)

    def encode(self, waveform: Tensor) -> Tensor:  # type: ignore[override]
        """Return the codes of companded values."""
        codes = torch.floor((waveform.clamp(-1, 1) + 1) / 2 * (self.classes - 1) + 0.5)
        return codes.to(torch.int64)

    def values(self) -> np.ndarray:
        return np.arange(self.classes) / (self.classes - 1) * 2 - 1

    def edges(self) -> np.ndarray:
        inner = (np.arange(1, self.classes) - 0.5) / (self.classes - 1) * 2 - 1
        return np.concatenate([[-np.inf], inner, [np.inf]])


@dataclass(frozen=True)
class CompandedLaw(Law):
    """A distribution of companded values, `inner`, for the codes of a mu-law grid."""

    inner: Gaussian | Laplace

    @property
    def channels(self) -> int:
        return self.inner.channels

    def initial_bias(self) -> Tensor:
        return self.inner.initial_bias()

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        return self.inner.log_prob_between(parameters, first, last)

    def draw(self, parameters: Tensor, uniform: Tensor, temperature: Tensor | float) -> Tensor:
        return self.inner.draw(parameters, uniform, temperature)


@dataclass
class LinearState:
    """The past of each stream."""

    past: Tensor
    """(B, p + d) codes, the oldest first; silence before the first sample."""


class Linear(AutoregressiveModel):
    """A weighted sum of past samples, and a residual of fixed scale. Its weights are float64.

    The sum runs from the constant over the oldest sample to the newest, a product and an addition
    at a time, in every engine: the same bits whatever the batch, the chunks and the engine.

    Parameters
    ----------
    config : LinearConfig
        The model begins with coefficients of 0: white noise. `wavear.fit_linear` returns a fitted
        one.

    Examples
    --------
    >>> model = Linear(LinearConfig(order=2, differencing=1))
    >>> _ = model.coefficients.data.copy_(torch.tensor([0.5, -0.25]))
    >>> model.taps().tolist(), model.receptive_field
    ([1.5, -0.75, 0.25], 3)
    >>> model(torch.zeros(1, 100, dtype=torch.long)).shape
    torch.Size([1, 2, 100])
    """

    family = "linear"

    config: LinearConfig
    values: Tensor

    def __init__(self, config: LinearConfig):
        super().__init__()
        self.config = config
        self.conditioning = None
        self.coefficients = nn.Parameter(torch.zeros(config.order, dtype=torch.float64))
        self.constant = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        values = torch.from_numpy(self.predicted_grid.values().copy())
        self.register_buffer("values", values, persistent=False)

    @property
    def law(self) -> Law:
        """Distribution of the next sample; parameters: mean, log-scale."""
        inner = (Laplace if self.config.law == "laplace" else Gaussian)(self.predicted_grid)
        if self.config.domain == "linear":
            return inner
        return CompandedLaw(Grid("mulaw", self.config.classes), inner)

    @property
    def predicted_grid(self) -> Grid:
        """The codes' values and intervals in the units that are predicted."""
        if self.config.domain == "companded":
            return Companded("mulaw", self.config.classes)
        return Grid(self.config.grid, self.config.classes)  # type: ignore[arg-type]  # checked

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per generated sample."""
        return self.config.receptive_field

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, in float64, read per generated sample."""
        return 8 * (self.config.receptive_field + 2)

    def taps(self) -> Tensor:
        """Return the weight of each past sample (p + d,), newest first, differencing expanded.

        1 - sum over k of taps[k] / z^k = (1 - sum over k of coefficients[k] / z^k) * (1 - 1 / z)^d
        """
        polynomial = torch.cat([self.coefficients.new_ones(1), -self.coefficients])
        pad = nn.functional.pad
        for _ in range(self.config.differencing):
            polynomial = pad(polynomial, (0, 1)) - pad(polynomial, (1, 0))
        return -polynomial[1:]

    def scale(self) -> Tensor:
        """Return the residual's mean absolute value (laplace) or standard deviation (gaussian)."""
        return _scale(self.predicted_grid, self.log_scale)

    def poles(self) -> np.ndarray:
        """Return the poles of the recursion of the signal, or of its differences, largest first.

        With all inside the unit circle, generated audio keeps about the level of the recordings it
        was fitted to. (The differencing adds d poles at 1: a signal that drifts.)
        """
        from wavear.models.lpc import poles

        return poles(self.coefficients.detach().cpu().double().numpy())

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: LinearState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """See `AutoregressiveModel.forward`: (B, 2, T), the means and the log-scale."""
        if state is None:
            state = self.init_state(len(codes))
        return self._predict(self.shift(codes, previous), state)

    def init_state(self, batch: int) -> LinearState:
        shape = (batch, self.config.receptive_field)
        return LinearState(torch.full(shape, self.start_code, device=self.values.device))

    def step(self, previous: Tensor, state: LinearState, cond_t: Tensor | None = None) -> Tensor:
        return self._predict(previous[:, None], state)[:, :, 0]

    def _predict(self, previous: Tensor, state: LinearState) -> Tensor:
        """Return means and log-scales (B, 2, T) after each of `previous` (B, T); advance state."""
        total = previous.shape[1]
        past = self.values[self.advance(previous, state)]
        taps = self.taps()
        mean = self.constant.expand(len(previous), total)
        for lag in range(len(taps), 0, -1):
            first = len(taps) - lag
            mean = mean + taps[lag - 1] * past[:, first : first + total]
        return torch.stack([mean, self.log_scale.expand_as(mean)], dim=1)

    def advance(self, previous: Tensor, state: LinearState, cond: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.advance`; return past and new codes (B, p + d - 1 + T)."""
        joined = torch.cat([state.past, previous], dim=1)
        state.past.copy_(joined[:, joined.shape[1] - state.past.shape[1] :])
        return joined[:, 1:]

    def export_state(self, state: LinearState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `past`, (B, p + d) codes, the oldest first."""
        return {"past": state.past.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> LinearState:
        return LinearState(tensors["past"].to(self.values.device, torch.int64, copy=True))

    def set(self, coefficients: np.ndarray, constant: float, scale: float) -> None:
        """Set fitted coefficients (p,), constant and scale, all in the units that are predicted."""
        with torch.no_grad():
            self.coefficients.copy_(torch.from_numpy(np.asarray(coefficients, dtype=np.float64)))
            self.constant.fill_(constant)
            self.log_scale.fill_(math.log(scale))
