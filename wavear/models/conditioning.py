"""Conditioning: mel frames and a speaker -> one vector per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wavear.models.config import CommonConfig


def upsampling_scales(hop: int) -> tuple[int, ...]:
    """Return factors of `hop` whose product is `hop`, each near 16 where the divisors allow it.

    Stages near 16 keep the learned kernels short: one stage would need `hop` kernels of its own.

    Examples
    --------
    >>> upsampling_scales(256), upsampling_scales(300), upsampling_scales(257), upsampling_scales(1)
    ((16, 16), (15, 20), (257,), ())
    """
    if hop == 1:
        return ()
    stages = max(1, round(math.log(hop, 16)))
    divisors = [d for d in range(2, hop) if hop % d == 0]
    if stages == 1 or not divisors:
        return (hop,)
    first = min(divisors, key=lambda d: abs(d - hop ** (1 / stages)))
    return (first, *upsampling_scales(hop // first))


class Interpolation(nn.Module):
    """`scale` samples for each input sample, each a learned mix of the input's three neighbours.

    out[c, f * scale + p] = sum over j in (-1, 0, 1) of weight[c, j + 1, p] * x[c, f + j]

    It is a transposed convolution of kernel 3 * scale and stride `scale`, one kernel per channel,
    written by phase. It starts as linear interpolation between the centres of the input samples.
    Sums are taken in this order, element by element, so the result does not depend on the length of
    the input.
    """

    def __init__(self, channels: int, scale: int):
        super().__init__()
        # Position of phase p, in input samples from the centre.
        centre = (torch.arange(scale) + 0.5) / scale - 0.5
        weight = torch.stack([(-centre).clamp(min=0), 1 - centre.abs(), centre.clamp(min=0)])
        self.weight = nn.Parameter(weight.repeat(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n + 2) -> (B, C, n * scale): the outer input samples serve as context only."""
        w = self.weight[:, :, None]
        x = x[..., None]
        mixed = x[:, :, :-2] * w[:, 0] + x[:, :, 1:-1] * w[:, 1] + x[:, :, 2:] * w[:, 2]
        return mixed.flatten(2)


class Conditioning(nn.Module):
    """Mel frames (B, M, F) and speakers (B,) -> (B, C, F * hop); without a mel (B, C, 1).

    A convolution over 2 * context + 1 frames mixes the bands, then `Interpolation` stages (of
    `scales`, by default `upsampling_scales`) raise the rate to one vector per sample, then the
    speaker's vector is added. `slope` is that of the leaky ReLU after the convolution. Frames
    beyond the ends repeat the first and the last frame.

    The samples of frame f depend on the frames f - lookahead .. f + lookahead, and on no others.
    """

    mel_mean: Tensor
    mel_deviation: Tensor

    def __init__(
        self,
        bands: int,
        channels: int,
        hop: int,
        context: int,
        speakers: int,
        slope: float,
        scales: tuple[int, ...] = (),
    ):
        super().__init__()
        self.hop, self.bands, self.context, self.slope = hop, bands, context, slope
        self.scales = (scales or upsampling_scales(hop)) if bands else ()
        if bands:
            # Mean and deviation of each band over the training data, for inputs near one.
            self.register_buffer("mel_mean", torch.zeros(bands))
            self.register_buffer("mel_deviation", torch.ones(bands))
            self.frames = nn.Conv1d(bands, channels, 2 * context + 1)
        self.stages = nn.ModuleList(Interpolation(channels, scale) for scale in self.scales)
        self.speakers = nn.Embedding(speakers, channels) if speakers else None

    @property
    def lookahead(self) -> int:
        """Frames after its own that a sample depends on: the convolution's and one per stage."""
        return self.context + len(self.scales) if self.bands else 0

    @property
    def lookback(self) -> int:
        """Frames before its own that a sample depends on."""
        return self.lookahead

    def forward(
        self, mel: Tensor | None, speaker: Tensor | None = None, padded: bool = False
    ) -> Tensor:
        parts = []
        if mel is not None:
            pad = (self.lookback, self.lookahead)
            parts.append(self.upsample(mel if padded else F.pad(mel, pad, "replicate")))
        if speaker is not None:
            assert self.speakers is not None
            parts.append(self.speakers(speaker)[:, :, None])
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def upsample(self, mel: Tensor) -> Tensor:
        """(B, M, F + 2 * lookahead) -> (B, C, F * hop)."""
        x = (mel - self.mel_mean[:, None]) / self.mel_deviation[:, None]
        x = F.leaky_relu(self.frames(x), self.slope)
        # Before a stage, x has one sample of context per remaining stage, at its own rate.
        for done, (stage, scale) in enumerate(zip(self.stages, self.scales, strict=True), 1):
            surplus = (len(self.scales) - done) * (scale - 1)
            x = stage(x)
            x = x[:, :, surplus : x.shape[2] - surplus]
        return x


def make_conditioning(config: CommonConfig) -> Conditioning | None:
    """Return the conditioning for a configuration's mel and speakers; None without both."""
    if not config.conditioned:
        return None
    bands, hop = (config.mel.bands, config.mel.hop_length) if config.mel else (0, 1)
    return Conditioning(
        bands,
        config.conditioning_channels,
        hop,
        config.conditioning_context,
        config.speakers,
        config.conditioning_slope,
        config.conditioning_scales,
    )


def conditioning_matrix(config: CommonConfig, outputs: int) -> nn.Linear | None:
    """Return a matrix from the conditioning to `outputs` channels; None without conditioning."""
    if not config.conditioned:
        return None
    return nn.Linear(config.conditioning_channels, outputs, bias=False)
