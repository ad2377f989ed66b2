"""The commands: each calls one function that a notebook could call, and prints the result."""

# Annotations are objects, not strings: tyro reads them.
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from wavear.cli.arguments import Checkpoint, Data, Folder, available, load_model
from wavear.cli.parsing import guarded, parse_command
from wavear.cli.synthesis import generate, mel, synthesize
from wavear.cli.training import recipe, run_training, train
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.words import counted
from wavear.evaluation.records import EvaluateConfig
from wavear.serving.settings import ServeConfig

__all__ = ["COMMANDS", "main", "recipe", "run_training"]
logger = get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-V"], ["--version"]):
        from wavear import __version__

        print(f"wavear {__version__}")
        return 0
    given = ["--help", *given[1:]] if given[:1] == ["help"] else given
    about = "Autoregressive audio: train a WaveNet, make sound with it."
    return guarded(lambda: parse_command(COMMANDS, given, about)())


def demo(
    out: Folder = Path("demo"),
    minutes: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> int:
    """Speak a sentence, train a small WaveNet on generated notes, play some: no download.

    Parameters
    ----------
    out
        Folder to write to: WAV files, a picture, the checkpoint.
    minutes
        Minutes of training; by default those of the demo's recipe.
    seed
        Of the sounds, the training and the audio; 0 or more.
    threads
        CPU cores to use; by default one to train and all to synthesize.
    overwrite
        Replace an earlier demo in the folder.
    """
    from wavear.demo import job

    result = job.run(out, minutes=minutes, seed=seed, threads=threads, overwrite=overwrite)
    return 0 if result.in_tune else 1


def info(checkpoint: Checkpoint) -> int:
    """Print what a checkpoint is: size, cost per sample, receptive field, mels, training.

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub.
    """
    from wavear.models.info import describe

    rows = describe(checkpoint)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        say(f"{label:<{width}}  {value}")
    return 0


def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    out: Folder,
    config: EvaluateConfig = EvaluateConfig(),
) -> int:
    """Report the exact bits per sample of held-out recordings, and copy synthesis with its bounds.

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


def index(data: Data, beside: bool = False, processes: int | None = None) -> int:
    """Read the headers of all files of a large corpus once and keep them for every later run.

    Only new and changed files are read, and an interrupted index resumes. `wavear train` does the
    same by itself from 1000 files on.

    Parameters
    ----------
    data
        Recordings: a folder, a manifest (table or JSON lines with `path`, `audio_filepath` or
        `file_name`, `start`, `duration` or `end`; `path|text`; docs/data.md), or tar shards (a
        pattern in quotes, such as 'shards/{000..012}.tar').
    beside
        Keep the index next to the data, for everybody who reads them there, rather than in your
        cache.
    processes
        Number of processes that read; by default one per core, up to 16.
    """
    from wavear.common.progress import bar
    from wavear.data.corpus import index

    report = index(data, beside=beside, processes=processes, progress=bar)
    for note in report.notes:
        logger.warning("%s", note)
    _list_failed(report.bad, at_most=20)
    rates = ", ".join(map(str, report.rates)) or "no"
    files, recordings = counted(report.files, "file"), counted(report.recordings, "recording")
    bad = len(report.bad)
    say(f"{files}, {report.new} of them new or changed; {bad} cannot be used")
    say(f"{recordings}, {report.seconds / 3600:.2f} hours of audio, {rates} Hz")
    say(f"index: {report.folder or 'not kept'}")
    return 1 if report.bad else 0


def shards(
    data: Data, out: Folder, megabytes: float = 256.0, speakers: bool = False, seed: int = 0
) -> int:
    """Put recordings into tar shards, for an object store: DIR/shard-000000.tar and so on.

    Files are copied byte for byte. `wavear train 'DIR/*.tar'` trains on them, as do other readers
    of webdataset's shards.

    Parameters
    ----------
    data
        Recordings: a folder, or a manifest of whole files.
    out
        Folder to write to: empty, or missing.
    megabytes
        Size at which a shard is closed.
    speakers
        The first level of a folder's sub-folders names the speakers; a manifest's column
        `speaker` always counts.
    seed
        Of the order of the files: it is shuffled, so that each shard is a sample of all.
    """
    from wavear.common.progress import bar
    from wavear.data.shards import write_shards

    report = write_shards(
        data, out, megabytes=megabytes, speakers=speakers, seed=seed, progress=bar
    )
    _list_failed(report.failed)
    first, last = report.shards[0].name, report.shards[-1].name
    size = f"{counted(report.files, 'file')}, {report.bytes / 1e6:.1f} MB"
    say(f"{out}  {counted(len(report.shards), 'shard')}, {first} to {last}, {size}")
    return 1 if report.failed else 0


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


def serve(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "voice",
    device: str = "cpu",
    config: ServeConfig = ServeConfig(),
) -> int:
    """Serve a page for the browser: resynthesize recordings, play and steer a model live.

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub; by default the
        voice that comes with wavear.
    device
        cpu, cuda, or one card: cuda:1.
    config
        Address and limits.
    """
    try:
        from wavear.serving import server
    except ImportError as error:
        raise WavearError(
            f"the page needs starlette and uvicorn ({error}): pip install 'wavear[serve]'"
        ) from None
    server.serve(load_model(checkpoint, device), checkpoint, config)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "index": index,
    "shards": shards,
    "synthesize": synthesize,
    "generate": generate,
    "mel": mel,
    "evaluate": evaluate,
    "compare": compare,
    "info": info,
    "bench": bench,
    "serve": serve,
}


def _list_failed(failed: Sequence[tuple[Any, str]], at_most: int | None = None) -> None:
    for name, reason in failed[:at_most]:
        logger.error("%s: %s", name, reason)
    if at_most is not None and len(failed) > at_most:
        logger.error("... and %d more", len(failed) - at_most)
