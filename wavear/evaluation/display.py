"""Sound and pictures in a notebook: each function returns an object that Jupyter shows as HTML.

The HTML is self-contained and needs no package of Jupyter: `View.html` can be written to a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from wavear.audio.waveforms import as_array, check_rate
from wavear.common.errors import WavearError
from wavear.evaluation.pages import flac, render, uri
from wavear.evaluation.pictures import curves, waveform_and_mel

__all__ = ["View", "curve", "hear", "side_by_side"]

_TEMPLATE = "display.html.j2"
Sound = Tensor | np.ndarray


@dataclass(frozen=True)
class View:
    """A player, a picture, or several, in one piece of HTML."""

    html: str = field(repr=False)  # a notebook would store it twice

    def _repr_html_(self) -> str:
        return self.html


def hear(waveform: Sound, sample_rate: int, label: str = "") -> View:
    """Show a player, the waveform and its log-mel spectrogram.

    Parameters
    ----------
    waveform : Tensor or array, shape (T,) or (1, T)
        Floating point in [-1, 1].
    sample_rate : int
        Hz.
    label : str
        A title.

    Raises
    ------
    WavearError
        If the waveform has another shape or type, or non-finite samples.

    Examples
    --------
    >>> view = hear(np.zeros(22050, np.float32), 22050, "silence")
    >>> "<audio" in view.html, "data:image/png" in view.html
    (True, True)
    """
    return side_by_side({label: waveform}, sample_rate)


def side_by_side(sounds: Mapping[str, Sound], sample_rate: int) -> View:
    """Show several sounds next to each other, with the colours of the first.

    Parameters
    ----------
    sounds : mapping of str to Tensor or array, shape (T,) or (1, T)
        By label, such as {"recording": x, "synthesis": y}.
    sample_rate : int
        Hz, of all of them.
    """
    rate = check_rate(sample_rate)
    shown, top = [], None
    for label, waveform in sounds.items():
        samples = _samples(waveform, label)
        picture, top = waveform_and_mel(samples, rate, top)
        shown.append((label, flac(samples, rate), uri("image/png", picture)))
    return View(render(_TEMPLATE, shown=shown))


def curve(run: str | Path) -> View:
    """Show the bits per sample of a training over its steps.

    Parameters
    ----------
    run : str or Path
        A run's folder, or one of its checkpoints.

    Raises
    ------
    WavearError
        If there is no `metrics.csv`, or no curve in it.
    """
    checkpoint = Path(run) / "last" if (Path(run) / "metrics.csv").is_file() else Path(run)
    picture = curves(checkpoint)
    if picture is None:
        raise WavearError(f"{run} has no metrics.csv with a curve: pass the folder of a run")
    return View(render(_TEMPLATE, shown=[("", "", uri("image/png", picture))]))


def _samples(waveform: Sound, label: str) -> np.ndarray:
    """Return the samples of one waveform as float32, shape (T,)."""
    x = as_array(waveform)
    x = x[0] if x.ndim == 2 and len(x) == 1 else x
    if x.ndim != 1 or not x.size or x.dtype.kind != "f":
        raise WavearError(
            f"{label or 'waveform'} is {x.dtype} of shape {as_array(waveform).shape}, expected"
            " floating point of shape (T,) or (1, T)"
        )
    if not np.isfinite(x).all():
        raise WavearError(f"{label or 'waveform'} has non-finite samples")
    return x.astype(np.float32).clip(-1, 1)
