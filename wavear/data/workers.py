"""Look into many audio files at once: few of them in threads, many in processes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from wavear.data import levels
from wavear.data.levels import Looked

THREADS = 8  # per process: reading headers waits for the disk, and longer for a network
Block = tuple[Any, Sequence[tuple[Any, ...]]]
"""A mark, and the arguments of `wavear.data.levels.look` for each file."""


def look_here(items: Sequence[tuple[Any, ...]]) -> list[Looked]:
    """Look into files in threads of this process."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda item: levels.look(*item), items))


def look_in_processes(
    blocks: Iterable[Block], processes: int
) -> Iterator[tuple[Any, list[Looked]]]:
    """Look into blocks of files in processes, and yield the results as they come, with the mark.

    A file that crashes its process gets an error; the others are read.
    """
    todo = enumerate(blocks)
    while True:
        unanswered: dict[int, Block] = {}
        try:
            yield from _answers(todo, processes, unanswered)
            return
        except BrokenProcessPool:
            for mark, items in unanswered.values():
                yield mark, list(_look_one_by_one(items))


def _answers(
    todo: Iterator[tuple[int, Block]], processes: int, unanswered: dict[int, Block]
) -> Iterator[tuple[Any, list[Looked]]]:
    waiting: dict[Future[list[Looked]], int] = {}
    with _process_pool(processes) as pool:
        while True:
            for number, block in itertools.islice(todo, 2 * processes - len(waiting)):
                unanswered[number] = block
                waiting[pool.submit(look_here, block[1])] = number
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                looked = future.result()
                mark, _ = unanswered.pop(waiting.pop(future))
                yield mark, looked


def _look_one_by_one(items: Sequence[tuple[Any, ...]]) -> Iterator[Looked]:
    """Look into files in one process at a time, to find the one that crashes it."""
    todo = list(reversed(items))
    while todo:
        with _process_pool(1) as pool:
            try:
                pool.submit(os.getpid).result()
            except BrokenProcessPool:
                raise OSError(f"{sys.executable} cannot start a process that reads files") from None
            try:
                while todo:
                    yield pool.submit(levels.look, *todo[-1]).result()
                    todo.pop()
            except BrokenProcessPool:
                yield Looked(error="crashes the process that reads it", lasting=False)
                todo.pop()


@contextlib.contextmanager
def _process_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Run a pool whose processes end at once with the block, whatever they are doing."""
    spawning = _SpawnContext()
    if os.name == "posix":
        with _isolated():  # the pool's locks would start it without
            resource_tracker.ensure_running()
    pool = ProcessPoolExecutor(processes, spawning, _start_worker)
    try:
        yield pool
    finally:
        for process in spawning.started:
            if process.pid is not None:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end this one.

    Under a fork server that process is not the parent of the system.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _isolated():
            return SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]


class _SpawnContext(SpawnContext):
    def __init__(self) -> None:
        self.started: list[_Process] = []

    def Process(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        self.started.append(_Process(*args, **named))
        return self.started[-1]


_isolating = threading.RLock()


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Make multiprocessing start processes with `python -I`, and without the caller's main module.

    The current directory, often that of the data, must not be on their import path. They get the
    import path of this process without it, since `-I` drops PYTHONPATH and editable installs.
    """
    flags: Callable[[], list[str]] = util._args_from_interpreter_flags  # type: ignore[attr-defined]
    preparation = spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        data = preparation(name) | {"sys_path": _import_path()}
        return {key: value for key, value in data.items() if not key.startswith("init_main")}

    with _isolating:
        util._args_from_interpreter_flags = lambda: [*flags(), "-I"]  # type: ignore[attr-defined]
        spawn.get_preparation_data = prepared
        try:
            yield
        finally:
            util._args_from_interpreter_flags = flags  # type: ignore[attr-defined]
            spawn.get_preparation_data = preparation


def _import_path() -> list[str]:
    """Return this process's import path without the current directory, unless it is wavear's."""
    package, here = str(Path(__file__).parents[2]), os.path.realpath(os.curdir)
    paths = [
        p for p in sys.path if os.path.isabs(p) and (p == package or os.path.realpath(p) != here)
    ]
    return paths if package in paths else [package, *paths]


def default_processes() -> int:
    """Return the number of cores available to this process, at most 16."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return min(cores, 16)
