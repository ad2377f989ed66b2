"""A table of models of any families and quantisation: bits, cost, speed and audio."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear import audio
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.words import counted
from wavear.data.crops import read_span
from wavear.evaluation.clips import Preparation, open_clips
from wavear.evaluation.config import EvaluateConfig
from wavear.evaluation.records import STRIP, Evaluation
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine
from wavear.generation.sampler import generate
from wavear.mel.spectrogram import log_mel
from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.sampling import uniforms

_PRIME_SECONDS, _STRIP_SECONDS = 0.5, 1.5
_SPEED_SECONDS = 2.0
QUALITY = ("pesq", "stoi", "mcd", "noise_floor")

logger = get_logger(__name__)


def check_before(
    sources: Sequence[str | Path],
    given: Sequence[Evaluation | None],
    configs: Sequence[dict[str, Any]],
    data: str | Path | None,
) -> None:
    """Refuse several sample rates, and other clips, before checkpoints are evaluated."""
    rates = sorted({config["sample_rate"] for config in configs})
    if len(rates) > 1:
        raise WavearError(
            f"the models are of {' and '.join(map(str, rates))} Hz: their bits cannot be compared"
        )
    done = {str(source): each for source, each in zip(sources, given, strict=True) if each}
    check_same_clips(list(done), list(done.values()))
    if data is None or None not in given:
        return
    names = {clip.name for clip in open_clips(data, rates[0], 1, Preparation(), False).good}
    for source, evaluation in done.items():
        if names.isdisjoint(clip.name for clip in evaluation.clips):
            raise WavearError(
                f"{source} was evaluated on other clips than those of {data}:"
                " evaluate all on the same"
            )


def name_models(evaluations: Sequence[Evaluation], sources: Sequence[str | Path]) -> list[str]:
    """Return a short name of each: the folder of its run, with its number where two are alike."""
    names = []
    for evaluation, source in zip(evaluations, sources, strict=True):
        path = Path(evaluation.record["checkpoint"]["source"])
        own = path.parent.name if path.name in ("best", "last") else path.name
        # Pictures cannot have names that are not Unicode.
        names.append((own or str(source)).encode("utf-8", "backslashreplace").decode("utf-8"))
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def row(name: str, evaluation: Evaluation, model: AutoregressiveModel | None) -> dict[str, Any]:
    """Return the row of one model; without the model it has no speeds (on this machine)."""
    record = evaluation.record
    described, measures = record["checkpoint"], record["measures"]
    found: dict[str, Any] = {
        "name": name,
        "source": described["source"],
        "family": described["family"],
        "law": described["config"].get("law", "categorical"),
        "grid": evaluation.codes,
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
        "measures": {each: measures[each]["model"] for each in QUALITY if each in measures},
    }
    if model is not None:
        state = model.export_state(model.init_state(1))
        found["state_bytes"] = sum(each.numel() * each.element_size() for each in state.values())
        engines = dict.fromkeys(["reference", make_engine(model, 1, threads=1)[0]])
        found["speed"] = {engine: speed(model, engine) for engine in engines}
    return found


@torch.inference_mode()
def speed(model: AutoregressiveModel, engine: str, seconds: float | None = None) -> float:
    """Return samples per second of one stream on one core, of the best call within `seconds`."""
    seconds = _SPEED_SECONDS if seconds is None else seconds
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
    """A stretch of a recording: its first part is given to every model, which continues it."""

    name: str
    waveform: torch.Tensor
    """(n,): whole frames of every model."""
    prime: int
    """Samples of it that are given."""


def find_beginning(data: str | Path, rate: int, hops: Sequence[int]) -> Beginning | str:
    """Return the loudest two seconds, of which half a second is given, or the reason for none.

    They are of the first readable recording of two seconds or more, or else of the longest.

    Parameters
    ----------
    hops : sequence of int
        Samples per mel frame of the models with mels: the stretch is a whole number of frames of
        each.
    """
    wanted, unit = round((_PRIME_SECONDS + _STRIP_SECONDS) * rate), math.lcm(*hops)
    if unit > wanted:
        frames = ", ".join(map(str, sorted(set(hops))))
        return f"mel frames of {frames} samples end together only after {unit / rate:.1f} s"
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
    models: dict[str, AutoregressiveModel], beginning: Beginning, out: Path, config: EvaluateConfig
) -> dict[str, Any]:
    """Let each model continue the same beginning: WAV files of the recording and of each.

    Models with mels get those of the recording.
    """
    target, prime = beginning.waveform, beginning.prime
    rate = next(iter(models.values())).config.sample_rate
    files = {"recording": f"{STRIP}/recording.wav"}
    (out / STRIP).mkdir(parents=True, exist_ok=True)
    audio.write(out / files["recording"], target, rate)
    for n, (name, model) in enumerate(models.items()):
        made = generate(
            model,
            None if model.config.mel is None else log_mel(target[None], model.config.mel),
            samples=target.numel() - prime,
            prime=target[:prime],
            include_prime=True,
            seed=config.seed,
            speaker=0 if model.config.speakers else None,
            threads=config.threads,
        )
        files[name] = f"{STRIP}/{n}.wav"
        audio.write(out / files[name], made[0], rate)
    return {"recording": beginning.name, "prime_seconds": prime / rate, "files": files}


def check_same_clips(names: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """Return notes on rows that are not of the same audio: missing clips, other treatment.

    Raises
    ------
    ValueError
        If two have no clip in common, or a clip of one name is other audio though it was treated
        alike.
    """
    notes: list[str] = []
    clips = [{clip.name: clip for clip in each.clips} for each in evaluations]
    treated = [each.record["data"].get("treated", []) for each in evaluations]
    for n, (name, own) in enumerate(zip(names, clips, strict=True)):
        shared = [clip for clip in clips[0] if clip in own]
        if not shared:
            raise WavearError(
                f"{names[0]} and {name} were evaluated on other clips"
                f" ({next(iter(clips[0]))}, {next(iter(own))}...): evaluate them on the same"
            )
        same_codes = evaluations[n].codes == evaluations[0].codes
        told = ("samples", "digest") if same_codes else ("samples",)
        differ = [
            clip
            for clip in shared
            if any(getattr(own[clip], key) != getattr(clips[0][clip], key) for key in told)
        ]
        if not differ and treated[n] == treated[0]:
            continue
        if not treated[n] and not treated[0]:
            raise WavearError(
                f"{differ[0]} is not the same audio in the evaluations of {names[0]} and {name}:"
                " evaluate them on the same recordings"
            )
        first, here = (", ".join(words or ["untreated"]) for words in (treated[0], treated[n]))
        notes.append(
            f"{name} ({here}) and {names[0]} ({first}) were not evaluated on the same audio:"
            " their bits do not compare"
        )
    every = dict.fromkeys(clip for own in clips for clip in own)
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
) -> dict[str, Any]:
    """Return the record: rows, the strip, and notes.

    Raises
    ------
    ValueError
        If they were evaluated on other clips.
    """
    names, rows, models = name_models(evaluations, sources), [], {}
    notes = check_same_clips(names, evaluations)
    for name, evaluation in zip(names, evaluations, strict=True):
        source, model = evaluation.record["checkpoint"]["source"], None
        try:
            # A name in a record must not download anything: only the user's own words may.
            if source not in map(str, sources) and not Path(source).is_dir():
                raise FileNotFoundError(f"{source}: no such directory")
            model = models[name] = checkpoint.load(source)
        except (FileNotFoundError, ValueError) as error:
            notes.append(f"{name}: its checkpoint cannot be loaded ({error}): speed not measured")
        if count := sum(clip.trained_on for clip in evaluation.clips):
            notes.append(f"{name}: {count} of {len(evaluation.clips)} clips were trained on")
        logger.info(f"measuring the speed of {name}")
        rows.append(row(name, evaluation, model))
    made = None
    if isinstance(beginning, str):
        notes.append(f"there is no continuation of one beginning: {beginning}")
    elif models and beginning is not None:
        logger.info(f"continuing {beginning.name} with each model")
        made = strip(models, beginning, out, config)
    data = evaluations[0].record["data"]
    length = f"{counted(data['clips'], 'clip')}, {data['seconds'] / 60:.1f} minutes"
    about = f"{data['source']}: {length} at {data['sample_rate']} Hz"
    return {"data": about, "models": rows, "strip": made, "notes": notes}
