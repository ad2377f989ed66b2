"""Log-mel spectrograms: `log_mel`, of the settings in `wavear.mel.config`.

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

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError, require
from wavear.common.words import counted
from wavear.mel.config import MelConfig, MelScale, Padding
from wavear.mel.features import FeatureConfig

# Frames computed at once: bounds the memory for an hour-long recording to that for some seconds.
BLOCK_FRAMES = 4096
_BLOCK_BINS = BLOCK_FRAMES * 2049  # Fourier bins at once, where n_fft is above 4096


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
    before = config.samples_before
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
