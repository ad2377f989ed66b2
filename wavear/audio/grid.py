"""The grid that waveforms are quantised to: codes, their sample values, and their intervals."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wavear.audio.mulaw import (
    MAX_CLASSES,
    check_codes,
    check_waveform,
    mulaw_decode,
    mulaw_encode,
    silence_code,
)
from wavear.audio.waveforms import Waveform, as_tensor
from wavear.common.errors import WavearError

Kind = Literal["mulaw", "linear"]
_cached = functools.lru_cache(maxsize=8)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False  # cached, so shared
    return array


@dataclass(frozen=True)
class Grid:
    """Quantise waveforms in [-1, 1] to codes in [0, Q) and back.

    "mulaw": `wavear.audio.mulaw`, steps that grow with the level. "linear": even steps, code c is
    (c - Q/2) / (Q/2); with 65536 codes, 16-bit PCM: code Q/2 is exactly 0, and 1.0 becomes the last
    code, 1 - 2/Q. Each code represents the interval of samples that are rounded to it; the first
    and the last interval are unbounded.

    Raises
    ------
    WavearError
        If the kind is unknown or the number of classes is out of range.

    Examples
    --------
    >>> Grid("linear", 65536).encode(torch.tensor([-1.0, 0.0, 1 / 32768, 1.0]))
    tensor([    0, 32768, 32769, 65535])
    >>> Grid("mulaw", 256).silence
    128
    """

    kind: Kind
    classes: int
    """Number of codes Q, 2 to 65536; even for a linear grid."""

    def __post_init__(self) -> None:
        if self.kind not in ("mulaw", "linear"):
            raise WavearError(f"the grid is {self.kind!r}, it must be mulaw or linear")
        integer = isinstance(self.classes, int) and not isinstance(self.classes, bool)
        if not integer or not 2 <= self.classes <= MAX_CLASSES:
            raise WavearError(f"classes is {self.classes!r}, it must be 2 to {MAX_CLASSES}")
        if self.kind == "linear" and self.classes % 2:
            raise WavearError(f"classes is {self.classes}, a linear grid needs an even number")

    def __str__(self) -> str:
        if self.kind == "linear" and self.classes & (self.classes - 1) == 0:
            return f"{self.classes.bit_length() - 1}-bit linear"
        return f"{self.classes} {'mu-law codes' if self.kind == 'mulaw' else 'linear values'}"

    @property
    def silence(self) -> int:
        """The code of a zero sample."""
        return silence_code(self.classes)

    @property
    def finest(self) -> float:
        """The smallest step between two codes, at silence."""
        mu = self.classes - 1
        return 2 / self.classes if self.kind == "linear" else 2 / mu * float(np.log1p(mu)) / mu

    def refinement(self, finer: Grid) -> np.ndarray | None:
        """Return log2 of the number of codes of a finer grid in each code's interval, (Q,).

        Given a code, its finer codes are taken as equally likely: a distribution with b bits on
        this grid has b + refinement bits on the finer one, so that distributions on different grids
        can be compared. None if an interval holds no finer code.

        Examples
        --------
        >>> Grid("linear", 256).refinement(Grid("linear", 65536)).tolist()[:3]
        [7.0, 8.0, 8.0]
        """
        counts = np.bincount(self.encode(finer.values()), minlength=self.classes)
        return np.log2(counts) if (counts > 0).all() else None

    @_cached
    def spans(self, coarser: Grid) -> np.ndarray | None:
        """Return the first and the last code that become each coarser code, (2, coarser Q), int64.

        A code becomes the coarser code that its sample value is rounded to. Both grids rise with
        the sample, so the codes that become one are adjacent, and their probability is F(upper end
        of the last) - F(lower end of the first). None if a coarser code receives no code: the other
        grid is finer there.

        Examples
        --------
        >>> Grid("linear", 65536).spans(Grid("mulaw", 256))[:, 128]  # silence: 16-bit values 0 to 5
        array([32768, 32773])
        """
        found, every = coarser.encode(self.values()), np.arange(coarser.classes)
        ends = [np.searchsorted(found, every), np.searchsorted(found, every, side="right") - 1]
        return _frozen(np.stack(ends)) if (ends[0] <= ends[1]).all() else None

    def encode(self, waveform: Waveform) -> Waveform:
        """Encode a floating-point waveform of any shape as int64 codes; clamp it to [-1, 1].

        Raises
        ------
        WavearError
            If `waveform` is not floating point or holds NaN.
        """
        if self.kind == "mulaw":
            return mulaw_encode(waveform, self.classes)
        if not isinstance(waveform, Tensor):
            return self.encode(as_tensor(waveform, "waveform")).numpy()
        return self.nearest(check_waveform(waveform))

    def nearest(self, values: Tensor) -> Tensor:
        """Return the codes of `encode` without checking the values, for capture in CUDA graphs."""
        if self.kind == "linear":  # halves up, as mu-law
            half = self.classes // 2
            return (torch.floor(values * half + 0.5).clamp(-half, half - 1) + half).to(torch.int64)
        return torch.bucketize(values, _inner_edges(self, values.device, values.dtype), right=True)

    def decode(self, codes: Waveform) -> Waveform:
        """Decode integer codes of any shape to float32 samples; `encode` returns the same codes.

        Raises
        ------
        WavearError
            If `codes` are not integers in [0, Q).
        """
        if self.kind == "mulaw":
            return mulaw_decode(codes, self.classes)
        if not isinstance(codes, Tensor):
            return self.decode(as_tensor(codes, "codes")).numpy()
        half = self.classes // 2
        return (check_codes(codes, self.classes) - half).to(torch.float32) / half

    @_cached
    def values(self) -> np.ndarray:
        """Return the sample of each code, (Q,), float64."""
        codes, half = np.arange(self.classes), self.classes // 2
        if self.kind == "linear":  # in float64: decode rounds to float32
            return _frozen((codes - half) / half)
        return _frozen(self.decode(codes).astype(np.float64))

    @_cached
    def edges(self) -> np.ndarray:
        """Return the bounds of the codes' intervals, (Q + 1,), float64, rising: -inf, ..., inf.

        They lie half way between neighbours, for a mu-law grid on the companded scale, which is
        where `encode` rounds.

        Examples
        --------
        >>> Grid("linear", 4).edges().tolist()
        [-inf, -0.75, -0.25, 0.25, inf]
        """
        steps = np.arange(1, self.classes) - 0.5
        if self.kind == "linear":
            inner = (steps - self.classes // 2) / (self.classes // 2)
        else:
            mu = self.classes - 1
            y = steps / mu * 2 - 1
            inner = np.sign(y) * np.expm1(np.abs(y) * np.log1p(mu)) / mu
        return _frozen(np.concatenate([[-np.inf], inner, [np.inf]]))


COMMON_GRIDS = {"linear": Grid("linear", 65536), "mulaw": Grid("mulaw", 256)}
"""Grids on which models of different codes are compared: 16-bit samples, and 256 mu-law codes."""


@functools.cache  # captured graphs read them by address
def _inner_edges(grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(grid.edges()[1:-1].copy()).to(device, dtype)
