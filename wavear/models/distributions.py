"""Output laws: what a network puts out for each sample -> the probability of every code, and one code from one uniform.

    parameters (B, P, T) --log_prob(codes)--> nats (B, T)        parameters (B, P), uniforms (B,) --sample--> codes (B,)

"categorical" names the probability of every code by itself (van den Oord et al., 2016, "WaveNet").
The others are densities over the sample's value x, integrated over the interval that each code of
the grid stands for; the first and the last code take the tails, so the probabilities of all codes
sum to one:

    P(c) = F(upper(c)) - F(lower(c))

"logistic_mixture" is that of PixelCNN++ (Salimans et al., 2017, https://arxiv.org/abs/1701.05517)
and of the 16-bit WaveNet (van den Oord et al., 2017, "Parallel WaveNet"): sum over k of w_k times a
logistic law of mean m_k, scale s_k.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from wavear.audio.grid import Grid
from wavear.models.sampling import sample as sample_categorical

_SHARPEST = (
    0.05  # of the grid's finest step: below it a scale makes one code certain, and gradients vanish
)
_LARGEST_LOG_SCALE = 5.0


class Law(Protocol):
    """What models, engines and training ask of a law."""

    truncates: ClassVar[bool]
    """Whether `sample` takes `top_k` and `top_p`."""

    @property
    def grid(self) -> Grid:
        """Of the codes."""
        ...

    @property
    def channels(self) -> int:
        """Numbers P that the network puts out for each sample."""
        ...

    def initial_bias(self) -> Tensor | None:
        """(P,), where the network's last bias begins; None: as it is."""
        ...

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """log P(code), (B, T) in nats, from parameters (B, P, T) and codes (B, T); in the precision of `parameters`."""
        ...

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """log P(first <= code <= last), (B, T) in nats, from parameters (B, P, T) and codes (B, T)."""
        ...

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Codes (B,) from parameters (B, P) and one uniform each (B,), float64 in [0, 1)."""
        ...


@dataclass(frozen=True)
class Categorical:
    """softmax over the codes. A temperature divides the logits.

    Examples
    --------
    >>> Categorical(Grid("mulaw", 4)).log_prob(torch.zeros(1, 4, 1), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """

    grid: Grid
    truncates: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """See `Law.channels`: a logit for each code."""
        return self.grid.classes

    def initial_bias(self) -> None:
        """See `Law.initial_bias`."""

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """See `Law.log_prob`."""
        return -F.cross_entropy(parameters, codes, reduction="none")

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """See `Law.log_prob_between`."""
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
        """See `Law.sample`: by inverse CDF, see `wavear.models.sampling`."""
        return sample_categorical(parameters, uniform, temperature, top_k, top_p)


@dataclass(frozen=True)
class LogisticMixture:
    """Mixture of K logistic laws over the sample's value; parameters: K logits, K means, K log-scales.

    One uniform picks the component, by inverse CDF over their weights, and what is left of it,
    uniform again, picks the value. A temperature T divides the logits of the weights and multiplies
    the scales.

    Examples
    --------
    >>> law = LogisticMixture(Grid("linear", 256), mixtures=2)
    >>> every_code = torch.arange(256)[None]
    >>> round(law.log_prob(torch.randn(1, 6, 1).expand(-1, -1, 256), every_code).exp().sum().item(), 3)
    1.0
    """

    grid: Grid
    mixtures: int = 10
    truncates: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """See `Law.channels`."""
        return 3 * self.mixtures

    def initial_bias(self) -> Tensor:
        """See `Law.initial_bias`: all weights alike, means about silence as far apart as the scales."""
        k, scale = self.mixtures, math.exp(-3)
        means = (torch.arange(k) - (k - 1) / 2) * scale
        return torch.cat([torch.zeros(k), means, torch.full((k,), math.log(scale))])

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """See `Law.log_prob`."""
        return self.log_prob_between(parameters, codes, codes)

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """See `Law.log_prob_between`."""
        logits, means, log_scales = parameters.unflatten(1, (3, self.mixtures)).unbind(1)
        ends = _interval(self.grid, first[:, None], last[:, None], means)
        inside = _log_mass_logistic(*ends, _scale(self.grid, log_scales))
        return torch.logsumexp(torch.log_softmax(logits, dim=1) + inside, dim=1)

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """See `Law.sample`."""
        refuse_truncation("logistic_mixture", top_k, top_p)
        logits, means, log_scales = parameters.double().unflatten(1, (3, self.mixtures)).unbind(1)
        heat = temperature[:, None] if isinstance(temperature, Tensor) else temperature
        weights = torch.softmax(logits / heat, dim=1)
        above = weights.cumsum(dim=1)
        threshold = uniform[:, None] * above[:, -1:]
        which = torch.searchsorted(above, threshold, right=True).clamp(max=self.mixtures - 1)
        below = F.pad(above[:, :-1], (1, 0)).gather(1, which)
        left = ((threshold - below) / weights.gather(1, which)).clamp(0, _BELOW_ONE)
        spread = _scale(self.grid, log_scales.gather(1, which)) * heat
        return self.grid.nearest(
            (means.gather(1, which) + spread * (left.log() - (-left).log1p()))[:, 0]
        )


@dataclass(frozen=True)
class _OneLaw:
    """A law of one mean and one scale; parameters: mean, log-scale. A temperature multiplies the scale."""

    grid: Grid
    truncates: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        """See `Law.channels`."""
        return 2

    def initial_bias(self) -> Tensor:
        """See `Law.initial_bias`."""
        return torch.tensor([0.0, -2.0])

    def log_prob(self, parameters: Tensor, codes: Tensor) -> Tensor:
        """See `Law.log_prob`; computed in float64, for it is the small difference of two numbers near one."""
        return self.log_prob_between(parameters, codes, codes)

    def log_prob_between(self, parameters: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """See `Law.log_prob_between`."""
        mean, log_scale = parameters.double().unbind(1)
        mass = self._log_mass(
            *_interval(self.grid, first, last, mean), _scale(self.grid, log_scale)
        )
        return mass.to(parameters.dtype)

    def sample(
        self,
        parameters: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """See `Law.sample`."""
        refuse_truncation(type(self).__name__.lower(), top_k, top_p)
        mean, log_scale = parameters.double().unbind(1)
        return self.grid.nearest(
            mean + _scale(self.grid, log_scale) * temperature * self._quantile(uniform)
        )

    def _log_mass(
        self,
        lower: Tensor,
        upper: Tensor,
        width: Tensor,
        first: Tensor,
        last: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """log(F(upper) - F(lower)) of the law of that scale about 0."""
        raise NotImplementedError

    def _quantile(self, uniform: Tensor) -> Tensor:
        """F^-1 of the law of scale 1 about 0."""
        raise NotImplementedError


class Gaussian(_OneLaw):
    """Normal law of the sample's value; its scale is the deviation."""

    def _log_mass(
        self,
        lower: Tensor,
        upper: Tensor,
        width: Tensor,
        first: Tensor,
        last: Tensor,
        scale: Tensor,
    ) -> Tensor:
        return _log_mass_normal(lower, upper, first, last, scale)

    def _quantile(self, uniform: Tensor) -> Tensor:
        return torch.special.ndtri(uniform)


class Laplace(_OneLaw):
    """exp(-abs(x - mean) / scale) / (2 scale)."""

    def _log_mass(
        self,
        lower: Tensor,
        upper: Tensor,
        width: Tensor,
        first: Tensor,
        last: Tensor,
        scale: Tensor,
    ) -> Tensor:
        return _log_mass_laplace(lower, upper, width, first, last, scale)

    def _quantile(self, uniform: Tensor) -> Tensor:
        tail = torch.minimum(uniform, 1 - uniform)
        return torch.where(uniform < 0.5, 1.0, -1.0) * (2 * tail).log()


LAWS = ("categorical", "logistic_mixture", "gaussian", "laplace")
_BELOW_ONE = 1 - 2.0**-53


def law_of(config: Any) -> Law:
    """The law that a model's configuration names: `config.law`, of `classes` codes and `mixtures` components."""
    if config.law == "categorical":
        return Categorical(Grid("mulaw", config.classes))
    grid = Grid("linear", config.classes)
    if config.law == "logistic_mixture":
        return LogisticMixture(grid, config.mixtures)
    return Gaussian(grid) if config.law == "gaussian" else Laplace(grid)


def log_prob_on(law: Law, parameters: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Return the log-probability of samples on another grid than the law's own, so that laws compare on one scale.

    On a coarser grid, the exact probability of all codes that become the coarser one
    (`Grid.spans`). On a finer one, each of the finer codes in a code's interval is as likely as
    another (`Grid.refinement`).

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
    ValueError
        If each of the two grids is the finer one in places.

    Examples
    --------
    >>> law = LogisticMixture(Grid("linear", 65536), mixtures=1)
    >>> silent = torch.tensor([[[0.0], [0.0], [-9.0]]])
    >>> on_mulaw = log_prob_on(law, silent, torch.tensor([[32768]]), Grid("mulaw", 256))
    >>> round(on_mulaw.exp().item(), 3), round(law.log_prob(silent, torch.tensor([[32768]])).exp().item(), 3)
    (0.327, 0.062)
    """
    own = law.grid
    if grid == own:
        return law.log_prob(parameters, codes)
    if (spans := own.spans(grid)) is not None:
        first, last = torch.from_numpy(spans.copy()).to(codes.device)
        # The codes rise with the samples: the one coarser code that begins at or below a code is
        # that which it becomes.
        coarse = torch.searchsorted(first, codes.contiguous(), right=True) - 1
        return law.log_prob_between(parameters, first[coarse], last[coarse])
    if (refinement := own.refinement(grid)) is not None:
        finer = torch.from_numpy(refinement).to(codes.device, parameters.dtype)
        return law.log_prob(parameters, codes) - math.log(2) * finer[codes]
    raise ValueError(
        f"{own} and {grid} are each finer than the other in places: bits on one say nothing of the other"
    )


def converts(own: Grid, grid: Grid) -> bool:
    """Return whether `log_prob_on` can give the probabilities of a law over `own` on `grid`."""
    return grid == own or own.spans(grid) is not None or own.refinement(grid) is not None


def refuse_truncation(law: str, top_k: int | None, top_p: float | None) -> None:
    """Of a law over values, which has no likeliest codes to choose among."""
    if top_k is not None or top_p is not None:
        raise ValueError(
            f"top_k, top_p and argmax choose among the codes of a categorical law, this is {law}: use temperature"
        )


def _scale(grid: Grid, log_scale: Tensor) -> Tensor:
    """The scale, kept from where one code is certain or none more likely than another."""
    least = math.log(_SHARPEST * grid.finest)
    return log_scale.clamp(least, _LARGEST_LOG_SCALE).exp()


@functools.cache  # captured graphs read them by address
def _table(grid: Grid, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lower and upper end of each code's interval, (Q,); where they are infinite any finite number."""
    edges = torch.from_numpy(grid.edges().copy()).nan_to_num(posinf=2.0, neginf=-2.0)
    return edges[:-1].to(device, dtype), edges[1:].to(device, dtype)


def _interval(
    grid: Grid, first: Tensor, last: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lower - mean, upper - mean, upper - lower) of the codes from `first` to `last`; and where these reach the first
    code of the grid, and the last."""
    low, high = _table(grid, mean.device, mean.dtype)
    lower, upper = low[first], high[last]
    return lower - mean, upper - mean, upper - lower, first == 0, last == grid.classes - 1


def _log_mass_logistic(
    lower: Tensor, upper: Tensor, width: Tensor, first: Tensor, last: Tensor, scale: Tensor
) -> Tensor:
    """log(F(upper) - F(lower)) of a logistic law, F(x) = 1 / (1 + exp(-x / scale)), at any scale:

    F(a) - F(b) = F(a) F(-b) (1 - exp(-(a - b))), whose factors have logarithms without
    cancellation.
    """
    zero = torch.zeros((), dtype=scale.dtype, device=scale.device)
    above = torch.where(last, zero, -F.softplus(-upper / scale))
    below = torch.where(first, zero, -F.softplus(lower / scale))
    return above + below + torch.where(first | last, zero, (-torch.expm1(-width / scale)).log())


def _log_mass_normal(
    lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, scale: Tensor
) -> Tensor:
    """log(F(upper) - F(lower)) of the normal law, in whichever tail is the smaller one."""
    flip = lower + upper > 0
    a = torch.where(flip, -upper, lower) / scale
    b = torch.where(flip, -lower, upper) / scale
    top = torch.special.log_ndtr(b)
    gap = (torch.special.log_ndtr(a) - top).clamp(max=-1e-300)
    inside = top + (-torch.expm1(gap)).log()
    tail = torch.special.log_ndtr(torch.where(first, upper, -lower) / scale)
    return torch.where(first | last, tail, inside)


def _log_mass_laplace(
    lower: Tensor, upper: Tensor, width: Tensor, first: Tensor, last: Tensor, scale: Tensor
) -> Tensor:
    """log(F(upper) - F(lower)) of the Laplace law: on one side of the mean, across it, or the tail of an end."""
    flip = lower + upper > 0
    a = torch.where(flip, -upper, lower) / scale
    b = torch.where(flip, -lower, upper) / scale
    aside = b.clamp(max=0) - math.log(2) + (-torch.expm1(-width / scale)).log()
    across = (
        (-(torch.expm1(a.clamp(max=0)) + torch.expm1(-b.clamp(min=1e-300))) / 2)
        .clamp(min=1e-300)
        .log()
    )
    end = torch.where(first, upper, -lower) / scale
    tail = torch.where(
        end <= 0, end.clamp(max=0) - math.log(2), torch.log1p(-0.5 * torch.exp(-end.clamp(min=0)))
    )
    return torch.where(first | last, tail, torch.where(b <= 0, aside, across))
