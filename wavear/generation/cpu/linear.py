"""The CPU engine of linear prediction: the whole loop over samples in compiled code.

A sum over the past would be a chain of additions that begins when the newest sample is known. It is
turned around: as soon as a sample is known, its contribution is added to the predictions of all
samples that will see it, which are independent of each other and fill vectors. Every prediction is
still the same sum in the same order as the model's, from the constant over the oldest sample to the
newest, a product and an addition at a time, in float64: the same bits.

So a sample costs its share of two short vectors, and the draw: the inverse of the residual's
cumulative distribution at its uniform, then the code whose interval contains it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from torch import Tensor

from wavear.common.compiled import compiled
from wavear.generation.cpu.coding import settle_value
from wavear.generation.cpu.compiled_engine import CompiledEngine
from wavear.generation.cpu.distributions import (
    GAUSSIAN,
    LAPLACE,
    encode,
    laplace_quantile,
    log_mass,
    normal_quantile,
)
from wavear.generation.cpu.sampling import Call, type_of
from wavear.models.linear import Linear

MULAW, LINEAR, COMPANDED = range(3)
_LEAST_ROWS = 2  # streams from which a second thread pays


@numba.njit
def _encode(grid, classes, x):
    """Return the code whose interval contains a value; see `wavear.audio.grid`."""
    if grid == LINEAR:
        return encode(x, classes)
    y = min(max(x, -1.0), 1.0)
    mu = classes - 1.0
    if grid == MULAW:
        y = math.copysign(math.log1p(mu * abs(y)) / math.log1p(mu), y)
    return np.int64((y + 1.0) / 2.0 * mu + 0.5)


@numba.njit
def _coded(law, mean, scale, call, coders, b, t):
    """Encode or decode a sample, if the call has coders; return whether it has."""
    if coders is None:
        return False
    call.heap[0], call.heap[1], call.heap[2] = 1.0, mean, scale
    settle_value(law, 1, call, b, t)
    return True


def _run(start, stop, law, grid, values, edges, taps, constant, scale, past, call):
    """Streams one after the other; `past` (B, p + d + 1) codes, the oldest first, is advanced."""
    classes, reach, codes = values.shape[0], taps.shape[0], call.codes
    samples = codes.shape[1]
    ahead = np.empty(samples + reach)  # predictions, as far as they are known
    for b in range(start, stop):
        ahead[:] = constant
        for i in range(reach):
            value = values[past[b, 1 + i]]
            for t in range(min(i + 1, samples)):
                ahead[t] += taps[t + reach - i - 1] * value
        for t in range(samples):
            mean = ahead[t]
            coded = _coded(law, mean, scale, call, call.coders, b, t)
            if not coded and not call.scoring:
                uniform = call.uniforms[b, t]
                away = normal_quantile(uniform) if law == GAUSSIAN else laplace_quantile(uniform)
                x = mean + scale * call.temperatures[b, t] * away
                codes[b, t] = _encode(grid, classes, x)
            code = codes[b, t]
            if not coded and (call.scoring or call.scored):
                lower, upper = (edges[code] - mean) / scale, (edges[code + 1] - mean) / scale
                ends = code == 0, code == classes - 1
                call.scores[b, t] = log_mass(law, lower, upper, upper - lower, *ends)
            value = values[code]
            for lag in range(reach):
                ahead[t + 1 + lag] += taps[lag] * value
        for i in range(reach + 1):
            at = samples + i
            past[b, i] = past[b, at] if at <= reach else codes[b, at - reach - 1]
    return -1


_int, _float, _floats = types.int64, types.float64, types.float64[::1]


@functools.cache
def run(call: Any) -> Any:
    """Compile `_run` for a type of call at the first one, or read it from the cache."""
    signature: Any = _int(
        _int, _int, _int, _int, _floats, _floats, _floats, _float, _float, _int[:, ::1], call
    )
    return compiled(_run, signature)


class NumbaLinearEngine(CompiledEngine):
    """Runs `batch` streams of a `Linear` in compiled code, in float64; see `CompiledEngine`.

    `weights` can be "float32" only, the name for weights as they are.
    """

    serves, weight_kinds = Linear, ("float32",)

    def _prepare(self) -> None:
        model = self.model
        config, predicted = model.config, model.predicted_grid
        law = {"laplace": LAPLACE, "gaussian": GAUSSIAN}[config.law]
        grid = {"mulaw": MULAW, "linear": LINEAR}[config.grid]
        numbers = (model.values, model.taps(), model.constant, model.scale())
        values, taps, constant, scale = (
            tensor.detach().double().cpu().numpy() for tensor in numbers
        )
        self._plan = (
            law, COMPANDED if config.domain == "companded" else grid, values.copy(),
            predicted.edges().copy(), taps.copy(), float(constant), float(scale),
        )  # fmt: skip
        shape = self.batch, model.receptive_field + 1
        self._past = np.full(shape, model.start_code, dtype=np.int64)
        self.threads = max(min(self.threads, self.batch // _LEAST_ROWS), 1)

    def _parts(self) -> Sequence[tuple[int, int]]:
        bounds = [self.batch * part // self.threads for part in range(self.threads + 1)]
        return list(pairwise(bounds))

    def _call(self, part: Any, condition: Any, call: Call) -> int:
        return run(type_of(call))(*part, *self._plan, self._past, call)

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        codes = torch.from_numpy(self._past[stream].copy())
        return {"previous": codes[-1:].clone(), "past": codes[:-1].clone()}

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self._past[stream] = torch.cat([state["past"], state["previous"]]).cpu().numpy()

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """See `Engine.copy_streams`."""
        self._past[targets] = self._past[sources]

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        reach = self._past.shape[1]
        self._past[stream] = np.concatenate([self._past[stream], codes])[-reach:]
