"""The CPU engine: WaveNet's whole loop over samples in compiled code, one call per chunk.

What it does that the plain loop does not:

- weights are packed for the vector kernels of `_simd` and read once per sample, shared by the
  streams of a group;
- the past of each layer lies in a ring buffer; a layer of dilation d knows its past taps d samples
  ahead, so their
  products are made for several samples at once and their weights read once for all of them;
- the conditioning of all layers is projected ahead for blocks of samples in the same way.

Every output element is one chain of fused multiply-adds in a fixed order: bias, conditioning, past
taps from the oldest on, current sample; in int8 each of these products is a chain of its own,
scaled and added in that order. So a stream's audio has the same bits whatever the batch, the
grouping, the number of threads and the cuts between calls.

Beside this engine lie the loop it runs (`numba_loop`), the products in it (`numba_products`), and
its plan of a network (`numba_plan`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from wavear.generation.cpu.compiled_engine import GroupedEngine
from wavear.generation.cpu.simd import LANES
from wavear.generation.cpu.wavenet_loop import kernels
from wavear.generation.cpu.wavenet_plan import Group, Shared, Weights
from wavear.models.wavenet import WaveNet


class NumbaEngine(GroupedEngine):
    """Runs `batch` streams of a WaveNet in compiled code; see `CompiledEngine`.

    With threads, each core has streams of its own. One stream runs on two cores only if it is asked
    for: they wait for each other some twenty times per sample, which pays on an idle machine, and
    costs more than it gains where another program takes one of the cores. int8 has a scale for each
    output of each tap.
    """

    serves = WaveNet

    def __init__(
        self,
        model: WaveNet,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, Weights] | None = None,
    ):
        super().__init__(model, batch, weights, threads, packings)
        if (
            batch == 1
            and threads is not None
            and threads > 1
            and _divides(model)
            and packings is None
        ):
            self.threads = 2
            shared = Shared(model)
            halves = [Weights(model, 1, weights, part, 2) for part in range(2)]
            self._packed = halves[0]
            self._groups = [Group(half, 0, 1, model.start_code, shared) for half in halves]
            self._pool = ThreadPoolExecutor(2)
        else:
            self._plan(lambda size: Weights(model, size, weights), Group)

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        from wavear.generation.cpu.states import export_state

        return export_state(self, stream)

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        from wavear.generation.cpu.states import load_state

        load_state(self, stream, state)

    def _as_run(self) -> WaveNet:
        from wavear.generation.cpu.states import as_run

        return as_run(self.model, self.weights)

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


def _divides(model: WaveNet) -> bool:
    """Whether two cores can share one stream: every layer has a vector for each of them."""
    config = model.config
    sizes = (
        config.residual_channels,
        config.skip_channels,
        config.head_channels,
        model.law.channels,
    )
    return min(sizes) > LANES
