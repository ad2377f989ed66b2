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
import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from wavear.generate import _simd, numba_sampling
from wavear.generate._simd import BLOCK, LANES, TALLEST, VECTOR_BYTES, WIDEST
from wavear.generate.compiled import compiled
from wavear.generate.numba_cpu import (
    _GROUP,
    _SIZES,
    _SPAN,
    _TABLE,
    CONDITION,
    CONSTANT_CONDITION,
    M_ADDRESS,
    M_BLOCKS,
    M_FIELDS,
    M_HALF,
    M_INPUTS,
    M_ROW,
    M_VECTORS,
    N_CLASSES,
    N_CONDITION_CHANNELS,
    N_CONDITION_PANELS,
    N_CONDITION_VECTORS,
    N_EMBEDDING,
    N_FIELDS,
    N_FIRST,
    N_H_VECTORS,
    N_HEAD,
    N_HEAD1,
    N_HEAD2,
    N_HEAD2_BIAS,
    N_HEAD_VECTORS,
    N_LOGIT_BLOCKS,
    N_LOGIT_ROW,
    N_LOGITS,
    N_MATRICES,
    N_MULTIPLY,
    N_OFFSETS,
    N_ROWS,
    N_SPAN,
    N_SPARSE,
    N_STREAMS,
    N_SUMS,
    N_TABLE,
    N_VALUES,
    N_WEIGHTS,
    N_X,
    N_X_VECTORS,
    N_Z_ROW,
    N_ZEROS,
    NO_CONDITION,
    Kernels,
    _log_probability,
    _multiply,
    _multiply_row,
    _multiply_rows,
    _multiply_sparse,
    _power,
    _project,
    _rectified,
    _sample,
    _simd_row_address,
    _tabulate,
    _to_panels,
    _void,
    _width,
    available_cores,
)
from wavear.generate.packing import Region, pack, round_to_bfloat16, to_numpy, vectors_of
from wavear.generate.reference import ReferenceEngine
from wavear.models.gru import GRU

# Fields of a layer: numbers of its matrices (of the first layer the input's is -1 where there is a table), addresses.
C_INPUT, C_HIDDEN, C_BIAS, C_H, C_Z, C_CONSTANT, C_FIELDS = range(7)


@numba.njit
def _start(net, layer, condition, mode):
    """Bias and constant conditioning of every stream, where the first layer's pre-activations start."""
    for s in range(net[N_STREAMS]):
        _simd.copy(layer[C_BIAS], VECTOR_BYTES, layer[C_CONSTANT] + s * net[N_Z_ROW], VECTOR_BYTES,
                   net[N_Z_ROW] // VECTOR_BYTES)  # fmt: skip
    if mode == CONSTANT_CONDITION:
        vectors = net[N_CONDITION_VECTORS]
        _to_panels(condition, vectors * VECTOR_BYTES, net[N_STREAMS], vectors, net[N_CONDITION_PANELS], 0)
        _project(net, net[N_CONDITION_CHANNELS], net[N_CONDITION_PANELS], vectors, net[N_STREAMS], net[N_ZEROS],
                 layer[C_CONSTANT], net[N_Z_ROW], layer[C_CONSTANT])  # fmt: skip


@numba.njit
def _start_span(net, layer, condition, condition_row, mode, count):
    """Bias and conditioning of the next `count` samples of every stream."""
    streams = net[N_STREAMS]
    for t in range(count):
        _simd.copy(layer[C_CONSTANT], VECTOR_BYTES, layer[C_Z] + t * streams * net[N_Z_ROW], VECTOR_BYTES,
                   streams * net[N_Z_ROW] // VECTOR_BYTES)  # fmt: skip
    if mode == CONDITION:
        vectors = net[N_CONDITION_VECTORS]
        row = vectors * VECTOR_BYTES
        for t in range(count):
            for s in range(streams):
                _to_panels(condition + s * condition_row + t * row, row, 1, vectors, net[N_CONDITION_PANELS],
                           t * streams + s)  # fmt: skip
        _project(net, net[N_CONDITION_CHANNELS], net[N_CONDITION_PANELS], vectors, count * streams, net[N_ZEROS],
                 layer[C_Z], net[N_Z_ROW], layer[C_Z])  # fmt: skip


@numba.njit
def _multiply_turned(net, matrix, x, bias, init, out, backwards):
    address = net[N_MATRICES] + 8 * M_FIELDS * matrix
    weights = _simd.load_int(address + 8 * M_ADDRESS)
    inputs = _simd.load_int(address + 8 * M_INPUTS)
    kernel = _simd.load_int(address + 8 * M_ROW)
    blocks = _simd.load_int(address + 8 * M_BLOCKS)
    block = _simd.load_int(address + 8 * M_VECTORS) * VECTOR_BYTES
    size = inputs * block
    if _simd.load_int(address + 8 * M_HALF):
        size //= 2
    for i in range(blocks):
        k = blocks - 1 - i if backwards else i
        _simd.call6(kernel, weights + k * size, inputs, x, bias + k * block, init + k * block, out + k * block)


@numba.njit
def _into(net, matrix, x, x_vectors, z, backwards):
    """Add matrix @ x of every stream to its row of pre-activations, from `z` on; x lies in panels."""
    if net[N_STREAMS] == 1:
        _multiply_turned(net, matrix, x, net[N_ZEROS], z, z, backwards)
    else:
        rows, z_row = net[N_ROWS], net[N_Z_ROW]
        vector = rows * VECTOR_BYTES
        _multiply(net, matrix, net[N_STREAMS], rows, x, vector, x_vectors * vector, net[N_ZEROS],
                  z, z_row, VECTOR_BYTES, rows * z_row, z, z_row, VECTOR_BYTES, rows * z_row)  # fmt: skip


@numba.njit
def _input(net, layer, previous, z):
    """Add the product of the first layer's input matrix with the input."""
    streams, rows = net[N_STREAMS], net[N_ROWS]
    if net[N_TABLE]:
        gates = 3 * net[N_H_VECTORS]
        for s in range(streams):
            _simd.add(net[N_TABLE] + previous[s] * gates * VECTOR_BYTES, z + s * net[N_Z_ROW], gates)
        return
    vectors = net[N_X_VECTORS]
    vector = rows * VECTOR_BYTES
    for s in range(streams):
        _simd.copy(net[N_EMBEDDING] + previous[s] * vectors * VECTOR_BYTES, VECTOR_BYTES,
                   net[N_X] + (s // rows) * vectors * vector + (s % rows) * VECTOR_BYTES, vector, vectors)  # fmt: skip
    _into(net, layer[C_INPUT], net[N_X], vectors, z, False)


@numba.njit
def _head(net, h, z):
    """Hidden units, and the head's part of the pre-activations -> logits."""
    streams, rows, z_row = net[N_STREAMS], net[N_ROWS], net[N_Z_ROW]
    head, logits, zeros = net[N_HEAD], net[N_LOGITS], net[N_ZEROS]
    if streams == 1:
        _multiply_row(net, net[N_HEAD1], h, zeros, z, head)
        _rectified(net, net[N_HEAD2], head, net[N_HEAD2_BIAS], logits)
        return
    vector = rows * VECTOR_BYTES
    head_vectors = net[N_HEAD_VECTORS]
    _multiply(net, net[N_HEAD1], streams, rows, h, vector, net[N_H_VECTORS] * vector, zeros,
              z, z_row, VECTOR_BYTES, rows * z_row, head, VECTOR_BYTES, vector, head_vectors * vector)  # fmt: skip
    _simd.relu(head, head, (streams + rows - 1) // rows * head_vectors * rows)
    _multiply(net, net[N_HEAD2], streams, rows, head, vector, head_vectors * vector, zeros,
              net[N_HEAD2_BIAS], 0, VECTOR_BYTES, 0,
              logits, net[N_LOGIT_ROW], VECTOR_BYTES, rows * net[N_LOGIT_ROW])  # fmt: skip


def _run(net, layers, previous, uniforms, temperatures, codes, scores, condition, mode, scoring, asked):
    """The loop over samples, for one group of streams: as `numba_cpu._run`, but for `previous`, int64 (G,)."""
    streams, rows, first, samples = net[N_STREAMS], net[N_ROWS], net[N_FIRST], codes.shape[1]
    h_vectors = net[N_H_VECTORS]
    vector = rows * VECTOR_BYTES
    gap = h_vectors * VECTOR_BYTES
    gates = net[N_HEAD_VECTORS] * VECTOR_BYTES
    z_row = net[N_Z_ROW]
    condition_row = net[N_CONDITION_VECTORS] * VECTOR_BYTES
    stream_bytes = condition_row if mode == CONSTANT_CONDITION else samples * condition_row
    condition += first * stream_bytes
    _start(net, layers[0], condition, mode)
    truncating = numba_sampling.truncates(asked, net[N_CLASSES])
    scored = asked.shape[0] > 0 and asked[numba_sampling.SCORED] > 0.0
    for t in range(samples):
        position = t % net[N_SPAN]
        if position == 0:
            _start_span(net, layers[0], condition + t * condition_row, stream_bytes, mode,
                        min(net[N_SPAN], samples - t))  # fmt: skip
        z0 = layers[0, C_Z] + position * streams * z_row
        for i in range(layers.shape[0]):
            layer = layers[i]
            z = z0 + gates
            if i == 0:
                _input(net, layer, previous, z)
            else:
                z = layer[C_Z] + gates
                for s in range(streams):
                    _simd.copy(layer[C_BIAS] + gates, VECTOR_BYTES, z + s * z_row, VECTOR_BYTES, 4 * h_vectors)
                _into(net, layer[C_INPUT], layers[i - 1, C_H], h_vectors, z, False)
            h = layer[C_H]
            _into(net, layer[C_HIDDEN], h, h_vectors, z + gap, False)
            for s in range(streams):
                _simd.cell(z + s * z_row, gap, h + (s // rows) * h_vectors * vector + (s % rows) * VECTOR_BYTES,
                           h_vectors, vector)  # fmt: skip
        _head(net, layers[layers.shape[0] - 1, C_H], z0)
        for s in range(streams):
            row = net[N_LOGITS] + s * net[N_LOGIT_ROW]
            if scoring:
                code = codes[first + s, t]
                scores[first + s, t] = _log_probability(net, row, code)
            else:
                if truncating:
                    code = numba_sampling.draw(row, net[N_LOGIT_BLOCKS], net[N_CLASSES], net[N_WEIGHTS], net[N_SUMS],
                                               uniforms[first + s, t], temperatures[first + s, t], asked)  # fmt: skip
                else:
                    code = _sample(net, row, uniforms[first + s, t], temperatures[first + s, t])
                if code < 0:
                    return t
                codes[first + s, t] = code
                if scored:
                    scores[first + s, t] = _log_probability(net, row, code)
            previous[s] = code
    return -1


_SIGNATURE = (
    "int64(int64[::1], int64[:,::1], int64[::1], float64[:,::1], float64[:,::1], int64[:,::1], "
    "float64[:,::1], int64, int64, int64, float64[::1])"
)


@functools.cache
def kernels() -> Kernels:
    """Compiled at the first call, or read from the cache; all but `run` are those of `numba_cpu`."""
    multiply = compiled(_multiply_rows, _void(15), callback=True)
    sparse = compiled(_multiply_sparse, _void(7), callback=True)
    _kept.extend([multiply, sparse])
    run, tabulate = compiled(_run, _SIGNATURE), compiled(_tabulate, _void(11))
    return Kernels(run, tabulate, compiled(_simd_row_address, "int64(int64, int64)"), multiply.address, sparse.address)


_kept: list = []  # the code at an address lives as long as its object


def products(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows (n, inputs) times matrix (outputs, inputs) -> (n, outputs), summed by the engine's own kernel.

    A library of linear algebra may sum in another order with another number of threads.
    """
    region = Region()
    packed, blocks, vectors = pack(matrix, LANES, _width(TALLEST), "float32")
    x_vectors = -(-rows.shape[1] // LANES)
    padded = np.zeros((len(rows), x_vectors * LANES), np.float32)
    padded[:, : rows.shape[1]] = rows
    weights, x = region.put(packed), region.put(padded)
    row = blocks * vectors * VECTOR_BYTES
    panels, zeros = region.reserve(TALLEST * x_vectors * VECTOR_BYTES), region.reserve(row)
    out = region.reserve(len(rows) * row)
    base = region.allocate()
    fields = np.zeros(M_FIELDS, np.int64)
    fields[:4] = base + weights, matrix.shape[1], blocks, vectors
    kernels().tabulate(kernels().multiply, fields.ctypes.data, len(rows), base + x, x_vectors, base + panels, base + zeros,
                    base + out, row, 0, 0)  # fmt: skip
    made = region.view(out, len(rows) * row).view(np.float32).reshape(len(rows), -1)
    return made[:, : len(matrix)].copy()


class _Weights:
    """The packed weights of a model and the plan of its network, shared by all groups of streams."""

    def __init__(self, model: GRU, group: int, weights: str):
        config = model.config
        self.region = region = Region()
        matrices: list[list[int]] = []
        hidden, head = config.channels, config.head_channels
        self.classes = config.classes
        self.layers = config.layers
        self.h_vectors = -(-hidden // LANES)
        self.span = _power(_SPAN // group)
        self.tabulated = config.classes <= _TABLE

        def matrix(array: np.ndarray, rows: int, precision: str = weights, width: int | None = None) -> int:
            packed, blocks, vectors = pack(array, LANES, _width(rows) if width is None else width, precision)
            half = int(precision == "bfloat16")
            row = kernels().row(vectors, half) if vectors <= WIDEST else 0
            matrices.append([region.put(packed), array.shape[1], blocks, vectors, half, row])
            return len(matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            return region.put(padded)

        def total(vectors: int, rows: int, precision: str = weights, width: int | None = None) -> int:
            """Vectors that a matrix writes."""
            width = _width(rows) if width is None else width
            blocks, each = vectors_of(vectors * LANES, LANES, width, precision == "bfloat16")
            return blocks * each

        def gates(array: np.ndarray, order: str) -> np.ndarray:
            """Of outputs (3H, ...) in torch's order r, u, n the gates of `order`, each padded to whole vectors."""
            parts = dict(zip("run", np.split(array, 3), strict=True))
            padded = np.zeros((len(order), self.h_vectors * LANES, *array.shape[1:]), np.float32)
            for k, name in enumerate(order):
                padded[k, :hidden] = parts[name]
            return padded.reshape(-1, *array.shape[1:])

        def of(name: str, layer: int) -> np.ndarray:
            return to_numpy(getattr(model.gru, f"{name}_l{layer}"))

        narrow = 0 if group == 1 else None
        self.head_vectors = total(-(-head // LANES), group)
        logits = total(-(-self.classes // LANES), group, width=narrow)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        self.condition_channels = config.conditioning_channels if model.conditioned else 0
        self.condition_vectors = -(-self.condition_channels // LANES)
        self.x_vectors = -(-config.input_channels // LANES)
        three = 3 * self.h_vectors
        self.z_vectors = self.head_vectors + max(
            self.h_vectors + total(three, group),
            *(total(three, group, precision) for precision in ("float32", "bfloat16")),
            *(total(self.head_vectors + three, rows, "float32") - self.head_vectors for rows in (group, 64, TALLEST)),
        )
        first, last = model.head.first, model.head.last
        # What every sample reads lies together, in the order of reading; what is read seldom follows.
        self.inputs, self.hiddens = [], []
        for layer in range(config.layers):
            self.inputs.append(-1 if layer == 0 else matrix(gates(of("weight_ih", layer), "nru"), group))
            self.hiddens.append(matrix(gates(of("weight_hh", layer), "run"), group))
        self.head1 = matrix(to_numpy(first.weight), group)
        self.head2 = matrix(to_numpy(last.weight), group, width=narrow)
        # The first layer's input matrix is multiplied ahead, with the input and with the conditioning: in float32.
        entrance = gates(of("weight_ih", 0), "nru")
        if not self.tabulated:
            self.inputs[0] = matrix(entrance, group, "float32")
        self.condition = -1
        if model.condition_input is not None and model.head.conditioning is not None:
            folded = products(to_numpy(model.condition_input.weight).T, entrance)
            both = np.zeros((self.head_vectors * LANES + len(entrance), self.condition_channels), np.float32)
            both[:head] = to_numpy(model.head.conditioning.weight)
            both[self.head_vectors * LANES :] = folded.T
            self.condition = matrix(both, self.span * group, "float32")
        self.biases = []
        for layer in range(config.layers):
            x, h = of("bias_ih", layer), of("bias_hh", layer)
            row = np.zeros(self.z_vectors * LANES, np.float32)
            row[:head] = to_numpy(first.bias)
            start = self.head_vectors * LANES
            sums = gates(x + h, "ru")
            parts = [gates(x, "n"), sums, gates(h, "n")]
            row[start : start + 4 * self.h_vectors * LANES] = np.concatenate(parts)
            self.biases.append(vector(row, self.z_vectors))
        # Outputs beyond the last class are never drawn.
        self.head2_bias = vector(to_numpy(last.bias), self.logit_vectors, fill=-np.inf)
        self.zeros = region.reserve((self.z_vectors + self.logit_vectors + self.x_vectors) * VECTOR_BYTES)
        embedding = to_numpy(model.input.table())
        if self.tabulated:
            self.first_table = vector(products(embedding, entrance), three)
        else:
            self.embedding = vector(embedding, self.x_vectors)
        base = region.allocate()
        self.table = np.array(matrices, dtype=np.int64)
        self.table[:, M_ADDRESS] += base


class _Group:
    """The state of some streams that one thread runs side by side, and the plan of the network for them."""

    def __init__(self, packed: _Weights, first: int, streams: int, start_code: int):
        self.packed = packed  # the plan holds addresses in it
        self.region = region = Region()
        base = packed.region.address
        panels = -(-streams // TALLEST)
        rows = -(-streams // panels)
        padded = panels * rows
        z_row = packed.z_vectors * VECTOR_BYTES
        layers = np.zeros((packed.layers, C_FIELDS), np.int64)
        own = [C_H, C_Z, C_CONSTANT]
        self.h_bytes = padded * packed.h_vectors * VECTOR_BYTES
        for i in range(packed.layers):
            layers[i, C_INPUT], layers[i, C_HIDDEN] = packed.inputs[i], packed.hiddens[i]
            layers[i, C_BIAS] = packed.biases[i] + base
            layers[i, C_H] = region.reserve(self.h_bytes)
            layers[i, C_Z] = region.reserve((packed.span if i == 0 else 1) * streams * z_row)
            layers[i, C_CONSTANT] = region.reserve(streams * z_row) if i == 0 else 0
        net = np.zeros(N_FIELDS, np.int64)
        net[N_CLASSES] = packed.classes
        net[N_STREAMS] = streams
        net[N_ROWS] = rows
        net[N_SPAN] = packed.span
        net[N_X_VECTORS] = packed.x_vectors
        net[N_H_VECTORS] = packed.h_vectors
        net[N_HEAD_VECTORS] = packed.head_vectors
        net[N_Z_ROW] = z_row
        net[N_LOGIT_ROW] = packed.logit_vectors * VECTOR_BYTES
        net[N_LOGIT_BLOCKS] = -(-packed.classes // BLOCK)
        net[N_CONDITION_CHANNELS] = packed.condition
        net[N_CONDITION_VECTORS] = packed.condition_vectors
        net[N_HEAD1], net[N_HEAD2] = packed.head1, packed.head2
        net[N_HEAD2_BIAS] = packed.head2_bias + base
        net[N_ZEROS] = packed.zeros + base
        net[N_TABLE] = packed.first_table + base if packed.tabulated else 0
        net[N_EMBEDDING] = 0 if packed.tabulated else packed.embedding + base
        span = -(-packed.span * streams // TALLEST) * TALLEST
        vectors = {
            N_X: padded * packed.x_vectors,
            N_HEAD: padded * packed.head_vectors,
            N_LOGITS: streams * packed.logit_vectors,
            N_WEIGHTS: packed.logit_vectors,
            N_SUMS: 2 * packed.logit_vectors,
            N_CONDITION_PANELS: span * packed.condition_vectors,
            N_VALUES: packed.head_vectors + 1,
            N_OFFSETS: 2 * packed.head_vectors + 2,
        }
        for field, count in vectors.items():
            net[field] = region.reserve(count * VECTOR_BYTES)
        net[N_FIRST] = first
        net[N_MATRICES] = packed.table.ctypes.data
        net[N_MULTIPLY] = kernels().multiply
        net[N_SPARSE] = kernels().sparse
        region.allocate()
        layers[:, own] += region.address
        net[list(vectors)] += region.address
        self.net, self.layers = net, layers
        self.previous = np.full(streams, start_code, np.int64)

    def hidden(self, layer: int, row: int) -> np.ndarray:
        """Hidden units of a stream, (padded H,), the memory itself."""
        rows = int(self.net[N_ROWS])
        memory = self.region.view(int(self.layers[layer, C_H]) - self.region.address, self.h_bytes).view(np.float32)
        return memory.reshape(-1, self.packed.h_vectors, rows, LANES)[row // rows, :, row % rows]


class NumbaGRUEngine:
    """Runs `batch` streams of a GRU in compiled code; see `NumbaEngine`, whose arguments these are."""

    def __init__(
        self,
        model: GRU,
        batch: int,
        *,
        weights: str = "float32",
        threads: int | None = None,
        packings: dict[int, _Weights] | None = None,
    ):
        if not isinstance(model, GRU):
            raise ValueError(f"this engine serves GRU, not {type(model).__name__}: use engine 'reference'")
        if weights not in ("float32", "bfloat16"):
            raise ValueError(f"weights is {weights!r}, it must be float32 or bfloat16")
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, it must be at least 1")
        self.model, self.batch, self.weights = model, batch, weights
        self._asked_threads = threads
        self._packings: dict[int, _Weights] = {} if packings is None else packings
        self.classes = model.config.classes
        self.threads = min(threads or available_cores(), batch)
        groups = -(-batch // _GROUP)
        groups = min(batch, -(-groups // self.threads) * self.threads)
        bounds = [batch * g // groups for g in range(groups + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        size = max(sizes) if packings is None else next(size for size in _SIZES if size >= max(sizes))
        if size not in self._packings:
            self._packings[size] = _Weights(model, size, weights)
        self._packed = self._packings[size]
        self._groups = [
            _Group(self._packed, first, size, model.start_code) for first, size in zip(bounds, sizes, strict=False)
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

    def _seat(self, stream: int) -> tuple[_Group, int]:
        """The group that runs a stream, and its row there."""
        group = next(g for g in reversed(self._groups) if g.net[N_FIRST] <= stream)
        return group, stream - int(group.net[N_FIRST])

    def _run(self, uniforms, temperatures, codes, scores, cond, scoring: bool, asked=(None, None, False)) -> None:
        if codes.ndim != 2 or codes.shape[0] != self.batch:
            raise ValueError(f"shape {codes.shape} for {self.batch} streams: expected ({self.batch}, n)")
        condition, mode = self._condition(cond, codes.shape[1])
        run = kernels().run

        def one(group: _Group) -> int:
            return run(group.net, group.layers, group.previous, uniforms, temperatures, codes, scores,
                       condition.ctypes.data, mode, int(scoring),
                       numba_sampling.request(self.classes, *asked))  # fmt: skip

        results = list(self._pool.map(one, self._groups)) if self._pool else [one(group) for group in self._groups]
        bad = [t for t in results if t >= 0]
        if bad:
            raise ValueError(
                f"the logits of sample {min(bad)} of this call are infinite or NaN: check the model's weights"
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
    if weights == "bfloat16":
        for matrix in rounded(model):
            bits = round_to_bfloat16(matrix.detach().cpu().numpy()) << np.uint32(16)
            matrix.data.copy_(torch.from_numpy(bits.view(np.float32)))
    return model


def rounded(model: GRU) -> list[Tensor]:
    """The matrices that weights of less than 32 bits round: all that are read for every sample.

    The first layer's input matrix and the conditioning's are multiplied ahead.
    """
    names = [name for name, _ in model.gru.named_parameters() if name.startswith("weight") and name != "weight_ih_l0"]
    return [*(model.gru.get_parameter(name) for name in names), model.head.first.weight, model.head.last.weight]
