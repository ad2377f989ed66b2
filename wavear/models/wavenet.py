"""WaveNet: dilated causal convolutions over codes.

van den Oord et al., 2016, https://arxiv.org/abs/1609.03499.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.common.errors import WavearError
from wavear.models.base import AutoregressiveModel, matrix_entries
from wavear.models.conditioning import conditioning_matrix, make_conditioning
from wavear.models.config import CommonConfig, check_whole
from wavear.models.inputs import initialise_output, make_input
from wavear.models.memory import recomputed


@dataclass(frozen=True)
class WaveNetConfig(CommonConfig):
    """Configuration of a WaveNet; saved with its weights."""

    layers: int = 20
    """Dilated convolutions; a multiple of `stacks`."""
    stacks: int = 2
    """The dilation doubles from layer to layer and restarts at 1 in each stack."""
    kernel_size: int = 2
    """Taps of each dilated convolution, 2 or more."""
    residual_channels: int = 64
    """Channels of the signal that runs through the layers, and of each half of the gate."""
    skip_channels: int = 128
    """Channels of the sum over layers that the head reads."""
    head_channels: int = 256
    """Channels between the two 1x1 convolutions of the head."""

    def __post_init__(self):
        check_whole(self, layers=1, stacks=1, kernel_size=2)
        check_whole(self, residual_channels=1, skip_channels=1, head_channels=1)
        super().__post_init__()
        if self.layers % self.stacks:
            raise WavearError(f"{self.layers} layers do not divide into {self.stacks} stacks")
        if self.layers // self.stacks > 24:
            raise WavearError(
                f"{self.layers} layers in {self.stacks} stacks: the dilation doubles, "
                "at most 24 fit a stack"
            )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each layer, in samples."""
        return tuple(2 ** (layer % (self.layers // self.stacks)) for layer in range(self.layers))

    @property
    def receptive_field(self) -> int:
        """The sample before, and the samples that each layer adds."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)


class Block(nn.Module):
    """One layer: dilated convolution, conditioning, tanh-sigmoid gate, 1x1 residual and skip.

    The convolution is one matrix over its taps side by side, oldest first, and channels are the
    last axis. So time is an axis like the batch: `forward` and `step` share every line, and a layer
    is a few large matrix products.
    """

    def __init__(self, config: WaveNetConfig, last: bool):
        super().__init__()
        r = config.residual_channels
        self.dilated = nn.Linear(config.kernel_size * r, 2 * r)
        self.conditioning = conditioning_matrix(config, 2 * r)
        self.skip = nn.Linear(r, config.skip_channels)
        self.residual = None if last else nn.Linear(r, r)  # nothing reads the last one

    def forward(self, taps: list[Tensor], cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Taps (..., R), the current last, and cond (..., C) -> the next input, gated units."""
        return self.units(torch.cat(taps, dim=-1), taps[-1], cond)

    def units(self, taps: Tensor, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` of taps (..., kernel * R) side by side: one compiled shape for all layers."""
        z = self.dilated(taps)
        if self.conditioning is not None:
            z = z + self.conditioning(cond)
        tanh, sigmoid = z.chunk(2, dim=-1)
        gated = torch.tanh(tanh) * torch.sigmoid(sigmoid)
        return x if self.residual is None else x + self.residual(gated), gated


@dataclass
class WaveNetState:
    """The past of each layer, as ring buffers: sample t lies at t modulo the length."""

    queues: list[Tensor]
    """Per layer, (B, (kernel - 1) * dilation, R)."""
    time: Tensor
    """Samples stepped since the queues began at their oldest; int64 scalar on the device, so that a
    captured graph can advance it."""


class WaveNet(AutoregressiveModel):
    """Dilated causal convolutions over the codes of the past, conditioned on mels and speakers.

    Parameters
    ----------
    config : WaveNetConfig

    Examples
    --------
    >>> model = WaveNet(WaveNetConfig(layers=4, stacks=2, residual_channels=8, skip_channels=8))
    >>> model.receptive_field
    7
    >>> model(torch.zeros(1, 100, dtype=torch.long)).shape
    torch.Size([1, 256, 100])
    """

    family = "wavenet"

    config: WaveNetConfig
    blocks: Any  # nn.ModuleList of Block
    embedding: Any  # CodeEmbedding or ValueEmbedding
    activation_checkpointing: bool | None = False

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.config = config
        self.embedding = make_input(self.law, config.residual_channels, config.coarse_classes)
        self.blocks = nn.ModuleList(
            Block(config, last=layer == config.layers - 1) for layer in range(config.layers)
        )
        output = initialise_output(nn.Linear(config.head_channels, self.law.channels), self.law)
        hidden = nn.Linear(config.skip_channels, config.head_channels)
        self.head = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), output)
        self.conditioning = make_conditioning(config)

    @property
    def multiply_adds(self) -> int:
        """See `AutoregressiveModel.multiply_adds`. (The input is a look-up.)"""
        return matrix_entries(self.blocks, self.head)

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: WaveNetState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        shifted = self.shift(codes, previous)
        layers = self._layers(shifted, cond) if state is None else self._from(state, shifted, cond)
        return self._read(list(layers)).transpose(1, 2)

    def _from(self, state: WaveNetState, previous: Tensor, cond: Tensor | None) -> Iterator[Tensor]:
        """Yield `_layers` from a state on; advance it."""
        queues = list(self.export_state(state).values())
        yield from self._layers(previous, cond, queues)
        for queue, filled in zip(state.queues, queues, strict=True):
            queue.copy_(filled)
        state.time.zero_()

    def _layers(
        self, previous: Tensor, cond: Tensor | None, queues: list[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the gated units (B, T, R) of each layer, of all samples in parallel.

        Parameters
        ----------
        previous : Tensor of int64, shape (B, T)
            The code before each sample.
        cond : Tensor, shape (B, C, T) or (B, C, 1), or None
        queues : list of Tensor, one per layer, shape (B, (kernel - 1) * dilation, R)
            The past of each layer, the oldest first, replaced by its past after the last sample;
            zeros if None.
        """
        x = self.embedding(previous)
        if cond is not None:
            cond = cond.transpose(1, 2).contiguous()  # once, and not in each layer's product
        total = previous.shape[1]
        recompute = queues is None and self.activation_checkpointing and torch.is_grad_enabled()
        layers = zip(self.blocks, self.config.dilations, strict=True)
        for layer, (block, dilation) in enumerate(layers):
            if recompute:
                x, gated = recomputed(block, functools.partial(self._taps, dilation), x, cond)
                yield gated
                continue
            queue = None if queues is None else queues[layer]
            if queues is not None and queue is not None:
                queues[layer] = torch.cat([queue, x], dim=1)[:, total:].detach().clone()
            x, gated = block(*self._taps(dilation, x, cond, queue))
            yield gated

    def compile_layers(self) -> None:
        """Compile one layer, whose code fits all but the last, and the last."""
        for block in self.blocks:
            block.units = torch.compile(block.units, dynamic=False)

    def _taps(
        self, dilation: int, x: Tensor, cond: Tensor | None, queue: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return a block's arguments: x (B, T, R) at each tap, oldest first, and cond as it is."""
        before, total = self.config.kernel_size - 1, x.shape[1]
        if queue is None:
            past = F.pad(x, (0, 0, before * dilation, 0))
        else:
            past = torch.cat([queue, x], dim=1)
        return [*(past[:, k * dilation : k * dilation + total] for k in range(before)), x], cond

    def _read(self, gates: list[Tensor]) -> Tensor:
        """Gated units of each layer (..., R) -> parameters (..., P); one product for skips."""
        weight = torch.cat([block.skip.weight for block in self.blocks], dim=1)
        bias = functools.reduce(torch.add, (block.skip.bias for block in self.blocks))
        return self.head(F.linear(torch.cat(gates, dim=-1), weight, bias))

    def init_state(self, batch: int) -> WaveNetState:
        config, weight = self.config, self.blocks[0].skip.weight
        lengths = [(config.kernel_size - 1) * dilation for dilation in config.dilations]
        queues = [weight.new_zeros(batch, n, config.residual_channels) for n in lengths]
        return WaveNetState(queues, torch.zeros((), dtype=torch.long, device=weight.device))

    def step(self, previous: Tensor, state: WaveNetState, cond_t: Tensor | None = None) -> Tensor:
        x = self.embedding(previous)
        gates = []
        steps = torch.arange(self.config.kernel_size - 1, device=x.device)
        layers = zip(self.blocks, self.config.dilations, state.queues, strict=True)
        for block, dilation, queue in layers:
            # The oldest tap lies at time modulo the length; the current sample then replaces it.
            slots = (state.time + steps * dilation) % queue.shape[1]
            past = queue.index_select(1, slots)
            queue.index_copy_(1, slots[:1], x[:, None])
            x, gated = block([past.flatten(1), x], cond_t)
            gates.append(gated)
        state.time += 1
        return self._read(gates)

    def advance(self, previous: Tensor, state: WaveNetState, cond: Tensor | None = None) -> None:
        """See `AutoregressiveModel.advance`: the layers without the head."""
        for _ in self._from(state, previous, cond):
            pass

    def export_state(self, state: WaveNetState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `queue.0`, `queue.1`...

        The past inputs of each layer, (B, (kernel - 1) * dilation, R), the oldest first; zero
        before the first sample.
        """
        time = int(state.time)
        return {
            f"queue.{i}": queue.roll(-(time % queue.shape[1]), dims=1)
            for i, queue in enumerate(state.queues)
        }

    def import_state(self, tensors: dict[str, Tensor]) -> WaveNetState:
        state = self.init_state(len(tensors["queue.0"]))
        for i, queue in enumerate(state.queues):
            queue.copy_(tensors[f"queue.{i}"])
        return state
