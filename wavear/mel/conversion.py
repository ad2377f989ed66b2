"""Convert mels between conventions where that loses nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from wavear.audio.waveforms import Waveform as Mel
from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig, check_config, compress_

# Fields that determine the value of a band; all others determine the band.
VALUE_FIELDS = ("floor", "floor_mode", "log_base", "scale", "shift", "clip")

# A value this close to a bound, as a share of the change by a factor e, was clipped to it: float32
# rounds by less.
_NEAR = 1e-4
_LOUDEST = 1e12  # audio reaches some hundreds


def analysis_differences(source: MelConfig, target: MelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two analyses differ, so that no formula converts one to the other.

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
    """Convert mels exactly from one convention to another, or raise.

    The conversion is exact up to rounding for another logarithm (natural, common, decibels, none),
    an affine normalisation, and a floor or clipping that removes more than that of `source`. It is
    impossible for another analysis (sample rate, hop, window, filter bank, power), and for values
    that `source` has clipped and `target` distinguishes: the given values are checked for them.

    Parameters
    ----------
    mel : Tensor or array, shape (..., M, F), floating point
    source, target : MelConfig
    ignore : collection of str
        Fields to leave as they are although they differ. With "floor" and "clip", clipped values
        count as being at the bound.

    Returns
    -------
    Tensor or array like `mel`
        Computed in float64.

    Raises
    ------
    WavearError
        If the shape does not fit `source`, or the conversion cannot be exact; the message names the
        fields.

    Examples
    --------
    >>> natural, common = MelConfig(), MelConfig(log_base="10")
    >>> convert_mel(torch.full((80, 1), math.log(1e-3)), natural, common)[0]
    tensor([-3.])
    >>> convert_mel(torch.zeros(80, 1), natural, MelConfig(hop_length=300))
    Traceback (most recent call last):
    wavear.common.errors.WavearError: ...: hop_length is 256 in the source and 300 in the target
    """
    check_config(source, "source")
    check_config(target, "target")
    values = as_tensor(mel, "mel")
    if differing := [
        _difference(name, source, target)
        for name in analysis_differences(source, target)
        if name not in ignore
    ]:
        raise WavearError(f"mels cannot be converted exactly: {'; '.join(differing)}")
    if not values.is_floating_point() or values.dim() < 2 or values.shape[-2] != source.bands:
        raise WavearError(
            f"mel is {values.dtype} of shape {tuple(values.shape)}, expected floating point,"
            f" (..., {source.bands}, F)"
        )
    if all(getattr(source, name) == getattr(target, name) for name in VALUE_FIELDS):
        return mel
    x = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
    _check_bounds(x, source, target, ignore)
    if (
        "none" not in (source.log_base, target.log_base)
        and source.floor_mode == target.floor_mode == "clip"
    ):
        # From logarithm to logarithm: without an exponential, nothing can overflow.
        x = ((x - source.shift) / per_neper(source)).clamp(min=math.log(target.floor))
        x = x * per_neper(target) + target.shift
        x = x if target.clip is None else x.clamp(*target.clip)
    else:
        x = _to_values(_to_bands(x, source), target)
    x = x.to(values.dtype)
    return x if isinstance(mel, Tensor) else x.numpy()  # type: ignore[return-value]


def per_neper(config: MelConfig) -> float:
    """Return the change of a value per neper of its band (without a logarithm, per unit)."""
    factor = {"e": 1.0, "none": 1.0, "10": 1 / math.log(10), "db": 20 / config.power / math.log(10)}
    return config.scale * factor[config.log_base]


def _difference(name: str, source: MelConfig, target: MelConfig) -> str:
    ours, theirs = getattr(source, name), getattr(target, name)
    return f"{name} is {ours!r} in the source and {theirs!r} in the target"


def _to_bands(x: Tensor, config: MelConfig) -> Tensor:
    """Return the bands before the floor and the logarithm, as far as the values determine them."""
    x = (x - config.shift) / per_neper(config)
    bands = x if config.log_base == "none" else x.exp()
    return bands - config.floor if config.floor_mode == "add" else bands


def _to_values(bands: Tensor, config: MelConfig) -> Tensor:
    return compress_(bands.clamp(min=0.0), config)


def _check_bounds(x: Tensor, source: MelConfig, target: MelConfig, ignore: Collection[str]) -> None:
    """Raise if `source` has clipped some of these values and `target` would distinguish them.

    A value at the lower bound represents any band from 0 to `end`, one at the upper bound any band
    from `end` on: nothing is lost if the target has one value for all of these.
    """
    near = abs(per_neper(source)) * _NEAR
    same = abs(per_neper(target)) * (1e-9 if target.log_base == "none" else 1e-7)
    for end_name, field, extreme in (("quietest", "floor", 0.0), ("loudest", "clip", _LOUDEST)):
        if field in ignore or "clip" in ignore:
            continue
        extreme = torch.tensor(extreme, dtype=x.dtype)
        bound = _to_values(extreme, source)
        if not torch.isfinite(bound):
            continue
        clipped = source.clip is not None and float(bound) in source.clip
        if not clipped and source.floor_mode == "add":
            bound = _to_values(extreme.new_tensor(source.floor), source)  # few digits remain below
        end = _to_bands(bound, source).clamp(min=0.0)
        if torch.isclose(_to_values(end, target), _to_values(extreme, target), rtol=0, atol=same):
            continue
        lower = (source.scale > 0) == (field == "floor")
        cut = x <= bound + near if lower else x >= bound - near
        if bool(cut.any()):
            share, fields = cut.double().mean().item(), "clip" if clipped else "floor"
            raise WavearError(
                f"mels cannot be converted exactly: {share:.1%} of the values are the {end_name}"
                f" that the source can represent ({float(bound):.4g}), where the target has"
                f" several: {_difference(fields, source, target)}"
            )
