"""The model card of a checkpoint, and its upload to a stand-in for the hub."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.image
import numpy as np
import pytest
import yaml
from small_models import MEL
from small_training import config_of

import wavear
from wavear.cli.commands import main
from wavear.models.card import CARD
from wavear.models.hub import push


@pytest.fixture
def model() -> wavear.WaveNet:
    return wavear.WaveNet(wavear.WaveNetConfig(layers=2, stacks=1, sample_rate=8000, mel=MEL))


@pytest.fixture
def saved(model: wavear.WaveNet, tmp_path: Path) -> Path:
    training = {"data": "notes", "step": 1234, "speakers": ["p1", "p2"], "validation_bits": 3.25}
    return model.save(tmp_path / "saved", training=training | {"free_run": {"log-mel": 0.5}})


def test_card_states_mels_data_bits_and_licence(saved: Path):
    _, head, body = (saved / CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"
    assert yaml.safe_load(head)["library_name"] == "wavear"
    assert "Trained on `notes`, 1,234 steps, 2 speakers: p1, p2." in body
    rows = dict(row.strip("| ").split(" | ") for row in body.splitlines() if row[:2] == "| ")
    assert (rows["bits per sample"], rows["log-mel"]) == ("3.25", "0.5")
    # The mel contract: every field as `config.json` has it.
    assert {name: str(value) for name, value in MEL.to_dict().items()}.items() <= rows.items()


def test_card_is_replaced_only_while_nobody_has_changed_it(model: wavear.WaveNet, saved: Path):
    model.save(saved, overwrite=True, training={"step": 7})
    assert "7 steps" in (saved / CARD).read_text()
    for text in ((saved / CARD).read_text().replace("unknown", "cc0-1.0"), "My own card.\n", ""):
        (saved / CARD).write_text(text)
        model.save(saved, overwrite=True, training={"step": 8})
        assert (saved / CARD).read_text() == text


def test_unconditional_model_has_a_card(tmp_path: Path):
    wavear.Linear(wavear.LinearConfig(order=2)).save(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert "None: the model is unconditional." in card
    assert "Not measured yet." in card


def test_card_of_a_model_of_features_shows_how_to_give_them(tmp_path: Path):
    features = wavear.FeatureConfig(sample_rate=8000, hop_length=64, channels=3)
    wavear.WaveNet(wavear.WaveNetConfig(layers=2, stacks=1, sample_rate=8000, mel=features)).save(
        tmp_path
    )
    card = (tmp_path / CARD).read_text()
    assert "takes features." in card
    assert "wavear generate FOLDER --features new.npy --out new.wav" in card
    assert "## Features" in card
    assert "synthesize" not in card
    assert "vocoder" not in card


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the calls to the hub; return what arrives there."""
    got: dict[str, Any] = {"existing": {"me/taken"}}

    def create_repo(_: Any, name: str, *, private: bool, exist_ok: bool) -> None:
        if name in got["existing"] and not exist_ok:
            error = OSError("409 Client Error: Conflict\nyou already created it")
            error.response = type("Response", (), {"status_code": 409})  # type: ignore[attr-defined]
            raise error
        got["private"] = private

    def upload_folder(_: Any, *, repo_id: str, folder_path: Path, **rest: Any) -> str:
        files = {name: (folder_path / name).read_bytes() for name in rest["allow_patterns"]}
        got["uploaded"] = (repo_id, files)
        return f"https://hub.invalid/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return got


def test_push_uploads_the_checkpoint_and_its_card_only(
    hub: dict[str, Any], saved: Path, capsys: pytest.CaptureFixture
):
    (saved / "notes.txt").write_text("private")
    assert main(["push", str(saved), "me/mine", "--private"]) == 0
    name, files = hub["uploaded"]
    assert name == "me/mine"
    assert hub["private"] is True
    assert files == {
        n: (saved / n).read_bytes() for n in ("config.json", "model.safetensors", CARD)
    }
    out, err = capsys.readouterr()
    assert out == "https://hub.invalid/me/mine/commit/1\n"
    assert "states no licence" in err


def test_push_writes_a_missing_card_and_keeps_an_edited_one(hub: dict[str, Any], saved: Path):
    (saved / CARD).unlink()
    push(saved, "me/mine")
    assert b"Trained on `notes`" in hub["uploaded"][1][CARD]
    (saved / CARD).write_text("My own card.\n")
    push(saved, "me/mine")
    assert hub["uploaded"][1][CARD] == b"My own card.\n"


def test_push_replaces_a_model_on_request_only(hub: dict[str, Any], saved: Path):
    with pytest.raises(wavear.WavearError, match=r"409 .*--overwrite replaces it"):
        push(saved, "me/taken")
    assert "uploaded" not in hub
    push(saved, "me/taken", overwrite=True)
    assert hub["uploaded"][0] == "me/taken"


def test_push_refuses_bad_names_and_folders_before_the_upload(
    hub: dict[str, Any], saved: Path, tmp_path: Path
):
    with pytest.raises(wavear.WavearError, match="owner/name"):
        push(saved, "mine")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        push(tmp_path / "nothing", "me/mine")
    (saved / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(wavear.CheckpointError, match="damaged"):
        push(saved, "me/mine")
    assert "uploaded" not in hub


class Refusing(BaseHTTPRequestHandler):
    """A hub that refuses every login."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error": "Invalid credentials"}')

    def log_message(self, *_: Any) -> None: ...


def test_push_without_a_login_is_one_line(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The real client, and a server on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    try:
        assert main(["push", str(saved), "me/mine"]) == 1
    finally:
        server.shutdown()
        server.server_close()
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("wavear: error: cannot upload to me/mine on the hub: ")
    assert "401" in line
    assert line.endswith("; run `hf auth login`")


def test_training_writes_a_card_and_a_picture_of_the_curves(tmp_path: Path):
    data = tmp_path / "private place" / "flute"
    data.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 4000)).astype(np.float32)
    for number, waveform in enumerate(noise):
        wavear.audio.write(data / f"{number}.wav", waveform, 8000)
    result = wavear.train(config_of(data, tmp_path / "run", max_steps=1))
    card = (result.best / CARD).read_text()
    assert "Trained on `flute`, 1 step." in card
    recorded = json.loads((result.best / "config.json").read_text())["training"]
    assert f"| bits per sample | {recorded['validation_bits']} |" in card
    assert recorded["validation_bits"] == pytest.approx(result.bits_best, abs=1e-4)
    assert "private place" not in card
    # The run's curves, as a picture with more than the background.
    pixels = matplotlib.image.imread(tmp_path / "run" / "loss.png")
    assert pixels.shape[0] > 100
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
