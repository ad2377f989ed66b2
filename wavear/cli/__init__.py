"""The command line."""

from wavear.cli.commands import main, recipe, run_training

__all__ = ["main", "recipe", "run_training"]
