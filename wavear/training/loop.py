"""The training of a network: Lightning's trainer, the loader, and the final scores."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.data.corpus import Corpus
from wavear.data.crops import Order, Segments, collate
from wavear.data.workers import end_with_parent
from wavear.evaluation.pictures import curves
from wavear.models.base import AutoregressiveModel
from wavear.models.checkpoint import load
from wavear.models.crop_loss import layout_of
from wavear.training.callbacks import ProgressBar, Run
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.lanes import Lanes
from wavear.training.log import finish, log_settings, loggers
from wavear.training.memory import check_memory
from wavear.training.module import TrainingModule
from wavear.training.optimizers import described
from wavear.training.precision import choose
from wavear.training.prepare import prepare
from wavear.training.processes import Processes
from wavear.training.run_directory import make_directory, write_record
from wavear.training.speakers import extend_state
from wavear.training.state import FoundState, StateIO, last_good_state, sweep
from wavear.training.validation import final_scores

logger = get_logger(__name__)


def fit(
    config: TrainConfig,
    corpus: Corpus,
    speakers: list[str],
    model: AutoregressiveModel,
    record: dict[str, Any],
    whole: Path | None = None,
) -> TrainResult:
    """Train `model` from its initial weights; `record` is the contents of train.json so far.

    The first part of the run `whole` is not scored at its end.
    """
    processes, kind = Processes.here(), _device_kind(config.device)
    segments = _segments(config, corpus, speakers, model, processes)
    if config.activation_checkpointing:
        if model.activation_checkpointing is None:
            name = type(model).__name__
            raise WavearError(f"{name} does not support activation_checkpointing: drop it")
        model.activation_checkpointing = True
    recorded = record.get("precision") if config.resume else None
    record["precision"], why = choose(config, model, kind, recorded)
    bf16 = record["precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else None
    check_memory(model, segments, config, dtype, kind, processes.world)
    found = _find_state(config, record, processes) if config.resume else None
    if found is None:
        if config.from_checkpoint is None:
            prepare(model, segments, config.seed)
    else:
        extend_state(found.state, record, model, config)
    module = TrainingModule(model, segments.layout, config, dtype)
    run = Run(config, corpus, speakers, record, found.state.get("run") if found else None)
    if record["history"] and record["history"][-1] not in run.comparable():
        logger.warning("the held-out recordings have changed: the best is now chosen by these")
    trainer = _trainer(config, kind, run, processes, found)
    device = trainer.strategy.root_device
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{type(model).__name__} of {parameters:,} parameters, receptive field {model.span}, on"
        f" {device}"
    )
    logger.info(f"{described(model, config)}; {'bf16' if bf16 else 'float32'} ({why})")
    if trainer.is_global_zero:
        make_directory(config, whole)
        write_record(config, record)
        log_settings(trainer, config)
    try:
        data = _Data(segments, config)
        path = found.path if found else None
        forked = torch.random.fork_rng(devices=[device] if kind == "cuda" else [])
        with forked, _safe_path(), _signals_restored():
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=False)
        if not run.began:  # all steps had been taken already
            run.save_last(trainer, module)
    finally:
        finish(trainer)
    if run.interrupted:  # perhaps during the last validation
        run.stopped_by = "interrupt"
    return _finish(config, corpus, trainer, run, whole)


def _segments(
    config: TrainConfig,
    corpus: Corpus,
    speakers: list[str],
    model: AutoregressiveModel,
    processes: Processes,
) -> Segments:
    batch_size, segment = config.batch_size, config.segment
    assert segment is not None
    assert batch_size is not None
    if batch_size % (processes.world * config.accumulate):
        parts = f"{processes.world} processes of {config.accumulate} parts each"
        raise WavearError(
            f"a batch of {batch_size} crops cannot be shared by {parts}: choose a multiple"
        )
    layout = layout_of(model, segment)
    if not model.carries:
        return Segments(corpus.train, layout, speakers, config.seed, config.redraw_below)
    if config.redraw_below is not None:
        raise WavearError(
            f"redraw_below is {config.redraw_below:g}: a {config.family} reads recordings from"
            " front to back, with their pauses; drop it"
        )
    return Lanes(corpus.train, layout, speakers, config.seed, batch_size=batch_size)


def _find_state(
    config: TrainConfig, record: dict[str, Any], processes: Processes
) -> FoundState | None:
    """Find the last good state of the run, if it has one, and cut `record` back to it."""
    if processes.rank == 0:
        sweep(config.out)
    found = last_good_state(config.out)
    record.pop("held_out", None)
    if found is None:
        record |= {"history": [], "spikes": [], "seconds": 0.0}
        logger.warning(f"{config.out} has no state yet: the run begins again")
        return None
    for message in found.damaged:
        logger.warning(f"{message}; the state before it is used")
    step, run = found.state["global_step"], found.state.get("run", {})
    for name in ("history", "spikes"):
        kept = run.get(name, [entry for entry in record.get(name, []) if entry["step"] <= step])
        record[name] = list(kept)  # a copy: the state is not to change
    logger.info(f"resuming from step {step} ({found.path})")
    return found


# --- the trainer


def _device_kind(device: str) -> str:
    """Return cpu, cuda or mps."""
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda", "mps"):
        raise WavearError(f"device is {device!r}, expected auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise WavearError(f"device is {device!r}, and there is no CUDA device here: use cpu")
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise WavearError(f"device is {device!r}, and there are {count} CUDA devices here")
    return kind


def _trainer(
    config: TrainConfig, kind: str, run: Run, processes: Processes, found: FoundState | None
) -> L.Trainer:
    number = config.device.partition(":")[2]
    one = bool(number) and processes.world == 1
    devices: Any = [int(number)] if one else processes.local
    step = found.state["global_step"] + 1 if found else None
    return L.Trainer(
        accelerator=kind,
        devices=devices,
        num_nodes=processes.nodes,
        strategy="ddp" if processes.world > 1 else "auto",
        precision="32-true",  # of the weights
        max_steps=config.max_steps or -1,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=loggers(config, run.record, step),
        callbacks=[run, *([ProgressBar(run)] if config.progress else [])],
        plugins=[StateIO(found), *processes.plugins()],
        enable_checkpointing=False,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class _Data(L.LightningDataModule):
    """Builds the loader when the first step is known: after a resumed state has been read."""

    def __init__(self, segments: Segments, config: TrainConfig):
        super().__init__()
        self.segments = segments
        self.config = config

    @override
    def train_dataloader(self) -> torch.utils.data.DataLoader:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        assert config.batch_size is not None
        rank, world = trainer.global_rank, trainer.world_size
        gpu = trainer.strategy.root_device.type == "cuda"
        workers = config.workers
        if workers is None:
            workers = min(4, max((os.cpu_count() or 1) - 1, 1)) if gpu else 0
        return torch.utils.data.DataLoader(
            self.segments,
            batch_sampler=Order(config.batch_size, trainer.global_step, rank, world),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=gpu,
            worker_init_fn=_begin_worker,
            prefetch_factor=4 if workers else None,
            # Its own generator: otherwise it draws from the global one.
            generator=torch.Generator().manual_seed(config.seed),
        )


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Keep the current directory, often the data's, off the import path of new Python processes.

    These are workers that are not forked, and the compilers of `torch.compile` (Python >= 3.11).
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Restore the signal handlers of the caller: Lightning and `Run` replace each other's."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)


def _begin_worker(worker: int) -> None:
    """Ignore Ctrl-C, which reaches all processes of the group, and end with the main process.

    The loader's own watch misses a death of that process before it begins: the worker would never
    end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _finish(
    config: TrainConfig, corpus: Corpus, trainer: L.Trainer, run: Run, whole: Path | None
) -> TrainResult:
    """Score all held-out recordings, unless more parts follow; write and return the result."""
    out, history = Path(config.out), run.record["history"]
    stopped_by = run.stopped_by or "steps"
    held_out: dict[str, float] = {}
    # Without a validation since the first step there is no best yet.
    best_path = out / ("best" if (out / "best").is_dir() else "last")
    if trainer.is_global_zero and (picture := curves(best_path)) is not None:
        replace_file(out / "loss.png", lambda path: path.write_bytes(picture))
    if stopped_by == "interrupt":
        logger.info(f"saved; to resume: the same command with --resume ({whole or out})")
    elif trainer.is_global_zero and whole is None:
        best = load(best_path, device=trainer.strategy.root_device)
        held_out, skipped = final_scores(config, corpus, best, run.speakers)
        for name, why in skipped.items():
            run.skip(name, why)
        run.record |= {"held_out": held_out, "skipped": run.skipped}
        write_record(config, run.record)
        # The free run improves the sound, and the bits rise a little.
        worse = min(entry["bits"] for entry in history[1:] or history) >= history[0]["bits"]
        if worse and not config.free_run:
            start = config.from_checkpoint or "the untrained model"
            logger.warning(
                f"no validation is better than the {history[0]['bits']:.3f} bits of {start}:"
                " train longer, or with another learning rate"
            )
    return TrainResult(
        bits_before=history[0]["bits"],
        bits_best=min((entry["bits"] for entry in run.comparable()), default=history[-1]["bits"]),
        bits_final=history[-1]["bits"],
        held_out=held_out,
        steps=trainer.global_step,
        seconds=float(run.record.get("seconds", 0.0)),
        stopped_by=stopped_by,
        best=best_path,
        last=out / "last",
        skipped=dict(run.skipped),
    )
