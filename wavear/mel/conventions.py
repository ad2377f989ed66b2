"""How the values of a mel can represent its bands: logarithms, decibels, and ranges of these."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

from wavear.common.errors import require
from wavear.mel.features import FeatureConfig
from wavear.mel.spectrogram import MelConfig

Frames = MelConfig | FeatureConfig
"""Settings of the frames that a model is conditioned on."""

# Differences that are audible at most at the ends of a recording or near the floor.
MINOR = ("padding", "power_offset", "power_floor")


class Convention(NamedTuple):
    """How the values of a mel represent its bands: fields of `MelConfig`."""

    label: str
    log_base: Any
    scale: float = 1.0
    shift: float = 0.0
    clip: tuple[float, float] | None = None

    def of(self, config: MelConfig) -> MelConfig:
        """Return this convention with the analysis of `config`."""
        _, log_base, scale, shift, clip = self
        return replace(config, log_base=log_base, scale=scale, shift=shift, clip=clip)


CONVENTIONS = {
    "ln": Convention("natural-logarithm", "e"),
    "log10": Convention("log10", "10"),
    "db": Convention("decibel", "db"),
    "db01": Convention("0-to-1", "db", 0.01, 1.0, (0.0, 1.0)),
    "db01-ref20": Convention("0-to-1 (20 dB down)", "db", 0.01, 0.8, (0.0, 1.0)),
    "db4-ref20": Convention("-4-to-4", "db", 0.08, 2.4, (-4.0, 4.0)),
    "linear": Convention("linear (no logarithm)", "none"),
}


def describe_source(source: MelConfig | str, target: MelConfig) -> MelConfig:
    """Return the configuration of a preset, or of a convention with the analysis of `target`."""
    require(source, (MelConfig, str), "source", "a MelConfig or the name of a preset")
    if isinstance(source, MelConfig):
        return source
    if source in CONVENTIONS:
        return CONVENTIONS[source].of(target)
    return MelConfig.preset(source)


def frames_from_dict(given: dict[str, Any]) -> Frames:
    """Return the configuration that `to_dict` was called on.

    Raises
    ------
    WavearError
        If a field is missing, unknown or out of range.
    """
    if isinstance(given, dict) and given.keys() == {field.name for field in fields(FeatureConfig)}:
        return FeatureConfig(**given)
    return MelConfig.from_dict(given)
