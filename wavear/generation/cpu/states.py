"""The state of the CPU engine's streams, between its own layout and the one that all engines share.

In the engine the past inputs of a layer lie in a ring, sample t at t modulo the length, for all
streams of a group side by side and padded to whole vectors. Of the first layer, if it is tabulated,
there is no ring: its past are codes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu.packing import as_packed
from wavear.generation.cpu.simd import LANES, VECTOR_BYTES

_ROUNDING = 1e-6  # an embedding of values is a product, which another engine may round otherwise

if TYPE_CHECKING:
    from wavear.generation.cpu.wavenet import NumbaEngine
    from wavear.models.wavenet import WaveNet


def export_state(engine: NumbaEngine, stream: int) -> dict[str, Tensor]:
    """See `Engine.state`."""
    from wavear.generation.cpu.products import N_TIME
    from wavear.generation.cpu.wavenet_loop import L_SLOTS

    group, row = next(
        _seats(engine, stream)
    )  # of two cores that share a stream, each holds all of its past
    residual = engine.model.config.residual_channels
    tensors = {"previous": torch.tensor([group.previous[row, -1]])}
    for i, layer in enumerate(group.layers):
        if i == 0 and group.packed.tabulated:
            past = _embedding(group, residual)[group.previous[row, :-1]]
        else:
            past = np.roll(
                _ring(group, i)[:, row, :residual], -(group.net[N_TIME] % layer[L_SLOTS]), axis=0
            )
        tensors[f"queue.{i}"] = torch.from_numpy(past)
    return tensors


def load_state(engine: NumbaEngine, stream: int, state: dict[str, Tensor]) -> None:
    """See `Engine.load_state`."""
    from wavear.generation.cpu.products import N_TIME
    from wavear.generation.cpu.wavenet_loop import L_SLOTS

    residual = engine.model.config.residual_channels
    for group, row in _seats(engine, stream):
        for i, layer in enumerate(group.layers):
            past = state[f"queue.{i}"].to("cpu", torch.float32).numpy()
            if i == 0 and group.packed.tabulated:
                group.previous[row, :-1] = _codes(past, _embedding(group, residual))
            else:
                _ring(group, i)[:, row, :residual] = np.roll(
                    past, group.net[N_TIME] % layer[L_SLOTS], axis=0
                )
        group.previous[row, -1] = int(state["previous"])


def as_run(model: WaveNet, weights: str) -> WaveNet:
    """The model that the engine runs, for `prefill`: in float32 or more, its matrices rounded as they are packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith(("blocks", "head")):
            # Each tap of a dilated convolution is a matrix of its own.
            taps = model.config.kernel_size if name.endswith("dilated.weight") else 1
            matrices = parameter.detach().cpu().numpy().reshape(len(parameter), taps, -1)
            parameter.data.copy_(
                torch.from_numpy(as_packed(matrices, weights)).reshape(parameter.shape)
            )
    return model


def _seats(engine: NumbaEngine, stream: int) -> Iterator[tuple[Any, int]]:
    """The groups that run a stream, and its row in each."""
    from wavear.generation.cpu.products import N_FIRST, N_STREAMS

    for group in engine._groups:
        row = stream - int(group.net[N_FIRST])
        if 0 <= row < group.net[N_STREAMS]:
            yield group, row


def _ring(group: Any, layer: int) -> np.ndarray:
    """(slots, streams, padded R), the memory itself."""
    from wavear.generation.cpu.products import N_STREAMS
    from wavear.generation.cpu.wavenet_loop import L_RING, L_SLOTS

    slots, streams, vectors = (
        int(group.layers[layer, L_SLOTS]),
        int(group.net[N_STREAMS]),
        group.packed.x_vectors,
    )
    offset = int(group.layers[layer, L_RING]) - group.region.address
    memory = group.region.view(offset, slots * streams * vectors * VECTOR_BYTES)
    return memory.view(np.float32).reshape(slots, streams, vectors * LANES)


def _embedding(group: Any, residual: int) -> np.ndarray:
    """(classes + 1, R); the last row, zeros, stands for no sample."""
    packed = group.packed
    rows = packed.region.view(packed.embedding, packed.classes * packed.x_vectors * VECTOR_BYTES)
    table = rows.view(np.float32).reshape(packed.classes, packed.x_vectors * LANES)[:, :residual]
    return np.concatenate([table, np.zeros((1, residual), np.float32)])


def _codes(past: np.ndarray, embedding: np.ndarray) -> list[int]:
    """The rows of the embedding that these vectors are. (Of equal rows any: their products are equal.)"""
    found = []
    for vector in past:
        away = np.abs(embedding - vector).max(axis=1)
        nearest = int(away.argmin())
        if not away[nearest] <= _ROUNDING * (1 + np.abs(vector).max()):
            raise ValueError(
                "the state is of another model: its first layer's past is not of this embedding"
            )
        found.append(nearest)
    return found
