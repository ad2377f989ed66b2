"""`wavear synthesize`, `wavear generate` and `wavear mel`."""

# Annotations are objects, not strings: tyro reads them.
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from wavear.cli.arguments import (
    Checkpoint,
    Folder,
    checkpoint_and_inputs,
    load_model,
    refuse_target,
    seeds_of,
)
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.generation.output import Output
from wavear.generation.settings import Sampling
from wavear.mel.config import MelConfig

if TYPE_CHECKING:
    from wavear.generation.files import Report

logger = get_logger(__name__)

Inputs = Annotated[Positional[list[Path]], arg(metavar="INPUT...", help_behavior_hint="(required)")]


def synthesize(
    inputs: Annotated[
        Positional[list[Path]],
        arg(metavar="[CHECKPOINT] INPUT...", help_behavior_hint="(required)"),
    ],
    out: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: next to the inputs)")
    ] = None,
    overwrite: bool = False,
    resume: bool = False,
    stream: bool = False,
    mel_preset: Annotated[str | None, arg(metavar="NAME")] = None,
    mel_seconds: float | None = None,
    force: bool = False,
    device: str = "cpu",
    seeds: str | None = None,
    sampling: Sampling = Sampling(),
    output: Output = Output(),
) -> int:
    """Make audio from mel spectrograms, or from the mels of recordings.

    A mel of F frames becomes F * hop samples. With `- --stream`, frames from stdin become raw
    16-bit PCM on stdout as they come: ... | wavear synthesize - --stream | aplay -t raw -f S16_LE
    -c 1 -r 22050

    Example: wavear synthesize runs/mine/best speech.wav mels/ --out new --top-p 0.99

    Parameters
    ----------
    inputs
        Audio files (their mel is taken), mels (.npy, .npz, .pt, .safetensors, .h5; bands first),
        Kaldi's feats.scp or .ark, or folders of the others. With --stream: -, stdin, float32 frame
        after frame, or a .npy array.
        Before them a folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub; by
        default the voice that comes with wavear.
    out
        Folder to write to; it is made if missing. By default x.wav becomes x-synthesized.wav next
        to it, and its similarity to x.wav is measured. With --stream: - for stdout, the default;
        device, or device:NAME, for a sound device (needs the package sounddevice).
    overwrite
        Replace files that exist.
    resume
        Complete an interrupted run of the same command: files that exist are kept. Under
        torchrun this is always on, and each process makes its share.
    stream
        Follow mel frames as they come; latency and underruns are reported on stderr.
    mel_preset
        The convention of mels whose files hold no configuration, to convert them: a preset
        (hifigan, r9y9, espnet, fatchord...), or, if only the values differ from the model's: ln,
        log10, db, db01, db01-ref20, db4-ref20, linear.
    mel_seconds
        Refuse mels whose frames do not make this many seconds of audio.
    force
        Use mels that are judged wrong, or cannot be converted, unchanged.
    device
        cpu, cuda, or one card: cuda:1.
    seeds
        Make one file for each of several seeds, x-seed0.wav and so on: 0:8 is 0 to 7; or 0,3,5.
    sampling
        How the audio is made.
    output
        How it is written.
    """
    from wavear.generation import distributed, files, pipes
    from wavear.generation.jobs import plan
    from wavear.mel.mel_files import is_mel

    checkpoint, inputs = checkpoint_and_inputs(inputs)
    each = seeds_of(seeds, sampling)
    if stream:
        if inputs != [Path("-")]:
            raise WavearError("--stream follows the frames on stdin: its one input is -")
        if output != Output() or overwrite or resume or force or mel_seconds is not None or seeds:
            raise WavearError(
                "--stream makes raw 16-bit PCM of frames without a known end: drop --format,"
                " --normalize, --fade, --overwrite, --resume, --mel-seconds, --seeds and --force"
            )
        pipes.run(load_model(checkpoint, device), str(out or "-"), sampling, mel_preset)
        return 0
    if Path("-") in inputs:
        raise WavearError("- is stdin, whose frames are followed as they come: pass --stream")
    rank, world = distributed.ranks()
    resume = resume or world > 1
    if resume and out is None:
        raise WavearError("--resume and torchrun need a folder to write to: pass --out")
    if resume and seeds is not None:
        raise WavearError("--resume and torchrun take one seed: drop --seeds")
    plans = [
        plan(inputs, out, output.suffix, overwrite=overwrite or resume, ending=ending)
        for ending, _ in each
    ]
    jobs = plans[0]
    mels = files.MelInput(mel_preset, mel_seconds, force)
    if mels != files.MelInput() and not any(is_mel(job.source) for job in jobs):
        raise WavearError(
            "the inputs are recordings, and their mels fit the model: drop --mel-preset,"
            " --mel-seconds and --force"
        )
    model = load_model(checkpoint, distributed.own_device(device))
    if not resume:
        bar, status = sys.stderr.isatty(), 0
        for (_, one), jobs in zip(each, plans, strict=True):
            report = files.synthesize(model, jobs, one, mels=mels, output=output, progress=bar)
            if out is None:
                from wavear.evaluation.similarity import report_similarity

                failed = {path for path, _ in report.failed}
                made = [job for job in jobs if job.source not in failed]
                report_similarity(model, made, one.speaker)
            status = max(status, _summary(report))
        return status
    assert out is not None
    report = distributed.synthesize(
        model, jobs, out, sampling, mels=mels, output=output, overwrite=overwrite
    )
    return _summary(report) if rank == 0 else int(bool(report.failed))


def generate(
    checkpoint: Checkpoint,
    out: Annotated[Path, arg(metavar="FILE")],
    seconds: float | None = None,
    overwrite: bool = False,
    prime: Annotated[Path | None, arg(metavar="FILE")] = None,
    include_prime: bool = False,
    features: Annotated[Path | None, arg(metavar="FILE")] = None,
    device: str = "cpu",
    seeds: str | None = None,
    sampling: Sampling = Sampling(),
    output: Output = Output(),
) -> int:
    """Make audio with a model that is not conditioned on mels, from silence or after a recording.

    Example: wavear generate runs/mine/best --prime clip.wav --seconds 10 --out more.wav

    Parameters
    ----------
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name on the Hugging Face hub.
    out
        WAV, FLAC, OGG or Opus file to write.
    seconds
        Seconds of audio to make; needed unless `--features` sets the length.
    overwrite
        Replace the file if it exists.
    prime
        Recording to continue.
    include_prime
        Write the recording in front of the new audio.
    features
        Frames to follow (channels x frames: .npy, ...), of a model that was trained with them; with
        `--prime` they begin with its own.
    device
        cpu, cuda, or one card: cuda:1.
    seeds
        Make one file for each of several seeds, x-seed0.wav and so on: 0:8 is 0 to 7; or 0,3,5.
    sampling
        How the audio is made.
    output
        How it is written.
    """
    from wavear.audio import info
    from wavear.generation.files import generate_file

    each = [(out.with_stem(out.stem + end), one) for end, one in seeds_of(seeds, sampling)]
    for path, _ in each:
        refuse_target(path, overwrite)
    if output.format is not None and out.suffix.lower() != output.suffix:
        raise WavearError(
            f"--format {output.format} makes a file that ends in {output.suffix}, and --out is"
            f" {out}"
        )
    model, status = load_model(checkpoint, device), 0
    for path, one in each:
        report = generate_file(
            model,
            seconds,
            path,
            one,
            output=output,
            progress=sys.stderr.isatty(),
            prime=prime,
            include_prime=include_prime,
            features=features,
        )
        say(f"{path}  {info(path).seconds:.2f} s, {model.config.sample_rate} Hz")
        status = max(status, _summary(report))
    return status


def mel(
    inputs: Inputs,
    out: Folder,
    checkpoint: Annotated[str | None, arg(metavar="CHECKPOINT")] = None,
    preset: Annotated[str | None, arg(metavar="NAME")] = None,
    npy: bool = False,
    overwrite: bool = False,
    config: MelConfig = MelConfig(),
) -> int:
    """Compute the mel spectrograms of recordings: .npz with `mel` (bands, frames) and `config`.

    Example: wavear mel speech.wav --preset r9y9 --out mels

    Parameters
    ----------
    inputs
        Audio files, or folders of these.
    out
        Folder to write to; it is made if missing.
    checkpoint
        Make the mels this model expects, instead of those of the flags.
    preset
        Make the mels that a project publishes, instead of those of the flags: hifigan,
        nvidia-tacotron2, r9y9, espnet, espnet-24k, fatchord, parallel-wavegan,
        torchaudio-tacotron2, torchaudio-tacotron2-wavernn, librosa-default, vocos-24k,
        bigvgan-v2-24k-100, bigvgan-v2-22k-80, bigvgan-v2-44k-128.
    npy
        Write plain .npy, bands first, without the configuration.
    overwrite
        Replace files that exist.
    config
        What the mels are.
    """
    from wavear.generation.files import write_mels
    from wavear.generation.jobs import plan
    from wavear.models.checkpoint import load

    if checkpoint is not None and config != MelConfig():
        raise WavearError("--checkpoint sets what the mels are: drop the flags on mels")
    if preset is not None and (checkpoint is not None or config != MelConfig()):
        raise WavearError(
            "--preset sets what the mels are: drop --checkpoint and the flags on mels"
        )
    wanted: MelConfig | None = config if preset is None else MelConfig.preset(preset)
    jobs = plan(inputs, out, ".npy" if npy else ".npz", mels=False, overwrite=overwrite)
    if checkpoint is not None:
        wanted = load(checkpoint).config.mel
    if wanted is None:
        raise WavearError(f"{checkpoint} is not conditioned on mels: it expects none")
    return _summary(write_mels(jobs, wanted))


def _summary(report: "Report") -> int:
    """Print what was done, and return the exit status; each failure is logged already."""
    if report.files:
        say(str(report))
    total = report.files + len(report.failed)
    if report.failed and total > 1:
        count = len(report.failed)
        logger.error("%d of %d inputs could not be used, they are named above", count, total)
    return 1 if report.failed else 0
