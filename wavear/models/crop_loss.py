"""Crops as the input of a model, and their loss, shared by training and validation."""

from __future__ import annotations

import math
from typing import Any

import torch

from wavear.audio.emphasis import coefficient
from wavear.data.crops import Batch, Layout, coded, mel_of
from wavear.models.base import AutoregressiveModel


def layout_of(model: AutoregressiveModel, segment: int) -> Layout:
    """Return the layout for crops of `model` with at least `segment` samples of loss."""
    mel = model.config.mel
    hop = 1 if mel is None else mel.hop_length
    field = 0 if model.carries else model.receptive_field or 0
    return Layout(
        segment=max(math.ceil(segment / hop), 1) * hop,
        context=math.ceil(field / hop) * hop,
        receptive_field=field,
        hop=hop,
        lookahead=0 if mel is None else model.lookahead,
        lookback=0 if mel is None else model.lookback,
        mel=mel,
        sample_rate=model.config.sample_rate,
        pre_emphasis=coefficient(model.config),
    )


def inputs(
    model: AutoregressiveModel,
    batch: Batch,
    layout: Layout,
    noise: torch.Generator | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Return the arguments of `forward`, computed on the device of `batch`.

    Returns
    -------
    codes : (B, window) int64
    cond : (B, C, window), (B, C, 1), a FrameConditioning or None
    mask : (B, window) bool, where loss is carried
    """
    codes = model.grid.encode(coded(batch, layout))
    places = torch.arange(layout.window, device=codes.device)
    mask = (places >= batch.span[:, :1]) & (places < batch.span[:, 1:])
    mel = None
    if layout.mel is not None:
        mel = mel_of(batch, layout)
        if noise is not None and dropout > 0:
            drawn = torch.rand(mel.shape[0], 1, mel.shape[2], generator=noise, device=mel.device)
            mel = torch.where(drawn < dropout, model.conditioning.mel_mean[:, None], mel)
    speaker = batch.speaker if model.config.speakers else None
    cond = model.condition(mel, speaker, padded=True) if model.conditioned else None
    return codes, cond, mask


def crop_loss(
    model: AutoregressiveModel,
    batch: Batch,
    layout: Layout,
    dtype: torch.dtype | None = None,
    noise: torch.Generator | None = None,
    input_noise: float = 0.0,
    carried: tuple[Any, torch.Tensor] | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of every sample in nats, and the mask, (B, window) each.

    It is 0 where no loss is carried.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Run the layers in it, activations and all, on copies of the weights; gradients arrive at the
        weights in their own type. (Autocast leaves the additions between the layers in float32,
        whose traffic costs a third of the time on a CPU.) Conditioning and loss stay in float32.
    noise : torch.Generator, optional
        Add noise of amount `input_noise` to the past that the model sees, not to the targets
        (`model.input_noise`): so it learns to correct its own errors and to use the conditioning.
    dropout : float
        Share of mel frames that `noise` replaces by the mean of the training data.
    carried : optional
        State and previous code: the window continues from there, and the state is advanced.
    """
    codes, cond, mask = inputs(model, batch, layout, noise, dropout)
    given: dict[str, Any] = {"codes": codes}
    if noise is not None and input_noise > 0:
        given = model.input_noise(codes, input_noise, noise)
    if carried is not None:
        given["state"], given["previous"] = carried
    if dtype is None:
        parameters = model(cond=cond, **given)
    else:
        named = model.named_parameters()
        weights = {n: p.to(dtype) for n, p in named if not n.startswith("conditioning.")}
        given["cond"] = None if cond is None else cond.to(dtype)
        parameters = torch.func.functional_call(model, weights, (), given)
    # bf16 would round the loss.
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    return -model.law.log_prob(parameters, codes) * mask, mask
