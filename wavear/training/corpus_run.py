"""The manifest of a run on a published corpus."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from wavear.common.errors import WavearError
from wavear.data.corpora import PublishedCorpus, write_manifest
from wavear.training.config import TrainConfig


def manifest_of(config: TrainConfig) -> Path:
    """Return the manifest of a run on a corpus: `out` with `.csv` appended.

    >>> manifest_of(TrainConfig(data="data", out="runs/vctk/")).as_posix()
    'runs/vctk.csv'
    """
    out = Path(os.path.normpath(config.out))
    if out.name in ("", ".."):
        out = Path(os.path.abspath(config.out))
    return out.with_name(f"{out.name}.csv")


def listed(corpus: PublishedCorpus, config: TrainConfig) -> TrainConfig:
    """Return `config` with the folder `data` of `corpus` replaced by a manifest, and write it.

    A resumed run keeps its manifest. A file `data` is a manifest already.

    Raises
    ------
    FileNotFoundError
        If the corpus is not there, with how to get it.
    FileExistsError
        If there is another manifest already, and neither `resume` nor `overwrite` is set.
    WavearError
        If the corpus cannot be listed, or `speakers` is set and the held-out speakers are others.
    """
    if Path(config.data).is_file():
        return config
    manifest = manifest_of(config)
    if not (config.resume and manifest.is_file()):
        clips = corpus.clips(config.data)
        heard = {clip.speaker for clip in clips if clip.split == "train"}
        unheard = sorted({clip.speaker for clip in clips if clip.split == "validation"} - heard)
        if config.speakers and unheard:
            raise WavearError(
                f"{corpus.title} holds out speakers that are not trained on, such as {unheard[0]}:"
                " drop --speakers"
            )
        write_manifest(manifest, clips, config.overwrite)
    return dataclasses.replace(config, data=os.fspath(manifest))
