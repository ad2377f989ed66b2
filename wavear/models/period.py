"""The period of the voice from a mel: a small network at the frame rate.

It is trained before the network of the samples, which then sees the same lags in training and in
generation (not lags measured in the recordings).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 128
"""Lags, evenly spaced in their logarithm."""
NEIGHBOURS = 3  # classes on each side of the likeliest one that the lag is the mean of
_LAYERS = 3
_TARGET_WIDTH = 0.012  # of the log-lag: 20 cents


class PeriodNetwork(nn.Module):
    """Mel frames -> logits of `CLASSES` lags, and of voicing.

    Letters: B batch, M bands, F frames.

    Parameters
    ----------
    bands : int
    shortest, longest : int
        The range of the lags, in samples.
    width : int
        Channels.
    causal : bool
        See only the frames before each frame.
    """

    grid: Tensor

    def __init__(
        self, bands: int, shortest: int, longest: int, width: int = 64, causal: bool = False
    ):
        super().__init__()
        self.causal = causal
        self.convolutions = nn.ModuleList(
            nn.Conv1d(bands if i == 0 else width, width, 3) for i in range(_LAYERS)
        )
        self.lag = nn.Conv1d(width, CLASSES, 1)
        self.voicing = nn.Conv1d(width, 1, 1)
        self.register_buffer("grid", torch.linspace(math.log(shortest), math.log(longest), CLASSES))

    @property
    def context(self) -> int:
        """Frames that the output is shorter than the input: half on each side, or all before."""
        return 2 * _LAYERS

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised mels (B, M, F + context) -> logits of lags (B, CLASSES, F), voicing (B, F)."""
        h = F.relu(self.convolutions[0](mel))
        for convolution in list(self.convolutions)[1:]:
            h = (h[:, :, 2:] if self.causal else h[:, :, 1:-1]) + F.relu(convolution(h))
        return self.lag(h), self.voicing(h)[:, 0]

    def track(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised mels (B, M, F + context) -> log-lag in samples, and voicing, (B, F) each.

        The lag is the mean over the classes next to the likeliest one, weighted by their
        probabilities.
        """
        logits, voicing = self(mel)
        probability = logits.softmax(1)
        offsets = torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, device=mel.device)[:, None]
        near = (probability.argmax(1, keepdim=True) + offsets).clamp(0, CLASSES - 1)
        weight = probability.gather(1, near)
        return (weight * self.grid.to(weight.dtype)[near]).sum(1) / weight.sum(1), voicing.sigmoid()


def period_loss(
    logits: Tensor, voicing: Tensor, log_lag: Tensor, correlation: Tensor, grid: Tensor
) -> Tensor:
    """Return the cross-entropy of the lag, weighted by the voicing, plus the voicing's error.

    The target is a Gaussian about the measured lag.

    Parameters
    ----------
    logits, voicing : Tensor, shape (B, CLASSES, F) and (B, F)
    log_lag, correlation : Tensor, shape (B, F)
        Measured (`wavear.audio.periods`): the logarithm of the lag, and the correlation at it.
    grid : Tensor, shape (CLASSES,)
        The logarithms of the lags.
    """
    target = torch.exp(-0.5 * ((grid[:, None] - log_lag[:, None]) / _TARGET_WIDTH) ** 2)
    target = target / target.sum(1, keepdim=True).clamp(min=1e-8)
    weight = ((correlation - 0.5) / 0.3).clamp(0, 1)
    cross = -(target * F.log_softmax(logits, 1)).sum(1)
    return (cross * weight).mean() + 5 * (voicing.sigmoid() - correlation).square().mean()
