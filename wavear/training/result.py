"""The outcome of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run. Bits are per sample; those of the curve are of the same held-out files."""

    bits_before: float
    """Bits of the model at its first step."""
    bits_best: float
    """The least on the curve."""
    bits_final: float
    """The last on the curve."""
    held_out: dict[str, float]
    """On all held-out files (up to `final_seconds`): "model" (that of `best`), "uniform",
    "unigram", "markov"."""
    steps: int
    seconds: float
    """Duration of training and validations, including resumed runs."""
    stopped_by: str
    """"steps", "time" or "interrupt"; "fit" for a linear model, fitted in closed form."""
    best: Path
    """Checkpoint directory; that of `last` if the run was stopped before its first validation."""
    last: Path
    """Checkpoint directory."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that could not be used, and why."""
