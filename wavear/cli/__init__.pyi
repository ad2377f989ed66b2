from .commands import main
from .training import recipe, run_training

__all__ = ["main", "recipe", "run_training"]
