"""The CPU engine of the transformer: weights as `numba_transformer_loop` reads them, and the state of its streams."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generate import numba_laws, numba_sampling
from wavear.generate import numba_transformer_loop as loop
from wavear.generate._simd import BLOCK, LANES, VECTOR_BYTES, WIDEST
from wavear.generate.numba_cpu import available_cores
from wavear.generate.packing import Region, pack, round_to_bfloat16, to_numpy, vectors_of
from wavear.generate.reference import ReferenceEngine
from wavear.models.attention import rotation, rotation_period
from wavear.models.transformer import Transformer

_TABLES = 64 << 20  # bytes of products by code, at most
_SPARSE = 0  # the width of a matrix for `_simd.sparse`, see `packing.pack`


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
        "float32", or "bfloat16": the matrices rounded once to nearest, half the bytes to read; arithmetic in float32.
    threads : int, optional
        Cores to use, each for streams of its own; by default all that the process may run on.
    packed : _Weights, optional
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
        packed: _Weights | None = None,
    ):
        if not isinstance(model, Transformer):
            raise ValueError(f"this engine serves a Transformer, not {type(model).__name__}: use engine 'reference'")
        if weights not in ("float32", "bfloat16"):
            raise ValueError(f"weights is {weights!r}, it must be float32 or bfloat16")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights, self._asked_threads = model, batch, weights, threads
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
        self._packed = packed or _Weights(model, weights)
        self._streams = [_Stream(self._packed, model.start_code) for _ in range(batch)]
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
        runner = ReferenceEngine(_as_run(self.model, self.weights), 1)
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
        run = loop.kernels().run

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


def _as_run(model: Transformer, weights: str) -> Transformer:
    """The model that the engine runs: in float32 or more, its matrices rounded as they are packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    for name, parameter in model.named_parameters():
        if weights == "bfloat16" and parameter.dim() == 2 and name.startswith(("blocks", "head", "enter")):
            if name == "head.place.weight":
                continue  # a table of vectors, which the loop adds as they are
            bits = round_to_bfloat16(parameter.detach().cpu().numpy()) << np.uint32(16)
            parameter.data.copy_(torch.from_numpy(bits.view(np.float32)))
    return model


class _Weights:
    """The packed weights of a model and the plan of its network, shared by all streams."""

    def __init__(self, model: Transformer, weights: str):
        config = self.config = model.config
        model = _as_run(model, weights)
        half = weights == "bfloat16"
        self.region = region = Region()
        matrices: list[list[int]] = []
        fields: dict[int, int] = {}
        head, width = model.head, config.head_channels
        window, patch, classes = config.window, config.patch, config.classes
        each = config.channels // config.heads
        self.widest = 0

        def matrix(weight: Tensor, width: int = WIDEST) -> int:
            packed, blocks, vectors = pack(to_numpy(weight), LANES, width, weights)
            row = loop.kernels().row(vectors, int(half)) if width else 0
            matrices.append([region.put(packed), weight.shape[1], blocks, vectors, int(half), row])
            self.widest = max(self.widest, blocks * vectors)
            return len(matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            self.widest = max(self.widest, vectors)
            return region.put(padded)

        def room(outputs: int, width: int = WIDEST) -> int:
            """Vectors that a product with so many outputs fills."""
            return int(np.prod(vectors_of(outputs, LANES, width, half)))

        x_vectors, z_vectors = -(-config.channels // LANES), -(-width // LANES)
        blocks = [
            (matrix(b.qkv.weight), matrix(b.out.weight), matrix(b.up.weight), matrix(b.down.weight, _SPARSE))
            for b in model.blocks
        ]
        position = matrix(head.position.weight)
        hidden, out = matrix(head.hidden.weight, _SPARSE), matrix(head.out.weight, _SPARSE)
        numbers = {loop.N_POSITION_MATRIX: position, loop.N_HIDDEN_MATRIX: hidden, loop.N_OUT_MATRIX: out}
        if model.enter_conditioning is not None:
            numbers[loop.N_ENTER_CONDITION] = matrix(model.enter_conditioning.weight)
            numbers[loop.N_HEAD_CONDITION] = matrix(head.conditioning.weight)
        # What does not depend on the code: of each place in the patch one vector.
        places = np.tile(to_numpy(head.samples.bias), (patch, 1))
        if head.place is not None:
            places = places + to_numpy(head.place.weight)
        fields[loop.N_PLACES] = vector(places, z_vectors)
        fields[loop.N_ENTER_BIAS] = vector(to_numpy(model.enter.bias), room(config.channels))
        fields[loop.N_HIDDEN_BIAS] = vector(to_numpy(head.hidden.bias), z_vectors)
        kind, mixtures, _ = numba_laws.numbers(model.law)
        logits = -(-room(model.law.channels, _SPARSE) // (BLOCK // LANES or 1)) * max(BLOCK // LANES, 1)
        # Outputs beyond the last class are never drawn.
        fields[loop.N_OUT_BIAS] = vector(
            to_numpy(head.out.bias), logits, fill=-np.inf if kind == numba_laws.CATEGORICAL else 0.0
        )
        embedding = model.embedding.table().detach()
        if 4 * patch * classes * (x_vectors + z_vectors) * LANES <= _TABLES:
            fields[loop.N_ENTER_TABLE] = vector(_products(model.enter.weight, embedding), x_vectors)
            fields[loop.N_HEAD_TABLE] = vector(_products(head.samples.weight, embedding), z_vectors)
        else:
            numbers[loop.N_ENTER] = matrix(model.enter.weight)
            numbers[loop.N_SAMPLES_MATRIX] = matrix(head.samples.weight)
            fields[loop.N_EMBEDDING] = vector(to_numpy(embedding), -(-config.sample_channels // LANES))
        period = rotation_period(window)
        cos, sin = rotation(torch.arange(period), model.turns.cpu(), period, torch.zeros(1, dtype=torch.float64))
        angles = torch.stack([cos[:, : each // 2], sin[:, each // 2 :]], dim=2)
        fields[loop.N_ANGLES] = region.put(angles.float().numpy())
        fields[loop.N_ZEROS] = region.reserve((self.widest + WIDEST) * VECTOR_BYTES)
        base = region.allocate()
        self.table = np.array(matrices, dtype=np.int64)
        self.table[:, loop.M_ADDRESS] += base

        def of(number: int) -> int:
            return self.table.ctypes.data + 8 * loop.M_FIELDS * number

        self.net = net = np.zeros(loop.N_FIELDS, np.int64)
        for field, offset in fields.items():
            net[field] = base + offset
        for field, number in numbers.items():
            net[field] = of(number)
        self.layers = np.zeros((config.layers, loop.L_FIELDS), np.int64)
        self.layers[:, : loop.L_DOWN + 1] = [[of(number) for number in block] for block in blocks]
        key_blocks, key_vectors, _ = _blocks(-(-window // BLOCK) * BLOCK)
        value_blocks, value_vectors, _ = _blocks(each)
        sizes = {
            loop.N_PATCH: patch,
            loop.N_CHANNELS: config.channels,
            loop.N_HEADS: config.heads,
            loop.N_WINDOW: window,
            loop.N_PERIOD: period,
            loop.N_CLASSES: classes,
            loop.N_LAW: kind,
            loop.N_MIXTURES: mixtures,
            loop.N_X_VECTORS: x_vectors,
            loop.N_Z_VECTORS: z_vectors,
            loop.N_KEY_BLOCKS: key_blocks,
            loop.N_KEY_VECTORS: key_vectors,
            loop.N_KEY_ROW: loop.kernels().row(key_vectors, 0),
            loop.N_VALUE_BLOCKS: value_blocks,
            loop.N_VALUE_VECTORS: value_vectors,
            loop.N_VALUE_ROW: loop.kernels().row(value_vectors, 0),
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


def _blocks(floats: int) -> tuple[int, int, int]:
    """(blocks, vectors in each, floats in all) that hold so many floats: of equal size, for the kernels of one row."""
    vectors = -(-floats // LANES)
    blocks = -(-vectors // WIDEST)
    each = -(-vectors // blocks)
    return blocks, each, blocks * each * LANES


def _products(weight: Tensor, embedding: Tensor) -> np.ndarray:
    """What each code adds, by the place it has among the samples of a patch: (patch * classes, outputs)."""
    taps = weight.detach().double().cpu().unflatten(1, (-1, embedding.shape[1]))
    products = torch.einsum("oke,qe->kqo", taps, embedding.double().cpu())
    return products.flatten(0, 1).float().numpy()


class _Stream:
    """The state of one stream, and the plan of the network for it."""

    def __init__(self, packed: _Weights, start_code: int):
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
            "position": torch.from_numpy(self._part(self.net[loop.N_POSITION], (config.head_channels,)).copy()),
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
        self._part(self.net[loop.N_POSITION], (config.head_channels,))[:] = _floats(state["position"])
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
        values = values.reshape(config.window, config.heads, -1)[:, :, :each].reshape(config.window, -1).copy()
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
