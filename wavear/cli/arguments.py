"""Arguments that several commands share."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from wavear.common.errors import WavearError

Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]


def checkpoint_and_inputs(paths: Sequence[Path]) -> tuple[str, list[Path]]:
    """Divide the arguments [CHECKPOINT] INPUT...: the shipped voice serves if no checkpoint leads.

    A single argument is an input. Of several, the first is a checkpoint unless it is a file, or
    named as one.
    """
    from wavear.audio import SUFFIXES
    from wavear.generation.mel_files import MEL_SUFFIXES
    from wavear.models.checkpoint import CONFIG, VOICE

    first, *others = paths
    if not others:
        if first.name and (str(first) == VOICE or (first / CONFIG).is_file()):
            raise WavearError(f"{first} is a checkpoint: name the audio or mels to synthesize, too")
        return VOICE, [first]
    named_as_file = first.suffix.lower() in SUFFIXES + MEL_SUFFIXES
    if str(first) == "-" or first.is_file() or (named_as_file and not first.is_dir()):
        return VOICE, list(paths)
    return str(first), others


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
