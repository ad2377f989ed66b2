"""Write audio files atomically."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from wavear.audio.waveforms import as_array, check_rate
from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError, require


class _Format(NamedTuple):
    container: str
    encodings: dict[str, str]  # encoding -> libsndfile's subtype; the first is the default


_FORMATS = {
    ".wav": _Format("WAV", {"pcm16": "PCM_16", "pcm24": "PCM_24", "float32": "FLOAT"}),
    ".flac": _Format("FLAC", {"pcm16": "PCM_16", "pcm24": "PCM_24"}),
    ".ogg": _Format("OGG", {"vorbis": "VORBIS", "opus": "OPUS"}),
    ".opus": _Format("OGG", {"opus": "OPUS"}),
}
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_BLOCK = 65536  # samples; libsndfile's Vorbis encoder puts each call's samples on the stack


def write(
    path: str | os.PathLike[str],
    waveform: torch.Tensor | np.ndarray,
    sample_rate: int,
    encoding: str | None = None,
) -> int:
    """Write a waveform as WAV, FLAC or OGG, according to the ending of the name.

    The file appears whole or not at all, and replaces an existing file. `read` returns what was
    written to half a step: 1.6e-5 for 16 bits, 6e-8 for 24, exact for floating point. The level is
    not changed.

    Parameters
    ----------
    path : str or Path
        Ends in .wav, .flac, .ogg or .opus. Its folder must exist.
    waveform : Tensor or array, shape (T,) or (1, T), floating point in [-1, 1]
        Values outside are clipped, except with "float32".
    sample_rate : int
        Hz, 1000 to 384000; Opus supports only 8, 12, 16, 24 and 48 kHz.
    encoding : str, optional
        WAV: "pcm16" (default), "pcm24" or "float32"; FLAC: "pcm16" (default) or "pcm24"; OGG:
        "vorbis" (default) or "opus", at libsndfile's default quality.

    Returns
    -------
    int
        Number of samples that were clipped.

    Raises
    ------
    WavearError
        If the waveform is empty, holds NaN or infinity, or has another shape or type; if the sample
        rate is out of range, the name has another ending, or the format lacks the encoding.
    OSError
        If the file cannot be written. An existing file stays as it was.
    """
    import soundfile

    require(path, (str, os.PathLike), "path", "the name of an audio file")
    target = Path(path)
    container, subtype = _encoding(target, encoding)
    rate = check_rate(sample_rate)
    if subtype == "OPUS" and rate not in _OPUS_RATES:
        rates = ", ".join(map(str, _OPUS_RATES))
        raise WavearError(f"{path}: Opus has no sample rate of {rate} Hz, only {rates}")
    x = as_array(waveform)
    if x.dtype.kind != "f":
        raise WavearError(
            f"{path}: waveform is {x.dtype}, expected floating point in [-1, 1]; "
            "divide 16-bit PCM by 32768"
        )
    if x.ndim == 2 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 1 or not x.size:
        raise WavearError(f"{path}: waveform has shape {x.shape}, expected (T,) or (1, T), T > 0")
    if not np.isfinite(x).all():
        raise WavearError(f"{path}: not written, the waveform holds NaN or infinity")
    clipped = 0 if subtype == "FLOAT" else int((np.abs(x) > 1).sum())
    encoded = io.BytesIO()
    with soundfile.SoundFile(encoded, "w", rate, 1, subtype=subtype, format=container) as file:
        samples = _quantised(x, subtype)
        for first in range(0, len(x), _BLOCK):
            file.write(samples[first : first + _BLOCK])
    try:
        if target.exists() and not target.is_file():
            raise OSError(f"{path}: exists and is not a file, not overwritten")
        replace_file(target, lambda temporary: temporary.write_bytes(encoded.getvalue()))
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    return clipped


def _quantised(x: np.ndarray, subtype: str) -> np.ndarray:
    """Scale by 2**15 or 2**23 as `read` does; libsndfile's 32767 would change samples each time."""
    if subtype == "FLOAT":
        return x.astype(np.float32)
    if subtype not in ("PCM_16", "PCM_24"):
        return np.clip(x, -1, 1).astype(np.float32)
    full = 2**15 if subtype == "PCM_16" else 2**23
    steps = np.clip(np.rint(x.astype(np.float64) * full), -full, full - 1)
    # libsndfile takes 24 bits as the upper bytes of 32.
    return steps.astype(np.int16) if subtype == "PCM_16" else steps.astype(np.int32) * 256


def _encoding(target: Path, encoding: str | None) -> tuple[str, str]:
    """Return libsndfile's names of a file's format and encoding."""
    suffix = target.suffix.lower()
    if suffix not in _FORMATS:
        *known, last = _FORMATS
        raise WavearError(
            f"{target}: can only write {', '.join(known)} and {last}, not"
            f" {target.suffix or 'a name without ending'}"
        )
    container, encodings = _FORMATS[suffix]
    if encoding is None:
        encoding = next(iter(encodings))
    if encoding not in encodings:
        known = " or ".join(encodings)
        raise WavearError(f"{target}: encoding is {encoding!r}, a {suffix} file has {known}")
    return container, encodings[encoding]
