"""Imports point one way: modules import only from their floor or lower ones, without circles."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import wavear

ROOT = Path(wavear.__file__).resolve().parent
# The lowest floor first.
FLOORS = (
    "common", "audio", "mel", "data", "models", "exchange", "generation", "evaluation", "training",
    "benchmark", "demo", "serving", "cli",
)  # fmt: skip
MODULES = {
    ".".join(["wavear", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports_in(source: str, module: str) -> set[str]:
    """Return the modules of wavear that a module imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            }
    return {name for name in found if name in MODULES and name != module}


GRAPH = {name: imports_in(path.read_text(encoding="utf-8"), name) for name, path in MODULES.items()}


def floor_of(module: str) -> int:
    """Return the number of a module's floor; the package `wavear` itself is above all of them."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if floor_of(other) > floor_of(module) and other != "wavear"
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter({name: others - {"wavear"} for name, others in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_downward():
    assert upward(GRAPH) == []


def test_imports_form_no_circle():
    assert circle(GRAPH) == []


def test_an_upward_import_and_a_circle_are_found():
    graph = GRAPH | {"wavear.audio.grid": GRAPH["wavear.audio.grid"] | {"wavear.models.base"}}
    assert "wavear.audio.grid imports wavear.models.base" in upward(graph)
    assert circle(graph)


def test_every_package_is_a_floor():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(FLOORS)


@pytest.mark.parametrize(
    "name", [name for name in wavear.__all__ if callable(getattr(wavear, name))]
)
def test_public_functions_and_modules_have_distinct_names(name):
    assert name not in {module.rsplit(".", 1)[-1] for module in MODULES}


@pytest.mark.parametrize(
    "path", MODULES.values(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_files_have_at_most_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
