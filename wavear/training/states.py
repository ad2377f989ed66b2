"""The last training states of a run: which are kept, which is the last good one, and what a killed run leaves behind.

A run keeps them in `states/`, named by the steps taken; runs of the first versions have one
`resume.safetensors`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavear.training.state import load_state

FOLDER, OLD = "states", "resume.safetensors"
_NAME = re.compile(r"step-(\d+)\.safetensors")


def state_path(out: str | Path, step: int) -> Path:
    """Where the state after `step` steps lies.

    Examples
    --------
    >>> state_path("runs/mine", 1000).as_posix()
    'runs/mine/states/step-00001000.safetensors'
    """
    return Path(out) / FOLDER / f"step-{step:08}.safetensors"


def state_paths(out: str | Path) -> list[Path]:
    """The states of a run, the last one first."""
    found = [
        (int(match[1]), path)
        for path in (Path(out) / FOLDER).glob("*")
        if (match := _NAME.fullmatch(path.name))
    ]
    old = Path(out) / OLD
    return [path for _, path in sorted(found, reverse=True)] + [old] * old.is_file()


@dataclass
class Found:
    """The state to go on from."""

    path: Path
    state: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    """Messages of later ones that cannot be used."""


def last_good_state(out: str | Path) -> Found | None:
    """The last state of a run that is whole, or None if the run has written none yet.

    Raises
    ------
    ValueError
        If there are states and none is good; the message names each.
    """
    damaged = []
    for path in state_paths(out):
        try:
            return Found(path, load_state(path), damaged)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"{out} holds no good state to resume: {'; '.join(damaged)}")
    return None


def prune_states(out: str | Path, step: int, keep: int) -> None:
    """Keep the last `keep` states up to `step`. Later ones are of a run that could not be resumed: they go too."""
    kept = 0
    for path in state_paths(out):
        match = _NAME.fullmatch(path.name)
        kept += match is None or int(match[1]) <= step
        if kept > keep or (match is not None and int(match[1]) > step):
            path.unlink(missing_ok=True)


def sweep(out: str | Path) -> None:
    """Remove the half-written files of a run that was killed; what they were to replace is whole."""
    for folder in ("", FOLDER, "best", "last"):
        for path in (Path(out) / folder).glob(".wavear-*.tmp"):
            path.unlink(missing_ok=True)
