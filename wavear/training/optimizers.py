"""Optimizers: AdamW, or Muon for the matrices inside a network with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wavear.models.base import AutoregressiveModel

_BETAS = (0.9, 0.99)
_MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer: a step of both is one step.

    Muon orthogonalises the momentum of a matrix (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    Parameters
    ----------
    muon, adamw : Optimizer
        Of parameters that are not the other's.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(model: AutoregressiveModel, config: Any, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer that `config.optimizer` names; each group's "peak" is its highest learning rate.

    Weight decay pulls on matrices, not on biases.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    inside = model.muon_parameters() if config.optimizer == "muon" else []
    chosen = {id(p) for p in inside}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    made: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=fused)
    for group in made.param_groups:
        group["peak"] = config.learning_rate
    if inside:
        muon = torch.optim.Muon(
            inside,
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            momentum=_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",  # so that its learning rate means what AdamW's does
        )
        for group in muon.param_groups:
            group["peak"] = config.muon_learning_rate
        made = MuonWithAdamW(muon, made)
    return made
