"""WaveNet (van den Oord et al., 2016, https://arxiv.org/abs/1609.03499): dilated causal convolutions over codes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.base import AutoregressiveModel, CommonConfig, check_whole, in_parts
from wavear.models.conditioning import make_conditioning
from wavear.models.inputs import make_head, make_input
from wavear.models.memory import recomputed


@dataclass(frozen=True)
class WaveNetConfig(CommonConfig):
    """What a WaveNet is made of; saved with its weights."""

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
        check_whole(
            self,
            layers=1,
            stacks=1,
            kernel_size=2,
            residual_channels=1,
            skip_channels=1,
            head_channels=1,
        )
        super().__post_init__()
        if self.layers % self.stacks:
            raise ValueError(f"{self.layers} layers do not divide into {self.stacks} stacks")
        if self.layers // self.stacks > 24:
            raise ValueError(
                f"{self.layers} layers in {self.stacks} stacks: the dilation doubles, at most 24 fit a stack"
            )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Of each layer, in samples."""
        return tuple(2 ** (layer % (self.layers // self.stacks)) for layer in range(self.layers))

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on: the sample before, and what each layer adds."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)


class Block(nn.Module):
    """One layer: a dilated convolution, the conditioning, a tanh-sigmoid gate, and 1x1 outputs to residual and skip.

    The convolution is one matrix over its taps side by side, oldest first, and channels are the
    last axis. So time is an axis like the batch: `forward` and `step` share every line, and a layer
    is a few large matrix products.
    """

    def __init__(self, config: WaveNetConfig, last: bool):
        super().__init__()
        r = config.residual_channels
        conditioned = config.conditioned
        self.dilated = nn.Linear(config.kernel_size * r, 2 * r)
        self.conditioning = (
            nn.Linear(config.conditioning_channels, 2 * r, bias=False) if conditioned else None
        )
        self.skip = nn.Linear(r, config.skip_channels)
        self.residual = None if last else nn.Linear(r, r)  # nothing reads the last one

    def forward(self, taps: list[Tensor], cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Taps (..., R), the current one last, and cond (..., C) -> the next layer's input, the gated units."""
        return self.units(torch.cat(taps, dim=-1), taps[-1], cond)

    def units(self, taps: Tensor, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` of taps side by side (..., kernel * R) and the current one, all of one shape in every layer."""
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
    """Samples stepped since the queues began at their oldest; int64 scalar on the device, so that a captured graph can
    advance it."""


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
        self.head = make_head(self.law, config.skip_channels, config.head_channels)
        self.conditioning = make_conditioning(config)

    @property
    def receptive_field(self) -> int:
        """Past samples that the law of the next one depends on."""
        return self.config.receptive_field

    @property
    def multiply_adds(self) -> int:
        """See `AutoregressiveModel.multiply_adds`: each weight of each matrix once. (The input is a look-up.)"""
        matrices = (module for part in (self.blocks, self.head) for module in part.modules())
        return sum(matrix.weight.numel() for matrix in matrices if isinstance(matrix, nn.Linear))

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: WaveNetState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """See `AutoregressiveModel.forward`."""
        if state is None:
            return self._read(list(self._layers(self.shift(codes), cond))).transpose(1, 2)
        queues = list(self.export_state(state).values())
        gates = list(self._layers(self.shift(codes, previous), cond, queues))
        self._store(queues, state)
        return self._read(gates).transpose(1, 2)

    def _layers(
        self, previous: Tensor, cond: Tensor | None, queues: list[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Gated units (B, T, R) of each layer, of all samples in parallel.

        Parameters
        ----------
        previous : Tensor of int64, shape (B, T)
            The code before each sample.
        cond : Tensor, shape (B, C, T) or (B, C, 1), or None
        queues : list of Tensor, one per layer, shape (B, (kernel - 1) * dilation, R)
            The past of each layer, the oldest first, replaced by what it is after the last sample;
            zeros if None.
        """
        x = self.embedding(previous)
        cond = (
            None if cond is None else cond.transpose(1, 2).contiguous()
        )  # once, and not in the product of each layer
        total = previous.shape[1]
        recompute = queues is None and self.activation_checkpointing and torch.is_grad_enabled()
        for layer, (block, dilation) in enumerate(
            zip(self.blocks, self.config.dilations, strict=True)
        ):
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
        """See `AutoregressiveModel.compile_layers`: the layers are alike, so one is compiled, and the last."""
        for block in self.blocks:
            block.units = torch.compile(block.units, dynamic=False)

    def _taps(
        self, dilation: int, x: Tensor, cond: Tensor | None, queue: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """What a block takes: x (B, T, R) at each tap, the oldest first, and cond as it is."""
        before = self.config.kernel_size - 1
        past = (
            F.pad(x, (0, 0, before * dilation, 0))
            if queue is None
            else torch.cat([queue, x], dim=1)
        )
        return [
            *(past[:, k * dilation : k * dilation + x.shape[1]] for k in range(before)),
            x,
        ], cond

    def _read(self, gates: list[Tensor]) -> Tensor:
        """Gated units of each layer (..., R) -> logits (..., Q): the sum of the skips as one product, then the head."""
        weight = torch.cat([block.skip.weight for block in self.blocks], dim=1)
        bias = functools.reduce(torch.add, (block.skip.bias for block in self.blocks))
        return self.head(F.linear(torch.cat(gates, dim=-1), weight, bias))

    def init_state(self, batch: int) -> WaveNetState:
        """See `AutoregressiveModel.init_state`."""
        weight = self.blocks[0].skip.weight
        past = [(self.config.kernel_size - 1) * dilation for dilation in self.config.dilations]
        return WaveNetState(
            queues=[
                weight.new_zeros(batch, length, self.config.residual_channels) for length in past
            ],
            time=torch.zeros((), dtype=torch.long, device=weight.device),
        )

    def step(self, previous: Tensor, state: WaveNetState, cond_t: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.step`."""
        x = self.embedding(previous)
        gates = []
        steps = torch.arange(self.config.kernel_size - 1, device=x.device)
        for block, dilation, queue in zip(
            self.blocks, self.config.dilations, state.queues, strict=True
        ):
            # The oldest tap lies at time modulo the length, where the current sample then takes its
            # place.
            slots = (state.time + steps * dilation) % queue.shape[1]
            past = queue.index_select(1, slots)
            queue.index_copy_(1, slots[:1], x[:, None])
            x, gated = block([past.flatten(1), x], cond_t)
            gates.append(gated)
        state.time += 1
        return self._read(gates)

    def prefill(self, previous: Tensor, state: WaveNetState, cond: Tensor | None = None) -> None:
        """See `AutoregressiveModel.prefill`: the layers of `forward`, begun with the past of the state."""
        queues = list(self.export_state(state).values())
        for part, given in in_parts(previous, cond):
            for _ in self._layers(part, given, queues):
                pass
        self._store(queues, state)

    def _store(self, queues: list[Tensor], state: WaveNetState) -> None:
        for queue, filled in zip(state.queues, queues, strict=True):
            queue.copy_(filled)
        state.time.zero_()

    def export_state(self, state: WaveNetState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `queue.0`, `queue.1`..., the past inputs of each layer.

        Of shape (B, (kernel - 1) * dilation, R), the oldest first; before the first sample they are
        zero.
        """
        time = int(state.time)
        return {
            f"queue.{i}": queue.roll(-(time % queue.shape[1]), dims=1)
            for i, queue in enumerate(state.queues)
        }

    def import_state(self, tensors: dict[str, Tensor]) -> WaveNetState:
        """See `AutoregressiveModel.import_state`."""
        state = self.init_state(tensors["queue.0"].shape[0])
        for i, queue in enumerate(state.queues):
            queue.copy_(tensors[f"queue.{i}"])
        return state
