"""The families, by name: model and configuration."""

from __future__ import annotations

from typing import Any

from wavear.models.base import AutoregressiveModel
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.predictive import PredictiveWaveNet, PredictiveWaveNetConfig
from wavear.models.transformer import Transformer, TransformerConfig
from wavear.models.wavenet import WaveNet, WaveNetConfig

FAMILIES: dict[str, tuple[type[AutoregressiveModel], type[Any]]] = {
    "predictive": (PredictiveWaveNet, PredictiveWaveNetConfig),
    "wavenet": (WaveNet, WaveNetConfig),
    "gru": (GRU, GRUConfig),
    "transformer": (Transformer, TransformerConfig),
    "linear": (Linear, LinearConfig),
}
