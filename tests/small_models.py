"""The small WaveNet of most tests, and its mels: 8 kHz, 10 bands, a frame per 40 samples."""

from __future__ import annotations

from typing import Any

import torch

from wavear import MelConfig, WaveNet, WaveNetConfig

RATE = 8000
MEL = MelConfig(
    sample_rate=RATE, n_fft=128, window_length=128, hop_length=40, bands=10, fmax=4000.0
)
SIZES = dict.fromkeys(
    ("residual_channels", "skip_channels", "head_channels", "conditioning_channels"), 4
)


def tiny(seed: int = 0, **settings: Any) -> WaveNet:
    """Return a WaveNet with random weights, of two layers unless `settings` state otherwise."""
    torch.manual_seed(seed)
    fields = {"layers": 2, "stacks": 1, "sample_rate": RATE, **SIZES, **settings}
    return WaveNet(WaveNetConfig(**fields)).eval()
