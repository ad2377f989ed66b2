"""The configuration of a predictive WaveNet."""

from __future__ import annotations

from dataclasses import dataclass

from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig
from wavear.models.config import CommonConfig, check_whole

_REFERENCE_RATE = 22050  # Hz, at which the lengths below were tuned
MAX_ORDER = 1024  # that of the highest sample rate is 558 by default
_FIXED = {
    "law": "logistic_mixture",
    "classes": 65536,
    "coarse_classes": 0,
    "pre_emphasis": 0.0,
    "conditioning_scales": (),
    "conditioning_slope": 0.2,
}


@dataclass(frozen=True, kw_only=True)
class PredictiveWaveNetConfig(CommonConfig):
    """Configuration of a predictive WaveNet; saved with its weights.

    A length of 0 follows the sample rate.
    """

    law: str = "logistic_mixture"
    """The distribution of the next sample; only logistic_mixture."""
    mixtures: int = 5
    """Components of the mixture of logistics."""
    conditioning_channels: int = 96
    """Channels of the convolutions over mel frames."""
    layers: int = 4
    """Gated layers of fixed dilation: 1, 3, 9 and so on."""
    period_layers: int = 1
    """Gated layers behind them whose dilation is the period."""
    kernel_size: int = 3
    """Taps of each layer, 2 or more."""
    residual_channels: int = 48
    """Channels of the signal that runs through the layers, and of each half of the gate."""
    skip_channels: int = 64
    """Channels of the sum over layers that the head reads."""
    head_channels: int = 64
    """Channels between the two 1x1 convolutions of the head."""
    prediction_order: int = 0
    """Past samples of the linear prediction; 0: 32 at 22.05 kHz, in proportion to the rate."""
    sub_frames: int = 0
    """Predictors per mel frame; 0: one per 64 samples at 22.05 kHz (2.9 ms)."""
    shortest_period: int = 0
    """Least lag in samples; 0: that of 550 Hz."""
    longest_period: int = 0
    """Largest lag in samples; 0: that of 50 Hz."""
    recent_residuals: int = 16
    """Residuals of the last samples at the input."""
    period_residuals: int = 4
    """Residuals at the input on each side of one period ago."""
    period_channels: int = 64
    """Channels of the network for lag and voicing."""
    causal: bool = False
    """Condition the samples of a frame on that frame and those before it, without look-ahead."""

    def __post_init__(self) -> None:
        scale = self.sample_rate / _REFERENCE_RATE if isinstance(self.sample_rate, int) else 1.0
        hop = self.mel.hop_length if self.mel is not None else 256
        automatic = {
            "prediction_order": max(2 * round(16 * scale), 8),
            "sub_frames": max(round(hop / (64 * scale)), 1),
            "shortest_period": max(round(self.sample_rate / 550), self.period_residuals + 4),
            "longest_period": round(self.sample_rate / 50),
        }
        for name, value in automatic.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        check_whole(self, layers=1, period_layers=0, kernel_size=2, residual_channels=1)
        check_whole(self, skip_channels=1, head_channels=1, prediction_order=1, sub_frames=1)
        check_whole(self, recent_residuals=1, period_residuals=1, period_channels=1)
        check_whole(self, shortest_period=self.period_residuals + 4)
        check_whole(self, longest_period=self.shortest_period + 1)
        super().__post_init__()
        if not isinstance(self.mel, MelConfig):
            raise WavearError(
                "a predictive WaveNet takes its prediction from a mel: give one, or use wavenet"
            )
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise WavearError(
                    f"{name} is {getattr(self, name)!r}: a predictive WaveNet has"
                    f" {value!r}: drop {name}, or use another family"
                )
        if self.layers > 12:
            raise WavearError(
                f"layers is {self.layers}: the dilation triples from layer to layer, at most 12"
            )
        if self.prediction_order > MAX_ORDER:
            raise WavearError(
                f"prediction_order is {self.prediction_order}, expected at most {MAX_ORDER}"
            )
        if self.longest_period > self.sample_rate:
            raise WavearError(
                f"longest_period is {self.longest_period} samples, expected a second at most"
            )
        if self.sub_frames > self.mel.hop_length:
            raise WavearError(
                f"sub_frames is {self.sub_frames}, and a frame has {self.mel.hop_length} samples"
            )

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each layer, in samples; 0 stands for the period."""
        return (*(3**layer for layer in range(self.layers)), *(0,) * self.period_layers)

    @property
    def queue_lengths(self) -> tuple[int, ...]:
        """Past inputs that each layer keeps, in samples."""
        return tuple((self.kernel_size - 1) * (d or self.longest_period) for d in self.dilations)

    @property
    def history(self) -> int:
        """Past samples and residuals that prediction and features need, beyond the last one."""
        reach = self.longest_period + self.period_residuals + 2
        return max(self.prediction_order, self.recent_residuals, reach)

    @property
    def lag_history(self) -> int:
        """Whole lags that are kept: a period layer steps back by the lag at each tap but one."""
        return max(self.kernel_size - 2, 1) * self.longest_period + 1

    @property
    def features(self) -> int:
        """Numbers at the input for each sample."""
        return self.recent_residuals + 3 + 2 * self.period_residuals + 1 + 2

    @property
    def gates(self) -> int:
        """Number of gate biases of all layers, and the bias of the skip."""
        return 2 * self.residual_channels * len(self.dilations) + self.skip_channels

    def gate_span(self, layer: int) -> tuple[int, int]:
        """Return the range of the gate biases of a layer, or of the skip after the last layer."""
        width = 2 * self.residual_channels
        return layer * width, (layer + 1) * width if layer < len(self.dilations) else self.gates

    @property
    def receptive_field(self) -> int:
        """Past samples: those of the layers, of the input, and of a residual's own prediction."""
        return sum(self.queue_lengths) + self.history + self.prediction_order + 1
