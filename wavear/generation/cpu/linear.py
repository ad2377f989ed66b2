"""The CPU engine of linear prediction: the whole loop over samples in compiled code, one call per chunk.

A sum over the past would be a chain of additions that begins when the newest sample is known. It is
turned around: as soon as a sample is known, what it counts for is added to the predictions of all
samples that will see it, which are independent of each other and fill vectors. Every prediction is
still the same sum in the same order as the model's, from the constant over the oldest sample to the
newest, a product and an addition at a time, in float64: the same bits.

So a sample costs its share of two short vectors, and the draw: the inverse of the residual's
cumulative distribution at its uniform, then the code whose interval that falls into.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from wavear.common.compiled import compiled
from wavear.common.machine import available_cores
from wavear.generation.cpu.distributions import (
    GAUSSIAN,
    LAPLACE,
    _log_tail,
    laplace_quantile,
    normal_quantile,
)
from wavear.models.linear import Linear

MULAW, LINEAR, COMPANDED = range(3)
_LEAST_ROWS = 2  # streams from which a second thread pays
_LOG_2 = math.log(2)


@numba.njit
def log_mass(law, lower, upper, first, last):
    """log(F(upper) - F(lower)) of the law of scale 1; the first and the last code take the tails."""
    if first or last:
        return _log_tail(law, upper if first else -lower)
    a, b = lower, upper
    if a + b > 0.0:  # the laws are symmetric: everything is computed in the lower tail
        a, b = -upper, -lower
    if law == GAUSSIAN:
        top = _log_tail(law, b)
        return top + math.log(-math.expm1(min(_log_tail(law, a) - top, -1e-300)))
    if b <= 0.0:
        return b - _LOG_2 + math.log(-math.expm1(a - b))
    return math.log(max(-(math.expm1(a) + math.expm1(-b)) / 2.0, 1e-300))


@numba.njit
def encode(grid, classes, x):
    """The code whose interval a predicted value, or a sample, falls into. As `wavear.audio.grid`."""
    if grid == LINEAR:
        half = classes // 2
        return min(np.int64(math.floor(min(max(x, -1.0), 1.0) * half + 0.5)) + half, classes - 1)
    y = min(max(x, -1.0), 1.0)
    mu = classes - 1.0
    if grid == MULAW:
        y = math.copysign(math.log1p(mu * abs(y)) / math.log1p(mu), y)
    return np.int64((y + 1.0) / 2.0 * mu + 0.5)


def _run(
    law, grid, values, edges, taps, constant, scale, past, codes, uniforms, temperatures, scores
):
    """Streams one after the other, a row each; `past` (B, p + d + 1) codes, the oldest first, is moved on.

    With uniforms (B, n) the codes (B, n) are made, else they are given. `scores` (B, n) or (B, 0)
    are filled.
    """
    classes, reach = values.shape[0], taps.shape[0]
    generates, scored = uniforms.size > 0, scores.size > 0
    samples = codes.shape[1]
    ahead = np.empty(samples + reach)  # predictions, as far as they are known
    for b in range(codes.shape[0]):
        ahead[:] = constant
        for i in range(reach):
            value = values[past[b, 1 + i]]
            for t in range(min(i + 1, samples)):
                ahead[t] += taps[t + reach - i - 1] * value
        for t in range(samples):
            mean = ahead[t]
            if generates:
                away = (
                    normal_quantile(uniforms[b, t])
                    if law == GAUSSIAN
                    else laplace_quantile(uniforms[b, t])
                )
                codes[b, t] = encode(grid, classes, mean + scale * temperatures[b, t] * away)
            code = codes[b, t]
            if scored:
                lower, upper = (edges[code] - mean) / scale, (edges[code + 1] - mean) / scale
                scores[b, t] = log_mass(law, lower, upper, code == 0, code == classes - 1)
            value = values[code]
            for lag in range(reach):
                ahead[t + 1 + lag] += taps[lag] * value
        for i in range(reach + 1):
            at = samples + i
            past[b, i] = past[b, at] if at <= reach else codes[b, at - reach - 1]


_SIGNATURE = (
    "void(int64, int64, float64[::1], float64[::1], float64[::1], float64, float64, int64[:, ::1], int64[:, ::1], "
    "float64[:, ::1], float64[:, ::1], float64[:, ::1])"
)


class NumbaLinearEngine:
    """Runs streams of a `Linear`; see `wavear.generate.Engine`.

    Parameters
    ----------
    model : Linear
        Its numbers are those of this moment.
    batch : int
    weights : str
        "float32", which is the name for weights as they are: these are float64.
    threads : int, optional
        CPU cores; all of them by default. The streams are shared among them.

    Raises
    ------
    ValueError
        If `weights` is something else.
    """

    def __init__(
        self, model: Linear, batch: int, *, weights: str = "float32", threads: int | None = None
    ):
        if weights != "float32":
            raise ValueError(
                f"weights is {weights!r}: a linear predictor runs in float64 as it is, leave weights away"
            )
        config, predicted = model.config, model.predicted_grid
        self.model, self.threads = model, threads or available_cores()
        self._law = {"laplace": LAPLACE, "gaussian": GAUSSIAN}[config.law]
        self._grid = (
            COMPANDED
            if config.domain == "companded"
            else {"mulaw": MULAW, "linear": LINEAR}[config.grid]
        )
        numbers = (model.values, model.taps(), model.constant, model.scale())
        values, taps, constant, scale = (
            tensor.detach().double().cpu().numpy() for tensor in numbers
        )
        self._numbers: Any = (
            values.copy(),
            predicted.edges().copy(),
            taps.copy(),
            float(constant),
            float(scale),
        )
        self._past = np.full((batch, model.receptive_field + 1), model.start_code, dtype=np.int64)
        self._kernel = compiled(_run, _SIGNATURE)

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
        """See `Engine.generate`; `top_k` and `top_p` are not for laws over values."""
        if top_k is not None or top_p is not None:
            raise ValueError(
                f"top_k and top_p choose among codes, and the law is {self.model.config.law}"
            )
        codes = np.empty(uniforms.shape, dtype=np.int64)
        temperatures = np.array(
            np.broadcast_to(np.asarray(temperature, np.float64), uniforms.shape), order="C"
        )
        scores = np.empty((len(codes), 0 if log_probability is None else uniforms.shape[1]))
        self._call(codes, np.array(uniforms, np.float64, order="C"), temperatures, scores)
        if log_probability is not None:
            log_probability[:] = scores
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        scores, none = np.empty(codes.shape), np.empty((len(codes), 0))
        self._call(np.array(codes, np.int64, order="C"), none, none, scores)
        return scores

    def _call(self, codes: np.ndarray, *arrays: np.ndarray) -> None:
        def run(rows: slice) -> None:
            self._kernel(
                self._law,
                self._grid,
                *self._numbers,
                self._past[rows],
                codes[rows],
                *(each[rows] for each in arrays),
            )

        parts = max(min(self.threads, len(codes) // _LEAST_ROWS), 1)
        bounds = [len(codes) * part // parts for part in range(parts + 1)]
        spans = [slice(*bounds[part : part + 2]) for part in range(parts)]
        if parts == 1:
            run(spans[0])
            return
        with ThreadPoolExecutor(parts) as pool:
            list(pool.map(run, spans))

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        codes = torch.from_numpy(self._past[stream].copy())
        return {"previous": codes[-1:].clone(), "past": codes[:-1].clone()}

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self._past[stream] = torch.cat([state["past"], state["previous"]]).cpu().numpy()

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        reach = self._past.shape[1]
        self._past[stream] = np.concatenate([self._past[stream], codes])[-reach:]

    def resized(self, batch: int) -> NumbaLinearEngine:
        """See `Engine.resized`."""
        return NumbaLinearEngine(self.model, batch, threads=self.threads)
