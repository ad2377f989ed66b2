"""Train a Transformer on codes, and play new ones: babble without a text, or more of a recording.

    python recipes/vqvae/babble.py runs/vqvae --data voices.csv --speaker p226 --out babble.wav
    python recipes/vqvae/babble.py runs/vqvae --speaker p226 --prime start.wav --out more.wav

It is wavear's Transformer, one position per code, conditioned on the speaker. The first run trains
it (MODEL/babble); later ones generate only, and need no data.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from networks import CodesModel, load_codes, refuse_existing
from recordings import listed, read, read_mel
from torch import Tensor
from torch.nn import functional as F

from wavear import (
    MelConfig,
    PredictiveWaveNet,
    Transformer,
    TransformerConfig,
    WavearError,
    audio,
    generate,
    load,
)
from wavear.cli import recipe

Sequences = list[tuple[Tensor, int]]
"""Codes (N,) and the number of the speaker, of each clip."""


@dataclass(frozen=True)
class Babble:
    """The babble, and the training before it."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")] = Path()
    """Folder that train.py wrote."""
    data: str | None = None
    """Recordings to train on, as of train.py; needed for the first run only."""
    speaker: str = ""
    """Name of the speaker; none: list the names."""
    prime: Path | None = None
    """A recording to continue; the file begins with it."""
    out: Path = Path("babble.wav")
    """File to write."""
    seconds: float = 8.0
    """Seconds of new audio."""
    steps: int = 800
    """Steps of training."""
    window: int = 128
    """Codes that a layer sees."""
    layers: int = 4
    """Layers."""
    width: int = 128
    """Channels."""
    batch_size: int = 16
    """Stretches of two windows per step."""
    learning_rate: float = 2e-3
    """The highest; it falls to zero by half a cosine."""
    dropout: float = 0.1
    """Share of past codes replaced by random ones in training."""
    limit: float = 400.0
    """Seconds of each speaker to train on, at most."""
    temperature: float = 1.0
    """Divides the logits of the codes."""
    top_p: float = 0.95
    """Draw among the likeliest codes with this probability."""
    seed: int = 0
    """Seed of the training, the codes and the audio."""
    overwrite: bool = False
    """Replace the file if it exists."""


VALUES = Babble()


def encoded(model: CodesModel, voice, data: str, limit: float) -> tuple[Sequences, Sequences]:
    """Return the codes of recordings to train on, and of held-out ones."""
    recordings = listed(data)
    return tuple(  # type: ignore[return-value]
        [
            (model.encode(torch.from_numpy(clip.mel).float()), model.number(clip.recording.speaker))
            for clip in read([r for r in recordings if r.held_out == held], voice.config.mel, most)
        ]
        for held, most in ((False, limit), (True, math.inf))
    )


def unigram(sequences: Sequences, classes: int) -> Tensor:
    """Return the probability (K,) of each code, one added to each count."""
    counts = torch.ones(classes)
    for codes, _ in sequences:
        counts += torch.bincount(codes, minlength=classes)
    return counts / counts.sum()


def entropy(sequences: Sequences, probability: Tensor) -> float:
    """Return the bits per code of sequences under a distribution of single codes."""
    return float(-torch.cat([probability[codes] for codes, _ in sequences]).log2().mean())


@torch.inference_mode()
def bits(babble: Transformer, sequences: Sequences) -> float:
    """Return the bits per code of sequences, each from its beginning."""
    total, count = 0.0, 0
    for codes, speaker in sequences:
        parameters = babble(codes[None], babble.condition(None, torch.tensor([speaker])))
        total -= float(babble.law.log_prob(parameters, codes[None]).sum())
        count += len(codes)
    return total / count / math.log(2)


def trained(
    config: Babble, speakers: tuple[str, ...], classes: int, train: Sequences, held: Sequences
) -> Transformer:
    """Train a Transformer, and return it as it was when held-out bits were lowest."""
    torch.manual_seed(config.seed)
    shape = TransformerConfig(
        classes=classes,
        sample_rate=1000,  # it has no meaning for codes
        speakers=len(speakers),
        layers=config.layers,
        channels=config.width,
        window=config.window,
        patch=1,
        sample_channels=config.width,
        head_channels=config.width,
    )
    babble = Transformer(shape)
    length = 2 * config.window
    usable = [(F.pad(c, (0, max(length - len(c), 0)), value=-1), s) for c, s in train]
    chance = np.array([float(len(codes)) for codes, _ in usable])
    generator = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(babble.parameters(), weight_decay=0.1)
    best, lowest, began = {}, math.inf, time.monotonic()
    for step in range(1, config.steps + 1):
        chosen = generator.choice(len(usable), config.batch_size, p=chance / chance.sum())
        rows = []
        for i in chosen:
            first = int(generator.integers(len(usable[i][0]) - length + 1))
            rows.append(usable[i][0][first : first + length])
        codes, speaker = torch.stack(rows), torch.tensor([usable[i][1] for i in chosen])
        mask = codes >= 0
        codes = codes.clamp(min=0)
        noisy = torch.where(
            torch.rand(codes.shape) < config.dropout, torch.randint_like(codes, classes), codes
        )
        # The targets are the codes themselves, the past is the noisy one.
        parameters = babble(noisy, babble.condition(None, speaker))
        loss = -(babble.law.log_prob(parameters, codes) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(babble.parameters(), 1.0)
        for group in optimizer.param_groups:
            warm = min(step / 50, 1.0)
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
            group["lr"] = config.learning_rate * warm * cosine
        optimizer.step()
        if step % max(config.steps // 8, 1) == 0 or step == config.steps:
            now = bits(babble.eval(), held)
            print(
                f"{time.monotonic() - began:.0f} s, step {step}: training"
                f" {loss.item() / math.log(2):.3f}, held out {now:.3f} bits per code",
                flush=True,
            )
            babble.train()
            if now < lowest:
                lowest = now
                best = {name: tensor.clone() for name, tensor in babble.state_dict().items()}
    babble.load_state_dict(best)
    return babble.eval()


def continued(
    model: CodesModel,
    voice: PredictiveWaveNet,
    babble: Transformer,
    speaker: str,
    seconds: float,
    prime: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = 0.95,
) -> Tensor:
    """Return new audio (T,), after a recording and its mel (`recordings.read_mel`) if given.

    The new codes follow the recording's codes, the new samples its samples; the mean of its mel is
    kept.
    """
    mels = voice.config.mel
    assert isinstance(mels, MelConfig)
    count = round(seconds * mels.frame_rate / model.config.frames)
    given: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_p": top_p}
    given["speaker"] = model.number(speaker)
    if prime is None:
        codes = babble.grid.encode(generate(babble, samples=count, **given))[0]
        return generate(voice, model.decode(codes, speaker), seed=seed)[0]
    waveform, mel = prime
    past = model.encode(mel)
    # A code is the value that the Transformer's grid decodes it to, and back.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prime is clipped")  # the first and the last code
        drawn = generate(babble, samples=count, prime=babble.grid.decode(past)[None], **given)
    codes = torch.cat([past, babble.grid.encode(drawn)[0]])
    new = model.decode(codes, speaker, mel.mean(1))[:, mel.shape[1] :]
    return generate(voice, torch.cat([mel, new], dim=1), prime=waveform, seed=seed)[0]


def run(config: Babble) -> int:
    """Train if there is nothing yet; generate codes, and play them."""
    refuse_existing(config.out, config.overwrite)
    model, voice = load_codes(config.model)
    names = model.config.speakers
    model.number(config.speaker)
    prime = None if config.prime is None else read_mel(config.prime, voice.config.mel)
    folder = config.model / "babble"
    if config.steps < 1:
        raise WavearError(f"steps is {config.steps}: expected at least 1")
    if not folder.is_dir():
        if config.data is None:
            raise WavearError(f"{folder} is missing: give --data to train it")
        train, held = encoded(model, voice, config.data, config.limit)
        if not held:
            raise WavearError(f"{config.data} holds no held-out recordings: add some")
        single = entropy(held, unigram(train, model.config.codes))
        print(
            f"{sum(len(c) for c, _ in train)} codes to train on, {sum(len(c) for c, _ in held)}"
            f" held out; a distribution of single codes has {single:.3f} bits per code"
        )
        babble = trained(config, names, model.config.codes, train, held)
        record = {"speakers": list(names), "validation_bits": bits(babble, held)}
        babble.save(folder, training=record)
        print(f"held out: {record['validation_bits']:.3f} bits per code: {folder}")
    babble = load(folder)
    new = continued(
        model,
        voice,
        babble,
        config.speaker,
        config.seconds,
        prime,
        seed=config.seed,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    waveform = new if prime is None else torch.cat([prime[0], new])
    audio.write(config.out, waveform, voice.config.sample_rate)
    print(f"{config.out}  {len(new) / voice.config.sample_rate:.2f} s of new audio")
    return 0


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
