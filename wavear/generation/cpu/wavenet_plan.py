"""The plan of a network for the CPU engine: its weights packed, and the state of the streams of a group."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
from torch import nn

from wavear.generation.cpu import distributions, simd
from wavear.generation.cpu.packing import LINE, Region, pack, to_numpy, vectors_of
from wavear.generation.cpu.products import (
    KINDS,
    M_ADDRESS,
    M_FIELDS,
    N_CLASSES,
    N_CONDITION_CHANNELS,
    N_CONDITION_PANELS,
    N_CONDITION_VECTORS,
    N_EMBEDDING,
    N_FIELDS,
    N_FIRST,
    N_FUSED,
    N_GATE_VECTORS,
    N_GIVE_WAY,
    N_H,
    N_H_OFFSET,
    N_H_VECTORS,
    N_HEAD,
    N_HEAD1,
    N_HEAD1_BIAS,
    N_HEAD2,
    N_HEAD2_BIAS,
    N_HEAD_ALL,
    N_HEAD_PLACE,
    N_HEAD_SHARE,
    N_HEAD_VECTORS,
    N_LAW,
    N_LOGIT_ALL,
    N_LOGIT_BLOCKS,
    N_LOGIT_PLACE,
    N_LOGIT_ROW,
    N_LOGIT_SHARE,
    N_LOGITS,
    N_MATRICES,
    N_MINE,
    N_MIXTURES,
    N_MULTIPLY,
    N_OFFSETS,
    N_PANELS,
    N_PARTS,
    N_ROWS,
    N_SKIP,
    N_SKIP_ALL,
    N_SKIP_BIAS,
    N_SKIP_PLACE,
    N_SKIP_SHARE,
    N_SKIP_VECTORS,
    N_SPAN,
    N_SPARSE,
    N_STREAMS,
    N_SUMS,
    N_TABLE,
    N_TAPS,
    N_THEIRS,
    N_VALUES,
    N_WEIGHTS,
    N_X,
    N_X_VECTORS,
    N_Z_ROW,
    N_ZEROS,
    products,
)
from wavear.generation.cpu.simd import BLOCK, LANES, TALLEST, VECTOR_BYTES, WIDEST
from wavear.generation.cpu.wavenet_loop import (
    L_AHEAD,
    L_BIAS,
    L_CONDITION,
    L_CONSTANT,
    L_DILATION,
    L_FIELDS,
    L_NOW,
    L_PAST,
    L_RESIDUAL,
    L_RESIDUAL_BIAS,
    L_RING,
    L_SKIP,
    L_SLOTS,
    L_Z,
    kernels,
)
from wavear.models.wavenet import WaveNet

GROUP = 3 * TALLEST  # streams that one thread runs side by side, at most
SIZES = (1, 3, TALLEST, GROUP)  # of groups that `NumbaEngine.resized` packs weights for
AHEAD = 64  # samples that past taps are computed ahead, at most, for one stream
SPAN = 64  # samples that the conditioning is projected ahead, for one stream
TABLE = 4096  # classes up to which the first layer's products with the embedding are tabulated


def put_matrix(region: Region, matrix: np.ndarray, width: int, weights: str) -> list[int]:
    """Put a packed matrix into a region; returns its fields, the address still as an offset (see `packing.pack`)."""
    packed, blocks, vectors = pack(matrix, LANES, width, weights)
    kind = KINDS[weights]
    row = products().row(vectors, kind) if vectors <= WIDEST else 0
    size, step = packed.nbytes // blocks, vectors * LANES * simd.WEIGHT_BYTES[kind]
    return [region.put(packed), matrix.shape[1], blocks, vectors, kind, row, size, step]


class Weights:
    """The packed weights of a model and the plan of its network, shared by all groups of streams.

    With two `parts` (for one stream on two cores) each has half of the outputs of every matrix, but
    all of the residual ones: each core computes the whole input of the next layer, which costs less
    than another exchange.
    """

    def __init__(self, model: WaveNet, group: int, weights: str, part: int = 0, parts: int = 1):
        config = model.config
        self.region = region = Region()
        self.matrices: list[list[int]] = []
        self.weights = weights
        even = weights == "bfloat16"
        residual, skip, head = config.residual_channels, config.skip_channels, config.head_channels
        taps = config.kernel_size
        self.ahead = [_ahead(dilation, group) for dilation in config.dilations]
        self.span = max([power_of_two(SPAN // group), *self.ahead])
        width = width_for(group)
        z_rows = []

        def matrix(array: np.ndarray, rows: int, width: int | None = None) -> int:
            width = width_for(rows) if width is None else width
            self.matrices.append(put_matrix(region, array, width, weights))
            return len(self.matrices) - 1

        def vector(array: np.ndarray, vectors: int, fill: float = 0.0) -> int:
            padded = np.full((*array.shape[:-1], vectors * LANES), fill, np.float32)
            padded[..., : array.shape[-1]] = array
            return region.put(padded)

        def total(outputs: int, rows: int, width: int | None = None) -> int:
            blocks, vectors = vectors_of(
                outputs, LANES, width_for(rows) if width is None else width, even
            )
            return blocks * vectors

        def bounds(outputs: int) -> tuple[int, int]:
            """First and last vector of this part."""
            vectors = -(-outputs // LANES)
            return vectors * part // parts, vectors * (part + 1) // parts

        def share(array: np.ndarray) -> np.ndarray:
            """The outputs of this part."""
            first, last = bounds(len(array))
            return array[first * LANES : last * LANES]

        head_width = 0 if group == 1 else None
        self.part, self.parts = part, parts
        fused = self.fused = group == 1 and parts == 1
        self.sparse = group == 1
        self.tabulated = config.classes <= TABLE

        self.h_vectors = -(-residual // LANES)
        # The input of a layer, and for one stream on one core the sums of the skips behind it.
        self.residual_vectors = -(-residual // LANES)
        self.x_vectors = self.residual_vectors if fused else total(residual, group)
        self.skip_bounds, self.head_bounds, self.logit_bounds = (
            bounds(skip),
            bounds(head),
            bounds(model.law.channels),
        )
        self.gate_first, gate_last = bounds(residual)
        self.gate_vectors = gate_last - self.gate_first
        self.skip_vectors = total(_size(self.skip_bounds), group)
        self.out_vectors = self.x_vectors
        if fused:
            self.out_vectors = max(
                total((self.x_vectors + -(-skip // LANES)) * LANES, 1),
                self.x_vectors + self.skip_vectors,
            )
        self.head_vectors = total(_size(self.head_bounds), group, head_width)
        logits = total(_size(self.logit_bounds), group, head_width)
        self.logit_vectors = -(-logits // (BLOCK // LANES)) * (BLOCK // LANES)
        self.condition_channels = (
            config.conditioning_channels if model.conditioning is not None else 0
        )
        self.condition_vectors = -(-self.condition_channels // LANES)
        gate_rows = 2 * self.gate_vectors * LANES
        z_rows = [
            total(gate_rows, rows)
            for rows in (group, TALLEST, self.span * group, *(a * group for a in self.ahead))
        ]
        self.z_vectors = max(z_rows)

        def gates(array: np.ndarray) -> np.ndarray:
            """Of outputs (2R, ...) this part of both halves, padded to whole vectors."""
            padded = np.zeros((2, self.gate_vectors * LANES, *array.shape[1:]), np.float32)
            for half, outputs in zip(padded, np.split(array, 2), strict=True):
                mine = share(outputs)
                half[: len(mine)] = mine
            return padded.reshape(gate_rows, *array.shape[1:])

        def outwards(block: nn.Module, name: str) -> np.ndarray:
            """Of a layer the weight or bias of the residual, and behind it, if both are one matrix, of the skip.

            (Its bias is added once, in `skip_bias`.)
            """
            residuals = to_numpy(getattr(block.residual, name))
            if not fused:
                return residuals
            skips = share(to_numpy(getattr(block.skip, name)))
            padded = np.zeros(
                (self.residual_vectors * LANES + len(skips), *residuals.shape[1:]), np.float32
            )
            padded[:residual] = residuals
            if name == "weight":
                padded[self.residual_vectors * LANES :] = skips
            return padded

        dilated = [
            to_numpy(block.dilated.weight).reshape(2 * residual, taps, residual)
            for block in model.blocks
        ]
        past, conditions = [], []
        now = []
        # What every sample reads lies together, in the order of reading; what is read seldom
        # follows.
        for block, taps_of in zip(model.blocks, dilated, strict=True):
            table = self.tabulated and not now
            now.append(
                (
                    matrix(gates(taps_of[:, -1]), TALLEST if table else group),
                    -1 if block.residual is None else matrix(outwards(block, "weight"), group),
                    -1
                    if fused and block.residual is not None
                    else matrix(share(to_numpy(block.skip.weight)), group),
                )
            )
        readout: Any = model.head
        self.head1 = matrix(share(to_numpy(readout[1].weight)), group, head_width)
        self.head2 = matrix(share(to_numpy(readout[3].weight)), group, head_width)
        for taps_of, ahead in zip(dilated, self.ahead, strict=True):
            table = self.tabulated and not past
            past.append(
                [
                    matrix(gates(taps_of[:, k]), TALLEST if table else ahead * group)
                    for k in range(taps - 1)
                ]
            )
        for block in model.blocks:
            if block.conditioning is None:
                conditions.append(-1)
            else:
                conditions.append(
                    matrix(gates(to_numpy(block.conditioning.weight)), self.span * group)
                )
        self.biases = [
            vector(gates(to_numpy(block.dilated.bias)), self.z_vectors) for block in model.blocks
        ]
        self.residual_biases = [
            0 if block.residual is None else vector(outwards(block, "bias"), self.out_vectors)
            for block in model.blocks
        ]
        skip_bias: Any = np.sum(
            [to_numpy(block.skip.bias) for block in model.blocks], axis=0, dtype=np.float64
        )
        self.skip_bias = vector(share(skip_bias.astype(np.float32)), self.skip_vectors)
        self.head1_bias = vector(share(to_numpy(readout[1].bias)), self.head_vectors)
        # Outputs beyond the last class are never drawn.
        self.head2_bias = vector(share(to_numpy(readout[3].bias)), self.logit_vectors, fill=-np.inf)
        self.embedding = vector(to_numpy(model.embedding.table()), self.x_vectors)
        widest = max(
            self.z_vectors,
            self.skip_vectors,
            self.head_vectors,
            self.logit_vectors,
            self.out_vectors,
        )
        self.zeros = region.reserve(widest * VECTOR_BYTES)
        entries = taps * (config.classes + 1) if self.tabulated else 0
        self.first_table = region.reserve(entries * self.z_vectors * VECTOR_BYTES)
        panels = region.reserve(TALLEST * self.x_vectors * VECTOR_BYTES)
        base = region.allocate()
        self.table = np.array(self.matrices, dtype=np.int64)
        self.table[:, M_ADDRESS] += base
        self.now, self.past, self.conditions, self.width = now, past, conditions, width
        self.taps, self.dilations = taps, config.dilations
        self.kind, self.mixtures, self.classes = distributions.numbers(model.law)
        self.outputs = model.law.channels
        for tap in range(taps if self.tabulated else 0):
            # The row after the last class stays zero: the past before the first sample.
            number = now[0][0] if tap == taps - 1 else past[0][tap]
            row = self.z_vectors * VECTOR_BYTES
            out = base + self.first_table + tap * (config.classes + 1) * row
            kernels().tabulate(products().multiply, self.table.ctypes.data + 8 * M_FIELDS * number, config.classes,
                               base + self.embedding, self.x_vectors, base + panels, base + self.zeros, out, row, 0, 0)  # fmt: skip  # noqa: E501


def _size(bounds: tuple[int, int]) -> int:
    """Outputs between two vectors."""
    return (bounds[1] - bounds[0]) * LANES


def power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _ahead(dilation: int, group: int) -> int:
    """Samples that the past taps of a layer are computed ahead."""
    return min(dilation, power_of_two(AHEAD * 2 // group) if group > 1 else AHEAD)


def width_for(rows: int) -> int:
    """Vectors in a block of a matrix that is multiplied with `rows` rows at a time."""
    return WIDEST if rows == 1 else 4 if rows < 4 else 2


class Group:
    """The state of some streams that one thread runs side by side, and the plan of the network for them."""

    def __init__(
        self,
        packed: Weights,
        first: int,
        streams: int,
        start_code: int,
        shared: Shared | None = None,
    ):
        region = Region()
        base = packed.region.address
        panels = -(-streams // TALLEST)
        rows = -(-streams // panels)
        padded = panels * rows
        z_row = packed.z_vectors * VECTOR_BYTES
        layers = np.zeros((len(packed.dilations), L_FIELDS), np.int64)
        own = (L_RING, L_Z, L_CONSTANT)
        for i, dilation in enumerate(packed.dilations):
            slots = (packed.taps - 1) * dilation
            layers[i, L_DILATION] = dilation
            layers[i, L_AHEAD] = packed.ahead[i]
            layers[i, L_SLOTS] = slots
            layers[i, L_PAST] = packed.past[i][0]
            layers[i, L_NOW], layers[i, L_RESIDUAL], layers[i, L_SKIP] = packed.now[i]
            layers[i, L_CONDITION] = packed.conditions[i]
            layers[i, L_BIAS] = packed.biases[i] + base
            layers[i, L_RESIDUAL_BIAS] = packed.residual_biases[i] + base
            layers[i, L_RING] = region.reserve(slots * streams * packed.x_vectors * VECTOR_BYTES)
            layers[i, L_Z] = region.reserve(packed.span * streams * z_row)
            layers[i, L_CONSTANT] = region.reserve(streams * z_row)
        net = np.zeros(N_FIELDS, np.int64)
        net[N_TAPS] = packed.taps
        net[N_LAW], net[N_MIXTURES], net[N_CLASSES] = packed.kind, packed.mixtures, packed.classes
        net[N_STREAMS] = streams
        net[N_ROWS] = rows
        net[N_SPAN] = packed.span
        net[N_X_VECTORS] = packed.x_vectors
        net[N_H_VECTORS] = packed.h_vectors
        net[N_SKIP_VECTORS] = packed.skip_vectors
        net[N_HEAD_VECTORS] = packed.head_vectors
        net[N_Z_ROW] = z_row
        net[N_LOGIT_ROW] = packed.logit_vectors * VECTOR_BYTES
        net[N_LOGIT_BLOCKS] = -(-packed.outputs // BLOCK)
        net[N_CONDITION_CHANNELS] = packed.condition_channels
        net[N_CONDITION_VECTORS] = packed.condition_vectors
        net[N_HEAD1], net[N_HEAD2] = packed.head1, packed.head2
        for field, offset in (
            (N_EMBEDDING, packed.embedding),
            (N_HEAD1_BIAS, packed.head1_bias),
            (N_HEAD2_BIAS, packed.head2_bias),
            (N_SKIP_BIAS, packed.skip_bias),
            (N_ZEROS, packed.zeros),
        ):
            net[field] = offset + base
        ahead = -(-max(packed.ahead) * streams // TALLEST) * TALLEST
        span = -(-packed.span * streams // TALLEST) * TALLEST
        vectors = {
            N_X: padded * packed.out_vectors,
            N_H: padded * packed.h_vectors,
            N_SKIP: padded * packed.skip_vectors,
            N_HEAD: padded * packed.head_vectors,
            N_LOGITS: streams * packed.logit_vectors,
            N_WEIGHTS: packed.parts * packed.logit_vectors,
            N_SUMS: 2 * packed.parts * packed.logit_vectors,
            N_PANELS: ahead * packed.x_vectors,
            N_CONDITION_PANELS: span * packed.condition_vectors,
            N_VALUES: packed.parts * (max(packed.skip_vectors, packed.head_vectors) + 1),
            N_OFFSETS: packed.parts * (2 * max(packed.skip_vectors, packed.head_vectors) + 2),
        }
        for field, count in vectors.items():
            net[field] = region.reserve(count * VECTOR_BYTES)
        net[N_FIRST] = first
        net[N_MATRICES] = packed.table.ctypes.data
        net[N_MULTIPLY] = products().multiply
        net[N_SPARSE] = products().sparse if packed.sparse else 0
        net[N_TABLE] = base + packed.first_table if packed.tabulated else 0
        region.allocate()
        layers[:, own] += region.address
        net[list(vectors)] += region.address
        net[N_FUSED] = packed.fused
        if packed.fused:
            net[N_SKIP] = net[N_X] + packed.x_vectors * VECTOR_BYTES
        net[N_PARTS] = packed.parts
        net[N_GATE_VECTORS] = packed.gate_vectors
        net[N_LOGIT_ALL] = net[N_LOGITS]
        if shared:
            shared.plan(net, packed)
        self.net, self.layers, self.region = net, layers, region
        self.packed, self.shared = packed, shared  # the plan holds addresses in them
        self.previous = np.full((streams, packed.taps), packed.classes, np.int64)
        self.previous[:, -1] = start_code


class Shared:
    """What the two cores of one stream write for each other."""

    def __init__(self, model: WaveNet):
        config = model.config
        self.region = region = Region()
        self.flags = [region.reserve(2 * LINE) for _ in range(2)]
        self.h = region.reserve(
            config.layers * -(-config.residual_channels // LANES) * VECTOR_BYTES
        )
        sizes = (config.skip_channels, config.head_channels, model.law.channels)
        padded = [-(-size // BLOCK) * BLOCK * 4 for size in sizes]
        self.all = [region.reserve(size) for size in padded]
        region.allocate()
        region.view(self.all[2], padded[2]).view(np.float32)[:] = -np.inf

    def plan(self, net: np.ndarray, packed: Weights) -> None:
        """Fill in the fields of the exchange."""
        base = self.region.address
        net[N_H] = base + self.h
        net[N_H_OFFSET] = packed.gate_first * VECTOR_BYTES
        net[N_MINE], net[N_THEIRS] = (base + self.flags[p] for p in (packed.part, 1 - packed.part))
        net[N_GIVE_WAY] = _address_of_sleep()
        for fields, whole, (first, last) in zip(
            ((N_SKIP_ALL, N_SKIP_PLACE, N_SKIP_SHARE), (N_HEAD_ALL, N_HEAD_PLACE, N_HEAD_SHARE),
             (N_LOGIT_ALL, N_LOGIT_PLACE, N_LOGIT_SHARE)),
            self.all, (packed.skip_bounds, packed.head_bounds, packed.logit_bounds), strict=True,
        ):  # fmt: skip
            net[list(fields)] = base + whole, base + whole + first * VECTOR_BYTES, last - first


def _address_of_sleep() -> int:
    """Of the C function `usleep`, by which a core that waits in vain leaves its place to the other thread; or 0."""
    if os.name != "posix":
        return 0
    return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0
