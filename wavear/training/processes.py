"""The processes of a run, from the variables of torchrun or of SLURM's srun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wavear.common.errors import WavearError

_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs with a shell, as in Lightning


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
        """Return the number of machines."""
        return self.world // self.local

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Processes:
        """Read the environment: torchrun's variables, otherwise those of srun.

        Examples
        --------
        >>> Processes.here({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}).nodes
        2
        """
        given = os.environ if environment is None else environment
        if "WORLD_SIZE" in given:
            world = _number(given, "WORLD_SIZE", 1)
            local = _number(given, "LOCAL_WORLD_SIZE", world)
            return cls(_number(given, "RANK", 0), world, local, "torchrun")
        if "SLURM_NTASKS" not in given or given.get("SLURM_JOB_NAME") in _INTERACTIVE:
            return cls()
        world, nodes = _number(given, "SLURM_NTASKS", 1), _number(given, "SLURM_NNODES", 1)
        local = _number(given, "SLURM_NTASKS_PER_NODE", 1 if world == 1 else 0)
        if world != nodes * local or not local:
            raise WavearError(
                f"SLURM has {world} tasks on {nodes} nodes with {local or 'an unknown number'} on"
                " each: set sbatch --ntasks-per-node to the same number for every node"
            )
        return cls(_number(given, "SLURM_PROCID", 0), world, local, "slurm")

    def plugins(self) -> list[Any]:
        """Return Lightning's plugin for the launcher, if it needs one."""
        if self.launcher != "slurm":
            return []
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # Lightning's own requeueing writes further states, to the directory it was started in.
        return [SLURMEnvironment(auto_requeue=False)]


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = str(given.get(name, default))
    if not text.isdecimal():
        raise WavearError(f"the environment variable {name} is {text!r}, expected a whole number")
    return int(text)
