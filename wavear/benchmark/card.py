"""The limits of the Triton engine on a CUDA card, from its properties and a measurement.

A program of the kernel reads the weights again for every sample, for its 16 streams together; the
programs on different multiprocessors share what the second-level cache gives. Beyond that, tensor
cores multiply the 16 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wavear.benchmark.ceiling import cost
from wavear.generation.cuda.triton_packing import ROWS
from wavear.models.wavenet import WaveNetConfig

_LINE = 64  # bytes that a multiprocessor gets from the second-level cache in a cycle


@dataclass(frozen=True)
class Card:
    """A CUDA device."""

    name: str
    multiprocessors: int
    clock: float
    """Hz."""
    cache: float
    """Bytes per second of reading the second-level cache, of all together, measured."""
    tensor: dict[str, float]
    """Multiply-adds per second of large matrix products, measured, by the type of the weights."""

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:.0f} T in {kind}" for kind, rate in self.tensor.items())
        return (
            f"{self.name}: {self.multiprocessors} multiprocessors, {self.clock / 1e9:.2f} GHz, "
            f"second-level cache {self.cache / 1e9:.0f} GB/s; multiply-adds/s: {rates}"
        )


def card(device: torch.device) -> Card:
    """Measure a card: a second or two."""
    properties = torch.cuda.get_device_properties(device)
    # 8 MiB: more than all first-level caches use, less than the second.
    values = torch.zeros(2 * 2**20, device=device)
    reading = 4 * values.numel() / _seconds(lambda: values.sum(), device)
    tensor = {}
    for name in ("float32", "bfloat16", "float16"):
        square = torch.zeros(4096, 4096, dtype=getattr(torch, name), device=device)
        tensor[name] = 4096**3 / _seconds(lambda x=square: x @ x, device)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or 1.7e9
    return Card(properties.name, properties.multi_processor_count, clock, reading, tensor)


def _seconds(function, device: torch.device, times: int = 20) -> float:
    """Return the seconds of one call, the fastest of some rounds of `times`."""
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            function()
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, begin.elapsed_time(end) / 1e3 / times)
    return best


def limit(card: Card, config: WaveNetConfig, weights: str, batch: int) -> float:
    """Return the samples per second that a card can reach with a batch.

    Examples
    --------
    >>> one = Card("", 100, 1.5e9, 5e12, {"float16": 3e14})
    >>> round(limit(one, WaveNetConfig(), "float16", 1))
    71894
    """
    network = cost(config, weights)
    programs = -(-batch // ROWS)
    rounds = -(-programs // card.multiprocessors)  # in which they have their turn
    one = card.clock * _LINE / network.weight_bytes
    together = min(one, card.cache / network.weight_bytes / min(programs, card.multiprocessors))
    return min(batch * together / rounds, card.tensor[weights] / network.multiply_adds)
