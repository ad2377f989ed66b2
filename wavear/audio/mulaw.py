"""Mu-law companding: waveforms in [-1, 1] to integer codes and back.

With mu = classes - 1, a sample x is companded to

    y = sign(x) * log(1 + mu * abs(x)) / log(1 + mu)

which gives small samples finer steps, and y in [-1, 1] is rounded to one of `classes` even steps.
The ends -1 and 1 are the first and the last code. (ITU-T G.711 approximates this curve for mu = 255
piecewise linearly; van den Oord et al., "WaveNet", 2016, section 2.2, use the curve itself.)

The operations have the order of `torchaudio.functional.mu_law_encoding`, so that both return the
same codes even on the edge between two. float32 suffices for all 65536 classes: its rounding moves
a code by 0.004, and 0.5 is allowed.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from wavear.audio.waveforms import Waveform, as_tensor
from wavear.common.errors import WavearError

MAX_CLASSES = 65536  # 16 bits


def mulaw_encode(waveform: Waveform, classes: int = 256) -> Waveform:
    """Encode a waveform as mu-law codes.

    Parameters
    ----------
    waveform : Tensor or array, any shape, floating point in [-1, 1]
        Values outside, including infinity, are clamped.
    classes : int
        Number of codes Q, 2 to 65536.

    Returns
    -------
    Tensor or array, the shape of `waveform`, int64 in [0, Q)
        A tensor (on the device of `waveform`) for a tensor, a NumPy array for everything else.

    Raises
    ------
    WavearError
        If `waveform` is not floating point or holds NaN, or `classes` is out of range.

    Examples
    --------
    >>> mulaw_encode(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0, 7.0]))
    tensor([  0,  98, 128, 157, 255, 255])
    """
    mu = _check_classes(classes) - 1
    if not isinstance(waveform, Tensor):
        return mulaw_encode(as_tensor(waveform, "waveform"), classes).numpy()
    x = check_waveform(waveform).clamp(-1.0, 1.0)
    y = torch.sign(x) * torch.log1p(mu * torch.abs(x))
    y = y / torch.log1p(torch.tensor(mu, dtype=x.dtype))
    return ((y + 1) / 2 * mu + 0.5).to(torch.int64)  # truncated: rounds to nearest, halves up


def mulaw_decode(codes: Waveform, classes: int = 256) -> Waveform:
    """Decode mu-law codes to a waveform; `mulaw_encode` returns the same codes.

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
    WavearError
        If `codes` are not integers or lie outside [0, Q), or `classes` is out of range.

    Notes
    -----
    An even `classes` has no code for exactly 0: silence (`silence_code`) decodes to half the
    smallest step, 8.6e-5 for 256 classes.

    Examples
    --------
    >>> mulaw_decode(torch.tensor([0, 98, 157, 255]))
    tensor([-1.0000, -0.0102,  0.0102,  1.0000])
    """
    mu = _check_classes(classes) - 1
    if not isinstance(codes, Tensor):
        return mulaw_decode(as_tensor(codes, "codes"), classes).numpy()
    y = check_codes(codes, classes).to(torch.float32) / mu * 2 - 1
    x = torch.exp(torch.abs(y) * torch.log1p(torch.tensor(mu, dtype=y.dtype))) - 1.0
    return (torch.sign(y) * x / mu).clamp(-1.0, 1.0)  # rounding exceeds 1 by one bit at some ends


def silence_code(classes: int = 256) -> int:
    """Return the code of a zero sample: the middle one, Q // 2.

    Raises
    ------
    WavearError
        If `classes` is out of range.

    Examples
    --------
    >>> silence_code(256)
    128
    """
    return _check_classes(classes) // 2  # (0 + 1) / 2 * (Q - 1) + 0.5 = Q / 2, truncated


def check_waveform(waveform: Tensor) -> Tensor:
    """Return a waveform in at least float32, without its graph, or raise WavearError."""
    waveform = as_tensor(waveform, "waveform")
    if not waveform.dtype.is_floating_point:
        raise WavearError(
            f"waveform is {waveform.dtype}, expected floating point in [-1, 1]; "
            "divide 16-bit PCM by 32768"
        )
    if torch.isnan(waveform).any():
        raise WavearError("waveform holds NaN, which has no code")
    return waveform.detach().to(torch.promote_types(waveform.dtype, torch.float32))


def check_codes(codes: Tensor, classes: int) -> Tensor:
    """Return codes as int64, or raise WavearError if they are not integers in [0, classes)."""
    codes = as_tensor(codes, "codes")
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise WavearError(f"codes are {codes.dtype}, expected integers in [0, {classes})")
    codes = codes.to(torch.int64)
    if codes.numel():
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= classes:
            raise WavearError(f"codes reach from {low} to {high}, outside [0, {classes})")
    return codes


def _check_classes(classes: int) -> int:
    try:
        count = operator.index(classes)
    except TypeError:
        raise WavearError(
            f"classes is {classes!r}, expected an integer from 2 to {MAX_CLASSES}"
        ) from None
    if isinstance(classes, bool) or not 2 <= count <= MAX_CLASSES:
        raise WavearError(f"classes is {classes!r}, expected 2 to {MAX_CLASSES}")
    return count
