"""Measure what models of music make of their past.

    python bench/music.py runs/music/best runs/wavenet/best --data my/held_out
    python bench/music.py --codes runs/vqvae --speaker music --data my/held_out
    python bench/music.py runs/steered/best --data my/held_out --features my/features
    python bench/music.py --instrument runs/instrument --data my/held_out --features my/features

Without `--features`, for models that play by themselves:

1. Bits per sample of the same held-out samples with 0.1, 0.5, 1, 2 and 4 s of the audio before
   them; earlier audio is replaced by silence.
2. Continuations of stretches of held-out recordings. Does the new audio have the tempo (librosa's
   beat tracker; within 4 %, octaves count as equal) and the key (mean chroma, the profiles of
   Krumhansl, 1990) of the stretch before? In brackets: of stretches of the other recordings, which
   is chance. The first row has the recordings' own continuations, which bound the others. With
   `--codes`, of recipes/vqvae: its babble after the codes of the stretch, and the recordings' own
   continuations as its codes render them.

With `--features`, for models of what recipes/music/features.py writes, or the instruments of
recipes/music/instrument.py: sounds made on the features of held-out recordings. Mean difference of
their loudness from the one asked for, in frames above -60 dB; the share of frames with a pitch in
both whose pitches are within 50 cents; and the share of frames in which both have a pitch, or
neither. In brackets: the same for the features of another recording, which is chance.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import torch
from torch import Tensor

import wavear
from wavear import FeatureConfig, audio
from wavear.common.errors import WavearError
from wavear.data.corpus import Treatment, find, prepare
from wavear.data.crops import read_span
from wavear.generation.conditioner import Conditioner
from wavear.generation.scoring import score_parallel
from wavear.models.base import AutoregressiveModel

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "music"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "vqvae"))
features = importlib.import_module("features").features

CONTEXTS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Seconds."""
SCORED = 0.1
"""Seconds that are scored after each context."""
WITHIN = 0.04
"""Tempi are equal up to this."""
AUDIBLE, CENTS = -60.0, 50.0
"""Loudness that counts, in dB of full scale, and a difference of pitches that is none."""
# Krumhansl, "Cognitive Foundations of Musical Pitch", 1990: how well each degree fits a key.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
KEYS = np.array([np.roll(profile, tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])


def windows(data: str, rate: int, seconds: float, count: int) -> tuple[Tensor, np.ndarray]:
    """Return evenly spaced windows of recordings, (N, T), and the number of each one's recording.

    Parameters
    ----------
    data : str
        A folder or a manifest.
    rate : int
    seconds : float
        Of a window. Shorter recordings are skipped.
    count : int
        Windows of each recording, fewer where they would lie closer than 0.1 s.

    Raises
    ------
    WavearError
        If no recording is long enough.
    """
    length = round(seconds * rate)
    recordings, _ = prepare(find(data), Treatment(rate, least_samples=length))
    if not len(recordings):
        raise WavearError(f"{data} has no recording of {seconds:g} s: give longer ones")
    rows, sources = [], []
    for number, recording in enumerate(recordings):
        room = recording.frames - length
        starts = np.unique(np.linspace(0, room, min(count, 1 + 10 * room // rate)).astype(int))
        rows += [read_span(recording, rate, int(a), int(a) + length) for a in starts]
        sources += [number] * len(starts)
    return torch.from_numpy(np.stack(rows)), np.array(sources)


@torch.inference_mode()
def bits_by_context(
    model: AutoregressiveModel, rows: Tensor, contexts: Sequence[int], scored: int
) -> np.ndarray:
    """Return the bits per sample of the end of each waveform by the length of the past, (N, len).

    Parameters
    ----------
    model : AutoregressiveModel
        Unconditional.
    rows : Tensor, shape (N, T)
        T is at least the longest context plus `scored`.
    contexts : sequence of int
        Samples before those that are scored. The model's past before them is silence.
    scored : int
        Samples at the end of each waveform.
    """
    codes = model.grid.encode(rows)
    nothing = Conditioner(model, None, None)
    found = np.empty((len(rows), len(contexts)))
    for column, first in enumerate(contexts):
        span, state = codes[:, codes.shape[1] - first - scored :], None
        if model.carries:
            state = model.init_state(len(span))
            model.prefill(model.shift(span)[:, :first], state)
        scores = score_parallel(model, span, nothing, first=first, state=state)
        found[:, column] = -scores.mean(dim=1).numpy() / math.log(2)
    return found


def tempo(x: np.ndarray, rate: int) -> float:
    """Return beats per minute, 0 where there are none."""
    return float(np.ravel(librosa.beat.beat_track(y=x, sr=rate)[0])[0])


def same_tempo(a: float, b: float) -> bool:
    """Return whether two tempi agree, where half and double count as equal.

    Examples
    --------
    >>> same_tempo(60, 122), same_tempo(60, 90), same_tempo(0, 0)
    (True, False, False)
    """
    if min(a, b) <= 0:
        return False
    octaves = math.log2(a / b)
    return abs(octaves - round(octaves)) <= math.log2(1 + WITHIN)


def chroma(x: np.ndarray, rate: int) -> np.ndarray:
    """Return the mean strength of the twelve pitch classes from C on, (12,)."""
    bins = 1 << math.ceil(math.log2(rate / 4))  # at most 4 Hz apart: semitones from 65 Hz on
    return librosa.feature.chroma_stft(y=x, sr=rate, n_fft=bins, tuning=0.0).mean(axis=1)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two vectors, 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / max(math.sqrt((a @ a) * (b @ b)), 1e-12))


def key(strengths: np.ndarray) -> int:
    """Return the key of (12,) pitch classes: 0 to 11 for C to B major, 12 to 23 minor."""
    return int(np.argmax([correlation(strengths, profile) for profile in KEYS]))


def kept(
    primes: Sequence[np.ndarray], new: Sequence[np.ndarray], sources: np.ndarray, rate: int
) -> list[tuple[float, float]]:
    """Return shares of equal tempo and key and the mean correlation of chroma, each as a pair.

    The first of a pair is of a continuation and its own prime, the second of a continuation and the
    primes of other recordings.
    """
    tempi = [[tempo(x, rate) for x in each] for each in (primes, new)]
    colours = [[chroma(x, rate) for x in each] for each in (primes, new)]
    keys = [[key(strengths) for strengths in each] for each in colours]
    measures: list[tuple[list[list], Callable]] = [
        (tempi, same_tempo),
        (keys, lambda a, b: a == b),
        (colours, correlation),
    ]
    other = sources[:, None] != sources[None]
    found = []
    for (before, after), equal in measures:
        table = np.array([[float(equal(a, b)) for b in after] for a in before])
        found.append((table.diagonal().mean(), table[other].mean() if other.any() else math.nan))
    return found


def context_table(models: dict[str, AutoregressiveModel], data: str, count: int) -> list[str]:
    """Return a table of bits by context, with the gain of each over the shortest one."""
    head = " | ".join(f"{c:g} s" for c in CONTEXTS)
    lines = [f"| model | its context | {head} |", "|---|---|" + "---:|" * len(CONTEXTS)]
    for name, model in models.items():
        rate, field = model.config.sample_rate, model.receptive_field
        rows, _ = windows(data, rate, max(CONTEXTS) + SCORED, count)
        spans = [round(c * rate) for c in CONTEXTS]
        bits = bits_by_context(model, rows, spans, round(SCORED * rate))
        # The samples are the same, so the error of a difference is that of the pairs.
        less = bits - bits[:, :1]
        errors = less.std(axis=0, ddof=1) / math.sqrt(len(less)) if len(less) > 1 else less[0]
        cells = [f"{bits[:, 0].mean():.3f}"] + [
            f"{mean:.3f} ({change:+.3f} ± {error:.3f})"
            for mean, change, error in zip(
                bits.mean(axis=0)[1:], less.mean(axis=0)[1:], errors[1:], strict=True
            )
        ]
        own = "unbounded" if field is None else f"{field / rate:.2f} s"
        lines.append(f"| {name} | {own} | {' | '.join(cells)} |")
    return [f"{len(rows)} stretches of {SCORED:g} s:", "", *lines]


def by_codes(folder: Path, speaker: str) -> tuple[int, Callable[[Tensor, int], dict[str, Tensor]]]:
    """Load what recipes/vqvae wrote.

    Returns
    -------
    int: its sample rate
    callable: from recordings (N, T) and the length of their beginnings to new ends, by name
    """
    babble = importlib.import_module("babble")
    model, voice = importlib.import_module("networks").load_codes(folder)
    speaks = wavear.load(folder / "babble")
    rate, hop = voice.config.sample_rate, voice.config.mel.hop_length * model.config.frames

    def ends(rows: Tensor, first: int) -> dict[str, Tensor]:
        rendered, continued = [], []
        for seed, row in enumerate(rows):
            mel = wavear.log_mel(row[None], voice.config.mel)[0]
            own = model.decode(model.encode(mel), speaker, mel.mean(1))
            rendered.append(wavear.generate(voice, own, seed=seed)[0, first : len(row)])
            prime = row[: first // hop * hop]
            given = prime, wavear.log_mel(prime[None], voice.config.mel)[0]
            seconds = (len(row) - first) / rate
            continued.append(
                babble.continued(model, voice, speaks, speaker, seconds, given, seed=seed)
            )
        length = min(len(x) for x in [*rendered, *continued])
        return {
            f"{name}{folder}": torch.stack([x[:length] for x in parts])
            for name, parts in (("the recording by the codes of ", rendered), ("", continued))
        }

    return rate, ends


def continuation_table(
    models: dict[str, AutoregressiveModel],
    data: str,
    count: int,
    seconds: float,
    threads: int,
    codes: tuple[Path, str] | None = None,
) -> list[str]:
    """Return a table of what continuations keep; `codes` are the folder and speaker of a recipe."""
    if codes is None:
        rate, ends = next(iter(models.values())).config.sample_rate, None
    else:
        rate, ends = by_codes(*codes)
    rows, sources = windows(data, rate, 2 * seconds, count)
    primes, rest = rows.split(round(seconds * rate), dim=1)
    sounds = {"the recording itself": rest}
    if ends is not None:
        sounds |= ends(rows, primes.shape[1])
    for name, model in models.items():
        sounds[name] = wavear.generate(
            model,
            samples=rest.shape[1],
            prime=primes,
            seed=list(range(len(rows))),
            threads=threads,
        )
    lines = [
        f"{len(rows)} continuations of {seconds:g} s after {seconds:g} s, of"
        f" {len(set(sources.tolist()))} recordings; in brackets with primes of the others:",
        "",
        "| continuation | same tempo | same key | correlation of chroma |",
        "|---|---:|---:|---:|",
    ]
    for name, sound in sounds.items():
        found = kept(list(primes.numpy()), list(sound.numpy()), sources, rate)
        lines.append(f"| {name} | " + " | ".join(f"{a:.2f} ({b:.2f})" for a, b in found) + " |")
    return lines


def followed(asked: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Compare loudness, pitch and voicing (3 or more, F) that were asked for with those found.

    Returns
    -------
    tuple of float
        Mean difference of loudness in dB, and the shares of equal pitch and of equal voicing; NaN
        where there is no frame to compare.
    """
    frames = min(asked.shape[1], found.shape[1])
    asked, found = asked[:3, :frames], found[:3, :frames]
    heard = asked[0] > AUDIBLE
    voiced = (asked[2] > 0) & (found[2] > 0)
    differences = [
        np.abs(asked[0] - found[0])[heard],
        np.abs(asked[1] - found[1])[voiced] <= CENTS / 1200,
        (asked[2] > 0) == (found[2] > 0),
    ]
    loudness, pitch, voicing = (float(d.mean()) if len(d) else math.nan for d in differences)
    return loudness, pitch, voicing


@dataclass(frozen=True)
class Follower:
    """A model or an instrument: `play` makes sounds (T,) of features (C, F) and a seed."""

    rate: int
    hop: int
    play: Callable[..., Tensor]


def followers(
    checkpoints: Sequence[str], instruments: Sequence[Path], threads: int
) -> dict[str, Follower]:
    """Load models of features, and instruments.

    Raises
    ------
    WavearError
        If a model is not one of features.
    """
    found = {}
    for name in checkpoints:
        model = wavear.load(name)
        config = model.config.mel
        if not isinstance(config, FeatureConfig):
            raise WavearError(f"{name} is not a model of features: leave out --features")
        play = partial(_play, model, threads)
        found[name] = Follower(model.config.sample_rate, config.hop_length, play)
    for folder in instruments:
        recipe = importlib.import_module("instrument")
        made, voice = recipe.load(folder)
        play = partial(recipe.play, made, voice)
        found[str(folder)] = Follower(voice.config.sample_rate, voice.config.mel.hop_length, play)
    return found


def _play(model: AutoregressiveModel, threads: int, asked: Tensor, *, seed: int) -> Tensor:
    return wavear.generate(model, asked[None], seed=seed, threads=threads)[0]


def steering_table(models: dict[str, Follower], data: Path, folder: Path) -> list[str]:
    """Return a table of how well sounds follow the features of the recordings in a folder.

    Raises
    ------
    WavearError
        If there are fewer than two recordings.
    OSError
        If a file of features is missing.
    """
    paths = sorted(p for p in data.rglob("*") if p.suffix.lower() in audio.SUFFIXES)
    if len(paths) < 2:
        raise WavearError(f"{data} has {len(paths)} recordings: give a folder with two or more")
    asked = [np.load((folder / p.relative_to(data)).with_suffix(".npy")) for p in paths]
    lines = [
        f"{len(paths)} sounds; in brackets on the features of another recording:",
        "",
        "| model | loudness, dB | pitch within 50 cents | voicing |",
        "|---|---:|---:|---:|",
    ]
    for name, model in models.items():
        made = [model.play(torch.from_numpy(each), seed=seed) for seed, each in enumerate(asked)]
        found = [features(sound.numpy(), model.rate, model.hop) for sound in made]
        own, chance = (
            np.nanmean([followed(a, b) for a, b in zip(asked, sounds, strict=True)], axis=0)
            for sounds in (found, found[1:] + found[:1])
        )
        cells = [f"{o:.{d}f} ({c:.{d}f})" for o, c, d in zip(own, chance, (1, 2, 2), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", help="folders that `wavear train` wrote")
    parser.add_argument("--codes", type=Path, help="folder that recipes/vqvae/babble.py trained")
    parser.add_argument("--speaker", default="", help="of the codes")
    parser.add_argument("--data", required=True, help="held-out recordings: folder or manifest")
    parser.add_argument(
        "--stretches", type=int, default=20, help="of each recording to score; 0: none (20)"
    )
    parser.add_argument(
        "--primes", type=int, default=4, help="of each recording to continue; 0: none (4)"
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of a prime and of its continuation (6)"
    )
    parser.add_argument("--features", type=Path, help="folder of features: measure steering")
    parser.add_argument(
        "--instrument", type=Path, action="append", default=[], help="of instrument.py, to steer"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to generate on (1)")
    arguments = parser.parse_args()
    try:
        if arguments.features:
            if not arguments.checkpoints and not arguments.instrument:
                raise WavearError("give checkpoints, or --instrument")
            found = followers(arguments.checkpoints, arguments.instrument, arguments.threads)
            print("\n".join(steering_table(found, Path(arguments.data), arguments.features)))
            return 0
        models = {name: wavear.load(name) for name in arguments.checkpoints}
        if conditioned := [name for name, model in models.items() if model.conditioned]:
            raise WavearError(f"{conditioned[0]} needs conditioning: give unconditional models")
        if len({model.config.sample_rate for model in models.values()}) > 1:
            raise WavearError("the models have different sample rates: measure them separately")
        if not models and not arguments.codes:
            raise WavearError("give checkpoints, or --codes")
        if models and arguments.codes:
            raise WavearError("--codes have a rate of their own: measure them without checkpoints")
        if models and arguments.stretches:
            print("\n".join(context_table(models, arguments.data, arguments.stretches)), flush=True)
        if arguments.primes:
            lines = continuation_table(
                models,
                arguments.data,
                arguments.primes,
                arguments.seconds,
                arguments.threads,
                (arguments.codes, arguments.speaker) if arguments.codes else None,
            )
            print("\n".join(["", *lines]))
    except (WavearError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
