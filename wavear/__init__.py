"""wavear: autoregressive waveform models, WaveNet first."""

from wavear import audio
from wavear.checkpoint import CheckpointError, load
from wavear.evaluate import EvaluateConfig, Evaluation, compare, evaluate
from wavear.generate import generate, score
from wavear.mel import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.wavenet import WaveNet, WaveNetConfig
from wavear.mulaw import mulaw_decode, mulaw_encode
from wavear.train import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveModel",
    "CheckpointError",
    "EvaluateConfig",
    "Evaluation",
    "MelConfig",
    "TrainConfig",
    "TrainResult",
    "WaveNet",
    "WaveNetConfig",
    "audio",
    "compare",
    "evaluate",
    "generate",
    "load",
    "log_mel",
    "mulaw_decode",
    "mulaw_encode",
    "score",
    "train",
]
