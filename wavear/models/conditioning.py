"""Conditioning: mel frames and a speaker -> one vector per sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def upsampling_scales(hop: int) -> tuple[int, ...]:
    """Factors of `hop`, each near 16 where the divisors allow it, whose product is `hop`.

    Stages near 16 keep the learned kernels short: `hop` phases in one stage would need `hop`
    kernels of their own.

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
    """`scale` samples for each input sample, each a learned mix of the input's neighbours before, at and after it.

    out[c, f * scale + p] = sum over j in (-1, 0, 1) of weight[c, j + 1, p] * x[c, f + j]

    It is a transposed convolution of kernel 3 * scale and stride `scale`, one kernel per channel,
    written by phase. It starts as linear interpolation between the centres of the input samples.
    Sums are taken in this order, element by element, so the result does not depend on the length of
    the input.
    """

    def __init__(self, channels: int, scale: int):
        super().__init__()
        centre = (
            torch.arange(scale) + 0.5
        ) / scale - 0.5  # where phase p lies, in input samples from the centre
        weight = torch.stack([(-centre).clamp(min=0), 1 - centre.abs(), centre.clamp(min=0)])
        self.weight = nn.Parameter(weight.repeat(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n + 2) -> (B, C, n * scale): the first and last input samples serve as context only."""
        w = self.weight[:, :, None]
        x = x[..., None]
        mixed = x[:, :, :-2] * w[:, 0] + x[:, :, 1:-1] * w[:, 1] + x[:, :, 2:] * w[:, 2]
        return mixed.flatten(2)


class Conditioning(nn.Module):
    """Mel frames (B, M, F) and speakers (B,) -> conditioning (B, C, F * hop), or (B, C, 1) of a speaker alone.

    A convolution over 2 * context + 1 frames mixes the bands, then `Interpolation` stages raise the
    rate to one vector per sample, then the speaker's vector is added. Frames beyond the ends repeat
    the first and the last frame.

    The samples of frame f depend on the frames f - lookahead .. f + lookahead, and on no others.
    """

    mel_mean: Tensor
    mel_deviation: Tensor

    def __init__(self, bands: int, channels: int, hop: int, context: int, speakers: int):
        super().__init__()
        self.hop = hop
        self.bands = bands
        self.context = context
        self.scales = upsampling_scales(hop) if bands else ()
        if bands:
            # Mean and deviation of each band over the training data: the network sees numbers near
            # one.
            self.register_buffer("mel_mean", torch.zeros(bands))
            self.register_buffer("mel_deviation", torch.ones(bands))
            self.frames = nn.Conv1d(bands, channels, 2 * context + 1)
        self.stages = nn.ModuleList(Interpolation(channels, scale) for scale in self.scales)
        self.speakers = nn.Embedding(speakers, channels) if speakers else None

    @property
    def lookahead(self) -> int:
        """Frames after its own that a sample depends on (and before): the convolution's and one per stage."""
        return self.context + len(self.scales) if self.bands else 0

    def forward(
        self, mel: Tensor | None, speaker: Tensor | None = None, padded: bool = False
    ) -> Tensor:
        """See `AutoregressiveModel.condition`."""
        parts = []
        if mel is not None:
            parts.append(
                self.upsample(
                    mel if padded else F.pad(mel, (self.lookahead, self.lookahead), "replicate")
                )
            )
        if speaker is not None:
            assert self.speakers is not None
            parts.append(self.speakers(speaker)[:, :, None])
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def upsample(self, mel: Tensor) -> Tensor:
        """(B, M, F + 2 * lookahead) -> (B, C, F * hop)."""
        x = (mel - self.mel_mean[:, None]) / self.mel_deviation[:, None]
        x = F.leaky_relu(self.frames(x), 0.2)
        # Before a stage x carries one sample of context per stage to come, on either side and at
        # its own rate.
        for rest, (stage, scale) in enumerate(
            zip(self.stages, self.scales, strict=True), 1 - len(self.scales)
        ):
            surplus = -rest * (scale - 1)
            x = stage(x)
            x = x[:, :, surplus : x.shape[2] - surplus]
        return x


def make_conditioning(config: Any) -> Conditioning | None:
    """The conditioning that a model's configuration asks for: of its `mel` and its `speakers`; None without both."""
    if config.mel is None and config.speakers == 0:
        return None
    bands, hop = (config.mel.bands, config.mel.hop_length) if config.mel else (0, 1)
    return Conditioning(
        bands, config.conditioning_channels, hop, config.conditioning_context, config.speakers
    )
