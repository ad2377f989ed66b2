"""The run itself: trainer, loader, first and last scores."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from wavear.data.corpus import Corpus
from wavear.data.crops import Layout, Order, Segments, collate
from wavear.evaluation.held_out import Counts, baselines, held_out_bits, subset
from wavear.models.base import AutoregressiveModel
from wavear.models.checkpoint import load
from wavear.models.crop_loss import layout_of
from wavear.training.callbacks import ProgressBar, Run
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.groups import turn_about
from wavear.training.lanes import Lanes
from wavear.training.log import finish, loggers, tell
from wavear.training.module import TrainingModule
from wavear.training.optimizers import described
from wavear.training.precision import choose
from wavear.training.prepare import prepare
from wavear.training.processes import Processes
from wavear.training.run_directory import make_directory
from wavear.training.state import StateIO
from wavear.training.states import Found, last_good_state, sweep


class _Data(L.LightningDataModule):
    """Builds the loader when the step to begin with is known: after a resumed state has been read."""

    def __init__(self, segments: Segments, batch_size: int, config: TrainConfig):
        super().__init__()
        self.segments = segments
        self.batch_size = batch_size
        self.config = config

    @override
    def train_dataloader(self) -> torch.utils.data.DataLoader:
        assert self.trainer is not None
        order = Order(
            self.batch_size,
            self.trainer.global_step,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        gpu = self.trainer.strategy.root_device.type == "cuda"
        workers = self.config.workers
        if workers is None:
            workers = min(4, max((os.cpu_count() or 1) - 1, 1)) if gpu else 0
        return torch.utils.data.DataLoader(
            self.segments,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=gpu,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(
                self.config.seed
            ),  # else it draws from that of everybody
        )


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Keep the current directory, often the data's, off the import path of what is started: from Python 3.11 on.

    Workers that are not forked, and the compilers of `torch.compile`, are new Python processes.
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


def _begin_worker(main: int, worker: int) -> None:
    """Ctrl-C reaches the whole group of processes: the main one decides when its workers end.

    They also end when the main one, process `main`, is killed. The loader's own watch misses a
    death that comes before it begins: it takes whoever is the parent by then for the main process,
    and its worker stays for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    while os.getppid() == main:
        time.sleep(1)
    os._exit(1)


def fit(
    config: Any,
    corpus: Corpus,
    speakers: list[str],
    model: AutoregressiveModel,
    record: dict[str, Any],
    say: Any,
) -> TrainResult:
    """Train `model`; see `wavear.train`. `config` is resolved: the family's defaults stand where None was."""
    assert config.segment is not None
    assert config.batch_size is not None
    layout = layout_of(model, config.segment)
    if model.carries:
        if config.redraw_below is not None:
            raise ValueError(
                f"redraw_below is {config.redraw_below:g}: a {config.family} reads recordings from front to back,"
                " pauses too; leave it away"
            )
        segments = Lanes(corpus.train, layout, speakers, config.seed, batch_size=config.batch_size)
    else:
        segments = Segments(corpus.train, layout, speakers, config.seed, config.redraw_below)
    processes = Processes.here()
    world = processes.world
    if config.batch_size % (world * config.accumulate):
        parts = f"{world} processes of {config.accumulate} parts each"
        raise ValueError(
            f"a batch of {config.batch_size} crops cannot be shared by {parts}: choose a multiple"
        )
    found = _resume(config, record, say) if config.resume else None
    if found is None:
        prepare(model, segments, config.seed, say)
    kind = _device_kind(config.device)
    record["precision"], why = choose(
        config, model, kind, record.get("precision") if config.resume else None
    )
    bf16 = record["precision"] == "bf16"
    module = TrainingModule(model, layout, config, torch.bfloat16 if bf16 else None)
    run = Run(
        config,
        subset(turn_about(corpus.validation), config.validation_seconds * config.sample_rate),
        speakers,
        record,
        corpus.train,
        found.state.get("run") if found else None,
    )
    run.skipped.update(corpus.bad)
    run.skipped.update(record.get("skipped", {}))
    if record["history"] and record["history"][-1] not in run.comparable():
        say("the held-out recordings are others than before: the best is now chosen by these")
    trainer = _trainer(config, kind, run, processes, found)
    ending = [] if config.max_steps is None else [f"{config.max_steps} steps"]
    ending += [] if config.max_minutes is None else [f"{config.max_minutes:g} minutes"]
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{type(model).__name__} of {parameters:,} parameters, receptive field {model.receptive_field} samples,"
        f" on {trainer.strategy.root_device}, until {' or '.join(ending)}"
    )
    say(f"{described(model, config)}; {'bf16' if bf16 else 'float32'} ({why})")
    if trainer.is_global_zero:
        make_directory(config)
        run.write_record()
        tell(trainer, config)
    try:
        path = found.path if found else None
        devices = [trainer.strategy.root_device] if kind == "cuda" else []
        data = _Data(segments, config.batch_size, config)
        with torch.random.fork_rng(devices=devices), _safe_path():
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=False)
        if not run.began:  # all steps had been taken already
            run.save_last(trainer, module)
    finally:
        run.release()
        finish(trainer)
    return _finish(config, corpus, speakers, layout, module, trainer, run, say)


def _resume(config: TrainConfig, record: dict[str, Any], say: Any) -> Found | None:
    """The last good state of the run in `out`, with `record` cut back to it; None if it was killed before the first."""
    if Processes.here().rank == 0:
        sweep(config.out)
    found = last_good_state(config.out)
    record.pop("held_out", None)
    if found is None:
        record |= {"history": [], "spikes": [], "seconds": 0.0}
        say(f"{config.out} was stopped before its first state: it begins anew")
        return None
    for message in found.damaged:
        say(f"{message}; the state before it is taken")
    step, run = found.state["global_step"], found.state.get("run", {})
    for name in ("history", "spikes"):
        kept = run.get(name, [entry for entry in record.get(name, []) if entry["step"] <= step])
        record[name] = list(kept)  # ours, and not the state's
    say(f"going on from step {step} ({found.path})")
    return found


def _device_kind(device: str) -> str:
    """cpu, cuda or mps."""
    kind = device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and there is no CUDA device here: use cpu")
    return kind


def _trainer(
    config: TrainConfig, kind: str, run: Run, processes: Processes, found: Found | None
) -> L.Trainer:
    number = config.device.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {config.device!r}, and there are {torch.cuda.device_count()} CUDA devices here"
        )
    world = processes.world
    devices: Any = [int(number)] if number and world == 1 else processes.local
    bar = [ProgressBar(run)] if config.progress else []
    return L.Trainer(
        accelerator=kind,
        devices=devices,
        num_nodes=processes.nodes,
        strategy="ddp" if world > 1 else "auto",
        precision="32-true",  # of the weights
        max_steps=config.max_steps or -1,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=loggers(
            config.out, config.wandb, run.record, found.state["global_step"] + 1 if found else None
        ),
        callbacks=[run, *bar],
        plugins=[StateIO({str(found.path): found.state} if found else None), *processes.plugins()],
        enable_checkpointing=False,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _finish(
    config: TrainConfig,
    corpus: Corpus,
    speakers: list[str],
    layout: Layout,
    module: TrainingModule,
    trainer: L.Trainer,
    run: Run,
    say: Any,
) -> TrainResult:
    """The scores on all held-out files, beside what needs no model."""
    out = Path(config.out)
    history = run.record["history"]
    stopped_by = run.stopped_by or "steps"
    held_out: dict[str, float] = {}
    if trainer.is_global_zero and stopped_by != "interrupt":
        recordings = subset(corpus.validation, config.final_seconds * config.sample_rate)
        grid = module.model.grid
        counted = Counts.of(
            subset(corpus.train, config.baseline_seconds * config.sample_rate), layout, grid
        )
        best = load(out / "best", device=trainer.strategy.root_device)
        scored = held_out_bits(best, recordings, speakers)
        for name, why in scored.skipped.items():
            if run.skipped.setdefault(name, why) is why:
                say(f"skipped {name}: {why}")
        held_out["model"] = scored.per_sample
        held_out |= baselines(counted, Counts.of(recordings, layout, grid))
        run.record |= {"held_out": held_out, "skipped": run.skipped}
        run.write_record()
    seconds = float(run.record.get("seconds", 0.0))
    result = TrainResult(
        bits_before=history[0]["bits"],
        bits_best=min((entry["bits"] for entry in run.comparable()), default=history[-1]["bits"]),
        bits_final=history[-1]["bits"],
        held_out=held_out,
        steps=trainer.global_step,
        seconds=seconds,
        stopped_by=stopped_by,
        best=out / "best",
        last=out / "last",
        skipped=dict(run.skipped),
    )
    if stopped_by == "interrupt":
        say(f"saved; to go on: the same command with --resume ({out})")
    return result
