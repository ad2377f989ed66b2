"""Memory, compiled layers, and runs that cannot begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import RATE, assert_same_run, config_of, record_of

import wavear
from wavear import train
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate
from wavear.models.crop_loss import crop_loss, layout_of

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(
    tones: Path, model: wavear.WaveNet, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int]:
    """Return the gradient of one batch, and the bytes kept for the backward pass."""
    layout = layout_of(model, 512)
    segments = Segments(open_corpus(tones, sample_rate=RATE).train, layout)
    batch = collate([segments[i] for i in range(2)])
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = crop_loss(model, batch, layout, dtype)
    found = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found]), sum(kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("unconditional", [False, True], ids=["mel", "free"])
def test_checkpointed_activations_give_the_same_gradient_in_less_memory(
    tones, dtype, unconditional
):
    """Bit for bit: the same operations on the same numbers."""
    settings: dict[str, Any] = {"layers": 8, "kernel_size": 3, "unconditional": unconditional}
    model = wavear.WaveNet(config_of("-", "-", **settings).model_config())
    plain, most = gradients(tones, model, dtype)
    model.activation_checkpointing = True
    again, least = gradients(tones, model, dtype)
    assert torch.equal(plain, again)
    assert least < 0.6 * most


def test_run_with_checkpointed_activations_is_the_same(tones, tmp_path):
    for name in ("plain", "checkpointed"):
        settings = {"activation_checkpointing": name == "checkpointed"}
        train(config_of(tones, tmp_path / name, max_steps=2, **settings))
    assert_same_run(tmp_path / "plain", tmp_path / "checkpointed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_gradient_of_plain_ones(tones):
    """Within float32 rounding: fused kernels may add in another order."""
    from torch._dynamo.utils import counters

    config = config_of("-", "-", layers=6, kernel_size=3, compile=True)
    model = wavear.WaveNet(config.model_config())
    plain, _ = gradients(tones, model)
    names = list(model.state_dict())
    counters.clear()
    model.compile_layers()
    compiled, _ = gradients(tones, model)
    torch.testing.assert_close(compiled, plain, atol=2e-6, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the last layer is another kernel
    assert list(model.state_dict()) == names


def test_compile_without_a_compiler_is_refused(tones, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        train(config_of(tones, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_checkpointing_of_an_unsupported_family_is_refused(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(wavear.WaveNet, "activation_checkpointing", None)
    with pytest.raises(ValueError, match="WaveNet does not support activation_checkpointing"):
        train(config_of(tones, tmp_path / "run", activation_checkpointing=True))


# --- a failed start leaves nothing behind


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ({}, {}, "holds no audio files"),
        ({"a.wav": b"no audio"}, {}, "none of the files can be used"),
        (None, {}, "no such folder or manifest"),
        ("tones", {"device": "abacus"}, "device is 'abacus'"),
        ("tones", {"wandb": "mine"}, "that package is not installed"),
    ],
    ids=["empty", "damaged", "missing", "device", "wandb"],
)
def test_failed_start_leaves_no_folder(tones, tmp_path, monkeypatch, content, settings, message):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    data = tones if content == "tones" else tmp_path / "data"
    if isinstance(content, dict):
        data.mkdir()
        for name, text in content.items():
            (data / name).write_bytes(text)
    with pytest.raises((ValueError, OSError), match=message):
        train(config_of(data, tmp_path / "deep" / "run", **settings))
    assert not (tmp_path / "deep").exists()


def test_failed_start_leaves_the_run_it_would_replace(tones, tmp_path):
    out = tmp_path / "run"
    train(config_of(tones, out, max_steps=2))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no audio files"):
        train(config_of(tmp_path / "empty", out, overwrite=True))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    train(config_of(tones, out, overwrite=True, max_steps=1))
    assert record_of(out)["steps"] == 1
    assert (out / "metrics.csv").read_text().count("validation_bits") == 1  # the old one is gone
