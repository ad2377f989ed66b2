"""Every preset equals the mels of its project, computed here with librosa, torch and torchaudio.

Where the published code centres its windows on multiples of the hop (`center=True`), it has one
frame more than ours; ours are its first T // hop frames.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import librosa
import numpy as np
import pytest
import torch
import torchaudio

from wavear import MelConfig, audio, log_mel
from wavear.mel.presets import PRESETS

Wave = np.ndarray  # (T,), float64


def bank(rate: int, n_fft: int, fmin: float, fmax: float | None) -> np.ndarray:
    return librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=80, fmin=fmin, fmax=fmax, dtype=np.float64
    )


def hifigan(wave: Wave) -> np.ndarray:
    """Compute `mel_spectrogram` of meldataset.py.

    It pads by (n_fft - hop) / 2 without centring, adds 1e-9 under the root, and clips at 1e-5
    before ln.
    """
    padded = torch.nn.functional.pad(
        torch.from_numpy(wave)[None, None], (384, 384), mode="reflect"
    )[0]
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(padded, 1024, 256, 1024, window, center=False, return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)[0].numpy()
    return np.log(np.maximum(bank(22050, 1024, 0, 8000) @ magnitude, 1e-5))


def nvidia_tacotron2(wave: Wave) -> np.ndarray:
    """Compute `STFT.transform` and `TacotronSTFT`.

    They convolve with the windowed Fourier basis, and clip at 1e-5 before ln.
    """
    padded = np.pad(wave, 512, mode="reflect")
    basis = np.fft.fft(np.eye(1024))[:513] * (
        0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    )
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::256].T
    magnitude = np.sqrt((basis.real @ frames) ** 2 + (basis.imag @ frames) ** 2)
    return np.log(np.maximum(bank(22050, 1024, 0, 8000) @ magnitude, 1e-5))


def r9y9(wave: Wave) -> np.ndarray:
    """Compute `logmelspectrogram` of audio.py, with hparams.py."""
    spectrum = librosa.stft(
        y=wave, n_fft=1024, hop_length=256, win_length=1024, window="hann", pad_mode="reflect"
    )
    return np.log10(np.maximum(bank(22050, 1024, 125, 7600) @ np.abs(spectrum), 1e-10))


def espnet(
    wave: Wave, rate: int = 22050, n_fft: int = 1024, hop: int = 256, window: int = 1024
) -> np.ndarray:
    """Compute `LogMelFbank`: torch.stft, powers and mels clipped at 1e-10, log10."""
    hann = torch.hann_window(window, dtype=torch.float64)
    spectrum = torch.stft(
        torch.from_numpy(wave), n_fft, hop, window, hann, pad_mode="reflect", return_complex=True
    )
    magnitude = torch.sqrt(torch.clamp(torch.view_as_real(spectrum).pow(2).sum(-1), min=1e-10))
    mel = torch.matmul(magnitude.T, torch.from_numpy(bank(rate, n_fft, 80, 7600)).T)
    return torch.clamp(mel, min=1e-10).log10().T.numpy()


def espnet_24k(wave: Wave) -> np.ndarray:
    """Compute `LogMelFbank` with the settings of the 24 kHz recipes."""
    return espnet(wave, 24000, 2048, 300, 1200)


def parallel_wavegan(wave: Wave) -> np.ndarray:
    """Compute `logmelfilterbank` of bin/preprocess.py."""
    spectrum = librosa.stft(
        wave, n_fft=1024, hop_length=256, win_length=None, window="hann", pad_mode="reflect"
    )
    return np.log10(np.maximum(1e-10, np.dot(np.abs(spectrum).T, bank(22050, 1024, 80, 7600).T))).T


def fatchord(wave: Wave) -> np.ndarray:
    """Compute `melspectrogram` of utils/dsp.py.

    It uses librosa.stft with its former padding (reflect), and maps -100..0 dB to 0..1.
    """
    spectrum = librosa.stft(y=wave, n_fft=2048, hop_length=275, win_length=1100, pad_mode="reflect")
    mel = librosa.feature.melspectrogram(
        S=np.abs(spectrum), sr=22050, n_fft=2048, n_mels=80, fmin=40
    )
    return np.clip((20 * np.log10(np.maximum(1e-5, mel)) + 100) / 100, 0, 1)


def torchaudio_mel(
    wave: Wave, n_fft: int, hop: int, window: int, fmin: float, fmax: float
) -> np.ndarray:
    """Compute `get_datasets` and `SpectralNormalization` of torchaudio's Tacotron 2 example.

    The file is examples/pipeline_tacotron2/train.py.
    """
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=22050,
        n_fft=n_fft,
        win_length=window,
        hop_length=hop,
        f_min=fmin,
        f_max=fmax,
        n_mels=80,
        mel_scale="slaney",
        normalized=False,
        power=1,
        norm="slaney",
    ).double()
    return torch.log(torch.clamp(transform(torch.from_numpy(wave)), min=1e-5)).numpy()


def torchaudio_tacotron2(wave: Wave) -> np.ndarray:
    return torchaudio_mel(wave, 1024, 256, 1024, 0.0, 8000.0)


def torchaudio_tacotron2_wavernn(wave: Wave) -> np.ndarray:
    return torchaudio_mel(wave, 2048, 275, 1100, 40.0, 11025.0)


def librosa_default(wave: Wave) -> np.ndarray:
    return librosa.power_to_db(librosa.feature.melspectrogram(y=wave, sr=22050), top_db=None)


def vocos_24k(wave: Wave) -> np.ndarray:
    """Compute `MelSpectrogramFeatures` of vocos: torchaudio's mels, then `safe_log`."""
    transform: Any = torchaudio.transforms.MelSpectrogram(
        sample_rate=24000, n_fft=1024, hop_length=256, n_mels=100, center=True, power=1
    ).double()
    # torchaudio computes window and filters in float32, too coarse near a floor of 1e-7.
    transform.spectrogram.window.copy_(torch.hann_window(1024, dtype=torch.float64))
    filters = librosa.filters.mel(
        sr=24000, n_fft=1024, n_mels=100, htk=True, norm=None, dtype=np.float64
    )
    assert np.abs(transform.mel_scale.fb.numpy().T - filters).max() < 1e-4
    transform.mel_scale.fb.copy_(torch.from_numpy(filters.T))
    return torch.log(torch.clip(transform(torch.from_numpy(wave)), min=1e-7)).numpy()


def bigvgan_v2(wave: Wave, rate: int, n_fft: int, hop: int, bands: int) -> np.ndarray:
    """Compute `mel_spectrogram` of BigVGAN's meldataset.py with win_size = n_fft, fmax null."""
    padding = (n_fft - hop) // 2
    padded = torch.nn.functional.pad(
        torch.from_numpy(wave)[None, None], (padding, padding), mode="reflect"
    )[0]
    window = torch.hann_window(n_fft, dtype=torch.float64)
    spectrum = torch.stft(padded, n_fft, hop, n_fft, window, center=False, return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)[0].numpy()
    filters = librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=bands, fmin=0, fmax=None, dtype=np.float64
    )
    return np.log(np.maximum(filters @ magnitude, 1e-5))


# Tolerances: ours rounds to float32 at the end, 6e-8 of the largest value. librosa's own calls
# have float32 filters (1.2e-7 of a band, 5e-7 dB) and complex64 spectra of float32 input only.
# torchaudio's filters are computed in float32, where differences of close frequencies cancel: 1e-3
# of a band whose sound is at its edge.
PUBLISHED: dict[str, tuple[Callable[[Wave], np.ndarray], float]] = {
    "hifigan": (hifigan, 2e-6),
    "nvidia-tacotron2": (nvidia_tacotron2, 2e-6),
    "r9y9": (r9y9, 2e-6),
    "espnet": (espnet, 2e-6),
    "espnet-24k": (espnet_24k, 2e-6),
    "parallel-wavegan": (parallel_wavegan, 2e-6),
    "fatchord": (fatchord, 1e-6),
    "torchaudio-tacotron2": (torchaudio_tacotron2, 2e-3),
    "torchaudio-tacotron2-wavernn": (torchaudio_tacotron2_wavernn, 2e-3),
    "librosa-default": (librosa_default, 1e-5),
    "vocos-24k": (vocos_24k, 2e-6),
    "bigvgan-v2-24k-100": (partial(bigvgan_v2, rate=24000, n_fft=1024, hop=256, bands=100), 2e-6),
    "bigvgan-v2-22k-80": (partial(bigvgan_v2, rate=22050, n_fft=1024, hop=256, bands=80), 2e-6),
    "bigvgan-v2-44k-128": (partial(bigvgan_v2, rate=44100, n_fft=2048, hop=512, bands=128), 2e-6),
}


def error(name: str, wave: Wave) -> float:
    """Return the largest difference between the preset and its independent computation."""
    config = MelConfig.preset(name)
    theirs = PUBLISHED[name][0](wave)
    ours = log_mel(torch.from_numpy(wave)[None].float(), config)[0].numpy()
    frames = len(wave) // config.hop_length
    assert ours.shape == (config.bands, frames)
    assert theirs.shape == (config.bands, frames + (config.centre == "start"))
    return float(np.abs(ours - theirs[:, :frames]).max())


def speechlike(samples: int) -> Wave:
    """Return gliding harmonics with pauses, hiss 60 dB below, and silence at the end."""
    time = np.arange(samples) / 22050
    phase = 2 * np.pi * (120 * time + 30 * np.sin(3 * time))
    voice = sum(np.sin(k * phase) / k for k in range(1, 40)) * np.maximum(
        np.sin(2 * np.pi * 2.5 * time), 0
    )
    wave = 0.2 * voice + 2e-4 * np.random.default_rng(0).normal(size=samples)
    wave[-samples // 8 :] = 0
    return wave.astype(np.float32).astype(np.float64)


def test_every_preset_has_its_computation():
    assert list(PUBLISHED) == list(PRESETS)


@pytest.mark.parametrize("samples", [30_000, 25_600, 25_599], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_published_code(name: str, samples: int):
    assert error(name, speechlike(samples)) < PUBLISHED[name][1]


@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_published_code_on_real_audio(name: str, data_dir):
    rate = MelConfig.preset(name).sample_rate
    for folder in ("ljspeech_mini", "kerstin_de", "sms_tools_sounds"):
        paths = [
            path
            for path in sorted((data_dir / folder).rglob("*"))
            if path.suffix in (".wav", ".flac")
        ]
        wave = (
            audio.read(paths[len(paths) // 2], sample_rate=rate, frames=4 * rate).double().numpy()
        )
        assert error(name, wave) < PUBLISHED[name][1]


def test_hifigan_and_tacotron2_differ_by_half_a_hop_and_a_trace():
    """HiFi-GAN's frame f lies half a hop after Tacotron 2's.

    After a delay of half a hop only the 1e-9 that HiFi-GAN adds makes a difference.
    """
    wave = torch.from_numpy(speechlike(30_000))[None]
    tacotron = log_mel(wave, MelConfig.preset("nvidia-tacotron2"))
    later = torch.nn.functional.pad(wave, (128, 0))
    hifigan = log_mel(later, MelConfig.preset("hifigan"))
    inside = slice(4, 108)
    shifted = (hifigan - tacotron)[0, :, inside]
    assert shifted.min() + 1e-9 >= 0
    # It adds at most 3.2e-5 to a bin, hence 1.47e-6 to a band, whose weights add up to 0.0465.
    # A band is at least 1e-5.
    assert 1e-4 < shifted.max() < np.log1p(0.147)
    assert shifted[(tacotron > np.log(1e-3))[0, :, inside]].max() < 1e-3
    unshifted = log_mel(wave, MelConfig.preset("hifigan"))
    assert (unshifted - tacotron)[0].abs().mean() > 0.1


def test_torchaudio_and_nvidia_have_one_definition():
    assert MelConfig.preset("torchaudio-tacotron2") == MelConfig.preset("nvidia-tacotron2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hifi-gan", "did you mean 'hifigan'"),
        ("tacotron2", "did you mean 'nvidia-tacotron2'"),
        ("ESPnet", "did you mean 'espnet'"),
        ("torchaudio_tacotron2", "did you mean 'torchaudio-tacotron2'"),
        ("x", "known are hifigan, "),
    ],
)
def test_an_unknown_preset_is_refused_with_suggestions(name: str, message: str):
    with pytest.raises(ValueError, match=f"^there is no mel preset '{name}': {message}"):
        MelConfig.preset(name)
