"""The training state on disk: tensors as safetensors, the rest as JSON, in one file that appears whole. No pickle.

`encode` takes a nest of dictionaries, lists, tuples, tensors, numbers, strings and None apart, and
refuses anything else: what it cannot write, it could not read back either.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from wavear.common.atomic import replace_file

_KEY, _SUM = "wavear_state", "wavear_crc32"


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
                raise TypeError(
                    f"{where} has a key of type {type(key).__name__}, expected str or int"
                )
        return {
            "dict": [[key, encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]
        }
    if type(value) in (list, tuple):
        items = [encode(item, tensors, f"{where}.{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which a training state cannot hold"
    )


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
    metadata = {_KEY: text, _SUM: _checksum(text, tensors)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of everything in a state: safetensors notices a file cut short, but not one whose bytes have changed."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, holds weights that are no numbers, or is not a training state.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no training state to go on from")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no training state: {error}") from None
    if (text := metadata.get(_KEY)) is None:
        raise ValueError(f"{path} is no training state: weights only")
    if _SUM in metadata and metadata[_SUM] != _checksum(
        text, tensors
    ):  # the first versions wrote none
        raise ValueError(f"{path} is damaged: its bytes are not those that were written (CRC-32)")
    try:
        state = decode(json.loads(text), tensors)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name, tensor in state.get("state_dict", {}).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path} is of no use: {name} holds NaN or infinity")
    return state


class StateIO(CheckpointIO):
    """Makes Lightning read and write its checkpoints with `save_state` and `load_state`.

    Parameters
    ----------
    read : dict, optional
        States by their path, read already; each is given away once.
    """

    def __init__(self, read: dict[str, dict[str, Any]] | None = None):
        super().__init__()
        self.read = read or {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        save_state(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict:
        return self.read.pop(str(path), None) or load_state(path)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
