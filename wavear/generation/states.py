"""What a stream needs to go on, in another process or on another engine: one safetensors file, never a pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavear.common.atomic import replace_file
from wavear.models.base import AutoregressiveModel

FORMAT = 1
_KEY = "wavear_stream"
_FIELDS = {
    "position",
    "asked",
    "seed",
    "speaker",
    "temperature",
    "top_k",
    "top_p",
    "first_frame",
    "closed",
    "model",
}


@dataclass(frozen=True)
class StreamState:
    """A stream as it was at one moment; `Stream.load` goes on from it, as often as wanted.

    Examples
    --------
    >>> from wavear import Stream, WaveNet, WaveNetConfig
    >>> model = WaveNet(WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4))
    >>> stream = Stream(model, engine="reference")
    >>> beginning = stream.pull(50)
    >>> state = stream.state()
    >>> bool((Stream.load(model, state, engine="reference").pull(9) == stream.pull(9)).all())
    True
    """

    tensors: dict[str, Tensor]
    """The engine's: `previous`, the code of the sample before, and what the model's `export_state` names, such as the
    past inputs of each layer, the oldest first; `mel`, the frames still needed (M, n); `prime`,
    codes to begin with."""
    about: dict[str, Any]
    """As JSON: position (samples so far), seed, speaker, temperature, frames, and the model's configuration and weights
    (as hashes)."""

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file, whole or not at all; over a file of that name if there is one.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        from safetensors.torch import save_file

        metadata = {_KEY: json.dumps(self.about)}
        replace_file(path, lambda temporary: save_file(self.tensors, temporary, metadata=metadata))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> StreamState:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or no state of a stream.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                about = (file.metadata() or {}).get(_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
        if about is None:
            raise ValueError(f"{path} is a safetensors file, but not of a stream's state")
        try:
            about = json.loads(about)
            found = about["format"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path} is damaged: what it says of itself is not JSON, or names no format"
            ) from None
        if found != FORMAT:
            raise ValueError(
                f"{path} has format {found!r}, this version of wavear reads format {FORMAT}"
            )
        if missing := _FIELDS - set(about):
            raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
        return cls(tensors, about)


def describe(model: AutoregressiveModel) -> dict[str, Any]:
    """The configuration of a model and a hash of each of its weights, the same on every device, as JSON."""
    weights = {}
    for name, tensor in model.state_dict().items():
        values = (
            tensor.detach()
            .to("cpu", torch.float32 if tensor.is_floating_point() else None)
            .contiguous()
        )
        weights[name] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    return {"family": type(model).__name__, "config": config, "weights": weights}


def check_model(state: StreamState, model: AutoregressiveModel) -> None:
    """Refuse a state of another model.

    Raises
    ------
    ValueError
        Naming what differs: fields of the configuration, else the weights.
    """
    from wavear.models.checkpoint import LATER

    theirs, ours = state.about["model"], describe(model)
    theirs = theirs | {
        "config": {k: v for k, v in LATER.items() if k in ours["config"]} | theirs["config"]
    }
    for part in ("family", "config"):
        differing = _differences(theirs[part], ours[part])
        if differing:
            raise ValueError(f"the state is of another model: {'; '.join(differing)}")
    names = [
        name for name, digest in ours["weights"].items() if theirs["weights"].get(name) != digest
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            "the state is of a model with other weights, trained further perhaps: different are "
            f"{', '.join(names[:3])}{more}"
        )


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        fields = dict.fromkeys([*theirs, *ours])
        return [
            d
            for f in fields
            for d in _differences(theirs.get(f), ours.get(f), f"{name}.{f}" if name else f)
        ]
    return [] if theirs == ours else [f"{name or 'it'} is {theirs!r} there, {ours!r} here"]
