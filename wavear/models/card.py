"""The model card of a checkpoint: README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wavear.common.atomic import replace_file
from wavear.common.words import counted

CARD = "README.md"
UNKNOWN_LICENSE = "license: unknown"
_MARK = "<!-- Written by wavear, which replaces this file only while it is unchanged: "


def write_card(directory: Path, described: Mapping[str, Any]) -> None:
    """Write the card of a checkpoint, unless there is one that somebody wrote or changed.

    Parameters
    ----------
    directory : Path
    described : mapping
        The contents of `config.json`.
    """
    path = directory / CARD
    if path.exists():
        body, _, mark = path.read_bytes().rpartition(_MARK.encode())
        if hashlib.sha256(body).hexdigest().encode() not in mark:
            return
    text = _card(described)
    text += f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode()))


_COMMANDS = {
    "mel spectrograms": "wavear synthesize FOLDER speech.wav",
    "features": "wavear generate FOLDER --features new.npy --out new.wav",
    None: "wavear generate FOLDER --seconds 10 --out new.wav",
}


def _card(described: Mapping[str, Any]) -> str:
    config, training = described["config"], described["training"]
    mel = config.get("mel")
    kind = None
    if mel:  # settings of a FeatureConfig, or of a MelConfig
        kind = "features" if "channels" in mel else "mel spectrograms"
    return f"""---
library_name: wavear
{UNKNOWN_LICENSE}
tags: [audio, {"vocoder" if kind == "mel spectrograms" else "audio generation"}, autoregressive]
---

# {described["family"]}, {config["sample_rate"]} Hz

An autoregressive waveform model of wavear with the output distribution `{config["law"]}`, which
takes {kind or "no mels"}.

## Use

```python
import wavear

model = wavear.load("FOLDER")  # the folder of this file, or "hf:owner/name"
```

    {_COMMANDS[kind]}

## Data and licence

{_data(training)}

The licence of the weights depends on these recordings: set `license` at the top of this file.

## {"Features" if kind == "features" else "Mels"}

{_table("setting", mel) if mel else "None: the model is unconditional."}

## Quality

{_quality(training)}

`wavear evaluate FOLDER RECORDINGS --out report` measures more.
"""


def _data(training: Mapping[str, Any]) -> str:
    name, steps, speakers = (training.get(key) for key in ("data", "step", "speakers"))
    text = f"Trained on `{name}`" if name else "The training data are not recorded"
    text += f", {counted(steps, 'step')}" if isinstance(steps, int) else ""
    return text + (
        f", {counted(len(speakers), 'speaker')}: {', '.join(speakers)}." if speakers else "."
    )


def _quality(training: Mapping[str, Any]) -> str:
    figures = dict(training.get("free_run") or {})
    if "validation_bits" in training:
        figures = {"bits per sample": training["validation_bits"], **figures}
    if not figures:
        return "Not measured yet."
    return "On held-out recordings, during training:\n\n" + _table("measure", figures)


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *lines])
