"""Train a vocoder for the mels of torchaudio's Tacotron 2. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.LJSpeech()

VALUES = TrainConfig(
    family="wavenet",
    data="data",  # with LJSpeech-1.1: the voice that Tacotron 2 was trained on
    out="runs/tts",
    # The mels that Tacotron 2 predicts, all of it: these are what the vocoder hears and nothing
    # else.
    mel_preset="torchaudio-tacotron2",
    sample_rate=22050,
    layers=20,
    stacks=2,
    residual_channels=64,
    skip_channels=128,
    # For one GPU; under torchrun the batch is shared by all.
    batch_size=16,
    segment=8192,
    learning_rate=2e-3,
    ema_decay=0.9999,
    max_steps=300_000,
    # Predicted mels are smoother than those of recordings: noise on the past makes the vocoder heed
    # them all the same.
    input_noise=1.0,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
