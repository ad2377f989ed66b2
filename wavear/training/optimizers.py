"""The optimizers: AdamW for all weights, or Muon for the matrices of a network's body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from wavear.common.errors import WavearError
from wavear.models.base import AutoregressiveModel
from wavear.models.inputs import CodeEmbedding, ValueEmbedding
from wavear.training.config import OptimizerSettings

BETAS = (0.9, 0.99)  # of AdamW
MOMENTUM = 0.95  # of Muon


class Both(torch.optim.Optimizer):
    """Steps several optimizers, each with its own parameters, as one.

    Lightning counts the steps of every optimizer in `global_step`, which counts the steps of a run:
    so a run has one optimizer. `param_groups` are the groups of all parts, in order; changes to a
    group reach its part.

    Examples
    --------
    >>> a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    >>> both = Both(torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25))
    >>> (a.sum() + b.sum()).backward()
    >>> both.step()
    >>> a.tolist(), b.tolist()
    ([0.5, 0.5], [0.75, 0.75])
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._gather()

    def _gather(self) -> None:
        """Show the groups and the state of the parts: the same objects, not copies."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state.clear()
        for part in self.parts:
            self.state.update(part.state)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step with each part; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return {"parts": [state of each part]}."""
        return {"parts": [part.state_dict() for part in self.parts]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if len(states := state_dict.get("parts", [])) != len(self.parts):
            count = len(states) or "one"
            raise WavearError(f"the state is of {count} and not of {len(self.parts)} optimizers")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._gather()


def body_matrices(model: AutoregressiveModel) -> list[torch.Tensor]:
    """Return the weights that Muon steps: matrices from hidden channels to hidden channels.

    A model may name them itself, in a method `muon_parameters()`. By default they are the weights
    of all `nn.Linear` except those of the input (`CodeEmbedding`, `ValueEmbedding`), of the
    conditioning network (`model.conditioning`) and of the output (the last `nn.Linear`). Muon gives
    an update the same size in all directions, which suits a product of matrices; AdamW suits rows
    of an embedding and logits, which are used one by one.
    """
    if (own := getattr(model, "muon_parameters", None)) is not None:
        return list(own())
    inputs = [m for m in model.modules() if isinstance(m, CodeEmbedding | ValueEmbedding)]
    ends = [*inputs, *([] if model.conditioning is None else [model.conditioning])]
    excluded = {module for end in ends for module in end.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in excluded]
    return [module.weight for module in linear[:-1]]


def make_optimizer(
    model: AutoregressiveModel, config: OptimizerSettings
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Return the optimizer of a run and the highest learning rate of each of its `param_groups`."""
    body = body_matrices(model) if config.optimizer == "muon" else []
    ids = {id(p) for p in body}
    rest = [p for p in model.parameters() if id(p) not in ids]
    peak, decay = config.learning_rate, config.weight_decay
    assert peak is not None
    assert decay is not None
    # Weight decay pulls on matrices, not on biases.
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = rest[0].device.type == "cuda"
    adamw = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=fused)
    peaks = [peak] * len(groups)
    if not body:
        return adamw, peaks
    # Scaled to the size of AdamW's updates (Liu et al., 2025, arXiv:2502.16982), so that weight
    # decay means the same.
    muon = torch.optim.Muon(
        body,
        lr=config.muon_learning_rate,
        weight_decay=decay,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return Both(muon, adamw), [config.muon_learning_rate, *peaks]


def described(model: AutoregressiveModel, config: OptimizerSettings) -> str:
    """Return the text about the optimizer that a run prints."""
    if config.optimizer == "adamw":
        return f"AdamW, learning rate {config.learning_rate:g}"
    body = body_matrices(model)
    share = sum(p.numel() for p in body) / sum(p.numel() for p in model.parameters())
    return (
        f"Muon for {len(body)} matrices ({share:.0%} of the weights), learning rate"
        f" {config.muon_learning_rate:g}; AdamW for the rest, {config.learning_rate:g}"
    )
