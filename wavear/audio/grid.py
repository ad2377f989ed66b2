"""The grid that waveforms are quantised to: codes, the sample value of each, and the interval that it stands for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch

from wavear.audio.mulaw import MAX_CLASSES, mulaw_decode, mulaw_encode, silence_code

Kind = Literal["mulaw", "linear"]


@dataclass(frozen=True)
class Grid:
    """Waveforms in [-1, 1] to codes in [0, Q) and back.

    "mulaw": `wavear.audio.mulaw`, steps that grow with the level. "linear": even steps, code c is
    (c - Q/2) / (Q/2) (with 65536 codes those of 16-bit PCM: code Q/2 is exactly 0, and 1.0 becomes
    the last code, 1 - 2/Q). Each code stands for the samples that are rounded to it: an interval;
    the first and the last one are open.

    Examples
    --------
    >>> Grid("linear", 65536).encode(torch.tensor([-1.0, 0.0, 1 / 32768, 1.0]))
    tensor([    0, 32768, 32769, 65535])
    >>> Grid("mulaw", 256).silence
    128
    """

    kind: Kind
    classes: int
    """Codes Q: 2 to 65536; for a linear grid an even number."""

    def __post_init__(self) -> None:
        if self.kind not in ("mulaw", "linear"):
            raise ValueError(f"the grid is {self.kind!r}, it must be mulaw or linear")
        if (
            isinstance(self.classes, bool)
            or not isinstance(self.classes, int)
            or not 2 <= self.classes <= MAX_CLASSES
        ):
            raise ValueError(f"classes is {self.classes!r}, it must be 2 to {MAX_CLASSES}")
        if self.kind == "linear" and self.classes % 2:
            raise ValueError(
                f"classes is {self.classes}, a linear grid needs an even number: 0 lies in the middle"
            )

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
        """log2 of the number of codes of a finer grid in each code's interval, (Q,); None if one has none.

        Given a code, each of them is as likely as another, to who knows no more: so a law of bits b
        over these codes is one of b + refinement over the finer ones, and laws of different grids
        are measured in one unit.

        Examples
        --------
        >>> Grid("linear", 256).refinement(Grid("linear", 65536)).tolist()[:3]
        [7.0, 8.0, 8.0]
        """
        counts = np.bincount(
            self.encode(torch.from_numpy(finer.values().copy())).numpy(), minlength=self.classes
        )
        return np.log2(counts) if (counts > 0).all() else None

    def spans(self, coarser: Grid) -> np.ndarray | None:
        """Which codes become each code of a coarser grid: the first and the last, (2, coarser Q), int64.

        A code becomes that which its sample value is rounded to. As both grids rise with the
        sample, the codes that become one lie side by side: their probability is F(upper end of the
        last) - F(lower end of the first). None if nothing becomes one of the coarser codes, so that
        the other grid is finer there.

        Examples
        --------
        >>> Grid("linear", 65536).spans(Grid("mulaw", 256))[:, 128]  # silence: 16-bit values from 0 to 5
        array([32768, 32773])
        """
        return _spans(self, coarser)

    @overload
    def encode(self, waveform: torch.Tensor) -> torch.Tensor: ...
    @overload
    def encode(self, waveform: np.ndarray) -> np.ndarray: ...
    def encode(self, waveform: Any) -> Any:
        """Waveform of any shape, floating point in [-1, 1], to int64 codes of that shape; what lies outside is clamped.

        Raises
        ------
        ValueError
            If `waveform` is not floating point or holds NaN.
        """
        if self.kind == "mulaw":
            return mulaw_encode(waveform, self.classes)
        if not isinstance(waveform, torch.Tensor):
            return self.encode(torch.from_numpy(np.asarray(waveform))).numpy()
        if not waveform.is_floating_point():
            raise ValueError(
                f"waveform is {waveform.dtype}, expected floating point in [-1, 1] (16-bit PCM: / 32768)"
            )
        if torch.isnan(waveform).any():
            raise ValueError("waveform holds NaN, which has no code")
        half = self.classes // 2
        x = waveform.detach().to(torch.promote_types(waveform.dtype, torch.float32)).clamp(-1, 1)
        return (torch.floor(x * half + 0.5).to(torch.int64) + half).clamp(
            max=self.classes - 1
        )  # halves up, as mu-law

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of any values, as `encode` has them, without a look at the values: a CUDA graph can capture it."""
        if self.kind == "linear":
            half = self.classes // 2
            return (torch.floor(values * half + 0.5).clamp(-half, half - 1) + half).to(torch.int64)
        return torch.bucketize(values, _inner_edges(self, values.device, values.dtype), right=True)

    @overload
    def decode(self, codes: torch.Tensor) -> torch.Tensor: ...
    @overload
    def decode(self, codes: np.ndarray) -> np.ndarray: ...
    def decode(self, codes: Any) -> Any:
        """Integer codes of any shape to the samples they stand for, float32 in [-1, 1]; `encode` gives the codes back.

        Raises
        ------
        ValueError
            If `codes` are not integers in [0, Q).
        """
        if self.kind == "mulaw":
            return mulaw_decode(codes, self.classes)
        if not isinstance(codes, torch.Tensor):
            return self.decode(torch.from_numpy(np.asarray(codes))).numpy()
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes are {codes.dtype}, expected integers in [0, {self.classes})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.classes:
            raise ValueError(
                f"codes reach from {int(codes.min())} to {int(codes.max())}, outside [0, {self.classes})"
            )
        half = self.classes // 2
        return (codes.to(torch.int64) - half).to(torch.float32) / half

    def values(self) -> np.ndarray:
        """The sample of each code, (Q,), float64."""
        return _values(self)

    def edges(self) -> np.ndarray:
        """Where the intervals of the codes meet, (Q + 1,), float64, rising: -inf, ..., inf.

        Half way between neighbours: of a mu-law grid as its curve sees it, which is where `encode`
        rounds.

        Examples
        --------
        >>> Grid("linear", 4).edges().tolist()
        [-inf, -0.75, -0.25, 0.25, inf]
        """
        return _edges(self)


COMMON_GRIDS = {"linear": Grid("linear", 65536), "mulaw": Grid("mulaw", 256)}
"""Grids that models of different codes are compared on: 16-bit samples, and 256 mu-law codes."""


@functools.lru_cache(maxsize=8)
def _values(grid: Grid) -> np.ndarray:
    half = grid.classes // 2
    codes = np.arange(grid.classes)
    found = (
        mulaw_decode(codes, grid.classes).astype(np.float64)
        if grid.kind == "mulaw"
        else (codes - half) / half
    )
    found.flags.writeable = False
    return found


@functools.lru_cache(maxsize=8)
def _spans(grid: Grid, coarser: Grid) -> np.ndarray | None:
    found = coarser.encode(grid.values().copy())
    every = np.arange(coarser.classes)
    spans = np.stack(
        [np.searchsorted(found, every), np.searchsorted(found, every, side="right") - 1]
    )
    spans.flags.writeable = False
    return spans if (spans[0] <= spans[1]).all() else None


@functools.lru_cache(maxsize=8)
def _edges(grid: Grid) -> np.ndarray:
    steps = np.arange(1, grid.classes) - 0.5
    if grid.kind == "linear":
        inner = (steps - grid.classes // 2) / (grid.classes // 2)
    else:
        mu = grid.classes - 1
        y = steps / mu * 2 - 1
        inner = np.sign(y) * np.expm1(np.abs(y) * np.log1p(mu)) / mu
    found = np.concatenate([[-np.inf], inner, [np.inf]])
    found.flags.writeable = False
    return found


@functools.cache  # captured graphs read them by address
def _inner_edges(grid: Grid, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(grid.edges()[1:-1].copy()).to(device, dtype)
