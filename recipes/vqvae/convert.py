"""Encode a recording as codes, and decode them in the voice of a speaker.

    python recipes/vqvae/convert.py runs/vqvae speech.wav --speaker p226 --out p226.wav

Codes can be kept (--codes speech.npy), and decoded later: give that file instead of the recording.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from networks import CodesModel, load_codes, refuse_existing
from recordings import read_mel

from wavear import WavearError, audio, generate
from wavear.cli import recipe


@dataclass(frozen=True)
class Convert:
    """A recording, and who shall speak it."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")] = Path()
    """Folder that train.py wrote."""
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")] = Path()
    """A recording, or codes: .npy."""
    speaker: str = ""
    """Name of the speaker; none: list the names."""
    out: Path = Path("converted.wav")
    """File to write: .wav, .flac, .ogg or .opus."""
    codes: Path | None = None
    """File to write the codes to: .npy."""
    seed: int = 0
    """Seed of the audio."""
    temperature: float = 1.0
    """Divides the logits of the voice."""
    overwrite: bool = False
    """Replace files that exist."""


VALUES = Convert()


def codes_of(source: Path, model: CodesModel, voice: Any) -> torch.Tensor:
    """Return the codes (N,) of a recording, or those in a file."""
    if source.suffix != ".npy":
        return model.encode(read_mel(source, voice.config.mel)[1])
    try:
        codes = np.load(source, allow_pickle=False)
    except ValueError as error:
        raise WavearError(f"{source} holds no codes: {error}") from None
    most = model.config.codes
    whole = codes.ndim == 1 and codes.size and codes.dtype.kind in "iu"
    if not whole or codes.min() < 0 or codes.max() >= most:
        raise WavearError(f"{source}: expected codes (N,), whole numbers of 0 to {most - 1}")
    return torch.from_numpy(codes.astype(np.int64))


def run(config: Convert) -> int:
    """Encode, decode, and write the audio."""
    outputs = [config.out, *([config.codes] if config.codes else [])]
    for path in outputs:
        refuse_existing(path, config.overwrite)
    model, voice = load_codes(config.model)
    model.number(config.speaker)
    began = time.perf_counter()
    codes = codes_of(config.source, model, voice)
    mel = model.decode(codes, config.speaker)
    waveform = generate(voice, mel, seed=config.seed, temperature=config.temperature)[0]
    if config.codes:
        with open(config.codes, "wb") as file:
            np.save(file, codes.numpy().astype(np.uint16))
    audio.write(config.out, waveform, voice.config.sample_rate)
    seconds = len(waveform) / voice.config.sample_rate
    print(
        f"{config.out}  {len(codes)} codes, {seconds:.2f} s of audio"
        f" in {time.perf_counter() - began:.2f} s"
    )
    return 0


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
