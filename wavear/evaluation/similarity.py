"""How near a synthesized file is to the recording that its mel was taken from, in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from wavear import audio
from wavear.common.log import get_logger
from wavear.evaluation.metrics import MEASURES, measure
from wavear.generation.jobs import Job
from wavear.generation.scoring import score
from wavear.mel.mel_files import is_mel
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

_NAMES = ("pesq", "stoi", "log_mel")


def similarity(
    model: AutoregressiveModel, recording: torch.Tensor, made: torch.Tensor, speaker: Any = None
) -> dict[str, float]:
    """Measure audio that a model made of a recording's mel.

    Parameters
    ----------
    model : AutoregressiveModel
    recording, made : Tensor, shape (T,) and (T',), float32 in [-1, 1], at the model's rate
        They are compared as far as both reach.
    speaker : int or str, optional
        For a model with speakers.

    Returns
    -------
    dict: "bits" per sample of the recording under the model, and those of "pesq", "stoi" (1 at
        most) and "log_mel" (nats) that can be measured; see docs/evaluation.md
    """
    length = min(len(recording), len(made))
    x, y = recording[:length], made[:length]
    nats = score(model, x[None], speaker=speaker)
    rate = model.config.sample_rate
    values, _ = measure(x.numpy(), y.numpy(), rate, names=_NAMES)
    return {"bits": -float(nats.mean()) / math.log(2)} | values


def report_similarity(model: AutoregressiveModel, jobs: Sequence[Job], speaker: Any = None) -> None:
    """Log the similarity of each job's target to its source, if that is a recording."""
    rate = model.config.sample_rate
    for job in jobs:
        if is_mel(job.source):
            continue
        x, y = (torch.as_tensor(audio.read(p, sample_rate=rate)) for p in (job.source, job.target))
        values = similarity(model, x, y, speaker)
        texts = [f"{values.pop('bits'):.2f} bits per sample"]
        for name, value in values.items():
            about = MEASURES[name]
            texts.append(f"{about.title} {value:.{about.decimals}f}")
        logger.info("%s  %s", job.target, ", ".join(texts))
