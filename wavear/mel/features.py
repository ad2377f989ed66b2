"""Frames that condition a model in place of mels: numbers (loudness, F0, a mask) or codes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavear.audio.waveforms import as_tensor
from wavear.common.errors import WavearError

_MOST = 4096  # channels that a model sees


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Settings of the features that a model is conditioned on, and that come from files.

    It stands where a `MelConfig` stands otherwise. Frame f belongs to the samples
    [f * hop, (f + 1) * hop). They cannot be computed from audio.

    Raises
    ------
    WavearError
        If a value is out of range.

    Examples
    --------
    >>> FeatureConfig(channels=1, classes=3).values(torch.tensor([[2, 0]]))
    tensor([[0., 1.],
            [0., 0.],
            [1., 0.]])
    """

    sample_rate: int = 22050
    """Rate of the audio, Hz."""
    hop_length: int = 256
    """Samples per frame."""
    channels: int = 1
    """Numbers or codes in a frame."""
    classes: int = 0
    """Codes that a channel may have, 0 to `classes` - 1, given as one-hot vectors; 0: numbers."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("sample_rate", 1000, 384_000),
            ("hop_length", 1, 2**16),
            ("channels", 1, _MOST),
            ("classes", 0, _MOST),
            ("bands", 1, _MOST),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise WavearError(
                    f"FeatureConfig: {name} is {value!r}, expected a whole number, {least} to"
                    f" {most}"
                )

    @property
    def bands(self) -> int:
        """Channels that the model sees: of codes, one for each code."""
        return self.channels * max(self.classes, 1)

    @property
    def context_frames(self) -> int:
        """Frames that computing others needs: none, they are read."""
        return 0

    @property
    def context_samples(self) -> int:
        """`context_frames` in samples."""
        return 0

    @property
    def padding(self) -> str:
        """Padding beyond the ends of a recording."""
        return "zeros"

    def to_dict(self) -> dict[str, Any]:
        """Return every field by its name, in types of JSON."""
        return dataclasses.asdict(self)

    def values(self, frames: Tensor | np.ndarray, name: str = "features") -> Tensor:
        """Return the frames as a model sees them.

        Parameters
        ----------
        frames : Tensor or array, shape (channels, F), or (F,) of one channel
            Floating point, or integers where there are `classes`; one-hot vectors (M, F), floating
            point, stay as they are.
        name : str
            What the error calls them.

        Returns
        -------
        Tensor, shape (M, F), float32, M = `bands`

        Raises
        ------
        WavearError
            Naming the shape, type or value that does not fit.
        """
        given = as_tensor(frames, name)
        given = given[None] if given.dim() == 1 else given
        if given.is_floating_point() and given.shape[:-1] == (self.bands,):
            return given.detach().float()
        wanted = f"({self.channels} channels, frames)"
        if given.dim() != 2 or len(given) != self.channels:
            raise WavearError(f"{name} has shape {tuple(given.shape)}, expected {wanted}")
        if not self.classes or given.is_floating_point() or given.dtype is torch.bool:
            kind = f"integers, 0 to {self.classes - 1}" if self.classes else "floating point"
            hint = "" if self.classes else "; for codes, state their number (--feature-classes)"
            raise WavearError(f"{name} is {given.dtype}, expected {kind}{hint}")
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < self.classes:
            raise WavearError(
                f"{name} has codes from {int(given.min())} to {int(given.max())}, the model takes 0"
                f" to {self.classes - 1}"
            )
        hot = torch.nn.functional.one_hot(given.long(), self.classes)  # (channels, F, classes)
        return hot.permute(0, 2, 1).flatten(0, 1).float()
