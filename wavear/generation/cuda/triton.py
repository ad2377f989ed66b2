"""The Triton engine: WaveNet's whole loop over samples in one kernel, launched once per chunk.

Each program runs 16 streams (or what there is of them) from the first sample of the chunk to the
last, with their queues, gates, head and draws; the programs fill the card and never wait for each
other. `triton_kernels` has the kernels, `triton_packing` the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.generation.checks import (
    check_batch,
    check_codes,
    check_condition,
    check_finite,
    check_streams,
    check_weights,
)
from wavear.generation.cuda import triton_kernels
from wavear.generation.cuda.triton_packing import ROWS, TYPES, pack, padded, rounded, shapes
from wavear.generation.reference import ReferenceEngine
from wavear.models.wavenet import WaveNet

kernels: Any = triton_kernels  # what `triton.jit` makes of functions has no types
WARPS = 8
_PROJECTED = 256 * 2**20  # bytes of conditioning projected ahead by a launch, at most
# Samples after which the queues are turned to begin at 0 again: the kernel counts in 32 bits.
_WRAP = 2**30
PROJECTION = {"ROWS": 64, "STEP": 16}


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at its import)."""
    return type(kernels.run).__name__ == "InterpretedFunction"


class TritonEngine:
    """Runs `batch` streams of a WaveNet in a Triton kernel.

    The weights are packed when it is made: an engine made after the model changed runs the changed
    model.

    Parameters
    ----------
    model : WaveNet
        On a CUDA device of compute capability 8.0 or more (or, under Triton's interpreter, on the
        CPU).
    batch : int
        Streams, at least 1.
    weights : str
        "float32": products as three in TF32, which is float32 up to rounding. "bfloat16",
        "float16": matrices and what they are multiplied with rounded, sums, queues and the draw in
        float32 and float64.
    packed : dict, optional
        Weights that are packed already: see `resized`.

    Raises
    ------
    WavearError
        If an argument is none of these.
    """

    def __init__(
        self,
        model: WaveNet,
        batch: int,
        *,
        weights: str = "float32",
        packed: dict[str, Tensor] | None = None,
    ):
        if not isinstance(model, WaveNet):
            raise WavearError(
                f"engine 'triton' serves WaveNet, not {type(model).__name__}: "
                "use engine 'cuda-graph'"
            )
        check_weights(weights, tuple(TYPES))
        check_batch(batch)
        self.model, self.batch, self.weights = model, batch, weights
        self.device = next(model.parameters()).device
        if self.device.type != "cuda" and not interpreted():
            raise WavearError(
                f"engine 'triton' needs a model on a CUDA device, this one is on {self.device}"
            )
        self._packed = pack(model, weights) if packed is None else packed
        self._shapes = shapes(model.config, weights)
        r, slots = self._shapes["R"], self._shapes["SLOTS"]
        self._programs = -(-batch // ROWS)
        self._now = 0
        self._previous = torch.full(
            (batch,), model.start_code, dtype=torch.int32, device=self.device
        )
        self._queues = torch.zeros(batch, slots, r, device=self.device)
        self._scratch = scratch(self._shapes, self._programs, TYPES[weights], self.device)

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
        draws = torch.from_numpy(np.ascontiguousarray(uniforms)).to(self.device)
        sharpness = torch.from_numpy(
            np.broadcast_to(1.0 / np.asarray(temperature), uniforms.shape).astype(np.float32)
        )
        codes = torch.empty(uniforms.shape, dtype=torch.int32, device=self.device)
        scores = None if log_probability is None else torch.empty_like(draws)
        classes = self.model.config.classes
        self._run(
            codes,
            cond,
            draws,
            sharpness.to(self.device),
            scores,
            top_k=min(top_k or classes, classes),
            top_p=top_p,
        )
        made = codes.cpu().numpy().astype(np.int64)
        check_finite(made < 0)
        if log_probability is not None and scores is not None:
            log_probability[...] = scores.cpu().numpy()
        return made

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        check_codes(codes, self.model.config.classes)
        scores = torch.empty(codes.shape, dtype=torch.float64, device=self.device)
        self._run(torch.from_numpy(codes.astype(np.int32)).to(self.device), cond, scores=scores)
        found = scores.cpu().numpy()
        check_finite(np.isnan(found))
        return found

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        residual = self.model.config.residual_channels
        tensors = {"previous": self._previous[stream : stream + 1].long().cpu()}
        for i, slots in enumerate(self._slots()):
            tensors[f"queue.{i}"] = self._queues[stream, slots, :residual].cpu()
        return tensors

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        residual = self.model.config.residual_channels
        for i, slots in enumerate(self._slots()):
            self._queues[stream, slots, :residual] = state[f"queue.{i}"].to(
                self.device, torch.float32
            )
        self._previous[stream] = int(state["previous"])

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        for each in (self._queues, self._previous):
            each[targets] = each[sources]

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        runner = ReferenceEngine(rounded(self.model, self.weights), 1)
        runner.load_state(0, self.state(stream))
        dtype = next(runner.model.parameters()).dtype
        runner.fill(0, codes, cond if cond is None else cond.to(dtype))
        self.load_state(stream, runner.state(0))

    def resized(self, batch: int) -> TritonEngine:
        """See `Engine.resized`."""
        return TritonEngine(self.model, batch, weights=self.weights, packed=self._packed)

    def keep(self, streams: list[int]) -> TritonEngine:
        """Return an engine that continues with these streams only."""
        engine = self.resized(len(streams))
        chosen = torch.tensor(streams, device=self.device)
        engine._now = self._now
        engine._previous, engine._queues = self._previous[chosen], self._queues[chosen]
        return engine

    def _slots(self) -> list[Tensor]:
        """Return the places of the past of each layer in the queues, the oldest first."""
        found, first = [], 0
        for dilation in self.model.config.dilations:
            length = (self.model.config.kernel_size - 1) * dilation + 1
            found.append(
                (first + (self._now + 1 + torch.arange(length - 1)) % length).to(self.device)
            )
            first += length
        return found

    def _turn(self) -> None:
        """Let the queues begin at 0 again."""
        before = self._slots()
        self._now = 0
        queues = torch.zeros_like(self._queues)
        for old, new in zip(before, self._slots(), strict=True):
            queues[:, new] = self._queues[:, old]
        self._queues = queues

    def _run(
        self,
        codes: Tensor,
        cond: Tensor | None,
        draws: Tensor | None = None,
        sharpness: Tensor | None = None,
        scores: Tensor | None = None,
        *,
        top_k: int = 0,
        top_p: float | None = None,
    ) -> None:
        """Launch the kernel for all samples of a call; scores given codes if there are no draws."""
        check_streams(tuple(codes.shape), self.batch)
        total = codes.shape[1]
        check_condition(self.model, cond, self.batch, total)
        none = torch.empty(1, dtype=torch.float64, device=self.device)
        settings: dict[str, Any] = {
            "uniforms": none if draws is None else draws,
            "sharpness": self._packed["bias"] if sharpness is None else sharpness,
            "codes": codes,
            "scores": none if scores is None else scores,
            "length": total,
            "batch": self.batch,
            "top_k": top_k,
            "top_p": none
            if top_p is None
            else torch.tensor([top_p], dtype=torch.float64, device=self.device),
            "previous": self._previous,
            "SCORING": draws is None,
            "SCORED": scores is not None,
            "TOP_K": draws is not None and top_k < self.model.config.classes,
            "TOP_P": top_p is not None,
            "UPCAST": interpreted() and self.weights != "float32",
        }
        weights = {
            name: value
            for name, value in self._packed.items()
            if name not in ("bias", "conditioning")
        }
        span = total
        if cond is not None and cond.shape[2] > 1:
            span = max(1, _PROJECTED // (self.batch * self._packed["bias"].numel() * 4))
        with torch.cuda.device(self.device) if self.device.type == "cuda" else torch.no_grad():
            for start in range(0, total, span):
                samples = min(span, total - start)
                if self._now + samples > _WRAP:
                    self._turn()
                z, z_rows = (
                    (self._packed["bias"], 0)
                    if cond is None
                    else self._project(cond, start, samples)
                )
                kernels.run[(self._programs,)](
                    start=start,
                    samples=samples,
                    queues=self._queues,
                    now=self._now,
                    z=z,
                    z_rows=z_rows,
                    z_moves=int(z_rows > 1),
                    **settings,
                    **weights,
                    **self._scratch,
                    **self._shapes,
                    num_warps=WARPS,
                )  # fmt: skip
                self._now += samples

    def _project(self, cond: Tensor, start: int, samples: int) -> tuple[Tensor, int]:
        """Return the initial values of the gates' inputs, and their number of rows per stream."""
        bias = self._packed["bias"]
        samples = min(samples, cond.shape[2])
        outputs, channels = bias.numel(), cond.shape[1]
        rows = self.batch * samples
        cond = cond.to(self.device, torch.float32)
        cond = cond[:, :, start : start + samples] if cond.shape[2] > 1 else cond
        z = torch.empty(rows, outputs, device=self.device)
        tile = min(2 * self._shapes["R"], 128)
        grid = (-(-rows // PROJECTION["ROWS"]), outputs // tile)
        kernels.project[grid](
            cond, *cond.stride(), self._packed["conditioning"], bias, z, samples, rows, channels,
            CHANNELS=padded(channels, 64)[0], OUTPUTS=outputs, TILE=tile,
            UPCAST=interpreted() and self.weights != "float32", **PROJECTION,
        )  # fmt: skip
        return z, samples


def scratch(
    sizes: dict[str, int], programs: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the memory in which threads of a program exchange values, by argument of `run`."""
    rows = programs * ROWS
    return {
        "gates": torch.zeros(rows, sizes["GATES"], dtype=dtype, device=device),
        "signal": torch.zeros(
            rows, sizes["R"] if sizes["R"] > sizes["R_TILE"] else 1, device=device
        ),
        "skips": torch.empty(rows, sizes["S"], dtype=dtype, device=device),
        "hidden": torch.empty(rows, sizes["A"], dtype=dtype, device=device),
        "logits": torch.empty(rows, sizes["Q"], device=device),
    }
