"""What the compiled engines of WaveNet, GRU and Transformer have in common: arguments, arrays in and out, threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from wavear.common.machine import available_cores
from wavear.generation.cpu import sampling
from wavear.generation.cpu.products import CONDITION, CONSTANT_CONDITION, KINDS, NO_CONDITION
from wavear.generation.cpu.simd import LANES
from wavear.generation.cpu.wavenet_plan import GROUP, SIZES
from wavear.generation.reference import ReferenceEngine
from wavear.models.base import AutoregressiveModel
from wavear.models.distributions import refuse_truncation


class CompiledEngine:
    """Runs `batch` streams of a model in compiled code, one call per chunk.

    The weights are packed when it is made: an engine made after the model changed runs the model as
    it then is. A subclass packs them, names the parts that threads run side by side, and calls its
    kernel for one of them.

    Parameters
    ----------
    model : AutoregressiveModel
        Of the family that the engine serves; on any device, of any precision.
    batch : int
        Streams, at least 1.
    weights : str
        "float32"; "bfloat16" or "int8" (a scale for each output of a matrix): rounded once to
        nearest, half or a quarter of the bytes to read. Arithmetic in float32.
    threads : int, optional
        Cores to use; by default all that the process may run on.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """

    serves: ClassVar[type[AutoregressiveModel]]
    model: Any

    def __init__(self, model: Any, batch: int, weights: str, threads: int | None):
        if not isinstance(model, self.serves):
            raise ValueError(
                f"this engine serves a {self.serves.__name__}, not {type(model).__name__}: use engine 'reference'"
            )
        if weights not in KINDS:
            raise ValueError(f"weights is {weights!r}, it must be one of {', '.join(KINDS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
        self._asked_threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def _parts(self) -> Sequence[Any]:
        """What threads run side by side: groups of streams, or streams."""
        raise NotImplementedError

    def _call(
        self,
        part: Any,
        arrays: tuple[np.ndarray, ...],
        condition: np.ndarray,
        mode: int,
        *rest: Any,
    ) -> int:
        """Run the kernel for one part; the first sample whose law is no numbers, or -1.

        `arrays` are uniforms, temperatures, codes and scores of all streams, `rest` whether codes
        are scored, and the request of `numba_sampling`.
        """
        raise NotImplementedError

    def _as_run(self) -> AutoregressiveModel:
        """The model with its weights as they are packed, for `prefill`."""
        raise NotImplementedError

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        raise NotImplementedError

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        raise NotImplementedError

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
        temperatures = np.require(
            np.broadcast_to(temperature, uniforms.shape), np.float64, ["C", "W"]
        )
        codes = np.empty(uniforms.shape, np.int64)
        scores = np.empty((self.batch, 1) if log_probability is None else codes.shape)
        request = sampling.request
        asked = (self.classes, top_k, top_p, log_probability is not None)
        self._run((uniforms, temperatures, codes, scores), cond, 0, lambda: request(*asked))
        if log_probability is not None:
            log_probability[...] = scores
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        codes = np.require(codes, np.int64, ["C", "W"])
        if codes.size and not 0 <= codes.min() <= codes.max() < self.classes:
            raise ValueError(
                f"codes reach from {codes.min()} to {codes.max()}, expected 0 to {self.classes - 1}"
            )
        scores, none = np.empty(codes.shape), np.empty((self.batch, 1))
        self._run((none, none, codes, scores), cond, 1, lambda: np.empty(0))
        return scores

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        runner = ReferenceEngine(self._as_run(), 1)
        runner.load_state(0, self.state(stream))
        runner.fill(
            0, codes, cond if cond is None else cond.to(next(runner.model.parameters()).dtype)
        )
        self.load_state(stream, runner.state(0))

    def _run(
        self, arrays: tuple[np.ndarray, ...], cond: Tensor | None, scoring: int, request: Any
    ) -> None:
        shape = arrays[2].shape
        if len(shape) != 2 or shape[0] != self.batch:
            raise ValueError(f"shape {shape} for {self.batch} streams: expected ({self.batch}, n)")
        condition, mode = self._condition(cond, shape[1])

        def one(part: Any) -> int:
            return self._call(
                part, arrays, condition, mode, scoring, request()
            )  # each thread works in its own

        parts = self._parts()
        results = list(self._pool.map(one, parts)) if self._pool else [one(part) for part in parts]
        if bad := [t for t in results if t >= 0]:
            raise ValueError(
                f"the network's values for sample {min(bad)} of this call are infinite or NaN:"
                " check the model's weights"
            )

    def _condition(self, cond: Tensor | None, samples: int) -> tuple[np.ndarray, int]:
        """Conditioning as (B, n or 1, padded C), and its mode."""
        channels = self.model.config.conditioning_channels
        if cond is None:
            if self.model.conditioned:
                raise ValueError(
                    f"the model is conditioned: cond must have shape ({self.batch}, {channels}, {samples})"
                )
            return np.empty(0, np.float32), NO_CONDITION
        if not self.model.conditioned:
            raise ValueError("the model is unconditional, and cond is given")
        shape = tuple(cond.shape)
        if len(shape) != 3 or shape[:2] != (self.batch, channels) or shape[2] not in (1, samples):
            raise ValueError(
                f"cond has shape {shape}, expected ({self.batch}, {channels}, {samples}) or (.., .., 1)"
            )
        rows = np.zeros((self.batch, shape[2], -(-channels // LANES) * LANES), np.float32)
        rows[:, :, :channels] = cond.detach().to("cpu", torch.float32).transpose(1, 2).numpy()
        return rows, CONSTANT_CONDITION if shape[2] == 1 else CONDITION


class GroupedEngine(CompiledEngine):
    """A compiled engine whose streams run in groups that share each read of the weights.

    Parameters
    ----------
    packings : dict, optional
        Weights that are packed already, by the size of the groups they are for: see `resized`.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        weights: str,
        threads: int | None,
        packings: dict[int, Any] | None,
    ):
        super().__init__(model, batch, weights, threads)
        self._shares = packings is not None
        self._packings: dict[int, Any] = {} if packings is None else packings
        self._groups: list[Any] = []
        self._packed: Any = None

    def _plan(self, pack: Any, group: Any) -> None:
        """Share the streams out to groups, and these to threads; `pack(size)` if there are no such weights yet."""
        groups = -(-self.batch // GROUP)
        groups = min(self.batch, -(-groups // self.threads) * self.threads)
        bounds = [self.batch * g // groups for g in range(groups + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        # The first weights are for groups of this size; those to be shared are for the sizes that
        # others may want.
        size = (
            max(sizes) if not self._shares else next(size for size in SIZES if size >= max(sizes))
        )
        if size not in self._packings:
            self._packings[size] = pack(size)
        self._packed = self._packings[size]
        self._groups = [
            group(self._packed, first, count, self.model.start_code)
            for first, count in zip(bounds, sizes, strict=False)
        ]
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def _parts(self) -> Sequence[Any]:
        return self._groups

    def resized(self, batch: int) -> Any:
        """See `Engine.resized`."""
        own: Any = type(self)
        return own(
            self.model,
            batch,
            weights=self.weights,
            threads=self._asked_threads,
            packings=self._packings,
        )
