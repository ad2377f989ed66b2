"""Train on VCTK: 109 English speakers, told apart by the model. Every value below is a flag too."""

from wavear import TrainConfig, corpora
from wavear.cli import recipe

CORPUS = corpora.VCTK(
    microphone="mic1",
)

VALUES = TrainConfig(
    family="wavenet",
    data="data",
    out="runs/vctk",
    # The model learns a vector for each speaker; --no-speakers makes a vocoder that has only
    # the mel.
    speakers=True,
    # The recordings are of 48000 Hz and are resampled as they are read.
    sample_rate=22050,
    mel_hop_length=256,
    mel_n_fft=1024,
    mel_fmax=8000.0,
    # Speakers were recorded at different levels: one gain for each of them. Decodes every file
    # once, at the start.
    normalize="rms",
    normalize_by="speaker",
    layers=20,
    stacks=2,
    residual_channels=64,
    skip_channels=128,
    # For one GPU; under torchrun the batch is shared by all.
    batch_size=16,
    segment=8192,
    learning_rate=2e-3,
    ema_decay=0.9999,
    max_steps=400_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__, CORPUS)
