"""The entry point: choose a command by the first argument, or list all of them.

Importing torch takes seconds: commands import it when they run, so that their help does not.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from wavear import __version__

GROUPS = {
    "Make audio": ("synthesize", "generate", "serve", "mel", "demo"),
    "Train": ("train", "index", "shards"),
    "Measure": ("evaluate", "compare", "bench"),
    "Likelihood": ("score", "compress", "decompress", "infill"),
    "Checkpoints": ("info", "push", "import", "export"),
}
"""The commands, as the help groups them: functions in the modules of this package."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of those of the process.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-V", "--version"):
        print(f"wavear {__version__}")
        return 0
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if not name:
        print(overview(), file=sys.stderr)
        return 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        wrong = f"there is no command {name}: {hint}wavear --help lists all"
        print(f"wavear: error: {wrong}", file=sys.stderr)
        return 2
    from wavear.cli.parsing import guarded, parse

    return guarded(lambda: parse(_function(name), rest, f"wavear {name}")())


def _function(name: str) -> Callable[..., int]:
    """Return a command, and import its module only."""
    if name in ("synthesize", "generate", "mel"):
        from wavear.cli import synthesis as module
    elif name == "train":
        from wavear.cli import training as module
    elif name in ("index", "shards"):
        from wavear.cli import data as module
    elif name in ("evaluate", "compare", "bench"):
        from wavear.cli import evaluation as module
    elif name in GROUPS["Likelihood"]:
        from wavear.cli import likelihood as module
    elif name in ("import", "export"):
        from wavear.cli import exchange as module
    else:
        from wavear.cli import models as module
    return getattr(module, f"{name}_" if keyword.iskeyword(name) else name)


def overview() -> str:
    """Return the list of commands, with the first line of each one's docstring."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                found.setdefault(node.name.rstrip("_"), line)
    lines = ["usage: wavear COMMAND ...", "", "Autoregressive audio: train a WaveNet, make sound."]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += textwrap.wrap(
                found[name], 96, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14
            )
    lines += ["", "wavear COMMAND --help lists the options of a command; wavear --version."]
    return "\n".join(lines)
