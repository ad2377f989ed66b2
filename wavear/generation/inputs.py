"""Checks of the mels and counts of utterances that a model is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError, require
from wavear.generation.conditioner import Conditioner
from wavear.mel.conventions import Frames
from wavear.mel.features import FeatureConfig
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel

_MOST_SAMPLES = 2**31
Mel = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]


def prepare(
    model: AutoregressiveModel, mel: Mel | None, speakers: list[int] | None, **given: int
) -> tuple[Conditioner, int]:
    """Return the conditioner of a batch, and the number of its utterances.

    `given` are other numbers of utterances, by name; all must agree, and 1 fits any.
    """
    mels = check_mel(mel, model.config.mel)
    counts = {} if mels is None else {"mels": len(mels)}
    others = {"speakers": len(speakers or [None]), **given}
    counts |= {name: count for name, count in others.items() if count > 1}
    if len(set(counts.values())) > 1:
        stated = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise WavearError(f"the numbers do not agree: {stated}")
    number = next(iter(counts.values()), 1)
    if speakers is not None and len(speakers) == 1:
        speakers = speakers * number
    return Conditioner(model, mels, speakers), number


def check_mel(mel: Any, config: Frames | None) -> list[Tensor] | None:
    """Return the mels (M, F) of a batch; None for a model without mel conditioning."""
    if config is None:
        if mel is not None:
            raise WavearError("the model takes no mel: it was trained without mel conditioning")
        return None
    if mel is None:
        raise WavearError(
            f"the model needs a mel: {config.bands} bands, one frame per {config.hop_length}"
            " samples"
            if isinstance(config, MelConfig)
            else f"the model needs features: {config.bands} channels, one frame per"
            f" {config.hop_length} samples"
        )
    if isinstance(mel, Tensor | np.ndarray):
        mel = list(mel) if mel.ndim == 3 else [mel]
    require(mel, Iterable, "mel", "a tensor or array (B, M, F) or (M, F), or a sequence of them")
    if isinstance(mel, str | bytes):
        raise WavearError(f"mel is {mel!r:.60}, expected numbers: read the file, or use log_mel")
    mels = [as_tensor(m, "mel") for m in mel]
    if not mels:
        raise WavearError("there is no mel: the batch is empty")
    if isinstance(config, FeatureConfig):
        mels = [config.values(m) for m in mels]
    for m in mels:
        if m.dim() != 2:
            raise WavearError(f"mel has shape {tuple(m.shape)}, expected (B, M, F) or (M, F)")
        if m.shape[0] != config.bands:
            transposed = "; it seems transposed, frames first" if m.shape[1] == config.bands else ""
            raise WavearError(
                f"mel has {m.shape[0]} bands, the model was trained on {config.bands}{transposed}"
            )
        if m.shape[1] == 0:
            raise WavearError("mel has no frames")
        if not m.is_floating_point():
            raise WavearError(f"mel is {m.dtype}, expected floating point")
        if not torch.isfinite(m).all():
            raise WavearError("mel holds NaN or infinity")
    return mels


def check_samples(
    lengths: list[int] | None, samples: int | None, batch: int, begin: int
) -> list[int]:
    """Return the samples to make of each utterance, after the `begin` samples of a prime."""
    if samples is not None and (
        isinstance(samples, bool)
        or not isinstance(samples, int | np.integer)
        or not 1 <= samples <= _MOST_SAMPLES
    ):
        raise WavearError(
            f"samples is {samples!r}; it must be a whole number, 1 to {_MOST_SAMPLES}"
        )
    if lengths is None:
        if samples is None:
            raise WavearError("samples is needed: no mel determines the length of the audio")
        return [int(samples)] * batch
    covered = min(lengths)
    if begin >= covered:
        raise WavearError(
            f"the mel covers {covered} samples and the prime has {begin}: it must cover both the"
            " prime and the audio to make"
        )
    if samples is None:
        return [length - begin for length in lengths]
    if begin + samples > covered:
        after = f" after a prime of {begin}" if begin else ""
        raise WavearError(
            f"the frames cover {covered} samples, and {samples} are asked for{after}: give more"
            " frames, or ask for less"
        )
    return [int(samples)] * batch
