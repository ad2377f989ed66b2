"""From files to files: recordings and mels in, new audio or mels out.

An input that cannot be used is logged, counted and skipped.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wavear import audio
from wavear.audio.scale import limited
from wavear.common.atomic import check_writable
from wavear.common.claims import claimed
from wavear.common.errors import WavearError, one_line
from wavear.common.log import get_logger
from wavear.common.memory import memory_errors
from wavear.common.words import counted
from wavear.generation.cuda.choice import ENGINES as CUDA_ENGINES
from wavear.generation.defects import Finding, watch
from wavear.generation.engines import make_engine, name_of_engine
from wavear.generation.jobs import Job
from wavear.generation.output import Output
from wavear.generation.priming import check_prime, doubts
from wavear.generation.sampler import generate_with
from wavear.generation.settings import Sampling
from wavear.mel.conventions import Frames, describe_source
from wavear.mel.mel_files import is_mel, read_mel, write_mel
from wavear.mel.spectrogram import MelConfig, log_mel
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

_LONGEST_SECONDS = 86400.0  # a WAV file ends at 4 GiB, 27 hours at 22050 Hz


@dataclass(frozen=True)
class _Batching:
    """How inputs are grouped."""

    window: int
    """Inputs read ahead, of which those of similar length share a batch."""
    most: int
    """Utterances per batch."""
    samples: int
    """Samples per batch, 8 bytes each."""
    spread: float
    """Longest over shortest: the engine computes what lies beyond an utterance's end, too."""


_CPU = _Batching(window=96, most=24, samples=2**25, spread=1.25)
_CUDA = _Batching(window=4096, most=2048, samples=2**27, spread=2.0)  # streams that end can leave


@dataclass(frozen=True)
class MelInput:
    """The convention of mels without a configuration, and checks; see `wavear.adapt_mel`."""

    source: MelConfig | str | None = None
    seconds: float | None = None
    force: bool = False


@dataclass
class Report:
    """The outcome of a batch of files."""

    engine: str = ""
    files: int = 0
    audio_seconds: float = 0.0
    """Seconds of audio that was made, or read."""
    seconds: float = 0.0
    """Spent, without loading the model."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Inputs that could not be used, and why."""
    findings: list[tuple[Path, Finding]] = field(default_factory=list)
    """Defects of the audio that was made, see `wavear.watch`."""

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio per second."""
        return self.audio_seconds / max(self.seconds, 1e-9)

    def skip(self, path: Path, error: Exception) -> None:
        """Log and count an input that cannot be used."""
        reason = one_line(error)
        reason = reason if str(path) in reason else f"{path}: {reason}"
        self.failed.append((path, reason))
        logger.error("%s", reason)

    def inspect(
        self,
        path: Path,
        waveform: torch.Tensor,
        rate: int,
        mel: torch.Tensor | None = None,
        config: Frames | None = None,
    ) -> None:
        """Log and keep the defects of audio that was made."""
        known = {"mel": mel, "config": config} if isinstance(config, MelConfig) else {}
        for finding in watch(waveform, rate, **known):
            self.findings.append((path, finding))
            logger.warning("%s: %s", path, finding)

    def __str__(self) -> str:
        engine = f", engine {self.engine}" if self.engine else ""
        files = counted(self.files, "file")
        return (
            f"{files}, {self.audio_seconds:.2f} s of audio"
            f" in {self.seconds:.2f} s, {self.real_time_factor:.2f} x real time{engine}"
        )


def synthesize(
    model: AutoregressiveModel,
    jobs: Sequence[Job],
    sampling: Sampling = Sampling(),
    *,
    mels: MelInput = MelInput(),
    output: Output = Output(),
    progress: bool = False,
) -> Report:
    """Make audio from every input with a model that is conditioned on mels, and write it.

    A mel of F frames gives exactly F * hop samples. Audio is resampled to the model's rate and its
    own mel is taken, so T samples give T // hop * hop. Inputs of similar length share a batch,
    which does not change the audio; the same seed serves each. A file that cannot be written raises
    `OSError`: the next one could not be written either. A file that another process is to write
    raises `WavearError`, before any work.
    """
    config, rate = model.config.mel, model.config.sample_rate
    if config is None:
        raise WavearError(
            "the model is not conditioned on mels, it cannot follow an input: use `wavear generate`"
        )
    if mels.source is not None:
        describe_source(mels.source, config)  # reject an unknown name before the first input
    name = make_engine(
        model, 1, sampling.engine, weights=sampling.weights, threads=sampling.threads
    )[0]
    report, began = Report(engine=name_of_engine(name, sampling.weights)), time.perf_counter()
    reader = _MelReader(config)
    batching = _CUDA if name in CUDA_ENGINES else _CPU
    with claimed(job.target for job in jobs):
        for at in range(0, len(jobs), batching.window):
            read: list[tuple[Job, torch.Tensor]] = []
            for job in jobs[at : at + batching.window]:
                try:
                    with memory_errors():
                        read.append((job, reader.read(job.source, model, mels)))
                except (ValueError, OSError, MemoryError) as error:
                    report.skip(job.source, error)
            todo = _batches(read, config.hop_length, batching)
            while todo:
                batch = todo.pop(0)
                try:
                    with memory_errors():
                        made, _ = generate_with(
                            model, sampling, [mel for _, mel in batch], progress=progress
                        )
                except MemoryError as error:
                    if len(batch) == 1:
                        report.skip(batch[0][0].source, error)
                    todo = [[one] for one in batch if len(batch) > 1] + todo
                    continue
                for (job, mel), row in zip(batch, made, strict=True):
                    waveform = row[: mel.shape[1] * config.hop_length]
                    output.write(job.target, waveform, rate)
                    report.inspect(job.target, waveform, rate, mel, config)
                    report.files += 1
                    seconds = len(waveform) / rate
                    report.audio_seconds += seconds
                    stated = f"{seconds:.2f} s, {len(waveform)} samples"
                    logger.info("%s -> %s  %s", job.source, job.target, stated)
    report.seconds = time.perf_counter() - began
    return report


def generate_file(
    model: AutoregressiveModel,
    seconds: float | None,
    out: str | Path,
    sampling: Sampling = Sampling(),
    *,
    output: Output = Output(),
    progress: bool = False,
    prime: str | Path | None = None,
    include_prime: bool = False,
    features: str | Path | None = None,
) -> Report:
    """Make `seconds` of audio from a model that is not conditioned on mels, and write it to a file.

    It may continue a recording, `prime`, which is resampled to the model's rate (samples that then
    exceed full scale are clipped), and write it in front of the new audio. A model of features
    takes them from a file, which begins with the prime's; without `seconds` they set the length.
    """
    given, config = None, model.config.mel
    if isinstance(config, MelConfig):
        raise WavearError(
            "the model is conditioned on mels, it needs them: use `wavear synthesize`"
        )
    if features is not None:
        given = read_mel(features, config) if config else None
        if given is None:
            raise WavearError("the model takes no features: drop --features")
    elif config is not None:
        raise WavearError("the model is conditioned on features: pass them with --features")
    elif seconds is None:
        raise WavearError("--seconds is needed: nothing else sets the length of the audio")
    if seconds is not None and not 0 < seconds <= _LONGEST_SECONDS:
        raise WavearError(
            f"seconds is {seconds:g}; it must be above 0 and at most {_LONGEST_SECONDS:g}"
        )
    if include_prime and prime is None:
        raise WavearError("include_prime needs a prime, and there is none")
    out, rate = Path(out), model.config.sample_rate
    check_writable(out.parent)
    past = None if prime is None else _read_prime(Path(prime), rate)
    samples = None if seconds is None else max(round(seconds * rate), 1)
    name = make_engine(
        model, 1, sampling.engine, weights=sampling.weights, threads=sampling.threads
    )[0]
    began = time.perf_counter()
    with claimed([out]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prime is")  # logged by _read_prime
        made, _ = generate_with(
            model,
            sampling,
            given,
            samples=samples,
            prime=past,
            include_prime=include_prime,
            progress=progress,
        )
        output.write(out, made[0], rate)
    audio_seconds = made.shape[-1] / rate if seconds is None else seconds
    report = Report(name_of_engine(name, sampling.weights), 1, audio_seconds)
    report.seconds = time.perf_counter() - began
    report.inspect(out, made[0], rate)
    return report


def write_mels(jobs: Sequence[Job], config: MelConfig) -> Report:
    """Write the log-mel of every recording to its job's target; log every file."""
    report, began = Report(), time.perf_counter()
    reader = _MelReader(config)
    with claimed(job.target for job in jobs):
        for job in jobs:
            try:
                with memory_errors():
                    mel = reader.of_audio(job.source)
            except (ValueError, OSError, MemoryError) as error:
                report.skip(job.source, error)
                continue
            job.target.parent.mkdir(parents=True, exist_ok=True)
            write_mel(job.target, mel, config)
            report.files += 1
            report.audio_seconds += mel.shape[1] * config.hop_length / config.sample_rate
            logger.info("%s -> %s  %d bands, %d frames", job.source, job.target, *mel.shape)
    report.seconds = time.perf_counter() - began
    return report


class _MelReader:
    """Reads mels of mel files and of recordings; logs the first recording that is resampled."""

    def __init__(self, config: Any):
        self.config = config
        self.resampled = False

    def read(self, path: Path, model: AutoregressiveModel, mels: MelInput) -> torch.Tensor:
        """Return (M, F) of a mel file or a recording."""
        if not is_mel(path):
            return self.of_audio(path)
        return read_mel(
            path,
            self.config,
            model=model,
            source=mels.source,
            seconds=mels.seconds,
            force=mels.force,
        )

    def of_audio(self, path: Path) -> torch.Tensor:
        """Return (M, F) of a recording."""
        rate, hop = self.config.sample_rate, self.config.hop_length
        waveform = torch.as_tensor(audio.read(path, sample_rate=rate))
        if waveform.shape[-1] < hop:
            raise WavearError(
                f"{path} has {waveform.shape[-1]} samples at {rate} Hz, less than one frame ({hop})"
            )
        info = audio.info(path)
        own = info.sample_rate
        waveform = limited(waveform, path, logger.warning, info.floating)
        if own != rate and not self.resampled:
            logger.info(
                "%s has %d Hz: resampled to %d Hz, like others of another rate", path, own, rate
            )
            self.resampled = True
        return log_mel(waveform[None], self.config)[0]


def _read_prime(path: Path, rate: int) -> torch.Tensor:
    """Return (P,) at the model's rate."""
    own = audio.info(path).sample_rate
    waveform = audio.read(path, sample_rate=rate)
    if own != rate:
        logger.info("%s has %d Hz: resampled to %d Hz", path, own, rate)
        # A filter overshoots where the recording is near full scale.
        waveform = waveform.clamp(-1, 1)
    try:
        for doubt in doubts(check_prime(waveform)):
            logger.warning("%s: %s", path, doubt)
    except WavearError as error:
        raise WavearError(f"{path}: {error}") from None
    return waveform


def _batches(
    mels: list[tuple[Job, torch.Tensor]], hop: int, batching: _Batching = _CPU
) -> list[list[tuple[Job, torch.Tensor]]]:
    """Return groups of similar length, longest first."""
    groups: list[list[tuple[Job, torch.Tensor]]] = []
    for item in sorted(mels, key=lambda item: -item[1].shape[1]):
        frames = item[1].shape[1]
        group = groups[-1] if groups else []
        longest = group[0][1].shape[1] if group else 0
        fits = len(group) < batching.most and (len(group) + 1) * longest * hop <= batching.samples
        if group and fits and longest <= frames * batching.spread:
            group.append(item)
        else:
            groups.append([item])
    return groups
