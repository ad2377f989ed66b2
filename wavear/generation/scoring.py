"""Scoring: waveform -> codes -> `forward` or an engine -> log-probability of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import coefficient, emphasised
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.audio.scale import limited
from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.generation.checks import check_finite_weights
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine, require_float32
from wavear.generation.inputs import Mel, prepare
from wavear.generation.progress import chunks
from wavear.generation.settings import Sampling
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel, check_model
from wavear.models.distributions import log_prob_on

logger = get_logger(__name__)

PARALLEL_CHUNK = 16384  # samples per forward, besides the receptive field in front of them


def score(
    model: AutoregressiveModel,
    waveform: Tensor | np.ndarray,
    mel: Mel | None = None,
    *,
    speaker: int | str | Sequence[int | str] | Tensor | None = None,
    grid: str | None = None,
    engine: str = "parallel",
    weights: str = "float32",
    threads: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the log-probability of every sample of a recording, log P(x_t | x_<t, c).

    Parameters
    ----------
    model : AutoregressiveModel
    waveform : Tensor or array, shape (B, T) or (T,), floating point in [-1, 1]
        At the model's sample rate. Samples beyond are clipped, with a warning; a waveform that is
        mostly beyond is refused.
    mel : optional
        As in `generate`; a model that needs one takes the waveform's own by default.
    speaker : optional
        As in `generate`.
    grid : str, optional
        The codes that are scored, so that models of different codes compare: "linear", 16-bit
        samples, or "mulaw", 256 mu-law codes (see `log_prob_on`); None: the model's own codes.
        Needs engine "parallel".
    engine : str
        "parallel": `model.forward` over long chunks, in memory that does not grow with T. Others:
        by stepping, as in generation.
    weights, threads
        See `make_engine`.
    progress : bool
        Show a bar with the real-time factor.

    Returns
    -------
    Tensor, shape (B, T), float64, in nats
        The negative of its mean, over log(2), is the bits per sample.

    Raises
    ------
    WavearError
        If an argument does not fit the model.
    """
    check_model(model)
    waveform = as_tensor(waveform, "waveform")
    waveform = waveform[None] if waveform.dim() == 1 else waveform
    if waveform.dim() != 2 or waveform.shape[1] == 0:
        raise WavearError(
            f"waveform has shape {tuple(waveform.shape)}, expected (B, T) or (T,) with T above 0"
        )
    if not waveform.is_floating_point():
        raise WavearError(f"waveform is {waveform.dtype}, expected floating point in [-1, 1]")
    waveform = limited(waveform, "waveform", logger.warning)
    batch, total = waveform.shape
    if model.config.mel is not None and mel is None:  # its own, the last frame filled with zeros
        missing = -total % model.config.mel.hop_length
        mel = log_mel(torch.nn.functional.pad(waveform.float(), (0, missing)), model.config.mel)
    speakers = Sampling(speaker=speaker).speakers(model)
    conditioner, number = prepare(model, mel, speakers, utterances=batch)
    if number != batch:
        raise WavearError(
            f"the numbers do not agree: {number} mels or speakers, {batch} utterances"
        )
    if conditioner.lengths is not None and min(conditioner.lengths) < total:
        raise WavearError(
            f"the mel covers {min(conditioner.lengths)} samples and the waveform has {total}"
        )
    on = _common_grid(model, grid, engine)
    codes = model.grid.encode(emphasised(waveform.cpu(), coefficient(model.config)))
    if engine == "parallel":
        require_float32(weights, engine)
        check_finite_weights(model)
        return score_parallel(model, codes, conditioner, progress, grids=[on])[0]
    with torch.inference_mode():
        name, runner = make_engine(model, batch, engine, weights=weights, threads=threads)
        scores = np.empty((batch, total))
        for start, stop in chunks(total, progress, model.config.sample_rate, batch, name):
            scores[:, start:stop] = runner.score(
                codes[:, start:stop].numpy(), conditioner.span(start, stop)
            )
    return torch.from_numpy(scores)


@torch.inference_mode()
def score_parallel(
    model: AutoregressiveModel,
    codes: Tensor,
    conditioner: Conditioner,
    progress: bool = False,
    first: int = 0,
    state: Any = None,
    grids: Sequence[Grid] | None = None,
) -> Tensor:
    """Score codes (B, T) by `forward` in chunks, each after its receptive field or from a state.

    The scores are those of codes[:, first:], (B, T - first); the codes before are their past. The
    `state` of a model that carries one is at `first`, and is advanced to T. With `grids` the scores
    are (len(grids), B, T - first), one row per grid.
    """
    device = next(model.parameters()).device
    batch, total = codes.shape
    carries = model.carries
    if carries and state is None:
        state = model.init_state(batch)
    previous = (
        codes[:, first - 1].to(device)
        if first
        else torch.full((batch,), model.start_code, device=device)
    )
    on = [model.grid] if grids is None else grids
    scores = torch.empty(len(on), batch, total - first, dtype=torch.float64)
    rate = model.config.sample_rate
    for a, b in chunks(total - first, progress, rate, batch, "parallel", PARALLEL_CHUNK):
        start, stop = first + a, first + b
        context = 0 if carries else min(start, model.receptive_field or 0)
        span = codes[:, start - context : stop].to(device)
        given = conditioner.span(start - context, stop)
        parameters = model(span, given, state, previous) if carries else model(span, given)
        previous = span[:, -1]
        numbers, span = parameters[:, :, context:].double(), span[:, context:]
        for row, grid in zip(scores, on, strict=True):
            row[:, a:b] = log_prob_on(model.law, numbers, span, grid).cpu()
    return scores[0] if grids is None else scores


def _common_grid(model: AutoregressiveModel, name: str | None, engine: str) -> Grid:
    if name is None:
        return model.grid
    if not isinstance(name, str) or name not in COMMON_GRIDS:
        raise WavearError(
            f"grid is {name!r}; it must be {' or '.join(COMMON_GRIDS)}, or None for the model's own"
            " codes"
        )
    if engine != "parallel":
        raise WavearError(
            f"engine {engine!r} scores the model's own codes: grid={name!r} needs engine 'parallel'"
        )
    if emphasis := coefficient(model.config):
        raise WavearError(
            f"the codes are of pre-emphasised audio ({emphasis:g}): they have no bits on another"
            " grid"
        )
    return COMMON_GRIDS[name]
