"""Self-contained HTML pages of evaluations and comparisons, from the templates in templates/."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile

from wavear.audio.grid import COMMON_GRIDS
from wavear.evaluation.metrics import MEASURES, NEAR
from wavear.evaluation.model_table import QUALITY
from wavear.evaluation.pictures import costs, spectrogram
from wavear.evaluation.records import SYSTEMS, Clip, Evaluation

_SOUND_BYTES = 24 * 2**20  # of sound in a page, as base64
_SHOWN = 8  # clips of a comparison
_COMMON = {  # grids that all models share: their record keys and names
    "common_bits": (str(COMMON_GRIDS["linear"]), "16-bit samples"),
    "mulaw_bits": (str(COMMON_GRIDS["mulaw"]), "256 mu-law codes"),
}


@dataclass(frozen=True)
class Shown:
    """A clip that a page plays and draws."""

    clip: Clip
    rank: str
    sounds: dict[str, str] | None
    """Data URIs by label; None where the page has no room for them."""
    pictures: dict[str, str]
    """Data URIs by label."""


class _Sounds:
    """The sounds of one page, limited in size together."""

    def __init__(self) -> None:
        self.left = _SOUND_BYTES

    def take(self, paths: Mapping[str, Path]) -> dict[str, str] | None:
        """Return data URIs, or None if the page has no room for them."""
        found = {label: sound(path) for label, path in paths.items()}
        self.left -= sum(map(len, found.values()))
        return found if self.left >= 0 else None


def report(record: dict[str, Any], folder: Path, curves: bytes | None) -> str:
    """Return the page of an evaluation.

    Parameters
    ----------
    record : dict
        See `Evaluation.record`.
    folder : Path
        Where the audio files lie that it names.
    curves : bytes, optional
        PNG of the training's curves.
    """
    evaluation, sounds = Evaluation(record, folder), _Sounds()
    free = []
    for entry in record.get("free", []):
        if found := sounds.take({"free": folder / entry["audio"]}):
            free.append((entry, found["free"]))
    ranked = [clip for clip in evaluation.clips if "stft_distance" in clip.measured]
    ranked.sort(key=lambda clip: clip.measured["stft_distance"])
    count, last = min(record["settings"]["shown"], len(ranked)), len(ranked) - 1
    shown = []
    for place in sorted({round(k) for k in np.linspace(0, last, count)}):
        clip = ranked[place]
        assert clip.audio is not None
        paths = {system: folder / clip.audio[system] for system in SYSTEMS}
        rank = "worst" if place == last else f"{place + 1} of {len(ranked)}"
        drawn = _pictures({system: paths[system] for system in ("original", "model")})
        shown.append(Shown(clip, "best" if place == 0 else rank, sounds.take(paths), drawn))
    common = [
        (record[key], name)
        for key, (grid, name) in _COMMON.items()
        if record.get(key) is not None and evaluation.grid != grid
    ]
    return render(
        "report.html.j2",
        record=record,
        evaluation=evaluation,
        common=common,
        free=free,
        ranked=len(ranked),
        shown=shown,
        curves=None if curves is None else uri("image/png", curves),
    )


def comparison(record: dict[str, Any], a: Evaluation, b: Evaluation) -> str:
    """Return the page of two evaluations, paired by clip."""
    sounds, shown = _Sounds(), []
    for x, y in zip(a.clips, b.clips, strict=True):
        if len(shown) == _SHOWN or x.audio is None or y.audio is None:
            continue
        paths = {
            "Recording": a.folder / x.audio["original"],
            "a": a.folder / x.audio["model"],
            "b": b.folder / y.audio["model"],
        }
        if not all(path.is_file() for path in paths.values()):
            continue
        found = sounds.take(paths)
        if found is None:
            break
        shown.append(Shown(x, "", found, _pictures(paths)))
    return render("comparison.html.j2", record=record, shown=shown)


def model_table(record: dict[str, Any], folder: Path) -> str:
    """Return the page of a table of models; `folder` has the audio files of the strip."""
    models = record["models"]
    grids = list(dict.fromkeys(entry["grid"] for entry in models))
    shared = {
        key: name
        for key, (grid, name) in _COMMON.items()
        if any(own != grid for own in grids) and any(entry[key] for entry in models)
    }
    strip, plot = {}, costs(models)
    if record["strip"] is not None:
        paths = {name: folder / path for name, path in record["strip"]["files"].items()}
        drawn = _pictures(paths)
        strip = {name: (drawn[name], sound(path)) for name, path in paths.items()}
    return render(
        "models.html.j2",
        record=record,
        models=models,
        grids=grids,
        shared=shared,
        engines=list(dict.fromkeys(engine for entry in models for engine in entry["speed"])),
        measured=[name for name in QUALITY if any(name in entry["measures"] for entry in models)],
        plot=None if plot is None else uri("image/png", plot),
        strip=strip,
    )


def sound(path: Path) -> str:
    """Return a data URI of a WAV file as FLAC: the same samples, in about half the bytes."""
    samples, rate = soundfile.read(path, dtype="int16")
    return flac(np.asarray(samples), rate)


def flac(samples: np.ndarray, rate: int) -> str:
    """Return a data URI of samples (T,), 16-bit integers or floating point in [-1, 1], as FLAC."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return uri("audio/flac", file.getvalue())


def _pictures(paths: Mapping[str, Path]) -> dict[str, str]:
    """Return spectrograms as data URIs, with the colours of the first."""
    pictures, top = {}, None
    for label, path in paths.items():
        waveform, rate = soundfile.read(path, dtype="float32")
        png, top = spectrogram(waveform, rate, top)
        pictures[label] = uri("image/png", png)
    return pictures


def uri(kind: str, data: bytes) -> str:
    """Return a data URI of bytes of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fixed(value: float, decimals: int, sign: bool = False) -> str:
    r"""Return a number with a typographic minus sign.

    Examples
    --------
    >>> fixed(2, 3, sign=True), fixed(-1.5, 1) == "\N{MINUS SIGN}1.5"
    ('+2.000', True)
    """
    return f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wavear.evaluation"),
        autoescape=True,  # names of files and speakers are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fixed"] = fixed
    environment.globals |= {"MEASURES": MEASURES, "NEAR": NEAR, "SYSTEMS": SYSTEMS}
    return environment


def render(template: str, **values: Any) -> str:
    """Return the text of a template of `templates/` with values."""
    return _environment().get_template(template).render(**values)
