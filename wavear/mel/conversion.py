"""Mels of one convention to mels of another, where nothing is lost by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, TypeVar

import numpy as np
import torch

from wavear.mel.spectrogram import MelConfig

Mel = TypeVar("Mel", torch.Tensor, np.ndarray)

# What happens to the value of a band once it is known; all other fields say which value that is.
VALUE_FIELDS = ("floor", "floor_mode", "log_base", "scale", "shift", "clip")

# A value this near to a bound, as a share of what a factor e changes, has been clipped to it:
# float32 rounds by less.
_NEAR = 1e-4


def analysis_differences(source: MelConfig, target: MelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which the analysis of two mels differs, so that no formula leads from one to the other.

    Returns
    -------
    dict of str to (source's value, target's value)

    Examples
    --------
    >>> analysis_differences(MelConfig.preset("hifigan"), MelConfig.preset("nvidia-tacotron2"))
    {'centre': ('middle', 'start'), 'power_offset': (1e-09, 0.0)}
    """
    found = {}
    for field in dataclasses.fields(MelConfig):
        ours, theirs = getattr(source, field.name), getattr(target, field.name)
        if field.name == "fmax":
            ours, theirs = ours or source.sample_rate / 2, theirs or target.sample_rate / 2
        if field.name not in VALUE_FIELDS and ours != theirs:
            found[field.name] = (ours, theirs)
    return found


def convert_mel(
    mel: Mel, source: MelConfig, target: MelConfig, *, ignore: Collection[str] = ()
) -> Mel:
    """Mels as `source` describes them, to what `target` describes: exactly, or not at all.

    Exact, up to rounding, are another logarithm (natural, common, decibels, none), an affine
    normalisation, and a floor or clipping that cuts off more than that of `source` did. Not to be
    had are another analysis (sample rate, hop, window, filter bank, magnitudes for powers...), and
    what `source` has cut off and `target` has not: that is found out from the values, of which none
    may lie where `source` clips.

    Parameters
    ----------
    mel : Tensor or array, shape (..., M, F), floating point
    source, target : MelConfig
    ignore : collection of str
        Fields to leave as they are although they differ; "floor" and "clip" among them: take what
        was cut off for the bound where it was.

    Returns
    -------
    Tensor or array like `mel`
        Computed in float64.

    Raises
    ------
    ValueError
        If it cannot be exact; the message names the fields.

    Examples
    --------
    >>> natural, common = MelConfig(), MelConfig(log_base="10")
    >>> convert_mel(torch.full((80, 1), math.log(1e-3)), natural, common)[0]
    tensor([-3.])
    >>> convert_mel(torch.zeros(80, 1), natural, MelConfig(hop_length=300))
    Traceback (most recent call last):
    ValueError: mels cannot be converted exactly: hop_length is 256, and wanted is 300
    """
    if differing := {
        k: v for k, v in analysis_differences(source, target).items() if k not in ignore
    }:
        told = "; ".join(
            f"{name} is {ours!r}, and wanted is {theirs!r}"
            for name, (ours, theirs) in differing.items()
        )
        raise ValueError(f"mels cannot be converted exactly: {told}")
    values = mel if isinstance(mel, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(mel))
    if not values.is_floating_point() or values.dim() < 2 or values.shape[-2] != source.bands:
        raise ValueError(
            f"mel is {values.dtype} of shape {tuple(values.shape)}, expected floating point, (..., {source.bands}, F)"
        )
    if all(getattr(source, name) == getattr(target, name) for name in VALUE_FIELDS):
        return mel
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    x = values.detach().to(exact)
    _check_bounds(x, source, target, ignore)
    if (
        source.log_base != "none"
        and target.log_base != "none"
        and source.floor_mode == target.floor_mode == "clip"
    ):
        # A line from logarithm to logarithm: no exponential has to be taken, and none can overflow.
        x = ((x - source.shift) / per_neper(source)).clamp(min=math.log(target.floor)) * per_neper(
            target
        ) + target.shift
        x = x if target.clip is None else x.clamp(*target.clip)
    else:
        x = _to_values(_to_bands(x, source), target)
    x = x.to(values.dtype)
    return x if isinstance(mel, torch.Tensor) else x.numpy()  # type: ignore[return-value]


def per_neper(config: MelConfig) -> float:
    """What a value gains when the natural logarithm of a band (or the band, where none is taken) gains one."""
    factor = {"e": 1.0, "none": 1.0, "10": 1 / math.log(10), "db": 20 / config.power / math.log(10)}
    return config.scale * factor[config.log_base]


def _to_bands(x: torch.Tensor, config: MelConfig) -> torch.Tensor:
    """Values to what the bands were before the floor and the logarithm, as far as that is known."""
    x = (x - config.shift) / per_neper(config)
    bands = x if config.log_base == "none" else x.exp()
    return bands - config.floor if config.floor_mode == "add" else bands


def _to_values(bands: torch.Tensor, config: MelConfig) -> torch.Tensor:
    """Bands before the floor and the logarithm to values."""
    bands = (
        bands.clamp(min=config.floor)
        if config.floor_mode == "clip"
        else bands.clamp(min=0.0) + config.floor
    )
    x = (bands if config.log_base == "none" else bands.log()) * per_neper(config) + config.shift
    return x if config.clip is None else x.clamp(*config.clip)


def _check_bounds(
    x: torch.Tensor, source: MelConfig, target: MelConfig, ignore: Collection[str]
) -> None:
    """Raises if `source` has cut off of these very values what `target` would show.

    Values at the bound of the quietest stand for any band from nothing to `end`, those at the bound
    of the loudest for any from `end` on: nothing is lost if the target has one value for all of
    these.
    """
    near = abs(per_neper(source)) * _NEAR
    zero, infinite = (
        torch.zeros((), dtype=x.dtype),
        torch.full((), 1e12, dtype=x.dtype),
    )  # audio makes some hundreds
    for what, field, extreme in (("quietest", "floor", zero), ("loudest", "clip", infinite)):
        if field in ignore or "clip" in ignore:
            continue
        bound = _to_values(extreme, source)
        if not torch.isfinite(bound):
            continue
        clipped = source.clip is not None and float(bound) in source.clip
        if (
            not clipped and source.floor_mode == "add"
        ):  # below an added floor there are few digits left
            bound = _to_values(zero + source.floor, source)
        end = _to_bands(bound, source).clamp(min=0.0)
        same = abs(per_neper(target)) * (1e-9 if target.log_base == "none" else 1e-7)
        if torch.isclose(_to_values(end, target), _to_values(extreme, target), rtol=0, atol=same):
            continue
        rising = source.scale > 0
        cut = x <= bound + near if rising == (field == "floor") else x >= bound - near
        if bool(cut.any()):
            field = "clip" if clipped else "floor"
            raise ValueError(
                f"mels cannot be converted exactly: {cut.double().mean().item():.1%} of the values are the {what} that "
                f"the source can hold ({float(bound):.4g}), where the target tells more apart: {field} is"
                f" {getattr(source, field)!r}, and wanted is {getattr(target, field)!r}"
            )
