"""`PredictiveConditioning` in compiled code: one frame after the other, for generation on the CPU.

A convolution library rounds differently for inputs of different lengths, and costs a millisecond
for a single frame. Here every number of a frame is one chain of operations in a fixed order: the
same bits however many frames are computed at once, so a stream that gets frame by frame equals the
whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from wavear.models.period import NEIGHBOURS, PeriodNetwork
from wavear.models.prediction import (
    LEAST_LOG_DENSITY,
    LEAST_SCALE,
    ROUNDING_POWER,
    WHITE_NOISE,
    Envelope,
    _levinson,
)

_solve = numba.njit(_levinson)


@numba.njit
def _convolve(x, layer, relu):
    """Frames (F, in) -> (F - k + 1, out); weights (k, in, out), summed from the oldest frame on."""
    weight, bias = layer
    out = np.empty((len(x) - weight.shape[0] + 1, weight.shape[2]), np.float32)
    for f in range(out.shape[0]):
        row = out[f]
        row[:] = bias
        for k in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                value = x[f + k, i]
                w = weight[k, i]
                for o in range(row.shape[0]):
                    row[o] += w[o] * value
        if relu:
            for o in range(row.shape[0]):
                row[o] = max(row[o], np.float32(0))
    return out


@numba.njit
def _lag(logits, grid, near):
    """Return the log-lag: the mean over the classes next to the likeliest."""
    best = 0
    for k in range(1, logits.shape[0]):
        if logits[k] > logits[best]:
            best = k
    total, mean = 0.0, 0.0
    for j in range(-near, near + 1):
        k = min(max(best + j, 0), logits.shape[0] - 1)
        weight = math.exp(np.float64(logits[k]) - np.float64(logits[best]))
        total += weight
        mean += weight * np.float64(grid[k])
    return mean / total


def _run(mel, layers, speaker, grid, near, trims, low, high, lowest, log_power, offset, cosines,
         least_density, white, rounding, least_scale, gain, hop_weights, sub_weights, shortest,
         longest, gates, coefficients, scales, lags, voicings):  # fmt: skip
    """Plain and normalised mels (2, F', M) -> all of `FrameConditioning`.

    `trims` are the outputs to leave out at the beginning: of the gate biases, of the period
    network, of its residual connections, and of the mel. `low`, `high` and `lowest` (bins,) are the
    bands next to each bin, and the weight of the lower one.
    """
    first, second, projection, c1, c2, c3, lag_layer, voicing_layer = layers
    plain, x = mel[0], mel[1]
    total = x.shape[0]
    frames = gates.shape[0] - 2
    h2 = _convolve(_convolve(x, first, True), second, True)
    for f in range(len(h2)):
        for i in range(h2.shape[1]):
            h2[f, i] += speaker[i]
    made = _convolve(h2, projection, False)
    p1 = _convolve(x, c1, True)
    p2 = _convolve(p1, c2, True)
    p2 += p1[trims[2] : trims[2] + len(p2)]
    p3 = _convolve(p2, c3, True)
    p3 += p2[trims[2] : trims[2] + len(p3)]
    logits = _convolve(p3, lag_layer, False)
    voiced = _convolve(p3, voicing_layer, False)
    log_lags, voicing = np.empty(frames + 2), np.empty(frames + 2)
    r = np.empty((frames + 2, cosines.shape[1]))
    for f in range(frames + 2):
        # In causal models there is no frame after the last: its weight is zero.
        g = min(trims[0] + f, len(made) - 1)
        gates[f] = made[g]
        g = min(trims[1] + f, len(logits) - 1)
        log_lags[f] = _lag(logits[g], grid, near)
        voicing[f] = 1 / (1 + math.exp(-np.float64(voiced[g, 0])))
        g = min(trims[3] + f, total - 1)
        r[f] = 0.0
        for b in range(len(low)):
            density = lowest[b] * log_power[0] * (plain[g, low[b]] - log_power[1])
            density += (1 - lowest[b]) * log_power[0] * (plain[g, high[b]] - log_power[1])
            power = math.exp(max(density + offset[b], least_density))
            for k in range(r.shape[1]):
                r[f, k] += cosines[b, k] * power
    hop, subs = hop_weights.shape[1], sub_weights.shape[1]
    between = np.empty((frames * subs, r.shape[1]))
    for f in range(frames):
        for p in range(hop):
            w0, w1, w2 = hop_weights[0, p], hop_weights[1, p], hop_weights[2, p]
            lag = math.exp(log_lags[f] * w0 + log_lags[f + 1] * w1 + log_lags[f + 2] * w2)
            lags[f * hop + p] = min(max(lag, shortest), longest)
            voicings[f * hop + p] = voicing[f] * w0 + voicing[f + 1] * w1 + voicing[f + 2] * w2
        for p in range(subs):
            w0, w1, w2 = sub_weights[0, p], sub_weights[1, p], sub_weights[2, p]
            row = between[f * subs + p]
            for k in range(r.shape[1]):
                row[k] = r[f, k] * w0 + r[f + 1, k] * w1 + r[f + 2, k] * w2
            row[0] = row[0] * (1 + white) + rounding
    a, error = np.empty_like(between), np.empty(len(between))
    _solve(between, a, error)
    for i in range(len(between)):
        for k in range(coefficients.shape[1]):
            coefficients[i, k] = a[i, k + 1]
        scales[i] = max(math.sqrt(error[i]) * gain, least_scale)


_SIGNATURE = (
    "void(float32[:, :, ::1], UniTuple(Tuple((float32[:, :, ::1], float32[::1])), 8), float32[::1],"
    " float32[::1], int64, UniTuple(int64, 4), int64[::1], int64[::1], float64[::1], "
    "UniTuple(float64, 2), float64[::1], float64[:, ::1], float64, float64, float64, float64, "
    "float64, float64[:, ::1], float64[:, ::1], float64, float64, float32[:, ::1], "
    "float32[:, ::1], float32[::1], float32[::1], float32[::1])"
)


@functools.cache
def _kernel() -> Any:
    from wavear.common.compiled import compiled

    return compiled(_run, _SIGNATURE)


Packed = tuple[tuple[np.ndarray, np.ndarray], ...]
"""Weights (kernel, inputs, outputs) and biases of each layer."""


def pack(layers: Sequence[nn.Module], period: PeriodNetwork) -> Packed:
    """Return the weights as the kernel reads them.

    Parameters
    ----------
    layers : the two convolutions and the projection to gate biases
    """

    def matrix(layer: Any) -> tuple[np.ndarray, np.ndarray]:
        weight = layer.weight.detach()
        weight = weight[:, :, None] if weight.dim() == 2 else weight
        return np.ascontiguousarray(weight.permute(2, 1, 0).numpy()), layer.bias.detach().numpy()

    return tuple(map(matrix, [*layers, *period.convolutions, period.lag, period.voicing]))


def condition(
    mels: Tensor,
    matrices: Packed,
    speaker: Tensor,
    period: PeriodNetwork,
    envelope: Envelope,
    trims: tuple[int, ...],
    weights: tuple[Tensor, Tensor],
    gain: float,
    range_of_lags: tuple[int, int],
    frames: int,
) -> tuple[Tensor, ...]:
    """Return gates (1, frames + 2, G), coefficients, scale, lag and voicing of one utterance.

    Parameters
    ----------
    mels : Tensor, shape (2, M, F')
        Log-mels with their context, plain and normalised.
    matrices : see `pack`
    speaker : Tensor, shape (C,)
        Added before the projection.
    trims : see `_run`
    weights : interpolation weights of samples and of sub-frames
    """
    hop, subs = weights[0].shape[1], weights[1].shape[1]
    tables = envelope.tables
    found = (
        np.empty((frames + 2, len(matrices[2][1])), np.float32),
        np.empty((frames * subs, envelope.order), np.float32),
        np.empty(frames * subs, np.float32),
        np.empty(frames * hop, np.float32),
        np.empty(frames * hop, np.float32),
    )
    _kernel()(
        mels.transpose(1, 2).contiguous().detach().numpy(), matrices, speaker.numpy(),
        period.grid.numpy(), NEIGHBOURS, trims,
        tables.low.numpy(), tables.high.numpy(), tables.weight.numpy(), envelope.log_power,
        tables.offset.numpy(), tables.cosines.numpy(), LEAST_LOG_DENSITY, WHITE_NOISE,
        ROUNDING_POWER, LEAST_SCALE, gain, *(each.numpy() for each in weights),
        *map(float, range_of_lags), *found,
    )  # fmt: skip
    return tuple(torch.from_numpy(array)[None] for array in found)
