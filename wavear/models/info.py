"""What a checkpoint is: its size, its cost per sample, what it expects, how it was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.conditioning import Interpolation


def multiply_adds(model: AutoregressiveModel) -> tuple[int, float]:
    """Multiplications and additions per sample, a pair counted once.

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
    ahead = sum(
        module.weight.numel() for module in conditioning.modules() if isinstance(module, nn.Conv1d)
    )
    cost, rate = ahead / conditioning.hop, 1 / conditioning.hop
    for stage in (module for module in conditioning.modules() if isinstance(module, Interpolation)):
        channels, _, scale = stage.weight.shape
        rate *= scale
        cost += 3 * channels * rate
    return model.multiply_adds, cost


def describe(source: str | Path) -> list[tuple[str, str]]:
    """What a checkpoint is, as labels and values, ready to print.

    Parameters
    ----------
    source : str or Path
        As `wavear.load` takes it. The weights are loaded, so a damaged one is refused.

    Raises
    ------
    FileNotFoundError, CheckpointError
        As `wavear.load`.
    """
    model = checkpoint.load(source)
    described = checkpoint.read_config(source)
    config = model.config
    field = model.receptive_field
    network, conditioning = multiply_adds(model)
    ahead = f" + {conditioning:,.0f} of the conditioning" if conditioning else ""
    span = (
        "unbounded"
        if field is None
        else f"{field:,} samples ({1000 * field / config.sample_rate:.0f} ms)"
    )
    rows = [
        ("model", f"{described['family']}, checkpoint format {described['format']}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("multiply-adds per sample", f"{network:,}{ahead}"),
        (
            "at its sample rate",
            f"{network * config.sample_rate / 1e9:.2f} G multiply-adds per second of audio",
        ),
        ("receptive field", span),
    ]
    rows += [(name, _value(value)) for name, value in described["config"].items() if name != "mel"]
    if config.mel is None:
        rows.append(("mel", "none: unconditional"))
    else:
        hop, rate = config.mel.hop_length, config.mel.sample_rate
        rows.append(
            (
                "mel",
                f"{config.mel.bands} bands, a frame per {hop} samples ({1000 * hop / rate:.1f} ms)",
            )
        )
        rows += [(f"mel {name}", _value(value)) for name, value in config.mel.to_dict().items()]
        rows.append(
            (
                "mel look-ahead",
                f"{model.lookahead} frames ({1000 * model.lookahead * hop / rate:.0f} ms)",
            )
        )
    rows += [
        (f"training {name}", _value(value)) for name, value in described.get("training", {}).items()
    ]
    return rows


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e4 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value[:8])) + (
            f" and {len(value) - 8} more" if len(value) > 8 else ""
        )
    return str(value)
