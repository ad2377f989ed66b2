"""Gated layers of a predictive WaveNet, compiled, for training on the CPU in bfloat16 or float32.

torch makes a pass over memory for each operation between two matrix products, and gathers a row at
a time. Here a gate is one pass forward and one back, and so is gathering the taps of a layer. The
arithmetic inside a pass is float32; in bfloat16 it is rounded where torch rounds its results.
"""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor
from torch.nn import functional as F

from wavear.models.frames import FrameConditioning
from wavear.models.predictive_config import PredictiveWaveNetConfig


@intrinsic
def _as_float(context, bits):
    return types.float32(types.uint32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def _as_bits(context, value):
    return types.uint32(types.float32), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(32))


def _load(value):
    """Return the float32 of a bfloat16 (as uint16), or of a float32."""
    raise NotImplementedError("compiled only")


def _store(value, array):
    """Return a float32 as an element of `array`: bfloat16 rounds to nearest, ties to even."""
    raise NotImplementedError("compiled only")


@overload(_load, inline="always")
def _load_of(value):
    if isinstance(value, types.Integer):
        return lambda value: _as_float(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: value


@overload(_store, inline="always")
def _store_of(value, array):
    if not isinstance(array.dtype, types.Integer):
        return lambda value, array: np.float32(value)

    def rounded(value, array):
        bits = _as_bits(np.float32(value))
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16((bits + half) >> np.uint32(16))

    return rounded


@numba.njit(inline="always")
def tanh_ratio(x):
    """Return numerator and denominator of tanh(x), as `wavear.generation.cpu.simd`."""
    x = min(max(x, np.float32(-7.9)), np.float32(7.9))
    y = x * x
    p = np.float32(-2.76076847742355e-16) * y + np.float32(2.00018790482477e-13)
    p = p * y + np.float32(-8.60467152213735e-11)
    p = p * y + np.float32(5.12229709037114e-08)
    p = p * y + np.float32(1.48572235717979e-05)
    p = p * y + np.float32(6.37261928875436e-04)
    p = p * y + np.float32(4.89352455891786e-03)
    q = np.float32(1.19825839466702e-06) * y + np.float32(1.18534705686654e-04)
    q = q * y + np.float32(2.26843463243900e-03)
    q = q * y + np.float32(4.89352518554385e-03)
    return x * p, q


def _gate_forward(z, units, kept):
    """units (N, R) = tanh * sigmoid of z (N, 2 R); both factors are kept (N, 2 R)."""
    n, r = units.shape
    half, one = np.float32(0.5), np.float32(1)
    for i in range(n):
        filters, gates, out = z[i, :r], z[i, r:], units[i]
        kept_tanh, kept_sigmoid = kept[i, :r], kept[i, r:]
        for j in range(r):
            n1, d1 = tanh_ratio(_load(filters[j]))
            n2, d2 = tanh_ratio(half * _load(gates[j]))  # sigmoid(x) = (1 + tanh(x / 2)) / 2
            inverse = one / (d1 * d2)
            tanh, sigmoid = n1 * d2 * inverse, half * (d2 + n2) * d1 * inverse
            out[j] = _store(tanh * sigmoid, out)
            kept_tanh[j] = _store(tanh, out)
            kept_sigmoid[j] = _store(sigmoid, out)


def _gate_backward(kept, gradient, out):
    """Gradient of z (N, 2 R) from that of the units (N, R)."""
    n, r = gradient.shape
    one = np.float32(1)
    for i in range(n):
        tanhs, sigmoids, given = kept[i, :r], kept[i, r:], gradient[i]
        filters, gates = out[i, :r], out[i, r:]
        for j in range(r):
            tanh, sigmoid = _load(tanhs[j]), _load(sigmoids[j])
            d = _load(given[j]) * sigmoid
            filters[j] = _store(d * (one - tanh * tanh), out)
            gates[j] = _store(d * tanh * (one - sigmoid), out)


def _taps_forward(x, rows, out):
    """out (N, (K + 1) R): the rows (K, N) before each row of x (N, R), -1 for zeros, and itself."""
    k_taps, n = rows.shape
    r = x.shape[1]
    for i in range(n):
        for k in range(k_taps):
            row = rows[k, i]
            part = out[i, k * r : (k + 1) * r]
            if row >= 0:
                part[:] = x[row]
            else:
                part[:] = 0
        out[i, k_taps * r :] = x[i]


def _taps_backward(gradient, rows, sums, out):
    """Gradient of x (N, R), from the end: each row after those that read it."""
    k_taps, n = rows.shape
    r = out.shape[1]
    for i in range(n - 1, -1, -1):
        own, total, result = gradient[i, k_taps * r :], sums[i], out[i]
        for j in range(r):
            result[j] = _store(total[j] + _load(own[j]), out)
        for k in range(k_taps):
            row = rows[k, i]
            if row >= 0:
                part, total = gradient[i, k * r : (k + 1) * r], sums[row]
                for j in range(r):
                    total[j] += _load(part[j])


class _Kernels(NamedTuple):
    gate_forward: Any
    gate_backward: Any
    taps_forward: Any
    taps_backward: Any


@functools.cache
def _kernels(dtype: torch.dtype) -> _Kernels:
    from wavear.common.compiled import compiled

    values = f"{'uint16' if dtype == torch.bfloat16 else 'float32'}[:, ::1]"
    rows, sums, fast = "int32[:, ::1]", "float32[:, ::1]", {"fastmath": True}
    gate = f"void({values}, {values}, {values})"
    return _Kernels(
        compiled(_gate_forward, gate, error_model="numpy", **fast),
        compiled(_gate_backward, gate, **fast),
        compiled(_taps_forward, f"void({values}, {rows}, {values})"),
        compiled(_taps_backward, f"void({values}, {rows}, {sums}, {values})"),
    )


def _values(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
        units, kept = z.new_empty(z.shape[0], z.shape[1] // 2), torch.empty_like(z)
        _kernels(z.dtype).gate_forward(_values(z), _values(units), _values(kept))
        ctx.save_for_backward(kept)
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        out = torch.empty_like(kept)
        _kernels(kept.dtype).gate_backward(
            _values(kept), _values(gradient.contiguous()), _values(out)
        )
        return out


class _Taps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: np.ndarray) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        out = x.new_empty(x.shape[0], x.shape[1] * (len(rows) + 1))
        _kernels(x.dtype).taps_forward(_values(x), rows, _values(out))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        shape = (gradient.shape[0], gradient.shape[1] // (len(ctx.rows) + 1))
        out = gradient.new_empty(shape)
        _kernels(out.dtype).taps_backward(
            _values(gradient.contiguous()), ctx.rows, np.zeros(shape, np.float32), _values(out)
        )
        return out, None


def usable(h: Tensor, cond: FrameConditioning) -> bool:
    """Return whether the fused layers can run: on the CPU, whole frames, a gradient."""
    whole = cond.samples == cond.gates.shape[1] * cond.hop  # then the offset is 0
    fits = h.dtype in (torch.bfloat16, torch.float32) and h.device.type == "cpu"
    return fits and whole and torch.is_grad_enabled()


def gated_layers(
    blocks: Iterable[Any],
    config: PredictiveWaveNetConfig,
    h: Tensor,
    cond: FrameConditioning,
    whole: Tensor,
) -> list[Tensor]:
    """Run the gated layers from the beginning of B crops.

    Parameters
    ----------
    blocks : the `PredictiveBlock` of each layer
    h : Tensor, shape (B, T, R), bfloat16 or float32
        The first layer's input.
    cond : FrameConditioning
        Of T = F * hop samples.
    whole : Tensor of int64, shape (B, T)
        Whole lags.

    Returns
    -------
    list of Tensor, shape (B, T, R): the gated units of each layer
    """
    batch, total, r = h.shape
    x = h.reshape(batch * total, r)
    found = []
    for i, (block, dilation) in enumerate(zip(blocks, config.dilations, strict=True)):
        taps: Tensor = _Taps.apply(x, _rows(dilation, whole, config.kernel_size - 1))  # type: ignore[assignment]
        z = F.linear(taps, block.taps.weight).view(batch, total, -1)
        z = interpolated_onto(z, cond, *config.gate_span(i))
        units: Tensor = _Gate.apply(z.view(batch * total, -1))  # type: ignore[assignment]
        found.append(units.view(batch, total, r))
        if block.residual is not None:
            x = x + block.residual(units)
    return found


def interpolated_onto(z: Tensor, cond: FrameConditioning, first: int, last: int) -> Tensor:
    """Add interpolated gate biases [first, last) to z (B, T, last - first)."""
    hop, width = cond.hop, last - first
    biases = cond.gates[:, :, first:last].transpose(2, 3).reshape(-1, 3, width).to(z.dtype)
    weights = cond.weights.T.to(z.dtype).expand(len(biases), hop, 3)
    return torch.baddbmm(z.view(-1, hop, width), weights, biases).view(z.shape)


def _rows(dilation: int, whole: Tensor, taps: int) -> np.ndarray:
    """Return the row that each tap reads, (taps, B T), int32; -1 before the beginning."""
    batch, total = whole.shape
    at = torch.arange(total).expand(batch, -1)
    begin = torch.arange(batch)[:, None] * total
    found: list[Tensor] = []
    for _ in range(taps):
        at = at - (dilation or whole.gather(1, at.clamp(min=0)))
        found.insert(0, torch.where(at >= 0, at + begin, -1).flatten())
    return torch.stack(found).to(torch.int32).numpy()
