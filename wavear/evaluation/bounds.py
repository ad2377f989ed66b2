"""What needs no training, to see a model's measures beside: the codes' round trip above, Griffin-Lim below."""

from __future__ import annotations

import numpy as np
import torch

from wavear.audio.emphasis import Deemphasis, emphasised
from wavear.audio.grid import Grid
from wavear.mel.spectrogram import MelConfig, mel_filter_bank

_WINDOWS = {"hann": "hann", "hamming": "hamming", "blackman": "blackman", "rectangular": "boxcar"}
ITERATIONS = 60


def grid_round_trip(waveform: torch.Tensor, grid: Grid, pre_emphasis: float = 0.0) -> torch.Tensor:
    """A waveform through the codes and back: the best that a model of these codes can do.

    Parameters
    ----------
    waveform : Tensor, shape (T,)
    grid : Grid
    pre_emphasis : float
        Of what the codes are, see `wavear.audio.emphasis`.

    Returns
    -------
    Tensor, shape (T,), float32
    """
    return Deemphasis(pre_emphasis)(grid.decode(grid.encode(emphasised(waveform, pre_emphasis))))


def griffin_lim(mel: np.ndarray, config: MelConfig, seed: int = 0) -> np.ndarray:
    """A waveform from a log-mel without a model.

    The mel's compression is undone, its filters by their pseudo-inverse, negative values set to 0
    (what `librosa.util.nnls` starts from, and its iterations did not improve on), and phases are
    found by 60 iterations of the fast Griffin-Lim algorithm (Perraudin, Balazs and Søndergaard,
    2013; `librosa.griffinlim`, momentum 0.99), from random ones.

    Parameters
    ----------
    mel : array, shape (M, F)
        As `log_mel` makes it.
    config : MelConfig
    seed : int
        Of the first phases.

    Returns
    -------
    array, shape (F * hop,), float32 in [-1, 1]
    """
    from wavear.common.compiled import prepare_numba

    prepare_numba()
    import librosa

    bands = _uncompressed(np.asarray(mel, np.float64), config)
    bins = np.maximum(np.linalg.pinv(mel_filter_bank(config).numpy()) @ bands, 0)
    magnitudes = bins if config.power == 1 else np.sqrt(bins)
    waveform = librosa.griffinlim(
        magnitudes,
        n_iter=ITERATIONS,
        hop_length=config.hop_length,
        win_length=config.window_length,
        n_fft=config.n_fft,
        window=_WINDOWS[config.window],
        center=False,
        random_state=np.random.default_rng(seed),
    )
    # Frame 0 of the result begins at its first sample, that of the mel so many samples before the
    # waveform's.
    before = config.window_span[0] + (config.n_fft - config.window_length) // 2
    length = mel.shape[1] * config.hop_length
    waveform = np.pad(
        waveform[before : before + length], (0, max(before + length - waveform.size, 0))
    )
    return np.clip(waveform, -1, 1).astype(np.float32)


def _uncompressed(mel: np.ndarray, config: MelConfig) -> np.ndarray:
    """What a band holds before the logarithm."""
    value = (mel - config.shift) / config.scale
    if config.log_base == "e":
        return np.exp(value)
    if config.log_base == "10":
        return 10**value
    if config.log_base == "db":
        return 10 ** (value / (20 if config.power == 1 else 10))
    return value
