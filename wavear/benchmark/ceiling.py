"""Both sides of a speed limit: the cost of a network per sample, and the rates of this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from wavear.common.compiled import compiled
from wavear.common.errors import WavearError
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES, Emitter, kernel
from wavear.generation.cpu.packing import Region, ahead_of
from wavear.models.distributions import law_of
from wavear.models.gru import GRUConfig
from wavear.models.predictive import PredictiveWaveNetConfig
from wavear.models.transformer import TransformerConfig
from wavear.models.wavenet import WaveNetConfig

Config = WaveNetConfig | GRUConfig | TransformerConfig | PredictiveWaveNetConfig
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """The cost of a sample of a stream by definition: no tables, no zeros left out."""

    multiply_adds: int
    """All of them, the conditioning's included."""
    weight_bytes: int
    """Bytes of all weights of the layers and the head, with the scales of int8."""
    hot_bytes: int
    """Bytes that one stream must read for every sample: without those of past taps and
    conditioning, which are read once for many samples, and of the first layer, which is a table."""
    patch: int = field(default=1, repr=False)
    """Samples for which the weights are read together, `patch * hot_bytes` at a time."""

    def seconds(self, read_rate: Callable[[float], float]) -> float:
        """Return the seconds to read one sample's weights.

        `read_rate(nbytes)` is the rate (bytes per second) of reading so many bytes.
        """
        return self.hot_bytes / read_rate(self.hot_bytes * self.patch)


class _Matrix(NamedTuple):
    outputs: int
    inputs: int
    multiplied: float
    """How many such are multiplied for a sample."""
    read: float
    """How many such are read for a sample."""


def cost(config: Config, weights: str = "float32") -> Cost:
    """Return the cost of one sample.

    Parameters
    ----------
    config : WaveNetConfig, GRUConfig, TransformerConfig or PredictiveWaveNetConfig
    weights : str
        "float32", "bfloat16", "float16" or "int8".

    Examples
    --------
    >>> cost(WaveNetConfig())
    Cost(multiply_adds=667648, weight_bytes=2670592, hot_bytes=2080640)
    >>> cost(GRUConfig())
    Cost(multiply_adds=662528, weight_bytes=2650112, hot_bytes=2109440)
    >>> cost(TransformerConfig())  # a share of the layers, which run once in 8 samples
    Cost(multiply_adds=712704, weight_bytes=2719744, hot_bytes=2129920)
    """
    patch, attention = 1, 0.0
    if isinstance(config, TransformerConfig):
        patch = config.patch
        attention = 2 * config.layers * config.window * config.channels / patch
        rows = _of_transformer(config)
    elif isinstance(config, PredictiveWaveNetConfig):
        rows = _of_predictive(config)
    elif isinstance(config, GRUConfig):
        rows = _of_gru(config)
    elif isinstance(config, WaveNetConfig):
        rows = _of_wavenet(config)
    else:
        raise WavearError(f"the cost of a {type(config).__name__} is not known")
    matrices = [_Matrix(*row) for row in rows if row[1]]
    nbytes = [m.outputs * (m.inputs * _BYTES[weights] + 4 * (weights == "int8")) for m in matrices]
    return Cost(
        int(sum(m.outputs * m.inputs * m.multiplied for m in matrices) + attention),
        int(sum(n * m.multiplied for n, m in zip(nbytes, matrices, strict=True))),
        int(sum(n * m.read for n, m in zip(nbytes, matrices, strict=True))),
        patch,
    )


_Rows = list[tuple[int, int, float, float]]  # the fields of a _Matrix


def _of_gru(config: GRUConfig) -> _Rows:
    h, r, a = config.channels, config.input_channels, config.head_channels
    channels = config.conditioning_channels if config.conditioned else 0
    line = 0 if config.law == "categorical" else 1
    return [
        (r, line, 1, 0),
        (r, channels, 1, 0),
        (a, channels, 1, 0),
        (3 * h, r, 1, 0),
        (3 * h, h, 2 * config.layers - 1, 2 * config.layers - 1),
        (a, h, 1, 1),
        (law_of(config).channels, a, 1, 1),
    ]


def _of_transformer(config: TransformerConfig) -> _Rows:
    d, f, a, share = config.channels, config.hidden_channels, config.head_channels, 1 / config.patch
    channels = config.conditioning_channels if config.conditioned else 0
    layers, samples = config.layers * share, config.patch * config.sample_channels
    read = 0 if config.law == "categorical" else 1
    return [
        (d, samples, share, read * share),
        (d, channels, share, share),
        (3 * d, d, layers, layers),
        (d, d, layers, layers),
        (f, d, layers, layers),
        (d, f, layers, layers),
        (a, d, share, share),
        (a, samples, 1, read),
        (a, channels, 1, 1),
        (a, a, 1, 1),
        (law_of(config).channels, a, 1, 1),
    ]


def _of_predictive(config: PredictiveWaveNetConfig) -> _Rows:
    r, s, a, layers = (
        config.residual_channels,
        config.skip_channels,
        config.head_channels,
        len(config.dilations),
    )
    past = config.kernel_size - 1
    # Past taps are read once for several samples.
    rare = past * sum(1 / ahead_of(d or config.shortest_period) for d in config.dilations)
    return [
        (r, config.features, 1, 1),
        (2 * r, r, layers, layers),
        (2 * r, r, layers * past, rare),
        (r, r, layers - 1, layers - 1),
        (s, r * layers, 1, 1),
        (a, s, 1, 1),
        (3 * config.mixtures, a, 1, 1),
    ]


def _of_wavenet(config: WaveNetConfig) -> _Rows:
    r, s, a, q = (
        config.residual_channels,
        config.skip_channels,
        config.head_channels,
        law_of(config).channels,
    )
    conditioned = config.conditioned
    channels = config.conditioning_channels if conditioned else 0
    layers, past = config.layers, config.kernel_size - 1
    # Past taps of a layer of dilation d are read once for d samples; those of the first layer are
    # in its table.
    rare = past * sum(1 / d for d in config.dilations[1:])
    return [
        (2 * r, r, layers, layers - 1),
        (2 * r, r, layers * past, rare),
        (2 * r, channels, layers, 0),
        (r, r, layers - 1, layers - 1),
        (s, r, layers, layers),
        (a, s, 1, 1),
        (q, a, 1, 1),
    ]


@dataclass(frozen=True)
class Ceiling:
    """Measured rates of one core of this machine."""

    multiply_adds: float
    """float32 multiply-adds per second, from registers."""
    bandwidth: dict[int, float]
    """Bytes per second of repeated reading, by the bytes of the working set."""

    def read_rate(self, nbytes: float) -> float:
        """Return the bytes per second of reading `nbytes` per turn, interpolated."""
        sizes = sorted(self.bandwidth)
        return float(np.interp(nbytes, sizes, [self.bandwidth[size] for size in sizes]))


SIZES = tuple(
    int(mebibytes * 2**20)
    for mebibytes in (0.02, 0.25, 0.5, 1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 6, 16, 64)
)


def measure(seconds: float = 0.005, repeats: int = 20) -> Ceiling:
    """Measure this core: the best of short runs of about `seconds` for each of `SIZES`."""
    read, multiply = _kernels()
    turns = 200_000
    rate = 12 * LANES * turns / _best(lambda: multiply(turns), repeats)
    region = Region()
    region.reserve(max(SIZES))
    address = region.allocate()
    region.bytes[:] = 0  # physical memory for every page
    bandwidth = {}
    for size in SIZES:
        lines = size // (8 * VECTOR_BYTES)
        once = _best(lambda n=lines: read(address, n, 1), 3)
        times = max(1, int(seconds / once))
        bandwidth[size] = (
            size * times / _best(lambda n=lines, k=times: read(address, n, k), repeats)
        )
    return Ceiling(rate, bandwidth)


def _best(function, repeats: int) -> float:
    """Return the seconds of the fastest of some calls."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return float(best)


def _emit_read(e: Emitter, address, lines):
    """Read `lines` times eight vectors, one multiply-add for each; returns their sum."""
    sums = [e.variable(e.f32(0.0)) for _ in range(8)]

    def body(i):
        start = e.at(address, i, 8 * e.bytes)
        for j, total in enumerate(sums):
            value = e.load(e.at(start, j, e.bytes))
            e.b.store(e.fma(value, e.f32(1.0), e.b.load(total)), total)

    return _looped(e, lines, body, sums)


def _emit_multiply_adds(e: Emitter, turns):
    """Twelve independent chains of `turns` multiply-adds in registers."""
    chains = [e.variable(e.f32(float(j))) for j in range(12)]

    def body(i):
        for chain in chains:
            e.b.store(e.fma(e.b.load(chain), e.f32(0.999), e.f32(0.5)), chain)

    return _looped(e, turns, body, chains)


def _looped(e: Emitter, count, body, sums: Sequence[ir.Value]):
    e.loop(count, body)
    return e.halves(functools.reduce(e.b.fadd, [e.b.load(total) for total in sums]), e.b.fadd)


_read = kernel("read", 2, _emit_read, result=types.float32)
_multiply_adds = kernel("multiply_adds", 1, _emit_multiply_adds, result=types.float32)


def _read_often(address, lines, times):
    from_all = np.float32(0.0)
    for turn in range(times):
        # Another address each time, or the compiler reads once.
        from_all += _read(address + 64 * (turn & 1), lines)
    return from_all


def _multiply_often(turns):
    return _multiply_adds(turns)


@functools.cache
def _kernels():
    return compiled(_read_often, "float32(int64, int64, int64)"), compiled(
        _multiply_often, "float32(int64)"
    )
