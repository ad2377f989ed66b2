"""Measure codes on held-out recordings: bits per second, resynthesis, and voice conversion.

    python recipes/vqvae/measure.py runs/vqvae --data voices.csv --voices kerstin p226

Resynthesis is judged by `wavear.evaluate`: the reports lie in OUT/copy (true mels, the voice as it
was before), OUT/codes, and OUT/apart (the codes' mels, the voice as it was before).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import librosa
import numpy as np
import torch
import tyro
from networks import VOICE, CodesModel, load_codes, refuse_existing
from recordings import Recording, listed, read_mel
from torch import Tensor

from wavear import EvaluateConfig, WavearError, audio, evaluate, generate, log_mel
from wavear.cli import recipe

MEASURES = {"pesq": 2, "stoi": 3, "mcd": 2, "log_mel": 3, "period_error": 1}
"""Measures of `wavear.evaluate`, with the decimals to print."""


@dataclass(frozen=True)
class Measure:
    """The recordings, and how much of them to measure."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")] = Path()
    """Folder that train.py wrote."""
    data: str = "data"
    """Recordings, as of train.py: the held-out ones are used."""
    out: Path = Path("measured")
    """Folder to write to; it must not exist."""
    before: str = "voice"
    """The voice that train.py started from."""
    voices: tuple[str, ...] = ()
    """Speakers to convert to each other."""
    ways: tuple[Literal["copy", "codes", "apart"], ...] = ("copy", "codes", "apart")
    """Syntheses to evaluate."""
    clips: int = 2
    """Clips of each speaker to synthesize."""
    seconds: float = 5.0
    """Seconds of each, from the middle of the recording."""
    seed: int = 0
    """Seed of the audio."""


VALUES = Measure()


def entropy_bits(codes: np.ndarray) -> tuple[float, int]:
    """Return the entropy of single codes in bits, and the number of codes that occur.

    With the correction of Miller and Madow for few codes.
    """
    counts = np.bincount(codes)
    counts = counts[counts > 0]
    share = counts / counts.sum()
    bias = (len(counts) - 1) / (2 * counts.sum() * math.log(2))
    return float(-(share * np.log2(share)).sum() + bias), len(counts)


def excerpts(held: list[Recording], config: Measure, rate: int, hop: int) -> list[Recording]:
    """Write the middle of some held-out recordings of each speaker, and return these."""
    (config.out / "clips").mkdir(parents=True)
    found: dict[str, list[Recording]] = {}
    for each in held:
        own = found.setdefault(each.speaker, [])
        if len(own) < config.clips:
            whole = audio.read(each.path, rate)
            length = min(round(config.seconds * rate), len(whole)) // hop * hop
            first = (len(whole) - length) // 2
            path = config.out / "clips" / f"{each.path.stem}.wav"
            audio.write(path, whole[first : first + length].clamp(-1, 1), rate)
            own.append(Recording(path, each.speaker, True))
    return [each for own in found.values() for each in own]


def resynthesis(clips: list[Recording], model: CodesModel, voice: Any, config: Measure) -> None:
    """Evaluate copy synthesis, the codes, and their mels with the earlier voice; print a table."""
    (config.out / "mels").mkdir()
    with open(config.out / "clips.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path"], *([c.path.resolve()] for c in clips)])
    for clip in clips:
        _, mel = read_mel(clip.path, voice.config.mel)
        decoded = model.decode(model.encode(mel), clip.speaker)[:, : mel.shape[1]]
        np.save(config.out / "mels" / f"{clip.path.stem}.npy", decoded.numpy())
    mels, after = str(config.out / "mels"), str(config.model / VOICE)
    ways = {"copy": (config.before, None), "codes": (after, mels), "apart": (config.before, mels)}
    print(f"| | bits | {' | '.join(MEASURES)} |\n|---|---:{'|---:' * len(MEASURES)}|")
    for name in config.ways:
        checkpoint, given = ways[name]
        settings = EvaluateConfig(
            clips=len(clips), seconds=config.seconds, seed=config.seed, mels=given
        )
        found = evaluate(checkpoint, config.out / "clips.csv", config.out / name, settings)
        means = {k: v["model"]["mean"] for k, v in found.record["measures"].items() if "model" in v}
        values = [f"{means[k]:.{d}f}" if k in means else "-" for k, d in MEASURES.items()]
        bits = found.bits["model"]
        print(f"| {name} | {bits:.2f} | {' | '.join(values)} |", flush=True)


def pitch(waveform: Tensor, rate: int) -> float:
    """Return the median of the pitch, Hz."""
    found = librosa.pyin(waveform.double().numpy(), fmin=65, fmax=400, sr=rate)[0]
    voiced = found[np.isfinite(found)]
    return float(np.median(voiced)) if voiced.size else math.nan


def average(mel: Tensor) -> Tensor:
    """Return the mean (M,) over the louder half of the frames: of the speech, not the pauses."""
    level = mel.mean(0)
    return mel[:, level >= level.median()].mean(1)


def conversion(clips: list[Recording], model: CodesModel, voice: Any, config: Measure) -> None:
    """Convert the clips of each voice to the others; print and write a table."""
    rate, mels = voice.config.sample_rate, voice.config.mel
    (config.out / "converted").mkdir()
    chosen = {name: [c for c in clips if c.speaker == name] for name in config.voices}
    if missing := [name for name, own in chosen.items() if not own]:
        raise WavearError(f"no held-out clip of {missing[0]}: choose other --voices")
    originals = {name: [read_mel(c.path, mels) for c in own] for name, own in chosen.items()}
    sound = {
        name: torch.stack([average(m) for _, m in own]).mean(0) for name, own in originals.items()
    }
    high = {
        name: float(np.median([pitch(x, rate) for x, _ in own])) for name, own in originals.items()
    }
    head = ["from", "to", "f0 of from", "f0 of to", "f0 as from", "f0 converted"]
    head += [
        f"{what} to {end}" for what in ("before", "shifted", "converted") for end in ("A", "B")
    ]
    rows = []
    for a, own in originals.items():
        again: list[float] = []
        for b in [a, *(name for name in chosen if name != a)]:
            pitches, distances = [], []
            for clip, (_, mel) in zip(chosen[a], own, strict=True):
                decoded = model.decode(model.encode(mel), b)
                made = generate(voice, decoded, seed=config.seed)[0]
                audio.write(config.out / "converted" / f"{clip.path.stem}-as-{b}.wav", made, rate)
                pitches.append(pitch(made, rate))
                spectra = [average(mel), average(mel) - sound[a] + sound[b]]
                spectra.append(average(log_mel(made[None], mels)[0]))
                distances.append(
                    [float((x - sound[end]).abs().mean()) for x in spectra for end in (a, b)]
                )
            if a == b:
                again = pitches
                continue
            f0 = [high[a], high[b], float(np.median(again)), float(np.median(pitches))]
            numbers = [f"{x:.0f}" for x in f0] + [f"{x:.2f}" for x in np.mean(distances, axis=0)]
            rows.append([a, b, *numbers])
            if len(rows) == 1:
                print(f"| {' | '.join(head)} |\n|---|---{'|---:' * (len(head) - 2)}|")
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    with open(config.out / "conversion.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def run(config: Measure) -> int:
    """Print bits per second, and the two tables."""
    refuse_existing(config.out, overwrite=False)
    model, voice = load_codes(config.model)
    for name in config.voices:
        model.number(name)
    mels, hop = voice.config.mel, voice.config.mel.hop_length
    held = [each for each in listed(config.data) if each.held_out]
    if not held:
        raise WavearError(f"{config.data} holds no held-out recordings: add some")
    codes = torch.cat([model.encode(read_mel(each.path, mels)[1]) for each in held]).numpy()
    rate = mels.frame_rate / model.config.frames
    bits, used = entropy_bits(codes)
    most = math.log2(model.config.codes)
    print(
        f"{len(held)} held-out recordings, {len(codes) / rate:.0f} s, {rate:.2f} codes per second"
    )
    print(f"{used} of {model.config.codes} codes occur, at most {most * rate:.0f} bits per second")
    print(f"entropy of single codes {bits:.2f} of {most:.2f} bits, {bits * rate:.0f} per second")
    clips = excerpts(held, config, voice.config.sample_rate, hop)
    if config.ways:
        resynthesis(clips, model, voice, config)
    if len(config.voices) > 1:
        conversion(clips, model, voice, config)
    return 0


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
