"""GRU: a recurrent network over codes, the WaveRNN line (Kalchbrenner et al., 2018, https://arxiv.org/abs/1802.08435)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.base import AutoregressiveModel, CommonConfig, check_whole, in_parts
from wavear.models.conditioning import make_conditioning
from wavear.models.inputs import ValueEmbedding, make_input


@dataclass(frozen=True)
class GRUConfig(CommonConfig):
    """What a GRU is made of; saved with its weights."""

    layers: int = 1
    """Recurrent layers, one on the other."""
    channels: int = 352
    """Hidden units of each layer."""
    input_channels: int = 128
    """Channels in which the sample before and the conditioning are added, before the first layer."""
    head_channels: int = 256
    """Units between the two layers of the head."""

    def __post_init__(self):
        check_whole(self, layers=1, channels=1, input_channels=1, head_channels=1)
        super().__post_init__()


class Head(nn.Module):
    """Hidden units (..., H), and the conditioning (..., C) -> parameters of the law (..., P)."""

    def __init__(self, config: GRUConfig, outputs: int, bias: Tensor | None):
        super().__init__()
        conditioned = config.conditioned
        self.first = nn.Linear(config.channels, config.head_channels)
        self.conditioning = (
            nn.Linear(config.conditioning_channels, config.head_channels, False)
            if conditioned
            else None
        )
        self.last = nn.Linear(config.head_channels, outputs)
        if bias is not None:
            with torch.no_grad():
                self.last.bias.copy_(bias)

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        """h (..., H), cond (..., C) -> (..., P)."""
        x = self.first(h)
        if self.conditioning is not None:
            x = x + self.conditioning(cond)
        return self.last(F.relu(x))


@dataclass
class GRUState:
    """What each layer has kept of the samples so far."""

    h: Tensor
    """Hidden units, (B, layers, H)."""


class GRU(AutoregressiveModel):
    """Recurrent model: the sample before and the conditioning, GRU layers (Cho et al., 2014), a head of two layers.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)            which of the hidden units the candidate sees
        u = sigmoid(W_iu x + b_iu + W_hu h + b_hu)            which of them stay
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))         the candidate
        h = (1 - u) * n + u * h

    `forward` leaves them to `torch.nn.GRU` (cuDNN on a GPU), `step` writes them out, from the same
    weights.

    Parameters
    ----------
    config : GRUConfig

    Examples
    --------
    >>> model = GRU(GRUConfig(channels=8, input_channels=4, head_channels=8))
    >>> model(torch.zeros(1, 100, dtype=torch.long)).shape
    torch.Size([1, 256, 100])
    """

    family = "gru"

    config: GRUConfig
    input: Any  # CodeEmbedding or ValueEmbedding

    def __init__(self, config: GRUConfig):
        super().__init__()
        self.config = config
        self.input = make_input(self.law, config.input_channels, config.coarse_classes)
        self.conditioning = make_conditioning(config)
        self.condition_input = (
            nn.Linear(config.conditioning_channels, config.input_channels, bias=False)
            if self.conditioned
            else None
        )
        self.gru = nn.GRU(config.input_channels, config.channels, config.layers, batch_first=True)
        self.head = Head(config, self.law.channels, self.law.initial_bias())

    @property
    def receptive_field(self) -> None:
        """None: the hidden units keep what they keep for as long as the gates let them."""
        return None

    @property
    def multiply_adds(self) -> int:
        """Per generated sample, as the definition has it: the input and all matrices of the layers and the head."""
        c = self.config
        line = c.input_channels if isinstance(self.input, ValueEmbedding) else 0
        condition = (
            c.conditioning_channels * (c.input_channels + c.head_channels)
            if self.conditioned
            else 0
        )
        layers = 3 * c.channels * (c.input_channels + c.channels + (c.layers - 1) * 2 * c.channels)
        return line + condition + layers + c.head_channels * (c.channels + self.law.channels)

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: GRUState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """See `AutoregressiveModel.forward`."""
        if state is None:
            x = self._inputs(self.shift(codes), cond)
            hidden, _ = self._layers(
                x, x.new_zeros(self.config.layers, len(codes), self.config.channels)
            )
        else:
            hidden = self._advance(self.shift(codes, previous), state, cond)
        return self.head(hidden, None if cond is None else cond.transpose(1, 2)).transpose(1, 2)

    def _inputs(self, previous: Tensor, cond: Tensor | None) -> Tensor:
        """What the first layer sees (B, T, R): of the code before each sample (B, T), and cond (B, C, T or 1)."""
        x = self.input(previous)
        if self.condition_input is not None:
            assert cond is not None
            x = x + self.condition_input(cond.transpose(1, 2))
        return x

    def _layers(self, x: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units of the last layer (B, T, H), of all layers after the last sample (layers, B, H).

        What `torch.nn.GRU` does, but for its care of the weights: those that
        `torch.func.functional_call` puts in for a call, as training in bfloat16 does, it would lay
        out anew in place each time.
        """
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [
            getattr(self.gru, f"{name}_l{layer}")
            for layer in range(self.config.layers)
            for name in names
        ]
        with warnings.catch_warnings():
            # cuDNN gathers weights that do not lie side by side, as rounded ones do not: a copy of
            # them per call.
            warnings.filterwarnings(
                "ignore", message="RNN module weights are not part of single contiguous chunk"
            )
            return torch.gru(
                x, begin, weights, True, self.config.layers, 0.0, self.training, False, True
            )

    def _advance(self, previous: Tensor, state: GRUState, cond: Tensor | None) -> Tensor:
        """Hidden units (B, T, H) of the last layer, going on from the state, which moves past `previous` (B, T)."""
        x = self._inputs(previous, cond)
        # A copy, even of one stream, for which the transpose would be a view: autograd keeps it,
        # and the state goes on.
        begin = (
            state.h.detach()
            .to(x.dtype)
            .transpose(0, 1)
            .clone(memory_format=torch.contiguous_format)
        )
        hidden, last = self._layers(x, begin)
        state.h.copy_(last.detach().transpose(0, 1))
        return hidden

    def init_state(self, batch: int) -> GRUState:
        """See `AutoregressiveModel.init_state`."""
        weight = self.head.first.weight
        return GRUState(weight.new_zeros(batch, self.config.layers, self.config.channels))

    def step(self, previous: Tensor, state: GRUState, cond_t: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.step`."""
        x = self._inputs(previous[:, None], None if cond_t is None else cond_t[:, :, None])[:, 0]
        for layer in range(self.config.layers):
            w_x, w_h, b_x, b_h = (
                getattr(self.gru, f"{name}_l{layer}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = state.h[:, layer]
            r_x, u_x, n_x = F.linear(x, w_x, b_x).chunk(3, dim=-1)
            r_h, u_h, n_h = F.linear(h, w_h, b_h).chunk(3, dim=-1)
            r, u = torch.sigmoid(r_x + r_h), torch.sigmoid(u_x + u_h)
            x = (1 - u) * torch.tanh(n_x + r * n_h) + u * h
            h.copy_(x.detach())
        return self.head(x, cond_t)

    def prefill(self, previous: Tensor, state: GRUState, cond: Tensor | None = None) -> None:
        """See `AutoregressiveModel.prefill`: the layers of `forward`, begun with the state."""
        for part, given in in_parts(previous, cond):
            self._advance(part, state, given)

    def export_state(self, state: GRUState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `h`, hidden units of each layer (B, layers, H)."""
        return {"h": state.h.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> GRUState:
        """See `AutoregressiveModel.import_state`."""
        state = self.init_state(tensors["h"].shape[0])
        state.h.copy_(tensors["h"])
        return state
