"""Train on music, without mels. Every value below is a flag too."""

from wavear import TrainConfig
from wavear.cli import recipe

VALUES = TrainConfig(
    family="wavenet",
    data="data/music",
    out="runs/music",
    unconditional=True,
    # Recordings are mixed to mono and resampled as they are read.
    sample_rate=16000,
    # Without mels the context is only the past: three stacks of ten layers see 192 ms of
    # it.
    layers=30,
    stacks=3,
    residual_channels=64,
    skip_channels=128,
    normalize="peak",
    redraw_below=-60.0,
    # For one GPU; under torchrun the batch is shared by all.
    batch_size=16,
    segment=8192,
    learning_rate=2e-3,
    ema_decay=0.9999,
    # Noise on the past, only in training, makes the free run robust.
    input_noise=1.0,
    sample_seconds=4.0,
    max_steps=300_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__)
