"""Files to waveforms and back.

A waveform here is a mono float32 tensor of shape (T,), in [-1, 1]. WAV, FLAC, OGG (Vorbis, Opus),
MP3 and AIFF are read through libsndfile, as is what else it knows; `wavear.audio.headers` sees to
files whose header does not tell the truth.
"""

from __future__ import annotations

import contextlib
import io
import math
import operator
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from wavear.audio import headers
from wavear.common import atomic

if TYPE_CHECKING:
    import soundfile

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 384_000  # Hz

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Member:
    """An audio file within another that stores it as it is: a member of a tar archive. `info` and `read` take it."""

    archive: str
    offset: int
    """Where its bytes begin."""
    size: int
    """How many they are."""
    member: str
    """Its name in the archive."""

    @property
    def name(self) -> str:
        """Last part of its name."""
        return Path(self.member).name

    @property
    def stem(self) -> str:
        """That without its ending."""
        return Path(self.member).stem

    @property
    def suffix(self) -> str:
        """The ending, with its dot."""
        return Path(self.member).suffix

    def resolve(self) -> Member:
        """With the archive's one true path."""
        return Member(os.path.realpath(self.archive), self.offset, self.size, self.member)

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"


AudioPath = StrPath | Member
Waveform = TypeVar("Waveform", torch.Tensor, np.ndarray)


class AudioError(ValueError):
    """A file that cannot be used as audio; the message names it and says why."""


@dataclass(frozen=True)
class AudioInfo:
    """What `info` finds out about a file."""

    sample_rate: int
    """Hz."""
    frames: int
    """Samples per channel."""
    channels: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / self.sample_rate


def info(path: AudioPath) -> AudioInfo:
    """Sample rate, length and channels of an audio file, from its header where that can be trusted; nothing is decoded.

    Parameters
    ----------
    path : str, Path or Member

    Returns
    -------
    AudioInfo

    Raises
    ------
    AudioError, OSError
        As `read`, less what only decoding brings to light.
    """
    with _open(path) as (file, _):
        return AudioInfo(file.samplerate, file.frames, file.channels)


def read(
    path: AudioPath, sample_rate: int | None = None, start: int = 0, frames: int | None = None
) -> torch.Tensor:
    """Read an audio file, or a part of it, as a mono waveform.

    Channels are averaged. Only the asked part is decoded (and resampled), from a little before it
    where the format or the resampling needs that: reading a part gives the same samples as cutting
    it out of the whole, to 1e-6.

    Parameters
    ----------
    path : str, Path or Member
    sample_rate : int, optional
        Rate of the result, Hz; by default the file's own.
    start : int
        First sample to return, counted at the rate of the result.
    frames : int, optional
        Number of samples to return, at the rate of the result; by default all, and fewer where the
        file ends.

    Returns
    -------
    Tensor, shape (T,), float32
        In [-1, 1], except that lossy codecs and floating-point files can pass it; nothing is
        clipped. T is `frames`, or round(samples of the file * sample_rate / its rate) less `start`.

    Raises
    ------
    AudioError
        If the file is empty, is not audio, has no samples, is damaged or truncated inside, holds
        NaN or infinity, or has a sample rate outside 1 to 384 kHz; if `start` lies beyond its end.
        It is a ValueError.
    FileNotFoundError, IsADirectoryError, PermissionError, OSError
        If there is no such file, it is a folder, or it may not be read.
    ValueError
        If `sample_rate`, `start` or `frames` make no sense.
    """
    if sample_rate is not None:
        sample_rate = _check_rate(sample_rate)
    start = _check_count("start", start, 0)
    if frames is not None:
        frames = _check_count("frames", frames, 1)
    with _open(path) as (file, last_seek):
        own_rate = file.samplerate
        rate = sample_rate or own_rate
        length = _resampled_length(file.frames, own_rate, rate)
        if length == 0:
            raise AudioError(
                f"{path}: is too short ({file.frames} samples at {own_rate} Hz) for a sample at {rate} Hz"
            )
        if start >= length:
            raise AudioError(
                f"{path}: start {start} lies beyond its end ({length} samples at {rate} Hz)"
            )
        stop = length if frames is None else min(start + frames, length)
        first, last = _needed(start, stop, own_rate, rate, file.frames)
        waveform = _decode(path, file, first, last, last_seek)
    if rate == own_rate:
        return torch.from_numpy(waveform)
    # `first` is a multiple of the ratio's denominator, so it falls on a sample of the result.
    offset = first * rate // own_rate
    return torch.from_numpy(_soxr(waveform, own_rate, rate)[start - offset : stop - offset].copy())


# What the ending of a file's name stands for, and in which encodings: libsndfile's names, the first
# by default.
_FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".wav": ("WAV", {"pcm16": "PCM_16", "pcm24": "PCM_24", "float32": "FLOAT"}),
    ".flac": ("FLAC", {"pcm16": "PCM_16", "pcm24": "PCM_24"}),
    ".ogg": ("OGG", {"vorbis": "VORBIS", "opus": "OPUS"}),
    ".opus": ("OGG", {"opus": "OPUS"}),
}
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def write(
    path: StrPath,
    waveform: torch.Tensor | np.ndarray,
    sample_rate: int,
    encoding: str | None = None,
) -> int:
    """Write a waveform: WAV, FLAC or OGG, by the ending of the name.

    The file appears whole or not at all: it is written beside its place under another name, and
    moved there at the end, over a file of that name if there is one. `read` gives back what was
    written to half a step: 1.6e-5 of 16 bits, 6e-8 of 24; floating point exactly. The level is left
    as it is.

    Parameters
    ----------
    path : str or Path
        Ends in .wav, .flac, .ogg or .opus. Its folder must exist.
    waveform : Tensor or array, shape (T,) or (1, T), floating point in [-1, 1]
        Values beyond are clipped, but for "float32".
    sample_rate : int
        Hz, 1000 to 384000.
    encoding : str, optional
        "pcm16" (by default), "pcm24" or "float32" of WAV; "pcm16" or "pcm24" of FLAC; "vorbis" (by
        default) or "opus" of OGG, at the quality libsndfile gives them. Opus knows 8, 12, 16, 24
        and 48 kHz alone.

    Returns
    -------
    int
        How many samples were clipped.

    Raises
    ------
    ValueError
        If the waveform is empty, holds NaN or infinity, or has another shape or type; if the sample
        rate is out of range, the name ends otherwise, or the encoding is none of its format.
    OSError
        If the file cannot be written: no such folder, no permission, disk full. What was there
        before stays.
    """
    import soundfile

    target = Path(path)
    container, subtype = _encoding(target, encoding)
    rate = _check_rate(sample_rate)
    if subtype == "OPUS" and rate not in _OPUS_RATES:
        raise ValueError(
            f"{path}: Opus has no sample rate of {rate} Hz, only {', '.join(map(str, _OPUS_RATES))}"
        )
    x = _as_array(waveform)
    if x.dtype.kind != "f":
        raise ValueError(
            f"{path}: waveform is {x.dtype}, expected floating point in [-1, 1] (16-bit PCM: / 32768)"
        )
    if x.ndim == 2 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 1 or not x.size:
        raise ValueError(
            f"{path}: waveform has shape {x.shape}, expected (T,) or (1, T) with T of 1 or more"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: not written, the waveform holds NaN or infinity")
    clipped = 0 if subtype == "FLOAT" else int((np.abs(x) > 1).sum())
    # As `read` scales, and not by 32767 as libsndfile would: so that reading and writing again
    # changes nothing.
    if subtype == "PCM_16":
        x = np.clip(np.rint(x.astype(np.float64) * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    elif subtype == "PCM_24":  # the upper bytes of 32 bits
        x = (
            np.clip(np.rint(x.astype(np.float64) * 2**23), -(2**23), 2**23 - 1).astype(np.int32)
            * 256
        )
    elif subtype == "FLOAT":
        x = x.astype(np.float32)
    else:
        x = np.clip(x, -1, 1).astype(np.float32)
    encoded = io.BytesIO()
    with soundfile.SoundFile(encoded, "w", rate, 1, subtype=subtype, format=container) as file:
        for first in range(
            0, len(x), 65536
        ):  # libsndfile's Vorbis encoder keeps what it is given at once on the stack
            file.write(x[first : first + 65536])
    try:
        if target.exists() and not target.is_file():
            raise OSError(f"{path}: exists and is not a file, not overwritten")
        atomic.replace_file(target, lambda temporary: temporary.write_bytes(encoded.getvalue()))
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    return clipped


def _encoding(target: Path, encoding: str | None) -> tuple[str, str]:
    """libsndfile's names of the format and the encoding of a file."""
    if target.suffix.lower() not in _FORMATS:
        known = list(_FORMATS)
        raise ValueError(
            f"{target}: can only write {', '.join(known[:-1])} and {known[-1]}, not"
            f" {target.suffix or 'a name without ending'}"
        )
    container, encodings = _FORMATS[target.suffix.lower()]
    encoding = next(iter(encodings)) if encoding is None else encoding
    if encoding not in encodings:
        raise ValueError(
            f"{target}: encoding is {encoding!r}, a {target.suffix} file has {' or '.join(encodings)}"
        )
    return container, encodings[encoding]


def normalize_peak(waveform: Waveform, decibels: float = -1.0) -> Waveform:
    """The same sound with its largest sample at a level.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
        Each row gets a gain of its own; one of nothing but zeros stays.
    decibels : float
        Of full scale, at most 0.

    Examples
    --------
    >>> normalize_peak(torch.tensor([0.1, -0.25]), 0.0)
    tensor([ 0.4000, -1.0000])
    """
    if not -200 <= decibels <= 0:
        raise ValueError(f"a peak of {decibels} dB makes no sense, expected -200 to 0")
    level = 10 ** (decibels / 20)
    if isinstance(waveform, torch.Tensor):
        peak = waveform.abs().amax(-1, keepdim=True)
        return waveform * (level / torch.where(peak == 0, 1.0, peak))
    peak = np.abs(waveform).max(-1, keepdims=True)
    return waveform * (level / np.where(peak == 0, 1, peak)).astype(waveform.dtype)


def fade(waveform: Waveform, sample_rate: int, milliseconds: float) -> Waveform:
    """The same sound, faded in and out over so many milliseconds (half of it at most) by half a period of a cosine.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
    sample_rate : int
        Hz.
    milliseconds : float
        0 or more.

    Examples
    --------
    >>> fade(torch.ones(6), 1000, 2.0)
    tensor([0.1464, 0.8536, 1.0000, 1.0000, 0.8536, 0.1464])
    """
    if not 0 <= milliseconds < math.inf:
        raise ValueError(f"a fade of {milliseconds} ms makes no sense, expected 0 or more")
    total = waveform.shape[-1]
    count = min(round(milliseconds * _check_rate(sample_rate) / 1000), total // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(count) + 0.5) / max(count, 1))
    gain = np.concatenate([ramp, np.ones(total - 2 * count), ramp[::-1]])
    if isinstance(waveform, torch.Tensor):
        return waveform * torch.from_numpy(gain).to(waveform.device, waveform.dtype)
    return waveform * gain.astype(waveform.dtype)


def resample(waveform: Waveform, from_rate: int, to_rate: int) -> Waveform:
    """Change the sample rate, by soxr: flat to 0.9 of the lower Nyquist frequency, 3 dB down at 0.95, without aliases.

    Linear phase, without delay: what is n seconds in stays n seconds in. The result of a crop
    equals the crop of the result to 1e-6, if it begins on a sample of both rates and 256 samples of
    the lower rate are left off at its ends.

    Parameters
    ----------
    waveform : Tensor or array, shape (..., T), floating point
    from_rate, to_rate : int
        Hz, 1000 to 384000.

    Returns
    -------
    Tensor or array like `waveform`, shape (..., round(T * to_rate / from_rate)), half rounded up
        On the device of `waveform`; the work is done on the CPU.

    Raises
    ------
    ValueError
        If a rate is out of range, or `waveform` is not floating point, or has no samples.

    Examples
    --------
    >>> resample(torch.zeros(2, 44100), 44100, 16000).shape
    torch.Size([2, 16000])
    """
    from_rate, to_rate = _check_rate(from_rate), _check_rate(to_rate)
    x = _as_array(waveform)
    if x.dtype.kind != "f" or x.ndim == 0 or not x.size:
        raise ValueError(
            f"waveform is {x.dtype} of shape {x.shape}, expected floating point of shape (..., T)"
        )
    if from_rate == to_rate:
        return waveform
    rows = x.reshape(-1, x.shape[-1])
    y = np.stack([_soxr(row, from_rate, to_rate) for row in rows]).reshape(*x.shape[:-1], -1)
    if isinstance(waveform, torch.Tensor):
        return torch.from_numpy(y).to(waveform.device, waveform.dtype)
    return y.astype(x.dtype)


def trim_silence(
    waveform: Waveform,
    top_db: float = 60.0,
    margin: int = 1024,
    frame_length: int = 2048,
    hop_length: int = 512,
) -> Waveform:
    """Cut silence off both ends (not from within), as `librosa.effects.trim` does, but with a margin.

    Silence is where the root mean square of a frame lies more than `top_db` below that of the
    loudest frame.

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
        A view of it; all of it if it is nothing but zeros.

    Raises
    ------
    ValueError
        If `waveform` is not one-dimensional floating point, or a setting makes no sense.

    Examples
    --------
    >>> beep = torch.cat([torch.zeros(8000), torch.ones(4000), torch.zeros(8000)])
    >>> len(trim_silence(beep, margin=512))
    7168
    """
    if not top_db > 0:
        raise ValueError(f"top_db is {top_db}, expected more than 0")
    margin = _check_count("margin", margin, 0)
    frame_length, hop_length = (
        _check_count("frame_length", frame_length, 1),
        _check_count("hop_length", hop_length, 1),
    )
    x = _as_array(waveform)
    if x.dtype.kind != "f" or x.ndim != 1:
        raise ValueError(
            f"waveform is {x.dtype} of shape {x.shape}, expected floating point of shape (T,)"
        )
    # The energy of a frame is a difference of the energy up to its ends.
    energy = np.concatenate([[0.0], np.cumsum(x.astype(np.float64) ** 2)])
    begins = np.arange(0, len(x) + 1, hop_length) - frame_length // 2
    powers = energy[(begins + frame_length).clip(0, len(x))] - energy[begins.clip(0, len(x))]
    loud = np.flatnonzero(powers > powers.max() * 10 ** (-top_db / 10))
    if not loud.size:
        return waveform
    first = max(int(loud[0]) * hop_length - margin, 0)
    return waveform[first : min((int(loud[-1]) + 1) * hop_length + margin, len(x))]


@contextlib.contextmanager
def _open(path: AudioPath) -> Iterator[tuple[soundfile.SoundFile, int | None]]:
    """A file opened by libsndfile, and the latest position to seek to, after all checks that need no decoding."""
    import soundfile

    holder, stretch = (
        (path.archive, (path.offset, path.size)) if isinstance(path, Member) else (path, None)
    )
    try:
        status = os.stat(holder)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path}: is a folder, expected an audio file")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(
                f"{path}: is not a regular file (audio is not read from pipes or devices)"
            )
        if (status.st_size if stretch is None else stretch[1]) == 0:
            raise AudioError(f"{path}: is empty (0 bytes)")
        if stretch is not None and sum(stretch) > status.st_size:
            raise AudioError(
                f"{path}: is damaged or truncated inside (the archive ends before it does)"
            )
        findings = headers.examine(holder, stretch)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot read {path}: {error.strerror}") from error
    except AudioError:
        raise
    except ValueError as error:
        raise AudioError(f"{path}: {error}") from error
    # soundfile encodes names strictly, on Windows as wide characters; elsewhere names need not be
    # Unicode.
    source: Any = os.fsencode(holder) if os.name == "posix" else os.fspath(holder)
    if stretch is not None:
        with open(holder, "rb") as archive:
            archive.seek(stretch[0])
            data = archive.read(stretch[1])
        source = io.BytesIO(data)
    if findings.splice:
        offset, removed, inserted = findings.splice
        data = Path(holder).read_bytes() if stretch is None else source.getvalue()
        source = io.BytesIO(data[:offset] + inserted + data[offset + removed :])
    # A file that is none, but has the name of one, goes to the MP3 decoder, too.
    with (
        _decoder_quiet()
        if findings.is_mp3 or str(path).lower().endswith(".mp3")
        else contextlib.nullcontext()
    ):
        try:
            file = soundfile.SoundFile(source)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{path}: is not audio, or its header is damaged ({error.error_string})"
            ) from error
        with file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                wanted = f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
                raise AudioError(
                    f"{path}: has a sample rate of {file.samplerate} Hz, expected {wanted}"
                )
            if file.frames == 0:
                raise AudioError(f"{path}: holds no audio (0 samples)")
            yield file, findings.last_seek


def _decode(
    path: AudioPath, file: soundfile.SoundFile, first: int, last: int, last_seek: int | None
) -> np.ndarray:
    """Samples [first, last) of a file, mono."""
    import soundfile

    begin = first if last_seek is None else min(first, last_seek)
    if file.subtype == "OPUS":
        begin = 0  # predicts from all that went before
    elif file.format in ("MP3", "OGG"):
        # Their decoders have a short memory (MP3: three frames of 1152, its bit reservoir; Vorbis:
        # a block): started this much earlier, they arrive in the same state.
        begin = max(begin - 4608, 0)
    try:
        if begin:
            file.seek(begin)
        samples = file.read(last - begin, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: is damaged or truncated inside ({error.error_string})"
        ) from error
    if len(samples) < last - begin:
        end = begin + len(samples)
        raise AudioError(
            f"{path}: is damaged or truncated inside (audio ends at sample {end} of {file.frames})"
        )
    samples = samples[first - begin :]
    if not np.isfinite(samples).all():
        at = first + int(np.argwhere(~np.isfinite(samples))[0, 0])
        raise AudioError(f"{path}: holds NaN or infinity (at sample {at})")
    return samples[:, 0].copy() if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


_stderr_lock = threading.RLock()
_CHATTER = re.compile(rb"mpg123|^(Note|Warning): |^\s*$")


@contextlib.contextmanager
def _decoder_quiet() -> Iterator[None]:
    """Keep the MP3 decoder's complaints off the terminal: it makes some at every seek, into the void we discard.

    It writes them to file descriptor 2, from C, so that is where they are caught; all else that
    arrives meanwhile is passed on afterwards.
    """
    with _stderr_lock:
        try:
            terminal = os.dup(2)
        except OSError:  # there is none
            yield
            return
        with tempfile.TemporaryFile() as caught:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                if sys.stderr is not None:
                    sys.stderr.flush()
                os.dup2(terminal, 2)
                os.close(terminal)
                caught.seek(0)
                for line in caught:
                    if not _CHATTER.search(line):
                        os.write(2, line)


# A child that is forked by another thread in the middle of this would have no terminal, and a lock
# that nobody opens.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_stderr_lock.acquire,
        after_in_parent=_stderr_lock.release,
        after_in_child=_stderr_lock.release,
    )


def _needed(start: int, stop: int, own_rate: int, rate: int, frames: int) -> tuple[int, int]:
    """The samples [first, last) of a file that samples [start, stop) of the result depend on."""
    if rate == own_rate:
        return start, stop
    # soxr's filter reaches 100 to 130 samples of the lower rate to either side.
    margin = math.ceil(256 * max(own_rate / rate, 1.0))
    step = own_rate // math.gcd(own_rate, rate)
    first = max(start * own_rate // rate - margin, 0) // step * step
    return first, min(stop * own_rate // rate + 1 + margin, frames)


def _resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    return (2 * samples * to_rate + from_rate) // (2 * from_rate)


def _soxr(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """(T,) -> (round(T * to_rate / from_rate),)"""
    import soxr

    # soxr rounds the length of its result in floating point, which can drop the last sample. Some
    # zeros at the end, which it imagines there anyway, leave it to us to say where to stop.
    x = np.pad(waveform, (0, from_rate // to_rate + 1)).astype(
        np.float64 if waveform.dtype.itemsize > 4 else np.float32
    )
    return soxr.resample(x, from_rate, to_rate, quality="VHQ")[
        : _resampled_length(len(waveform), from_rate, to_rate)
    ]


def _as_array(waveform: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        return (waveform.float() if waveform.dtype == torch.bfloat16 else waveform).numpy()
    return np.asarray(waveform)


def _check_rate(sample_rate: int) -> int:
    rate = _check_count("sample_rate", sample_rate, 1)
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"sample rate is {rate} Hz, expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
        )
    return rate


def _check_count(name: str, value: int, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None
    if count < least or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected {least} or more")
    return count
