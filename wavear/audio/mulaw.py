"""Mu-law companding: waveforms in [-1, 1] to integer codes and back; the one place that knows which code is silence.

With mu = classes - 1, a sample x is bent by

    y = sign(x) * log(1 + mu * abs(x)) / log(1 + mu)

which spends the codes where the ear (and speech) needs them, near zero, and y in [-1, 1] is rounded
to one of `classes` even steps. The ends -1 and 1 are the first and the last code. (ITU-T G.711
approximates this curve for mu = 255 by straight pieces; van den Oord et al., "WaveNet", 2016,
section 2.2, use the curve itself, as torchaudio does and we do.)

The order of the operations is that of `torchaudio.functional.mu_law_encoding`, so that both give
the same codes even on the edge between two. float32 suffices for all 65536 classes: its rounding
moves a code by 0.004, 0.5 is allowed.
"""

from __future__ import annotations

import operator
from typing import Any, overload

import numpy as np
import torch

MAX_CLASSES = 65536  # 16 bits


@overload
def mulaw_encode(waveform: torch.Tensor, classes: int = 256) -> torch.Tensor: ...
@overload
def mulaw_encode(waveform: np.ndarray, classes: int = 256) -> np.ndarray: ...
def mulaw_encode(waveform: Any, classes: int = 256) -> Any:
    """Waveform to mu-law codes.

    Parameters
    ----------
    waveform : Tensor or array, any shape, floating point in [-1, 1]
        What lies outside, infinity too, is clamped.
    classes : int
        Number of codes Q, 2 to 65536.

    Returns
    -------
    Tensor or array, the shape of `waveform`, int64 in [0, Q)
        A tensor (on the device of `waveform`) for a tensor, a NumPy array for everything else.

    Raises
    ------
    ValueError
        If `waveform` is not floating point or holds NaN, or `classes` is out of range.

    Examples
    --------
    >>> mulaw_encode(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0, 7.0]))
    tensor([  0,  98, 128, 157, 255, 255])
    """
    mu = _check_classes(classes) - 1
    if not isinstance(waveform, torch.Tensor):
        return mulaw_encode(_to_tensor(waveform, "waveform"), classes).numpy()
    if not waveform.dtype.is_floating_point:
        raise ValueError(
            f"waveform is {waveform.dtype}, expected floating point in [-1, 1] (16-bit PCM: / 32768)"
        )
    x = waveform.detach()
    if x.dtype.itemsize < 4:  # half precision has fewer digits than 1024 classes need
        x = x.to(torch.float32)
    if torch.isnan(x).any():
        raise ValueError("waveform holds NaN, which has no code")
    x = x.clamp(-1.0, 1.0)
    y = (
        torch.sign(x)
        * torch.log1p(mu * torch.abs(x))
        / torch.log1p(torch.tensor(mu, dtype=x.dtype))
    )
    return ((y + 1) / 2 * mu + 0.5).to(
        torch.int64
    )  # to() drops the fraction: this rounds, halves up


@overload
def mulaw_decode(codes: torch.Tensor, classes: int = 256) -> torch.Tensor: ...
@overload
def mulaw_decode(codes: np.ndarray, classes: int = 256) -> np.ndarray: ...
def mulaw_decode(codes: Any, classes: int = 256) -> Any:
    """Mu-law codes to waveform; `mulaw_encode` gives back the same codes.

    Parameters
    ----------
    codes : Tensor or array, any shape, integer in [0, Q)
    classes : int
        Number of codes Q, 2 to 65536.

    Returns
    -------
    Tensor or array, the shape of `codes`, float32 in [-1, 1]
        A tensor (on the device of `codes`) for a tensor, a NumPy array for everything else.

    Raises
    ------
    ValueError
        If `codes` are not integers or lie outside [0, Q), or `classes` is out of range.

    Notes ----- An even `classes` has no code for exactly 0: silence (`silence_code`) decodes to
    half the smallest step, 8.6e-5 for 256 classes.

    Examples
    --------
    >>> mulaw_decode(torch.tensor([0, 98, 157, 255]))
    tensor([-1.0000, -0.0102,  0.0102,  1.0000])
    """
    mu = _check_classes(classes) - 1
    if not isinstance(codes, torch.Tensor):
        return mulaw_decode(_to_tensor(codes, "codes"), classes).numpy()
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}, expected integers in [0, {classes})")
    codes = codes.to(torch.int64)
    if codes.numel():
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= classes:
            raise ValueError(
                f"codes reach from {low} to {high}, outside [0, {classes}) of {classes} classes"
            )
    y = codes.to(torch.float32) / mu * 2 - 1
    x = (
        torch.sign(y)
        * (torch.exp(torch.abs(y) * torch.log1p(torch.tensor(mu, dtype=y.dtype))) - 1.0)
        / mu
    )
    return x.clamp(-1.0, 1.0)  # rounding passes 1 by one bit in some classes


def silence_code(classes: int = 256) -> int:
    """The code of a zero sample, `mulaw_encode` of 0: the middle one, Q // 2.

    Parameters
    ----------
    classes : int
        Number of codes Q, 2 to 65536.

    Raises
    ------
    ValueError
        If `classes` is out of range.

    Examples
    --------
    >>> silence_code(256)
    128
    """
    return _check_classes(classes) // 2  # (0 + 1) / 2 * (Q - 1) + 0.5 = Q / 2, its fraction dropped


def _check_classes(classes: int) -> int:
    try:
        count = operator.index(classes)
    except TypeError:
        raise ValueError(
            f"classes is {classes!r}, expected an integer from 2 to {MAX_CLASSES}"
        ) from None
    if isinstance(classes, bool) or not 2 <= count <= MAX_CLASSES:
        raise ValueError(f"classes is {classes!r}, expected 2 to {MAX_CLASSES}")
    return count


def _to_tensor(values: Any, name: str) -> torch.Tensor:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} of type {array.dtype} cannot be read as numbers")
    dtype = (
        np.int64
        if array.dtype.kind != "f"
        else np.float64
        if array.dtype.itemsize > 4
        else np.float32
    )
    # A copy in native byte order: torch refuses negative strides and warns about read-only memory.
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))
