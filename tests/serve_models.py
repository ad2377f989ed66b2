"""The small models that the tests of `wavear serve` play."""

from __future__ import annotations

import torch

from wavear import MelConfig, WaveNet, WaveNetConfig


def small_wavenet(rate: int, mel: MelConfig | None = None, seed: int = 1) -> WaveNet:
    """Return a random model whose output varies, for comparisons that can fail."""
    torch.manual_seed(seed)
    width = dict.fromkeys(("residual_channels", "skip_channels", "head_channels"), 8)
    model = WaveNet(WaveNetConfig(layers=4, stacks=2, **width, sample_rate=rate, mel=mel))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()
