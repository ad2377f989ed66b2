"""Two evaluations paired by clip: differences and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wavear.common.errors import WavearError
from wavear.evaluation.metrics import MEASURES
from wavear.evaluation.records import Clip
from wavear.evaluation.statistics import bootstrap


def paired(
    a: dict[str, Any], b: dict[str, Any], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return the differences between two evaluations: b less a, clip by clip.

    Parameters
    ----------
    a, b : dict
        `Evaluation.record` of each.
    resamples, seed : int
        Of the bootstrap: clips are drawn with replacement, each with its pair of values.

    Returns
    -------
    dict
        "bits" and "measures", each with "a", "b", "difference" (mean, low, high, clips) and, where
        a direction is better, "better": the number of clips in which b is better.

    Raises
    ------
    ValueError
        If they are not of the same codes, rate, clips and length of synthesis.
    """
    check_codes(a["checkpoint"]["config"], b["checkpoint"]["config"])
    pairs = _pair_clips(a, b)

    def entry(values: Sequence[Sequence[float]], better: str, weights: Any = None) -> Any:
        x, y = np.array(values, np.float64).T
        found: dict[str, Any] = {
            name: bootstrap(each, weights, resamples=resamples, seed=seed).to_dict()
            for name, each in (("a", x), ("b", y), ("difference", y - x))
        }
        if better != "near":
            found["better"] = int(((y < x) if better == "lower" else (y > x)).sum())
        return found

    clips = [
        {
            "name": x.name,
            "samples": x.samples,
            "bits": [x.bits["model"], y.bits["model"]],
            "measures": {
                name: [x.measured[name], y.measured[name]]
                for name in MEASURES
                if name in x.measured and name in y.measured
            },
        }
        for x, y in pairs
    ]
    measures = {
        name: [clip["measures"][name] for clip in clips if name in clip["measures"]]
        for name in MEASURES
    }
    return {
        "a": _described(a),
        "b": _described(b),
        "bits": entry(
            [clip["bits"] for clip in clips], "lower", [float(x.samples) for x, _ in pairs]
        ),
        "measures": {
            name: entry(values, MEASURES[name].better)
            for name, values in measures.items()
            if values
        },
        "notes": _notes(a, b),
        "clips": clips,
    }


def _pair_clips(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Clip, Clip]]:
    """Pair the clips of two records; refuse records of other clips."""
    rows = {"a": Clip.rows(a), "b": Clip.rows(b)}
    one, two = ({clip.name: clip for clip in each} for each in rows.values())
    if alone := sorted(set(one) ^ set(two)):
        which = "a" if alone[0] in one else "b"
        raise WavearError(
            f"{alone[0]} is a clip of {which} only ({len(alone)} clips differ):"
            " evaluate both on the same"
        )
    for name, clip in one.items():
        if clip.digest != two[name].digest:
            raise WavearError(
                f"{name} is not the same audio in a and b (or was treated differently):"
                " evaluate both on the same"
            )
    if list(one) != list(two):
        raise WavearError(
            "the clips of a and b are in different orders: evaluate both with one version of wavear"
        )
    x, y = a["settings"]["seconds"], b["settings"]["seconds"]
    if a["measures"] and b["measures"] and x != y:
        raise WavearError(
            f"a was synthesized up to {x:g} s of each clip and b up to {y:g} s:"
            " evaluate both with one --seconds"
        )
    return list(zip(*rows.values(), strict=True))


def check_codes(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Refuse models whose bits do not compare: of other codes, or of another sample rate."""
    emphases = (a.get("pre_emphasis", 0.0), b.get("pre_emphasis", 0.0), " of pre-emphasis")
    rates = (a["sample_rate"], b["sample_rate"], " Hz")
    for x, y, unit in ((codes(a), codes(b), ""), rates, emphases):
        if x != y:
            raise WavearError(
                f"a has {x}{unit} and b has {y}{unit}:"
                " bits per sample under different quantisation cannot be compared"
            )


def codes(config: dict[str, Any]) -> str:
    """Return the quantisation of a model's samples in words."""
    mulaw = config.get("law", "categorical") == "categorical"
    return f"{config['classes']} {'mu-law codes' if mulaw else 'values'}"


def _described(record: dict[str, Any]) -> dict[str, Any]:
    checkpoint = record["checkpoint"]
    return {
        "source": checkpoint["source"],
        "parameters": checkpoint["parameters"],
        "step": checkpoint["training"].get("step"),
        "created": record["created"],
        "settings": record["settings"],
    }


def _notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the differences other than the model."""
    notes = []
    for name in ("seed", "temperature", "weights", "particles"):
        x, y = (each["settings"].get(name, 1) for each in (a, b))  # old records have no particles
        if x != y:
            notes.append(f"{name} is {x} in a and {y} in b: the model is not the only difference")
    for side, record in (("a", a), ("b", b)):
        clips = Clip.rows(record)
        if count := sum(clip.trained_on for clip in clips):
            notes.append(
                f"{count} of {len(clips)} clips were trained on by {side}: not held-out for it"
            )
        if not record["measures"]:
            notes.append(f"{side} has no copy synthesis: bits only")
    return notes
