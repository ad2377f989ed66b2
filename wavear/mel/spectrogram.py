"""Log-mel spectrograms: `MelConfig`, the settings that define a mel, and `log_mel`.

Frames and edges: frame f belongs to the samples [f * hop, (f + 1) * hop), and a waveform of T
samples has F = T // hop frames; up to hop - 1 samples at the end belong to no frame. The window of
frame f is centred on its own samples:

- centre = "middle": on f * hop + hop / 2, as in HiFi-GAN (padding by (n_fft - hop) / 2 and
  torch.stft(center=False));
- centre = "start": on f * hop, as in librosa and torch.stft(center=True), without the last frame.

Beyond the ends of the waveform, a window reads its mirror image or zeros (`padding`). A frame
depends on no sample outside `MelConfig.window_span`. So the mel of a crop equals the crop of the
mel if the crop has `MelConfig.context_frames` more frames on both sides, which are then dropped:

    context = config.context_samples  # a multiple of hop, like a and b
    part = log_mel(waveform[:, a - context : b + context], config)
    part = part[..., config.context_frames : -config.context_frames]
    part == log_mel(waveform, config)[..., a // hop : b // hop]

A crop that begins or ends with the waveform has no context there.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError, require
from wavear.common.words import counted
from wavear.mel.features import FeatureConfig
from wavear.mel.presets import PRESETS

Window = Literal["hann", "hamming", "blackman", "rectangular"]
Centre = Literal["middle", "start"]
Padding = Literal["reflect", "zeros"]
MelScale = Literal["slaney", "htk"]
Norm = Literal["slaney"]
FloorMode = Literal["clip", "add"]
LogBase = Literal["e", "10", "db", "none"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "window": get_args(Window),
    "centre": get_args(Centre),
    "padding": get_args(Padding),
    "mel_scale": get_args(MelScale),
    "norm": (*get_args(Norm), None),
    "floor_mode": get_args(FloorMode),
    "log_base": get_args(LogBase),
}

# Fields that the first checkpoints lack, with the values that they had.
_LATER = {"floor_mode": "clip"}

# Frames computed at once: bounds the memory for an hour-long recording to that for some seconds.
BLOCK_FRAMES = 4096
_BLOCK_BINS = BLOCK_FRAMES * 2049  # Fourier bins at once, where n_fft is above 4096
MAX_N_FFT, MAX_BANDS = 2**16, 1024  # a filter bank of 256 MiB; 65536 samples are 1.5 s at 44.1 kHz


@dataclass(frozen=True)
class MelConfig:
    """The settings that define a mel spectrogram. The default is HiFi-GAN's at 22.05 kHz.

    With X the spectrum of the windowed frame and W the filter bank, the value of band m is

        S[k] = max(abs(X[k])**2 + power_offset, power_floor) ** (power / 2)
        V[m] = clip(scale * log(max(sum_k W[m, k] * S[k], floor)) + shift)

    (with `floor_mode` "add", the floor is added instead). This covers all published mels: decibels
    relative to r are a `shift` of -20 log10(r), logarithms to base 2 a `scale` of 1 / log(2), a
    spectrum divided by the window's norm n a `shift` of -log(n). Settings that depend on a whole
    recording, such as librosa's `top_db`, are left out: the mel of a crop would differ from the
    crop of the mel.

    Raises
    ------
    WavearError
        If a value is out of range; the message names the field, the value and the range.

    Examples
    --------
    >>> config = MelConfig(sample_rate=16000, hop_length=200)
    >>> config.frame_rate
    80.0
    >>> MelConfig.from_dict(config.to_dict()) == config
    True
    >>> MelConfig(hop_length=2000)
    Traceback (most recent call last):
    wavear.common.errors.WavearError: MelConfig: hop_length is 2000, expected 1 to ...
    """

    sample_rate: int = 22050
    """Sample rate of the waveform, Hz."""
    n_fft: int = 1024
    """Length of the Fourier transform, samples."""
    window_length: int = 1024
    """Length of the window, samples; if shorter than `n_fft`, it is centred between zeros."""
    window: Window = "hann"
    """Shape of the window, in its periodic form."""
    hop_length: int = 256
    """Samples per frame."""
    centre: Centre = "middle"
    """Where a frame's window is centred: see the module."""
    padding: Padding = "reflect"
    """Beyond the ends of the waveform: its mirror image about the end sample, or zeros."""
    bands: int = 80
    """Number of mel bands M."""
    fmin: float = 0.0
    """Lower end of the lowest band, Hz."""
    fmax: float | None = 8000.0
    """Upper end of the highest band, Hz; None: half of `sample_rate`."""
    mel_scale: MelScale = "slaney"
    """Slaney's Auditory Toolbox (linear below 1 kHz), or HTK's 2595 log10(1 + f / 700)."""
    norm: Norm | None = "slaney"
    """"slaney": every band has unit area (per Hz). None: every band has unit height."""
    power: float = 1.0
    """1: bands add up magnitudes. 2: powers."""
    power_offset: float = 0.0
    """Added to the power of every bin before the root (HiFi-GAN's code: 1e-9)."""
    power_floor: float = 0.0
    """Least power of a bin (ESPnet's code: 1e-10)."""
    floor: float = 1e-5
    """Least value of a band before the logarithm."""
    floor_mode: FloorMode = "clip"
    """"clip": smaller values become the floor. "add": the floor is added to every value."""
    log_base: LogBase = "e"
    """Natural, common, decibels (20 log10 of magnitudes, 10 log10 of powers), or no logarithm."""
    scale: float = 1.0
    """Factor on the logarithm."""
    shift: float = 0.0
    """Added after `scale`."""
    clip: tuple[float, float] | None = None
    """Least and largest value of the result, after `scale` and `shift`."""

    def __post_init__(self) -> None:
        for field in ("sample_rate", "n_fft", "window_length", "hop_length", "bands"):
            object.__setattr__(self, field, _integer(field, getattr(self, field)))
        for field in ("fmin", "power", "power_offset", "power_floor", "floor", "scale", "shift"):
            object.__setattr__(self, field, _number(field, getattr(self, field)))
        if self.fmax is not None:
            object.__setattr__(self, "fmax", _number("fmax", self.fmax))
        if self.clip is not None:
            if not isinstance(self.clip, (tuple, list)) or len(self.clip) != 2:
                raise _refusal("clip", self.clip, "None or two numbers, the lesser first")
            object.__setattr__(self, "clip", tuple(_number("clip", end) for end in self.clip))
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise _refusal(field, getattr(self, field), " or ".join(map(repr, choices)))
        bins, nyquist = self.n_fft // 2 + 1, self.sample_rate / 2
        logarithm = self.log_base != "none"
        for field, holds, wanted in (
            ("sample_rate", 1000 <= self.sample_rate <= 384_000, "1000 to 384000 Hz"),
            ("n_fft", 2 <= self.n_fft <= MAX_N_FFT, f"2 to {MAX_N_FFT}"),
            ("window_length", 1 <= self.window_length <= self.n_fft, f"1 to n_fft ({self.n_fft})"),
            (
                "hop_length",
                1 <= self.hop_length <= self.window_length,
                f"1 to window_length ({self.window_length})",
            ),
            ("bands", self.bands <= MAX_BANDS, f"at most {MAX_BANDS}"),
            ("bands", 1 <= self.bands <= bins, f"1 to n_fft // 2 + 1 ({bins})"),
            (
                "fmin",
                0 <= self.fmin < nyquist,
                f"0 to less than {nyquist} Hz (half of sample_rate)",
            ),
            (
                "fmax",
                self.fmax is None or self.fmin < self.fmax <= nyquist,
                f"more than fmin ({self.fmin}) and at most {nyquist} Hz (half of sample_rate)",
            ),
            ("power", self.power in (1.0, 2.0), "1 (magnitude) or 2 (power)"),
            ("power_offset", self.power_offset >= 0, "0 or more"),
            ("power_floor", self.power_floor >= 0, "0 or more"),
            ("floor", self.floor >= 0, "0 or more"),
            ("floor", self.floor > 0 or not logarithm, "more than 0 before a logarithm"),
            ("scale", self.scale != 0, "a number other than 0"),
            ("clip", self.clip is None or self.clip[0] < self.clip[1], "the lesser number first"),
        ):
            if not holds:
                raise _refusal(field, getattr(self, field), wanted)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def window_span(self) -> tuple[int, int]:
        """(left, right), samples: frame f depends on waveform[f * hop - left : f * hop + right]."""
        before = _samples_before(self)
        # torch.stft centres the window in n_fft.
        start = (self.n_fft - self.window_length) // 2
        return before - start, start + self.window_length - before

    @property
    def context_frames(self) -> int:
        """Frames to add on each side of a crop so that its own frames equal those of the whole."""
        left, right = self.window_span
        return max(math.ceil(max(left, right - self.hop_length) / self.hop_length), 0)

    @property
    def context_samples(self) -> int:
        """`context_frames` in samples."""
        return self.context_frames * self.hop_length

    def to_dict(self) -> dict[str, Any]:
        """Return every field by its name, in types of JSON."""
        fields = dataclasses.asdict(self)
        fields["clip"] = None if self.clip is None else list(self.clip)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MelConfig:
        """Return the configuration that `to_dict` was called on.

        Raises
        ------
        WavearError
            If a field is missing, unknown or out of range.
        """
        if not isinstance(fields, dict):
            raise WavearError(f"a mel configuration is a dictionary of fields, not {fields!r:.80}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            names = ", ".join(map(str, unknown))
            raise WavearError(f"mel configuration has unknown fields {names}; known: {known}")
        if missing := [name for name in known if name not in fields and name not in _LATER]:
            raise WavearError(f"mel configuration lacks the fields {', '.join(missing)}")
        return cls(**{**_LATER, **fields})

    @classmethod
    def preset(cls, name: str) -> MelConfig:
        """Return the configuration of a well-known project; see `docs/mels.md`.

        Parameters
        ----------
        name : str
            hifigan, nvidia-tacotron2, vocos-24k, or another of `wavear.mel.presets.PRESETS`.

        Raises
        ------
        WavearError
            If the name is unknown; the message suggests similar ones.

        Examples
        --------
        >>> MelConfig.preset("fatchord").hop_length
        275
        >>> MelConfig.preset("hifi-gan")
        Traceback (most recent call last):
        wavear.common.errors.WavearError: there is no mel preset 'hifi-gan': did you mean 'hifigan'?
        """
        require(name, str, "the name of a mel preset", "text")
        if name in PRESETS:
            return cls(**PRESETS[name])
        plain = {re.sub("[^a-z0-9]", "", known): known for known in PRESETS}
        near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", str(name).lower()), plain, n=2)
        hint = f"did you mean {' or '.join(repr(plain[known]) for known in near)}?"
        hint = hint if near else f"known are {', '.join(PRESETS)}"
        raise WavearError(f"there is no mel preset {name!r}: {hint}")


@torch.no_grad()
def log_mel(waveform: Tensor | np.ndarray, config: MelConfig) -> Tensor:
    """Compute a log-mel spectrogram, one frame per `config.hop_length` samples.

    It is computed in float64 (float32 on Apple's GPUs), also under autocast: in float32, a quiet
    band next to a loud one is off by up to 1e-3 in the logarithm, with TF32 by 1e-2.

    Parameters
    ----------
    waveform : Tensor or array, shape (B, T) or (T,), float32 or float64 in [-1, 1]
        At least one hop; a waveform shorter than a window is mirrored repeatedly, as by
        `numpy.pad`.
    config : MelConfig

    Returns
    -------
    Tensor, shape (B, M, F), or (M, F) for (T,); of the type and on the device of `waveform`
        See `MelConfig` for the values; F = T // hop. It carries no gradient.

    Raises
    ------
    WavearError
        If `waveform` is not float32 or float64, has another shape, is shorter than one hop, or
        holds NaN or infinity; if `config` is not a `MelConfig`.

    Examples
    --------
    >>> log_mel(torch.zeros(1, 2560), MelConfig(hop_length=256)).shape
    torch.Size([1, 80, 10])
    """
    check_config(config, "config")
    waveform = as_tensor(waveform, "waveform")
    if waveform.dtype not in (torch.float32, torch.float64):
        raise WavearError(f"waveform is {waveform.dtype}, expected float32 or float64 in [-1, 1]")
    if waveform.ndim == 1:
        return log_mel(waveform[None], config)[0]
    if waveform.ndim != 2:
        raise WavearError(f"waveform has shape {tuple(waveform.shape)}, expected (B, T) or (T,)")
    hop, samples = config.hop_length, waveform.shape[1]
    frames = samples // hop
    if frames == 0:
        raise WavearError(f"waveform has {samples} samples, a mel needs at least one hop ({hop})")
    exact = torch.float32 if waveform.device.type == "mps" else torch.float64
    filters, window = filters_and_window(config, waveform.device, exact)
    before = _samples_before(config)
    # The last frame's window ends at (frames - 1) * hop - before + n_fft.
    after = max((frames - 1) * hop - before + config.n_fft - samples, 0)
    padded = _pad(waveform, before, after, config.padding)
    mel = waveform.new_empty(waveform.shape[0], config.bands, frames)
    step = max(min(BLOCK_FRAMES, _BLOCK_BINS // (config.n_fft // 2 + 1)), 1)
    for first in range(0, frames, step):
        last = min(first + step, frames)
        block = padded[:, first * hop : (last - 1) * hop + config.n_fft].to(exact)
        spectrum = torch.stft(
            block,
            config.n_fft,
            hop,
            config.window_length,
            window,
            center=False,
            return_complex=True,
        )  # (B, n_fft // 2 + 1, last - first)
        bins = spectrum.real.square() + spectrum.imag.square() + config.power_offset
        bins.clamp_(min=config.power_floor)
        if config.power == 1:
            bins = bins.sqrt_()
        mel[..., first:last] = compress_(filters @ bins, config)
    # Checking the result suffices, and it is a hundredth of the size of the waveform.
    if not torch.isfinite(mel).all():
        raise WavearError("waveform holds NaN or infinity (or values beyond 1e100)")
    return mel


def check_config(config: Any, name: str) -> None:
    """Refuse what is not a `MelConfig`; the configuration of a model holds one, or None."""
    if isinstance(config, FeatureConfig):
        raise WavearError(
            "the model is conditioned on features from files (--features), which audio does not"
            f" give: {counted(config.bands, 'channel')}, a frame per {config.hop_length} samples"
        )
    own = isinstance(getattr(config, "mel", None), MelConfig)
    hint = " (the configuration of a model holds it: pass model.config.mel)" if own else ""
    require(config, MelConfig, name, f"a MelConfig{hint}")


def compress_(bands: Tensor, config: MelConfig) -> Tensor:
    """Apply the floor, the logarithm, `scale`, `shift` and `clip`; overwrite the bands."""
    if config.floor_mode == "clip":
        bands.clamp_(min=config.floor)
    else:
        bands.add_(config.floor)
    if config.log_base == "e":
        bands.log_()
    elif config.log_base != "none":
        bands.log10_()
    if config.log_base == "db":
        bands *= 20.0 / config.power
    values = bands * config.scale + config.shift
    return values if config.clip is None else values.clamp(*config.clip)


def mel_filter_bank(config: MelConfig) -> Tensor:
    """Return triangular filters from Fourier bins to mel bands, as `librosa.filters.mel`.

    Band m rises from edge m to edge m + 1 and falls to edge m + 2; the bands + 2 edges are evenly
    spaced on the mel scale. (torchaudio computes it in float32, where a band's first bins are off
    by up to 1e-3 of themselves, and importing librosa takes seconds.)

    Parameters
    ----------
    config : MelConfig

    Returns
    -------
    Tensor, shape (M, n_fft // 2 + 1), float64

    Warns
    -----
    UserWarning
        If a band is too narrow to contain a bin: it would always be at the floor.
    """
    fmax = config.sample_rate / 2 if config.fmax is None else config.fmax
    low, high = (_hz_to_mel(frequency, config.mel_scale) for frequency in (config.fmin, fmax))
    mels = torch.linspace(low, high, config.bands + 2, dtype=torch.float64)
    edges = _mel_to_hz(mels, config.mel_scale)
    bins = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64)
    bins = bins * config.sample_rate / config.n_fft
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rise, fall).clamp(min=0.0)
    if empty := (filters.amax(dim=1) == 0).nonzero()[:, 0].tolist():
        warnings.warn(
            f"mel bands {empty} hold no bin of an n_fft of {config.n_fft}: use a larger n_fft or"
            f" fewer than {config.bands} bands",
            stacklevel=2,
        )
    if config.norm == "slaney":
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters


# Slaney's scale: 3 mel per 200 Hz up to 1 kHz (15 mel), then 27 mel per factor of 6.4.
_SLANEY_HZ_PER_MEL = 200.0 / 3.0
_SLANEY_KNEE_HZ = 1000.0
_SLANEY_KNEE_MEL = _SLANEY_KNEE_HZ / _SLANEY_HZ_PER_MEL
_SLANEY_LOG_STEP = math.log(6.4) / 27.0


def _hz_to_mel(frequency: float, scale: MelScale) -> float:
    if scale == "htk":
        return 2595.0 * math.log10(1.0 + frequency / 700.0)
    if frequency < _SLANEY_KNEE_HZ:
        return frequency / _SLANEY_HZ_PER_MEL
    return _SLANEY_KNEE_MEL + math.log(frequency / _SLANEY_KNEE_HZ) / _SLANEY_LOG_STEP


def _mel_to_hz(mels: Tensor, scale: MelScale) -> Tensor:
    if scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    bent = _SLANEY_KNEE_HZ * torch.exp(_SLANEY_LOG_STEP * (mels - _SLANEY_KNEE_MEL))
    return torch.where(mels < _SLANEY_KNEE_MEL, mels * _SLANEY_HZ_PER_MEL, bent)


_WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "rectangular": lambda length, dtype: torch.ones(length, dtype=dtype),
}


@functools.lru_cache(maxsize=32)
def filters_and_window(
    config: MelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the filter bank (M, n_fft / 2 + 1) and the window (window_length,)."""
    window = _WINDOWS[config.window](config.window_length, dtype=torch.float64)
    return mel_filter_bank(config).to(device, dtype), window.to(device, dtype)


def _samples_before(config: MelConfig) -> int:
    """Return the number of samples before f * hop in the transform of frame f."""
    if config.centre == "start":
        return config.n_fft // 2
    return (config.n_fft - config.hop_length) // 2


def _pad(waveform: Tensor, before: int, after: int, padding: Padding) -> Tensor:
    """(B, T) -> (B, before + T + after)."""
    if padding == "zeros":
        return torch.nn.functional.pad(waveform, (before, after))
    # Mirrored about the end samples without repeating them: a triangle wave of period 2 * (T - 1).
    # (torch's "reflect" is limited to T - 1 samples, and a spoken digit can be shorter than a
    # window.)
    samples = waveform.shape[1]
    period = max(2 * (samples - 1), 1)
    outside = torch.cat([torch.arange(-before, 0), torch.arange(samples, samples + after)]) % period
    inside = torch.minimum(outside, period - outside).clamp_(max=samples - 1)
    edges = waveform[:, inside.to(waveform.device)]
    return torch.cat([edges[:, :before], waveform, edges[:, before:]], dim=1)


def _refusal(field: str, value: object, wanted: str) -> WavearError:
    return WavearError(f"MelConfig: {field} is {value!r}, expected {wanted}")


def _integer(field: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise _refusal(field, value, "an integer") from None


def _number(field: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)) or not math.isfinite(float(value)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(field, value, "a finite number") from None
