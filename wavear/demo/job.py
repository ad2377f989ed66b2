"""`wavear demo`: speak a sentence, then teach the voice some notes that it has never heard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from wavear import audio
from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.words import counted
from wavear.demo.sounds import notes
from wavear.evaluation.config import EvaluateConfig
from wavear.evaluation.evaluation import compare
from wavear.evaluation.records import Comparison
from wavear.generation.jobs import check_folder
from wavear.generation.sampler import generate
from wavear.mel.mel_files import read_mel
from wavear.models.checkpoint import SHIPPED, VOICE, load, read_config
from wavear.training.config import TrainConfig, TrainResult
from wavear.training.run import train

NOTE_SECONDS = 1.0
_FOLDERS = ("sounds", "held_out", "run", "report")
_RECORD = "demo.json"

# Fine-tuning: the voice was trained on speech, not on strings or long sung vowels.
VALUES = TrainConfig(
    data="sounds",
    out="run",
    validation="held_out",
    from_checkpoint=VOICE,
    max_minutes=3.0,
    free_run=0.0,  # whose steps take seconds: more short ones for sounds that are new to the voice
    device="cpu",
    sample_seconds=0.0,
    progress=True,
)


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo."""

    training: TrainResult
    compared: Comparison
    """The voice (a) and the fine-tuned model (b) on the held-out notes."""
    seconds: float
    """Seconds of everything."""

    @property
    def better(self) -> bool:
        """True if fine-tuning lowered the bits and the log-mel distance of the held-out notes."""
        record = self.compared.record
        found = (record["bits"], record["measures"]["log_mel"])
        return all(entry["difference"]["mean"] < 0 for entry in found)


def run(
    out: str | Path,
    *,
    config: TrainConfig = VALUES,
    minutes: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Speak a sentence; then make notes, fine-tune the voice on them, and compare before and after.

    Parameters
    ----------
    out : str or Path
        Folder to write to: `voice.wav` (the voice that comes with wavear, from the mel of a
        recording that it was not trained on), `sounds/` and `held_out/` (WAV), `run/` (see
        `wavear.train`; `run/best` is the checkpoint), `before.wav` and `after.wav` (the held-out
        notes), `report/` (see `wavear.compare`), `demo.json`.
    config : TrainConfig
        Its `data`, `out`, `validation`, `seed` and `overwrite` are replaced.
    minutes : float, optional
        Of training; by default those of `config`.
    seed : int
        Of the sounds, the training and the audio.
    threads : int, optional
        CPU cores to use; by default one to train, all to synthesize.
    overwrite : bool
        Replace an earlier demo in the folder; anything else raises `FileExistsError`.
    """
    if threads is not None and threads < 1:
        raise WavearError(f"threads is {threads}; it must be at least 1")
    if minutes is not None and not minutes > 0:
        raise WavearError(f"minutes is {minutes}; it must be above 0")
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
    _make_folder(out, overwrite)
    speak(out / "voice.wav", seed)
    count = write_notes(out, seed)
    say(f"{out / 'sounds'}: {counted(count, 'note')} to learn; {out / 'held_out'}: others to test")
    with _threads(threads or 1):
        trained = train(config)
    if trained.stopped_by == "interrupt":
        raise KeyboardInterrupt
    settings = EvaluateConfig(seed=seed, threads=threads)
    compared = compare(VOICE, trained.best, out / "report", out / "held_out", settings)
    for which, name in (("a", "before.wav"), ("b", "after.wav")):
        _join(sorted((out / "report" / which).glob("audio/*/model.wav")), out / name)
    result = DemoResult(trained, compared, time.perf_counter() - began)
    record = {"seed": seed, "seconds": round(result.seconds, 1), "steps": trained.steps}
    record |= {"better": result.better, "bits": compared.record["bits"]}
    record |= {"measures": compared.record["measures"]}
    (out / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"a is the voice ({out / 'before.wav'}), b the fine-tuned model ({out / 'after.wav'}):")
    for line in compared.summary():
        say(f"  {line}")
    verdict = "learned the notes" if result.better else "did not learn the notes"
    say(f"{trained.best} {verdict}; {result.seconds:.0f} s in all")
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


def write_notes(out: str | Path, seed: int = 0) -> int:
    """Write `sounds/` and `held_out/` to a folder, as WAV; return the number of `sounds/`."""
    rate = read_config(VOICE)["config"]["sample_rate"]
    counts = []
    for name, held_out in (("sounds", False), ("held_out", True)):
        made = notes(NOTE_SECONDS, rate, seed=seed, held_out=held_out)
        Path(out, name).mkdir(parents=True, exist_ok=True)
        for note in made:
            audio.write(Path(out, name, f"{note.name}.wav"), note.waveform, rate)
        counts.append(len(made))
    return counts[0]


def _join(paths: list[Path], out: Path) -> None:
    """Write recordings of one rate one after the other."""
    rate = audio.info(paths[0]).sample_rate
    audio.write(out, torch.cat([audio.read(path, rate) for path in paths]), rate)


def _make_folder(out: Path, overwrite: bool) -> None:
    """Make the folder, and remove an earlier demo from it."""
    check_folder(out, overwrite, _RECORD)
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    # So that a demo that was cut short can be overwritten.
    (out / _RECORD).write_text("{}\n", encoding="utf-8")


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)
