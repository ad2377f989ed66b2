"""The contract of an engine, which every way of running a model keeps."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor


class Engine(Protocol):
    """Runs `batch` streams of a model; each call continues where the last one ended."""

    def generate(
        self,
        uniforms: np.ndarray,
        cond: Tensor | None,
        temperature: float | np.ndarray = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        log_probability: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw the next samples of every stream.

        Parameters
        ----------
        uniforms : ndarray of float64 in [0, 1), shape (B, n)
        cond : Tensor, shape (B, C, n) or (B, C, 1), or None
        temperature : float, or ndarray of shape (B, n)
        top_k, top_p : optional
            See `wavear.models.sampling`; for a categorical distribution.
        log_probability : ndarray of float64, shape (B, n), optional
            Filled with that of each code, in nats, under the model's own distribution, without
            temperature and truncation.

        Returns
        -------
        ndarray of int64, shape (B, n): codes

        Raises
        ------
        ValueError
            If a shape does not fit, or the network's values become infinite or NaN.
        """
        ...

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """Return log-probabilities (B, n), in nats, of codes (B, n)."""
        ...

    def state(self, stream: int) -> dict[str, Tensor]:
        """Return the state from which any engine can resume one stream: copies, on the CPU.

        `previous` (1,), the code of the sample before, and the model's `export_state`, without the
        batch axis.
        """
        ...

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """Resume one stream from the `state` of any engine."""
        ...

    def copy_streams(self, sources: list[int], targets: list[int]) -> None:
        """Replace the states of streams by those of others; no target is also a source."""
        for source, target in zip(sources, targets, strict=True):
            self.load_state(target, self.state(source))

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """Move one stream past codes (n,) in parallel, as `score` does one by one.

        The conditioning is (1, C, n), (1, C, 1) or None.
        """
        ...

    def resized(self, batch: int) -> Engine:
        """Return such an engine for `batch` new streams, which shares its packed weights."""
        ...
