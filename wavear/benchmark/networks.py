"""The networks that the field publishes and measures, by name, and one line about a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wavear.benchmark.ceiling import Config
from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig
from wavear.models.gru import GRUConfig
from wavear.models.linear import LinearConfig
from wavear.models.predictive import PredictiveWaveNetConfig
from wavear.models.transformer import TransformerConfig
from wavear.models.wavenet import WaveNetConfig

_A = WaveNetConfig(layers=20, stacks=2, residual_channels=64, skip_channels=128, mel=MelConfig())
_R9Y9 = replace(_A, layers=24, stacks=4, kernel_size=3, residual_channels=128)
_IBAB = replace(_A, layers=50, stacks=5, residual_channels=32, skip_channels=512)
_IBAB = replace(_IBAB, head_channels=512, sample_rate=16000, mel=None)
_KAN_BAYASHI = replace(_A, layers=30, stacks=3, residual_channels=512, skip_channels=256)
_WIDE = replace(_R9Y9, layers=30, stacks=3)

# All with 256 mu-law codes and 80 mels, unless stated otherwise.
SHAPES: dict[str, tuple[str, Config]] = {
    "predictive": ("the default of wavear train", PredictiveWaveNetConfig(mel=MelConfig())),
    "nv-wavenet": ("nv-wavenet (2018): 20 layers, 64 residual, 128 skip", _A),
    "nv-wavenet-free": ("the same without conditioning", replace(_A, mel=None)),
    "small": (
        "20 layers, 32 residual, 128 skip, no conditioning",
        replace(_A, residual_channels=32, mel=None),
    ),
    "r9y9": ("r9y9/wavenet_vocoder: 24 layers, 4 stacks, kernel 3, 128 residual, 128 skip", _R9Y9),
    "wide": ("30 layers, 3 stacks, kernel 3, 128 residual, 128 skip", _WIDE),
    "ibab": (
        "ibab/tensorflow-wavenet: 50 layers, 32 residual, 512 skip, 16 kHz, no conditioning",
        _IBAB,
    ),
    "kan-bayashi": (
        "kan-bayashi/PytorchWaveNetVocoder: 30 layers, 3 stacks, 512 residual, 256 skip",
        _KAN_BAYASHI,
    ),
    "gru": ("the default GRU: one layer of 352", GRUConfig(mel=MelConfig())),
    "gru-512": ("a GRU of 512 units", GRUConfig(channels=512, mel=MelConfig())),
    "wavernn": (
        "the size of WaveRNN (2018): one GRU of 896 units, neither halved nor sparse",
        GRUConfig(channels=896, mel=MelConfig()),
    ),
    "transformer": ("the default transformer", TransformerConfig(mel=MelConfig())),
}


def described(config: Any) -> str:
    """Return a line about a network."""
    head = "" if isinstance(config, LinearConfig) else f"{config.head_channels} head, "
    mel = "no mel"
    if config.mel is not None:
        mel = f"{config.mel.bands} mels, hop {config.mel.hop_length}"
    return f"{_layers(config)}, {head}{config.classes} classes, {mel}, {config.sample_rate} Hz"


def _layers(config: Config | LinearConfig) -> str:
    if isinstance(config, LinearConfig):
        return f"linear, order {config.order}, differencing {config.differencing}"
    if isinstance(config, GRUConfig):
        return f"GRU, {config.layers} x {config.channels} units"
    if isinstance(config, TransformerConfig):
        return (
            f"transformer, {config.layers} layers of {config.channels}, {config.heads} heads, "
            f"window {config.window}, patch {config.patch}"
        )
    if not isinstance(config, WaveNetConfig | PredictiveWaveNetConfig):
        return type(config).__name__.removesuffix("Config")
    layers, more = f"{config.layers} layers, {getattr(config, 'stacks', 0)} stacks", ""
    if isinstance(config, PredictiveWaveNetConfig):
        layers = f"{config.layers} layers and {config.period_layers} of the period"
        more = f", prediction of order {config.prediction_order}"
    return (
        f"{layers}, kernel {config.kernel_size}, {config.residual_channels} residual, "
        f"{config.skip_channels} skip{more}"
    )


def config_of(shape: str | None, settings: dict[str, Any], unconditional: bool) -> Config:
    """Return the configuration of `shape`, else of `settings` of a WaveNet with 80 mel bands."""
    if shape is not None:
        if shape not in SHAPES:
            raise WavearError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
        config = SHAPES[shape][1]
        return replace(config, mel=None) if unconditional else config
    config = replace(WaveNetConfig(), **settings)
    rate = config.sample_rate
    mel = MelConfig(sample_rate=rate, fmax=min(8000.0, rate / 2))
    return config if unconditional else replace(config, mel=mel)
