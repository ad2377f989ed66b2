"""Import checkpoints of other projects, exactly: `forward` returns what the source's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.exchange.layouts import LAYOUTS, Tensors
from wavear.exchange.parts import assemble
from wavear.mel.spectrogram import MelConfig
from wavear.mel.torch_files import load_tensors
from wavear.models.wavenet import WaveNet


def import_checkpoint(
    source: str | Path,
    *,
    stacks: int,
    sample_rate: int | None = None,
    mel: MelConfig | None = None,
    statistics: str | Path | None = None,
) -> tuple[str, WaveNet]:
    """Read a checkpoint of another project.

    Parameters
    ----------
    source : str or Path
        A .pt or .pth file: a dict of tensors, or one with an entry "state_dict". It is read by
        torch's loader that runs no code.
    stacks : int
        Cycles of dilations; the weights do not tell.
    sample_rate : int, optional
        Of the audio, Hz; by default that of the mel.
    mel : MelConfig, optional
        The mels that the source was trained on; None for one without mels.
    statistics : str or Path, optional
        A .npy file (2, M): mean and deviation of each band, by which the source standardised its
        mels; None: it did not.

    Returns
    -------
    str: the name of the layout (`wavear.exchange.layouts.LAYOUTS`)
    WaveNet

    Raises
    ------
    WavearError
        Naming the file and the first tensor that does not fit.
    """
    path = Path(source)
    rate = sample_rate if sample_rate is not None else mel.sample_rate if mel is not None else None
    try:
        tensors = Tensors(_state_dict(path))
        layout = next((name for name, (sign, _) in LAYOUTS.items() if sign in tensors), None)
        if layout is None:
            first = next(iter(tensors.left), "none")
            signs = ", ".join(sign for sign, _ in LAYOUTS.values())
            raise WavearError(f"its layout is unknown: tensor {first}; expected one of {signs}")
        parts = LAYOUTS[layout][1](tensors)
        tensors.finish()
        if rate is None:
            raise WavearError("give its sample rate with --sample-rate; the file has none")
        model = assemble(parts, stacks, rate, mel)
        if statistics is not None:
            _standardise(model, Path(statistics))
    except WavearError as error:
        raise WavearError(f"{path}: {error}") from None
    return layout, model


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    loaded: Any = load_tensors(path)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise WavearError("it holds no state dict, a dict of tensors by name")
    return loaded


def _standardise(model: WaveNet, path: Path) -> None:
    """Let the model standardise its mels as the source did."""
    if model.config.mel is None:
        raise WavearError("the model has no mels to standardise: drop --statistics")
    bands = model.config.mel.bands
    values = np.load(path, allow_pickle=False)
    if values.shape != (2, bands) or not np.isfinite(values).all() or (values[1] <= 0).any():
        raise WavearError(
            f"{path} has shape {values.shape}; expected (2, {bands}), mean and deviation above 0"
        )
    model.conditioning.mel_mean.copy_(torch.from_numpy(values[0]))
    model.conditioning.mel_deviation.copy_(torch.from_numpy(values[1]))
