"""The state of a stream, to resume in another process or engine; a safetensors file, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavear.common.atomic import replace_tensors
from wavear.common.errors import WavearError, require
from wavear.common.untrusted import checksum, parse_json
from wavear.models.base import AutoregressiveModel

FORMAT = 1
_KEY, _SUM = "wavear_stream", "wavear_crc32"
_COUNT = range(2**62)
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "position": lambda value: type(value) is int and value in _COUNT,
    "asked": lambda value: type(value) is int and value in _COUNT,
    "seed": lambda value: type(value) is int and value in range(2**64),
    "speaker": lambda value: value is None or (type(value) is int and value in _COUNT),
    "temperature": lambda value: type(value) in (int, float),
    "top_k": lambda value: value is None or (type(value) is int and value in _COUNT),
    "top_p": lambda value: value is None or type(value) in (int, float),
    "first_frame": lambda value: type(value) is int and value in _COUNT,
    "closed": lambda value: type(value) is bool,
    "model": lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("family"), str)
        and all(isinstance(value.get(part), dict) for part in ("config", "weights"))
    ),
}
"""Fields of the description of a stream, and the values that are possible."""
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StreamState:
    """A stream at one moment; `Stream.load` resumes it, as often as wanted.

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
    """The engine's: `previous`, the code of the sample before, and the model's `export_state`, such
    as the past inputs of each layer, the oldest first; `mel`, the frames still needed (M, n);
    `prime`, codes not yet filled in."""
    about: dict[str, Any]
    """As JSON: position (samples so far), settings, frames, configuration and hashes."""

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all, replacing an older one.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        text = json.dumps(self.about)
        metadata = {_KEY: text, _SUM: checksum(text, self.tensors)}
        replace_tensors(path, self.tensors, metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> StreamState:
        """Read a file that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        WavearError
            If it is damaged, or not the state of a stream.
        """
        from safetensors import SafetensorError, safe_open

        require(path, (str, os.PathLike), "state", "a StreamState, or the path of a file")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise WavearError(f"{path} is damaged or not a safetensors file: {error}") from None
        if (text := metadata.get(_KEY)) is None:
            raise WavearError(f"{path} is a safetensors file, but not of a stream's state")
        try:
            about = parse_json(text)
            found = about["format"]
        except (ValueError, TypeError, KeyError):
            raise WavearError(
                f"{path} is damaged: its description is not JSON, or has no format"
            ) from None
        if found != FORMAT:
            raise WavearError(
                f"{path} has format {found!r}, this version of wavear reads format {FORMAT}"
            )
        # The first versions wrote no checksum.
        if metadata.get(_SUM, expected := checksum(text, tensors)) != expected:
            raise WavearError(f"{path} is damaged: its CRC-32 does not match")
        if missing := set(_FIELDS) - set(about):
            raise WavearError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
        for name, possible in _FIELDS.items():
            if not possible(about[name]):
                raise WavearError(f"{path} is damaged: {name} is {about[name]!r:.60}")
        return cls(tensors, about)


def describe(model: AutoregressiveModel) -> dict[str, Any]:
    """Return a model's configuration and hashes of its weights, the same on every device."""
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


def check_model(state: StreamState, ours: dict[str, Any]) -> None:
    """Raise a `WavearError` for a state of another model than `describe` names, with the names."""
    from wavear.models.checkpoint import LATER

    theirs = state.about["model"]
    theirs = theirs | {
        "config": {k: v for k, v in LATER.items() if k in ours["config"]} | theirs["config"]
    }
    for part in ("family", "config"):
        differing = _differences(theirs[part], ours[part])
        if differing:
            raise WavearError(f"the state is of another model: {'; '.join(differing)}")
    names = [
        name for name, digest in ours["weights"].items() if theirs["weights"].get(name) != digest
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WavearError(
            "the state is of a model with other weights, perhaps trained further: "
            f"{', '.join(names[:3])}{more} differ"
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


def engine_tensors(
    state: StreamState, pattern: dict[str, Tensor], model: AutoregressiveModel
) -> dict[str, Tensor]:
    """Return the engine's part of a state, whose names and shapes must be those of `pattern`."""
    classes = model.config.classes
    tensors = {
        name: tensor for name, tensor in state.tensors.items() if name not in ("mel", "prime")
    }
    found, expected = (
        {n: (tuple(t.shape), t.dtype in _FLOATS) for n, t in each.items()}
        for each in (tensors, pattern)
    )
    names = ("previous", "prime", "codes", "past")
    codes = [state.tensors[name] for name in names if name in state.tensors]
    whole = [*codes, *(t for name, t in tensors.items() if not expected.get(name, ((), True))[1])]
    intact = (
        found == expected
        and all(tensor.dtype in (torch.int32, torch.int64) for tensor in whole)
        and int(tensors.get("time", torch.zeros(1)).min()) >= 0
        and all(c.numel() and 0 <= int(c.min()) <= int(c.max()) < classes for c in codes)
    )
    if intact and "lags" in tensors:
        lags = tensors["lags"]
        intact = 0 <= int(lags.min()) <= int(lags.max()) <= model.config.longest_period
    if intact and (mel := state.tensors.get("mel")) is not None:
        intact = (
            model.config.mel is not None
            and mel.dim() == 2
            and len(mel) == model.config.mel.bands
            and mel.numel() > 0
            and mel.dtype in _FLOATS
        )
    if intact and (prime := state.tensors.get("prime")) is not None:
        intact = prime.shape == (state.about["position"],)
    deemphasis = state.about.get("deemphasis", 0.0)
    intact = intact and type(deemphasis) in (int, float) and math.isfinite(deemphasis)
    if not intact:
        raise WavearError(
            "the state is damaged: its contents are not those of a stream of this model"
        )
    return tensors
