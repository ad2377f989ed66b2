"""Write a checkpoint: `config.json` and `model.safetensors` in a directory, the Hugging Face layout. No pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from wavear.common.atomic import replace_file

if TYPE_CHECKING:
    from wavear.models.base import AutoregressiveModel

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(
    model: AutoregressiveModel,
    directory: str | Path,
    *,
    overwrite: bool = False,
    training: dict | None = None,
) -> Path:
    """Write a model so that `load` needs nothing else.

    Each file appears whole or not at all. The weights carry a copy of the configuration, so that
    files of two different models, mixed by hand or by a crash between the two files, are told apart
    by `load`.

    Parameters
    ----------
    model : AutoregressiveModel
    directory : str or Path
        Made where it is missing.
    overwrite : bool
        Replace a checkpoint that is there.
    training : dict, optional
        What is worth knowing of how it was trained (steps, bits per sample...), as JSON; see
        `read_config`.

    Returns
    -------
    Path: the directory

    Raises
    ------
    FileExistsError
        If there is a checkpoint already and `overwrite` is false.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not overwrite and (directory / name).exists():
            raise FileExistsError(
                f"{directory / name} exists: choose another directory, or overwrite"
            )
    family = vars(type(model)).get("family")  # its own: a subclass of a family is another class
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is not a family that this version can save: it has no `family`"
        )
    described = {
        "format": FORMAT,
        "family": family,
        "config": dataclasses.asdict(model.config),
        "training": training or {},
    }
    text = json.dumps(described, indent=2)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(
        directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"wavear": text})
    )
    replace_file(directory / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return directory
