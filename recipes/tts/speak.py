"""Speak a text: torchaudio's Tacotron 2 makes a mel of it, a wavear vocoder the audio."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import wavear

# The vocoder's mel for each bundle: the two kinds were trained on different mels.
BUNDLES = {
    "TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH": "torchaudio-tacotron2",
    "TACOTRON2_GRIFFINLIM_PHONE_LJSPEECH": "torchaudio-tacotron2",
    "TACOTRON2_WAVERNN_CHAR_LJSPEECH": "torchaudio-tacotron2-wavernn",
    "TACOTRON2_WAVERNN_PHONE_LJSPEECH": "torchaudio-tacotron2-wavernn",
}


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


def text_to_mel(text: str, processor: Any, tacotron2: Any, seed: int = 0) -> torch.Tensor:
    """(M, F) of a text; Tacotron 2 keeps its dropout when it predicts, so it takes a seed."""
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens, lengths = processor(text)
        mel, frames, _ = tacotron2.infer(tokens, lengths)
    return mel[0, :, : int(frames[0])]


def speak(speak: Speak, processor: Any = None, tacotron2: Any = None) -> tuple[torch.Tensor, int]:
    """Return the waveform (T,) and its rate; download the bundle's parts that are not given."""
    if speak.bundle not in BUNDLES:
        raise ValueError(f"bundle is {speak.bundle!r}, it must be one of {', '.join(BUNDLES)}")
    if speak.out.exists() and not speak.overwrite:
        raise FileExistsError(f"{speak.out} exists: choose another name, or pass --overwrite")
    model = wavear.load(speak.checkpoint)
    if model.config.mel is None:
        raise ValueError(f"{speak.checkpoint} takes no mels: it is not a vocoder")
    if processor is None or tacotron2 is None:
        try:
            import torchaudio
        except (ImportError, OSError) as error:
            raise ValueError(
                "Tacotron 2 needs torchaudio, which cannot be imported"
                f' ({error}): pip install "wavear[corpora]"'
            ) from None
        bundle = getattr(torchaudio.pipelines, speak.bundle)
        processor, tacotron2 = bundle.get_text_processor(), bundle.get_tacotron2()
    mel = text_to_mel(speak.text, processor, tacotron2, speak.seed)
    # Without a recording to stay in step with, where a frame is centred makes no difference.
    source = wavear.MelConfig.preset(BUNDLES[speak.bundle])
    source = dataclasses.replace(source, centre=model.config.mel.centre)
    mel = wavear.adapt_mel(mel, model, source, force=speak.force)
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
