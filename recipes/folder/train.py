"""Train on your own recordings, a folder or a manifest. Every value below is a flag too."""

from wavear import TrainConfig
from wavear.cli import recipe

VALUES = TrainConfig(
    data="data",
    out="runs/folder",
    # Rates of 16000 to 24000 Hz suit speech. Recordings of another rate are resampled as they are
    # read.
    sample_rate=22050,
    # Recordings of one speaker at very different levels, or of several: --normalize rms.
    normalize="none",
    # Crops quieter than this are drawn again, so that pauses do not fill the batches.
    redraw_below=-60.0,
    # A long run; the best checkpoint so far is always complete on disk, and Ctrl-C followed by
    # --resume continues.
    max_steps=200_000,
)

if __name__ == "__main__":
    recipe(VALUES, __doc__)
