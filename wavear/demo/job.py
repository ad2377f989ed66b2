"""`wavear demo`: speak a sentence, then train a small WaveNet and synthesize held-out notes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wavear import audio
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.words import counted
from wavear.demo.sounds import Note, notes
from wavear.generation.engines import make_engine
from wavear.generation.mel_files import read_mel
from wavear.generation.sampler import generate
from wavear.mel.spectrogram import log_mel
from wavear.models.checkpoint import SHIPPED, VOICE, load
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.run import train

NOTE_SECONDS = 1.0
CENTS = 50.0  # half a semitone, which listeners call out of tune
_STEADY = 0.6  # share of the frames of a note that have to be in tune
_FOLDERS = ("sounds", "held_out", "synthesized", "run")
_TEMPERATURE = 0.8  # less noise than the distribution has
_RECORD = "demo.json"

# Small enough to train in a few minutes on one core. The past is 64 samples, little more than a
# period of the lowest note: with more of it, so short a training learns to continue any pitch in
# the past and to ignore the mel. Noise on the past helps in the same way. The mel's windows are
# long, because the network gets the pitch from the mel only.
VALUES = TrainConfig(
    family="wavenet",
    data="sounds",
    out="run",
    validation="held_out",
    layers=6,
    stacks=1,
    residual_channels=32,
    skip_channels=64,
    head_channels=64,
    conditioning_channels=32,
    sample_rate=8000,
    mel_bands=80,
    mel_hop_length=80,
    mel_n_fft=1024,
    input_noise=1.5,
    segment=1200,
    batch_size=8,
    learning_rate=5e-3,
    warmup_steps=50,
    weight_decay=0.0,
    ema_decay=0.99,
    # After 3.5 minutes on a slow machine one note of six was in tune for 59 % of its frames.
    max_minutes=4.5,
    device="cpu",
    validate_seconds=60.0,
    sample_seconds=0.0,
    progress=True,
)


@dataclass(frozen=True)
class Heard:
    """A synthesized note and its measured pitch."""

    note: Note
    waveform: np.ndarray
    """(T,), float32."""
    cents: float
    """Median pitch above the note's, in hundredths of a semitone."""
    steady: float
    """Share of the frames that are within `CENTS` of the pitch that the note has there."""

    @property
    def in_tune(self) -> bool:
        """True if it has the note's pitch."""
        return abs(self.cents) <= CENTS and self.steady >= _STEADY


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo."""

    heard: list[Heard]
    training: TrainResult
    picture: Path
    seconds: float
    """Seconds of everything."""

    @property
    def in_tune(self) -> bool:
        """True if every note has its pitch."""
        return all(heard.in_tune for heard in self.heard)


def run(
    out: str | Path,
    *,
    config: TrainConfig = VALUES,
    minutes: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Speak a sentence; then make sounds, train, synthesize held-out notes, measure and draw them.

    Parameters
    ----------
    out : str or Path
        Folder to write to: `voice.wav` (the voice that comes with wavear, from the mel of a
        recording that it was not trained on), `sounds/` and `held_out/` (WAV), `run/` (see
        `wavear.train`; `run/best` is the checkpoint), `synthesized/` (WAV), `demo.png`,
        `demo.json`.
    config : TrainConfig
        Its `data`, `out`, `validation`, `seed` and `overwrite` are replaced.
    minutes : float, optional
        Of training; by default those of `config`.
    seed : int
        Of the sounds, the training and the audio.
    threads : int, optional
        CPU cores to use; by default one to train (two wait for each other hundreds of times a
        step), all to synthesize.
    overwrite : bool
        Replace an earlier demo in the folder; anything else raises `FileExistsError`.
    """
    began = time.perf_counter()
    out = Path(out)
    config = dataclasses.replace(
        config,
        data=str(out / "sounds"),
        validation=str(out / "held_out"),
        out=str(out / "run"),
        max_minutes=config.max_minutes if minutes is None else minutes,
        seed=seed,
        overwrite=False,
        resume=False,
    )
    mel = config.mel
    if mel is None:
        raise WavearError("the demo synthesizes from mels: its model cannot be unconditional")
    if threads is not None and threads < 1:
        raise WavearError(f"threads is {threads}; it must be at least 1")
    _make_folder(out, overwrite)
    speak(out / "voice.wav", seed)
    rate = config.sample_rate
    count = write_notes(out, rate, seed)
    held = notes(NOTE_SECONDS, rate, seed=seed, held_out=True)
    say(
        f"{out / 'sounds'}: {count} notes of {NOTE_SECONDS:g} s to train on;"
        f" {out / 'held_out'}: {len(held)} more"
    )
    with _threads(threads or 1):
        trained = train(config)
        if trained.stopped_by == "interrupt":
            raise KeyboardInterrupt
        model = load(trained.best)
        mels = log_mel(torch.from_numpy(np.stack([note.waveform for note in held])), mel)
        engine, _ = make_engine(model, len(held), threads=threads)
        started = time.perf_counter()
        seeds = list(range(seed, seed + len(held)))
        waveforms = generate(
            model, mels, seed=seeds, temperature=_TEMPERATURE, threads=threads
        ).numpy()
        taken = time.perf_counter() - started
    made = waveforms.size / rate
    speed = f"{made:.1f} s of audio in {taken:.1f} s, {made / taken:.1f} x real time"
    say(f"{out / 'synthesized'}: {counted(len(held), 'file')}, {speed}, engine {engine}")
    heard = []
    for note, waveform in zip(held, waveforms, strict=True):
        audio.write(out / "synthesized" / f"{note.name}.wav", waveform, rate)
        one = Heard(note, waveform, *compare_pitch(waveform, note, rate))
        wrong = "" if one.in_tune else "   WRONG"
        say(
            f"  {note.name:<20} pitch {one.cents:+6.1f} cents, in tune"
            f" {100 * one.steady:3.0f} % of the time{wrong}"
        )
        heard.append(one)
    picture = out / "demo.png"
    draw(heard, rate, picture)
    result = DemoResult(heard, trained, picture, time.perf_counter() - began)
    _write_record(out, result, seed)
    bits = trained.held_out
    say(
        f"held-out bits per sample: {trained.bits_before:.3f} before training,"
        f" {bits['model']:.3f} after"
    )
    say(
        "  with no model: "
        + ", ".join(f"{name} {value:.3f}" for name, value in bits.items() if name != "model")
    )
    say(f"{picture}: targets and synthesized notes; checkpoint: {trained.best}")
    wrong = sum(not one.in_tune for one in heard)
    verdict = f"all {len(heard)} notes are in tune"
    if wrong:
        verdict = f"{wrong} of {len(heard)} notes have the wrong pitch"
    say(f"{verdict}; {result.seconds:.0f} s in all")
    return result


def speak(path: Path, seed: int = 0) -> None:
    """Write a sentence in the voice that comes with wavear, from a mel that comes with it."""
    began = time.perf_counter()
    model = load(VOICE)
    mel = read_mel(SHIPPED / VOICE / "sentence.npz", model.config.mel)
    waveform = generate(model, mel, seed=seed)[0]
    audio.write(path, waveform.numpy(), model.config.sample_rate)
    seconds, taken = len(waveform) / model.config.sample_rate, time.perf_counter() - began
    say(f"{path}: {seconds:.1f} s of speech in {taken:.1f} s, compilation included; play it now")


def write_notes(out: str | Path, sample_rate: int, seed: int = 0) -> int:
    """Write `sounds/` and `held_out/` to a folder, as WAV; return the number of `sounds/`."""
    counts = []
    for name, held_out in (("sounds", False), ("held_out", True)):
        made = notes(NOTE_SECONDS, sample_rate, seed=seed, held_out=held_out)
        Path(out, name).mkdir(parents=True, exist_ok=True)
        for note in made:
            audio.write(Path(out, name, f"{note.name}.wav"), note.waveform, sample_rate)
        counts.append(len(made))
    return counts[0]


def compare_pitch(waveform: np.ndarray, note: Note, sample_rate: int) -> tuple[float, float]:
    """Measure the pitch of a waveform against its note, where the note sounds, by YIN (librosa).

    Return the median pitch over the note's frequency in cents, and the share of the frames within
    `CENTS` of YIN's pitch of the note itself.
    """
    from wavear.common.compiled import prepare_numba

    prepare_numba()
    from librosa import yin

    frame = 2 ** round(np.log2(0.064 * sample_rate))
    lowest, highest = note.frequency / 2.5, min(note.frequency * 2.5, sample_rate / 4)

    def pitch(x: np.ndarray) -> np.ndarray:
        sizes = {"frame_length": frame, "hop_length": frame // 4, "center": False}
        return yin(x, fmin=lowest, fmax=highest, sr=sample_rate, **sizes)

    count = min(len(waveform), len(note.waveform))
    found, wanted = pitch(waveform[:count]), pitch(note.waveform[:count])
    level = np.array([np.sqrt(np.mean(x**2)) for x in _frames(note.waveform[:count], frame)])
    sounds = level > 0.1 * level.max()
    off = 1200 * np.abs(np.log2(found[sounds] / wanted[sounds]))
    median = 1200 * np.log2(np.median(found[sounds]) / note.frequency)
    return float(median), float(np.mean(off <= CENTS))


def draw(heard: Sequence[Heard], sample_rate: int, path: str | Path) -> None:
    """Draw a row per note: 25 ms from its middle, target above synthesized, two spectrograms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.1 * len(heard)))
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heard), 3, squeeze=False, width_ratios=(1.4, 1, 1))
    figure.subplots_adjust(
        left=0.02, right=0.99, bottom=0.25 / len(heard), top=1 - 0.15 / len(heard), hspace=0.6
    )
    for one, (wave, target, synthesized) in zip(heard, rows, strict=True):
        middle, span = len(one.waveform) // 2, round(0.025 * sample_rate)
        milliseconds = (np.arange(span) + middle) / sample_rate * 1000
        for waveform, shift, label in (
            (one.note.waveform, 0.6, "target"),
            (one.waveform, -0.6, "synthesized"),
        ):
            wave.plot(
                milliseconds, waveform[middle : middle + span] + shift, linewidth=0.9, label=label
            )
        wave.set(xlabel="ms", yticks=[], xlim=(milliseconds[0], milliseconds[-1]), ylim=(-1.4, 1.4))
        wave.set_title(f"{one.note.name}: {one.cents:+.0f} cents", fontsize=9)
        for axes, waveform, label in (
            (target, one.note.waveform, "target"),
            (synthesized, one.waveform, "synthesized"),
        ):
            seconds = len(waveform) / sample_rate
            axes.imshow(
                _decibels(waveform),
                origin="lower",
                aspect="auto",
                extent=(0, seconds, 0, sample_rate / 2000),
                vmin=-80,
                vmax=0,
            )
            axes.set(xlabel="s", ylabel="kHz")
            axes.set_title(label, fontsize=9)
    rows[0][0].legend(fontsize=7, loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)


def _decibels(waveform: np.ndarray, size: int = 512, hop: int = 64) -> np.ndarray:
    """Return a spectrogram in dB below the loudest, shape (size / 2 + 1, frames)."""
    spectrum = np.abs(np.fft.rfft(_frames(waveform, size, hop) * np.hanning(size), axis=1)).T
    return 20 * np.log10(spectrum / max(spectrum.max(), 1e-9) + 1e-5)


def _frames(waveform: np.ndarray, size: int, hop: int | None = None) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(waveform, size)[:: hop or size // 4]


def _make_folder(out: Path, overwrite: bool) -> None:
    """Make the folders, and remove an earlier demo from them."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{out} is not empty: choose another folder with --out, or pass --overwrite"
            )
        if not (out / _RECORD).is_file():
            raise FileExistsError(
                f"{out} holds no demo (no {_RECORD}) and is not overwritten: choose another folder"
            )
        for name in _FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
    (out / "synthesized").mkdir(parents=True)
    (out / _RECORD).write_text(
        "{}\n", encoding="utf-8"
    )  # so that a demo that was cut short can be overwritten


def _write_record(out: Path, result: DemoResult, seed: int) -> None:
    names = ("cents", "steady", "in_tune")
    record: dict[str, Any] = {
        "seed": seed,
        "seconds": round(result.seconds, 1),
        "bits_before": result.training.bits_before,
        "held_out_bits": result.training.held_out,
        "steps": result.training.steps,
        "notes": [
            {"name": h.note.name, "frequency": h.note.frequency}
            | {name: getattr(h, name) for name in names}
            for h in result.heard
        ],
    }
    (out / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)
