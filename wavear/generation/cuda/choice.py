"""Which engine runs a model on a CUDA device."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from typing import TYPE_CHECKING

import torch

from wavear.common.errors import WavearError
from wavear.models.base import AutoregressiveModel

if TYPE_CHECKING:
    from wavear.generation.engine import Engine

ENGINES = ("cuda-graph", "triton")
_CAPABILITY = (8, 0)  # tensor cores that multiply TF32 and bfloat16


def pick(model: AutoregressiveModel, device: torch.device) -> str:
    """Return the engine that "auto" means on a CUDA device; warn if a faster one cannot run.

    triton for a WaveNet of mu-law codes, whatever the batch: its programs run 16 streams in the
    time of one. cuda-graph for the others.
    """
    from wavear.models.wavenet import WaveNet

    if not isinstance(model, WaveNet) or model.config.law != "categorical":
        return "cuda-graph"
    reason = why_not_triton(device)
    if reason is not None:
        warnings.warn(
            f"{reason}: engine 'cuda-graph' is taken, which is slower than 'triton'", stacklevel=3
        )
        return "cuda-graph"
    return "triton"


def why_not_triton(device: torch.device) -> str | None:
    """Return the reason why the Triton engine cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"the model is on {device}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        found = f"{capability[0]}.{capability[1]}"
        return f"{name} has compute capability {found}, Triton's kernel needs 8.0"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        return "there is no C compiler, which Triton needs to launch its kernels"
    return None


def make(model: AutoregressiveModel, batch: int, engine: str, weights: str) -> Engine:
    """Make an engine of `ENGINES`.

    Raises
    ------
    WavearError
        If it cannot serve the model, or has no such weights.
    """
    from wavear.models.wavenet import WaveNet

    device = next(model.parameters()).device
    if engine == "cuda-graph":
        if weights != "float32":
            raise WavearError(
                f"engine 'cuda-graph' runs the model as it is: weights={weights!r} needs engine "
                "'triton'"
            )
        if device.type != "cuda":
            raise WavearError(
                f"engine 'cuda-graph' needs a model on a CUDA device, this one is on {device}"
            )
        from wavear.generation.cuda.graph import CudaGraphEngine

        return CudaGraphEngine(model, batch)
    if not isinstance(model, WaveNet):
        raise WavearError(
            f"engine 'triton' serves WaveNet, not {type(model).__name__}: use engine 'cuda-graph'"
        )
    if model.config.law != "categorical":
        raise WavearError(
            f"engine 'triton' serves a categorical law, not {model.config.law}: "
            "use engine 'cuda-graph'"
        )
    if (reason := why_not_triton(device)) is not None:
        raise WavearError(f"engine 'triton' cannot run: {reason}")
    from wavear.generation.cuda.triton import TritonEngine

    return TritonEngine(model, batch, weights=weights)
