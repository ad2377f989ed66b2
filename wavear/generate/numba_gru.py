"""The CPU engine of a GRU: the whole loop over samples in compiled code, one call per chunk.

It stands on the pieces of the WaveNet's (`numba_cpu`): packed weights, the vector kernels, the draw. Its own are:

- the product of the first layer's input matrix with the input is a table over codes, in float32;
- the conditioning, folded into one matrix for the first layer and the head, is projected ahead for blocks of samples;
- the three gates of a layer are one matrix over its hidden units, and one kernel makes the new hidden units of them.

A row of pre-activations holds, `gap` bytes apart from its second part on,

    head | n_x | r | u | n_h

so that what the conditioning adds to (the first four parts), what a layer's input adds to (n_x, r, u) and what its
hidden units add to (r, u, n_h) is each contiguous, and a product runs in place.

Every output element is one chain in a fixed order: bias, conditioning, input, hidden units. So a stream's audio has the
same bits whatever the batch, the grouping, the number of threads and the cuts between calls.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from wavear.generate import numba_sampling
from wavear.generate._simd import LANES
from wavear.generate.numba_cpu import available_cores
from wavear.generate.numba_gru_loop import kernels
from wavear.generate.numba_gru_plan import Group, Weights
from wavear.generate.numba_loop import CONDITION, CONSTANT_CONDITION, NO_CONDITION
from wavear.generate.numba_plan import GROUP, SIZES
from wavear.generate.numba_products import KINDS, N_FIRST
from wavear.generate.packing import as_packed, to_numpy
from wavear.generate.reference import ReferenceEngine
from wavear.models.gru import GRU


class NumbaGRUEngine:
    """Runs `batch` streams of a GRU in compiled code; see `NumbaEngine`, whose arguments these are."""

    def __init__(
        self,
        model: GRU,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, Weights] | None = None,
    ):
        if not isinstance(model, GRU):
            raise ValueError(f"this engine serves GRU, not {type(model).__name__}: use engine 'reference'")
        if weights not in KINDS:
            raise ValueError(f"weights is {weights!r}, it must be one of {', '.join(KINDS)}")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self._asked_threads = threads
        self._packings: dict[int, Weights] = {} if packings is None else packings
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
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
        """See `NumbaEngine.generate`."""
        if not self.model.law.truncates and (top_k is not None or top_p is not None):
            raise ValueError(f"top_k and top_p choose among the codes of a categorical law: {self.model.config.law}")
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

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        runner = ReferenceEngine(as_run(self.model, self.weights), 1)
        runner.load_state(0, self.state(stream))
        runner.fill(0, codes, cond if cond is None else cond.to(next(runner.model.parameters()).dtype))
        self.load_state(stream, runner.state(0))

    def resized(self, batch: int) -> NumbaGRUEngine:
        """See `Engine.resized`."""
        threads = self._asked_threads
        return NumbaGRUEngine(self.model, batch, weights=self.weights, threads=threads, packings=self._packings)

    def _seat(self, stream: int) -> tuple[Group, int]:
        """The group that runs a stream, and its row there."""
        group = next(g for g in reversed(self._groups) if g.net[N_FIRST] <= stream)
        return group, stream - int(group.net[N_FIRST])

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
                f"the law of sample {min(bad)} of this call has infinite or NaN parameters: check the model's weights"
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
    names = [name for name, _ in model.gru.named_parameters() if name.startswith("weight") and name != "weight_ih_l0"]
    return [*(model.gru.get_parameter(name) for name in names), model.head.first.weight, model.head.last.weight]
