"""Audio of many inputs by several processes under `torchrun`, and resumption of such runs.

Every process works out its share from the list of all inputs, so no process waits for another, and
no input is in two shares. A file appears whole or not at all: the files that a run left out are the
work of the next one, with any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wavear.common.atomic import replace_file
from wavear.common.claims import claimed
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.common.untrusted import parse_json
from wavear.generation.files import MelInput, Report
from wavear.generation.files import synthesize as synthesize_jobs
from wavear.generation.jobs import Job
from wavear.generation.output import Output
from wavear.generation.settings import Sampling
from wavear.generation.states import describe
from wavear.mel import kaldi
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

RECORD = ".wavear-synthesis.json"  # in the folder of the audio: the model and the settings
# Processes wait this long for the slowest; torchrun ends them if it dies.
_PATIENCE = datetime.timedelta(days=30)


def ranks() -> tuple[int, int]:
    """Return the number of this process and of processes, from `torchrun`, or (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """Return the device of this process: "cuda" is one card for each process of a machine."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"


def share(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """Return the jobs of one process: dealt out largest first, for equal amounts of work.

    Examples
    --------
    >>> jobs = [Job(Path(__file__), Path(name)) for name in "abcde"]
    >>> [[str(job.target) for job in share(jobs, rank, 2)] for rank in range(2)]
    [['a', 'c', 'e'], ['b', 'd']]
    """

    def order(job: Job) -> tuple[int, str]:
        file, _ = kaldi.split_entry(job.source) or (job.source, 0)
        return -file.stat().st_size, str(job.target)

    dealt = sorted(jobs, key=order)
    return dealt[rank::world]


def claim(out: Path, jobs: Sequence[Job], record: dict[str, Any], overwrite: bool = False) -> None:
    """Take a folder for a run, or resume the same run in it.

    Audio of another run, or of none, is refused, or with `overwrite` removed, so that all audio in
    the folder is of this run.
    """
    path, remedy = out / RECORD, "choose another folder, or pass --overwrite"
    if path.exists() and not overwrite:
        try:
            found = dict(parse_json(path.read_bytes()))
        except (ValueError, TypeError):
            raise FileExistsError(f"{path} is damaged: {remedy}") from None
        names = [n for n in sorted({*found, *record}) if found.get(n) != record.get(n)]
        if names:
            raise FileExistsError(
                f"{out} holds audio of another run, with another {', '.join(names)}: {remedy}"
            )
        return
    taken = next((job.target for job in jobs if job.target.exists()), None)
    if taken and not overwrite:
        raise FileExistsError(f"{taken} exists, and {out} has no record of its run: {remedy}")
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs if overwrite else ():
        job.target.unlink(missing_ok=True)
    text = json.dumps(record, indent=1)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def synthesize(
    model: AutoregressiveModel,
    jobs: Sequence[Job],
    out: Path,
    sampling: Sampling = Sampling(),
    *,
    mels: MelInput = MelInput(),
    output: Output = Output(),
    overwrite: bool = False,
) -> Report:
    """Make the missing files of this process's share; return the report of all processes.

    `jobs` are all of them, the same in every process; with `overwrite` all files are made again.
    """
    rank, world = ranks()
    settings = {"mel": dataclasses.asdict(mels), "output": dataclasses.asdict(output)}
    settings |= dataclasses.asdict(sampling)
    for name in ("engine", "threads"):  # these change no sample
        del settings[name]
    record = json.loads(json.dumps({"model": describe(model), **settings}, default=str))

    def begin() -> None:
        with claimed([job.target for job in jobs], out):  # no other run may lose its files
            claim(out, jobs, record, overwrite)

    with _together(world):
        _first(begin, rank, world)
        own = share(jobs, rank, world)
        todo = own if overwrite else [job for job in own if not job.target.exists()]
        if len(todo) < len(own):
            logger.info("%d of %d files exist already", len(own) - len(todo), len(own))
        return _summed(synthesize_jobs(model, todo, sampling, mels=mels, output=output), world)


@contextlib.contextmanager
def _together(world: int) -> Iterator[None]:
    """Connect the processes of `torchrun`; does nothing for a single process."""
    if world == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first(action: Callable[[], object], rank: int, world: int) -> None:
    """Let the first process act before the others continue; if it is refused, all are."""
    refused: list[str | None] = [None]
    if rank == 0:
        try:
            action()
        except (OSError, WavearError) as error:
            refused = [str(error)]
    if world > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(refused)
    if refused[0] is not None:
        raise FileExistsError(refused[0])


def _summed(report: Report, world: int) -> Report:
    """Return the reports of all processes as one, once the slowest is done.

    `torchrun` would end the others when one exits that had to skip an input.
    """
    if world == 1:
        return report
    import torch.distributed as dist

    reports: list[Any] = [None] * world
    dist.all_gather_object(reports, report)
    return Report(
        engine=report.engine,
        files=sum(each.files for each in reports),
        audio_seconds=sum(each.audio_seconds for each in reports),
        seconds=max(each.seconds for each in reports),
        failed=[item for each in reports for item in each.failed],
        findings=[item for each in reports for item in each.findings],
    )
