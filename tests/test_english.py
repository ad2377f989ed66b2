"""Docstrings, comments, messages and pages are in plain English.

Each entry of `PHRASES` is a turn of phrase that readers stumble over, and what to write instead.
Code spans in backticks are not checked.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("wavear", "recipes", "bench", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__).resolve()
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")])


class Phrase(NamedTuple):
    pattern: str
    instead: str
    pages_only: bool = False


# Words that may stand before "alone" where it means "by itself".
BY_ITSELF = (
    "it|them|leaves?|left|leaving|let|is|are|was|were|be|been|stands?|runs?|ran|running|works?|"
    "alive|used|made|scored|computed|generated|synthesized|measured|trained|again"
)
PHRASES = (
    Phrase(r"\b(go|goes|going|went|gone) on(?! the )\b", "resume, continue"),
    Phrase(
        r"(?<!\bthere )(?<!\bthere's )\b(is|are|was|were|be) no (?!longer|more|less|fewer|later|"
        r"earlier|larger|smaller|better|worse|help|matter)",
        "is not a, are not",
    ),
    Phrase(r"\blets it\b", "name what the program does"),
    Phrase(r"(?<![-\w])beside\b(?!=| : |\(| Keep)", "next to, compared with, in addition to"),
    Phrase(r"\btak(e|es|ing) (it|them|this|that|these|each) for\b|\btaken for\b", "treat as"),
    Phrase(r"\bwhat\b[^.;:,]{1,30}\btakes for\b", "treat as"),
    Phrase(
        r"\b(passed|passing) over\b(?! (one|each|the|all|a)\b)|"
        r"\b(to|and|or|will|they|we) pass over\b",
        "skip, omit",
    ),
    Phrase(r"\b(says|said|saying)\b", "gives, states, defines, prints, contains"),
    Phrase(r"\b(tells|told|telling)\b(?![^.;]{0,30}\bapart\b)", "prints, shows, reports, warns"),
    Phrase(r"\b(knows|knew)\b", "has, stores, supports"),
    Phrase(rf"(?<![\w-])(?!(?:{BY_ITSELF})\b)[\w'`)]+,? alone\b", "only"),
    Phrase(r"\b(that|what|which) (is|are) no numbers?\b|\bgives? no number\b", "non-finite"),
    Phrase(r"\bleft away\b|\bleav(e|es|ing) (\S+ ){1,4}?away\b", "drop, omit"),
    Phrase(r"\banew\b", "again, from scratch"),
    Phrase(r"\bto the bit\b", "bit for bit"),
    Phrase(r"\b(for|by|in|of|makes?|takes?|after|with) so many\b(?! that)", "N, this many"),
    Phrase(r"\b(is|are|was|too|as) dear\b|\bdearer\b", "expensive"),
    Phrase(r"\b(frames?|samples?|mels?) to come\b", "future frames"),
    Phrase(r"\bwhat lies before\b|\bwhat came before\b", "context"),
    Phrase(r"\brooms\b|\b(its|each|every|one) room\b(?! for)", "module"),
    Phrase(r"\bin the midst of\b", "within"),
    Phrase(r"\bhave? to hand\b|\bat hand\b", "available"),
    Phrase(r"\bit may be that\b", "may"),
    Phrase(r"\bthe other way round\b", "vice versa"),
    Phrase(r"\bthe like of\b|\band the like\b", "and so on"),
    Phrase(r"\bwherefore\b|\bwhereupon\b|\bupon which\b|\bthereof\b", "then"),
    Phrase(r"(?<!power )(?<!mu-)\blaws?\b(?!\.md)", "distribution", pages_only=True),
)
# How the first line of a docstring must not begin: it is a sentence, not a noun clause.
CLAUSE = re.compile(r"(What|Whether|Of|Those|That|Whose|Whoever) ")


def without_code(text: str) -> str:
    """Blank out code spans, addresses and link targets, and keep the lines as they are."""
    blank = r"``[^`]*``|`[^`]*`|\]\([^)]*\)|https?://\S+"
    return re.sub(blank, lambda match: re.sub(r"[^\n]", "_", match[0]), text)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every run of comments."""
    line, text = 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or "noqa" in token.string or "type:" in token.string:
            continue
        row, content = token.start[0], token.string.lstrip("#")
        if text and row == line + text.count("\n") + 1:
            text += "\n" + content
            continue
        if text:
            yield line, text
        line, text = row, content
    if text:
        yield line, text


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of everything in a file that people read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        code = r"^```.*?^```|^(?: {4,}| *\$ )[^\n]*|^<!--.*?-->"
        flags = re.DOTALL | re.MULTILINE
        yield 1, re.sub(code, lambda match: "\n" * match[0].count("\n"), source, flags=flags)
        return
    yield from comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the docstrings of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None) if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()


def findings(line: int, text: str, page: bool = False) -> list[str]:
    """Return "line: 'phrase', write: instead" for each banned phrase in a text."""
    text = without_code(text)
    words = [match.start() for match in re.finditer(r"\S+", text)]
    flat = " ".join(text.split())  # a phrase may be broken over two lines
    found = []
    for phrase in PHRASES:
        if phrase.pages_only and not page:
            continue
        for match in re.finditer(phrase.pattern, flat, flags=re.IGNORECASE):
            first = words[flat.count(" ", 0, match.start())]
            at = line + text.count("\n", 0, first)
            found.append(f"{at}: {match[0]!r}, write: {phrase.instead}")
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name)
def test_no_banned_phrase(path: Path):
    page = path.suffix == ".md"
    assert sorted(f for line, text in texts(path) for f in findings(line, text, page)) == []


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts], ids=name)
def test_docstrings_begin_with_a_sentence(path: Path):
    source = path.read_text(encoding="utf-8")
    bad = [f"{line}: {text[:60]}" for line, text in docstrings(source) if CLAUSE.match(text)]
    assert bad == []


@pytest.mark.parametrize(
    "text",
    [
        "An index that was stopped goes\non where it was.",
        "if x is no directory",
        "the clips beside it",
        "the weights alone",
        "files are passed over",
        "what the header says",
        "leave --speakers away",
        "mels that do not tell, which the user is told",
    ],
)
def test_a_banned_phrase_is_found(text: str):
    assert findings(1, text)


@pytest.mark.parametrize(
    "text",
    [
        "there is no file; it is no longer there",
        "flags go on the command line",
        "one pass over the recordings; an average passed over the frames",
        "tell speakers apart, which the mel tells apart",
        "generated alone, each runs alone; leave them alone",
        "the flag `--beside`, or index(beside=True), or --beside",
        "so many that they do not fit; and so on",
    ],
)
def test_plain_english_is_not_a_finding(text: str):
    assert findings(1, text) == []
