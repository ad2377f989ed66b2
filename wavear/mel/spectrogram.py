"""Log-mel spectrograms: `MelConfig`, all that makes two mels differ, and `log_mel`, which computes one.

The rule of the edges --------------------- Frame f belongs to the samples [f * hop, (f + 1) * hop),
and a waveform of T samples has F = T // hop frames, whatever the settings; up to hop - 1 samples at
the end belong to no frame (though the last frames still see them). The window of frame f is centred
on its own samples:

    centre = "middle":  on f * hop + hop / 2, as in HiFi-GAN (padded by (n_fft - hop) / 2, torch.stft(center=False))
    centre = "start":   on f * hop, as in librosa and torch.stft(center=True), less the frame past the end

What a window sees beyond the ends of the waveform is its mirror image or zeros (`padding`). A frame
depends on no sample outside `MelConfig.window_span`, so the mel of a crop is the crop of the mel,
once the crop is taken with `MelConfig.context_frames` more frames on both sides and these are
dropped from its mel:

    context = config.context_samples                       # a multiple of hop, like a and b
    part = log_mel(waveform[:, a - context : b + context], config)[..., config.context_frames : -config.context_frames]
    part == log_mel(waveform, config)[..., a // hop : b // hop]

A crop that begins or ends with the waveform has no context there, and drops nothing there.
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

import torch

from wavear.mel.presets import PRESETS

Window = Literal["hann", "hamming", "blackman", "rectangular"]
Centre = Literal["middle", "start"]
Padding = Literal["reflect", "zeros"]
MelScale = Literal["slaney", "htk"]
Norm = Literal["slaney"]
FloorMode = Literal["clip", "add"]
LogBase = Literal["e", "10", "db", "none"]

# Fields that came after the first checkpoints, and what those meant.
_LATER = {"floor_mode": "clip"}

# Frames computed at once: bounds the memory of an hour-long recording to that of some seconds.
BLOCK_FRAMES = 4096


@dataclass(frozen=True)
class MelConfig:
    """All that makes two mel spectrograms of one waveform differ. The default is HiFi-GAN's at 22.05 kHz.

    The value of band m in frame f is, with X the spectrum of the windowed frame and W the filter
    bank,

        S[k] = max(abs(X[k])**2 + power_offset, power_floor) ** (power / 2)
        V[m] = clip(scale * log(max(sum_k W[m, k] * S[k], floor)) + shift)

    (`floor_mode` "add" has the floor added, instead of the larger of the two.) That leaves room for
    all that published mels do: decibels against a reference r are a `shift` of -20 log10(r),
    logarithms to base 2 a `scale` of 1 / log(2), a spectrum divided by the window's norm n a
    `shift` of -log(n). What depends on a whole recording, such as the `top_db` of librosa, has no
    place here: the mel of a crop would not be the crop of the mel.

    Raises
    ------
    ValueError
        If a value makes no sense, with the field, the value and what would work.

    Examples
    --------
    >>> config = MelConfig(sample_rate=16000, hop_length=200)
    >>> config.frame_rate
    80.0
    >>> MelConfig.from_dict(config.to_dict()) == config
    True
    >>> MelConfig(fmax=16000)
    Traceback (most recent call last):
    ValueError: MelConfig: fmax is 16000.0 Hz, expected more than fmin (0.0) and at most 11025.0 (half of sample_rate)
    """

    sample_rate: int = 22050
    """Of the waveform, Hz."""
    n_fft: int = 1024
    """Length of the Fourier transform, samples."""
    window_length: int = 1024
    """Length of the window, samples; a window shorter than `n_fft` lies in its middle, between zeros."""
    window: Window = "hann"
    """Shape of the window, in its periodic form."""
    hop_length: int = 256
    """Samples per frame."""
    centre: Centre = "middle"
    """Where in its samples a frame's window is centred, see the module."""
    padding: Padding = "reflect"
    """What lies beyond the ends of the waveform: its mirror image about the end sample, or zeros."""
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
    """"clip": what is below the floor becomes the floor. "add": the floor is added to every value."""
    log_base: LogBase = "e"
    """Natural or common logarithm; decibels (20 log10 of magnitudes, 10 log10 of powers); or none at all."""
    scale: float = 1.0
    """Factor on the logarithm."""
    shift: float = 0.0
    """Added after `scale`."""
    clip: tuple[float, float] | None = None
    """Least and largest value of the result, after `scale` and `shift`."""

    def __post_init__(self) -> None:
        for field in ("sample_rate", "n_fft", "window_length", "hop_length", "bands"):
            value = _integer(field, getattr(self, field))
            object.__setattr__(self, field, value)
            if value < 1:
                raise _refusal(field, value, "1 or more")
        for field in ("fmin", "power", "power_offset", "power_floor", "floor", "scale", "shift"):
            object.__setattr__(self, field, _number(field, getattr(self, field)))
        if self.fmax is not None:
            object.__setattr__(self, "fmax", _number("fmax", self.fmax))
        for field, choices in (
            ("window", get_args(Window)),
            ("centre", get_args(Centre)),
            ("padding", get_args(Padding)),
            ("mel_scale", get_args(MelScale)),
            ("norm", (*get_args(Norm), None)),
            ("floor_mode", get_args(FloorMode)),
            ("log_base", get_args(LogBase)),
        ):
            if getattr(self, field) not in choices:
                raise _refusal(field, repr(getattr(self, field)), " or ".join(map(repr, choices)))
        if not 1000 <= self.sample_rate <= 384_000:
            raise _refusal("sample_rate", f"{self.sample_rate} Hz", "1000 to 384000")
        if self.n_fft < 2:
            raise _refusal("n_fft", self.n_fft, "2 or more")
        if self.window_length > self.n_fft:
            raise _refusal("window_length", self.window_length, f"at most n_fft ({self.n_fft})")
        if self.hop_length > self.window_length:
            raise _refusal(
                "hop_length", self.hop_length, f"at most window_length ({self.window_length})"
            )
        if self.bands > self.n_fft // 2 + 1:
            raise _refusal("bands", self.bands, f"at most n_fft // 2 + 1 ({self.n_fft // 2 + 1})")
        nyquist = self.sample_rate / 2
        if not 0 <= self.fmin < nyquist:
            raise _refusal(
                "fmin", f"{self.fmin} Hz", f"0 to less than {nyquist} (half of sample_rate)"
            )
        if self.fmax is not None and not self.fmin < self.fmax <= nyquist:
            wanted = f"more than fmin ({self.fmin}) and at most {nyquist} (half of sample_rate)"
            raise _refusal("fmax", f"{self.fmax} Hz", wanted)
        if self.power not in (1.0, 2.0):
            raise _refusal("power", self.power, "1 (magnitude) or 2 (power)")
        for field in ("power_offset", "power_floor", "floor"):
            if getattr(self, field) < 0:
                raise _refusal(field, getattr(self, field), "0 or more")
        if self.floor == 0 and self.log_base != "none":
            raise _refusal(
                "floor", self.floor, f"more than 0 before a logarithm (log_base {self.log_base!r})"
            )
        if self.scale == 0:
            raise _refusal("scale", self.scale, "any other number (0 leaves nothing of the mel)")
        if self.clip is not None:
            if not isinstance(self.clip, (tuple, list)) or len(self.clip) != 2:
                raise _refusal(
                    "clip", repr(self.clip), "None or two numbers, the least and the largest value"
                )
            low, high = (_number("clip", bound) for bound in self.clip)
            object.__setattr__(self, "clip", (low, high))
            if not low < high:
                raise _refusal("clip", self.clip, "the lesser number first")

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def window_span(self) -> tuple[int, int]:
        """(left, right), samples: frame f depends on waveform[f * hop - left : f * hop + right] and on nothing else."""
        before = _samples_before(self)
        # The window in the middle of n_fft, as torch.stft places it.
        start = (self.n_fft - self.window_length) // 2
        return before - start, start + self.window_length - before

    @property
    def context_frames(self) -> int:
        """Frames to add on each side of a crop, so that those inside come out as in the whole."""
        left, right = self.window_span
        return max(
            math.ceil(left / self.hop_length),
            math.ceil((right - self.hop_length) / self.hop_length),
            0,
        )

    @property
    def context_samples(self) -> int:
        """`context_frames` in samples."""
        return self.context_frames * self.hop_length

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, as JSON can hold it."""
        fields = dataclasses.asdict(self)
        fields["clip"] = None if self.clip is None else list(self.clip)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MelConfig:
        """The inverse of `to_dict`.

        Raises
        ------
        ValueError
            If a field is missing or unknown (the message names it), or holds nonsense.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"a mel configuration is a dictionary of fields, not {fields!r:.80}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(
                f"mel configuration has unknown fields {', '.join(map(str, unknown))}; known: {known}"
            )
        if missing := [name for name in known if name not in fields and name not in _LATER]:
            raise ValueError(f"mel configuration lacks the fields {', '.join(missing)}")
        return cls(**{**_LATER, **fields})

    @classmethod
    def preset(cls, name: str) -> MelConfig:
        """Mels as a well-known project publishes them; `docs/mels.md` says which, and how exactly they agree.

        Parameters
        ----------
        name : str
            hifigan, nvidia-tacotron2, r9y9, espnet, espnet-24k, parallel-wavegan, fatchord,
            torchaudio-tacotron2, torchaudio-tacotron2-wavernn or librosa-default.

        Raises
        ------
        ValueError
            If there is no such preset; the message has the nearest ones.

        Examples
        --------
        >>> MelConfig.preset("fatchord").hop_length
        275
        >>> MelConfig.preset("hifi-gan")
        Traceback (most recent call last):
        ValueError: there is no mel preset 'hifi-gan': did you mean 'hifigan'?
        """
        if name not in PRESETS:
            plain = {re.sub("[^a-z0-9]", "", known): known for known in PRESETS}
            near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", str(name).lower()), plain, n=2)
            hint = (
                f"did you mean {' or '.join(repr(plain[known]) for known in near)}?" if near else ""
            )
            raise ValueError(
                f"there is no mel preset {name!r}: {hint or 'known are ' + ', '.join(PRESETS)}"
            )
        return cls(**PRESETS[name])


@torch.no_grad()
def log_mel(waveform: torch.Tensor, config: MelConfig) -> torch.Tensor:
    """Log-mel spectrogram, one frame per `config.hop_length` samples.

    The arithmetic is float64 inside (float32 on Apple's GPUs, which have no float64): in float32, a
    quiet band beside a loud one is off by up to 1e-3 in the logarithm, and autocast or TF32 would
    make that 1e-2 without being asked.

    Parameters
    ----------
    waveform : Tensor, shape (B, T), float32 or float64 in [-1, 1]
        Any length from one hop; shorter than a window is mirrored as often as it takes, as in
        NumPy's `pad`.
    config : MelConfig

    Returns
    -------
    Tensor, shape (B, M, F), of the type and on the device of `waveform`
        See `MelConfig` for the values; F = T // hop. No gradient flows.

    Raises
    ------
    ValueError
        If `waveform` is not two-dimensional floating point, is shorter than one hop, or holds NaN
        or infinity.

    Examples
    --------
    >>> log_mel(torch.zeros(1, 2560), MelConfig(hop_length=256)).shape
    torch.Size([1, 80, 10])
    """
    if not isinstance(waveform, torch.Tensor) or waveform.dtype not in (
        torch.float32,
        torch.float64,
    ):
        kind = waveform.dtype if isinstance(waveform, torch.Tensor) else type(waveform).__name__
        raise ValueError(f"waveform is {kind}, expected a float32 or float64 tensor")
    if waveform.ndim != 2:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}, expected (B, T)")
    hop = config.hop_length
    samples = waveform.shape[1]
    frames = samples // hop
    if frames == 0:
        raise ValueError(f"waveform has {samples} samples, a mel needs at least one hop ({hop})")
    exact = torch.float32 if waveform.device.type == "mps" else torch.float64
    filters, window = _filters_and_window(config, waveform.device, exact)
    before = _samples_before(config)
    # The last frame's window ends at (frames - 1) * hop - before + n_fft.
    after = max((frames - 1) * hop - before + config.n_fft - samples, 0)
    padded = _pad(waveform, before, after, config.padding)
    mel = waveform.new_empty(waveform.shape[0], config.bands, frames)
    for first in range(0, frames, BLOCK_FRAMES):
        last = min(first + BLOCK_FRAMES, frames)
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
        bins = (spectrum.real.square() + spectrum.imag.square() + config.power_offset).clamp_(
            min=config.power_floor
        )
        if config.power == 1:
            bins = bins.sqrt_()
        mel[..., first:last] = _compress(filters @ bins, config)
    # One check of the result, a hundredth the size of the waveform: what is not finite in there is
    # not finite here.
    if not torch.isfinite(mel).all():
        raise ValueError("waveform holds NaN or infinity (or values beyond 1e100)")
    return mel


def mel_filter_bank(config: MelConfig) -> torch.Tensor:
    """Triangular filters, from the bins of the Fourier transform to mel bands; equals `librosa.filters.mel`.

    Band m rises from edge m to edge m + 1 and falls to edge m + 2, the bands + 2 edges lying evenly
    on the mel scale. (Our own, as torchaudio's is computed in float32, where a band's first bins
    are off by up to 1e-3 of themselves, and importing librosa takes seconds.)

    Parameters
    ----------
    config : MelConfig

    Returns
    -------
    Tensor, shape (M, n_fft // 2 + 1), float64

    Warns
    -----
    UserWarning
        If a band is too narrow to hold any bin: it would be at the floor always.
    """
    fmax = config.sample_rate / 2 if config.fmax is None else config.fmax
    low, high = (_hz_to_mel(frequency, config.mel_scale) for frequency in (config.fmin, fmax))
    edges = _mel_to_hz(
        torch.linspace(low, high, config.bands + 2, dtype=torch.float64), config.mel_scale
    )
    bins = (
        torch.arange(config.n_fft // 2 + 1, dtype=torch.float64) * config.sample_rate / config.n_fft
    )
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rise, fall).clamp(min=0.0)
    if empty := (filters.amax(dim=1) == 0).nonzero()[:, 0].tolist():
        warnings.warn(
            f"mel bands {empty} hold no bin of an n_fft of {config.n_fft}: use a larger n_fft or fewer than "
            f"{config.bands} bands",
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


def _mel_to_hz(mels: torch.Tensor, scale: MelScale) -> torch.Tensor:
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
def _filters_and_window(
    config: MelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    window = _WINDOWS[config.window](config.window_length, dtype=torch.float64)
    return mel_filter_bank(config).to(device, dtype), window.to(device, dtype)


def _samples_before(config: MelConfig) -> int:
    """Samples that lie in the transform of frame f before f * hop: where `centre` puts its middle."""
    if config.centre == "start":
        return config.n_fft // 2
    return (config.n_fft - config.hop_length) // 2


def _pad(waveform: torch.Tensor, before: int, after: int, padding: Padding) -> torch.Tensor:
    """(B, T) -> (B, before + T + after)."""
    if padding == "zeros":
        return torch.nn.functional.pad(waveform, (before, after))
    # Mirrored about the end samples without repeating them, again and again: a triangle wave of
    # period 2 * (T - 1). (torch's own "reflect" stops at T - 1 samples, and a spoken digit can be
    # shorter than a window.)
    samples = waveform.shape[1]
    period = max(2 * (samples - 1), 1)
    outside = torch.cat([torch.arange(-before, 0), torch.arange(samples, samples + after)]) % period
    edges = waveform[
        :, torch.minimum(outside, period - outside).clamp_(max=samples - 1).to(waveform.device)
    ]
    return torch.cat([edges[:, :before], waveform, edges[:, before:]], dim=1)


def _compress(mel: torch.Tensor, config: MelConfig) -> torch.Tensor:
    mel = mel.clamp_(min=config.floor) if config.floor_mode == "clip" else mel.add_(config.floor)
    if config.log_base == "e":
        mel = mel.log_()
    elif config.log_base == "10":
        mel = mel.log10_()
    elif config.log_base == "db":
        mel = mel.log10_() * (20.0 / config.power)
    mel = mel * config.scale + config.shift
    return mel if config.clip is None else mel.clamp(*config.clip)


def _refusal(field: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"MelConfig: {field} is {value}, expected {wanted}")


def _integer(field: str, value: Any) -> int:
    if isinstance(value, bool):
        raise _refusal(field, value, "an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise _refusal(field, repr(value), "an integer") from None


def _number(field: str, value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise _refusal(field, repr(value), "a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _refusal(field, repr(value), "a number") from None
    if not math.isfinite(number):
        raise _refusal(field, number, "a finite number")
    return number
