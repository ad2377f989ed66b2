"""LLVM IR on generic vector types, and functions for Numba code made of it.

LLVM lowers the same IR to AVX-512, AVX2 or NEON, so nothing here names an instruction set; only the
number of lanes and the size of a register tile follow the machine (`shape_of_machine`). Every
multiply-add is an explicit `llvm.fma`, so no compiler may contract, split or reorder it.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
F64 = ir.DoubleType()


def machine_features() -> tuple[str, dict[str, bool]]:
    """Return the name and features of the processor that Numba compiles for.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES replace those of this machine.
    """
    name = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    if config.CPU_FEATURES is not None:
        parts = [part for part in config.CPU_FEATURES.split(",") if part]
        return name, {part.lstrip("+-"): not part.startswith("-") for part in parts}
    return name, dict(llvmlite.binding.get_host_cpu_features())


def shape_of_machine() -> tuple[int, int]:
    """Return the float32 lanes of a vector, and the number of vector registers.

    (16, 32) with AVX-512, (8, 16) with AVX, (4, 32) on ARM.
    """
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
# Whether there is an instruction for the products of four bytes in each lane.
HAS_DOT = machine_features()[1].get("avx512vnni" if LANES == 16 else "avxvnni", False)


class Emitter:
    """The few IR idioms used below, on vectors of `lanes` floats."""

    def __init__(self, builder: ir.IRBuilder, lanes: int):
        self.b = builder
        self.lanes = lanes
        self.bytes = 4 * lanes
        self.vector = ir.VectorType(F32, lanes)
        self.integers = ir.VectorType(I32, lanes)

    def f32(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.lanes)

    def i32(self, value: int) -> ir.Constant:
        return ir.Constant(self.integers, [value] * self.lanes)

    def i64(self, value):
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def at(self, address, offset, times=1):
        """Return address + offset * times, of numbers or IR values."""
        if isinstance(offset, int) and isinstance(times, int):
            offset, times = offset * times, 1
        offset = self.i64(offset)
        return self.b.add(address, offset if times == 1 else self.b.mul(offset, self.i64(times)))

    def load(self, address, kind=None):
        kind = kind or self.vector
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value, address):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def variable(self, value):
        """Return a variable that starts with a value; LLVM keeps it in a register."""
        variable = self.b.alloca(value.type)
        self.b.store(value, variable)
        return variable

    def splat(self, scalar):
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(self.integers, [0] * self.lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def fma(self, x, y, z):
        name = f"llvm.fma.v{self.lanes}f32"
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(self.vector, [self.vector] * 3), name
        )
        return self.b.call(function, [x, y, z])

    def dot(self, total, unsigned, signed):
        """Add the products of four unsigned bytes with four signed ones to each lane of a total."""
        if HAS_DOT and self.lanes == LANES:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
            function = self.b.module.globals.get(name) or ir.Function(
                self.b.module, ir.FunctionType(self.integers, [self.integers] * 3), name
            )
            return self.b.call(function, [total, unsigned, signed])
        for k in range(4):
            weight = self.b.ashr(self.b.shl(signed, self.i32(24 - 8 * k)), self.i32(24))
            value = self.b.and_(self.b.lshr(unsigned, self.i32(8 * k)), self.i32(255))
            total = self.b.add(total, self.b.mul(value, weight))
        return total

    def halves(self, value, combine):
        """Reduce a vector to a number by halves: a fixed tree."""
        width = value.type.count
        while width > 1:
            width //= 2
            low, high = (
                self.b.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(I32, width), list(range(s, s + width)))
                )
                for s in (0, width)
            )
            value = combine(low, high)
        return self.b.extract_element(value, ir.Constant(I32, 0))

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
        """e^x, relative error below 2e-7 (subnormals: half a step), e^-inf = 0, e^inf = inf.

        x = n ln 2 + r, |r| <= ln(2)/2; e^r by the polynomial of Cephes' expf; 2^n in two factors,
        so that results beyond the range of one exponent field overflow and underflow correctly.
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
        p = self.polynomial(r, _EXP)
        p = self.fma(p, b.fmul(r, r), b.fadd(r, self.f32(1.0)))
        half = b.ashr(integer, self.i32(1))
        for exponent in (half, b.sub(integer, half)):
            bits = b.shl(b.add(exponent, self.i32(127)), self.i32(23))
            p = b.fmul(p, b.bitcast(bits, self.vector))
        return p

    def tanh_ratio(self, x):
        """Numerator and denominator of tanh(x): Eigen's 13/6 rational function, error below 3e-7.

        Both are scaled so that they begin with x and 1: nothing underflows that the result does
        not.
        """
        x = self.clamp(x, -7.90531110763549805, 7.90531110763549805)
        s = self.b.fmul(x, x)
        numerator = self.polynomial(s, [coefficient / _TANH_Q[-1] for coefficient in _TANH_P])
        denominator = self.polynomial(s, [coefficient / _TANH_Q[-1] for coefficient in _TANH_Q])
        return self.b.fmul(x, numerator), denominator

    def sigmoid_denominator(self, x):
        return self.b.fadd(self.f32(1.0), self.exp(self.b.fneg(x)))

    def switch(self, key, cases: dict[int, Callable[[], Any]]):
        """Run the case of a key, or none."""
        done = self.b.append_basic_block("done")
        switch = self.b.switch(key, done)
        for number, emit in cases.items():
            block = self.b.append_basic_block("case")
            switch.add_case(self.i64(number), block)
            with self.b.goto_block(block):
                emit()
                self.b.branch(done)
        self.b.position_at_end(done)

    def loop(self, count, body):
        """`body(i)` for i in [0, count)."""
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(self.i64(0), before)
        b.cbranch(b.icmp_signed("<", i, self.i64(count)), inside, after)
        b.position_at_end(inside)
        body(i)
        following = b.add(i, self.i64(1))
        i.add_incoming(following, b.block)
        # LLVM would unroll what is unrolled already, and take minutes.
        module = b.module
        no_unroll = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
        progress = module.add_metadata([ir.MetaDataString(module, "llvm.loop.mustprogress")])
        identity = module.add_metadata([progress, no_unroll])
        b.branch(head).set_metadata("llvm.loop", identity)
        b.position_at_end(after)


# Highest power first.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
        5.0000001201e-1)  # fmt: skip
_TANH_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
           1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

_IR = {types.void: ir.VoidType(), types.float32: F32, types.float64: F64, types.int64: I64}


def emitted(module, symbol: str, lanes: int, result, arguments, emit) -> ir.Function:
    """Return the function of that name in a module; `emit(emitter, *arguments)` writes it once."""
    found = module.globals.get(symbol)
    if found is not None:
        return found
    kind = ir.FunctionType(_IR[result], [_IR[argument] for argument in arguments])
    function = ir.Function(module, kind, symbol)
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
    name: str, arguments: int, emit, lanes: int = LANES, result: Any = types.void, floats: int = 0
):
    """Return a function for Numba code, emitted once per module and called.

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
    floats : int
        Number of float32 arguments after the integers.
    """
    signature = [types.int64] * arguments + [types.float32] * floats

    def codegen(context, builder, sig, args):
        function = emitted(builder.module, f"wavear_{name}_{lanes}", lanes, result, signature, emit)
        value = builder.call(function, args)
        return context.get_dummy_value() if result is types.void else value

    return _intrinsic(name, result, signature, codegen)


def call(arguments: int):
    """Return a function that calls the C function at an address: `call(address, *arguments)`."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I64] * arguments).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return _intrinsic("call", types.void, [types.int64] * (arguments + 1), codegen)


def _intrinsic(name: str, result, signature, codegen):
    names = ", ".join(f"a{i}" for i in range(len(signature)))
    scope = {"codegen": codegen, "result": result, "signature": signature}
    # Numba reads the number of arguments from the function itself.
    exec(f"def {name}(context, {names}):\n    return result(*signature), codegen", scope)
    return intrinsic(scope[name])
