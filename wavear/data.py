"""Recordings: a folder or a manifest -> which stretch of which file is for training and which is held out.

`find` lists a folder or reads a manifest, `open_corpus` looks into the header of every file, names those that cannot be
used, and splits the rest. Nothing is decoded here unless levels or silence have to be measured.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wavear import audio

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test", "": None}
_THREADS = 8  # reading headers waits for the disk, not for the processor
_PEAK_TARGET = 0.9  # of full scale
_RMS_TARGET = 10 ** (-23 / 20)  # -23 dB of full scale, about the level of broadcast speech (EBU R 128)
_TRIM_KEEP_SECONDS = 0.05  # silence left at either end by `trim_silence`

Normalise = Literal["none", "peak", "rms"]


@dataclass(frozen=True, slots=True)
class Recording:
    """A stretch of an audio file."""

    path: Path
    name: str
    """Path relative to the data, with forward slashes; `#seconds` follows where it does not begin with the file."""
    start: int = 0
    """Where in the file it begins, in samples at the model's rate."""
    frames: int = -1
    """Samples, at the model's rate; -1 until `open_corpus` has read the file's header."""
    sample_rate: int = 0
    """Of the file, in Hz; 0 until then."""
    speaker: str | None = None
    split: str | None = None
    """ "train", "validation" or "test" where a manifest says so."""
    gain: float = 1.0
    """Factor on the samples, from level normalisation."""
    span: tuple[float, float | None] = (0.0, None)
    """Start and duration in seconds, as a manifest gave them."""


@dataclass(frozen=True)
class Corpus:
    """What there is to train on and to validate on."""

    train: list[Recording]
    validation: list[Recording]
    speakers: list[str]
    """Names in the order of their numbers; empty without speakers."""
    bad: list[tuple[str, str]]
    """Files that cannot be used: name and reason."""
    notes: list[str]
    """What a user should know, one line each."""


def find(data: str | Path, speakers: bool = False) -> list[Recording]:
    """Recordings of a folder (at any depth, sorted by name) or of a manifest, their headers not yet read.

    Parameters
    ----------
    data : str or Path
        A folder with WAV, FLAC, OGG, MP3 or AIFF files (hidden ones are passed over), one such file, or a manifest:
        CSV with a header, or JSON lines (`.jsonl`, `.json`). A manifest has `path` (relative to the manifest), and
        optionally `start` and `duration` in seconds, `speaker`, and `split` (train, validation or dev, test). A CSV
        without a header whose lines read `path|text` is taken as well.
    speakers : bool
        A folder's first level of sub-folders names the speakers. (A manifest's column `speaker` always counts.)

    Raises
    ------
    FileNotFoundError
        If `data` does not exist.
    ValueError
        If there is no audio in it, or the manifest cannot be read; the message names the line.
    """
    data = Path(data)
    if data.is_dir():
        return _find_in_folder(data, speakers)
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such folder or manifest")
    if data.suffix.lower() in SUFFIXES:
        return [Recording(data, data.name)]
    rows = _read_manifest(data)
    return [_from_row(row, data, line) for line, row in rows]


def _find_in_folder(folder: Path, speakers: bool) -> list[Recording]:
    found = []
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                path = Path(directory, file)
                name = path.relative_to(folder).as_posix()
                parts = name.split("/")
                found.append(Recording(path, name, speaker=parts[0] if speakers and len(parts) > 1 else None))
    if not found:
        raise ValueError(f"{folder} holds no audio files ({', '.join(s[1:] for s in SUFFIXES)}), at any depth")
    if speakers and (lone := [r.name for r in found if r.speaker is None]):
        raise ValueError(f"{folder / lone[0]} lies in no sub-folder: speakers are named by the first level of folders")
    return sorted(found, key=lambda r: r.name)


def _read_manifest(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of each recording."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither audio by its name ({', '.join(SUFFIXES)}) nor a text manifest") from None
    if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        rows = []
        for line, content in enumerate(text.splitlines(), 1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{path}:{line} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line} is no JSON object: {content:.60}")
            rows.append((line, row))
    else:
        lines = text.splitlines()
        first = lines[0] if lines else ""
        if "|" in first and "path" not in first.split("|"):  # LJSpeech's list: path|text|...
            rows = [(n, {"path": content.split("|")[0]}) for n, content in enumerate(lines, 1) if content.strip()]
        else:
            separator = max(",;\t|", key=first.count)
            reader = csv.DictReader(lines, delimiter=separator)
            rows = [(reader.line_num, {key: value or "" for key, value in row.items() if key}) for row in reader]
            rows = [(line, row) for line, row in rows if any(row.values())]
    if not rows:
        raise ValueError(f"{path} lists no recordings")
    for line, row in rows:
        if not isinstance(row.get("path"), str) or not row["path"]:
            raise ValueError(f"{path}:{line} has no 'path'; its columns are {', '.join(row) or 'none'}")
    return rows


def _from_row(row: dict[str, Any], manifest: Path, line: int) -> Recording:
    def number(key: str, least: float) -> float | None:
        value = row.get(key)
        if value is None or value == "":
            return None
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = float("nan")
        if not least <= seconds < float("inf"):
            raise ValueError(f"{manifest}:{line}: {key} is {value!r}, expected seconds, {least:g} or more")
        return seconds

    start, duration = number("start", 0.0) or 0.0, number("duration", 0.0)
    split = str(row.get("split") or "").strip().lower()
    if split not in SPLITS:
        raise ValueError(f"{manifest}:{line}: split is {row['split']!r}, expected train, validation, dev or test")
    speaker = str(row.get("speaker") if row.get("speaker") is not None else "").strip()
    name = Path(row["path"]).as_posix() + (f"#{start:g}" if start else "")
    path = manifest.parent / Path(row["path"]).expanduser()
    return Recording(path, name, speaker=speaker or None, split=SPLITS[split], span=(start, duration))


def open_corpus(
    data: str | Path,
    *,
    sample_rate: int,
    validation: str | Path | None = None,
    validation_fraction: float = 0.05,
    speakers: bool = False,
    least_samples: int = 1,
    normalise: Normalise = "none",
    normalise_by: Literal["file", "speaker"] = "file",
    trim_silence: float | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> Corpus:
    """Look into every file and split them.

    Files are held out by the hash of their name, so a file stays where it is when others come or go; at least one is
    held out and at least one is trained on. A single file is cut: its end is held out. Where a manifest has a column
    `split` that holds anything out, or `validation` is given, that decides alone.

    Parameters
    ----------
    data, validation : str or Path
        See `find`; `validation` is a second folder or manifest, all of it held out.
    sample_rate : int
        Of the model, in Hz. Files of another rate are resampled as they are read; a note says so, once.
    validation_fraction : float
        Share of the files to hold out.
    speakers : bool
        See `find`.
    least_samples : int
        Shorter files cannot be used (one mel frame, say).
    normalise : "none", "peak" or "rms"
        Gain that brings the peak to 0.9 or the RMS to -23 dB of full scale (and no peak over 1). Decodes every file.
    normalise_by : "file" or "speaker"
        One gain per file, or one per speaker, which keeps the differences between the files of a speaker.
    trim_silence : float, optional
        Cut the ends that are this many dB below the file's peak, in blocks of 10 ms, up to 50 ms. Decodes every file.
    progress : callable, optional
        Wraps an iterable, with its length and a description, to show how far it is.

    Raises
    ------
    ValueError
        If not one file can be used; the message gives the first reason.
    """
    found = find(data, speakers)
    held = [] if validation is None else find(validation, speakers)
    bad: list[tuple[str, str]] = []
    notes: list[str] = []
    measure = normalise != "none" or trim_silence is not None

    def look(recording: Recording) -> Recording | tuple[str, str]:
        try:
            opened = _open(recording, sample_rate, least_samples)
            return _measured(opened, sample_rate, normalise, trim_silence) if measure else opened
        except (ValueError, OSError) as error:
            return recording.name, reason(error, recording)

    with ThreadPoolExecutor(_THREADS) as pool:
        todo: Iterable[Any] = pool.map(look, found + held)
        if progress is not None:
            todo = progress(todo, len(found) + len(held), "measuring levels" if measure else "reading headers")
        looked = list(todo)
    good, good_held = [], []
    for index, result in enumerate(looked):
        if isinstance(result, tuple):
            bad.append(result)
        else:
            (good if index < len(found) else good_held).append(result)
    for part, source in ((good, data), *(((good_held, validation),) if validation is not None else ())):
        if not part:
            raise ValueError(f"{source}: none of the files can be used; the first: {bad[0][0]}: {bad[0][1]}")
    rates = sorted({r.sample_rate for r in good + good_held} - {sample_rate})
    if rates:
        count = sum(r.sample_rate != sample_rate for r in good + good_held)
        listed = ", ".join(map(str, rates))
        notes.append(f"{count} of {len(good + good_held)} files are resampled to {sample_rate} Hz (from {listed} Hz)")
    if normalise_by == "speaker" and normalise != "none":
        good, good_held = _level_by_speaker(good), _level_by_speaker(good_held)
    if validation is None:
        train, kept = split(good, validation_fraction)
    else:
        train, kept = [r for r in good if r.split in (None, "train")], good_held
        if not train:
            raise ValueError(f"{data}: every recording is held out by its 'split', none is left to train on")
    names = sorted({r.speaker for r in train + kept if r.speaker is not None})
    if names and any(r.speaker is None for r in train + kept):
        lone = next(r.name for r in train + kept if r.speaker is None)
        raise ValueError(f"{data}: {lone} has no speaker and others have: name all of them, or none")
    return Corpus(train, kept, names, bad, notes)


def _open(recording: Recording, rate: int, least_samples: int) -> Recording:
    """With start and length, from the file's header."""
    info = audio.info(recording.path)
    whole = (2 * info.frames * rate + info.sample_rate) // (2 * info.sample_rate)  # rounded, as `audio.read` does
    start, duration = round(recording.span[0] * rate), recording.span[1]
    if start >= whole:
        raise ValueError(f"it is to be read from {recording.span[0]:g} s on, and ends at {info.seconds:g} s")
    frames = whole - start if duration is None else min(whole - start, round(duration * rate))
    if frames < least_samples:
        raise ValueError(f"{frames} samples at {rate} Hz are too few: at least {least_samples} are needed")
    return dataclasses.replace(recording, start=start, frames=frames, sample_rate=info.sample_rate)


def _measured(recording: Recording, rate: int, normalise: Normalise, trim: float | None) -> Recording:
    """With a gain from its level, and without its silent ends."""
    waveform = audio.read(recording.path, rate, recording.start, recording.frames)
    if trim is not None:
        kept = audio.trim_silence(waveform, top_db=trim, margin=round(_TRIM_KEEP_SECONDS * rate))
        start = recording.start + kept.storage_offset() - waveform.storage_offset()  # it is a view
        recording, waveform = dataclasses.replace(recording, start=start, frames=len(kept)), kept
    peak, rms = float(waveform.abs().max()), float(waveform.double().square().mean().sqrt())
    if normalise == "none" or peak == 0:
        return recording
    gain = _PEAK_TARGET / peak if normalise == "peak" else min(_RMS_TARGET / rms, 1 / peak)
    return dataclasses.replace(recording, gain=gain)


def _level_by_speaker(recordings: list[Recording]) -> list[Recording]:
    """One gain for all recordings of a speaker: the least of theirs, so that none is clipped."""
    gains: dict[str | None, list[float]] = {}
    for recording in recordings:
        gains.setdefault(recording.speaker, []).append(recording.gain)
    return [dataclasses.replace(r, gain=min(gains[r.speaker])) for r in recordings]


def split(recordings: Sequence[Recording], fraction: float) -> tuple[list[Recording], list[Recording]]:
    """(train, validation): by the column `split` where it holds anything out, else by the hash of the name.

    Raises
    ------
    ValueError
        If `fraction` is not between 0 and 1, or nothing is left to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction!r}, expected more than 0 and less than 1")
    recordings = [r for r in recordings if r.split != "test"]
    if any(r.split == "validation" for r in recordings):
        train = [r for r in recordings if r.split != "validation"]
        if not train:
            raise ValueError("every recording is held out by its 'split', none is left to train on")
        return train, [r for r in recordings if r.split == "validation"]
    if not recordings:
        raise ValueError("every recording is held out by its 'split', none is left to train on")
    if len(recordings) == 1:
        return _cut(recordings[0], fraction)
    # Stretches of one file stay together: the file's name is hashed, not the stretch's.
    names = sorted({r.name.split("#")[0] for r in recordings}, key=_hash)
    if len(names) == 1:
        count = max(1, min(round(len(recordings) * fraction), len(recordings) - 1))
        return list(recordings[:-count]), list(recordings[-count:])
    held = {name for name in names if _hash(name) < fraction} or {names[0]}
    if len(held) == len(names):
        held.discard(names[-1])
    return [r for r in recordings if r.name.split("#")[0] not in held], [
        r for r in recordings if r.name.split("#")[0] in held
    ]


def _cut(recording: Recording, fraction: float) -> tuple[list[Recording], list[Recording]]:
    """The beginning of a single file and its end."""
    at = round(recording.frames * (1 - fraction))
    if at == 0 or at == recording.frames:
        raise ValueError(f"{recording.name} is the only recording, and too short to hold out a part of it")
    end = dataclasses.replace(
        recording, name=f"{recording.name}#end", start=recording.start + at, frames=recording.frames - at
    )
    return [dataclasses.replace(recording, frames=at)], [end]


def _hash(name: str) -> float:
    """Of a name, even over [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def reason(error: Exception, recording: Recording) -> str:
    """One line that says why a file cannot be used, without its name."""
    lines = str(error).strip().splitlines()
    return lines[0].replace(f"{recording.path}: ", "") if lines else type(error).__name__
