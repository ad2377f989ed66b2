"""Training states on disk: one safetensors file each, tensors as they are and the rest as JSON.

A run keeps its last states in `states/`, named by the steps taken; runs of the first versions have
one `resume.safetensors`. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from wavear.common.atomic import replace_tensors
from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger
from wavear.common.untrusted import checksum, parse_json
from wavear.models.saving import non_finite

logger = get_logger(__name__)

_KEY, _SUM = "wavear_state", "wavear_crc32"
_FOLDER, _OLD = "states", "resume.safetensors"
_NAME = re.compile(r"step-(\d+)\.safetensors")


# --- one state


def encode(value: Any, tensors: dict[str, torch.Tensor], where: str = "state") -> Any:
    """Return `value` as JSON; move its tensors to `tensors`, named by their place in the nest."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, dict):
        if wrong := [type(key).__name__ for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{where} has a key of type {wrong[0]}, expected str or int")
        items = [[key, encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]
        return {"dict": items}
    if type(value) in (list, tuple):
        items = [encode(item, tensors, f"{where}.{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
    raise TypeError(f"{where} is of type {type(value).__name__}, which a state cannot hold")


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Invert `encode`."""
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
    """Write a training state; `path` holds the old one or the new one at any moment."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(state, tensors))
    metadata = {_KEY: text, _SUM: checksum(text, tensors)}
    replace_tensors(path, tensors, metadata)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    WavearError
        If it is damaged, holds non-finite weights, or is not a training state.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no training state to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WavearError(f"{path} is damaged or not a training state: {error}") from None
    if (text := metadata.get(_KEY)) is None:
        raise WavearError(f"{path} is not a training state: weights only")
    # The first versions wrote no checksum.
    if metadata.get(_SUM, expected := checksum(text, tensors)) != expected:
        raise WavearError(f"{path} is damaged: its CRC-32 does not match")
    try:
        state = decode(parse_json(text), tensors)
        name = non_finite(state.get("state_dict", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise WavearError(f"{path} is damaged: {one_line(error)}") from None
    if name:
        raise WavearError(f"{path} cannot be used: {name} holds NaN or infinity")
    return state


class StateIO(CheckpointIO):
    """Make Lightning use `save_state` and `load_state`; `found` has been read already."""

    def __init__(self, found: FoundState | None = None):
        super().__init__()
        self.found = found

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        save_state(checkpoint, path)

    @override
    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        found, self.found = self.found, None  # once: it is large
        return found.state if found and found.path == Path(path) else load_state(path)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


# --- the states of a run


def state_path(out: str | Path, step: int) -> Path:
    """Return the path of the state after `step` steps.

    Examples
    --------
    >>> state_path("runs/mine", 1000).as_posix()
    'runs/mine/states/step-00001000.safetensors'
    """
    return Path(out) / _FOLDER / f"step-{step:08}.safetensors"


def state_paths(out: str | Path) -> list[Path]:
    """Return the paths of a run's states, the last one first."""
    paths = (Path(out) / _FOLDER).glob("*")
    found = [(int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name))]
    old = Path(out) / _OLD
    return [path for _, path in sorted(found, reverse=True)] + [old] * old.is_file()


@dataclass
class FoundState:
    """The state to resume from."""

    path: Path
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    """Messages of later states that cannot be used."""


def last_good_state(out: str | Path) -> FoundState | None:
    """Return the last good state of a run, or None if the run has not written one yet."""
    damaged = []
    for path in state_paths(out):
        try:
            return FoundState(path, load_state(path), damaged)
        except (WavearError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        raise WavearError(f"{out} holds no good state to resume: {'; '.join(damaged)}")
    return None


def prune_states(out: str | Path, step: int, keep: int, sound: int) -> None:
    """Keep the last `keep` states up to `step`, and that of the step `sound`.

    Later ones could not be resumed and go, too.
    """
    drop_states_after(out, step)
    for path in state_paths(out)[keep:]:
        if path != state_path(out, sound):
            path.unlink(missing_ok=True)


def fall_back(out: str | Path, step: int) -> FoundState | None:
    """Make the last good state up to `step` the newest one: remove later ones, and return it.

    Returns None, and removes nothing, if there is no such state.
    """
    for path in state_paths(out):
        match = _NAME.fullmatch(path.name)
        if match is not None and int(match[1]) > step:
            continue
        try:
            found = FoundState(path, load_state(path))
        except (WavearError, OSError) as error:
            logger.warning(f"{error}; the state before it is used")
            continue
        drop_states_after(out, found.state["global_step"])
        return found
    return None


def drop_states_after(out: str | Path, step: int) -> None:
    """Remove the states of later steps."""
    for path in state_paths(out):
        match = _NAME.fullmatch(path.name)
        if match is not None and int(match[1]) > step:
            path.unlink(missing_ok=True)


def sweep(out: str | Path) -> None:
    """Remove half-written files of a killed run; the files that they were to replace are whole."""
    for folder in ("", _FOLDER, "best", "last"):
        for path in (Path(out) / folder).glob(".wavear-*.tmp"):
            path.unlink(missing_ok=True)
