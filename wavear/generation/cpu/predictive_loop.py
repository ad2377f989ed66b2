"""The loop of the CPU engine of a predictive WaveNet over samples, compiled; see `numba_predictive`."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.distributions import LOGISTIC_MIXTURE, draw_value, log_probability
from wavear.generation.cpu.simd import LANES, VECTOR_BYTES

_LARGEST_RESIDUAL = 15.0  # these three are `wavear.models.predictive`'s; what is compiled depends on this folder alone
_LEAST_LOG_SCALE, _LARGEST_LOG_SCALE = -7.0, 5.0


@numba.njit
def _product(matrix, bias, x, init, out):
    """out = init + bias + matrix @ x; every output is one chain in the order of the inputs."""
    address, inputs, blocks, vectors, kernel, size = matrix
    for block in range(blocks):
        at = block * vectors * VECTOR_BYTES
        simd.call6(kernel, address + block * size, inputs, x, bias + at, init + at, out + at)


@numba.njit
def _features(out, xs, es, now, back, fraction, voicing, p, s, log_s, recent, near):
    """What the network sees of the past; see `wavear.models.predictive`. All in float64, rounded once."""
    for j in range(recent):
        e = np.float64(es[now - recent + j])
        out[j] = np.float32(min(max(e, -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL) * 0.7)
    out[recent] = np.float32(math.asinh(p / s) * 0.3)
    out[recent + 1] = np.float32(math.asinh(np.float64(xs[now - 1]) / s) * 0.3)
    out[recent + 2] = np.float32((log_s + 6) * 0.5)
    n, w = recent + 3, fraction
    b = min(max(np.float64(es[back - near - 1]), -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL) * 0.7
    c = min(max(np.float64(es[back - near]), -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL) * 0.7
    d = min(max(np.float64(es[back - near + 1]), -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL) * 0.7
    for j in range(2 * near + 1):
        a, b, c = b, c, d
        d = (
            min(max(np.float64(es[back - near + 2 + j]), -_LARGEST_RESIDUAL), _LARGEST_RESIDUAL)
            * 0.7
        )
        cubic = b + 0.5 * w * (c - a + w * (2 * a - 5 * b + 4 * c - d + w * (3 * (b - c) + d - a)))
        out[n] = np.float32(cubic * voicing)
        n += 1
    out[n] = np.float32(math.asinh(np.float64(xs[back]) / s) * 0.3)
    out[n + 1] = np.float32(voicing * 2 - 1)


@numba.njit
def _mixture(raw, row, mixtures, p, s, log_s):
    """From units of e to those of samples."""
    for k in range(mixtures):
        row[k] = raw[k]
        row[mixtures + k] = np.float32(p + s * np.float64(raw[mixtures + k]))
        log_scale = np.float64(raw[2 * mixtures + k])
        if not log_scale >= _LEAST_LOG_SCALE and log_scale == log_scale:
            log_scale = _LEAST_LOG_SCALE
        if log_scale > _LARGEST_LOG_SCALE:
            log_scale = _LARGEST_LOG_SCALE
        row[2 * mixtures + k] = np.float32(log_s + log_scale)


def _run(first, last, sizes, matrices, biases, dilations, rings, ring_rows, times, xs, es, whole, pending, gates,
         weights, coefficients, scales, lags, voicings, offsets, uniforms, temperatures, codes, scores, scoring,
         scored):  # fmt: skip
    """The streams `first` to `last`, one after the other.

    Parameters ---------- sizes : recent, near, mixtures, classes, taps, x vectors, skip vectors,
    head vectors, features, history matrices : (n, 6) address, inputs, blocks, vectors, kernel,
    bytes of a block: input; taps and residual of each
        layer; skip; hidden; output
    biases : (n, widest) float32, of each matrix rings, ring_rows : (B, L) addresses of the past
    inputs of each layer, and their rows less one times : (B,) samples made so far; moved on xs, es
    : (B, history + 1 + n) samples and residuals, of which the last n are filled whole : (B, lag
    history + n) whole lags pending : (B, 2) prediction and scale of the last sample gates : (B, F,
    3, padded G); weights : (3, hop); the rest as in `FrameConditioning`, coefficients oldest first

    Returns
    -------
    int: the first sample of this call whose distribution is not finite, or -1
    """
    (
        recent,
        near,
        mixtures,
        classes,
        taps,
        x_vectors,
        skip_vectors,
        head_vectors,
        features,
        history,
    ) = sizes
    layers, samples, hop = dilations.shape[0], codes.shape[1], weights.shape[1]
    order, per_frame = coefficients.shape[2], scales.shape[1] // gates.shape[1]
    width = x_vectors * LANES
    row_bytes = x_vectors * VECTOR_BYTES
    half = classes // 2
    room = biases.shape[1]
    seen = np.zeros(features + LANES, np.float32)
    h, inside = np.zeros(room, np.float32), np.zeros(taps * width + LANES, np.float32)
    z, units = np.zeros(room, np.float32), np.zeros(layers * width + LANES, np.float32)
    skip, hidden, raw = (
        np.zeros(room, np.float32),
        np.zeros(room, np.float32),
        np.zeros(room, np.float32),
    )
    zeros, row = np.zeros(room, np.float32), np.zeros(3 * mixtures, np.float32)
    bias_gates = np.zeros(gates.shape[3] + LANES, np.float32)
    h_at, inside_at, z_at, units_at = (
        h.ctypes.data,
        inside.ctypes.data,
        z.ctypes.data,
        units.ctypes.data,
    )
    skip_at, hidden_at, raw_at, zeros_at = (
        skip.ctypes.data,
        hidden.ctypes.data,
        raw.ctypes.data,
        zeros.ctypes.data,
    )
    gates_at, seen_at, row_at = bias_gates.ctypes.data, seen.ctypes.data, row.ctypes.data
    biases_at, bias_bytes = biases.ctypes.data, room * 4
    ring_of_lags = whole.shape[1] - samples
    for stream in range(first, last):
        x, e, lag_of = xs[stream], es[stream], whole[stream]
        x_before = np.float64(x[history])
        e[history] = np.float32((x_before - pending[stream, 0]) / pending[stream, 1])
        sub_before = -1
        s, log_s = 1.0, 0.0
        for t in range(samples):
            place = offsets[stream] + t
            frame, phase = place // hop, place % hop
            sub = frame * per_frame + phase * per_frame // hop
            if sub != sub_before:
                s = np.float64(scales[stream, sub])
                log_s = math.log(s)
                sub_before = sub
            now = history + 1 + t
            p = 0.0
            for k in range(order):
                p -= np.float64(coefficients[stream, sub, k]) * np.float64(x[now - order + k])
            lag = lags[stream, place]
            if not lag >= 1:  # NaN would lead outside of the arrays
                return t
            ceiling = math.ceil(lag)
            _features(seen, x, e, now, now - np.int64(ceiling), np.float64(np.float32(ceiling) - lag),
                      np.float64(voicings[stream, place]), p, s, log_s, recent, near)  # fmt: skip
            before, at, after = (
                gates[stream, frame, 0],
                gates[stream, frame, 1],
                gates[stream, frame, 2],
            )
            w0, w1, w2 = weights[0, phase], weights[1, phase], weights[2, phase]
            for j in range(before.shape[0]):
                bias_gates[j] = before[j] * w0 + at[j] * w1 + after[j] * w2
            _product(matrices[0], biases_at, seen_at, zeros_at, h_at)
            time = times[stream] + t
            for i in range(layers):
                ring, mask = rings[stream, i], ring_rows[i]
                slot = time
                behind = t
                for k in range(taps - 1):
                    if dilations[i]:
                        slot -= dilations[i]
                    else:
                        step = lag_of[ring_of_lags + behind]
                        slot -= step
                        behind -= step
                    simd.copy(ring + (slot & mask) * row_bytes, VECTOR_BYTES,
                               inside_at + (taps - 2 - k) * row_bytes, VECTOR_BYTES, x_vectors)  # fmt: skip
                simd.copy(
                    h_at, VECTOR_BYTES, ring + (time & mask) * row_bytes, VECTOR_BYTES, x_vectors
                )
                simd.copy(
                    h_at, VECTOR_BYTES, inside_at + (taps - 1) * row_bytes, VECTOR_BYTES, x_vectors
                )
                _product(matrices[1 + 2 * i], biases_at + (1 + 2 * i) * bias_bytes, inside_at,
                         gates_at + 2 * i * row_bytes, z_at)  # fmt: skip
                simd.gate(z_at, z_at + row_bytes, units_at + i * row_bytes, x_vectors, VECTOR_BYTES)
                if i < layers - 1:
                    _product(matrices[2 + 2 * i], biases_at + (2 + 2 * i) * bias_bytes, units_at + i * row_bytes,
                             h_at, h_at)  # fmt: skip
            n = 2 * layers + 1
            _product(
                matrices[n],
                biases_at + n * bias_bytes,
                units_at,
                gates_at + 2 * layers * row_bytes,
                skip_at,
            )
            simd.relu(skip_at, skip_at, skip_vectors)
            _product(
                matrices[n + 1], biases_at + (n + 1) * bias_bytes, skip_at, zeros_at, hidden_at
            )
            simd.relu(hidden_at, hidden_at, head_vectors)
            _product(matrices[n + 2], biases_at + (n + 2) * bias_bytes, hidden_at, zeros_at, raw_at)
            _mixture(raw, row, mixtures, p, s, log_s)
            if scoring:
                code = codes[stream, t]
            else:
                code = draw_value(LOGISTIC_MIXTURE, mixtures, classes, row_at, uniforms[stream, t],
                                  temperatures[stream, t])  # fmt: skip
                if code < 0:
                    return t
                codes[stream, t] = code
            if scoring or scored:
                scores[stream, t] = log_probability(
                    LOGISTIC_MIXTURE, mixtures, classes, row_at, code
                )
            value = np.float64(code - half) / half
            x[now] = np.float32(value)
            e[now] = np.float32((value - p) / s)
            pending[stream, 0], pending[stream, 1] = p, s
        times[stream] += samples
    return -1


_SIGNATURE = (
    "int64(int64, int64, UniTuple(int64, 10), int64[:, ::1], float32[:, ::1], int64[::1], int64[:, ::1], int64[::1], "
    "int64[::1], float32[:, ::1], float32[:, ::1], int64[:, ::1], float64[:, ::1], float32[:, :, :, ::1], "
    "float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[::1], "
    "float64[:, ::1], float64[:, ::1], int64[:, ::1], float64[:, ::1], boolean, boolean)"
)


@functools.cache
def kernel() -> Any:
    """Compile at the first call, or read from the cache."""
    return compiled(_run, _SIGNATURE)
