"""How fast a network generates on this machine, its share of the machine's limit, and its error."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wavear.benchmark.card import card
from wavear.benchmark.card import limit as card_limit
from wavear.benchmark.ceiling import Ceiling, Config, cost
from wavear.benchmark.ceiling import measure as measure_ceiling
from wavear.benchmark.networks import config_of, described
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.machine import available_cores, machine
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import WEIGHTS, make_engine
from wavear.models.base import AutoregressiveModel
from wavear.models.families import FAMILIES
from wavear.models.linear import LinearConfig
from wavear.models.sampling import uniforms

logger = get_logger(__name__)

_CHUNK = 4096  # samples per call of the numba engine, as `wavear.generate` calls it
_REFERENCE_CHUNK = 64  # of the reference engine, which needs a thousandth of a second for each
_MOST = 2**22  # samples per call of an engine on a card: of 8192 streams 512 each
_DISTINCT = 1024  # streams whose conditioning is computed; more repeat it
_LENGTH = 16384  # samples of the mels, which are repeated
_SCORED_STREAMS, _SCORED = 4, 1024  # streams and samples whose log-probabilities are compared
_SHOWN = (0.25, 1, 1.5, 2, 2.5, 4, 64)  # MiB

PRECISIONS = {
    "numba": ("float32", "bfloat16", "int8"),
    "triton": ("float32", "bfloat16", "float16"),
    "cuda-graph": ("float32",),
    "reference": ("float32",),
}
ENGINES: dict[str, tuple[str, ...]] = {
    "cpu": ("numba", "reference"),
    "cuda": ("triton", "cuda-graph", "reference"),
}
BATCHES = {"cpu": (1, 24), "cuda": (1, 16, 128, 1024, 8192)}
"""Streams at once that are measured by default, by device."""


@dataclass(frozen=True)
class Measurement:
    """One engine, precision and batch, on one machine."""

    engine: str
    weights: str
    batch: int
    threads: int
    samples_per_second: float
    """Rate of all streams: the fastest of several runs, as other programs slow some down."""
    real_time: float
    """Seconds of audio per second, of all streams together."""
    share: float | None
    """Share of `limit`; None for an engine without a known limit."""
    error: float
    """Largest difference of a log-probability from `forward` in float64, in nats."""
    cost: float
    """Bits per sample lost against float64, on audio drawn from the model."""
    device: str = "cpu"


def limit(ceiling: Ceiling, config: Config, weights: str, batch: int, threads: int) -> float:
    """Return the samples per second that cores of this machine can reach with a batch.

    Each core runs its share of the streams; they share each read of the weights, and each has its
    own multiply-adds.
    """
    network = cost(config, weights)
    streams = -(-batch // threads)  # of the core that has most
    reading = 1 / network.seconds(ceiling.read_rate)
    return batch * min(reading, ceiling.multiply_adds / network.multiply_adds / streams)


def measure(
    model: AutoregressiveModel,
    engine: str = "numba",
    *,
    weights: str = "float32",
    batch: int = 1,
    threads: int = 1,
    seconds: float = 2.0,
    ceiling: Ceiling | None = None,
) -> Measurement:
    """Measure an engine as `wavear.generate` runs it: uniforms, conditioning and engine together.

    Parameters
    ----------
    model : WaveNet, GRU or Transformer
        Its error is measured on audio drawn from it: random weights make a law near the uniform
        one, trained weights a real one.
    engine, weights, threads
        See `wavear.generation.engines.make_engine`.
    batch : int
        Streams at once.
    seconds : float
        To measure for, and at least five calls of the engine.
    ceiling : Ceiling, optional
        Of this machine, for `share`.
    """
    with torch.inference_mode():
        calls = _calls(model, engine, weights, batch, threads)
        next(calls)  # compiled, and the caches warm
        best, began, runs = 0.0, time.perf_counter(), 0
        while runs < 5 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            made = next(calls)
            best = max(best, made / (time.perf_counter() - start))
            runs += 1
        error, lost = _compare(model, engine, weights, threads)
    share = None
    config: Any = model.config
    if engine == "numba" and ceiling is not None:
        share = best / limit(ceiling, config, weights, batch, threads)
    device = next(model.parameters()).device
    if device.type == "cuda" and engine == "triton":
        share = best / card_limit(card(device), config, weights, batch)
    rate = model.config.sample_rate
    return Measurement(
        engine, weights, batch, threads, best, best / rate, share, error, lost, device.type
    )


def _conditioner(model: AutoregressiveModel, batch: int) -> Conditioner:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    mels = None
    if config.mel is not None:
        mean, deviation = (
            model.conditioning.mel_mean[:, None].cpu(),
            model.conditioning.mel_deviation[:, None].cpu(),
        )  # type: ignore
        frames = -(-_LENGTH // config.mel.hop_length)
        mels = [
            mean + deviation * torch.randn(len(mean), frames, generator=generator)
            for _ in range(batch)
        ]
    return Conditioner(model, mels, [0] * batch if config.speakers else None)


def _calls(
    model: AutoregressiveModel, engine: str, weights: str, batch: int, threads: int
) -> Iterator[int]:
    """Yield the number of samples that each call of the engine made, without end."""
    _, runner = make_engine(model, batch, engine, weights=weights, threads=threads)
    conditioner = _conditioner(model, min(batch, _DISTINCT))
    chunk = _REFERENCE_CHUNK if engine == "reference" else max(16, min(_CHUNK, _MOST // batch))
    for turn in itertools.count():
        start = turn * chunk % (_LENGTH - chunk)
        draws = np.stack([uniforms(b, turn * chunk, chunk) for b in range(batch)])
        cond = conditioner.span(start, start + chunk)
        runner.generate(
            draws, cond if cond is None else cond[torch.arange(batch) % len(cond), :, :]
        )
        yield chunk * batch


def _compare(
    model: AutoregressiveModel, engine: str, weights: str, threads: int
) -> tuple[float, float]:
    """(largest difference of a log-probability, mean loss in bits) against `forward` in float64."""
    batch, samples = (1, _REFERENCE_CHUNK) if engine == "reference" else (_SCORED_STREAMS, _SCORED)
    cond = _conditioner(model, batch).span(0, samples)
    draws = np.stack([uniforms(b, 0, samples) for b in range(batch)])
    _, exact = make_engine(model, batch, engine, threads=threads)
    codes = exact.generate(draws, cond)
    _, scoring = make_engine(model, batch, engine, weights=weights, threads=threads)
    scores = scoring.score(codes, cond)
    given = torch.from_numpy(codes).to(next(model.parameters()).device)
    parameters = copy.deepcopy(model).double()(
        given, None if cond is None else cond.to(torch.float64)
    )
    expected = model.law.log_prob(parameters, given).cpu().numpy()
    return float(np.abs(scores - expected).max()), float((expected - scores).mean() / np.log(2))


@dataclass(frozen=True)
class Report:
    """The measurements of one network."""

    machine: str
    core: str
    """The measured rates of a core, or of a card; empty for a linear model."""
    network: str
    costs: list[str]
    """A line for each precision."""
    rows: list[Measurement]

    def __str__(self) -> str:
        lines = [self.machine, self.core, self.network, *self.costs]
        return "\n".join([*filter(None, lines), "", table(self.rows)])


def measure_all(
    model: AutoregressiveModel | None = None,
    *,
    shape: str | None = None,
    settings: dict[str, Any] | None = None,
    unconditional: bool = False,
    engines: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 2.0,
) -> Report:
    """Measure a network with each engine, precision and batch.

    Parameters
    ----------
    model : AutoregressiveModel, optional
        Otherwise one with random weights is made: of `shape`, a name in `networks.SHAPES`, or of
        `settings`.
    settings : dict, optional
        Fields of `WaveNetConfig`; mels of 80 bands are added unless `unconditional`.
    engines, weights, batches
        What to combine, by default what suits the device; the reference engine runs float32 and one
        stream only, the CUDA graph float32 only.
    device : str
        "cpu", or a CUDA device.
    threads : int, optional
        Cores; by default 1 for one stream and all for more.
    seconds : float
        To measure each for, at least.

    Returns
    -------
    Report

    Raises
    ------
    WavearError
        If a name or number cannot be measured.
    """
    kind = torch.device(device).type
    asked = (("engine", engines or (), ENGINES[kind]), ("weights", weights or (), WEIGHTS))
    for name, given, known in asked:
        if unknown := [value for value in given if value not in known]:
            raise WavearError(f"{name} is {unknown[0]!r}, expected {' or '.join(known)}")
    batches = batches or BATCHES[kind]
    if wrong := [n for n in (*batches, 1 if threads is None else threads) if n < 1]:
        raise WavearError(f"batches and threads are {wrong[0]}, expected 1 or more")
    if not 0 < seconds < 3600:
        raise WavearError(f"seconds is {seconds}, expected more than 0 and less than 3600")
    if model is None:
        config = config_of(shape, settings or {}, unconditional)
        model = next(cls for cls, own in FAMILIES.values() if type(config) is own)(config).eval()
    elif shape is not None:
        raise WavearError(
            f"shape is {shape!r}, and a checkpoint has a shape of its own: give one of them"
        )
    model = model.to(device)
    config = model.config
    linear = isinstance(config, LinearConfig)
    if not engines:  # None, or none named on the command line
        fastest = make_engine(model, 1)[0] in ("numba", "triton")
        engines = ENGINES[kind][:2] if fastest else ENGINES[kind][1:2]
    if not weights:
        weights = ("float32", "bfloat16", "float16" if kind == "cuda" else "int8")
        weights = weights[: 1 if linear else None]
        weights = [w for w in weights if any(w in PRECISIONS[engine] for engine in engines)]
    plan = [
        (engine, precision, batch)
        for engine, precision, batch in itertools.product(engines, weights, batches)
        if precision in PRECISIONS[engine][: 1 if linear else None]
        and (engine != "reference" or batch == 1)
    ]
    if lacking := [precision for precision in weights if precision not in {row[1] for row in plan}]:
        raise WavearError(
            f"there is nothing to measure with weights={lacking[0]!r}: {' and '.join(engines)} "
            "cannot have them here (or runs one stream only)"
        )
    ceiling, core = None, ""
    if kind == "cuda":
        core = str(card(torch.device(device)))
    elif not linear:  # it reads and multiplies next to nothing
        ceiling = measure_ceiling()
        rates = ", ".join(
            f"{ceiling.read_rate(size * 2**20) / 1e9:.0f} GB/s from {size:g} MiB" for size in _SHOWN
        )
        rate = ceiling.multiply_adds / 1e9
        core = f"one core: {rate:.0f} G multiply-adds/s in float32; reads {rates}"
    costs = []
    for precision in () if linear else weights:
        asked = cost(config, precision)
        costs.append(
            f"{precision}: {asked.multiply_adds:,} multiply-adds, {asked.hot_bytes:,} bytes read "
            f"per sample; {asked.weight_bytes:,} bytes of weights"
        )
    rows = []
    for engine, precision, batch in plan:
        logger.info("measuring %s, %s, %d streams", engine, precision, batch)
        cores = threads or (1 if batch == 1 or kind == "cuda" else available_cores())
        given: Any = {"weights": precision, "batch": batch, "threads": cores, "seconds": seconds}
        rows.append(measure(model, engine, **given, ceiling=ceiling))
    return Report(machine(), core, described(config), costs, rows)


def table(rows: Sequence[Measurement]) -> str:
    """Return measurements as a Markdown table."""
    lines = [
        "| engine | weights | streams | cores | samples/s | x real time | of the limit |"
        " error, nats | cost, bits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        share = "" if r.share is None else f"{100 * r.share:.0f} %"
        lines.append(
            f"| {r.engine} | {r.weights} | {r.batch} | {r.threads} | {r.samples_per_second:,.0f} "
            f"| {r.real_time:.2f} | {share} | {r.error:.1e} | {r.cost:+.5f} |"
        )
    return "\n".join(lines)
