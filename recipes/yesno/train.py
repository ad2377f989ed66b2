"""Train on YesNo: six minutes of one speaker, to try things on. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.YesNo()

VALUES = TrainConfig(
    family="wavenet",
    data="data",
    out="runs/yesno",
    sample_rate=8000,
    # Two stacks of eight layers see 64 ms of past at 8000 Hz.
    layers=16,
    stacks=2,
    residual_channels=32,
    skip_channels=64,
    head_channels=128,
    conditioning_channels=40,
    mel_bands=40,
    batch_size=4,
    segment=4096,
    max_steps=20_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
