"""The contract of an autoregressive model: P(x) = product over t of P(x_t | x_<t, c)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavear.mulaw import silence_code


class AutoregressiveModel(nn.Module):
    """Base of every family: what training, scoring and generation rely on.

    Letters: B batch, T samples, F mel frames, M mel bands, C conditioning channels, Q code classes.

    A subclass defines `forward` (all samples in parallel) and `init_state` with `step` (one sample at a time).
    The two are the same law: `step` fed with `codes` one by one returns the columns of `forward(codes)`.
    State is an argument, never an attribute, and nothing is cached past the weights.
    """

    config: Any
    """Frozen dataclass, saved with the weights. Has at least `classes`, `sample_rate`, `mel` and `speakers`."""

    activation_checkpointing: bool | None = None
    """Whether `forward` keeps only the inputs of its layers for the backward pass; None: the family cannot."""

    @property
    def receptive_field(self) -> int | None:
        """How many past samples the law of the next one depends on; None where unbounded."""
        raise NotImplementedError

    @property
    def lookahead(self) -> int:
        """How many mel frames after frame f the samples of frame f depend on (and as many before it)."""
        raise NotImplementedError

    @property
    def start_code(self) -> int:
        """The code that stands before the first sample: silence."""
        return silence_code(self.config.classes)

    @property
    def conditioned(self) -> bool:
        """Whether the model takes conditioning, from a mel or a speaker."""
        return self.config.mel is not None or self.config.speakers > 0

    def shift(self, codes: Tensor) -> Tensor:
        """`codes` (B, T) one sample later, with the start code in front: what the network sees at each t."""
        return torch.nn.functional.pad(codes[:, :-1], (1, 0), value=self.start_code)

    def condition(self, mel: Tensor | None, speaker: Tensor | None = None, *, padded: bool = False) -> Tensor:
        """One vector per sample from a mel and a speaker.

        Parameters
        ----------
        mel : Tensor, shape (B, M, F), or None for a model without mel conditioning
        speaker : Tensor of int64, shape (B,), or None for a model without speakers
        padded : bool
            `mel` has shape (B, M, F + 2 * lookahead): it carries its own context on both sides, as a crop does.
            Otherwise the first and the last frame are repeated.

        Returns
        -------
        Tensor, shape (B, C, F * hop); of a speaker alone (B, C, 1), the same for every sample
        """
        raise NotImplementedError

    def forward(self, codes: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits (B, Q, T) of `codes` (B, T): [..., t] is the law of codes[:, t] given codes[:, :t] and `cond`."""
        raise NotImplementedError

    def init_state(self, batch: int) -> Any:
        """State of `batch` streams before their first sample, preallocated, batch first."""
        raise NotImplementedError

    def step(self, previous: Tensor, state: Any, cond_t: Tensor | None = None) -> Tensor:
        """Logits (B, Q) of the next sample.

        Parameters
        ----------
        previous : Tensor of int64, shape (B,)
            The code of the sample before; `start_code` for the first.
        state : what `init_state` returned; updated in place
        cond_t : Tensor, shape (B, C), or None
        """
        raise NotImplementedError

    def prefill(self, previous: Tensor, state: Any, cond: Tensor | None = None) -> None:
        """Bring the state to where `step` fed with each of `previous` in turn would, if the family can in parallel.

        Parameters
        ----------
        previous : Tensor of int64, shape (B, T)
            The code before each sample: of a recording `shift(codes)`.
        state : what `init_state` returned; updated in place
        cond : Tensor, shape (B, C, T), or (B, C, 1) the same for every sample, or None
        """
        for t in range(previous.shape[1]):
            self.step(previous[:, t], state, None if cond is None else cond[:, :, t if cond.shape[2] > 1 else 0])

    def export_state(self, state: Any) -> dict[str, Tensor]:
        """What the state holds as tensors by name, batch first, in an order that every engine can make and read.

        Copies, on the device and in the precision of the state.
        """
        raise NotImplementedError

    def import_state(self, tensors: dict[str, Tensor]) -> Any:
        """The state that `export_state` gave these tensors of, from any device and precision."""
        raise NotImplementedError

    def compile_layers(self) -> None:
        """Let torch.compile make kernels for `forward`, in place, for the shapes of training."""
        self.compile(dynamic=False)

    def save(self, directory: str | Path, *, overwrite: bool = False, training: dict | None = None) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`; see `wavear.checkpoint.save`."""
        from wavear.checkpoint import save

        return save(self, directory, overwrite=overwrite, training=training)
