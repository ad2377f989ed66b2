"""Bounds for a model without training: the round trip through its codes, and Griffin-Lim."""

from __future__ import annotations

import numpy as np
import torch

from wavear.audio.emphasis import Deemphasis, emphasised
from wavear.audio.grid import Grid
from wavear.evaluation.metrics import mels_at
from wavear.mel.conventions import Frames
from wavear.mel.spectrogram import MelConfig, log_mel, mel_filter_bank

_WINDOWS = {"hann": "hann", "hamming": "hamming", "blackman": "blackman", "rectangular": "boxcar"}
ITERATIONS = 60


def grid_round_trip(waveform: torch.Tensor, grid: Grid, pre_emphasis: float = 0.0) -> torch.Tensor:
    """Return a waveform after encoding and decoding: the best that a model of these codes can do.

    Parameters
    ----------
    waveform : Tensor, shape (T,)
    grid : Grid
    pre_emphasis : float
        Of the codes, see `wavear.audio.emphasis`.

    Returns
    -------
    Tensor, shape (T,), float32
    """
    return Deemphasis(pre_emphasis)(grid.decode(grid.encode(emphasised(waveform, pre_emphasis))))


def bound_without_model(
    waveform: np.ndarray, mel: torch.Tensor, config: Frames, seed: int
) -> np.ndarray:
    """Return Griffin-Lim's audio (T,) of a mel (M, F), or for features of a usual mel."""
    if not isinstance(config, MelConfig):
        config = mels_at(config.sample_rate)
        missing = -waveform.size % config.hop_length
        mel = log_mel(torch.from_numpy(np.pad(waveform, (0, missing)))[None], config)[0]
    return griffin_lim(mel.numpy(), config, seed)[: waveform.size]


def griffin_lim(mel: np.ndarray, config: MelConfig, seed: int = 0) -> np.ndarray:
    """Return a waveform from a log-mel without a model.

    The compression is undone, then the filters by their pseudo-inverse, with negative values set to
    0 (the start of `librosa.util.nnls`, whose iterations did not improve on it). Phases come from
    60 iterations of the fast Griffin-Lim algorithm, from random ones (Perraudin, Balazs and
    Søndergaard, 2013; `librosa.griffinlim`, momentum 0.99).

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
    waveform = librosa.griffinlim(
        bins if config.power == 1 else np.sqrt(bins),
        n_iter=ITERATIONS,
        hop_length=config.hop_length,
        win_length=config.window_length,
        n_fft=config.n_fft,
        window=_WINDOWS[config.window],
        center=False,
        random_state=np.random.default_rng(seed),
    )
    # Frame 0 of the result begins at its first sample, frame 0 of the mel `before` samples earlier.
    before = config.window_span[0] + (config.n_fft - config.window_length) // 2
    length = mel.shape[1] * config.hop_length
    waveform = librosa.util.fix_length(waveform[before:], size=length)
    return np.clip(waveform, -1, 1).astype(np.float32)


def _uncompressed(mel: np.ndarray, config: MelConfig) -> np.ndarray:
    """Return the band values before the logarithm."""
    value = (mel - config.shift) / config.scale
    if config.log_base == "none":
        return value
    if config.log_base == "db":
        return 10 ** (value / (20 if config.power == 1 else 10))
    return np.exp(value) if config.log_base == "e" else 10**value
