"""The CPU engine: WaveNet's whole loop over samples in compiled code, one call per chunk.

What it does that the plain loop does not:

- weights are packed for the vector kernels of `_simd` and read once per sample, shared by the streams of a group;
- the past of each layer lies in a ring buffer; a layer of dilation d knows its past taps d samples ahead, so their
  products are made for several samples at once and their weights read once for all of them;
- the conditioning of all layers is projected ahead for blocks of samples in the same way.

Every output element is one chain of fused multiply-adds in a fixed order: bias, conditioning, past taps from the
oldest on, current sample; in int8 each of these products is a chain of its own, scaled and added in that order. So a
stream's audio has the same bits whatever the batch, the grouping, the number of threads and the cuts between calls.

Beside this engine lie the loop it runs (`numba_loop`), the products in it (`numba_products`), and its plan of a network
(`numba_plan`).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from wavear.generate import numba_sampling
from wavear.generate._simd import LANES
from wavear.generate.numba_loop import CONDITION, CONSTANT_CONDITION, NO_CONDITION, kernels
from wavear.generate.numba_plan import GROUP, SIZES, Group, Shared, Weights
from wavear.generate.numba_products import KINDS
from wavear.generate.reference import ReferenceEngine
from wavear.models.wavenet import WaveNet


class NumbaEngine:
    """Runs `batch` streams of a WaveNet in compiled code.

    The weights are packed when it is made: an engine made after the model changed runs the model as it then is.

    Parameters
    ----------
    model : WaveNet
        On any device, of any precision.
    batch : int
        Streams, at least 1.
    weights : str
        "float32"; "bfloat16": the matrices rounded once to nearest, half the bytes to read; "int8": whole numbers from
        -127 to 127 with a scale for each output (of each tap), a quarter. Arithmetic is float32 always.
    threads : int, optional
        Cores to use; by default all that the process may run on, each for streams of its own. One stream runs on two
        cores only if it is asked for: they wait for each other some twenty times per sample, which pays on an idle
        machine, and costs more than it gains where another program takes one of the cores.
    packings : dict, optional
        Weights that are packed already, by the size of the groups they serve: see `resized`.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """

    def __init__(
        self,
        model: WaveNet,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, Weights] | None = None,
    ):
        if not isinstance(model, WaveNet):
            raise ValueError(f"engine 'numba' serves WaveNet, not {type(model).__name__}: use engine 'reference'")
        if weights not in KINDS:
            raise ValueError(f"weights is {weights!r}, it must be one of {', '.join(KINDS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self._asked_threads = threads
        self._packings: dict[int, Weights] = {} if packings is None else packings
        cores = threads or available_cores()
        self.classes = model.config.classes
        if batch == 1 and threads is not None and threads > 1 and _divides(model) and packings is None:
            self.threads = 2
            shared = Shared(model)
            halves = [Weights(model, 1, weights, part, 2) for part in range(2)]
            self._packed = halves[0]
            self._groups = [Group(half, 0, 1, model.start_code, shared) for half in halves]
            self._pool = ThreadPoolExecutor(2)
            return
        self.threads = min(cores, batch)
        groups = -(-batch // GROUP)
        groups = min(batch, -(-groups // self.threads) * self.threads)
        bounds = [batch * g // groups for g in range(groups + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        size = max(sizes) if packings is None else next(size for size in SIZES if size >= max(sizes))
        if size not in self._packings:
            self._packings[size] = Weights(model, size, weights)
        self._packed = self._packings[size]
        self._groups = [
            Group(self._packed, first, size, model.start_code) for first, size in zip(bounds, sizes, strict=False)
        ]
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

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
        """The next samples of every stream.

        Parameters
        ----------
        uniforms : ndarray of float64 in [0, 1), shape (B, n)
        cond : Tensor, shape (B, C, n) or (B, C, 1), or None
        temperature : float, or ndarray of shape (B, n)
        top_k, top_p : optional
            See `wavear.sampling`.
        log_probability : ndarray of float64, shape (B, n), optional
            Filled with that of each code, in nats, by the model's own law: without temperature and truncation.

        Returns
        -------
        ndarray of int64, shape (B, n): codes

        Raises
        ------
        ValueError
            If a shape does not fit, or the logits become infinite or NaN.
        """
        uniforms = np.require(uniforms, np.float64, ["C", "W"])
        temperatures = np.require(np.broadcast_to(temperature, uniforms.shape), np.float64, ["C", "W"])
        codes = np.empty(uniforms.shape, np.int64)
        scores = np.empty((1, 1) if log_probability is None else codes.shape)
        asked = (top_k, top_p, log_probability is not None)
        self._run(uniforms, temperatures, codes, scores, cond, scoring=False, asked=asked)
        if log_probability is not None:
            log_probability[...] = scores
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """Log-probabilities, in nats, of the next samples of every stream being `codes`; float64, shape (B, n)."""
        codes = np.require(codes, np.int64, ["C", "W"])
        if codes.size and not 0 <= codes.min() <= codes.max() < self.classes:
            raise ValueError(f"codes reach from {codes.min()} to {codes.max()}, expected 0 to {self.classes - 1}")
        scores = np.empty(codes.shape)
        none = np.empty((1, 1))
        self._run(none, none, codes, scores, cond, scoring=True)
        return scores

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        from wavear.generate.numba_state import export_state

        return export_state(self, stream)

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        from wavear.generate.numba_state import load_state

        load_state(self, stream, state)

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        from wavear.generate.numba_state import as_run

        runner = ReferenceEngine(as_run(self.model, self.weights), 1)
        runner.load_state(0, self.state(stream))
        runner.fill(0, codes, cond if cond is None else cond.to(next(runner.model.parameters()).dtype))
        self.load_state(stream, runner.state(0))

    def resized(self, batch: int) -> NumbaEngine:
        """See `Engine.resized`."""
        threads = self._asked_threads
        return NumbaEngine(self.model, batch, weights=self.weights, threads=threads, packings=self._packings)

    def _run(self, uniforms, temperatures, codes, scores, cond, scoring: bool, asked=(None, None, False)) -> None:
        if codes.ndim != 2 or codes.shape[0] != self.batch:
            raise ValueError(f"shape {codes.shape} for {self.batch} streams: expected ({self.batch}, n)")
        condition, mode = self._condition(cond, codes.shape[1])
        run = kernels().run

        def one(group: Group) -> int:
            return run(group.net, group.layers, group.previous, uniforms, temperatures, codes, scores,
                       condition.ctypes.data, mode, int(scoring),
                       numba_sampling.request(self.classes, *asked))  # fmt: skip

        results = list(self._pool.map(one, self._groups)) if self._pool else [one(group) for group in self._groups]
        bad = [t for t in results if t >= 0]
        if bad:
            raise ValueError(
                f"the logits of sample {min(bad)} of this call are infinite or NaN: check the model's weights"
            )

    def _condition(self, cond: Tensor | None, samples: int) -> tuple[np.ndarray, int]:
        """Conditioning as (B, n or 1, padded C), and its mode."""
        channels = self._packed.condition_channels
        if cond is None:
            if channels:
                raise ValueError(
                    f"the model is conditioned: cond must have shape ({self.batch}, {channels}, {samples})"
                )
            return np.empty(0, np.float32), NO_CONDITION
        if not channels:
            raise ValueError("the model is unconditional, and cond is given")
        shape = tuple(cond.shape)
        if len(shape) != 3 or shape[:2] != (self.batch, channels) or shape[2] not in (1, samples):
            raise ValueError(f"cond has shape {shape}, expected ({self.batch}, {channels}, {samples}) or (.., .., 1)")
        rows = np.zeros((self.batch, shape[2], self._packed.condition_vectors * LANES), np.float32)
        rows[:, :, :channels] = cond.detach().to("cpu", torch.float32).transpose(1, 2).numpy()
        return rows, CONSTANT_CONDITION if shape[2] == 1 else CONDITION


def _divides(model: WaveNet) -> bool:
    """Whether two cores can share one stream: every layer has a vector for each of them."""
    config = model.config
    sizes = (config.residual_channels, config.skip_channels, config.head_channels, model.law.channels)
    return min(sizes) > LANES


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
