"""Train on LibriTTS: a vocoder for unseen voices. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.LibriTTS(
    # All of it: --subsets train-clean-100 train-clean-360 train-other-500
    subsets=("train-clean-100",),
)

VALUES = TrainConfig(
    family="wavenet",
    data="data",
    out="runs/libritts",
    # The rate of the recordings. The readers of dev-clean are not in the training subsets,
    # so there are no speaker vectors: the mel identifies the voice.
    sample_rate=24000,
    mel_hop_length=256,
    mel_n_fft=1024,
    mel_fmax=8000.0,
    # Pauses do not fill the batches. Levels stay: the vocoder is to follow those of its mels.
    redraw_below=-60.0,
    layers=20,
    stacks=2,
    residual_channels=64,
    skip_channels=128,
    # For one GPU; under torchrun the batch is shared by all.
    batch_size=16,
    segment=8192,
    learning_rate=2e-3,
    ema_decay=0.9999,
    max_steps=500_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
