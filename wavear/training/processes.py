"""How many processes a run has, and which of them this one is: torchrun's variables, else those of SLURM's srun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INTERACTIVE = (
    "bash",
    "interactive",
)  # names of SLURM jobs that somebody types in, as Lightning knows them


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run."""

    rank: int = 0
    """Number of this process, over all nodes; process 0 writes."""
    world: int = 1
    """Processes, over all nodes."""
    local: int = 1
    """Processes on each node."""
    launcher: str = "none"
    """ "torchrun", "slurm" or "none"."""

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world // self.local

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Processes:
        """As the environment says.

        Under srun that is SLURM_PROCID, SLURM_NTASKS and SLURM_NTASKS_PER_NODE (or SLURM_NNODES);
        where torchrun was started by srun, torchrun's variables count.

        Raises
        ------
        ValueError
            If the variables are no numbers, or the tasks do not divide evenly among the nodes.

        Examples
        --------
        >>> Processes.here({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}).nodes
        2
        """
        given = os.environ if environment is None else environment
        if "WORLD_SIZE" in given:
            world = _number(given, "WORLD_SIZE", 1)
            return cls(
                _number(given, "RANK", 0),
                world,
                _number(given, "LOCAL_WORLD_SIZE", world),
                "torchrun",
            )
        if "SLURM_NTASKS" not in given or given.get("SLURM_JOB_NAME") in _INTERACTIVE:
            return cls()
        world, nodes = _number(given, "SLURM_NTASKS", 1), _number(given, "SLURM_NNODES", 1)
        local = _number(given, "SLURM_NTASKS_PER_NODE", 0)
        if world > 1 and not local:
            raise ValueError(
                f"SLURM has {world} tasks: give sbatch --ntasks-per-node, so that each node has as many"
            )
        local = local or 1
        if world != nodes * local:
            raise ValueError(
                f"SLURM has {world} tasks on {nodes} nodes with {local} on each: these do not agree"
            )
        return cls(_number(given, "SLURM_PROCID", 0), world, local, "slurm")

    def plugins(self) -> list[Any]:
        """What tells Lightning the same."""
        if self.launcher != "slurm":
            return []
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # Without Lightning's own requeueing, which writes states of its own to the directory it was
        # started in.
        return [SLURMEnvironment(auto_requeue=False)]


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name, default)
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"the environment variable {name} is {text!r}, expected a whole number")
    return value
