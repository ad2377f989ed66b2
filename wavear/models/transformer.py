"""Transformer: causal self-attention over patches of samples, and a small network within a patch.

The line of GPT (Radford et al., 2018), with rotary positions, over a window of positions whose keys
and values lie in a ring; in training the keys and values of the segment before are seen too,
without a gradient (Dai et al., 2019, "Transformer-XL", https://arxiv.org/abs/1901.02860).

A position stands for `patch` samples. The product over samples stays exact: position j sees the
samples before the patch, and the head computes the distribution of each sample from the position's
output and from the `patch` samples before it, so from all that lie in the patch already (as in
SampleRNN, Mehri et al., 2017, https://arxiv.org/abs/1612.07837).

    samples    | ... patch j-1 ... | x_t0  x_t0+1 ...  x_t ... |          t0 = j * patch
                        |                          |
    positions  ... -> layers -> output j --------> head -> distribution of x_t
                        |                          |
                   keys, values of             the samples t - patch .. t - 1
                   the window before
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.common.errors import WavearError
from wavear.models.attention import (
    Block,
    attend_within,
    normalised,
    rotation,
    rotation_period,
    turns,
)
from wavear.models.base import AutoregressiveModel
from wavear.models.conditioning import conditioning_matrix, make_conditioning
from wavear.models.config import CommonConfig, check_whole
from wavear.models.inputs import initialise_output, make_input


@dataclass(frozen=True)
class TransformerConfig(CommonConfig):
    """Configuration of a Transformer; saved with its weights."""

    layers: int = 4
    """Attention layers."""
    channels: int = 256
    """Channels of a position; a multiple of 2 * `heads`."""
    heads: int = 4
    """Attention heads."""
    window: int = 128
    """Positions that a position attends to in each layer, itself among them."""
    patch: int = 8
    """Samples that a position stands for."""
    hidden_channels: int = 0
    """Channels between the two matrices of a layer; 0: four times `channels`."""
    sample_channels: int = 64
    """Channels of a past sample's vector."""
    head_channels: int = 256
    """Channels of the two hidden layers of the head, which runs for every sample."""

    def __post_init__(self):
        check_whole(self, layers=1, channels=2, heads=1, window=1, patch=1, hidden_channels=0)
        check_whole(self, sample_channels=1, head_channels=1)
        super().__post_init__()
        if self.channels % (2 * self.heads):
            raise WavearError(
                f"{self.channels} channels do not divide into {self.heads} heads of an even number:"
                f" choose a multiple of {2 * self.heads}"
            )
        if self.hidden_channels == 0:
            object.__setattr__(self, "hidden_channels", 4 * self.channels)

    @property
    def receptive_field(self) -> int:
        """Past samples that the next one depends on, at most.

        A layer reaches window - 1 positions back, and the input of a position is the patch before
        it: so a position that begins at sample t0 sees `layers * (window - 1) + 1` patches before
        t0. The last sample of its patch is patch - 1 samples later and sees as far; those before it
        see less far, down to patch - 1 samples less.
        """
        return (self.layers * (self.window - 1) + 2) * self.patch - 1


class Head(nn.Module):
    """A sample's distribution from its position, the `patch` samples before it, and cond."""

    def __init__(self, config: TransformerConfig, channels: int):
        super().__init__()
        width = config.head_channels
        self.position = nn.Linear(config.channels, width, bias=False)
        self.samples = nn.Linear(config.patch * config.sample_channels, width)
        self.place = nn.Embedding(config.patch, width) if config.patch > 1 else None
        self.conditioning = conditioning_matrix(config, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, channels)

    def forward(
        self, position: Tensor, samples: Tensor, place: Tensor, cond: Tensor | None
    ) -> Tensor:
        """Return parameters (..., P).

        Parameters
        ----------
        position : Tensor, shape (..., head channels)
            `self.position` of the position's output: one for all samples of a patch.
        samples : Tensor, shape (..., patch * sample channels)
            Those before, the oldest first.
        place : Tensor of int64, shape (...)
            Place of the sample in its patch.
        cond : Tensor, shape (..., C), or None
        """
        x = position + self.samples(samples)
        if self.place is not None:
            x = x + self.place(place)
        if self.conditioning is not None:
            x = x + self.conditioning(cond)
        x = F.relu(x)
        return self.out(F.relu(x + self.hidden(x)))


@dataclass
class TransformerState:
    """The past of every row, each at its own time; ring position n lies at n % window."""

    time: Tensor
    """Samples stepped, (B,) int64."""
    codes: Tensor
    """The last `patch` codes consumed, the oldest first, (B, patch); silence before the first."""
    position: Tensor
    """`Head.position` of the position that the last sample lay in, (B, head channels)."""
    keys: list[Tensor]
    """Per layer, (B, heads, window + 1, channels / heads), rotated. The last place takes writes
    that are to be discarded."""
    values: list[Tensor]
    """Likewise."""

    def rings(self) -> dict[str, Tensor]:
        """Return all keys and values by name."""
        named: dict[str, Tensor] = {}
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            named |= {f"keys.{i}": keys, f"values.{i}": values}
        return named


class Transformer(AutoregressiveModel):
    """Causal self-attention over a window of patches of samples, conditioned on mels and speakers.

    Conditioning enters twice: a position sees the vector of its first sample, and the head that of
    each sample.

    Parameters
    ----------
    config : TransformerConfig

    Examples
    --------
    >>> model = Transformer(TransformerConfig(layers=2, channels=16, heads=2, window=8, patch=4))
    >>> model.receptive_field  # 2 layers of 7 patches, the patch before, up to 3 samples of its own
    63
    >>> model(torch.zeros(1, 100, dtype=torch.long)).shape
    torch.Size([1, 256, 100])
    """

    family = "transformer"

    config: TransformerConfig
    blocks: Any  # nn.ModuleList of Block
    turns: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = make_input(self.law, config.sample_channels, config.coarse_classes)
        self.enter = nn.Linear(config.patch * config.sample_channels, config.channels)
        self.enter_conditioning = conditioning_matrix(config, config.channels)
        self.blocks = nn.ModuleList(
            Block(config.channels, config.heads, config.hidden_channels)
            for _ in range(config.layers)
        )
        self.head = Head(config, self.law.channels)
        self.conditioning = make_conditioning(config)
        frequencies = turns(config.channels // config.heads, config.window)
        self.register_buffer("turns", frequencies, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Let each layer add little at first, so that the sum of all has the size of one."""
        with torch.no_grad():
            for block in self.blocks:
                for matrix in (block.qkv, block.up):
                    matrix.weight.normal_(std=self.config.channels**-0.5)
                for matrix in (block.out, block.down):
                    matrix.weight.normal_(std=(matrix.in_features * 2 * self.config.layers) ** -0.5)
            if self.head.place is not None:
                self.head.place.weight.zero_()
        initialise_output(self.head.out, self.law)

    @property
    def carries(self) -> bool:
        """The keys and values of the segments before are seen in training."""
        return True

    @property
    def multiply_adds(self) -> int:
        """Per generated sample, with a full window: the head, and the layers once per patch."""
        config = self.config
        attention = 2 * config.layers * config.window * config.channels
        return round((self._weights(False) + attention) / config.patch) + self._weights(True)

    @property
    def weight_bytes(self) -> int:
        """Bytes of float32 weights read per generated sample: the layers' share, and the head."""
        return 4 * (round(self._weights(False) / self.config.patch) + self._weights(True))

    def _weights(self, per_sample: bool) -> int:
        """Entries of the matrices that are used for every sample, or for every position."""
        once = [self.enter, self.enter_conditioning, *self.blocks, self.head.position]
        each = [self.head.samples, self.head.conditioning, self.head.hidden, self.head.out]
        modules = [module for module in (each if per_sample else once) if module is not None]
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: TransformerState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        past = self.init_state(len(codes)) if state is None else state
        found = self._run(self.shift(codes, previous), cond, past, keep=state is not None)
        return found.transpose(1, 2)

    @torch.no_grad()
    def advance(
        self, previous: Tensor, state: TransformerState, cond: Tensor | None = None
    ) -> None:
        """See `AutoregressiveModel.advance`: the layers without the head."""
        self._run(previous, cond, state, read=False)

    def _run(
        self,
        given: Tensor,
        cond: Tensor | None,
        state: TransformerState,
        keep: bool = True,
        read: bool = True,
    ) -> Tensor:
        """Return parameters (B, T, P) of the samples after each of `given` (B, T), from `state` on.

        Every row is at its own time, so its positions begin at its own samples, and it may have one
        fewer than others.

        Parameters
        ----------
        keep : bool
            Advance the state past the last of `given`.
        read : bool
            Run the head. Otherwise the result is empty.
        """
        patch, window, device = self.config.patch, self.config.window, given.device
        batch, total = given.shape
        # Before sample s lie [s + 1, s + 1 + patch) of `joined`.
        joined = torch.cat([state.codes, given], dim=1)
        vectors = self.embedding(joined)
        cond = None if cond is None else cond.transpose(1, 2).expand(batch, -1, -1)
        place = state.time % patch
        # Begin of each position, in samples from the first of `given`; those at `total` or later
        # are not reached.
        numbers = torch.arange(-(-total // patch), device=device)
        begins = -state.time[:, None] % patch + patch * numbers
        reached = (begins < total).sum(dim=1)
        begins = begins.clamp(max=total - 1)
        begun = -(-state.time // patch)  # positions so far
        taps = (begins[..., None] + 1 + torch.arange(patch, device=device)).flatten(1)
        x = self.enter(_take(vectors, taps).reshape(batch, -1, self.enter.in_features))
        if self.enter_conditioning is not None:
            assert cond is not None
            x = x + self.enter_conditioning(cond if cond.shape[1] == 1 else _take(cond, begins))

        by = rotation((begun[:, None] + numbers)[:, None], self.turns, rotation_period(window), x)
        ring = torch.arange(window, device=device)
        before = begun[:, None] - window + ring  # the positions in the ring, the oldest first
        # Afterwards slot s holds the last position that is s modulo the window.
        last = (begun + reached)[:, None] - 1
        kept = last - (last - ring) % window - (begun[:, None] - window)
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                k = torch.cat([_take(keys, before % window, 2).to(k.dtype), k], dim=2)
                v = torch.cat([_take(values, before % window, 2).to(v.dtype), v], dim=2)
                if keep:
                    keys[:, :, :window] = _take(k.detach(), kept, 2)
                    values[:, :, :window] = _take(v.detach(), kept, 2)
                return attend_within(q, k, v, before >= 0)

            x = block(x, by, attend)
        positions = self.head.position(normalised(x))
        positions = torch.cat([state.position[:, None].to(positions.dtype), positions], dim=1)
        if keep:
            state.position.copy_(_take(positions.detach(), reached[:, None])[:, 0])
            state.codes.copy_(joined[:, total:])
            state.time += total
        if not read:
            return x[:, :0]
        steps = place[:, None] + torch.arange(total, device=device)
        samples = torch.cat([vectors[:, k : k + total] for k in range(1, patch + 1)], dim=-1)
        position = _take(positions, steps // patch + (place == 0)[:, None])
        return self.head(position, samples, steps % patch, cond)

    def init_state(self, batch: int) -> TransformerState:
        config, weight = self.config, self.enter.weight
        shape = (batch, config.heads, config.window + 1, config.channels // config.heads)
        return TransformerState(
            time=torch.zeros(batch, dtype=torch.long, device=weight.device),
            codes=torch.full((batch, config.patch), self.start_code, device=weight.device),
            position=weight.new_zeros(batch, config.head_channels),
            keys=[weight.new_zeros(shape) for _ in range(config.layers)],
            values=[weight.new_zeros(shape) for _ in range(config.layers)],
        )

    def step(
        self, previous: Tensor, state: TransformerState, cond_t: Tensor | None = None
    ) -> Tensor:
        """See `AutoregressiveModel.step`.

        On the CPU the layers run where a row begins a patch. A captured graph cannot choose: there
        they run for every sample, and rows that begin none keep their state.
        """
        state.codes.copy_(torch.cat([state.codes[:, 1:], previous[:, None]], dim=1))
        samples = self.embedding(state.codes).flatten(1)
        place = state.time % self.config.patch
        begins = place == 0
        if samples.device.type != "cpu" or bool(begins.any()):
            self._begin(samples, begins, state, cond_t)
        state.time += 1
        return self.head(state.position, samples, place, cond_t)

    def _begin(
        self, samples: Tensor, begins: Tensor, state: TransformerState, cond_t: Tensor | None
    ) -> None:
        """Run the layers for the next position, of the rows that begin one."""
        window = self.config.window
        x = self.enter(samples)
        if self.enter_conditioning is not None:
            x = x + self.enter_conditioning(cond_t)
        number = state.time // self.config.patch
        by = rotation(number[:, None, None], self.turns, rotation_period(window), x)
        slot = torch.where(begins, number % window, window)[:, None, None, None]
        slot = slot.expand(-1, *state.keys[0].shape[1:])[:, :, :1]
        unseen = torch.arange(window, device=x.device) > number[:, None]
        mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, float("-inf"))
        mask = mask[:, None, None]
        x = x[:, None]
        for block, keys, values in zip(self.blocks, state.keys, state.values, strict=True):

            def attend(
                q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                keys.scatter_(2, slot, k)
                values.scatter_(2, slot, v)
                return F.scaled_dot_product_attention(
                    q, keys[:, :, :window], values[:, :, :window], attn_mask=mask
                )

            x = block(x, by, attend)
        position = self.head.position(normalised(x[:, 0]))
        state.position.copy_(torch.where(begins[:, None], position, state.position))

    def export_state(self, state: TransformerState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`.

        `time` (B,), `codes` (B, patch) and `position` (B, head channels) as in `TransformerState`;
        `keys.0`, `values.0`..., (B, window, channels) of each layer, one head after the other, the
        oldest position first; zero before the first position. The last one is position
        (time - 1) // patch; keys are rotated.
        """
        begun = -(-state.time[:, None] // self.config.patch)
        window = self.config.window
        order = (begun + torch.arange(window, device=begun.device)) % window
        tensors = {name: getattr(state, name).clone() for name in ("time", "codes", "position")}
        for name, ring in state.rings().items():
            tensors[name] = _take(ring, order, 2).transpose(1, 2).flatten(2)
        return tensors

    def import_state(self, tensors: dict[str, Tensor]) -> TransformerState:
        """See `AutoregressiveModel.import_state`.

        Raises
        ------
        WavearError
            If the times or the codes are out of range.
        """
        time, codes, window = tensors["time"], tensors["codes"], self.config.window
        low, high = int(codes.min()), int(codes.max())
        if int(time.min()) < 0 or not 0 <= low <= high < self.config.classes:
            raise WavearError("the state is damaged: its time or its codes are out of range")
        state = self.init_state(len(time))
        state.time.copy_(time)
        state.codes.copy_(codes)
        state.position.copy_(tensors["position"])
        # Slot s takes the last position that is s modulo the window.
        last = -(-state.time[:, None] // self.config.patch) - 1
        order = window - 1 - (last - torch.arange(window, device=last.device)) % window
        for name, ring in state.rings().items():
            past = tensors[name].to(ring).unflatten(2, (self.config.heads, -1)).transpose(1, 2)
            ring[:, :, :window] = _take(past, order, 2)
        return state


def _take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Copy each row's entries `index` (B, n) along `dim`, which the last axis follows."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    wide = list(x.shape)
    wide[dim] = index.shape[1]
    return x.gather(dim, index.reshape(shape).expand(wide))
