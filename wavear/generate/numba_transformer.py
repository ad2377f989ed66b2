"""The CPU engine of the transformer.

What it does that the plain loop does not:

- weights are packed for the vector kernels of `_simd` and read once: those of the layers once per patch;
- what a past sample adds to its position's input, and to the head, is looked up by its code and its place, where the
  tables of these products fit a cache;
- keys lie with their channels apart and their positions side by side, values the other way round, so both products of
  the attention run along whole vectors;
- half of what a ReLU lets through is zero, and is neither multiplied nor are its weights read.

Every output element is one chain of fused multiply-adds in a fixed order, and streams share nothing but the weights:
so a stream's audio has the same bits whatever the batch, the threads and the cuts between calls.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from wavear.generate import numba_sampling
from wavear.generate import numba_transformer_loop as loop
from wavear.generate._simd import LANES
from wavear.generate.numba_cpu import available_cores
from wavear.generate.numba_products import KINDS
from wavear.generate.numba_transformer_plan import Stream, Weights, as_run
from wavear.generate.reference import ReferenceEngine
from wavear.models.transformer import Transformer


class NumbaTransformer:
    """Runs `batch` streams of a Transformer in compiled code.

    The weights are packed when it is made: an engine made after the model changed runs the model as it then is.

    Parameters
    ----------
    model : Transformer
        On any device, of any precision.
    batch : int
        Streams, at least 1.
    weights : str
        "float32", "bfloat16" or "int8" (a scale for each output): the matrices rounded once to nearest, half or a
        quarter of the bytes to read; arithmetic in float32.
    threads : int, optional
        Cores to use, each for streams of its own; by default all that the process may run on.
    packed : Weights, optional
        Weights that are packed already: see `resized`.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packed: Weights | None = None,
    ):
        if not isinstance(model, Transformer):
            raise ValueError(f"this engine serves a Transformer, not {type(model).__name__}: use engine 'reference'")
        if weights not in KINDS:
            raise ValueError(f"weights is {weights!r}, it must be one of {', '.join(KINDS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights, self._asked_threads = model, batch, weights, threads
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
        self._packed = packed or Weights(model, weights)
        self._streams = [Stream(self._packed, model.start_code) for _ in range(batch)]
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
        """See `Engine.generate`.

        Raises
        ------
        ValueError
            If a shape does not fit, or the network puts out infinities or NaN.
        """
        uniforms = np.require(uniforms, np.float64, ["C", "W"])
        temperatures = np.require(np.broadcast_to(temperature, uniforms.shape), np.float64, ["C", "W"])
        codes = np.empty(uniforms.shape, np.int64)
        scores = np.empty((self.batch, 1) if log_probability is None else codes.shape)
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
        scores, none = np.empty(codes.shape), np.empty((self.batch, 1))
        self._run(none, none, codes, scores, cond, scoring=True)
        return scores

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        return self._streams[stream].export()

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self._streams[stream].load(state)

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        runner = ReferenceEngine(as_run(self.model, self.weights), 1)
        runner.load_state(0, self.state(stream))
        runner.fill(0, codes, cond if cond is None else cond.to(next(runner.model.parameters()).dtype))
        self.load_state(stream, runner.state(0))

    def resized(self, batch: int) -> NumbaTransformer:
        """See `Engine.resized`."""
        return NumbaTransformer(
            self.model, batch, weights=self.weights, threads=self._asked_threads, packed=self._packed
        )

    def _run(self, uniforms, temperatures, codes, scores, cond, scoring: bool, asked=(None, None, False)) -> None:
        if codes.ndim != 2 or codes.shape[0] != self.batch:
            raise ValueError(f"shape {codes.shape} for {self.batch} streams: expected ({self.batch}, n)")
        condition, mode = self._condition(cond, codes.shape[1])
        run = loop.run()

        def one(row: int) -> int:
            stream = self._streams[row]
            address = condition[row].ctypes.data if mode else 0
            return run(stream.net, stream.layers, stream.work, stream.history, uniforms[row], temperatures[row],
                       codes[row], scores[row], address, mode, int(scoring),
                       numba_sampling.request(self.classes, *asked))  # fmt: skip

        results = list(self._pool.map(one, range(self.batch))) if self._pool else [one(b) for b in range(self.batch)]
        bad = [t for t in results if t >= 0]
        if bad:
            raise ValueError(
                f"the network puts out infinities or NaN for sample {min(bad)} of this call: check the model's weights"
            )

    def _condition(self, cond: Tensor | None, samples: int) -> tuple[np.ndarray, int]:
        """Conditioning as (B, n or 1, padded C), and its mode."""
        channels = self.model.config.conditioning_channels
        if cond is None:
            if self.model.conditioned:
                raise ValueError(
                    f"the model is conditioned: cond must have shape ({self.batch}, {channels}, {samples})"
                )
            return np.empty(0, np.float32), loop.NO_CONDITION
        if not self.model.conditioned:
            raise ValueError("the model is unconditional, and cond is given")
        shape = tuple(cond.shape)
        if len(shape) != 3 or shape[:2] != (self.batch, channels) or shape[2] not in (1, samples):
            raise ValueError(f"cond has shape {shape}, expected ({self.batch}, {channels}, {samples}) or (.., .., 1)")
        rows = np.zeros((self.batch, shape[2], -(-channels // LANES) * LANES), np.float32)
        rows[:, :, :channels] = cond.detach().to("cpu", torch.float32).transpose(1, 2).numpy()
        return rows, loop.CONSTANT_CONDITION if shape[2] == 1 else loop.CONDITION
