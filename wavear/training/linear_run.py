"""The run of a linear model: one pass over the recordings, and its scores."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear.audio.grid import Grid
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.data.corpus import Corpus, Recording, reason
from wavear.data.crops import read_span
from wavear.evaluation.held_out import held_out_bits, subset
from wavear.models.checkpoint import load
from wavear.models.fitting import Fitted, Fitter
from wavear.models.linear import Linear
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.processes import Processes
from wavear.training.run_directory import make_directory, write_record
from wavear.training.validation import final_scores

logger = get_logger(__name__)

_SECONDS = 30.0  # of a recording that are read at once
_THREADS = 2  # that read and encode ahead of the sums


def fit(
    config: TrainConfig,
    corpus: Corpus,
    speakers: Sequence[str],
    model: Any,
    record: dict[str, Any],
    whole: Path | None = None,
) -> TrainResult:
    """Fit a `Linear` with the configuration of `model`; the signature is that of `loop.fit`."""
    if Processes.here().world > 1:
        raise WavearError(
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
    unread = dict(add_recordings(fitter, corpus.train, config.sample_rate))
    fitted = fitter.fit(config.sample_rate, stabilise=config.stabilise)
    model, seconds = fitted.model, time.monotonic() - began
    _log(fitted, seconds)

    validation = subset(corpus.validation, config.validation_seconds * config.sample_rate)
    before = held_out_bits(Linear(model.config).eval(), validation).per_sample
    scored = held_out_bits(model, validation)
    bits = scored.per_sample
    make_directory(config)
    described = {"data": Path(config.data).name, "step": 1, "speakers": []}
    described |= {"validation_bits": round(bits, 5)}
    for name in ("best", "last"):
        model.save(out / name, overwrite=True, training=described)
    held_out, unscored = final_scores(config, corpus, load(out / "best"))
    unread |= scored.skipped | unscored
    for name, why in unread.items():
        logger.warning(f"skipped {name}: {why}")
    skipped = dict(corpus.bad) | unread
    poles = model.poles()
    record |= {
        "model": dataclasses.asdict(model.config),
        "history": [
            {"step": 0, "seconds": 0.0, "bits": before},
            {"step": 1, "seconds": round(seconds, 2), "bits": bits},
        ],
        "seconds": round(seconds, 2),
        "held_out": held_out,
        "skipped": skipped,
        "fit": {
            "samples": fitted.samples,
            "nats": fitted.nats,
            "criteria": None if fitted.criteria is None else fitted.criteria.tolist(),
            "largest_pole": float(np.abs(poles[0])) if len(poles) else 0.0,
            "unstable": fitted.unstable,
        },
    }
    write_record(config, record)
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
    """Add recordings to a fitter, read ahead in blocks; yield name and reason of unreadable ones.

    What comes before the unreadable part of a recording counts.
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
    """Yield the codes of recordings in blocks and in order, or an error; read some blocks ahead."""
    small = np.uint8 if grid.classes <= 256 else np.uint16
    length = round(_SECONDS * sample_rate)

    def read(recording: Recording, start: int) -> np.ndarray | Exception:
        stop = min(start + length, recording.frames)
        try:
            waveform = read_span(recording, sample_rate, start, stop)
            return grid.encode(torch.from_numpy(waveform)).numpy().astype(small)
        except (ValueError, OSError, MemoryError) as error:
            return error

    blocks = ((r, start) for r in recordings for start in range(0, r.frames, length))
    waiting: deque[tuple[Recording, Future[np.ndarray | Exception]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for recording, start in blocks:
                waiting.append((recording, pool.submit(read, recording, start)))
                if len(waiting) > 2 * _THREADS:
                    first, codes = waiting.popleft()
                    yield first, codes.result()
            for recording, codes in waiting:
                yield recording, codes.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _log(fitted: Fitted, seconds: float) -> None:
    config = fitted.model.config
    d = config.differencing
    name = f"ARI({config.order}, {d})" if d else f"AR({config.order})"
    logger.info(
        f"{name} of {fitted.samples:,} samples in {seconds:.1f} s, {config.law} law of scale"
        f" {fitted.model.scale().item():.3g} on {fitted.model.grid}"
    )
    if fitted.unstable:
        logger.warning(fitted.unstable)
    if fitted.criteria is not None and config.order == len(fitted.criteria) - 1:
        logger.info(f"the criterion chose the highest order, {config.order}: raise --order")
