"""Vector code for Numba: small kernels emitted as LLVM IR on generic vector types.

LLVM lowers the same IR to AVX-512, AVX2 or NEON, so nothing here names an instruction set; only the
number of lanes and the size of a register tile follow the machine (`shape_of_machine`). Every
multiply-add is an explicit `llvm.fma`, so no compiler may contract, split or reorder it: **an
output element is one chain of fused multiply-adds over its inputs in ascending order**, whatever
the tile that computes it. That is what makes the audio of a stream independent of the batch it
rides in.

Kernels take plain addresses (int64) and strides in bytes.

Panels ------ Activations that several streams share a weight read for lie in *panels*: `[channel
block][row][lane]`, the lanes of one row and one block of channels contiguous, rows `LANES` floats
apart. A tile of `rows` then finds every input at a constant displacement.

Weights ------- `[block of vectors][input][vector][lane]`. In bfloat16 two vectors share one vector
of 32-bit words: the even one in the low half, the odd one in the high half. In int8 each block
begins with the scales of its outputs, in float32: there the chain of an output runs over whole
numbers times inputs, from zero, and one more multiply-add scales it and adds what it starts from.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import math
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_F64 = ir.DoubleType()

# How weights are stored, and the bytes of each.
FLOAT32, BFLOAT16, INT8 = KINDS = range(3)
WEIGHT_BYTES = (4, 2, 1)
_NAMES = ("float32", "bfloat16", "int8")

# Blocks of the softmax sums: the same on every machine, so that the sums have the same bits.
BLOCK = 16


def machine_features() -> tuple[str, dict[str, bool]]:
    """Name and features of the processor that Numba compiles for (it can be told another one by NUMBA_CPU_NAME)."""
    name = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    if config.CPU_FEATURES is not None:
        parts = [part for part in config.CPU_FEATURES.split(",") if part]
        return name, {part.lstrip("+-"): not part.startswith("-") for part in parts}
    return name, dict(llvmlite.binding.get_host_cpu_features())


def shape_of_machine() -> tuple[int, int]:
    """Lanes of float32 in a vector, and vector registers: (16, 32) with AVX-512, (8, 16) with AVX, (4, 32) on ARM."""
    _, features = machine_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx"):
        return 8, 16
    if llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64")):
        return 4, 32
    return 4, 16


LANES, REGISTERS = shape_of_machine()
VECTOR_BYTES = 4 * LANES

# Accumulators of a tile: all registers but two for weights, one for an input, and some to spare.
TALLEST = 12 if REGISTERS == 32 else 4
WIDEST = 12 if REGISTERS == 32 else 8
# rows -> how many rows one tile kernel takes, by the vectors it is wide
HEIGHTS = (
    {2: (12, 8, 6, 4, 3, 2, 1), 4: (3, 2, 1)} if REGISTERS == 32 else {2: (4, 3, 2, 1), 4: (2, 1)}
)
# Vectors in a block of a matrix for `sparse`.
SPARSE = (8, 4)


class Emitter:
    """The few IR idioms used below, on vectors of `lanes` floats."""

    def __init__(self, builder: ir.IRBuilder, lanes: int):
        self.b = builder
        self.lanes = lanes
        self.bytes = 4 * lanes
        self.vector = ir.VectorType(_F32, lanes)
        self.integers = ir.VectorType(_I32, lanes)

    def f32(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.lanes)

    def i32(self, value: int) -> ir.Constant:
        return ir.Constant(self.integers, [value] * self.lanes)

    def at(self, address, offset):
        if isinstance(offset, int):
            offset = ir.Constant(_I64, offset)
        return self.b.add(address, offset)

    def load(self, address, kind=None):
        kind = kind or self.vector
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value, address):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def splat(self, scalar, lanes=None):
        lanes = lanes or self.lanes
        kind = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def fma(self, x, y, z):
        return self.b.call(
            declare(self.b.module, f"llvm.fma.v{self.lanes}f32", self.vector, [self.vector] * 3),
            [x, y, z],
        )

    def polynomial(self, x, coefficients):
        """Horner, highest power first."""
        result = self.f32(coefficients[0])
        for coefficient in coefficients[1:]:
            result = self.fma(result, x, self.f32(coefficient))
        return result

    def clamp(self, x, low: float, high: float):
        """Comparisons are false for NaN, which therefore passes."""
        x = self.b.select(self.b.fcmp_ordered("<", x, self.f32(low)), self.f32(low), x)
        return self.b.select(self.b.fcmp_ordered(">", x, self.f32(high)), self.f32(high), x)

    def maximum(self, x, y):
        return self.b.select(self.b.fcmp_ordered("<", x, y), y, x)

    def relu(self, x):
        return self.b.select(self.b.fcmp_ordered("<", x, self.f32(0.0)), self.f32(0.0), x)

    def exp(self, x):
        """e^x, relative error below 2e-7 (subnormal results included: half a step), e^-inf = 0, e^inf = inf.

        x = n ln 2 + r, |r| <= ln(2)/2; e^r by the polynomial of Cephes' expf; 2^n in two factors,
        so that results beyond the range of one exponent field overflow and underflow as they
        should.
        """
        b = self.b
        # e^-104 rounds to zero, e^89 overflows.
        x = self.clamp(x, -104.0, 89.0)
        # Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        magic = 12582912.0
        shifted = self.fma(x, self.f32(math.log2(math.e)), self.f32(magic))
        n = b.fsub(shifted, self.f32(magic))
        integer = b.sub(b.bitcast(shifted, self.integers), self.i32(0x4B400000))
        # ln 2 in two parts: the first has 9 bits, so that n times it is exact.
        r = self.fma(n, self.f32(-0.693359375), x)
        r = self.fma(n, self.f32(2.12194440e-4), r)
        p = self.polynomial(
            r,
            [
                1.9875691500e-4,
                1.3981999507e-3,
                8.3334519073e-3,
                4.1665795894e-2,
                1.6666665459e-1,
                5.0000001201e-1,
            ],
        )
        p = self.fma(p, b.fmul(r, r), b.fadd(r, self.f32(1.0)))
        half = b.ashr(integer, self.i32(1))
        for exponent in (half, b.sub(integer, half)):
            p = b.fmul(
                p, b.bitcast(b.shl(b.add(exponent, self.i32(127)), self.i32(23)), self.vector)
            )
        return p

    def tanh_ratio(self, x):
        """Numerator and denominator of tanh(x): the 13/6 rational approximation used by Eigen, error below 3e-7.

        Both are scaled so that they begin with x and 1, and nothing underflows that the result does
        not.
        """
        x = self.clamp(x, -7.90531110763549805, 7.90531110763549805)
        s = self.b.fmul(x, x)
        p = [
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-08,
            1.48572235717979e-05,
            6.37261928875436e-04,
            4.89352455891786e-03,
        ]
        q = [1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03]
        numerator = self.polynomial(s, [coefficient / q[-1] for coefficient in p])
        return self.b.fmul(x, numerator), self.polynomial(
            s, [coefficient / q[-1] for coefficient in q]
        )

    def sigmoid_denominator(self, x):
        return self.b.fadd(self.f32(1.0), self.exp(self.b.fneg(x)))

    def loop(self, count, body):
        """`body(i)` for i in [0, count)."""
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(_I64)
        i.add_incoming(ir.Constant(_I64, 0), before)
        b.cbranch(b.icmp_signed("<", i, count), inside, after)
        b.position_at_end(inside)
        body(i)
        following = b.add(i, ir.Constant(_I64, 1))
        i.add_incoming(following, b.block)
        # LLVM would unroll what is unrolled already, and take minutes.
        module = b.module
        own = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
        vectorize = module.add_metadata([ir.MetaDataString(module, "llvm.loop.mustprogress")])
        identity = module.add_metadata([vectorize, own])
        b.branch(head).set_metadata("llvm.loop", identity)
        b.position_at_end(after)


def declare(module, name, result, arguments):
    """The function of that name in the module, declared if it is not there."""
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, arguments), name)


_KINDS = {types.void: ir.VoidType(), types.float32: _F32, types.float64: _F64, types.int64: _I64}


def emitted(module, symbol: str, lanes: int, result, arguments, emit) -> ir.Function:
    """The function of that name in the module; `emit(emitter, *arguments)` writes its body the first time."""
    found = module.globals.get(symbol)
    if found is not None:
        return found
    function = ir.Function(
        module, ir.FunctionType(_KINDS[result], [_KINDS[kind] for kind in arguments]), symbol
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = emit(Emitter(builder, lanes), *function.args)
    if value is None:
        builder.ret_void()
    else:
        builder.ret(value)
    return function


def kernel(
    name: str, arguments: int, emit, lanes: int | None = None, result: Any = types.void, floats=()
):
    """A function for Numba code, emitted once per module and called.

    Parameters
    ----------
    name : str
        Unique; becomes part of the symbol.
    arguments : int
        Number of int64 arguments (addresses, counts, strides in bytes).
    emit : callable
        `emit(emitter, *arguments)`, returns the result or None.
    result : numba type
        int64, float32, float64 or void.
    floats : tuple of numba types
        Floating-point arguments after the integers.
    """
    lanes = lanes or LANES
    signature = [types.int64] * arguments + list(floats)

    def codegen(context, builder, sig, args):
        function = emitted(builder.module, f"wavear_{name}_{lanes}", lanes, result, signature, emit)
        value = builder.call(function, args)
        return context.get_dummy_value() if result is types.void else value

    names = ", ".join(f"a{i}" for i in range(len(signature)))
    scope = {"codegen": codegen, "result": result, "signature": signature}
    # Numba reads the number of arguments from the function itself.
    exec(f"def {name}(context, {names}):\n    return result(*signature), codegen", scope)
    return intrinsic(scope[name])


def _read_weights(e: Emitter, address, vectors: int, kind: int) -> list:
    """The weights of one input."""
    b = e.b
    if kind == FLOAT32:
        return [e.load(e.at(address, j * e.bytes)) for j in range(vectors)]
    if kind == INT8:
        bytes_of_vector = ir.VectorType(ir.IntType(8), e.lanes)
        packed = [e.load(e.at(address, j * e.lanes), bytes_of_vector) for j in range(vectors)]
        return [b.sitofp(b.sext(p, e.integers), e.vector) for p in packed]
    w = []
    for j in range(vectors // 2):
        pair = e.load(e.at(address, j * e.bytes), e.integers)
        w.append(b.bitcast(b.shl(pair, e.i32(16)), e.vector))
        w.append(b.bitcast(b.and_(pair, e.i32(0xFFFF0000)), e.vector))
    return w


def _begin(e: Emitter, kind: int, start, *place: int):
    """A new chain, that begins with `start(*place)`; where a scale comes at the end, with zero."""
    chain = e.b.alloca(e.vector)
    e.b.store(e.f32(0.0) if kind == INT8 else start(*place), chain)
    return chain


def _end(e: Emitter, kind: int, chain, scales, start, *place: int):
    """The value of a chain of that place, the last number of which is the vector in a block with these scales."""
    total = e.b.load(chain)
    if kind != INT8:
        return total
    return e.fma(total, e.load(e.at(scales, place[-1] * e.bytes)), start(*place))


def _first_weight(e: Emitter, block, vectors: int, kind: int):
    """The address of a block's weights, behind its scales if it has any."""
    return e.at(block, vectors * e.bytes) if kind == INT8 else block


def _tile(rows: int, vectors: int, kind: int):
    """Emits out[row] = init[row] + bias + sum over inputs of x[row, input] * weights[input], for one tile of outputs.

    Arguments: weights, inputs, x, block stride of x, bias, init, row and vector stride of init,
    out, row and vector stride of out. `out` may be `init`.
    """

    def emit(
        e: Emitter,
        weights,
        inputs,
        x,
        x_block,
        bias,
        init,
        init_row,
        init_vector,
        out,
        out_row,
        out_vector,
    ):
        b = e.b

        def start(m, v):
            row, vector = (
                b.mul(init_row, ir.Constant(_I64, m)),
                b.mul(init_vector, ir.Constant(_I64, v)),
            )
            return b.fadd(e.load(e.at(init, b.add(row, vector))), e.load(e.at(bias, v * e.bytes)))

        sums = [[_begin(e, kind, start, m, v) for v in range(vectors)] for m in range(rows)]
        pointer = b.alloca(_I64)
        b.store(_first_weight(e, weights, vectors, kind), pointer)
        step = vectors * e.lanes * WEIGHT_BYTES[kind]

        def one(address, source, position):
            """One input: `position` counts from `source` in floats and is a constant."""
            w = _read_weights(e, address, vectors, kind)
            for m in range(rows):
                value = e.splat(e.load(e.at(source, 4 * (position + m * e.lanes)), _F32))
                for v in range(vectors):
                    b.store(e.fma(value, w[v], b.load(sums[m][v])), sums[m][v])

        def several(source, count):
            def body(i):
                address = b.load(pointer)
                inputs_from = b.add(source, b.mul(i, ir.Constant(_I64, 4 * count)))
                for k in range(count):
                    one(e.at(address, k * step), inputs_from, k)
                b.store(e.at(address, count * step), pointer)

            return body

        unroll = 4  # more, and LLVM runs out of registers: half the speed
        blocks = b.udiv(inputs, ir.Constant(_I64, e.lanes))
        e.loop(
            blocks,
            lambda i: e.loop(
                ir.Constant(_I64, e.lanes // unroll), several(b.add(x, b.mul(i, x_block)), unroll)
            ),
        )
        done = b.mul(blocks, ir.Constant(_I64, e.lanes))
        tail = b.add(x, b.mul(blocks, x_block))
        e.loop(b.sub(inputs, done), several(tail, 1))
        for v in range(vectors):
            for m in range(rows):
                address = e.at(
                    out,
                    b.add(
                        b.mul(out_row, ir.Constant(_I64, m)),
                        b.mul(out_vector, ir.Constant(_I64, v)),
                    ),
                )
                e.store(_end(e, kind, sums[m][v], weights, start, m, v), address)

    return emit


def _sparse(vectors: int, kind: int):
    """Emits the product with a vector that is mostly zeros, given by its other entries.

    Arguments: weights, number of entries, values, offsets of their rows in bytes, init, out. A
    fused multiply-add of zero changes nothing, so leaving it out gives the same result.
    """

    def emit(e: Emitter, weights, entries, values, offsets, init, out):
        b = e.b

        def start(v):
            return e.load(e.at(init, v * e.bytes))

        sums = [_begin(e, kind, start, v) for v in range(vectors)]
        first_weight = _first_weight(e, weights, vectors, kind)

        def several(begin, count):
            def body(i):
                first = b.add(begin, b.mul(i, ir.Constant(_I64, count)))
                for k in range(count):
                    position = e.at(first, k)
                    row = b.add(
                        first_weight,
                        e.load(b.add(offsets, b.mul(position, ir.Constant(_I64, 8))), _I64),
                    )
                    value = e.splat(
                        e.load(b.add(values, b.mul(position, ir.Constant(_I64, 4))), _F32)
                    )
                    for v, w in enumerate(_read_weights(e, row, vectors, kind)):
                        b.store(e.fma(value, w, b.load(sums[v])), sums[v])

            return body

        e.loop(b.udiv(entries, ir.Constant(_I64, 4)), several(ir.Constant(_I64, 0), 4))
        done = b.and_(entries, ir.Constant(_I64, ~3))
        e.loop(b.sub(entries, done), several(done, 1))
        for v in range(vectors):
            e.store(_end(e, kind, sums[v], weights, start, v), e.at(out, v * e.bytes))

    return emit


def _sparses(e: Emitter, key, *arguments):
    """Calls the kernel for `key`: vectors + 256 * kind."""
    b = e.b
    done = b.append_basic_block("done")
    switch = b.switch(key, done)
    for vectors in SPARSE:
        for kind in KINDS:
            name = f"wavear_sparse_{vectors}_{_NAMES[kind]}"
            function = emitted(
                b.module, name, LANES, types.void, [types.int64] * 6, _sparse(vectors, kind)
            )
            block = b.append_basic_block(name)
            switch.add_case(ir.Constant(_I64, vectors + 256 * kind), block)
            with b.goto_block(block):
                b.call(function, arguments)
                b.branch(done)
    b.position_at_end(done)


sparse = kernel("sparse", 7, _sparses)


def _entries(e: Emitter, x, count, row, values, offsets):
    """The entries above zero of a vector (NaN too), with the offsets of rows of `row` bytes; returns their number."""
    b = e.b
    found = b.alloca(_I64)
    b.store(ir.Constant(_I64, 0), found)

    def body(i):
        value = e.load(b.add(x, b.mul(i, ir.Constant(_I64, 4))), _F32)
        n = b.load(found)
        e.store(value, b.add(values, b.mul(n, ir.Constant(_I64, 4))))
        e.store(b.mul(i, row), b.add(offsets, b.mul(n, ir.Constant(_I64, 8))))
        keep = b.fcmp_unordered(">", value, ir.Constant(_F32, 0.0))
        b.store(b.add(n, b.zext(keep, _I64)), found)

    e.loop(count, body)
    return b.load(found)


entries = kernel("entries", 5, _entries, result=types.int64)


def _row(vectors: int, kind: int):
    """Emits out = init + bias + x @ weights for one row and one block, everything contiguous; out may be init.

    Arguments: weights, inputs, x, bias, init, out. Six fit the registers of a call: one stream
    makes sixty calls a sample, and with strides on the stack each costs as much as a quarter of its
    work.
    """

    def emit(e: Emitter, weights, inputs, x, bias, init, out):
        b = e.b

        def start(v):
            return b.fadd(e.load(e.at(init, v * e.bytes)), e.load(e.at(bias, v * e.bytes)))

        sums = [_begin(e, kind, start, v) for v in range(vectors)]
        first_weight = _first_weight(e, weights, vectors, kind)
        step = vectors * e.lanes * WEIGHT_BYTES[kind]

        def several(row, source, count):
            def body(i):
                address = b.add(row, b.mul(i, ir.Constant(_I64, count * step)))
                inputs_from = b.add(source, b.mul(i, ir.Constant(_I64, 4 * count)))
                for k in range(count):
                    value = e.splat(e.load(e.at(inputs_from, 4 * k), _F32))
                    for v, w in enumerate(_read_weights(e, e.at(address, k * step), vectors, kind)):
                        b.store(e.fma(value, w, b.load(sums[v])), sums[v])

            return body

        e.loop(b.udiv(inputs, ir.Constant(_I64, 4)), several(first_weight, x, 4))
        done = b.and_(inputs, ir.Constant(_I64, ~3))
        tail = several(
            b.add(first_weight, b.mul(done, ir.Constant(_I64, step))),
            b.add(x, b.mul(done, ir.Constant(_I64, 4))),
            1,
        )
        e.loop(b.sub(inputs, done), tail)
        for v in range(vectors):
            e.store(_end(e, kind, sums[v], weights, start, v), e.at(out, v * e.bytes))

    return emit


def _row_address(e: Emitter, vectors, kind):
    """The address of the kernel for one row, a C function."""
    b = e.b
    result = b.alloca(_I64)
    b.store(ir.Constant(_I64, 0), result)
    done = b.append_basic_block("done")
    switch = b.switch(b.add(vectors, b.mul(kind, ir.Constant(_I64, 256))), done)
    for width in range(1, WIDEST + 1):
        for stored in KINDS:
            if stored == BFLOAT16 and width % 2:
                continue
            name = f"wavear_row_{width}_{_NAMES[stored]}"
            function = emitted(
                b.module, name, e.lanes, types.void, [types.int64] * 6, _row(width, stored)
            )
            block = b.append_basic_block(name)
            switch.add_case(ir.Constant(_I64, width + 256 * stored), block)
            with b.goto_block(block):
                b.store(b.ptrtoint(function, _I64), result)
                b.branch(done)
    b.position_at_end(done)
    return b.load(result)


row_address = kernel("row_address", 2, _row_address, result=types.int64)


def _tiles(e: Emitter, key, *arguments):
    """Calls the kernel that `key` names: rows + 16 * vectors + 256 * kind."""
    b = e.b
    done = b.append_basic_block("done")
    switch = b.switch(key, done)
    for vectors, heights in HEIGHTS.items():
        for rows in heights:
            for kind in KINDS:
                name = f"wavear_tile_{rows}x{vectors}_{_NAMES[kind]}"
                function = emitted(
                    b.module,
                    name,
                    LANES,
                    types.void,
                    [types.int64] * 11,
                    _tile(rows, vectors, kind),
                )
                block = b.append_basic_block(name)
                switch.add_case(ir.Constant(_I64, rows + 16 * vectors + 256 * kind), block)
                with b.goto_block(block):
                    b.call(function, arguments)
                    b.branch(done)
    b.position_at_end(done)


tile = kernel("tile", 12, _tiles)


def _gate(e: Emitter, filters, gates, out, vectors, out_vector):
    """out = tanh(filters) * sigmoid(gates), one division for both."""

    def body(i):
        offset = e.b.mul(i, ir.Constant(_I64, e.bytes))
        numerator, denominator = e.tanh_ratio(e.load(e.at(filters, offset)))
        denominator = e.b.fmul(denominator, e.sigmoid_denominator(e.load(e.at(gates, offset))))
        e.store(e.b.fdiv(numerator, denominator), e.at(out, e.b.mul(i, out_vector)))

    e.loop(vectors, body)


gate = kernel("gate", 5, _gate)


def _cell(e: Emitter, z, gap, h, vectors, h_vector):
    """h = (1 - u) n + u h of a GRU, where n = tanh(n_x + sigmoid(r) n_h); `z` holds n_x, r, u, n_h, `gap` bytes apart.

    u = 1 / (1 + w) with w = e^-u, and n = p / q, so h = (p w + q h) / (q (1 + w)): one division for
    both. e^60 leaves room for q below 200.
    """
    b = e.b

    def body(i):
        offset = b.mul(i, ir.Constant(_I64, e.bytes))
        parts = [e.load(e.at(z, b.add(offset, b.mul(gap, ir.Constant(_I64, k))))) for k in range(4)]
        candidate, reset, update, past = parts
        reset = b.fdiv(e.f32(1.0), e.sigmoid_denominator(reset))
        p, q = e.tanh_ratio(e.fma(reset, past, candidate))
        w = e.exp(e.clamp(b.fneg(update), -104.0, 60.0))
        address = e.at(h, b.mul(i, h_vector))
        numerator = e.fma(p, w, b.fmul(e.load(address), q))
        e.store(b.fdiv(numerator, e.fma(q, w, q)), address)

    e.loop(vectors, body)


cell = kernel("cell", 5, _cell)


def _pointwise(function):
    def emit(e: Emitter, x, out, vectors):
        def body(i):
            offset = e.b.mul(i, ir.Constant(_I64, e.bytes))
            e.store(function(e, e.load(e.at(x, offset))), e.at(out, offset))

        e.loop(vectors, body)

    return emit


exp = kernel("exp", 3, _pointwise(Emitter.exp))
tanh = kernel("tanh", 3, _pointwise(lambda e, x: e.b.fdiv(*e.tanh_ratio(x))))
sigmoid = kernel(
    "sigmoid", 3, _pointwise(lambda e, x: e.b.fdiv(e.f32(1.0), e.sigmoid_denominator(x)))
)
relu = kernel("relu", 3, _pointwise(Emitter.relu))


def _copy(e: Emitter, source, source_vector, out, out_vector, vectors):
    e.loop(
        vectors,
        lambda i: e.store(
            e.load(e.at(source, e.b.mul(i, source_vector))), e.at(out, e.b.mul(i, out_vector))
        ),
    )


copy = kernel("copy", 5, _copy)


def _add(e: Emitter, x, y, vectors):
    """y += x"""

    def body(i):
        offset = e.b.mul(i, ir.Constant(_I64, e.bytes))
        e.store(e.b.fadd(e.load(e.at(y, offset)), e.load(e.at(x, offset))), e.at(y, offset))

    e.loop(vectors, body)


add = kernel("add", 3, _add)


def _add_scaled(e: Emitter, x, y, vectors, factor):
    """y += factor * x"""
    scale = e.splat(factor)

    def body(i):
        offset = e.b.mul(i, ir.Constant(_I64, e.bytes))
        e.store(e.fma(scale, e.load(e.at(x, offset)), e.load(e.at(y, offset))), e.at(y, offset))

    e.loop(vectors, body)


add_scaled = kernel("add_scaled", 3, _add_scaled, floats=(types.float32,))


def _halves(e: Emitter, value, combine):
    """Reduce a vector by halves: a fixed tree."""
    width = value.type.count
    while width > 1:
        width //= 2
        parts = [
            e.b.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(_I32, width), list(range(s, s + width)))
            )
            for s in (0, width)
        ]
        value = combine(*parts)
    return e.b.extract_element(value, ir.Constant(_I32, 0))


def _largest(e: Emitter, x, blocks):
    best = e.b.alloca(e.vector)
    e.b.store(e.load(x), best)

    def body(i):
        value = e.load(e.at(x, e.b.mul(i, ir.Constant(_I64, 4 * BLOCK))))
        e.b.store(e.maximum(e.b.load(best), value), best)

    e.loop(blocks, body)
    return _halves(e, e.b.load(best), e.maximum)


largest = kernel("largest", 2, _largest, lanes=BLOCK, result=types.float32)


def _exponentials(e: Emitter, logits, blocks, weights, sums, largest, scale):
    """weights = exp((logits - largest) * scale); sums[block] = their float64 sum per block; returns the total."""
    total = e.b.alloca(_F64)
    e.b.store(ir.Constant(_F64, 0.0), total)
    shift, factor = e.splat(largest), e.splat(scale)

    def body(i):
        offset = e.b.mul(i, ir.Constant(_I64, 4 * BLOCK))
        value = e.exp(e.b.fmul(e.b.fsub(e.load(e.at(logits, offset)), shift), factor))
        e.store(value, e.at(weights, offset))
        wide = e.b.fpext(value, ir.VectorType(_F64, BLOCK))
        block = _halves(e, wide, e.b.fadd)
        e.store(block, e.at(sums, e.b.mul(i, ir.Constant(_I64, 8))))
        e.b.store(e.b.fadd(e.b.load(total), block), total)

    e.loop(blocks, body)
    return e.b.load(total)


exponentials = kernel(
    "exponentials",
    4,
    _exponentials,
    lanes=BLOCK,
    result=types.float64,
    floats=(types.float32, types.float32),
)

load_float = kernel("load_float", 1, lambda e, address: e.load(address, _F32), result=types.float32)
load_double = kernel(
    "load_double", 1, lambda e, address: e.load(address, _F64), result=types.float64
)
load_int = kernel("load_int", 1, lambda e, address: e.load(address, _I64), result=types.int64)


def _call(arguments: int):
    """An intrinsic that calls the C function at an address: `call(address, *arguments)`, all int64."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64] * arguments).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    names = ", ".join(f"a{i}" for i in range(arguments + 1))
    scope = {"codegen": codegen, "signature": types.void(*[types.int64] * (arguments + 1))}
    exec(f"def call(context, {names}):\n    return signature, codegen", scope)
    return intrinsic(scope["call"])


call15 = _call(15)
call6 = _call(6)
call7 = _call(7)


def _publish(e: Emitter, flag, value):
    """Everything written before is seen by whoever sees the flag."""
    e.b.store_atomic(value, e.b.inttoptr(flag, _I64.as_pointer()), "release", 8)


def _wait(e: Emitter, flag, value, give_way):
    """Spin until the flag is at least `value`; at times sleep by the C function at `give_way`."""
    b = e.b
    before = b.block
    spin, late, call, after = (
        b.append_basic_block(name) for name in ("spin", "late", "call", "after")
    )
    b.branch(spin)
    b.position_at_end(spin)
    turns = b.phi(_I64)
    turns.add_incoming(ir.Constant(_I64, 1), before)
    seen = b.load_atomic(b.inttoptr(flag, _I64.as_pointer()), "acquire", 8)
    b.cbranch(b.icmp_signed(">=", seen, value), after, late)
    b.position_at_end(late)
    following = b.add(turns, ir.Constant(_I64, 1))
    turns.add_incoming(following, late)
    tired = b.icmp_signed("==", b.and_(turns, ir.Constant(_I64, 16383)), ir.Constant(_I64, 0))
    able = b.icmp_signed("!=", give_way, ir.Constant(_I64, 0))
    b.cbranch(b.and_(tired, able), call, spin)
    b.position_at_end(call)
    turns.add_incoming(following, call)
    b.call(
        b.inttoptr(give_way, ir.FunctionType(_I32, [_I32]).as_pointer()), [ir.Constant(_I32, 50)]
    )
    b.branch(spin)
    b.position_at_end(after)


publish = kernel("publish", 2, _publish)
wait = kernel("wait", 3, _wait)


def _read(e: Emitter, address, lines):
    """Read `lines` times eight vectors, one multiply-add for each; returns something that depends on all of them."""
    sums = [e.b.alloca(e.vector) for _ in range(8)]
    for total in sums:
        e.b.store(e.f32(0.0), total)

    def body(i):
        start = e.b.add(address, e.b.mul(i, ir.Constant(_I64, 8 * e.bytes)))
        for j, total in enumerate(sums):
            e.b.store(e.fma(e.load(e.at(start, j * e.bytes)), e.f32(1.0), e.b.load(total)), total)

    e.loop(lines, body)
    return _halves(e, functools.reduce(e.b.fadd, [e.b.load(total) for total in sums]), e.b.fadd)


def _multiply_adds(e: Emitter, turns):
    """Twelve independent chains of `turns` multiply-adds in registers."""
    chains = [e.b.alloca(e.vector) for _ in range(12)]
    for j, chain in enumerate(chains):
        e.b.store(e.f32(float(j)), chain)

    def body(i):
        for chain in chains:
            e.b.store(e.fma(e.b.load(chain), e.f32(0.999), e.f32(0.5)), chain)

    e.loop(turns, body)
    return _halves(e, functools.reduce(e.b.fadd, [e.b.load(chain) for chain in chains]), e.b.fadd)


read = kernel("read", 2, _read, result=types.float32)
multiply_adds = kernel("multiply_adds", 1, _multiply_adds, result=types.float32)
