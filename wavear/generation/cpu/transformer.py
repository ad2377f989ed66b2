"""The CPU engine of the transformer.

What it does that the plain loop does not:

- weights are packed for the vector kernels of `_simd` and read once: those of the layers once per
  patch;
- what a past sample adds to its position's input, and to the head, is looked up by its code and its
  place, where the
  tables of these products fit a cache;
- keys lie with their channels apart and their positions side by side, values the other way round,
  so both products of
  the attention run along whole vectors;
- half of what a ReLU lets through is zero, and is neither multiplied nor are its weights read.

Every output element is one chain of fused multiply-adds in a fixed order, and streams share nothing
but the weights: so a stream's audio has the same bits whatever the batch, the threads and the cuts
between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from wavear.generation.cpu import transformer_loop as loop
from wavear.generation.cpu.compiled_engine import CompiledEngine
from wavear.generation.cpu.transformer_plan import Stream, Weights, as_run
from wavear.models.transformer import Transformer


class NumbaTransformer(CompiledEngine):
    """Runs `batch` streams of a Transformer in compiled code; see `CompiledEngine`. Each thread has streams of its own.

    Parameters
    ----------
    packed : Weights, optional
        Weights that are packed already: see `resized`.
    """

    serves = Transformer

    def __init__(
        self,
        model: Transformer,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packed: Weights | None = None,
    ):
        super().__init__(model, batch, weights, threads)
        self._packed = packed or Weights(model, weights)
        self._streams = [Stream(self._packed, model.start_code) for _ in range(batch)]
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        return self._streams[stream].export()

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self._streams[stream].load(state)

    def resized(self, batch: int) -> NumbaTransformer:
        """See `Engine.resized`."""
        return NumbaTransformer(
            self.model,
            batch,
            weights=self.weights,
            threads=self._asked_threads,
            packed=self._packed,
        )

    def _as_run(self) -> Transformer:
        return as_run(self.model, self.weights)

    def _parts(self) -> Sequence[int]:
        return range(self.batch)

    def _call(
        self,
        part: int,
        arrays: tuple[np.ndarray, ...],
        condition: np.ndarray,
        mode: int,
        *rest: Any,
    ) -> int:
        stream = self._streams[part]
        address = condition[part].ctypes.data if mode else 0
        rows = (array[part] for array in arrays)
        return loop.run()(
            stream.net, stream.layers, stream.work, stream.history, *rows, address, mode, *rest
        )
