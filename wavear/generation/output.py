"""How audio is written. No torch here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wavear.common.errors import WavearError
from wavear.common.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

# By the name of a format: the ending of the file, and the encoding of `wavear.audio.write`.
FORMATS = {
    "wav": (".wav", "pcm16"),
    "wav24": (".wav", "pcm24"),
    "wavfloat": (".wav", "float32"),
    "flac": (".flac", "pcm16"),
    "flac24": (".flac", "pcm24"),
    "ogg": (".ogg", "vorbis"),
    "opus": (".opus", "opus"),
}


@dataclass(frozen=True)
class Output:
    """How audio is written."""

    format: str | None = None
    """wav (16 bits), wav24, wavfloat, flac (16 bits), flac24, ogg (Vorbis) or opus; by default wav,
    or after the name of the file."""
    normalize: float | None = None
    """Peak of each file in dB of full scale (such as -1); by default the level is unchanged."""
    fade: float = 0.0
    """Milliseconds to fade in and out over."""

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise WavearError(f"format is {self.format!r}; it must be one of {', '.join(FORMATS)}")
        if self.normalize is not None and not -200 <= self.normalize <= 0:
            raise WavearError(f"normalize is {self.normalize!r}; it must be -200 to 0 dB")
        if not 0 <= self.fade < float("inf"):
            raise WavearError(f"fade is {self.fade!r}; it must be 0 ms or more")

    @property
    def suffix(self) -> str:
        """The ending of the files."""
        return FORMATS[self.format or "wav"][0]

    def write(self, path: Path, waveform: Tensor, sample_rate: int) -> None:
        """Write a waveform to a file, whose folder is made; samples that clip are logged."""
        from wavear import audio

        path.parent.mkdir(parents=True, exist_ok=True)
        if self.normalize is not None:
            waveform = audio.normalize_peak(waveform, self.normalize)
        waveform = audio.fade(waveform, sample_rate, self.fade) if self.fade else waveform
        encoding = None if self.format is None else FORMATS[self.format][1]
        if clipped := audio.write(path, waveform.numpy(), sample_rate, encoding):
            logger.warning("%s: %d samples are beyond full scale and were clipped", path, clipped)
