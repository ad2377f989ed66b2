"""The two ends of a network: the vector of a past sample, and the parameters of a distribution."""

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
        self.initialise()

    def initialise(self) -> None:
        """Give neighbouring codes neighbouring vectors: cosines of the value, at random phases.

        So the network need not learn code by code that code 100 and code 101 sound alike.
        """
        levels = torch.arange(self.num_embeddings) / (self.num_embeddings - 1) * 2 - 1
        frequency = torch.rand(self.embedding_dim) * 8
        phase = torch.rand(self.embedding_dim) * 2 * torch.pi
        with torch.no_grad():
            self.weight.copy_(torch.cos(levels[:, None] * frequency * torch.pi / 2 + phase))

    def table(self) -> Tensor:
        """Return the vector of every code, (Q, R)."""
        return self.weight


class ValueEmbedding(nn.Module):
    """A learned line through the sample's value, plus the vector of its code on a coarser grid.

    The value is near zero where sounds are quiet; the coarse mu-law code distinguishes those values
    from the start.
    """

    values: Tensor
    coarse_codes: Tensor

    def __init__(self, grid: Grid, channels: int, coarse_classes: int = 0):
        super().__init__()
        self.grid = grid
        self.line = nn.Linear(1, channels)
        values = torch.from_numpy(grid.values().copy()).float()
        self.register_buffer("values", values, persistent=False)
        self.coarse = None
        if coarse_classes:
            coarse = Grid("mulaw", coarse_classes)
            self.coarse = CodeEmbedding(coarse, channels)
            self.register_buffer("coarse_codes", coarse.encode(values), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> ValueEmbedding:
        """Keep the values in float32, whatever the weights become: 16 bits would round them."""
        super()._apply(fn, recurse)
        values = torch.from_numpy(self.grid.values().copy())
        self.values = values.to(self.values.device, torch.float32)
        return self

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (...) -> (..., R)."""
        x = self.line(self.values[codes][..., None].to(self.line.weight.dtype))
        return x if self.coarse is None else x + self.coarse(self.coarse_codes[codes])

    def table(self) -> Tensor:
        """Return the vector of every code, (Q, R)."""
        return self(torch.arange(len(self.values), device=self.values.device))


def make_input(law: Law, channels: int, coarse_classes: int = 0) -> CodeEmbedding | ValueEmbedding:
    """Return the first layer of a network: `module(codes)` has shape (..., channels)."""
    if isinstance(law, Categorical):
        return CodeEmbedding(law.grid, channels)
    return ValueEmbedding(law.grid, channels, coarse_classes)


def initialise_output(output: nn.Linear, law: Law) -> nn.Linear:
    """Let a distribution over values begin spread about silence."""
    if (bias := law.initial_bias()) is not None:
        with torch.no_grad():
            output.bias.copy_(bias)
    return output
