"""Train on CMU ARCTIC: one voice, or several. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.CMUArctic(
    # One voice of an hour. Several, told apart: --voices slt bdl clb rms --speakers
    voices=("slt",),
)

VALUES = TrainConfig(
    family="wavenet",
    data="data",
    out="runs/cmu_arctic",
    # The rate of the recordings. The mel is that of 16 kHz: a frame per 256 samples would be 16 ms,
    # as here.
    sample_rate=16000,
    mel_hop_length=256,
    mel_n_fft=1024,
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
    # An hour of speech: more steps than these come to know it by heart.
    max_steps=100_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
