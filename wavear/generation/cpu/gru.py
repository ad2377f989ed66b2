"""The CPU engine of a GRU: the whole loop over samples in compiled code, one call per chunk.

It stands on the pieces of the WaveNet's (`numba_cpu`): packed weights, the vector kernels, the
draw. Its own are:

- the product of the first layer's input matrix with the input is a table over codes, in float32;
- the conditioning, folded into one matrix for the first layer and the head, is projected ahead for
  blocks of samples;
- the three gates of a layer are one matrix over its hidden units, and one kernel makes the new
  hidden units of them.

A row of pre-activations holds, `gap` bytes apart from its second part on,

    head | n_x | r | u | n_h

so that what the conditioning adds to (the first four parts), what a layer's input adds to (n_x, r,
u) and what its hidden units add to (r, u, n_h) is each contiguous, and a product runs in place.

Every output element is one chain in a fixed order: bias, conditioning, input, hidden units. So a
stream's audio has the same bits whatever the batch, the grouping, the number of threads and the
cuts between calls.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu.compiled_engine import GroupedEngine
from wavear.generation.cpu.gru_loop import kernels
from wavear.generation.cpu.gru_plan import Group, Weights
from wavear.generation.cpu.packing import as_packed, to_numpy
from wavear.generation.cpu.products import N_FIRST
from wavear.generation.cpu.simd import LANES
from wavear.models.gru import GRU


class NumbaGRUEngine(GroupedEngine):
    """Runs `batch` streams of a GRU in compiled code; see `CompiledEngine`."""

    serves = GRU

    def __init__(
        self,
        model: GRU,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, Weights] | None = None,
    ):
        super().__init__(model, batch, weights, threads, packings)
        self._plan(lambda size: Weights(model, size, weights), Group)

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`: `previous` (1,) and `h` (layers, H)."""
        group, row = self._seat(stream)
        hidden = np.stack([group.hidden(i, row).reshape(-1)[: self.model.config.channels]
                           for i in range(self.model.config.layers)])  # fmt: skip
        return {"previous": torch.tensor([group.previous[row]]), "h": torch.from_numpy(hidden)}

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        group, row = self._seat(stream)
        for i, h in enumerate(state["h"].to("cpu", torch.float32).numpy()):
            padded = np.zeros(group.packed.h_vectors * LANES, np.float32)
            padded[: len(h)] = h
            group.hidden(i, row)[:] = padded.reshape(-1, LANES)
        group.previous[row] = int(state["previous"])

    def _as_run(self) -> GRU:
        return as_run(self.model, self.weights)

    def _seat(self, stream: int) -> tuple[Group, int]:
        """The group that runs a stream, and its row there."""
        group = next(g for g in reversed(self._groups) if g.net[N_FIRST] <= stream)
        return group, stream - int(group.net[N_FIRST])

    def _call(
        self,
        part: Group,
        arrays: tuple[np.ndarray, ...],
        condition: np.ndarray,
        mode: int,
        *rest: Any,
    ) -> int:
        return kernels().run(
            part.net, part.layers, part.previous, *arrays, condition.ctypes.data, mode, *rest
        )


def as_run(model: GRU, weights: str) -> GRU:
    """The model that the engine runs, for `prefill`: in float32 or more, its matrices rounded as they are packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        for matrix in rounded(model):
            matrix.copy_(torch.from_numpy(as_packed(to_numpy(matrix), weights)))
    return model


def rounded(model: GRU) -> list[Tensor]:
    """The matrices that weights of less than 32 bits round: all that are read for every sample.

    The first layer's input matrix and the conditioning's are multiplied ahead.
    """
    names = [
        name
        for name, _ in model.gru.named_parameters()
        if name.startswith("weight") and name != "weight_ih_l0"
    ]
    return [
        *(model.gru.get_parameter(name) for name in names),
        model.head.first.weight,
        model.head.last.weight,
    ]
