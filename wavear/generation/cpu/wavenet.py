"""The CPU engine of WaveNet: the whole loop over samples in compiled code, one call per chunk.

- Weights are packed for the vector kernels and read once per sample, shared by the streams of a
  group.
- The past of each layer lies in a ring buffer. The past taps of a layer of dilation d are known d
  samples ahead, so their products are made for several samples at once, reading weights once.
- The conditioning of all layers is projected ahead for blocks of samples in the same way.

Every output element is one chain of fused multiply-adds in a fixed order: bias, conditioning, past
taps from the oldest on, current sample; in int8 each of these products is a sum of integers, exact,
scaled and added in that order. So a stream's audio has the same bits whatever the batch, the
grouping, the number of threads and the cuts between calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.checks import non_finite
from wavear.generation.cpu import wavenet_loop
from wavear.generation.cpu.compiled_engine import GroupedEngine
from wavear.generation.cpu.packing import (
    SIGNAL_STEPS,
    UNIT_STEPS,
    named_matrices,
    on_steps,
    round_inputs,
)
from wavear.generation.cpu.wavenet_plan import (
    TABLE,
    Group,
    Weights,
    input_steps,
    multiplies_integers,
)
from wavear.models.wavenet import WaveNet


class NumbaEngine(GroupedEngine):
    """Runs `batch` streams of a WaveNet in compiled code; see `CompiledEngine`."""

    serves, weights_for, group_of, kernel = WaveNet, Weights, Group, wavenet_loop.run

    @staticmethod
    def matrices_of(model: Any) -> Iterable[Tensor]:
        """See `CompiledEngine.matrices_of`: each tap of a dilated convolution is one."""
        for name, matrix in named_matrices(model, "blocks", "head"):
            taps = model.config.kernel_size if name.endswith("dilated.weight") else 1
            yield matrix.view(len(matrix), taps, -1)

    @property
    def _integers(self) -> bool:
        return multiplies_integers(self.model.config, self.weights)

    def _condition(self, cond: Any, samples: int) -> tuple[Any, int]:
        """See `CompiledEngine._condition`."""
        rows, mode = super()._condition(cond, samples)
        # Integers would hide a number that is not finite.
        if self._integers and rows is not None and not np.isfinite(rows).all():
            raise non_finite(int(np.isfinite(rows).all(axis=(0, 2)).argmin()))
        return rows, mode

    def _as_run(self) -> Any:
        """See `CompiledEngine._as_run`; in int8 what matrices read is rounded too."""
        model = super()._as_run()
        if self._integers:
            steps, skip_steps, head_steps = input_steps(self.model)
            tabulated = model.config.classes <= TABLE
            for i, (block, own) in enumerate(zip(model.blocks, steps, strict=True)):
                if i > 0 or not tabulated:
                    round_inputs(block.dilated, own)
                if block.conditioning is not None:
                    round_inputs(block.conditioning, SIGNAL_STEPS)
                if block.residual is not None:
                    round_inputs(block.residual, UNIT_STEPS)
                block.register_forward_hook(lambda _, x, y: (y[0], on_steps(y[1], UNIT_STEPS)))
            round_inputs(model.head[1], skip_steps)
            round_inputs(model.head[3], head_steps)
        return model

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        group, row = self._seat(stream)
        pasts = [group.past(i, row) for i in range(len(group.layers))]
        return {
            "previous": torch.tensor([group.previous[row, -1]]),
            **{f"queue.{i}": torch.from_numpy(past) for i, past in enumerate(pasts)},
        }

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        group, row = self._seat(stream)
        for i in range(len(group.layers)):
            group.set_past(i, row, state[f"queue.{i}"].to("cpu", torch.float32).numpy())
        group.previous[row, -1] = int(state["previous"])
