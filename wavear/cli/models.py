"""`wavear demo`, `wavear info`, `wavear push` and `wavear serve`."""

# Annotations are objects, not strings: tyro reads them.
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from wavear.cli.arguments import Checkpoint, Folder, load_model
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.serving.settings import ServeConfig


def demo(
    out: Folder = Path("demo"),
    minutes: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> int:
    """Speak a sentence, then teach the voice some generated notes, and compare before and after.

    Example: wavear demo --out demo --minutes 3

    Parameters
    ----------
    out
        Folder to write to: WAV files, the checkpoint, a report to open in a browser.
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
    return 0 if result.better else 1


def info(checkpoint: Checkpoint) -> int:
    """Print what a checkpoint is: size, cost per sample, receptive field, mels, training.

    Example: wavear info runs/mine/best

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


def push(
    directory: Annotated[Positional[Path], arg(metavar="DIR")],
    name: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    private: bool = False,
    overwrite: bool = False,
) -> int:
    """Upload a checkpoint with its model card to the Hugging Face hub.

    Example: wavear push runs/mine/best owner/name --private

    Parameters
    ----------
    directory
        Folder that `wavear train` wrote, such as runs/mine/best. Read its README.md before, and
        set the licence.
    name
        Where on the hub.
    private
        Create it for its owner only.
    overwrite
        Upload to a model that exists there.
    """
    from wavear.models import hub

    say(hub.push(directory, name, private=private, overwrite=overwrite))
    return 0


def serve(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "voice",
    device: str = "cpu",
    config: ServeConfig = ServeConfig(),
) -> int:
    """Serve a page for the browser: resynthesize recordings, play and steer a model live.

    Example: wavear serve runs/mine/best --port 8001

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
