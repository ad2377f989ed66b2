"""The loop over samples of a predictive WaveNet, as it is compiled; see `predictive`."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.products import MATRIX, array_of, copy_row, multiply_row, record
from wavear.generation.cpu.sampling import CALL, settle

# As in `wavear.models.predictive`; the key of the compiled code covers this directory only.
_LARGEST_RESIDUAL = 15.0
_LEAST_LOG_SCALE, _LARGEST_LOG_SCALE = -7.0, 5.0

# Of a layer: its dilation, or 0 for the period; rows of its ring less one, a power of two less one;
# numbers of matrices, addresses of biases.
LAYER = record("dilation mask taps residual taps_bias residual_bias")
# Of a network: sizes, numbers of matrices, addresses of biases; `room`: floats that a product
# writes, at most. (No memory for a categorical law, which it never has.)
PLAN = record(
    "law mixtures classes recent near tap_count x_vectors skip_vectors head_vectors features "
    "history room input skip hidden output input_bias skip_bias hidden_bias output_bias "
    "logit_blocks weights sums"
)


class Frames(NamedTuple):
    """The state and the conditioning of the streams; the rest as in `FrameConditioning`."""

    rings: Any
    """int64 (B, L): addresses of the past inputs of each layer."""
    times: Any
    """int64 (B,): samples made so far; advanced."""
    samples: Any
    """float32 (B, history + 1 + n): of which the last n are filled in."""
    residuals: Any
    """float32 (B, history + 1 + n)."""
    whole_lags: Any
    """int64 (B, lag history + n)."""
    pending: Any
    """float64 (B, 2): prediction and scale of the last sample."""
    gates: Any
    """float32 (B, F, 3, padded G)."""
    weights: Any
    """float32 (3, hop)."""
    coefficients: Any
    """float32 (B, sub-frames, order), oldest first."""
    scales: Any
    lags: Any
    voicings: Any
    offsets: Any


FRAMES = types.NamedTuple(
    (types.int64[:, ::1], types.int64[::1], types.float32[:, ::1], types.float32[:, ::1],
     types.int64[:, ::1], types.float64[:, ::1], types.float32[:, :, :, ::1],
     types.float32[:, ::1], types.float32[:, :, ::1], types.float32[:, ::1],
     types.float32[:, ::1], types.float32[:, ::1], types.int64[::1]),
    Frames,
)  # fmt: skip


@numba.njit
def _clamped(es, i):
    return min(max(np.float64(es[i]), -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL) * 0.7


@numba.njit
def _features(out, xs, es, now, back, fraction, voicing, p, s, log_s, recent, near):
    """Write the network's features, float64 rounded once; see `wavear.models.predictive`."""
    for j in range(recent):
        out[j] = np.float32(_clamped(es, now - recent + j))
    out[recent] = np.float32(math.asinh(p / s) * 0.3)
    out[recent + 1] = np.float32(math.asinh(np.float64(xs[now - 1]) / s) * 0.3)
    out[recent + 2] = np.float32((log_s + 6) * 0.5)
    n, w, first = recent + 3, fraction, back - near
    b, c, d = _clamped(es, first - 1), _clamped(es, first), _clamped(es, first + 1)
    for j in range(2 * near + 1):
        a, b, c, d = b, c, d, _clamped(es, first + 2 + j)
        cubic = b + 0.5 * w * (c - a + w * (2 * a - 5 * b + 4 * c - d + w * (3 * (b - c) + d - a)))
        out[n] = np.float32(cubic * voicing)
        n += 1
    out[n] = np.float32(math.asinh(np.float64(xs[back]) / s) * 0.3)
    out[n + 1] = np.float32(voicing * 2 - 1)


@numba.njit
def _mixture(raw, row, mixtures, p, s, log_s):
    """From units of the residual to those of samples."""
    for k in range(mixtures):
        row[k] = raw[k]
        row[mixtures + k] = np.float32(p + s * np.float64(raw[mixtures + k]))
        log_scale = np.float64(raw[2 * mixtures + k])
        if not log_scale >= _LEAST_LOG_SCALE and log_scale == log_scale:
            log_scale = _LEAST_LOG_SCALE
        if log_scale > _LARGEST_LOG_SCALE:
            log_scale = _LARGEST_LOG_SCALE
        row[2 * mixtures + k] = np.float32(log_s + log_scale)


@numba.njit
def _gather(net, layer, ring, time, lags, now, inputs):
    """Put the current input of a layer, the last of `inputs`, in its ring; gather the past taps."""
    row = net.x_vectors * VECTOR_BYTES
    slot, behind = time, now
    for k in range(net.tap_count - 1):
        step = layer.dilation
        if step == 0:
            step = lags[behind]
            behind -= step
        slot -= step
        out = inputs + (net.tap_count - 2 - k) * row
        copy_row(ring + (slot & layer.mask) * row, out, net.x_vectors)
    current = inputs + (net.tap_count - 1) * row
    copy_row(current, ring + (time & layer.mask) * row, net.x_vectors)


def _run(first, last, plan, layers, matrices, frames, call):
    """Run the streams `first` to `last`, one after the other.

    Returns
    -------
    int64
        The first sample of this call whose distribution is not finite, or -1.
    """
    net = plan[0]
    mixtures, count, samples = net.mixtures, layers.shape[0], call.codes.shape[1]
    hop, order = frames.weights.shape[1], frames.coefficients.shape[2]
    per_frame = frames.scales.shape[1] // frames.gates.shape[1]
    row_bytes, half = net.x_vectors * VECTOR_BYTES, net.classes // 2
    seen = np.zeros(net.features + LANES, np.float32)
    inputs = np.zeros(net.tap_count * net.x_vectors * LANES + LANES, np.float32)
    units = np.zeros(count * net.x_vectors * LANES + LANES, np.float32)
    rooms = np.zeros((6, net.room), np.float32)
    raw, row = rooms[4], np.zeros(3 * mixtures, np.float32)
    bias_gates = np.zeros(frames.gates.shape[3] + LANES, np.float32)
    h, z, skip, hidden, raw_at, zeros = (
        rooms[0].ctypes.data,
        rooms[1].ctypes.data,
        rooms[2].ctypes.data,
        rooms[3].ctypes.data,
        rooms[4].ctypes.data,
        rooms[5].ctypes.data,
    )
    gates_at, units_at, inputs_at = bias_gates.ctypes.data, units.ctypes.data, inputs.ctypes.data
    current = inputs_at + (net.tap_count - 1) * row_bytes
    ring_of_lags = frames.whole_lags.shape[1] - samples
    for b in range(first, last):
        x, e, lags = frames.samples[b], frames.residuals[b], frames.whole_lags[b]
        pending, gates = frames.pending[b], frames.gates[b]
        e[net.history] = np.float32((np.float64(x[net.history]) - pending[0]) / pending[1])
        sub_before = -1
        s, log_s = 1.0, 0.0
        for t in range(samples):
            place = frames.offsets[b] + t
            frame, phase = place // hop, place % hop
            sub = frame * per_frame + phase * per_frame // hop
            if sub != sub_before:
                s = np.float64(frames.scales[b, sub])
                log_s = math.log(s)
                sub_before = sub
            now = net.history + 1 + t
            p = 0.0
            for k in range(order):
                p -= np.float64(frames.coefficients[b, sub, k]) * np.float64(x[now - order + k])
            lag = frames.lags[b, place]
            if not lag >= 1:  # NaN would lead outside of the arrays
                return t
            ceiling = math.ceil(lag)
            fraction = np.float64(np.float32(ceiling) - lag)
            voicing = np.float64(frames.voicings[b, place])
            _features(seen, x, e, now, now - np.int64(ceiling), fraction, voicing, p, s, log_s,
                      net.recent, net.near)  # fmt: skip
            w0, w1, w2 = (
                frames.weights[0, phase],
                frames.weights[1, phase],
                frames.weights[2, phase],
            )
            for j in range(gates.shape[2]):
                bias_gates[j] = (
                    gates[frame, 0, j] * w0 + gates[frame, 1, j] * w1 + gates[frame, 2, j] * w2
                )
            multiply_row(matrices[net.input], seen.ctypes.data, net.input_bias, zeros, h)
            time = frames.times[b] + t
            for i in range(count):
                layer = layers[i]
                copy_row(h, current, net.x_vectors)
                _gather(net, layer, frames.rings[b, i], time, lags, ring_of_lags + t, inputs_at)
                gate, unit = gates_at + 2 * i * row_bytes, units_at + i * row_bytes
                multiply_row(matrices[layer.taps], inputs_at, layer.taps_bias, gate, z)
                simd.gate(z, z + row_bytes, unit, net.x_vectors, VECTOR_BYTES)
                if i < count - 1:
                    multiply_row(matrices[layer.residual], unit, layer.residual_bias, h, h)
            gate = gates_at + 2 * count * row_bytes
            multiply_row(matrices[net.skip], units_at, net.skip_bias, gate, skip)
            simd.relu(skip, skip, net.skip_vectors)
            multiply_row(matrices[net.hidden], skip, net.hidden_bias, zeros, hidden)
            simd.relu(hidden, hidden, net.head_vectors)
            multiply_row(matrices[net.output], hidden, net.output_bias, zeros, raw_at)
            _mixture(raw, row, mixtures, p, s, log_s)
            code = settle(net, row.ctypes.data, call, b, t)
            if code < 0:
                return t
            value = np.float64(code - half) / half
            x[now] = np.float32(value)
            e[now] = np.float32((value - p) / s)
            pending[0], pending[1] = p, s
        frames.times[b] += samples
    return -1


@functools.cache
def run() -> Any:
    """Compile `_run` at the first call, or read it from the cache."""
    plans = array_of(PLAN), array_of(LAYER), array_of(MATRIX)
    signature: Any = types.int64(types.int64, types.int64, *plans, FRAMES, CALL)
    return compiled(_run, signature)
