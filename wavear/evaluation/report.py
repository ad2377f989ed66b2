"""The page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from wavear.audio.grid import COMMON_GRIDS
from wavear.evaluation.html import (
    MINUS,
    bar,
    cell,
    document,
    interval,
    number,
    picture,
    sound,
    table,
    text,
)
from wavear.evaluation.metrics import MEASURES, NEAR
from wavear.evaluation.pictures import spectrogram
from wavear.evaluation.run import SYSTEMS

_DOT = " \N{MIDDLE DOT} "
_SOUND_BYTES = 24 * 2**20  # of sound in a page, as base64
_LAWS = {
    "model": ("Model", "the checkpoint, every sample given all before it"),
    "linear": ("Linear prediction", "32 samples, fitted residual law"),
    "markov": ("Order-1 Markov chain", "the code before, counted"),
    "unigram": ("Unigram", "how often each code occurs"),
    "uniform": ("Uniform", "every code alike: log2 of their number"),
}
_BETTER = {
    "lower": "lower is better",
    "higher": "higher is better",
    "near": "best where the recordings' is",
}
_DOMAINS = {"linear": "samples as they are", "companded": "companded samples"}
_KINDS = {"original": "", "mulaw": "bound", "model": "model", "griffin_lim": "bound"}
DEFINITIONS = {
    "Bits per sample": "Mean of \u2212log2 P(code | all codes before it, conditioning) over every sample of every clip."
    " The laws beside it see the same codes and are fitted to recordings that are not tested.",
    "STFT distance": "Multi-resolution: spectral convergence plus L1 of log magnitudes, mean of the three resolutions"
    " of Yamamoto et al., Parallel WaveGAN (2020).",
    "Mel-cepstral distortion": "10 / ln 10 \u00d7 \u221a(2 \u03a3 (c \u2212 c\u2032)\u00b2), cepstra of order 24"
    " without c0 from 80 log-mel bands, mean over all frames, time not warped (Kubichek, 1993).",
    "Log-F0 RMSE, voicing error": "Pitch by librosa.pyin, 65 to 1000 Hz: RMSE over frames voiced in both, in cents;"
    " share of frames whose voicing differs.",
    "PESQ": "ITU-T P.862.2 wide band at 16 kHz (P.862.1 narrow band at 8 kHz for rates below), by the package pesq.",
    "STOI": "Short-time objective intelligibility (Taal et al., 2011), by the package pystoi.",
    "Noise floor in silence": "Level in frames of 20 ms where the recording, and the frames beside, lie 40 dB or more"
    " below its loudest frame.",
    "Intervals": "95 %, percentile bootstrap over clips.",
    "Round trip": "The recording through the codes and back: all that a model of these codes can give, with its"
    " quantisation noise. That noise is why it can lie behind Griffin-Lim where quiet bands count as much as loud ones"
    " (STFT distance, MCD).",
    "Griffin-Lim": "From the same mel without a model: filters by pseudo-inverse, 60 iterations of fast Griffin-Lim.",
}


def page(record: dict[str, Any], folder: Path, curves: bytes | None) -> str:
    """The report of an evaluation as one page that needs nothing else.

    Parameters
    ----------
    record : dict
        See `Evaluation.record`.
    folder : Path
        Where the audio files lie that it names.
    curves : bytes, optional
        PNG of the training's curves.
    """
    source = record["checkpoint"]["source"]
    parts = [
        f"<h1>{text(source)}</h1>",
        f'<p class="soft all">{_facts(record)}</p>',
        _cards(record),
        *(f'<p class="note">{text(note)}</p>' for note in record["notes"]),
        _bits(record),
        _copy_synthesis(record),
        _listen(record, folder),
        _clips(record),
    ]
    if curves is not None:
        parts += [
            "<h2>Training</h2>",
            f"<figure>{picture(curves, 'bits per sample over training steps')}</figure>",
        ]
    parts.append(_made(record))
    return document(f"wavear evaluation: {source}", "\n".join(part for part in parts if part))


def _facts(record: dict[str, Any]) -> str:
    data, checkpoint = record["data"], record["checkpoint"]
    step = checkpoint["training"].get("step")
    facts = [
        f"{data['clips']} clips of {text(data['source'])}, {data['seconds'] / 60:.1f} minutes",
        f"{data['sample_rate']} Hz",
        f"{checkpoint['parameters']:,} parameters",
        *([f"step {step:,}"] if isinstance(step, int) else []),
        record["created"][:10],
    ]
    return _DOT.join(facts)


def _cards(record: dict[str, Any]) -> str:
    """What one looks for first."""
    bits, cards = record["bits"], []
    against = f"linear prediction {bits['linear']['mean']:.3f}" if "linear" in bits else ""
    cards.append(("Bits per sample", f"{bits['model']['mean']:.3f}", "", against))
    for name in ("pesq", "stoi", "mcd"):
        if name in record["measures"]:
            about, found = MEASURES[name], record["measures"][name]
            bounds = _DOT.join(
                f"{label} {found[system]['mean']:.{about.decimals}f}"
                for system, label in (("mulaw", "round trip"), ("griffin_lim", "Griffin-Lim"))
            )
            cards.append(
                (about.title, f"{found['model']['mean']:.{about.decimals}f}", about.unit, bounds)
            )
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="title">{text(title)}</div>'
            f'<div class="value">{value} <span>{unit}</span></div>'
            f'<div class="small soft">{text(below)}</div></div>'
            for title, value, unit, below in cards
        )
        + "</div>"
    )


def _bits(record: dict[str, Any]) -> str:
    found = record["bits"]
    widest = max(entry["mean"] for entry in found.values())
    rows = []
    for law, (title, about) in _LAWS.items():
        if law in found:
            row = cell(f"{title}<span class='better'>{about}</span>", tag="th")
            row += cell(bar(found[law]["mean"] / widest), "wide") + cell(
                interval(found[law], 3), "n"
            )
            rows.append(f'<tr class="{"model" if law == "model" else ""}">{row}</tr>')
    fitted = record["baselines"]
    linear = fitted.get("linear")
    minutes = f"{fitted['seconds'] / 60:.1f} minutes of " if fitted["seconds"] else ""
    says = f"Linear prediction and the counts are fitted to {minutes}{text(fitted['fitted_to'])}"
    if linear:
        law = {"laplace": "Laplace's", "normal": "the normal one"}[linear["law"]]
        says += f"; the likeliest law of the residual is {law}, on {_DOMAINS[linear['domain']]}"
    head = ["<th>Law</th>", "<th></th>", '<th class="n">bits, 95 % interval</th>']
    parts = [
        "<h2>Bits per sample</h2>",
        f'<p class="soft">Exact, over every sample of every clip, of {text(_grid(record))}.{_common(record)}'
        f" {says}.</p>",
    ]
    parts.append(table(head, rows))
    parts += [_by_level(record), _by_speaker(record)]
    return "\n".join(part for part in parts if part)


def _grid(record: dict[str, Any]) -> str:
    checkpoint = record["checkpoint"]
    return checkpoint.get("grid", f"{checkpoint['config']['classes']} mu-law codes")


def _common(record: dict[str, Any]) -> str:
    found = {
        "16-bit samples": record.get("common_bits")
        if _grid(record) != str(COMMON_GRIDS["linear"])
        else None,
        "256 mu-law codes": record.get("mulaw_bits")
        if _grid(record) != str(COMMON_GRIDS["mulaw"])
        else None,
    }
    known = [
        f"{number(bits['mean'], 3)} on {name}" for name, bits in found.items() if bits is not None
    ]
    return (
        f" Where models of any quantisation compare, the model needs {' and '.join(known)}."
        if known
        else ""
    )


def _by_level(record: dict[str, Any]) -> str:
    levels = [entry for entry in record["by_level"] if entry["samples"]]
    if len(levels) < 2:
        return ""
    total, widest = (
        sum(entry["samples"] for entry in levels),
        max(entry["bits"] for entry in levels),
    )
    rows = []
    for entry in levels:
        row = cell(_range(entry["from"], entry["to"]), "line", "th")
        row += cell(bar(entry["bits"] / widest, "model"), "wide") + cell(
            number(entry["bits"], 3), "n"
        )
        rows.append(f"<tr>{row}{cell(number(100 * entry['samples'] / total, 1), 'n')}</tr>")
    head = [
        "<th>Level, dBFS</th>",
        "<th></th>",
        '<th class="n">bits</th>',
        '<th class="n">% of samples</th>',
    ]
    return (
        "<h3>By loudness</h3><p class='soft'>RMS of the 20 ms around a sample; the model's bits.</p>"
        + table(head, rows)
    )


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"below {high:g}".replace("-", MINUS)
    return (f"from {low:g}" if high is None else f"{low:g} to {high:g}").replace("-", MINUS)


def _by_speaker(record: dict[str, Any]) -> str:
    if not record["by_speaker"]:
        return ""
    laws = [law for law in _LAWS if law in record["bits"]]
    head = ["<th>Speaker</th>", '<th class="n">minutes</th>']
    head += [
        f'<th class="n {"model" if law == "model" else ""}">{_LAWS[law][0]}</th>' for law in laws
    ]
    rows = []
    for name, entry in record["by_speaker"].items():
        row = cell(text(name), tag="th")
        row += cell(number(entry["samples"] / record["data"]["sample_rate"] / 60, 1), "n")
        for law in laws:
            kind = "n model" if law == "model" else "n"
            row += cell(interval(entry["bits"].get(law), 3), kind)
        rows.append(f"<tr>{row}</tr>")
    return "<h3>By speaker</h3>" + table(head, rows)


def _copy_synthesis(record: dict[str, Any]) -> str:
    measures = record["measures"]
    if not measures:
        return ""
    made = record["generation"]
    rows = []
    for name, about in MEASURES.items():
        if name not in measures:
            continue
        unit = f", {about.unit}" if about.unit else ""
        hint = f"<span class='hint'>{_BETTER[about.better]}</span>"
        if name in NEAR:
            hint = f"<span class='hint'>recordings: {number(measures[name]['original']['mean'], 1)}</span>"
        row = cell(f"{about.title}{unit}{hint}", tag="th")
        for system in ("model", "mulaw", "griffin_lim"):
            row += cell(interval(measures[name][system], about.decimals), f"n {_KINDS[system]}")
        row += cell(number(measures[name]["mulaw"]["clips"], 0), "n hide")
        rows.append(f"<tr>{row}</tr>")
    head = [
        "<th>Measure</th>",
        '<th class="n model">Model</th>',
        '<th class="n bound">Round trip<span class="better">bound: the codes themselves</span></th>',
        '<th class="n bound">Griffin-Lim<span class="better">bound: no model</span></th>',
        '<th class="n hide">clips</th>',
    ]
    missing = [about.title for name, about in MEASURES.items() if name not in measures]
    left = (
        f" Not measured: {', '.join(missing)} (see the clips in evaluation.json for the reasons)."
        if missing
        else ""
    )
    speed = made["audio_seconds"] / made["seconds"] if made["seconds"] else 0
    says = (
        f"{made['clips']} clips, {made['audio_seconds']:.0f} s of audio from their own mels at temperature"
        f" {record['settings']['temperature']:g}, seed {record['settings']['seed']},"
        f" made {speed:.2f} times as fast as it plays. Means over the clips that all three have a value for.{left}"
    )
    return f'<h2>Copy synthesis</h2><p class="soft">{text(says)}</p>' + table(head, rows)


def _listen(record: dict[str, Any], folder: Path) -> str:
    """Clips from the best to the worst, and free samples."""
    parts, budget = [], _SOUND_BYTES
    if record.get("free"):
        parts.append("<h2>Free samples</h2><div class='players'>")
        for entry in record["free"]:
            player = sound(folder / entry["audio"])
            budget -= len(player)
            who = f", speaker {entry['speaker']}" if entry["speaker"] is not None else ""
            if budget >= 0:
                parts.append(f'<div class="player model">seed {entry["seed"]}{who}{player}</div>')
        parts.append("</div>")
    ranked = [
        row
        for row in record["clips"]
        if "stft_distance" in row.get("measures", {}).get("model", {})
    ]
    ranked.sort(key=lambda row: row["measures"]["model"]["stft_distance"])
    count = min(record["settings"]["shown"], len(ranked))
    if not count:
        return "\n".join(parts)
    parts.append("<h2>Listen and look</h2>")
    parts.append(
        f'<p class="soft">{count} of {len(ranked)} clips, evenly from the least to the largest STFT distance.'
        " The two pictures of a clip share one scale of 80 dB.</p>"
    )
    for place in sorted({round(k) for k in np.linspace(0, len(ranked) - 1, count)}):
        row = ranked[place]
        measured = row["measures"]["model"]
        said = [
            f"{about.title} {f'{measured[name]:.{about.decimals}f}'.replace('-', MINUS)} {about.unit}".strip()
            for name, about in MEASURES.items()
            if name in measured and name != "voicing_error"
        ]
        rank = (
            "best"
            if place == 0
            else "worst"
            if place == len(ranked) - 1
            else f"{place + 1} of {len(ranked)}"
        )
        parts.append(
            f'<section class="clip"><h3>{text(row["name"])} <span class="soft">\N{MIDDLE DOT} {rank}</span></h3>'
        )
        parts.append(f'<p class="small soft">{text(_DOT.join(said))}</p>')
        players = {system: sound(folder / row["audio"][system]) for system in SYSTEMS}
        budget -= sum(map(len, players.values()))
        if budget >= 0:
            parts.append('<div class="players">')
            parts += [
                f'<div class="player {"model" if system == "model" else ""}">{SYSTEMS[system]}{player}</div>'
                for system, player in players.items()
            ]
            parts.append("</div>")
        else:
            parts.append(
                f'<p class="small soft">Too large for this page: {text(row["audio"]["model"])} beside it.</p>'
            )
        parts.append(_pair(row, folder) + "</section>")
    return "\n".join(parts)


def _pair(row: dict[str, Any], folder: Path) -> str:
    """Spectrograms of the recording and of what the model made of it."""
    pair, top = [], None
    for system in ("original", "model"):
        waveform, rate = soundfile.read(folder / row["audio"][system], dtype="float32")
        png, top = spectrogram(waveform, rate, top)
        image = picture(png, f"spectrogram of {row['name']}, {SYSTEMS[system]}")
        pair.append(f"<figure>{image}<figcaption>{SYSTEMS[system]}</figcaption></figure>")
    return f'<div class="pair">{"".join(pair)}</div>'


def _clips(record: dict[str, Any]) -> str:
    """Every clip in a table."""
    names = [name for name in MEASURES if name in record["measures"]]
    head = ["<th>Clip</th>", '<th class="n">s</th>', '<th class="n">bits</th>']
    head += [f'<th class="n">{MEASURES[name].title}</th>' for name in names]
    rows = []
    for clip in record["clips"]:
        mark = " <small>(trained on)</small>" if clip["trained_on"] else ""
        row = cell(text(clip["name"]) + mark, tag="th")
        row += cell(number(clip["samples"] / record["data"]["sample_rate"], 1), "n")
        row += cell(number(clip["bits"]["model"], 3), "n")
        measured = clip.get("measures", {}).get("model", {})
        if "measures" in clip:
            row += "".join(
                cell(number(measured.get(name), MEASURES[name].decimals), "n") for name in names
            )
        else:
            row += "<td></td>" * len(names)
        rows.append(f"<tr>{row}</tr>")
    failed = [f"<li>{text(name)}: {text(why)}</li>" for name, why in record["failed"].items()]
    broken = f"<h3>Clips that could not be used</h3><ul>{''.join(failed)}</ul>" if failed else ""
    inside = f"<details><summary>{len(rows)} clips, the model's values</summary>{table(head, rows)}</details>"
    return f"<h2>Every clip</h2>{inside}{broken}"


def _made(record: dict[str, Any]) -> str:
    """How to make it again, and what the words mean."""
    settings = ", ".join(
        f"{name} {value}" for name, value in record["settings"].items() if value is not None
    )
    terms = "".join(
        f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in DEFINITIONS.items()
    )
    return (
        f"<h2>How it was made</h2><pre>{text(record['command'])}</pre>"
        f'<p class="small soft">{text(record["machine"])}<br>{text(settings)}</p>'
        f"<details><summary>Definitions</summary><dl>{terms}</dl></details>"
    )
