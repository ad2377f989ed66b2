"""wavear: autoregressive waveform models, WaveNet first."""

from wavear import audio
from wavear.audio.mulaw import mulaw_decode, mulaw_encode
from wavear.common.errors import WavearError
from wavear.data import corpora
from wavear.data.corpus import IndexReport, index
from wavear.evaluation.evaluation import compare, compare_models, evaluate
from wavear.evaluation.records import EvaluateConfig, Evaluation
from wavear.generation.defects import watch
from wavear.generation.sampler import generate
from wavear.generation.scoring import score
from wavear.generation.states import StreamState
from wavear.generation.streams import Stream, StreamBatch
from wavear.mel.conversion import convert_mel
from wavear.mel.detection import adapt_mel, judge_mel
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.checkpoint import CheckpointError, load
from wavear.models.fitting import fit_linear
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.predictive import PredictiveWaveNet, PredictiveWaveNetConfig
from wavear.models.transformer import Transformer, TransformerConfig
from wavear.models.wavenet import WaveNet, WaveNetConfig
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.run import train, write_held_out

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
    "WavearError",
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
