"""`wavear index` and `wavear shards`."""

# Annotations are objects, not strings: tyro reads them.
from collections.abc import Sequence
from typing import Any

from wavear.cli.arguments import Data, Folder
from wavear.common.atomic import say
from wavear.common.log import get_logger
from wavear.common.words import counted

logger = get_logger(__name__)


def index(data: Data, beside: bool = False, processes: int | None = None) -> int:
    """Read the headers of all files of a large corpus once and keep them for every later run.

    Only new and changed files are read, and an interrupted index resumes. `wavear train` does the
    same by itself from 1000 files on.

    Example: wavear index my/recordings --processes 4

    Parameters
    ----------
    data
        Recordings: a folder, a manifest (table or JSON lines with `path`, `audio_filepath` or
        `file_name`, `start`, `duration` or `end`; `path|text`; docs/data.md), or tar shards (a
        pattern in quotes, such as 'shards/{000..012}.tar').
    beside
        Keep the index next to the data, for everybody who reads them there, rather than in your
        cache.
    processes
        Number of processes that read; by default one per core, up to 16.
    """
    from wavear.common.progress import bar
    from wavear.data.corpus import index

    report = index(data, beside=beside, processes=processes, progress=bar)
    for note in report.notes:
        logger.warning("%s", note)
    _list_failed(report.bad, at_most=20)
    rates = ", ".join(map(str, report.rates)) or "no"
    files, recordings = counted(report.files, "file"), counted(report.recordings, "recording")
    bad = len(report.bad)
    say(f"{files}, {report.new} of them new or changed; {bad} cannot be used")
    say(f"{recordings}, {report.seconds / 3600:.2f} hours of audio, {rates} Hz")
    say(f"index: {report.folder or 'not kept'}")
    return 1 if report.bad else 0


def shards(
    data: Data, out: Folder, megabytes: float = 256.0, speakers: bool = False, seed: int = 0
) -> int:
    """Put recordings into tar shards, for an object store: DIR/shard-000000.tar and so on.

    Files are copied byte for byte. `wavear train 'DIR/*.tar'` trains on them, as do other readers
    of webdataset's shards.

    Example: wavear shards my/recordings --out shards --megabytes 512

    Parameters
    ----------
    data
        Recordings: a folder, or a manifest of whole files.
    out
        Folder to write to: empty, or missing.
    megabytes
        Size at which a shard is closed.
    speakers
        The first level of a folder's sub-folders names the speakers; a manifest's column
        `speaker` always counts.
    seed
        Of the order of the files: it is shuffled, so that each shard is a sample of all.
    """
    from wavear.common.progress import bar
    from wavear.data.shards import write_shards

    report = write_shards(
        data, out, megabytes=megabytes, speakers=speakers, seed=seed, progress=bar
    )
    _list_failed(report.failed)
    first, last = report.shards[0].name, report.shards[-1].name
    size = f"{counted(report.files, 'file')}, {report.bytes / 1e6:.1f} MB"
    say(f"{out}  {counted(len(report.shards), 'shard')}, {first} to {last}, {size}")
    return 1 if report.failed else 0


def _list_failed(failed: Sequence[tuple[Any, str]], at_most: int | None = None) -> None:
    for name, reason in failed[:at_most]:
        logger.error("%s: %s", name, reason)
    if at_most is not None and len(failed) > at_most:
        logger.error("... and %d more", len(failed) - at_most)
