"""`wavear train`, and the main program of a recipe."""

# Annotations are objects, not strings: tyro reads those of functions inside functions, too.
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tyro.conf import Positional, arg

from wavear.cli.parsing import guarded, parse
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.words import counted
from wavear.training.combinations import refuse_unused
from wavear.training.config import (
    FREE_RUN_LEAST_MINUTES,
    FREE_RUN_SHARE,
    TrainConfig,
    family_defaults,
)


@dataclasses.dataclass(frozen=True)
class _Values(TrainConfig):
    """The settings as flags, in help and messages."""


_Values.__annotations__["from_checkpoint"] = Annotated[
    str | None, arg(name="from", metavar="CHECKPOINT")
]
# The default of a field that is None depends on others: show that instead.
_types = get_type_hints(TrainConfig)
_share = (
    f"{FREE_RUN_SHARE} of --max-minutes from {FREE_RUN_LEAST_MINUTES:g} on; below all with --from,"
    " otherwise 0; 0 without --max-minutes and on several processes"
)
for _name, _text in (family_defaults() | {"free_run": _share}).items():
    _Values.__annotations__[_name] = Annotated[
        _types[_name], arg(help_behavior_hint=f"(default: {_text})")
    ]


@dataclasses.dataclass(frozen=True)
class _Flags(_Values):
    data: Annotated[Positional[str], arg(metavar="DATA")]


def train(config: _Flags) -> int:
    """Train a model on a folder of recordings, or a manifest.

    Example: wavear train my/recordings --out runs/mine --max-minutes 60

    Parameters
    ----------
    config
        The run.
    """
    refuse_unused(config)
    return run_training(config)


def run_training(config: Any) -> int:
    """Train and print the result; return the exit status."""
    from wavear.training.processes import Processes
    from wavear.training.run import train

    result = train(config)
    if Processes.here().rank:
        return 130 if result.stopped_by == "interrupt" else 0
    # An interrupt leaves no time for all the scores.
    scores = result.held_out or {"model": result.bits_best}
    bits = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    if result.stopped_by == "fit":
        say(f"fitted in {result.seconds:.1f} s")
    else:
        steps, minutes = counted(result.steps, "step"), result.seconds / 60
        say(f"stopped by {result.stopped_by} after {steps}, {minutes:.1f} minutes with validations")
    say(f"held-out bits per sample: {bits} (before training {result.bits_before:.3f})")
    say(f"checkpoint: {result.best}")
    return 130 if result.stopped_by == "interrupt" else 0


def recipe(
    config: Any,
    description: str | None = None,
    corpus: Any = None,
    run: Callable[[Any], int] | None = None,
) -> None:
    """Run the main program of a recipe: train with its values, each of which a flag overrides.

    Parameters
    ----------
    config : TrainConfig, or the argument of `run`
        The recipe's values.
    description : str, optional
        For --help.
    corpus : of `wavear.corpora`, optional
        The corpus in the folder `config.data`: it is listed in a manifest next to the run. Its
        fields become flags too, and --download gets it.
    run : callable
        Called with the values instead of a training; returns the exit status.
    """

    if isinstance(config, TrainConfig):
        config = _Values(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def values_only(config: Any = config) -> int:
        return (run or run_training)(config)

    values_only.__annotations__["config"] = type(config)  # so that its fields become flags
    values_only.__doc__ = description
    main = values_only if corpus is None else _on_corpus(config, corpus, description)
    sys.exit(guarded(lambda: parse(main, sys.argv[1:], Path(sys.argv[0]).name)()))


def _on_corpus(config: Any, corpus: Any, description: str | None) -> Callable[..., int]:
    """Return the main program of a recipe for a published corpus."""

    def run(config: Any = config, corpus: Any = corpus) -> int:
        from wavear.training.corpus_run import listed

        return run_training(listed(corpus, config))

    def run_or_download(config: Any = config, corpus: Any = corpus, download: bool = False) -> int:
        if not download:
            return run(config, corpus)
        from wavear.training.processes import Processes

        if Processes.here().world > 1:
            raise WavearError(
                "--download is for one process: run it once without torchrun or srun, then train"
            )
        for folder in corpus.download(config.data):
            say(f"{folder} is there")
        return 0

    main = run_or_download if corpus.get is None else run
    main.__annotations__ |= {"config": type(config), "corpus": type(corpus)}
    folders = ", ".join(map(corpus.folder, corpus.parts()))
    lines = [
        f"{description}\n",
        f"--data is the folder that holds {folders} ({corpus.title}), or a manifest.\n",
        "Parameters\n----------",
        "config\n    The run.",
        "corpus\n    The corpus.",
    ]
    if corpus.get is None:
        size = corpus.size(corpus.parts())
        lines.append(
            f"download\n    Download the missing parts of the corpus ({size} with the recipe's"
            " values) into --data, and stop."
        )
    main.__doc__ = "\n".join(lines)
    return main
