"""Load checkpoints: a directory with `config.json` and `model.safetensors`, never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from wavear.common.errors import WavearError, require
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel
from wavear.models.families import FAMILIES
from wavear.models.saving import CONFIG, FORMAT, WEIGHTS

# Fields added after the first checkpoints, with the values that their absence means.
LATER = {"law": "categorical", "mixtures": 10, "coarse_classes": 0, "pre_emphasis": 0.0}

HUB = "hf:"
"""Prefix of a name on the Hugging Face hub."""


class CheckpointError(WavearError):
    """A checkpoint that is damaged, foreign or of another version; the message gives the reason."""


def load(source: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load a saved model, ready to generate (in evaluation mode).

    Parameters
    ----------
    source : str or Path
        A directory that `save` wrote, or "hf:owner/name", a model on the Hugging Face hub.
    device : str or torch.device

    Returns
    -------
    AutoregressiveModel: of the class of its family, such as `WaveNet`

    Raises
    ------
    FileNotFoundError
        If there is no such directory, and no such model on the hub.
    CheckpointError
        If it is damaged or foreign; the message names the file and the fault.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = _find(source)
    path = directory / WEIGHTS
    described = read_config(directory)
    model = _build(described, directory / CONFIG)
    names = described.get("training", {}).get("speakers", [])
    if isinstance(names, list) and len(names) == model.config.speakers:
        model.speaker_names = tuple(map(str, names))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    _check_tensors(model, tensors, path)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors)
    return model.to(device).eval()


def read_config(source: str | Path) -> dict:
    """Return the description in a checkpoint, without its weights.

    Returns
    -------
    dict with the keys "format", "family", "config" and "training"

    Raises
    ------
    FileNotFoundError, CheckpointError
        As `load`.
    """
    from safetensors import SafetensorError, safe_open

    directory = _find(source)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            found = [str(path.parent) for path in sorted(directory.glob(f"*/{CONFIG}"))]
            hint = f" (there is one in {', '.join(found)})" if found else ""
            raise CheckpointError(
                f"{directory} is not a wavear checkpoint: {name} is missing{hint}"
            )
    described = _parse((directory / CONFIG).read_bytes(), directory / CONFIG)
    _settings(described, directory / CONFIG)
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            text = (file.metadata() or {}).get("wavear")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{directory / WEIGHTS} is damaged or not a safetensors file: {error}"
        ) from None
    own = described if text is None else _parse(text.encode(), directory / WEIGHTS)
    if (own["family"], own["config"]) != (described["family"], described["config"]):
        raise CheckpointError(
            f"{directory}: {CONFIG} and {WEIGHTS} are of two models: their configurations differ"
        )
    return described


def _parse(text: bytes, path: Path) -> dict:
    try:
        described = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged, not valid JSON: {error}") from None
    if not isinstance(described, dict) or not {"family", "format"} <= set(described):
        raise CheckpointError(
            f"{path} is not of a wavear checkpoint: it has no 'format' and 'family'"
        )
    if described["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {described['format']!r}; this version of wavear reads {FORMAT}"
        )
    family = described["family"]
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{path} has family {family!r}, known are {', '.join(FAMILIES)}")
    for name in ("config", "training"):
        if not isinstance(described.get(name, {} if name == "training" else None), dict):
            raise CheckpointError(f"{path}: {name!r} is missing or not an object")
    return described


def _settings(described: dict, path: Path) -> dict:
    """Return the fields of the configuration, all of them and no others."""
    config_class = FAMILIES[described["family"]][1]
    known = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in LATER.items() if name in known} | described["config"]
    wrong = [f"{name} missing" for name in sorted(known - set(settings))]
    wrong += [f"{name} unknown" for name in sorted(set(settings) - known)]
    if wrong:
        raise CheckpointError(
            f"{path}: 'config' does not fit a {described['family']}: {', '.join(wrong)}"
        )
    return settings


def _build(described: dict, path: Path) -> AutoregressiveModel:
    family, config_class = FAMILIES[described["family"]]
    settings = _settings(described, path)
    try:
        if settings["mel"] is not None:
            settings["mel"] = MelConfig.from_dict(settings["mel"])
        return family(config_class(**settings))
    except (AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_tensors(
    model: AutoregressiveModel, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    expected = model.state_dict()
    if missing := sorted(set(expected) - set(tensors)):
        raise CheckpointError(f"{path} lacks {_some(missing)}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path} holds {_some(unknown)}, unknown to the configuration")
    for name, tensor in tensors.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _find(source: str | Path) -> Path:
    require(source, (str, os.PathLike), "checkpoint", "the path of a folder")
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(
            f"{source} is a file: give the directory that holds {CONFIG} and {WEIGHTS}"
        )
    # A mistyped path must not reach the hub, so a name there has to be marked.
    name = str(source).removeprefix(HUB)
    if name == str(source):
        hint = f" (a model on the Hugging Face hub is {HUB}{name})" if name.count("/") == 1 else ""
        raise FileNotFoundError(f"{source}: no such directory{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except HFValidationError:
        raise FileNotFoundError(f"{source}: the hub has owner/name only") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{source}: the hub did not provide it: {reason}") from None
