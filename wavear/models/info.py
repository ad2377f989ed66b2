"""Describe a checkpoint: its size, cost per sample, configuration and training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from wavear.common.words import counted
from wavear.mel.spectrogram import MelConfig
from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.conditioning import Interpolation


def multiply_adds(model: AutoregressiveModel) -> tuple[int, float]:
    """Count multiplications and additions per sample, a pair counted once.

    Returns
    -------
    int
        Of the network that runs sample by sample: each weight of each matrix once. (The embedding
        is a look-up.)
    float
        Of the conditioning, which runs once per utterance, spread over its samples: the convolution
        over frames is paid once per hop, a stage of the upsampling has 3 products per channel of
        each of its outputs.

    Examples
    --------
    >>> from wavear import WaveNet, WaveNetConfig
    >>> multiply_adds(WaveNet(WaveNetConfig(layers=20, residual_channels=64, skip_channels=128)))[0]
    667648
    """
    conditioning = getattr(model, "conditioning", None)
    if conditioning is None:
        return model.multiply_adds, 0.0
    rate = 1 / conditioning.hop
    modules = list(conditioning.modules())
    cost = rate * sum(m.weight.numel() for m in modules if isinstance(m, nn.Conv1d))
    for stage in (module for module in modules if isinstance(module, Interpolation)):
        channels, _, scale = stage.weight.shape
        rate *= scale
        cost += 3 * channels * rate
    return model.multiply_adds, cost


def describe(source: str | Path) -> list[tuple[str, str]]:
    """Return labels and values that describe a checkpoint, ready to print.

    Parameters
    ----------
    source : str or Path
        As for `wavear.load`. The weights are loaded, so a damaged one is refused.

    Raises
    ------
    FileNotFoundError, CheckpointError
        As `wavear.load`.
    """
    model = checkpoint.load(source)
    described = checkpoint.read_config(source)
    config = model.config
    network, conditioning = multiply_adds(model)
    cost = f"{network:,}" + (f" + {conditioning:,.0f} of the conditioning" if conditioning else "")
    billions = network * config.sample_rate / 1e9
    rows = {
        "model": f"{described['family']}, checkpoint format {described['format']}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "multiply-adds per sample": cost,
        "at its sample rate": f"{billions:.2f} G multiply-adds per second of audio",
        "receptive field": model.span,
    }
    rows |= {name: _value(value) for name, value in described["config"].items() if name != "mel"}
    if config.mel is None:
        rows["mel"] = "none: unconditional"
    else:
        hop, step = config.mel.hop_length, 1000 * config.mel.hop_length / config.sample_rate
        mels = isinstance(config.mel, MelConfig)
        kind, noun = ("mel", "bands") if mels else ("features", "channels")
        rows[kind] = f"{config.mel.bands} {noun}, a frame per {hop} samples ({step:.1f} ms)"
        rows |= {f"{kind} {name}": _value(value) for name, value in config.mel.to_dict().items()}
        rows[f"{kind} look-ahead"] = (
            f"{counted(model.lookahead, 'frame')} ({model.lookahead * step:.0f} ms)"
        )
    training = described.get("training", {})
    rows |= {f"training {name}": _value(value) for name, value in training.items() if value != []}
    return list(rows.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e4 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        more = f" and {len(value) - 8} more" if len(value) > 8 else ""
        return ", ".join(map(_value, value[:8])) + more
    return str(value)
