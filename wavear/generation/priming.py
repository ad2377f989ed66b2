"""Continuation of a recording: one parallel pass over its codes fills the state of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import Deemphasis, coefficient, emphasised
from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError
from wavear.generation.engine import Engine
from wavear.models.base import AutoregressiveModel

# Of full scale, -60 dB: below it speech in 8-bit mu-law is little more than its steps.
_SILENT = 1e-3
_JUDGED = 100  # shorter primes, in samples, are not judged
_CLIPPED = 1e-3  # share of samples at full scale above which a prime counts as clipped


def check_prime(prime: Any) -> Tensor:
    """Return a prime as float32 (B, P) on the CPU.

    A `WavearError` reports that its shape or type is wrong, or it holds NaN or exceeds full scale.
    """
    waveform = as_tensor(prime, "prime").cpu()
    waveform = waveform[None] if waveform.dim() == 1 else waveform
    if waveform.dim() != 2 or waveform.numel() == 0:
        raise WavearError(
            f"prime has shape {tuple(waveform.shape)}, expected (B, T) or (T,) with T above 0"
        )
    if not waveform.is_floating_point():
        raise WavearError(
            f"prime is {waveform.dtype}, expected floating point in [-1, 1] (16-bit PCM: / 32768)"
        )
    if not torch.isfinite(waveform).all():
        raise WavearError("prime holds NaN or infinity")
    peak = float(waveform.abs().max())
    if peak > 1:
        raise WavearError(f"prime reaches {peak:g}, expected [-1, 1]: divide it by its peak")
    return waveform.float()


def doubts(prime: Tensor) -> list[str]:
    """Describe primes (B, P) that are silent or clipped."""
    found = []
    for b, row in enumerate(prime.abs() if prime.shape[1] >= _JUDGED else []):
        name = "the prime" if len(prime) == 1 else f"prime {b}"
        peak, clipped = float(row.max()), float((row >= 1 - 2**-12).float().mean())
        if peak < _SILENT:
            level = f"its peak is {20 * np.log10(peak):.0f} dB" if peak else "it is all zeros"
            found.append(f"{name} is silent ({level}): the model continues from silence")
        elif clipped > _CLIPPED:
            found.append(
                f"{name} is clipped ({clipped:.1%} of its samples are at full scale): the model"
                " continues alike"
            )
    return found


def encode_prime(prime: Tensor, model: AutoregressiveModel) -> np.ndarray:
    """Return codes (B, P)."""
    return model.grid.encode(emphasised(prime, coefficient(model.config))).numpy()


def deemphasis_after(prime: Tensor, model: AutoregressiveModel) -> Deemphasis:
    """Return the de-emphasis of audio after a prime (P,), with the memory of its codes."""
    found = Deemphasis(coefficient(model.config))
    if found.a and prime.numel():
        found(model.grid.decode(torch.from_numpy(encode_prime(prime, model))))
    return found


def context(model: AutoregressiveModel, samples: int) -> int:
    """Return the first of `samples` past samples that the next one, or its state, depends on.

    It is 0 for a model that carries its state, whose samples may count from the start, in patches.
    """
    if model.receptive_field is None or model.carries:
        return 0
    return max(0, samples - model.receptive_field)


def fill(
    engine: Engine, stream: int, model: AutoregressiveModel, codes: np.ndarray, conditioner: Any
) -> None:
    """Move a new stream past codes (P,), whose conditioning `conditioner` has."""
    start, stop = context(model, len(codes)), len(codes)
    engine.fill(stream, codes[start:], conditioner.span(start, stop))
