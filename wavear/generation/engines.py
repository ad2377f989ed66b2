"""Generation and scoring: validates, prepares the conditioning, picks an engine, and runs it in chunks.

    generate: mel -> conditioning -> engine(uniforms, conditioning) -> codes -> waveform
    score:    waveform -> codes -> engine or forward -> log-probability of every sample

Streams are independent: what one of them becomes depends on the model, its mel, its speaker and its
seed, not on the batch it rides in, and not on the chunks it is made in.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wavear.audio.emphasis import coefficient, emphasised
from wavear.audio.grid import COMMON_GRIDS, Grid
from wavear.generation.conditioner import Conditioner
from wavear.generation.cuda import choice
from wavear.generation.priming import check_prime, deemphasis_after, doubts, encode_prime, fill
from wavear.generation.reference import ReferenceEngine
from wavear.models.base import AutoregressiveModel
from wavear.models.distributions import log_prob_on
from wavear.models.sampling import uniforms

ENGINES = ("auto", "reference", "numba", "cuda-graph", "triton")
WEIGHTS = ("float32", "bfloat16", "int8", "float16")
COLDEST = (
    1e-6  # the least temperature: every engine can divide by it and by what it makes of the logits
)
_CHUNK = 2048  # samples per call of an engine: a fraction of a second, so that Ctrl-C and the progress bar are prompt
_FEWER = (
    3 / 4
)  # of an engine's streams are left when those that have ended leave it, where it can (`keep`)
_PARALLEL_CHUNK = (
    16384  # samples per forward of `score`, besides the receptive field in front of them
)

_ARGMAX = (
    "the likeliest code is taken always: audio made so collapses to silence or to a tone; a temperature of 0.8"
    " or a top_p of 0.9 is cleaner than 1 and stays alive"
)

Mel = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]


class Engine(Protocol):
    """Runs `batch` streams of a model; each call continues where the last one ended."""

    def generate(
        self,
        uniforms: np.ndarray,
        cond: Tensor | None,
        temperature: float | np.ndarray = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        log_probability: np.ndarray | None = None,
    ) -> np.ndarray:
        """The next samples of every stream.

        Parameters
        ----------
        uniforms : ndarray of float64 in [0, 1), shape (B, n)
        cond : Tensor, shape (B, C, n) or (B, C, 1), or None
        temperature : float, or ndarray of shape (B, n)
        top_k, top_p : optional
            See `wavear.models.sampling`; for a categorical law.
        log_probability : ndarray of float64, shape (B, n), optional
            Filled with that of each code, in nats, by the model's own law: without temperature and
            truncation.

        Returns
        -------
        ndarray of int64, shape (B, n): codes

        Raises
        ------
        ValueError
            If a shape does not fit, or the network's values become infinite or NaN.
        """
        ...

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """Log-probabilities (B, n), in nats, of codes (B, n)."""
        ...

    def state(self, stream: int) -> dict[str, Tensor]:
        """What one stream needs to go on, on any engine: tensors on the CPU, copies.

        `previous` (1,), the code of the sample before, and the model's `export_state`, without the
        axis of the batch.
        """
        ...

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """Go on with one stream where `state` of any engine was taken."""
        ...

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """Move one stream past codes (n,), conditioning (1, C, n), (1, C, 1) or None, in parallel; as `score` does."""
        ...

    def resized(self, batch: int) -> Engine:
        """An engine like this one for `batch` streams before their first sample, which shares its packed weights."""
        ...


def make_engine(
    model: AutoregressiveModel,
    batch: int,
    engine: str = "auto",
    *,
    weights: str = "float32",
    threads: int | None = None,
) -> tuple[str, Engine]:
    """The name and the instance of the engine that will run `batch` streams of `model`.

    Parameters
    ----------
    engine : str
        "reference": the plain loop over `model.step`, any model, any device; slow, and the
        definition of correct. "numba": compiled for this CPU, for the families and laws that have a
        kernel. "triton": one kernel on a CUDA device, for a WaveNet of mu-law codes. "cuda-graph":
        steps of any model on a CUDA device, captured once. "auto": numba on the CPU where it serves
        the model, on CUDA triton where it does, else cuda-graph; else reference.
    weights : str
        "float32"; "bfloat16" (numba, triton) or "float16" (triton): rounded once, half the bytes to
        read; "int8" (numba): rounded to 255 steps for each output of a matrix, a quarter of the
        bytes. All but the first cost some likelihood: `wavear bench CHECKPOINT` measures how much.
    threads : int, optional
        CPU cores the numba engine may use; all of them by default.

    Raises
    ------
    ValueError
        If there is no such engine, or it cannot serve the model; the message says which can.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, it must be one of {', '.join(ENGINES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, it must be one of {', '.join(WEIGHTS)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, it must be at least 1")
    if engine == "auto":
        device = next(model.parameters()).device
        if device.type == "cuda":
            engine = choice.pick(model, device)
        else:
            serves = device.type == "cpu" and _compiled_engine(model) is not None
            engine = "numba" if serves else "reference"
    if engine in choice.ENGINES:
        return engine, choice.make(model, batch, engine, weights)
    if engine == "reference":
        if weights != "float32":
            raise ValueError(
                f"the reference engine runs the model as it is: weights={weights!r} needs engine {_rounding(weights)}"
            )
        return engine, ReferenceEngine(model, batch)
    compiled = _compiled_engine(model)
    if compiled is None:
        raise ValueError(
            f"engine 'numba' has no kernel for {type(model).__name__}: use engine 'reference'"
        )
    if weights == "float16":
        raise ValueError(
            f"engine 'numba' has no weights={weights!r}: it needs engine {_rounding(weights)}"
        )
    return engine, compiled(model, batch, weights=weights, threads=threads)


def _compiled_engine(model: AutoregressiveModel) -> Any | None:
    """The class of the compiled engine that serves a model, if there is one."""
    from wavear.models.gru import GRU
    from wavear.models.linear import Linear
    from wavear.models.predictive import PredictiveWaveNet
    from wavear.models.transformer import Transformer
    from wavear.models.wavenet import WaveNet

    if isinstance(model, WaveNet):
        from wavear.generation.cpu.wavenet import NumbaEngine

        return NumbaEngine
    if isinstance(model, PredictiveWaveNet):
        from wavear.generation.cpu.predictive import NumbaPredictiveEngine

        return NumbaPredictiveEngine
    if isinstance(model, GRU):
        from wavear.generation.cpu.gru import NumbaGRUEngine

        return NumbaGRUEngine
    if isinstance(model, Transformer):
        from wavear.generation.cpu.transformer import NumbaTransformer

        return NumbaTransformer
    if isinstance(model, Linear):
        from wavear.generation.cpu.linear import NumbaLinearEngine

        return NumbaLinearEngine
    return None


def name_of_engine(engine: str, weights: str) -> str:
    """For people: weights that were rounded are never silent.

    Examples
    --------
    >>> name_of_engine("numba", "int8")
    'numba with int8 weights'
    """
    return engine if weights == "float32" else f"{engine} with {weights} weights"


def _rounding(weights: str) -> str:
    """The engines that have such weights."""
    return {"bfloat16": "'numba' or 'triton'", "int8": "'numba'", "float16": "'triton'"}[weights]


def generate(
    model: AutoregressiveModel,
    mel: Mel | None = None,
    *,
    samples: int | None = None,
    speaker: int | Sequence[int] | Tensor | None = None,
    seed: int | Sequence[int] = 0,
    temperature: float | Tensor | np.ndarray = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    argmax: bool = False,
    best_of: int = 1,
    return_log_probability: bool = False,
    engine: str = "auto",
    weights: str = "float32",
    threads: int | None = None,
    progress: bool = False,
    prime: Tensor | np.ndarray | None = None,
    include_prime: bool = False,
) -> Any:
    """New audio, sample by sample.

    Parameters
    ----------
    model : AutoregressiveModel
    mel : Tensor or array, shape (B, M, F) or (M, F); or a sequence of (M, F_i) of different lengths
        Log-mels as `model.config.mel` defines them (`wavear.log_mel`); None for a model without mel
        conditioning.
    samples : int, optional
        Samples T of each utterance. With a mel at most, and by default, F * hop; without one it is
        required. A prime is not counted: see there.
    speaker : int, or one per utterance
        For a model with speakers, 0 to speakers - 1.
    seed : int, or one per utterance; 0 to 2**64 - 1
        An utterance is a function of its own seed: with one number, each utterance becomes what it
        would alone.
    temperature : float, or one per sample, shape (T,) or (B, T)
        Divides the logits. 1 samples from the model as trained; below 1 is duller and cleaner,
        above 1 noisier.
    top_k : int, optional
        Draw among the k likeliest codes alone. 1 is the argmax.
    top_p : float, optional
        Draw among the smallest set of likeliest codes that has this share of the probability (of
        what `top_k` leaves), above 0 and at most 1.
    argmax : bool
        Take the likeliest code always. It warns: audio made so collapses to silence or to a tone,
        because the likeliest next sample is nearly always the quietest; the noise in a sound is
        never likeliest.
    best_of : int
        Make so many candidates of each utterance and keep the one of the highest log-probability.
        Candidate i of seed s has the seed `candidate_seeds(s, best_of)[i]`, the first s itself.
    return_log_probability : bool
        Return the log-probability of every sample as well.
    engine, weights, threads
        See `make_engine`. Every engine makes the same audio from the same seed.
    progress : bool
        Show a bar with the real-time factor (seconds of audio per second).
    prime : Tensor or array, shape (P,) or (B, P), floating point in [-1, 1], at the model's sample
    rate, optional
        A recording to go on from; one for all utterances, or one for each. It takes the first P
        samples of the utterance: a mel covers the prime and what follows, so that F * hop is at
        least P + T, and what is made is samples P to P + T, from the uniforms of these. So a
        recording that was made with a seed goes on as it would have. A prime that is silent or
        clipped is warned of.
    include_prime : bool
        Return the prime, as it was given, in front of what follows: (B, P + T).

    Returns
    -------
    Tensor, shape (B, T), float32 in [-1, 1], on the CPU
        From mels of different lengths each row ends in zeros.
    Tensor, shape (B, T), float64, if `return_log_probability`
        log P(x_t | x_<t, c) in nats by the model's own law, whatever temperature and truncation the
        sample was drawn with: what `score` gives for these codes. 0 beyond the end of a shorter
        row. Of a prime there is none.

    Raises
    ------
    ValueError
        If an argument does not fit the model or is out of range; the message names it.

    Examples
    --------
    >>> from wavear import WaveNet, WaveNetConfig
    >>> model = WaveNet(WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4))
    >>> generate(model, samples=100, seed=[1, 2], engine="reference").shape
    torch.Size([2, 100])
    """
    top_k, top_p = _check_truncation(model, top_k, top_p, argmax)
    seeds = _check_seeds(seed)
    if not isinstance(best_of, int | np.integer) or isinstance(best_of, bool) or best_of < 1:
        raise ValueError(f"best_of is {best_of!r}, it must be a whole number of at least 1")
    if best_of > 1 and top_k == 1:
        raise ValueError(f"best_of is {best_of}, and there is one argmax: leave one of them away")
    past = torch.empty(1, 0) if prime is None else check_prime(prime)
    counts = {"utterances": len(seeds), "primes": len(past)}
    conditioner, batch = _prepare(
        model, mel, speaker, {name: n for name, n in counts.items() if n > 1}
    )
    seeds = seeds * batch if len(seeds) == 1 else seeds
    past = past.expand(batch, -1)
    begin = past.shape[1]
    for doubt in doubts(past[:1] if past.stride(0) == 0 else past) if begin else []:
        warnings.warn(doubt, stacklevel=2)
    lengths = _check_samples(conditioner.lengths, samples, batch, begin)
    total = max(lengths)
    temperatures = _check_temperature(temperature, batch, total)
    if top_k == 1:
        warnings.warn(_ARGMAX, stacklevel=2)
    if best_of > 1:
        # The candidates of an utterance are further streams, side by side.
        conditioner.repeat(int(best_of))
        past = past.repeat_interleave(best_of, dim=0)
        seeds = [candidate for s in seeds for candidate in candidate_seeds(s, best_of)]
        lengths = [length for length in lengths for _ in range(best_of)]
        batch *= best_of
        if isinstance(temperatures, np.ndarray):
            temperatures = np.repeat(temperatures, best_of, axis=0)
    codes = np.zeros((batch, total), dtype=np.int64)
    scores = np.empty((batch, total)) if return_log_probability or best_of > 1 else None
    truncation: dict[str, Any] = {"top_k": top_k, "top_p": top_p}
    with torch.inference_mode():
        name, runner = make_engine(model, batch, engine, weights=weights, threads=threads)
        for b, row in enumerate(encode_prime(past, model) if begin else []):
            # Without conditioning there are fewer of them than streams, all alike.
            fill(runner, b, model, row, conditioner.utterances[b % len(conditioner.utterances)])
        seats = np.arange(batch)  # the streams that the engine runs
        for start, stop in _chunks(total, progress, model.config.sample_rate, batch, name):
            staying = np.flatnonzero(np.asarray(lengths)[seats] > start)
            if hasattr(runner, "keep") and len(staying) <= _FEWER * len(seats):
                runner, seats = runner.keep(staying.tolist()), seats[staying]  # type: ignore[attr-defined]
                conditioner.keep(staying.tolist())
            draws = np.stack([uniforms(seeds[b], begin + start, stop - start) for b in seats])
            scale = (
                temperatures[seats, start:stop]
                if isinstance(temperatures, np.ndarray)
                else temperatures
            )
            part = None if scores is None else np.empty(draws.shape)
            codes[seats, start:stop] = runner.generate(
                draws,
                conditioner.span(begin + start, begin + stop),
                scale,
                log_probability=part,
                **truncation,
            )
            if scores is not None:
                scores[seats, start:stop] = part
    waveform = model.grid.decode(torch.from_numpy(codes))
    for b, length in enumerate(lengths):
        waveform[b] = deemphasis_after(past[b], model)(waveform[b])
        waveform[b, length:] = 0
        if scores is not None:
            scores[b, length:] = 0
    if best_of > 1:
        assert scores is not None
        totals = scores.sum(axis=1).reshape(-1, best_of)
        best = torch.from_numpy(totals.argmax(axis=1) + np.arange(len(totals)) * best_of)
        past, waveform, scores = past[best], waveform[best], scores[best.numpy()]
    waveform = torch.cat([past, waveform], dim=1) if include_prime else waveform
    return (waveform, torch.from_numpy(scores)) if return_log_probability else waveform


def candidate_seeds(seed: int, best_of: int) -> list[int]:
    """The seeds of the candidates of one utterance: the first is its own, the others lie far from it and each other.

    Examples
    --------
    >>> candidate_seeds(7, 2)
    [7, 11400714819323198492]
    """
    return [(seed + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(best_of)]


def score(
    model: AutoregressiveModel,
    waveform: Tensor | np.ndarray,
    mel: Mel | None = None,
    *,
    speaker: int | Sequence[int] | Tensor | None = None,
    grid: str | None = None,
    engine: str = "parallel",
    weights: str = "float32",
    threads: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Log-probability of every sample of a recording: log P(x_t | x_<t, c), nothing left out.

    Parameters ---------- model : AutoregressiveModel waveform : Tensor or array, shape (B, T) or
    (T,), floating point in [-1, 1], at the model's sample rate mel : as in `generate`; with a model
    that needs one and None given, the waveform's own mel is taken speaker : as in `generate` grid :
    str, optional
        What the probabilities are of, so that models of different codes compare: "linear", 16-bit
        samples, or "mulaw", 256 mu-law codes (see `log_prob_on`); None: the model's own codes.
        Needs engine "parallel".
    engine : str
        "parallel": `model.forward` over long chunks, in memory that does not grow with T. Others:
        by stepping, as in generation.
    weights, threads
        See `make_engine`.

    Returns ------- Tensor, shape (B, T), float64, in nats; the negative of its mean over log(2) is
    the bits per sample

    Raises
    ------
    ValueError
        If an argument does not fit the model.
    """
    if isinstance(waveform, np.ndarray):
        waveform = torch.from_numpy(waveform)
    waveform = waveform[None] if waveform.dim() == 1 else waveform
    if waveform.dim() != 2 or waveform.shape[1] == 0:
        raise ValueError(
            f"waveform has shape {tuple(waveform.shape)}, expected (B, T) or (T,) with T above 0"
        )
    if not waveform.is_floating_point():
        raise ValueError(f"waveform is {waveform.dtype}, expected floating point in [-1, 1]")
    batch, total = waveform.shape
    if model.config.mel is not None and mel is None:
        mel = _own_mel(waveform, model.config.mel)
    conditioner, _ = _prepare(model, mel, speaker, {"utterances": batch})
    if conditioner.lengths is not None and min(conditioner.lengths) < total:
        raise ValueError(
            f"the mel covers {min(conditioner.lengths)} samples and the waveform has {total}"
        )
    on = _common_grid(model, grid, engine)
    codes = model.grid.encode(emphasised(waveform.cpu(), coefficient(model.config)))
    with torch.inference_mode():
        if engine == "parallel":
            if weights != "float32":
                raise ValueError(
                    f"engine 'parallel' runs the model as it is: weights={weights!r} needs engine {_rounding(weights)}"
                )
            return score_parallel(model, codes, conditioner, progress, grids=[on])[0]
        name, runner = make_engine(model, batch, engine, weights=weights, threads=threads)
        scores = np.empty((batch, total))
        for start, stop in _chunks(total, progress, model.config.sample_rate, batch, name):
            scores[:, start:stop] = runner.score(
                codes[:, start:stop].numpy(), conditioner.span(start, stop)
            )
    return torch.from_numpy(scores)


@torch.inference_mode()
def score_parallel(
    model: AutoregressiveModel,
    codes: Tensor,
    conditioner: Conditioner,
    progress: bool = False,
    first: int = 0,
    state: Any = None,
    grids: Sequence[Grid] | None = None,
) -> Tensor:
    """`score` by `forward`, in chunks: with the receptive field before them, or from the state of the one before.

    Parameters
    ----------
    codes : Tensor of int64, shape (B, T)
    first : int
        The scores are those of codes[:, first:]; the ones before are their past.
    state : optional
        Of a model that carries one: where it is at `first`. It goes along, and is then where it is
        at T.
    grids : sequence of Grid, optional
        Return the log-probabilities on each of them, (len(grids), B, T - first).
    """
    device = next(model.parameters()).device
    batch, total = codes.shape
    carries = model.carries
    if carries and state is None:
        state = model.init_state(batch)
    previous = (
        codes[:, first - 1].to(device)
        if first
        else torch.full((batch,), model.start_code, device=device)
    )
    on = [model.grid] if grids is None else grids
    scores = torch.empty(len(on), batch, total - first, dtype=torch.float64)
    for a, b in _chunks(
        total - first, progress, model.config.sample_rate, batch, "parallel", _PARALLEL_CHUNK
    ):
        start, stop = first + a, first + b
        context = 0 if carries else min(start, model.receptive_field or 0)
        span = codes[:, start - context : stop].to(device)
        given = conditioner.span(start - context, stop)
        parameters = model(span, given, state, previous) if carries else model(span, given)
        previous = span[:, -1]
        numbers, span = parameters[:, :, context:].double(), span[:, context:]
        for row, grid in zip(scores, on, strict=True):
            row[:, a:b] = log_prob_on(model.law, numbers, span, grid).cpu()
    return scores[0] if grids is None else scores


def _common_grid(model: AutoregressiveModel, name: str | None, engine: str) -> Grid:
    """The grid that `score` names, or the model's own."""
    if name is None:
        return model.grid
    if name not in COMMON_GRIDS:
        raise ValueError(
            f"grid is {name!r}, it must be {' or '.join(COMMON_GRIDS)}, or None for the model's own codes"
        )
    if engine != "parallel":
        raise ValueError(
            f"engine {engine!r} scores the model's own codes: grid={name!r} needs engine 'parallel'"
        )
    if emphasis := coefficient(model.config):
        raise ValueError(
            f"the codes are of pre-emphasised audio ({emphasis:g}): they have no bits on another grid"
        )
    return COMMON_GRIDS[name]


def _own_mel(waveform: Tensor, config: Any) -> Tensor:
    """The mel of `waveform`, whose end is padded with zeros to whole frames."""
    from wavear.mel.spectrogram import log_mel

    missing = -waveform.shape[1] % config.hop_length
    return log_mel(torch.nn.functional.pad(waveform.float(), (0, missing)), config)


def _chunks(total: int, progress: bool, rate: int, batch: int, name: str, length: int = _CHUNK):
    """(start, stop) of each chunk, under a progress bar if one is asked for."""
    spans = [(start, min(start + length, total)) for start in range(0, total, length)]
    if not progress:
        yield from spans
        return
    from tqdm import tqdm

    began = time.perf_counter()
    with tqdm(
        total=total * batch, unit=" samples", unit_scale=True, desc=name, dynamic_ncols=True
    ) as bar:
        for start, stop in spans:
            yield start, stop
            bar.update((stop - start) * batch)
            bar.set_postfix_str(
                f"{stop * batch / rate / (time.perf_counter() - began):.2f} x real time"
            )


def _check_seeds(seed: int | Sequence[int]) -> list[int]:
    seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    for value in seeds:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | np.integer)
            or not 0 <= value < 2**64
        ):
            raise ValueError(f"seed is {value!r}, it must be a whole number from 0 to 2**64 - 1")
    if not seeds:
        raise ValueError("seed is empty: give one number, or one per utterance")
    return [int(value) for value in seeds]


def _check_truncation(
    model: AutoregressiveModel, top_k: int | None, top_p: float | None, argmax: bool
) -> tuple[int | None, float | None]:
    if not model.law.truncates and (top_k is not None or top_p is not None or argmax):
        raise ValueError(
            f"top_k, top_p and argmax choose among the codes of a categorical law, and this model's law is"
            f" {model.config.law}: use temperature"
        )
    if top_k is not None and (
        isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1
    ):
        raise ValueError(f"top_k is {top_k!r}, it must be a whole number of at least 1")
    if top_p is not None and (isinstance(top_p, bool | str) or not 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p!r}, it must be above 0 and at most 1")
    if not argmax:
        return None if top_k is None else int(top_k), None if top_p is None else float(top_p)
    if top_k is not None or top_p is not None:
        raise ValueError("argmax takes the likeliest code: leave top_k and top_p away")
    return 1, None


def _check_samples(
    lengths: list[int] | None, samples: int | None, batch: int, begin: int = 0
) -> list[int]:
    """Samples to make of each utterance, after the `begin` samples of a prime."""
    if samples is not None and (
        isinstance(samples, bool) or not isinstance(samples, int | np.integer) or samples < 1
    ):
        raise ValueError(f"samples is {samples!r}, it must be a whole number of at least 1")
    if lengths is None:
        if samples is None:
            raise ValueError("samples is needed where no mel says how long the audio is")
        return [int(samples)] * batch
    if begin >= min(lengths):
        raise ValueError(
            f"the mel covers {min(lengths)} samples and the prime has {begin}: it must cover the prime and what follows"
        )
    if samples is None:
        return [length - begin for length in lengths]
    if begin + samples > min(lengths) and begin:
        raise ValueError(
            f"samples is {samples} after a prime of {begin}, and the mel covers {min(lengths)}: it must cover both"
        )
    if samples > min(lengths):
        raise ValueError(
            f"samples is {samples}, and the mel covers {min(lengths)}: give more frames, or ask for less"
        )
    return [int(samples)] * batch


def _check_temperature(
    temperature: float | Tensor | np.ndarray, batch: int, total: int
) -> float | np.ndarray:
    given = (
        temperature.detach().cpu().double().numpy()
        if isinstance(temperature, Tensor)
        else temperature
    )
    values = np.asarray(given).astype(np.float64)
    if not ((values >= COLDEST).all() and (values <= 1 / COLDEST).all()):
        raise ValueError(
            f"temperature is {temperature!r}, it must be {COLDEST:g} to {1 / COLDEST:g}"
        )
    if values.ndim == 0:
        return float(values)
    if values.shape not in ((total,), (batch, total), (batch, 1)):
        raise ValueError(
            f"temperature has shape {values.shape}, expected one number, ({total},) or ({batch}, {total})"
        )
    return np.ascontiguousarray(np.broadcast_to(values, (batch, total)))


def _prepare(
    model: AutoregressiveModel,
    mel: Mel | None,
    speaker: int | Sequence[int] | Tensor | None,
    given: dict[str, int],
) -> tuple[Conditioner, int]:
    """Checks mel and speaker against the model and other numbers of utterances; the conditioner and the number."""
    config = model.config
    mels = _check_mel(mel, config.mel)
    speakers = _check_speaker(speaker, config.speakers)
    counts = {
        "mels": len(mels) if mels is not None else None,
        "speakers": len(speakers) if speakers is not None and len(speakers) > 1 else None,
        **given,
    }
    known = {name: count for name, count in counts.items() if count is not None}
    if len(set(known.values())) > 1:
        raise ValueError(
            "the numbers do not agree: "
            + ", ".join(f"{count} {name}" for name, count in known.items())
        )
    number = next(iter(known.values()), 1)
    if speakers is not None and len(speakers) == 1:
        speakers = speakers * number
    return Conditioner(model, mels, speakers), number


def _check_mel(mel: Mel | None, config: Any) -> list[Tensor] | None:
    if config is None:
        if mel is not None:
            raise ValueError("the model takes no mel: it was trained without mel conditioning")
        return None
    if mel is None:
        raise ValueError(
            f"the model needs a mel: {config.bands} bands, one frame per {config.hop_length} samples"
        )
    if isinstance(mel, Tensor | np.ndarray):
        mel = [mel] if mel.ndim == 2 else list(mel) if mel.ndim == 3 else [mel]
    mels = [torch.as_tensor(m) for m in mel]
    if not mels:
        raise ValueError("there is no mel: the batch is empty")
    for m in mels:
        if m.dim() != 2:
            raise ValueError(f"mel has shape {tuple(m.shape)}, expected (B, M, F) or (M, F)")
        if m.shape[0] != config.bands:
            transposed = "; it seems transposed, frames first" if m.shape[1] == config.bands else ""
            raise ValueError(
                f"mel has {m.shape[0]} bands, the model was trained on {config.bands}{transposed}"
            )
        if m.shape[1] == 0:
            raise ValueError("mel has no frames")
        if not m.is_floating_point() or not torch.isfinite(m).all():
            raise ValueError(
                "mel holds NaN or infinity"
                if m.is_floating_point()
                else f"mel is {m.dtype}, not float"
            )
    return mels


def _check_speaker(speaker: int | Sequence[int] | Tensor | None, speakers: int) -> list[int] | None:
    if speakers == 0:
        if speaker is not None:
            raise ValueError(f"speaker is {speaker}, and the model was trained without speakers")
        return None
    if speaker is None:
        raise ValueError(f"the model needs a speaker, 0 to {speakers - 1}")
    try:
        values = torch.as_tensor(speaker)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"speaker is {speaker!r}, expected a whole number, or one per utterance"
        ) from None
    if (
        values.dtype.is_floating_point
        or values.dtype == torch.bool
        or values.dim() > 1
        or values.numel() == 0
    ):
        raise ValueError(f"speaker is {speaker!r}, expected a whole number, or one per utterance")
    numbers = [int(value) for value in values.reshape(-1)]
    for number in numbers:
        if not 0 <= number < speakers:
            raise ValueError(f"speaker is {number}, the model knows 0 to {speakers - 1}")
    return numbers
