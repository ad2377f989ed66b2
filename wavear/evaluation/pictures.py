"""Pictures for the report, as PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.evaluation.clips import of_run

_DEPTH = 80.0  # dB from the brightest to the darkest
_INK, _MUTED, _MODEL = "#1d2430", "#8a93a3", "#1457a8"


def spectrogram(waveform: np.ndarray, rate: int, top: float | None = None) -> tuple[bytes, float]:
    """Spectrogram from 0 to half of the rate, 80 dB deep, windows of about 23 ms.

    Parameters
    ----------
    waveform : array, shape (T,)
    rate : int
        Hz.
    top : float, optional
        dB that the brightest colour stands for; by default the loudest there is. Pictures with one
        top can be compared.

    Returns
    -------
    bytes: PNG
    float: the top
    """
    n_fft = 2 ** round(np.log2(0.023 * rate))
    x = torch.from_numpy(np.ascontiguousarray(waveform, np.float32))
    x = torch.nn.functional.pad(x, (0, max(n_fft - x.numel(), 0)))
    hop = max(n_fft // 4, x.numel() // 1500)  # no more columns than a screen has
    spectrum = (
        torch.stft(x, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)
        .abs()
        .numpy()
    )
    decibels = 20 * np.log10(np.maximum(spectrum, 1e-7))
    top = float(decibels.max()) if top is None else top
    figure, axes = _figure(5.4, 2.15)
    extent = (0, x.numel() / rate, 0, rate / 2000)
    axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        extent=extent,
        vmin=top - _DEPTH,
        vmax=top,
        cmap="magma",
    )
    axes.set_xlabel("s")
    axes.set_ylabel("kHz")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure), top


def curves(checkpoint: str | Path) -> bytes | None:
    """Bits per sample over the steps of the run that a checkpoint is of, from its metrics.csv.

    Returns
    -------
    bytes: PNG; or None, if there is no such file or no curve in it
    """
    path = of_run(checkpoint, "metrics.csv")
    if path is None:
        return None
    training, held_out = _read_curves(path)
    if not training and not held_out:
        return None
    figure, axes = _figure(9.6, 3.0)
    if training:
        steps, bits = np.array(training).T
        axes.plot(steps, bits, color=_MUTED, linewidth=0.6, alpha=0.55, label="training, segments")
        if len(bits) > 20:
            width = max(len(bits) // 40, 2)
            smooth = np.convolve(bits, np.ones(width) / width, mode="valid")
            axes.plot(
                steps[width - 1 :], smooth, color=_MUTED, linewidth=1.6, label="its running mean"
            )
    if held_out:
        steps, bits = np.array(held_out).T
        axes.plot(
            steps,
            bits,
            color=_MODEL,
            linewidth=1.8,
            marker="o",
            markersize=3.5,
            label="held out, whole files",
        )
    every = [bits for _, bits in [*training, *held_out]]
    low, high = min(every), float(np.quantile(every, 0.95))
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    axes.set_xlabel("step")
    axes.set_ylabel("bits per sample")
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper right")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _read_curves(path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(step, bits) of training and of held-out files; rows that are cut short are passed over."""
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


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.xaxis.label.set(size=8, color=_INK)
    axes.yaxis.label.set(size=8, color=_INK)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def costs(models: Sequence[dict[str, Any]]) -> bytes | None:
    """Bits per sample against multiply-adds, and against speed, a point for each model.

    Parameters
    ----------
    models : sequence of dict
        Rows of `wavear.evaluation.model_table`; only those with bits on the common grid are shown.

    Returns
    -------
    bytes: PNG; or None, if fewer than two can be shown
    """
    shown = [m for m in models if m["common_bits"] is not None and m["multiply_adds"]]
    if len(shown) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    sides = figure.subplots(1, 2, sharey=True)
    for axes, title, values in (
        (sides[0], "multiply-adds per sample", [m["multiply_adds"] for m in shown]),
        (
            sides[1],
            "samples per second, one core",
            [max(m["speed"].values(), default=None) for m in shown],
        ),
    ):
        for model, x in zip(shown, values, strict=True):
            if x is None:
                continue
            bits = model["common_bits"]
            axes.plot(x, bits["mean"], "o", color=_MODEL, markersize=5)
            if bits["low"] is not None:
                axes.plot([x, x], [bits["low"], bits["high"]], color=_MODEL, linewidth=1)
            axes.annotate(
                model["name"],
                (x, bits["mean"]),
                (6, 4),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
            )
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel(title, fontsize=8, color=_INK)
        axes.tick_params(labelsize=8, colors=_INK, length=0)
        axes.grid(color="#e4e7ec", linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    sides[1].axvline(shown[0]["sample_rate"], color=_MUTED, linewidth=1, linestyle="--")
    sides[0].set_ylabel("bits per 16-bit sample", fontsize=8, color=_INK)
    return _png(figure)
