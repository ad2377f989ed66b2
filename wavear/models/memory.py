"""How layers are run in training: activation checkpointing, and what torch.compile needs.

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


def recomputed(module: nn.Module, prepare: Callable[..., tuple], *inputs: Any) -> Any:
    """`module(*prepare(*inputs))`, of which the backward pass finds only `inputs` kept and computes the rest anew.

    With the weights that the module has now: in `torch.func.functional_call` (which gives it bf16
    copies, say) these are gone when the backward pass comes. Nothing may be random in it.
    """
    weights: dict[str, Tensor] = dict(module.named_parameters())
    return checkpoint(
        lambda *given: functional_call(module, weights, prepare(*given)),
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def check_compiler() -> None:
    """Refuse to compile where that cannot work.

    Raises
    ------
    ValueError
        If there is no C++ compiler.
    """
    names = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"compile needs a C++ compiler, and there is none here (looked for {', '.join(names)})"
        )
