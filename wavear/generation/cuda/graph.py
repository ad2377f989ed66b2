"""The CUDA graph engine: a run of any model's `step`, captured once and replayed.

A step launches hundreds of small kernels, and launching them from Python takes longer than running
them. A CUDA graph launches all of a run of samples at once. For that everything a step reads and
writes lies at fixed addresses (uniforms, temperatures, conditioning, codes, the model's state), and
the number of the sample is a counter on the device: the host feeds a chunk, replays, and reads the
codes when the chunk is done.

The runner that captures is an argument: on CUDA a graph, elsewhere a stand-in that calls the same
steps again on the same memory, so that all but the capture itself is tested on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.checks import check_batch, check_condition, check_finite, check_streams
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import dense

CHUNK = 512  # samples fed at once
RUN = 32  # samples per replay, where so many are left

Replay = Callable[[], object]
Runner = Callable[[Callable[[], None]], Replay]


def graph_runner(steps: Callable[[], None]) -> Replay:
    """Capture `steps` in a CUDA graph, after the run that capturing requires to load kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def plain_runner(steps: Callable[[], None]) -> Replay:
    """Stand in for `graph_runner`: run the steps, and call them again for each replay."""
    steps()
    return steps


class CudaGraphEngine:
    """Runs `batch` streams of any model that keeps the contract.

    Parameters
    ----------
    model : AutoregressiveModel
        Its `step` must do the same operations for every sample, on tensors of its state only,
        without asking the device for values. Weights changed in place are used at once.
    batch : int
        Streams, at least 1.
    runner : callable, optional
        What captures; by default a CUDA graph, and on other devices the stand-in.

    Raises
    ------
    WavearError
        If the batch is empty.
    """

    def __init__(self, model: AutoregressiveModel, batch: int, *, runner: Runner | None = None):
        check_batch(batch)
        self.model, self.batch = model, batch
        self.device = next(model.parameters()).device
        self._runner = runner or (graph_runner if self.device.type == "cuda" else plain_runner)
        self._state = model.init_state(batch)
        self._previous = torch.full((batch,), model.start_code, device=self.device)
        self._clock = torch.zeros(1, dtype=torch.long, device=self.device)
        # What goes in and out, time first.
        self._uniforms = torch.zeros(CHUNK, batch, dtype=torch.float64, device=self.device)
        self._temperatures = torch.ones_like(self._uniforms)
        self._codes = torch.zeros(CHUNK, batch, dtype=torch.long, device=self.device)
        self._scores = torch.zeros_like(self._uniforms)
        self._cond: dict[bool, Tensor] = {}  # by whether it differs from sample to sample
        self._replays: dict[tuple[Any, ...], Replay] = {}

    @torch.inference_mode()
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
        draws = torch.from_numpy(np.ascontiguousarray(uniforms))
        temperatures = torch.from_numpy(
            np.broadcast_to(temperature, uniforms.shape).astype(np.float64)
        )
        codes = np.empty(uniforms.shape, dtype=np.int64)
        law = (False, top_k, top_p, log_probability is not None)
        for part in self._chunks(uniforms.shape, cond):
            size = part.stop - part.start
            self._uniforms[:size] = draws[:, part].T.to(self.device)
            self._temperatures[:size] = temperatures[:, part].T.to(self.device)
            self._advance(size, cond, part, law)
            codes[:, part] = self._codes[:size].T.cpu().numpy()
            if log_probability is not None:
                log_probability[:, part] = self._scores[:size].T.cpu().numpy()
            check_finite(codes[:, part] < 0, part.start)
        return codes

    @torch.inference_mode()
    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        given = torch.from_numpy(np.ascontiguousarray(codes))
        scores = np.empty(codes.shape)
        for part in self._chunks(codes.shape, cond):
            size = part.stop - part.start
            self._codes[:size] = given[:, part].T.to(self.device)
            self._advance(size, cond, part, (True, None, None, True))
            scores[:, part] = self._scores[:size].T.cpu().numpy()
            check_finite(np.isnan(scores[:, part]), part.start)
        return scores

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        tensors = self.model.export_state(self._state)
        one = {name: value[stream].to("cpu", copy=True) for name, value in tensors.items()}
        return {"previous": self._previous[stream : stream + 1].to("cpu", copy=True), **one}

    @torch.inference_mode()
    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        tensors = self.model.export_state(self._state)
        for name, value in tensors.items():
            value[stream] = state[name].to(self.device, value.dtype)
        self._write(tensors)
        self._previous[stream] = int(state["previous"])

    @torch.inference_mode()
    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        tensors = self.model.export_state(self._state)
        for value in (*tensors.values(), self._previous):
            value[targets] = value[sources]
        self._write(tensors)

    @torch.inference_mode()
    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        tensors = self.model.export_state(self._state)
        one = self.model.import_state(
            {name: value[stream : stream + 1] for name, value in tensors.items()}
        )
        given = torch.from_numpy(codes).to(self.device)
        self.model.prefill(
            torch.cat([self._previous[stream : stream + 1], given[:-1]])[None], one, cond
        )
        for name, value in self.model.export_state(one).items():
            tensors[name][stream] = value[0]
        self._write(tensors)
        self._previous[stream] = given[-1]

    def resized(self, batch: int) -> CudaGraphEngine:
        """See `Engine.resized`."""
        return CudaGraphEngine(self.model, batch, runner=self._runner)

    @torch.inference_mode()
    def keep(self, streams: list[int]) -> CudaGraphEngine:
        """Return an engine that continues with these streams only."""
        engine = self.resized(len(streams))
        chosen = torch.tensor(streams, device=self.device)
        engine._write(
            {name: value[chosen] for name, value in self.model.export_state(self._state).items()}
        )
        engine._previous.copy_(self._previous[chosen])
        return engine

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """Copy the state from `export_state` to the addresses that the graphs use."""
        for mine, theirs in zip(
            tensors_of(self._state), tensors_of(self.model.import_state(tensors)), strict=True
        ):
            mine.copy_(theirs)

    def _chunks(self, shape: tuple[int, ...], cond: Tensor | None) -> Iterator[slice]:
        check_streams(shape, self.batch)
        check_condition(self.model, cond, self.batch, shape[1])
        for start in range(0, shape[1], CHUNK):
            yield slice(start, min(start + CHUNK, shape[1]))

    def _advance(
        self, samples: int, cond: Tensor | None, part: slice, law: tuple[Any, ...]
    ) -> None:
        """Feed the conditioning of a chunk, and replay until its samples are made."""
        varying = cond is not None and cond.shape[2] > 1
        if cond is not None:
            given = dense(cond[:, :, part] if varying else cond)
            if varying not in self._cond:
                length = CHUNK if varying else 1
                self._cond[varying] = torch.zeros(
                    length, *given.shape[:2], dtype=given.dtype, device=self.device
                )
            self._cond[varying][: given.shape[2]] = given.permute(2, 0, 1)
        whole, rest = divmod(samples, RUN)
        self._replay(RUN if whole else 1, varying, law, whole or rest)
        if whole and rest:
            self._replay(1, varying, law, rest, begin=whole * RUN)

    def _replay(
        self, run: int, varying: bool, law: tuple[Any, ...], times: int, begin: int = 0
    ) -> None:
        key = (run, varying, *law)
        if key not in self._replays:
            self._replays[key] = self._capture(run, varying, law)
        self._clock.fill_(begin)
        for _ in range(times):
            self._replays[key]()

    def _capture(self, run: int, varying: bool, law: tuple[Any, ...]) -> Replay:
        """Return a replay of `run` samples; the state that capturing changes is restored."""

        def steps() -> None:
            for _ in range(run):
                self._step(varying, *law)

        changed = [*tensors_of(self._state), self._previous, self._codes, self._scores]
        before = [tensor.clone() for tensor in changed]
        self._clock.zero_()
        replay = self._runner(steps)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return replay

    def _step(
        self, varying: bool, scoring: bool, top_k: int | None, top_p: float | None, scored: bool
    ) -> None:
        """One sample of all streams, on fixed memory and without asking the device for anything."""
        now = self._clock
        cond = None
        if self.model.conditioned:
            cond = (
                self._cond[varying].index_select(0, now)[0] if varying else self._cond[varying][0]
            )
        law, parameters = self.model.law, self.model.step(self._previous, self._state, cond)
        if scoring:
            codes = self._codes.index_select(0, now)[0]
        else:
            uniform, temperature = (
                tensor.index_select(0, now)[0] for tensor in (self._uniforms, self._temperatures)
            )
            codes = law.sample(parameters, uniform, temperature, top_k, top_p).clamp(
                0, law.grid.classes - 1
            )
            fine = torch.isfinite(parameters.amax(dim=-1))  # of NaN the largest is NaN
            self._codes.index_copy_(0, now, torch.where(fine, codes, -1)[None])
        if scored:
            nats = law.log_prob(parameters.double()[..., None], codes[:, None])
            self._scores.index_copy_(0, now, nats.T)
        self._previous.copy_(codes)
        self._clock += 1


def tensors_of(state: Any) -> list[Tensor]:
    """Return all tensors of a model's state, in one order.

    Raises
    ------
    TypeError
        If it holds numbers that the host would have to change: a graph replays what it captured.

    Examples
    --------
    >>> state = {"a": [torch.tensor(1), torch.tensor(2)], "b": torch.tensor(3)}
    >>> [tensor.tolist() for tensor in tensors_of(state)]
    [1, 2, 3]
    """
    if isinstance(state, Tensor):
        return [state]
    if state is None:
        return []
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        state = [getattr(state, field.name) for field in dataclasses.fields(state)]
    if isinstance(state, dict):
        state = list(state.values())
    if not isinstance(state, list | tuple):
        raise TypeError(
            f"a state of tensors cannot hold {state!r}: a captured graph would never change it"
        )
    return [tensor for part in state for tensor in tensors_of(part)]
