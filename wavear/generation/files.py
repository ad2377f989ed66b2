"""From files to files: recordings and mels in, new audio or mels out.

`plan` says which file becomes which, and refuses before any work starts; `synthesize` and
`write_mels` do the work. An input that cannot be used is named, counted and passed over; the others
are done.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear import audio
from wavear.common.atomic import replace_file
from wavear.generation.cuda.choice import ENGINES as CUDA_ENGINES
from wavear.generation.defects import Finding, watch
from wavear.generation.engines import generate, make_engine, name_of_engine
from wavear.generation.priming import check_prime, doubts
from wavear.mel.detection import Expectation, adapt_mel, describe_source
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
MEL_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")
_WINDOW = 96  # inputs read ahead, among which those of similar length are batched
_BATCH = 24  # utterances per batch: what the engines were tuned for
_BATCH_SAMPLES = 2**25  # of a batch at most: 8 bytes each
_LONGEST_SECONDS = 86400.0  # a WAV file ends at 4 GiB, 27 hours at 22050 Hz
_CUDA = {
    "window": 4096,
    "most": 2048,
    "samples": 2**27,
    "spread": 2.0,
}  # on a card, which those that end leave
_SPREAD = (
    1.25  # longest over shortest of a batch: what is made beyond an utterance's end is thrown away
)


@dataclass(frozen=True)
class Job:
    """One input and the file it becomes."""

    source: Path
    target: Path


# What `Output.format` says: the ending of the file's name, and the encoding of
# `wavear.audio.write`.
FORMATS = {
    "wav": (".wav", "pcm16"),
    "wav24": (".wav", "pcm24"),
    "wavfloat": (".wav", "float32"),
    "flac": (".flac", "pcm16"),
    "flac24": (".flac", "pcm24"),
    "ogg": (".ogg", "vorbis"),
    "opus": (".opus", "opus"),
}


@dataclass(frozen=True)
class Output:
    """How audio is written."""

    format: str | None = None
    """wav (16 bits), wav24, wavfloat, flac (16 bits), flac24, ogg (Vorbis) or opus; by default wav, or what the name of
    the file says."""
    normalize: float | None = None
    """Bring the peak of each file to so many dB of full scale (-1, say); by default the level is left as it is."""
    fade: float = 0.0
    """Milliseconds to fade in and out over."""

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, it must be one of {', '.join(FORMATS)}")
        if self.normalize is not None and not -200 <= self.normalize <= 0:
            raise ValueError(f"normalize is {self.normalize!r}, it must be -200 to 0 dB")
        if not 0 <= self.fade < float("inf"):
            raise ValueError(f"fade is {self.fade!r}, it must be 0 ms or more")

    @property
    def suffix(self) -> str:
        """Of the files."""
        return FORMATS[self.format or "wav"][0]

    def write(self, path: Path, waveform: torch.Tensor, sample_rate: int) -> int:
        """Write a waveform; how many samples were clipped."""
        if self.normalize is not None:
            waveform = audio.normalize_peak(waveform, self.normalize)
        waveform = audio.fade(waveform, sample_rate, self.fade) if self.fade else waveform
        encoding = None if self.format is None else FORMATS[self.format][1]
        return audio.write(path, waveform.numpy(), sample_rate, encoding)


@dataclass
class Report:
    """What was done."""

    engine: str = ""
    files: int = 0
    audio_seconds: float = 0.0
    """Of the audio that was made, or read."""
    seconds: float = 0.0
    """That it took, without loading the model."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Inputs that could not be used, and why."""
    findings: list[tuple[Path, Finding]] = field(default_factory=list)
    """What is wrong with the audio that was made, see `wavear.watch`."""

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio per second."""
        return self.audio_seconds / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        engine = f", engine {self.engine}" if self.engine else ""
        return (
            f"{self.files} {'file' if self.files == 1 else 'files'}, {self.audio_seconds:.2f} s of audio"
            f" in {self.seconds:.2f} s, {self.real_time_factor:.2f} x real time{engine}"
        )


def plan(
    inputs: Sequence[str | Path],
    out: str | Path,
    suffix: str,
    *,
    mels: bool = True,
    overwrite: bool = False,
) -> list[Job]:
    """Which file each input becomes, checked before any work starts.

    Parameters
    ----------
    inputs : sequence of str or Path
        Files, and folders, whose audio (and mel) files at any depth are taken, hidden ones passed
        over.
    out : str or Path
        The folder to write to: `x.flac` becomes `x.wav`, `sub/x.flac` of a folder `sub/x.wav`. What
        lies in `out` itself is not taken for input.
    suffix : str
        Of the files to write, such as ".wav".
    mels : bool
        Whether an input may be a mel; otherwise it is audio.
    overwrite : bool
        Whether files may be replaced. An input never is.

    Raises
    ------
    FileNotFoundError
        If there is no such input.
    FileExistsError
        If a file to write exists and `overwrite` is false.
    ValueError
        If there is nothing to do, or two inputs would become the same file.
    """
    out = Path(out)
    suffixes = AUDIO_SUFFIXES + MEL_SUFFIXES * mels
    kinds = "audio or mel" if mels else "audio"
    found: list[tuple[Path, Path]] = []
    for source in map(Path, inputs):
        if source.is_dir():
            inside = _walk(source, suffixes, out)
            if not inside:
                raise ValueError(f"{source} holds no {kinds} files ({_listed(suffixes)})")
            found += inside
        elif not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        elif source.suffix.lower() not in suffixes:
            raise ValueError(
                f"{source} is no {kinds} file by its name: expected {_listed(suffixes)}"
            )
        else:
            found.append((source, Path(source.name)))
    if not found:
        raise ValueError(f"no input: name {kinds} files, or a folder of them")
    if (
        above := next((part for part in (out, *out.parents) if part.exists()), out)
    ).exists() and not above.is_dir():
        raise NotADirectoryError(f"{above} is a file: --out names the folder to write to")
    sources = {source.resolve() for source, _ in found}
    jobs: dict[Path, Job] = {}
    for source, name in found:
        target = out / name.with_suffix(suffix)
        if target in jobs and jobs[target].source.resolve() == source.resolve():
            continue  # named twice
        if target in jobs:
            raise ValueError(
                f"{jobs[target].source} and {source} would both become {target}: give them one at a time, or the folder"
                " above them"
            )
        if target.is_dir():
            raise IsADirectoryError(
                f"{target} is a folder: {source} would become a file of that name"
            )
        if target.resolve() in sources:
            raise FileExistsError(f"{target} is an input itself: choose another folder to write to")
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists: choose another folder to write to, or pass --overwrite"
            )
        jobs[target] = Job(source, target)
    check_writable(out)
    return list(jobs.values())


def check_writable(folder: str | Path) -> None:
    """Try whether files can be made in a folder, or in what there is of the folders above it. Nothing is left.

    Raises
    ------
    OSError
        If not: no permission, a read-only file system.
    """
    existing = next(
        part for part in (Path(folder), *Path(folder).absolute().parents) if part.exists()
    )
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {existing}: {error.strerror}") from None


def read_mel(
    path: str | Path,
    config: MelConfig,
    *,
    model: AutoregressiveModel | None = None,
    source: MelConfig | str | None = None,
    seconds: float | None = None,
    force: bool = False,
    complain: Callable[[str], object] = lambda line: None,
) -> torch.Tensor:
    """A mel from a file, as the mels a model was trained on: converted, or judged. Nothing in the file is executed.

    Parameters
    ----------
    path : str or Path
        A tensor of shape (M, F) or (1, M, F), floating point, in `.npy`, `.npz` (named `mel`, or
        alone; beside it `config`, the JSON of a `MelConfig`, as `write_mels` writes it), `.pt` (a
        tensor, or a dict with `mel`; read by torch's loader for weights, which runs no code) or
        `.safetensors` (named `mel`, or alone).
    config : MelConfig
        What is wanted.
    model : AutoregressiveModel, optional
        The one that was trained on such mels: a mel that does not say what it is is judged by what
        the model has seen.
    source, seconds, force
        See `wavear.adapt_mel`; a file that says what it holds is believed.
    complain : callable
        Is told what is doubtful.

    Returns
    -------
    Tensor, shape (M, F), float32

    Raises
    ------
    ValueError
        If the file is damaged, or holds no mel that can be used; the message says what differs.
    """
    path = Path(path)
    if path.suffix.lower() not in MEL_SUFFIXES:
        raise ValueError(f"{path} is no mel file by its name: expected {_listed(MEL_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    read = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".pt": _read_pt,
        ".safetensors": _read_safetensors,
    }
    mel, described = read[path.suffix.lower()](path)
    shape = tuple(mel.shape)
    if mel.dim() == 3 and shape[0] == 1:
        mel = mel[0]
    if mel.dim() != 2:
        raise ValueError(
            f"{path}: the mel has shape {shape}, expected ({config.bands} bands, frames)"
        )
    if not mel.is_floating_point():
        raise ValueError(f"{path}: the mel is {mel.dtype}, expected floating point")
    if mel.shape[1] == 0:
        raise ValueError(f"{path}: the mel has no frames")
    mel = mel.float()
    if not bool(torch.isfinite(mel).all()):
        frame = int((~torch.isfinite(mel)).any(dim=0).nonzero()[0])
        raise ValueError(f"{path}: the mel holds NaN or infinity, first in frame {frame}")
    own = None if described is None else _described(described, path)
    if own is not None and source is not None and describe_source(source, config) != own:
        complain(f"{path} says itself what mels it holds, that is what it is taken for")
    try:
        return adapt_mel(
            mel,
            model or Expectation(config),
            own or source,
            seconds=seconds,
            force=force,
            warn=lambda line: complain(f"{path}: {line}"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def synthesize(
    model: AutoregressiveModel,
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    argmax: bool = False,
    best_of: int = 1,
    speaker: int | None = None,
    engine: str = "auto",
    weights: str = "float32",
    threads: int | None = None,
    mel_source: MelConfig | str | None = None,
    mel_seconds: float | None = None,
    force: bool = False,
    output: Output = Output(),
    progress: bool = False,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
    warn: Callable[[str], object] = lambda line: None,
) -> Report:
    """Make audio from every input with a model that is conditioned on mels, and write it.

    A mel of F frames gives exactly F * hop samples. Audio is resampled to the model's rate and its
    own mel is taken, so T samples give T // hop * hop. Inputs of similar length ride in one batch,
    which changes nothing about them.

    Parameters
    ----------
    model : AutoregressiveModel
    jobs : sequence of Job
        From `plan`.
    seed, temperature, top_k, top_p, argmax, best_of, speaker, engine, weights, threads, progress
        See `wavear.generate`; the same seed serves every input.
    mel_source, mel_seconds, force
        What mels are that do not say it themselves, and how long their audio should be: `source`
        and `seconds` of `wavear.adapt_mel`.
    output : Output
        How the audio is written; the jobs' targets have to end in `output.suffix`.
    say : callable
        Is told, in one line each: every file written, and a resampling, once.
    complain : callable
        Is told, in one line each, every input passed over.
    warn : callable
        Is told, in one line each, what is doubtful.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If the model takes no mels, or a setting does not fit it.
    OSError
        If a file cannot be written: the next one could not either.
    """
    config = model.config.mel
    if config is None:
        raise ValueError(
            "the model is not conditioned on mels, it cannot follow an input: use `wavear generate`"
        )
    if mel_source is not None:
        describe_source(mel_source, config)  # a name that is none is no fault of the first input
    name = make_engine(model, 1, engine, weights=weights, threads=threads)[0]
    report = Report(engine=name_of_engine(name, weights))
    began = time.perf_counter()
    resampled: set[int] = set()
    limits: list[Any]
    window, *limits = (
        _CUDA.values() if name in CUDA_ENGINES else (_WINDOW, _BATCH, _BATCH_SAMPLES, _SPREAD)
    )
    for at in range(0, len(jobs), window):
        mels: list[tuple[Job, torch.Tensor]] = []
        for job in jobs[at : at + window]:
            try:
                if job.source.suffix.lower() in MEL_SUFFIXES:
                    settings: dict[str, Any] = {
                        "source": mel_source,
                        "seconds": mel_seconds,
                        "force": force,
                    }
                    mel = read_mel(job.source, config, model=model, complain=warn, **settings)
                else:
                    mel = _mel_of(job.source, config, resampled, say)
                mels.append((job, mel))
            except (ValueError, OSError) as error:
                _pass_over(report, job.source, error, complain)
        for batch in _batches(mels, config.hop_length, *limits):
            made = generate(
                model,
                [mel for _, mel in batch],
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                argmax=argmax,
                best_of=best_of,
                speaker=speaker,
                engine=engine,
                weights=weights,
                threads=threads,
                progress=progress,
            )
            for (job, mel), row in zip(batch, made, strict=True):
                samples = mel.shape[1] * config.hop_length
                job.target.parent.mkdir(parents=True, exist_ok=True)
                waveform = row[:samples]
                _report_clipping(
                    output.write(job.target, waveform, model.config.sample_rate), job.target, warn
                )
                for finding in watch(waveform, model.config.sample_rate, mel=mel, config=config):
                    report.findings.append((job.target, finding))
                    warn(f"{job.target}: {finding}")
                report.files += 1
                report.audio_seconds += samples / model.config.sample_rate
                say(
                    f"{job.source} -> {job.target}  {samples / model.config.sample_rate:.2f} s, {samples} samples"
                )
    report.seconds = time.perf_counter() - began
    return report


def generate_file(
    model: AutoregressiveModel,
    seconds: float,
    out: str | Path,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    argmax: bool = False,
    best_of: int = 1,
    speaker: int | None = None,
    engine: str = "auto",
    weights: str = "float32",
    threads: int | None = None,
    output: Output = Output(),
    progress: bool = False,
    prime: str | Path | None = None,
    include_prime: bool = False,
    say: Callable[[str], object] = lambda line: None,
    warn: Callable[[str], object] = lambda line: None,
) -> Report:
    """Make audio from a model that is not conditioned on mels, and write it.

    Parameters
    ----------
    model : AutoregressiveModel
    seconds : float
        Above 0, at most a day; rounded to whole samples.
    out : str or Path
        The `.wav`, `.flac`, `.ogg` or `.opus` file; replaced if it exists. Its folder is made where
        it is missing.
    seed, temperature, top_k, top_p, argmax, best_of, speaker, engine, weights, threads, progress
        See `wavear.generate`.
    output : Output
        How the audio is written.
    prime : str or Path, optional
        Audio file to go on from, resampled to the model's rate; what exceeds full scale by that is
        clipped.
    include_prime : bool
        Write it in front of what follows.
    say : callable
        Is told, in one line each, that the prime is resampled, and what seems wrong with it.
    warn : callable
        Is told, in one line each, what is wrong with the audio.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If the model takes mels, or a setting or the prime does not fit it.
    """
    if model.config.mel is not None:
        raise ValueError(
            "the model is conditioned on mels, it cannot make audio without: use `wavear synthesize`"
        )
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise ValueError(
            f"seconds is {seconds:g}, it must be above 0 and at most {_LONGEST_SECONDS:g}"
        )
    if include_prime and prime is None:
        raise ValueError("the prime is to be written, and there is none")
    check_writable(Path(out).parent)
    rate = model.config.sample_rate
    past = None if prime is None else _read_prime(Path(prime), rate, say)
    samples = max(round(seconds * rate), 1)
    name = make_engine(model, 1, engine, weights=weights, threads=threads)[0]
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prime is")  # it has been said
        waveform = generate(
            model,
            samples=samples,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            argmax=argmax,
            best_of=best_of,
            speaker=speaker,
            engine=engine,
            weights=weights,
            threads=threads,
            progress=progress,
            prime=past,
            include_prime=include_prime,
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    _report_clipping(output.write(Path(out), waveform[0], rate), Path(out), warn)
    report = Report(name_of_engine(name, weights), 1, samples / rate, time.perf_counter() - began)
    for finding in watch(waveform[0], rate):
        report.findings.append((Path(out), finding))
        warn(f"{out}: {finding}")
    return report


def _read_prime(path: Path, rate: int, say: Callable[[str], object]) -> torch.Tensor:
    """(P,) at the model's rate."""
    own = audio.info(path).sample_rate
    waveform = audio.read(path, sample_rate=rate)
    if own != rate:
        say(f"{path} has {own} Hz: it is resampled to {rate} Hz")
        waveform = waveform.clamp(
            -1, 1
        )  # a filter overshoots where the recording is near full scale
    try:
        for doubt in doubts(check_prime(waveform)):
            say(f"{path}: {doubt}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return waveform


def write_mels(
    jobs: Sequence[Job],
    config: MelConfig,
    *,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
) -> Report:
    """The log-mel of every recording: `.npz` with `mel` (M, F) float32 and `config`, the JSON of its `MelConfig`.

    Where the target's name ends in `.npy` the array alone is written, as other programs read it.

    Parameters
    ----------
    jobs : sequence of Job
        From `plan`.
    config : MelConfig
    say, complain : callable
        As in `synthesize`.

    Returns
    -------
    Report
    """
    report = Report()
    began = time.perf_counter()
    resampled: set[int] = set()
    described = json.dumps(config.to_dict())
    for job in jobs:
        try:
            mel = _mel_of(job.source, config, resampled, say)
        except (ValueError, OSError) as error:
            _pass_over(report, job.source, error, complain)
            continue
        job.target.parent.mkdir(parents=True, exist_ok=True)
        if job.target.suffix == ".npy":
            _write_array(job.target, lambda file, mel=mel: np.save(file, mel.numpy()))
        else:
            _write_array(
                job.target,
                lambda file, mel=mel: np.savez(file, mel=mel.numpy(), config=np.array(described)),
            )
        report.files += 1
        report.audio_seconds += mel.shape[1] * config.hop_length / config.sample_rate
        say(f"{job.source} -> {job.target}  {mel.shape[0]} bands, {mel.shape[1]} frames")
    report.seconds = time.perf_counter() - began
    return report


def _walk(folder: Path, suffixes: tuple[str, ...], out: Path) -> list[tuple[Path, Path]]:
    """(file, name below `folder`), sorted, without what lies in `out` (unless `out` is the folder itself)."""
    found = []
    for directory, subdirectories, files in os.walk(folder):
        subdirectories[:] = [
            name
            for name in subdirectories
            if not name.startswith(".") and Path(directory, name).resolve() != out.resolve()
        ]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                path = Path(directory, name)
                found.append((path, path.relative_to(folder)))
    return sorted(found)


def _mel_of(
    path: Path, config: MelConfig, resampled: set[int], say: Callable[[str], object]
) -> torch.Tensor:
    """(M, F) of an audio file."""
    rate = audio.info(path).sample_rate
    waveform = torch.as_tensor(audio.read(path, sample_rate=config.sample_rate))
    if waveform.shape[-1] < config.hop_length:
        raise ValueError(
            f"{path} has {waveform.shape[-1]} samples at {config.sample_rate} Hz, less than one frame"
            f" ({config.hop_length})"
        )
    if rate != config.sample_rate and not resampled:
        say(
            f"{path} has {rate} Hz: it is resampled to {config.sample_rate} Hz, and so are others of another rate"
        )
        resampled.add(rate)
    return log_mel(waveform[None], config)[0]


def _report_clipping(clipped: int, path: Path, warn: Callable[[str], object]) -> None:
    if clipped:
        warn(f"{path}: {clipped} samples are beyond full scale and were clipped")


def _pass_over(
    report: Report, path: Path, error: Exception, complain: Callable[[str], object]
) -> None:
    reason = one_line(error)
    reason = reason if str(path) in reason else f"{path}: {reason}"
    report.failed.append((path, reason))
    complain(reason)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; of the operating system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _batches(
    mels: list[tuple[Job, torch.Tensor]],
    hop: int,
    most: int = _BATCH,
    samples: int = _BATCH_SAMPLES,
    spread: float = _SPREAD,
) -> list[list[tuple[Job, torch.Tensor]]]:
    """Groups of similar length, longest first."""
    groups: list[list[tuple[Job, torch.Tensor]]] = []
    for item in sorted(mels, key=lambda item: -item[1].shape[1]):
        frames = item[1].shape[1]
        group = groups[-1] if groups else []
        longest = group[0][1].shape[1] if group else 0
        fits = len(group) < most and (len(group) + 1) * longest * hop <= samples
        if group and fits and longest <= frames * spread:
            group.append(item)
        else:
            groups.append([item])
    return groups


def _listed(suffixes: Sequence[str]) -> str:
    return ", ".join(suffixes[:-1]) + f" or {suffixes[-1]}"


Read = tuple[torch.Tensor, Any]  # a mel, and the `MelConfig` beside it, still as JSON, or None


def _read_npy(path: Path) -> Read:
    try:
        with open(path, "rb") as file:
            if file.read(6) != b"\x93NUMPY":  # np.load would take it for a pickle
                raise ValueError("it does not begin like a NumPy array")
        # Mapped, so that a header that promises too much is refused before memory is allocated.
        return _to_tensor(np.load(path, mmap_mode="r", allow_pickle=False)), None
    except (ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or no NumPy array: {one_line(error)}") from None


def _read_npz(path: Path) -> Read:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
        raise ValueError(f"{path} is damaged or no .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = _only("mel", [name for name in archive.files if name != "config"], path)
            described = str(archive["config"]) if "config" in archive.files else None
            return _to_tensor(archive[name]), described
    except (
        ValueError,
        EOFError,
        OverflowError,
        MemoryError,
        zipfile.BadZipFile,
        zipfile.zlib.error,
    ) as error:  # type: ignore
        reason = one_line(error)
        raise ValueError(
            reason if str(path) in reason else f"{path} is damaged: {reason}"
        ) from None


def _read_pt(path: Path) -> Read:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises whatever the first damaged byte leads to
        reason = one_line(error).split(". ")[0][:200]
        raise ValueError(
            f"{path} is damaged or no tensor that loads without running code: {reason}"
        ) from None
    described = None
    if isinstance(loaded, dict):
        described = loaded.get("config")
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        loaded = tensors[_only("mel", list(tensors), path)]
    if not isinstance(loaded, torch.Tensor):
        raise ValueError(
            f"{path} holds a {type(loaded).__name__}, expected a tensor or a dict with 'mel'"
        )
    return loaded, described


def _read_safetensors(path: Path) -> Read:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            name = _only("mel", list(file.keys()), path)
            return file.get_tensor(name), (file.metadata() or {}).get("config")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {one_line(error)}") from None


def _only(name: str, names: list[str], path: Path) -> str:
    if name in names:
        return name
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"{path} holds {', '.join(map(repr, names)) or 'nothing'}, expected an array named {name!r}"
    )


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    return torch.from_numpy(
        np.array(array, dtype=np.float32 if array.dtype.kind == "f" else np.int64)
    )


def _described(described: Any, path: Path) -> MelConfig:
    try:
        return MelConfig.from_dict(
            json.loads(described) if isinstance(described, str) else described
        )
    except ValueError as error:
        raise ValueError(f"{path}: 'config' is no mel configuration: {one_line(error)}") from None


def _write_array(path: Path, save: Callable[[Any], object]) -> None:
    """The file appears whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, NumPy would add an ending to it
            save(file)

    try:
        replace_file(path, write)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
