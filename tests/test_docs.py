"""The docs site holds every page and every public name; notebooks give the stored results."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_english import findings

import wavear

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))


def toctree() -> set[str]:
    """Return the pages in the toctrees of docs/index.md, relative to the root, without ending."""
    found = set()
    for block in re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL):
        for entry in block.splitlines():
            if entry and not entry.startswith(":"):
                paths = DOCS.glob(entry + ".*") if "*" in entry else [DOCS / f"{entry}.md"]
                found |= {path.resolve().relative_to(ROOT).with_suffix("") for path in paths}
    return {path.as_posix() for path in found}


def pages() -> set[str]:
    """Return the pages that the site has, without its landing page."""
    patterns = ("docs/*.md", "docs/*.rst", "docs/notebooks/*.ipynb", "recipes/**/README.md")
    more = ["CHANGELOG.md", "SECURITY.md", "wavear/voices/voice/README.md"]
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    names = {path.relative_to(ROOT).with_suffix("").as_posix() for path in found}
    return (names | {name.removesuffix(".md") for name in more}) - {"docs/index"}


def test_toctree_holds_every_page():
    assert toctree() == pages()


def test_api_page_holds_every_public_name():
    page = (DOCS / "api.rst").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto\w+:: wavear\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(wavear.__all__)


@pytest.mark.slow
def test_site_builds_without_warnings_and_needs_no_network(tmp_path: Path):
    pytest.importorskip("furo", reason='the docs site needs pip install "wavear[docs]"')
    pytest.importorskip("myst_parser", reason='the docs site needs pip install "wavear[docs]"')
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    command += ["-c", str(DOCS), "-d", str(tmp_path / "trees"), str(ROOT), str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert 'url=docs/index.html"' in (tmp_path / "site" / "index.html").read_text()
    for page in pages() | {"docs/index"}:
        html = (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|audio)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", html)
        assert [address for address in loaded if re.match(r"https?:|//", address)] == [], page
    api = (tmp_path / "site" / "docs" / "api.html").read_text(encoding="utf-8")
    assert ">Type<" not in api  # napoleon split no sentence at its colon
    landing = (tmp_path / "site" / "docs" / "index.html").read_text(encoding="utf-8")
    sounds = re.findall(r'<audio [^>]*src="([^"]+)"', landing)
    assert len(sounds) >= 3
    assert all((tmp_path / "site" / "docs" / sound).is_file() for sound in sounds)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_their_outputs_in_plain_english(path: Path):
    """Results only: no messages, no paths of the machine that ran them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result"}
    shown = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", json.dumps(outputs))
    assert shown.count("<audio") >= 2
    assert re.findall(r"(?<![\w<*])/\w+/|[A-Z]:\\|Path\(", shown) == []
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert [found for text in texts for found in findings(1, text, page=True)] == []


def test_notebooks_are_small():
    assert len(NOTEBOOKS) == 3
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000


def results_of(notebook: Any) -> list[str]:
    """Return the text of each result, HTML where there is some."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    return ["".join(each.get("text/html") or each["text/plain"]) for each in data]


def execute(name: str, folder: Path) -> list[str]:
    """Run a notebook in a folder; its results have the form of the stored ones. Return them."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"running a notebook needs {package}")
    bench = runpy.run_path(str(ROOT / "bench" / "notebooks.py"))
    results = results_of(bench["execute"](name, folder))
    stored = results_of(json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text("utf-8")))
    forms = [
        [re.sub(r"data:[^\"]+|[-\d.]+", "", text) for text in texts] for texts in (results, stored)
    ]
    assert forms[0] == forms[1]
    return results


@pytest.mark.slow
def test_notebook_hear_runs(tmp_path: Path):
    shapes, heard, copies, temperatures, defects = execute("hear", tmp_path)
    assert shapes == "((80, 401), torch.Size([1, 102656]))"
    assert [x.count("<audio") for x in (heard, copies, temperatures)] == [1, 2, 3]
    assert defects == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_notebook_train_lowers_the_bits(tmp_path: Path):
    *_, bits, curve, sounds = execute("train", tmp_path)
    before, after = json.loads(bits.replace("(", "[").replace(")", "]"))
    assert after < before - 0.1
    assert "<img" in curve
    assert sounds.count("<audio") == 3


@pytest.mark.slow
def test_notebook_likelihood_shows_what_it_states(tmp_path: Path):
    bits, fault, streamed, forked, _ = execute("likelihood", tmp_path)
    speech, backwards, noise = (float(x) for x in re.findall(r": ([\d.]+)", bits))
    assert speech < backwards < noise
    assert abs(int(re.findall(r"\d+", fault)[0]) - 20_000) <= 40
    assert streamed == "True"
    assert forked == "(True, True, False)"


def literals() -> str:
    """Return the constant parts of all strings in `wavear/`, a line each."""
    found = []
    for path in (ROOT / "wavear").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    parts = [part.strip(" ()") for cell in cells for part in cell.split("...")]
    source = literals()
    wanted = [part for part in parts if len(part) > 3 and "command not found" not in part]
    assert len(wanted) > 25
    assert [part for part in wanted if part not in source] == []


def test_minutes_on_the_first_page_are_those_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("<!-- begin minutes -->")[1].split("<!-- end minutes -->")[0]
    rows = re.findall(r"^\|[^|]*\| ([\d.]+ \|.*) \|$", section, flags=re.MULTILINE)
    sources = [(DOCS / name).read_text(encoding="utf-8") for name in ("quality.md", "training.md")]
    measured = [
        {cell.split("(")[0].strip() for cell in line.split("|")}
        for page in sources
        for line in page.splitlines()
        if line.startswith("|")
    ]
    assert len(rows) >= 5
    assert [row for row in rows if not any(set(row.split(" | ")) <= m for m in measured)] == []


def test_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def small(mel: wavear.MelConfig | None) -> wavear.WaveNet:
    """Return a WaveNet that is not trained."""
    return wavear.WaveNet(
        wavear.WaveNetConfig(layers=2, stacks=1, residual_channels=8, skip_channels=8, mel=mel)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/streaming.md", "docs/families.md"])
def test_python_on_a_page_runs(page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of a page run one after the other, in a folder with a recording and a model."""
    monkeypatch.chdir(tmp_path)
    small(wavear.MelConfig()).save("runs/mine/best")
    waveform = 0.1 * torch.randn(8192, generator=torch.Generator().manual_seed(0))
    wavear.audio.write("speech.wav", waveform, 22050)
    heard = []
    names = {
        "frames": torch.randn(80, 20),
        "text_to_speech": lambda: torch.randn(80, 20).split(3, dim=1),
        "play": heard.append,
        "send": lambda member, audio: heard.append(audio),
        "waveform": waveform,
        "recordings": [waveform],
        "wavear": wavear,
    }
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.M)
    assert blocks
    for block in blocks:
        if "prime=" in block:  # the page describes a model without mels there
            names["model"] = small(None)
            block = block.replace("220500", "2205")
        exec(block, names)
    if page == "README.md":
        assert wavear.audio.info("new.wav").seconds == pytest.approx(32 * 256 / 22050)
        assert names["nats"].shape == (1, 8192)
    if page == "docs/streaming.md":
        assert sum(map(len, heard)) >= 20 * 256
        assert names["audio"].shape == (1, 8192 + 2205)
