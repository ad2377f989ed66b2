"""Train every family on the same recordings with the same budget, and compare them in a table.

Runs that are there already are kept, and interrupted ones resume: the same command ends
what was begun.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wavear import EvaluateConfig, TrainConfig, compare_models, train, write_held_out
from wavear.cli import recipe

# Shapes of about 0.7 million multiply-adds per sample: what one CPU core plays live.
WAVENET = {
    "family": "wavenet",
    "layers": 20,
    "stacks": 2,
    "residual_channels": 64,
    "skip_channels": 128,
    "batch_size": 1,
}
MIXTURE = {"law": "logistic_mixture", "mixtures": 10, "coarse_classes": 256}
# A recurrent model takes its samples one after the other: many short segments keep the processor
# busier.
GRU = {"family": "gru", "channels": 352, "segment": 1024, "batch_size": 16, "learning_rate": 8e-3}
TRANSFORMER = {"family": "transformer", "segment": 2048, "batch_size": 4, "learning_rate": 5e-3}
Name = Literal["linear", "wavenet", "wavenet-16-bit", "gru", "transformer"]
MODELS: dict[Name, dict[str, Any]] = {
    "linear": {"family": "linear", "order": 32},
    "wavenet": WAVENET,
    "wavenet-16-bit": WAVENET | MIXTURE,
    "gru": GRU,
    "transformer": TRANSFORMER,
}


@dataclass(frozen=True)
class Families:
    """Models to compare, and how."""

    data: str = "data"
    """Recordings: a folder or a manifest."""
    out: str = "runs/families"
    """Directory: a run for each model, and table/ with models.html."""
    validation: str | None = None
    """A second folder or manifest, all of it held out; None: a part of `data` is."""
    models: tuple[Name, ...] = ("linear", "wavenet", "wavenet-16-bit", "gru", "transformer")
    """Which."""
    minutes: float = 30.0
    """Minutes of training, for each but the linear one."""
    sample_rate: int = 22050
    """Hz."""
    unconditional: bool = False
    """Train without mels: each model has only its past, as the linear one always has."""
    clips: int = 8
    """Held-out clips to synthesize from their mels and measure."""
    seconds: float = 5.0
    """Most seconds of each clip."""
    precision: str = "auto"
    """auto: bf16 for models of codes where the device has it in hardware; or 32."""
    device: str = "auto"
    """auto, cpu or cuda, for the training."""
    seed: int = 0
    """Seed of the first weights, the order of the data, and the sound."""
    progress: bool = True
    """Show progress."""


VALUES = Families()


def run(config: Families) -> int:
    """Train what is not there yet, and write the table."""
    say = print if config.progress else lambda line: None
    if config.validation is None and config.data.endswith(
        ".tar"
    ):  # what `write_held_out` would refuse, hours later
        raise ValueError(
            f"{config.data}: no manifest can name what is held out of tar shards: give --validation"
        )
    best = [train_one(name, config, say) for name in config.models]
    settings = EvaluateConfig(
        clips=config.clips,
        seconds=config.seconds,
        seed=config.seed,
        shown=4,
        overwrite=True,
        device="cpu",
    )
    table = Path(config.out) / "table"
    held_out = config.validation or write_held_out(
        best[0].parent, Path(config.out) / "held-out.jsonl"
    )
    found = compare_models(best, table, held_out, settings)
    for line in found.summary():
        say(line)
    return 0


def train_one(name: Name, config: Families, say) -> Path:
    """Return the best checkpoint of a model's run; start or resume it if it is unfinished."""
    out = Path(config.out) / name
    record = out / "train.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("held_out"):
        say(f"{name}: {out} is there already")
        return out / "best"
    say(f"{name}:")
    values = MODELS[name]
    own = {}
    if values["family"] != "linear":  # all by the likelihood, which they are compared by
        own = {"precision": config.precision, "max_minutes": config.minutes, "free_run": 0.0}
    result = train(
        TrainConfig(
            data=config.data,
            out=str(out),
            validation=config.validation,
            sample_rate=config.sample_rate,
            unconditional=config.unconditional or values["family"] == "linear",
            device=config.device,
            seed=config.seed,
            progress=config.progress,
            resume=record.is_file(),
            **{"sample_seconds": 0.0, "max_steps": None, **own, **values} if own else values,  # type: ignore[arg-type]
        )
    )
    if result.stopped_by == "interrupt":
        raise KeyboardInterrupt
    return result.best


if __name__ == "__main__":
    recipe(VALUES, __doc__, run=run)
