"""The plan of a WaveNet for its compiled loop: packed weights, and the state of some streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from wavear.common.errors import WavearError
from wavear.generation.cpu import distributions
from wavear.generation.cpu.compiled_engine import geometry, whole_panels
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.packing import (
    SPARSE_WIDTH,
    Packer,
    Region,
    multiplied,
    power_of_two,
    to_numpy,
    vectors_for,
    width_for,
)
from wavear.generation.cpu.products import products
from wavear.generation.cpu.simd import BLOCK, TALLEST
from wavear.generation.cpu.wavenet_loop import LAYER, PLAN
from wavear.models.wavenet import WaveNet

AHEAD = 64  # samples that past taps are computed ahead, at most, for one stream
SPAN = 64  # samples that the conditioning is projected ahead, for one stream
TABLE = 4096  # classes up to which the first layer's products with the embedding are tabulated


class Weights:
    """The packed weights of a model and its plan, for groups of `group` streams.

    For one stream the residual and skip matrices of a layer are one ("fused"), and the head omits
    the zeros behind its ReLUs.
    """

    def __init__(self, model: WaveNet, group: int, weights: str):
        config = self.config = model.config
        self.packer = packer = Packer(weights)
        residual, skip, taps = config.residual_channels, config.skip_channels, config.kernel_size
        dilations, law = config.dilations, model.law
        self.plan, self.layers = np.zeros(1, PLAN), np.zeros(len(dilations), LAYER)
        net, layers = self.plan[0], self.layers
        self.span = power_of_two(SPAN // group)
        most = power_of_two(AHEAD * 2 // group) if group > 1 else AHEAD
        layers["dilation"], layers["ahead"] = dilations, [min(d, most) for d in dilations]
        layers["slots"] = (taps - 1) * layers["dilation"]
        for field in ("now", "past", "skip", "residual", "condition"):
            layers[field] = -1  # there is none
        fused, tabulated = group == 1, config.classes <= TABLE
        one, head = width_for(group), SPARSE_WIDTH if group == 1 else width_for(group)

        # What a product writes fills whole blocks, which may be more than its outputs.
        x_vectors = gate_vectors = vectors_for(residual)
        skip_vectors, gates = packer.room(skip, one), 2 * gate_vectors * LANES
        self.out_vectors = x_vectors = x_vectors if fused else packer.room(residual, one)
        if fused:
            both = (x_vectors + vectors_for(skip)) * LANES
            self.out_vectors = max(packer.room(both, one), x_vectors + skip_vectors)
        head_vectors = packer.room(config.head_channels, head)
        logits = packer.room(law.channels, head)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        ahead_rows = [int(ahead) * group for ahead in layers["ahead"]]
        all_rows = {group, TALLEST, self.span * group, *ahead_rows}
        z_vectors = max(packer.room(gates, width_for(rows)) for rows in all_rows)

        def gated(array: np.ndarray) -> np.ndarray:
            """Return outputs (2R, ...), each half padded to whole vectors."""
            padded = np.zeros((2, gate_vectors * LANES, *array.shape[1:]), np.float32)
            padded[:, :residual] = array.reshape(2, residual, *array.shape[1:])
            return padded.reshape(gates, *array.shape[1:])

        def outwards(block: Any, name: str) -> np.ndarray:
            """Return the weight or bias of the residual, then of the skip if both are one.

            (The skip's bias is added once, as `skip_bias`.)
            """
            array = to_numpy(getattr(block.residual, name))
            if not fused:
                return array
            padded = np.zeros((x_vectors * LANES + skip, *array.shape[1:]), np.float32)
            padded[:residual] = array
            if name == "weight":
                padded[x_vectors * LANES :] = to_numpy(block.skip.weight)
            return padded

        blocks: list[Any] = list(model.blocks)
        dilated = [
            to_numpy(block.dilated.weight).reshape(2 * residual, taps, residual) for block in blocks
        ]
        # What every sample reads lies together, in the order of reading; the rest follows.
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            last = block.residual is None
            if not (tabulated and i == 0):
                layer["now"] = packer.matrix(gated(dilated[i][:, -1]), one)
            if not last:
                layer["residual"] = packer.matrix(outwards(block, "weight"), one)
            if last or not fused:
                layer["skip"] = packer.matrix(to_numpy(block.skip.weight), one)
        readout: Any = model.head
        net["head1"] = packer.matrix(to_numpy(readout[1].weight), head)
        net["head2"] = packer.matrix(to_numpy(readout[3].weight), head)
        for i, (layer, rows) in enumerate(zip(layers, ahead_rows, strict=True)):
            if not (tabulated and i == 0):
                numbers = [
                    packer.matrix(gated(dilated[i][:, k]), width_for(rows)) for k in range(taps - 1)
                ]
                layer["past"] = numbers[0]
        for block, layer in zip(blocks, layers, strict=True):
            if block.conditioning is not None:
                matrix = gated(to_numpy(block.conditioning.weight))
                layer["condition"] = packer.matrix(matrix, width_for(self.span * group))
            packer.vector(layer, "bias", gated(to_numpy(block.dilated.bias)), z_vectors)
            if block.residual is not None:
                bias = outwards(block, "bias")
                packer.vector(layer, "residual_bias", bias, self.out_vectors)
        skips = np.sum([to_numpy(b.skip.bias) for b in blocks], axis=0, dtype=np.float64)
        packer.vector(net, "skip_bias", np.asarray(skips, np.float32), skip_vectors)
        packer.vector(net, "head1_bias", to_numpy(readout[1].bias), head_vectors)
        # Outputs beyond the last class are never drawn.
        packer.vector(net, "head2_bias", to_numpy(readout[3].bias), self.logit_vectors, -np.inf)
        embedding = to_numpy(model.embedding.table())
        packer.vector(net, "embedding", embedding, x_vectors)
        widest = (z_vectors, skip_vectors, head_vectors, self.logit_vectors, self.out_vectors)
        packer.space(net, "zeros", max(widest))
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
            "taps": taps, "fused": fused, "span": self.span, "x_vectors": x_vectors,
            "h_vectors": gate_vectors, "gate_vectors": gate_vectors, "skip_vectors": skip_vectors,
            "head_vectors": head_vectors, "z_row": z_vectors * VECTOR_BYTES,
            "logit_row": self.logit_vectors * VECTOR_BYTES,
            "logit_blocks": -(-law.channels // BLOCK), "multiply": products().multiply,
            "sparse": products().sparse if group == 1 else 0,
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
        skips, head, logits = net["skip_vectors"], net["head_vectors"], packed.logit_vectors
        entries = max(skips, head) + 1  # of a rectified vector
        ahead = whole_panels(int(packed.layers["ahead"].max()) * streams)
        for field, vectors in {
            "x": panels * rows * packed.out_vectors,
            "h": panels * rows * net["h_vectors"],
            "skips": panels * rows * skips,
            "head": panels * rows * head,
            "logits": streams * logits,
            "weights": logits,
            "sums": 2 * logits,
            "panels": ahead * net["x_vectors"],
            "condition_panels": whole_panels(packed.span * streams) * net["condition_vectors"],
            "values": entries,
            "offsets": 2 * entries,
        }.items():
            region.space(net, field, vectors)
        region.allocate()
        if net["fused"]:
            net["skips"] = net["x"] + net["x_vectors"] * VECTOR_BYTES
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
