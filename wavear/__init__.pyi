"""The public names: `__init__.py` imports each when it is first used, by this list."""

from . import audio
from .audio.mulaw import mulaw_decode, mulaw_encode
from .common.errors import WavearError
from .data import corpora
from .data.corpus import IndexReport, index
from .evaluation import display
from .evaluation.config import EvaluateConfig
from .evaluation.evaluation import compare, compare_models, evaluate
from .evaluation.ratios import likelihood_ratios
from .evaluation.records import Evaluation
from .generation.defects import watch
from .generation.infilling import gap_features
from .generation.sampler import generate
from .generation.scoring import score
from .generation.states import StreamState
from .generation.streams import Stream, StreamBatch
from .generation.tacotron import Tacotron
from .mel.config import MelConfig
from .mel.conversion import convert_mel
from .mel.detection import adapt_mel, judge_mel
from .mel.features import FeatureConfig
from .mel.spectrogram import log_mel
from .models.base import AutoregressiveModel
from .models.checkpoint import CheckpointError, load
from .models.fitting import fit_linear
from .models.gru import GRU, GRUConfig
from .models.linear import Linear, LinearConfig
from .models.predictive import PredictiveWaveNet, PredictiveWaveNetConfig
from .models.transformer import Transformer, TransformerConfig
from .models.wavenet import WaveNet, WaveNetConfig
from .training.config import TrainConfig, TrainResult
from .training.run import train, write_held_out

__version__: str

__all__ = [
    "GRU",
    "AutoregressiveModel",
    "CheckpointError",
    "EvaluateConfig",
    "Evaluation",
    "FeatureConfig",
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
    "Tacotron",
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
    "display",
    "evaluate",
    "fit_linear",
    "gap_features",
    "generate",
    "index",
    "judge_mel",
    "likelihood_ratios",
    "load",
    "log_mel",
    "mulaw_decode",
    "mulaw_encode",
    "score",
    "train",
    "watch",
    "write_held_out",
]
