"""How good a model is: exact bits per sample of held-out recordings, and copy synthesis measured against bounds."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavear.common.atomic import replace_file

FORMAT = 1
RECORD, PAGE, SOUNDS = "evaluation.json", "report.html", "audio"


@dataclass(frozen=True)
class EvaluateConfig:
    """How to evaluate. Times are in seconds.

    Raises
    ------
    ValueError
        If a value makes no sense, with the field, the value and what would work.
    """

    train_data: str | None = None
    """Recordings to fit the baselines to (folder or manifest); None: those the model was trained on, where its
    train.json names them, else each half of the evaluated clips serves the other."""
    baseline_seconds: float = 600.0
    """Seconds of recordings to fit the baselines to."""
    clips: int = 16
    """Clips to synthesize and measure, spread evenly over the data; bits are of all clips."""
    seconds: float = 10.0
    """Seconds of each to synthesize at most, from its beginning."""
    seed: int = 0
    """Of the audio and of the intervals; the same seed gives the same report."""
    temperature: float = 1.0
    """Divides the logits: 1 as trained, below 1 duller and cleaner, above 1 noisier. Bits are at 1 always."""
    speaker: int | None = None
    """Number of the speaker, for a model with speakers; None: by the names of folders, or the manifest's column."""
    engine: str = "auto"
    """auto, numba (compiled for this CPU) or reference (slow, any device): makes the audio."""
    weights: str = "float32"
    """float32; bfloat16 or int8 (numba only): rounded, for the audio alone; bits are those of float32."""
    threads: int | None = None
    """CPU cores to use; all by default."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    resamples: int = 2000
    """Of the clips, for the 95 % intervals."""
    shown: int = 8
    """Clips that the page shows and plays, evenly spread from the best to the worst."""
    overwrite: bool = False
    """Replace an earlier evaluation in the folder."""

    def __post_init__(self) -> None:
        for name, least in {"clips": 0, "seed": 0, "shown": 0, "resamples": 100}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {least} or more")
        for name in ("baseline_seconds", "seconds", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected more than 0")
        if self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device is {self.device!r}, it must be cpu, cuda or mps")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, it must be at least 1")

    def flags(self) -> list[str]:
        """What the command line would say, without defaults."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}"] + (
                    [] if value is True else [str(value)]
                )
        return words


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to."""

    record: dict[str, Any]
    """Everything, as in evaluation.json; docs/evaluation.md says what is where."""
    folder: Path

    @property
    def bits(self) -> dict[str, float]:
        """Bits per sample over all clips: "model", "uniform", "unigram", "markov", "linear"."""
        return {name: interval["mean"] for name, interval in self.record["bits"].items()}

    @property
    def grid(self) -> str:
        """What the bits refer to: the quantisation of the model's samples."""
        checkpoint = self.record["checkpoint"]
        return checkpoint.get("grid", f"{checkpoint['config']['classes']} mu-law codes")

    @property
    def page(self) -> Path:
        """The report."""
        return self.folder / PAGE

    def summary(self) -> list[str]:
        """What to print: bits, measures beside their bounds, and where the page lies."""
        from wavear.evaluation.metrics import MEASURES

        bits = ", ".join(f"{law} {value:.3f}" for law, value in self.bits.items())
        lines = [f"bits per sample ({self.grid}): {bits}"]
        if common := self.record.get("common_bits"):
            lines.append(f"on the grid of 16-bit samples: model {common['mean']:.3f}")
        if mulaw := self.record.get("mulaw_bits"):
            lines.append(f"on the grid of 256 mu-law codes: model {mulaw['mean']:.3f}")
        for name, found in self.record["measures"].items():
            about = MEASURES[name]
            values = {
                system: f"{entry['mean']:.{about.decimals}f}" for system, entry in found.items()
            }
            beside = {
                "mulaw": "round trip through the codes",
                "griffin_lim": "Griffin-Lim",
                "original": "recording",
            }
            bounds = ", ".join(
                f"{label} {values[system]}" for system, label in beside.items() if system in values
            )
            unit = f" {about.unit}" if about.unit else ""
            lines.append(f"{about.title}: {values['model']}{unit} ({bounds})")
        return [*lines, f"report: {self.page}"]

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """From a folder that `evaluate` wrote, or its evaluation.json.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If it is damaged, unfinished, or of another version.
        """
        path = Path(path)
        path = path / RECORD if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such evaluation")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None
        if not isinstance(record, dict) or "bits" not in record:
            raise ValueError(
                f"{path} is no finished evaluation: run wavear evaluate again with --overwrite"
            )
        if record.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {record.get('format')!r}, this version of wavear reads {FORMAT}"
            )
        if "checkpoint" not in record:
            raise ValueError(
                f"{path} is no evaluation of one model: pass the evaluation.json of each, or its folder"
            )
        for row in record.get("clips", []):
            for name in row.get("audio", {}).values():
                if not (path.parent / name).resolve().is_relative_to(path.parent.resolve()):
                    raise ValueError(
                        f"{path} names {name}, which lies outside its folder: evaluate again"
                    )
        return cls(record, path.parent)


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    progress: bool = False,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
) -> Evaluation:
    """Score recordings under a model, synthesize them from their mels, measure both, and write a report.

    A model that is not conditioned on mels has nothing to copy: its report has bits, and samples it
    made freely.

    Parameters
    ----------
    checkpoint : str or Path
        As `wavear.load` takes it.
    data : str or Path
        Held-out recordings: a folder, a file, or a manifest; of a manifest with a column `split`,
        what is not for training. Other sample rates are resampled, and levels and ends are treated
        as in the model's training where its train.json says how.
    out : str or Path
        Folder to write to: `evaluation.json`, `report.html` (one page that needs nothing else),
        `audio/`.
    config : EvaluateConfig
    progress : bool
        Show bars.
    say, complain : callable
        Are told what is done, and which clips cannot be used, line by line.

    Returns
    -------
    Evaluation

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint, or no such data.
    FileExistsError
        If the folder holds something, and `overwrite` is false or it is no evaluation.
    ValueError
        If no clip can be used, or a setting does not fit the model.
    """
    from wavear.evaluation import report
    from wavear.evaluation.pictures import curves
    from wavear.evaluation.run import cores, measure_everything

    out = Path(out)
    _check_folder(out, config.overwrite)
    for source in (checkpoint, data):
        if Path(source).resolve().is_relative_to((out / SOUNDS).resolve()):
            raise ValueError(
                f"{source} lies in {out / SOUNDS}, which the evaluation replaces: choose another folder"
            )
    command = shlex.join(
        ["wavear", "evaluate", str(checkpoint), str(data), "--out", str(out), *config.flags()]
    )
    record = {"format": FORMAT, "command": command}
    told: dict[str, Any] = {"progress": progress, "say": say, "complain": complain}
    with cores(config.threads):
        record |= measure_everything(
            checkpoint, data, out, config, begin=lambda: _make_folder(out), **told
        )
    _write(out, RECORD, record, PAGE, report.page(record, out, curves(checkpoint)))
    return Evaluation(record, out)


def compare(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    progress: bool = False,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Two evaluations side by side, paired by clip: what differs, and how sure that is.

    Parameters
    ----------
    a, b : str or Path
        Each a folder that `evaluate` wrote, or its evaluation.json, or a checkpoint, which is
        evaluated first.
    out : str or Path
        Folder to write to: `compare.html` (one page that needs nothing else), `compare.json`, and
        for checkpoints their evaluations, `a/` and `b/`.
    data : str or Path, optional
        What to evaluate checkpoints on.
    config, progress, say, complain
        As for `evaluate`.

    Returns
    -------
    Comparison

    Raises
    ------
    FileNotFoundError, FileExistsError
        As `evaluate`.
    ValueError
        If the two are not of the same clips, rate, codes and length of synthesis; or `data` is
        missing or not needed.
    """
    from wavear.evaluation import comparison as pairs
    from wavear.models.checkpoint import read_config

    out = Path(out)
    _check_folder(out, config.overwrite, pairs.RECORD)
    found = {"a": _evaluation(a), "b": _evaluation(b)}
    sources = {"a": a, "b": b}
    missing = [side for side, evaluation in found.items() if evaluation is None]
    if missing and data is None:
        raise ValueError(
            f"{sources[missing[0]]} is no evaluation: pass --data to evaluate it as a checkpoint"
        )
    if not missing and data is not None:
        raise ValueError("two evaluations need no --data: they say what they are of")
    # What can be known to be in vain is refused before hours of work.
    pairs.check_codes(
        *(
            read_config(sources[side])["config"] if e is None else e.record["checkpoint"]["config"]
            for side, e in found.items()
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / pairs.RECORD, lambda path: path.write_text("{}\n", encoding="utf-8"))
    for side in missing:
        assert data is not None
        say(f"evaluating {side}: {sources[side]}")
        found[side] = evaluate(
            sources[side], data, out / side, config, progress=progress, say=say, complain=complain
        )
    assert found["a"] is not None
    assert found["b"] is not None
    record = pairs.paired(
        found["a"].record, found["b"].record, resamples=config.resamples, seed=config.seed
    )
    asked = [] if data is None else ["--data", str(data)]
    words = ["wavear", "compare", str(a), str(b), "--out", str(out), *asked, *config.flags()]
    record = {"format": FORMAT, "command": shlex.join(words)} | record
    _write(out, pairs.RECORD, record, pairs.PAGE, pairs.page(record, found["a"], found["b"]))
    return Comparison(record, out)


def compare_models(
    sources: Sequence[str | Path],
    out: str | Path,
    data: str | Path | None = None,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    progress: bool = False,
    say: Callable[[str], object] = lambda line: None,
    complain: Callable[[str], object] = lambda line: None,
) -> ModelTable:
    """Models of any families, laws and quantisation side by side: bits, cost, speed, and what each makes.

    Parameters
    ----------
    sources : sequence of str or Path
        Each a folder that `evaluate` wrote, or its evaluation.json, or a checkpoint, which is
        evaluated first.
    out : str or Path
        Folder to write to: `models.html` (one page that needs nothing else), `models.json`,
        `strip/` (what each made after the same beginning), and for checkpoints their evaluations,
        `1/`, `2/`...
    data : str or Path, optional
        What to evaluate checkpoints on, and what the beginning is of.
    config, progress, say, complain
        As for `evaluate`.

    Returns
    -------
    ModelTable

    Raises
    ------
    FileNotFoundError, FileExistsError
        As `evaluate`.
    ValueError
        If the models are not of one sample rate, or were evaluated on other clips, or `data` is
        missing.
    """
    from wavear.evaluation import model_table as table
    from wavear.evaluation.clips import Preparation, open_clips
    from wavear.evaluation.run import cores
    from wavear.models.checkpoint import read_config

    out = Path(out)
    _check_folder(out, config.overwrite, table.RECORD)
    found = [_evaluation(source) for source in sources]
    if data is None and None in found:
        raise ValueError(
            f"{sources[found.index(None)]} is no evaluation: pass --data to evaluate it as a checkpoint"
        )
    configs = [
        read_config(source)["config"] if e is None else e.record["checkpoint"]["config"]
        for source, e in zip(sources, found, strict=True)
    ]
    if len(rates := sorted({c["sample_rate"] for c in configs})) > 1:
        raise ValueError(
            f"the models are of {' and '.join(map(str, rates))} Hz: their bits cannot be compared"
        )
    # What would fail, or be in vain, does so before hours of work.
    given = [(str(source), e) for source, e in zip(sources, found, strict=True) if e is not None]
    table.check_same_clips([name for name, _ in given], [e for _, e in given])
    if data is not None and None in found:
        names = {clip.name for clip in open_clips(data, rates[0], 1, Preparation(), False).good}
        for source, e in given:
            if not any(clip["name"] in names for clip in e.record["clips"]):
                raise ValueError(
                    f"{source} was evaluated on other clips than {data} holds: evaluate all on the same"
                )
    hops = [c["mel"]["hop_length"] for c in configs if c.get("mel")]
    beginning = None if data is None else table.find_beginning(data, rates[0], hops)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / table.RECORD, lambda path: path.write_text("{}\n", encoding="utf-8"))
    for n, (source, evaluation) in enumerate(zip(sources, found, strict=True)):
        if evaluation is None:
            assert data is not None
            say(f"evaluating {source}")
            place = dataclasses.replace(config, overwrite=True)
            found[n] = evaluate(
                source, data, out / str(n + 1), place, progress=progress, say=say, complain=complain
            )
    evaluations = [evaluation for evaluation in found if evaluation is not None]
    with cores(config.threads):
        record = table.side_by_side(evaluations, sources, beginning, out, config, say)
    asked = [] if data is None else ["--data", str(data)]
    words = ["wavear", "compare", *map(str, sources), "--out", str(out), *asked, *config.flags()]
    record = {"format": FORMAT, "command": shlex.join(words)} | record
    _write(out, table.RECORD, record, table.PAGE, table.page(record, out))
    return ModelTable(record, out)


@dataclass(frozen=True)
class ModelTable:
    """What `compare_models` came to."""

    record: dict[str, Any]
    """Everything, as in models.json; docs/evaluation.md says what is where."""
    folder: Path

    def summary(self) -> list[str]:
        """What to print."""
        from wavear.evaluation import model_table as table

        return [*table.lines(self.record), f"report: {self.folder / table.PAGE}"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to."""

    record: dict[str, Any]
    """Everything, as in compare.json; docs/evaluation.md says what is where."""
    folder: Path

    def summary(self) -> list[str]:
        """What to print."""
        from wavear.evaluation import comparison as pairs

        return [*pairs.lines(self.record), f"report: {self.folder / pairs.PAGE}"]


def same_codes(a: str | Path, b: str | Path) -> bool:
    """Whether two models, or what was evaluated, have the same grid, so that their bits compare clip by clip."""
    from wavear.evaluation import comparison as pairs
    from wavear.models.checkpoint import read_config

    configs = [
        read_config(source)["config"]
        if (e := _evaluation(source)) is None
        else e.record["checkpoint"]["config"]
        for source in (a, b)
    ]
    return pairs.codes(configs[0]) == pairs.codes(configs[1])


def _evaluation(source: str | Path) -> Evaluation | None:
    """An evaluation that is there already; None for what is to be taken for a checkpoint."""
    path = Path(source)
    if path.suffix == ".json" or (path / RECORD).is_file():
        return Evaluation.read(path)
    return None


def _check_folder(out: Path, overwrite: bool, record: str = RECORD) -> None:
    """Refuse to lose anything, before any work is done."""
    from wavear.generation.jobs import check_writable

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{out} is not empty: choose another folder with --out, or pass --overwrite"
            )
        if not (out / record).is_file():
            raise FileExistsError(
                f"{out} holds nothing of ours (no {record}), nothing in it is overwritten"
            )
    check_writable(out)


def _write(out: Path, name: str, record: dict[str, Any], page_name: str, page: str) -> None:
    """The page, then the record. Files' names that are no Unicode are escaped, in JSON so that they come back."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    replace_file(
        out / page_name,
        lambda path: path.write_text(page, encoding="utf-8", errors="backslashreplace"),
    )
    replace_file(out / name, lambda path: path.write_text(text, encoding="utf-8"))


def _make_folder(out: Path) -> None:
    """An earlier evaluation goes when it is sure that there will be another."""
    shutil.rmtree(out / SOUNDS, ignore_errors=True)
    (out / SOUNDS).mkdir(parents=True)
    (out / PAGE).unlink(missing_ok=True)
    # So that an evaluation that was cut short can be overwritten.
    replace_file(out / RECORD, lambda path: path.write_text("{}\n", encoding="utf-8"))
