"""The loop over samples of a transformer, as it is compiled, one call per chunk and stream."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
from numba.core import types

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.products import (
    CONDITION,
    CONSTANT_CONDITION,
    MATRIX,
    NO_CONDITION,
    array_of,
    copy_row,
    multiply_entries,
    multiply_row,
    record,
    rectified,
)
from wavear.generation.cpu.sampling import settle
from wavear.generation.cpu.simd import BLOCK

_EPSILON = 1e-6  # of `normalised`

# Of a layer: numbers of matrices, addresses of the stream's keys and values.
LAYER = record("qkv out up down keys values")
# Of a network, for one stream: sizes; addresses of kernels for one row; numbers of matrices;
# addresses of weights (0 for a table that does not exist); of the stream's memory.
PLAN = record(
    "law mixtures classes first time patch channels heads window period x_vectors z_vectors "
    "key_blocks key_vectors value_blocks value_vectors condition_vectors sample_channels "
    "sample_vectors logit_blocks key_row value_row sparse "
    "enter enter_condition position_matrix samples_matrix head_condition hidden_matrix out_matrix "
    "enter_bias enter_table places head_table hidden_bias out_bias zeros angles embedding "
    "base x y qkv found scores weights sums mask up values offsets position z h logits samples "
    "constant"
)


@numba.njit
def _index(net, address):
    """Return the place of an address in the stream's memory, in floats."""
    return (address - net.base) // 4


@numba.njit
def _squared(net, matrix, work, x, init, out):
    """out = init + matrix @ relu(x)^2: omits zeros and their weights."""
    count = simd.entries(x, matrix.inputs, matrix.step, net.values, net.offsets)
    first = _index(net, net.values)
    for i in range(first, first + count):
        work[i] = work[i] * work[i]
    multiply_entries(net, matrix, count, init, out)


@numba.njit
def _normalise(net, work):
    """y = x scaled to a mean square of one."""
    channels, x, y = net.channels, _index(net, net.x), _index(net, net.y)
    mean = np.float64(simd.squares(net.x, (channels + BLOCK - 1) // BLOCK)) / channels
    scale = np.float32(1.0 / math.sqrt(mean + _EPSILON))
    for i in range(channels):
        work[y + i] = work[x + i] * scale


@numba.njit
def _turn(net, work, number, channels):
    """Rotate the queries and keys of a position by its angles."""
    pairs = channels // 2
    angle = net.angles + 8 * (number % net.period) * pairs
    for part in range(2 * net.heads):  # the queries, then the keys
        first = _index(net, net.qkv) + part * channels
        for i in range(pairs):
            cos, sin = simd.load_float(angle + 8 * i), simd.load_float(angle + 8 * i + 4)
            a, b = work[first + i], work[first + pairs + i]
            work[first + i] = a * cos - b * sin
            work[first + pairs + i] = b * cos + a * sin


@numba.njit
def _attend(net, layer, work, number):
    """Compute the attention of position `number`: from `qkv` to `found`, one head after another."""
    heads, window = net.heads, net.window
    channels = net.channels // heads
    slot = number % window
    qkv = _index(net, net.qkv)
    _turn(net, work, number, channels)
    work[_index(net, net.mask) + slot] = 0.0
    key_width, value_width = net.key_vectors * LANES, net.value_vectors * LANES
    key_block, value_block = channels * key_width, window * value_width
    blocks = (window + BLOCK - 1) // BLOCK
    scale = np.float32(1.0 / math.sqrt(channels))
    inputs = min(number + 1, window)
    for head in range(heads):
        keys = layer.keys + 4 * head * net.key_blocks * key_block
        values = layer.values + 4 * head * net.value_blocks * value_block
        place = _index(net, keys) + slot // key_width * key_block + slot % key_width
        first = qkv + net.channels + head * channels
        for i in range(channels):
            work[place + i * key_width] = work[first + i]
        first += net.channels
        place = _index(net, values) + slot * value_width
        for i in range(channels):
            work[place + i // value_width * value_block + i % value_width] = work[first + i]
        query = net.qkv + 4 * head * channels
        for block in range(net.key_blocks):
            offset = 4 * block * key_width
            simd.call6(net.key_row, keys + 4 * block * key_block, channels, query,
                       net.mask + offset, net.zeros, net.scores + offset)  # fmt: skip
        largest = simd.largest(net.scores, blocks)
        total = simd.exponentials(net.scores, blocks, net.weights, net.sums, largest, scale)
        out = net.found + 4 * head * channels
        for block in range(net.value_blocks):
            # The next head overwrites the rest of the last vector.
            simd.call6(net.value_row, values + 4 * block * value_block, inputs, net.weights,
                       net.zeros, net.zeros, out + 4 * block * value_width)  # fmt: skip
        share = np.float32(1.0 / total)
        first = _index(net, out)
        for i in range(channels):
            work[first + i] = work[first + i] * share


@numba.njit
def _add_codes(net, table, history, out, vectors):
    """Add the rows of a table for the codes of the patch before."""
    for k in range(net.patch):
        entry = k * net.classes + history[k]
        simd.add(table + entry * vectors * VECTOR_BYTES, out, vectors)


@numba.njit
def _position(net, layers, matrices, work, history, condition, mode):
    """Compute the next position from the codes of the patch before, and its output for the head."""
    zeros, x, number = net.zeros, net.x, net.time // net.patch
    if net.enter_table:
        copy_row(net.enter_bias, x, net.x_vectors)
        _add_codes(net, net.enter_table, history, x, net.x_vectors)
    else:
        multiply_row(matrices[net.enter], net.samples, net.enter_bias, zeros, x)
    if mode != NO_CONDITION:
        multiply_row(matrices[net.enter_condition], condition, zeros, x, x)
    for i in range(layers.shape[0]):
        layer = layers[i]
        _normalise(net, work)
        multiply_row(matrices[layer.qkv], net.y, zeros, zeros, net.qkv)
        _attend(net, layer, work, number)
        multiply_row(matrices[layer.out], net.found, zeros, x, x)
        _normalise(net, work)
        multiply_row(matrices[layer.up], net.y, zeros, zeros, net.up)
        _squared(net, matrices[layer.down], work, net.up, x, x)
    _normalise(net, work)
    multiply_row(matrices[net.position_matrix], net.y, zeros, zeros, net.position)


@numba.njit
def _head(net, matrices, history, place, condition, mode):
    """Compute the parameters of a sample's law, `logits`."""
    z, h, vectors = net.z, net.h, net.z_vectors
    copy_row(net.places + place * vectors * VECTOR_BYTES, z, vectors)
    simd.add(net.position, z, vectors)
    if net.head_table:
        _add_codes(net, net.head_table, history, z, vectors)
    else:
        multiply_row(matrices[net.samples_matrix], net.samples, net.zeros, z, z)
    if mode == CONSTANT_CONDITION:
        simd.add(net.constant, z, vectors)
    elif mode == CONDITION:
        multiply_row(matrices[net.head_condition], condition, net.zeros, z, z)
    simd.relu(z, z, vectors)
    copy_row(net.hidden_bias, h, vectors)
    simd.add(z, h, vectors)
    rectified(net, matrices[net.hidden_matrix], z, h, h)
    rectified(net, matrices[net.out_matrix], h, net.out_bias, net.logits)


def _run(plan, layers, matrices, work, history, call):
    """Loop over the samples of one stream.

    Parameters
    ----------
    plan : array of one PLAN
        Its `time` is advanced.
    layers, matrices : arrays of LAYER and MATRIX
    work : float32 array
        The stream's memory, of which `base` is the address.
    history : int64 array (patch + 1,)
        The codes consumed, then the one before the next sample; becomes the last codes.
    call : Call

    Returns
    -------
    int64
        The first sample whose parameters are not finite, or -1.
    """
    net = plan[0]
    patch, channels, mode, samples = net.patch, net.sample_channels, call.mode, call.codes.shape[1]
    row = net.condition_vectors * VECTOR_BYTES if mode == CONDITION else 0
    condition = call.condition
    if mode == CONSTANT_CONDITION:
        condition += net.first * net.condition_vectors * VECTOR_BYTES
        multiply_row(matrices[net.head_condition], condition, net.zeros, net.zeros, net.constant)
    elif mode == CONDITION:
        condition += net.first * samples * row
    for t in range(samples):
        for k in range(patch):
            history[k] = history[k + 1]
        if net.embedding:
            first = _index(net, net.samples)
            for k in range(patch):
                vector = net.embedding + history[k] * net.sample_vectors * VECTOR_BYTES
                for i in range(channels):
                    work[first + k * channels + i] = simd.load_float(vector + 4 * i)
        place = net.time % patch
        if place == 0:
            _position(net, layers, matrices, work, history, condition + t * row, mode)
        _head(net, matrices, history, place, condition + t * row, mode)
        code = settle(net, net.logits, call, net.first, t)
        if code < 0:
            return t
        history[patch] = code
        net.time += 1
    return -1


@functools.cache
def run(call: Any) -> Any:
    """Compile `_run` for a type of call at the first one, or read it from the cache."""
    plans = array_of(PLAN), array_of(LAYER), array_of(MATRIX)
    signature: Any = types.int64(*plans, types.float32[::1], types.int64[::1], call)
    return compiled(_run, signature)
