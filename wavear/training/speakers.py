"""Speakers of resumed and fine-tuned runs: numbers stay bound to names; speakers can be added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.models.base import AutoregressiveModel
from wavear.models.checkpoint import load, read_config
from wavear.training.config import TrainConfig
from wavear.training.optimizers import make_optimizer

logger = get_logger(__name__)

_NAMED = 8  # speakers in a message


def bound(record: dict[str, Any], names: Sequence[str], config: TrainConfig) -> list[str]:
    """Return the names in the order of their numbers: those of the run first, added ones after.

    Parameters
    ----------
    record : dict
        train.json of the run that is resumed. Its model gets the number of speakers.
    names : sequence of str
        The speakers of the data.
    config : TrainConfig

    Raises
    ------
    WavearError
        If the names differ from those of the run, and `extend_speakers` is not set.
    """
    before = record.get("data", {}).get("speakers", [])
    missing = [name for name in before if name not in set(names)]
    new = [name for name in names if name not in set(before)]
    if not before or not names or not (missing or new):
        return list(before if before and names else names)
    both = (("missing", missing), ("new", new))
    changes = "; ".join(f"{title}: {_some(some)}" for title, some in both if some)
    if not config.extend_speakers:
        raise WavearError(
            f"{config.out} was trained on other speakers than {config.data} has ({changes})."
            " Restore the names, or pass --extend-speakers: then the speakers of the run keep their"
            " numbers, and new ones get the next numbers."
        )
    logger.warning(f"speakers {changes}: the others keep their numbers")
    record["model"] = record["model"] | {"speakers": len(before) + len(new)}
    return [*before, *new]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def extend_state(
    state: dict[str, Any], record: dict[str, Any], model: AutoregressiveModel, config: TrainConfig
) -> None:
    """Add rows for new speakers to a training state, in place; the others stay as they are.

    A new speaker begins as the mean of the others, without moments of the optimizer. The points of
    the curve are no longer compared with, since the best model so far lacks the new speakers.
    """
    key, weight = _embedding(model)
    if weight is None:
        return
    old = len(state["state_dict"][f"model.{key}"])
    added = len(weight) - old
    if added <= 0:
        return
    if config.max_steps is not None and state["global_step"] >= config.max_steps:
        raise WavearError(
            f"{config.out} has taken all of its {config.max_steps} steps: raise --max-steps to"
            f" train on {added} more speakers"
        )
    for owner in ("model", "average"):
        rows = state["state_dict"][f"{owner}.{key}"]
        state["state_dict"][f"{owner}.{key}"] = _more_rows(rows, added)
    optimizer, _ = make_optimizer(model, config)
    saved = state["optimizer_states"][0]
    parts = zip(getattr(optimizer, "parts", [optimizer]), saved.get("parts", [saved]), strict=True)
    for part, part_state in parts:
        parameters = [p for group in part.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            if parameter is weight:
                moments = part_state["state"].get(number, {})
                for name, moment in moments.items():
                    if moment.dim() == 2:
                        moments[name] = torch.cat(
                            [moment, moment.new_zeros(added, moment.shape[1])]
                        )
    record["history"] = [entry | {"held_out": ""} for entry in record["history"]]


def named_speakers(checkpoint: str) -> list[str]:
    """Return the names of a checkpoint's speakers, in the order of their numbers.

    Raises
    ------
    WavearError
        If it has speakers without names.
    """
    saved = read_config(checkpoint)
    names = saved.get("training", {}).get("speakers", [])
    if len(names) != (count := saved["config"].get("speakers", 0)):
        raise WavearError(
            f"{checkpoint} has {count} speakers without names: train on them from the beginning"
        )
    return list(names)


def start_state(checkpoint: str, model: AutoregressiveModel) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, with rows for the speakers that `model` adds to it.

    A new speaker begins as the mean of the others, so all old ones sound as before. Where there
    were none, each begins as zeros: as the voice of the checkpoint.
    """
    state = load(checkpoint).float().state_dict()
    key, weight = _embedding(model)
    if weight is not None:
        rows = state.get(key)
        added = len(weight) - (0 if rows is None else len(rows))
        state[key] = torch.zeros_like(weight) if rows is None else _more_rows(rows, added)
    return state


def _embedding(model: AutoregressiveModel) -> tuple[str, torch.Tensor | None]:
    """Return name and rows of the speakers' vectors; None without speakers."""
    embedding = getattr(model.conditioning, "speakers", None)
    if embedding is None:
        return "", None
    weight = embedding.weight
    return next(name for name, p in model.named_parameters() if p is weight), weight


def _more_rows(rows: torch.Tensor, added: int) -> torch.Tensor:
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(added, -1)])
