"""The plan of a transformer for its CPU engine: its weights packed, and the state of a stream."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.cpu import distributions
from wavear.generation.cpu import transformer_loop as loop
from wavear.generation.cpu.packing import Region, as_packed, to_numpy, vectors_of
from wavear.generation.cpu.products import M_ADDRESS, M_FIELDS, products
from wavear.generation.cpu.simd import BLOCK, FLOAT32, LANES, VECTOR_BYTES, WIDEST
from wavear.generation.cpu.wavenet_plan import put_matrix
from wavear.models.attention import rotation, rotation_period
from wavear.models.transformer import Transformer

_TABLES = 64 << 20  # bytes of products by code, at most
_SPARSE = 0  # the width of a matrix for `_simd.sparse`, see `packing.pack`


def as_run(model: Transformer, weights: str) -> Transformer:
    """The model that the engine runs: in float32 or more, its matrices rounded as they are packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    for name, parameter in model.named_parameters():
        # (The places in a patch are a table of vectors, which the loop adds as they are.)
        if (
            parameter.dim() == 2
            and name.startswith(("blocks", "head", "enter"))
            and name != "head.place.weight"
        ):
            parameter.data.copy_(torch.from_numpy(as_packed(to_numpy(parameter), weights)))
    return model


class Weights:
    """The packed weights of a model and the plan of its network, shared by all streams."""

    def __init__(self, model: Transformer, weights: str):
        config = self.config = model.config
        rounded, even = as_run(model, weights), weights == "bfloat16"
        self.region = region = Region()
        matrices: list[list[int]] = []
        fields: dict[int, int] = {}
        head, width = model.head, config.head_channels
        window, patch, classes = config.window, config.patch, config.classes
        each = config.channels // config.heads
        self.widest = 0

        def matrix(weight: Tensor, width: int = WIDEST) -> int:
            matrices.append(put_matrix(region, to_numpy(weight), width, weights))
            self.widest = max(self.widest, room(len(weight), width))
            return len(matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            self.widest = max(self.widest, vectors)
            return region.put(padded)

        def room(outputs: int, width: int = WIDEST) -> int:
            """Vectors that a product with so many outputs fills."""
            return int(np.prod(vectors_of(outputs, LANES, width, even)))

        x_vectors, z_vectors = -(-config.channels // LANES), -(-width // LANES)
        blocks = [
            (
                matrix(b.qkv.weight),
                matrix(b.out.weight),
                matrix(b.up.weight),
                matrix(b.down.weight, _SPARSE),
            )
            for b in model.blocks
        ]
        position = matrix(head.position.weight)
        hidden, out = matrix(head.hidden.weight, _SPARSE), matrix(head.out.weight, _SPARSE)
        numbers = {
            loop.N_POSITION_MATRIX: position,
            loop.N_HIDDEN_MATRIX: hidden,
            loop.N_OUT_MATRIX: out,
        }
        if model.enter_conditioning is not None and head.conditioning is not None:
            numbers[loop.N_ENTER_CONDITION] = matrix(model.enter_conditioning.weight)
            numbers[loop.N_HEAD_CONDITION] = matrix(head.conditioning.weight)
        # What does not depend on the code: of each place in the patch one vector.
        places = np.tile(to_numpy(head.samples.bias), (patch, 1))
        if head.place is not None:
            places = places + to_numpy(head.place.weight)
        fields[loop.N_PLACES] = vector(places, z_vectors)
        fields[loop.N_ENTER_BIAS] = vector(to_numpy(model.enter.bias), room(config.channels))
        fields[loop.N_HIDDEN_BIAS] = vector(to_numpy(head.hidden.bias), z_vectors)
        kind, mixtures, _ = distributions.numbers(model.law)
        logits = -(-room(model.law.channels, _SPARSE) // (BLOCK // LANES or 1)) * max(
            BLOCK // LANES, 1
        )
        # Outputs beyond the last class are never drawn.
        fields[loop.N_OUT_BIAS] = vector(
            to_numpy(head.out.bias),
            logits,
            fill=-np.inf if kind == distributions.CATEGORICAL else 0.0,
        )
        embedding = model.embedding.table().detach()
        if 4 * patch * classes * (x_vectors + z_vectors) * LANES <= _TABLES:
            fields[loop.N_ENTER_TABLE] = vector(
                _products(rounded.enter.weight, embedding), x_vectors
            )
            fields[loop.N_HEAD_TABLE] = vector(
                _products(rounded.head.samples.weight, embedding), z_vectors
            )
        else:
            numbers[loop.N_ENTER] = matrix(model.enter.weight)
            numbers[loop.N_SAMPLES_MATRIX] = matrix(head.samples.weight)
            fields[loop.N_EMBEDDING] = vector(
                to_numpy(embedding), -(-config.sample_channels // LANES)
            )
        period = rotation_period(window)
        cos, sin = rotation(
            torch.arange(period), model.turns.cpu(), period, torch.zeros(1, dtype=torch.float64)
        )
        angles = torch.stack([cos[:, : each // 2], sin[:, each // 2 :]], dim=2)
        fields[loop.N_ANGLES] = region.put(angles.float().numpy())
        fields[loop.N_ZEROS] = region.reserve((self.widest + WIDEST) * VECTOR_BYTES)
        base = region.allocate()
        self.table = np.array(matrices, dtype=np.int64)
        self.table[:, M_ADDRESS] += base

        def of(number: int) -> int:
            return self.table.ctypes.data + 8 * M_FIELDS * number

        self.net = net = np.zeros(loop.N_FIELDS, np.int64)
        for field, offset in fields.items():
            net[field] = base + offset
        for field, number in numbers.items():
            net[field] = of(number)
        self.layers = np.zeros((config.layers, loop.L_FIELDS), np.int64)
        self.layers[:, : loop.L_DOWN + 1] = [[of(number) for number in block] for block in blocks]
        key_blocks, key_vectors = vectors_of(-(-window // BLOCK) * BLOCK, LANES, WIDEST, False)
        value_blocks, value_vectors = vectors_of(each, LANES, WIDEST, False)
        sizes = {
            loop.N_PATCH: patch,
            loop.N_CHANNELS: config.channels,
            loop.N_HEADS: config.heads,
            loop.N_WINDOW: window,
            loop.N_PERIOD: period,
            loop.N_CLASSES: classes,
            loop.N_LAW: kind,
            loop.N_MIXTURES: mixtures,
            loop.N_SPARSE: products().sparse,
            loop.N_X_VECTORS: x_vectors,
            loop.N_Z_VECTORS: z_vectors,
            loop.N_KEY_BLOCKS: key_blocks,
            loop.N_KEY_VECTORS: key_vectors,
            loop.N_KEY_ROW: products().row(key_vectors, FLOAT32),
            loop.N_VALUE_BLOCKS: value_blocks,
            loop.N_VALUE_VECTORS: value_vectors,
            loop.N_VALUE_ROW: products().row(value_vectors, FLOAT32),
            loop.N_CONDITION_VECTORS: -(-config.conditioning_channels // LANES),
            loop.N_SAMPLE_CHANNELS: config.sample_channels,
            loop.N_SAMPLE_VECTORS: -(-config.sample_channels // LANES),
        }
        for field, size in sizes.items():
            net[field] = size
        self.keys = (config.heads, key_blocks, each, key_vectors * LANES)
        self.values = (config.heads, value_blocks, window, value_vectors * LANES)
        most = max(config.hidden_channels, width)
        x_room = max(room(config.channels), room(config.channels, _SPARSE)) + BLOCK // LANES
        z_room = max(room(width), room(width, _SPARSE))
        slots = key_blocks * key_vectors
        self.rooms = {  # floats of what a stream works in
            loop.N_X: x_room * LANES,
            loop.N_Y: x_room * LANES,
            loop.N_QKV: room(3 * config.channels) * LANES,
            loop.N_FOUND: config.channels + value_blocks * value_vectors * LANES,
            loop.N_SCORES: slots * LANES,
            loop.N_WEIGHTS: max(slots, logits) * LANES,
            loop.N_SUMS: 2 * max(slots, logits) * LANES,
            loop.N_MASK: slots * LANES,
            loop.N_UP: room(config.hidden_channels) * LANES,
            loop.N_VALUES: most + LANES,
            loop.N_OFFSETS: 2 * most + LANES,
            loop.N_POSITION: z_room * LANES,
            loop.N_Z: z_room * LANES,
            loop.N_H: z_room * LANES,
            loop.N_LOGITS: logits * LANES,
            loop.N_SAMPLES: patch * config.sample_channels + LANES,
            loop.N_CONSTANT: z_room * LANES,
        }


def _products(weight: Tensor, embedding: Tensor) -> np.ndarray:
    """What each code adds, by the place it has among the samples of a patch: (patch * classes, outputs)."""
    taps = weight.detach().double().cpu().unflatten(1, (-1, embedding.shape[1]))
    products = torch.einsum("oke,qe->kqo", taps, embedding.double().cpu())
    return products.flatten(0, 1).float().numpy()


class Stream:
    """The state of one stream, and the plan of the network for it."""

    def __init__(self, packed: Weights, start_code: int):
        self.packed, config = packed, packed.config
        self.region = region = Region()
        self.net, self.layers = packed.net.copy(), packed.layers.copy()
        for field, floats in packed.rooms.items():
            self.net[field] = region.reserve(4 * floats) // 4
        for i in range(config.layers):
            self.layers[i, loop.L_KEYS] = region.reserve(4 * int(np.prod(packed.keys))) // 4
            self.layers[i, loop.L_VALUES] = region.reserve(4 * int(np.prod(packed.values))) // 4
        self.net[loop.N_SLOTS] = config.window
        self.net[loop.N_BASE] = region.allocate()
        self.work = region.bytes.view(np.float32)
        self.history = np.full(config.patch + 1, start_code, np.int64)
        self._mask(0)

    def export(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        config, order = self.packed.config, self._order()
        tensors = {
            "previous": torch.tensor([self.history[-1]]),
            "time": torch.tensor(self.net[loop.N_TIME]),
            "codes": torch.from_numpy(self.history[:-1].copy()),
            "position": torch.from_numpy(
                self._part(self.net[loop.N_POSITION], (config.head_channels,)).copy()
            ),
        }
        for i, layer in enumerate(self.layers):
            keys, values = self._rings(layer)
            tensors[f"keys.{i}"] = torch.from_numpy(np.ascontiguousarray(keys[order]))
            tensors[f"values.{i}"] = torch.from_numpy(np.ascontiguousarray(values[order]))
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        config = self.packed.config
        self.net[loop.N_TIME] = int(state["time"])
        self.history[:-1] = state["codes"].cpu().numpy()
        self.history[-1] = int(state["previous"])
        self._part(self.net[loop.N_POSITION], (config.head_channels,))[:] = _floats(
            state["position"]
        )
        order = self._order()
        for i, layer in enumerate(self.layers):
            keys, values = self._rings(layer)
            keys[order], values[order] = _floats(state[f"keys.{i}"]), _floats(state[f"values.{i}"])
            self._put(layer, keys, values)
        self._mask(self._begun())

    def _begun(self) -> int:
        """Positions so far."""
        return -(-int(self.net[loop.N_TIME]) // self.packed.config.patch)

    def _order(self) -> np.ndarray:
        """The slots of the ring, that of the oldest position first."""
        window = self.packed.config.window
        return (self._begun() + np.arange(window)) % window

    def _mask(self, begun: int) -> None:
        """What is added to the scores: the slots that no position has filled yet are not to be seen."""
        mask = self._part(self.net[loop.N_MASK], (self.packed.rooms[loop.N_MASK],))
        mask[:] = -np.inf
        mask[: min(begun, self.packed.config.window)] = 0.0

    def _part(self, first: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Of the stream's memory, the memory itself."""
        return self.work[int(first) : int(first) + int(np.prod(shape))].reshape(shape)

    def _rings(self, layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, (window, channels) each, copies."""
        config = self.packed.config
        each = config.channels // config.heads
        keys = self._part(layer[loop.L_KEYS], self.packed.keys).transpose(1, 3, 0, 2)
        keys = keys.reshape(-1, config.channels)[: config.window].copy()
        values = self._part(layer[loop.L_VALUES], self.packed.values).transpose(2, 0, 1, 3)
        values = (
            values.reshape(config.window, config.heads, -1)[:, :, :each]
            .reshape(config.window, -1)
            .copy()
        )
        return keys, values

    def _put(self, layer: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """The reverse of `_rings`."""
        heads, blocks, each, width = self.packed.keys
        padded = np.zeros((blocks * width, heads * each), np.float32)
        padded[: len(keys)] = keys
        memory = self._part(layer[loop.L_KEYS], self.packed.keys)
        memory[:] = padded.reshape(blocks, width, heads, each).transpose(2, 0, 3, 1)
        heads, blocks, window, width = self.packed.values
        padded = np.zeros((window, heads, blocks * width), np.float32)
        padded[:, :, :each] = values.reshape(window, heads, each)
        memory = self._part(layer[loop.L_VALUES], self.packed.values)
        memory[:] = padded.reshape(window, heads, blocks, width).transpose(1, 2, 0, 3)


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.to("cpu", torch.float32).numpy()
