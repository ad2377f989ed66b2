"""Generate with a predictive WaveNet so that gradients reach its weights through every sample.

`step` writes into rings, which stops gradients, and does one sample at a time. Here samples are
kept in lists, and what depends only on samples one period ago is computed for a block at once: a
period is longer than a block.

The draw is the one of `step`: a component, then e = mean + scale * logit(u). With u fixed, e is a
differentiable function of mean and scale (the reparameterisation of Kingma and Welling, 2014,
https://arxiv.org/abs/1312.6114); the choice of the component has no gradient. Samples are not
rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavear.models.frames import FrameConditioning
from wavear.models.predictive import (
    LOG_SCALES,
    PredictiveBlock,
    PredictiveWaveNet,
    around_period,
    clipped_residuals,
    folded,
    level,
)

_LONGEST_BLOCK = 24  # samples; longer ones gained nothing
_LEAST_UNIFORM = 1e-5  # logit(u) is then within 11.5
GRADIENT_GROWTH = 100.0
"""Gradients of samples are clipped at this multiple of the largest that comes in from outside, for
each stream: on their way back through 1,000 samples they can overflow. The multiple
is usually below 1, and was at most 55 in 1,000 stretches of a training."""


@dataclass(frozen=True)
class Past:
    """The past of B streams, the newest last."""

    samples: Tensor
    """(B, H + 1)."""
    residuals: Tensor
    """(B, H + 1)."""
    lags: Tensor
    """(B, lag history), int64."""
    queues: list[Tensor]
    """Per layer, (B, queue length, R): its inputs."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Past:
        """Return a past with `change` applied to every tensor."""
        queues = [change(queue) for queue in self.queues]
        return Past(change(self.samples), change(self.residuals), change(self.lags), queues)

    def twice(self) -> Past:
        """Return two copies of the streams, one after the other: (2 B, ...)."""
        return self.map(lambda x: torch.cat([x, x]))


@torch.no_grad()
def past_of(model: PredictiveWaveNet, codes: Tensor, cond: FrameConditioning) -> Past:
    """Return the past after codes (B, T) that follow silence, T at least 1."""
    state = model.init_state(len(codes))
    model(codes, cond, state=state)
    tensors = model.export_state(state)
    last = model.value(codes[:, -1:])
    prediction, scale = tensors["pending"].float().split(1, dim=1)
    return Past(
        torch.cat([tensors["samples"], last], dim=1),
        torch.cat([tensors["residuals"], (last - prediction) / scale], dim=1),
        tensors["lags"],
        [tensors[f"queue.{i}"] for i in range(len(model.blocks))],
    )


def rollout(
    model: PredictiveWaveNet, past: Past, cond: FrameConditioning, generator: torch.Generator
) -> tuple[Tensor, Past]:
    """Generate `cond.samples` samples (B, T) after `past`; return them and the past after them.

    Gradients reach the weights through these samples, not through those before them. On the CPU in
    float32 it is `compiled_rollout`.
    """
    config, dtype = model.config, model.input.weight.dtype
    past = past.map(lambda x: x.detach().to(dtype) if x.is_floating_point() else x)
    lag = cond.per_sample()[2]
    (batch, total), device = lag.shape, lag.device
    uniform = torch.rand(2, batch, total, generator=generator, device=device)
    component, u = uniform[0], uniform[1].clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM)
    # Places in time, from the first new sample on: those before it are below 0.
    at = torch.arange(total, device=device).expand(batch, -1)
    whole = torch.cat([past.lags, lag.round().long()], dim=1)
    places, periods = at, []
    for _ in range(config.kernel_size - 1):
        places = places - whole.gather(1, places + past.lags.shape[1])
        periods.insert(0, places)
    plan = (at - lag.ceil().long(), periods, component, torch.logit(u).to(dtype), GRADIENT_GROWTH)
    run = _kernel().generate_stretch if _kernel().usable(model, cond) else _generate_in_torch
    samples, residuals, inputs = run(model, past.samples, past.residuals, past.queues, cond, *plan)

    def newest(old: Tensor, new: Tensor) -> Tensor:
        length = old.shape[1]
        return torch.cat([old[:, total:], new.detach()], dim=1)[:, -length:]

    after = Past(
        newest(past.samples, samples),
        newest(past.residuals, residuals),
        whole[:, total:],
        [newest(old, new) for old, new in zip(past.queues, inputs, strict=True)],
    )
    return samples, after


def _kernel() -> Any:
    """Return the module of compiled code, imported when needed: importing Numba is slow."""
    from wavear.models import compiled_rollout

    return compiled_rollout


def _generate_in_torch(
    model: PredictiveWaveNet,
    past_samples: Tensor,
    past_residuals: Tensor,
    queues: list[Tensor],
    cond: FrameConditioning,
    back: Tensor,
    periods: list[Tensor],
    component: Tensor,
    logistic: Tensor,
    growth: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute `compiled_rollout.generate_stretch`; this is its definition."""
    config, dtype, device = model.config, model.input.weight.dtype, past_samples.device
    coefficients, scale, lag, voicing = cond.per_sample()
    batch, total = lag.shape
    block = min(config.shortest_period - config.period_residuals - 2, _LONGEST_BLOCK)
    widths = [2 * config.residual_channels] * len(config.dilations) + [config.skip_channels]
    biases = [b.split(widths, 2) for b in cond.gates_at(0, config.gates).split(block, 1)]
    samples, residuals = [past_samples], [past_residuals]
    layers = [
        _Layer(queue, dilation, block_.taps.weight)
        for queue, dilation, block_ in zip(queues, config.dilations, model.blocks, strict=True)
    ]
    count = config.recent_residuals
    recent_weight = model.input.weight[:, : count + 2].t()
    known_weight = model.input.weight[:, count + 2 :].t()
    bounds: list[Tensor] = []  # of the gradients, known when they come in

    def clip(made: Tensor) -> Tensor:
        if made.requires_grad:
            made.register_hook(lambda g: g.clamp(-bounds[-1], bounds[-1]))
        return made

    x_window = past_samples[:, -config.prediction_order :]
    e_window = past_residuals[:, -count:]
    reversed_coefficients = coefficients.flip(2)
    for number, first in enumerate(range(0, total, block)):
        now = slice(first, min(first + block, total))
        span = now.stop - now.start
        s, v = scale[:, now, None], voicing[:, now, None]
        near = back[:, now, None] + model.around(device)
        period = around_period(
            _gather(residuals, near.flatten(1)).view(batch, span, -1),
            (lag.ceil() - lag)[:, now, None],
            v,
        )
        ago = level(_gather(samples, back[:, now])[:, :, None] / s)
        known = torch.cat([(s.log() + 6) * 0.5, period, ago, v * 2 - 1], dim=2).to(dtype)
        inputs = (known @ known_weight + model.input.bias).unbind(1)
        for layer, bias in zip(layers, biases[number], strict=False):
            layer.begin(bias, [p[:, now] for p in periods])
        skips = (biases[number][-1] + model.skip.bias).unbind(1)
        xs, es = [], []
        for j in range(span):
            t = first + j
            s_t = scale[:, t : t + 1]
            p = folded(-(x_window * reversed_coefficients[:, t]).sum(1, keepdim=True))
            levels = level(torch.cat([p, x_window[:, -1:]], dim=1) / s_t)
            recent = torch.cat([clipped_residuals(e_window), levels], dim=1)
            h, gated = torch.addmm(inputs[j], recent, recent_weight), []
            for layer, network in zip(layers, model.blocks, strict=True):
                h, units = layer.step(network, h, j)
                gated.append(units)
            skip = torch.addmm(skips[j], torch.cat(gated, dim=1), model.skip.weight.t())
            logits, means, scales = model.read(skip).chunk(3, dim=1)
            below = logits.detach().softmax(1).cumsum(1) < component[:, t : t + 1]
            chosen = below.sum(1, keepdim=True).clamp(max=config.mixtures - 1)
            width = scales.gather(1, chosen).clamp(*LOG_SCALES).exp()
            e = means.gather(1, chosen) + width * logistic[:, t : t + 1]
            x = clip(p + s_t * e)
            xs.append(x)
            es.append(e)
            x_window = torch.cat([x_window[:, 1:], x], dim=1)
            e_window = torch.cat([e_window[:, 1:], e], dim=1)
        samples.append(torch.cat(xs, dim=1))
        residuals.append(torch.cat(es, dim=1))
        for layer in layers:
            layer.end()
    made = [layer.made() for layer in layers]
    out = torch.cat(samples[1:], dim=1)
    if out.requires_grad:
        out.register_hook(lambda g: bounds.append(growth * g.abs().amax(1, keepdim=True)))
    return out, torch.cat(residuals[1:], dim=1), made


class _Layer:
    """The inputs of one layer, kept for its taps."""

    def __init__(self, queue: Tensor, dilation: int, weight: Tensor):
        self.dilation = dilation
        self.kept = [queue]
        channels = queue.shape[2]
        if dilation:
            self.inputs = list(queue.unbind(1))
            self.weight = weight.t()
        else:  # taps of the past first, then the current
            self.past_weight, self.weight = weight[:, :-channels].t(), weight[:, -channels:].t()

    def begin(self, bias: Tensor, periods: list[Tensor]) -> None:
        """Begin a block with gate biases (B, n, 2 R); taps of a period layer lie at `periods`."""
        if not self.dilation:
            taps = torch.cat([_gather(self.kept, places) for places in periods], dim=2)
            bias = bias + taps @ self.past_weight
        self.biases = bias.unbind(1)
        self.new: list[Tensor] = []

    def step(self, network: PredictiveBlock, h: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Input (B, R) of sample j of the block -> the next layer's input, and gated units."""
        taps = [h]
        if self.dilation:
            before = network.taps.in_features // h.shape[1] - 1
            taps = [self.inputs[-k * self.dilation] for k in range(before, 0, -1)] + taps
            self.inputs.append(h)
        self.new.append(h)
        gate = torch.addmm(self.biases[j], torch.cat(taps, dim=1), self.weight)
        return network.gated(gate, h)

    def end(self) -> None:
        """End a block."""
        self.kept.append(torch.stack(self.new, dim=1))

    def made(self) -> Tensor:
        """Return the inputs of all samples: (B, T, R)."""
        return torch.cat(self.kept[1:], dim=1)


def _gather(parts: list[Tensor], places: Tensor) -> Tensor:
    """Take values at places (B, n): those below 0 from the first part, of the past, (B, L, ...)."""

    def take(x: Tensor, rows: Tensor) -> Tensor:
        rows = rows.clamp(0, x.shape[1] - 1)
        return x.gather(1, rows if x.dim() == 2 else rows[:, :, None].expand(-1, -1, x.shape[2]))

    old = take(parts[0], places + parts[0].shape[1])
    if len(parts) == 1:
        return old
    new = take(torch.cat(parts[1:], dim=1), places)
    inside = places >= 0
    return torch.where(inside if old.dim() == 2 else inside[:, :, None], new, old)
