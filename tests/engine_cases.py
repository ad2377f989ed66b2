"""Small models of every family with a compiled engine, and inputs to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import test_predictive
import torch

from wavear import GRU, GRUConfig, Transformer, TransformerConfig, WaveNet, WaveNetConfig
from wavear.generation.cpu.gru import NumbaGRUEngine
from wavear.generation.cpu.predictive import NumbaPredictiveEngine
from wavear.generation.cpu.transformer import NumbaTransformer
from wavear.generation.cpu.wavenet import NumbaEngine

WEIGHTS = ["float32", "bfloat16", "int8"]


@torch.no_grad()
def scaled(model: Any, **gains: float) -> Any:
    """Scale parameters by `gains`, by name prefix, so that logits vary as in a trained model."""
    for name, parameter in model.named_parameters():
        for part, gain in gains.items():
            if name.startswith(part):
                parameter.mul_(gain)
    return model.eval()


def make_wavenet(gain: float = 2.0, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    base = {"layers": 4, "stacks": 2, "residual_channels": 16, "skip_channels": 32}
    return scaled(WaveNet(WaveNetConfig(**{**base, **config})), blocks=gain, head=gain)


def make_gru(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    base = {"layers": 2, "channels": 24, "head_channels": 20, "input_channels": 10}
    large = 4.0 if config.get("law", "categorical") == "categorical" else 1.0
    return scaled(GRU(GRUConfig(**{**base, **config})), gru=1.5, head=large)


def make_transformer(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    base = {"layers": 2, "channels": 24, "heads": 3, "window": 7, "patch": 4, "head_channels": 24}
    model = Transformer(TransformerConfig(**{**base, **config})).eval()
    with torch.no_grad():
        if model.config.law == "categorical":
            model.head.out.weight *= 4
        if model.head.place is not None:
            model.head.place.weight.normal_()
    return model


def make_predictive(seed: int = 0, **config: Any) -> Any:
    return test_predictive.make(test_predictive.small(**config), torch.float32, seed)


@dataclass(frozen=True)
class Case:
    engine: Any
    make: Callable[..., Any]
    tolerance: float
    """In nats. Sums of some hundred float32 products round to about 1e-6 of their size."""


WAVENET = Case(NumbaEngine, make_wavenet, 1e-4)
GRU_CASE = Case(NumbaGRUEngine, make_gru, 1e-4)
TRANSFORMER = Case(NumbaTransformer, make_transformer, 1e-4)
PREDICTIVE = Case(NumbaPredictiveEngine, make_predictive, 2e-5)


def tolerance(case: Case, weights: str) -> float:
    """Return that of a case in nats; a WaveNet in int8 rounds what its matrices read.

    Where that lies between two of 65535 steps, another order of sums selects another of them. The
    reference in float32 differs as much from itself in float64.
    """
    return 2e-2 if case is WAVENET and weights == "int8" else case.tolerance


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "wavenet": (WAVENET, {}),
    "wavenet, odd": (
        WAVENET,
        {"kernel_size": 3, "residual_channels": 37, "layers": 6, "stacks": 1, "speakers": 2},
    ),
    "gru": (GRU_CASE, {"layers": 1, "channels": 37, "speakers": 2}),
    "gru, many classes": (GRU_CASE, {"classes": 5000, "layers": 3}),
    "gru, mixture": (
        GRU_CASE,
        {"law": "logistic_mixture", "mixtures": 3, "coarse_classes": 20, "speakers": 2},
    ),
    "transformer": (TRANSFORMER, {"speakers": 3}),
    "predictive": (PREDICTIVE, {"causal": True, "speakers": 3}),
}


def conditioning(model: Any, batch: int, samples: int, constant: bool = False) -> Any:
    if not model.conditioned:
        return None
    if model.config.mel is not None:
        frames = -(-samples // model.config.mel.hop_length)
        with torch.no_grad():
            return test_predictive.conditioning(model, batch, frames)[:, :, :samples]
    generator = torch.Generator().manual_seed(0)
    shape = batch, model.config.conditioning_channels, 1 if constant else samples
    return torch.randn(*shape, generator=generator)


def piece(cond: Any, start: int, stop: int, rows: Any = None) -> Any:
    """Return samples `start` to `stop` of the conditioning of some streams."""
    if cond is None:
        return None
    if rows is not None:
        cond = cond[torch.as_tensor(rows), :, :]
    return cond if cond.shape[2] == 1 else cond[:, :, start:stop]


def random_codes(model: Any, batch: int, samples: int, seed: int = 0) -> np.ndarray:
    """Draw any codes, or codes near silence for densities, which are near zero elsewhere."""
    classes = model.config.classes
    generator = np.random.default_rng(seed)
    if model.config.law == "categorical":
        return generator.integers(0, classes, (batch, samples))
    levels = generator.normal(0, 0.05, (batch, samples))
    return np.clip(np.round(levels * classes / 2).astype(np.int64) + classes // 2, 0, classes - 1)


def random_uniforms(batch: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, samples))


@torch.inference_mode()
def parallel(model: Any, codes: np.ndarray, cond: Any) -> np.ndarray:
    """Return the log-probabilities (B, T) that the model's forward pass gives codes."""
    given = torch.from_numpy(codes)
    if isinstance(cond, torch.Tensor):
        cond = cond.expand(-1, -1, codes.shape[1])
    return model.law.log_prob(model(given, cond).double(), given).numpy()


def scored_in_parts(engine: Any, codes: np.ndarray, cond: Any, cuts: Sequence[int]) -> np.ndarray:
    parts = [engine.score(codes[:, a:b], piece(cond, a, b)) for a, b in pairwise(cuts)]
    return np.concatenate(parts, axis=1)


def assert_codes_follow(
    model: Any, codes: np.ndarray, uniforms: np.ndarray, cond: Any, tolerance: float = 1e-5
) -> None:
    """Check that each uniform selects its code under `forward`, or lies near a code boundary.

    Rounding moves a boundary by about 1e-7.
    """
    with torch.inference_mode():
        logits = model(torch.from_numpy(codes), cond).double()
    law = torch.softmax(logits, dim=1).cumsum(dim=1).numpy()
    upper = np.take_along_axis(law, codes[:, None], axis=1)[:, 0]
    lower = np.take_along_axis(law, np.maximum(codes - 1, 0)[:, None], axis=1)[:, 0] * (codes > 0)
    assert (uniforms >= lower - tolerance).all()
    assert (uniforms < upper + tolerance).all()
