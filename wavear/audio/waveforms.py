"""Operations on waveforms: peak level, fades, resampling, trimming of silence.

A waveform is a mono tensor or array of shape (T,), floating point in [-1, 1].
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError, require

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 384_000  # Hz

Waveform = TypeVar("Waveform", Tensor, np.ndarray)


def normalize_peak(waveform: Waveform, decibels: float = -1.0) -> Waveform:
    """Scale each row so that its largest sample has a given level.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
        Rows of zeros stay as they are.
    decibels : float
        Relative to full scale, -200 to 0.

    Raises
    ------
    WavearError
        If `decibels` is out of range.

    Examples
    --------
    >>> normalize_peak(torch.tensor([0.1, -0.25]), 0.0)
    tensor([ 0.4000, -1.0000])
    """
    require(decibels, numbers.Real, "decibels", "a number, -200 to 0")
    if not -200 <= decibels <= 0:
        raise WavearError(f"the peak is {decibels} dB, expected -200 to 0")
    waveform = _samples(waveform)
    level = 10 ** (decibels / 20)
    if isinstance(waveform, Tensor):
        peak = waveform.abs().amax(-1, keepdim=True)
        return waveform * (level / torch.where(peak == 0, 1.0, peak))
    peak = np.abs(waveform).max(-1, keepdims=True)
    return waveform * (level / np.where(peak == 0, 1, peak)).astype(waveform.dtype)


def fade(waveform: Waveform, sample_rate: int, milliseconds: float) -> Waveform:
    """Fade a waveform in and out along half a period of a cosine.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
    sample_rate : int
        Hz.
    milliseconds : float
        Length of each fade, 0 or more; at most half of the waveform.

    Raises
    ------
    WavearError
        If `sample_rate` or `milliseconds` is out of range.

    Examples
    --------
    >>> fade(torch.ones(6), 1000, 2.0)
    tensor([0.1464, 0.8536, 1.0000, 1.0000, 0.8536, 0.1464])
    """
    require(milliseconds, numbers.Real, "milliseconds", "a number, 0 or more")
    if not 0 <= milliseconds < math.inf:
        raise WavearError(f"the fade is {milliseconds} ms, expected 0 or more")
    waveform = _samples(waveform)
    total = waveform.shape[-1]
    count = min(round(milliseconds * check_rate(sample_rate) / 1000), total // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / max(count, 1))
    gain = np.concatenate([ramp, np.ones(total - 2 * count), ramp[::-1]])
    if isinstance(waveform, Tensor):
        return waveform * torch.from_numpy(gain).to(waveform.device, waveform.dtype)
    return waveform * gain.astype(waveform.dtype)


def resample(waveform: Waveform, from_rate: int, to_rate: int) -> Waveform:
    """Change the sample rate with soxr (VHQ).

    The passband is flat to 0.9 of the lower Nyquist frequency, 3 dB down at 0.95, without aliases;
    linear phase, without delay. The result of a crop equals the crop of the result to 1e-6 if the
    crop begins on a sample of both rates and 256 samples of the lower rate are dropped at its ends.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
    from_rate, to_rate : int
        Hz, 1000 to 384000.

    Returns
    -------
    Tensor or array like `waveform`, shape (..., round(T * to_rate / from_rate)), half rounded up
        On the device of `waveform`; computed on the CPU.

    Raises
    ------
    WavearError
        If a rate is out of range, or `waveform` is not floating point, or has no samples.

    Examples
    --------
    >>> resample(torch.zeros(2, 44100), 44100, 16000).shape
    torch.Size([2, 16000])
    """
    from_rate, to_rate = check_rate(from_rate), check_rate(to_rate)
    x = as_array(waveform)
    if x.dtype.kind != "f" or x.ndim == 0 or not x.size:
        raise WavearError(
            f"waveform is {x.dtype} of shape {x.shape}, expected floating point of shape (..., T)"
        )
    if from_rate == to_rate:
        return waveform
    rows = x.reshape(-1, x.shape[-1])
    y = np.stack([resample_row(row, from_rate, to_rate) for row in rows])
    y = y.reshape(*x.shape[:-1], -1)
    if isinstance(waveform, Tensor):
        return torch.from_numpy(y).to(waveform.device, waveform.dtype)
    return y.astype(x.dtype)


def trim_silence(
    waveform: Waveform,
    top_db: float = 60.0,
    margin: int = 1024,
    frame_length: int = 2048,
    hop_length: int = 512,
) -> Waveform:
    """Cut silence off both ends like `librosa.effects.trim`, but with a margin.

    A frame is silent if its root mean square is more than `top_db` below that of the loudest frame.

    Parameters
    ----------
    waveform : Tensor or array, shape (T,), floating point
    top_db : float
        Decibels below the loudest frame, more than 0.
    margin : int
        Samples of silence to keep at each end.
    frame_length, hop_length : int
        Samples; frames are centred on multiples of `hop_length`, with zeros beyond the ends.

    Returns
    -------
    Tensor or array like `waveform`
        A view; the whole waveform if it is silent throughout.

    Raises
    ------
    WavearError
        If `waveform` is not one-dimensional floating point, or a setting is out of range.

    Examples
    --------
    >>> beep = torch.cat([torch.zeros(8000), torch.ones(4000), torch.zeros(8000)])
    >>> len(trim_silence(beep, margin=512))
    7168
    """
    require(top_db, numbers.Real, "top_db", "a number above 0")
    if not top_db > 0:
        raise WavearError(f"top_db is {top_db}, expected more than 0")
    margin = check_count("margin", margin, 0)
    frame, hop = check_count("frame_length", frame_length), check_count("hop_length", hop_length)
    x = as_array(waveform)
    if x.dtype.kind != "f" or x.ndim != 1:
        raise WavearError(
            f"waveform is {x.dtype} of shape {x.shape}, expected floating point of shape (T,)"
        )
    first, last = sounding([x], top_db, margin, frame, hop)
    return waveform[first:last]


def sounding(
    blocks: Iterable[np.ndarray],
    top_db: float,
    margin: int,
    frame: int = 2048,
    hop: int = 512,
) -> tuple[int, int]:
    """Return the samples [first, last) that `trim_silence` keeps of a signal in blocks (T_i,)."""
    # The energy of a frame is the difference of the cumulative energy at its ends, which are
    # multiples of `step`.
    step = math.gcd(frame, frame // 2, hop)
    marks, energy, total = [np.zeros(1)], 0.0, 0
    for x in blocks:
        cumulative = np.cumsum(np.concatenate([[energy], x.astype(np.float64) ** 2]))[1:]
        marks.append(cumulative[(-total - 1) % step :: step].copy())
        total += len(x)
        energy = float(cumulative[-1]) if len(x) else energy
    at = np.concatenate(marks)

    def until(places: np.ndarray) -> np.ndarray:
        inside = at[places.clip(0, total) // step]
        return np.where(places >= total, energy, inside)

    begins = np.arange(0, total + 1, hop) - frame // 2
    powers = until(begins + frame) - until(begins)
    loud = np.flatnonzero(powers > powers.max() * 10 ** (-top_db / 10))
    if not loud.size:
        return 0, total
    return max(int(loud[0]) * hop - margin, 0), min((int(loud[-1]) + 1) * hop + margin, total)


def _samples(waveform: Any) -> Any:
    """Return a tensor or array of floating point, shape (..., T) with T above 0."""
    waveform = as_tensor(waveform, "waveform") if isinstance(waveform, Tensor) else waveform
    x = as_array(waveform)
    if x.dtype.kind != "f" or x.ndim == 0 or not x.size:
        raise WavearError(
            f"waveform is {x.dtype} of shape {x.shape}, expected floating point of shape (..., T)"
        )
    return waveform if isinstance(waveform, Tensor) else x


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Return round(samples * to_rate / from_rate), half rounded up."""
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def resample_row(x: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample an array of shape (T,) as `resample` does, without checks."""
    return np.concatenate(list(resample_blocks([x], from_rate, to_rate)))


def resample_blocks(
    blocks: Iterable[np.ndarray], from_rate: int, to_rate: int
) -> Iterator[np.ndarray]:
    """Resample a signal that comes in blocks (T_i,); the same bits as for the whole."""
    import soxr

    stream, taken, made = None, 0, 0
    for block in blocks:
        kind = np.float64 if block.dtype.itemsize > 4 else np.float32
        stream = stream or soxr.ResampleStream(
            from_rate, to_rate, 1, dtype=np.dtype(kind).name, quality="VHQ"
        )
        taken += len(block)
        y = stream.resample_chunk(block.astype(kind, copy=False))
        made += len(y)
        yield y
    if stream is not None:
        # soxr rounds the length of its result in floating point, which can drop the last sample. It
        # assumes zeros beyond the end, so appending some changes only the length.
        y = stream.resample_chunk(np.zeros(from_rate // to_rate + 1, kind), last=True)
        yield y[: max(resampled_length(taken, from_rate, to_rate) - made, 0)]


def as_array(waveform: Tensor | np.ndarray) -> np.ndarray:
    """Return a waveform as a NumPy array; refuse anything else than numbers."""
    if not isinstance(waveform, Tensor):
        as_tensor(waveform, "waveform")
        return np.asarray(waveform)
    waveform = as_tensor(waveform, "waveform").cpu()
    exact = waveform.dtype in (torch.float16, torch.float32, torch.float64)
    keep = exact or not waveform.is_floating_point()  # NumPy has no bfloat16 and no 8-bit types
    return (waveform if keep else waveform.float()).numpy()


_INTEGERS = ("int8", "int16", "int32", "uint8")


def as_tensor(values: Any, name: str) -> Tensor:
    """Return a tensor without its gradient; arrays and lists become one of a type that torch has.

    Raises
    ------
    WavearError
        If `values` is not an array of numbers; the message has `name`.
    """
    if isinstance(values, Tensor):
        if values.is_meta or values.layout != torch.strided:
            raise WavearError(f"{name} is a tensor without its own values: expected a dense one")
        small = values.is_floating_point() and values.dtype.itemsize == 1  # few operations have it
        return values.detach().float() if small else values.detach()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # rows of several lengths, lists of tensors
        raise WavearError(f"{name} is a {type(values).__name__} of unequal parts") from None
    if array.dtype.kind not in "fiu":
        shown = f" ({values!r:.60})" if isinstance(values, str | os.PathLike) else ""
        remedy = ": read the file first, recordings with wavear.audio.read" if shown else ""
        raise WavearError(
            f"{name} is a {type(values).__name__}{shown}, of type {array.dtype}, which cannot be"
            f" read as numbers{remedy}"
        )
    kind = "i8" if array.dtype.kind != "f" else "f8" if array.dtype.itemsize > 4 else "f4"
    kind = array.dtype.name if array.dtype.name in _INTEGERS else kind
    # A copy in native byte order: torch refuses negative strides and warns about read-only memory.
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))


def check_rate(sample_rate: int) -> int:
    """Return a sample rate, or raise WavearError if it is out of range."""
    rate = check_count("sample_rate", sample_rate)
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise WavearError(
            f"sample rate is {rate} Hz, expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
        )
    return rate


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return an integer, or raise WavearError if it is less than `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise WavearError(f"{name} is {value!r}, expected an integer") from None
    if not least <= count < 2**62 or isinstance(value, bool):
        raise WavearError(f"{name} is {value!r}, expected {least} or more")
    return count
