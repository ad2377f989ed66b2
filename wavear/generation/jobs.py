"""Jobs: which file each input becomes, checked before any work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wavear.audio import SUFFIXES
from wavear.common.atomic import check_writable
from wavear.common.errors import WavearError
from wavear.mel import kaldi
from wavear.mel.mel_files import MEL_SUFFIXES, listed

MADE = "-synthesized"
"""End of the name of a file written next to its input."""


@dataclass(frozen=True)
class Job:
    """One input and the file it becomes."""

    source: Path
    target: Path


def plan(
    inputs: Sequence[str | Path],
    out: str | Path | None,
    suffix: str,
    *,
    mels: bool = True,
    overwrite: bool = False,
    ending: str = "",
) -> list[Job]:
    """List which file each input becomes; raise before any work starts if one cannot be used.

    Inputs are files, and folders, whose audio (and, with `mels`, mel) files at any depth are taken,
    except hidden ones and those in `out`. `x.flac` becomes `x.wav` in `out`, `sub/x.flac` of a
    folder `sub/x.wav`; if `out` is None, both become `x-synthesized.wav` next to `x.flac`, and
    folders are searched for other files than such ones. Each entry of a Kaldi archive or list
    (.ark, .scp) is an input of its own name. `ending` is added to the stem of the input's name.
    Without `overwrite` no file is replaced, and an input never is.
    """
    beside = out is None
    out = Path(out or "")
    suffixes = SUFFIXES + MEL_SUFFIXES * mels
    kinds = "audio or mel" if mels else "audio"
    found: list[tuple[Path, Path]] = []
    if not inputs:
        raise WavearError(f"there is no input: name {kinds} files, or folders of these")
    for source in map(Path, inputs):
        if source.is_dir():
            inside = _walk(source, suffixes, None if beside else out)
            if not inside:
                raise WavearError(f"{source} holds no {kinds} files ({listed(suffixes)})")
            found += inside
        elif not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        elif mels and source.suffix.lower() in kaldi.SUFFIXES:
            entries = kaldi.entries(source).items()
            found += [(entry, Path(f"{name}{source.suffix}")) for name, entry in entries]
        elif source.suffix.lower() not in suffixes:
            raise WavearError(
                f"{source} is not an {kinds} file by its name: expected {listed(suffixes)};"
                f" other audio can be converted: ffmpeg -i {source.name} {source.stem}.wav"
            )
        else:
            found.append((source, Path(source.name)))
    if not found:
        raise WavearError(f"no input: name {kinds} files, or a folder of them")
    if beside:
        ending += MADE
        found = [(source, source.with_name(name.name)) for source, name in found]
    # The suffix stays until it is replaced, since a stem may have dots.
    found = [(s, name.with_name(f"{name.stem}{ending}{name.suffix}")) for s, name in found]
    above = next((part for part in (out, *out.parents) if part.exists()), out)
    if above.exists() and not above.is_dir():
        raise NotADirectoryError(f"{above} is a file: --out names the folder to write to")
    sources = {source.resolve() for source, _ in found}
    jobs: dict[Path, Job] = {}
    for source, name in found:
        target = out / name.with_suffix(suffix)
        if target in jobs and jobs[target].source.resolve() == source.resolve():
            continue  # named twice
        if target in jobs:
            other = jobs[target].source
            remedy = "rename one" if other.parent == source.parent else "give the folder above"
            raise WavearError(
                f"{other} and {source} would both become {target}: give them one at a time, or"
                f" {remedy}"
            )
        if target.is_dir():
            raise IsADirectoryError(
                f"{target} is a folder: {source} would become a file of that name"
            )
        if target.resolve() in sources:
            raise FileExistsError(f"{target} is an input itself: choose another folder to write to")
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists: {'choose a' if beside else 'choose another'} folder to write to"
                f"{' with --out' if beside else ''}, or pass --overwrite"
            )
        jobs[target] = Job(source, target)
    for folder in sorted({job.target.parent for job in jobs.values()}) if beside else [out]:
        check_writable(folder)
    return list(jobs.values())


def check_folder(out: Path, overwrite: bool, record: str) -> None:
    """Refuse a folder to write to before the work, unless it is empty or may be overwritten.

    Raises
    ------
    OSError
        The folder is a file, cannot be written, or has files and `overwrite` is false or the file
        `record` of an earlier result is missing.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{out} is not empty: choose another folder with --out, or pass --overwrite"
            )
        if not (out / record).is_file():
            raise FileExistsError(
                f"{out} is not empty and has no {record}: choose another folder with --out"
            )
    check_writable(out)


def _walk(folder: Path, suffixes: tuple[str, ...], out: Path | None) -> list[tuple[Path, Path]]:
    """Return (file, name below `folder`), sorted, without what was written to `out` below it."""
    found = []
    for directory, subdirectories, files in os.walk(folder):
        subdirectories[:] = [
            name
            for name in subdirectories
            if not name.startswith(".")
            and (out is None or Path(directory, name).resolve() != out.resolve())
        ]
        for name in files:
            path = Path(directory, name)
            made = out is None and path.stem.endswith(MADE)
            if not name.startswith(".") and name.lower().endswith(suffixes) and not made:
                found.append((path, path.relative_to(folder)))
    return sorted(found)
