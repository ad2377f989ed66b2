"""Train on music, without mels. Every value below is a flag too."""

from wavear import TrainConfig
from wavear.cli import recipe

VALUES = TrainConfig(
    family="transformer",
    data="data/music",
    out="runs/music",
    unconditional=True,
    # Recordings are mixed to mono and resampled as they are read.
    sample_rate=16000,
    # 4 layers x 383 positions x 32 samples: 3.1 seconds of past. Few channels of a past sample, as
    # the head reads those of 32 samples for each new one.
    layers=4,
    channels=128,
    window=384,
    patch=32,
    sample_channels=16,
    head_channels=128,
    # A segment sees the keys and values of those before it, 32 segments (8.2 s) at most.
    segment=4096,
    batch_size=2,
    optimizer="muon",
    learning_rate=4e-3,
    hold=0.3,
    ema_decay=0.9,
    # Noise on the past, only in training, makes the free run robust.
    input_noise=1.0,
    sample_seconds=4.0,
    max_steps=None,
    max_minutes=20.0,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__)
