"""The mels of a run: a preset, or every field of `MelConfig` as `mel_` and its name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from wavear.mel.config import (
    Centre,
    FloorMode,
    LogBase,
    MelConfig,
    MelScale,
    Norm,
    Padding,
    Window,
)

MEL_FIELDS = {
    f"mel_{f.name}": f.name for f in dataclasses.fields(MelConfig) if f.name != "sample_rate"
}
"""Fields of `MelSettings` and those of `MelConfig` that they set; the rate is the model's."""


@dataclass(frozen=True, kw_only=True)
class MelSettings:
    """The mels to condition on; None is the default of `MelConfig`."""

    mel_preset: str | None = None
    """A project's mels (torchaudio-tacotron2, vocos-24k...: docs/mels.md), instead of those below.
    Set `sample_rate` to its rate."""
    mel_bands: int = 80
    """Mel bands."""
    mel_hop_length: int | None = None
    """Samples per mel frame; None: 256 at 22050 Hz, the fitting power of two at other rates."""
    mel_n_fft: int | None = None
    """Samples of the mel's Fourier transform; None: four hops, and a window at least."""
    mel_window_length: int | None = None
    """Samples of the window; None: `mel_n_fft`."""
    mel_window: Window | None = None
    """hann, hamming, blackman or rectangular."""
    mel_centre: Centre | None = None
    """A frame's window is centred on the middle of its hop, or on its start as in librosa."""
    mel_padding: Padding | None = None
    """Beyond the ends of a recording: its mirror image (reflect), or zeros."""
    mel_fmin: float = 0.0
    """Lower end of the lowest mel band, Hz."""
    mel_fmax: float | None = None
    """Upper end of the highest mel band, Hz; None: 8000, half of a sample rate above 24000."""
    mel_mel_scale: MelScale | None = None
    """Mel scale: slaney or htk."""
    mel_norm: Norm | Literal["none"] | None = None
    """slaney: bands of unit area. none: of unit height."""
    mel_power: float | None = None
    """1: bands add up magnitudes. 2: powers."""
    mel_power_offset: float | None = None
    """Added to the power of every bin."""
    mel_power_floor: float | None = None
    """Least power of a bin."""
    mel_floor: float | None = None
    """Least value of a band before the logarithm."""
    mel_floor_mode: FloorMode | None = None
    """clip: smaller values become the floor. add: it is added to every value."""
    mel_log_base: LogBase | None = None
    """e, 10, db or none (no logarithm)."""
    mel_scale: float | None = None
    """Factor on the logarithm."""
    mel_shift: float | None = None
    """Added after the factor."""
    mel_clip: tuple[float, float] | None = None
    """Least and largest value of the result."""

    def mel_of(self, sample_rate: int) -> MelConfig:
        """Return the mels at a rate in Hz, which a preset overrides."""
        if self.mel_preset is not None:
            return MelConfig.preset(self.mel_preset)
        given: dict[str, Any] = {own: getattr(self, name) for name, own in MEL_FIELDS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("norm") == "none":
            given["norm"] = None
        octave = max(sample_rate / 22050, 1 / 16)
        hop = given.setdefault("hop_length", 2 ** round(math.log2(256 * octave)))
        n_fft = given.setdefault("n_fft", max(4 * hop, given.get("window_length", 0)))
        given.setdefault("window_length", n_fft)
        if sample_rate <= 24000:
            given.setdefault("fmax", min(8000.0, sample_rate / 2))
        given.setdefault("fmax", None)
        return MelConfig(**given, sample_rate=sample_rate)
