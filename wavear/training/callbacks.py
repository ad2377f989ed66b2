"""Everything around the steps of a run: progress, validation, saved states, logs, and its end."""

from __future__ import annotations

import copy
import math
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from wavear import audio
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.data.corpus import Corpus
from wavear.data.recordings import fingerprint
from wavear.evaluation.held_out import subset
from wavear.models.saving import non_finite
from wavear.training.config import TrainConfig
from wavear.training.faults import Spikes, crops_named, save_batch, some
from wavear.training.free_run import FreeRun, free_run
from wavear.training.log import Log
from wavear.training.module import TrainingModule
from wavear.training.processes import Processes
from wavear.training.run_directory import is_second_part, write_record
from wavear.training.state import fall_back, prune_states, state_path
from wavear.training.validation import HeldOut, interleave_speakers, score_held_out

logger = get_logger(__name__)

LOG_EVERY = 10  # steps
_VALIDATION_SHARE = 0.05  # of the time, at most, for validations that are due by the clock
_SPIKES_KEPT = 100  # in train.json
_SAMPLES_KEPT = 5  # validations whose clips stay in samples/
_PRINTED = ("score", "log_mel", "hnr_low", "hnr_low_recorded", "pesq", "stoi")  # of the free run


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over the run's share of its steps or its minutes, whichever is larger."""

    BAR_FORMAT = "{l_bar}{bar}| {remaining} left{postfix}"

    def __init__(self, run: Run):
        super().__init__()
        # Seconds between two looks: a log file does not need a line ten times a second.
        self.interval = 0.1 if sys.stdout.isatty() else 15.0
        self.drawn = -math.inf
        self.run = run

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        # The rate is that of this part of the run.
        bar.total = 1.0
        bar.initial = bar.n = min(_training(pl_module).progress, 1.0)
        bar.set_description("training")

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        """Leave the bar as it is: there is one epoch."""

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        share = _training(pl_module).progress  # of all processes, so each has to ask at each step
        now = time.monotonic()
        if now - self.drawn >= self.interval or share >= 1:
            self.drawn = now
            self.train_progress_bar.n = min(share, 1.0)
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {"step": trainer.global_step} | self.run.shown


class Run(L.Callback):
    """Validates, saves, logs and ends a run. All processes score their share; process 0 writes.

    `record` is the contents of train.json: its "history" and "spikes" grow here. `resumed` is what
    `on_save_checkpoint` saved in the state that the run resumes from.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        speakers: Sequence[str],
        record: dict[str, Any],
        resumed: dict[str, Any] | None = None,
    ):
        self.config = config
        self.out = Path(config.out)
        self.train = corpus.train
        in_turn = interleave_speakers(corpus.validation)
        self.validation = subset(in_turn, config.validation_seconds * config.sample_rate)
        self.fingerprint = fingerprint(self.validation)
        self.speakers = speakers
        self.record = record
        self.skipped: dict[str, str] = {**dict(corpus.bad), **record.get("skipped", {})}
        self.log_book = Log(config.out)
        self.shown: dict[str, str] = {}
        self.stopped_by: str | None = None
        """"steps", "time" or "interrupt"."""
        self.began = False
        self.interrupted = False
        resumed = resumed or {}
        self._spikes = Spikes(resumed.get("recent", ()), resumed.get("inside", False))
        # Steps of the last saved state, and of the last one after which a step was normal: the one
        # that a failed run falls back to.
        self._saved, self._sound = 0, resumed.get("sound")
        # Since the last row of metrics.csv. The first two are saved, so that a resumed run writes
        # the same rows.
        self._nats, self._samples = float(resumed.get("nats", 0.0)), int(resumed.get("samples", 0))
        self._counted, self._waited = 0, 0.0
        self._since = self._step_ended = self._validated_at = self._validation_cost = 0.0

    # --- beginning and end

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _training(pl_module)
        module.began = time.monotonic()
        self._catch_signals()
        self.began = True
        history = self.record["history"]
        if trainer.is_global_zero:
            self.log_book.trim(trainer.global_step if history else -1)
        if not history:
            self._validate(trainer, module)
            self._save(trainer, module)
        else:
            self._saved = trainer.global_step
            self._sound = self._saved if self._sound is None else self._sound
            self.save_last(trainer, module)
            self._show_validation(history[-1])
        self._validated_at = self._since = self._step_ended = time.monotonic()

    def _catch_signals(self) -> None:
        """End the run after the step on Ctrl-C (at once on a second), SIGTERM, SLURM's SIGUSR1."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: Any) -> None:
            if self.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted = True

        slurm = [signal.SIGUSR1] if Processes.here().launcher == "slurm" else []
        for number in (signal.SIGINT, signal.SIGTERM, *slurm):
            signal.signal(number, stop)  # `fit` restores the caller's handlers

    # --- around every step

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._waited += time.monotonic() - self._step_ended

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        module, config, step = _training(pl_module), self.config, trainer.global_step
        for name, reason in batch.skipped:
            self.skip(name, reason)
        if not module.last.finite:
            self._refuse_step(trainer, module, batch)
        elapsed, interrupted = module.largest(module.elapsed, float(self.interrupted))
        if config.max_steps is not None and step >= config.max_steps:
            self.stopped_by = "steps"
        elif config.max_minutes is not None and elapsed >= 60 * config.max_minutes:
            self.stopped_by = "time"
        elif interrupted:
            self.stopped_by = "interrupt"
        self._nats += module.last.nats
        self._samples += module.last.samples
        self._counted += module.last.samples
        self._detect_spike(trainer, module, batch)
        if self._saved == step - 1 and self._normal(module.last.bits):
            self._sound = step - 1
        last = self.stopped_by is not None
        if step % LOG_EVERY == 0 or (last and self.stopped_by != "interrupt"):
            self._log_training(trainer, module)
        validated = self._validation_due(module, step)
        if validated:
            self._validate(trainer, module)
        if validated or last or step % config.checkpoint_every == 0:
            self._save(trainer, module)
        trainer.should_stop = trainer.should_stop or last
        self._step_ended = time.monotonic()

    def _normal(self, bits: float) -> bool:
        """Return whether a loss is neither in a spike nor far above that of the untrained model."""
        return not self._spikes.inside and bits < 1.5 * max(self.record["history"][0]["bits"], 1.0)

    def _refuse_step(self, trainer: L.Trainer, module: TrainingModule, batch: Any) -> None:
        """Save the batch of a non-finite loss or gradient, drop ruined states, and end the run.

        The weights before this step gave a non-finite number, and would give it again.
        """
        step, last = trainer.global_step + 1, module.last
        process = f"-process-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.out / f"bad-step-{step:08}{process}.safetensors"
        crops = crops_named(batch, self.train, module.layout.sample_rate, last.crop_nats)
        save_batch(path, batch, module, step, crops)
        if trainer.is_global_zero and (found := fall_back(self.out, self._sound or 0)):
            self._restore_last(module, found.state)
        trainer.strategy.barrier()  # torchrun ends the others when one ends
        raise WavearError(
            f"step {step}: the loss became {last.bits:.4g} bits and the gradient's norm"
            f" {last.gradient_norm:.4g}; the state to resume is that of step {self._sound or 0},"
            f" whose loss was normal. Its batch ({path}): {some(crops)}. Resume with a lower"
            f" learning rate than {self.config.learning_rate:g}, or precision 32"
        )

    def _restore_last(self, module: TrainingModule, state: dict[str, Any]) -> None:
        """Write `last/` and train.json of an earlier state."""
        tensors = state["state_dict"]
        average = {name: tensors[f"average.{name}"] for name in module.average.state_dict()}
        module.average.load_state_dict(average)
        self.record["history"] = list(state.get("run", {}).get("history", self.record["history"]))
        self._sound = state["global_step"]
        self._write_last(module, state["global_step"], state["seconds"])

    def _detect_spike(self, trainer: L.Trainer, module: TrainingModule, batch: Any) -> None:
        """Name the crops of a batch with a spike; every process watches its share, 0 writes."""
        last = module.last
        usual = self._spikes.step(last.bits)
        if usual is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        crops = crops_named(batch, self.train, module.layout.sample_rate, last.crop_nats)
        spike = {"step": step, "bits": round(last.bits, 5), "usual": round(usual, 5)}
        spikes = [*self.record.get("spikes", []), spike | {"crops": crops}]
        self.record["spikes"] = spikes[-_SPIKES_KEPT:]
        logger.warning(
            f"step {step}: the loss spikes to {last.bits:.2f} from {usual:.2f} bits: {some(crops)}"
        )

    def _validation_due(self, module: TrainingModule, step: int) -> bool:
        if self.stopped_by is not None:
            return self.stopped_by != "interrupt"
        if self.config.validate_every is not None:
            return step % self.config.validate_every == 0
        least = max(self.config.validate_seconds, self._validation_cost / _VALIDATION_SHARE)
        return module.largest(float(time.monotonic() - self._validated_at >= least))[0] > 0

    def skip(self, name: str, reason: str) -> None:
        """Note and report a recording that cannot be read, once."""
        if name not in self.skipped:
            self.skipped[name] = reason
            logger.warning(f"skipped what cannot be read of {name}: {reason}")

    # --- numbers

    def _log_training(self, trainer: L.Trainer, module: TrainingModule) -> None:
        if self._samples == 0:  # nothing new
            return
        bits = self._nats / self._samples / math.log(2)
        now = time.monotonic()
        spent = max(now - self._since, 1e-9)
        rate = self._counted * trainer.world_size / spent
        self.shown |= {"loss": f"{bits:.3f}", "samples/s": f"{rate:,.0f}"}
        if trainer.is_global_zero:
            row = {
                "seconds": round(module.elapsed, 2),
                "train_bits": round(bits, 5),
                "learning_rate": module.last.learning_rate,
                "gradient_norm": round(module.last.gradient_norm, 5),
                "samples_per_second": round(rate, 1),
                "data_wait": round(self._waited / spent, 4),
                "average_distance": round(module.average_distance(), 6),
            }
            self.log_book.metrics(trainer, trainer.global_step, row)
        self._nats, self._samples, self._counted, self._since, self._waited = 0.0, 0, 0, now, 0.0

    def _show_validation(self, entry: dict[str, Any]) -> None:
        self.shown["bits"] = f"{entry['bits']:.3f}"
        if (score := _score(entry)) is not None:
            self.shown["score"] = f"{score:.3f}"

    # --- validation

    def _validate(self, trainer: L.Trainer, module: TrainingModule) -> None:
        began, step = time.monotonic(), trainer.global_step
        held_out = score_held_out(trainer, module.average, self.validation, self.speakers)
        for name, why in held_out.bits.skipped.items():
            self.skip(name, why)
        entry: dict[str, Any] = {
            "step": step,
            "seconds": round(module.elapsed, 2),
            "bits": held_out.bits.per_sample,
            "held_out": self.fingerprint,
        }
        for name, group in held_out.groups.items():
            if group:
                entry[name] = {key: round(value, 5) for key, (value, _) in group.items()}
        free, seconds = None, self.config.sample_seconds
        # Non-finite weights are for the next step to find, which falls back to earlier ones.
        finite = not non_finite(module.average.state_dict())
        trained = step > 0 or is_second_part(self.config)
        if trainer.is_global_zero and trained and seconds > 0 and finite:
            model = copy.deepcopy(module.average).cpu()
            try:
                free = free_run(model, self.validation, seconds, self.speakers)
            except WavearError as error:  # such as weights that are finite and logits that are not
                logger.warning(f"step {step}: the free run failed, the training continues: {error}")
        if free is not None and free.measures:
            entry["free_run"] = {name: round(value, 5) for name, value in free.measures.items()}
        best = self._is_best(entry)
        self.record["history"].append(entry)
        self._show_validation(entry)
        if trainer.is_global_zero:
            self._log_validation(trainer, entry, held_out)
            if free is not None:
                self._log_free_run(trainer, entry, free, best)
            if best:
                described = self._described(step, entry["bits"])
                described |= {"free_run": entry["free_run"]} if "free_run" in entry else {}
                module.average.save(self.out / "best", overwrite=True, training=described)
        self._validated_at = time.monotonic()
        self._validation_cost = self._validated_at - began
        self._since += self._validation_cost  # not time of training

    def _is_best(self, entry: dict[str, Any]) -> bool:
        """Compare with the curve so far: by the free run, or by bits where it has no score.

        The untrained model is never the best: who stops in the first minutes gets no `best/`. The
        best of the first part is, until the second has a better one.
        """
        earlier = self.comparable()
        scores = [s for s in map(_score, earlier) if s is not None and self.config.features is None]
        if (score := _score(entry)) is not None:
            return score < min(filter(math.isfinite, scores), default=math.inf)
        bits = filter(math.isfinite, (e["bits"] for e in earlier if e["step"] > 0))
        return entry["step"] > 0 and not scores and entry["bits"] < min(bits, default=math.inf)

    def comparable(self) -> list[dict[str, Any]]:
        """Return the points of the curve that are of the current held-out recordings."""
        own = self.fingerprint
        return [entry for entry in self.record["history"] if entry.get("held_out", own) == own]

    def _log_validation(self, trainer: L.Trainer, entry: dict[str, Any], held_out: HeldOut) -> None:
        step = entry["step"]
        row = {"seconds": entry["seconds"], "validation_bits": round(entry["bits"], 5)}
        if (score := _score(entry)) is not None:
            row["free_run_score"] = score
        self.log_book.metrics(trainer, step, row)
        for name, group in held_out.groups.items():
            self.log_book.validation(trainer, step, f"bits by {name}", group)

    def _log_free_run(
        self, trainer: L.Trainer, entry: dict[str, Any], free: FreeRun, best: bool
    ) -> None:
        step, rate = entry["step"], self.config.sample_rate
        for name, values in (("free run", free.measures), ("probe", free.probe)):
            rows = {key: (value, None) for key, value in values.items()}
            self.log_book.validation(trainer, step, name, rows)
        for name, waveform in zip(("original", "generated"), free.clips[0], strict=True):
            self.log_book.sound(trainer, step, f"sample/{name}", waveform, rate)
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        for number, (recorded, generated) in enumerate(free.clips):
            if not (path := folder / f"recorded-{number}.wav").exists():
                audio.write(path, recorded, rate)
            audio.write(folder / f"step-{step:08}-{number}.wav", generated, rate)
        kept = sorted({path.name[:13] for path in folder.glob("step-*.wav")})[-_SAMPLES_KEPT:]
        for path in folder.glob("step-*.wav"):
            if path.name[:13] not in kept:
                path.unlink()
        if not free.measures:
            return
        printed = ", ".join(f"{n} {v:.3f}" for n, v in free.measures.items() if n in _PRINTED)
        mark = " (best so far)" if best else ""
        logger.info(f"step {step}: {entry['bits']:.3f} bits; free run: {printed}{mark}")

    # --- states and checkpoints

    def _save(self, trainer: L.Trainer, module: TrainingModule) -> None:
        path = state_path(self.out, trainer.global_step)
        if trainer.is_global_zero:
            path.parent.mkdir(exist_ok=True)
        trainer.save_checkpoint(path)  # every process takes part, one writes
        if trainer.is_global_zero:
            prune_states(self.out, trainer.global_step, self.config.keep_last, self._sound or 0)
        self._saved = trainer.global_step
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
            "sound": self._sound,
        }

    def save_last(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Write `last/` and `train.json` for the state that was just written or read."""
        if trainer.is_global_zero:
            self._write_last(module, trainer.global_step, module.elapsed)

    def _write_last(self, module: TrainingModule, step: int, seconds: float) -> None:
        entries = self.record["history"][-1:]
        bits = next((entry["bits"] for entry in entries if entry["step"] == step), None)
        described = self._described(step, bits)
        module.average.save(self.out / "last", overwrite=True, training=described)
        self.record |= {"steps": step, "seconds": round(seconds, 2), "skipped": self.skipped}
        write_record(self.config, self.record)

    def _described(self, step: int, bits: float | None) -> dict[str, Any]:
        data = Path(self.config.data).name
        described: dict[str, Any] = {"data": data, "step": step, "speakers": list(self.speakers)}
        return described | ({} if bits is None else {"validation_bits": round(bits, 5)})


def _training(module: L.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module


def _score(entry: Mapping[str, Any]) -> float | None:
    """Return the score of a validation's free run, if it has one."""
    return entry.get("free_run", {}).get("score")
