"""Arguments to a call, and a call to an exit status.

Exit status: 0 done; 1 an input cannot be used, with one line on stderr for each; 2 the command line
itself is wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger, setup_logging

logger = get_logger(__name__)

Command = Callable[[], int]  # parsed, to be run: returns the exit status
_ALIASES = {"--normalise": "--normalize", "--normalise-by": "--normalize-by"}
_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def _deferred(function: Callable[..., int]) -> Callable[..., Any]:
    """Return a function for tyro to call while it parses, so that only usage errors are raised."""

    @functools.wraps(function)
    def later(*values: Any, **named: Any) -> Any:
        return functools.partial(function, *values, **named)

    return later


def parse(function: Callable[..., int], arguments: Sequence[str], prog: str) -> Command:
    """Return `function` with its parameters from the arguments; usage errors exit with status 2."""
    named = [_aliased(argument) for argument in arguments]
    parameters = inspect.signature(function).parameters.values()
    for owner in [function, *(p.default for p in parameters), *function.__annotations__.values()]:
        _hide_none(owner)
    flags, box = _flags(function), io.StringIO()
    try:
        with contextlib.redirect_stderr(box), _wide({"-h", "--help"}.isdisjoint(named)):
            command = tyro.cli(_deferred(function), prog=prog, args=named, config=_CONFIG)
    except SystemExit as stop:
        if stop.code:
            wrong = _with_flags(_unboxed(box.getvalue()), flags)
            print(f"wavear: error: {wrong}: {prog} --help lists the options", file=sys.stderr)
        raise
    sys.stderr.write(box.getvalue())  # warnings

    def run() -> int:
        try:
            return command()
        except WavearError as error:
            raise WavearError(_with_flags(str(error), flags)) from error

    return run


@contextlib.contextmanager
def _wide(wanted: bool) -> Iterator[None]:
    """Let tyro print its errors without line breaks."""
    before = os.environ.get("COLUMNS")
    if wanted:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _unboxed(box: str) -> str:
    """Return tyro's box on one line, without the help of options."""
    parts: list[str] = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]:  # without its title
        text = line.strip("│ ")
        if text.startswith(("Argument helptext", "For full helptext")):
            break
        if not text.strip("─-"):  # between sections
            parts = [" ".join(parts) + ";"] if parts else []
        elif not text.startswith("╰") and not line.strip("│").startswith(" " * 9):
            parts.append(text)
    said = re.sub(r"^Error parsing (?!--)\w+: ", "", " ".join(parts).rstrip("; ."))
    said = said.removeprefix("MelConfig: ")
    number = r"^Error parsing (--\S+): .*(?:invalid literal|could not convert)[^:]*: (.*)$"
    return re.sub(number, r"\1 is \2; it must be a number", said)


def _with_flags(message: str, flags: dict[str, str]) -> str:
    """Name flags, not parameters, in a message.

    Names of one word are words of messages, too: they are flags before a value, before "need" and
    after "drop".

    Examples
    --------
    >>> _with_flags("seed is -1; drop top_k", {"seed": "--seed", "top_k": "--top-k"})
    '--seed is -1; drop --top-k'
    >>> _with_flags("top_k and argmax need", {"argmax": "--argmax", "top_k": "--top-k"})
    '--top-k and --argmax need'
    """
    names = "|".join(flags)
    long = "|".join(name for name in flags if "_" in name) or "(?!)"
    value = r"(?= is (?:['\d-]|nan|inf)|=| '| need\b)"
    pattern = (
        rf"(?<![\w./-])(?:(?:{long})(?![\w/-]|\.\w)"
        rf"|(?<!mel )(?:{names}){value}|(?<=drop )(?:{names})\b)"
    )
    return re.sub(pattern, lambda m: flags[m[0]], message)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _flags(function: Callable[..., Any]) -> dict[str, str]:
    """Return the flag of each parameter, and of each field of those that are dataclasses."""
    found = {}
    owners = [function, *(t for t in get_type_hints(function).values() if _is_record(t))]
    for owner in owners:
        for name, hint in get_type_hints(owner, include_extras=True).items():
            given = getattr(hint, "__metadata__", ())
            if tyro.conf.Positional not in given and not _is_record(hint):
                renamed = [each.name for each in given if getattr(each, "name", None)]
                found[name] = "--" + (renamed or [name.replace("_", "-")])[0]
    return found


def _hide_none(owner: Any) -> None:
    """Leave None out of the help of a function or dataclass: its text has what that stands for.

    "{None}|INT ... (default: None)" becomes "INT ...". A default that is a dataclass has the values
    of its fields.
    """
    defaults: dict[str, Any]
    if inspect.isfunction(owner):
        defaults = {n: p.default for n, p in inspect.signature(owner).parameters.items()}
    elif dataclasses.is_dataclass(owner):
        defaults = {f.name: getattr(owner, f.name, f.default) for f in dataclasses.fields(owner)}
        owner = owner if isinstance(owner, type) else type(owner)
    else:
        return
    plain = get_type_hints(owner)
    for name, hint in get_type_hints(owner, include_extras=True).items():
        if defaults.get(name, 0) is not None:
            continue
        given = getattr(hint, "__metadata__", ())
        if all(getattr(each, "help_behavior_hint", None) is None for each in given):
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        if all(getattr(each, "metavar", None) is None for each in given):
            types = [t for t in get_args(plain[name]) if t is not type(None)]
            if types and all(isinstance(t, type) for t in types):
                metavar = "|".join(t.__name__.upper() for t in types)
                hint = Annotated[hint, tyro.conf.arg(metavar=metavar)]
        owner.__annotations__[name] = hint


def _aliased(argument: str) -> str:
    """Return an argument with the present name of its flag."""
    name, equals, value = argument.partition("=")
    return _ALIASES.get(name.replace("_", "-"), name) + equals + value


def guarded(run: Command) -> int:
    """Run a command; return the exit status. A refusal is one line, a bug keeps its traceback."""
    try:
        with warnings.catch_warnings():
            setup_logging()
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
    except (WavearError, OSError) as error:
        _drop_unwritten()
        logger.error("%s", one_line(error))
        return 1


def _refuse_settings() -> None:
    """Refuse settings of Numba in the current directory, which is often the data's.

    They can name a folder of compiled code, which is unpickled.
    """
    if os.path.exists(".numba_config.yaml"):
        raise WavearError(
            ".numba_config.yaml in the current directory would configure the compiler: run wavear"
            " from another directory, and set the NUMBA_* environment variables instead"
        )


def _drop_unwritten() -> None:
    """Discard output that nobody reads, on which Python would fail once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
