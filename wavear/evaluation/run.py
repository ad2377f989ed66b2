"""The steps of `wavear.evaluate`: score every clip, synthesize some, measure these, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from wavear import audio
from wavear.audio.emphasis import coefficient
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.machine import machine
from wavear.common.memory import memory_errors
from wavear.common.words import counted
from wavear.data.corpus import Recording, reason
from wavear.data.crops import file_mel, read_span
from wavear.data.file_mels import MelFolder
from wavear.evaluation.bits import LEVELS, Baselines, Scores, score_recording
from wavear.evaluation.bounds import bound_without_model, grid_round_trip
from wavear.evaluation.clips import (
    Fitting,
    Preparation,
    fitting_data,
    none_usable,
    open_clips,
    preparation,
    training_record,
)
from wavear.evaluation.config import EvaluateConfig
from wavear.evaluation.held_out import subset
from wavear.evaluation.metrics import MEASURES, NEAR, NotMeasured, measure, pitch
from wavear.evaluation.records import SOUNDS, SYSTEMS, Clip
from wavear.evaluation.statistics import bootstrap
from wavear.generation.engines import make_engine, name_of_engine
from wavear.generation.particles import check_particles
from wavear.generation.sampler import generate
from wavear.generation.settings import Sampling
from wavear.mel.conventions import Frames
from wavear.mel.features import FeatureConfig
from wavear.mel.spectrogram import log_mel
from wavear.models import checkpoint
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import layout_of

LAWS = ("model", "linear", "markov", "unigram", "uniform")
_BATCH, _SPREAD = 24, 1.25  # streams at once, and the longest over the shortest of them
_FREE = 4  # samples of a model that follows no recording
_QUICK_CLIPS, _QUICK_SECONDS, _QUICK_MEASURES = 10, 5.0, ("stoi", "mcd")

logger = get_logger(__name__)


@contextlib.contextmanager
def cores(threads: int | None) -> Iterator[None]:
    """Limit torch to so many threads, for a while."""
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
) -> dict[str, Any]:
    """Return the record of an evaluation. `begin` is called before the first file is written."""
    if config.quick:
        clips, seconds = min(config.clips, _QUICK_CLIPS), min(config.seconds, _QUICK_SECONDS)
        config = dataclasses.replace(config, clips=clips, seconds=seconds)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise WavearError(f"device is {config.device!r}, and no CUDA device is available: use cpu")
    model = checkpoint.load(source, config.device)
    described = checkpoint.read_config(source)
    rate, mel = model.config.sample_rate, model.config.mel
    engine = make_engine(model, 1, config.engine, weights=config.weights, threads=config.threads)[0]
    trained = training_record(source)
    prepared = preparation(trained)
    if config.particles > 1:
        check_particles(model)
    least = 2 if mel is None else mel.hop_length
    by_name = model.config.speakers > 0 and config.speaker is None
    clips = open_clips(data, rate, least, prepared, by_name, _mel_folder(config, mel, prepared))
    speakers = _speaker_numbers(model, described, clips.good, config.speaker, clips.failed)
    good = [clip for clip in clips.good if clip.name not in clips.failed]
    for name, why in clips.failed.items():
        logger.warning(f"{name}: {why}")
    if not good:
        raise none_usable(data, clips.failed)
    if config.quick:
        few = _spread(list(range(len(good))), _QUICK_CLIPS)
        good, speakers = [good[n] for n in few], [speakers[n] for n in few]
    fitting = fitting_data(
        good, rate, least, trained, prepared, config.train_data, config.baseline_seconds
    )
    fitted = None
    if fitting.recordings:
        fitted = Baselines.fit(fitting.recordings, layout_of(model, 1), model.grid)
    notes = [*clips.notes, *_first_notes(model, fitting, fitted, len(good))]
    for note in notes:
        logger.info(note)
    begin()
    seconds = sum(clip.frames for clip in good) / rate
    logger.info(f"baselines fitted to {fitting.origin}")
    logger.info(f"scoring {counted(len(good), 'clip')}, {seconds / 60:.1f} minutes")
    scores: dict[int, Scores] = {}
    for n, clip in enumerate(_bar(good, progress, "scoring")):
        try:
            with memory_errors():
                scores[n] = score_recording(model, clip, speakers[n])
        except (ValueError, OSError, MemoryError) as error:
            clips.failed[clip.name] = reason(error, clip)
            logger.warning(f"{clip.name}: {clips.failed[clip.name]}")
    if not scores:
        raise none_usable(data, clips.failed)
    linear = _add_baselines(model, good, scores, fitted, config.baseline_seconds)
    if linear is None:
        notes.append("one clip and no training data: pass --train-data to fit baselines")
    rows = {n: _row(good[n], scores[n], good[n].name in fitting.trained_on) for n in scores}
    every = list(rows.values())
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
        "data": {
            "source": str(data),
            "clips": len(rows),
            "seconds": seconds,
            "sample_rate": rate,
            "treated": prepared.words,
        },
        "settings": dataclasses.asdict(config) | {"engine": engine},
        "baselines": {
            "fitted_to": fitting.origin,
            "seconds": fitted.counts.single.sum().item() / rate if fitted else 0.0,
            **(linear or {}),
        },
        "bits": _bits(every, config),
        "common_bits": _mean_bits([row.common_bits for row in every], every, config),
        "mulaw_bits": _mean_bits([row.mulaw_bits for row in every], every, config),
        "by_speaker": _by_speaker(every, config),
        "by_level": _by_level(list(scores.values())),
    }
    del record["settings"]["overwrite"]
    synthesis = _Synthesis(model, out, config, engine, progress)
    if mel is None:
        notes.append("the model is not conditioned on mels: bits and free samples only")
        record["free"] = synthesis.free() if config.clips else []
    else:
        chosen = _spread(sorted(scores), config.clips)
        record["generation"] = synthesis.copy(good, rows, speakers, chosen)
    record["measures"] = _measures(every, config)
    return record | {
        "clips": [row.to_dict() for row in every],
        "failed": clips.failed,
        "notes": notes,
    }


def _mel_folder(
    config: EvaluateConfig, mel: Frames | None, prepared: Preparation
) -> MelFolder | None:
    if config.mels is None:
        if isinstance(mel, FeatureConfig):
            raise WavearError("the model is conditioned on features: pass their folder as --mels")
        return None
    if mel is None:
        raise WavearError("the model is not conditioned on mels: drop mels")
    if prepared.words:
        raise WavearError(
            f"the model's recordings are treated ({', '.join(prepared.words)}), so mels from files"
            " do not fit them: drop mels"
        )
    return MelFolder(config.mels, mel)


def _first_notes(
    model: AutoregressiveModel, fitting: Fitting, fitted: Baselines | None, clips: int
) -> list[str]:
    notes = [] if fitting.note is None else [fitting.note]
    if fitting.trained_on:
        count = len(fitting.trained_on)
        notes.append(f"{count} of {clips} clips were trained on: their numbers are not held-out")
    if emphasis := coefficient(model.config):
        notes.append(
            f"bits are of pre-emphasised codes (x[t] - {emphasis:g} x[t-1]), not of plain ones"
        )
    failed = fitted.failed if fitted else {}
    return notes + [f"the baselines skip {name}: {why}" for name, why in failed.items()]


def _speaker_numbers(
    model: AutoregressiveModel,
    described: dict[str, Any],
    clips: list[Recording],
    given: int | str | None,
    failed: dict[str, str],
) -> list[int | None]:
    """Return the speaker of each clip; a clip of an unknown speaker goes into `failed` instead."""
    if given is not None or not model.config.speakers:
        return (Sampling(speaker=given).speakers(model) or [None]) * len(clips)  # type: ignore[return-value]
    names = described.get("training", {}).get("speakers", [])
    found: list[int | None] = []
    for clip in clips:
        if clip.speaker in names:
            found.append(names.index(clip.speaker))
        else:
            known = ", ".join(names[:8]) or "numbers only: pass --speaker"
            failed[clip.name] = f"its speaker is {clip.speaker!r}; the model has {known}"
    return found


def _add_baselines(
    model: AutoregressiveModel,
    clips: list[Recording],
    scores: dict[int, Scores],
    fitted: Baselines | None,
    seconds: float,
) -> dict[str, Any] | None:
    """Add the baselines' bits to `scores`, and return the linear predictor for the record.

    Without baselines that are `fitted`, each half of the clips serves the other.
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


def _row(recording: Recording, score: Scores, trained_on: bool) -> Clip:
    common = {name: bits / score.samples for name, bits in score.common.items()}
    return Clip(
        recording.name,
        recording.speaker,
        score.samples,
        score.digest,
        trained_on,
        bits={law: score.bits[law] / score.samples for law in LAWS if law in score.bits},
        common_bits=common.get("linear"),
        mulaw_bits=common.get("mulaw"),
        by_level=list(zip(score.level_samples.tolist(), score.level_bits.tolist(), strict=True)),
    )


@dataclass(frozen=True)
class _Synthesis:
    """Makes the audio of an evaluation."""

    model: AutoregressiveModel
    out: Path
    config: EvaluateConfig
    engine: str
    progress: bool

    def generate(self, *inputs: Any, **settings: Any) -> Any:
        config = self.config
        return generate(
            self.model,
            *inputs,
            temperature=config.temperature,
            engine=config.engine,
            weights=config.weights,
            threads=config.threads,
            **settings,
        )

    def write(self, name: str, waveform: Any) -> str:
        """Write a WAV file, and return its path relative to the evaluation."""
        path = self.out / SOUNDS / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, waveform, self.model.config.sample_rate)
        return f"{SOUNDS}/{name}.wav"

    def copy(
        self,
        clips: list[Recording],
        rows: dict[int, Clip],
        speakers: list[int | None],
        chosen: list[int],
    ) -> dict[str, Any]:
        """Synthesize clips from their mels, and add audio and measures to `rows`."""
        model, seed = self.model, self.config.seed
        rate, mel_config = model.config.sample_rate, model.config.mel
        emphasis, layout = coefficient(model.config), layout_of(model, 1)
        hop, longest = mel_config.hop_length, round(self.config.seconds * rate)
        spans = {n: min(clips[n].frames, max(longest, hop)) // hop * hop for n in chosen}
        taken, missing = 0.0, dict[str, list[str]]()
        for batch in _bar(list(_batches(spans)), self.progress, "synthesizing"):
            originals = [read_span(clips[n], rate, 0, spans[n]) for n in batch]
            mels = [
                log_mel(torch.from_numpy(x)[None], mel_config)[0]
                if (given := file_mel(clips[n], layout, 0, spans[n] // hop)) is None
                else torch.from_numpy(given)
                for n, x in zip(batch, originals, strict=True)
            ]
            numbers = None if model.config.speakers == 0 else [speakers[n] for n in batch]
            began = time.perf_counter()
            how = {"seed": seed, "speaker": numbers, "particles": self.config.particles}
            waveforms = self.generate(mels, **how, progress=self.progress)
            taken += time.perf_counter() - began
            for n, x, mel, made in zip(batch, originals, mels, waveforms, strict=True):
                systems = {
                    "original": x,
                    "mulaw": grid_round_trip(torch.from_numpy(x), model.grid, emphasis).numpy(),
                    "model": made[: x.size].numpy(),
                    "griffin_lim": bound_without_model(x, mel, mel_config, seed),
                }
                row = rows[n]
                stem = f"{n:04d}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(row.name).stem)[:60]}"
                row.synthesized_samples = x.size
                row.audio = {
                    system: self.write(f"{stem}/{system}", systems[system]) for system in systems
                }
                names = _QUICK_MEASURES if self.config.quick else tuple(MEASURES)
                row.measures, row.not_measured = _measure(systems, rate, names)
                for name, why in row.not_measured.get("model", {}).items():
                    missing.setdefault(f"no {MEASURES[name].title}: {why}", []).append(row.name)
        for what, names in missing.items():
            where = names[0] if len(names) == 1 else counted(len(names), "clip")
            logger.info(f"{where}: {what}")
        seconds = sum(spans.values()) / rate
        if chosen:
            logger.info(
                f"synthesized {counted(len(chosen), 'clip')}, {seconds:.1f} s of audio in"
                f" {taken:.1f} s, {seconds / taken:.2f} x real time"
            )
        return {"clips": len(chosen), "audio_seconds": seconds, "seconds": taken}

    def free(self) -> list[dict[str, Any]]:
        """Make samples of a model that follows no recording."""
        config, model = self.config, self.model
        count = min(config.clips, _FREE)
        speakers: Any = [None] * count
        if model.config.speakers:
            given = config.speaker
            speakers = [k % model.config.speakers if given is None else given for k in range(count)]
        began, seeds = time.perf_counter(), [config.seed + k for k in range(count)]
        waveforms = self.generate(
            samples=max(round(config.seconds * model.config.sample_rate), 1),
            seed=seeds,
            speaker=speakers if model.config.speakers else None,
        )
        logger.info(
            f"made {count} free samples of {config.seconds:g} s in"
            f" {time.perf_counter() - began:.1f} s,"
            f" engine {name_of_engine(self.engine, config.weights)}"
        )
        return [
            {"audio": self.write(f"free-{k}", waveform), "seed": seed, "speaker": speaker}
            for k, (seed, speaker, waveform) in enumerate(
                zip(seeds, speakers, waveforms, strict=True)
            )
        ]


def _measure(
    systems: dict[str, np.ndarray], rate: int, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return values, and reasons for the missing ones, by system and measure."""
    x = systems["original"]
    true = None
    if "f0_rmse" in names:
        with contextlib.suppress(NotMeasured):
            true = pitch(x, rate)
    found = {"original": measure(x, x, rate, names=[n for n in NEAR if n in names])}
    for system in ("mulaw", "model", "griffin_lim"):
        found[system] = measure(x, systems[system], rate, true, names)
    values = {system: each for system, (each, _) in found.items()}
    return values, {system: reasons for system, (_, reasons) in found.items() if reasons}


def _mean_bits(
    values: Sequence[float | None], rows: Sequence[Clip], config: EvaluateConfig
) -> dict[str, Any] | None:
    """Return the mean over all samples with its interval; None where a clip has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(rows):
        return None
    weights = [row.samples for row in rows]
    return bootstrap(known, weights, resamples=config.resamples, seed=config.seed).to_dict()


def _bits(rows: Sequence[Clip], config: EvaluateConfig) -> dict[str, Any]:
    """Return bits per sample over all samples, by distribution."""
    found = {law: _mean_bits([row.bits.get(law) for row in rows], rows, config) for law in LAWS}
    return {law: interval for law, interval in found.items() if interval is not None}


def _by_speaker(rows: Sequence[Clip], config: EvaluateConfig) -> dict[str, Any]:
    groups: dict[str, list[Clip]] = {}
    for row in rows:
        if row.speaker is not None:
            groups.setdefault(row.speaker, []).append(row)
    return {
        name: {"samples": sum(row.samples for row in group), "bits": _bits(group, config)}
        for name, group in sorted(groups.items())
    }


def _by_level(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    samples = np.sum([score.level_samples for score in scores], axis=0)
    bits = np.sum([score.level_bits for score in scores], axis=0)
    bounds = [None if np.isinf(level) else level for level in LEVELS]
    return [
        {"from": low, "to": high, "samples": int(n), "bits": float(total / n) if n else None}
        for low, high, n, total in zip(bounds, bounds[1:], samples, bits, strict=False)
    ]


def _measures(rows: Sequence[Clip], config: EvaluateConfig) -> dict[str, Any]:
    """Return means by measure and system, over the clips where every system has a value."""
    measured = [row.measures for row in rows if row.measures is not None]
    found: dict[str, Any] = {}
    for name in MEASURES:
        systems = [system for system in SYSTEMS if system != "original" or name in NEAR]
        kept = [values for values in measured if all(name in values[s] for s in systems)]
        if kept:
            found[name] = {
                system: bootstrap(
                    [values[system][name] for values in kept],
                    resamples=config.resamples,
                    seed=config.seed,
                ).to_dict()
                for system in systems
            }
    return found


def _spread(numbers: list[int], count: int) -> list[int]:
    """Choose so many, evenly."""
    if count >= len(numbers):
        return numbers
    return [numbers[round(k)] for k in np.linspace(0, len(numbers) - 1, count)]


def _batches(spans: dict[int, int]) -> Iterator[list[int]]:
    """Group clips of similar length: samples beyond an utterance's end are thrown away."""
    batch: list[int] = []
    for n in sorted(spans, key=lambda n: -spans[n]):
        if batch and (len(batch) == _BATCH or spans[batch[0]] > _SPREAD * spans[n]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _bar(items: Sequence[Any], progress: bool, description: str) -> Any:
    return tqdm(items, desc=description, dynamic_ncols=True, leave=False, disable=not progress)
