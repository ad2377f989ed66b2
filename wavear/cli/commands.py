"""The command line: parses, calls functions that a notebook could call, prints what they did.

Exit status: 0 done; 1 something given cannot be used, in one line on stderr, or an input was passed
over; 2 the command itself is not understood; 130 interrupted.
"""

# Annotations are read by tyro, those of functions inside functions too: they stay objects, not
# strings.
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from wavear.common.atomic import say
from wavear.common.log import setup_logging

_PACKAGE = str(Path(__file__).parent)

Command = Callable[[], int]  # parsed, to be run: returns the exit status


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How audio is made: what `wavear synthesize` and `wavear generate` share."""

    seed: int = 0
    """0 or more; the same seed gives the same audio."""
    temperature: float = 1.0
    """Divides the logits: 1 as trained, below 1 duller and cleaner, above 1 noisier."""
    top_k: int | None = None
    """Draw each sample among the k likeliest values alone."""
    top_p: float | None = None
    """Draw each sample among the likeliest values that together have this probability (0.95, say), which cuts off the
    rare ones that crackle."""
    argmax: bool = False
    """Take the likeliest value always: the same audio for every seed, and it collapses to silence or a tone."""
    best_of: int = 1
    """Make so many candidates of each and keep the likeliest; takes so many times as long, and favours the plain."""
    speaker: int | None = None
    """Number of the speaker, for a model with speakers."""
    engine: str = "auto"
    """auto, numba (compiled for this CPU), triton or cuda-graph (on a CUDA device), or reference (slow, any device)."""
    weights: str = "float32"
    """float32, or, faster and slightly noisier, bfloat16 (numba, triton), int8 (numba) or float16 (triton): rounded;
    `wavear bench` measures the cost."""
    threads: int | None = None
    """CPU cores to use; all by default."""
    device: str = "cpu"
    """cpu, cuda, or one card: cuda:1."""

    @property
    def settings(self) -> dict[str, Any]:
        """For `wavear.generate`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "device"}

    @property
    def stream_settings(self) -> dict[str, Any]:
        """For `wavear.Stream`."""
        if self.best_of > 1:
            raise ValueError(
                "--best-of compares whole utterances: a stream is heard before it is done"
            )
        settings = self.settings
        del settings["best_of"]
        if settings.pop("argmax"):
            if self.top_k is not None or self.top_p is not None:
                raise ValueError(
                    "--argmax takes the likeliest code: leave --top-k and --top-p away"
                )
            settings["top_k"] = 1
        return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of those of the process.

    Returns
    -------
    int: the exit status
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return _guarded(lambda: _run(arguments))


def _guarded(run: Command) -> int:
    """The exit status of `run`; what a user did wrong is said in one line, bugs of ours keep their traceback."""
    try:
        with warnings.catch_warnings():
            setup_logging()
            warnings.showwarning = _show_warning
            _refuse_settings()
            status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("wavear: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        _drop_unwritten()
        return 1
    except (ValueError, OSError) as error:
        if not _refused(error):
            raise
        from wavear.generation.files import one_line

        _drop_unwritten()
        return _complain(one_line(error), 1)


def _refuse_settings() -> None:
    """Refuse to run where Numba would take settings from the current directory, often the data's.

    They can name a folder of compiled code, which is unpickled.
    """
    if os.path.exists(".numba_config.yaml"):
        raise ValueError(
            ".numba_config.yaml in the current directory would set up the compiler: run wavear from another directory,"
            " and set the NUMBA_* environment variables instead"
        )


def _drop_unwritten() -> None:
    """Forget output that nobody takes: Python would fail once more, and say so, when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        from wavear import __version__

        print(f"wavear {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        return _complain(f"there is no command {name!r}: {hint}", 2)
    return _parse(COMMANDS[name][1](), rest, prog=f"wavear {name}")()


def _parse(function: Callable[..., int], arguments: Sequence[str], prog: str) -> Command:
    """`function` with its parameters from the arguments, to be called: what it raises is not taken for bad usage.

    Usage errors come as one line and exit status 2, instead of tyro's boxes.
    """
    import tyro

    @functools.wraps(function)
    def later(*values: Any, **named: Any) -> Any:
        return functools.partial(function, *values, **named)

    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(later, prog=prog, args=list(arguments), config=config)
    except SystemExit as stop:
        if stop.code:
            _complain(f"{_unbox(caught.getvalue())} (see {prog} --help)", 2)
        raise


def _unbox(text: str) -> str:
    """What tyro says in a box of line-drawing characters, up to the first rule across it, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    said = []
    for line in text.splitlines():
        content = line.strip(" │╭╮╰╯")
        if content.startswith("─") and not line.startswith("╭"):
            break
        if content and not line.startswith(
            ("╭", "╰", "│" + 7 * " ")
        ):  # so far in, it is a flag's help
            said.append(content)
    message = re.sub(
        r"^Error parsing (__tyro[^:]*|config|corpus|sampling|output): ", "", " ".join(said)
    )
    return message[:1].lower() + message[1:] if message else text.strip()


def _refused(error: Exception) -> bool:
    """Whether an error is a refusal, raised on purpose and worded for users, rather than a bug of ours."""
    if os.environ.get("WAVEAR_TRACEBACK"):
        return False
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


def _complain(message: str, status: int = 1) -> int:
    print(f"wavear: error: {message}", file=sys.stderr)
    return status


def _warn(message: str) -> None:
    print(f"wavear: warning: {message}", file=sys.stderr)


_python_shows = warnings.showwarning


def _show_warning(message: Any, category: Any, filename: str, *rest: Any) -> None:
    """What we warn of ourselves reads like what else we say; other warnings are the libraries' affair."""
    if filename.startswith(_PACKAGE) and issubclass(category, UserWarning):
        _warn(" ".join(str(message).split()))
    else:
        _python_shows(message, category, filename, *rest)


def _overview() -> str:
    lines = [
        "usage: wavear COMMAND ...",
        "",
        "Autoregressive audio: train a WaveNet, make sound with it.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<12}{summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "wavear COMMAND --help lists its flags, wavear --version the version."]
    )


def _demo() -> Callable[..., int]:
    from tyro.conf import arg

    def demo(
        out: Annotated[Path, arg(metavar="DIR")] = Path("demo"),
        minutes: float = 3.5,
        seed: int = 0,
        threads: int | None = None,
        overwrite: bool = False,
    ) -> int:
        """Make sounds, train a small WaveNet on them, and hear notes it has not heard. Nothing is downloaded.

        Parameters
        ----------
        out
            Folder to write to: WAV files, a picture, the checkpoint.
        minutes
            Minutes of training.
        seed
            Of the sounds, the training and the audio; 0 or more.
        threads
            CPU cores to use; by default one to train and all to synthesize.
        overwrite
            Replace what an earlier demo wrote to the folder.
        """
        from wavear.demo.job import run

        result = run(out, minutes=minutes, seed=seed, threads=threads, overwrite=overwrite, say=say)
        return 0 if result.in_tune else 1

    return demo


def _train() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.training.config import TrainConfig, family_defaults

    @dataclasses.dataclass(frozen=True)
    class Flags(TrainConfig):
        data: Annotated[Positional[str], arg(metavar="DATA")]

    types = get_type_hints(TrainConfig)
    for name, text in family_defaults().items():  # in place of "(default: None)"
        Flags.__annotations__[name] = Annotated[
            types[name], arg(help_behavior_hint=f"(default: {text})")
        ]

    def train(config: Flags) -> int:
        """Train a model on a folder of recordings, or a manifest.

        Parameters
        ----------
        config
            The run.
        """
        return run_training(config)

    return train


def run_training(config: Any) -> int:
    """Train, and print what was done; the exit status."""
    from wavear.training.run import train

    result = train(config)
    scores = result.held_out or {
        "model": result.bits_best
    }  # an interrupt leaves no time for all of them
    bits = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    if result.stopped_by == "fit":
        say(f"fitted in {result.seconds:.1f} s")
    else:
        say(
            f"stopped by {result.stopped_by} after {result.steps} steps, {result.seconds / 60:.1f} minutes"
        )
    say(f"held-out bits per sample: {bits} (before training {result.bits_before:.3f})")
    say(f"checkpoint: {result.best}")
    return 130 if result.stopped_by == "interrupt" else 0


def recipe(
    config: Any,
    description: str | None = None,
    corpus: Any = None,
    run: Callable[[Any], int] | None = None,
) -> None:
    """The main program of a recipe: its values, each of which a flag overrides, are trained with.

    Parameters
    ----------
    config : TrainConfig, or what `run` takes
        The recipe's values.
    description : str, optional
        For --help.
    corpus : of `wavear.corpora`, optional
        What `config.data` is the folder of: it is listed in a manifest beside the run. Its fields
        become flags too, and --download gets it.
    run : callable
        What is done with the values, if not a training; it gives the exit status.
    """
    if corpus is not None:
        sys.exit(
            _guarded(
                lambda: _parse(_on_corpus(config, corpus, description), sys.argv[1:], _script())()
            )
        )

    def main(config: Any = config) -> int:
        return (run or run_training)(config)

    main.__annotations__["config"] = type(config)  # so that its fields become flags
    main.__doc__ = description
    sys.exit(_guarded(lambda: _parse(main, sys.argv[1:], _script())()))


def _script() -> str:
    return Path(sys.argv[0]).name


def _on_corpus(config: Any, corpus: Any, description: str | None) -> Callable[..., int]:
    """The main program of a recipe for a published corpus."""

    def run(config: Any = config, corpus: Any = corpus) -> int:
        from wavear.training.corpus_run import listed

        return run_training(listed(corpus, config))

    def run_or_download(config: Any = config, corpus: Any = corpus, download: bool = False) -> int:
        if not download:
            return run(config, corpus)
        from wavear.training.processes import Processes

        if Processes.here().world > 1:
            raise ValueError(
                "--download is for one process: run it once without torchrun or srun, then train"
            )
        for folder in corpus.download(config.data):
            say(f"{folder} is there")
        return 0

    main = run_or_download if corpus.get is None else run
    main.__annotations__ |= {"config": type(config), "corpus": type(corpus)}
    size = corpus.size(corpus.parts())
    told = {"config": "The run.", "corpus": "The corpus."}
    if corpus.get is None:
        told["download"] = (
            f"Get what is missing of the corpus ({size} as the recipe has it) into --data, and stop."
        )
    main.__doc__ = "\n".join(
        [
            f"{description}\n",
            f"--data is the folder that holds {', '.join(map(corpus.folder, corpus.parts()))} ({corpus.title}), or a"
            " manifest.\n",
            "Parameters\n----------",
            *(f"{name}\n    {text}" for name, text in told.items()),
        ]
    )
    return main


def _synthesize() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.generation.files import Output

    def synthesize(
        checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
        inputs: Annotated[
            Positional[list[Path]], arg(metavar="INPUT...", help_behavior_hint="(required)")
        ],
        out: Annotated[
            Path | None, arg(metavar="DIR", help_behavior_hint="(required without --stream)")
        ] = None,
        overwrite: bool = False,
        resume: bool = False,
        stream: bool = False,
        mel_preset: Annotated[str | None, arg(metavar="NAME")] = None,
        mel_seconds: float | None = None,
        force: bool = False,
        sampling: Sampling = Sampling(),
        output: Output = Output(),  # noqa: B008 (frozen)
    ) -> int:
        """Make audio from mel spectrograms, or from the mels of recordings.

        A mel of F frames becomes F * hop samples. With `- --stream`, frames from stdin become raw
        16-bit PCM on stdout as they come: ... | wavear synthesize CHECKPOINT - --stream | aplay -t
        raw -f S16_LE -c 1 -r 22050

        Parameters
        ----------
        checkpoint
            Folder that `wavear train` wrote, or owner/name on the Hugging Face hub.
        inputs
            Audio files (their mel is taken), mels (.npy, .npz, .pt, .safetensors; bands first), or
            folders of these. With --stream: -, stdin, float32 frame after frame, or a .npy array.
        out
            Folder to write to, made where it is missing. With --stream: - for stdout, the default;
            device, or device:NAME, for a sound device (needs the package sounddevice).
        overwrite
            Replace files that exist.
        resume
            Go on with a run that was cut short: the same command, whose files that exist are done.
            So it is always under torchrun, where each process makes its share.
        stream
            Follow mel frames as they come; latency and underruns are told on stderr.
        mel_preset
            What mels are that do not say it themselves, to convert them: a preset (hifigan, r9y9,
            espnet, fatchord...), or, where all but the values is as the model's: ln, log10, db,
            db01, db01-ref20, db4-ref20, linear.
        mel_seconds
            Refuse mels whose frames do not make so many seconds of audio.
        force
            Take mels that are judged wrong, or differ in what cannot be converted, as they are.
        sampling
            How the audio is made.
        output
            How it is written.
        """
        from wavear.generation import distributed
        from wavear.generation.files import plan, synthesize

        if stream:
            from wavear.generation import pipes

            if inputs != [Path("-")]:
                raise ValueError("--stream follows the frames on stdin: its one input is -")
            if output != Output() or overwrite or resume or force or mel_seconds is not None:
                raise ValueError(
                    "--stream makes raw 16-bit PCM of frames whose end is not known: leave --format, --normalize,"
                    " --fade, --overwrite, --resume, --mel-seconds and --force away"
                )
            settings = sampling.stream_settings
            return pipes.run(
                _load(checkpoint, sampling.device),
                str(out or "-"),
                mel_source=mel_preset,
                **settings,
            )
        if Path("-") in inputs:
            raise ValueError("- is stdin, whose frames are followed as they come: pass --stream")
        if out is None:
            return _complain(
                "the following arguments are required: --out (see wavear synthesize --help)", 2
            )
        rank, world = distributed.ranks()
        resume = resume or world > 1
        jobs = plan(inputs, out, output.suffix, overwrite=overwrite or resume)
        model = _load(checkpoint, distributed.own_device(sampling.device))
        settings: dict[str, Any] = {
            "mel_source": mel_preset,
            "mel_seconds": mel_seconds,
            "force": force,
        }
        settings |= {"output": output, **sampling.settings}
        heard: dict[str, Any] = {"say": say, "complain": _complain, "warn": _warn}
        if resume:
            report = distributed.synthesize(
                model, jobs, out, rank, world, overwrite, settings, **heard
            )
        else:
            report = synthesize(model, jobs, progress=sys.stderr.isatty(), **settings, **heard)
        return _summary(report) if rank == 0 else int(bool(report.failed))

    return synthesize


def _generate() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.generation.files import FORMATS, Output

    def generate(
        checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
        seconds: float,
        out: Annotated[Path, arg(metavar="FILE")],
        overwrite: bool = False,
        prime: Annotated[Path | None, arg(metavar="FILE")] = None,
        include_prime: bool = False,
        sampling: Sampling = Sampling(),
        output: Output = Output(),  # noqa: B008 (frozen)
    ) -> int:
        """Make audio freely, with a model that is not conditioned on mels; from silence, or going on from a recording.

        Parameters
        ----------
        checkpoint
            Folder that `wavear train` wrote, or owner/name on the Hugging Face hub.
        seconds
            Seconds of audio to make.
        out
            WAV, FLAC, OGG or Opus file to write.
        overwrite
            Replace the file if it exists.
        prime
            Recording to go on from.
        include_prime
            Write the recording in front of what follows it.
        sampling
            How the audio is made.
        output
            How it is written.
        """
        from wavear.audio.waveforms import info
        from wavear.generation.files import generate_file

        _check_file(out, overwrite, sorted({suffix for suffix, _ in FORMATS.values()}))
        if output.format is not None and out.suffix.lower() != output.suffix:
            raise ValueError(
                f"--format {output.format} makes a file that ends in {output.suffix}, and --out is {out}"
            )
        model = _load(checkpoint, sampling.device)
        report = generate_file(
            model,
            seconds,
            out,
            prime=prime,
            include_prime=include_prime,
            output=output,
            progress=sys.stderr.isatty(),
            say=say,
            warn=_warn,
            **sampling.settings,
        )
        say(f"{out}  {info(out).seconds:.2f} s, {model.config.sample_rate} Hz")
        return _summary(report)

    return generate


def _mel() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.mel.spectrogram import MelConfig

    def mel(
        inputs: Annotated[
            Positional[list[Path]], arg(metavar="INPUT...", help_behavior_hint="(required)")
        ],
        out: Annotated[Path, arg(metavar="DIR")],
        checkpoint: Annotated[str | None, arg(metavar="CHECKPOINT")] = None,
        preset: Annotated[str | None, arg(metavar="NAME")] = None,
        npy: bool = False,
        overwrite: bool = False,
        config: MelConfig = MelConfig(),  # noqa: B008 (frozen)
    ) -> int:
        """Take the mel spectrograms of recordings: .npz with `mel` (bands, frames) and `config`.

        Parameters
        ----------
        inputs
            Audio files, or folders of these.
        out
            Folder to write to, made where it is missing.
        checkpoint
            Take the mels this model expects; the flags on mels are then not needed, and refused.
        preset
            Take the mels that a project publishes: hifigan, nvidia-tacotron2, r9y9, espnet,
            espnet-24k, fatchord, parallel-wavegan, torchaudio-tacotron2,
            torchaudio-tacotron2-wavernn, librosa-default. Likewise.
        npy
            Write plain .npy, bands first, without saying what the mels are.
        overwrite
            Replace files that exist.
        config
            What the mels are.
        """
        from wavear.generation.files import plan, write_mels
        from wavear.models.checkpoint import load

        if checkpoint is not None and config != MelConfig():
            raise ValueError("--checkpoint says what the mels are: leave the flags on mels away")
        if preset is not None and (checkpoint is not None or config != MelConfig()):
            raise ValueError(
                "--preset says what the mels are: leave --checkpoint and the flags on mels away"
            )
        config = config if preset is None else MelConfig.preset(preset)
        jobs = plan(inputs, out, ".npy" if npy else ".npz", mels=False, overwrite=overwrite)
        if checkpoint is not None:
            config = load(checkpoint).config.mel
            if config is None:
                raise ValueError(
                    f"{checkpoint} is not conditioned on mels: it says nothing about them"
                )
        return _summary(write_mels(jobs, config, say=say, complain=_complain))

    return mel


def _info() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    def info(checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]) -> int:
        """Say what a checkpoint is: size, cost per sample, receptive field, mels, training.

        Parameters
        ----------
        checkpoint
            Folder that `wavear train` wrote, or owner/name on the Hugging Face hub.
        """
        from wavear.models.info import describe

        rows = describe(checkpoint)
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            say(f"{label:<{width}}  {value}")
        return 0

    return info


def _evaluate() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.evaluation.evaluation import EvaluateConfig

    def evaluate(
        checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
        data: Annotated[Positional[str], arg(metavar="DATA")],
        out: Annotated[Path, arg(metavar="DIR")],
        config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 (frozen)
    ) -> int:
        """Exact bits per sample of held-out recordings, copy synthesis measured beside its bounds, and a report.

        Parameters
        ----------
        checkpoint
            Folder that `wavear train` wrote, or owner/name on the Hugging Face hub.
        data
            Held-out recordings: a folder, a file, or a manifest.
        out
            Folder to write to: report.html, evaluation.json, audio/.
        config
            How to evaluate.
        """
        from wavear.evaluation.evaluation import evaluate

        result = evaluate(
            checkpoint, data, out, config, progress=sys.stderr.isatty(), say=say, complain=_complain
        )
        for line in result.summary():
            say(line)
        return 1 if result.record["failed"] else 0

    return evaluate


def _index() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    def index(
        data: Annotated[Positional[str], arg(metavar="DATA")],
        beside: bool = False,
        processes: int | None = None,
    ) -> int:
        """Read the headers of all files of a large corpus once and keep what they say, for every run to come.

        Only new and changed files are looked into, and one that was stopped goes on where it was.
        `wavear train` does the same by itself from 1000 files on.

        Parameters
        ----------
        data
            Recordings: a folder, a manifest, or tar shards (a pattern in quotes, such as
            'shards/{000..012}.tar').
        beside
            Keep the index beside the data, for everybody who reads them there, rather than in your
            cache.
        processes
            To look into files with; by default one per core, up to 16.
        """
        from wavear.data.corpus import index
        from wavear.training.run import _bar

        report = index(data, beside=beside, processes=processes, progress=_bar)
        for note in report.notes:
            _warn(note)
        for name, why in report.bad[:20]:
            _complain(f"{name}: {why}")
        if len(report.bad) > 20:
            _complain(f"... and {len(report.bad) - 20} more")
        rates = ", ".join(map(str, report.rates))
        say(
            f"{report.files} files, {report.new} of them new or changed; {len(report.bad)} cannot be used"
        )
        say(
            f"{report.recordings} recordings, {report.seconds / 3600:.2f} hours of audio, {rates or 'no'} Hz"
        )
        say(f"index: {report.folder or 'not kept'}")
        return 1 if report.bad else 0

    return index


def _shards() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    def shards(
        data: Annotated[Positional[str], arg(metavar="DATA")],
        out: Annotated[Path, arg(metavar="DIR")],
        megabytes: float = 256.0,
        speakers: bool = False,
        seed: int = 0,
    ) -> int:
        """Put recordings into tar shards, for an object store: DIR/shard-000000.tar and so on, files byte for byte.

        `wavear train 'DIR/*.tar'` trains on them, as does whatever reads webdataset's shards.

        Parameters
        ----------
        data
            Recordings: a folder, or a manifest of whole files.
        out
            Folder to write to: empty, or not there yet.
        megabytes
            A shard is closed when it has so many.
        speakers
            The first level of a folder's sub-folders names the speakers; a manifest's column
            `speaker` always counts.
        seed
            Of the order of the files: it is shuffled, so that each shard is a sample of all.
        """
        from wavear.data.shards import write_shards
        from wavear.training.run import _bar

        report = write_shards(
            data, out, megabytes=megabytes, speakers=speakers, seed=seed, progress=_bar
        )
        for name, why in report.failed:
            _complain(f"{name}: {why}")
        first, last = report.shards[0].name, report.shards[-1].name
        say(
            f"{out}  {len(report.shards)} shards, {first} to {last}, {report.files} files, {report.bytes / 1e6:.1f} MB"
        )
        return 1 if report.failed else 0

    return shards


def _compare() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    from wavear.evaluation.evaluation import EvaluateConfig

    def compare(
        sources: Annotated[
            Positional[list[str]], arg(metavar="A B...", help_behavior_hint="(two or more)")
        ],
        out: Annotated[Path, arg(metavar="DIR")],
        data: Annotated[str | None, arg(metavar="DATA")] = None,
        models: bool = False,
        config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 (frozen)
    ) -> int:
        """Put checkpoints or evaluations side by side: two of the same codes clip by clip, others as a table.

        The table has models of any family, law and quantisation: bits, cost, speed, and what each
        makes after the same beginning.

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
            The table for two models of the same codes, too.
        config
            How to evaluate them.
        """
        from wavear.evaluation.evaluation import compare, compare_models, same_codes

        if len(sources) < 2:
            raise ValueError("compare needs two models or more")
        complaints: list[str] = []

        def complain(line: str) -> None:
            complaints.append(line)
            _complain(line)

        told: dict[str, Any] = {"progress": sys.stderr.isatty(), "say": say, "complain": complain}
        if len(sources) == 2 and not models and same_codes(*sources):
            found = compare(sources[0], sources[1], out, data, config, **told)
        else:
            found = compare_models(sources, out, data, config, **told)
        for line in found.summary():
            say(line)
        return 1 if complaints else 0

    return compare


def _bench() -> Callable[..., int]:
    from tyro.conf import Positional, arg

    def bench(
        checkpoint: Annotated[Positional[str | None], arg(metavar="CHECKPOINT")] = None,
        shape: str | None = None,
        layers: int = 20,
        stacks: int = 2,
        kernel_size: int = 2,
        residual_channels: int = 64,
        skip_channels: int = 128,
        head_channels: int = 256,
        classes: int = 256,
        sample_rate: int = 22050,
        unconditional: bool = False,
        engines: tuple[str, ...] = (),
        weights: tuple[str, ...] = (),
        batches: tuple[int, ...] = (),
        device: str = "cpu",
        threads: int | None = None,
        seconds: float = 2.0,
    ) -> int:
        """How fast a network generates on this machine, what share of the machine's limit that is, and how exact.

        Without a checkpoint the weights are random: so a network's speed is known before it is
        trained.

        Parameters
        ----------
        checkpoint
            Folder that `wavear train` wrote, or owner/name on the Hugging Face hub; else the flags
            say what to measure.
        shape
            A published network instead of the flags below; `--shape list` lists them.
        layers
            Dilated convolutions; a multiple of the stacks.
        stacks
            The dilation doubles from layer to layer and restarts at 1 in each stack.
        kernel_size
            Taps of each dilated convolution.
        residual_channels
            Channels of the signal that runs through the layers.
        skip_channels
            Channels of the sum over layers that the head reads.
        head_channels
            Channels between the two layers of the head.
        classes
            Mu-law codes.
        sample_rate
            Of the audio, Hz.
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
        from wavear.benchmark import speed as benchmark

        if shape == "list":
            for name, (text, _) in benchmark.SHAPES.items():
                say(f"{name:<16}{text}")
            return 0
        flags = {
            "layers": layers,
            "stacks": stacks,
            "kernel_size": kernel_size,
            "residual_channels": residual_channels,
            "skip_channels": skip_channels,
            "head_channels": head_channels,
            "classes": classes,
            "sample_rate": sample_rate,
        }
        defaults = inspect.signature(bench).parameters
        changed = [name for name, value in flags.items() if value != defaults[name].default]
        changed += ["unconditional"] * (unconditional and checkpoint is not None)
        if changed and (given := checkpoint or shape):
            raise ValueError(
                f"{given} says what the network is: leave --{changed[0].replace('_', '-')} away"
            )
        benchmark.run(
            None if checkpoint is None else _load(checkpoint, "cpu"),
            device=_device(device),
            shape=shape,
            settings=flags,
            unconditional=unconditional,
            engines=engines,
            weights=weights,
            batches=batches,
            threads=threads,
            seconds=seconds,
            say=say,
        )
        return 0

    return bench


# Name: what it does, and what makes the function to parse for (with imports that only it needs).
COMMANDS: dict[str, tuple[str, Callable[[], Callable[..., int]]]] = {
    "demo": (
        "make sounds, train on them, and hear the result: five minutes, nothing downloaded",
        _demo,
    ),
    "train": ("train a model on a folder of recordings", _train),
    "index": ("look into the files of a large corpus once, for every run to come", _index),
    "shards": ("put recordings into tar shards, for an object store", _shards),
    "synthesize": ("mels, or recordings, to audio", _synthesize),
    "generate": ("audio from a model that needs no mel", _generate),
    "mel": ("recordings to mels", _mel),
    "evaluate": (
        "how good a model is: bits per sample, copy synthesis beside its bounds, a report",
        _evaluate,
    ),
    "compare": ("two checkpoints side by side, clip by clip", _compare),
    "info": ("what a checkpoint is", _info),
    "bench": ("how fast a network generates on this machine, before it is trained", _bench),
}


def _load(checkpoint: str, device: str) -> Any:
    from wavear.models.checkpoint import load

    return load(checkpoint, _device(device))


def _device(device: str) -> str:
    """It, if it is there."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device is {device!r}, it must be cpu, cuda, or one card as cuda:1")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {device!r}, and there is no CUDA device here: use cpu")
    return device


def _check_file(out: Path, overwrite: bool, suffixes: Sequence[str]) -> None:
    if out.suffix.lower() not in suffixes:
        raise ValueError(
            f"{out} is no audio file by its name: --out takes a {', '.join(suffixes)} file"
        )
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: --out takes a file")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another name, or pass --overwrite")


def _summary(report: Any) -> int:
    """Print what was done; what was not has been said where it happened."""
    if report.files:
        say(str(report))
    total = report.files + len(report.failed)
    if report.failed and total > 1:
        _complain(f"{len(report.failed)} of {total} inputs could not be used, they are named above")
    return 1 if report.failed else 0
