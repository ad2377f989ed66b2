"""The run of a linear model: one pass over the recordings, and the scores beside what needs no model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.audio.grid import Grid
from wavear.common.atomic import replace_file
from wavear.data.corpus import Corpus, Recording, reason
from wavear.data.crops import read_span
from wavear.evaluation.held_out import Counts, baselines, held_out_bits, subset
from wavear.models.checkpoint import load
from wavear.models.crop_loss import layout_of
from wavear.models.fitting import Fitted, Fitter
from wavear.models.linear import Linear
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.processes import Processes
from wavear.training.run_directory import make_directory

_SECONDS = 30.0  # of a recording that are read at once
_THREADS = 2  # that read and encode ahead of the sums


def fit(
    config: TrainConfig,
    corpus: Corpus,
    speakers: Sequence[str],
    model: Any,
    record: dict[str, Any],
    say: Any,
) -> TrainResult:
    """Fit a `Linear` to the recordings to train on, and write the run; see `wavear.train`.

    Parameters
    ----------
    config : TrainConfig
    corpus : Corpus
    speakers : of no use to it
    model : Linear
        As `config` has it; its numbers are not looked at.
    record : dict
        What `train.json` is to say so far.
    say : callable
        Takes a line.

    Raises
    ------
    ValueError
        If the run is one of several processes, or has nothing to fit to.
    """
    if Processes.here().world > 1:
        raise ValueError(
            "a linear model is fitted in one pass by one process: run it without torchrun and srun"
        )
    began, out, wanted = time.monotonic(), Path(config.out), model.config
    fitter = Fitter(
        model.grid,
        order=config.criterion or wanted.order,
        max_order=wanted.order,
        differencing=wanted.differencing,
        law=config.law or "auto",
        domain=wanted.domain,
        method="silence",
    )
    skipped = dict(corpus.bad)
    for name, why in add_recordings(fitter, corpus.train, config.sample_rate):
        skipped[name] = why
        say(f"skipped {name}: {why}")
    fitted = fitter.fit(config.sample_rate, stabilise=config.stabilise)
    model, seconds = fitted.model, time.monotonic() - began
    _describe(fitted, seconds, say)

    validation = subset(corpus.validation, config.validation_seconds * config.sample_rate)
    before = held_out_bits(Linear(model.config).eval(), validation).per_sample
    scored = held_out_bits(model, validation)
    bits = scored.per_sample
    make_directory(config)
    described = {"step": 1, "speakers": [], "validation_bits": round(bits, 5)}
    for name in ("best", "last"):
        model.save(out / name, overwrite=True, training=described)
    recordings = subset(corpus.validation, config.final_seconds * config.sample_rate)
    final = held_out_bits(load(out / "best"), recordings)
    for name, why in {**scored.skipped, **final.skipped}.items():
        skipped[name] = why
        say(f"skipped {name}: {why}")
    held_out = {"model": final.per_sample}
    held_out |= _baselines(config, corpus, recordings, model)
    record |= {
        "model": dataclasses.asdict(model.config),
        "history": [
            {"step": 0, "seconds": 0.0, "bits": before},
            {"step": 1, "seconds": round(seconds, 2), "bits": bits},
        ],
        "seconds": round(seconds, 2),
        "held_out": held_out,
        "skipped": skipped,
        "fit": _as_json(fitted),
    }
    replace_file(
        out / "train.json",
        lambda path: path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"),
    )
    return TrainResult(
        bits_before=before,
        bits_best=bits,
        bits_final=bits,
        held_out=held_out,
        steps=1,
        seconds=seconds,
        stopped_by="fit",
        best=out / "best",
        last=out / "last",
        skipped=skipped,
    )


def add_recordings(
    fitter: Fitter, recordings: Sequence[Recording], sample_rate: int
) -> Iterator[tuple[str, str]]:
    """Let a fitter see recordings, read block by block ahead of it; (name, reason) of each that cannot be read.

    If that is beyond its beginning, what came before counts.
    """
    broken: Recording | None = None
    current: Recording | None = None
    for recording, codes in _ahead(recordings, sample_rate, fitter.grid):
        if recording is broken:
            continue
        if recording is not current:
            if current is not None:
                fitter.end()
            fitter.begin()
            current = recording
        if isinstance(codes, Exception):
            broken = recording
            yield recording.name, reason(codes, recording)
        else:
            fitter.push(codes)
    if current is not None:
        fitter.end()


def _ahead(
    recordings: Iterable[Recording], sample_rate: int, grid: Grid
) -> Iterator[tuple[Recording, np.ndarray | Exception]]:
    """The codes of recordings in blocks, in order, a few of them read ahead; or why a block cannot be read."""
    small = np.uint8 if grid.classes <= 256 else np.uint16
    length = round(_SECONDS * sample_rate)

    def read(recording: Recording, start: int) -> np.ndarray | Exception:
        try:
            waveform = read_span(
                recording, sample_rate, start, min(start + length, recording.frames)
            )
            return grid.encode(torch.from_numpy(waveform)).numpy().astype(small)
        except (ValueError, OSError) as error:
            return error

    waiting: deque[tuple[Recording, Future[np.ndarray | Exception]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for recording in recordings:
                for start in range(0, recording.frames, length):
                    waiting.append((recording, pool.submit(read, recording, start)))
                    if len(waiting) > 2 * _THREADS:
                        first, codes = waiting.popleft()
                        yield first, codes.result()
            while waiting:
                first, codes = waiting.popleft()
                yield first, codes.result()
        finally:
            for _, codes in waiting:
                codes.cancel()


def _describe(fitted: Fitted, seconds: float, say: Any) -> None:
    config = fitted.model.config
    name = (
        f"ARI({config.order}, {config.differencing})"
        if config.differencing
        else f"AR({config.order})"
    )
    say(
        f"{name} of {fitted.samples:,} samples in {seconds:.1f} s, {config.law} law of scale"
        f" {fitted.model.scale().item():.3g} on {fitted.model.grid}"
    )
    if fitted.unstable:
        say(fitted.unstable)
    if fitted.criteria is not None and config.order == len(fitted.criteria) - 1:
        say(f"the criterion took the highest order tried, {config.order}: --order allows more")


def _baselines(
    config: TrainConfig, corpus: Corpus, recordings: Sequence[Recording], model: Linear
) -> dict[str, float]:
    layout, grid = layout_of(model, 1), model.grid
    counted = Counts.of(
        subset(corpus.train, config.baseline_seconds * config.sample_rate), layout, grid
    )
    return baselines(counted, Counts.of(recordings, layout, grid))


def _as_json(fitted: Fitted) -> dict[str, Any]:
    poles = fitted.model.poles()
    return {
        "samples": fitted.samples,
        "nats": fitted.nats,
        "criteria": None if fitted.criteria is None else fitted.criteria.tolist(),
        "largest_pole": float(np.abs(poles[0])) if len(poles) else 0.0,
        "unstable": fitted.unstable,
    }
