"""The manifest of a run on a published corpus."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from wavear.data.corpora import PublishedCorpus, write_manifest
from wavear.training.config import TrainConfig


def manifest_of(config: TrainConfig) -> Path:
    """The manifest of a run on a corpus: beside the run's directory, under its name with `.csv`.

    >>> manifest_of(TrainConfig(data="data", out="runs/vctk/")).as_posix()
    'runs/vctk.csv'
    """
    out = Path(os.path.normpath(config.out))
    if out.name in ("", ".."):
        out = Path(os.path.abspath(config.out))
    return out.with_name(f"{out.name}.csv")


def listed(corpus: PublishedCorpus, config: TrainConfig) -> TrainConfig:
    """`config`, with its `data` (the folder that holds `corpus`) replaced by a manifest, which is written.

    A resumed run keeps the manifest that it began with. Where `data` is a file, it is a manifest
    already and stays.

    Parameters
    ----------
    corpus : PublishedCorpus
    config : TrainConfig

    Returns
    -------
    TrainConfig

    Raises
    ------
    FileNotFoundError
        If the corpus is not there, with how to get it.
    FileExistsError
        If there is another manifest already, and neither `resume` nor `overwrite` is set.
    ValueError
        If the corpus cannot be listed, or `speakers` are to be told apart and the held-out ones are
        others.
    """
    if Path(config.data).is_file():
        return config
    manifest = manifest_of(config)
    if not (config.resume and manifest.is_file()):
        clips = corpus.clips(config.data)
        heard = {clip.speaker for clip in clips if clip.split == "train"}
        unheard = sorted({clip.speaker for clip in clips if clip.split == "validation"} - heard)
        if config.speakers and unheard:
            raise ValueError(
                f"{corpus.title} holds out speakers that are not trained on ({unheard[0]}, say):"
                " a model cannot be told to be one of them, so leave --speakers away"
            )
        write_manifest(manifest, clips, config.overwrite)
    return dataclasses.replace(config, data=os.fspath(manifest))
