"""The predictive WaveNet: a small network for the residual of a prediction known from the mel.

    mel --Envelope, Levinson--> prediction p and scale s of every sample    (`.prediction`)
    mel --PeriodNetwork------> lag and voicing of every sample              (`.period`)
    mel --convolutions-------> gate biases of every layer, at the frame rate
    e = (x - p) / s of the past, p, s, lag --gated layers--> mixture of logistics in units of e
        --> distribution of x

The layers are WaveNet's (van den Oord et al., 2016), but for the last, whose dilation is the
period, as in the quasi-periodic WaveNet (Wu et al., 2019, https://arxiv.org/abs/1907.00797).
Prediction before a network is LPCNet's idea (Valin and Skoglund, 2019,
https://arxiv.org/abs/1810.11846); here it needs no analysis of the waveform.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.base import AutoregressiveModel, matrix_entries
from wavear.models.frames import FrameConditioning
from wavear.models.predictive_conditioning import PredictiveConditioning
from wavear.models.predictive_config import PredictiveWaveNetConfig

LARGEST_RESIDUAL = 15.0
"""Clipping of residuals at the input, in units of their scale."""
LOG_SCALES = (-7.0, 5.0)  # of the mixture, in units of e
_INITIAL_SPREAD, _INITIAL_SCALE = 0.3, 0.45  # of the mixture, in units of e
_RINGS = {"samples": torch.float32, "residuals": torch.float32, "lags": torch.long}


class PredictiveBlock(nn.Module):
    """One layer: a matrix over the taps, oldest first, its gate biases, and a 1x1 residual."""

    def __init__(self, config: PredictiveWaveNetConfig, last: bool):
        super().__init__()
        r = config.residual_channels
        self.taps = nn.Linear(config.kernel_size * r, 2 * r, bias=False)
        self.residual = None if last else nn.Linear(r, r)

    def forward(self, taps: list[Tensor], gates: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (..., R), the current last, and biases (..., 2 R) -> next input, gated units."""
        return self.gated(self.taps(torch.cat(taps, dim=-1)) + gates, taps[-1])

    def gated(self, gate: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Gate (..., 2 R), and the current input (..., R) -> next input, gated units."""
        tanh, sigmoid = gate.chunk(2, dim=-1)
        units = torch.tanh(tanh) * torch.sigmoid(sigmoid)
        return h if self.residual is None else h + self.residual(units), units


@dataclass
class PredictiveState:
    """The past of B streams, in rings: time t lies at t modulo the length."""

    samples: Tensor
    """(B, H), float32: at t the sample before t."""
    residuals: Tensor
    """(B, H), float32: at t the residual of the sample before t."""
    lags: Tensor
    """(B, lag history), int64: whole lags."""
    queues: list[Tensor]
    """Per layer, (B, queue length, R): its inputs."""
    pending: Tensor
    """(B, 2), float64: prediction and scale of the last sample, whose value comes with the next."""
    time: Tensor
    """Samples stepped; int64 scalar on the device, so that a captured graph can advance it."""


@dataclass(frozen=True)
class _Past:
    """The past that features are computed from, float64: (..., n) or (...)."""

    recent: Tensor
    """Residuals of the last samples, the newest last."""
    around: Tensor
    """Residuals around one period ago, with the neighbours that interpolation needs."""
    last: Tensor
    """The sample before."""
    period_ago: Tensor
    """The sample one period ago."""


class PredictiveWaveNet(AutoregressiveModel):
    """Gated layers over the residual of a prediction known from the mel; see the module.

    Parameters
    ----------
    config : PredictiveWaveNetConfig

    Examples
    --------
    >>> from wavear import MelConfig
    >>> config = PredictiveWaveNetConfig(mel=MelConfig(), residual_channels=8, skip_channels=8)
    >>> model = PredictiveWaveNet(config)
    >>> cond = model.condition(torch.zeros(1, 80, 3))
    >>> model(torch.full((1, 768), 32768), cond).shape  # 5 logits, 5 means, 5 log-scales
    torch.Size([1, 15, 768])
    """

    family = "predictive"

    config: PredictiveWaveNetConfig
    conditioning: PredictiveConditioning
    blocks: Any  # nn.ModuleList of PredictiveBlock
    frames_are_exact = True
    bf16 = True  # features, prediction and loss have a precision of their own

    def __init__(self, config: PredictiveWaveNetConfig):
        super().__init__()
        self.config = config
        self.input = nn.Linear(config.features, config.residual_channels)
        last = len(config.dilations) - 1
        self.blocks = nn.ModuleList(
            PredictiveBlock(config, last=layer == last) for layer in range(last + 1)
        )
        self.skip = nn.Linear(config.residual_channels * (last + 1), config.skip_channels)
        self.hidden = nn.Linear(config.skip_channels, config.head_channels)
        self.output = nn.Linear(config.head_channels, 3 * config.mixtures)
        self.conditioning = PredictiveConditioning(config)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            weights, means, scales = self.output.bias.view(3, config.mixtures)
            weights.zero_()
            means.copy_(torch.linspace(-_INITIAL_SPREAD, _INITIAL_SPREAD, config.mixtures))
            scales.fill_(math.log(_INITIAL_SCALE))

    @property
    def multiply_adds(self) -> int:
        """See `AutoregressiveModel.multiply_adds`: the matrices, and the prediction."""
        entries = matrix_entries(self.input, self.blocks, self.skip, self.hidden, self.output)
        return entries + self.config.prediction_order

    def muon_parameters(self) -> list[nn.Parameter]:
        """Return the matrices inside the network, which Muon trains."""
        blocks = [m for block in self.blocks for m in (block.taps, block.residual) if m is not None]
        matrices: list[Any] = [*blocks, self.skip, self.hidden]
        return [matrix.weight for matrix in matrices]

    def input_noise(
        self, codes: Tensor, amount: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return Gaussian noise (B, T) on the input residuals, of a level up to `amount` per row.

        Prediction and target stay clean. The network learns not to trust every detail of a past
        that it generated itself.
        """
        level = torch.rand(len(codes), 1, generator=generator, device=codes.device) * amount
        noise = torch.randn(codes.shape, generator=generator, device=codes.device)
        return {"codes": codes, "noise": level * noise}

    # --- all samples in parallel

    def forward(
        self,
        codes: Tensor,
        cond: FrameConditioning | None = None,
        state: PredictiveState | None = None,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `AutoregressiveModel.forward`; `noise` (B, T) is added to the residuals."""
        assert cond is not None, "a predictive WaveNet is conditioned on mels"
        config = self.config
        batch, total = codes.shape
        tensors = self._fresh(batch) if state is None else self.export_state(state)
        coefficients, scale, lag, voicing = cond.per_sample()
        x = self.value(codes)
        s = scale.double()
        # The past: kept samples, the one before codes[:, 0], the codes; time t lies at now + t.
        if previous is None:
            before = x.new_zeros(batch, 1)
            before_residual = before
        else:
            before = self.value(previous)[:, None]
            before_residual = _residual(before, *tensors["pending"].double().split(1, dim=1))
        now = config.history + 1
        xs = torch.cat([tensors["samples"].float(), before, x], dim=1)
        p = self._predicted(xs[:, now - config.prediction_order :], coefficients)
        residual = _residual(x, p, s)
        clean = torch.cat([tensors["residuals"].float(), before_residual, residual], dim=1)
        es = clean if noise is None else torch.cat([clean[:, :now], clean[:, now:] + noise], dim=1)
        whole = torch.cat([tensors["lags"], lag.round().long()], dim=1)
        features = _features(self._past_of(xs, es, lag, now), p, s, lag, voicing)
        h = self.input(features.to(self.input.weight.dtype))
        skip_span = config.gate_span(len(self.blocks))
        fused = _fused() if state is None and h.requires_grad else None
        if fused is not None and fused.usable(h, cond):
            gates = fused.gated_layers(self.blocks, config, h, cond, lag.round().long())
            skip = self.skip(torch.cat(gates, dim=-1))
            skip = fused.interpolated_onto(skip, cond, *skip_span)
        else:
            gates = self._layers(h, cond, whole, tensors)
            skip = self.skip(torch.cat(gates, dim=-1)) + cond.gates_at(*skip_span).to(h.dtype)
        if state is not None:
            kept = slice(total, total + config.history)
            tensors |= {"samples": xs[:, kept], "residuals": clean[:, kept]}
            tensors |= {"lags": whole[:, total:], "pending": torch.stack([p, s], dim=2)[:, -1]}
            self._store(tensors, state)
        return self._mixture(self.read(skip), p, s).transpose(1, 2)

    def _layers(
        self, h: Tensor, cond: FrameConditioning, whole: Tensor, tensors: dict[str, Tensor]
    ) -> list[Tensor]:
        """Return the gated units (B, T, R) of each layer; advance the queues in `tensors`."""
        gates, total = [], h.shape[1]
        for i, (block, dilation) in enumerate(zip(self.blocks, self.config.dilations, strict=True)):
            queue = tensors[f"queue.{i}"]
            full = torch.cat([queue.to(h.dtype), h], dim=1)
            tensors[f"queue.{i}"] = full[:, total:]
            taps = self._taps(full, dilation, whole, queue.shape[1], total)
            h, gated = block([*taps, h], cond.gates_at(*self.config.gate_span(i)).to(h.dtype))
            gates.append(gated)
        return gates

    @torch.no_grad()
    def residuals(self, codes: Tensor, cond: FrameConditioning) -> tuple[Tensor, Tensor]:
        """Return residuals and scales, (B, T) each, of codes (B, T) that begin a recording."""
        coefficients, scale, _, _ = cond.per_sample()
        x = self.value(codes)
        p = self._predicted(F.pad(x, (self.config.prediction_order, 0)), coefficients)
        return _residual(x, p, scale.double()), scale

    def _predicted(self, xs: Tensor, coefficients: Tensor) -> Tensor:
        """Predict (B, T), float64, from samples (B, order + T) and coefficients (B, T, order)."""
        windows = xs[:, :-1].unfold(1, self.config.prediction_order, 1)
        return folded(-(windows.double() * coefficients.flip(2).double()).sum(2))

    def value(self, codes: Tensor) -> Tensor:
        """Return the samples of codes, float32."""
        half = self.config.classes // 2
        return (codes - half).float() / half

    def _past_of(self, xs: Tensor, es: Tensor, lag: Tensor, now: int) -> _Past:
        """Gather the past of each time from the whole (B, now + T)."""
        config, total = self.config, lag.shape[1]
        count = config.recent_residuals
        recent = es[:, now - count : now + total - 1].unfold(1, count, 1)
        back = torch.arange(total, device=xs.device) + now - lag.ceil().long()
        around = back[:, :, None] + self.around(xs.device)
        return _Past(
            recent.double(),
            es.gather(1, around.flatten(1)).view(around.shape).double(),
            xs[:, now - 1 : now + total - 1].double(),
            xs.gather(1, back).double(),
        )

    def around(self, device: torch.device) -> Tensor:
        """Return the places, from one period ago, of the residuals that features need."""
        near = self.config.period_residuals
        return torch.arange(-near - 1, near + 3, device=device)

    def _taps(
        self, full: Tensor, dilation: int, whole: Tensor, kept: int, total: int
    ) -> list[Tensor]:
        """Return a layer's past inputs (B, T, R) at each tap but the current one, oldest first."""
        before = self.config.kernel_size - 1
        if dilation:
            return [full[:, k * dilation : k * dilation + total] for k in range(before)]
        lags = self.config.lag_history
        at = torch.arange(total, device=full.device).expand(len(full), -1)
        taps = []
        for _ in range(before):  # `whole` begins so many samples before the codes, a queue `kept`
            at = at - whole.gather(1, at + lags)
            rows = (at + kept)[:, :, None].expand(-1, -1, full.shape[2])
            taps.insert(0, full.gather(1, rows))
        return taps

    def read(self, skip: Tensor) -> Tensor:
        """Sum over layers (..., skip channels) -> mixture (..., 3 K), in units of e."""
        return self.output(F.relu(self.hidden(F.relu(skip))))

    def _mixture(self, raw: Tensor, p: Tensor, s: Tensor) -> Tensor:
        """Convert a mixture (..., 3 K) from units of e to those of samples."""
        dtype = torch.promote_types(raw.dtype, torch.float32)
        logits, means, scales = raw.to(dtype).chunk(3, dim=-1)
        means = (p[..., None] + s[..., None] * means).to(dtype)
        scales = (s.log()[..., None] + scales.clamp(*LOG_SCALES)).to(dtype)
        return torch.cat([logits, means, scales], dim=-1)

    # --- one sample at a time

    def init_state(self, batch: int) -> PredictiveState:
        return self.import_state(self._fresh(batch))

    def _fresh(self, batch: int) -> dict[str, Tensor]:
        """Return the state before the first sample: silence, whose residuals are zero."""
        config, weight = self.config, self.input.weight
        pending = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=weight.device)
        zeros = functools.partial(torch.zeros, batch, device=weight.device)
        found = {
            "samples": zeros(config.history),
            "residuals": zeros(config.history),
            "lags": zeros(config.lag_history, dtype=torch.long),
            "pending": pending.repeat(batch, 1),
        }
        for i, length in enumerate(config.queue_lengths):
            found[f"queue.{i}"] = weight.new_zeros(batch, length, config.residual_channels)
        return found

    def step(
        self, previous: Tensor, state: PredictiveState, cond_t: Tensor | None = None
    ) -> Tensor:
        """See `AutoregressiveModel.step`; `cond_t` is from `FrameConditioning.dense`."""
        assert cond_t is not None, "a predictive WaveNet is conditioned on mels"
        config, time = self.config, state.time
        gates_t, coefficients, scale, lag, voicing = cond_t.split(
            [config.gates, config.prediction_order, 1, 1, 1], dim=1
        )
        s, lag, voicing = scale[:, 0].double(), lag[:, 0], voicing[:, 0]
        # The value of the sample before is known now, and with it its residual.
        x = self.value(previous)
        history, ring = config.history, config.lag_history
        at = (time % history)[None]
        state.samples.index_copy_(1, at, x[:, None])
        state.residuals.index_copy_(1, at, _residual(x, *state.pending.unbind(1))[:, None])

        def last(values: Tensor, count: int) -> Tensor:
            newest = torch.arange(count - 1, -1, -1, device=x.device)
            return values.index_select(1, (time - newest) % history).double()

        window = last(state.samples, config.prediction_order)
        p = folded(-(window * coefficients.flip(1).double()).sum(1))
        state.pending.copy_(torch.stack([p, s], dim=1))
        # Slots hold the sample before: that of time t lies at t + 1.
        back = (time + 1 - lag.ceil().long())[:, None]
        around = (back + self.around(x.device)) % history
        past = _Past(
            last(state.residuals, config.recent_residuals),
            state.residuals.gather(1, around).double(),
            x.double(),
            state.samples.gather(1, back % history)[:, 0].double(),
        )
        state.lags.index_copy_(1, (time % ring)[None], lag.round().long()[:, None])
        h = self.input(_features(past, p, s, lag, voicing).to(self.input.weight.dtype))
        gates = []
        layers = zip(self.blocks, config.dilations, state.queues, strict=True)
        for i, (block, dilation, queue) in enumerate(layers):
            length = queue.shape[1]
            taps: list[Tensor] = []
            where = time.expand(len(x))
            for _ in range(config.kernel_size - 1):
                where = where - (dilation or state.lags.gather(1, where[:, None] % ring)[:, 0])
                rows = (where % length)[:, None, None].expand(-1, 1, queue.shape[2])
                taps.insert(0, queue.gather(1, rows)[:, 0])
            queue.index_copy_(1, (time % length)[None], h[:, None])
            h, gated = block([*taps, h], gates_t[:, slice(*config.gate_span(i))].to(h.dtype))
            gates.append(gated)
        state.time += 1
        bias = gates_t[:, slice(*config.gate_span(len(gates)))].to(h.dtype)
        return self._mixture(self.read(self.skip(torch.cat(gates, dim=-1)) + bias), p, s)

    def export_state(self, state: PredictiveState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: every ring with the oldest first.

        `samples` and `residuals` (B, H) end with those before the last code; `lags` (B, lag
        history) and `queue.0`, `queue.1`... (B, queue length, R) end with the last code's;
        `pending` (B, 2) are the prediction and the scale of the last code.
        """
        time = int(state.time)
        rings = {name: getattr(state, name) for name in _RINGS}
        rings |= {f"queue.{i}": queue for i, queue in enumerate(state.queues)}
        found = {n: ring.roll(-(time % ring.shape[1]), dims=1) for n, ring in rings.items()}
        return found | {"pending": state.pending.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> PredictiveState:
        weight = self.input.weight
        dtypes = _RINGS | {"pending": torch.float64}
        mine = {
            name: t.to(weight.device, dtypes.get(name, weight.dtype), copy=True)
            for name, t in tensors.items()
        }
        return PredictiveState(
            queues=[mine[f"queue.{i}"] for i in range(len(self.blocks))],
            time=torch.zeros((), dtype=torch.long, device=weight.device),
            **{name: mine[name] for name in dtypes},
        )

    @torch.no_grad()
    def _store(self, tensors: dict[str, Tensor], state: PredictiveState) -> None:
        for i, queue in enumerate(state.queues):
            queue.copy_(tensors[f"queue.{i}"])
        for name in (*_RINGS, "pending"):
            getattr(state, name).copy_(tensors[name])
        state.time.zero_()


def _fused() -> Any:
    """Return the module of fused layers, imported when needed: importing Numba is slow."""
    from wavear.models import fused

    return fused


def _residual(x: Tensor, p: Tensor, s: Tensor) -> Tensor:
    """(x - p) / s, in float64 rounded to float32: the same bits on every engine."""
    return ((x.double() - p) / s).float()


def folded(p: Tensor) -> Tensor:
    """Fold predictions beyond full scale back: 0 from twice full scale on.

    Samples are clipped at full scale, and a recursive filter that clips can oscillate there for as
    long as it runs, although it is stable (overflow oscillations: Ebert, Mazo and Taylor, 1969,
    https://doi.org/10.1002/j.1538-7305.1969.tb01202.x).
    """
    size = p.abs()
    return torch.where(size > 1, p.sign() * (2 - size).clamp(min=0), p)


def _features(past: _Past, p: Tensor, s: Tensor, lag: Tensor, voicing: Tensor) -> Tensor:
    """Return the input of the network (..., features), float32, computed in float64."""
    v, w = voicing.double()[..., None], (lag.ceil() - lag).double()[..., None]
    period = around_period(past.around, w, v)
    levels = level(torch.stack([p / s, past.last / s, past.period_ago / s], dim=-1))
    log_scale = (s.log()[..., None] + 6) * 0.5
    recent = clipped_residuals(past.recent)
    parts = [recent, levels[..., :2], log_scale, period, levels[..., 2:], v * 2 - 1]
    return torch.cat(parts, dim=-1).float()


def clipped_residuals(e: Tensor) -> Tensor:
    """Scale residuals for the input."""
    return e.clamp(-LARGEST_RESIDUAL, LARGEST_RESIDUAL) * 0.7


def level(ratio: Tensor) -> Tensor:
    """Compress a value in units of the residual's scale for the input."""
    return ratio.asinh() * 0.3


def around_period(e: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Interpolate residuals (..., n + 3) at a whole lag to a lag shorter by w, times voicing v."""
    around = clipped_residuals(e)
    a, b, c, d = around[..., :-3], around[..., 1:-2], around[..., 2:-1], around[..., 3:]
    # Catmull-Rom: the cubic between b and c with the slopes of their neighbours.
    curve = 2 * a - 5 * b + 4 * c - d + w * (3 * (b - c) + d - a)
    return (b + 0.5 * w * (c - a + w * curve)) * v
