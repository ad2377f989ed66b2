"""Evaluation of models; docs/evaluation.md has the definitions."""
