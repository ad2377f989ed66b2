"""The plan of a WaveNet for its compiled loop: packed weights, and the state of some streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from wavear.common.errors import WavearError
from wavear.generation.cpu import distributions
from wavear.generation.cpu.compiled_engine import geometry, whole_panels
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.packing import (
    SIGNAL_STEPS,
    SPARSE_WIDTH,
    UNIT_STEPS,
    Packer,
    Region,
    multiplied,
    padded,
    power_of_two,
    to_numpy,
    vectors_for,
    width_for,
)
from wavear.generation.cpu.products import products
from wavear.generation.cpu.simd import BLOCK, TALLEST
from wavear.generation.cpu.wavenet_loop import LAYER, PLAN
from wavear.models.wavenet import WaveNet, WaveNetConfig

AHEAD = 64  # samples that past taps are computed ahead, at most, for one stream
SPAN = 64  # samples that the conditioning is projected ahead, for one stream
# The same in int8, whose weights and so many pre-activations stay in a cache of 1.25 MiB.
SHORT_SPAN = 16
TABLE = 4096  # classes up to which the first layer's products with the embedding are tabulated


class Weights:
    """The packed weights of a model and its plan, for groups of `group` streams.

    The residual and skip matrices of a layer are one, its `mix`. For one stream the head omits the
    zeros behind its ReLUs, but in int8.
    """

    def __init__(self, model: WaveNet, group: int, weights: str):
        config = self.config = model.config
        self.packer = packer = Packer(weights)
        residual, skip, taps = config.residual_channels, config.skip_channels, config.kernel_size
        dilations, law = config.dilations, model.law
        self.plan, self.layers = np.zeros(1, PLAN), np.zeros(len(dilations), LAYER)
        net, layers = self.plan[0], self.layers
        most = power_of_two(AHEAD * 2 // group) if group > 1 else AHEAD
        layers["dilation"], layers["ahead"] = dilations, [min(d, most) for d in dilations]
        layers["slots"] = (taps - 1) * layers["dilation"]
        for field in ("now", "past", "condition"):
            layers[field] = -1  # there is none
        stored = "dots" if multiplies_integers(config, weights) else weights
        short = group == 1 and stored == "dots"
        self.span = power_of_two((SHORT_SPAN if short else SPAN) // group)
        tabulated, sparse = config.classes <= TABLE, group == 1 and stored != "dots"
        one, head = width_for(group), SPARSE_WIDTH if sparse else width_for(group)
        steps, skip_steps, head_steps = input_steps(model)
        gate_vectors = x_vectors = vectors_for(residual)
        gates, x_width = 2 * gate_vectors * LANES, x_vectors * LANES
        ahead_rows = [int(ahead) * group for ahead in layers["ahead"]]

        def gated(array: np.ndarray) -> np.ndarray:
            """Return outputs (2R, ...), each half padded to whole vectors."""
            more = array.shape[1:]
            halves = padded(array.reshape(2, residual, *more), 2, x_width, *more)
            return halves.reshape(gates, *more)

        def matrix(array: np.ndarray, width: int, steps: int) -> int:
            return packer.matrix(array, width, stored, steps=steps if stored == "dots" else 0)

        blocks: list[Any] = list(model.blocks)
        dilated = [
            to_numpy(block.dilated.weight).reshape(2 * residual, taps, residual) for block in blocks
        ]
        # What every sample reads lies together, in the order of reading; the rest follows.
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            if not (tabulated and i == 0):
                layer["now"] = matrix(gated(dilated[i][:, -1]), one, steps[i])
            mix = to_numpy(block.skip.weight)
            if block.residual is None:
                layer["mix_at"] = x_vectors
            else:
                own = padded(to_numpy(block.residual.weight), x_width, -1)
                mix = np.concatenate([own, mix])
            layer["mix"] = matrix(mix, one, UNIT_STEPS)
        readout: Any = model.head
        net["head1"] = matrix(to_numpy(readout[1].weight), head, skip_steps)
        net["head2"] = matrix(to_numpy(readout[3].weight), head, head_steps)
        for i, (layer, rows) in enumerate(zip(layers, ahead_rows, strict=True)):
            if not (tabulated and i == 0):
                numbers = [
                    matrix(gated(dilated[i][:, k]), width_for(rows), steps[i])
                    for k in range(taps - 1)
                ]
                layer["past"] = numbers[0]
        for block, layer in zip(blocks, layers, strict=True):
            if block.conditioning is not None:
                weight = gated(to_numpy(block.conditioning.weight))
                layer["condition"] = matrix(weight, width_for(self.span * group), SIGNAL_STEPS)

        # What a product writes fills whole blocks, which may be more than its outputs.
        def room(outputs: int, *widths: int) -> int:
            return max(packer.room(outputs, width, stored) for width in widths)

        skip_vectors = room(skip, one)
        out_vectors = max(room(x_width + skip, one), x_vectors + skip_vectors)
        head_vectors, logits = room(config.head_channels, head), room(law.channels, head)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        all_rows = {group, TALLEST, self.span * group, *ahead_rows}
        z_vectors = room(gates, *(width_for(rows) for rows in all_rows))
        if tabulated:  # which is multiplied as bytes times float32
            z_vectors = max(z_vectors, packer.room(gates, width_for(TALLEST)))
        for block, layer in zip(blocks, layers, strict=True):
            packer.vector(layer, "bias", gated(to_numpy(block.dilated.bias)), z_vectors)
            # (The skip's bias is added once, as `skip_bias`.)
            bias = np.zeros(0) if block.residual is None else to_numpy(block.residual.bias)
            packer.vector(layer, "mix_bias", bias, out_vectors)
        skips = np.sum([to_numpy(b.skip.bias) for b in blocks], axis=0, dtype=np.float64)
        packer.vector(net, "skip_bias", np.asarray(skips, np.float32), out_vectors - x_vectors)
        packer.vector(net, "head1_bias", to_numpy(readout[1].bias), head_vectors)
        last = to_numpy(readout[3].bias)
        if stored == "dots":  # integers would hide a weight that is not finite
            last = last + 0 * sum(float(p.detach().sum()) for p in model.parameters())
        # Outputs beyond the last class are never drawn.
        packer.vector(net, "head2_bias", last, self.logit_vectors, -np.inf)
        embedding = to_numpy(model.embedding.table())
        packer.vector(net, "embedding", embedding, x_vectors)
        packer.space(net, "zeros", max(z_vectors, head_vectors, self.logit_vectors, out_vectors))
        if tabulated:
            # Row `classes` of each tap stays zero: the past before the first sample.
            table = np.zeros((taps, config.classes + 1, gates), np.float32)
            for k in range(taps):
                table[k, :-1] = multiplied(embedding, gated(dilated[0][:, k]), weights)
            packer.vector(net, "table", table, z_vectors)
        packer.allocate()
        self.matrices = packer.matrices
        net["law"], net["mixtures"], net["classes"] = distributions.numbers(law)
        sizes = {
            "taps": taps, "span": self.span, "x_vectors": x_vectors, "out_vectors": out_vectors,
            "gate_vectors": gate_vectors, "skip_vectors": skip_vectors,
            "head_vectors": head_vectors, "z_row": z_vectors * VECTOR_BYTES,
            "logit_row": self.logit_vectors * VECTOR_BYTES,
            "logit_blocks": -(-law.channels // BLOCK), "multiply": products().multiply,
            "sparse": products().sparse if sparse else 0,
        }  # fmt: skip
        if model.conditioned:
            sizes["condition_vectors"] = vectors_for(config.conditioning_channels)
        for field, size in sizes.items():
            net[field] = size

    def embedding(self) -> np.ndarray:
        """Return (classes + 1, R); the last row, zeros, stands for no sample."""
        classes, width = self.config.classes, int(self.plan[0]["x_vectors"]) * LANES
        table = self.packer.floats(self.plan[0]["embedding"], classes, width)
        return np.pad(table[:, : self.config.residual_channels], ((0, 1), (0, 0)))


class Group:
    """The state of some streams that one thread runs side by side, and their plan."""

    def __init__(self, packed: Weights, first: int, streams: int, start_code: int):
        self.packed = packed  # the plan holds addresses in it
        self.plan, self.layers = packed.plan.copy(), packed.layers.copy()
        self.region = region = Region()
        net = self.net = self.plan[0]
        panels, rows = geometry(streams)
        net["first"], net["streams"], net["rows"] = first, streams, rows
        z_vectors = net["z_row"] // VECTOR_BYTES
        for layer in self.layers:
            region.space(layer, "ring", layer["slots"] * streams * net["x_vectors"])
            region.space(layer, "z", packed.span * streams * z_vectors)
            region.space(layer, "constant", streams * z_vectors)
        head, logits = net["head_vectors"], packed.logit_vectors
        widest = max(net["out_vectors"], head)
        ahead = whole_panels(int(packed.layers["ahead"].max()) * streams)
        for field, vectors in {
            "x": panels * rows * net["out_vectors"],
            "h": panels * rows * net["gate_vectors"],
            "head": panels * rows * head,
            "integers": panels * rows * widest,
            "logits": streams * logits,
            "weights": logits,
            "sums": 2 * logits,
            "panels": ahead * net["x_vectors"],
            "condition_panels": whole_panels(packed.span * streams) * net["condition_vectors"],
            "values": widest + 1,
            "offsets": 2 * widest + 2,
        }.items():
            region.space(net, field, vectors)
        region.allocate()
        self.previous = np.full((streams, packed.config.kernel_size), net["classes"], np.int64)
        self.previous[:, -1] = start_code

    def past(self, layer: int, row: int) -> np.ndarray:
        """Return the past inputs of a layer of a stream, (slots, R), oldest first, a copy."""
        if self._tabulated(layer):
            return self.packed.embedding()[self.previous[row, :-1]]
        shift = self.net["time"] % self.layers[layer]["slots"]
        return np.roll(self._ring(layer)[:, row], -int(shift), axis=0)

    def set_past(self, layer: int, row: int, past: np.ndarray) -> None:
        """Reverse `past`."""
        if self._tabulated(layer):
            self.previous[row, :-1] = _codes(past, self.packed.embedding())
        else:
            shift = self.net["time"] % self.layers[layer]["slots"]
            self._ring(layer)[:, row] = np.roll(past, int(shift), axis=0)

    def copy(self, row: int, other: Group, source: int) -> None:
        """Copy the state of a stream of a group that has made as many samples."""
        for layer in range(len(self.layers)):
            self._ring(layer)[:, row] = other._ring(layer)[:, source]
        self.previous[row] = other.previous[source]

    def _tabulated(self, layer: int) -> bool:
        return layer == 0 and self.net["table"] != 0

    def _ring(self, layer: int) -> np.ndarray:
        """Return a view of the past inputs (slots, streams, R), sample t at t modulo slots."""
        slots, streams, x_vectors = (
            int(n)
            for n in (self.layers[layer]["slots"], self.net["streams"], self.net["x_vectors"])
        )
        ring = self.region.floats(self.layers[layer]["ring"], slots, streams, x_vectors * LANES)
        return ring[:, :, : self.packed.config.residual_channels]


def multiplies_integers(config: WaveNetConfig, weights: str) -> bool:
    """Return whether matrices are multiplied as integers: all of int8 whose sums fit 32 bits."""
    widest = max(config.residual_channels, config.skip_channels, config.head_channels)
    most = (2**31 - 1) // (127 * 32767)
    return weights == "int8" and max(widest, config.conditioning_channels) <= most


def input_steps(model: WaveNet) -> tuple[list[int], int, int]:
    """Return the steps in 1 of the inputs of the layers, of the skips and of the hidden units.

    In int8 these are integers of 16 bits. As units lie between -1 and 1, the weights bound all of
    them: so many steps hold each range that nothing is ever clipped.
    """

    def bound(layer: Any, inputs: Any) -> Any:
        return to_numpy(layer.bias), np.abs(to_numpy(layer.weight)) @ inputs

    def steps(largest: np.ndarray) -> int:
        # A hundredth more, as weights are rounded.
        whole = np.nan_to_num(1.01 * largest.max(), nan=np.inf)
        return power_of_two(int(min(32767 / max(whole, 1), 32767)))

    one, found = np.ones(model.config.residual_channels), []
    signal = np.abs(to_numpy(model.embedding.table())).max(axis=0)
    skips = np.zeros(model.config.skip_channels)
    bias = np.zeros_like(skips)
    for block in model.blocks:
        found.append(steps(signal))
        own, reach = bound(block.skip, one)
        bias, skips = bias + own, skips + reach
        if block.residual is not None:
            own, reach = bound(block.residual, one)
            signal = signal + np.abs(own) + reach
    skips = skips + np.abs(bias)
    own, reach = bound(model.head[1], skips)
    return found, steps(skips), steps(np.abs(own) + reach)


def _codes(past: np.ndarray, embedding: np.ndarray) -> list[int]:
    """Return the rows of the embedding that these vectors are; of equal rows, any."""
    found = []
    for vector in past:
        away = np.abs(embedding - vector).max(axis=1)
        nearest = int(away.argmin())
        # An embedding of values is a product, which another engine may round otherwise.
        if not away[nearest] <= 1e-6 * (1 + np.abs(vector).max()):
            raise WavearError(
                "the state is of another model: its first layer's past is not of this embedding"
            )
        found.append(nearest)
    return found
