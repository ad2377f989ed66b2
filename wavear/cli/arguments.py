"""Arguments that several commands share."""

import re
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from wavear.common.errors import WavearError

Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]


def load_model(checkpoint: str, device: str) -> Any:
    """Return the model of a checkpoint on a device, if the machine has it."""
    from wavear.models.checkpoint import load

    return load(checkpoint, available(device))


def available(device: str) -> str:
    """Return the name of a device, if the machine has it."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise WavearError(f"--device is {device!r}; it must be cpu, cuda, or one card as cuda:1")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise WavearError(f"--device is {device!r}, and there is no CUDA device here: use cpu")
    return device
