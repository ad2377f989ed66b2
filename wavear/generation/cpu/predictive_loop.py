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
from wavear.generation.cpu.products import (
    MATRIX,
    array_of,
    as_input,
    copy_input,
    copy_row,
    in_lines,
    in_panels,
    multiply,
    multiply_row,
    record,
)
from wavear.generation.cpu.sampling import settle
from wavear.generation.cpu.simd import TALLEST

# As in `wavear.models.predictive`; the key of the compiled code covers this directory only.
_LARGEST_RESIDUAL = 15.0
_LEAST_LOG_SCALE, _LARGEST_LOG_SCALE = -7.0, 5.0

# Of a layer: its dilation, or 0 for the period; rows of its ring less one, a power of two less one;
# samples whose past taps are multiplied at once; numbers of matrices: of its taps, oldest first,
# and of what its units add to the signal and the skip; the bias of the latter, and where that
# product writes: 0, or behind the signal, which the last layer leaves alone.
LAYER = record("dilation mask ahead taps mix mix_bias mix_at")
# Of a network: sizes, numbers of matrices, addresses of biases; `room`: floats that a product
# writes, at most. (No memory for a categorical law, which it never has.)
PLAN = record(
    "law mixtures classes recent near tap_count x_vectors skip_vectors head_vectors features "
    "history room input hidden output input_bias hidden_bias output_bias multiply "
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
    """float32 (B or 1, F, 3, padded G): like all that follows for one stream, or for all."""
    weights: Any
    """float32 (3, hop)."""
    coefficients: Any
    """float32 (B or 1, sub-frames, order), oldest first."""
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
def _interpolated(frames, c, place, first, out, vectors):
    """Write the gate biases of a sample from `first`, at an address."""
    hop, gates = frames.weights.shape[1], frames.gates
    frame, phase = place // hop, place % hop
    weights = frames.weights
    simd.blend(
        gates[c, frame, 0, first:].ctypes.data, 4 * gates.shape[3], out, vectors,
        weights[0, phase], weights[1, phase], weights[2, phase],
    )  # fmt: skip


@numba.njit
def _address(array):
    return np.int64(array.ctypes.data)


@numba.njit
def _multiply_past(net, layer, matrices, ring, time, lags, now, count, panels, zeros, sums):
    """Add the products of the past taps of the next `count` samples to their gate biases."""
    row, panel = net.x_vectors * VECTOR_BYTES, net.x_vectors * TALLEST * VECTOR_BYTES
    past = net.tap_count - 1
    if layer.ahead == 1:  # the kernel for one row is faster
        for k in range(past):
            x = ring + ((time - (past - k) * layer.dilation) & layer.mask) * row
            matrix = matrices[layer.taps + k]
            multiply_row(matrix, as_input(matrix, x, net.x_vectors, panels), zeros, sums, sums)
        return
    for j in range(count):
        slot, behind = time + j, now + j
        for k in range(past - 1, -1, -1):
            step = layer.dilation
            if step == 0:
                step = lags[behind]
                behind -= step
            slot -= step
            out = panels + k * panel + j * VECTOR_BYTES
            copy_input(matrices[layer.taps + k], ring + (slot & layer.mask) * row, VECTOR_BYTES,
                       out, TALLEST * VECTOR_BYTES, net.x_vectors)  # fmt: skip
    lines = in_lines(sums, TALLEST, 2 * row)
    for k in range(past):
        x = in_panels(panels + k * panel, TALLEST, net.x_vectors)
        multiply(net, matrices[layer.taps + k], count, TALLEST, x, zeros, lines, lines)


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
    row_bytes, width = net.x_vectors * VECTOR_BYTES, net.x_vectors * LANES
    half = net.classes // 2
    seen = np.zeros(net.features + LANES, np.float32)
    panels = np.zeros((net.tap_count - 1) * TALLEST * width, np.float32)
    sums = np.zeros((count, TALLEST * 2 * width), np.float32)
    rooms = np.zeros((7, net.room), np.float32)
    raw, row = rooms[4], np.zeros(3 * mixtures, np.float32)
    signal, z, unit, hidden, raw_at, zeros, bytes_at = (
        _address(rooms[0]), _address(rooms[1]), _address(rooms[2]), _address(rooms[3]),
        _address(rooms[4]), _address(rooms[5]), _address(rooms[6]),
    )  # fmt: skip
    skip = signal + row_bytes  # so that one product writes both
    sums_at, sums_size = _address(sums), 4 * sums.shape[1]
    ring_of_lags = frames.whole_lags.shape[1] - samples
    for b in range(first, last):
        x, e, lags = frames.samples[b], frames.residuals[b], frames.whole_lags[b]
        pending, c = frames.pending[b], b % len(frames.offsets)  # c: its conditioning
        e[net.history] = np.float32((np.float64(x[net.history]) - pending[0]) / pending[1])
        sub_before = -1
        s, log_s = 1.0, 0.0
        for t in range(samples):
            place = frames.offsets[c] + t
            frame, phase = place // hop, place % hop
            sub = frame * per_frame + phase * per_frame // hop
            if sub != sub_before:
                s = np.float64(frames.scales[c, sub])
                log_s = math.log(s)
                sub_before = sub
            now = net.history + 1 + t
            p = 0.0
            for k in range(order):
                p -= np.float64(frames.coefficients[c, sub, k]) * np.float64(x[now - order + k])
            if abs(p) > 1.0:
                p = math.copysign(max(2.0 - abs(p), 0.0), p)
            lag = frames.lags[c, place]
            voicing = np.float64(frames.voicings[c, place])
            # A lag of NaN would lead outside of the arrays; integers would hide a voicing of NaN.
            if not lag >= 1 or voicing != voicing:
                return t
            ceiling = math.ceil(lag)
            fraction = np.float64(np.float32(ceiling) - lag)
            _features(seen, x, e, now, now - np.int64(ceiling), fraction, voicing, p, s, log_s,
                      net.recent, net.near)  # fmt: skip
            multiply_row(matrices[net.input], seen.ctypes.data, net.input_bias, zeros, signal)
            _interpolated(frames, c, place, 2 * width * count, skip, net.skip_vectors)
            time = frames.times[b] + t
            for i in range(count):
                layer, ring, own = layers[i], frames.rings[b, i], sums_at + i * sums_size
                copy_row(signal, ring + (time & layer.mask) * row_bytes, net.x_vectors)
                turn = t % layer.ahead
                if turn == 0:
                    many = min(layer.ahead, samples - t)
                    for j in range(many):
                        _interpolated(frames, c, place + j, 2 * width * i,
                                      own + j * 2 * row_bytes, 2 * net.x_vectors)  # fmt: skip
                    _multiply_past(net, layer, matrices, ring, time, lags, ring_of_lags + t, many,
                                   _address(panels), zeros, own)  # fmt: skip
                own += turn * 2 * row_bytes
                matrix, out = matrices[layer.taps + net.tap_count - 1], signal + layer.mix_at
                source = as_input(matrix, signal, net.x_vectors, bytes_at)
                multiply_row(matrix, source, zeros, own, z)
                simd.gate(z, z + row_bytes, unit, net.x_vectors, VECTOR_BYTES)
                matrix = matrices[layer.mix]
                source = as_input(matrix, unit, net.x_vectors, bytes_at)
                multiply_row(matrix, source, layer.mix_bias, out, out)
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
def run(call: Any) -> Any:
    """Compile `_run` for a type of call at the first one, or read it from the cache."""
    plans = array_of(PLAN), array_of(LAYER), array_of(MATRIX)
    signature: Any = types.int64(types.int64, types.int64, *plans, FRAMES, call)
    return compiled(_run, signature)
