"""Pictures of audio and of training, as PNG or pixels."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.evaluation.clips import of_run
from wavear.mel.spectrogram import MelConfig, log_mel

DEPTH = 80.0  # dB from the brightest to the darkest
_INK, _MUTED, _MODEL, _LINE = "#1d2430", "#8a93a3", "#1457a8", "#e4e7ec"


def decibels(waveform: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Return the magnitude spectrogram in dB, with Hann windows.

    Parameters
    ----------
    waveform : array, shape (T,)
    n_fft, hop : int
        Samples.

    Returns
    -------
    array, shape (n_fft / 2 + 1, frames), at least -140 dB
    """
    import librosa

    x = np.asarray(waveform, np.float32)
    x = np.pad(x, (0, max(n_fft - x.size, 0)))
    spectrum = np.abs(librosa.stft(x, n_fft=n_fft, hop_length=hop, pad_mode="reflect"))
    return 20 * np.log10(np.maximum(spectrum, 1e-7))


def show_spectrogram(axes: Any, values: np.ndarray, seconds: float, rate: int, top: float) -> None:
    """Draw `decibels` from 0 to half of the rate, `DEPTH` deep, the brightest at `top` dB."""
    extent = (0, seconds, 0, rate / 2000)
    axes.imshow(
        values,
        origin="lower",
        aspect="auto",
        extent=extent,
        vmin=top - DEPTH,
        vmax=top,
        cmap="magma",
    )
    axes.set(xlabel="s", ylabel="kHz")


def mel_decibels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Return a log-mel spectrogram in dB, from 0 to half of the rate.

    Parameters
    ----------
    waveform : array, shape (T,)
    rate : int
        Hz.

    Returns
    -------
    array, shape (80 or fewer, frames), low frequencies first
    """
    n_fft = 2 ** round(math.log2(rate / 22050 * 1024))
    hop = n_fft // 8
    x = np.pad(np.asarray(waveform, np.float32), (0, max(hop - len(waveform), 0)))
    config = MelConfig(
        sample_rate=rate,
        n_fft=n_fft,
        window_length=n_fft,
        hop_length=hop,
        bands=min(80, n_fft // 8),
        fmax=None,
    )
    return log_mel(torch.from_numpy(x)[None], config)[0].numpy() * (20 / math.log(10))


def waveform_and_mel(
    waveform: np.ndarray, rate: int, top: float | None = None
) -> tuple[bytes, float]:
    """Draw a waveform and, below it, its log-mel spectrogram, `DEPTH` deep.

    Parameters
    ----------
    waveform : array, shape (T,)
    rate : int
        Hz.
    top : float, optional
        dB of the brightest colour; by default the loudest value. Pictures with one top can be
        compared.

    Returns
    -------
    bytes: PNG
    float: the top
    """
    values, seconds = mel_decibels(waveform, rate), len(waveform) / rate
    top = float(values.max()) if top is None else top
    figure, (above, below) = _figure(7.2, 3.2, rows=2, heights=(1, 2))
    above.plot(np.arange(len(waveform)) / rate, waveform, color=_MODEL, linewidth=0.4)
    above.set(xlim=(0, seconds), ylim=(-1, 1), xticks=[])
    show_spectrogram(below, values, seconds, rate, top)
    below.set(ylabel=f"mel band, 0 to {rate / 2000:g} kHz", yticks=[])
    return _png(figure), top


def mel_pixels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Draw `mel_decibels`, `DEPTH` deep, as pixels (height, width, 3), low frequencies below."""
    import matplotlib

    values = mel_decibels(waveform, rate)[::-1]
    shade = np.clip((values - values.max()) / DEPTH + 1, 0, 1)
    picture = (matplotlib.colormaps["magma"](shade)[..., :3] * 255).astype(np.uint8)
    return picture.repeat(2, axis=0).repeat(2, axis=1)


def spectrogram(waveform: np.ndarray, rate: int, top: float | None = None) -> tuple[bytes, float]:
    """Draw the spectrogram from 0 to half of the rate, with windows of about 23 ms.

    Parameters, depth and result are those of `waveform_and_mel`.
    """
    n_fft = 2 ** round(math.log2(0.023 * rate))
    values = decibels(waveform, n_fft, max(n_fft // 4, waveform.size // 1500))  # a screen's columns
    top = float(values.max()) if top is None else top
    figure, (axes,) = _figure(5.4, 2.15)
    show_spectrogram(axes, values, max(waveform.size, n_fft) / rate, rate, top)
    axes.spines[:].set_visible(False)
    return _png(figure), top


def curves(checkpoint: str | Path) -> bytes | None:
    """Draw bits per sample over the steps of the run that a checkpoint is of, from its metrics.csv.

    Returns
    -------
    bytes: PNG; or None, if there is no such file or no curve in it
    """
    path = of_run(checkpoint, "metrics.csv")
    training, held_out = ([], []) if path is None else _read_curves(path)
    if not training and not held_out:
        return None
    figure, (axes,) = _figure(9.6, 3.0)
    if training:
        steps, bits = np.array(training).T
        axes.plot(steps, bits, color=_MUTED, linewidth=0.6, alpha=0.55, label="training, segments")
        if len(bits) > 20:
            width = max(len(bits) // 40, 2)
            smooth = np.convolve(bits, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, color=_MUTED, linewidth=1.6, label="running mean")
    if held_out:
        label = "held out, whole files"
        axes.plot(*np.array(held_out).T, "o-", color=_MODEL, lw=1.8, markersize=3.5, label=label)
    every = [bits for _, bits in [*training, *held_out]]
    low, high = min(every), float(np.quantile(every, 0.95))
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    axes.set(xlabel="step", ylabel="bits per sample")
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper right")
    return _png(figure)


def _read_curves(path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (step, bits) of training and of held-out files, without rows cut short."""
    training, held_out = [], []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            for column, points in (("train_bits", training), ("validation_bits", held_out)):
                try:
                    point = float(row.get("step") or "nan"), float(row.get(column) or "nan")
                except ValueError:
                    continue
                if np.isfinite(point).all():
                    points.append(point)
    return training, held_out


def costs(models: Sequence[dict[str, Any]]) -> bytes | None:
    """Draw bits per sample against multiply-adds, and against speed, a point for each model.

    Parameters
    ----------
    models : sequence of dict
        Rows of `wavear.evaluation.model_table`; those without bits on the common grid are left out.

    Returns
    -------
    bytes: PNG; or None, if fewer than two can be shown
    """
    shown = [m for m in models if m["common_bits"] is not None and m["multiply_adds"]]
    if len(shown) < 2:
        return None
    figure, sides = _figure(9.6, 3.4, columns=2)
    kinds = {
        "multiply-adds per sample": [m["multiply_adds"] for m in shown],
        "samples per second, one core": [max(m["speed"].values(), default=None) for m in shown],
    }
    for axes, (title, values) in zip(sides, kinds.items(), strict=True):
        for model, x in zip(shown, values, strict=True):
            if x is None:
                continue
            bits, note = model["common_bits"], {"fontsize": 8, "color": _INK}
            axes.plot(x, bits["mean"], "o", color=_MODEL, markersize=5)
            if bits["low"] is not None:
                axes.plot([x, x], [bits["low"], bits["high"]], color=_MODEL, linewidth=1)
            place = (x, bits["mean"])
            axes.annotate(model["name"], place, (6, 4), textcoords="offset points", **note)
        axes.set(xscale="log", xlabel=title)
        axes.margins(x=0.4, y=0.15)
        axes.grid(color=_LINE, linewidth=0.8)
    sides[1].axvline(shown[0]["sample_rate"], color=_MUTED, linewidth=1, linestyle="--")
    sides[0].set_ylabel("bits per 16-bit sample")
    return _png(figure)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] = (1,)
) -> tuple[Any, Sequence[Any]]:
    """Return a figure and its axes, which share the values of a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, sharey="row", squeeze=False, height_ratios=heights)
    # Inches for the labels. A layout that measures them takes as long as all the rest.
    right, top = 1 - 0.1 / width, 1 - 0.08 / height
    figure.subplots_adjust(0.55 / width, 0.42 / height, right, top, wspace=0.1, hspace=0.1)
    sides = list(grid.flat)
    for axes in sides:
        axes.tick_params(labelsize=8, colors=_INK, length=0)
        axes.xaxis.label.set(size=8, color=_INK)
        axes.yaxis.label.set(size=8, color=_INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, sides


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    settings = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
    figure.savefig(file, format="png", dpi=150, **settings)
    return file.getvalue()
