"""The two ends of a network: what it sees of a past sample, and how it puts out a law."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wavear.audio.grid import Grid
from wavear.models.distributions import Categorical, Law


class CodeEmbedding(nn.Embedding):
    """A learned vector for each code."""

    def __init__(self, grid: Grid, channels: int):
        super().__init__(grid.classes, channels)
        self.classes = grid.classes
        self.initialise()

    def initialise(self) -> None:
        """Neighbouring codes start with neighbouring vectors: cosines of the sample's value, at random phases.

        The network then begins by knowing that code 100 and code 101 sound alike, instead of
        learning it code by code.
        """
        levels = torch.arange(self.classes) / (self.classes - 1) * 2 - 1
        frequency = torch.rand(self.embedding_dim) * 8
        phase = torch.rand(self.embedding_dim) * 2 * torch.pi
        with torch.no_grad():
            self.weight.copy_(torch.cos(levels[:, None] * frequency * torch.pi / 2 + phase))

    def table(self) -> Tensor:
        """The vector of every code, (Q, R)."""
        return self.weight


class ValueEmbedding(nn.Module):
    """A learned line through the sample's value, and beside it the vector of its code on a coarser mu-law grid.

    The value alone is near zero where sounds are quiet; the coarse code tells those values apart
    from the start.
    """

    values: Tensor
    coarse_codes: Tensor

    def __init__(self, grid: Grid, channels: int, coarse_classes: int = 0):
        super().__init__()
        self.grid = grid
        self.line = nn.Linear(1, channels)
        self.coarse = (
            CodeEmbedding(Grid("mulaw", coarse_classes), channels) if coarse_classes else None
        )
        values = torch.from_numpy(grid.values().copy())
        self.register_buffer("values", values.float(), persistent=False)
        if self.coarse is not None:
            codes = Grid("mulaw", coarse_classes).encode(values.float())
            self.register_buffer("coarse_codes", codes, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> ValueEmbedding:
        """The values stay in float32, whatever the weights become: 16 bits would round them, for good."""
        super()._apply(fn, recurse)
        self.values = torch.from_numpy(self.grid.values().copy()).to(
            self.values.device, torch.float32
        )
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (...) -> (..., R)."""
        x = self.line(self.values[codes][..., None].to(self.line.weight.dtype))
        return x if self.coarse is None else x + self.coarse(self.coarse_codes[codes])

    def table(self) -> Tensor:
        """The vector of every code, (Q, R)."""
        return self(torch.arange(len(self.values), device=self.values.device))


def make_input(law: Law, channels: int, coarse_classes: int = 0) -> CodeEmbedding | ValueEmbedding:
    """The first layer of a network: `module(codes)` is (..., channels), `module.table()` that of every code."""
    if isinstance(law, Categorical):
        return CodeEmbedding(law.grid, channels)
    return ValueEmbedding(law.grid, channels, coarse_classes)


def make_head(law: Law, channels: int, hidden: int) -> nn.Sequential:
    """The last layers of a network, (..., channels) -> (..., P); a law over values begins spread about silence."""
    output = nn.Linear(hidden, law.channels)
    if (bias := law.initial_bias()) is not None:
        with torch.no_grad():
            output.bias.copy_(bias)
    return nn.Sequential(nn.ReLU(), nn.Linear(channels, hidden), nn.ReLU(), output)
