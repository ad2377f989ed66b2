"""The records that evaluations and comparisons return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.evaluation.metrics import MEASURES

FORMAT = 1
RECORD, PAGE, SOUNDS = "evaluation.json", "report.html", "audio"
COMPARISON_RECORD, COMPARISON_PAGE = "compare.json", "compare.html"
TABLE_RECORD, TABLE_PAGE, STRIP = "models.json", "models.html", "strip"
SYSTEMS = {
    "original": "Recording",
    "mulaw": "Round trip",
    "model": "Model",
    "griffin_lim": "Griffin-Lim",
}


@dataclass
class Clip:
    """One evaluated recording: a row of the tables, and of `clips` in evaluation.json."""

    name: str
    speaker: str | None
    samples: int
    digest: str
    """Digest of the codes: equal for recordings that the model cannot distinguish."""
    trained_on: bool
    bits: dict[str, float]
    """Per sample, by distribution: "model", "linear", "markov", "unigram", "uniform"."""
    common_bits: float | None = None
    """Per sample on the grid of 16-bit samples; None where the model has no bits there."""
    mulaw_bits: float | None = None
    """Per sample on the grid of 256 mu-law codes."""
    by_level: list[tuple[int, float]] = field(default_factory=list)
    """Samples and bits by level, see `wavear.evaluation.bits.LEVELS`."""
    synthesized_samples: int | None = None
    audio: dict[str, str] | None = None
    """Files by system (`SYSTEMS`), relative to the evaluation; None if not synthesized."""
    measures: dict[str, dict[str, float]] | None = None
    """Values by system and measure."""
    not_measured: dict[str, dict[str, str]] | None = None
    """Reasons by system and measure."""

    @property
    def measured(self) -> dict[str, float]:
        """Measures of the model's audio; empty for a clip that was not synthesized."""
        return (self.measures or {}).get("model", {})

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON has it: without the fields of a synthesis that was not made."""
        unmade = () if self.audio else ("synthesized_samples", "audio", "measures", "not_measured")
        return {name: value for name, value in vars(self).items() if name not in unmade}

    @classmethod
    def rows(cls, record: dict[str, Any]) -> list[Clip]:
        """Return the clips of an `Evaluation.record`."""
        names = {each.name for each in dataclasses.fields(cls)}
        return [cls(**{k: v for k, v in row.items() if k in names}) for row in record["clips"]]


def mean_text(value: float, decimals: int, unit: str = "", sign: bool = False) -> str:
    """Return a number with its unit, for lines of text."""
    return f"{value:{'+' if sign else ''}.{decimals}f}" + (f" {unit}" if unit else "")


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    record: dict[str, Any]
    """The content of evaluation.json; its fields are listed in docs/evaluation.md."""
    folder: Path

    @property
    def bits(self) -> dict[str, float]:
        """Bits per sample over all clips: "model", "uniform", "unigram", "markov", "linear"."""
        return {name: interval["mean"] for name, interval in self.record["bits"].items()}

    @property
    def grid(self) -> str:
        """The quantisation of the model's samples, which the bits refer to."""
        checkpoint = self.record["checkpoint"]
        return checkpoint.get("grid", f"{checkpoint['config']['classes']} mu-law codes")

    @property
    def codes(self) -> str:
        """The quantisation and pre-emphasis, in words: equal for models whose bits compare."""
        emphasis = self.record["checkpoint"]["config"].get("pre_emphasis", 0.0)
        return self.grid + (f", pre-emphasis {emphasis:g}" if emphasis else "")

    @property
    def clips(self) -> list[Clip]:
        """The evaluated recordings."""
        return Clip.rows(self.record)

    @property
    def page(self) -> Path:
        """The report."""
        return self.folder / PAGE

    @property
    def verdict(self) -> str:
        """Compare the means with those of Griffin-Lim, in one line; empty if none can be."""
        named: dict[str, list[str]] = {"better": [], "worse": [], "equal": []}
        for name, found in self.record["measures"].items():
            sign = {"higher": 1, "lower": -1}.get(MEASURES[name].better)
            model, other = (
                found.get(system, {}).get("mean") for system in ("model", "griffin_lim")
            )
            if sign is not None and model is not None and other is not None:
                gain = sign * (model - other)
                kind = "better" if gain > 0 else "worse" if gain < 0 else "equal"
                named[kind].append(MEASURES[name].title)
        found = [f"{kind} on {', '.join(titles)}" for kind, titles in named.items() if titles]
        return f"compared with Griffin-Lim: {'; '.join(found)}" if found else ""

    def summary(self) -> list[str]:
        """Return lines to print: verdict, bits, measures with bounds, and the path of the page."""
        bits = ", ".join(f"{law} {value:.3f}" for law, value in self.bits.items())
        lines = [self.verdict] if self.verdict else []
        lines.append(f"bits per sample ({self.grid}): {bits}")
        for key, grid in (("common_bits", "16-bit samples"), ("mulaw_bits", "256 mu-law codes")):
            if found := self.record.get(key):
                lines.append(f"on the grid of {grid}: model {found['mean']:.3f}")
        bounds = {
            "mulaw": "round trip through the codes",
            "griffin_lim": "Griffin-Lim",
            "original": "recording",
        }
        for name, found in self.record["measures"].items():
            about = MEASURES[name]
            model = mean_text(found["model"]["mean"], about.decimals, about.unit)
            others = ", ".join(
                f"{label} {mean_text(found[system]['mean'], about.decimals)}"
                for system, label in bounds.items()
                if system in found
            )
            lines.append(f"{about.title}: {model} ({others})")
        return [*lines, f"report: {self.page}"]

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read the folder that `evaluate` wrote, or its evaluation.json.

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
            record = parse_json(path.read_bytes())
        except ValueError as error:
            raise WavearError(f"{path} is damaged, it is not JSON: {error}") from None
        if not isinstance(record, dict) or "bits" not in record:
            raise WavearError(
                f"{path} is not a finished evaluation: run wavear evaluate again with --overwrite"
            )
        if record.get("format") != FORMAT:
            raise WavearError(
                f"{path} has format {record.get('format')!r}; this version of wavear reads {FORMAT}"
            )
        if "checkpoint" not in record:
            raise WavearError(
                f"{path} is not an evaluation of one model: pass each model's evaluation.json"
            )
        for row in record.get("clips", []):
            for name in row.get("audio", {}).values():
                if not (path.parent / name).resolve().is_relative_to(path.parent.resolve()):
                    raise WavearError(
                        f"{path} names {name}, which lies outside its folder: evaluate again"
                    )
        return cls(record, path.parent)


@dataclass(frozen=True)
class Comparison:
    """Two models, paired by clip."""

    record: dict[str, Any]
    """The content of compare.json; its fields are listed in docs/evaluation.md."""
    folder: Path
    skipped: int = 0
    """Clips that an evaluation made for it could not use."""

    def summary(self) -> list[str]:
        """Return lines to print."""
        entries = [("bits per sample", "", 4, self.record["bits"])]
        for name, entry in self.record["measures"].items():
            about = MEASURES[name]
            entries.append((about.title, about.unit, about.decimals, entry))
        lines = []
        for title, unit, decimals, entry in entries:
            d = entry["difference"]
            a = mean_text(entry["a"]["mean"], decimals)
            b = mean_text(entry["b"]["mean"], decimals, unit)
            line = f"{title}: a {a}, b {b}, b less a {mean_text(d['mean'], decimals, sign=True)}"
            if d["low"] is not None:
                low, high = (mean_text(d[end], decimals, sign=True) for end in ("low", "high"))
                line += f" ({low} to {high})"
            if "better" in entry:
                line += f", b better in {entry['better']} of {d['clips']} clips"
            lines.append(line)
        return [*lines, f"report: {self.folder / COMPARISON_PAGE}"]


@dataclass(frozen=True)
class ModelTable:
    """Models of any quantisation, one row each."""

    record: dict[str, Any]
    """The content of models.json; its fields are listed in docs/evaluation.md."""
    folder: Path
    skipped: int = 0
    """Clips that an evaluation made for it could not use."""

    def summary(self) -> list[str]:
        """Return lines to print, one for each model."""
        lines = []
        for row in self.record["models"]:
            bits = [f"{row['bits']['mean']:.3f} bits ({row['grid']})"]
            for key, grid in (
                ("common_bits", "16-bit samples"),
                ("mulaw_bits", "256 mu-law codes"),
            ):
                if row[key] is not None:
                    bits.append(f"{row[key]['mean']:.3f} on {grid}")
            speeds = [f"{value:,.0f} samples/s {engine}" for engine, value in row["speed"].items()]
            facts = [*bits, f"{row['parameters']:,} parameters", *speeds]
            facts += [] if speeds else ["speed not measured"]
            lines.append(f"{row['name']}: {', '.join(facts)}")
        return [*lines, f"report: {self.folder / TABLE_PAGE}"]
