"""The help of the commands: its defaults, examples, names and groups."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from test_cli import run

from wavear.cli.commands import COMMANDS, _function
from wavear.cli.parsing import parse
from wavear.generation.engines import ENGINES
from wavear.mel.presets import PRESETS
from wavear.models.distributions import LAWS


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: wavear {command}" in out
    assert "default: None" not in out  # the text has what it stands for
    assert not re.search(r"--(seeds|threads|from|top-p|validation) {None}", out)
    assert out.count("\nExample: wavear ") == 1
    assert "partial(" not in out
    assert "dummy" not in out


@pytest.mark.parametrize(
    ("command", "names"),
    [("train", LAWS), ("mel", PRESETS), ("synthesize", ENGINES), ("bench", ENGINES[1:])],
)
def test_help_lists_every_name(command: str, names: Any, capsys: pytest.CaptureFixture):
    words = set(re.findall(r"[\w-]*\w", re.sub(r"-\s+", "-", run(capsys, command, "--help")[1])))
    assert set(names) <= words


@pytest.mark.parametrize("command", COMMANDS)
def test_example_in_the_help_is_accepted(command: str):
    function = _function(command)
    lines = [line.strip() for line in str(function.__doc__).splitlines()]
    (example,) = (line for line in lines if line.startswith("Example: "))
    _, wavear, name, *rest = shlex.split(example)
    assert (wavear, name) == ("wavear", command)
    parse(function, rest, "wavear")  # exits on a usage error


def test_commands_are_listed_in_groups(capsys: pytest.CaptureFixture):
    status, out, err = run(capsys, "--help")
    assert (status, err) == (0, "")
    for name in COMMANDS:
        first = str(_function(name).__doc__).partition("\n")[0]
        assert f"  {name:<12}{first}" in re.sub(r"\n {14}", " ", out)
    assert run(capsys)[0] == 2
