"""Output distributions, called laws in the code: parameters -> probability of a code.

A `Law` is the distribution of the next code that the network's output stands for. `law` is its name
in configurations, and P the number of its parameters:

    parameters (B, P, T), codes (B, T)       --log_prob--> nats (B, T)
    parameters (B, P),    uniforms (B,)      --sample----> codes (B,)

"categorical" gives every code a probability of its own (van den Oord et al., 2016, "WaveNet"). The
others are densities over the sample's value x, integrated over the interval that each code of the
grid stands for; the first and the last code take the tails, so the probabilities of all codes sum
to one:

    P(c) = F(upper(c)) - F(lower(c))

"logistic_mixture" is that of PixelCNN++ (Salimans et al., 2017, https://arxiv.org/abs/1701.05517)
and of the 16-bit WaveNet (van den Oord et al., 2017, "Parallel WaveNet"): sum over k of w_k times a
logistic distribution of mean m_k, scale s_k. "gaussian" and "laplace" have one mean and one scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wavear.audio.grid import Grid
from wavear.common.errors import WavearError
from wavear.models import sampling

# Scales below this share of the grid's finest step make one code certain: gradients vanish.
_SHARPEST = 0.05
_LARGEST_LOG_SCALE = 5.0
_BELOW_ONE = 1 - 2.0**-53


@dataclass(frozen=True)
class Law:
    """A distribution over the codes of a grid. A subclass over values defines the unset methods."""

    grid: Grid
    truncates: ClassVar[bool] = False
    """True if `sample` takes `top_k` and `top_p`."""

    @property
    def channels(self) -> int:
        """Parameters P that the network returns for each sample."""
        raise NotImplementedError

    def initial_bias(self) -> Tensor | None:
        """Return the first value (P,) of the network's last bias; None: torch's own."""
        raise NotImplementedError

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """Return log P(code) in nats, in the precision of `parameters`.

        Parameters
        ----------
        parameters : Tensor, shape (B, P, T)
        codes : Tensor of int64, shape (B, T)

        Returns
        -------
        Tensor, shape (B, T)
        """
        return self.log_prob_between(parameters, codes, codes)

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Return log P(first <= code <= last), as `log_prob`."""
        raise NotImplementedError

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Draw one code from each row by inverse CDF.

        Parameters
        ----------
        parameters : Tensor, shape (B, P)
        uniform : Tensor of float64, shape (B,), in [0, 1)
        temperature : float, or Tensor of shape (B,)
        top_k, top_p : optional
            See `wavear.models.sampling.kept`.

        Returns
        -------
        Tensor of int64, shape (B,)

        Raises
        ------
        WavearError
            If a distribution over values is to be truncated.
        """
        refuse_truncation(type(self).__name__, top_k, top_p)
        return self.draw(parameters.double(), uniform, temperature)

    def draw(self, parameters: Tensor, uniform: Tensor, temperature: Tensor | float) -> Tensor:
        """Return one code (B,) from each row of float64 parameters, without truncation."""
        raise NotImplementedError


@dataclass(frozen=True)
class Categorical(Law):
    """softmax over the codes. A temperature divides the logits.

    Examples
    --------
    >>> Categorical(Grid("mulaw", 4)).log_prob(torch.zeros(1, 4, 1), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """

    truncates: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """A logit for each code."""
        return self.grid.classes

    def initial_bias(self) -> None:
        return None

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        return -F.cross_entropy(parameters, codes, reduction="none")

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        every = torch.arange(self.grid.classes, device=parameters.device)[:, None]
        inside = (every >= first[:, None]) & (every <= last[:, None])
        chosen = parameters.masked_fill(~inside, -math.inf)
        return torch.logsumexp(chosen, dim=1) - torch.logsumexp(parameters, dim=1)

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """See `Law.sample` and `wavear.models.sampling`."""
        return sampling.sample(parameters, uniform, temperature, top_k, top_p)


@dataclass(frozen=True)
class LogisticMixture(Law):
    """Mixture of K logistic distributions over the value: K logits, K means, K log-scales.

    One uniform picks the component, by inverse CDF over the weights, and the remainder, uniform
    again, picks the value. A temperature divides the logits of the weights and multiplies the
    scales.

    Examples
    --------
    >>> law = LogisticMixture(Grid("linear", 256), mixtures=2)
    >>> every_code = torch.arange(256)[None]
    >>> nats = law.log_prob(torch.randn(1, 6, 1).expand(-1, -1, 256), every_code)
    >>> round(nats.exp().sum().item(), 3)
    1.0
    """

    mixtures: int = 10

    @property
    def channels(self) -> int:
        return 3 * self.mixtures

    def initial_bias(self) -> Tensor:
        """Return equal weights, and means about silence as far apart as the scales."""
        k, scale = self.mixtures, math.exp(-3)
        means = (torch.arange(k) - (k - 1) / 2) * scale
        return torch.cat([torch.zeros(k), means, torch.full((k,), math.log(scale))])

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        logits, means, log_scales = parameters.unflatten(1, (3, self.mixtures)).unbind(1)
        ends = _interval(self.grid, first[:, None], last[:, None], means)
        inside = _log_mass_logistic(ends, _scale(self.grid, log_scales))
        return torch.logsumexp(torch.log_softmax(logits, dim=1) + inside, dim=1)

    def draw(self, parameters: Tensor, uniform: Tensor, temperature: Tensor | float) -> Tensor:
        logits, means, log_scales = parameters.unflatten(1, (3, self.mixtures)).unbind(1)
        heat = temperature[:, None] if isinstance(temperature, Tensor) else temperature
        weights = torch.softmax(logits / heat, dim=1)
        above = weights.cumsum(dim=1)
        threshold = uniform[:, None] * above[:, -1:]
        which = torch.searchsorted(above, threshold, right=True).clamp(max=self.mixtures - 1)
        below = F.pad(above[:, :-1], (1, 0)).gather(1, which)
        left = ((threshold - below) / weights.gather(1, which)).clamp(0, _BELOW_ONE)
        spread = _scale(self.grid, log_scales.gather(1, which)) * heat
        value = means.gather(1, which) + spread * (left.log() - (-left).log1p())
        return self.grid.nearest(value[:, 0])


class _OneMean(Law):
    """A distribution of a mean and a scale; parameters: mean, log-scale.

    A temperature multiplies the scale.
    """

    @property
    def channels(self) -> int:
        return 2

    def initial_bias(self) -> Tensor:
        return torch.tensor([0.0, -2.0])

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """See `Law.log_prob_between`; in float64, as the small difference of numbers near one."""
        mean, log_scale = parameters.double().unbind(1)
        ends = _interval(self.grid, first, last, mean)
        return self._log_mass(ends, _scale(self.grid, log_scale)).to(parameters.dtype)

    def draw(self, parameters: Tensor, uniform: Tensor, temperature: Tensor | float) -> Tensor:
        mean, log_scale = parameters.unbind(1)
        away = _scale(self.grid, log_scale) * temperature * self._quantile(uniform)
        return self.grid.nearest(mean + away)

    def _log_mass(self, ends: _Interval, scale: Tensor) -> Tensor:
        """Return log(F(upper) - F(lower)) with that scale and mean 0."""
        raise NotImplementedError

    def _quantile(self, uniform: Tensor) -> Tensor:
        """Return F^-1 with scale 1 and mean 0."""
        raise NotImplementedError


class Gaussian(_OneMean):
    """Normal distribution of the sample's value; its scale is the standard deviation."""

    def _log_mass(self, ends: _Interval, scale: Tensor) -> Tensor:
        """Compute it in whichever tail is the smaller one."""
        a, b = (end / scale for end in ends.lower_half())
        top = torch.special.log_ndtr(b)
        gap = (torch.special.log_ndtr(a) - top).clamp(max=-1e-300)
        inside = top + (-torch.expm1(gap)).log()
        tail = torch.special.log_ndtr(ends.open_end() / scale)
        return torch.where(ends.first | ends.last, tail, inside)

    def _quantile(self, uniform: Tensor) -> Tensor:
        return torch.special.ndtri(uniform)


class Laplace(_OneMean):
    """exp(-abs(x - mean) / scale) / (2 scale)."""

    def _log_mass(self, ends: _Interval, scale: Tensor) -> Tensor:
        """Compute it on one side of the mean, across it, or for the tail of an end."""
        a, b = (end / scale for end in ends.lower_half())
        aside = b.clamp(max=0) - math.log(2) + (-torch.expm1(-ends.width / scale)).log()
        across = -(torch.expm1(a.clamp(max=0)) + torch.expm1(-b.clamp(min=1e-300))) / 2
        across = across.clamp(min=1e-300).log()
        end = ends.open_end() / scale
        below = end.clamp(max=0) - math.log(2)
        tail = torch.where(end <= 0, below, torch.log1p(-0.5 * torch.exp(-end.clamp(min=0))))
        return torch.where(ends.first | ends.last, tail, torch.where(b <= 0, aside, across))

    def _quantile(self, uniform: Tensor) -> Tensor:
        tail = torch.minimum(uniform, 1 - uniform)
        return torch.where(uniform < 0.5, 1.0, -1.0) * (2 * tail).log()


LAWS: dict[str, Callable[[Any], Law]] = {
    "categorical": lambda config: Categorical(Grid("mulaw", config.classes)),
    "logistic_mixture": lambda config: LogisticMixture(
        Grid("linear", config.classes), config.mixtures
    ),
    "gaussian": lambda config: Gaussian(Grid("linear", config.classes)),
    "laplace": lambda config: Laplace(Grid("linear", config.classes)),
}
"""Each name of `--law`, and the law of a configuration."""


def law_of(config: Any) -> Law:
    """Return the law of a configuration: `config.law`, with its `classes` and `mixtures`."""
    return LAWS[config.law](config)


def log_prob_on(law: Law, parameters: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Return the log-probability of samples on another grid than the law's own, for comparisons.

    On a coarser grid, the exact probability of all codes that become the coarser one
    (`Grid.spans`). On a finer one, the finer codes in a code's interval are equally likely
    (`Grid.refinement`).

    Parameters
    ----------
    law : Law
    parameters : Tensor, shape (B, P, T)
    codes : Tensor of int64, shape (B, T)
        On the law's own grid.
    grid : Grid

    Returns
    -------
    Tensor, shape (B, T), in nats

    Raises
    ------
    WavearError
        If each of the two grids is the finer one in places.

    Examples
    --------
    >>> law = LogisticMixture(Grid("linear", 65536), mixtures=1)
    >>> silent, code = torch.tensor([[[0.0], [0.0], [-9.0]]]), torch.tensor([[32768]])
    >>> round(log_prob_on(law, silent, code, Grid("mulaw", 256)).exp().item(), 3)
    0.327
    >>> round(law.log_prob(silent, code).exp().item(), 3)
    0.062
    """
    own = law.grid
    if grid == own:
        return law.log_prob(parameters, codes)
    if (spans := own.spans(grid)) is not None:
        first, last = torch.from_numpy(spans.copy()).to(codes.device)
        # Codes increase with the samples: the coarser code of a code is the last that begins at or
        # below it.
        coarse = torch.searchsorted(first, codes.contiguous(), right=True) - 1
        return law.log_prob_between(parameters, first[coarse], last[coarse])
    if (refinement := own.refinement(grid)) is not None:
        finer = torch.from_numpy(refinement).to(codes.device, parameters.dtype)
        return law.log_prob(parameters, codes) - math.log(2) * finer[codes]
    raise WavearError(f"{own} and {grid} cannot be compared: each is the finer grid in places")


def converts(own: Grid, grid: Grid) -> bool:
    """Return whether `log_prob_on` can convert probabilities from `own` to `grid`."""
    return grid == own or own.spans(grid) is not None or own.refinement(grid) is not None


def refuse_truncation(law: str, top_k: int | None, top_p: float | None) -> None:
    """Raise a WavearError if a distribution over values is to be truncated."""
    if top_k is not None or top_p is not None:
        raise WavearError(
            f"top_k, top_p and argmax need a categorical distribution, this model's is {law}: use"
            " temperature"
        )


def _scale(grid: Grid, log_scale: Tensor) -> Tensor:
    """Return the scale, clamped where one code is certain or all are equally likely."""
    least = math.log(_SHARPEST * grid.finest)
    return log_scale.clamp(least, _LARGEST_LOG_SCALE).exp()


@functools.cache  # captured graphs read them by address
def _table(grid: Grid, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each code's interval, (Q,); infinite ones replaced by any number."""
    edges = torch.from_numpy(grid.edges().copy()).nan_to_num(posinf=2.0, neginf=-2.0)
    return edges[:-1].to(device, dtype), edges[1:].to(device, dtype)


class _Interval(NamedTuple):
    """The interval of a range of codes, relative to a mean."""

    lower: Tensor
    upper: Tensor
    width: Tensor
    first: Tensor
    """True if it contains the grid's first code, so that it is open below."""
    last: Tensor
    """True if it contains the last one."""

    def lower_half(self) -> tuple[Tensor, Tensor]:
        """Return both ends, mirrored if their middle lies above the mean."""
        flip = self.lower + self.upper > 0
        return torch.where(flip, -self.upper, self.lower), torch.where(
            flip, -self.lower, self.upper
        )

    def open_end(self) -> Tensor:
        """Return the finite end of an open interval, mirrored to be the upper one."""
        return torch.where(self.first, self.upper, -self.lower)


def _interval(grid: Grid, first: Tensor, last: Tensor, mean: Tensor) -> _Interval:
    low, high = _table(grid, mean.device, mean.dtype)
    lower, upper = low[first], high[last]
    return _Interval(
        lower - mean, upper - mean, upper - lower, first == 0, last == grid.classes - 1
    )


def _log_mass_logistic(ends: _Interval, scale: Tensor) -> Tensor:
    """Return log(F(upper) - F(lower)) with F(x) = 1 / (1 + exp(-x / scale)), at any scale.

    F(a) - F(b) = F(a) F(-b) (1 - exp(-(a - b))), whose factors have logarithms without
    cancellation.
    """
    zero = torch.zeros((), dtype=scale.dtype, device=scale.device)
    above = torch.where(ends.last, zero, -F.softplus(-ends.upper / scale))
    below = torch.where(ends.first, zero, -F.softplus(ends.lower / scale))
    inside = (-torch.expm1(-ends.width / scale)).log()
    return above + below + torch.where(ends.first | ends.last, zero, inside)
