"""The plan of a transformer for its compiled loop: packed weights, and the state of a stream."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu import distributions
from wavear.generation.cpu.emitter import LANES
from wavear.generation.cpu.packing import (
    SPARSE_WIDTH,
    Packer,
    Region,
    named_matrices,
    padded,
    rounded,
    to_numpy,
    vectors_for,
    vectors_of,
)
from wavear.generation.cpu.products import products
from wavear.generation.cpu.simd import BLOCK, FLOAT32, WIDEST
from wavear.generation.cpu.transformer_loop import LAYER, PLAN
from wavear.models.attention import rotation, rotation_period
from wavear.models.transformer import Transformer

_TABLES = 64 << 20  # bytes of products by code, at most


def matrices_of(model: Transformer) -> Iterable[Tensor]:
    """Yield the matrices that `weights` rounds.

    Not the places in a patch: a table of vectors, which the loop adds as they are.
    """
    for name, matrix in named_matrices(model, "blocks", "head", "enter"):
        if name != "head.place.weight":
            yield matrix


class Weights:
    """The packed weights of a model and its plan, shared by all streams."""

    def __init__(self, model: Transformer, weights: str):
        config = self.config = model.config
        self.packer = packer = Packer(weights)
        self.plan, self.layers = np.zeros(1, PLAN), np.zeros(config.layers, LAYER)
        net, head, width = self.plan[0], model.head, config.head_channels
        window, patch, classes = config.window, config.patch, config.classes
        each = config.channels // config.heads
        x_vectors, z_vectors = vectors_for(config.channels), vectors_for(width)
        sample_vectors = vectors_for(config.sample_channels)
        rooms = [x_vectors, z_vectors]  # vectors that a product may read as zeros

        def room(outputs: int, width: int = WIDEST) -> int:
            return packer.room(outputs, width)

        def matrix(weight: Tensor, width: int = WIDEST) -> int:
            rooms.append(room(len(weight), width))
            return packer.matrix(to_numpy(weight), width)

        for layer, block in zip(self.layers, model.blocks, strict=True):
            layer["qkv"], layer["out"] = matrix(block.qkv.weight), matrix(block.out.weight)
            layer["up"] = matrix(block.up.weight)
            layer["down"] = matrix(block.down.weight, SPARSE_WIDTH)
        net["position_matrix"] = matrix(head.position.weight)
        net["hidden_matrix"] = matrix(head.hidden.weight, SPARSE_WIDTH)
        net["out_matrix"] = matrix(head.out.weight, SPARSE_WIDTH)
        if model.enter_conditioning is not None and head.conditioning is not None:
            net["enter_condition"] = matrix(model.enter_conditioning.weight)
            net["head_condition"] = matrix(head.conditioning.weight)
        # The part that does not depend on the code: of each place in the patch one vector.
        places = np.tile(to_numpy(head.samples.bias), (patch, 1))
        if head.place is not None:
            places = places + to_numpy(head.place.weight)
        packer.vector(net, "places", places, z_vectors)
        packer.vector(net, "enter_bias", to_numpy(model.enter.bias), room(config.channels))
        packer.vector(net, "hidden_bias", to_numpy(head.hidden.bias), z_vectors)
        kind, mixtures, _ = distributions.numbers(model.law)
        step = max(BLOCK // LANES, 1)
        logits = -(-room(model.law.channels, SPARSE_WIDTH) // step) * step
        # Outputs beyond the last class are never drawn.
        fill = -np.inf if kind == distributions.CATEGORICAL else 0.0
        packer.vector(net, "out_bias", to_numpy(head.out.bias), logits, fill)
        rooms.append(logits)
        embedding = model.embedding.table().detach()
        if 4 * patch * classes * (x_vectors + z_vectors) * LANES <= _TABLES:
            run = rounded(model, weights, matrices_of)
            table = _products(run.enter.weight, embedding)
            packer.vector(net, "enter_table", table, x_vectors)
            table = _products(run.head.samples.weight, embedding)
            packer.vector(net, "head_table", table, z_vectors)
        else:
            net["enter"] = matrix(model.enter.weight)
            net["samples_matrix"] = matrix(head.samples.weight)
            packer.vector(net, "embedding", to_numpy(embedding), sample_vectors)
        period = rotation_period(window)
        none = torch.zeros(1, dtype=torch.float64)
        cos, sin = rotation(torch.arange(period), model.turns.cpu(), period, none)
        angles = torch.stack([cos[:, : each // 2], sin[:, each // 2 :]], dim=2)
        packer.point(net, "angles", packer.put(angles.float().numpy()))
        packer.space(net, "zeros", max(rooms) + WIDEST)
        packer.allocate()
        self.matrices = packer.matrices
        key_blocks, key_vectors = vectors_of(-(-window // BLOCK) * BLOCK, LANES, WIDEST, "float32")
        value_blocks, value_vectors = vectors_of(each, LANES, WIDEST, "float32")
        sizes = {
            "patch": patch, "channels": config.channels, "heads": config.heads, "window": window,
            "period": period, "classes": classes, "law": kind, "mixtures": mixtures,
            "sparse": products().sparse, "x_vectors": x_vectors, "z_vectors": z_vectors,
            "key_blocks": key_blocks, "key_vectors": key_vectors,
            "key_row": products().row(key_vectors, FLOAT32),
            "value_blocks": value_blocks, "value_vectors": value_vectors,
            "value_row": products().row(value_vectors, FLOAT32),
            "condition_vectors": vectors_for(config.conditioning_channels),
            "sample_channels": config.sample_channels, "sample_vectors": sample_vectors,
            "logit_blocks": -(-classes // BLOCK),
        }  # fmt: skip
        for field, size in sizes.items():
            net[field] = size
        self.keys = (config.heads, key_blocks, each, key_vectors * LANES)
        self.values = (config.heads, value_blocks, window, value_vectors * LANES)
        most = max(config.hidden_channels, width)
        x_room = max(room(config.channels), room(config.channels, SPARSE_WIDTH)) + BLOCK // LANES
        z_room = max(room(width), room(width, SPARSE_WIDTH))
        slots = key_blocks * key_vectors
        self.slots = slots * LANES
        self.rooms = {  # vectors of a stream's memory
            "x": x_room, "y": x_room, "qkv": room(3 * config.channels),
            "found": x_vectors + value_blocks * value_vectors, "scores": slots,
            "weights": max(slots, logits), "sums": 2 * max(slots, logits), "mask": slots,
            "up": room(config.hidden_channels), "values": vectors_for(most) + 1,
            "offsets": 2 * vectors_for(most) + 1, "position": z_room, "z": z_room, "h": z_room,
            "logits": logits, "constant": z_room,
            "samples": vectors_for(patch * config.sample_channels) + 1,
        }  # fmt: skip


def _products(weight: Tensor, embedding: Tensor) -> np.ndarray:
    """Return what each code adds by its place in a patch: (patch * classes, outputs)."""
    taps = weight.detach().double().cpu().unflatten(1, (-1, embedding.shape[1]))
    products = torch.einsum("oke,qe->kqo", taps, embedding.double().cpu())
    return products.flatten(0, 1).float().numpy()


class Stream:
    """The state of one stream, and its plan."""

    def __init__(self, packed: Weights, number: int, start_code: int):
        self.packed, config = packed, packed.config
        self.region = region = Region()
        self.plan, self.layers = packed.plan.copy(), packed.layers.copy()
        net = self.net = self.plan[0]
        net["first"] = number
        for field, vectors in packed.rooms.items():
            region.space(net, field, vectors)
        for layer in self.layers:
            region.space(layer, "keys", np.prod(packed.keys) // LANES)
            region.space(layer, "values", np.prod(packed.values) // LANES)
        net["base"] = region.allocate()
        self.work = region.bytes.view(np.float32)
        self.history = np.full(config.patch + 1, start_code, np.int64)
        self._mask()

    def export(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        order = self._order()
        tensors = {
            "previous": torch.tensor([self.history[-1]]),
            "time": torch.tensor(int(self.net["time"])),
            "codes": torch.from_numpy(self.history[:-1].copy()),
            "position": torch.from_numpy(self._position().copy()),
        }
        for i, layer in enumerate(self.layers):
            keys, values = self._rings(layer)
            tensors[f"keys.{i}"] = torch.from_numpy(np.ascontiguousarray(keys[order]))
            tensors[f"values.{i}"] = torch.from_numpy(np.ascontiguousarray(values[order]))
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self.net["time"] = int(state["time"])
        self.history[:-1] = state["codes"].cpu().numpy()
        self.history[-1] = int(state["previous"])
        self._position()[:] = _floats(state["position"])
        order = self._order()
        for i, layer in enumerate(self.layers):
            keys, values = self._rings(layer)
            keys[order], values[order] = _floats(state[f"keys.{i}"]), _floats(state[f"values.{i}"])
            self._put(layer, keys, values)
        self._mask()

    def copy(self, other: Stream) -> None:
        """Copy the state of another stream: a region holds no addresses."""
        self.net["time"] = other.net["time"]
        self.history[:] = other.history
        self.region.bytes[:] = other.region.bytes

    def _begun(self) -> int:
        """Return the number of positions so far."""
        return -(-int(self.net["time"]) // self.packed.config.patch)

    def _order(self) -> np.ndarray:
        """Return the slots of the ring, that of the oldest position first."""
        window = self.packed.config.window
        return (self._begun() + np.arange(window)) % window

    def _mask(self) -> None:
        """Hide the slots that no position has filled yet: the mask is added to the scores."""
        mask = self.region.floats(self.net["mask"], self.packed.slots)
        mask[:] = -np.inf
        mask[: min(self._begun(), self.packed.config.window)] = 0.0

    def _position(self) -> np.ndarray:
        return self.region.floats(self.net["position"], self.packed.config.head_channels)

    def _rings(self, layer: np.void) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values of a layer, (window, channels) each, copies."""
        config = self.packed.config
        keys = self.region.floats(layer["keys"], *self.packed.keys).transpose(1, 3, 0, 2)
        keys = keys.reshape(-1, config.channels)[: config.window].copy()
        values = self.region.floats(layer["values"], *self.packed.values).transpose(2, 0, 1, 3)
        values = values.reshape(config.window, config.heads, -1)
        each = config.channels // config.heads
        return keys, values[:, :, :each].reshape(config.window, -1).copy()

    def _put(self, layer: np.void, keys: np.ndarray, values: np.ndarray) -> None:
        """Reverse `_rings`."""
        heads, blocks, each, width = self.packed.keys
        rows = padded(keys, blocks * width, -1)
        memory = self.region.floats(layer["keys"], *self.packed.keys)
        memory[:] = rows.reshape(blocks, width, heads, each).transpose(2, 0, 3, 1)
        heads, blocks, window, width = self.packed.values
        rows = padded(values.reshape(window, heads, each), -1, -1, blocks * width)
        memory = self.region.floats(layer["values"], *self.packed.values)
        memory[:] = rows.reshape(window, heads, blocks, width).transpose(1, 2, 0, 3)


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.to("cpu", torch.float32).numpy()
