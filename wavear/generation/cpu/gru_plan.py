"""The plan of a GRU for its compiled loop: packed weights, and the state of some streams."""

from __future__ import annotations

import numpy as np

from wavear.generation.cpu.compiled_engine import geometry, whole_panels
from wavear.generation.cpu.distributions import CATEGORICAL, numbers
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.gru_loop import LAYER, PLAN
from wavear.generation.cpu.packing import (
    SPARSE_WIDTH,
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
from wavear.generation.cpu.wavenet_plan import SPAN, TABLE
from wavear.models.gru import GRU
from wavear.models.inputs import ValueEmbedding


class Weights:
    """The packed weights of a model and its plan, for groups of `group` streams."""

    def __init__(self, model: GRU, group: int, weights: str):
        config = self.config = model.config
        self.packer = packer = Packer(weights)
        hidden, head_channels = config.channels, config.head_channels
        self.plan, self.layers = np.zeros(1, PLAN), np.zeros(config.layers, LAYER)
        net, layers = self.plan[0], self.layers
        self.span = power_of_two(SPAN // group)
        law, mixtures, classes = numbers(model.law)
        tabulated = classes <= TABLE or law != CATEGORICAL
        one, narrow = width_for(group), SPARSE_WIDTH if group == 1 else width_for(group)

        # What a product writes fills whole blocks, which may be more than its outputs.
        h_vectors, head_vectors = vectors_for(hidden), packer.room(head_channels, one)
        logits = packer.room(model.law.channels, narrow)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        x_vectors, gates = vectors_for(config.input_channels), 3 * h_vectors * LANES
        both = head_vectors * LANES + gates
        z_vectors = max(
            head_vectors + h_vectors + packer.room(gates, one),
            *(head_vectors + packer.room(gates, one, kind) for kind in ("float32", "bfloat16")),
            *(packer.room(both, width_for(n), "float32") for n in (group, 64, TALLEST)),
        )

        width = h_vectors * LANES

        def gated(array: np.ndarray, order: str) -> np.ndarray:
            """Return the gates of `order`, each padded to whole vectors, from outputs (3H, ...)."""
            parts = padded(array.reshape(3, hidden, *(more := array.shape[1:])), 3, width, *more)
            return np.concatenate([parts["run".index(name)] for name in order])

        def of(name: str, layer: int) -> np.ndarray:
            return to_numpy(getattr(model.gru, f"{name}_l{layer}"))

        # What every sample reads lies together, in the order of reading; the rest follows.
        entrance = gated(of("weight_ih", 0), "nru")
        for i, layer in enumerate(layers):
            layer["input"] = -1
            if i > 0:
                layer["input"] = packer.matrix(gated(of("weight_ih", i), "nru"), one)
            layer["hidden"] = packer.matrix(gated(of("weight_hh", i), "run"), one)
        first, last = model.head.first, model.head.last
        net["head1"] = packer.matrix(to_numpy(first.weight), one)
        net["head2"] = packer.matrix(to_numpy(last.weight), narrow)
        # The first layer's input matrix is multiplied ahead, with the input and with the
        # conditioning: in float32.
        if not tabulated:
            layers[0]["input"] = packer.matrix(entrance, one, "float32")
        if model.condition_input is not None and model.head.conditioning is not None:
            channels = config.conditioning_channels
            folded = np.zeros((both, channels), np.float32)
            folded[:head_channels] = to_numpy(model.head.conditioning.weight)
            products_of_input = multiplied(to_numpy(model.condition_input.weight).T, entrance)
            folded[head_vectors * LANES :] = products_of_input.T
            layers[0]["condition"] = packer.matrix(folded, width_for(self.span * group), "float32")
            net["condition_vectors"] = vectors_for(channels)
        for i, layer in enumerate(layers):
            x, h = of("bias_ih", i), of("bias_hh", i)
            row = np.zeros(z_vectors * LANES, np.float32)
            row[:head_channels] = to_numpy(first.bias)
            parts = np.concatenate([gated(x, "n"), gated(x + h, "ru"), gated(h, "n")])
            row[head_vectors * LANES :][: len(parts)] = parts
            packer.vector(layer, "bias", row, z_vectors)
        # Outputs beyond the last class are never drawn.
        packer.vector(net, "head2_bias", to_numpy(last.bias), self.logit_vectors, -np.inf)
        packer.space(net, "zeros", z_vectors + self.logit_vectors + x_vectors)
        three = 3 * h_vectors
        if isinstance(model.input, ValueEmbedding):
            # The line through the value as a product of its own, the rest of the input as a table.
            line, coarse = model.input.line, model.input.coarse
            entries, rows = line.bias[None], np.zeros(classes, np.int64)
            if coarse is not None:
                entries = coarse.weight + line.bias
                rows = model.input.coarse_codes.cpu().numpy()
            packer.vector(net, "table", multiplied(to_numpy(entries), entrance), three)
            packer.vector(net, "line", multiplied(to_numpy(line.weight.T), entrance), three)
            packer.point(net, "code_values", packer.put(to_numpy(model.input.values)))
            packer.point(net, "code_rows", packer.put(rows))
        elif tabulated:
            table = multiplied(to_numpy(model.input.table()), entrance)
            packer.vector(net, "table", table, three)
        else:
            packer.vector(net, "embedding", to_numpy(model.input.table()), x_vectors)
        packer.allocate()
        self.matrices = packer.matrices
        sizes = {
            "law": law, "mixtures": mixtures, "classes": classes, "span": self.span,
            "x_vectors": x_vectors, "h_vectors": h_vectors, "head_vectors": head_vectors,
            "z_row": z_vectors * VECTOR_BYTES, "logit_row": self.logit_vectors * VECTOR_BYTES,
            "logit_blocks": -(-classes // BLOCK), "multiply": products().multiply,
            "sparse": products().sparse if group == 1 else 0,
        }  # fmt: skip
        for field, size in sizes.items():
            net[field] = size


class Group:
    """The state of some streams that one thread runs side by side, and their plan."""

    def __init__(self, packed: Weights, first: int, streams: int, start_code: int):
        self.packed = packed  # the plan holds addresses in it
        self.plan, self.layers = packed.plan.copy(), packed.layers.copy()
        self.region = region = Region()
        net = self.net = self.plan[0]
        self.panels, rows = geometry(streams)
        net["first"], net["streams"], net["rows"] = first, streams, rows
        z_vectors = net["z_row"] // VECTOR_BYTES
        for i, layer in enumerate(self.layers):
            region.space(layer, "h", self.panels * rows * net["h_vectors"])
            region.space(layer, "z", (packed.span if i == 0 else 1) * streams * z_vectors)
        region.space(self.layers[0], "constant", streams * z_vectors)
        for field, vectors in {
            "x": self.panels * rows * net["x_vectors"],
            "head": self.panels * rows * net["head_vectors"],
            "logits": streams * packed.logit_vectors,
            "weights": packed.logit_vectors,
            "sums": 2 * packed.logit_vectors,
            "condition_panels": whole_panels(packed.span * streams) * net["condition_vectors"],
            "values": net["head_vectors"] + 1,
            "offsets": 2 * net["head_vectors"] + 2,
        }.items():
            region.space(net, field, vectors)
        region.allocate()
        self.previous = np.full((streams, 1), start_code, np.int64)

    def hidden(self, row: int) -> list[np.ndarray]:
        """Return the hidden units of a stream by layer, (H vectors, lanes), the memory itself."""
        vectors, rows = int(self.net["h_vectors"]), int(self.net["rows"])
        shape = self.panels, vectors, rows, LANES
        panels = [self.region.floats(layer["h"], *shape) for layer in self.layers]
        return [each[row // rows, :, row % rows] for each in panels]

    def copy(self, row: int, other: Group, source: int) -> None:
        """Copy the state of a stream of any group."""
        for mine, theirs in zip(self.hidden(row), other.hidden(source), strict=True):
            mine[:] = theirs
        self.previous[row] = other.previous[source]
