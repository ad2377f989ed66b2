"""The reference engine: the plain loop over `model.step`, which defines the correct result."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wavear.generation.checks import non_finite
from wavear.generation.engine import Engine
from wavear.models.base import AutoregressiveModel


class ReferenceEngine(Engine):
    """Steps any autoregressive model, one stream after the other, on the model's device.

    Streams do not share a step, because a matrix product rounds differently over two rows than over
    one: so the audio of a stream does not depend on its batch.
    """

    def __init__(self, model: AutoregressiveModel, batch: int):
        self.model = model
        self.device = next(model.parameters()).device
        self.states = [model.init_state(1) for _ in range(batch)]
        self.previous = [
            torch.full((1,), model.start_code, device=self.device) for _ in range(batch)
        ]

    def generate(
        self,
        uniforms: np.ndarray,
        cond: Tensor | None,
        temperature: float | np.ndarray = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        log_probability: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `Engine.generate`."""
        codes = np.empty(uniforms.shape, dtype=np.int64)
        draws = torch.from_numpy(uniforms).to(self.device)
        temperatures = np.broadcast_to(np.asarray(temperature, dtype=np.float64), uniforms.shape)
        law = self.model.law
        for b, t in np.ndindex(*codes.shape):
            parameters = self._step(b, t, cond)
            self.previous[b] = law.sample(
                parameters, draws[b, t : t + 1], float(temperatures[b, t]), top_k, top_p
            )
            codes[b, t] = self.previous[b].item()
            if log_probability is not None:
                log_probability[b, t] = self._nats(parameters, self.previous[b])
        return codes

    def score(self, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
        """See `Engine.score`."""
        scores = np.empty(codes.shape)
        given = torch.from_numpy(codes).to(self.device)
        for b, t in np.ndindex(*codes.shape):
            parameters = self._step(b, t, cond)
            self.previous[b] = given[b, t : t + 1]
            scores[b, t] = self._nats(parameters, self.previous[b])
        return scores

    def _nats(self, parameters: Tensor, code: Tensor) -> float:
        return self.model.law.log_prob(parameters.double()[..., None], code[:, None]).item()

    def _step(self, b: int, t: int, cond: Tensor | None) -> Tensor:
        cond_t = None if cond is None else cond[b : b + 1, :, t if cond.shape[2] > 1 else 0]
        parameters = self.model.step(self.previous[b], self.states[b], cond_t)
        if not torch.isfinite(parameters).all():
            raise non_finite(t)
        return parameters

    def state(self, stream: int) -> dict[str, Tensor]:
        """See `Engine.state`."""
        tensors = self.model.export_state(self.states[stream])
        return {
            "previous": self.previous[stream].cpu(),
            **{name: value[0].cpu() for name, value in tensors.items()},
        }

    def load_state(self, stream: int, state: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        tensors = {name: value[None] for name, value in state.items() if name != "previous"}
        self.states[stream] = self.model.import_state(tensors)
        self.previous[stream] = state["previous"].to(self.device, copy=True)

    def fill(self, stream: int, codes: np.ndarray, cond: Tensor | None) -> None:
        """See `Engine.fill`."""
        given = torch.from_numpy(codes).to(self.device)
        previous = torch.cat([self.previous[stream], given[:-1]])
        self.model.prefill(previous[None], self.states[stream], cond)
        self.previous[stream] = given[-1:].clone()

    def resized(self, batch: int) -> ReferenceEngine:
        """See `Engine.resized`."""
        return ReferenceEngine(self.model, batch)
