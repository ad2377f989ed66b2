"""How fast a network generates on this machine, what share of the machine's limit that is, and how exact it is."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from wavear.common.machine import available_cores, machine
from wavear.generation.cpu.ceiling import Ceiling, Config, cost
from wavear.generation.cpu.ceiling import measure as measure_ceiling
from wavear.generation.cuda.card import card
from wavear.generation.cuda.card import limit as card_limit
from wavear.generation.cuda.choice import pick
from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import WEIGHTS, make_engine
from wavear.mel.spectrogram import MelConfig
from wavear.models.base import AutoregressiveModel
from wavear.models.families import FAMILIES
from wavear.models.gru import GRUConfig
from wavear.models.linear import LinearConfig
from wavear.models.predictive import PredictiveWaveNetConfig
from wavear.models.sampling import uniforms
from wavear.models.transformer import TransformerConfig
from wavear.models.wavenet import WaveNetConfig

_CHUNK = 2048  # samples per call of the numba engine, as `wavear.generate` calls it
_REFERENCE_CHUNK = 64  # of the reference engine, which takes a thousandth of a second for each
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
BATCHES = {"cpu": (1, 24), "cuda": (1, 16, 128, 1024, 8192)}
"""Streams at once that are measured by default, by device."""

_A = WaveNetConfig(layers=20, stacks=2, residual_channels=64, skip_channels=128, mel=MelConfig())

# The networks that the field publishes and measures; all of them here with 256 mu-law codes and 80
# mels.
SHAPES: dict[str, tuple[str, Config]] = {
    "predictive": (
        "the predictive WaveNet that wavear train makes",
        PredictiveWaveNetConfig(mel=MelConfig()),
    ),
    "nv-wavenet": (
        "the shape that nv-wavenet (2018) is measured with: 20 layers, 64 residual, 128 skip",
        _A,
    ),
    "nv-wavenet-free": ("the same without conditioning", replace(_A, mel=None)),
    "small": (
        "20 layers, 32 residual, 128 skip, no conditioning",
        replace(_A, residual_channels=32, mel=None),
    ),
    "r9y9": (
        "r9y9/wavenet_vocoder's usual vocoder: 24 layers, 4 stacks, kernel 3, 128 residual, 128 skip",
        replace(_A, layers=24, stacks=4, kernel_size=3, residual_channels=128),
    ),
    "wide": (
        "30 layers, 3 stacks, kernel 3, 128 residual, 128 skip",
        replace(_A, layers=30, stacks=3, kernel_size=3, residual_channels=128),
    ),
    "ibab": (
        "ibab/tensorflow-wavenet: 50 layers, 5 stacks, 32 residual, 512 skip, 16 kHz, no conditioning",
        replace(
            _A,
            layers=50,
            stacks=5,
            residual_channels=32,
            skip_channels=512,
            head_channels=512,
            sample_rate=16000,
            mel=None,
        ),
    ),
    "kan-bayashi": (
        "kan-bayashi/PytorchWaveNetVocoder: 30 layers, 3 stacks, 512 residual, 256 skip",
        replace(_A, layers=30, stacks=3, residual_channels=512, skip_channels=256),
    ),
    "gru": (
        "the GRU that the family makes by default: one layer of 352",
        GRUConfig(mel=MelConfig()),
    ),
    "gru-512": ("a GRU of 512 units", GRUConfig(channels=512, mel=MelConfig())),
    "wavernn": (
        "the size of WaveRNN (2018): one GRU of 896 units, without its two halves of 8 bits and its sparse weights",
        GRUConfig(channels=896, mel=MelConfig()),
    ),
    "transformer": (
        "the transformer that the family makes by default",
        TransformerConfig(mel=MelConfig()),
    ),
}


@dataclass(frozen=True)
class Measurement:
    """One engine, precision and batch, on one machine."""

    engine: str
    weights: str
    batch: int
    threads: int
    samples_per_second: float
    """Of all streams together: the fastest of several runs, so that what else the machine does counts least."""
    real_time: float
    """Seconds of audio per second, of all streams together."""
    share: float | None
    """Of what the machine's bandwidth and arithmetic allow (`limit`); None for an engine without a known limit."""
    error: float
    """Largest difference of a log-probability from `forward` in float64, teacher-forced, in nats."""
    cost: float
    """Bits per sample that the engine's law loses against float64, on audio drawn from the model."""
    device: str = "cpu"


def limit(ceiling: Ceiling, config: Config, weights: str, batch: int, threads: int) -> float:
    """Samples per second that cores of this machine can reach with a batch.

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
    """Generate for a while, with random mels, as `wavear.generate` does: uniforms, conditioning and engine together.

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
    """Samples made by each call of the engine, without end."""
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


def run(
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
    say: Callable[[str], None] = print,
) -> list[Measurement]:
    """Measure a network with each engine, precision and batch, and say what came out.

    Parameters
    ----------
    model : WaveNet, GRU or Transformer, optional
        Otherwise one with random weights is made: of `shape`, a name in `SHAPES`, or of `settings`.
    settings : dict, optional
        Fields of `WaveNetConfig`; mels of 80 bands are added unless `unconditional`.
    engines, weights, batches
        What to combine, by default what the device is for; the reference engine runs float32 and
        one stream only, the CUDA graph float32 only.
    device : str
        "cpu", or a CUDA device.
    threads : int, optional
        Cores; by default 1 for one stream and all for more.
    seconds : float
        To measure each for, at least.

    Returns
    -------
    list of Measurement

    Raises
    ------
    ValueError
        If a name or number is not one that can be measured.
    """
    kind = torch.device(device).type
    of_device = ("triton", "cuda-graph", "reference") if kind == "cuda" else ("numba", "reference")
    batches = batches or BATCHES[kind]
    for name, given, known in (("engine", engines, of_device), ("weights", weights, WEIGHTS)):
        if unknown := [value for value in given or () if value not in known]:
            raise ValueError(f"{name} is {unknown[0]!r}, expected {' or '.join(known)}")
    if wrong := [
        value for value in (*batches, *([] if threads is None else [threads])) if value < 1
    ]:
        raise ValueError(f"batches and threads are {wrong[0]}, expected 1 or more")
    if not 0 < seconds < 3600:
        raise ValueError(f"seconds is {seconds}, expected more than 0 and less than 3600")
    if model is None:
        config = _config(shape, settings or {}, unconditional)
        model = next(cls for cls, own in FAMILIES.values() if type(config) is own)(config).eval()
    elif shape is not None:
        raise ValueError(
            f"shape is {shape!r}, and a checkpoint has a shape of its own: give one of them"
        )
    model = model.to(device)
    config = model.config
    linear = isinstance(config, LinearConfig)
    if not engines:  # None, or none named on the command line
        fastest = kind == "cpu" or pick(model, torch.device(device)) == "triton"
        engines = of_device[:2] if fastest else of_device[1:2]
    if not weights:
        weights = (
            ("float32",)
            if linear
            else ("float32", "bfloat16", "float16" if kind == "cuda" else "int8")
        )
    plan = [
        (engine, precision, batch)
        for engine, precision, batch in itertools.product(engines, weights, batches)
        if precision in PRECISIONS[engine][: 1 if linear else None]
        and (engine != "reference" or batch == 1)
    ]
    if lacking := [precision for precision in weights if precision not in {row[1] for row in plan}]:
        raise ValueError(
            f"there is nothing to measure with weights={lacking[0]!r}: {' and '.join(engines)} cannot have them here"
            " (or runs one stream only)"
        )
    say(machine())
    ceiling = None
    if kind == "cuda":
        say(str(card(torch.device(device))))
    elif not linear:  # it reads and multiplies next to nothing
        ceiling = measure_ceiling()
        rates = ", ".join(
            f"{ceiling.read_rate(size * 2**20) / 1e9:.0f} GB/s from {size:g} MiB" for size in _SHOWN
        )
        say(
            f"one core: {ceiling.multiply_adds / 1e9:.0f} G multiply-adds/s in float32; reads {rates}"
        )
    mel = (
        "no mel" if config.mel is None else f"{config.mel.bands} mels, hop {config.mel.hop_length}"
    )
    head = "" if linear else f"{config.head_channels} head, "
    say(f"{_layers(config)}, {head}{config.classes} classes, {mel}, {config.sample_rate} Hz")
    for precision in () if linear else weights:
        asked = cost(config, precision)
        say(
            f"{precision}: {asked.multiply_adds:,} multiply-adds per sample, {asked.weight_bytes:,} bytes of weights, "
            f"of which {asked.hot_bytes:,} are read for every sample"
        )
    rows = []
    for engine, precision, batch in plan:
        cores = threads or (1 if batch == 1 or kind == "cuda" else available_cores())
        rows.append(
            measure(
                model,
                engine,
                weights=precision,
                batch=batch,
                threads=cores,
                seconds=seconds,
                ceiling=ceiling,
            )
        )
    say("")
    say(table(rows))
    return rows


def _layers(config: Config) -> str:
    if isinstance(config, LinearConfig):
        return f"linear, order {config.order}, differencing {config.differencing}"
    if isinstance(config, TransformerConfig):
        return (
            f"transformer, {config.layers} layers of {config.channels}, {config.heads} heads, window {config.window}, "
            f"patch {config.patch}"
        )
    if isinstance(config, GRUConfig):
        return f"GRU, {config.layers} x {config.channels} units"
    if isinstance(config, PredictiveWaveNetConfig):
        return (
            f"{config.layers} layers and {config.period_layers} of the period, kernel {config.kernel_size}, "
            f"{config.residual_channels} residual, {config.skip_channels} skip, prediction of order "
            f"{config.prediction_order}"
        )
    return (
        f"{config.layers} layers, {config.stacks} stacks, kernel {config.kernel_size}, "
        f"{config.residual_channels} residual, {config.skip_channels} skip"
    )


def _config(shape: str | None, settings: dict[str, Any], unconditional: bool) -> Config:
    if shape is not None:
        if shape not in SHAPES:
            raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
        config = SHAPES[shape][1]
        return replace(config, mel=None) if unconditional else config
    config = replace(WaveNetConfig(), **settings)
    rate = config.sample_rate
    mel = MelConfig(sample_rate=rate, fmax=min(8000.0, rate / 2))
    return config if unconditional else replace(config, mel=mel)


def table(rows: Sequence[Measurement]) -> str:
    """Measurements as a Markdown table."""
    lines = [
        "| engine | weights | streams | cores | samples/s | x real time | of the limit | error, nats | cost, bits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        share = "" if r.share is None else f"{100 * r.share:.0f} %"
        lines.append(
            f"| {r.engine} | {r.weights} | {r.batch} | {r.threads} | {r.samples_per_second:,.0f} | {r.real_time:.2f} "
            f"| {share} | {r.error:.1e} | {r.cost:+.5f} |"
        )
    return "\n".join(lines)
