"""GRU: a recurrent network over codes, the WaveRNN line.

Kalchbrenner et al., 2018, https://arxiv.org/abs/1802.08435.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.base import AutoregressiveModel, matrix_entries
from wavear.models.conditioning import conditioning_matrix, make_conditioning
from wavear.models.config import CommonConfig, check_whole
from wavear.models.distributions import Law
from wavear.models.inputs import ValueEmbedding, initialise_output, make_input


@dataclass(frozen=True)
class GRUConfig(CommonConfig):
    """Configuration of a GRU; saved with its weights."""

    layers: int = 1
    """Recurrent layers, one on the other."""
    channels: int = 352
    """Hidden units of each layer."""
    input_channels: int = 128
    """Channels in which the previous sample and the conditioning are added, before the first
    layer."""
    head_channels: int = 256
    """Units between the two layers of the head."""

    def __post_init__(self):
        check_whole(self, layers=1, channels=1, input_channels=1, head_channels=1)
        super().__post_init__()


class Head(nn.Module):
    """Hidden units (..., H) and the conditioning (..., C) -> parameters (..., P)."""

    def __init__(self, config: GRUConfig, law: Law):
        super().__init__()
        self.first = nn.Linear(config.channels, config.head_channels)
        self.conditioning = conditioning_matrix(config, config.head_channels)
        self.last = initialise_output(nn.Linear(config.head_channels, law.channels), law)

    def forward(self, h: Tensor, cond: Tensor | None) -> Tensor:
        """h (..., H), cond (..., C) -> (..., P)."""
        x = self.first(h)
        if self.conditioning is not None:
            x = x + self.conditioning(cond)
        return self.last(F.relu(x))


@dataclass
class GRUState:
    """The hidden units of each layer."""

    h: Tensor
    """(B, layers, H)."""


class GRU(AutoregressiveModel):
    """Recurrent model: an input layer, GRU layers (Cho et al., 2014), a head of two layers.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)            hidden units that the candidate sees
        u = sigmoid(W_iu x + b_iu + W_hu h + b_hu)            hidden units that stay
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))         the candidate
        h = (1 - u) * n + u * h

    `forward` uses torch's own GRU (cuDNN on a GPU), `step` writes it out, with the same weights.

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
        self.condition_input = conditioning_matrix(config, config.input_channels)
        self.gru = nn.GRU(config.input_channels, config.channels, config.layers, batch_first=True)
        self.head = Head(config, self.law)

    @property
    def multiply_adds(self) -> int:
        """See `AutoregressiveModel.multiply_adds`. (The input of a code is a look-up.)"""
        recurrent = sum(weight.numel() for weight in self.gru.parameters() if weight.dim() == 2)
        line = [self.input] if isinstance(self.input, ValueEmbedding) else []
        condition = [] if self.condition_input is None else [self.condition_input]
        return recurrent + matrix_entries(*line, *condition, self.head)

    def forward(
        self,
        codes: Tensor,
        cond: Tensor | None = None,
        state: GRUState | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        shifted = self.shift(codes, previous)
        if state is None:
            x = self._inputs(shifted, cond)
            begin = x.new_zeros(self.config.layers, len(codes), self.config.channels)
            hidden, _ = self._layers(x, begin)
        else:
            hidden = self.advance(shifted, state, cond)
        return self.head(hidden, None if cond is None else cond.transpose(1, 2)).transpose(1, 2)

    def _inputs(self, previous: Tensor, cond: Tensor | None) -> Tensor:
        """Previous codes (B, T), cond (B, C, T or 1) -> input of the first layer (B, T, R)."""
        x = self.input(previous)
        if self.condition_input is not None:
            assert cond is not None
            x = x + self.condition_input(cond.transpose(1, 2))
        return x

    def _weights(self, layer: int) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self.gru, f"{name}_l{layer}") for name in names]

    def _layers(self, x: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's units (B, T, H), and all layers' last ones (layers, B, H).

        Calls the function under `torch.nn.GRU`: the module rearranges its weights in place, also
        those that `torch.func.functional_call` substitutes in bfloat16 training.
        """
        weights = [weight for layer in range(self.config.layers) for weight in self._weights(layer)]
        with warnings.catch_warnings():
            # cuDNN copies weights that are not contiguous in one chunk, as rounded ones are not.
            warnings.filterwarnings(
                "ignore", message="RNN module weights are not part of single contiguous chunk"
            )
            return torch.gru(
                x, begin, weights, True, self.config.layers, 0.0, self.training, False, True
            )

    def advance(self, previous: Tensor, state: GRUState, cond: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.advance`; return the last layer's hidden units (B, T, H)."""
        x = self._inputs(previous, cond)
        # A copy, even of one stream, for which the transpose would be a view: autograd keeps it
        # while the state advances.
        begin = state.h.detach().to(x.dtype).transpose(0, 1)
        hidden, last = self._layers(x, begin.clone(memory_format=torch.contiguous_format))
        state.h.copy_(last.detach().transpose(0, 1))
        return hidden

    def init_state(self, batch: int) -> GRUState:
        weight = self.head.first.weight
        return GRUState(weight.new_zeros(batch, self.config.layers, self.config.channels))

    def step(self, previous: Tensor, state: GRUState, cond_t: Tensor | None = None) -> Tensor:
        x = self._inputs(previous[:, None], None if cond_t is None else cond_t[:, :, None])[:, 0]
        for layer in range(self.config.layers):
            w_x, w_h, b_x, b_h = self._weights(layer)
            h = state.h[:, layer]
            r_x, u_x, n_x = F.linear(x, w_x, b_x).chunk(3, dim=-1)
            r_h, u_h, n_h = F.linear(h, w_h, b_h).chunk(3, dim=-1)
            r, u = torch.sigmoid(r_x + r_h), torch.sigmoid(u_x + u_h)
            x = (1 - u) * torch.tanh(n_x + r * n_h) + u * h
            h.copy_(x.detach())
        return self.head(x, cond_t)

    def export_state(self, state: GRUState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `h`, the hidden units (B, layers, H)."""
        return {"h": state.h.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> GRUState:
        state = self.init_state(len(tensors["h"]))
        state.h.copy_(tensors["h"])
        return state
