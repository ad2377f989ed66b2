"""Arguments that several commands share."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from wavear.common.errors import WavearError

if TYPE_CHECKING:
    from wavear.generation.settings import Sampling

Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]
_MOST_SEEDS = 10_000


def checkpoint_and_inputs(paths: Sequence[Path]) -> tuple[str, list[Path]]:
    """Divide the arguments [CHECKPOINT] INPUT...: the shipped voice serves if no checkpoint leads.

    A single argument is an input. Of several, the first is a checkpoint unless it is a file, or
    named as one.
    """
    from wavear.audio import SUFFIXES
    from wavear.mel import kaldi
    from wavear.mel.mel_files import MEL_SUFFIXES
    from wavear.models.checkpoint import CONFIG, VOICE

    if not paths:  # `plan` refuses
        return VOICE, []
    first, *others = paths
    if not others:
        if first.name and (str(first) == VOICE or (first / CONFIG).is_file()):
            raise WavearError(f"{first} is a checkpoint: name the audio or mels, too")
        return VOICE, [first]
    named_as_file = first.suffix.lower() in SUFFIXES + MEL_SUFFIXES + kaldi.SUFFIXES
    if str(first) == "-" or first.is_file() or (named_as_file and not first.is_dir()):
        return VOICE, list(paths)
    return str(first), others


def seeds_of(text: str | None, sampling: "Sampling") -> list[tuple[str, "Sampling"]]:
    """Return for each seed of `--seeds` the ending of its files' names, and its settings.

    Examples
    --------
    >>> from wavear.generation.settings import Sampling
    >>> [ending for ending, _ in seeds_of("0:3", Sampling())]
    ['-seed0', '-seed1', '-seed2']
    >>> seeds_of(None, Sampling(seed=5)) == [("", Sampling(seed=5))]
    True
    """
    if text is None:
        return [("", sampling)]
    if sampling.seed != type(sampling)().seed:
        raise WavearError("--seed and --seeds exclude each other: drop one")
    match = re.fullmatch(r"(\d+):(\d+)", text)
    numbers = range(int(match[1]), int(match[2])) if match else text.split(",")
    if (not match and not re.fullmatch(r"\d+(,\d+)*", text)) or not 0 < len(numbers) <= _MOST_SEEDS:
        raise WavearError(
            f"--seeds is {text!r}; it must be a range such as 0:8 (0 to 7), or a list such as"
            f" 0,3,5, of at most {_MOST_SEEDS} seeds"
        )
    seeds = dict.fromkeys(int(number) for number in numbers)
    return [(f"-seed{seed}", dataclasses.replace(sampling, seed=seed)) for seed in seeds]


def refuse_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a name for `--out` that is not of audio, or not a file to write (`check_target`)."""
    from wavear.common.atomic import check_target
    from wavear.generation.output import FORMATS

    suffixes = sorted({suffix for suffix, _ in FORMATS.values()})
    if out.suffix.lower() not in suffixes:
        raise WavearError(
            f"{out} is not an audio file by its name: --out takes a {', '.join(suffixes)} file"
        )
    check_target(out, overwrite, source)


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
