"""The common part of the compiled engines: arguments, arrays in and out, threads, states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.common.machine import available_cores
from wavear.generation.checks import (
    check_batch,
    check_codes,
    check_condition,
    check_streams,
    check_weights,
    non_finite,
)
from wavear.generation.cpu.coding import DECODE, ENCODE
from wavear.generation.cpu.emitter import LANES
from wavear.generation.cpu.packing import rounded, vectors_for
from wavear.generation.cpu.products import CONDITION, CONSTANT_CONDITION, NO_CONDITION
from wavear.generation.cpu.sampling import Call, type_of
from wavear.generation.cpu.simd import KINDS, TALLEST
from wavear.generation.reference import ReferenceEngine
from wavear.models.base import AutoregressiveModel
from wavear.models.distributions import refuse_truncation

GROUP = 3 * TALLEST  # streams that one thread runs side by side, at most
SIZES = (1, 3, TALLEST, GROUP)  # of groups that `GroupedEngine.resized` packs weights for


class CompiledEngine:
    """Runs `batch` streams of a model in compiled code, one call per chunk.

    The weights are packed when it is made: an engine made after the model changed runs the changed
    model. Each thread has streams of its own.

    Parameters
    ----------
    model : AutoregressiveModel
        Of the family that the engine serves; on any device, of any precision.
    batch : int
        Streams, at least 1.
    weights : str
        "float32"; "bfloat16" or "int8" (a scale for each output of a matrix, in a WaveNet for each
        output of each tap): rounded once to nearest, half or a quarter of the bytes to read.
        Arithmetic in float32; in int8 the WaveNets also round what their matrices read, and
        multiply integers.
    threads : int, optional
        Cores to use, at most one for each stream; by default all that the process may run on.
    packed : optional
        Weights that are packed already: see `resized`.

    Raises
    ------
    WavearError
        If an argument is none of these.
    """

    serves: ClassVar[type[AutoregressiveModel]]
    weight_kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)
    model: Any

    def __init__(
        self,
        model: Any,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packed: Any = None,
    ):
        if not isinstance(model, self.serves):
            raise WavearError(
                f"this engine serves a {self.serves.__name__}, not {type(model).__name__}: "
                "use engine 'reference'"
            )
        check_weights(weights, self.weight_kinds)
        check_batch(batch)
        if threads is not None and threads < 1:
            raise WavearError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
        self._asked_threads = threads
        self._packed = packed
        self._prepare()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def _prepare(self) -> None:
        """Pack the weights into `_packed` if it is None, and make the state of the streams."""
        raise NotImplementedError

    def _parts(self) -> Sequence[Any]:
        """Return what threads run side by side: groups of streams, or streams."""
        raise NotImplementedError

    def _call(self, part: Any, condition: Any, call: Call) -> int:
        """Run the kernel for one part; return the first non-finite sample, or -1."""
        raise NotImplementedError

    @staticmethod
    def matrices_of(model: Any) -> Iterable[Tensor]:
        """Yield the matrices (..., inputs) of a model that `weights` rounds."""
        raise NotImplementedError

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        raise NotImplementedError

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        raise NotImplementedError

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        raise NotImplementedError

    def resized(self, batch: int) -> Any:
        """See `Engine.resized`."""
        own = type(self)
        given = {"weights": self.weights, "threads": self._asked_threads, "packed": self._packed}
        return own(self.model, batch, **given)

    def generate(
        self,
        uniforms: np.ndarray,
        cond: Tensor | None,
        temperature: float | np.ndarray = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        log_probability: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `Engine.generate`."""
        if not self.model.law.truncates:
            refuse_truncation(self.model.config.law, top_k, top_p)
        uniforms = np.require(uniforms, np.float64, ["C", "W"])
        temperatures = np.broadcast_to(temperature, uniforms.shape)
        temperatures = np.require(temperatures, np.float64, ["C", "W"])
        codes = np.empty(uniforms.shape, np.int64)
        scores = np.empty((self.batch, 1) if log_probability is None else codes.shape)
        call = Call(
            uniforms, temperatures, codes, scores, False, log_probability is not None,
            min(top_k or self.classes, self.classes), 1.0 if top_p is None else float(top_p),
            np.empty(0), 0, NO_CONDITION,
        )  # fmt: skip
        self._run(call, cond)
        if log_probability is not None:
            log_probability[...] = scores
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        codes = np.require(codes, np.int64, ["C", "W"])
        check_codes(codes, self.classes)
        scores, none = np.empty(codes.shape), np.empty((self.batch, 1))
        call = Call(
            none, none, codes, scores, True, False, self.classes, 1.0, np.empty(0), 0, NO_CONDITION
        )
        self._run(call, cond)
        return scores

    def code(
        self,
        codes: np.ndarray,
        cond: Tensor | None,
        coders: np.ndarray,
        streams: np.ndarray,
        decode: bool = False,
    ) -> np.ndarray:
        """Encode codes (B, n), or decode them in place; return log P (B, n) as it was coded.

        Parameters
        ----------
        codes : ndarray of int64, contiguous
        coders, streams : ndarray of uint64 (B, 3) and uint8 (B, bytes)
            See `wavear.generation.cpu.coding`; both are advanced.
        """
        if not decode:
            check_codes(codes, self.classes)
        scores, none = np.empty(codes.shape), np.empty((self.batch, 1))
        edges = getattr(self.model, "predicted_grid", self.model.grid).edges()
        call = Call(
            none, none, codes, scores, True, False, self.classes, 1.0, np.empty(0), 0, NO_CONDITION,
            DECODE if decode else ENCODE, coders, streams, edges.copy(),
        )  # fmt: skip
        self._run(call, cond)
        return scores

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        runner = ReferenceEngine(self._as_run(), 1)
        runner.load_state(0, self.state(stream))
        dtype = next(runner.model.parameters()).dtype
        runner.fill(0, codes, cond if cond is None else cond.to(dtype))
        self.load_state(stream, runner.state(0))

    def _as_run(self) -> Any:
        """Return the model with its weights as they are packed."""
        return rounded(self.model, self.weights, self.matrices_of)

    def _run(self, call: Call, cond: Tensor | None) -> None:
        shape = call.codes.shape
        check_streams(shape, self.batch)
        condition, mode = self._condition(cond, shape[1])
        if mode != NO_CONDITION:
            call = call._replace(condition=condition.ctypes.data, mode=mode)
        if shape[1] == 0:
            return
        size = max(self.classes, self.model.law.channels, 3)

        def one(part: Any) -> int:
            return self._call(part, condition, call._replace(heap=np.empty(size)))

        parts = self._parts()
        results = list(self._pool.map(one, parts)) if self._pool else [one(part) for part in parts]
        if bad := [t for t in results if t >= 0]:
            raise non_finite(min(bad))

    def _condition(self, cond: Any, samples: int) -> tuple[Any, int]:
        """Return the conditioning as (B, n or 1, padded C), and its mode."""
        check_condition(self.model, cond, self.batch, samples)
        if cond is None:
            return None, NO_CONDITION
        channels, count = cond.shape[1:]
        rows = np.zeros((self.batch, count, vectors_for(channels) * LANES), np.float32)
        rows[:, :, :channels] = cond.detach().to("cpu", torch.float32).transpose(1, 2).numpy()
        return rows, CONSTANT_CONDITION if count == 1 else CONDITION


class GroupedEngine(CompiledEngine):
    """A compiled engine whose streams run in groups that share each read of the weights.

    `packed` is a dict of weights by the size of the groups that they are for.
    """

    weights_for: ClassVar[Any]
    """`weights_for(model, size, weights)` packs the weights for groups of a size."""
    group_of: ClassVar[Any]
    """`group_of(packed, first, count, start_code)` makes the state of some streams."""
    kernel: ClassVar[Any]
    """`kernel(type_of(call))` returns the compiled loop."""

    def _prepare(self) -> None:
        groups = -(-self.batch // GROUP)
        groups = min(self.batch, -(-groups // self.threads) * self.threads)
        bounds = [self.batch * g // groups for g in range(groups + 1)]
        size = max(stop - start for start, stop in pairwise(bounds))
        if self._packed is None:
            self._packed = {}
        else:  # to be shared: for the sizes that others may want
            size = next(each for each in SIZES if each >= size)
        if size not in self._packed:
            self._packed[size] = self.weights_for(self.model, size, self.weights)
        packed = self._packed[size]
        self._groups = [
            self.group_of(packed, start, stop - start, self.model.start_code)
            for start, stop in pairwise(bounds)
        ]

    def _parts(self) -> Sequence[Any]:
        return self._groups

    def _seat(self, stream: int) -> tuple[Any, int]:
        """Return the group that runs a stream, and its row there."""
        group = next(g for g in reversed(self._groups) if g.net["first"] <= stream)
        return group, stream - int(group.net["first"])

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        for source, target in zip(sources, targets, strict=True):
            group, row = self._seat(target)
            group.copy(row, *self._seat(source))

    def _call(self, part: Any, condition: Any, call: Call) -> int:
        return type(self).kernel(type_of(call))(
            part.plan, part.layers, part.packed.matrices, part.previous, call
        )


def geometry(streams: int) -> tuple[int, int]:
    """Return (panels, rows of each) that hold so many streams: panels of equal size."""
    panels = -(-streams // TALLEST)
    return panels, -(-streams // panels)


def whole_panels(rows: int) -> int:
    """Return the rows of all panels of `TALLEST` that hold so many."""
    return -(-rows // TALLEST) * TALLEST
