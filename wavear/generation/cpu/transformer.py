"""The CPU engine of the transformer: the whole loop over samples in compiled code.

- Weights are packed for the vector kernels and read once: those of the layers once per patch.
- The products of past samples with the input of a position, and with the head, are looked up by
  code and place, where the tables of these products fit a cache.
- Keys lie with their channels apart and their positions next to each other, values vice
  versa, so both products of the attention run along whole vectors.
- Half of the output of a ReLU is zero, and is neither multiplied nor are its weights read.

Every output element is one chain of fused multiply-adds in a fixed order, and streams share nothing
but the weights: so a stream's audio has the same bits whatever the batch, the threads and the cuts
between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wavear.generation.cpu import transformer_plan
from wavear.generation.cpu.compiled_engine import CompiledEngine
from wavear.generation.cpu.sampling import Call, type_of
from wavear.generation.cpu.transformer_loop import run
from wavear.generation.cpu.transformer_plan import Stream, Weights
from wavear.models.transformer import Transformer


class NumbaTransformer(CompiledEngine):
    """Runs `batch` streams of a Transformer in compiled code; see `CompiledEngine`."""

    serves = Transformer
    matrices_of = staticmethod(transformer_plan.matrices_of)

    def _prepare(self) -> None:
        self._packed = self._packed or Weights(self.model, self.weights)
        start = self.model.start_code
        self._streams = [Stream(self._packed, number, start) for number in range(self.batch)]

    def _parts(self) -> Sequence[Stream]:
        return self._streams

    def _call(self, part: Stream, condition: Any, call: Call) -> int:
        return run(type_of(call))(
            part.plan, part.layers, part.packed.matrices, part.work, part.history, call
        )

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        return self._streams[stream].export()

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self._streams[stream].load(state)

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        for source, target in zip(sources, targets, strict=True):
            self._streams[target].copy(self._streams[source])
