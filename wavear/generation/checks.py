"""Refusals that all fast engines share: wrong shapes, codes out of range, non-finite values."""

from __future__ import annotations

from typing import Any

import numpy as np

from wavear.common.errors import WavearError
from wavear.models import saving
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import FrameConditioning


def check_batch(batch: int) -> None:
    """Refuse an empty batch."""
    if batch < 1:
        raise WavearError(f"batch is {batch}, it must be at least 1")


def check_weights(weights: str, known: tuple[str, ...]) -> None:
    """Refuse weights that an engine does not have."""
    if weights not in known:
        raise WavearError(f"weights is {weights!r}, it must be one of {', '.join(known)}")


def check_finite_weights(model: AutoregressiveModel) -> None:
    """Refuse a model whose weights are not finite; compiled engines would score NaN."""
    if name := saving.non_finite(model.state_dict()):
        raise WavearError(
            f"the model's {name} holds NaN or infinity, from a training that diverged: use another"
            " checkpoint of the run"
        )


def check_streams(shape: tuple[int, ...], batch: int) -> None:
    """Refuse arrays that are not (B, n) for the streams of an engine."""
    if len(shape) != 2 or shape[0] != batch:
        raise WavearError(f"shape {tuple(shape)} for {batch} streams: expected ({batch}, n)")


def check_codes(codes: np.ndarray, classes: int) -> None:
    """Refuse codes out of range."""
    if codes.size and not 0 <= codes.min() <= codes.max() < classes:
        raise WavearError(
            f"codes reach from {codes.min()} to {codes.max()}, expected 0 to {classes - 1}"
        )


def check_condition(model: AutoregressiveModel, cond: Any, batch: int, samples: int) -> None:
    """Refuse conditioning that the model does not take, or whose shape does not fit."""
    if not model.conditioned:
        if cond is not None:
            raise WavearError("the model is unconditional, and cond is given")
        return
    channels = model.config.conditioning_channels
    if isinstance(cond, FrameConditioning):  # its channels are gates, and more
        channels = cond.shape[1]
    expected = f"({batch}, {channels}, {samples})"
    if cond is None:
        raise WavearError(f"the model is conditioned: cond must have shape {expected}")
    shape = tuple(cond.shape)
    if len(shape) != 3 or shape[:2] != (batch, channels) or shape[2] not in (1, samples):
        raise WavearError(f"cond has shape {shape}, expected {expected} or (.., .., 1)")


def check_finite(wrong: np.ndarray, start: int = 0) -> None:
    """Refuse a call whose law is not finite where `wrong` (B, n), that begins at sample `start`."""
    if wrong.any():
        first = start + int(np.flatnonzero(wrong.any(axis=0))[0])
        raise non_finite(first)


def non_finite(sample: int) -> WavearError:
    """Return the error for a sample whose law is not finite."""
    return WavearError(
        f"the network's values for sample {sample} of this call are infinite or NaN:"
        " check the model's weights"
    )
