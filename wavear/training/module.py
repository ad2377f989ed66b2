"""The Lightning module: one optimizer step per batch, its learning rate, the averaged weights."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from wavear.data.crops import Batch, Layout, coded
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import crop_loss
from wavear.models.energy_distance import free_run_losses
from wavear.models.memory import check_compiler
from wavear.models.predictive import PredictiveWaveNet
from wavear.training.config import TrainConfig
from wavear.training.lanes import Carried
from wavear.training.optimizers import make_optimizer

_LAST_RATE = 0.02  # of the peak: where the cosine ends
FREE_RUN_WEIGHT = 13.0
"""Weight of the energy distance next to nats per sample."""
_AVERAGE_WARMUP = 10  # steps: the decay is (1 + n) / (10 + n), up to `ema_decay`


def learning_rate(step: int, progress: float, peak: float, warmup: int, hold: float = 0.0) -> float:
    """Return the learning rate of a step: a linear warm-up, `peak`, and half a cosine to 2 % of it.

    Parameters
    ----------
    step : int
        Steps taken before this one.
    progress : float
        Of the run, 0 to 1.
    peak : float
        The highest learning rate.
    warmup : int
        Steps of the linear rise from 0.
    hold : float
        The `progress` at which the cosine begins: 0 to less than 1.

    Examples
    --------
    >>> [round(learning_rate(step, step / 100, 1.0, 10), 3) for step in (0, 9, 50, 100)]
    [0.1, 0.981, 0.51, 0.02]
    >>> [round(learning_rate(n, n / 100, 1.0, 10, hold=0.3), 3) for n in (0, 9, 30, 65, 100)]
    [0.1, 1.0, 1.0, 0.51, 0.02]
    """
    falling = (progress - hold) / (1 - hold)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(falling, 0.0), 1.0)))
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


@dataclass(frozen=True)
class StepResult:
    """Numbers of the last step, of this process's share of the batch."""

    finite: bool
    """True if loss and gradient are finite in all processes; otherwise no step was taken."""
    nats: float
    samples: int
    crop_nats: torch.Tensor
    """Nats of each crop, (B,)."""
    learning_rate: float
    """AdamW's."""
    gradient_norm: float
    """Before clipping."""

    @property
    def bits(self) -> float:
        """Return the loss in bits per sample."""
        return self.nats / max(self.samples, 1) / math.log(2)


class TrainingModule(L.LightningModule):
    """Trains `model`; `average`, its exponential moving average, is validated, saved and sampled.

    The weights are float32; the layers run in `dtype` if one is given.

    The gradient is that of the sum of nats over a batch divided by (crops * segment), a constant:
    every sample of loss has the same weight, however the batch is divided among processes and
    `accumulate` parts.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        layout: Layout,
        config: TrainConfig,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.layout = layout
        if config.compile:
            check_compiler()
            model.compile_layers()  # after the copy: held-out bits do not depend on it
        self.settings = config
        self.compute_dtype = dtype
        self.seconds_before = 0.0  # of the runs that this one resumes
        self.began = time.monotonic()
        self.last: StepResult
        self.peaks: list[float] = []
        """The highest learning rate of each group of the optimizer."""
        self.carried: Carried | None = None
        """State from batch to batch, of models that carry one."""

    @property
    def elapsed(self) -> float:
        """Return the seconds of training so far, with those of resumed runs."""
        return self.seconds_before + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """Return the progress of the run, 0 to 1: the larger of steps and time."""
        config = self.settings
        parts = [0.0]
        if config.max_steps is not None:
            parts.append(self.global_step / config.max_steps)
        if config.max_minutes is not None:
            parts.append(self.largest(self.elapsed)[0] / (60 * config.max_minutes))
        return max(parts)

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over processes, so that all of them decide alike."""
        if self.trainer.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        reduced: Any = self.trainer.strategy.reduce(tensor, reduce_op="max")
        return reduced.tolist()

    @override
    def setup(self, stage: str) -> None:
        """Use the precision of the first process: each process has measured for itself."""
        self.compute_dtype = self.trainer.strategy.broadcast(self.compute_dtype)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer, self.peaks = make_optimizer(self.model, self.settings)
        return optimizer

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        config = self.settings
        optimizer: Any = self.optimizers()
        step, progress = self.global_step, self.progress
        for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(step, progress, peak, config.warmup_steps, config.hold or 0)
        noise = self._seed_step()
        if self.model.carries and self.carried is None:
            self.carried = Carried(self.model, len(batch.source))
        crops: list[torch.Tensor] = []
        carry: list[dict[str, torch.Tensor]] = []
        samples = torch.zeros((), dtype=torch.int64, device=self.device)
        row = 0
        for part in batch.split(config.accumulate):
            state = None
            if self.carried is not None:
                rows = slice(row, row + len(part.source))
                state = self.carried.take(self.model, rows, part.begins)
            losses, mask = crop_loss(
                self.model,
                part,
                self.layout,
                self.compute_dtype,
                noise,
                config.input_noise or 0.0,
                state,
                config.conditioning_dropout,
            )
            if state is not None:
                end = coded(part, self.layout)[:, -1]
                carry.append(Carried.give(self.model, state[0], self.model.grid.encode(end)))
            self.manual_backward(losses.sum() / (len(batch.source) * self.layout.segment))
            if config.free_run:
                assert isinstance(self.model, PredictiveWaveNet)
                for loss in free_run_losses(self.model, part, self.layout, noise):
                    self.manual_backward(FREE_RUN_WEIGHT * loss / config.accumulate)
            crops.append(losses.detach().sum(1, dtype=torch.float64))
            samples += mask.sum()
            row += len(part.source)
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
        crop_nats = torch.cat(crops)
        # One wait for the device: only finite numbers may reach the weights.
        sums = torch.stack([crop_nats.sum(), samples.double(), norm.double()])
        nats, count, length = sums.tolist()
        finite = not self.largest(float(not math.isfinite(nats + length)))[0]
        if finite:
            optimizer.step()
            self.update_average()
            if self.carried is not None:
                self.carried.put(carry)
        optimizer.zero_grad()
        rate = optimizer.param_groups[-1]["lr"]
        self.last = StepResult(finite, nats, int(count), crop_nats, rate, length)

    def _seed_step(self) -> torch.Generator:
        """Seed torch by seed, step and process; return a generator of noise on the device.

        A resumed run then draws what an uninterrupted run draws, without saved generator states.
        """
        step = (self.settings.seed * 1_000_003 + self.global_step) * 1024
        seed = (step + self.trainer.global_rank) % 2**63
        torch.manual_seed(seed)  # `fit` restores the caller's generator
        return torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def update_average(self) -> None:
        """Take a step of the moving average; `global_step` counts the step just taken."""
        steps = self.global_step
        decay = min(self.settings.ema_decay or 0, (1 + steps) / (_AVERAGE_WARMUP + steps))
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def average_distance(self) -> float:
        """Return the norm of (weights - average) over the norm of the weights."""
        pairs = list(zip(self.model.parameters(), self.average.parameters(), strict=True))
        apart = torch.stack([(weight - average).norm() for weight, average in pairs]).norm()
        norm = torch.stack([weight.norm() for weight, _ in pairs]).norm()
        return float(apart / norm.clamp(min=1e-30))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.elapsed
        if self.carried is not None:
            tensors = self.carried.tensors.items()
            checkpoint["carried"] = {name: self._of_all(tensor) for name, tensor in tensors}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = float(checkpoint["seconds"])
        if "carried" in checkpoint:
            rows = (self.settings.batch_size or 0) // self.trainer.world_size
            mine = slice(self.trainer.global_rank * rows, (self.trainer.global_rank + 1) * rows)
            tensors = {name: tensor[mine] for name, tensor in checkpoint["carried"].items()}
            self.carried = Carried(self.model, rows, tensors)

    def _of_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, in order."""
        gathered: Any = self.all_gather(tensor)
        return tensor if self.trainer.world_size == 1 else torch.cat(list(gathered))
