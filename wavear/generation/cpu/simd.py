"""The vector kernels of the CPU engines, for Numba code; see `emitter`.

**An output element is one chain of fused multiply-adds over its inputs in ascending order**,
whatever the tile that computes it: so the audio of a stream does not depend on its batch. Kernels
take addresses (int64) and strides in bytes.

Panels: activations of several streams that share a weight read lie in *panels*, `[channel
block][row][lane]`: the lanes of one row and one block of channels contiguous, rows `LANES` floats
apart. A tile of `rows` then finds every input at a constant displacement.

Weights: `[block of vectors][input][vector][lane]`. In bfloat16 two vectors share one vector of
32-bit words: the even one in the low half, the odd one in the high half. In int8 each block begins
with the scales of its outputs, in float32: there the chain of an output runs over integers times
inputs, from zero, and one more multiply-add scales it and adds its initial value.

Bytes times bytes (`DOTS`): inputs are integers of 16 bits plus 2^15 (`quantise`), of four the upper
bytes and then the lower ones. A block is `[scales][corrections][four inputs][vector][lane][4]`,
where a correction is -2^7 times the sum of an output's weights. Sums of integers are exact, so they
have the same bits in any order and on every machine; one multiply-add scales and adds as above.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from wavear.generation.cpu.emitter import (
    F32,
    F64,
    I32,
    I64,
    REGISTERS,
    Emitter,
    call,
    emitted,
    kernel,
)  # fmt: skip

# How weights are stored, the name of each, and its bytes.
FLOAT32, BFLOAT16, INT8, DOTS = range(4)
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}
STORED = KINDS | {"dots": DOTS}
WEIGHT_BYTES = (4, 2, 1, 4)  # of an input; in `DOTS` of four

# Blocks of the softmax sums: the same on every machine, so that the sums have the same bits.
BLOCK = 16

# Accumulators of a tile: all registers but two for weights, one for an input, and some to spare.
TALLEST = 12 if REGISTERS == 32 else 4
WIDEST = 12 if REGISTERS == 32 else 8
# vectors -> the numbers of rows that a tile kernel of that width takes
HEIGHTS = (
    {2: (12, 8, 6, 4, 3, 2, 1), 4: (3, 2, 1)} if REGISTERS == 32 else {2: (4, 3, 2, 1), 4: (2, 1)}
)
# The same for `DOTS`, whose blocks are a vector wide: two accumulators for each output.
DOTS_HEIGHTS = HEIGHTS[2]
# Vectors in a block of a matrix for `sparse`.
SPARSE = (8, 4)
_UNROLL = 4  # inputs at once; more, and LLVM runs out of registers: half the speed


def _read_weights(e: Emitter, address, vectors: int, kind: int) -> list:
    """Return the weights of one input."""
    b = e.b
    if kind == FLOAT32:
        return [e.load(e.at(address, j, e.bytes)) for j in range(vectors)]
    if kind == INT8:
        packed = [
            e.load(e.at(address, j, e.lanes), ir.VectorType(ir.IntType(8), e.lanes))
            for j in range(vectors)
        ]
        return [b.sitofp(b.sext(p, e.integers), e.vector) for p in packed]
    pairs = [e.load(e.at(address, j, e.bytes), e.integers) for j in range(vectors // 2)]
    return [
        b.bitcast(word, e.vector)
        for pair in pairs
        for word in (b.shl(pair, e.i32(16)), b.and_(pair, e.i32(0xFFFF0000)))
    ]


class _Chains:
    """The sums of one block of outputs, for some rows; `start(row, vector)` is what each adds to.

    A chain begins with it, or where a scale comes at the end, with zero.
    """

    def __init__(self, e: Emitter, rows: int, vectors: int, kind: int, block, start):
        self.e, self.vectors, self.kind, self.block, self.start = e, vectors, kind, block, start
        headers = {INT8: 1, DOTS: 2}.get(kind, 0)
        self.sums: list[list[Any]] = [
            [e.variable(e.f32(0.0) if headers else start(m, v)) for v in range(vectors)]
            for m in range(0 if kind == DOTS else rows)
        ]
        # Of the upper and of the lower bytes.
        self.halves: list[list[Any]] = [
            [
                (e.variable(e.load(e.at(block, vectors + v, e.bytes), e.integers)),
                 e.variable(e.i32(0)))
                for v in range(vectors)
            ]
            for _ in range(rows if kind == DOTS else 0)
        ]  # fmt: skip
        self.first_weight = e.at(block, headers * vectors * e.bytes)
        self.input_bytes = vectors * e.lanes * WEIGHT_BYTES[kind]

    def add(self, weights, inputs) -> None:
        """Add one input: the address of its weights, and of its value in each row."""
        e = self.e
        if self.kind == DOTS:
            quads = [e.load(e.at(weights, v, e.bytes), e.integers) for v in range(self.vectors)]
            for address, pairs in zip(inputs, self.halves, strict=True):
                values = [e.splat(e.load(e.at(address, 4 * half), I32)) for half in range(2)]
                for quad, pair in zip(quads, pairs, strict=True):
                    for total, value in zip(pair, values, strict=True):
                        e.b.store(e.dot(e.b.load(total), value, quad), total)
            return
        w = _read_weights(e, weights, self.vectors, self.kind)
        for address, chains in zip(inputs, self.sums, strict=True):
            value = e.splat(e.load(address, F32))
            for weight, chain in zip(w, chains, strict=True):
                e.b.store(e.fma(value, weight, e.b.load(chain)), chain)

    def write(self, place) -> None:
        """Store the results at the addresses `place(row, vector)`."""
        e = self.e
        for v in range(self.vectors):
            for m, chains in enumerate(self.halves or self.sums):
                if self.kind == DOTS:
                    upper, lower = (e.b.load(total) for total in chains[v])
                    total = e.b.sitofp(e.b.add(e.b.shl(upper, e.i32(8)), lower), e.vector)
                else:
                    total = e.b.load(chains[v])
                if self.kind in (INT8, DOTS):
                    total = e.fma(total, e.load(e.at(self.block, v, e.bytes)), self.start(m, v))
                e.store(total, place(m, v))


def _tile(rows: int, vectors: int, kind: int):
    """Emit out[row] = init[row] + bias + x[row] @ weights for one block; `out` may be `init`."""

    def emit(e: Emitter, weights, inputs, x, x_block, bias, init, init_row, init_vector, out,
             out_row, out_vector):  # fmt: skip
        b = e.b

        def start(m, v):
            address = e.at(e.at(init, init_row, m), init_vector, v)
            return b.fadd(e.load(address), e.load(e.at(bias, v, e.bytes)))

        chains = _Chains(e, rows, vectors, kind, weights, start)
        pointer, each = e.variable(chains.first_weight), 8 if kind == DOTS else 4

        def several(source, count):
            def body(i):
                address, inputs_from = b.load(pointer), e.at(source, i, each * count)
                for k in range(count):
                    places = [e.at(inputs_from, each * k + m * e.bytes) for m in range(rows)]
                    chains.add(e.at(address, k, chains.input_bytes), places)
                b.store(e.at(address, count, chains.input_bytes), pointer)

            return body

        block, unroll = e.bytes // each, min(_UNROLL, e.bytes // each)
        blocks = b.udiv(inputs, e.i64(block))
        e.loop(
            blocks,
            lambda i: e.loop(block // unroll, several(e.at(x, i, x_block), unroll)),
        )
        left = b.sub(inputs, b.mul(blocks, e.i64(block)))
        e.loop(left, several(e.at(x, blocks, x_block), 1))
        chains.write(lambda m, v: e.at(e.at(out, out_row, m), out_vector, v))

    return emit


def _row(vectors: int, kind: int):
    """Emit out = init + bias + x @ weights for one row and one block, everything contiguous.

    Six arguments fit the registers of a call: one stream makes sixty calls a sample, and with
    strides on the stack each costs as much as a quarter of its work.
    """

    def emit(e: Emitter, weights, inputs, x, bias, init, out):
        def start(_, v):
            return e.b.fadd(e.load(e.at(init, v, e.bytes)), e.load(e.at(bias, v, e.bytes)))

        chains = _Chains(e, 1, vectors, kind, weights, start)
        each = 8 if kind == DOTS else 4

        def several(row, source, count):
            def body(i):
                address = e.at(row, i, count * chains.input_bytes)
                inputs_from = e.at(source, i, each * count)
                for k in range(count):
                    chains.add(e.at(address, k, chains.input_bytes), [e.at(inputs_from, each * k)])

            return body

        e.loop(e.b.udiv(inputs, e.i64(_UNROLL)), several(chains.first_weight, x, _UNROLL))
        done = e.b.and_(inputs, e.i64(-_UNROLL))
        tail = several(e.at(chains.first_weight, done, chains.input_bytes), e.at(x, done, each), 1)
        e.loop(e.b.sub(inputs, done), tail)
        chains.write(lambda _, v: e.at(out, v, e.bytes))

    return emit


def _sparse(vectors: int, kind: int):
    """Emit the product with a vector that is mostly zeros, given by its other entries.

    Arguments: weights, number of entries, their values, the offsets of their rows in bytes, init,
    out. A fused multiply-add of zero changes nothing, so omitting it gives the same result.
    """

    def emit(e: Emitter, weights, entries, values, offsets, init, out):
        chains = _Chains(e, 1, vectors, kind, weights, lambda _, v: e.load(e.at(init, v, e.bytes)))

        def several(begin, count):
            def body(i):
                first = e.at(begin, i, count)
                for k in range(count):
                    position = e.at(first, k)
                    row = e.at(chains.first_weight, e.load(e.at(offsets, position, 8), I64))
                    chains.add(row, [e.at(values, position, 4)])

            return body

        e.loop(e.b.udiv(entries, e.i64(_UNROLL)), several(e.i64(0), _UNROLL))
        done = e.b.and_(entries, e.i64(-_UNROLL))
        e.loop(e.b.sub(entries, done), several(done, 1))
        chains.write(lambda _, v: e.at(out, v, e.bytes))

    return emit


def _variants(e: Emitter, emits: dict[int, tuple[str, Any]], arguments: int) -> dict:
    return {
        key: emitted(
            e.b.module, f"wavear_{name}", e.lanes, types.void, [types.int64] * arguments, emit
        )
        for key, (name, emit) in emits.items()
    }


def _call_variant(e: Emitter, key, functions: dict, arguments) -> None:
    e.switch(key, {k: lambda f=f: e.b.call(f, arguments) for k, f in functions.items()})


def _sparses(e: Emitter, key, *arguments):
    """Call the kernel for `key`: vectors + 256 * kind."""
    emits = {
        vectors + 256 * kind: (f"sparse_{vectors}_{name}", _sparse(vectors, kind))
        for vectors in SPARSE
        for name, kind in KINDS.items()
    }
    _call_variant(e, key, _variants(e, emits, 6), arguments)


def _tiles(e: Emitter, key, *arguments):
    """Call the kernel for `key`: rows + 16 * vectors + 256 * kind."""
    emits = {
        rows + 16 * vectors + 256 * kind: (
            f"tile_{rows}x{vectors}_{name}",
            _tile(rows, vectors, kind),
        )
        for vectors, heights in HEIGHTS.items()
        for rows in heights
        for name, kind in KINDS.items()
    }
    emits |= {
        rows + 16 + 256 * DOTS: (f"tile_{rows}_dots", _tile(rows, 1, DOTS)) for rows in DOTS_HEIGHTS
    }
    _call_variant(e, key, _variants(e, emits, 11), arguments)


def _row_address(e: Emitter, vectors, kind):
    """Return the address of the kernel for one row, a C function; 0 if there is none."""
    emits = {
        width + 256 * stored: (f"row_{width}_{name}", _row(width, stored))
        for width in range(1, WIDEST + 1)
        for name, stored in STORED.items()
        if stored != BFLOAT16 or width % 2 == 0
    }
    result = e.variable(e.i64(0))
    cases = {
        key: lambda f=f: e.b.store(e.b.ptrtoint(f, I64), result)
        for key, f in _variants(e, emits, 6).items()
    }
    e.switch(e.at(vectors, kind, 256), cases)
    return e.b.load(result)


sparse = kernel("sparse", 7, _sparses)
tile = kernel("tile", 12, _tiles)
row_address = kernel("row_address", 2, _row_address, result=types.int64)
call6, call7, call15 = call(6), call(7), call(15)


def _entries(e: Emitter, x, count, row, values, offsets):
    """Gather the entries above zero of a vector (NaN too), with the offsets of rows of `row` bytes.

    Returns their number.
    """
    found = e.variable(e.i64(0))

    def body(i):
        value = e.load(e.at(x, i, 4), F32)
        n = e.b.load(found)
        e.store(value, e.at(values, n, 4))
        e.store(e.b.mul(i, row), e.at(offsets, n, 8))
        keep = e.b.fcmp_unordered(">", value, ir.Constant(F32, 0.0))
        e.b.store(e.b.add(n, e.b.zext(keep, I64)), found)

    e.loop(count, body)
    return e.b.load(found)


def _gate(e: Emitter, filters, gates, out, vectors, out_vector):
    """out = tanh(filters) * sigmoid(gates), one division for both."""

    def body(i):
        numerator, denominator = e.tanh_ratio(e.load(e.at(filters, i, e.bytes)))
        sigmoid = e.sigmoid_denominator(e.load(e.at(gates, i, e.bytes)))
        denominator = e.b.fmul(denominator, sigmoid)
        e.store(e.b.fdiv(numerator, denominator), e.at(out, i, out_vector))

    e.loop(vectors, body)


def _cell(e: Emitter, z, gap, h, vectors, h_vector):
    """h = (1 - u) n + u h of a GRU, where n = tanh(n_x + sigmoid(r) n_h).

    `z` holds n_x, r, u, n_h, `gap` bytes apart. u = 1 / (1 + w) with w = e^-u, and n = p / q, so
    h = (p w + q h) / (q (1 + w)): one division for both. e^60 leaves room for q below 200.
    """
    b = e.b

    def body(i):
        candidate, reset, update, past = (
            e.load(e.at(e.at(z, i, e.bytes), gap, k)) for k in range(4)
        )
        reset = b.fdiv(e.f32(1.0), e.sigmoid_denominator(reset))
        p, q = e.tanh_ratio(e.fma(reset, past, candidate))
        w = e.exp(e.clamp(b.fneg(update), -104.0, 60.0))
        address = e.at(h, i, h_vector)
        numerator = e.fma(p, w, b.fmul(e.load(address), q))
        e.store(b.fdiv(numerator, e.fma(q, w, q)), address)

    e.loop(vectors, body)


def _quantise(e: Emitter, x, x_vector, out, out_vector, vectors, scale):
    """Write x * scale as `DOTS` inputs: rounded to even, clipped to 2^15 - 1; NaN becomes anything.

    Two vectors fill a vector of bytes.
    """
    b, factor = e.b, e.splat(scale)
    pairs = ir.VectorType(ir.IntType(8), 2 * e.lanes)
    order = [8 * (k // 8) + (1 + 2 * (k % 8) if k % 8 < 4 else 2 * (k % 8) - 8)
             for k in range(2 * e.lanes)]  # fmt: skip

    def body(i):
        value = e.clamp(b.fmul(e.load(e.at(x, i, x_vector)), factor), -32767.0, 32767.0)
        # Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        bits = b.bitcast(b.fadd(value, e.f32(12582912.0)), e.integers)
        shorts = b.trunc(b.add(bits, e.i32(32768)), ir.VectorType(ir.IntType(16), e.lanes))
        packed = b.bitcast(shorts, pairs)
        index = ir.Constant(ir.VectorType(I32, len(order)), order)
        place = e.at(e.at(out, b.lshr(i, e.i64(1)), out_vector), b.and_(i, e.i64(1)), 2 * e.lanes)
        e.store(b.shuffle_vector(packed, packed, index), place)

    e.loop(vectors, body)


def _copy(e: Emitter, source, source_vector, out, out_vector, vectors):
    e.loop(vectors, lambda i: e.store(e.load(e.at(source, i, source_vector)),
                                      e.at(out, i, out_vector)))  # fmt: skip


def _pointwise(function):
    """Emit out = function(x)."""

    def emit(e: Emitter, x, out, vectors):
        e.loop(
            vectors,
            lambda i: e.store(function(e, e.load(e.at(x, i, e.bytes))), e.at(out, i, e.bytes)),
        )

    return emit


def _blend(e: Emitter, rows, gap, out, vectors, first, second, third):
    """out = first * rows[0] + second * rows[1] + third * rows[2], the rows `gap` bytes apart."""
    weights = [e.splat(weight) for weight in (first, second, third)]

    def body(i):
        place = e.at(rows, i, e.bytes)
        parts = [e.b.fmul(e.load(e.at(place, gap, k)), w) for k, w in enumerate(weights)]
        e.store(e.b.fadd(e.b.fadd(parts[0], parts[1]), parts[2]), e.at(out, i, e.bytes))

    e.loop(vectors, body)


def _add_scaled(e: Emitter, x, y, vectors, factor):
    """y += factor * x"""
    scale = e.splat(factor)

    def body(i):
        place = e.at(y, i, e.bytes)
        e.store(e.fma(scale, e.load(e.at(x, i, e.bytes)), e.load(place)), place)

    e.loop(vectors, body)


def _add(e: Emitter, x, y, vectors):
    """y += x"""

    def body(i):
        place = e.at(y, i, e.bytes)
        e.store(e.b.fadd(e.load(place), e.load(e.at(x, i, e.bytes))), place)

    e.loop(vectors, body)


entries = kernel("entries", 5, _entries, result=types.int64)
gate = kernel("gate", 5, _gate)
cell = kernel("cell", 5, _cell)
quantise = kernel("quantise", 5, _quantise, floats=1)
copy = kernel("copy", 5, _copy)
add = kernel("add", 3, _add)
blend = kernel("blend", 4, _blend, floats=3)
add_scaled = kernel("add_scaled", 3, _add_scaled, floats=1)
relu = kernel("relu", 3, _pointwise(Emitter.relu))


def _largest(e: Emitter, x, blocks):
    best = e.variable(e.load(x))
    e.loop(
        blocks,
        lambda i: e.b.store(e.maximum(e.b.load(best), e.load(e.at(x, i, 4 * BLOCK))), best),
    )
    return e.halves(e.b.load(best), e.maximum)


def _squares(e: Emitter, x, blocks):
    """Return the sum of the squares of `blocks` times 16 floats: 16 chains, then by halves."""
    total = e.variable(e.f32(0.0))

    def body(i):
        value = e.load(e.at(x, i, 4 * BLOCK))
        e.b.store(e.fma(value, value, e.b.load(total)), total)

    e.loop(blocks, body)
    return e.halves(e.b.load(total), e.b.fadd)


def _exponentials(e: Emitter, logits, blocks, weights, sums, largest, scale):
    """weights = exp((logits - largest) * scale); sums[block] = their float64 sum per block.

    Returns the sum of all.
    """
    total = e.variable(ir.Constant(F64, 0.0))
    shift, factor = e.splat(largest), e.splat(scale)

    def body(i):
        value = e.exp(e.b.fmul(e.b.fsub(e.load(e.at(logits, i, 4 * BLOCK)), shift), factor))
        e.store(value, e.at(weights, i, 4 * BLOCK))
        block = e.halves(e.b.fpext(value, ir.VectorType(F64, BLOCK)), e.b.fadd)
        e.store(block, e.at(sums, i, 8))
        e.b.store(e.b.fadd(e.b.load(total), block), total)

    e.loop(blocks, body)
    return e.b.load(total)


largest = kernel("largest", 2, _largest, lanes=BLOCK, result=types.float32)
squares = kernel("squares", 2, _squares, lanes=BLOCK, result=types.float32)
exponentials = kernel("exponentials", 4, _exponentials, lanes=BLOCK, result=types.float64, floats=2)
load_float = kernel("load_float", 1, lambda e, address: e.load(address, F32), result=types.float32)
load_double = kernel(
    "load_double", 1, lambda e, address: e.load(address, F64), result=types.float64
)
load_int = kernel("load_int", 1, lambda e, address: e.load(address, I64), result=types.int64)
