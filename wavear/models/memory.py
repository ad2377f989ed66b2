"""Memory and compilation of layers in training: activation checkpointing, torch.compile.

Checkpointing is from Chen et al., "Training deep nets with sublinear memory cost", 2016,
https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from wavear.common.errors import WavearError


def recomputed(module: nn.Module, prepare: Callable[..., tuple], *inputs: Any) -> Any:
    """Return `module(*prepare(*inputs))`; the backward pass keeps `inputs` and recomputes the rest.

    With the weights that the module has now: those that `torch.func.functional_call` substitutes
    (bf16 copies, say) are gone by then. Nothing in it may be random.
    """
    weights: dict[str, Tensor] = dict(module.named_parameters())
    return checkpoint(
        lambda *given: functional_call(module, weights, prepare(*given)),
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def check_compiler() -> None:
    """Raise a WavearError if there is no C++ compiler for torch.compile."""
    names = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if not any(map(shutil.which, names)):
        raise WavearError(
            f"compile needs a C++ compiler, and there is none here (looked for {', '.join(names)})"
        )
