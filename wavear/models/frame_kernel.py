"""`PredictiveConditioning` in compiled code: one frame after the other, for generation on the CPU.

A convolution library rounds differently for inputs of different lengths, and costs a millisecond
for a single frame. Here every number of a frame is one chain of operations in a fixed order: it is
the same to the bit however many frames are made at once, so a stream that gets frame by frame
equals the whole.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from wavear.models.prediction import _ROUNDING_POWER, LEAST_SCALE, WHITE_NOISE, _levinson

if TYPE_CHECKING:
    from wavear.models.predictive import PredictiveConditioning

_solve = numba.njit(_levinson)


@numba.njit
def _convolve(x, weight, bias, relu, out):
    """Frames (F, in) -> (F - k + 1, out) with weights (k, in, out); every output sums from the oldest frame on."""
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


@numba.njit
def _lag(logits, grid, near):
    """The logarithm of the lag: the mean over the classes next to the likeliest."""
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


def _run(mel, first, first_bias, second, second_bias, speaker, projection, projection_bias, c1, b1, c2, b2, c3, b3,
         lag_weight, lag_bias, voicing_weight, voicing_bias, grid, near, trims, low, high, lowest, log_power, offset,
         cosines, least_density, white, rounding, least_scale, gain, hop_weights, sub_weights, shortest, longest, gates,
         coefficients, scales, lags, voicings):  # fmt: skip
    """Normalised and plain mels (2, F', M) -> all of `FrameConditioning`; see `PredictiveConditioning.forward`.

    `trims` are, of the outputs of each network, how many to leave out at the beginning; and of the
    mel. `low`, `high` (bins,) and `lowest` (bins,) are the bands next to each bin, and the weight
    of the lower one.
    """
    plain, x = mel[0], mel[1]
    total = x.shape[0]
    frames = gates.shape[0] - 2
    h1 = np.empty((total - first.shape[0] + 1, first.shape[2]), np.float32)
    _convolve(x, first, first_bias, True, h1)
    h2 = np.empty((len(h1) - second.shape[0] + 1, second.shape[2]), np.float32)
    _convolve(h1, second, second_bias, True, h2)
    for f in range(len(h2)):
        for i in range(h2.shape[1]):
            h2[f, i] += speaker[i]
    made = np.empty((len(h2), gates.shape[1]), np.float32)
    _convolve(h2, projection, projection_bias, False, made)
    p1 = np.empty((total - 2, c1.shape[2]), np.float32)
    _convolve(x, c1, b1, True, p1)
    p2 = np.empty((total - 4, c2.shape[2]), np.float32)
    _convolve(p1, c2, b2, True, p2)
    p2 += p1[trims[2] : trims[2] + len(p2)]
    p3 = np.empty((total - 6, c3.shape[2]), np.float32)
    _convolve(p2, c3, b3, True, p3)
    p3 += p2[trims[2] : trims[2] + len(p3)]
    logits = np.empty((len(p3), lag_weight.shape[2]), np.float32)
    _convolve(p3, lag_weight, lag_bias, False, logits)
    voiced = np.empty((len(p3), 1), np.float32)
    _convolve(p3, voicing_weight, voicing_bias, False, voiced)
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
    "void(float32[:, :, ::1], float32[:, :, ::1], float32[::1], float32[:, :, ::1], float32[::1], float32[::1], "
    "float32[:, :, ::1], float32[::1], "
    + "float32[:, :, ::1], float32[::1], "
    * 5
    + "float32[::1], int64, UniTuple(int64, 4), int64[::1], int64[::1], float64[::1], UniTuple(float64, 2), "
    "float64[::1], float64[:, ::1], float64, float64, float64, float64, float64, float64[:, ::1], float64[:, ::1], "
    "float64, float64, float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], float32[::1])"
)


@functools.cache
def _kernel() -> Any:
    from wavear.common.compiled import compiled

    return compiled(_run, _SIGNATURE)


def usable(conditioning: PredictiveConditioning, mel: Tensor) -> bool:
    """Whether the compiled code can run: one utterance in float32 on the CPU, and no gradient is asked for."""
    weight = conditioning.projection.weight
    plain = (
        mel.device.type == "cpu" and mel.dtype == weight.dtype == torch.float32 and len(mel) == 1
    )
    return plain and not torch.is_grad_enabled()


def condition(
    conditioning: PredictiveConditioning, mel: Tensor, speaker: Tensor | None, frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gates (1, frames + 2, G), coefficients, scale, lag and voicing of a padded mel (1, M, F')."""
    from wavear.models.period import NEIGHBOURS

    config, network, envelope = conditioning.config, conditioning.period, conditioning.envelope

    def matrix(layer: Any) -> tuple[np.ndarray, np.ndarray]:
        weight = layer.weight.detach()
        weight = weight[:, :, None] if weight.dim() == 2 else weight
        return np.ascontiguousarray(weight.permute(2, 1, 0).numpy()), layer.bias.detach().numpy()

    both = (
        torch.stack([envelope.logarithm(mel)[0], conditioning.normalised(mel)[0]])
        .transpose(1, 2)
        .contiguous()
        .detach()
        .numpy()
    )
    voice = torch.zeros(config.conditioning_channels)
    if conditioning.speakers is not None:
        assert speaker is not None
        voice = conditioning.speakers.weight[int(speaker)].detach()
    made = both.shape[1] - 2 * config.conditioning_context - 2
    tracked = both.shape[1] - network.context
    if config.causal:
        trims = (made - frames - 1, tracked - frames - 1, 2, conditioning.lookback - 1)
    else:
        trims = (
            (made - frames - 2) // 2,
            (tracked - frames - 2) // 2,
            1,
            conditioning.lookback - 1,
        )
    gates = np.empty((frames + 2, config.gates), np.float32)
    coefficients = np.empty((frames * config.sub_frames, config.prediction_order), np.float32)
    scales = np.empty(frames * config.sub_frames, np.float32)
    lags, voicings = (
        np.empty(frames * conditioning.hop, np.float32),
        np.empty(frames * conditioning.hop, np.float32),
    )
    layers = [conditioning.first, conditioning.second]
    networks = [*network.convolutions, network.lag, network.voicing]
    _kernel()(
        both, *matrix(layers[0]), *matrix(layers[1]), voice.numpy(), *matrix(conditioning.projection),
        *(part for layer in networks for part in matrix(layer)), network.grid.numpy(), NEIGHBOURS, trims,
        *envelope.compiled, WHITE_NOISE, _ROUNDING_POWER, LEAST_SCALE, float(conditioning.gain),
        conditioning.hop_weights.numpy(), conditioning.sub_weights.numpy(),
        float(config.shortest_period), float(config.longest_period), gates, coefficients, scales, lags, voicings,
    )  # fmt: skip
    found = (gates, coefficients, scales, lags, voicings)
    return tuple(torch.from_numpy(array)[None] for array in found)  # type: ignore[return-value]
