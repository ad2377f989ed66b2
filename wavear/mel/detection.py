"""Whether a mel is what a model was trained on: by what it says of itself, or else by its numbers.

The numbers tell conventions apart because a model keeps the mean and deviation of each band over
its training data. A convention supposes that value v stands for the band exp(t) with t = (v -
shift) / slope; how likely the values are,

    log p(v) = mean over bands and frames of log N(t; mean_b + gain, deviation_b) - log(slope),

says how well it fits, whatever the loudness: `gain` is the best one, whose size counts against it
(a deviation of 2.5, 22 dB of magnitudes). The convention that fits best is not the model's own:
then the mel is doubtful, or wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from wavear.mel.conversion import analysis_differences, convert_mel, per_neper
from wavear.mel.presets import PRESETS
from wavear.mel.spectrogram import MelConfig

# What the values of mels of one analysis may be.
CONVENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ln": ("natural-logarithm", {"log_base": "e", "scale": 1.0, "shift": 0.0, "clip": None}),
    "log10": ("log10", {"log_base": "10", "scale": 1.0, "shift": 0.0, "clip": None}),
    "db": ("decibel", {"log_base": "db", "scale": 1.0, "shift": 0.0, "clip": None}),
    "db01": ("0-to-1", {"log_base": "db", "scale": 0.01, "shift": 1.0, "clip": (0.0, 1.0)}),
    "db01-ref20": (
        "0-to-1 (20 dB down)",
        {"log_base": "db", "scale": 0.01, "shift": 0.8, "clip": (0.0, 1.0)},
    ),
    "db4-ref20": ("-4-to-4", {"log_base": "db", "scale": 0.08, "shift": 2.4, "clip": (-4.0, 4.0)}),
    "linear": (
        "linear (no logarithm)",
        {"log_base": "none", "scale": 1.0, "shift": 0.0, "clip": None},
    ),
}
INT16, STANDARD = "integer-waveform", "standardised"

# Differences that are heard at the ends of a recording or near the floor, if anywhere.
_MINOR = ("padding", "power_offset", "power_floor")
# Nats per value. Of 90 recordings of eight kinds (speech, music, sounds), by the statistics of one
# reader, 2 pass the first as mels of the right convention and none the second; in log10 for natural
# 75 the first and 69 the second.
_DOUBTFUL, _WRONG = 0.3, 1.0
_GAIN_DEVIATION = 2.5  # nepers
_FURTHEST = 5.0  # deviations, from which on a value counts no more
_SLACK = 3.0  # nepers beyond what a recording in [-1, 1] can hold that a network may predict


@dataclass(frozen=True)
class MelVerdict:
    """What `judge_mel` found."""

    verdict: Literal["fits", "doubtful", "wrong"]
    reason: str = ""
    """In one line: what is wrong, and what to do."""
    convention: str | None = None
    """What the values look like, if not like the model's: a name `wavear.adapt_mel` takes for `source`, or else
    "integer-waveform" (of a waveform in integers, not in [-1, 1]) or "standardised" (mean 0,
    deviation 1 per band)."""


class ConditionedModel(Protocol):
    """The parts of an `AutoregressiveModel` that detection reads."""

    @property
    def config(self) -> Any: ...
    @property
    def conditioning(self) -> Any: ...


class Expectation:
    """A model of which nothing is known but its mels."""

    def __init__(self, mel: MelConfig):
        self.config = self
        self.mel = mel


def judge_mel(
    mel: torch.Tensor | np.ndarray,
    model: ConditionedModel | Expectation,
    *,
    seconds: float | None = None,
) -> MelVerdict:
    """Judge by its numbers a mel that says nothing of itself: bands, frames, range, distribution.

    Parameters
    ----------
    mel : Tensor or array, shape (M, F)
    model : AutoregressiveModel, or another with `config.mel` and `conditioning`
        Conditioned on mels. One that was never trained knows no distribution; then the range alone
        is judged.
    seconds : float, optional
        How long its audio should be.

    Returns
    -------
    MelVerdict
    """
    config = model.config.mel
    if config is None:
        return MelVerdict(
            "wrong", "the model takes no mel: it was trained without mel conditioning"
        )
    values = torch.as_tensor(mel)
    shape = tuple(values.shape)
    if len(shape) != 2 or 0 in shape or not values.is_floating_point():
        kind = "floating point" if values.is_floating_point() else str(values.dtype)
        return MelVerdict(
            "wrong", f"the mel is {kind} of shape {shape}, expected floating point, (bands, frames)"
        )
    if shape[0] != config.bands:
        if shape[1] == config.bands:
            reason = (
                f"the mel has shape {shape}: it seems transposed, frames first; give its transpose"
            )
        else:
            known = [name for name in PRESETS if MelConfig.preset(name).bands == shape[0]]
            hint = f" ({', '.join(known)} has as many)" if known and shape[0] != 80 else ""
            reason = f"the mel has {shape[0]} bands, the model was trained on {config.bands}{hint}"
        return MelVerdict("wrong", reason)
    values = values.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        frame = int((~torch.isfinite(values)).any(dim=0).nonzero()[0])
        return MelVerdict("wrong", f"the mel holds NaN or infinity, first in frame {frame}")
    if seconds is not None and (reason := _wrong_rate(shape[1], seconds, config)):
        return MelVerdict("wrong", reason)
    return _judge_values(values, model, config)


def adapt_mel(
    mel: torch.Tensor | np.ndarray,
    model: ConditionedModel | Expectation,
    source: MelConfig | str | None = None,
    *,
    seconds: float | None = None,
    force: bool = False,
    warn: Callable[[str], object] | None = None,
) -> torch.Tensor:
    """A mel as the model expects it: converted if it is said what it is, else judged by its numbers.

    Parameters
    ----------
    mel : Tensor or array, shape (M, F)
    model : AutoregressiveModel, or another with `config.mel` and `conditioning`
        Conditioned on mels.
    source : MelConfig or str, optional
        What the mel is: a configuration, the name of a preset, or what its values are where all
        else is as the model's: ln, log10, db, db01 (decibels from -100 to 0 as 0 to 1), db01-ref20,
        db4-ref20, linear.
    seconds : float, optional
        How long its audio should be; refused if the frames say otherwise.
    force : bool
        Take it although it is judged wrong or differs in what cannot be converted; not where the
        bands differ.
    warn : callable, optional
        Is told, in one line, what is doubtful; by default a UserWarning is issued.

    Returns
    -------
    Tensor, shape (M, F), float32

    Raises
    ------
    ValueError
        If it is not what the model expects and cannot be made so.
    """
    say = warn or (lambda line: warnings.warn(line, stacklevel=3))
    target: MelConfig = model.config.mel
    given = torch.as_tensor(mel)
    if source is None:
        judged = judge_mel(given, model, seconds=seconds)
        if judged.verdict == "wrong" and not (
            force and given.dim() == 2 and given.shape[0] == target.bands
        ):
            raise ValueError(judged.reason)
        if judged.verdict != "fits":
            say(judged.reason)
        return given.float()
    if (
        given.dim() != 2
        or 0 in given.shape
        or given.shape[0] != target.bands
        or not given.is_floating_point()
    ):
        raise ValueError(judge_mel(given, Expectation(target)).reason)
    # Not the range: it is that of `source`.
    if seconds is not None and (reason := _wrong_rate(given.shape[1], seconds, target)):
        raise ValueError(reason)
    config = describe_source(source, target)
    differing = analysis_differences(config, target)
    told = [f"{name} {ours!r}, the model {theirs!r}" for name, (ours, theirs) in differing.items()]
    if any(name not in _MINOR for name in differing) and (not force or "bands" in differing):
        half = differing.keys() <= {"centre", *_MINOR}
        shift = 500 * target.hop_length / target.sample_rate
        hint = (
            f" (all but {shift:.1f} ms of delay, half a frame, is the same: force takes it)"
            if half
            else ""
        )
        raise ValueError(
            f"it is not the mel the model was trained on: it has {'; '.join(told)}{hint}"
        )
    if told:
        say(f"the mel is taken although it has {'; '.join(told)}")
    try:
        return convert_mel(given, config, target, ignore=list(differing)).float()
    except ValueError as error:
        say(f"{error}; they stay where they are")
        return convert_mel(given, config, target, ignore=[*differing, "floor", "clip"]).float()


def describe_source(source: MelConfig | str, target: MelConfig) -> MelConfig:
    """The configuration that a preset's or a convention's name stands for, beside a model of mels `target`."""
    if isinstance(source, MelConfig):
        return source
    if source in CONVENTIONS:
        return replace(target, **CONVENTIONS[source][1])
    return MelConfig.preset(source)


def _wrong_rate(frames: int, seconds: float, config: MelConfig) -> str:
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"the mel should make {seconds:g} s of audio: that must be above 0 and finite"
        )
    expected = seconds * config.frame_rate
    if abs(frames - expected) <= 2 + 0.01 * expected:
        return ""
    rate = frames / seconds
    hop = config.sample_rate / rate
    fitting = [
        name
        for name in PRESETS
        if abs(MelConfig.preset(name).frame_rate - rate) <= 0.01 * rate + 2 / seconds
        and MelConfig.preset(name).frame_rate != config.frame_rate
    ]
    return (
        f"the mel has {frames} frames for {seconds:g} s, {rate:.1f} per second (a hop of {hop:.0f} samples at"
        f" {config.sample_rate} Hz{', as ' + ' and '.join(fitting) if fitting else ''}), the model expects"
        f" {config.frame_rate:.1f} per second (a hop of {config.hop_length})"
    )


def _judge_values(values: torch.Tensor, model: Any, config: MelConfig) -> MelVerdict:
    low, high = float(values.min()), float(values.max())
    quietest, loudest = _possible(config)
    mean, deviation = _statistics(model, config)
    # The ways to read the values, in nepers of the band: value -> neper, and the mean logarithm of
    # its slope.
    own = _line(config)
    readings: dict[str, tuple[torch.Tensor, float]] = {}
    if own is not None:
        readings["own"] = (values - own[1]) / own[0], -math.log(abs(own[0]))
    for name, (_, fields) in CONVENTIONS.items():
        line = _line(replace(config, **fields))
        if line is None:
            if low >= 0:
                floor = config.floor or 1e-10
                t = values.clamp(min=floor).log()
                readings[name] = t, -float(torch.where(values > floor, t, 0.0).mean())
            continue
        slope, shift = line
        bounds = fields["clip"] or (
            shift + slope * (math.log(1e-10) - 1),
            shift + slope * (loudest + _SLACK),
        )
        margin = 0.1 * (bounds[1] - bounds[0]) if fields["clip"] else 0.0
        # Conventions that differ by a shift alone are, but for very large ones, told apart by
        # nothing but loudness.
        like_own = (
            own is not None and math.isclose(slope, own[0]) and abs(shift - own[1]) < 3 * slope
        )
        if not like_own and bounds[0] - margin <= low and high <= bounds[1] + margin:
            readings[name] = (values - shift) / slope, -math.log(slope)
    if own is not None:
        readings[INT16] = (
            (values - own[1]) / own[0] - config.power * math.log(32768),
            -math.log(abs(own[0])),
        )
    if mean is not None and deviation is not None:
        if abs(float(values.mean())) < 1 and 0.2 < float(values.std()) < 3:
            readings[STANDARD] = values * deviation + mean, float(deviation.log().mean())
        fits = {
            name: _fit(t, slope, mean, deviation, name) for name, (t, slope) in readings.items()
        }
    else:
        fits = {}
    best = max(fits, key=fits.__getitem__, default="own")
    margin = fits[best] - fits["own"] if "own" in fits else 0.0
    outside = _outside(readings.get("own", (values, 0.0))[0], quietest, loudest)
    if best == "own" and not outside:
        return MelVerdict("fits")
    verdict = (
        "wrong" if outside or margin > _WRONG else "doubtful" if margin > _DOUBTFUL else "fits"
    )
    if verdict == "fits":
        return MelVerdict("fits")
    convention = best if best != "own" else None
    reason = _explain(low, high, config, convention, mean, deviation, outside)
    return MelVerdict(verdict, reason, convention)


def _line(config: MelConfig) -> tuple[float, float] | None:
    """Slope and shift from nepers to values; None where no logarithm is taken."""
    return None if config.log_base == "none" else (per_neper(config), config.shift)


def _possible(config: MelConfig) -> tuple[float, float]:
    """Nepers of the quietest and the loudest band of a waveform in [-1, 1]."""
    if config.log_base == "none":
        return -math.inf, math.inf
    # A bin is half the window's sum at most (a full-scale tone), all bins of a band together not
    # much more; the filters' weights are below 2 / (width in Hz), or 1.
    peak = config.window_length / 2
    weight = 2 * config.n_fft / config.sample_rate / 2 if config.norm == "slaney" else 4.0
    return math.log(config.floor), config.power * math.log(peak) + math.log(weight) + 1.0


def _statistics(model: Any, config: MelConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(M, 1) mean and deviation of each band over the training data, in nepers; None of a model without."""
    conditioning, line = getattr(model, "conditioning", None), _line(config)
    if conditioning is None or line is None or not hasattr(conditioning, "mel_mean"):
        return None, None
    mean, deviation = (
        getattr(conditioning, name).detach().cpu().double()
        for name in ("mel_mean", "mel_deviation")
    )
    if not mean.any():
        return None, None
    return ((mean - line[1]) / line[0])[:, None], (deviation / abs(line[0]))[:, None].clamp(min=0.1)


def _fit(
    t: torch.Tensor, slope: float, mean: torch.Tensor, deviation: torch.Tensor, name: str
) -> float:
    """Mean log-likelihood of the values, in nats, read as `t`."""
    weight = deviation**-2
    gain = (
        float((((t - mean) * weight).mean() / weight.mean()).clamp(-6, 6))
        if name != STANDARD
        else 0.0
    )
    z = ((t - mean - gain) / deviation).abs().clamp(max=_FURTHEST)
    return (
        -float(0.5 * (z**2).mean() + deviation.log().mean())
        + slope
        - 0.5 * (gain / _GAIN_DEVIATION) ** 2
    )


def _outside(t: torch.Tensor, quietest: float, loudest: float) -> bool:
    return bool(t.min() < quietest - _SLACK or t.max() > loudest + _SLACK)


def _explain(
    low: float,
    high: float,
    config: MelConfig,
    convention: str | None,
    mean: torch.Tensor | None,
    deviation: torch.Tensor | None,
    outside: bool,
) -> str:
    own = next(
        (
            text
            for text, fields in CONVENTIONS.values()
            if _same_values(replace(config, **fields), config)
        ),
        None,
    )
    quietest, loudest = _possible(config)
    if mean is not None and deviation is not None:
        quietest = max(quietest, float((mean - 3 * deviation).min()))
        loudest = min(loudest, float((mean + 3 * deviation).max()))
    line = _line(config)
    ends = (
        (quietest, loudest)
        if line is None
        else sorted(line[1] + line[0] * end for end in (quietest, loudest))
    )
    expected = f"the model expects {own or 'other'} mels (range {ends[0]:.1f}..{ends[1]:.1f})"
    seen = f"range {low:.1f}..{high:.1f}"
    if convention is None:
        return f"the mel cannot be right ({seen}): {expected}"
    if convention == INT16:
        return f"this looks like mels of a waveform in 16-bit integers ({seen}), {expected}: divide it by 32768"
    if convention == STANDARD:
        return (
            f"this looks like standardised mels, mean 0 and deviation 1 in each band ({seen}), {expected}: undo that "
            "with the statistics it was done with"
        )
    source = replace(config, **CONVENTIONS[convention][1])
    presets = [
        name
        for name in PRESETS
        if _same_values(MelConfig.preset(name), source)
        and not analysis_differences(MelConfig.preset(name), config).keys() - set(_MINOR)
    ]
    how = (
        f"--mel-preset {presets[0]}"
        if presets
        else f"--mel-preset {convention} (if all else is as the model's)"
    )
    return f"this looks like {CONVENTIONS[convention][0]} mels ({seen}), {expected}: pass {how} to convert"


def _same_values(one: MelConfig, other: MelConfig) -> bool:
    return (_line(one), one.clip, one.log_base == "none") == (
        _line(other),
        other.clip,
        other.log_base == "none",
    )
