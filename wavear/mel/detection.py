"""Detect whether a mel is of the kind that a model was trained on, and convert it if not.

The numbers distinguish conventions because a model stores the mean and deviation of each band over
its training data. A convention maps value v to the band exp(t) with t = (v - shift) / slope; the
likelihood of the values,

    log p(v) = mean over bands and frames of log N(t; mean_b + gain, deviation_b) - log(slope),

measures how well it fits at any loudness: `gain` is the best one, with a prior of deviation 2.5 (22
dB of magnitudes). If a convention other than the model's fits best, the mel is doubtful or wrong.
Only values above the floor count: padding and digital silence are of no convention.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError, require
from wavear.mel.conventions import CONVENTIONS, MINOR, Frames, describe_source
from wavear.mel.conversion import analysis_differences, convert_mel, per_neper
from wavear.mel.features import FeatureConfig
from wavear.mel.presets import PRESETS
from wavear.mel.spectrogram import MelConfig

INT16, STANDARD, POWER, TRANSPOSED = "integer-waveform", "standardised", "power", "transposed"

# Nats per value. Of 90 recordings of eight kinds (speech, music, sounds), judged by the statistics
# of one speaker, 2 with the right convention exceed the first threshold and none the second; with
# log10 instead of natural logarithms, 75 exceed the first and 69 the second.
_DOUBTFUL, _WRONG = 0.3, 1.0
# A logarithm of powers is twice that of magnitudes, so it differs from loud and lively sound in its
# spread only.
_DOUBTFUL_POWER, _WRONG_POWER = 0.2, 0.8
# Correlation of neighbouring frames below which a mel is read along the wrong axis, and by how much
# that of neighbouring bands exceeds it.
_UNRELATED, _RELATED = 0.45, 0.3
_LEAST_POWER_FRAMES = 90  # with sound: the spread of a single word varies much
_LEAST_FRAMES = 20  # above the floor, for that correlation
_FLAT = 1e-3  # of the range of the mel: frames that vary less over the bands are padding or silence
_GAIN_DEVIATION = 2.5  # nepers of magnitudes
_NATURAL = 0.7  # share of frames with sound above which the others are pauses, not padding
_ALIKE = 0.05  # nats: the spread of two readings is the same
_FURTHEST = 5.0  # deviations at which a value's distance is capped
_SLACK = 3.0  # nepers by which a network may exceed the range of a recording in [-1, 1]


@dataclass(frozen=True)
class MelVerdict:
    """The result of `judge_mel`."""

    verdict: Literal["fits", "doubtful", "wrong"]
    reason: str = ""
    """In one line: the problem and the remedy."""
    convention: str | None = None
    """The apparent convention if it is not the model's: a name that `wavear.adapt_mel` accepts as
    `source`, or "integer-waveform" (of a waveform in integers, not in [-1, 1]), "standardised"
    (mean 0, deviation 1 per band), "power" (the logarithm of powers, for a model of magnitudes, or
    the reverse), or "transposed" (read along the wrong axis)."""


class ConditionedModel(Protocol):
    """The parts of an `AutoregressiveModel` that detection reads."""

    @property
    def config(self) -> Any: ...
    @property
    def conditioning(self) -> Any: ...


class Expectation:
    """Stands for a model of which only the mels are known, and perhaps their statistics.

    These are `mel_mean` and `mel_deviation` of `conditioning`, (M,) each.
    """

    def __init__(self, mel: MelConfig, conditioning: Any = None):
        self.config = self
        self.mel = mel
        self.conditioning = conditioning


def judge_mel(
    mel: Tensor | np.ndarray,
    model: ConditionedModel | Expectation,
    *,
    seconds: float | None = None,
) -> MelVerdict:
    """Judge a mel of unknown origin by its numbers: bands, frames, range, distribution.

    Parameters
    ----------
    mel : Tensor or array, shape (M, F)
    model : AutoregressiveModel, or another with `config.mel` and `conditioning`
        Conditioned on mels. For an untrained model, which has no statistics, only the range is
        judged.
    seconds : float, optional
        Expected duration of its audio.

    Returns
    -------
    MelVerdict

    Raises
    ------
    WavearError
        If `seconds` is not positive and finite.
    """
    config = _mels_of(model)
    if config is None:
        return MelVerdict("wrong", "the model was trained without mels and cannot use one")
    if isinstance(config, FeatureConfig):
        raise WavearError("the model takes features from files, which are not judged")
    values = as_tensor(mel, "mel")
    if reason := _wrong_shape(values, config):
        return MelVerdict("wrong", reason)
    values = values.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        frame = int((~torch.isfinite(values)).any(dim=0).nonzero()[0])
        return MelVerdict("wrong", f"the mel holds NaN or infinity, first in frame {frame}")
    if seconds is not None and (reason := _wrong_rate(values.shape[1], seconds, config)):
        return MelVerdict("wrong", reason)
    return MelVerdict("fits") if config.log_base == "none" else _judge_values(values, model, config)


def adapt_mel(
    mel: Tensor | np.ndarray,
    model: ConditionedModel | Expectation,
    source: MelConfig | str | None = None,
    *,
    seconds: float | None = None,
    force: bool = False,
    warn: Callable[[str], object] | None = None,
) -> Tensor:
    """Return a mel as the model expects it: converted if its kind is given, else judged.

    Parameters
    ----------
    mel : Tensor or array, shape (M, F)
    model : AutoregressiveModel, or another with `config.mel` and `conditioning`
        Conditioned on mels.
    source : MelConfig or str, optional
        The kind of the mel: a configuration, the name of a preset, or a convention of the values
        with the model's analysis: ln, log10, db, db01 (decibels from -100 to 0 as 0 to 1),
        db01-ref20, db4-ref20, linear.
    seconds : float, optional
        Expected duration of its audio; a mel with another number of frames is refused.
    force : bool
        Accept a mel that is judged wrong or has differences that cannot be converted, except in the
        number of bands.
    warn : callable, optional
        Receives doubts, one line each; by default a UserWarning is issued.

    Returns
    -------
    Tensor, shape (M, F), float32

    Raises
    ------
    WavearError
        If the mel does not fit and cannot be converted, or `source` is unknown.
    """
    warn = warn or (lambda line: warnings.warn(line, stacklevel=3))
    target = _mels_of(model)
    if target is None:
        raise WavearError("the model was trained without mels and cannot use one")
    if isinstance(target, FeatureConfig):
        if source is not None:
            raise WavearError("the model takes features, not mels of any kind: drop --mel-preset")
        return target.values(mel)
    given = as_tensor(mel, "mel")
    if source is None:
        judged = judge_mel(given, model, seconds=seconds)
        usable = given.dim() == 2 and given.shape[0] == target.bands
        if judged.verdict == "wrong" and not (force and usable):
            raise WavearError(judged.reason)
        if judged.verdict != "fits":
            warn(judged.reason)
        return given.float()
    if reason := _wrong_shape(given, target):
        raise WavearError(reason)
    # The range is not judged: it is that of `source`.
    if seconds is not None and (reason := _wrong_rate(given.shape[1], seconds, target)):
        raise WavearError(reason)
    config = describe_source(source, target)
    differing = analysis_differences(config, target)
    listed = "; ".join(
        f"{name} {ours!r}, the model {theirs!r}" for name, (ours, theirs) in differing.items()
    )
    if not differing.keys() <= {*MINOR} and (not force or "bands" in differing):
        delay = 500 * target.hop_length / target.sample_rate
        hint = f" (only {delay:.1f} ms of delay, half a frame, differ: --force accepts it)"
        hint = hint if differing.keys() <= {"centre", *MINOR} else ""
        raise WavearError(f"it is not the mel the model was trained on: it has {listed}{hint}")
    if differing:
        warn(f"the mel is accepted although it has {listed}")
    try:
        return convert_mel(given, config, target, ignore=list(differing)).float()
    except WavearError as error:
        warn(f"{error}; these values stay at the bound")
        return convert_mel(given, config, target, ignore=[*differing, "floor", "clip"]).float()


def _mels_of(model: Any) -> Frames | None:
    if not hasattr(getattr(model, "config", None), "mel"):
        raise WavearError(f"model is a {type(model).__name__}, expected one of wavear.load")
    return model.config.mel


def _wrong_shape(values: Tensor, config: MelConfig) -> str:
    """Return the problem with the shape or type of a mel, or ""."""
    shape = tuple(values.shape)
    if len(shape) != 2 or 0 in shape or not values.is_floating_point():
        kind = "floating point" if values.is_floating_point() else str(values.dtype)
        return f"the mel is {kind} of shape {shape}, expected floating point, (bands, frames)"
    if shape[0] == config.bands:
        return ""
    if shape[1] == config.bands:
        return f"the mel has shape {shape}: it seems transposed, frames first; give its transpose"
    known = [name for name in PRESETS if MelConfig.preset(name).bands == shape[0]]
    hint = f" (as many as {' and '.join(known)})" if known and shape[0] != 80 else ""
    return f"the mel has {shape[0]} bands, the model was trained on {config.bands}{hint}"


def _wrong_rate(frames: int, seconds: float, config: MelConfig) -> str:
    """Return the problem with the number of frames, or ""."""
    require(seconds, numbers.Real, "seconds", "a number above 0")
    if not 0 < seconds < math.inf:
        raise WavearError(
            f"the duration of the mel is {seconds:g} s, it must be above 0 and finite"
        )
    expected = seconds * config.frame_rate
    if abs(frames - expected) <= 2 + 0.01 * expected:
        return ""
    rate = frames / seconds
    others = {name: MelConfig.preset(name) for name in PRESETS}
    fitting = {
        name: other
        for name, other in others.items()
        if abs(other.frame_rate - rate) <= 0.01 * rate + 2 / seconds
        and other.frame_rate != config.frame_rate
    }
    hop = f"a hop of {config.sample_rate / rate:.0f} samples at {config.sample_rate} Hz"
    if fitting and all(other.sample_rate != config.sample_rate for other in fitting.values()):
        kinds = {f"{o.hop_length} samples at {o.sample_rate} Hz" for o in fitting.values()}
        hop = f"a hop of {' or '.join(sorted(kinds))}"
    presets = f", as {' and '.join(fitting)}" if fitting else ""
    return (
        f"the mel has {frames} frames for {seconds:g} s, {rate:.1f} per second ({hop}{presets}),"
        f" the model expects {config.frame_rate:.1f} per second (a hop of {config.hop_length})"
    )


class _Statistics(NamedTuple):
    """Mean and deviation of each band over the training data, (M, 1), in nepers."""

    mean: Tensor
    deviation: Tensor


class _Reading(NamedTuple):
    """The values, read by a convention."""

    nepers: Tensor
    density: Tensor | float
    """Logarithm of nepers per unit of the values."""


def _judge_values(values: Tensor, model: Any, config: MelConfig) -> MelVerdict:
    own = _Reading((values - config.shift) / per_neper(config), -math.log(abs(per_neper(config))))
    quietest, loudest = _possible(config)
    heard = _above_floor(values)
    statistics = _statistics(model, config)
    if int(heard.sum()) <= config.bands:  # silence: of every convention
        heard, statistics = torch.ones_like(heard), None
    elif reason := _wrong_axis(values, heard, config):
        return MelVerdict("wrong", reason, TRANSPOSED)
    lowest = float(own.nepers[heard].min())
    outside = lowest < quietest - _SLACK or float(own.nepers.max()) > loudest + _SLACK
    best, margin = "own", 0.0
    doubtful, wrong = _DOUBTFUL, _WRONG
    if statistics is not None:
        readings = {"own": own, **_other_readings(values, own, statistics, config, heard)}
        spreads = {n: _fit(reading, statistics, n, heard) for n, reading in readings.items()}
        power = readings.pop(POWER, None)
        # A quiet recording must not count as another convention: that explains its spread, too.
        # The floor in frames with sound, and in natural pauses, locates that of the convention.
        sounding = heard.any(0)
        natural = float(sounding.double().mean()) > _NATURAL
        frames = (sounding | natural).expand_as(heard)
        fits = {
            name: _fit(reading, statistics, name, frames, config.power)
            for name, reading in readings.items()
            if spreads[name] > spreads["own"] - _ALIKE
        }
        best = max(fits, key=fits.__getitem__)
        margin = fits[best] - fits["own"]
        by_spread = spreads.pop(POWER, -math.inf) - spreads["own"]
        others = max(spreads.values()) - spreads["own"]
        enough = int(sounding.sum()) >= _LEAST_POWER_FRAMES
        if power and enough and by_spread > max(_DOUBTFUL_POWER, others + _ALIKE):
            best, margin, doubtful, wrong = POWER, by_spread, _DOUBTFUL_POWER, _WRONG_POWER
    if not outside and margin <= doubtful:
        padding = float(own.nepers.min())
        if padding >= quietest - _SLACK:
            return MelVerdict("fits")
        low = float(values.min() if per_neper(config) > 0 else values.max())
        floor = config.shift + per_neper(config) * quietest
        return MelVerdict(
            "doubtful", f"the mel is padded with {low:.1f}: use the model's floor, {floor:.1f}"
        )
    convention = best if best != "own" else None
    reason = _explain(values, config, convention, statistics)
    return MelVerdict("wrong" if outside or margin > wrong else "doubtful", reason, convention)


def _above_floor(values: Tensor) -> Tensor:
    """Return which values (M, F) are of sound: not of a flat frame, and not the least one."""
    span = _FLAT * float(values.max() - values.min())
    alive = values.amax(0) - values.amin(0) > span
    if not bool(alive.any()):
        return torch.zeros_like(values, dtype=torch.bool)
    return alive & (values > values[:, alive].min() + 0.1 * span)


def _wrong_axis(values: Tensor, heard: Tensor, config: MelConfig) -> str:
    """Return the problem with a mel whose neighbouring frames are unrelated, or "".

    Neighbouring frames of sound are alike, as their windows overlap; where a mel is read along the
    wrong axis, they are values of other times.
    """
    overlaps = 4 * config.hop_length <= config.window_length  # less relates no frames of noise
    if not overlaps or int(heard.any(0).sum()) < _LEAST_FRAMES:
        return ""
    count = heard.sum(1, keepdim=True).clamp(min=1)
    apart = torch.where(heard, values - (values * heard).sum(1, keepdim=True) / count, 0.0)

    def related(a: Tensor, b: Tensor, both: Tensor) -> float:
        power = (a**2 * both).sum() * (b**2 * both).sum()
        return float((a * b * both).sum() / power.clamp(min=1e-30).sqrt())

    frames = related(apart[:, 1:], apart[:, :-1], heard[:, 1:] & heard[:, :-1])
    bands = related(apart[1:], apart[:-1], heard[1:] & heard[:-1])
    if frames >= _UNRELATED or bands < frames + _RELATED:
        return ""
    return (
        f"neighbouring frames are unrelated (correlation {frames:.2f}, of neighbouring bands"
        f" {bands:.2f}): the mel seems transposed; give its transpose, in a raw stream frame after"
        " frame"
    )


def _other_readings(
    values: Tensor, own: _Reading, statistics: _Statistics, config: MelConfig, heard: Tensor
) -> dict[str, _Reading]:
    sound = values[heard]
    low, high = float(sound.min()), float(sound.max())
    slope, shift = per_neper(config), config.shift
    readings: dict[str, _Reading] = {}
    for name, convention in CONVENTIONS.items():
        other = convention.of(config)
        if other.log_base == "none":
            if low >= 0:
                nepers = values.clamp(min=config.floor).log()
                density = -torch.where(values > config.floor, nepers, 0.0)
                readings[name] = _Reading(nepers, density)
            continue
        factor = per_neper(other)
        if other.clip is None:
            least, most = math.log(1e-10) - 1, _possible(config)[1] + _SLACK
            least, most = other.shift + factor * least, other.shift + factor * most
        else:
            tolerance = 0.1 * (other.clip[1] - other.clip[0])
            least, most = other.clip[0] - tolerance, other.clip[1] + tolerance
        # Conventions that differ by a moderate shift only differ in nothing but loudness.
        like_own = math.isclose(factor, slope) and abs(other.shift - shift) < 3 * factor
        if not like_own and least <= low and high <= most:
            readings[name] = _Reading((values - other.shift) / factor, -math.log(factor))
    readings[INT16] = own._replace(nepers=own.nepers - config.power * math.log(32768))
    if config.log_base != "db":  # decibels of powers and of magnitudes are alike
        factor = 2.0 if config.power == 2 else 0.5
        readings[POWER] = _Reading(own.nepers * factor, own.density + math.log(factor))
    if abs(float(sound.mean())) < 1 and 0.2 < float(sound.std()) < 3:
        mean, deviation = statistics
        readings[STANDARD] = _Reading(values * deviation + mean, deviation.log())
    return readings


def _possible(config: MelConfig) -> tuple[float, float]:
    """Return nepers of the quietest and the loudest band of a waveform in [-1, 1]."""
    # A bin is at most half the window's sum (a full-scale tone), all bins of a band together not
    # much more; the filters' weights are below 2 / (width in Hz), or 1.
    peak = config.window_length / 2
    weight = config.n_fft / config.sample_rate if config.norm == "slaney" else 4.0
    return math.log(config.floor), config.power * math.log(peak) + math.log(weight) + 1.0


def _statistics(model: Any, config: MelConfig) -> _Statistics | None:
    conditioning: Any = getattr(model, "conditioning", None)
    if not hasattr(conditioning, "mel_mean") or not conditioning.mel_mean.any():
        return None  # without mels, or untrained
    mean = conditioning.mel_mean.detach().cpu().double()
    deviation = conditioning.mel_deviation.detach().cpu().double() / abs(per_neper(config))
    mean = (mean - config.shift) / per_neper(config)
    return _Statistics(mean[:, None], deviation[:, None].clamp(min=0.1))


def _fit(
    reading: _Reading,
    statistics: _Statistics,
    name: str,
    heard: Tensor,
    power: float | None = None,
) -> float:
    """Return the mean log-likelihood of the values `heard`, in nats.

    With `power`, that of the mel (1 or 2), the prior of the loudness is included.
    """
    mean, deviation = statistics
    weight, distance = heard * deviation**-2, reading.nepers - mean
    gain = 0.0
    if name != STANDARD:
        gain = float((distance * weight).sum() / weight.sum())
        gain = gain if power is None else min(max(gain, -6 * power), 6 * power)
    z = ((distance - gain) / deviation).abs().clamp(max=_FURTHEST)
    fits = reading.density - 0.5 * z**2 - deviation.log()
    fit = float((fits * heard).sum() / heard.sum())
    return fit if power is None else fit - 0.5 * (gain / (_GAIN_DEVIATION * power)) ** 2


def _explain(
    values: Tensor, config: MelConfig, convention: str | None, statistics: _Statistics | None
) -> str:
    labels = [one.label for one in CONVENTIONS.values() if _same_values(one.of(config), config)]
    quietest, loudest = _possible(config)
    if statistics is not None:
        mean, deviation = statistics
        quietest = max(quietest, float((mean - 3 * deviation).min()))
        loudest = min(loudest, float((mean + 3 * deviation).max()))
    low, high = sorted(config.shift + per_neper(config) * end for end in (quietest, loudest))
    expected = f"the model expects {[*labels, 'other'][0]} mels (range {low:.1f}..{high:.1f})"
    seen = f"range {float(values.min()):.1f}..{float(values.max()):.1f}"
    if convention is None:
        return f"the mel cannot be right ({seen}): {expected}"
    if convention == INT16:
        return (
            f"this looks like mels of a waveform in 16-bit integers ({seen}), {expected}: divide it"
            " by 32768"
        )
    if convention == POWER:
        given, wanted = ("magnitudes", "powers") if config.power == 2 else ("powers", "magnitudes")
        return (
            f"this looks like the logarithm of {given} ({seen}), {expected} of {wanted}, and no"
            f" formula converts one to the other: compute it again with power={config.power:g}"
        )
    if convention == STANDARD:
        return (
            f"this looks like standardised mels, mean 0 and deviation 1 in each band ({seen}),"
            f" {expected}: undo that with the statistics it was done with"
        )
    label, source = CONVENTIONS[convention].label, CONVENTIONS[convention].of(config)
    how = f"{convention} (if all else is as the model's)"
    for name in PRESETS:
        preset = MelConfig.preset(name)
        if _same_values(preset, source) and analysis_differences(preset, config).keys() <= {*MINOR}:
            how = name
            break
    return f"this looks like {label} mels ({seen}), {expected}: pass --mel-preset {how} to convert"


def _same_values(one: MelConfig, other: MelConfig) -> bool:
    if "none" in (one.log_base, other.log_base):
        return (one.log_base, one.clip) == (other.log_base, other.clip)
    return (per_neper(one), one.shift, one.clip) == (per_neper(other), other.shift, other.clip)
