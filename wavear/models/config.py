"""The configuration that all networks share, and checks of its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from wavear.common.errors import WavearError
from wavear.mel.conventions import Frames
from wavear.models.distributions import LAWS, law_of


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Fields of every network's configuration.

    Raises
    ------
    WavearError
        Naming the field, its value, and the values it may have.
    """

    classes: int = 0
    """Codes Q, 2 to 65536; 0: 256 mu-law codes of a categorical distribution, 65536 linear values
    (16 bits) of the others."""
    sample_rate: int = 22050
    """Rate of the audio, in Hz."""
    mel: Frames | None = None
    """The mels, or features from files, the model is conditioned on; None: unconditional."""
    speakers: int = 0
    """Speakers the model is conditioned on; 0: none."""
    conditioning_channels: int = 80
    """Channels of the conditioning, one vector per sample."""
    conditioning_context: int = 2
    """Mel frames before and after each that the conditioning's first convolution sees."""
    conditioning_scales: tuple[int, ...] = ()
    """Factors of the upsampling from frames to samples, whose product is the hop; (): automatic."""
    conditioning_slope: float = 0.2
    """Slope below zero of the leaky ReLU after the conditioning's first convolution; 1: none."""
    law: str = "categorical"
    """Distribution of the next sample: categorical, logistic_mixture, gaussian or laplace; see
    `wavear.models.distributions`."""
    mixtures: int = 10
    """Components of a mixture of logistics."""
    coarse_classes: int = 0
    """For distributions over values: mu-law codes that are embedded in addition to the value; 0:
    none."""
    pre_emphasis: float = 0.0
    """a of x[t] - a x[t-1], the signal that is coded; 0: the audio itself. See
    `wavear.audio.emphasis`."""

    def __post_init__(self):
        if self.law not in LAWS:
            raise WavearError(f"law is {self.law!r}, it must be one of {', '.join(LAWS)}")
        if self.classes == 0:
            object.__setattr__(self, "classes", 256 if self.law == "categorical" else 65536)
        check_whole(
            self,
            mixtures=1,
            coarse_classes=0,
            speakers=0,
            conditioning_channels=1,
            conditioning_context=0,
        )
        object.__setattr__(self, "conditioning_scales", tuple(self.conditioning_scales))
        self._check_upsampling()
        law_of(self)  # it checks `classes`
        coarse = self.coarse_classes
        if coarse and self.law == "categorical":
            raise WavearError(
                f"coarse_classes is {coarse}; categorical embeds its own codes: set 0"
            )
        if coarse == 1 or coarse > 65536:
            raise WavearError(f"coarse_classes is {coarse}, it must be 0, or 2 to 65536")
        check_rate(self.sample_rate)
        if self.mel is not None and self.mel.sample_rate != self.sample_rate:
            raise WavearError(
                f"the mel is of {self.mel.sample_rate} Hz audio and the model of "
                f"{self.sample_rate} Hz: they must agree"
            )
        if not 0 <= self.pre_emphasis < 1:
            raise WavearError(f"pre_emphasis is {self.pre_emphasis!r}, it must be 0 to less than 1")

    def _check_upsampling(self) -> None:
        scales, hop = self.conditioning_scales, self.mel.hop_length if self.mel else 1
        whole = all(isinstance(scale, int) and scale > 0 for scale in scales)
        if scales and (not whole or math.prod(scales) != hop):
            raise WavearError(
                f"conditioning_scales is {scales!r}: the product must be the hop, {hop} samples"
            )
        if not 0 <= self.conditioning_slope <= 1:
            raise WavearError(
                f"conditioning_slope is {self.conditioning_slope!r}, it must be 0 to 1"
            )

    @property
    def conditioned(self) -> bool:
        """True if the model takes conditioning, from a mel or a speaker."""
        return self.mel is not None or self.speakers > 0

    @property
    def receptive_field(self) -> int | None:
        """Past samples that the distribution of the next one depends on; None: unbounded."""
        return None


def check_whole(config: Any, **least: int) -> None:
    """Check that fields are whole numbers, each of at least the value given.

    Raises
    ------
    WavearError
        Naming the field and its value.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise WavearError(f"{name} is {value!r}, it must be a whole number of at least {bound}")


def check_rate(sample_rate: Any) -> None:
    """Raise a WavearError unless the sample rate is 1000 to 384000 Hz."""
    if not isinstance(sample_rate, int) or not 1000 <= sample_rate <= 384000:
        raise WavearError(f"sample_rate is {sample_rate!r}, it must be 1000 to 384000 Hz")
