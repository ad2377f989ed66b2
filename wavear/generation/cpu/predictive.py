"""The CPU engine of a predictive WaveNet: the whole loop over samples in compiled code.

The network is small: its weights stay in the first two caches, so streams run one after the other
and share nothing. Every output element of a product is one chain of fused multiply-adds in a fixed
order: gate bias or the layer's input, bias, inputs from the first to the last (oldest tap first).
Prediction, residual, features and draw are in float64. So a stream's audio has the same bits
whatever the batch, the number of threads and the cuts between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.generation.cpu import distributions
from wavear.generation.cpu.compiled_engine import CompiledEngine
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.packing import (
    SIGNAL_STEPS,
    UNIT_STEPS,
    Packer,
    ahead_of,
    padded,
    power_of_two,
    quantise,
    round_inputs,
    to_numpy,
    vectors_for,
)
from wavear.generation.cpu.predictive_loop import LAYER, PLAN, Frames, run
from wavear.generation.cpu.products import NO_CONDITION, products
from wavear.generation.cpu.sampling import Call, type_of
from wavear.generation.cpu.simd import WIDEST
from wavear.models.frames import FrameConditioning
from wavear.models.predictive import PredictiveWaveNet


class Weights:
    """The packed weights of a model and its plan."""

    def __init__(self, model: PredictiveWaveNet, weights: str):
        config = model.config
        self.packer = packer = Packer(weights)
        self.plan, self.layers = np.zeros(1, PLAN), np.zeros(len(config.dilations), LAYER)
        net, own, count = self.plan[0], config.residual_channels, len(config.dilations)
        r, skip, head = (
            vectors_for(channels) * LANES
            for channels in (own, config.skip_channels, config.head_channels)
        )
        rooms, dots = [2 * r // LANES], weights == "int8"
        # How the matrices of the layers are stored, and the steps of their inputs.
        stored, unit, signal = ("dots", UNIT_STEPS, SIGNAL_STEPS) if dots else (weights, 0, 0)

        def product(plan: Any, field: str, matrix: np.ndarray, bias: Any, *how: Any):
            room = packer.room(len(matrix), WIDEST)
            rooms.append(room + r // LANES)
            plan[field] = packer.matrix(matrix, WIDEST, *how)
            bias = bias if isinstance(bias, np.ndarray) else to_numpy(bias)
            packer.vector(plan, f"{field}_bias", bias, room)

        # Matrices in the order of use. In int8 the parts of a matrix share its scales.
        product(net, "input", padded(to_numpy(model.input.weight), r, -1), model.input.bias)
        units = to_numpy(model.skip.weight).reshape(config.skip_channels, count, own)
        units = padded(units, skip, count, r)
        unit_scales = quantise(units.reshape(skip, -1))[1]
        for i, (layer, block) in enumerate(zip(self.layers, model.blocks, strict=True)):
            reach = config.dilations[i] or config.shortest_period
            layer["ahead"] = ahead_of(reach)
            taps = to_numpy(block.taps.weight).reshape(2, own, config.kernel_size, own)
            taps = padded(taps, 2, r, config.kernel_size, r).reshape(2 * r, config.kernel_size, r)
            scales = quantise(taps.reshape(2 * r, -1))[1]
            layer["taps"] = len(packer)
            for k in range(config.kernel_size):
                alone = layer["ahead"] == 1 or k == config.kernel_size - 1
                packer.matrix(taps[:, k], WIDEST if alone else 2, stored, scales, signal)
            mix, bias, scales = units[:, i], to_numpy(model.skip.bias) * (i == 0), unit_scales
            if block.residual is None:
                layer["mix_at"] = r // LANES * VECTOR_BYTES
            else:
                residual = padded(to_numpy(block.residual.weight), r, r)
                mix = np.concatenate([residual, mix])
                bias = np.concatenate([padded(to_numpy(block.residual.bias), r), bias])
                scales = np.concatenate([quantise(residual)[1], unit_scales])
            product(layer, "mix", mix, bias, stored, scales, unit)
        hidden = padded(to_numpy(model.hidden.weight), head, skip)
        product(net, "hidden", hidden, model.hidden.bias)
        output, bias = to_numpy(model.output.weight), to_numpy(model.output.bias)
        if dots:  # integers would hide a weight that is not finite
            bias = bias + 0 * sum(float(to_numpy(p).sum()) for p in _parameters(model))
        product(net, "output", padded(output, -1, head), bias)
        packer.allocate()
        self.matrices = packer.matrices
        # Rings hold the current input too, and their lengths are powers of two.
        self.rows = [power_of_two(2 * n) for n in config.queue_lengths]
        self.layers["dilation"] = config.dilations
        self.layers["mask"] = np.array(self.rows) - 1
        net["law"], net["mixtures"], net["classes"] = distributions.numbers(model.law)
        sizes = {
            "recent": config.recent_residuals, "near": config.period_residuals,
            "tap_count": config.kernel_size,
            "x_vectors": r // LANES, "skip_vectors": skip // LANES, "head_vectors": head // LANES,
            "features": config.features, "history": config.history, "room": max(rooms) * LANES,
            "multiply": products().multiply,
        }  # fmt: skip
        for field, size in sizes.items():
            net[field] = size


class NumbaPredictiveEngine(CompiledEngine):
    """Runs `batch` streams of a predictive WaveNet in compiled code; see `CompiledEngine`."""

    serves = PredictiveWaveNet
    model: PredictiveWaveNet

    def _prepare(self) -> None:
        model, config, batch = self.model, self.model.config, self.batch
        packed = self._packed = self._packed or Weights(model, self.weights)
        self._width, self._masks = int(packed.plan[0]["x_vectors"]) * LANES, packed.layers["mask"]
        self._rings = [np.zeros((batch, n, self._width), np.float32) for n in packed.rows]
        self._addresses = np.array(
            [[ring[b].ctypes.data for ring in self._rings] for b in range(batch)], np.int64
        ).reshape(batch, -1)
        self._times = np.zeros(batch, np.int64)
        # The last one is that of `previous`.
        self._samples = np.zeros((batch, config.history + 1), np.float32)
        self._residuals = np.zeros((batch, config.history + 1), np.float32)
        self._lags = np.zeros((batch, config.lag_history), np.int64)
        self._pending = np.tile(np.array([0.0, 1.0]), (batch, 1))
        self._previous = np.full(batch, model.start_code, np.int64)

    def _parts(self) -> Sequence[tuple[int, int]]:
        bounds = [self.batch * part // self.threads for part in range(self.threads + 1)]
        return list(pairwise(bounds))

    @staticmethod
    def matrices_of(model: Any) -> Iterable[Tensor]:
        """See `CompiledEngine.matrices_of`."""
        return (p for p in _parameters(model) if p.dim() == 2)

    def _as_run(self) -> Any:
        """See `CompiledEngine._as_run`; in int8 the inputs of the layers are rounded too."""
        model = super()._as_run()
        if self.weights == "int8":
            round_inputs(model.skip, UNIT_STEPS)
            for block in model.blocks:
                round_inputs(block.taps, SIGNAL_STEPS)
                if block.residual is not None:
                    round_inputs(block.residual, UNIT_STEPS)
        return model

    def _condition(self, cond: Any, samples: int) -> tuple[Frames, int]:
        config, batch = self.model.config, self.batch
        if not isinstance(cond, FrameConditioning) or (len(cond), cond.samples) != (batch, samples):
            shape = "None" if cond is None else tuple(cond.shape)
            raise WavearError(
                f"cond is {shape}, expected the conditioning of {batch} streams of {samples} "
                "samples"
            )
        cond = cond.distinct()
        r, count = config.residual_channels, len(config.dilations)
        gates = cond.gates.detach().to("cpu", torch.float32).permute(0, 1, 3, 2).numpy()
        parts = gates[..., : 2 * r * count].reshape(*gates.shape[:3], 2 * count, r)
        skip = gates[..., 2 * r * count :]
        inner = padded(parts, *parts.shape[:4], self._width)
        inner = inner.reshape(*gates.shape[:3], 2 * count * self._width)
        if self.weights == "int8":  # as for weights, see `Weights`
            skip = skip + 0 * inner.sum(axis=-1, keepdims=True)
        outer = padded(skip, *skip.shape[:3], int(self._packed.plan[0]["skip_vectors"]) * LANES)
        first = cond.offset.cpu()[:, None] + torch.arange(samples)
        new_lags = cond.lag.cpu().gather(1, first).round()
        new_lags = new_lags.nan_to_num(1).clamp(config.shortest_period, config.longest_period)
        new_lags = new_lags.long().numpy()
        new_lags = np.broadcast_to(new_lags, (batch, samples))
        new = np.zeros((batch, samples), np.float32)
        given = cond.weights.cpu().float(), cond.coefficients.cpu().flip(2), cond.scale.cpu()
        arrays = [*given, cond.lag.cpu(), cond.voicing.cpu(), cond.offset.cpu()]
        frames = Frames(
            self._addresses,
            self._times.copy(),
            np.concatenate([self._samples, new], axis=1),
            np.concatenate([self._residuals, new], axis=1),
            np.concatenate([self._lags, new_lags], axis=1),
            self._pending.copy(),
            np.concatenate([inner, outer], axis=3),
            *(np.ascontiguousarray(each.numpy()) for each in arrays),
        )
        return frames, NO_CONDITION

    def _call(self, part: tuple[int, int], condition: Frames, call: Call) -> int:
        packed = self._packed
        bad = run(type_of(call))(
            *part, packed.plan, packed.layers, packed.matrices, condition, call
        )
        if bad < 0:
            rows, kept = slice(*part), self.model.config.history + 1
            self._samples[rows] = condition.samples[rows, -kept:]
            self._residuals[rows] = condition.residuals[rows, -kept:]
            self._lags[rows] = condition.whole_lags[rows, -self._lags.shape[1] :]
            self._pending[rows] = condition.pending[rows]
            self._times[rows] = condition.times[rows]
            self._previous[rows] = call.codes[rows, -1]
        return bad

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

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        for array in (
            *self._rings, self._times, self._samples, self._residuals, self._lags, self._pending,
            self._previous,
        ):  # fmt: skip
            array[targets] = array[sources]


def _parameters(model: PredictiveWaveNet) -> Iterable[Tensor]:
    """Yield the parameters that every sample needs."""
    for name, parameter in model.named_parameters():
        if not name.startswith("conditioning."):
            yield parameter
