"""The conditioning of a predictive WaveNet: gate biases, prediction, and period, from a mel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.frames import FrameConditioning, interpolated, interpolation_weights
from wavear.models.period import PeriodNetwork
from wavear.models.prediction import Envelope, predictor
from wavear.models.predictive_config import PredictiveWaveNetConfig


class PredictiveConditioning(nn.Module):
    """Mel frames (B, M, F) and speakers (B,) -> `FrameConditioning`.

    Two convolutions over frames, the speaker's vector, and one matrix to the gate biases of all
    layers and the skip; the prediction and the period of the mel.
    """

    mel_mean: Tensor
    mel_deviation: Tensor
    gain: Tensor

    def __init__(self, config: PredictiveWaveNetConfig):
        super().__init__()
        mel: Any = config.mel
        self.config = config
        self.hop, self.bands = mel.hop_length, mel.bands
        channels = config.conditioning_channels
        # Mean and deviation of each band over the training data, for inputs near one.
        self.register_buffer("mel_mean", torch.zeros(mel.bands))
        self.register_buffer("mel_deviation", torch.ones(mel.bands))
        # Factor on the scale of the residual, fitted to the training data: its mean absolute value
        # is then 0.6.
        self.register_buffer("gain", torch.ones(1))
        self.first = nn.Conv1d(mel.bands, channels, 2 * config.conditioning_context + 1)
        self.second = nn.Conv1d(channels, channels, 3)
        self.projection = nn.Linear(channels, config.gates)
        self.speakers = nn.Embedding(config.speakers, channels) if config.speakers else None
        self.period = PeriodNetwork(
            mel.bands,
            config.shortest_period,
            config.longest_period,
            config.period_channels,
            config.causal,
        ).requires_grad_(False)  # trained on its own, before the rest
        self.envelope = Envelope(mel, config.prediction_order)
        self.hop_weights = interpolation_weights(mel.hop_length, config.causal)
        self.sub_weights = interpolation_weights(config.sub_frames, config.causal)

    @property
    def context(self) -> int:
        """Frames that the convolutions' output is shorter than their input."""
        return max(2 * self.config.conditioning_context + 2, self.period.context)

    @property
    def lookahead(self) -> int:
        """Frames after its own: half of the convolutions' context, and one to interpolate."""
        return 0 if self.config.causal else self.context // 2 + 1

    @property
    def lookback(self) -> int:
        """Frames before its own that a sample depends on."""
        return self.context + 1 if self.config.causal else self.lookahead

    def packed(self) -> Any:
        """Return what `forward` would pack at every call, or None where it is not compiled."""
        from wavear.models import frame_kernel  # not before it is needed: importing Numba is slow

        weight = self.projection.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        return frame_kernel.pack([self.first, self.second, self.projection], self.period)

    def forward(
        self,
        mel: Tensor | None,
        speaker: Tensor | None = None,
        padded: bool = False,
        packed: Any = None,
    ) -> FrameConditioning:
        """See `AutoregressiveModel.condition`; `packed` is from `packed`.

        Compiled for one utterance in float32 on the CPU without a gradient, as in generation.
        """
        assert mel is not None
        mel = mel if padded else F.pad(mel, (self.lookback, self.lookahead), "replicate")
        frames = mel.shape[2] - self.lookback - self.lookahead
        plain = mel.dtype == self.projection.weight.dtype == torch.float32
        compiled = plain and mel.device.type == "cpu" and len(mel) == 1
        if compiled and not torch.is_grad_enabled():
            found = self._compiled(mel, speaker, frames, packed or self.packed())
        else:
            found = self.in_torch(mel, speaker, frames)
        gates, coefficients, scale, lag, voicing = found
        return FrameConditioning(
            gates=gates.unfold(1, 3, 1),
            coefficients=coefficients,
            scale=scale,
            lag=lag.float(),
            voicing=voicing.float(),
            offset=torch.zeros(len(mel), dtype=torch.long, device=mel.device),
            samples=frames * self.hop,
            weights=self.hop_weights.to(mel.device),
        )

    def in_torch(self, mel: Tensor, speaker: Tensor | None, frames: int) -> tuple[Tensor, ...]:
        """Return gates (B, frames + 2, G), coefficients, scale, lag and voicing of a padded mel."""
        weights = self.hop_weights.to(mel.device)
        gates = self._around(self.gate_biases(self.normalised(mel), speaker), frames)
        with torch.no_grad():
            tracked = self.period.track(self.normalised(mel))
            log_lag, voicing = (self._around(x[:, :, None], frames)[:, :, 0] for x in tracked)
            r = self.envelope.autocorrelation(self._neighbours(mel))
            r = interpolated(r, self.sub_weights.to(mel.device))
            coefficients, scale = predictor(r, self.gain.double())
            lag = interpolated(log_lag, weights).exp()
            lag = lag.clamp(self.config.shortest_period, self.config.longest_period)
        return gates, coefficients, scale, lag, interpolated(voicing, weights)

    def _compiled(
        self, mel: Tensor, speaker: Tensor | None, frames: int, packed: Any
    ) -> tuple[Tensor, ...]:
        """Compute `in_torch` in compiled code."""
        from wavear.models import frame_kernel

        config = self.config
        voice = torch.zeros(config.conditioning_channels)
        if self.speakers is not None:
            assert speaker is not None
            voice = self.speakers.weight[int(speaker)].detach()
        before = 2 * config.conditioning_context + 2
        trims = tuple(
            self._surplus(mel.shape[2] - context, frames)
            for context in (before, self.period.context)
        )
        return frame_kernel.condition(
            torch.stack([self.envelope.logarithm(mel)[0], self.normalised(mel)[0]]),
            packed,
            voice,
            self.period,
            self.envelope,
            (*trims, 2 if config.causal else 1, self.lookback - 1),
            (self.hop_weights, self.sub_weights),
            float(self.gain),
            (config.shortest_period, config.longest_period),
            frames,
        )

    def normalised(self, mel: Tensor) -> Tensor:
        """Scale each band to mean 0 and deviation 1 over the training data."""
        return (mel - self.mel_mean[:, None]) / self.mel_deviation[:, None]

    def gate_biases(self, mel: Tensor, speaker: Tensor | None = None) -> Tensor:
        """Normalised mels (B, M, F) -> (B, F - 2 * conditioning_context - 2, G)."""
        h = F.relu(self.second(F.relu(self.first(mel))))
        if self.speakers is not None:
            assert speaker is not None
            h = h + self.speakers(speaker)[:, :, None]
        return self.projection(h.transpose(1, 2))

    def period_of(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mels (B, M, F) -> log-lag and voicing, (B, F) each; the ends are repeated."""
        before = self.period.context if self.config.causal else self.period.context // 2
        pad = (before, self.period.context - before)
        return self.period.track(self.normalised(F.pad(mel, pad, "replicate")))

    def _surplus(self, outputs: int, frames: int) -> int:
        """Return how many outputs for a padded mel lie before the frame before the first."""
        # Those of a causal model end with the last frame.
        return outputs - frames - 1 if self.config.causal else (outputs - frames - 2) // 2

    def _around(self, x: Tensor, frames: int) -> Tensor:
        """Cut (B, n, C) of a padded mel to its frames and one on each side: (B, frames + 2, C)."""
        x = x[:, self._surplus(x.shape[1], frames) :][:, : frames + 2]
        if self.config.causal:  # the frame after the last has the weight zero
            x = torch.cat([x, x[:, -1:]], dim=1)
        return x

    def _neighbours(self, mel: Tensor) -> Tensor:
        """Cut a padded mel to its frames and one on each side, (B, M, frames + 2)."""
        mel = mel[:, :, self.lookback - 1 :]
        if self.config.causal:
            return torch.cat([mel, mel[:, :, -1:]], dim=2)
        return mel[:, :, : mel.shape[2] - self.lookahead + 1]
