"""The compiled loops over time of `compiled_rollout`, one in each direction.

BLAS does the matrix products. Arrays begin with time: what a step needs of all streams is
contiguous.

The way back runs from the last sample to the first. All that read a sample comes later, so a
sample's gradient is complete when its turn comes.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np

from wavear.models.fused import tanh_ratio
from wavear.models.predictive import LARGEST_RESIDUAL, LOG_SCALES

_SCALING = np.float32(0.7)  # of residuals, as `predictive.clipped_residuals`
_LARGEST = np.float32(LARGEST_RESIDUAL)
_LOWEST, _HIGHEST = (np.float32(bound) for bound in LOG_SCALES)


class Weights(NamedTuple):
    """Matrices, of layers stacked: (inputs, outputs) on the way forth, transposed on the way back.

    The last layer has none for a residual connection.
    """

    input: Any
    taps: Any
    residual: Any
    skip: Any
    hidden: Any
    output: Any


class Biases(NamedTuple):
    """Their biases; `taps` have none."""

    input: Any
    residual: Any
    skip: Any
    hidden: Any
    output: Any


class Given(NamedTuple):
    """Arrays that do not depend on samples. P prediction order, K taps, G gate biases."""

    dilations: Any
    """(layers,); 0 for the period."""
    begins: Any
    """(layers,): the row of `Kept.h` with a layer's first new input."""
    gates: Any
    """(B, F, 3, G)."""
    frames: Any
    """(T, B): the frame of a sample."""
    mix: Any
    """(T, B, 3): weights of its three gate biases."""
    coefficients: Any
    """(T, P, B)."""
    scale: Any
    """(T, B)."""
    back: Any
    """(T, B): the sample one period ago."""
    curve: Any
    """(T, B, 4): weights of neighbours that interpolate residuals around one period ago."""
    places: Any
    """(K - 1, T, B): samples whose inputs the taps of period layers read; below 0 the past."""
    queues: Any
    """(period layers, B, queue length, R): the past inputs of period layers."""
    component: Any
    """(T, B): uniform, for the choice of the component."""
    logistic: Any
    """(T, B): logit of uniform."""


class Kept(NamedTuple):
    """Arrays that the way forth computes; N past samples."""

    samples: Any
    """(N + T, B)."""
    residuals: Any
    """(N + T, B)."""
    clipped: Any
    """(N + T, B): residuals as features."""
    prediction: Any
    """(T, B), before it is folded."""
    features: Any
    """(T, features, B)."""
    h: Any
    """(rows, B, R): inputs of all layers, each layer with the past that its dilation reaches."""
    taps: Any
    """(period layers, T, B, (K - 1) R): past inputs of period layers."""
    factors: Any
    """(layers, T, B, 2 R): tanh and sigmoid; the way back puts the gradient of the gate here."""
    units: Any
    """(T, B, layers * R): their products."""
    skip: Any
    """(T, B, S), not negative."""
    hidden: Any
    """(T, B, head channels), not negative."""
    chosen: Any
    """(T, B): the component."""
    slope: Any
    """(T, B): derivative of the residual by the component's log-scale."""


class Gradients(NamedTuple):
    """Arrays that the way back computes; zero at first but for `samples`."""

    samples: Any
    """(T, B): at first the gradient of what was returned."""
    clipped: Any
    """(T, B)."""
    h: Any
    """(layers, T, B, R)."""
    gates: Any
    """(B, F, 3, G)."""
    skip: Any
    """(T, B, S)."""
    hidden: Any
    """(T, B, head channels)."""
    raw: Any
    """(T, B, 3 * mixtures)."""
    bound: Any
    """(B,): see `rollout.GRADIENT_GROWTH`."""


@numba.njit(inline="always")
def _level(x):
    """Compress as `predictive.level`."""
    size = abs(x)
    size = math.log(size + math.sqrt(size * size + np.float32(1))) * np.float32(0.3)
    return size if x > np.float32(0) else -size


@numba.njit(inline="always")
def _level_slope(x):
    return np.float32(0.3) / math.sqrt(x * x + np.float32(1))


@numba.njit(inline="always")
def _folded(p):
    """Fold as `predictive.folded`."""
    size = abs(p)
    if size <= np.float32(1):
        return p
    size = max(np.float32(2) - size, np.float32(0))
    return size if p > np.float32(0) else -size


@numba.njit(inline="always")
def _folded_slope(p):
    size = abs(p)
    if size <= np.float32(1):
        return np.float32(1)
    return np.float32(-1) if size < np.float32(2) else np.float32(0)


@numba.njit(fastmath=True)
def _predict(t, recent, given, kept):
    """Compute the prediction of sample t, and the features that depend on samples."""
    features, p, scale = kept.features[t], kept.prediction[t], given.scale[t]
    order, streams = given.coefficients.shape[1:]
    now = kept.samples.shape[0] - given.scale.shape[0] + t
    p[:] = 0
    for k in range(order):
        coefficient, x = given.coefficients[t, k], kept.samples[now - 1 - k]
        for b in range(streams):
            p[b] -= coefficient[b] * x[b]
    for i in range(recent):
        features[i] = kept.clipped[now - recent + i]
    first, last = recent + 3, features.shape[0] - 2
    last_x = kept.samples[now - 1]
    for b in range(streams):
        s, ago = scale[b], now - t + given.back[t, b]
        features[recent, b] = _level(_folded(p[b]) / s)
        features[recent + 1, b] = _level(last_x[b] / s)
        features[last, b] = _level(kept.samples[ago, b] / s)
        begin = ago - (last - first - 1) // 2 - 1
        w = given.curve[t, b]
        for i in range(last - first):
            value = w[0] * kept.clipped[begin + i, b] + w[1] * kept.clipped[begin + i + 1, b]
            value += w[2] * kept.clipped[begin + i + 2, b] + w[3] * kept.clipped[begin + i + 3, b]
            features[first + i, b] = value


# Rows are indexed, not sliced: a slice counts references, which takes as long as a row. Offsets are
# unsigned, or LLVM would have to expect indices that count from the end.
@numba.njit(fastmath=True)
def _copy(row, out, first):
    """Copy rows (B, n) to the columns of `out` from `first` on."""
    for b in range(row.shape[0]):
        for c in range(np.uint64(row.shape[1])):
            out[b, first + c] = row[b, c]


@numba.njit(fastmath=True)
def _gather(t, layer, period, given, kept, inputs):
    """Collect the taps (B, K R) of a layer."""
    h, queues, places = kept.h, given.queues, given.places
    streams, r, before = h.shape[1], np.uint64(h.shape[2]), places.shape[0]
    begin, dilation = given.begins[layer], given.dilations[layer]
    for k in range(before + 1):
        first = np.uint64(k) * r
        if dilation > 0 or k == before:
            _copy(h[begin + t - (before - k) * dilation], inputs, first)
            continue
        taps, length = kept.taps[period, t], queues.shape[2]
        for b in range(streams):
            place = places[k, t, b]
            if place >= 0:
                for c in range(r):
                    inputs[b, first + c] = h[begin + place, b, c]
            else:
                for c in range(r):
                    inputs[b, first + c] = queues[period, b, length + place, c]
            for c in range(r):
                taps[b, first + c] = inputs[b, first + c]


@numba.njit(fastmath=True)
def _add_gate_biases(frames, mix, gates, first, out):
    """Add the gate biases from `first` on to `out` (B, n)."""
    width = np.uint64(out.shape[1])
    for b in range(out.shape[0]):
        frame = frames[b]
        for j in range(3):
            w = mix[b, j]
            if w != np.float32(0):
                for c in range(width):
                    out[b, c] += w * gates[b, frame, j, first + c]


# LLVM vectorises loops over few arrays; a row stays in the first cache from one loop to the next.
@numba.njit(fastmath=True, error_model="numpy")
def _gate(z, factors, units):
    """Factors (B, 2 R) and gated units (B, R) of z (B, 2 R)."""
    r = np.uint64(units.shape[1])
    half, one = np.float32(0.5), np.float32(1)
    for b in range(units.shape[0]):
        for c in range(r):
            numerator, denominator = tanh_ratio(z[b, c])
            factors[b, c] = numerator / denominator
        for c in range(r):  # sigmoid(x) = (1 + tanh(x / 2)) / 2
            numerator, denominator = tanh_ratio(half * z[b, r + c])
            factors[b, r + c] = half * (one + numerator / denominator)
        for c in range(r):
            units[b, c] = factors[b, c] * factors[b, r + c]


@numba.njit(fastmath=True)
def _add(out, bias, more):
    for b in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[b, c] += bias[c] + more[b, c]


@numba.njit(fastmath=True)
def _rectify(out, bias):
    """Add a bias to `out` (B, n), and make it 0 where negative."""
    for b in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[b, c] = max(out[b, c] + bias[c], np.float32(0))


@numba.njit(fastmath=True, error_model="numpy")
def _draw(t, given, kept, raw, bias):
    """Draw sample t from the mixture (B, 3 mixtures) without its biases."""
    count = raw.shape[1] // 3
    now = kept.samples.shape[0] - given.scale.shape[0] + t
    for b in range(raw.shape[0]):
        row = raw[b]
        largest = row[0] + bias[0]
        for k in range(1, count):
            largest = max(largest, row[k] + bias[k])
        total = np.float32(0)
        for k in range(count):
            row[k] = math.exp(row[k] + bias[k] - largest)
            total += row[k]
        wanted, running, chosen = given.component[t, b] * total, np.float32(0), 0
        for k in range(count - 1):
            running += row[k]
            if running < wanted:
                chosen = k + 1
        log_scale = row[2 * count + chosen] + bias[2 * count + chosen]
        deviation = math.exp(min(max(log_scale, _LOWEST), _HIGHEST)) * given.logistic[t, b]
        inside = log_scale >= _LOWEST and log_scale <= _HIGHEST
        e = row[count + chosen] + bias[count + chosen] + deviation
        kept.chosen[t, b] = chosen
        kept.slope[t, b] = deviation if inside else np.float32(0)
        kept.residuals[now, b] = e
        kept.clipped[now, b] = min(max(e, -_LARGEST), _LARGEST) * _SCALING
        kept.samples[now, b] = _folded(kept.prediction[t, b]) + given.scale[t, b] * e


def _forth(recent, weights, biases, given, kept):
    """Generate all samples."""
    total, streams = given.scale.shape
    r, layers = kept.h.shape[2], len(given.begins)
    inputs = np.empty((streams, weights.taps.shape[1]), np.float32)
    z = np.empty((streams, 2 * r), np.float32)
    units = np.empty((streams, r), np.float32)
    raw = np.empty((streams, weights.output.shape[1]), np.float32)
    zeros = np.zeros((streams, r), np.float32)
    for t in range(total):
        _predict(t, recent, given, kept)
        h = kept.h[given.begins[0] + t]
        np.dot(kept.features[t].T, weights.input, h)
        _add(h, biases.input, zeros)
        period = 0
        for layer in range(layers):
            _gather(t, layer, period, given, kept, inputs)
            np.dot(inputs, weights.taps[layer], z)
            first = np.uint64(layer * r)
            _add_gate_biases(given.frames[t], given.mix[t], given.gates, first + first, z)
            _gate(z, kept.factors[layer, t], units)
            _copy(units, kept.units[t], first)
            if layer + 1 < layers:
                after = kept.h[given.begins[layer + 1] + t]
                np.dot(units, weights.residual[layer], after)
                _add(after, biases.residual[layer], kept.h[given.begins[layer] + t])
            period += given.dilations[layer] == 0
        np.dot(kept.units[t], weights.skip, kept.skip[t])
        first = np.uint64(layers * 2 * r)
        _add_gate_biases(given.frames[t], given.mix[t], given.gates, first, kept.skip[t])
        _rectify(kept.skip[t], biases.skip)
        hidden = kept.hidden[t]
        np.dot(kept.skip[t], weights.hidden, hidden)
        _rectify(hidden, biases.hidden)
        np.dot(hidden, weights.output, raw)
        _draw(t, given, kept, raw, biases.output)


@numba.njit(fastmath=True)
def _undraw(t, given, kept, gradients):
    """Pass the gradient of sample t to its mixture."""
    raw, count = gradients.raw[t], gradients.raw.shape[2] // 3
    now = kept.samples.shape[0] - given.scale.shape[0] + t
    for b in range(raw.shape[0]):
        e, bound = kept.residuals[now, b], gradients.bound[b]
        gradients.samples[t, b] = min(max(gradients.samples[t, b], -bound), bound)
        gradient = given.scale[t, b] * gradients.samples[t, b]
        if abs(e) <= _LARGEST:
            gradient += _SCALING * gradients.clipped[t, b]
        chosen = kept.chosen[t, b]
        raw[b, count + chosen] = gradient
        raw[b, 2 * count + chosen] = gradient * kept.slope[t, b]


@numba.njit(fastmath=True)
def _mask(gradient, values):
    """Set the gradient of a relu to 0 where its value is 0."""
    zero = np.float32(0)
    for b in range(gradient.shape[0]):
        for c in range(gradient.shape[1]):
            gradient[b, c] = gradient[b, c] if values[b, c] > zero else zero


@numba.njit(fastmath=True)
def _collect_gate_biases(frames, mix, part, first, gates):
    """Add a gradient (B, n) to that of the gate biases from `first` on."""
    width = np.uint64(part.shape[1])
    for b in range(part.shape[0]):
        frame = frames[b]
        for j in range(3):
            w = mix[b, j]
            if w != np.float32(0):
                for c in range(width):
                    gates[b, frame, j, first + c] += w * part[b, c]


@numba.njit(fastmath=True)
def _ungate(factors, units, first, more):
    """Turn the factors (B, 2 R) of a gate into the gradient of z.

    The gradient of the units is the sum of `units` (B, layers * R) from `first` on, and of `more`
    (B, R).
    """
    r, one = np.uint64(more.shape[1]), np.float32(1)
    for b in range(more.shape[0]):
        for c in range(r):
            tanh, sigmoid = factors[b, c], factors[b, r + c]
            d = (units[b, first + c] + more[b, c]) * sigmoid
            factors[b, c] = d * (one - tanh * tanh)
            factors[b, r + c] = d * tanh * (one - sigmoid)


@numba.njit(fastmath=True)
def _scatter(t, dilation, places, h, inputs):
    """Add the gradients (B, K R) of a layer's taps to that of its inputs h (T, B, R)."""
    streams, r, before = h.shape[1], np.uint64(h.shape[2]), places.shape[0]
    for k in range(before + 1):
        first = np.uint64(k) * r
        for b in range(streams):
            place = t - (before - k) * dilation
            if dilation == 0 and k < before:
                place = places[k, t, b]
            if place >= 0:
                for c in range(r):
                    h[place, b, c] += inputs[b, first + c]


@numba.njit(fastmath=True, error_model="numpy")
def _unpredict(t, recent, given, kept, gradients, features):
    """Pass the gradient (features, B) of the features, and of the prediction, to the past."""
    order, streams = given.coefficients.shape[1:]
    now = kept.samples.shape[0] - given.scale.shape[0]
    first, last = recent + 3, features.shape[0] - 2
    x = gradients.samples
    for i in range(max(recent - t, 0), recent):
        out, part = gradients.clipped[t - recent + i], features[i]
        for b in range(streams):
            out[b] += part[b]
    prediction = x[t]  # what is left to pass on is its gradient
    for b in range(streams):
        s, ago = given.scale[t, b], given.back[t, b]
        p = kept.prediction[t, b]
        prediction[b] += features[recent, b] * _level_slope(_folded(p) / s) / s
        prediction[b] *= _folded_slope(p)
        if t > 0:
            slope = _level_slope(kept.samples[now + t - 1, b] / s)
            x[t - 1, b] += features[recent + 1, b] * slope / s
        if ago >= 0:
            x[ago, b] += features[last, b] * _level_slope(kept.samples[now + ago, b] / s) / s
        begin = ago - (last - first - 1) // 2 - 1
        for i in range(last - first):
            for j in range(4):
                if begin + i + j >= 0:
                    gradients.clipped[begin + i + j, b] += (
                        given.curve[t, b, j] * features[first + i, b]
                    )
    for k in range(min(order, t)):
        out, coefficient = x[t - 1 - k], given.coefficients[t, k]
        for b in range(streams):
            out[b] -= coefficient[b] * prediction[b]


def _back(recent, weights, given, kept, gradients):
    """Compute the gradients of everything from that of the samples."""
    total, streams = given.scale.shape
    r, layers = kept.h.shape[2], len(given.begins)
    inputs = np.empty((streams, weights.taps.shape[2]), np.float32)
    units = np.empty((streams, layers * r), np.float32)
    more, zeros = np.empty((streams, r), np.float32), np.zeros(r, np.float32)
    features = np.empty(kept.features.shape[1:], np.float32)
    for t in range(total - 1, -1, -1):
        _undraw(t, given, kept, gradients)
        np.dot(gradients.raw[t], weights.output, gradients.hidden[t])
        _mask(gradients.hidden[t], kept.hidden[t])
        np.dot(gradients.hidden[t], weights.hidden, gradients.skip[t])
        _mask(gradients.skip[t], kept.skip[t])
        skip, first = gradients.skip[t], np.uint64(layers * 2 * r)
        _collect_gate_biases(given.frames[t], given.mix[t], skip, first, gradients.gates)
        np.dot(skip, weights.skip, units)
        more[:] = 0
        for layer in range(layers - 1, -1, -1):
            factors, h, first = kept.factors[layer, t], gradients.h[layer], np.uint64(layer * r)
            if layer + 1 < layers:
                after = gradients.h[layer + 1, t]
                np.dot(after, weights.residual[layer], more)
                _add(h[t], zeros, after)
            _ungate(factors, units, first, more)
            _collect_gate_biases(
                given.frames[t], given.mix[t], factors, first + first, gradients.gates
            )
            np.dot(factors, weights.taps[layer], inputs)
            _scatter(t, given.dilations[layer], given.places, h, inputs)
        np.dot(weights.input.T, gradients.h[0, t].T, features)
        _unpredict(t, recent, given, kept, gradients, features)


@functools.cache
def _kernel(back: bool, *arguments: Any) -> Any:
    from wavear.common.compiled import compiled

    signature = numba.types.void(*arguments)
    return compiled(_back if back else _forth, signature, fastmath=True, error_model="numpy")


def run(back: bool, *arguments: Any) -> None:
    """Run the way back or the way forth, on their arguments."""
    _kernel(back, *map(numba.typeof, arguments))(*arguments)
