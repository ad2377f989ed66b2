"""One rule for samples beyond full scale: they are clipped, with a warning that gives their share.

A file or array of which most samples are beyond is refused: it is not in [-1, 1], but holds 16-bit
values as floating point, say. Lossy decoders and resampling filters overshoot where a recording is
near full scale; that is clipped without a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError

_MOST = 0.5  # share beyond full scale of the samples other than zeros, from which on we refuse


def share_beyond(counts: np.ndarray) -> float:
    """Return the share of samples beyond full scale, of the `counts` of their blocks summed up.

    Raises
    ------
    WavearError
        If most samples other than zeros are beyond; the message has no name.
    """
    beyond, sound, total = counts.tolist()
    if beyond > _MOST * sound:
        raise WavearError(
            f"{beyond / total:.1%} of the samples exceed full scale, expected [-1, 1]: divide"
            " 16-bit values by 32768, or others by their peak"
        )
    return beyond / max(total, 1)


def counts(samples: np.ndarray) -> np.ndarray:
    """Return the numbers of samples that exceed full scale, that are not zero, and of all, (3,)."""
    size = np.abs(samples[np.isfinite(samples)])
    return np.array([(size > 1).sum(), (size > 0).sum(), size.size], np.int64)


def limited(
    waveform: Tensor, name: Any, warn: Callable[[str], object], floating: bool = True
) -> Tensor:
    """Return a waveform clipped to [-1, 1].

    Parameters
    ----------
    waveform : Tensor, floating point
    name : str or Path
        For messages.
    warn : callable
        Gets the warning.
    floating : bool
        False for the samples of a codec or of integers: they only overshoot.

    Raises
    ------
    WavearError
        If most of it is beyond full scale.
    """
    if not floating:
        return waveform.clamp(-1, 1)
    try:
        share = share_beyond(counts(waveform.detach().cpu().float().numpy()))
    except WavearError as error:
        raise WavearError(f"{name}: {error}") from None
    if not share:
        return waveform
    warn(f"{name}: {_percent(share)} of the samples exceed full scale and are clipped")
    return torch.clamp(waveform, -1, 1)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 else "less than 0.01%"
