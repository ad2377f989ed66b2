"""What a network asks of the machine per sample, and what the machine can give: the two sides of a speed limit."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from wavear.common.compiled import compiled
from wavear.generation.cpu import simd
from wavear.generation.cpu.packing import Region
from wavear.generation.cpu.simd import LANES, VECTOR_BYTES
from wavear.models.distributions import law_of
from wavear.models.gru import GRUConfig
from wavear.models.predictive import PredictiveWaveNetConfig
from wavear.models.transformer import TransformerConfig
from wavear.models.wavenet import WaveNetConfig


@dataclass(frozen=True)
class Cost:
    """Of one sample of one stream, as the definition of the network has it: no table, no zero left out."""

    multiply_adds: int
    """All of them, the conditioning's included."""
    weight_bytes: int
    """Bytes of all weights of the layers and the head in the given precision, with the scales of int8."""
    hot_bytes: int
    """Bytes that one stream must read anew for every sample: without those of past taps and conditioning that are
    read once for many samples, and of the first layer, which is a table."""
    patch: int = field(default=1, repr=False)
    """Samples for which the weights are read together: a reading is of `hot_bytes` times as many."""

    def seconds(self, read_rate: Callable[[float], float]) -> float:
        """For the reading of one sample, by the rate (bytes per second) at which so many bytes are read."""
        return self.hot_bytes / read_rate(self.hot_bytes * self.patch)


Config = WaveNetConfig | GRUConfig | TransformerConfig | PredictiveWaveNetConfig


def cost(config: Config, weights: str = "float32") -> Cost:
    """What one sample costs.

    Parameters
    ----------
    config : WaveNetConfig, GRUConfig, TransformerConfig or PredictiveWaveNetConfig
    weights : str
        "float32", "bfloat16" or "int8".

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
        matrices = _of_transformer(config)
    elif isinstance(config, PredictiveWaveNetConfig):
        matrices = _of_predictive(config)
    else:
        matrices = _of_gru(config) if isinstance(config, GRUConfig) else _of_wavenet(config)
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[weights]
    scale = 4 if weights == "int8" else 0

    def nbytes(outputs: int, inputs: int) -> int:
        return outputs * (inputs * size + scale) if inputs else 0

    return Cost(
        int(sum(outputs * inputs * count for outputs, inputs, count, _ in matrices) + attention),
        int(sum(nbytes(outputs, inputs) * count for outputs, inputs, count, _ in matrices)),
        int(sum(nbytes(outputs, inputs) * count for outputs, inputs, _, count in matrices)),
        patch,
    )


# Of each matrix: outputs, inputs, how many such are multiplied for a sample, how many are read.
_Matrices = list[tuple[int, int, float, float]]


def _of_gru(config: GRUConfig) -> _Matrices:
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


def _of_transformer(config: TransformerConfig) -> _Matrices:
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


def _of_predictive(config: PredictiveWaveNetConfig) -> _Matrices:
    r, s, a, layers = (
        config.residual_channels,
        config.skip_channels,
        config.head_channels,
        len(config.dilations),
    )
    return [
        (r, config.features, 1, 1),
        (2 * r, config.kernel_size * r, layers, layers),
        (r, r, layers - 1, layers - 1),
        (s, r * layers, 1, 1),
        (a, s, 1, 1),
        (3 * config.mixtures, a, 1, 1),
    ]


def _of_wavenet(config: WaveNetConfig) -> _Matrices:
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
    """What one core of this machine does, measured."""

    multiply_adds: float
    """float32 multiply-adds per second, from registers."""
    bandwidth: dict[int, float]
    """Bytes per second when reading a working set of so many bytes again and again."""

    def read_rate(self, nbytes: float) -> float:
        """Bytes per second of reading `nbytes` per turn, interpolated."""
        sizes = sorted(self.bandwidth)
        return float(np.interp(nbytes, sizes, [self.bandwidth[size] for size in sizes]))


SIZES = tuple(
    int(mebibytes * 2**20)
    for mebibytes in (0.02, 0.25, 0.5, 1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 6, 16, 64)
)


def measure(seconds: float = 0.005, repeats: int = 20) -> Ceiling:
    """Measure this core: the best of some short runs for each of `SIZES`, about `seconds` each; some seconds in all."""
    read, multiply = _kernels()
    turns = 200_000
    rate = 12 * LANES * turns / _best(lambda: multiply(turns), repeats)
    region = Region()
    region.reserve(max(SIZES))
    address = region.allocate()
    region.bytes[:] = 0
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
    """Seconds of the fastest of some calls."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return float(best)


def _read_often(address, lines, times):
    from_all = np.float32(0.0)
    for turn in range(times):
        # Another address each time, or the compiler reads once.
        from_all += simd.read(address + 64 * (turn & 1), lines)
    return from_all


def _multiply_often(turns):
    return simd.multiply_adds(turns)


@functools.cache
def _kernels():
    return compiled(_read_often, "float32(int64, int64, int64)"), compiled(
        _multiply_often, "float32(int64)"
    )
