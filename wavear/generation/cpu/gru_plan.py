"""The packed weights of a GRU and the plan of its network, as the loop of `numba_gru_loop` reads them."""

from __future__ import annotations

import numpy as np

from wavear.generation.cpu.distributions import CATEGORICAL, numbers
from wavear.generation.cpu.gru_loop import (  # fmt: skip
    C_BIAS,
    C_CONSTANT,
    C_FIELDS,
    C_H,
    C_HIDDEN,
    C_INPUT,
    C_Z,
    G_FIELDS,
    G_LINE,
    G_ROWS,
    G_VALUES,
    kernels,
)
from wavear.generation.cpu.packing import Region, to_numpy, vectors_of
from wavear.generation.cpu.products import (
    M_ADDRESS,
    M_BLOCKS,
    M_VECTORS,
    N_CLASSES,
    N_CONDITION_CHANNELS,
    N_CONDITION_PANELS,
    N_CONDITION_VECTORS,
    N_EMBEDDING,
    N_FIRST,
    N_H_VECTORS,
    N_HEAD,
    N_HEAD1,
    N_HEAD2,
    N_HEAD2_BIAS,
    N_HEAD_VECTORS,
    N_LAW,
    N_LOGIT_BLOCKS,
    N_LOGIT_ROW,
    N_LOGITS,
    N_MATRICES,
    N_MIXTURES,
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
    products,
)
from wavear.generation.cpu.simd import BLOCK, LANES, TALLEST, VECTOR_BYTES
from wavear.generation.cpu.wavenet_plan import SPAN, TABLE, power_of_two, put_matrix, width_for
from wavear.models.gru import GRU
from wavear.models.inputs import ValueEmbedding


def multiplied(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows (n, inputs) times matrix (outputs, inputs) -> (n, outputs), summed by the engine's own kernel.

    A library of linear algebra may sum in another order with another number of threads.
    """
    region = Region()
    x_vectors = -(-rows.shape[1] // LANES)
    padded = np.zeros((len(rows), x_vectors * LANES), np.float32)
    padded[:, : rows.shape[1]] = rows
    fields = np.array(put_matrix(region, matrix, width_for(TALLEST), "float32"), np.int64)
    blocks, vectors = fields[[M_BLOCKS, M_VECTORS]].tolist()
    x = region.put(padded)
    row = blocks * vectors * VECTOR_BYTES
    panels, zeros = region.reserve(TALLEST * x_vectors * VECTOR_BYTES), region.reserve(row)
    out = region.reserve(len(rows) * row)
    base = region.allocate()
    fields[M_ADDRESS] += base
    kernels().tabulate(products().multiply, fields.ctypes.data, len(rows), base + x, x_vectors, base + panels,
                       base + zeros, base + out, row, 0, 0)  # fmt: skip
    made = region.view(out, len(rows) * row).view(np.float32).reshape(len(rows), -1)
    return made[:, : len(matrix)].copy()


class Weights:
    """The packed weights of a model and the plan of its network, shared by all groups of streams."""

    def __init__(self, model: GRU, group: int, weights: str):
        config = model.config
        self.region = region = Region()
        matrices: list[list[int]] = []
        hidden, head = config.channels, config.head_channels
        self.classes = config.classes
        self.layers = config.layers
        self.h_vectors = -(-hidden // LANES)
        self.span = power_of_two(SPAN // group)
        self.law = numbers(model.law)
        self.tabulated = config.classes <= TABLE or self.law[0] != CATEGORICAL

        def matrix(
            array: np.ndarray, rows: int, precision: str = weights, width: int | None = None
        ) -> int:
            matrices.append(
                put_matrix(region, array, width_for(rows) if width is None else width, precision)
            )
            return len(matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            return region.put(padded)

        def total(
            vectors: int, rows: int, precision: str = weights, width: int | None = None
        ) -> int:
            """Vectors that a matrix writes."""
            width = width_for(rows) if width is None else width
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
        logits = total(-(-model.law.channels // LANES), group, width=narrow)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        self.condition_channels = config.conditioning_channels if model.conditioned else 0
        self.condition_vectors = -(-self.condition_channels // LANES)
        self.x_vectors = -(-config.input_channels // LANES)
        three = 3 * self.h_vectors
        self.z_vectors = self.head_vectors + max(
            self.h_vectors + total(three, group),
            *(total(three, group, precision) for precision in ("float32", "bfloat16")),
            *(
                total(self.head_vectors + three, rows, "float32") - self.head_vectors
                for rows in (group, 64, TALLEST)
            ),
        )
        first, last = model.head.first, model.head.last
        # What every sample reads lies together, in the order of reading; what is read seldom
        # follows.
        self.inputs, self.hiddens = [], []
        for layer in range(config.layers):
            self.inputs.append(
                -1 if layer == 0 else matrix(gates(of("weight_ih", layer), "nru"), group)
            )
            self.hiddens.append(matrix(gates(of("weight_hh", layer), "run"), group))
        self.head1 = matrix(to_numpy(first.weight), group)
        self.head2 = matrix(to_numpy(last.weight), group, width=narrow)
        # The first layer's input matrix is multiplied ahead, with the input and with the
        # conditioning: in float32.
        entrance = gates(of("weight_ih", 0), "nru")
        if not self.tabulated:
            self.inputs[0] = matrix(entrance, group, "float32")
        self.condition = -1
        if model.condition_input is not None and model.head.conditioning is not None:
            folded = multiplied(to_numpy(model.condition_input.weight).T, entrance)
            both = np.zeros(
                (self.head_vectors * LANES + len(entrance), self.condition_channels), np.float32
            )
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
        self.zeros = region.reserve(
            (self.z_vectors + self.logit_vectors + self.x_vectors) * VECTOR_BYTES
        )
        self.embedding = self.first_table = self.values = self.rows = self.line = 0
        if isinstance(model.input, ValueEmbedding):
            # The line through the value as a product of its own, the rest of the input as a table.
            coarse = model.input.coarse
            entries = to_numpy(
                model.input.line.bias[None]
                if coarse is None
                else coarse.weight + model.input.line.bias
            )
            self.first_table = vector(multiplied(entries, entrance), three)
            self.line = vector(multiplied(to_numpy(model.input.line.weight.T), entrance), three)
            self.values = region.put(to_numpy(model.input.values))
            rows = (
                np.zeros(config.classes, np.int64)
                if coarse is None
                else model.input.coarse_codes.cpu().numpy()
            )
            self.rows = region.put(rows)
        elif self.tabulated:
            self.first_table = vector(multiplied(to_numpy(model.input.table()), entrance), three)
        else:
            self.embedding = vector(to_numpy(model.input.table()), self.x_vectors)
        base = region.allocate()
        self.table = np.array(matrices, dtype=np.int64)
        self.table[:, M_ADDRESS] += base


class Group:
    """The state of some streams that one thread runs side by side, and the plan of the network for them."""

    def __init__(self, packed: Weights, first: int, streams: int, start_code: int):
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
        net = np.zeros(G_FIELDS, np.int64)
        net[N_LAW], net[N_MIXTURES], net[N_CLASSES] = packed.law
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
        net[[N_EMBEDDING, G_VALUES, G_ROWS, G_LINE]] = (
            packed.embedding,
            packed.values,
            packed.rows,
            packed.line,
        )
        net[[N_EMBEDDING, G_VALUES, G_ROWS, G_LINE]] += base
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
        net[N_MULTIPLY] = products().multiply
        net[N_SPARSE] = products().sparse
        region.allocate()
        layers[:, own] += region.address
        net[list(vectors)] += region.address
        self.net, self.layers = net, layers
        self.previous = np.full(streams, start_code, np.int64)

    def hidden(self, layer: int, row: int) -> np.ndarray:
        """Hidden units of a stream, (padded H,), the memory itself."""
        rows = int(self.net[N_ROWS])
        memory = self.region.view(
            int(self.layers[layer, C_H]) - self.region.address, self.h_bytes
        ).view(np.float32)
        return memory.reshape(-1, self.packed.h_vectors, rows, LANES)[row // rows, :, row % rows]
