"""`MelConfig`, the settings that define a mel. No torch here: the command line reads it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wavear.common.errors import WavearError, require
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
    """Where a frame's window is centred: see docs/mels.md."""
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
        before = self.samples_before
        # torch.stft centres the window in n_fft.
        start = (self.n_fft - self.window_length) // 2
        return before - start, start + self.window_length - before

    @property
    def samples_before(self) -> int:
        """Samples before f * hop in the transform of frame f."""
        if self.centre == "start":
            return self.n_fft // 2
        return (self.n_fft - self.hop_length) // 2

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
