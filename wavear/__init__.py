"""wavear: autoregressive waveform models, WaveNet first."""

from wavear import audio, corpora
from wavear.checkpoint import CheckpointError, load
from wavear.convert import convert_mel
from wavear.data import IndexReport, index
from wavear.evaluate import EvaluateConfig, Evaluation, compare, compare_models, evaluate
from wavear.fit import fit_linear
from wavear.generate import generate, score
from wavear.generate.state import StreamState
from wavear.generate.stream import Stream, StreamBatch
from wavear.judge import adapt_mel, judge_mel
from wavear.mel import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.predictive import PredictiveWaveNet, PredictiveWaveNetConfig
from wavear.models.transformer import Transformer, TransformerConfig
from wavear.models.wavenet import WaveNet, WaveNetConfig
from wavear.mulaw import mulaw_decode, mulaw_encode
from wavear.train import TrainConfig, TrainResult, train, write_held_out
from wavear.watch import watch

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "AutoregressiveModel",
    "CheckpointError",
    "EvaluateConfig",
    "Evaluation",
    "GRUConfig",
    "IndexReport",
    "Linear",
    "LinearConfig",
    "MelConfig",
    "PredictiveWaveNet",
    "PredictiveWaveNetConfig",
    "Stream",
    "StreamBatch",
    "StreamState",
    "TrainConfig",
    "TrainResult",
    "Transformer",
    "TransformerConfig",
    "WaveNet",
    "WaveNetConfig",
    "adapt_mel",
    "audio",
    "compare",
    "compare_models",
    "convert_mel",
    "corpora",
    "evaluate",
    "fit_linear",
    "generate",
    "index",
    "judge_mel",
    "load",
    "log_mel",
    "mulaw_decode",
    "mulaw_encode",
    "score",
    "train",
    "watch",
    "write_held_out",
]
