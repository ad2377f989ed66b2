"""Pieces of a page that needs nothing else: style, numbers aligned on their points, pictures and sound inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MINUS = "\N{MINUS SIGN}"
STYLE = """
:root { --ink: #1d2430; --soft: #5a6475; --line: #e1e5eb; --wash: #f6f7f9; --model: #1457a8; --model-wash: #eef4fc;
  --warn: #8a4b00; --warn-wash: #fff6e8; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, small, figcaption { color: var(--soft); }
small, figcaption, .small { font-size: .82rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85rem; }
pre { background: var(--wash); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card .title { font-size: .82rem; color: var(--soft); }
.card .value { font-size: 1.75rem; line-height: 1.25; color: var(--model); font-variant-numeric: tabular-nums; }
.card .value span { font-size: .9rem; color: var(--soft); }
.note { background: var(--warn-wash); color: var(--warn); border-radius: 6px; padding: .5rem .9rem; margin: .5rem 0;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .42rem .7rem; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; font-size: .8rem; color: var(--soft);
  border-bottom: 1.5px solid #c9cfd9; vertical-align: bottom; }
tbody th { font-weight: 500; } th.line { white-space: nowrap; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th.n { white-space: normal; }
.n .i { display: inline-block; text-align: right; }
.n .f { display: inline-block; text-align: left; min-width: 2.1em; }
.hint .f { min-width: 0; }
.fine .f { min-width: 2.75em; }
.n .range { display: block; font-size: .76rem; color: var(--soft); }
.model { background: var(--model-wash); }
tr.model th, tr.model td, td.model, th.model { color: var(--model); }
td.model .i, td.model .f, tr.model .i, tr.model .f { font-weight: 650; }
.bound { background: repeating-linear-gradient(-45deg, #fafbfc 0 5px, #f4f5f7 5px 10px); color: var(--soft); }
.bar { display: block; height: .72rem; border-radius: 2px; background: #c5ccd7; margin-top: .35rem; min-width: 1px; }
tr.model .bar, .bar.model { background: var(--model); }
td.wide { width: 42%; min-width: 7rem; }
p.all { max-width: none; }
.better, .hint { font-size: .76rem; color: var(--soft); display: block; font-weight: 400; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.players.three, .pair.three { grid-template-columns: repeat(3, 1fr); }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
.players { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem; margin: .6rem 0; }
.players audio { width: 100%; height: 34px; }
.player { font-size: .82rem; color: var(--soft); min-width: 0; }
.player.model { background: none; color: var(--model); font-weight: 600; }
.clip { border-top: 1px solid var(--line); padding-bottom: 1rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: var(--soft); max-width: 50rem; }
@media (max-width: 760px) {
  main { padding: 1.3rem .9rem 3rem; } h1 { font-size: 1.35rem; }
  .pair, .pair.three { grid-template-columns: 1fr; } .players { grid-template-columns: 1fr 1fr; }
  th, td { padding: .4rem .45rem; } .cards { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .card { padding: .6rem .7rem; }
  .card .value { font-size: 1.35rem; } .hide, .better, .bound .range { display: none; }
  td.wide { width: 30%; min-width: 3rem; } table { font-size: .86rem; }
}
@media print { .players { display: none; } }
"""


def text(value: Any) -> str:
    """Anything as text that HTML does not take for markup."""
    return html.escape(str(value))


def document(title: str, body: str) -> str:
    """A page of its own."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def number(
    value: float | None,
    decimals: int,
    sign: bool = False,
    low: float | None = None,
    high: float | None = None,
):
    """The inside of a cell: a number whose point falls under that of its neighbours, and its interval below."""
    if value is None:
        return '<span class="soft">n/a</span>'
    shown = f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", MINUS)
    whole, _, fraction = shown.partition(".")
    inside = (
        f'<span class="i">{whole}</span><span class="f">{"." + fraction if fraction else ""}</span>'
    )
    if low is not None and high is not None:
        ends = [
            f"{end:{'+' if sign else ''}.{decimals}f}".replace("-", MINUS) for end in (low, high)
        ]
        inside += f'<span class="range">{ends[0]} to {ends[1]}</span>'
    return inside


def interval(found: dict[str, Any] | None, decimals: int, sign: bool = False) -> str:
    """The same of a mean with its interval."""
    if found is None:
        return number(None, 0)
    if found["low"] == found["high"]:  # one clip, or nothing that could vary
        return number(found["mean"], decimals, sign)
    return number(found["mean"], decimals, sign, found["low"], found["high"])


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Header cells and rows, as HTML already."""
    inside = f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def cell(inside: str, kind: str = "", tag: str = "td") -> str:
    """A cell of a class or several."""
    return f'<{tag} class="{kind}">{inside}</{tag}>' if kind else f"<{tag}>{inside}</{tag}>"


def bar(share: float, kind: str = "") -> str:
    """A bar of that share of the width there is."""
    return f'<span class="bar {kind}" style="width:{100 * min(max(share, 0), 1):.2f}%"></span>'


def picture(png: bytes, alt: str) -> str:
    """A picture, inside the page."""
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def sound(path: Path) -> str:
    """A player with the sound of a WAV file inside, as FLAC: the same samples, in about half the bytes."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="metadata" src="data:audio/flac;base64,{data}"></audio>'
