"""The rollout of `wavear.models.rollout` as one differentiable function, compiled, for the CPU.

torch makes about 60 small operations per sample, and as many for their gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.models.frames import FrameConditioning
from wavear.models.predictive import PredictiveWaveNet, clipped_residuals
from wavear.models.rollout_kernel import Biases, Given, Gradients, Kept, Weights, run


def _parameters(model: PredictiveWaveNet) -> list[Tensor]:
    """Return the weights of `Weights` and `Biases`, those of layers one after the other."""
    blocks = list(model.blocks)
    residuals = [block.residual for block in blocks[:-1]]
    ends = [model.skip, model.hidden, model.output]
    return [
        *(model.input.weight, *(block.taps.weight for block in blocks)),
        *(each.weight for each in (*residuals, *ends)),
        *(each.bias for each in (model.input, *residuals, *ends)),
    ]


def _arrays(parameters: tuple[Tensor, ...], layers: int) -> tuple[Weights, Weights, Biases]:
    """Return the weights for the way forth, those for the way back, and the biases."""
    detached = [p.detach() for p in parameters]
    first, taps, rest = detached[0], detached[1 : layers + 1], detached[layers + 1 :]
    r = len(first)
    residual = torch.stack([first.new_zeros(r, r), *rest[: layers - 1]])[1:]
    back = [first, torch.stack(taps), residual, *rest[layers - 1 : layers + 2]]
    forth = [w.transpose(-1, -2) for w in back]
    bias, *biases = rest[layers + 2 :]
    residual_bias = torch.stack([bias.new_zeros(r), *biases[: layers - 1]])[1:]
    return (
        Weights(*(w.contiguous().numpy() for w in forth)),
        Weights(*(w.contiguous().numpy() for w in back)),
        Biases(*(b.contiguous().numpy() for b in (bias, residual_bias, *biases[layers - 1 :]))),
    )


class _Rollout(torch.autograd.Function):
    """Gate biases (B, F, G, 3) and `_parameters` -> samples (T, B)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        recent: int,
        growth: float,
        given: Given,
        kept: Kept,
        gates: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        given = given._replace(gates=gates.detach().transpose(2, 3).contiguous().numpy())
        forth, back, biases = _arrays(parameters, len(given.begins))
        run(False, recent, forth, biases, given, kept)
        ctx.kept = recent, growth, back, given, kept
        return torch.from_numpy(kept.samples[-len(given.scale) :].copy())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        if ctx.kept is None:
            raise RuntimeError("the gradient of a rollout can be taken once")
        (recent, growth, weights, given, kept), ctx.kept = ctx.kept, None
        layers, (total, streams) = len(given.begins), given.scale.shape
        rows = total * streams
        gradients = Gradients(
            gradient.clone(memory_format=torch.contiguous_format).numpy(),
            np.zeros_like(given.scale),
            np.zeros((layers, total, streams, kept.h.shape[2]), np.float32),
            np.zeros_like(given.gates),
            np.empty_like(kept.skip),
            np.empty_like(kept.hidden),
            np.zeros((total, streams, weights.output.shape[0]), np.float32),
            gradient.abs().amax(0).numpy() * np.float32(growth),
        )
        run(True, recent, weights, given, kept, gradients)

        def flat(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).view(rows, -1)

        h = [flat(each) for each in gradients.h]
        units = flat(kept.units).split(kept.h.shape[2], dim=1)
        skip, hidden, raw = (flat(x) for x in (gradients.skip, gradients.hidden, gradients.raw))
        features = flat(np.ascontiguousarray(kept.features.transpose(0, 2, 1)))
        taps, period = [], 0
        for layer, dilation in enumerate(given.dilations):
            z, begin = flat(kept.factors[layer]), given.begins[layer]
            before = [-k * dilation for k in range(len(given.places), 0, -1)] if dilation else []
            parts = [flat(kept.h[begin + k : begin + k + total]) for k in (*before, 0)]
            if not dilation:
                parts.insert(0, flat(kept.taps[period]))
                period += 1
            taps.append(torch.cat([z.t() @ part for part in parts], dim=1))
        found = [
            *(h[0].t() @ features, *taps),
            *(after.t() @ unit for after, unit in zip(h[1:], units, strict=False)),
            *(skip.t() @ flat(kept.units), hidden.t() @ flat(kept.skip)),
            raw.t() @ flat(kept.hidden),
            *(each.sum(0) for each in (*h, skip, hidden, raw)),
        ]
        return None, None, None, None, torch.from_numpy(gradients.gates).transpose(2, 3), *found


def usable(model: PredictiveWaveNet, cond: FrameConditioning) -> bool:
    """Return whether the kernel can run: on the CPU in float32."""
    tensors = (model.input.weight, cond.gates, cond.scale)
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def generate_stretch(
    model: PredictiveWaveNet,
    samples: Tensor,
    residuals: Tensor,
    queues: list[Tensor],
    cond: FrameConditioning,
    back: Tensor,
    places: list[Tensor],
    component: Tensor,
    logistic: Tensor,
    growth: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Generate samples (B, T), differentiable; return them, residuals, and inputs of the layers.

    Parameters
    ----------
    samples, residuals : Tensor, shape (B, N)
        Those of the past, the newest last.
    queues : the past inputs (B, n, R) of each layer
    back : Tensor, shape (B, T)
        The sample one period ago, counted from the first new one.
    places : K - 1 of (B, T), those that the taps of a period layer read, the oldest first
    component, logistic : Tensor, shape (B, T)
        The randomness.
    growth : float
        See `rollout.GRADIENT_GROWTH`.

    Returns
    -------
    samples (B, T), residuals (B, T) and for each layer inputs (B, T, R); the last two have no
    gradient
    """
    config = model.config
    coefficients, scale, lag, voicing = cond.per_sample()
    streams, total = lag.shape
    past, r, layers = samples.shape[1], config.residual_channels, len(config.dilations)
    before = config.kernel_size - 1

    def extended(values: Tensor) -> np.ndarray:
        return np.concatenate([values.t().numpy(), np.empty((total, streams), np.float32)])

    def by_time(values: Tensor) -> np.ndarray:
        return values.transpose(0, 1).contiguous().numpy()

    w = (lag.ceil() - lag)[:, :, None]
    # The cubic of `predictive.around_period`, as a weight for each neighbour.
    cubic = torch.cat(
        [
            w * (w * (2 - w) - 1),
            2 + w * w * (3 * w - 5),
            w * (1 + w * (4 - 3 * w)),
            w * w * (w - 1),
        ],
        dim=2,
    )
    times = cond.times()
    lengths = [before * dilation for dilation in config.dilations]
    begins = np.cumsum([length + total for length in lengths]) - total
    periods = [queue for queue, d in zip(queues, config.dilations, strict=True) if not d]
    given = Given(
        np.array(config.dilations),
        begins,
        np.empty((0, 0, 0, 0), np.float32),
        by_time(times // cond.hop),
        by_time(cond.weights.t().float()[times % cond.hop]),
        coefficients.permute(1, 2, 0).contiguous().numpy(),
        by_time(scale),
        by_time(back),
        by_time(cubic * 0.5 * voicing[:, :, None]),
        torch.stack(places).transpose(1, 2).contiguous().numpy(),
        (torch.stack(periods) if periods else samples.new_zeros(0, streams, 1, r)).numpy(),
        by_time(component),
        by_time(logistic),
    )

    def empty(*shape: int) -> np.ndarray:
        return np.empty(shape, np.float32)

    kept = Kept(
        extended(samples),
        extended(residuals),
        extended(clipped_residuals(residuals)),
        empty(total, streams),
        empty(total, config.features, streams),
        empty(begins[-1] + total, streams, r),
        empty(len(periods), total, streams, before * r),
        empty(layers, total, streams, 2 * r),
        empty(total, streams, layers * r),
        empty(total, streams, config.skip_channels),
        empty(total, streams, config.head_channels),
        np.empty((total, streams), np.int64),
        empty(total, streams),
    )
    kept.features[:, config.recent_residuals + 2] = by_time((scale.log() + 6) * 0.5)
    kept.features[:, -1] = by_time(voicing * 2 - 1)
    for begin, length, queue in zip(begins, lengths, queues, strict=True):
        if length:
            kept.h[begin - length : begin] = by_time(queue[:, -length:])
    made: Tensor = _Rollout.apply(  # type: ignore[assignment]
        config.recent_residuals, growth, given, kept, cond.gates, *_parameters(model)
    )
    return (
        made.t(),
        torch.from_numpy(kept.residuals[past:]).t(),
        [torch.from_numpy(kept.h[b : b + total]).transpose(0, 1) for b in begins],
    )
