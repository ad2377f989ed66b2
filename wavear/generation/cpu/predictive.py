"""The CPU engine of a predictive WaveNet: the whole loop over samples in compiled code, one call per chunk.

The network is small: its weights stay in the first two caches, so streams run one after the other
and share nothing. Every output element of a product is one chain of fused multiply-adds in a fixed
order: gate bias or the layer's input, bias, inputs from the first to the last (oldest tap first).
Prediction, residual, features and draw are in float64. So a stream's audio has the same bits
whatever the batch, the number of threads and the cuts between calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu.compiled_engine import CompiledEngine
from wavear.generation.cpu.packing import Region, as_packed, to_numpy
from wavear.generation.cpu.predictive_loop import kernel
from wavear.generation.cpu.simd import LANES, WIDEST
from wavear.generation.cpu.wavenet_plan import power_of_two, put_matrix
from wavear.models.frames import FrameConditioning
from wavear.models.predictive import PredictiveWaveNet


class Weights:
    """The packed weights of a model: a table of its matrices, and their biases."""

    def __init__(self, model: PredictiveWaveNet, weights: str):
        config = model.config
        self.residual = _whole_vectors(config.residual_channels)
        self.skip, self.head = (
            _whole_vectors(config.skip_channels),
            _whole_vectors(config.head_channels),
        )
        r, k, layers = self.residual, config.kernel_size, len(config.dilations)
        parts: list[tuple[np.ndarray, Tensor | None]] = [
            (_padded(model.input.weight, r), model.input.bias)
        ]
        for block in model.blocks:
            taps = to_numpy(block.taps.weight).reshape(
                2, config.residual_channels, k, config.residual_channels
            )
            wide = np.zeros((2, r, k, r), np.float32)
            wide[:, : config.residual_channels, :, : config.residual_channels] = taps
            parts.append((wide.reshape(2 * r, k * r), None))
            if block.residual is None:
                parts.append((np.zeros((r, r), np.float32), None))  # never multiplied
            else:
                parts.append((_padded(block.residual.weight, r, r), block.residual.bias))
        units = to_numpy(model.skip.weight).reshape(
            config.skip_channels, layers, config.residual_channels
        )
        wide = np.zeros((self.skip, layers, r), np.float32)
        wide[: config.skip_channels, :, : config.residual_channels] = units
        parts.append((wide.reshape(self.skip, layers * r), model.skip.bias))
        parts.append((_padded(model.hidden.weight, self.head, self.skip), model.hidden.bias))
        outputs = 3 * config.mixtures
        parts.append((_padded(model.output.weight, outputs, self.head), model.output.bias))
        self.region = Region()
        fields = [put_matrix(self.region, matrix, WIDEST, weights) for matrix, _ in parts]
        base = self.region.allocate()
        # address, inputs, blocks, vectors, kernel of a row, bytes of a block
        self.matrices = np.array([[f[0] + base, *f[1:4], f[5], f[6]] for f in fields], np.int64)
        widest = int((self.matrices[:, 2] * self.matrices[:, 3]).max()) * LANES
        self.biases = np.zeros((len(parts), widest), np.float32)
        for row, (_, bias) in zip(self.biases, parts, strict=True):
            if bias is not None:
                row[: len(bias)] = to_numpy(bias)


class NumbaPredictiveEngine(CompiledEngine):
    """Runs `batch` streams of a predictive WaveNet in compiled code; see `CompiledEngine`."""

    serves = PredictiveWaveNet
    model: PredictiveWaveNet

    def __init__(
        self,
        model: PredictiveWaveNet,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packed: Weights | None = None,
    ):
        super().__init__(model, batch, weights, threads)
        config = model.config
        self._packed = packed or Weights(model, weights)
        self._dilations = np.array(config.dilations, np.int64)
        # Rings hold the current input too, and their lengths are powers of two.
        rows = np.array(
            [power_of_two(n) * (2 if power_of_two(n) <= n else 1) for n in config.queue_lengths],
            np.int64,
        )
        self._masks = rows - 1
        self._rings = [np.zeros((batch, n, self._packed.residual), np.float32) for n in rows]
        self._addresses = np.array(
            [[ring[b].ctypes.data for ring in self._rings] for b in range(batch)], np.int64
        ).reshape(batch, -1)
        self._times = np.zeros(batch, np.int64)
        self._samples = np.zeros(
            (batch, config.history + 1), np.float32
        )  # the last one is that of `previous`
        self._residuals = np.zeros((batch, config.history + 1), np.float32)
        self._lags = np.zeros((batch, config.lag_history), np.int64)
        self._pending = np.tile(np.array([0.0, 1.0]), (batch, 1))
        self._previous = np.full(batch, model.start_code, np.int64)
        bounds = [batch * part // self.threads for part in range(self.threads + 1)]
        self._spans = list(pairwise(bounds))
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def _parts(self) -> Sequence[Any]:
        return self._spans

    def _condition(self, cond: Any, samples: int) -> tuple[Any, int]:
        config, batch = self.model.config, self.batch
        if not isinstance(cond, FrameConditioning) or (len(cond), cond.samples) != (batch, samples):
            shape = "None" if cond is None else tuple(cond.shape)
            raise ValueError(
                f"cond is {shape}, expected the conditioning of {batch} streams of {samples} samples"
            )
        r, width = config.residual_channels, self._packed.residual
        gates = (
            cond.gates.detach().to("cpu", torch.float32).permute(0, 1, 3, 2).numpy()
        )  # (B, F, 3, G)
        parts = gates[..., : 2 * r * len(config.dilations)].reshape(*gates.shape[:3], -1, r)
        padded = np.zeros(
            (*gates.shape[:3], parts.shape[3] * width + self._packed.skip), np.float32
        )
        padded[..., : parts.shape[3] * width].reshape(*parts.shape[:4], width)[..., :r] = parts
        skip = gates[..., 2 * r * len(config.dilations) :]
        padded[..., parts.shape[3] * width :][..., : skip.shape[3]] = skip
        lags = cond.lag.cpu()
        first = cond.offset.cpu()[:, None] + torch.arange(samples)
        whole = np.concatenate([self._lags, lags.gather(1, first).round().long().numpy()], axis=1)
        new = np.zeros((batch, samples), np.float32)
        return {
            "xs": np.concatenate([self._samples, new], axis=1),
            "es": np.concatenate([self._residuals, new], axis=1),
            "whole": np.ascontiguousarray(whole),
            "pending": self._pending.copy(),
            "times": self._times.copy(),
            "gates": padded,
            "weights": cond.weights.cpu().float().numpy(),
            "coefficients": np.ascontiguousarray(cond.coefficients.cpu().numpy()[:, :, ::-1]),
            "scales": np.ascontiguousarray(cond.scale.cpu().numpy()),
            "lags": np.ascontiguousarray(lags.numpy()),
            "voicings": np.ascontiguousarray(cond.voicing.cpu().numpy()),
            "offsets": np.ascontiguousarray(cond.offset.cpu().numpy()),
        }, 0  # fmt: skip

    def _run(self, arrays: tuple[np.ndarray, ...], cond: Any, scoring: int, request: Any) -> None:
        codes = arrays[2]
        if codes.ndim == 2 and codes.shape[1] == 0:
            return
        super()._run(arrays, cond, scoring, request)

    def _call(
        self, part: Any, arrays: tuple[np.ndarray, ...], condition: Any, mode: int, *rest: Any
    ) -> int:
        config, packed = self.model.config, self._packed
        scoring, asked = rest
        given: Any = condition
        sizes = (
            config.recent_residuals, config.period_residuals, config.mixtures, config.classes, config.kernel_size,
            packed.residual // LANES, packed.skip // LANES, packed.head // LANES, config.features, config.history,
        )  # fmt: skip
        bad = kernel()(
            *part, sizes, packed.matrices, packed.biases, self._dilations, self._addresses, self._masks,
            given["times"], given["xs"], given["es"], given["whole"], given["pending"], given["gates"],
            given["weights"], given["coefficients"], given["scales"], given["lags"], given["voicings"],
            given["offsets"], *arrays, bool(scoring), len(asked) > 0,
        )  # fmt: skip
        if bad < 0:
            rows = slice(*part)
            kept = config.history + 1
            self._samples[rows], self._residuals[rows] = (
                given["xs"][rows, -kept:],
                given["es"][rows, -kept:],
            )
            self._lags[rows] = given["whole"][rows, -self._lags.shape[1] :]
            self._pending[rows], self._times[rows] = given["pending"][rows], given["times"][rows]
            self._previous[rows] = arrays[2][rows, -1]
        return bad

    def _as_run(self) -> PredictiveWaveNet:
        if self.weights == "float32" and next(self.model.parameters()).dtype in (
            torch.float32,
            torch.float64,
        ):
            return self.model
        model = copy.deepcopy(self.model).float()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.startswith("conditioning."):
                parameter.data.copy_(torch.from_numpy(as_packed(to_numpy(parameter), self.weights)))
        return model

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        config, time = self.model.config, int(self._times[stream])
        queues = {}
        for i, (ring, mask, length) in enumerate(
            zip(self._rings, self._masks, config.queue_lengths, strict=True)
        ):
            rows = ring[stream, np.arange(time - length, time) & mask, : config.residual_channels]
            queues[f"queue.{i}"] = torch.from_numpy(rows)
        return {
            "previous": torch.tensor([self._previous[stream]]),
            "samples": torch.from_numpy(self._samples[stream, :-1].copy()),
            "residuals": torch.from_numpy(self._residuals[stream, :-1].copy()),
            "lags": torch.from_numpy(self._lags[stream].copy()),
            **queues,
            "pending": torch.from_numpy(self._pending[stream].copy()),
        }

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        config = self.model.config
        self._times[stream] = 0
        for i, (ring, mask, length) in enumerate(
            zip(self._rings, self._masks, config.queue_lengths, strict=True)
        ):
            ring[stream] = 0
            queue = state[f"queue.{i}"].to("cpu", torch.float32).numpy()
            ring[stream, np.arange(-length, 0) & mask, : config.residual_channels] = queue
        previous = int(state["previous"])
        half = config.classes // 2
        self._samples[stream, :-1] = state["samples"].to("cpu", torch.float32).numpy()
        self._samples[stream, -1] = np.float32((previous - half) / half)
        self._residuals[stream, :-1] = state["residuals"].to("cpu", torch.float32).numpy()
        self._lags[stream] = state["lags"].cpu().numpy()
        self._pending[stream] = state["pending"].to("cpu", torch.float64).numpy()
        self._previous[stream] = previous

    def resized(self, batch: int) -> NumbaPredictiveEngine:
        """See `Engine.resized`."""
        return NumbaPredictiveEngine(
            self.model,
            batch,
            weights=self.weights,
            threads=self._asked_threads,
            packed=self._packed,
        )


def _whole_vectors(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _padded(matrix: Tensor, outputs: int, inputs: int | None = None) -> np.ndarray:
    """A matrix with rows and columns of zeros behind its own."""
    own = to_numpy(matrix)
    padded = np.zeros((outputs, own.shape[1] if inputs is None else inputs), np.float32)
    padded[: own.shape[0], : own.shape[1]] = own
    return padded
