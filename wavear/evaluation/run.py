"""The work of `wavear.evaluate`: score every clip, synthesize some, measure these, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wavear import audio
from wavear.audio.emphasis import coefficient
from wavear.common.machine import machine
from wavear.data.corpus import Recording, reason
from wavear.data.crops import read_span
from wavear.evaluation.bits import LEVELS, Baselines, Scores, score_recording
from wavear.evaluation.bounds import grid_round_trip, griffin_lim
from wavear.evaluation.clips import fitting_data, open_clips, preparation, training_record
from wavear.evaluation.held_out import subset
from wavear.evaluation.metrics import MEASURES, NEAR, NotMeasured, measure, pitch
from wavear.evaluation.statistics import bootstrap
from wavear.generation.engines import make_engine, name_of_engine
from wavear.generation.sampler import generate
from wavear.mel.spectrogram import log_mel
from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of

if TYPE_CHECKING:
    from wavear.evaluation.evaluation import EvaluateConfig

SYSTEMS = {
    "original": "Recording",
    "mulaw": "Round trip",
    "model": "Model",
    "griffin_lim": "Griffin-Lim",
}
LAWS = ("model", "linear", "markov", "unigram", "uniform")
_BATCH, _SPREAD = 24, 1.25  # streams at once, and the longest over the shortest of them
_FREE = 4  # samples of a model that follows no recording

Say = Callable[[str], object]


@contextlib.contextmanager
def cores(threads: int | None) -> Iterator[None]:
    """No more of them for torch, while it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_everything(
    source: str | Path,
    data: str | Path,
    out: Path,
    config: EvaluateConfig,
    *,
    begin: Callable[[], object],
    progress: bool,
    say: Say,
    complain: Say,
) -> dict[str, Any]:
    """The record of an evaluation, less what it was asked with. `begin` is called before the first file is written."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device!r}, and there is no CUDA device here: use cpu")
    model = checkpoint.load(source, config.device)
    described = checkpoint.read_config(source)
    rate, mel = model.config.sample_rate, model.config.mel
    engine = make_engine(model, 1, config.engine, weights=config.weights, threads=config.threads)[0]
    trained = training_record(source)
    prepared = preparation(trained)
    least = 2 if mel is None else mel.hop_length
    by_name = model.config.speakers > 0 and config.speaker is None
    clips = open_clips(data, rate, least, prepared, by_name)
    speakers = _speaker_numbers(model, described, clips.good, config.speaker, clips.failed)
    good = [clip for clip in clips.good if clip.name not in clips.failed]
    for name, why in clips.failed.items():
        complain(f"{name}: {why}")
    if not good:
        raise ValueError(
            f"{data}: none of the clips can be used; the first: {next(iter(clips.failed.values()))}"
        )
    fitting = fitting_data(
        good, rate, least, trained, prepared, config.train_data, config.baseline_seconds
    )
    notes = list(clips.notes)
    if fitting.note is not None:
        notes.append(fitting.note)
    if fitting.trained_on:
        notes.append(
            f"{len(fitting.trained_on)} of {len(good)} clips were trained on: what is said of them is not held-out"
        )
    if emphasis := coefficient(model.config):
        notes.append(
            f"bits are of pre-emphasised codes (x[t] - {emphasis:g} x[t-1]), not those of plain ones"
        )
    fitted = (
        Baselines.fit(fitting.recordings, layout_of(model, 1), model.grid)
        if fitting.recordings
        else None
    )
    notes += [
        f"the baselines pass over {name}: {why}"
        for name, why in (fitted.failed if fitted else {}).items()
    ]
    for note in notes:
        say(note)
    begin()
    seconds = sum(clip.frames for clip in good) / rate
    say(
        f"scoring {len(good)} clips, {seconds / 60:.1f} minutes; baselines fitted to {fitting.says}"
    )
    scores: dict[int, Scores] = {}
    for n, clip in enumerate(_bar(good, progress, "scoring")):
        try:
            scores[n] = score_recording(model, clip, speakers[n])
        except (ValueError, OSError) as error:
            clips.failed[clip.name] = reason(error, clip)
            complain(f"{clip.name}: {clips.failed[clip.name]}")
    if not scores:
        raise ValueError(
            f"{data}: none of the clips can be read; the first: {next(iter(clips.failed.values()))}"
        )
    linear = _add_baselines(model, good, scores, fitted, config.baseline_seconds)
    if linear is None:
        notes.append(
            "with one clip and no training data there is nothing to fit baselines to: pass --train-data"
        )
    rows = {n: _clip(good[n], scores[n], good[n].name in fitting.trained_on) for n in scores}
    record: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "checkpoint": {
            "source": str(source),
            "family": described["family"],
            "grid": str(model.grid),
            "multiply_adds": model.multiply_adds,
            "weight_bytes": model.weight_bytes,
            "receptive_field": model.receptive_field,
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": described["config"],
            "training": described.get("training", {}),
        },
        "data": {"source": str(data), "clips": len(rows), "seconds": seconds, "sample_rate": rate}
        | {"treated": prepared.words},
        "settings": _settings(config, engine),
        "baselines": {
            "fitted_to": fitting.says,
            "seconds": fitted.counts.single.sum().item() / rate if fitted else 0.0,
        }
        | (linear or {}),
        "bits": _bits(list(rows.values()), config),
        "common_bits": _common_bits(list(rows.values()), "common_bits", config),
        "mulaw_bits": _common_bits(list(rows.values()), "mulaw_bits", config),
        "by_speaker": _by_speaker(list(rows.values()), config),
        "by_level": _by_level(list(scores.values())),
    }
    if mel is None:
        notes.append(
            "the model is not conditioned on mels: it has no recording to copy, so there are bits and free samples"
        )
        record["free"] = _free(model, out, config, engine, say) if config.clips else []
    else:
        chosen = _spread(sorted(scores), config.clips)
        record["generation"] = _copy(
            model, good, rows, speakers, chosen, out, config, progress, say
        )
    record["measures"] = _measures(list(rows.values()), config)
    return record | {"clips": list(rows.values()), "failed": clips.failed, "notes": notes}


def _speaker_numbers(
    model: AutoregressiveModel,
    described: dict[str, Any],
    clips: list[Recording],
    given: int | None,
    failed: dict[str, str],
) -> list[int | None]:
    """Of each clip that is not in `failed`; what has no speaker that the model knows goes there."""
    if not model.config.speakers:
        if given is not None:
            raise ValueError(f"speaker is {given}, and the model was trained without speakers")
        return [None] * len(clips)
    if given is not None:
        if not 0 <= given < model.config.speakers:
            raise ValueError(
                f"speaker is {given}, the model knows 0 to {model.config.speakers - 1}"
            )
        return [given] * len(clips)
    names = described.get("training", {}).get("speakers", [])
    found: list[int | None] = []
    for clip in clips:
        if clip.speaker in names:
            found.append(names.index(clip.speaker))
        else:
            known = ", ".join(names[:8]) or "numbers only: pass --speaker"
            failed[clip.name] = f"its speaker is {clip.speaker!r}, the model knows {known}"
    return found


def _add_baselines(
    model: AutoregressiveModel,
    clips: list[Recording],
    scores: dict[int, Scores],
    fitted: Baselines | None,
    seconds: float,
) -> dict[str, Any] | None:
    """Bits of the laws that need no model, into `scores`; what is to be said of the linear predictor.

    Without laws that are `fitted` the clips serve each other by halves.
    """
    layout, grid = layout_of(model, 1), model.grid
    numbers = list(scores)
    if fitted is not None:
        halves = [(fitted, numbers)]
    elif len(numbers) < 2:
        for score in scores.values():
            score.bits["uniform"] = score.samples * float(np.log2(grid.classes))
        return None
    else:
        limit = seconds * layout.sample_rate
        even, odd = numbers[::2], numbers[1::2]
        halves = [
            (Baselines.fit(subset([clips[n] for n in a], limit), layout, grid), b)
            for a, b in ((even, odd), (odd, even))
        ]
    for laws, tested in halves:
        for n in tested:
            scores[n].bits |= laws.bits(clips[n], layout, grid)
    linear = halves[-1][0].linear
    return {
        "linear": {
            "order": linear.config.order,
            "domain": linear.config.domain,
            "law": {"gaussian": "normal"}.get(linear.config.law, linear.config.law),
            "scale": linear.scale().item(),
            "weights": linear.taps().tolist()[::-1],  # the oldest sample's first
        }
    }


def _clip(recording: Recording, score: Scores, trained_on: bool) -> dict[str, Any]:
    return {
        "name": recording.name,
        "speaker": recording.speaker,
        "samples": score.samples,
        "digest": score.digest,
        "trained_on": trained_on,
        "bits": {law: score.bits[law] / score.samples for law in LAWS if law in score.bits},
        "common_bits": score.common["linear"] / score.samples if "linear" in score.common else None,
        "mulaw_bits": score.common["mulaw"] / score.samples if "mulaw" in score.common else None,
        "by_level": [
            [int(n), float(bits)]
            for n, bits in zip(score.level_samples, score.level_bits, strict=True)
        ],
    }


def _copy(
    model: AutoregressiveModel,
    clips: list[Recording],
    rows: dict[int, dict[str, Any]],
    speakers: list[int | None],
    chosen: list[int],
    out: Path,
    config: EvaluateConfig,
    progress: bool,
    say: Say,
) -> dict[str, Any]:
    """Synthesize clips from their mels, measure them and the bounds, and add what comes out to `rows`."""
    rate, mel_config = model.config.sample_rate, model.config.mel
    hop, emphasis = mel_config.hop_length, coefficient(model.config)
    spans = {
        n: min(clips[n].frames, max(round(config.seconds * rate), hop)) // hop * hop for n in chosen
    }
    taken = 0.0
    for batch in _bar(list(_batches(spans)), progress, "synthesizing"):
        originals = [read_span(clips[n], rate, 0, spans[n]) for n in batch]
        mels = [log_mel(torch.from_numpy(x)[None], mel_config)[0] for x in originals]
        known = [speakers[n] for n in batch]
        began = time.perf_counter()
        waveforms = generate(
            model,
            mels,
            seed=config.seed,
            temperature=config.temperature,
            speaker=None if known[0] is None else [int(s) for s in known if s is not None],
            engine=config.engine,
            weights=config.weights,
            threads=config.threads,
            progress=progress,
        )
        taken += time.perf_counter() - began
        for n, x, mel, made in zip(batch, originals, mels, waveforms, strict=True):
            systems = {
                "original": x,
                "mulaw": grid_round_trip(torch.from_numpy(x), model.grid, emphasis).numpy(),
                "model": made[: x.size].numpy(),
                "griffin_lim": griffin_lim(mel.numpy(), mel_config, config.seed),
            }
            row = rows[n]
            row["synthesized_samples"] = int(x.size)
            row["audio"] = _write(systems, rate, out, f"{n:04d}-{_file_name(row['name'])}")
            row["measures"], row["not_measured"] = _measure(systems, rate)
            for name, why in row["not_measured"].get("model", {}).items():
                say(f"{row['name']}: no {MEASURES[name].title}: {why}")
    seconds = sum(spans.values()) / rate
    if chosen:
        speed = f"{seconds / taken:.2f} x real time"
        say(f"synthesized {len(chosen)} clips, {seconds:.1f} s of audio in {taken:.1f} s, {speed}")
    return {"clips": len(chosen), "audio_seconds": seconds, "seconds": taken}


def _write(systems: dict[str, np.ndarray], rate: int, out: Path, name: str) -> dict[str, str]:
    """WAV files of one clip; their paths below `out`."""
    folder = out / "audio" / name
    folder.mkdir(parents=True)
    for system, waveform in systems.items():
        audio.write(folder / f"{system}.wav", waveform, rate)
    return {system: f"audio/{name}/{system}.wav" for system in systems}


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem)[:60]


def _measure(systems: dict[str, np.ndarray], rate: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values, and reasons for those that are missing, by system and measure."""
    x = systems["original"]
    values: dict[str, Any] = {}
    missing: dict[str, Any] = {}
    try:
        true = pitch(x, rate)
    except NotMeasured:
        true = None
    values["original"], reasons = measure(x, x, rate, names=NEAR)
    if reasons:
        missing["original"] = reasons
    for system in ("mulaw", "model", "griffin_lim"):
        values[system], reasons = measure(x, systems[system], rate, true)
        if reasons:
            missing[system] = reasons
    return values, missing


def _free(
    model: AutoregressiveModel, out: Path, config: EvaluateConfig, engine: str, say: Say
) -> list[dict[str, Any]]:
    """Samples of a model that follows no recording."""
    rate, count = model.config.sample_rate, min(config.clips, _FREE)
    speakers = None
    if model.config.speakers:
        speakers = [
            k % model.config.speakers if config.speaker is None else config.speaker
            for k in range(count)
        ]
    began, seeds = time.perf_counter(), [config.seed + k for k in range(count)]
    waveforms = generate(
        model,
        samples=max(round(config.seconds * rate), 1),
        seed=seeds,
        temperature=config.temperature,
        speaker=speakers,
        engine=config.engine,
        weights=config.weights,
        threads=config.threads,
    )
    name = name_of_engine(engine, config.weights)
    say(
        f"made {count} free samples of {config.seconds:g} s in {time.perf_counter() - began:.1f} s, engine {name}"
    )
    made = []
    for k, (seed, waveform) in enumerate(zip(seeds, waveforms, strict=True)):
        audio.write(out / "audio" / f"free-{k}.wav", waveform, rate)
        made.append(
            {
                "audio": f"audio/free-{k}.wav",
                "seed": seed,
                "speaker": speakers[k] if speakers else None,
            }
        )
    return made


def _bits(rows: list[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """Bits per sample over all samples, by law."""
    found = {}
    for law in LAWS:
        kept = [row for row in rows if law in row["bits"]]
        if len(kept) == len(rows):
            values, weights = [row["bits"][law] for row in kept], [row["samples"] for row in kept]
            interval = bootstrap(values, weights, resamples=config.resamples, seed=config.seed)
            found[law] = interval.to_dict()
    return found


def _common_bits(
    rows: list[dict[str, Any]], name: str, config: EvaluateConfig
) -> dict[str, Any] | None:
    """Bits per sample of the model on one of `COMMON_GRIDS`, over all samples."""
    if any(row[name] is None for row in rows):
        return None
    values, weights = [row[name] for row in rows], [row["samples"] for row in rows]
    return bootstrap(values, weights, resamples=config.resamples, seed=config.seed).to_dict()


def _by_speaker(rows: list[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    names = sorted({row["speaker"] for row in rows if row["speaker"] is not None})
    groups = {name: [row for row in rows if row["speaker"] == name] for name in names}
    return {
        name: {"samples": sum(row["samples"] for row in group), "bits": _bits(group, config)}
        for name, group in groups.items()
    }


def _by_level(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    samples = np.sum([score.level_samples for score in scores], axis=0)
    bits = np.sum([score.level_bits for score in scores], axis=0)
    bounds = [None if np.isinf(level) else level for level in LEVELS]
    return [
        {"from": low, "to": high, "samples": int(n), "bits": float(total / n) if n else None}
        for low, high, n, total in zip(bounds, bounds[1:], samples, bits, strict=False)
    ]


def _measures(rows: list[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """Means over clips, by measure and system: of the clips where every system has a value."""
    rows = [row for row in rows if "measures" in row]
    found: dict[str, Any] = {}
    for name in MEASURES:
        systems = (
            SYSTEMS if name in NEAR else [system for system in SYSTEMS if system != "original"]
        )
        kept = [row for row in rows if all(name in row["measures"][system] for system in systems)]
        if kept:
            found[name] = {
                system: bootstrap(
                    [row["measures"][system][name] for row in kept],
                    resamples=config.resamples,
                    seed=config.seed,
                ).to_dict()
                for system in systems
            }
    return found


def _settings(config: EvaluateConfig, engine: str) -> dict[str, Any]:
    return {
        name: value for name, value in dataclasses.asdict(config).items() if name != "overwrite"
    } | {"engine": engine}


def _spread(numbers: list[int], count: int) -> list[int]:
    """So many of them, evenly."""
    if count >= len(numbers):
        return numbers
    if not count:
        return []
    return [numbers[round(k)] for k in np.linspace(0, len(numbers) - 1, count)]


def _batches(spans: dict[int, int]) -> Iterator[list[int]]:
    """Clips of similar length together: what is made beyond an utterance's end is thrown away."""
    batch: list[int] = []
    for n in sorted(spans, key=lambda n: -spans[n]):
        if batch and (len(batch) == _BATCH or spans[batch[0]] > _SPREAD * spans[n]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _bar(items: Sequence[Any], progress: bool, description: str) -> Iterable[Any]:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description, dynamic_ncols=True, leave=False)
