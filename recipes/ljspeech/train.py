"""Train on LJ Speech: one reader, 24 hours. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.LJSpeech()

VALUES = TrainConfig(
    family="wavenet",
    data="data",
    out="runs/ljspeech",
    # HiFi-GAN's mels (80 bands, a frame per 256 samples, natural logarithm), so that text-to-speech
    # models that were trained for them speak through this one.
    sample_rate=22050,
    mel_bands=80,
    mel_hop_length=256,
    mel_n_fft=1024,
    mel_fmin=0.0,
    mel_fmax=8000.0,
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
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
