"""Audio of many inputs by several processes under `torchrun`: whose inputs are whose, and which are done.

Every process works out its share from all inputs alone, so no process waits for another, and no
input is in two shares. A file appears whole or not at all; so what a run that was cut short has
left is what there is to do, for as many processes as the next one has.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wavear.common.atomic import replace_file
from wavear.generation.files import Job, Report
from wavear.generation.files import synthesize as synthesize_jobs
from wavear.generation.states import describe
from wavear.models.base import AutoregressiveModel

RECORD = ".wavear-synthesis.json"  # in the folder of the audio: what it is made with
_PATIENCE = datetime.timedelta(
    days=30
)  # that processes wait for the slowest: torchrun ends them if it dies


def ranks() -> tuple[int, int]:
    """(number of this process, number of processes), as `torchrun` says, or (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str) -> str:
    """The device of this process: "cuda" is one card for each process of a machine."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"


def share(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """The jobs of one process: the files are dealt out, largest first, so that all have about as much to do.

    Examples
    --------
    >>> jobs = [Job(Path(__file__), Path(name)) for name in "abcde"]
    >>> [[str(job.target) for job in share(jobs, rank, 2)] for rank in range(2)]
    [['a', 'c', 'e'], ['b', 'd']]
    """
    dealt = sorted(jobs, key=lambda job: (-job.source.stat().st_size, str(job.target)))
    return dealt[rank::world]


def claim(out: Path, jobs: Sequence[Job], record: dict[str, Any], overwrite: bool = False) -> None:
    """Take a folder for a run, or go on with the same run in it.

    Raises
    ------
    FileExistsError
        If it holds audio that no run has claimed, or another one, and `overwrite` is false. With it
        such audio is removed, so that what a run that is cut short leaves is its own.
    """
    path = out / RECORD
    if path.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise FileExistsError(
                f"{path} is damaged: choose another folder, or pass --overwrite"
            ) from None
        if names := sorted(
            name for name in {*found, *record} if found.get(name) != record.get(name)
        ):
            raise FileExistsError(
                f"{out} holds audio of another run, with another {', '.join(names)}: choose another folder, or pass"
                " --overwrite"
            )
        return
    if not overwrite and (taken := next((job.target for job in jobs if job.target.exists()), None)):
        raise FileExistsError(
            f"{taken} exists, and {out} does not say what made it: choose another folder, or pass --overwrite"
        )
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs if overwrite else ():
        job.target.unlink(missing_ok=True)
    replace_file(
        path, lambda temporary: temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    )


def synthesize(
    model: AutoregressiveModel,
    jobs: Sequence[Job],
    out: Path,
    rank: int,
    world: int,
    overwrite: bool,
    settings: dict[str, Any],
    *,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
    warn: Callable[[str], object] = lambda line: None,
) -> Report:
    """The share of this process of what is left to do; the report is of all processes.

    Parameters
    ----------
    model : AutoregressiveModel
        On the device of this process.
    jobs : sequence of Job
        All of them, the same in every process.
    out : Path
        The folder of the audio.
    rank, world : int
        See `ranks`.
    overwrite : bool
        Make all files anew.
    settings : dict
        Of `wavear.generation.files.synthesize`.
    say, complain, warn : callable
        As there.

    Raises
    ------
    FileExistsError
        If the folder holds other audio and `overwrite` is false.
    """
    made_with = {
        name: value for name, value in settings.items() if name not in ("engine", "threads")
    }
    record = json.loads(json.dumps({"model": describe(model), **made_with}, default=str))
    with _together(world):
        _first(lambda: claim(out, jobs, record, overwrite), rank, world)
        own = share(jobs, rank, world)
        todo = own if overwrite else [job for job in own if not job.target.exists()]
        if len(todo) < len(own):
            say(f"{len(own) - len(todo)} of {len(own)} files are there")
        report = synthesize_jobs(model, todo, say=say, complain=complain, warn=warn, **settings)
        return _summed(report, world)


@contextlib.contextmanager
def _together(world: int) -> Iterator[None]:
    """The processes of `torchrun` know each other within; nothing for a process alone."""
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
    """Let the first process act before any goes on; if it is refused, all are."""
    refused: list[str | None] = [None]
    if rank == 0:
        try:
            action()
        except OSError as error:
            refused = [str(error)]
    if world > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(refused)
    if refused[0] is not None:
        raise FileExistsError(refused[0])


def _summed(report: Report, world: int) -> Report:
    """The reports of all processes as one. It waits for the slowest: `torchrun` would end the others where one is done
    and had to pass over an input."""
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
