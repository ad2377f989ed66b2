"""Lossless compression: range coding by the exact distribution of every sample.

    16-bit samples -> codes -> engine step, range coder -> bytes

The decoder computes the same distributions, sample by sample, on the same engine. The encoder
compares each of them with that of `model.forward`, so a file is only written if `step` and
`forward` agree: its size is the likelihood that `wavear.score` reports.

A file: `_HEADER`, the bytes of each channel's stream as uint32, for a model with mels the step of
their levels as float32, the streams. A stream begins with the mel, in levels. Where a code stands
for several 16-bit values (mu-law), it ends with the values, as equally likely.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.audio.emphasis import coefficient
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.audio.reading import read_pcm16
from wavear.common.atomic import check_target, replace_file
from wavear.common.errors import WavearError
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine
from wavear.generation.progress import chunks
from wavear.generation.scoring import score_parallel
from wavear.generation.states import describe
from wavear.mel.spectrogram import log_mel
from wavear.models.base import AutoregressiveModel
from wavear.models.checkpoint import LATER

ARITHMETIC = 1
"""Version of the engines' rounding: to be raised by a change that moves a bit of any distribution,
since older files cannot be decoded after it (`tests/test_compression.py` has their digests)."""
TOLERANCE = 0.01
"""Largest difference in nats between the log-probabilities of a sample by `step` and `forward`, for
a likely one; it grows with the surprise."""
ENDINGS = {".wav": "WAV", ".flac": "FLAC"}

_MAGIC = b"wvar"
_HEADER = struct.Struct("<4sBBIQI8s")  # magic, arithmetic, channels, rate, samples, CRC-32, model
_HALF = 2**15
_STEP = 0.5  # of a mel's levels, in its standard deviations: finer and coarser ones cost more bits
_PCM = COMMON_GRIDS["linear"]


@dataclass(frozen=True)
class Compressed:
    """A recording that was compressed or restored."""

    samples: int
    """Number, over all channels."""
    sample_rate: int
    """Hz."""
    channels: int
    size: int
    """Bytes of the compressed file."""
    engine: str

    @property
    def bits(self) -> float:
        """Bits per sample, the header included."""
        return 8 * self.size / self.samples


def compress(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: AutoregressiveModel | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Compressed:
    """Compress a recording without loss.

    Parameters
    ----------
    source : str or Path
        A 16-bit WAV or FLAC file; its samples are kept, its tags are not.
    out : str or Path
    model : AutoregressiveModel, optional
        At the rate of the recording, without speakers; the decoder needs it too. Of one with mels
        the file stores the mel, coarsely. None: linear prediction that adapts to the recording, for
        any rate (`wavear.generation.cpu.adaptive`).
    overwrite : bool
    progress : bool

    Raises
    ------
    WavearError
        If the recording or the model is not suited, or `step` and `forward` differ.
    """
    check_target(Path(out), overwrite, Path(source))
    pcm, rate = read_pcm16(source)
    grid = _check_model(model, rate, str(source))
    values = pcm.astype(np.int64) + _HALF
    codes, ranks, counts = _coarse(values, grid)
    name, engine = _engine(model, len(codes))
    coders = np.tile(_coding().new_coder(), (len(codes), 1))
    streams = np.zeros((len(codes), 0), np.uint8)
    levels, step = _levels(model, pcm)
    if levels.size:
        streams = _room(streams, coders, levels[0].size)
        for each in zip(coders, streams, levels, strict=True):
            _coding().settle_levels(*each, _coding().ENCODE)
    conditioner = _conditioner(model, levels, step)
    scores = np.empty(codes.shape)
    for start, stop in chunks(codes.shape[1], progress, rate, len(codes), name):
        streams = _room(streams, coders, stop - start)
        part = np.ascontiguousarray(codes[:, start:stop])
        scores[:, start:stop] = engine.code(part, _span(conditioner, start, stop), coders, streams)
    if model is not None:
        conditioner = _conditioner(model, levels, step)
        assert conditioner is not None
        expected = score_parallel(model, torch.from_numpy(codes), conditioner).numpy()
        _check_scores(scores, expected, str(source))
    if grid != _PCM:
        streams = _room(streams, coders, codes.shape[1])
        _coding().settle_evenly(coders, streams, ranks, counts, _coding().ENCODE)
    parts = [_coding().finished(*each) for each in zip(coders, streams, strict=True)]
    header = _HEADER.pack(
        _MAGIC, ARITHMETIC, len(pcm), rate, pcm.shape[1], zlib.crc32(pcm.tobytes()), _digest(model)
    )
    sizes = struct.pack(f"<{len(parts)}I", *map(len, parts))
    sizes += struct.pack("<f", step) if levels.size else b""
    data = header + sizes + b"".join(parts)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(out), lambda path: path.write_bytes(data))
    return Compressed(pcm.size, rate, len(pcm), len(data), name)


def decompress(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: AutoregressiveModel | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Compressed:
    """Restore the recording that `compress` was given: every sample is equal, or it is refused.

    Parameters
    ----------
    source : str or Path
    out : str or Path
        A WAV or FLAC file.
    model : AutoregressiveModel, optional
        The one that `compress` was given.
    overwrite, progress : bool

    Raises
    ------
    WavearError
        If the file is damaged, or was made with another model or arithmetic.
    """
    target = Path(out)
    check_target(target, overwrite, Path(source))
    if target.suffix.lower() not in ENDINGS:
        raise WavearError(f"{out}: its name must end in {' or '.join(ENDINGS)}")
    data = Path(source).read_bytes()
    channels, rate, samples, checksum, step, parts = _parse(str(source), data, model)
    grid = _check_model(model, rate, str(source))
    name, engine = _engine(model, channels)
    longest = max(map(len, parts))
    streams = np.zeros((channels, longest + 8), np.uint8)
    for row, part in zip(streams, parts, strict=True):
        row[: len(part)] = np.frombuffer(part, np.uint8)
    coders = np.stack([_coding().new_decoder(row) for row in streams])
    levels = np.zeros((channels, *_mel_shape(model, samples)), np.int64)
    if levels.size:
        for each in zip(coders, streams, levels, strict=True):
            _coding().settle_levels(*each, _coding().DECODE)
    conditioner = _conditioner(model, levels, step)
    codes = np.empty((channels, samples), np.int64)
    for start, stop in chunks(samples, progress, rate, channels, name):
        part = np.zeros((channels, stop - start), np.int64)
        engine.code(part, _span(conditioner, start, stop), coders, streams, decode=True)
        if (coders[:, _coding().POSITION] > longest + 16).any():
            raise WavearError(f"{source} is damaged: its streams end before its samples")
        codes[:, start:stop] = part
    values = codes
    if grid != _PCM:
        first, counts = _parts_of(codes, grid)
        ranks = np.empty_like(codes)
        _coding().settle_evenly(coders, streams, ranks, counts, _coding().DECODE)
        values = first + ranks
    pcm = (values - _HALF).astype(np.int16)
    if zlib.crc32(pcm.tobytes()) != checksum:
        raise WavearError(
            f"{source} is damaged, or this machine's arithmetic differs from that which compressed"
            " it: the CRC-32 of the samples does not match"
        )
    _write(target, pcm, rate)
    return Compressed(pcm.size, rate, channels, len(data), name)


def _parse(
    name: str, data: bytes, model: AutoregressiveModel | None
) -> tuple[int, int, int, int, float, list[bytes]]:
    """Return channels, rate, samples, checksum, step of the levels of a mel, and streams."""
    if data[:4] != _MAGIC or len(data) < _HEADER.size:
        raise WavearError(f"{name} is not a file that `wavear compress` wrote")
    _, arithmetic, channels, rate, samples, checksum, digest = _HEADER.unpack_from(data)
    if arithmetic != ARITHMETIC:
        raise WavearError(
            f"{name} has arithmetic {arithmetic}, this version of wavear has {ARITHMETIC}:"
            " decompress it with the version that compressed it"
        )
    if digest != (mine := _digest(model)):
        if digest == _digest(None):
            raise WavearError(f"{name} was compressed without a checkpoint: drop --checkpoint")
        given = "none is given" if model is None else f"given is {mine.hex()}"
        raise WavearError(
            f"{name} was compressed with the model {digest.hex()}, and {given}: pass the"
            " --checkpoint that it was compressed with"
        )
    sizes, step = struct.Struct(f"<{channels}I"), 1.0
    total = _HEADER.size + sizes.size + 4 * (model is not None and model.config.mel is not None)
    lengths = sizes.unpack_from(data, _HEADER.size) if len(data) >= total else ()
    if total > _HEADER.size + sizes.size and lengths:
        (step,) = struct.unpack_from("<f", data, total - 4)
    if not lengths or total + sum(lengths) != len(data) or not 0 < step < math.inf:
        raise WavearError(f"{name} is damaged: it has {len(data)} bytes, not those of its header")
    # A sample takes 2^-22 bits or more: a number that nothing backs would only take memory.
    if samples > 2**25 * (max(lengths) + 1):
        raise WavearError(f"{name} is damaged: its header has {samples} samples")
    parts = []
    for length in lengths:
        parts.append(data[total : total + length])
        total += length
    return channels, rate, samples, checksum, step, parts


def _mel_shape(model: AutoregressiveModel | None, samples: int) -> tuple[int, int]:
    """Return bands and frames of the mel that a file stores."""
    if model is None or (config := model.config.mel) is None:
        return 0, 0
    return config.bands, -(-samples // config.hop_length)


def _levels(model: AutoregressiveModel | None, pcm: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mel of each channel in whole levels (C, M, F), and their step."""
    bands, frames = _mel_shape(model, pcm.shape[1])
    if model is None or not bands:
        return np.zeros((len(pcm), 0, 0), np.int64), 1.0
    hop = model.config.mel.hop_length
    waveform = torch.from_numpy(pcm.astype(np.float32) / _HALF)
    waveform = torch.nn.functional.pad(waveform, (0, frames * hop - pcm.shape[1]))
    mel = log_mel(waveform, model.config.mel).double().numpy()
    step = float(np.float32(max(float(mel.std()) * _STEP, np.abs(mel).max() / 100, 1e-3)))
    return np.rint(mel / step).astype(np.int64), step


def _conditioner(
    model: AutoregressiveModel | None, levels: np.ndarray, step: float
) -> Conditioner | None:
    if model is None:
        return None
    mels = [torch.from_numpy((each * step).astype(np.float32)) for each in levels]
    return Conditioner(model, mels if levels.size else None, None)


def _span(conditioner: Conditioner | None, start: int, stop: int) -> Any:
    with torch.inference_mode():
        return None if conditioner is None else conditioner.span(start, stop)


def _coding() -> Any:
    from wavear.generation.cpu import coding

    return coding


def _engine(model: AutoregressiveModel | None, batch: int) -> tuple[str, Any]:
    if model is None:
        from wavear.generation.cpu.adaptive import Adaptive

        return "adaptive", Adaptive(batch)
    with torch.inference_mode():
        return make_engine(model, batch, "numba")


def _check_model(model: AutoregressiveModel | None, rate: int, name: str) -> Grid:
    """Return the grid of the codes; refuse a model that cannot compress."""
    if model is None:
        return _PCM
    config = model.config
    if config.speakers:
        raise WavearError(
            "the model is conditioned on speakers, which a file does not name: use a model without,"
            " or drop --checkpoint"
        )
    if coefficient(config):
        raise WavearError(
            "the model's codes are of pre-emphasised audio, which rounds: use another, or drop"
            " --checkpoint"
        )
    if config.sample_rate != rate:
        raise WavearError(
            f"{name} has a rate of {rate} Hz and the model {config.sample_rate} Hz: drop"
            " --checkpoint, or resample the recording"
        )
    if model.grid != _PCM and _PCM.spans(model.grid) is None:
        raise WavearError(f"the model's {model.grid} are finer than 16-bit samples in places")
    return model.grid


def _coarse(values: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of 16-bit values, each value's rank among those of its code, their number."""
    if grid == _PCM:
        return values, values, values
    spans = _PCM.spans(grid)
    assert spans is not None
    codes = np.searchsorted(spans[0], values, side="right") - 1
    first, counts = _parts_of(codes, grid)
    return codes, values - first, counts


def _parts_of(codes: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 16-bit value of each code, and how many it stands for."""
    spans = _PCM.spans(grid)
    assert spans is not None
    return spans[0][codes], (spans[1] - spans[0] + 1)[codes]


def _room(streams: np.ndarray, coders: np.ndarray, samples: int) -> np.ndarray:
    """Return streams with space for more samples."""
    needed = int(coders[:, _coding().POSITION].max()) + samples * _coding().MOST_BYTES + 16
    if needed <= streams.shape[1]:
        return streams
    return np.pad(streams, ((0, 0), (0, 2 * needed - streams.shape[1])))


def _check_scores(scores: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Refuse if the coded log-probabilities are not those of `forward`."""
    # A code has 2 of 2^32 at least, and whole numbers: a rare one is off by up to half of its own.
    floor = np.logaddexp(expected, math.log(_coding().LEAST_SHARE))
    allowed = TOLERANCE * np.maximum(-floor / 10, 1) + np.exp(-20 - floor)
    away = np.abs(scores - floor) / allowed
    if away.max() > 1:
        b, t = np.unravel_index(int(away.argmax()), away.shape)
        raise WavearError(
            f"{name}: step and forward of the model differ at sample {t}: log P is"
            f" {scores[b, t]:.4f} by step and {floor[b, t]:.4f} by forward (at most"
            f" {allowed[b, t]:.2g} is rounding); this is a fault of the model's code or of the"
            " coder's, and nothing was written"
        )


def _digest(model: AutoregressiveModel | None) -> bytes:
    if model is None:
        return bytes(8)
    found = describe(model)
    # Without what came later and has its first value, so that files of before can be decoded.
    found["config"] = {n: v for n, v in found["config"].items() if n not in LATER or LATER[n] != v}
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:8]


def _write(target: Path, pcm: np.ndarray, rate: int) -> None:
    import soundfile

    kind = ENDINGS[target.suffix.lower()]
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(
        target,
        lambda path: soundfile.write(path, pcm.T, rate, subtype="PCM_16", format=kind),
    )
