"""The Triton engine in the interpreter: draws."""

from __future__ import annotations

from test_triton_scores import run_interpreted


def test_draws():
    run_interpreted("interpreted_triton_draws.py")
