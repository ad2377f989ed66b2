"""Linear prediction as a law over codes: AR(p), and ARI(p, d), the same of the d-th differences.

    mean[t] = c + sum over k of taps[k] * value(code[t-k])
    P(code) = F((upper - mean) / scale) - F((lower - mean) / scale)

with F the normal or the Laplace law of what the prediction leaves over, integrated over the
interval of each code. So it is measured in the same bits per sample as the other families. It is
fitted, not trained: see `wavear.fit_linear`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from wavear.audio.grid import Grid
from wavear.models.base import AutoregressiveModel, check_whole
from wavear.models.distributions import Gaussian, Laplace, Law, _scale

LAWS = ("laplace", "gaussian")
DOMAINS = ("linear", "companded")


@dataclass(frozen=True)
class LinearConfig:
    """What a linear predictor is made of; saved with its numbers."""

    order: int = 32
    """Lags p of the signal (or of its differences), 0 or more."""
    differencing: int = 0
    """Order d of the differences that are predicted; 1 suits sounds that drift. `order` and it make 1 or more."""
    law: str = "laplace"
    """Of the residual: laplace or gaussian."""
    grid: str = "mulaw"
    """Of the codes: mulaw, or linear (PCM)."""
    classes: int = 0
    """Codes Q, 2 to 65536; 0: 256 mu-law codes, 65536 linear values (16 bits)."""
    domain: str = "linear"
    """What is predicted: samples (linear), or their mu-law companded values (companded), evenly spaced codes."""
    sample_rate: int = 22050
    """Of the audio, in Hz."""
    mel: None = None
    """It takes no mels."""
    speakers: int = 0
    """It tells no speakers apart."""

    def __post_init__(self) -> None:
        check_whole(self, order=0, differencing=0)
        if self.order + self.differencing < 1:
            raise ValueError("order is 0 and differencing 0: together they must be 1 or more")
        for name, known in (("law", LAWS), ("domain", DOMAINS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, it must be {' or '.join(known)}"
                )
        if self.classes == 0:
            object.__setattr__(self, "classes", 65536 if self.grid == "linear" else 256)
        Grid(self.grid, self.classes)  # type: ignore[arg-type]  # it checks both
        if self.domain == "companded" and self.grid != "mulaw":
            raise ValueError(
                "domain is 'companded': that is the mu-law curve's, and needs grid 'mulaw'"
            )
        if not isinstance(self.sample_rate, int) or not 1000 <= self.sample_rate <= 384000:
            raise ValueError(f"sample_rate is {self.sample_rate!r}, it must be 1000 to 384000 Hz")
        if self.mel is not None or self.speakers != 0:
            raise ValueError(
                "a linear predictor takes neither mels nor speakers: leave mel None and speakers 0"
            )

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on."""
        return self.order + self.differencing


@dataclass(frozen=True)
class Companded(Grid):
    """The codes of a mu-law grid where its curve sees them: evenly spaced from -1 to 1."""

    @property
    def finest(self) -> float:
        """See `Grid.finest`."""
        return 2 / (self.classes - 1)

    def encode(self, waveform: Tensor) -> Tensor:  # type: ignore[override]
        """The codes of companded values."""
        return torch.floor((waveform.clamp(-1, 1) + 1) / 2 * (self.classes - 1) + 0.5).to(
            torch.int64
        )

    def values(self) -> np.ndarray:
        """See `Grid.values`."""
        return np.arange(self.classes) / (self.classes - 1) * 2 - 1

    def edges(self) -> np.ndarray:
        """See `Grid.edges`."""
        inner = (np.arange(1, self.classes) - 0.5) / (self.classes - 1) * 2 - 1
        return np.concatenate([[-np.inf], inner, [np.inf]])


@dataclass(frozen=True)
class CompandedLaw:
    """A law of companded values, `inner`, for the codes of a mu-law grid."""

    inner: Gaussian | Laplace
    truncates: ClassVar[bool] = False

    @property
    def grid(self) -> Grid:
        """See `Law.grid`."""
        return Grid("mulaw", self.inner.grid.classes)

    @property
    def channels(self) -> int:
        """See `Law.channels`."""
        return self.inner.channels

    def initial_bias(self) -> Tensor:
        """See `Law.initial_bias`."""
        return self.inner.initial_bias()

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """See `Law.log_prob`."""
        return self.inner.log_prob(parameters, codes)

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """See `Law.log_prob_between`."""
        return self.inner.log_prob_between(parameters, first, last)

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """See `Law.sample`."""
        return self.inner.sample(parameters, uniform, temperature, top_k, top_p)


@dataclass
class LinearState:
    """The past of each stream."""

    past: Tensor
    """(B, p + d) codes, the oldest first; silence before the first sample."""


class Linear(AutoregressiveModel):
    """A weighted sum of past samples, and a law of fixed scale about it. Its numbers are float64.

    The sum runs from the constant over the oldest sample to the newest, a product and an addition
    at a time, in every engine: the same bits whatever the batch, the chunks and the engine.

    Parameters
    ----------
    config : LinearConfig
        The model begins with coefficients of 0: white noise. `wavear.fit_linear` makes a fitted
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
        self.register_buffer(
            "values", torch.from_numpy(self.predicted_grid.values().copy()), persistent=False
        )

    @property
    def law(self) -> Law:
        """Of the next sample: parameters (mean, log-scale)."""
        inner = (Laplace if self.config.law == "laplace" else Gaussian)(self.predicted_grid)
        return CompandedLaw(inner) if self.config.domain == "companded" else inner

    @property
    def predicted_grid(self) -> Grid:
        """The codes' values and intervals in the units that are predicted."""
        if self.config.domain == "companded":
            return Companded("mulaw", self.config.classes)
        return Grid(self.config.grid, self.config.classes)  # type: ignore[arg-type]  # checked

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on."""
        return self.config.receptive_field

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per generated sample."""
        return self.receptive_field

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, in float64, read per generated sample."""
        return 8 * (self.receptive_field + 2)

    def taps(self) -> Tensor:
        """(p + d,), what each past sample counts for, the sample before first: the differencing multiplied out.

        1 - sum over k of taps[k] / z^k = (1 - sum over k of coefficients[k] / z^k) * (1 - 1 / z)^d
        """
        polynomial = torch.cat([self.coefficients.new_ones(1), -self.coefficients])
        for _ in range(self.config.differencing):
            polynomial = nn.functional.pad(polynomial, (0, 1)) - nn.functional.pad(
                polynomial, (1, 0)
            )
        return -polynomial[1:]

    def scale(self) -> Tensor:
        """Of the residual, as the law takes it: the mean absolute one (laplace) or the deviation (gaussian)."""
        return _scale(self.predicted_grid, self.log_scale)

    def poles(self) -> np.ndarray:
        """Of the recursion of the signal, or of its differences, the largest first; complex, or real if all are.

        All inside the unit circle: what the model generates stays about the level of what it was
        fitted to. (The differencing adds d poles at 1: a signal that drifts.)
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
        """See `AutoregressiveModel.init_state`."""
        past = torch.full((batch, self.receptive_field), self.start_code, device=self.values.device)
        return LinearState(past)

    def step(self, previous: Tensor, state: LinearState, cond_t: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.step`."""
        return self._predict(previous[:, None], state)[:, :, 0]

    def prefill(self, previous: Tensor, state: LinearState, cond: Tensor | None = None) -> None:
        """See `AutoregressiveModel.prefill`: the state is the past itself."""
        self._move(previous, state)

    def _predict(self, previous: Tensor, state: LinearState) -> Tensor:
        """Means and log-scales (B, 2, T), from the code before each sample (B, T); the state is moved past them."""
        total = previous.shape[1]
        past = self.values[self._move(previous, state)]
        taps = self.taps()
        mean = self.constant.expand(len(previous), total)
        for lag in range(len(taps), 0, -1):
            first = len(taps) - lag
            mean = mean + taps[lag - 1] * past[:, first : first + total]
        return torch.stack([mean, self.log_scale.expand_as(mean)], dim=1)

    def _move(self, previous: Tensor, state: LinearState) -> Tensor:
        """Past and new codes (B, p + d - 1 + T), the oldest first; the state is moved past them."""
        joined = torch.cat([state.past, previous], dim=1)
        state.past.copy_(joined[:, joined.shape[1] - state.past.shape[1] :])
        return joined[:, 1:]

    def export_state(self, state: LinearState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `past`, (B, p + d) codes, the oldest first."""
        return {"past": state.past.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> LinearState:
        """See `AutoregressiveModel.import_state`."""
        past = tensors["past"].to(self.values.device, torch.int64, copy=True)
        return LinearState(past)

    def set(self, coefficients: np.ndarray, constant: float, scale: float) -> None:
        """Put in fitted numbers: coefficients (p,), constant, and scale, all in the units that are predicted."""
        with torch.no_grad():
            self.coefficients.copy_(torch.from_numpy(np.asarray(coefficients, dtype=np.float64)))
            self.constant.fill_(constant)
            self.log_scale.fill_(math.log(scale))
