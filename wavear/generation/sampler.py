"""Generation: mel -> conditioning -> engine(uniforms, conditioning) -> codes -> waveform.

Streams are independent: the audio of one depends on the model, its mel, its speaker and its seed,
not on the batch it is in, nor on the chunks it is made in.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.generation.conditioner import Conditioner
from wavear.generation.engines import make_engine
from wavear.generation.inputs import Mel, check_mel, check_samples, prepare
from wavear.generation.particles import Particles, check_particles
from wavear.generation.priming import check_prime, deemphasis_after, doubts, encode_prime, fill
from wavear.generation.progress import chunks
from wavear.generation.settings import Sampling, candidate_seeds
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import shared
from wavear.models.sampling import uniforms

# Streams that have ended leave an engine that can `keep` others once this share of them is left.
_SHARE_LEFT = 3 / 4


def generate(
    model: AutoregressiveModel,
    mel: Mel | None = None,
    *,
    samples: int | None = None,
    speaker: int | str | Sequence[int | str] | Tensor | None = None,
    seed: int | Sequence[int] = 0,
    temperature: float | Tensor | np.ndarray = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    argmax: bool = False,
    best_of: int = 1,
    particles: int = 1,
    return_log_probability: bool = False,
    engine: str = "auto",
    weights: str = "float32",
    threads: int | None = None,
    progress: bool = False,
    prime: Tensor | np.ndarray | None = None,
    include_prime: bool = False,
) -> Any:
    """Generate audio, sample by sample.

    Parameters
    ----------
    model : AutoregressiveModel
    mel : Tensor or array, shape (B, M, F) or (M, F); or a sequence of (M, F_i) of different lengths
        Log-mels as `model.config.mel` defines them (`wavear.log_mel`); None for a model without mel
        conditioning.
    samples : int, optional
        Samples T of each utterance, not counting a prime. With a mel at most, and by default, F *
        hop; without one it is required.
    speaker : int or str, or one per utterance
        For a model with speakers: 0 to speakers - 1, or a name that its checkpoint has.
    seed : int, or one per utterance; 0 to 2**64 - 1
        An utterance is a function of its own seed: with one number, each utterance is the same in
        any batch.
    temperature : float, or one per sample, shape (T,) or (B, T)
        Divides the logits. 1 samples from the model as trained; below 1 is duller and cleaner,
        above 1 noisier.
    top_k : int, optional
        Draw among the k likeliest codes only. 1 is the argmax.
    top_p : float, optional
        Draw among the smallest set of likeliest codes that has this share of the probability (of
        the codes that `top_k` leaves), above 0 and at most 1.
    argmax : bool
        Always take the likeliest code. It warns: such audio collapses to silence or to a tone,
        because the likeliest next sample is nearly always the quietest; the noise in a sound is
        never likeliest.
    best_of : int
        Make this many candidates of each utterance and keep the one of the highest log-probability.
        Candidate i of seed s has the seed `candidate_seeds(s, best_of)[i]`, the first s itself.
    particles : int
        Make this many streams of each utterance side by side and every half frame continue
        those whose mel is nearest to the given one (`wavear.generation.particles`).
    return_log_probability : bool
        Return the log-probability of every sample as well.
    engine, weights, threads
        See `make_engine`. Every engine makes the same audio from the same seed.
    progress : bool
        Show a bar with the real-time factor (seconds of audio per second).
    prime : Tensor or array, shape (P,) or (B, P), floating point in [-1, 1], optional
        A recording to continue, at the model's sample rate; one for all utterances, or one for
        each. It is the first P samples of the utterance: a mel covers the prime and the audio that
        follows, so that F * hop is at least P + T, and samples P to P + T are generated, from their
        own uniforms. So a recording that was made with a seed continues as it would have. A silent
        or clipped prime is warned of.
    include_prime : bool
        Return the prime, unchanged, in front of the audio: (B, P + T).

    Returns
    -------
    Tensor, shape (B, T), float32 in [-1, 1], on the CPU
        From mels of different lengths each row ends in zeros.
    Tensor, shape (B, T), float64, if `return_log_probability`
        log P(x_t | x_<t, c) in nats under the model's own distribution, whatever temperature and
        truncation the sample was drawn with: the `score` of these codes. 0 beyond the end of a
        shorter row. The prime is not included.

    Raises
    ------
    WavearError
        If an argument does not fit the model or is out of range; the message names it.

    Examples
    --------
    >>> from wavear import WaveNet, WaveNetConfig
    >>> model = WaveNet(WaveNetConfig(layers=2, stacks=1, residual_channels=4, skip_channels=4))
    >>> generate(model, samples=100, seed=[1, 2], engine="reference").shape
    torch.Size([2, 100])
    """
    sampling = Sampling(
        seed, temperature, top_k, top_p, argmax, best_of, particles, speaker, engine, weights,
        threads,
    )  # fmt: skip
    waveform, scores = generate_with(
        model,
        sampling,
        mel,
        samples=samples,
        prime=prime,
        include_prime=include_prime,
        with_scores=return_log_probability,
        progress=progress,
    )
    return (waveform, scores) if return_log_probability else waveform


def generate_with(
    model: AutoregressiveModel,
    sampling: Sampling,
    mel: Mel | None = None,
    *,
    samples: int | None = None,
    prime: Any = None,
    include_prime: bool = False,
    with_scores: bool = False,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Generate as `generate` does; return the audio (B, T), and its scores (B, T) if wanted."""
    sampling = sampling.checked(model)
    seeds = sampling.seeds
    past = torch.empty(1, 0) if prime is None else check_prime(prime)
    speakers = sampling.speakers(model)
    conditioner, batch = prepare(model, mel, speakers, utterances=len(seeds), primes=len(past))
    seeds = seeds * batch if len(seeds) == 1 else seeds
    for doubt in doubts(past):
        warnings.warn(doubt, stacklevel=3)
    past = past.expand(batch, -1)
    lengths = check_samples(conditioner.lengths, samples, batch, past.shape[1])
    temperature = sampling.temperature_of(batch, max(lengths))
    best_of = sampling.best_of
    if best_of > 1:  # the candidates of an utterance are further streams, side by side
        conditioner.repeat(best_of)
        past = past.repeat_interleave(best_of, dim=0)
        seeds = [candidate for s in seeds for candidate in candidate_seeds(s, best_of)]
        lengths = [length for length in lengths for _ in range(best_of)]
        if isinstance(temperature, np.ndarray):
            temperature = np.repeat(temperature, best_of, axis=0)
    scores = np.zeros((len(lengths), max(lengths))) if with_scores or best_of > 1 else None
    streams = _Streams(conditioner, past, seeds, lengths, temperature)
    if sampling.particles > 1:
        check_particles(model)
        mels = check_mel(mel, model.config.mel) or []
        mels *= batch // len(mels)
        codes = _draw_particles(model, sampling, streams, mels, scores, progress)
    else:
        codes = _draw(model, sampling, streams, scores, progress)
    waveform = model.grid.decode(torch.from_numpy(codes))
    for b, length in enumerate(lengths):
        waveform[b] = deemphasis_after(past[b], model)(waveform[b])
        waveform[b, length:] = 0
        if scores is not None:
            scores[b, length:] = 0
    if best_of > 1:
        assert scores is not None
        totals = scores.sum(axis=1).reshape(batch, best_of)
        best = torch.from_numpy(totals.argmax(axis=1) + np.arange(batch) * best_of)
        past, waveform, scores = past[best], waveform[best], scores[best.numpy()]
    waveform = torch.cat([past, waveform], dim=1) if include_prime else waveform
    return waveform, None if scores is None else torch.from_numpy(scores)


@dataclasses.dataclass(frozen=True)
class _Streams:
    """The streams of one call, of which an engine may later run only the unfinished ones."""

    conditioner: Conditioner
    past: Tensor
    """Primes (B, P)."""
    seeds: list[int]
    lengths: list[int]
    """Samples to make."""
    temperature: float | np.ndarray
    """One, or (B, T)."""


@torch.inference_mode()
def _draw(
    model: AutoregressiveModel,
    sampling: Sampling,
    streams: _Streams,
    scores: np.ndarray | None,
    progress: bool,
) -> np.ndarray:
    """Return the codes (B, T) that an engine draws, and fill in their scores (B, T)."""
    batch, total, begin = len(streams.lengths), max(streams.lengths), streams.past.shape[1]
    conditioner, temperature = streams.conditioner, streams.temperature
    name, runner = make_engine(
        model, batch, sampling.engine, weights=sampling.weights, threads=sampling.threads
    )
    for b, row in enumerate(encode_prime(streams.past, model) if begin else []):
        # Without conditioning there is one utterance for all streams.
        fill(runner, b, model, row, conditioner.utterances[b % len(conditioner.utterances)])
    codes = np.zeros((batch, total), dtype=np.int64)
    seats = np.arange(batch)  # the streams that the engine runs
    for start, stop in chunks(total, progress, model.config.sample_rate, batch, name):
        staying = np.flatnonzero(np.asarray(streams.lengths)[seats] > start)
        if hasattr(runner, "keep") and len(staying) <= _SHARE_LEFT * len(seats):
            runner, seats = runner.keep(staying.tolist()), seats[staying]  # type: ignore[attr-defined]
            conditioner.keep(staying.tolist())
        draws = np.stack([uniforms(streams.seeds[b], begin + start, stop - start) for b in seats])
        part = None if scores is None else np.empty(draws.shape)
        codes[seats, start:stop] = runner.generate(
            draws,
            conditioner.span(begin + start, begin + stop),
            temperature[seats, start:stop] if isinstance(temperature, np.ndarray) else temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            log_probability=part,
        )
        if scores is not None:
            scores[seats, start:stop] = part
    return codes


@torch.inference_mode()
def _draw_particles(
    model: AutoregressiveModel,
    sampling: Sampling,
    streams: _Streams,
    mels: list[Tensor],
    scores: np.ndarray | None,
    progress: bool,
) -> np.ndarray:
    """Return the codes (B, T) of particles, one utterance after another; see `_draw`."""
    count, begin = sampling.particles, streams.past.shape[1]
    name, engine = make_engine(
        model, count, sampling.engine, weights=sampling.weights, threads=sampling.threads
    )
    codes = np.zeros((len(streams.lengths), max(streams.lengths)), dtype=np.int64)
    temperature = streams.temperature
    for b, length in enumerate(streams.lengths):
        runner = engine if b == 0 else engine.resized(count)
        utterance = streams.conditioner.utterances[b]
        if begin:
            row = encode_prime(streams.past[b : b + 1], model)[0]
            fill(runner, 0, model, row, utterance)
            runner.copy_streams([0] * (count - 1), list(range(1, count)))
        seeds = candidate_seeds(streams.seeds[b], count + 1)
        particles = Particles(model, runner, mels[b], streams.past[b], seeds)
        for start, stop in chunks(length, progress, model.config.sample_rate, 1, name):
            given = temperature
            if isinstance(temperature, np.ndarray):
                given = temperature[b, start:stop]
            cond = shared(utterance.span(begin + start, begin + stop), count)
            particles.run(stop - start, cond, given, top_k=sampling.top_k, top_p=sampling.top_p)
        codes[b, :length], found = particles.chosen()
        if scores is not None:
            scores[b, :length] = found
    return codes
