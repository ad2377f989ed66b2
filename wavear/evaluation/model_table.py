"""Models of any families and laws side by side: what each needs, costs, sees and makes, one row each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavear import audio
from wavear.audio.grid import COMMON_GRIDS
from wavear.data.crops import read_span
from wavear.evaluation.clips import Preparation, open_clips
from wavear.evaluation.html import cell, document, interval, number, picture, sound, table, text
from wavear.evaluation.metrics import MEASURES
from wavear.evaluation.pictures import costs, spectrogram
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine
from wavear.generation.sampler import generate
from wavear.mel.spectrogram import log_mel
from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.sampling import uniforms

if TYPE_CHECKING:
    from wavear.evaluation.evaluation import EvaluateConfig, Evaluation

RECORD, PAGE = "models.json", "models.html"
_PRIME_SECONDS, _STRIP_SECONDS = 0.5, 1.5
_SPEED_SECONDS = 2.0
_SHARED = {  # columns that all models share: grid and title
    "common_bits": (str(COMMON_GRIDS["linear"]), "on 16-bit samples"),
    "mulaw_bits": (str(COMMON_GRIDS["mulaw"]), "on 256 mu-law codes"),
}
_QUALITY = ("pesq", "stoi", "mcd", "noise_floor")


def name_models(evaluations: Sequence[Evaluation], sources: Sequence[str | Path]) -> list[str]:
    """A short name of each: the folder of its run, with its family where that leaves two alike."""
    names = []
    for evaluation, source in zip(evaluations, sources, strict=True):
        path = Path(evaluation.record["checkpoint"]["source"])
        own = path.parent.name if path.name in ("best", "last") else path.name
        names.append(
            (own or str(source)).encode("utf-8", "backslashreplace").decode("utf-8")
        )  # it goes into pictures
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def codes(evaluation: Evaluation) -> str:
    """What the bits are of, in words: equal for models whose bits compare."""
    emphasis = evaluation.record["checkpoint"]["config"].get("pre_emphasis", 0.0)
    return evaluation.grid + (f", pre-emphasis {emphasis:g}" if emphasis else "")


def row(name: str, evaluation: Evaluation, model: AutoregressiveModel | None) -> dict[str, Any]:
    """What the table says of one model. Speeds are of this machine, one stream on one core, and need the model."""
    record = evaluation.record
    described = record["checkpoint"]
    found: dict[str, Any] = {
        "name": name,
        "source": described["source"],
        "family": described["family"],
        "law": described["config"].get("law", "categorical"),
        "grid": codes(evaluation),
        "bits": record["bits"]["model"],
        "common_bits": record.get("common_bits"),
        "mulaw_bits": record.get("mulaw_bits"),
        "parameters": described["parameters"],
        "multiply_adds": described.get("multiply_adds"),
        "weight_bytes": described.get("weight_bytes"),
        "receptive_field": described.get("receptive_field"),
        "sample_rate": described["config"]["sample_rate"],
        "step": described["training"].get("step"),
        "speed": {},
        "state_bytes": None,
        "measures": {
            n: record["measures"][n]["model"] for n in _QUALITY if n in record["measures"]
        },
    }
    if model is not None:
        state = model.export_state(model.init_state(1))
        found["state_bytes"] = sum(
            tensor.numel() * tensor.element_size() for tensor in state.values()
        )
        found["speed"] = {engine: speed(model, engine) for engine in _engines(model)}
    return found


def _engines(model: AutoregressiveModel) -> list[str]:
    """The reference engine, and the one that `auto` takes."""
    return list(dict.fromkeys(["reference", make_engine(model, 1, threads=1)[0]]))


@torch.inference_mode()
def speed(model: AutoregressiveModel, engine: str, seconds: float = _SPEED_SECONDS) -> float:
    """Samples per second of one stream on one core: the best of the calls within some seconds, the first left out."""
    chunk = 64 if engine == "reference" else 1024
    _, runner = make_engine(model, 1, engine, threads=1)
    mels = None
    if model.config.mel is not None:
        frames = -(-chunk // model.config.mel.hop_length)
        mels = [torch.zeros(model.config.mel.bands, frames)]
    cond = Conditioner(model, mels, [0] if model.config.speakers else None).span(0, chunk)
    threads, best, began, turn = torch.get_num_threads(), 0.0, time.perf_counter(), 0
    torch.set_num_threads(1)
    try:
        while turn < 3 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            runner.generate(uniforms(0, turn * chunk, chunk)[None], cond)
            if turn:
                best = max(best, chunk / (time.perf_counter() - start))
            turn += 1
    finally:
        torch.set_num_threads(threads)
    return best


@dataclass(frozen=True)
class Beginning:
    """What every model goes on from, and what the recording goes on with."""

    name: str
    waveform: torch.Tensor
    """(n,): whole frames of every model."""
    prime: int
    """Samples of it that are given."""


def find_beginning(data: str | Path, rate: int, hops: Sequence[int]) -> Beginning | str:
    """The loudest two seconds, and of these the first half second; or why there is none.

    Of the first recording of two seconds or more, or else of the longest; of those that can be
    read.

    Parameters
    ----------
    hops : sequence of int
        Samples per mel frame of the models with mels: the stretch is a whole number of frames of
        each.
    """
    wanted, unit = round((_PRIME_SECONDS + _STRIP_SECONDS) * rate), math.lcm(*hops)
    if unit > wanted:
        frames = ", ".join(map(str, sorted(set(hops))))
        return f"mel frames of {frames} samples end together after {unit / rate:.1f} s alone"
    try:
        clips = open_clips(data, rate, max(rate // 4, unit), Preparation(), False).good
    except ValueError as error:
        return str(error)
    for clip in sorted(clips, key=lambda clip: -min(clip.frames, wanted)):
        try:
            whole = read_span(clip, rate, 0, min(clip.frames, 60 * rate))
        except (ValueError, OSError):  # the evaluations name it
            continue
        length = min(wanted, whole.size) // unit * unit
        energy = np.concatenate([[0.0], np.cumsum(np.square(whole, dtype=np.float64))])
        start = int(np.argmax(energy[length:] - energy[: energy.size - length]))
        target = torch.from_numpy(whole[start : start + length])
        return Beginning(clip.name, target, min(round(_PRIME_SECONDS * rate), length // 2))
    return "no recording can be read"


def strip(
    names: Sequence[str],
    models: Sequence[AutoregressiveModel],
    beginning: Beginning,
    out: Path,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """What each model makes of the same beginning: WAV files of the recording and of each.

    Models with mels get those of the recording.
    """
    rate, target, prime = models[0].config.sample_rate, beginning.waveform, beginning.prime
    files = {"recording": "strip/recording.wav"}
    (out / "strip").mkdir(parents=True, exist_ok=True)
    audio.write(out / files["recording"], target, rate)
    for n, (name, model) in enumerate(zip(names, models, strict=True)):
        mel = None if model.config.mel is None else log_mel(target[None], model.config.mel)
        made = generate(
            model,
            mel,
            samples=target.numel() - prime,
            prime=target[:prime],
            include_prime=True,
            seed=config.seed,
            speaker=0 if model.config.speakers else None,
            threads=config.threads,
        )
        files[name] = f"strip/{n}.wav"
        audio.write(out / files[name], made[0], rate)
    return {"recording": beginning.name, "prime_seconds": prime / rate, "files": files}


def lines(record: dict[str, Any]) -> list[str]:
    """The table in words, a line for each model."""
    found = []
    for entry in record["models"]:
        common = entry["common_bits"]
        bits = f"{entry['bits']['mean']:.3f} bits ({entry['grid']})"
        bits += "" if common is None else f", {common['mean']:.3f} on 16-bit samples"
        bits += (
            ""
            if (mulaw := entry["mulaw_bits"]) is None
            else f", {mulaw['mean']:.3f} on 256 mu-law codes"
        )
        speeds = ", ".join(
            f"{value:,.0f} samples/s {engine}" for engine, value in entry["speed"].items()
        )
        found.append(
            f"{entry['name']}: {bits}, {entry['parameters']:,} parameters, {speeds or 'speed not measured'}"
        )
    return found


def page(record: dict[str, Any], out: Path) -> str:
    """The table, the plots and the strip as one page that needs nothing else."""
    models = record["models"]
    parts = ["<h1>Models side by side</h1>", f'<p class="all soft">{text(record["data"])}</p>']
    parts += [f'<p class="note">{text(note)}</p>' for note in record["notes"]]
    parts += ["<h2>Bits per sample</h2>", _bits(models)]
    parts += ["<h2>Cost</h2>", _cost(models)]
    if plot := costs(models):
        parts.append(f"<figure>{picture(plot, 'bits against speed and multiply-adds')}</figure>")
    if any(entry["measures"] for entry in models):
        parts += ["<h2>Copy synthesis</h2>", _quality(models)]
    if record["strip"] is not None:
        parts += ["<h2>After the same beginning</h2>", _strip(record["strip"], out)]
    parts.append(f"<h2>How it was made</h2><pre>{text(record['command'])}</pre>")
    return document("wavear compare: models", "\n".join(parts))


def _bits(models: Sequence[dict[str, Any]]) -> str:
    """A column for each grid, so that bits of different quantisation never stand in one, and one that all share."""
    grids = list(dict.fromkeys(entry["grid"] for entry in models))
    head = [
        "<th>Model</th>",
        "<th>Family, law</th>",
        *(f'<th class="n">{text(grid)}</th>' for grid in grids),
    ]
    extra = {
        name: title
        for name, (grid, title) in _SHARED.items()
        if any(own != grid for own in grids) and any(entry[name] for entry in models)
    }
    head += [f'<th class="n model">{title}</th>' for title in extra.values()]
    rows = []
    for entry in models:
        inside = cell(text(entry["name"]), tag="th") + cell(
            f"{text(entry['family'])}, {text(entry['law'])}"
        )
        inside += "".join(
            cell(interval(entry["bits"], 3) if grid == entry["grid"] else "", "n") for grid in grids
        )
        inside += "".join(cell(interval(entry[name], 3), "n model") for name in extra)
        rows.append(f"<tr>{inside}</tr>")
    says = (
        "Held-out, exact, with 95 % intervals over clips. Bits of different quantisation cannot be compared. On"
        " one grid they can. On 16-bit samples a coarser code leaves each of the 16-bit values in its interval equally"
        " likely, so a model of it needs log2 of their number more. On mu-law codes a model of 16-bit values gives each"
        " code the probability of all its values."
    )
    return f'<p class="soft">{says}</p><div class="fine">{table(head, rows)}</div>'


def _cost(models: Sequence[dict[str, Any]]) -> str:
    engines = list(dict.fromkeys(engine for entry in models for engine in entry["speed"]))
    head = ["<th>Model</th>"]
    head += [
        f'<th class="n">{title}</th>'
        for title in (
            "parameters",
            "multiply-adds a sample",
            "weights read a sample",
            "past seen, samples",
            "state",
        )
    ]
    head += [f'<th class="n">samples/s, {engine}</th>' for engine in engines]
    rows = []
    for entry in models:
        field, rate = entry["receptive_field"], entry["sample_rate"]
        cells = [
            f"{entry['parameters']:,}",
            "" if entry["multiply_adds"] is None else f"{entry['multiply_adds']:,}",
            "" if entry["weight_bytes"] is None else f"{entry['weight_bytes'] / 1024:,.0f} KiB",
            "unbounded"
            if field is None
            else f"{field:,}<span class='range'>{1000 * field / rate:,.1f} ms</span>",
            "" if entry["state_bytes"] is None else f"{entry['state_bytes'] / 1024:,.0f} KiB",
        ]
        for engine in engines:
            value = entry["speed"].get(engine)
            pace = (
                ""
                if value is None
                else f"<span class='range'>{value / rate:.2f} x real time</span>"
            )
            cells.append("" if value is None else f"{value:,.0f}{pace}")
        inside = "".join(cell(inside, "n") for inside in cells)
        rows.append(f"<tr>{cell(text(entry['name']), tag='th')}{inside}</tr>")
    says = "Speeds are of one stream on one core of this machine, the best of some seconds."
    return f'<p class="soft">{says}</p>{table(head, rows)}'


def _quality(models: Sequence[dict[str, Any]]) -> str:
    names = [name for name in _QUALITY if any(name in entry["measures"] for entry in models)]
    head = ["<th>Model</th>"]
    for name in names:
        unit = f", {MEASURES[name].unit}" if MEASURES[name].unit else ""
        head.append(f'<th class="n">{MEASURES[name].title}{unit}</th>')
    rows = []
    for entry in models:
        values = (
            cell(interval(entry["measures"].get(n), MEASURES[n].decimals), "n") for n in names
        )
        rows.append(f"<tr>{cell(text(entry['name']), tag='th')}{''.join(values)}</tr>")
    return table(head, rows)


def _strip(found: dict[str, Any], out: Path) -> str:
    import soundfile

    figures, top = [], None
    for name, path in found["files"].items():
        waveform, rate = soundfile.read(out / path, dtype="float32")
        png, top = spectrogram(waveform, rate, top)
        image = picture(png, f"spectrogram: {name}")
        figures.append(
            f"<figure>{image}<figcaption>{text(name)}</figcaption>{sound(out / path)}</figure>"
        )
    says = (
        f"{text(found['recording'])}: the first {number(found['prime_seconds'], 2)} s are given, what follows is each"
        " model's own."
    )
    return f'<p class="soft">{says}</p><div class="pair three">{"".join(figures)}</div>'


def check_same_clips(names: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """What keeps the rows of the table from being of one thing, in words: clips that some lack, other treatment.

    Raises
    ------
    ValueError
        If two have no clip in common, or a clip of one name that is not the same audio though it
        was treated alike.
    """
    notes: list[str] = []
    if not evaluations:
        return notes
    clips = [{clip["name"]: clip for clip in e.record["clips"]} for e in evaluations]
    treated = [e.record["data"].get("treated", []) for e in evaluations]
    kinds = [codes(evaluation) for evaluation in evaluations]
    for n, (name, own) in enumerate(zip(names, clips, strict=True)):
        shared = [clip for clip in clips[0] if clip in own]
        if not shared:
            raise ValueError(
                f"{names[0]} and {name} were evaluated on other clips ({next(iter(clips[0]))}, {next(iter(own))}...):"
                " evaluate them on the same"
            )
        told = ("samples", "digest") if kinds[n] == kinds[0] else ("samples",)
        differ = [
            clip for clip in shared if any(own[clip][key] != clips[0][clip][key] for key in told)
        ]
        if not differ and treated[n] == treated[0]:
            continue
        if not treated[n] and not treated[0]:
            raise ValueError(
                f"{differ[0]} is not the same audio in the evaluations of {names[0]} and {name}: evaluate them on the"
                " same recordings"
            )
        first, here = (", ".join(words or ["untreated"]) for words in (treated[0], treated[n]))
        notes.append(
            f"{name} ({here}) and {names[0]} ({first}) were not evaluated on the same audio: their bits do not compare"
        )
    every = {clip: None for own in clips for clip in own}
    for name, own in zip(names, clips, strict=True):
        if missing := [clip for clip in every if clip not in own]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            notes.append(f"{name}: its numbers are without {missing[0]}{more}, which others have")
    return notes


def side_by_side(
    evaluations: Sequence[Evaluation],
    sources: Sequence[str | Path],
    beginning: Beginning | str | None,
    out: Path,
    config: EvaluateConfig,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The record: rows, the strip, and what is to be said of them.

    Raises
    ------
    ValueError
        If they are not of one sample rate, or were evaluated on other clips.
    """
    rates = {evaluation.record["checkpoint"]["config"]["sample_rate"] for evaluation in evaluations}
    if len(rates) > 1:
        raise ValueError(
            f"the models are of {' and '.join(map(str, sorted(rates)))} Hz: their bits cannot be compared"
        )
    names, models = name_models(evaluations, sources), []
    notes = check_same_clips(names, evaluations)
    for name, evaluation in zip(names, evaluations, strict=True):
        source = evaluation.record["checkpoint"]["source"]
        try:
            if (
                source not in map(str, sources) and not Path(source).is_dir()
            ):  # the record's word, not the user's
                raise FileNotFoundError(f"{source}: no such directory")
            models.append(checkpoint.load(source))
        except (FileNotFoundError, ValueError) as error:
            notes.append(
                f"{name}: its checkpoint is not to be had ({error}), so its speed is not measured"
            )
            models.append(None)
        if count := sum(clip["trained_on"] for clip in evaluation.record["clips"]):
            notes.append(
                f"{name}: {count} of {len(evaluation.record['clips'])} clips were trained on"
            )
    rows = []
    for name, evaluation, model in zip(names, evaluations, models, strict=True):
        say(f"measuring the speed of {name}")
        rows.append(row(name, evaluation, model))
    here = [(name, model) for name, model in zip(names, models, strict=True) if model is not None]
    made = None
    if isinstance(beginning, str):
        notes.append(f"nothing was made after the same beginning: {beginning}")
    elif here and beginning is not None:
        say(f"making what follows the same beginning, {beginning.name}")
        made = strip(
            [name for name, _ in here], [model for _, model in here], beginning, out, config
        )
    data = evaluations[0].record["data"]
    said = f"{data['source']}: {data['clips']} clips, {data['seconds'] / 60:.1f} minutes at {data['sample_rate']} Hz"
    return {"data": said, "models": rows, "strip": made, "notes": notes}
