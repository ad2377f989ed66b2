"""The loop over samples of the CPU engine of the transformer, as it is compiled, one call per chunk and stream."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu import distributions, sampling, simd
from wavear.generation.cpu.products import (
    CONDITION,
    CONSTANT_CONDITION,
    M_ADDRESS,
    M_BLOCKS,
    M_INPUTS,
    M_ROW,
    M_SIZE,
    M_STEP,
    M_VECTORS,
    NO_CONDITION,
)
from wavear.generation.cpu.simd import BLOCK, LANES, VECTOR_BYTES

_EPSILON = 1e-6  # of `normalised`

# Fields of a layer: addresses of its matrices' fields; places of its keys and values in the
# stream's memory.
L_QKV, L_OUT, L_UP, L_DOWN, L_KEYS, L_VALUES, L_FIELDS = range(7)

# Fields of the network for one stream. Sizes; addresses of weights; places in the stream's memory,
# in floats.
(N_PATCH, N_CHANNELS, N_HEADS, N_WINDOW, N_PERIOD, N_CLASSES, N_TIME, N_X_VECTORS, N_Z_VECTORS,
 N_KEY_BLOCKS, N_KEY_VECTORS, N_KEY_ROW, N_VALUE_BLOCKS, N_VALUE_VECTORS, N_VALUE_ROW, N_SLOTS, N_CONDITION_VECTORS,
 N_SAMPLE_CHANNELS, N_SAMPLE_VECTORS,
 N_ENTER, N_ENTER_BIAS, N_ENTER_CONDITION, N_ENTER_TABLE, N_POSITION_MATRIX, N_SAMPLES_MATRIX, N_HEAD_CONDITION,
 N_PLACES, N_HEAD_TABLE, N_HIDDEN_MATRIX, N_HIDDEN_BIAS, N_OUT_MATRIX, N_OUT_BIAS, N_ZEROS, N_ANGLES, N_EMBEDDING,
 N_LAW, N_MIXTURES, N_SPARSE,
 N_BASE, N_X, N_Y, N_QKV, N_FOUND, N_SCORES, N_WEIGHTS, N_SUMS, N_MASK, N_UP, N_VALUES, N_OFFSETS, N_POSITION, N_Z,
 N_H, N_LOGITS, N_SAMPLES, N_CONSTANT, N_FIELDS) = range(57)  # fmt: skip


def _squares(e, x, blocks):
    """The sum of the squares of `blocks` times 16 floats: 16 chains, then by halves."""
    total = e.b.alloca(e.vector)
    e.b.store(e.f32(0.0), total)

    def body(i):
        value = e.load(e.at(x, e.b.mul(i, ir.Constant(ir.IntType(64), 4 * BLOCK))))
        e.b.store(e.fma(value, value, e.b.load(total)), total)

    e.loop(blocks, body)
    return simd._halves(e, e.b.load(total), e.b.fadd)


squares = simd.kernel("squares", 2, _squares, lanes=BLOCK, result=types.float32)


@numba.njit
def _row(matrix, x, bias, init, out):
    """out = init + bias + matrix @ x, everything contiguous; `matrix` is the address of its fields."""
    weights = simd.load_int(matrix + 8 * M_ADDRESS)
    inputs = simd.load_int(matrix + 8 * M_INPUTS)
    kernel = simd.load_int(matrix + 8 * M_ROW)
    block = simd.load_int(matrix + 8 * M_VECTORS) * VECTOR_BYTES
    size = simd.load_int(matrix + 8 * M_SIZE)
    for _ in range(simd.load_int(matrix + 8 * M_BLOCKS)):
        simd.call6(kernel, weights, inputs, x, bias, init, out)
        weights += size
        bias += block
        init += block
        out += block


@numba.njit
def _rectified(net, work, matrix, x, squared, init, out):
    """out = init + matrix @ relu(x), or relu(x)^2: the zeros are not multiplied nor their weights read."""
    values, offsets = net[N_BASE] + 4 * net[N_VALUES], net[N_BASE] + 4 * net[N_OFFSETS]
    row = simd.load_int(matrix + 8 * M_STEP)
    count = simd.entries(x, simd.load_int(matrix + 8 * M_INPUTS), row, values, offsets)
    if squared:
        first = net[N_VALUES]
        for i in range(first, first + count):
            work[i] = work[i] * work[i]
    simd.call7(net[N_SPARSE], matrix, count, values, offsets, init, out, 0)


@numba.njit
def _normalise(net, work):
    """y = x scaled to a mean square of one."""
    channels, x, y = net[N_CHANNELS], net[N_X], net[N_Y]
    mean = np.float64(squares(net[N_BASE] + 4 * x, (channels + BLOCK - 1) // BLOCK)) / channels
    scale = np.float32(1.0 / math.sqrt(mean + _EPSILON))
    for i in range(channels):
        work[y + i] = work[x + i] * scale


@numba.njit
def _attend(net, layer, work, number):
    """The attention of position `number`, whose queries, keys and values are made: `found`, one head after another."""
    base, heads, window = net[N_BASE], net[N_HEADS], net[N_WINDOW]
    channels = net[N_CHANNELS] // heads
    pairs = channels // 2
    slot = number % window
    qkv, scores, found = net[N_QKV], net[N_SCORES], net[N_FOUND]
    angle = net[N_ANGLES] + 8 * (number % net[N_PERIOD]) * pairs
    for part in range(2 * heads):  # the queries, then the keys
        first = qkv + part * channels
        for i in range(pairs):
            cos, sin = simd.load_float(angle + 8 * i), simd.load_float(angle + 8 * i + 4)
            a, b = work[first + i], work[first + pairs + i]
            work[first + i] = a * cos - b * sin
            work[first + pairs + i] = b * cos + a * sin
    work[net[N_MASK] + slot] = 0.0
    key_width = net[N_KEY_VECTORS] * LANES
    value_width = net[N_VALUE_VECTORS] * LANES
    key_block = channels * key_width
    value_block = net[N_SLOTS] * value_width
    scale = np.float32(1.0 / math.sqrt(channels))
    inputs = min(number + 1, window)
    zeros = net[N_ZEROS]
    for head in range(heads):
        keys = layer[L_KEYS] + head * net[N_KEY_BLOCKS] * key_block
        values = layer[L_VALUES] + head * net[N_VALUE_BLOCKS] * value_block
        place = keys + slot // key_width * key_block + slot % key_width
        first = qkv + net[N_CHANNELS] + head * channels
        for i in range(channels):
            work[place + i * key_width] = work[first + i]
        first += net[N_CHANNELS]
        for i in range(channels):
            work[values + i // value_width * value_block + slot * value_width + i % value_width] = (
                work[first + i]
            )
        query = base + 4 * (qkv + head * channels)
        for block in range(net[N_KEY_BLOCKS]):
            offset = 4 * block * key_width
            simd.call6(net[N_KEY_ROW], base + 4 * (keys + block * key_block), channels, query,
                        base + 4 * net[N_MASK] + offset, zeros, base + 4 * scores + offset)  # fmt: skip
        row, weights = base + 4 * scores, base + 4 * net[N_WEIGHTS]
        blocks = (window + BLOCK - 1) // BLOCK
        largest = simd.largest(row, blocks)
        total = simd.exponentials(row, blocks, weights, base + 4 * net[N_SUMS], largest, scale)
        out = found + head * channels
        for block in range(net[N_VALUE_BLOCKS]):
            # Of the last vector the rest is written over by the next head.
            simd.call6(net[N_VALUE_ROW], base + 4 * (values + block * value_block), inputs, weights, zeros, zeros,
                        base + 4 * (out + block * value_width))  # fmt: skip
        share = np.float32(1.0 / total)
        for i in range(channels):
            work[out + i] = work[out + i] * share


@numba.njit
def _position(net, layers, work, history, condition, mode):
    """The next position, from the codes of the patch before; what the head takes of it."""
    base, patch, zeros = net[N_BASE], net[N_PATCH], net[N_ZEROS]
    x, y, vectors = base + 4 * net[N_X], base + 4 * net[N_Y], net[N_X_VECTORS]
    number = net[N_TIME] // patch
    if net[N_ENTER_TABLE]:
        simd.copy(net[N_ENTER_BIAS], VECTOR_BYTES, x, VECTOR_BYTES, vectors)
        for k in range(patch):
            entry = k * net[N_CLASSES] + history[k]
            simd.add(net[N_ENTER_TABLE] + entry * vectors * VECTOR_BYTES, x, vectors)
    else:
        _row(net[N_ENTER], base + 4 * net[N_SAMPLES], net[N_ENTER_BIAS], zeros, x)
    if mode != NO_CONDITION:
        _row(net[N_ENTER_CONDITION], condition, zeros, x, x)
    for i in range(layers.shape[0]):
        layer = layers[i]
        _normalise(net, work)
        _row(layer[L_QKV], y, zeros, zeros, base + 4 * net[N_QKV])
        _attend(net, layer, work, number)
        _row(layer[L_OUT], base + 4 * net[N_FOUND], zeros, x, x)
        _normalise(net, work)
        _row(layer[L_UP], y, zeros, zeros, base + 4 * net[N_UP])
        _rectified(net, work, layer[L_DOWN], base + 4 * net[N_UP], True, x, x)
    _normalise(net, work)
    _row(net[N_POSITION_MATRIX], y, zeros, zeros, base + 4 * net[N_POSITION])


@numba.njit
def _head(net, work, history, place, condition, mode):
    """What the law of a sample takes: logits, for one."""
    base, patch, zeros, vectors = net[N_BASE], net[N_PATCH], net[N_ZEROS], net[N_Z_VECTORS]
    z, h = base + 4 * net[N_Z], base + 4 * net[N_H]
    simd.copy(
        net[N_PLACES] + place * vectors * VECTOR_BYTES, VECTOR_BYTES, z, VECTOR_BYTES, vectors
    )
    simd.add(base + 4 * net[N_POSITION], z, vectors)
    if net[N_HEAD_TABLE]:
        for k in range(patch):
            entry = k * net[N_CLASSES] + history[k]
            simd.add(net[N_HEAD_TABLE] + entry * vectors * VECTOR_BYTES, z, vectors)
    else:
        _row(net[N_SAMPLES_MATRIX], base + 4 * net[N_SAMPLES], zeros, z, z)
    if mode == CONSTANT_CONDITION:
        simd.add(base + 4 * net[N_CONSTANT], z, vectors)
    elif mode == CONDITION:
        _row(net[N_HEAD_CONDITION], condition, zeros, z, z)
    simd.relu(z, z, vectors)
    simd.copy(net[N_HIDDEN_BIAS], VECTOR_BYTES, h, VECTOR_BYTES, vectors)
    simd.add(z, h, vectors)
    _rectified(net, work, net[N_HIDDEN_MATRIX], z, False, h, h)
    _rectified(net, work, net[N_OUT_MATRIX], h, False, net[N_OUT_BIAS], base + 4 * net[N_LOGITS])


@numba.njit
def _sample(logits, classes, weights, sums, uniform, temperature):
    """The smallest code whose cumulative probability exceeds the uniform; -1 if the logits are not numbers."""
    blocks = (classes + BLOCK - 1) // BLOCK
    largest = simd.largest(logits, blocks)
    total = simd.exponentials(logits, blocks, weights, sums, largest, np.float32(1.0 / temperature))
    if not total > 0.0 or total == np.inf:
        return -1
    threshold = uniform * total
    before = 0.0
    block = 0
    while block < blocks - 1:
        after = before + simd.load_double(sums + 8 * block)
        if after > threshold:
            break
        before = after
        block += 1
    code = block * BLOCK
    last = min(code + BLOCK, classes) - 1
    while code < last:
        before += simd.load_float(weights + 4 * code)
        if before > threshold:
            break
        code += 1
    return code


@numba.njit
def _log_probability(net, logits, weights, sums, code):
    classes = net[N_CLASSES]
    if net[N_LAW] != distributions.CATEGORICAL:
        return distributions.log_probability(net[N_LAW], net[N_MIXTURES], classes, logits, code)
    blocks = (classes + BLOCK - 1) // BLOCK
    largest = simd.largest(logits, blocks)
    total = simd.exponentials(logits, blocks, weights, sums, largest, np.float32(1.0))
    return np.float64(simd.load_float(logits + 4 * code)) - np.float64(largest) - np.log(total)


def _run(
    net,
    layers,
    work,
    history,
    uniforms,
    temperatures,
    codes,
    scores,
    condition,
    mode,
    scoring,
    asked,
):
    """The loop over the samples of one stream.

    Parameters
    ----------
    net, layers : int64 arrays
        The plan: see the fields above. `net[N_TIME]` is advanced.
    work : float32 array
        The stream's memory, of which `net[N_BASE]` is the address.
    history : int64 array (patch + 1,)
        The codes consumed, then the one before the next sample; becomes the last codes.
    uniforms, temperatures : float64 arrays (n,)
    codes : int64 array (n,)
        Written, or read if `scoring`.
    scores : float64 array (n,)
        Written if `scoring`, or if a request asks for them.
    condition : int64
        Address of float32 (n, padded C), or (1, padded C).
    mode : int64
        NO_CONDITION, CONSTANT_CONDITION or CONDITION.
    scoring : int64
    asked : float64 array
        A request of `numba_sampling`, or empty.

    Returns
    -------
    int64
        The first sample whose parameters are no numbers, or -1.
    """
    base, patch, classes = net[N_BASE], net[N_PATCH], net[N_CLASSES]
    logits, weights, sums = (
        base + 4 * net[N_LOGITS],
        base + 4 * net[N_WEIGHTS],
        base + 4 * net[N_SUMS],
    )
    truncating = sampling.truncates(asked, classes)
    scored = asked.shape[0] > 0 and asked[sampling.SCORED] > 0.0
    row = net[N_CONDITION_VECTORS] * VECTOR_BYTES if mode == CONDITION else 0
    channels, sample_row = net[N_SAMPLE_CHANNELS], net[N_SAMPLE_VECTORS] * VECTOR_BYTES
    if mode == CONSTANT_CONDITION:
        _row(
            net[N_HEAD_CONDITION], condition, net[N_ZEROS], net[N_ZEROS], base + 4 * net[N_CONSTANT]
        )
    for t in range(codes.shape[0]):
        for k in range(patch):
            history[k] = history[k + 1]
        if net[N_EMBEDDING]:
            first = net[N_SAMPLES]
            for k in range(patch):
                vector = net[N_EMBEDDING] + history[k] * sample_row
                for i in range(channels):
                    work[first + k * channels + i] = simd.load_float(vector + 4 * i)
        place = net[N_TIME] % patch
        if place == 0:
            _position(net, layers, work, history, condition + t * row, mode)
        _head(net, work, history, place, condition + t * row, mode)
        if scoring:
            code = codes[t]
            scores[t] = _log_probability(net, logits, weights, sums, code)
        else:
            if net[N_LAW] != distributions.CATEGORICAL:
                code = distributions.draw_value(
                    net[N_LAW], net[N_MIXTURES], classes, logits, uniforms[t], temperatures[t]
                )
            elif truncating:
                code = sampling.draw(logits, (classes + BLOCK - 1) // BLOCK, classes, weights, sums, uniforms[t],
                                           temperatures[t], asked)  # fmt: skip
            else:
                code = _sample(logits, classes, weights, sums, uniforms[t], temperatures[t])
            if code < 0:
                return t
            codes[t] = code
            if scored:
                scores[t] = _log_probability(net, logits, weights, sums, code)
        history[patch] = code
        net[N_TIME] += 1
    return -1


_SIGNATURE = (
    "int64(int64[::1], int64[:,::1], float32[::1], int64[::1], float64[::1], float64[::1], int64[::1], float64[::1], "
    "int64, int64, int64, float64[::1])"
)


@functools.cache
def run() -> Any:
    """Compiled at the first call, or read from the cache."""
    return compiled(_run, _SIGNATURE)
