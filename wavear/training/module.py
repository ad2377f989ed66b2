"""The Lightning module: one optimizer step per batch, its learning rate, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from wavear.data.crops import Batch, Layout, coded
from wavear.models.base import AutoregressiveModel
from wavear.models.crop_loss import crop_loss
from wavear.models.memory import check_compiler
from wavear.training.lanes import Carried
from wavear.training.optimizers import make_optimizer

_LAST_RATE = 0.02  # of the peak: where the cosine ends
_AVERAGE_WARMUP = 10  # steps: the average's memory grows with the steps: decay (1 + n) / (10 + n), up to `ema_decay`


def learning_rate(step: int, progress: float, peak: float, warmup: int, hold: float = 0.0) -> float:
    """Return the learning rate of a step: a linear warm-up, `peak`, and half a cosine down to 2 % of it.

    Parameters
    ----------
    step : int
        Steps taken before this one.
    progress : float
        How far the run is, 0 to 1.
    peak : float
        The highest learning rate.
    warmup : int
        Steps of the linear rise from 0.
    hold : float
        Share of the run, its beginning, before the cosine: 0 to less than 1.

    The cosine begins when `progress` reaches `hold`.

    Examples
    --------
    >>> [round(learning_rate(step, step / 100, 1.0, 10), 3) for step in (0, 9, 50, 100)]
    [0.1, 0.981, 0.51, 0.02]
    >>> [round(learning_rate(step, step / 100, 1.0, 10, hold=0.3), 3) for step in (0, 9, 30, 65, 100)]
    [0.1, 1.0, 1.0, 0.51, 0.02]
    """
    falling = (progress - hold) / (1 - hold)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(falling, 0.0), 1.0)))
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


class TrainingModule(L.LightningModule):
    """Trains `model`; `average` is its exponential moving average, which is validated, saved and sampled from.

    The weights are float32; the layers run in `dtype` if one is given.

    The gradient is that of the sum of nats over a batch divided by (crops * segment), a constant:
    every sample of loss weighs the same, and it is the same gradient however the batch is divided
    among processes and `accumulate` parts.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        layout: Layout,
        config: Any,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.layout = layout
        if config.activation_checkpointing and model.activation_checkpointing is None:
            raise ValueError(
                f"activation_checkpointing is not made for {type(model).__name__}: leave it away"
            )
        self.model.activation_checkpointing = (
            config.activation_checkpointing or model.activation_checkpointing
        )
        if config.compile:
            check_compiler()
            self.model.compile_layers()  # after the copy: held-out bits do not depend on it
        self.settings = config
        self.compute_dtype = dtype
        self.seconds_before = 0.0  # spent by the runs that this one resumes
        self.began = time.monotonic()
        self.last: dict[str, Any] = {}
        self.peaks: list[float] = []
        """The highest learning rate of each group of the optimizer."""
        self.carried: Carried | None = None
        """Of models that carry their state from batch to batch."""

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those of resumed runs included."""
        return self.seconds_before + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """How far the run is, 0 to 1: the further of steps and time."""
        config = self.settings
        parts = [0.0]
        if config.max_steps is not None:
            parts.append(self.global_step / config.max_steps)
        if config.max_minutes is not None:
            parts.append(self._agreed(self.elapsed) / (60 * config.max_minutes))
        return max(parts)

    def _agreed(self, value: float) -> float:
        """The largest over processes, so that all of them see one clock."""
        if self.trainer.world_size == 1:
            return value
        return float(
            self.trainer.strategy.reduce(torch.tensor(value, device=self.device), reduce_op="max")
        )

    @override
    def setup(self, stage: str) -> None:
        """Take the precision of the first process, which recorded its own: each of them has measured for itself."""
        self.compute_dtype = self.trainer.strategy.broadcast(self.compute_dtype)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer, self.peaks = make_optimizer(self.model, self.settings)
        return optimizer

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        config = self.settings
        optimizer: Any = self.optimizers()
        progress = self.progress
        for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(
                self.global_step, progress, peak, config.warmup_steps, config.hold
            )
        crops: list[torch.Tensor] = []
        samples = torch.zeros((), dtype=torch.int64, device=self.device)
        # All that is random in a step is a function of seed, step and process, so that a resumed
        # run has the noise of one never stopped: there is no state of a generator to be saved.
        # `fit` gives the caller's back.
        seed = (
            (config.seed * 1_000_003 + self.global_step) * 1024 + self.trainer.global_rank
        ) % 2**63
        torch.manual_seed(seed)
        noise = torch.Generator(self.device)
        noise.manual_seed(seed)
        if self.model.carries and self.carried is None:
            self.carried = Carried(self.model, len(batch.source))
        carry: list[dict[str, torch.Tensor]] = []
        for part in batch.split(config.accumulate):
            state = self._carried(part, sum(map(len, crops)))
            losses, mask = crop_loss(
                self.model,
                part,
                self.layout,
                self.compute_dtype,
                noise,
                config.input_noise,
                state,
                config.conditioning_dropout,
            )
            if state is not None:
                end = coded(part, self.layout)[:, -1]
                carry.append(Carried.give(self.model, state[0], self.model.grid.encode(end)))
            total = losses.sum()
            self.manual_backward(total / (len(batch.source) * self.layout.segment))
            crops.append(losses.detach().sum(1, dtype=torch.float64))
            samples += mask.sum()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.gradient_clip or math.inf
        )
        crop_nats = torch.cat(crops)
        # One wait for the device: nothing may reach the weights before it is known to be a number.
        nats, count, length = torch.stack(
            [crop_nats.sum(), samples.double(), norm.double()]
        ).tolist()
        good = math.isfinite(nats) and math.isfinite(length)
        if self.trainer.world_size > 1:
            good = not self._agreed(float(not good))
        if good:
            optimizer.step()
            self.update_average()
            if self.carried is not None:
                self.carried.put(carry)
        optimizer.zero_grad()
        self.last = {
            "good": good,
            "nats": nats,
            "samples": int(count),
            "crop_nats": crop_nats,
            "learning_rate": optimizer.param_groups[-1]["lr"],  # AdamW's
            "gradient_norm": length,
        }

    def _carried(self, part: Batch, row: int) -> tuple[Any, torch.Tensor] | None:
        """The state that a part of the batch, from this row on, goes on from."""
        if self.carried is None:
            return None
        return self.carried.take(self.model, slice(row, row + len(part.source)), part.begins)

    @torch.no_grad()
    def update_average(self) -> None:
        """One step of the moving average; `global_step` counts the step just taken."""
        decay = min(
            self.settings.ema_decay, (1 + self.global_step) / (_AVERAGE_WARMUP + self.global_step)
        )
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def average_distance(self) -> float:
        """Norm of what the weights differ in from their moving average, over the norm of the weights."""
        pairs = list(zip(self.model.parameters(), self.average.parameters(), strict=True))
        apart = torch.stack([(weight - average).norm() for weight, average in pairs]).norm()
        return float(
            apart / torch.stack([weight.norm() for weight, _ in pairs]).norm().clamp(min=1e-30)
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.elapsed
        if self.carried is not None:
            checkpoint["carried"] = {
                name: self._of_all(tensor) for name, tensor in self.carried.tensors.items()
            }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = float(checkpoint["seconds"])
        if "carried" in checkpoint:
            rows = self.settings.batch_size // self.trainer.world_size
            mine = slice(self.trainer.global_rank * rows, (self.trainer.global_rank + 1) * rows)
            tensors = {name: tensor[mine] for name, tensor in checkpoint["carried"].items()}
            self.carried = Carried(self.model, rows, tensors)

    def _of_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in order."""
        gathered: Any = self.all_gather(tensor)
        return tensor if self.trainer.world_size == 1 else torch.cat(list(gathered))
