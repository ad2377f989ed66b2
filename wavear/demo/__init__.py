"""`wavear demo`: train a small model on sounds made here."""

from wavear.demo.job import VALUES, DemoResult, run, write_notes

__all__ = ["VALUES", "DemoResult", "run", "write_notes"]
