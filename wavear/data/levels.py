"""Looking into many audio files at once: in threads where they are few, in processes of their own where they are many.

A process answers one line of JSON with another. So it needs no import of the caller's main module,
it ends when the caller ends, however that happens, and a file that kills it (a decoder's fault) is
named and costs one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

from wavear import audio

Normalise = Literal["none", "peak", "rms"]

THREADS = 8  # of a process: reading headers waits for the disk, and for a network more so
_PEAK_TARGET = 0.9  # of full scale
_RMS_TARGET = 10 ** (
    -23 / 20
)  # -23 dB of full scale, about the level of broadcast speech (EBU R 128)
_TRIM_KEEP_SECONDS = 0.05  # silence left at either end by `trim_silence`


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """What `level` measures."""

    start: int
    frames: int
    gain: float


@dataclasses.dataclass(frozen=True, slots=True)
class Looked:
    """What came of looking into a file: two whole numbers and a real one, by the kind of look; or why it failed."""

    a: int = 0
    b: int = 0
    c: float = 0.0
    error: str | None = None
    lasting: bool = True
    """Whether another look would say the same while the file stays as it is; not so where it could not be opened."""


def level(
    path: audio.AudioPath,
    rate: int,
    start: int,
    frames: int,
    normalise: Normalise,
    trim: float | None,
) -> Level:
    """The gain that brings a stretch to its level, and where it begins and how long it is without its silent ends."""
    waveform = audio.read(path, rate, start, frames)
    if trim is not None:
        kept = audio.trim_silence(waveform, top_db=trim, margin=round(_TRIM_KEEP_SECONDS * rate))
        start += int(kept.storage_offset() - waveform.storage_offset())  # it is a view
        waveform, frames = kept, len(kept)
    peak, rms = float(waveform.abs().max()), float(waveform.double().square().mean().sqrt())
    if normalise == "none" or peak == 0:
        return Level(start, frames, 1.0)
    return Level(
        start,
        frames,
        _PEAK_TARGET / peak if normalise == "peak" else min(_RMS_TARGET / rms, 1 / peak),
    )


def look(kind: str, item: Sequence[Any]) -> Looked:
    """Look into a file.

    Parameters
    ----------
    kind : "header" or "level"
        Header: length in samples, and rate. Level: see `level`.
    item : the path (that of a `Member` as four values), then for "level" its other arguments
    """
    first, *rest = item
    path = audio.Member(*first) if isinstance(first, list) else first
    try:
        if kind == "header":
            info = audio.info(path)
            return Looked(info.frames, info.sample_rate)
        found = level(path, *rest)
        return Looked(found.start, found.frames, found.gain)
    except (ValueError, OSError) as error:
        return Looked(error=why(error, path), lasting=not isinstance(error, OSError))


def why(error: Exception, path: audio.AudioPath) -> str:
    """One line that says why a file cannot be used, without its name."""
    lines = str(error).strip().splitlines()
    return lines[0].replace(f"{path}: ", "") if lines else type(error).__name__


def look_here(kind: str, items: Iterable[Sequence[Any]]) -> Iterator[Looked]:
    """`look` at each, in threads of this process."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda item: look(kind, item), items)


def _import_path() -> list[str]:
    """Return where this process imports from, less the current directory, unless that holds this package."""
    package, here = str(Path(__file__).parents[1]), os.path.realpath(os.curdir)
    paths = [
        p for p in sys.path if os.path.isabs(p) and (p == package or os.path.realpath(p) != here)
    ]
    return paths if package in paths else [package, *paths]


class _Process:
    """A process that looks into files, made when it is first needed, and again when a file has killed it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None

    def ask(self, kind: str, items: Sequence[Sequence[Any]]) -> list[Looked] | None:
        """What comes of a block of files; None if one of them killed the process."""
        child = self._started()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps([kind, items]) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            answer = ""
        if answer.endswith("\n"):
            return [Looked(*values) for values in json.loads(answer)]
        self.end()
        return None

    def _started(self) -> subprocess.Popen[str]:
        if self.child is None:
            # Isolated (-I): the current directory, often the data's, is no place to import from.
            # What else this process imports from (PYTHONPATH, an editable install) is handed over.
            program = f"import sys; sys.path[:] = {_import_path()!a}; from wavear.data.levels import serve; serve()"
            # A process that reads headers needs no thread of torch's.
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.child = subprocess.Popen(
                [sys.executable, "-I", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",
                env=environment,
            )
            assert self.child.stdout is not None
            if self.child.stdout.readline() != "ready\n":
                self.end()
                raise OSError(f"{sys.executable} starts no process that can look into files")
        return self.child

    def end(self) -> None:
        """Now."""
        if self.child is not None:
            self.child.kill()
            for pipe in (self.child.stdin, self.child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self.child.wait()
            self.child = None


def look_in_processes(
    kind: str, blocks: Iterable[tuple[Any, Sequence[Sequence[Any]]]], processes: int
) -> Iterator[tuple[Any, list[Looked]]]:
    """`look` at each item of blocks, in processes; blocks come back as they get done, with their mark.

    Parameters
    ----------
    kind : as of `look`
    blocks : iterable of (mark, items)
    processes : int
    """
    own = threading.local()
    made: list[_Process] = []
    closing = threading.Event()

    def ask(items: Sequence[Sequence[Any]]) -> list[Looked]:
        if closing.is_set():
            return []
        if not hasattr(own, "process"):
            own.process = _Process()
            made.append(own.process)
        found = own.process.ask(kind, items)
        if found is not None:
            return found
        if len(items) == 1:
            return [Looked(error="kills the process that looks into it", lasting=False)]
        half = len(items) // 2
        return ask(items[:half]) + ask(items[half:])

    pool = ThreadPoolExecutor(processes)
    try:
        waiting: dict[Future[list[Looked]], Any] = {}
        todo = iter(blocks)
        while True:
            for mark, items in itertools.islice(todo, 2 * processes - len(waiting)):
                waiting[pool.submit(ask, items)] = mark
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(done), done.result()
    finally:
        closing.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(made):
            if process.child is not None:
                process.child.kill()  # whoever waits for its answer gets none
        pool.shutdown(wait=True)
        for process in made:
            process.end()


def default_processes() -> int:
    """As many as there are cores for this process, up to 16."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return min(cores, 16)


def serve() -> None:
    """Answer until there are no more questions: the main program of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks: it ends us
    answers, sys.stdout = sys.stdout, sys.stderr
    answers.write("ready\n")
    answers.flush()
    with ThreadPoolExecutor(THREADS) as pool:
        for question in sys.stdin:
            kind, items = json.loads(question)
            found = pool.map(functools.partial(look, kind), items)
            answers.write(json.dumps([[f.a, f.b, f.c, f.error, f.lasting] for f in found]) + "\n")
            answers.flush()
