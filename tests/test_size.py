"""What a file claims is not what it holds: refusals within bounds of memory and time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import AVAILABLE, bounded

import wavear
from wavear import MelConfig, PredictiveWaveNet, PredictiveWaveNetConfig, WaveNet, WaveNetConfig
from wavear.common.errors import WavearError
from wavear.models.gru import GRU, GRUConfig
from wavear.models.linear import Linear, LinearConfig
from wavear.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="memory is bounded by Linux")

RATE = 8000
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=4000.0)
SMALL: dict[str, Any] = {
    "wavenet": lambda: WaveNet(
        WaveNetConfig(sample_rate=RATE, mel=MEL, layers=2, stacks=1, residual_channels=1)
    ),
    "predictive": lambda: PredictiveWaveNet(
        PredictiveWaveNetConfig(sample_rate=RATE, mel=MEL, layers=1, residual_channels=4)
    ),
    "gru": lambda: GRU(GRUConfig(sample_rate=RATE, channels=4)),
    "transformer": lambda: Transformer(TransformerConfig(sample_rate=RATE, channels=8, heads=2)),
    "linear": lambda: Linear(LinearConfig(sample_rate=RATE, order=2)),
}


# ---- checkpoints


def rewrite(folder: Path, change: Any, weights: Any = None) -> None:
    """Change the configuration of a checkpoint, in both files, and its weights."""
    from safetensors.torch import load_file, save_file

    described = json.loads((folder / "config.json").read_text())
    change(described["config"])
    text = json.dumps(described)
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    tensors = tensors if weights is None else weights(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"wavear": text})


HUGE = 10**9
LARGER = "is of a larger model than model.safetensors"
CONFIGS = [
    ("wavenet", {"residual_channels": HUGE}, LARGER),
    ("wavenet", {"layers": HUGE, "stacks": HUGE // 20}, LARGER),
    ("wavenet", {"speakers": 2**62}, LARGER),
    ("wavenet", {"conditioning_context": 2**70}, LARGER),
    ("wavenet", {"head_channels": 20_000}, LARGER),
    ("predictive", {"period_layers": HUGE}, LARGER),
    ("predictive", {"prediction_order": HUGE}, "prediction_order is 1000000000, expected at most"),
    ("predictive", {"period_channels": HUGE}, LARGER),
    ("predictive", {"mixtures": HUGE}, LARGER),
    ("gru", {"layers": HUGE}, LARGER),
    ("gru", {"channels": 50_000}, LARGER),
    ("transformer", {"window": HUGE}, "state has more than"),
    ("transformer", {"patch": HUGE}, LARGER),
    ("transformer", {"channels": HUGE}, LARGER),
    ("linear", {"order": HUGE}, LARGER),
    ("linear", {"differencing": HUGE}, "differencing is 1000000000, expected at most"),
]


@pytest.mark.parametrize(("family", "fields", "message"), CONFIGS)
def test_a_configuration_larger_than_its_weights_is_refused(
    tmp_path: Path, family: str, fields: dict, message: str
):
    SMALL[family]().save(tmp_path)
    rewrite(tmp_path, lambda config: config.update(fields))
    with bounded(300, 10) as cost, pytest.raises(WavearError, match=message):
        wavear.load(tmp_path)
    assert cost.mebibytes < 100


@pytest.mark.parametrize("family", SMALL)
def test_a_checkpoint_that_fits_its_weights_loads(tmp_path: Path, family: str):
    SMALL[family]().save(tmp_path)
    assert wavear.load(tmp_path).family == family


def test_dilations_beyond_all_use_are_refused(tmp_path: Path):
    config = WaveNetConfig(layers=24, stacks=1, residual_channels=8, skip_channels=1)
    WaveNet(config).save(tmp_path)
    with bounded(600, 10), pytest.raises(WavearError, match="state has more than"):
        wavear.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"n_fft": HUGE}, {"n_fft": 2**16, "bands": 20_000}, {"n_fft": HUGE, "hop_length": HUGE},
     {"fmin": 10**400}, {"n_fft": HUGE, "window_length": HUGE}],
)  # fmt: skip
def test_absurd_windows_and_hops_of_a_mel_are_refused(tmp_path: Path, fields: dict):
    SMALL["wavenet"]().save(tmp_path)
    rewrite(tmp_path, lambda config: config["mel"].update(fields))
    with bounded(300, 10), pytest.raises(WavearError, match="MelConfig: "):
        wavear.load(tmp_path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.uint8, torch.bool],
)
def test_weights_that_are_not_floats_are_refused(tmp_path: Path, dtype: torch.dtype):
    SMALL["wavenet"]().save(tmp_path)
    name = "blocks.0.skip.weight"
    rewrite(tmp_path, lambda _: None, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(WavearError, match=rf"{name} is .*, expected F32"):
        wavear.load(tmp_path)


# ---- JSON


def test_json_nested_too_deep_is_refused_everywhere(tmp_path: Path):
    from wavear.data.corpus import find
    from wavear.evaluation.clips import training_record
    from wavear.evaluation.evaluation import Evaluation
    from wavear.training.config import TrainConfig
    from wavear.training.run import write_held_out
    from wavear.training.run_directory import open_directory

    deep = "[" * 100_000 + "]" * 100_000
    SMALL["wavenet"]().save(tmp_path / "run" / "best")
    for name in ("run/best/config.json", "run/train.json", "list.jsonl", "evaluation.json"):
        (tmp_path / name).write_text(deep)
    resumed = TrainConfig(data="x", out=str(tmp_path / "run"), resume=True)
    for call in (
        lambda: wavear.load(tmp_path / "run" / "best"),
        lambda: write_held_out(tmp_path / "run", tmp_path / "held.jsonl"),
        lambda: open_directory(resumed, writes=False),
        lambda: find(tmp_path / "list.jsonl"),
        lambda: Evaluation.read(tmp_path / "evaluation.json"),
    ):
        with pytest.raises(WavearError, match="nested too deep"):
            call()
    assert training_record(tmp_path / "run" / "best") == {}
