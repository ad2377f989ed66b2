"""The arithmetic of a run: float32, or bf16 where the device gains by it."""

from __future__ import annotations

import functools
import time

import torch

from wavear.common.errors import WavearError
from wavear.models.base import AutoregressiveModel
from wavear.training.config import TrainConfig

# A layer of 48 channels and three taps over a quarter of a second.
_ROWS, _INPUTS, _OUTPUTS = 6144, 144, 96
_REPEATS = 5  # the fastest counts: another program can only slow a product down
_LEAST_SPEEDUP = 1.3  # of the products: the rest of a step gains less, and copying weights costs


def choose(
    config: TrainConfig, model: AutoregressiveModel, kind: str, recorded: str | None = None
) -> tuple[str, str]:
    """Return "32" or "bf16" for a device (cpu, cuda, mps), and the reason to print.

    The model's attribute `bf16` allows bf16; by default a categorical law does, since a law over
    values needs more than the 8 bits of bf16. "auto" keeps the `recorded` precision of a resumed
    run: a second measurement might differ, and the run would not equal an uninterrupted one.
    """
    allowed = model.law.truncates if model.bf16 is None else model.bf16
    if config.precision == "bf16" and not allowed:
        raise WavearError(
            f"bf16 has 8 bits, too few for the values of the law {config.law}: use precision 32"
        )
    if config.precision != "auto":
        return config.precision, "as requested"
    if recorded is not None:
        return recorded, "as in the run so far"
    if not allowed:
        return "32", "bf16 is too coarse for this model"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "which the GPU has in hardware"
        return "32", "the GPU has no bf16 in hardware"
    if kind != "cpu":
        return "32", f"bf16 is not used on {kind}"
    speedup = bf16_speedup(torch.get_num_threads())
    chosen = "bf16" if speedup >= _LEAST_SPEEDUP else "32"
    return chosen, f"bf16 products are {speedup:.1f} times as fast here"


@functools.cache
def bf16_speedup(threads: int) -> float:
    """Return how many times as fast the CPU multiplies in bf16 as in float32, with gradients.

    Measured once per process and number of threads, in a tenth of a second, because the
    instruction set does not settle it: AVX-512 has bf16 products that are 2.5 times as fast on one
    CPU, and no faster on another.
    """
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for repeat in range(_REPEATS + 1):
        for dtype in fastest:  # in turn: other load on the machine slows both
            x = torch.ones(_ROWS, _INPUTS, dtype=dtype, requires_grad=True)
            weight = torch.ones(_OUTPUTS, _INPUTS, dtype=dtype, requires_grad=True)
            gradient = torch.ones(_ROWS, _OUTPUTS, dtype=dtype)
            began = time.perf_counter()
            with torch.enable_grad():
                torch.nn.functional.linear(x, weight).backward(gradient)
            if repeat:  # the first product of a shape is slower: kernels are chosen
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - began)
    return fastest[torch.float32] / fastest[torch.bfloat16]
