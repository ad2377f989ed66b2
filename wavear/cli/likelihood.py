"""`wavear score`, `wavear compress`, `wavear decompress` and `wavear infill`."""

# Annotations are objects, not strings: tyro reads them.
import math
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from wavear.cli.arguments import checkpoint_and_inputs, load_model, refuse_target
from wavear.common.atomic import check_target, say
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.words import counted

logger = get_logger(__name__)

_PAGE = "<!doctype html><meta charset=utf-8><title>infilling</title>{}"
_KEPT = {"PCM_24": "pcm24", "FLOAT": "float32"}  # other than 16 bits
_SHOWN = 5  # recordings, and windows

In = Annotated[Positional[Path], arg(metavar="IN")]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
Optional = Annotated[str | None, arg(metavar="CHECKPOINT")]


def score(
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="[CHECKPOINT] DATA")],
    against: str = "linear",
    every: float = 0.1,
    csv: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Find sounds that are odd to a model, by log-likelihood ratios over time.

    Example: wavear score runs/normal/best recordings --against linear --csv ratios.csv

    Parameters
    ----------
    paths
        A model of the sounds that are not odd: a folder that `wavear train` wrote, or
        hf:owner/name; without one the voice that comes with wavear. Then the recordings: a folder,
        a file, or a manifest (docs/data.md).
    against
        What the model is compared with: another checkpoint, or linear, prediction that adapts to
        each recording.
    every
        Seconds of a window.
    csv
        File to write a row for each window to: path, start in seconds, bits per 16-bit sample
        under the model and under the other one, their difference.
    overwrite
        Replace the file if it exists.
    """
    from wavear.common.progress import bar
    from wavear.evaluation.ratios import LINEAR, likelihood_ratios

    if csv is not None:
        check_target(csv, overwrite)
    checkpoint, data = checkpoint_and_inputs(paths)
    if len(data) != 1:
        raise WavearError(f"there are {len(data)} inputs: name one folder, file or manifest")
    model = load_model(checkpoint, "cpu")
    other = None if against == LINEAR else load_model(against, "cpu")
    found = likelihood_ratios(model, data[0], other, every=every, progress=bar)
    for name, why in found.failed:
        logger.error("%s: %s", name, why)
    if csv is not None and found.windows:
        found.write(csv)
    say("bits per sample: model, against, ratio; the oddest recordings, then the oddest windows")
    for windows, timed in ((found.of_recordings(), False), (found.windows, True)):
        for w in sorted(windows, key=lambda w: w.ratio)[:_SHOWN]:
            at = f" at {w.start:.2f} s" if timed else ""
            say(f"{w.bits:8.3f} {w.against:8.3f} {w.ratio:+8.3f}  {w.path}{at}")
    return 1 if found.failed or not found.windows else 0


def compress(source: In, out: Out, checkpoint: Optional = None, overwrite: bool = False) -> int:
    """Compress a recording without loss, by the exact distribution of every sample.

    Example: wavear compress speech.wav speech.wvr

    Parameters
    ----------
    source
        16-bit WAV or FLAC, mono or more channels.
    out
        File to write.
    checkpoint
        A model at the recording's rate: a folder that `wavear train` wrote, hf:owner/name, or
        voice, the one that comes with wavear. To decompress, the same is needed. By default linear
        prediction that adapts to the recording, for any rate.
    overwrite
        Replace the file if it exists.
    """
    from wavear.generation.compression import compress

    return _run(compress, source, out, checkpoint, overwrite)


def decompress(source: In, out: Out, checkpoint: Optional = None, overwrite: bool = False) -> int:
    """Restore a recording that `wavear compress` compressed, sample for sample.

    Example: wavear decompress speech.wvr speech.wav

    Parameters
    ----------
    source
        File that `wavear compress` wrote.
    out
        WAV or FLAC file to write.
    checkpoint
        The model that it was compressed with.
    overwrite
        Replace the file if it exists.
    """
    from wavear.generation.compression import decompress

    return _run(decompress, source, out, checkpoint, overwrite)


def infill(
    source: In,
    begin: Annotated[float, arg(name="from", metavar="SECONDS")],
    end: Annotated[float, arg(name="to", metavar="SECONDS")],
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    checkpoint: Annotated[str, arg(metavar="CHECKPOINT")] = "voice",
    features: Annotated[Path | None, arg(metavar="FILE")] = None,
    candidates: int = 16,
    seed: int = 0,
    page: Annotated[Path | None, arg(metavar="FILE.html")] = None,
    overwrite: bool = False,
) -> int:
    """Replace a damaged stretch of a recording by what fits on both sides.

    Example: wavear infill speech.wav --from 1.20 --to 1.25 --seed 3 --page mended.html

    Parameters
    ----------
    source
        Mono recording. At another rate than the model's, frequencies that the model lacks are
        filled by linear prediction.
    begin
        Start of the stretch, in seconds.
    end
        Its end.
    out
        WAV, FLAC, OGG or Opus file to write; by default speech-infilled.wav for speech.wav.
    checkpoint
        Folder that `wavear train` wrote, or hf:owner/name; by default the voice that comes with
        wavear.
    features
        Frames that condition the model instead of the recording's mel: recipes/infill.
    candidates
        Fillings to choose among.
    seed
        The same seed makes the same filling.
    page
        Page to write, with sound and spectrograms of the gap, the filling, and linear prediction
        from both sides.
    overwrite
        Replace files that exist.
    """
    import soundfile

    from wavear import audio
    from wavear.generation.infilling import at_rate, infill, janssen, seam_of
    from wavear.mel.mel_files import read_mel

    out = out or source.with_name(f"{source.stem}-infilled.wav")
    for flag, value in (("--from", begin), ("--to", end)):
        if not math.isfinite(value):
            raise WavearError(f"{flag} is {value}; it must be a time in the recording, in seconds")
    refuse_target(out, overwrite, source)
    if page is not None:
        check_target(page, overwrite, source)
    model, found = load_model(checkpoint, "cpu"), audio.info(source)
    rate = found.sample_rate
    if found.channels != 1:
        raise WavearError(
            f"{source} has {counted(found.channels, 'channel')}, expected one: fill each by itself"
        )
    waveform, gap = audio.read(source), (round(begin * rate), round(end * rate))
    known = None
    if features is not None:
        if model.config.mel is None:
            raise WavearError(f"{checkpoint} takes no features: drop --features")
        known = read_mel(features, model.config.mel)
    given: dict[str, Any] = {"features": known, "candidates": candidates, "seed": seed}
    result = infill(model, waveform, *gap, sample_rate=rate, **given)
    kept = _KEPT.get(soundfile.info(source).subtype) if out.suffix.lower() == ".wav" else None
    out.parent.mkdir(parents=True, exist_ok=True)
    audio.write(out, result.waveform, rate, kept)
    linear = janssen(waveform, *gap)
    seam = seam_of(model, *at_rate(linear, *gap, rate, model.config.sample_rate), known)
    say(f"{out}  {begin:g} to {end:g} s of {len(waveform) / rate:.2f} s, {rate} Hz")
    say(
        f"log P of the seam, nats per sample: {result.seam:.3f}; of candidates without the right"
        f" side {result.first_seam:.3f}; of linear prediction {seam:.3f}"
    )
    if page is not None:
        from wavear.common.atomic import replace_file
        from wavear.evaluation.display import side_by_side

        first, last = max(gap[0] - rate, 0), gap[1] + rate
        damaged = waveform.clone()
        damaged[slice(*gap)] = 0
        sounds = {"gap": damaged, "filled": result.waveform, "linear prediction": linear}
        html = side_by_side({name: x[first:last] for name, x in sounds.items()}, rate).html
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_file(page, lambda path: path.write_text(_PAGE.format(html), encoding="utf-8"))
        say(f"{page}  a second on each side")
    return 0


def _run(call: Any, source: Path, out: Path, checkpoint: str | None, overwrite: bool) -> int:
    model = None if checkpoint is None else load_model(checkpoint, "cpu")
    done = call(source, out, model, overwrite=overwrite, progress=sys.stderr.isatty())
    say(
        f"{out}  {done.samples / done.channels / done.sample_rate:.2f} s, {done.sample_rate} Hz,"
        f" {done.bits:.3f} bits per sample, {done.size / 2 / done.samples:.1%} of 16 bits"
        f" ({done.engine})"
    )
    return 0
