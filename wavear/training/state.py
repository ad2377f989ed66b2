"""The training state on disk: tensors as safetensors, the rest as JSON, in one file that appears whole. No pickle.

`encode` takes a nest of dictionaries, lists, tuples, tensors, numbers, strings and None apart, and refuses anything
else: what it cannot write, it could not read back either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from wavear.files import replace_file

_KEY = "wavear_state"


def encode(value: Any, tensors: dict[str, torch.Tensor], where: str = "state") -> Any:
    """JSON for `value`; its tensors go to `tensors`, under their place in the nest.

    Raises
    ------
    TypeError
        If there is something in it that JSON and tensors cannot hold; the message names its place.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has a key of type {type(key).__name__}, expected str or int")
        return {"dict": [[key, encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [encode(item, tensors, f"{where}.{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
    raise TypeError(f"{where} is of type {type(value).__name__}, which a training state cannot hold")


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def save_state(state: dict[str, Any], path: str | Path) -> None:
    """Write a training state; `path` holds the old one or the new one, at any moment."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(state, tensors))
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={_KEY: text}))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or not a training state.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no training state to go on from")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no training state: {error}") from None
    if text is None:
        raise ValueError(f"{path} is no training state: weights only")
    return decode(json.loads(text), tensors)


class StateIO(CheckpointIO):
    """Makes Lightning read and write its checkpoints with `save_state` and `load_state`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_state(checkpoint, path)

    @override
    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict:
        return load_state(path)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
