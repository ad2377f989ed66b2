"""`wavear evaluate`, `wavear compare` and `wavear bench`."""

# Annotations are objects, not strings: tyro reads them.
import dataclasses
import sys
from typing import Annotated

from tyro.conf import Positional, arg

from wavear.cli.arguments import Checkpoint, Data, Folder, available, load_model
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.evaluation.config import EvaluateConfig


def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    out: Folder,
    config: EvaluateConfig = EvaluateConfig(),
) -> int:
    """Report the exact bits per sample of held-out recordings, and copy synthesis with its bounds.

    Example: wavear evaluate runs/mine/best held_out --out report --clips 8

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub.
    data
        Held-out recordings: a folder, a file, or a manifest (table or JSON lines with `path`,
        `audio_filepath` or `file_name`, `start`, `duration` or `end`; `path|text`; docs/data.md).
    out
        Folder to write to: report.html, evaluation.json, audio/.
    config
        How to evaluate.
    """
    from wavear.evaluation.evaluation import evaluate

    result = evaluate(checkpoint, data, out, config, progress=sys.stderr.isatty())
    for line in result.summary():
        say(line)
    return 1 if result.record["failed"] else 0


def compare(
    sources: Annotated[
        Positional[list[str]], arg(metavar="A B...", help_behavior_hint="(two or more)")
    ],
    out: Folder,
    data: Annotated[str | None, arg(metavar="DATA")] = None,
    models: bool = False,
    config: EvaluateConfig = EvaluateConfig(),
) -> int:
    """Compare checkpoints or evaluations: two of the same codes clip by clip, others as a table.

    The table has models of any family, distribution and quantisation: bits, cost, speed, and the
    audio each makes after the same beginning.

    Example: wavear compare runs/a/best runs/b/best --data held_out --out side_by_side

    Parameters
    ----------
    sources
        Folders that `wavear evaluate` wrote (or their evaluation.json), or checkpoints, for
        which --data is needed.
    out
        Folder to write to: compare.html or models.html, and the same as JSON; evaluations of
        checkpoints too.
    data
        Held-out recordings to evaluate checkpoints on.
    models
        Make the table for two models of the same codes, too.
    config
        How to evaluate them.
    """
    from wavear.evaluation.evaluation import compare, compare_models, same_codes

    if len(sources) < 2:
        raise WavearError("compare needs two models or more")
    progress = sys.stderr.isatty()
    if len(sources) == 2 and not models and same_codes(*sources):
        found = compare(sources[0], sources[1], out, data, config, progress=progress)
    else:
        found = compare_models(sources, out, data, config, progress=progress)
    for line in found.summary():
        say(line)
    return 1 if found.skipped else 0


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to measure before it is trained."""

    layers: int = 20
    """Dilated convolutions; a multiple of the stacks."""
    stacks: int = 2
    """The dilation doubles from layer to layer and restarts at 1 in each stack."""
    kernel_size: int = 2
    """Taps of each dilated convolution."""
    residual_channels: int = 64
    """Channels of the signal that runs through the layers."""
    skip_channels: int = 128
    """Channels of the sum over layers that the head reads."""
    head_channels: int = 256
    """Channels between the two layers of the head."""
    classes: int = 256
    """Mu-law codes."""
    sample_rate: int = 22050
    """Sample rate of the audio, Hz."""


def bench(
    checkpoint: Annotated[Positional[str | None], arg(metavar="CHECKPOINT")] = None,
    shape: str | None = None,
    network: Network = Network(),
    unconditional: bool = False,
    engines: tuple[str, ...] = (),
    weights: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 2.0,
) -> int:
    """Measure the speed of a network here, its share of the machine's limit, and its accuracy.

    Without a checkpoint the weights are random: measure the speed of a network before you train it.

    Example: wavear bench runs/mine/best --weights float32 int8 --batches 1 24

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub; by default the
        network of the flags.
    shape
        A published network instead of the flags below; `--shape list` lists them.
    network
        The network.
    unconditional
        Without mels; otherwise 80 bands, a frame per 256 samples.
    engines
        numba, reference; on CUDA triton, cuda-graph, reference. By default all of the first
        two.
    weights
        float32, bfloat16 (numba, triton), int8 (numba), float16 (triton). By default all that
        the device has.
    batches
        Streams at once; by default 1 24, on CUDA 1 16 128 1024 8192.
    device
        cpu or cuda.
    threads
        CPU cores; by default 1 for one stream and all for more.
    seconds
        To measure each for, at least.
    """
    from wavear.benchmark import networks, speed

    if shape == "list":
        for name, (text, _) in networks.SHAPES.items():
            say(f"{name:<16}{text}")
        return 0
    flags, defaults = dataclasses.asdict(network), dataclasses.asdict(Network())
    changed = [name for name, value in flags.items() if value != defaults[name]]
    changed += ["unconditional"] * (unconditional and checkpoint is not None)
    if changed and (given := checkpoint or shape):
        raise WavearError(f"{given} sets the network: drop --{changed[0].replace('_', '-')}")
    report = speed.measure_all(
        None if checkpoint is None else load_model(checkpoint, "cpu"),
        device=available(device),
        shape=shape,
        settings=flags,
        unconditional=unconditional,
        engines=engines or None,
        weights=weights or None,
        batches=batches or None,
        threads=threads,
        seconds=seconds,
    )
    say(str(report))
    return 0
