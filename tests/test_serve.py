"""The page of `wavear serve`: what the server answers, makes and refuses."""

from __future__ import annotations

import base64
import functools
import io
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from serve_models import small_wavenet

import wavear
from wavear import MelConfig
from wavear.cli.commands import main
from wavear.generation.pipes import pcm16
from wavear.serving.settings import ServeConfig

testclient = pytest.importorskip("starlette.testclient", reason="needs wavear[serve] and httpx")
pytest.importorskip("uvicorn", reason="needs wavear[serve]")
import anyio  # noqa: E402
from starlette import exceptions, requests  # noqa: E402

from wavear.serving import live as live_module  # noqa: E402
from wavear.serving.server import Server  # noqa: E402

RATE = 8000
MEL = MelConfig(sample_rate=RATE, n_fft=256, window_length=256, hop_length=64, bands=8, fmax=None)
HOME = "http://127.0.0.1:8000"
SMALL = ServeConfig(clients=2, max_megabytes=0.2, max_seconds=2, buffer=0.2, threads=1)
WS = "ws://127.0.0.1:8000/live"


@pytest.fixture(scope="module")
def free() -> Any:
    return small_wavenet(RATE)


@pytest.fixture(scope="module")
def vocoder() -> Any:
    return small_wavenet(RATE, MEL, seed=2)


def client_of(model: Any, config: ServeConfig = SMALL) -> Any:
    app = Server(model, "runs/mine", config).app()
    return testclient.TestClient(app, base_url=HOME, headers={"origin": HOME})


@pytest.fixture
def page(vocoder: Any) -> Iterator[Any]:
    with client_of(vocoder) as client:
        yield client


@pytest.fixture
def player(free: Any) -> Iterator[Any]:
    with client_of(free) as client:
        yield client


def recording(seconds: float = 0.5, rate: int = RATE, **options: Any) -> bytes:
    x = 0.5 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, x, rate, format=options.pop("format", "WAV"), **options)
    return file.getvalue()


def pcm_of(answer: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer.json()["pcm"]), "<i2")


def listen(ws: Any, until: int, epoch: int = 0, into: bytearray | None = None) -> np.ndarray:
    """Return samples up to position `until`, reporting what was heard, as the page does."""
    heard = bytearray() if into is None else into
    replies = []
    while True:
        message = ws.receive()
        if message.get("bytes") is None:
            replies.append(message.get("text"))
            continue
        found, position = struct.unpack("<II", message["bytes"][:8])
        if found != epoch:
            continue
        del heard[2 * position :]
        assert len(heard) == 2 * position, f"a gap at {position}: {replies}"
        heard += message["bytes"][8:]
        ws.send_json({"heard": len(heard) // 2, "epoch": epoch})
        if len(heard) >= 2 * until:
            return np.frombuffer(bytes(heard[: 2 * until]), "<i2")


def reply(ws: Any, name: str) -> dict[str, Any]:
    """Return the next message that has a key; audio before it is heard."""
    while True:
        message = ws.receive()
        if message.get("text") and name in (found := testclient.json.loads(message["text"])):
            return found


def expected(model: Any, samples: int, **settings: Any) -> np.ndarray:
    made = wavear.generate(model, samples=samples, threads=1, **settings)[0]
    return np.frombuffer(pcm16(made.numpy()), "<i2")


def test_the_page_and_its_files_are_served(page):
    text = page.get("/").text
    for name in ("style.css", "app.js"):
        assert name in text
        assert page.get(f"/{name}").status_code == 200
    assert page.get("/worklet.js").status_code == 200
    assert "//" not in text.replace("<!doctype html>", "")  # nothing from elsewhere
    assert "default-src 'self'" in page.get("/").headers["content-security-policy"]
    assert page.get("/about").json()["mel"] is True


def test_no_file_outside_the_folder_is_served(page):
    for path in ("/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd",
                 "/%2fetc/passwd", "/page/../../settings.py"):  # fmt: skip
        assert page.get(path).status_code == 404, path


def test_resynthesis_equals_generate(page, vocoder):
    kept = page.post("/recordings?name=a.wav", content=recording())
    assert len(pcm_of(kept)) == 4000
    asked = {"id": kept.json()["id"], "seed": 7, "temperature": 0.8}
    made = page.post("/resynthesize", json=asked)
    waveform = torch.from_numpy(soundfile.read(io.BytesIO(recording()), dtype="float32")[0])
    mel = wavear.log_mel(waveform[None], MEL)
    right = wavear.generate(vocoder, mel, seed=7, temperature=0.8)[0].numpy()
    assert pcm_of(made).tobytes() == pcm16(right)
    several = page.post("/resynthesize", json=asked | {"particles": 2})
    right = wavear.generate(vocoder, mel, seed=7, temperature=0.8, particles=2)[0].numpy()
    assert pcm_of(several).tobytes() == pcm16(right)
    for wrong in (0, 33, 1.5, "2", None):
        refused = page.post("/resynthesize", json=asked | {"particles": wrong})
        assert refused.status_code == 400
        assert "particles is" in refused.json()["error"]
    assert made.json()["real_time_factor"] > 0
    assert base64.b64decode(made.json()["spectrogram"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(("format", "name"), [("FLAC", "a.flac"), ("OGG", "b.ogg"), ("WAV", "")])
def test_recordings_of_other_formats_and_rates_are_resampled(page, format, name):
    kept = page.post(f"/recordings?name={name}", content=recording(0.5, 16000, format=format))
    assert kept.status_code == 200
    assert kept.json()["seconds"] == 0.5


@pytest.mark.parametrize(
    ("content", "name", "status", "reason"),
    [
        (b"no audio at all", "a.wav", 400, "a.wav"),
        (b"", "../../a.wav", 400, "a.wav: "),
        (recording(2.5), "long.wav", 400, "2.5 s, at most 2 s"),
        (recording(0.5, 384000), "big.wav", 413, "at most 0.2 MB"),
    ],
)
def test_recordings_that_cannot_be_used_are_refused(page, content, name, status, reason):
    answer = page.post("/recordings", params={"name": name}, content=content)
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert "/tmp" not in answer.json()["error"]


def test_a_slow_upload_is_stopped(vocoder):
    server = Server(vocoder, "x", ServeConfig(upload_timeout=0.05))
    scope = {"type": "http", "method": "POST", "headers": [], "query_string": b""}
    receive: Any = functools.partial(anyio.sleep, 60)
    request = requests.Request(scope, receive)
    with pytest.raises(exceptions.HTTPException, match="took too long"):
        anyio.run(server.upload, request)


def test_only_the_newest_recordings_are_kept(page):
    keys = [page.post("/recordings?name=a.wav", content=recording()).json()["id"] for _ in range(3)]
    statuses = [page.post("/resynthesize", json={"id": key}).status_code for key in keys]
    assert statuses == [400, 200, 200]  # clients=2


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "the recording is None; it must be the id"),
        ({"id": 3}, "the recording is 3; it must be the id"),
        ({"id": "x"}, "upload it again"),
    ],
)
def test_a_request_without_a_recording_is_refused_with_what_to_send(page, asked, reason):
    assert reason in page.post("/resynthesize", json=asked).json()["error"]


@pytest.mark.parametrize("asked", ["[]", "{", '{"seed": "x"}', '{"temperature": 0}', '{"x": 1}'])
def test_wrong_requests_are_refused_in_one_line(page, asked):
    key = page.post("/recordings?name=a.wav", content=recording()).json()["id"]
    body = asked.replace("{", f'{{"id": "{key}",', 1) if asked.startswith('{"') else asked
    answer = page.post("/resynthesize", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize("settings", [{}, {"seed": 5, "temperature": 0.7, "top_p": 0.9}])
def test_live_audio_equals_generate(player, free, settings):
    with player.websocket_connect(WS) as ws:
        ws.send_json(settings)
        heard = listen(ws, 6000)
    assert (heard == expected(free, 6000, **settings)).all()
    assert len(set(heard.tolist())) > 20


def test_live_audio_equals_the_command(player, free, tmp_path: Path):
    free.save(tmp_path / "model")
    out = tmp_path / "a.wav"
    assert main(["generate", str(tmp_path / "model"), "--seconds", "0.5", "--seed", "9",
                 "--out", str(out)]) == 0  # fmt: skip
    with player.websocket_connect(WS) as ws:
        ws.send_json({"seed": 9})
        assert (listen(ws, 4000) == soundfile.read(out, dtype="int16")[0]).all()


def test_a_recording_is_continued(player, free):
    key = player.post("/recordings?name=a.wav", content=recording()).json()["id"]
    prime = torch.from_numpy(soundfile.read(io.BytesIO(recording()), dtype="float32")[0])
    with player.websocket_connect(WS) as ws:
        ws.send_json({"seed": 1, "recording": key})
        assert (listen(ws, 3000) == expected(free, 3000, seed=1, prime=prime)).all()


def test_the_mel_of_a_recording_is_followed_again_and_again(page, vocoder):
    key = page.post("/recordings?name=a.wav", content=recording(0.25)).json()["id"]
    waveform = torch.from_numpy(soundfile.read(io.BytesIO(recording(0.25)), dtype="float32")[0])
    mel = wavear.log_mel(waveform[None], MEL)[0].repeat(1, 4)
    with page.websocket_connect(WS) as ws:
        ws.send_json({"seed": 3, "recording": key})
        heard = listen(ws, 6000)
        ws.send_json({"back": 0})
        again = listen(ws, 6000, epoch=1)
    right = wavear.generate(vocoder, mel, seed=3)[0, :6000].numpy()
    assert heard.tobytes() == again.tobytes() == pcm16(right)


def test_going_back_gives_the_same_samples_and_a_fork_others(player, free):
    with player.websocket_connect(WS) as ws:
        ws.send_json({"seed": 2})
        heard = bytearray()
        listen(ws, 3000, into=heard)
        ws.send_json({"mark": True})
        mark = reply(ws, "mark")
        first = expected(free, 9000, seed=2)
        position = mark["position"]
        del heard[:]
        heard += first[:position].tobytes()
        ws.send_json({"back": mark["mark"]})
        assert reply(ws, "back")["seed"] == 2
        assert (listen(ws, 9000, epoch=1, into=heard) == first).all()
        ws.send_json({"back": mark["mark"], "seed": 77})
        forked = listen(ws, 9000, epoch=2, into=heard)
        stream = wavear.Stream(free, seed=2, threads=1)
        stream.pull(position)
        other = stream.fork(seed=77).pull(9000 - position)
        assert forked[position:].tobytes() == pcm16(other.numpy())
        assert (forked[:position] == first[:position]).all()
        assert (forked != first).any()


def test_settings_change_from_the_position_that_is_reported(player, free):
    with player.websocket_connect(WS) as ws:
        ws.send_json({"seed": 4})
        heard = bytearray()
        listen(ws, 2000, into=heard)
        ws.send_json({"temperature": 0.5, "top_p": 0.8})
        while "changed" not in (message := ws.receive()).get("text", ""):
            heard += (message.get("bytes") or b"")[8:]
            ws.send_json({"heard": len(heard) // 2, "epoch": 0})  # else the stream may pause
        position = testclient.json.loads(message["text"])["changed"]
        stream = wavear.Stream(free, seed=4, threads=1)
        first = stream.pull(position)
        state = stream.state()
        state.about.update(temperature=0.5, top_p=0.8)
        rest = wavear.Stream.load(free, state, threads=1).pull(8000 - position)
        assert listen(ws, 8000, into=heard).tobytes() == pcm16(torch.cat([first, rest]).numpy())


def test_clients_share_one_batch_and_each_hears_its_own_seed(free):
    server = Server(free, "x", SMALL)
    with testclient.TestClient(server.app(), base_url=HOME, headers={"origin": HOME}) as client:
        with client.websocket_connect(WS) as one, client.websocket_connect(WS) as two:
            one.send_json({"seed": 1})
            two.send_json({"seed": 2})
            a, b = bytearray(), bytearray()
            for until in range(1000, 8001, 1000):
                listen(one, until, into=a)
                listen(two, until, into=b)
            (batch,) = server.live._batches.values()
            assert len(batch) == 2
            with client.websocket_connect(WS) as three:
                three.send_json({})  # without the limit, the answer is that it has started
                assert "all 2 streams are in use" in three.receive_json()["error"]
        assert (np.frombuffer(a, "<i2")[:8000] == expected(free, 8000, seed=1)).all()
        assert (np.frombuffer(b, "<i2")[:8000] == expected(free, 8000, seed=2)).all()
        time.sleep(0.3)
        assert len(batch) == 0


def test_a_client_that_reports_nothing_pauses_its_stream(free):
    server = Server(free, "x", SMALL)
    app = server.app()
    with (
        testclient.TestClient(app, base_url=HOME, headers={"origin": HOME}) as client,
        client.websocket_connect(WS) as ws,
    ):
        ws.send_json({})
        reply(ws, "started")
        time.sleep(1)
        (player,) = server.live.players
        assert server.live.lead <= player.made <= server.live.lead + 2 * live_module.BLOCK
        player.report(0, 10**9)  # more than it was sent
        assert player.heard == player.sent == player.made


@pytest.mark.parametrize(
    "message", ["{", "[]", '{"back": 99}', '{"back": [1]}', '{"heard": "x"}', '{"temperature": 0}']
)
def test_wrong_messages_are_answered_and_the_stream_continues(player, free, message):
    with player.websocket_connect(WS) as ws:
        ws.send_json({"seed": 1})
        ws.send_text(message)
        assert reply(ws, "error")["error"]
        ws.send_json({"back": 0})
        assert (listen(ws, 4000, epoch=1) == expected(free, 4000, seed=1)).all()


def test_a_binary_message_closes_the_stream_with_a_reason(player):
    with player.websocket_connect(WS) as ws:
        ws.send_json({})
        assert reply(ws, "started")
        ws.send_bytes(b"{}")
        assert "must be JSON text" in reply(ws, "error")["error"]


@pytest.mark.parametrize("start", ['{"seed": -1}', '{"top_p": 2}', '{"speaker": 1}', "x"])
def test_wrong_settings_close_the_stream_with_a_reason(player, start):
    with player.websocket_connect(WS) as ws:
        ws.send_text(start)
        assert ws.receive_json()["error"]
        with pytest.raises(testclient.WebSocketDisconnect):
            ws.receive_json()


class FrontEnd:
    """Stands in for `Tacotron`."""

    frames = torch.randn(8, 25, generator=torch.Generator().manual_seed(0)) - 5

    def mel(self, text: str, seed: Any = 0) -> torch.Tensor:
        if not text:
            raise wavear.WavearError("no letters")
        return self.frames[:, : len(text)] + seed


def test_a_text_is_spoken_once_and_can_be_repeated(vocoder):
    app = Server(vocoder, "x", SMALL, FrontEnd()).app()  # type: ignore[arg-type]
    right = pcm16(wavear.generate(vocoder, FrontEnd().mel("x" * 25, 3), seed=3)[0].numpy())
    with testclient.TestClient(app, base_url=HOME, headers={"origin": HOME}) as client:
        assert client.get("/about").json()["speaks"]
        with client.websocket_connect(WS) as ws:
            ws.send_json({"text": "x" * 25, "seed": 3})
            for epoch in (0, 1):
                assert listen(ws, 25 * 64, epoch=epoch).tobytes() == right
                end = ws.receive()
                while end.get("bytes") is None:
                    end = ws.receive()
                assert struct.unpack("<II", end["bytes"]) == (epoch, 25 * 64)
                ws.send_json({"back": 0})
        with client.websocket_connect(WS) as ws:
            ws.send_json({"text": ""})
            assert ws.receive_json()["error"] == "no letters"


def test_without_tacotron_a_text_is_refused_with_the_flag(page):
    with page.websocket_connect(WS) as ws:
        ws.send_json({"text": "Hello."})
        assert "--tacotron2 TACOTRON2_" in ws.receive_json()["error"]


def test_a_fault_ends_the_streams_that_it_hit_once(free, monkeypatch, caplog):
    server = Server(free, "x", SMALL)
    with testclient.TestClient(server.app(), base_url=HOME, headers={"origin": HOME}) as client:
        calls = []
        monkeypatch.setattr(server.live, "_step", lambda due: calls.append(due) or 1 / 0)
        with client.websocket_connect(WS) as ws:
            ws.send_json({})
            assert "log has the reason" in reply(ws, "error")["error"]
        assert len(calls) == 1


def test_changing_a_setting_hashes_no_weights(free, monkeypatch):
    batch = wavear.StreamBatch(free, threads=1)
    member = batch.add(seed=1)
    batch.pull(member, 100)
    batch.step()
    monkeypatch.setattr("hashlib.sha256", None)
    batch.add(state=batch.state(member))


def test_a_mel_model_without_a_recording_asks_for_one(page):
    with page.websocket_connect(WS) as ws:
        ws.send_json({})
        assert "upload one" in ws.receive_json()["error"]


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null", "http://127.0.0.1:9000"])
def test_requests_of_other_pages_are_refused(vocoder, origin):
    headers = {} if origin is None else {"origin": origin}
    app = Server(vocoder, "x", SMALL).app()
    with testclient.TestClient(app, base_url=HOME, headers=headers) as client:
        assert client.post("/recordings", content=recording()).status_code == 403
        assert client.post("/resynthesize", json={}).status_code == 403
        with pytest.raises(testclient.WebSocketDisconnect), client.websocket_connect(WS):
            pass


def test_other_names_of_this_machine_are_refused(page):
    headers = {"host": "rebound.example", "origin": "http://rebound.example"}
    assert page.get("/about", headers=headers).status_code == 400
    assert page.post("/recordings", headers=headers, content=recording()).status_code == 400


@pytest.mark.parametrize("setting", [{"port": 70000}, {"clients": 0}, {"buffer": 0.0}])
def test_wrong_limits_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(wavear.WavearError, match=f"{name} is {value}"):
        ServeConfig(**setting)


def test_a_port_in_use_and_a_missing_model_are_one_line(free, tmp_path, capsys):
    free.save(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path / "model"), "--port", port]) == 1
    assert main(["serve", str(tmp_path / "nowhere")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "in use" in first
    assert port in first
    assert "nowhere" in second
