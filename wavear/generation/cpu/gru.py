"""The CPU engine of a GRU: the whole loop over samples in compiled code, one call per chunk.

- The product of the first layer's input matrix with the input is a table over codes, in float32.
- The conditioning, folded into one matrix for the first layer and the head, is projected ahead for
  blocks of samples.
- The three gates of a layer are one matrix over its hidden units, and one kernel makes the new
  hidden units from them.

A row of pre-activations holds

    head | n_x | r | u | n_h

where the conditioning adds to the first four parts, a layer's input to n_x, r, u, and its hidden
units to r, u, n_h: each is contiguous, and a product runs in place.

Every output element is one chain in a fixed order: bias, conditioning, input, hidden units. So a
stream's audio has the same bits whatever the batch, the grouping, the number of threads and the
cuts between calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu import gru_loop
from wavear.generation.cpu.compiled_engine import GroupedEngine
from wavear.generation.cpu.gru_plan import Group, Weights
from wavear.models.gru import GRU


class NumbaGRUEngine(GroupedEngine):
    """Runs `batch` streams of a GRU in compiled code; see `CompiledEngine`."""

    serves, weights_for, group_of, kernel = GRU, Weights, Group, gru_loop.run

    @staticmethod
    def matrices_of(model: Any) -> Iterable[Tensor]:
        """See `CompiledEngine.matrices_of`: all that are read for every sample.

        The first layer's input matrix and the conditioning's are multiplied ahead.
        """
        for name, parameter in model.gru.named_parameters():
            if name.startswith("weight") and name != "weight_ih_l0":
                yield parameter
        yield model.head.first.weight
        yield model.head.last.weight

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`: `previous` (1,) and `h` (layers, H)."""
        group, row = self._seat(stream)
        channels = self.model.config.channels
        hidden = np.stack([h.reshape(-1)[:channels] for h in group.hidden(row)])
        return {"previous": torch.tensor([group.previous[row, 0]]), "h": torch.from_numpy(hidden)}

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        group, row = self._seat(stream)
        given = state["h"].to("cpu", torch.float32).numpy()
        for memory, h in zip(group.hidden(row), given, strict=True):
            memory[:] = np.pad(h, (0, memory.size - len(h))).reshape(memory.shape)
        group.previous[row, 0] = int(state["previous"])
