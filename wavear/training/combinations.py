"""Settings of a `TrainConfig` that exclude each other, or that nothing would read: all refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from wavear.common.errors import WavearError
from wavear.training.mel_settings import MEL_FIELDS

_OWN_MELS = " ".join(MEL_FIELDS)
_MELS = f"mel_preset {_OWN_MELS} conditioning_dropout"
_OF_STEPS = (
    "input_noise segment batch_size accumulate optimizer learning_rate muon_learning_rate"
    " weight_decay gradient_clip ema_decay precision compile activation_checkpointing warmup_steps"
    " hold validate_every validate_seconds validation_seconds checkpoint_every keep_last"
    " max_steps max_minutes"
)


def refuse_contradictions(config: Any) -> None:
    """Raise a `WavearError` for settings that exclude each other."""
    if config.max_steps is None and config.max_minutes is None:
        raise WavearError("the run needs an end: set max_steps, max_minutes, or both")
    if config.resume and config.overwrite:
        raise WavearError("resume continues a run and overwrite replaces it: choose one")
    if config.extend_speakers and not (config.resume and config.speakers):
        raise WavearError("extend_speakers is for a resumed run with speakers: add --resume")
    batch = config.defaults.batch_size if config.batch_size is None else config.batch_size
    if batch % config.accumulate:
        raise WavearError(f"a batch of {batch} does not divide into {config.accumulate} parts")
    if config.unconditional and config.family == "predictive":
        raise WavearError("a predictive model needs mels: drop --unconditional or --family")
    if config.free_run and config.family != "predictive":
        raise WavearError(f"the family {config.family} has no training by the free run: drop it")
    if config.family == "linear":
        if config.resume:
            raise WavearError("a linear model has nothing to resume: drop resume")
        if config.speakers:
            raise WavearError("a linear model has no speakers: drop speakers")
        _refuse(config, "mel_preset", "a linear model takes no mels")
    else:
        _refuse(config, "criterion stabilise", f"the family {config.family} has no {{}}")
    if config.features is None:
        _refuse(config, "feature_hop feature_classes", "there are no features")
    elif config.family == "predictive":
        raise WavearError("a predictive model needs mels: drop --features or --family")
    else:
        _refuse(config, f"mels mel_preset {_OWN_MELS}", "the model takes features, not mels")
    if config.frames is not None:
        why = "frames from files are of the recordings as they are; change the recordings instead"
        _refuse(config, "trim_silence normalize", why)
    if config.family == "linear":
        _refuse(config, "mels features", "a linear model takes no mels")
    if config.unconditional:
        _refuse(config, "conditioning_dropout mels features", "unconditional models have no mels")
    elif config.mel_preset:
        _refuse(config, _OWN_MELS, f"mel_preset {config.mel_preset!r} sets the mels")


def refuse_unused(config: Any) -> None:
    """Raise a `WavearError` for settings that another makes useless.

    For the command line, where someone typed each of them; a recipe's values may go unused.
    """
    if config.from_checkpoint is None:
        if config.family == "linear":
            _refuse(config, _MELS, "a linear model takes no mels")
            _refuse(config, _OF_STEPS, "a linear model is fitted in closed form, without steps")
        elif config.unconditional:
            _refuse(config, _MELS, "unconditional models have no mels")
    if config.validation is not None:
        _refuse(config, "validation_fraction", "validation is held out as a whole")
    if config.normalize == "none":
        _refuse(config, "normalize_by", "levels stay as they are without normalize")
    if (config.optimizer or config.defaults.optimizer) != "muon":
        _refuse(config, "muon_learning_rate", "the optimizer is adamw")


def _refuse(config: Any, names: str, why: str) -> None:
    """Refuse those of the settings that differ from their defaults."""
    for field in dataclasses.fields(config):
        if field.name not in names.split():
            continue
        value = getattr(config, field.name)
        if value not in (field.default, getattr(config.defaults, field.name, field.default)):
            raise WavearError(f"{why.format(field.name)}: drop {field.name} {value!r}")
