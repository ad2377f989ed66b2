"""GRU (the WaveRNN line: Kalchbrenner et al., 2018, https://arxiv.org/abs/1802.08435): a recurrent network over codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.mel import MelConfig
from wavear.models.base import AutoregressiveModel
from wavear.models.conditioning import Conditioning

_PREFILL = 4096  # samples that `GRU.prefill` computes at once: its memory does not grow with the past given


@dataclass(frozen=True)
class GRUConfig:
    """What a GRU is made of; saved with its weights."""

    layers: int = 1
    """Recurrent layers, one on the other."""
    channels: int = 352
    """Hidden units of each layer."""
    classes: int = 256
    sample_rate: int = 22050
    """Of the audio, in Hz."""
    mel: MelConfig | None = None
    """The mels the model is conditioned on; None: unconditional."""
    speakers: int = 0
    """Speakers the model is conditioned on; 0: none."""
    input_channels: int = 128
    """Channels of the sample before and of the conditioning, where they are added: the input of the first layer."""
    head_channels: int = 256
    """Units between the two layers of the head."""
    conditioning_channels: int = 80
    """Channels of the conditioning, one vector per sample."""
    conditioning_context: int = 2
    """Mel frames that the first convolution of the conditioning sees before and after each frame."""

    def __post_init__(self):
        for name in ("layers", "channels", "input_channels", "head_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, it must be a whole number of at least 1")


@dataclass
class GRUState:
    """The hidden units of each layer after the samples so far."""

    h: Tensor
    """(B, layers, H)."""


class GRU(AutoregressiveModel):
    """Recurrent autoregressive model: an embedding, GRU layers (Cho et al., 2014), a head of two layers."""

    config: GRUConfig

    def __init__(self, config: GRUConfig):
        super().__init__()
        self.config = config
        self.input = nn.Embedding(config.classes, config.input_channels)
        self.gru = nn.GRU(config.input_channels, config.channels, config.layers, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(config.channels, config.head_channels),
            nn.ReLU(),
            nn.Linear(config.head_channels, config.classes),
        )
        self.condition_input = None
        self.conditioning = None
        if self.conditioned:
            self.condition_input = nn.Linear(config.conditioning_channels, config.input_channels, bias=False)
            self.conditioning = Conditioning(
                config.mel.bands if config.mel else 0,
                config.conditioning_channels,
                config.mel.hop_length if config.mel else 1,
                config.conditioning_context,
                config.speakers,
            )
        self.initialise()

    def initialise(self):
        levels = torch.arange(self.config.classes) / (self.config.classes - 1) * 2 - 1
        frequency = torch.rand(self.config.input_channels) * 8
        phase = torch.rand(self.config.input_channels) * 2 * torch.pi
        with torch.no_grad():
            self.input.weight.copy_(torch.cos(levels[:, None] * frequency * torch.pi / 2 + phase))

    @property
    def receptive_field(self) -> None:
        """Unbounded: the hidden units carry what they keep for as long as they keep it."""
        return None

    @property
    def lookahead(self) -> int:
        return self.conditioning.lookahead if self.conditioning is not None else 0

    def condition(self, mel, speaker=None, *, padded=False):
        if self.conditioning is None:
            raise ValueError("the model is unconditional: it takes neither a mel nor a speaker")
        return self.conditioning(mel, speaker, padded)

    def forward(self, codes, cond=None, state=None, previous=None):
        """See `AutoregressiveModel.forward`."""
        if state is None:
            hidden, _ = self.gru(self._inputs(self.shift(codes), cond))
        else:
            assert previous is not None
            given = torch.cat([previous[:, None], codes[:, :-1]], dim=1)
            hidden = self._advance(given, state, cond)
        return self.head(hidden).transpose(1, 2)

    def _inputs(self, previous: Tensor, cond: Tensor | None) -> Tensor:
        """Inputs of the first layer (B, T, R), of the code before each sample (B, T) and cond (B, C, T or 1)."""
        x = self.input(previous)
        if self.condition_input is not None:
            assert cond is not None
            x = x + self.condition_input(cond.transpose(1, 2))
        return x

    def _advance(self, previous: Tensor, state: GRUState, cond: Tensor | None) -> Tensor:
        """Hidden units (B, T, H) of the last layer, going on from the state, which is moved past `previous` (B, T)."""
        x = self._inputs(previous, cond)
        # A copy: what autograd keeps of it must not change when the state goes on.
        begin = state.h.detach().to(x.dtype).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        hidden, last = self.gru(x, begin)
        state.h.copy_(last.detach().transpose(0, 1))
        return hidden

    def init_state(self, batch: int) -> GRUState:
        """See `AutoregressiveModel.init_state`."""
        weight = self.gru.weight_hh_l0
        return GRUState(weight.new_zeros(batch, self.config.layers, self.config.channels))

    def step(self, previous: Tensor, state: GRUState, cond_t: Tensor | None = None) -> Tensor:
        """See `AutoregressiveModel.step`: the equations of the cell written out, from the weights of `forward`."""
        x = self._inputs(previous[:, None], None if cond_t is None else cond_t[:, :, None])[:, 0]
        for layer in range(self.config.layers):
            w_x, w_h, b_x, b_h = (
                getattr(self.gru, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = state.h[:, layer]
            r_x, u_x, n_x = F.linear(x, w_x, b_x).chunk(3, dim=-1)
            r_h, u_h, n_h = F.linear(h, w_h, b_h).chunk(3, dim=-1)
            reset, update = torch.sigmoid(r_x + r_h), torch.sigmoid(u_x + u_h)
            candidate = torch.tanh(n_x + reset * n_h)
            x = (1 - update) * candidate + update * h
            state.h[:, layer] = x.detach()
        return self.head(x)

    def prefill(self, previous: Tensor, state: GRUState, cond: Tensor | None = None) -> None:
        """See `AutoregressiveModel.prefill`: the layers of `forward`, begun with the state."""
        for start in range(0, previous.shape[1], _PREFILL):
            part = slice(start, start + _PREFILL)
            self._advance(previous[:, part], state, cond if cond is None or cond.shape[2] == 1 else cond[:, :, part])

    def export_state(self, state: GRUState) -> dict[str, Tensor]:
        """See `AutoregressiveModel.export_state`: `h`, (B, layers, H)."""
        return {"h": state.h.clone()}

    def import_state(self, tensors: dict[str, Tensor]) -> GRUState:
        """See `AutoregressiveModel.import_state`."""
        state = self.init_state(tensors["h"].shape[0])
        state.h.copy_(tensors["h"])
        return state
