"""Train on spoken digits: six speakers. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.Digits()

VALUES = TrainConfig(
    family="wavenet",
    data="data/free-spoken-digit-dataset",
    out="runs/digits",
    speakers=True,
    sample_rate=8000,
    # Two stacks of eight layers see 64 ms of past at 8000 Hz.
    layers=16,
    stacks=2,
    residual_channels=32,
    skip_channels=64,
    head_channels=128,
    conditioning_channels=40,
    mel_bands=40,
    # Speakers used their own microphones: one gain for each of them.
    normalize="rms",
    normalize_by="speaker",
    # The shortest digits take 0.14 s, and a crop is as long as its recording at most.
    batch_size=8,
    segment=2048,
    max_steps=30_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
