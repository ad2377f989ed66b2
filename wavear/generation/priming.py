"""Going on from a recording: its codes are the past, and one parallel pass over them fills the state of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import Deemphasis, coefficient, emphasised
from wavear.models.base import AutoregressiveModel

if TYPE_CHECKING:
    from wavear.generation.engines import Engine

_SILENT = (
    1e-3  # of full scale, -60 dB: below it speech in 8-bit mu-law is little more than its steps
)
_JUDGED = 100  # samples from which a prime is judged at all
_CLIPPED = 1e-3  # share of samples at full scale from which a prime counts as clipped


def check_prime(prime: Any) -> Tensor:
    """A prime as float32 (B, P) on the CPU.

    Raises
    ------
    ValueError
        If it has another shape or type, is empty, holds NaN, or exceeds full scale.
    """
    waveform = torch.as_tensor(prime).detach().cpu()
    waveform = waveform[None] if waveform.dim() == 1 else waveform
    if waveform.dim() != 2 or waveform.numel() == 0:
        raise ValueError(
            f"prime has shape {tuple(waveform.shape)}, expected (B, T) or (T,) with T above 0"
        )
    if not waveform.is_floating_point():
        raise ValueError(
            f"prime is {waveform.dtype}, expected floating point in [-1, 1] (16-bit PCM: / 32768)"
        )
    if not torch.isfinite(waveform).all():
        raise ValueError("prime holds NaN or infinity")
    peak = float(waveform.abs().max())
    if peak > 1:
        raise ValueError(
            f"prime reaches {peak:g}, expected [-1, 1]: divide it by its peak, or what scales it"
        )
    return waveform.float()


def doubts(prime: Tensor) -> list[str]:
    """What is likely wrong with a prime (B, P), if anything: that it is silent, or clipped."""
    found = []
    for b, row in enumerate(prime.abs() if prime.shape[1] >= _JUDGED else []):
        name = "the prime" if len(prime) == 1 else f"prime {b}"
        peak, clipped = float(row.max()), float((row >= 1 - 2**-12).float().mean())
        if peak < _SILENT:
            level = f"its peak is {20 * np.log10(peak):.0f} dB" if peak else "it is all zeros"
            found.append(f"{name} is silent ({level}): the model goes on from silence")
        elif clipped > _CLIPPED:
            found.append(
                f"{name} is clipped ({clipped:.1%} of its samples are at full scale): the model goes on like it"
            )
    return found


def encode_prime(prime: Tensor, model: AutoregressiveModel) -> np.ndarray:
    """Codes (B, P)."""
    return model.grid.encode(emphasised(prime, coefficient(model.config))).numpy()


def deemphasis_after(prime: Tensor, model: AutoregressiveModel) -> Deemphasis:
    """What takes the pre-emphasis off what follows a prime (P,), P from 0 on: it has heard the prime's own codes."""
    found = Deemphasis(coefficient(model.config))
    if found.a and prime.numel():
        found(model.grid.decode(torch.from_numpy(encode_prime(prime, model))))
    return found


def context(model: AutoregressiveModel, samples: int) -> int:
    """The first of `samples` past samples that the next one depends on, or its state.

    Of a model that carries its state the whole past is filled in: its samples may count from the
    beginning, in patches.
    """
    return (
        0
        if model.receptive_field is None or model.carries
        else max(0, samples - model.receptive_field)
    )


def fill(
    engine: Engine, stream: int, model: AutoregressiveModel, codes: np.ndarray, conditioner: Any
) -> None:
    """Move a stream that has not begun past codes (P,), of whose conditioning `conditioner` is certain."""
    start, stop = context(model, len(codes)), len(codes)
    engine.fill(stream, codes[start:], conditioner.span(start, stop))
