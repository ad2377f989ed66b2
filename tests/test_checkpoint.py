"""Checkpoints: round trips; damaged and foreign ones are refused with a reason."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import wavear
from wavear import CheckpointError, MelConfig, WaveNet, WaveNetConfig
from wavear.common.errors import WavearError
from wavear.models.checkpoint import LATER, read_config

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=20, bands=5, fmax=4000.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes: Any = {"layers": 4, "residual_channels": 6, "skip_channels": 7, "head_channels": 8}
    return WaveNet(WaveNetConfig(sample_rate=8000, mel=MEL, speakers=2, **sizes))


@pytest.fixture
def saved(model, tmp_path):
    return model.save(tmp_path / "model", training={"steps": 10})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(model, tmp_path, dtype):
    model.to(dtype).save(tmp_path / "a" / "b")
    loaded = wavear.load(str(tmp_path / "a" / "b"))
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype


def test_the_description_can_be_read_without_weights(saved):
    described = json.loads((saved / "config.json").read_text())
    assert described["family"] == "wavenet"
    assert described["config"]["mel"]["hop_length"] == 20
    assert read_config(saved) == described
    assert described["training"] == {"steps": 10}


def test_a_checkpoint_is_overwritten_on_request_only(model, saved):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"config\.json exists"):
        model.save(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        model.embedding.weight += 1
    model.save(saved, overwrite=True)
    assert torch.equal(wavear.load(saved).embedding.weight, model.embedding.weight)


def test_a_failed_save_keeps_the_old_checkpoint(model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def edit(directory, change):
    path = directory / "config.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "half a config": (
        lambda d: truncate(d / "config.json", 40),
        "config.json is damaged, not valid JSON",
    ),
    "half the weights": (
        lambda d: truncate(d / "model.safetensors", 2000),
        "model.safetensors is damaged",
    ),
    "no bytes": (lambda d: truncate(d / "model.safetensors", 0), "model.safetensors is damaged"),
    "a pickle": (
        lambda d: torch.save({"a": torch.zeros(1)}, d / "model.safetensors"),
        "not a safetensors file",
    ),
    "foreign": (
        lambda d: (d / "config.json").write_text('{"model_type": "bert"}'),
        "not of a wavear checkpoint",
    ),
    "newer": (
        lambda d: edit(d, lambda c: c.update(format=99)),
        "format 99; this version of wavear reads 1",
    ),
    "family": (
        lambda d: edit(d, lambda c: c.update(family="lstm")),
        "family 'lstm', known are predictive, wavenet",
    ),
    "no family": (
        lambda d: edit(d, lambda c: c.update(family=[])),
        r"family \[\], known are predictive, wavenet",
    ),
    "no training": (
        lambda d: edit(d, lambda c: c.update(training=3)),
        "'training' is missing or not an object",
    ),
    "key missing": (lambda d: edit(d, lambda c: c["config"].pop("layers")), "layers missing"),
    "key unknown": (lambda d: edit(d, lambda c: c["config"].update(depth=3)), "depth unknown"),
    "mel key": (
        lambda d: edit(d, lambda c: c["config"]["mel"].pop("fmin")),
        "fmin|of two models",
    ),
    "edited": (lambda d: edit(d, lambda c: c["config"].update(layers=8)), "of two models"),
    "tensor missing": (
        lambda d: edit_tensors(d, lambda t: t.pop("embedding.weight")),
        "lacks embedding.weight",
    ),
    "tensor unknown": (
        lambda d: edit_tensors(d, lambda t: t.update(x=torch.zeros(1))),
        "holds x, unknown",
    ),
    "shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"head.3.bias": torch.zeros(3)})),
        r"head.3.bias has shape \(3,\), expected \(256,\)",
    ),
    "NaN": (
        lambda d: edit_tensors(
            d, lambda t: t.update({"head.3.bias": torch.full((256,), torch.nan)})
        ),
        "head.3.bias holds NaN or infinity, from a training that diverged",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_the_error_names_the_damage(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        wavear.load(saved)
    assert str(saved) in str(caught.value)
    assert isinstance(caught.value, WavearError)


def test_a_parent_directory_gets_a_hint(saved):
    with pytest.raises(CheckpointError, match=f"there is one in {saved}"):
        wavear.load(saved.parent)


def test_a_file_is_refused_as_a_checkpoint(saved):
    with pytest.raises(CheckpointError, match="is a file"):
        wavear.load(saved / "model.safetensors")


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, tuple(allow_patterns)))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert wavear.load("hf:someone/some-model").config.speakers == 2
    assert asked == [("someone/some-model", ("config.json", "model.safetensors"))] * len(asked)


def test_an_unreachable_hub_is_reported(monkeypatch):
    def download(*_args, **_kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = "hf:someone/some-model: the hub did not provide it: Name"
    with pytest.raises(FileNotFoundError, match=message):
        wavear.load("hf:someone/some-model")


@pytest.mark.parametrize("path", ["rnus/best", "someone/some-model", "best", "a/b/c", "hf/x"])
def test_a_mistyped_path_does_not_reach_the_hub(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=f"{path}: no such directory"):
        wavear.load(path)


@pytest.mark.parametrize("engine", ["reference", "numba", "parallel"])
def test_non_finite_weights_are_refused_before_they_score(engine):
    """In memory, where no checkpoint was read; a compiled engine scored NaN."""
    sizes: Any = {"layers": 2, "stacks": 1, "residual_channels": 4, "skip_channels": 4}
    model = WaveNet(WaveNetConfig(sample_rate=8000, **sizes)).eval()
    with torch.no_grad():
        model.embedding.weight[3] = torch.inf
    with pytest.raises(WavearError, match=r"model's embedding\.weight holds NaN or infinity"):
        wavear.score(model, torch.zeros(1, 20), engine=engine)
    if engine != "parallel":
        with pytest.raises(WavearError, match="holds NaN or infinity"):
            wavear.generate(model, samples=5, engine=engine)


def test_values_that_came_later_are_those_of_json():
    """They are compared with the configurations of runs and states, which are read from JSON."""
    assert json.loads(json.dumps(LATER)) == LATER
