"""Two evaluations paired by clip: differences, their intervals, and a page with both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from wavear.evaluation.html import cell, document, interval, number, picture, sound, table, text
from wavear.evaluation.metrics import MEASURES
from wavear.evaluation.pictures import spectrogram
from wavear.evaluation.statistics import bootstrap

if TYPE_CHECKING:
    from wavear.evaluation.evaluation import Evaluation

RECORD, PAGE = "compare.json", "compare.html"
_SOUND_BYTES = 24 * 2**20
_SHOWN = 8


def paired(
    a: dict[str, Any], b: dict[str, Any], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What differs between two evaluations: b less a, clip by clip.

    Parameters
    ----------
    a, b : dict
        `Evaluation.record` of each.
    resamples, seed : int
        Of the bootstrap: clips are drawn with replacement, each with its pair of values.

    Returns
    -------
    dict
        "bits" and "measures", each with "a", "b", "difference" (mean, low, high, clips); "better":
        how many clips are better in b, where better has a direction.

    Raises
    ------
    ValueError
        If they are not of the same codes, rate, clips and length of synthesis: their numbers could
        not be compared.
    """
    _check_comparable(a, b)
    rows = list(zip(a["clips"], b["clips"], strict=True))

    def entry(
        pairs: list[tuple[float, float]], weights: list[float] | None, better: str
    ) -> dict[str, Any]:
        x, y = np.array(pairs, np.float64).T
        found: dict[str, Any] = {
            name: bootstrap(values, weights, resamples=resamples, seed=seed).to_dict()
            for name, values in (("a", x), ("b", y), ("difference", y - x))
        }
        if better != "near":
            found["better"] = int(((y < x) if better == "lower" else (y > x)).sum())
        return found

    weights = [float(x["samples"]) for x, _ in rows]
    result: dict[str, Any] = {
        "a": _described(a),
        "b": _described(b),
        "bits": entry(
            [(x["bits"]["model"], y["bits"]["model"]) for x, y in rows], weights, "lower"
        ),
        "measures": {},
        "notes": _notes(a, b),
    }
    for name, about in MEASURES.items():
        values = [
            (x["measures"]["model"][name], y["measures"]["model"][name])
            for x, y in rows
            if all(name in row.get("measures", {}).get("model", {}) for row in (x, y))
        ]
        if values:
            result["measures"][name] = entry(values, None, about.better)
    result["clips"] = [
        {
            "name": x["name"],
            "samples": x["samples"],
            "bits": [x["bits"]["model"], y["bits"]["model"]],
            "measures": {
                name: [x["measures"]["model"][name], y["measures"]["model"][name]]
                for name in MEASURES
                if all(name in row.get("measures", {}).get("model", {}) for row in (x, y))
            },
        }
        for x, y in rows
    ]
    return result


def _check_comparable(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Numbers of different codes, rates or clips are not of one kind."""
    check_codes(a["checkpoint"]["config"], b["checkpoint"]["config"])
    one, two = ({row["name"]: row for row in record["clips"]} for record in (a, b))
    if alone := sorted(set(one) ^ set(two)):
        which = "a" if alone[0] in one else "b"
        raise ValueError(
            f"{alone[0]} is a clip of {which} alone ({len(alone)} clips differ): evaluate both on the same"
        )
    for name, row in one.items():
        if row["digest"] != two[name]["digest"]:
            raise ValueError(
                f"{name} is not the same audio in a and b (or was treated differently): they cannot be paired"
            )
    if [row["name"] for row in a["clips"]] != [row["name"] for row in b["clips"]]:
        raise ValueError(
            "the clips of a and b are in different orders: evaluate both with one version of wavear"
        )
    x, y = a["settings"]["seconds"], b["settings"]["seconds"]
    if a["measures"] and b["measures"] and x != y:
        raise ValueError(
            f"a was synthesized up to {x:g} s of each clip and b up to {y:g} s: evaluate both with one --seconds"
        )


def check_codes(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Refuse models whose bits are not of one kind: of other codes, or of another sample rate."""
    emphases = (a.get("pre_emphasis", 0.0), b.get("pre_emphasis", 0.0), " of pre-emphasis")
    for x, y, unit in (
        (codes(a), codes(b), ""),
        (a["sample_rate"], b["sample_rate"], " Hz"),
        emphases,
    ):
        if x != y:
            raise ValueError(
                f"a has {x}{unit} and b has {y}{unit}: bits per sample under different quantisation cannot be compared"
            )


def codes(config: dict[str, Any]) -> str:
    """What the samples of a model are, in words."""
    return f"{config['classes']} {'mu-law codes' if config.get('law', 'categorical') == 'categorical' else 'values'}"


def _described(record: dict[str, Any]) -> dict[str, Any]:
    checkpoint = record["checkpoint"]
    return {
        "source": checkpoint["source"],
        "parameters": checkpoint["parameters"],
        "step": checkpoint["training"].get("step"),
        "created": record["created"],
        "settings": record["settings"],
    }


def _notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs besides the model."""
    notes = []
    for name in ("seed", "temperature", "weights"):
        x, y = a["settings"][name], b["settings"][name]
        if x != y:
            notes.append(f"{name} is {x} in a and {y} in b: it differs besides the model")
    for side, record in (("a", a), ("b", b)):
        if count := sum(row["trained_on"] for row in record["clips"]):
            notes.append(
                f"{count} of {len(record['clips'])} clips were trained on by {side}: not held-out for it"
            )
        if not record["measures"]:
            notes.append(f"{side} has no copy synthesis: bits only")
    return notes


def lines(record: dict[str, Any]) -> list[str]:
    """The comparison in words, one line each."""
    entries = [("bits per sample", "", 4, record["bits"])]
    entries += [
        (MEASURES[n].title, MEASURES[n].unit, MEASURES[n].decimals, e)
        for n, e in record["measures"].items()
    ]
    found = []
    for title, unit, decimals, entry in entries:
        d, unit = entry["difference"], f" {unit}" if unit else ""
        span = (
            "" if d["low"] is None else f" ({d['low']:+.{decimals}f} to {d['high']:+.{decimals}f})"
        )
        better = (
            f", b better in {entry['better']} of {d['clips']} clips" if "better" in entry else ""
        )
        values = f"a {entry['a']['mean']:.{decimals}f}, b {entry['b']['mean']:.{decimals}f}{unit}"
        found.append(f"{title}: {values}, b less a {d['mean']:+.{decimals}f}{span}{better}")
    return found


def page(record: dict[str, Any], a: Evaluation, b: Evaluation) -> str:
    """The comparison as one page that needs nothing else."""
    names = {side: record[side]["source"] for side in ("a", "b")}
    parts = ["<h1>Two models, clip by clip</h1>"]
    for side in ("a", "b"):
        step = f", step {record[side]['step']:,}" if isinstance(record[side]["step"], int) else ""
        parts.append(
            f'<p class="all"><b>{side}</b> {text(names[side])}'
            f' <span class="soft">{record[side]["parameters"]:,} parameters{step}</span></p>'
        )
    parts += [f'<p class="note">{text(note)}</p>' for note in record["notes"]]
    head = ["<th>Measure</th>", '<th class="n">a</th>', '<th class="n">b</th>']
    head += [
        '<th class="n model">b less a, 95 % interval</th>',
        '<th class="n">b better in</th>',
        "<th></th>",
    ]
    rows = [_row("Bits per sample", "lower is better", 4, record["bits"], "lower")]
    for name, entry in record["measures"].items():
        about = MEASURES[name]
        unit = f", {about.unit}" if about.unit else ""
        hint = {"lower": "lower is better", "higher": "higher is better"}.get(about.better, "")
        rows.append(_row(about.title + unit, hint, about.decimals, entry, about.better))
    parts.append(f'<div class="fine">{table(head, rows)}</div>')
    parts.append(
        '<p class="small soft">Differences are taken clip by clip, and the interval is that of their mean over'
        " resampled clips. Where it holds 0, these clips do not tell the two apart.</p>"
    )
    parts.append(_listen(a, b))
    parts.append(f"<h2>How it was made</h2><pre>{text(record['command'])}</pre>")
    return document(f"wavear compare: {names['a']}, {names['b']}", "\n".join(parts))


def _row(title: str, hint: str, decimals: int, entry: dict[str, Any], better: str) -> str:
    d = entry["difference"]
    row = cell(f"{text(title)}<span class='hint'>{hint}</span>", tag="th")
    row += cell(number(entry["a"]["mean"], decimals), "n") + cell(
        number(entry["b"]["mean"], decimals), "n"
    )
    row += cell(interval(d, decimals, sign=True), "n model")
    row += cell(f"{entry['better']} of {d['clips']}" if "better" in entry else "", "n")
    return f"<tr>{row}{cell(_verdict(d, better), 'small')}</tr>"


def _verdict(difference: dict[str, Any], better: str) -> str:
    """Which side the interval is on."""
    low, high = difference["low"], difference["high"]
    if low is None or better == "near":
        return ""
    if low <= 0 <= high:
        return "no difference shown"
    return "b better" if (high < 0) == (better == "lower") else "a better"


def _listen(a: Evaluation, b: Evaluation) -> str:
    """Clips that both have synthesized: recording, a, b."""
    budget, parts = _SOUND_BYTES, []
    for x, y in zip(a.record["clips"], b.record["clips"], strict=True):
        if len(parts) == _SHOWN or "audio" not in x or "audio" not in y:
            continue
        paths = {
            "Recording": a.folder / x["audio"]["original"],
            "a": a.folder / x["audio"]["model"],
            "b": b.folder / y["audio"]["model"],
        }
        if not all(path.is_file() for path in paths.values()):
            continue
        players = {label: sound(path) for label, path in paths.items()}
        budget -= sum(map(len, players.values()))
        if budget < 0:
            break
        heard = "".join(
            f'<div class="player">{label}{player}</div>' for label, player in players.items()
        )
        parts.append(
            f'<section class="clip"><h3>{text(x["name"])}</h3><div class="players three">{heard}</div>'
            f'<div class="pair three">{_pictures(paths)}</div></section>'
        )
    return "<h2>Listen and look</h2>" + "\n".join(parts) if parts else ""


def _pictures(paths: dict[str, Path]) -> str:
    pictures, top = [], None
    for label, path in paths.items():
        waveform, rate = soundfile.read(path, dtype="float32")
        png, top = spectrogram(waveform, rate, top)
        image = picture(png, f"spectrogram: {label}")
        pictures.append(f"<figure>{image}<figcaption>{text(label)}</figcaption></figure>")
    return "".join(pictures)
