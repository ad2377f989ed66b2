"""Load checkpoints: a directory with `config.json` and `model.safetensors`, never a pickle."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wavear.common.errors import WavearError, one_line, require
from wavear.common.untrusted import parse_json
from wavear.mel.conventions import frames_from_dict
from wavear.models.base import AutoregressiveModel
from wavear.models.families import FAMILIES
from wavear.models.saving import CONFIG, FORMAT, WEIGHTS, non_finite

# Fields added after the first checkpoints, with the values that their absence means.
LATER = {
    "law": "categorical",
    "mixtures": 10,
    "coarse_classes": 0,
    "pre_emphasis": 0.0,
    "conditioning_scales": [],  # as JSON has it
    "conditioning_slope": 0.2,
}

HUB = "hf:"
"""Prefix of a name on the Hugging Face hub."""


_FLOATS = ("F32", "F64", "F16", "BF16")  # types of weights, as safetensors names them
_MOMENTARY = 2**16  # numbers of the first values that a model makes besides its weights
_LARGEST_STATE = 2**26  # numbers in a stream's state: those of the default models are 131,000


# By which models make weights and states, before all else of the same size.
_MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.Tensor.new_zeros)


class CheckpointError(WavearError):
    """A checkpoint that is damaged, foreign or of another version; the message gives the reason."""


SHIPPED = Path(__file__).parents[1] / "voices"
"""Folder of the models that come with wavear."""
VOICE = "voice"
"""Name of the one that is used where none is given."""


def load(source: str | Path = VOICE, device: str | torch.device = "cpu") -> Any:
    """Load a saved model, ready to generate (in evaluation mode).

    Parameters
    ----------
    source : str or Path
        "voice", the speech model that comes with wavear; a directory that `save` wrote (one of the
        same name is "./voice"); or "hf:owner/name", a model on the Hugging Face hub.
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
    described, header = read_config(directory), _header(path)
    model = _build(described, directory / CONFIG, header)
    _check_header(model, header, path)
    _check_state(model, directory / CONFIG)
    training = described.get("training")
    names = training.get("speakers") if isinstance(training, dict) else None
    if isinstance(names, list) and names and len(names) == model.config.speakers:
        model.speaker_names = tuple(map(str, names))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    if name := non_finite(tensors):
        raise CheckpointError(
            f"{path}: {name} holds NaN or infinity, from a training that diverged: use another"
            " checkpoint of the run"
        )
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


def saved_config(source: str | Path) -> tuple[str, Any]:
    """Return the family of a checkpoint, and the configuration of its model.

    Raises
    ------
    FileNotFoundError, CheckpointError
        As `load`.
    """
    described = read_config(source)
    return described["family"], _config(described, _find(source) / CONFIG)


def _parse(text: bytes, path: Path) -> dict:
    try:
        described = parse_json(text.decode("utf-8"))
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


def _config(described: dict, path: Path) -> Any:
    settings = _settings(described, path)
    try:
        if settings["mel"] is not None:
            settings["mel"] = frames_from_dict(settings["mel"])
        return FAMILIES[described["family"]][1](**settings)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def _build(
    described: dict, path: Path, header: dict[str, tuple[str, list[int]]]
) -> AutoregressiveModel:
    """Return a model of random weights, no larger than the weights in a file."""
    config = _config(described, path)
    try:
        with _Budget(sum(math.prod(shape) for _, shape in header.values()) + _MOMENTARY):
            return FAMILIES[described["family"]][0](config)
    except MemoryError:
        raise CheckpointError(
            f"{path} is of a larger model than {WEIGHTS}, which holds {len(header)} tensors"
        ) from None
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


class _Budget(TorchFunctionMode):
    """Refuse to make tensors of more than `elements` numbers altogether.

    To build the model on torch's device "meta" first would do, too, but importing what that needs
    takes 5 s.
    """

    def __init__(self, elements: int):
        super().__init__()
        self.left = elements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _MAKERS:
            sizes = args[1:] if func is torch.Tensor.new_zeros else args
            sizes = sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes
            self.left -= math.prod(size for size in sizes if isinstance(size, int))
            if self.left < 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the type and the shape of each tensor of a file; safetensors compares its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None


def _check_header(
    model: AutoregressiveModel, header: dict[str, tuple[str, list[int]]], path: Path
) -> None:
    """Refuse a file whose tensors are not those of a model."""
    expected = model.state_dict()
    if missing := sorted(set(expected) - set(header)):
        raise CheckpointError(f"{path} lacks {_some(missing)}")
    if unknown := sorted(set(header) - set(expected)):
        raise CheckpointError(f"{path} holds {_some(unknown)}, unknown to the configuration")
    for name, (kind, found) in header.items():
        shape = tuple(expected[name].shape)
        if tuple(found) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(found)}, expected {shape}")
        if kind not in _FLOATS:
            raise CheckpointError(
                f"{path}: {name} is {kind}, expected {', '.join(_FLOATS)}: convert the weights"
            )


def _check_state(model: AutoregressiveModel, path: Path) -> None:
    """Refuse a model whose state, such as the past of its layers, is beyond all use."""
    try:
        with _Budget(_LARGEST_STATE):
            model.init_state(1)
    except MemoryError:
        raise CheckpointError(
            f"{path}: the model's state has more than {_LARGEST_STATE:,} numbers for each stream:"
            " its dilations or windows are too long"
        ) from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _find(source: str | Path) -> Path:
    require(source, (str, os.PathLike), "checkpoint", "the path of a folder")
    if str(source) == VOICE:
        return SHIPPED / VOICE
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
