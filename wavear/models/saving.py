"""Write a checkpoint: a directory of `config.json` and `model.safetensors`, without pickle.

This is the layout of Hugging Face.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavear.common.atomic import replace_file, replace_tensors
from wavear.models.card import write_card

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(
    directory: str | Path,
    family: str,
    config: Any,
    weights: dict[str, Tensor],
    *,
    overwrite: bool = False,
    training: dict | None = None,
) -> Path:
    """Write a model so that `wavear.load` needs nothing else; see `AutoregressiveModel.save`.

    A model card, README.md, is written too, unless somebody wrote or changed the one there.

    Each file appears whole or not at all. The weights carry a copy of the configuration: `load`
    detects files of two different models, mixed by hand or by a crash between the two files.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not overwrite and (directory / name).exists():
            raise FileExistsError(
                f"{directory / name} exists: choose another directory, or overwrite"
            )
    described = {
        "format": FORMAT,
        "family": family,
        "config": dataclasses.asdict(config),
        "training": training or {},
    }
    text = json.dumps(described, indent=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    directory.mkdir(parents=True, exist_ok=True)
    replace_tensors(directory / WEIGHTS, tensors, {"wavear": text})
    replace_file(directory / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_card(directory, described)
    return directory


def non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor with NaN or infinity, or ""."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return ""
