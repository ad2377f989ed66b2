"""Settings of the docs site. `make docs` reads every page where it is in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.sphinx_ import Parser
from sphinx import addnodes
from sphinx.application import Sphinx

import wavear

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = "\0"  # stands for a colon while napoleon reads a docstring
LANDING = "docs/index"  # README.md, and the list of pages

project = "wavear"
author = "The wavear authors"
copyright = author
version = release = wavear.__version__

root_doc = LANDING
include_patterns = [
    "docs/*.md",
    "docs/*.rst",
    "docs/notebooks/*.ipynb",
    "recipes/README.md",
    "recipes/*/README.md",
    "wavear/voices/*/README.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

default_role = "code"  # single backticks in docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
myst_heading_anchors = 4  # the anchors of GitHub

html_theme = "furo"
html_title = f"wavear {version}"
html_extra_path = ["site"]
html_copy_source = False
pygments_style = "friendly"


class NotebookParser(Parser):
    """Read a notebook as Markdown: its texts, its code as fenced blocks, its outputs."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the cells of a notebook."""
        cells = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            cells.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            for output in cell.get("outputs", []):
                kind, shown = next(
                    (block, "".join(output["data"][key]))
                    for key, block in (("text/html", "{raw} html"), ("text/plain", "none"))
                    if key in output["data"]
                )
                cells.append(f"```{kind}\n{shown}\n```")
        super().parse("\n\n".join(cells), document)


def make_landing(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put README.md before the list of pages, with its links relative to `docs/`."""
    if docname.startswith("docs/"):
        source[0] = source[0].replace("](../README.md", "](index.md")
    if docname == LANDING:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?![a-z]+:|#)", "](../", readme) + "\n" + source[0]


def add_players(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put a player after each link to an MP3 file."""
    for link in list(doctree.findall(addnodes.download_reference)):
        if link.get("filename", "").endswith(".mp3"):
            address = "../" * docname.count("/") + "_downloads/" + link["filename"]
            player = f' <audio controls preload="none" src="{address}"></audio>'
            link.parent.insert(link.parent.index(link) + 1, nodes.raw("", player, format="html"))


def hide_colon(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading "a sentence: more of it" of a field as "type: description"."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(":", HIDDEN)


def show_colon(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put back what `hide_colon` replaced."""
    lines[:] = [line.replace(HIDDEN, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the parser of notebooks, the landing page and the players."""
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    app.connect("source-read", make_landing)
    app.connect("doctree-resolved", add_players)
    app.connect("autodoc-process-docstring", hide_colon, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    return {"parallel_read_safe": True}
