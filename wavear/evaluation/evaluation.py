"""Evaluate models, and compare evaluations."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wavear.common.atomic import replace_file
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.evaluation.config import EvaluateConfig
from wavear.evaluation.records import (
    COMPARISON_PAGE,
    COMPARISON_RECORD,
    FORMAT,
    PAGE,
    RECORD,
    SOUNDS,
    TABLE_PAGE,
    TABLE_RECORD,
    Comparison,
    Evaluation,
    ModelTable,
)
from wavear.generation.jobs import check_folder

logger = get_logger(__name__)
_DEFAULTS = EvaluateConfig()


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    config: EvaluateConfig = _DEFAULTS,
    *,
    progress: bool = False,
) -> Evaluation:
    """Score recordings, synthesize them from their mels, measure the result, and write a report.

    A model that is not conditioned on mels has nothing to copy: its report has bits and
    free-running samples.

    Parameters
    ----------
    checkpoint : str or Path
        As for `wavear.load`.
    data : str or Path
        Held-out recordings: a folder, a file, or a manifest; of a manifest with a column `split`,
        the rows that are not for training. Other sample rates are resampled, and levels and ends
        are treated as in the model's training where its train.json records how.
    out : str or Path
        Folder to write to: `evaluation.json`, `report.html` (one self-contained page), `audio/`.
    config : EvaluateConfig
    progress : bool
        Show bars.

    Returns
    -------
    Evaluation

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint, or no such data.
    FileExistsError
        If the folder is not empty, and `overwrite` is false or it holds no evaluation.
    ValueError
        If no clip can be used, or a setting does not fit the model.
    """
    from wavear.evaluation import pages
    from wavear.evaluation.pictures import curves
    from wavear.evaluation.run import cores, measure_everything

    out = Path(out)
    check_folder(out, config.overwrite, RECORD)
    for source in (checkpoint, data):
        if Path(source).resolve().is_relative_to((out / SOUNDS).resolve()):
            raise WavearError(
                f"{source} lies in {out / SOUNDS}, which the evaluation replaces:"
                " choose another folder"
            )
    record = _begin(["evaluate", checkpoint, data, "--out", out, *config.flags()])
    with cores(config.threads):
        record |= measure_everything(
            checkpoint, data, out, config, begin=lambda: _make_folder(out), progress=progress
        )
    _write(out, RECORD, record, PAGE, pages.report(record, out, curves(checkpoint)))
    return Evaluation(record, out)


def compare(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    config: EvaluateConfig = _DEFAULTS,
    *,
    progress: bool = False,
) -> Comparison:
    """Compare two evaluations clip by clip: the differences, and their intervals.

    Parameters
    ----------
    a, b : str or Path
        Each a folder that `evaluate` wrote, or its evaluation.json, or a checkpoint, which is
        evaluated first.
    out : str or Path
        Folder to write to: `compare.html` (one self-contained page), `compare.json`, and for
        checkpoints their evaluations, `a/` and `b/`.
    data : str or Path, optional
        Recordings to evaluate checkpoints on.
    config, progress
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
    from wavear.evaluation import comparison, pages

    out, sources = Path(out), (a, b)
    check_folder(out, config.overwrite, COMPARISON_RECORD)
    given = _read_evaluations(sources, data)
    if data is not None and None not in given:
        raise WavearError("two evaluations need no --data: drop it, they name their own")
    comparison.check_codes(*_model_configs(sources, given))  # before hours of work
    found, skipped = _complete(
        sources, given, out, COMPARISON_RECORD, ("a", "b"), data, config, progress
    )
    record = _begin(["compare", a, b, "--out", out, *_data_flag(data), *config.flags()])
    record |= comparison.paired(
        found[0].record, found[1].record, resamples=config.resamples, seed=config.seed
    )
    page = pages.comparison(record, found[0], found[1])
    _write(out, COMPARISON_RECORD, record, COMPARISON_PAGE, page)
    return Comparison(record, out, skipped)


def compare_models(
    sources: Sequence[str | Path],
    out: str | Path,
    data: str | Path | None = None,
    config: EvaluateConfig = _DEFAULTS,
    *,
    progress: bool = False,
) -> ModelTable:
    """Compare models of any families and quantisation in one table: bits, cost, speed, and audio.

    Parameters
    ----------
    sources : sequence of str or Path
        Each a folder that `evaluate` wrote, or its evaluation.json, or a checkpoint, which is
        evaluated first.
    out : str or Path
        Folder to write to: `models.html` (one self-contained page), `models.json`, `strip/` (the
        continuation of one beginning by each model), and for checkpoints their evaluations, `1/`,
        `2/`...
    data : str or Path, optional
        Recordings to evaluate checkpoints on, and to take the beginning from.
    config, progress
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
    from wavear.evaluation import model_table, pages
    from wavear.evaluation.run import cores

    out = Path(out)
    check_folder(out, config.overwrite, TABLE_RECORD)
    given = _read_evaluations(sources, data)
    configs = _model_configs(sources, given)
    # Reject before hours of work.
    model_table.check_before(sources, given, configs, data)
    hops = [each["mel"]["hop_length"] for each in configs if each.get("mel")]
    rate = configs[0]["sample_rate"]
    beginning = None if data is None else model_table.find_beginning(data, rate, hops)
    names = [str(n + 1) for n in range(len(sources))]
    found, skipped = _complete(sources, given, out, TABLE_RECORD, names, data, config, progress)
    record = _begin(["compare", *sources, "--out", out, *_data_flag(data), *config.flags()])
    with cores(config.threads):
        record |= model_table.side_by_side(found, sources, beginning, out, config)
    _write(out, TABLE_RECORD, record, TABLE_PAGE, pages.model_table(record, out))
    return ModelTable(record, out, skipped)


def same_codes(a: str | Path, b: str | Path) -> bool:
    """Return whether two models or evaluations have one grid, so that their clips compare."""
    from wavear.evaluation.comparison import codes

    one, two = _model_configs((a, b), [_read_evaluation(a), _read_evaluation(b)])
    return codes(one) == codes(two)


def _read_evaluation(source: str | Path) -> Evaluation | None:
    """Return an existing evaluation, or None for a checkpoint."""
    path = Path(source)
    if path.suffix == ".json" or (path / RECORD).is_file():
        return Evaluation.read(path)
    return None


def _read_evaluations(
    sources: Sequence[str | Path], data: str | Path | None
) -> list[Evaluation | None]:
    given = [_read_evaluation(source) for source in sources]
    if data is None and None in given:
        raise WavearError(
            f"{sources[given.index(None)]} is not an evaluation:"
            " pass --data to evaluate it as a checkpoint"
        )
    return given


def _model_configs(
    sources: Sequence[str | Path], given: Sequence[Evaluation | None]
) -> list[dict[str, Any]]:
    from wavear.models.checkpoint import read_config

    return [
        (read_config(source) if each is None else each.record["checkpoint"])["config"]
        for source, each in zip(sources, given, strict=True)
    ]


def _complete(
    sources: Sequence[str | Path],
    given: Sequence[Evaluation | None],
    out: Path,
    record: str,
    folders: Sequence[str],
    data: str | Path | None,
    config: EvaluateConfig,
    progress: bool,
) -> tuple[list[Evaluation], int]:
    """Evaluate the checkpoints among the sources, and count the clips that were skipped."""
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / record, "{}\n")
    found, skipped = [], 0
    for source, evaluation, name in zip(sources, given, folders, strict=True):
        if evaluation is None:
            assert data is not None
            logger.info(f"evaluating {source}")
            place = dataclasses.replace(config, overwrite=True)
            evaluation = evaluate(source, data, out / name, place, progress=progress)
            skipped += len(evaluation.record["failed"])
        found.append(evaluation)
    return found, skipped


def _begin(words: Sequence[str | Path]) -> dict[str, Any]:
    return {"format": FORMAT, "command": shlex.join(["wavear", *map(str, words)])}


def _data_flag(data: str | Path | None) -> list[str]:
    return [] if data is None else ["--data", str(data)]


def _make_folder(out: Path) -> None:
    """Delete the earlier evaluation; called once another is certain to follow."""
    shutil.rmtree(out / SOUNDS, ignore_errors=True)
    (out / SOUNDS).mkdir(parents=True)
    (out / PAGE).unlink(missing_ok=True)
    _write_text(out / RECORD, "{}\n")  # so that an interrupted evaluation can be overwritten


def _write(out: Path, name: str, record: dict[str, Any], page_name: str, page: str) -> None:
    """Write the page, then the record."""
    _write_text(out / page_name, page)
    _write_text(out / name, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file as a whole; file names that are not Unicode are escaped."""
    replace_file(
        path, lambda place: place.write_text(text, encoding="utf-8", errors="backslashreplace")
    )
