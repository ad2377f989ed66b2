"""Pages, packaging and code agree: links, commands, flags, make targets, versions."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import os
import re
from pathlib import Path

import pytest

import wavear
from wavear.cli.commands import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("recipes/**/*.md"),
        *ROOT.glob("bench/*.md"),
    ]
)
MODULES = sorted(ROOT.glob("wavear/**/*.py"))
RECIPES = sorted(ROOT.glob("recipes/**/*.py"))


# `wavear COMMAND` and its flags, up to the end of the line or span, a pipe or a comment.
COMMAND = re.compile(r"\bwavear ([a-z]+)\b([^|#`\n]*)")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_in(page: str) -> list[str]:
    """Return everything that a Markdown page sets as code: fenced blocks, indented lines, spans."""
    fenced = re.findall(r"^```.*?^```", page, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return (
        fenced + re.findall(r"^ {4,}.*$", rest, flags=re.MULTILINE) + re.findall(r"`[^`\n]+`", rest)
    )


def imports_of_wavear(path: Path) -> set[str]:
    """Return the absolute names of everything of wavear that a file imports."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "wavear"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_a_page_lead_to_files(page):
    targets = re.findall(r"\]\(<?([^)\s>]+)", page.read_text(encoding="utf-8"))
    targets += re.findall(r'(?:src|href)="([^"]+)"', page.read_text(encoding="utf-8"))
    files = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_anchors_of_links_exist(page):
    targets = re.findall(r"\]\(([^)\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    pages = [(page.parent / file if file else page, anchor) for file, anchor in targets]
    assert [anchor for file, anchor in pages if anchor not in anchors(file)] == []


@functools.cache
def flags_of(command: str) -> set[str]:
    """Return the flags that `wavear COMMAND --help` lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_and_flags_on_a_page_exist(page):
    code = re.sub(r"\\\n", " ", "\n".join(code_in(page.read_text(encoding="utf-8"))))
    unknown = []
    for command, rest in COMMAND.findall(code):
        if "error" in rest or command == "import":
            continue
        known = flags_of(command)
        unknown += [f"wavear {command}"] if not known else []
        flags = re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", rest)
        unknown += [f"wavear {command} {flag}" for flag in flags if flag not in known]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_on_a_page_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "test-slow", "lint"} <= targets
    named = re.findall(
        r"(?<!\.py )\bmake ([a-z][a-z-]*)", "\n".join(code_in(page.read_text(encoding="utf-8")))
    )
    assert set(named) <= targets


def test_version_is_the_same_everywhere():
    def version_in(file: str, pattern: str) -> str:
        match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert match, f"no version in {file}"
        return match[1]

    assert version_in("pyproject.toml", r'^version = "(.+)"$') == wavear.__version__
    assert version_in("CITATION.cff", r"^version: (\S+)$") == wavear.__version__
    assert version_in("CHANGELOG.md", r"^## (\S+)") == wavear.__version__  # the newest comes first


def test_continuous_integration_can_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("recipe", RECIPES, ids=relative)
def test_recipes_import_only_public_names(recipe):
    public = {"wavear", "wavear.audio", "wavear.cli.recipe"} | {
        f"wavear.{name}" for name in wavear.__all__
    }
    public |= {"wavear.demo.VALUES", "wavear.demo.write_notes"}  # of the demo's own recipe
    assert imports_of_wavear(recipe) <= public
