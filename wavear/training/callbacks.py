"""What happens around the steps: the progress bar, validation, samples, checkpoints, logs, and when to stop."""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from wavear import audio
from wavear.common.atomic import printable, replace_file, say
from wavear.data.corpus import Recording
from wavear.data.recordings import fingerprint
from wavear.evaluation.held_out import Bits, held_out_bits
from wavear.training.faults import Spikes, crops_named, save_batch
from wavear.training.free_run import FreeRun, free_run
from wavear.training.groups import ByLevel, by_speaker
from wavear.training.log import Log
from wavear.training.module import TrainingModule
from wavear.training.probes import probe
from wavear.training.processes import Processes
from wavear.training.states import prune_states, state_path

LOG_EVERY = 10  # steps
_VALIDATION_SHARE = 0.05  # of the time, at most, for validations that are due by the clock
_SAMPLING_SHARE = 0.03  # of the time, at most, for free-running samples
_NAMED = 8  # crops of a batch that a message names
_SPIKES = 100  # kept in train.json
SAMPLES = "samples"
_SAMPLES_KEPT = 5  # validations whose clips stay in the folder
_TOLD = (
    "score",
    "log_mel",
    "hnr_low",
    "hnr_low_recorded",
    "pesq",
    "stoi",
)  # of the free run, on the console


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, counting steps to `max_steps` where there is one, with loss, held-out bits and samples/s."""

    def __init__(self, run: Run):
        super().__init__(
            refresh_rate=1 if sys.stdout.isatty() else 100
        )  # a log file needs no bar ten times a second
        self.run = run

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        bar = self.train_progress_bar
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = trainer.global_step  # so that the rate counts this run's steps only
        bar.n = trainer.global_step
        bar.set_description("training")

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return self.run.shown


class Run(L.Callback):
    """Everything that a run writes, and its end. Only process 0 writes; all of them score their share.

    Parameters
    ----------
    config : TrainConfig
    validation : recordings that the curve of held-out bits is measured on
    speakers : names in the order of their numbers
    record : dict
        Contents of `train.json`; `record["history"]` and `record["spikes"]` grow here.
    train : recordings that the batches are drawn from
    resumed : dict, optional
        What `on_save_checkpoint` put into the state that the run goes on from.
    """

    def __init__(
        self,
        config: Any,
        validation: Sequence[Recording],
        speakers: Sequence[str],
        record: dict[str, Any],
        train: Sequence[Recording],
        resumed: dict[str, Any] | None = None,
    ):
        self.config = config
        self.train = train
        self.out = Path(config.out)
        self.log_book = Log(self.out)
        self.validation = validation
        self.speakers = speakers
        self.record = record
        self.shown: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.stopped_by: str | None = None
        """"steps", "time" or "interrupt"."""
        self._interrupted = False
        self._handlers: dict[int, Any] = {}
        resumed = resumed or {}
        # Since the last row of metrics.csv; kept in the state, so that a resumed run writes the
        # same rows.
        self._nats, self._samples = float(resumed.get("nats", 0.0)), int(resumed.get("samples", 0))
        self._spikes = Spikes(resumed.get("recent", ()), resumed.get("inside", False))
        self._since, self._counted = 0.0, 0
        self._waited, self._step_ended = 0.0, 0.0
        self.began = False
        self._heard = 0  # the first held-out recording that can be read
        self._validated_at, self._validation_cost, self._sampling_cost = 0.0, 0.0, 0.0
        self._rate = 0.0

    # --- beginning and end

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _training(pl_module)
        module.began = time.monotonic()
        self._catch_interrupts()
        self.began = True
        history = self.record["history"]
        if trainer.is_global_zero:
            self.log_book.trim(trainer.global_step if history else -1)
        if not history:
            self._validate(trainer, module)
            self._save(trainer, module)
        else:
            self.save_last(trainer, module)
            self._show(bits=history[-1]["bits"], **_scores(history[-1]))
        self._validated_at = self._since = self._step_ended = time.monotonic()

    def _catch_interrupts(self) -> None:
        """Ctrl-C, SIGTERM and, of SLURM, SIGUSR1 end the run after the step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: Any) -> None:
            if self._interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._interrupted = True

        slurm = [signal.SIGUSR1] if Processes.here().launcher == "slurm" else []
        for number in (signal.SIGINT, signal.SIGTERM, *slurm):
            self._handlers[number] = signal.signal(number, stop)

    def release(self) -> None:
        """Give the signals back to whom they belonged."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    # --- around every step

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._step_ended

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        module, config, step = _training(pl_module), self.config, trainer.global_step
        for name, reason in batch.skipped:
            self._skip(trainer, name, reason)
        if not module.last["good"]:
            self._stop_at(trainer, module, batch)
        elapsed, interrupted = self._agree(trainer, module.elapsed, self._interrupted)
        if config.max_steps is not None and step >= config.max_steps:
            self.stopped_by = "steps"
        elif config.max_minutes is not None and elapsed >= 60 * config.max_minutes:
            self.stopped_by = "time"
        elif interrupted:
            self.stopped_by = "interrupt"
        self._nats += module.last["nats"]
        self._samples += module.last["samples"]
        self._counted += module.last["samples"]
        self._name_spike(trainer, module, batch)
        last = self.stopped_by is not None
        if step % LOG_EVERY == 0 or (last and self.stopped_by != "interrupt"):
            self._log_training(trainer, module, step)
        validated = self._validation_due(trainer, step, last)
        if validated:
            self._validate(trainer, module)
        if validated or last or step % config.checkpoint_every == 0:
            self._save(trainer, module)
        if last:
            trainer.should_stop = True
        self._step_ended = time.monotonic()

    def _stop_at(self, trainer: L.Trainer, module: TrainingModule, batch: Any) -> None:
        """Save the batch whose loss or gradient is no number, and the state before it; end the run."""
        step, last = trainer.global_step + 1, module.last
        process = f"-process-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.out / f"bad-step-{step:08}{process}.safetensors"
        crops = crops_named(batch, self.train, module.layout.sample_rate, last["crop_nats"])
        save_batch(path, batch, module.layout, module.model.grid, step, last["crop_nats"], crops)
        self._save(trainer, module)
        bits = last["nats"] / max(last["samples"], 1) / math.log(2)
        raise ValueError(
            f"step {step}: the loss became {bits:.4g} bits and the gradient's norm {last['gradient_norm']:.4g}, which"
            f" stops the run; the weights are those before this step. Its batch ({path}): {_some(crops)}."
            f" Resume with a lower learning rate than {self.config.learning_rate:g}, or precision 32"
        )

    def _name_spike(self, trainer: L.Trainer, module: TrainingModule, batch: Any) -> None:
        """Name the files of a batch whose loss leaps. Each process of several watches its share; the first writes."""
        bits = module.last["nats"] / max(module.last["samples"], 1) / math.log(2)
        usual = self._spikes.step(bits)
        if usual is None or not trainer.is_global_zero:
            return
        crops = crops_named(batch, self.train, module.layout.sample_rate, module.last["crop_nats"])
        spike = {
            "step": trainer.global_step,
            "bits": round(bits, 5),
            "usual": round(usual, 5),
            "crops": crops,
        }
        self.record["spikes"] = [*self.record.get("spikes", []), spike][-_SPIKES:]
        self.say(
            trainer,
            f"step {spike['step']}: the loss leaps to {bits:.2f} from {usual:.2f} bits: {_some(crops)}",
        )

    def _agree(self, trainer: L.Trainer, elapsed: float, interrupted: bool) -> tuple[float, bool]:
        if trainer.world_size == 1:
            return elapsed, interrupted
        both = torch.tensor([elapsed, float(interrupted)], device=trainer.strategy.root_device)
        elapsed, interrupted = trainer.strategy.reduce(both, reduce_op="max").tolist()  # type: ignore[union-attr]
        return elapsed, interrupted > 0

    def _validation_due(self, trainer: L.Trainer, step: int, last: bool) -> bool:
        if last:
            return self.stopped_by != "interrupt"
        if self.config.validate_every is not None:
            return step % self.config.validate_every == 0
        waited = time.monotonic() - self._validated_at
        due = waited >= max(self.config.validate_seconds, self._validation_cost / _VALIDATION_SHARE)
        return self._agree(trainer, 0.0, due)[1]

    def _skip(self, trainer: L.Trainer, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            if trainer.is_global_zero:
                self.say(trainer, f"skipped {name}: {reason}")

    def say(self, trainer: L.Trainer, text: str) -> None:
        """Print a line above the progress bar, if the run is to speak."""
        if not self.config.progress:
            return
        bar = trainer.progress_bar_callback
        if (
            bar is not None
            and isinstance(bar, TQDMProgressBar)
            and bar._train_progress_bar is not None
        ):
            bar.train_progress_bar.write(printable(text))
        else:
            say(text)

    # --- numbers

    def _log_training(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if self._samples == 0:  # nothing new
            return
        bits = self._nats / self._samples / math.log(2)
        now = time.monotonic()
        spent = max(now - self._since, 1e-9)
        self._rate = self._counted * trainer.world_size / spent
        row = {
            "step": step,
            "seconds": round(module.elapsed, 2),
            "train_bits": round(bits, 5),
            "learning_rate": module.last["learning_rate"],
            "gradient_norm": round(float(module.last["gradient_norm"]), 5),
            "samples_per_second": round(self._rate, 1),
            "data_wait": round(self._waited / spent, 4),
        }
        self._nats, self._samples, self._counted, self._since, self._waited = 0.0, 0, 0, now, 0.0
        self._show(loss=bits)
        if trainer.is_global_zero:
            row["average_distance"] = round(module.average_distance(), 6)
            self.log_book.metrics(trainer, step, row)

    def _show(self, **values: float) -> None:
        self.shown.update({name: f"{value:.3f}" for name, value in values.items()})
        if self._rate:
            self.shown["samples/s"] = f"{self._rate:,.0f}"

    # --- validation, samples, checkpoints

    def _validate(self, trainer: L.Trainer, module: TrainingModule) -> None:
        began = time.monotonic()
        world, step, history = trainer.world_size, trainer.global_step, self.record["history"]
        levels = ByLevel(module.layout.sample_rate)
        found = held_out_bits(
            module.average,
            self.validation,
            self.speakers,
            rank=trainer.global_rank,
            world=world,
            note=levels.add,
        )
        if world > 1:
            sums = torch.from_numpy(
                np.concatenate([found.total, found.samples, levels.bits, levels.samples])
            )
            sums = (
                trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
                .cpu()
                .numpy()
            )  # type: ignore
            n, m = len(found.total), len(levels.bits)
            found = Bits(sums[:n], sums[n : 2 * n], found.skipped)
            levels.bits, levels.samples = sums[2 * n : 2 * n + m], sums[2 * n + m :]
        for name, why in found.skipped.items():
            self._skip(trainer, name, why)
        bits, elapsed = found.per_sample, round(module.elapsed, 2)
        self._heard = int(np.argmax(found.samples > 0))
        groups = {"level": levels.named(), "speaker": by_speaker(self.validation, found)}
        means = {
            of: {name: round(value, 5) for name, (value, _) in them.items()}
            for of, them in groups.items()
            if them
        }
        entry = {
            "step": step,
            "seconds": elapsed,
            "bits": bits,
            "held_out": fingerprint(self.validation),
        } | means
        heard = self._free_run(module) if trainer.is_global_zero and step > 0 else None
        if heard is not None:
            entry["free_run"] = {name: round(value, 5) for name, value in heard.measures.items()}
        best = self._is_best(entry)
        history.append(entry)
        self._show(bits=bits, **_scores(entry))
        if trainer.is_global_zero:
            if heard is not None:
                self._keep_samples(step, heard)
                free = ", ".join(
                    f"{name} {value:.3f}" for name, value in heard.measures.items() if name in _TOLD
                )
                self.say(
                    trainer,
                    f"step {step}: {bits:.3f} bits; free run: {free}{' (best so far)' if best else ''}",
                )
                rows = [("free run", name, value, None) for name, value in heard.measures.items()]
                self.log_book.validation(trainer, step, rows)
            row = {"step": step, "seconds": elapsed, "validation_bits": round(bits, 5)}
            row |= {f"free_run_{name}": value for name, value in _scores(entry).items()}
            self.log_book.metrics(trainer, step, row)
            rows = [
                (f"bits by {of}", name, *pair)
                for of, them in groups.items()
                for name, pair in them.items()
            ]
            self.log_book.validation(trainer, step, rows)
            if best:
                module.average.save(
                    self.out / "best", overwrite=True, training=self._described(step, bits)
                )
        self._validated_at = time.monotonic()
        self._validation_cost = self._validated_at - began
        if step > 0 and self.config.sample_seconds > 0 and trainer.is_global_zero:
            self._sample(trainer, module)
        self._since += time.monotonic() - began  # validation is no training time

    def _free_run(self, module: TrainingModule) -> FreeRun | None:
        """The free run of a model that is conditioned on mels; None of others, or without seconds for samples."""
        if module.layout.mel is None or self.config.sample_seconds == 0:
            return None
        model = copy.deepcopy(module.average).cpu()
        return free_run(model, self.validation, self.config.sample_seconds, self.speakers)

    def _is_best(self, entry: dict[str, Any]) -> bool:
        """Whether a point of the curve is the best so far: by its free run, or where there are none by its bits."""
        earlier = self.comparable()
        scores = [e["free_run"]["score"] for e in earlier if "free_run" in e]
        if "free_run" in entry:
            return entry["free_run"]["score"] < min(scores, default=math.inf)
        return not scores and entry["bits"] < min((e["bits"] for e in earlier), default=math.inf)

    def _keep_samples(self, step: int, heard: FreeRun) -> None:
        """Write the clips of a free run to `samples/`, and drop those of all but the newest steps."""
        folder, rate = self.out / SAMPLES, self.config.sample_rate
        folder.mkdir(exist_ok=True)
        for number, (recorded, generated) in enumerate(heard.clips):
            if not (path := folder / f"recorded-{number}.wav").exists():
                audio.write(path, recorded, rate)
            audio.write(folder / f"step-{step:08}-{number}.wav", generated, rate)
        steps = sorted({path.name[:13] for path in folder.glob("step-*.wav")})
        for path in (
            path for old in steps[:-_SAMPLES_KEPT] for path in folder.glob(f"{old}-*.wav")
        ):
            path.unlink()

    def comparable(self) -> list[dict[str, Any]]:
        """Points of the curve that are of the held-out recordings of today: a run may be resumed with others."""
        own = fingerprint(self.validation)
        return [entry for entry in self.record["history"] if entry.get("held_out", own) == own]

    def _described(self, step: int, bits: float | None) -> dict[str, Any]:
        described: dict[str, Any] = {"step": step, "speakers": list(self.speakers)}
        return described | ({} if bits is None else {"validation_bits": round(bits, 5)})

    def _save(self, trainer: L.Trainer, module: TrainingModule) -> None:
        path = state_path(self.out, trainer.global_step)
        if trainer.is_global_zero:
            path.parent.mkdir(exist_ok=True)
        trainer.save_checkpoint(path)  # every process takes part, one writes
        if trainer.is_global_zero:
            prune_states(self.out, trainer.global_step, self.config.keep_last)
        self.save_last(trainer, module)

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["run"] = {
            "history": self.record["history"],
            "spikes": self.record.get("spikes", []),
            "nats": self._nats,
            "samples": self._samples,
            "recent": self._spikes.recent,
            "inside": self._spikes.inside,
        }

    def save_last(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """`last/` and `train.json`, of the state that was just written or read."""
        if trainer.is_global_zero:
            history = self.record["history"]
            bits = (
                history[-1]["bits"]
                if history and history[-1]["step"] == trainer.global_step
                else None
            )
            described = self._described(trainer.global_step, bits)
            module.average.save(self.out / "last", overwrite=True, training=described)
            self.record |= {
                "steps": trainer.global_step,
                "seconds": round(module.elapsed, 2),
                "skipped": self.skipped,
            }
            self.write_record()

    def write_record(self) -> None:
        """`train.json`."""
        text = (
            json.dumps(self.record, indent=2) + "\n"
        )  # ASCII: a name that is no Unicode can be written
        replace_file(self.out / "train.json", lambda path: path.write_text(text, encoding="utf-8"))

    def _sample(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """A little free-running audio: to hear, to see, and measured."""
        if self._sampling_cost > _SAMPLING_SHARE * module.elapsed:
            return
        began = time.monotonic()
        model = copy.deepcopy(module.average).cpu()
        made = probe(model, self.validation[self._heard], self.config.sample_seconds, self.speakers)
        rate, step = model.config.sample_rate, trainer.global_step
        for name, waveform in (
            ("sample/original", made.original),
            ("sample/generated", made.generated),
        ):
            self.log_book.sound(trainer, step, name, waveform, rate)
        self.log_book.validation(
            trainer, step, [("probe", name, value, None) for name, value in made.measures.items()]
        )
        self._sampling_cost += time.monotonic() - began


def _scores(entry: dict[str, Any]) -> dict[str, float]:
    """What chooses the best model, of a point of the curve that has a free run."""
    return {"score": entry["free_run"]["score"]} if "free_run" in entry else {}


def _some(crops: list[str]) -> str:
    return "; ".join(crops[:_NAMED]) + (
        f"; and {len(crops) - _NAMED} more" if len(crops) > _NAMED else ""
    )


def _training(module: L.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module
