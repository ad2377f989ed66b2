"""Speak a text: torchaudio's Tacotron 2 makes a mel of it, a wavear vocoder the audio."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import wavear


@dataclasses.dataclass(frozen=True)
class Speak:
    """The text, and the models that speak it."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Vocoder: voice, which comes with wavear; a folder such as runs/tts/best; or hf:owner/name on
    the Hugging Face hub."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """In English."""
    out: Path = Path("speech.wav")
    """File to write: .wav, .flac, .ogg or .opus."""
    bundle: str = "TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH"
    """A bundle of torchaudio.pipelines; those with PHONE need the package deep_phonemizer."""
    seed: int = 0
    """Seed of Tacotron 2's dropout and of the audio."""
    temperature: float = 1.0
    """Temperature of the vocoder: below 1 duller and cleaner."""
    top_p: float | None = None
    """Draw among the likeliest values with this probability."""
    engine: str = "auto"
    """auto, numba or reference."""
    weights: str = "float32"
    """float32, bfloat16 or int8."""
    overwrite: bool = False
    """Replace the file if it exists."""
    force: bool = False
    """Continue although the vocoder expects other mels than the bundle makes."""


def speak(speak: Speak, processor: Any = None, network: Any = None) -> tuple[torch.Tensor, int]:
    """Return the waveform (T,) and its rate; download the bundle's parts that are not given."""
    if speak.out.exists() and not speak.overwrite:
        raise FileExistsError(f"{speak.out} exists: choose another name, or pass --overwrite")
    model = wavear.load(speak.checkpoint)
    front = wavear.Tacotron(model, speak.bundle, processor, network, speak.force)
    mel = front.mel(speak.text, speak.seed)
    sampling: dict[str, Any] = {
        "seed": speak.seed,
        "temperature": speak.temperature,
        "top_p": speak.top_p,
    }
    waveform = wavear.generate(model, mel, engine=speak.engine, weights=speak.weights, **sampling)[
        0
    ]
    for finding in wavear.watch(
        waveform, model.config.sample_rate, mel=mel, config=model.config.mel
    ):
        print(f"speak.py: warning: {finding}", file=sys.stderr)
    wavear.audio.write(speak.out, waveform, model.config.sample_rate)
    return waveform, model.config.sample_rate


def main(arguments: list[str] | None = None) -> int:
    """Speak the text; return the exit status."""
    given = tyro.cli(Speak, description=__doc__, args=arguments)
    began = time.perf_counter()
    try:
        waveform, rate = speak(given)
    except (ValueError, OSError) as error:
        print(f"speak.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(
        f"{given.out}  {len(waveform) / rate:.2f} s of audio in {time.perf_counter() - began:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
