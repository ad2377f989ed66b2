"""The Triton engine in the interpreter: draws."""

from __future__ import annotations

import pytest
from test_triton_scores import run_interpreted


@pytest.mark.slow
def test_draws():
    run_interpreted("interpreted_triton_draws.py")
