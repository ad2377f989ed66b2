"""The options of an evaluation. No torch here: the command line reads it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from wavear.common.errors import WavearError


@dataclass(frozen=True)
class EvaluateConfig:
    """How to evaluate. Times are in seconds.

    Raises
    ------
    ValueError
        If a value makes no sense; the message has the field, the value and the valid range.
    """

    train_data: str | None = None
    """Recordings to fit the baselines to (folder or manifest). None: the training data that the
    model's train.json names, else each half of the evaluated clips serves the other."""
    mels: str | None = None
    """Folder of mels or features to condition on, as of `wavear train`. None: mels of the clips."""
    baseline_seconds: float = 600.0
    """Seconds of recordings to fit the baselines to."""
    clips: int = 16
    """Clips to synthesize and measure, spread evenly over the data; bits are of all clips."""
    seconds: float = 10.0
    """Longest stretch of each clip to synthesize, from its beginning."""
    quick: bool = False
    """Use ten clips, at most five seconds of each for synthesis, and measure only STOI and
    mel-cepstral distortion."""
    seed: int = 0
    """Seed of the audio and of the intervals; the same seed gives the same report."""
    temperature: float = 1.0
    """Divides the logits: 1 as trained, below 1 duller and cleaner, above 1 noisier. Bits are
    always at 1."""
    particles: int = 1
    """Streams of each clip side by side, of which those nearest to its mel continue."""
    speaker: str | int | None = None
    """Name or number of the speaker, for a model with speakers; None: by the names of folders, or
    the manifest's column."""
    engine: str = "auto"
    """auto, numba (compiled for this CPU) or reference (slow, any device): makes the audio."""
    weights: str = "float32"
    """float32; bfloat16 or int8 (numba only): rounded, for the audio only; bits are of float32."""
    threads: int | None = None
    """CPU cores to use; all by default."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    resamples: int = 2000
    """Bootstrap resamples of the clips, for the 95 % intervals."""
    shown: int = 8
    """Clips that the page shows and plays, evenly spread from the best to the worst."""
    overwrite: bool = False
    """Replace an earlier evaluation in the folder."""

    def __post_init__(self) -> None:
        at_least = {"clips": 0, "seed": 0, "particles": 1, "shown": 0, "resamples": 100}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise WavearError(f"{name} is {getattr(self, name)!r}; it must be {least} or more")
        for name in ("baseline_seconds", "seconds", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise WavearError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        if self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise WavearError(f"device is {self.device!r}; it must be cpu, cuda or mps")
        if self.threads is not None and self.threads < 1:
            raise WavearError(f"threads is {self.threads}; it must be at least 1")

    def flags(self) -> list[str]:
        """Return the command-line flags of the values that are not defaults."""
        words: list[str] = []
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value != each.default:
                words.append(f"--{each.name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
        return words
