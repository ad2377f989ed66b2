"""The vector kernels: accuracy, one order of summation in every tile, other processors."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba.core import types

from wavear.generation.cpu import emitter, simd
from wavear.generation.cpu.emitter import LANES, VECTOR_BYTES
from wavear.generation.cpu.packing import (
    as_packed,
    pack,
    quantise,
    round_to_bfloat16,
    vectors_of,
)


def _sigmoid(e, x):
    return e.b.fdiv(e.f32(1.0), e.sigmoid_denominator(x))


_exp = emitter.kernel("exp", 3, simd._pointwise(emitter.Emitter.exp))
_tanh = emitter.kernel("tanh", 3, simd._pointwise(lambda e, x: e.b.fdiv(*e.tanh_ratio(x))))
_logistic = emitter.kernel("sigmoid", 3, simd._pointwise(_sigmoid))


@numba.njit
def _functions(x, out, vectors, size):
    _exp(x, out, vectors)
    _tanh(x, out + size, vectors)
    _logistic(x, out + 2 * size, vectors)


def functions(x: np.ndarray) -> np.ndarray:
    """Compute exp, tanh and sigmoid of float32 values with the kernels."""
    padded = np.zeros(-(-x.size // LANES) * LANES, np.float32)
    padded[: x.size] = x
    out = np.empty((3, padded.size), np.float32)
    _functions(padded.ctypes.data, out.ctypes.data, padded.size // LANES, padded.nbytes)
    return out[:, : x.size]


def exact(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.stack([np.exp(wide), np.tanh(wide), 1 / (1 + np.exp(-wide))])


WIDE = np.concatenate(
    [
        np.linspace(-110, 95, 100_003),
        np.linspace(-10, 10, 100_003),
        np.geomspace(1e-45, 3e38, 100_003),
        -np.geomspace(1e-45, 3e38, 100_003),
    ]
).astype(np.float32)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["exp", "tanh", "sigmoid"])
def test_relative_error_over_the_whole_range(number):
    found, expected = functions(WIDE)[number].astype(np.float64), exact(WIDE)[number]
    normal = (np.abs(expected) > 1.2e-38) & (expected < 3.4028235e38)
    relative = np.abs(found / np.where(normal, expected, 1) - 1)[normal]
    # A step of float32 is at most 1.2e-7. tanh is an approximation to 4e-7; the others round
    # three times.
    assert relative.max() < (2.5e-7, 4e-7, 3.5e-7)[number]
    below = np.abs(expected) <= 1.2e-38
    # Subnormal results (for tanh: of subnormal inputs) may be off by two of their steps. The
    # sigmoid is zero or almost zero there, because its reciprocal overflows.
    assert np.abs(found[below] - expected[below]).max() <= (3e-45, 3e-45, 1.2e-38)[number]
    assert (found[expected > 3.41e38] == np.inf).all()


def test_infinities_zero_and_nan():
    found = functions(np.array([-np.inf, np.inf, 0.0, -0.0, np.nan], np.float32))
    np.testing.assert_array_equal(found[0], np.array([0, np.inf, 1, 1, np.nan], np.float32))
    np.testing.assert_allclose(found[1], np.array([-1, 1, 0, -0.0, np.nan], np.float32), rtol=3e-7)
    np.testing.assert_array_equal(found[2], np.array([0, 1, 0.5, 0.5, np.nan], np.float32))


def test_tanh_is_odd_and_both_stay_in_range():
    _, tanh, sigmoid = functions(WIDE)
    assert (functions(-WIDE)[1] == -tanh).all()
    assert np.abs(tanh).max() <= 1
    assert sigmoid.min() >= 0
    assert sigmoid.max() <= 1


@numba.njit
def _tile(key, weights, inputs, x, x_block, bias, zeros, out, row):
    simd.tile(key, weights, inputs, x, x_block, bias, zeros, 0, 0, out, row, VECTOR_BYTES)


@numba.njit
def _row(vectors, kind, weights, inputs, x, bias, init, out):
    simd.call6(simd.row_address(vectors, kind), weights, inputs, x, bias, init, out)


@pytest.mark.parametrize("inputs", [1, 3, LANES, 2 * LANES + 5])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_an_output_has_the_same_bits_in_every_kernel(inputs, weights):
    """The kernels are every tile of rows by vectors, and the kernel of one row."""
    draw = np.random.default_rng(inputs)
    kind, zeros = simd.KINDS[weights], np.zeros(simd.WIDEST * LANES, np.float32)
    even = kind == simd.BFLOAT16
    matrix = as_packed(
        draw.standard_normal((simd.WIDEST * LANES, inputs)).astype(np.float32), weights
    )
    rows = draw.standard_normal((simd.TALLEST, inputs)).astype(np.float32)
    panel = np.zeros((-(-inputs // LANES), simd.TALLEST, LANES), np.float32)
    for k in range(inputs):
        panel[k // LANES, :, k % LANES] = rows[:, k]
    bias = draw.standard_normal(simd.WIDEST * LANES).astype(np.float32)
    expected = rows.astype(np.float64) @ matrix.astype(np.float64).T + bias
    alone = [(1, vectors, False) for vectors in range(1 + even, simd.WIDEST + 1, 1 + even)]
    tiles = [
        (height, vectors, True) for vectors, heights in simd.HEIGHTS.items() for height in heights
    ]
    results: dict[tuple[int, int], set[bytes]] = {}
    for height, vectors, panelled in alone + tiles:
        width = vectors if panelled else simd.WIDEST
        packed, blocks, each = pack(matrix[: vectors * LANES], LANES, width, weights)
        assert (blocks, each) == (1, vectors)
        out = np.empty((height, vectors * LANES), np.float32)
        if panelled:
            _tile(height + 16 * vectors + 256 * kind, packed.ctypes.data, inputs,
                  panel.ctypes.data, panel[0].nbytes, bias.ctypes.data, zeros.ctypes.data,
                  out.ctypes.data, out[0].nbytes)  # fmt: skip
        else:
            _row(vectors, kind, packed.ctypes.data, inputs, rows.ctypes.data, bias.ctypes.data,
                 zeros.ctypes.data, out.ctypes.data)  # fmt: skip
        np.testing.assert_allclose(out, expected[:height, : vectors * LANES], atol=1e-5)
        for r, v in np.ndindex(height, vectors):
            results.setdefault((r, v), set()).add(out[r, v * LANES : (v + 1) * LANES].tobytes())
    assert all(len(found) == 1 for found in results.values())


@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(True, id="instruction"),
        pytest.param(False, id="plain", marks=pytest.mark.slow if emitter.HAS_DOT else ()),
    ],
)
def test_products_of_bytes_are_exact_in_every_kernel(monkeypatch, instruction):
    if instruction and not emitter.HAS_DOT:
        pytest.skip("this processor has no such instruction")
    monkeypatch.setattr(emitter, "HAS_DOT", instruction)

    # Compiled here, for the instruction or without.
    @numba.njit("void(int64,int64,int64,int64)")
    def quantised(x, out, vectors, block):
        simd.quantise(x, VECTOR_BYTES, out, block, vectors, np.float32(1024))

    @numba.njit("void(int64,int64,int64,int64,int64,int64,int64,int64)")
    def row(vectors, kind, weights, inputs, x, bias, init, out):
        simd.call6(simd.row_address(vectors, kind), weights, inputs, x, bias, init, out)

    @numba.njit("void(int64,int64,int64,int64,int64,int64,int64,int64,int64)")
    def tile(key, weights, inputs, x, x_block, bias, zeros, out, row):
        simd.tile(key, weights, inputs, x, x_block, bias, zeros, 0, 0, out, row, VECTOR_BYTES)

    draw = np.random.default_rng(0)
    for vectors, in_vectors in ((1, 1), (3, 2), (simd.WIDEST, 5)):
        inputs = in_vectors * LANES
        matrix = draw.standard_normal((vectors * LANES, inputs)).astype(np.float32)
        rows = draw.normal(0, 9, (simd.TALLEST, inputs)).astype(np.float32)
        rows[:, 0] = np.linspace(-40, 40, simd.TALLEST)  # beyond the largest integer
        rows[:, 1] = 0.5 / 1024, *[1.5 / 1024] * (simd.TALLEST - 1)  # ties go to even
        numbers, scales = quantise(matrix)
        integers = np.clip(np.rint(rows.astype(np.float64) * 1024), -32767, 32767)
        sums = (integers @ numbers.T.astype(np.float64)).astype(np.float32)
        expected = sums * (scales * np.float32(1 / 1024))
        panel = np.zeros((in_vectors, simd.TALLEST, LANES), np.float32)
        flat = np.zeros((simd.TALLEST, in_vectors + 1, LANES), np.float32)
        block, zeros = panel[0].nbytes, np.zeros(simd.WIDEST * LANES, np.float32)
        for r in range(simd.TALLEST):
            quantised(rows[r].ctypes.data, panel[0, r].ctypes.data, in_vectors, block)
            quantised(rows[r].ctypes.data, flat[r].ctypes.data, in_vectors, VECTOR_BYTES)
            packed, blocks, each = pack(matrix, LANES, simd.WIDEST, "dots", scales, 1024)
            assert (blocks, each) == (1, vectors)
            out = np.empty(vectors * LANES, np.float32)
            row(vectors, simd.DOTS, packed.ctypes.data, inputs // 4, flat[r].ctypes.data,
                zeros.ctypes.data, zeros.ctypes.data, out.ctypes.data)  # fmt: skip
            np.testing.assert_array_equal(out, expected[r])
        packed, blocks, each = pack(matrix, LANES, 2, "dots", scales, 1024)
        assert (blocks, each) == (vectors, 1)
        for height in simd.DOTS_HEIGHTS:
            out = np.empty((height, LANES), np.float32)
            for number in range(blocks):
                tile(height + 16 + 256 * simd.DOTS, packed[number].ctypes.data, inputs // 4,
                     panel.ctypes.data, block, zeros.ctypes.data, zeros.ctypes.data,
                     out.ctypes.data, out[0].nbytes)  # fmt: skip
                own = slice(number * LANES, (number + 1) * LANES)
                np.testing.assert_array_equal(out, expected[:height, own])


@numba.njit
def _sparse(key, weights, x, inputs, row, values, offsets, init, out):
    count = simd.entries(x, inputs, row, values, offsets)
    simd.sparse(key, weights, count, values, offsets, init, out)
    return count


@pytest.mark.parametrize("inputs", [1, 6, 37])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_omitting_zeros_changes_no_bit(inputs, weights):
    draw = np.random.default_rng(inputs)
    kind = simd.KINDS[weights]
    for vectors in simd.SPARSE:
        matrix = draw.standard_normal((vectors * LANES, inputs)).astype(np.float32)
        x = draw.standard_normal(inputs).astype(np.float32)
        packed, blocks, width = pack(matrix, LANES, 0, weights)
        assert (blocks, width) == (1, vectors)
        init = draw.standard_normal(vectors * LANES).astype(np.float32)
        found, values, offsets = (
            np.empty_like(init),
            np.empty(inputs + 1, np.float32),
            np.empty(inputs + 1, np.int64),
        )
        row = vectors * LANES * simd.WEIGHT_BYTES[kind]
        count = _sparse(vectors + 256 * kind, packed.ctypes.data, x.ctypes.data, inputs, row,
                        values.ctypes.data, offsets.ctypes.data, init.ctypes.data,
                        found.ctypes.data)  # fmt: skip
        assert count == (x > 0).sum()
        packed, _, _ = pack(matrix, LANES, simd.WIDEST, weights)
        rectified, zeros, dense = np.maximum(x, 0), np.zeros_like(init), np.empty_like(init)
        _row(vectors, kind, packed.ctypes.data, inputs, rectified.ctypes.data, zeros.ctypes.data,
             init.ctypes.data, dense.ctypes.data)  # fmt: skip
        np.testing.assert_array_equal(found, dense)


def test_rounding_to_bfloat16_equals_torch():
    import torch

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(1e3)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8]
    found = (round_to_bfloat16(values) << np.uint32(16)).view(np.float32)
    np.testing.assert_array_equal(found, torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 97, 128, 192, 193, 256, 1024])
@pytest.mark.parametrize("width", [0, 2, 4, 12])
def test_blocks_hold_all_outputs_and_little_more(outputs, width):
    for stored in simd.STORED:
        blocks, each = vectors_of(outputs, 16, width, stored)
        vectors = -(-outputs // 16)
        assert vectors <= blocks * each < vectors + max(2 * blocks, 8 if width == 0 else width)
        assert each <= (width or 8)
        assert not (stored == "bfloat16" and each % 2 and width)


@pytest.mark.parametrize(
    ("triple", "processor", "lanes", "rows", "multiply_add"),
    [
        ("aarch64-linux-gnu", "neoverse-n1", 4, 12, r"fmla\s+v\d+\.4s"),
        ("x86_64-linux-gnu", "haswell", 8, 4, r"vfmadd\d+ps.*%ymm"),
        ("x86_64-linux-gnu", "skylake-avx512", 16, 12, r"vfmadd\d+ps.*%zmm"),
    ],
    ids=["NEON", "AVX2", "AVX-512"],
)
def test_the_same_source_becomes_vector_code_elsewhere(
    triple, processor, lanes, rows, multiply_add
):
    """The inner loop multiplies and adds in registers, without calls or spills."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this LLVM has no such target: {error}")
    module = ir.Module()
    module.triple = triple
    function = emitter.emitted(
        module, "tile", lanes, types.void, [types.int64] * 11, simd._tile(rows, 2, simd.FLOAT32)
    )
    function.linkage = "external"
    machine = target.create_target_machine(cpu=processor, opt=3)
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    assembly = machine.emit_assembly(parsed)
    assert len(re.findall(multiply_add, assembly)) >= 4 * 2 * rows
    assert not re.search(r"\bcall\b|\bbl\b|fmaf", assembly)


def test_every_block_that_packing_makes_has_a_kernel():
    for outputs in range(1, 3000, 7):
        for stored in simd.STORED:
            assert 1 <= vectors_of(outputs, LANES, simd.WIDEST, stored)[1] <= simd.WIDEST
            for width in (2, 4):
                each = vectors_of(outputs, LANES, width, stored)[1]
                assert each in simd.HEIGHTS if stored != "dots" else each == 1
        assert vectors_of(outputs, LANES, 0, "float32")[1] in simd.SPARSE


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (5, 40), (3, 4, 9)])
def test_quantised_rows_are_integers_times_a_scale_within_half_a_step(shape):
    draw = np.random.default_rng(0)
    values = (
        draw.standard_normal(shape) * np.exp(draw.normal(0, 20, shape[:-1]))[..., None]
    ).astype(np.float32)
    numbers, scales = quantise(values)
    assert (numbers == np.rint(numbers)).all()
    assert np.abs(numbers).max(axis=-1).ravel().tolist() == [127] * scales.size
    assert (np.abs(numbers * scales[..., None] - values) <= 0.5001 * scales[..., None]).all()
    np.testing.assert_array_equal(as_packed(values, "int8"), numbers * scales[..., None])


def test_zero_tiny_and_non_finite_rows_keep_their_nature():
    tiny = np.float32(1e-45)
    values = np.array(
        [[0, 0, -0.0], [tiny, -tiny, 0], [2.65e-43, -1e-43, 0], [3.4e38, -1.7e38, 0],
         [np.nan, 1, 2], [1, -np.inf, 2]], np.float32,
    )  # fmt: skip
    numbers = quantise(values)[0]
    assert np.abs(numbers).max() <= 127
    product = as_packed(values, "int8")
    np.testing.assert_array_equal(product[0], [0, 0, 0])
    assert np.abs(product[1:3]).max() <= 1e-42
    np.testing.assert_allclose(product[3], values[3], rtol=0.01)
    assert np.isnan(product[4]).any()
    assert not np.isfinite(product[5]).all()
