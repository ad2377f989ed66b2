"""The server of the page: Starlette, run by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from wavear.common.atomic import say
from wavear.common.errors import WavearError
from wavear.common.untrusted import parse_json
from wavear.generation.sampler import generate_with
from wavear.generation.settings import Sampling
from wavear.generation.tacotron import BUNDLES, Tacotron
from wavear.models.base import AutoregressiveModel
from wavear.serving.live import Live, Player
from wavear.serving.recordings import Recordings, mel_of, resynthesize, shown
from wavear.serving.settings import ServeConfig

PAGE = Path(__file__).parent / "page"
_MOST_PARTICLES = 32  # of a resynthesis, which takes as many times as long
_RESYNTHESIS = "id", "top", "seed", "temperature", "top_p", "particles", "speaker"
_LONGEST_MESSAGE = 4096  # bytes of a client's message on the WebSocket
_NO_SPEECH = f"Speaking needs wavear[tts]: wavear serve --tacotron2 {next(iter(BUNDLES))}"


class SameOrigin:
    """Refuse requests that change something, and WebSockets, unless the page itself sends them.

    Every answer forbids the page to load anything from elsewhere.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = b"default-src 'self'; img-src data:; frame-ancestors 'none'"
                message["headers"].append((b"content-security-policy", policy))
                message["headers"].append((b"x-content-type-options", b"nosniff"))
            await send(message)

        headers = Headers(scope=scope) if "headers" in scope else Headers()
        host, origin = headers.get("host"), urlsplit(headers.get("origin", "")).netloc
        harmless = scope["type"] == "lifespan" or scope.get("method") in ("GET", "HEAD")
        if harmless or (host and origin == host):
            await self.app(scope, receive, guarded)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = PlainTextResponse("only the page itself may send this", 403)
            await refusal(scope, receive, guarded)


class Server:
    """The page of one model.

    Parameters
    ----------
    model : AutoregressiveModel
    name : str
        Of the checkpoint, as shown on the page.
    config : ServeConfig
    tacotron : Tacotron, optional
        Reads the texts that clients send; by default that of `config`.

    Raises
    ------
    WavearError
        If Tacotron 2 does not fit the model, or torchaudio is missing.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        name: str,
        config: ServeConfig = ServeConfig(),
        tacotron: Tacotron | None = None,
    ):
        rate = model.config.sample_rate
        self.model, self.name, self.config, self.rate = model, name, config, rate
        self.recordings = Recordings(rate, config.max_seconds, config.clients)
        self.live = Live(model, round(config.buffer * rate), config.weights, config.threads)
        if tacotron is None and config.tacotron2 is not None:
            tacotron = Tacotron(model, config.tacotron2)
        self.tacotron = tacotron
        self._synthesis = asyncio.Lock()  # one at a time: each uses all cores
        self._waiting = 0
        self._joined = 0

    def app(self) -> Starlette:
        """Return the application."""
        local = ["localhost", "127.0.0.1", "[::1]", "::1"]  # others could be a rebound name
        hosts = ["*"] if self.config.host in ("0.0.0.0", "::") else [*local, self.config.host]
        return Starlette(
            routes=[
                Route("/about", self.about),
                Route("/recordings", self.upload, methods=["POST"]),
                Route("/resynthesize", self.resynthesize, methods=["POST"]),
                WebSocketRoute("/live", self.play),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
                Middleware(SameOrigin),
            ],
            exception_handlers={
                WavearError: _refused,
                HTTPException: _refused,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        playing = asyncio.create_task(self.live.play())
        yield
        playing.cancel()

    async def about(self, _: Request) -> JSONResponse:
        """Describe the model and the limits."""
        config = self.config
        return JSONResponse(
            {
                "name": self.name,
                "family": type(self.model).__name__,
                "rate": self.rate,
                "mel": self.model.config.mel is not None,
                "speakers": self.model.speaker_names or list(range(self.model.config.speakers)),
                "truncates": self.model.law.truncates,
                "buffer": config.buffer,
                "limits": f"{config.max_megabytes:g} MB, {config.max_seconds:g} s",
                "speaks": self.tacotron is not None,
                "speak": _NO_SPEECH if self.tacotron is None else "",
            }
        )

    async def upload(self, request: Request) -> JSONResponse:
        """Keep a recording, the body of the request, for `resynthesize` and `play`."""
        most, content = round(self.config.max_megabytes * 1e6), bytearray()
        too_large = HTTPException(413, f"a recording has at most {self.config.max_megabytes:g} MB")
        try:
            with anyio.fail_after(self.config.upload_timeout):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, "the upload took too long") from None
        name = request.query_params.get("name", "")

        def keep() -> dict[str, Any]:
            key, waveform = self.recordings.add(bytes(content), name)
            return shown(waveform, self.rate) | {"id": key, "seconds": len(waveform) / self.rate}

        return JSONResponse(await self._in_turn(keep))

    async def resynthesize(self, request: Request) -> JSONResponse:
        """Synthesize a recording from its mel; the body is JSON: id, seed, temperature, ..."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_MESSAGE:
                raise HTTPException(413, "the request is too long")
        asked = _settings(bytes(body), *_RESYNTHESIS)
        waveform, top = self.recordings.get(asked.pop("id", None)), asked.pop("top", None)
        if top is not None and not (isinstance(top, int | float) and math.isfinite(top)):
            raise WavearError(f"top is {top!r:.60}; it must be a number")
        if (particles := asked.get("particles", 1)) not in range(1, _MOST_PARTICLES + 1):
            raise WavearError(f"particles is {particles!r:.60}; it must be 1 to {_MOST_PARTICLES}")
        sampling = Sampling(**asked, weights=self.config.weights, threads=self.config.threads)
        work = resynthesize, self.model, waveform, sampling, top
        return JSONResponse(await self._in_turn(*work))

    async def _in_turn(self, function: Any, *arguments: Any) -> Any:
        """Run a function in a thread, one after the other; refuse if too many wait."""
        if self._waiting >= self.config.clients:
            raise HTTPException(503, "the server is busy: try again")
        self._waiting += 1
        try:
            async with self._synthesis:
                return await run_in_threadpool(function, *arguments)
        finally:
            self._waiting -= 1

    async def play(self, client: WebSocket) -> None:
        """Play to one client until it leaves."""
        await client.accept()
        if self._joined >= self.config.clients:
            await client.send_json({"error": f"all {self.config.clients} streams are in use"})
            await client.close(1013)
            return
        self._joined += 1
        player = sending = None
        try:
            player = await self._start(await client.receive_text())
            await client.send_json({"started": True})
            sending = asyncio.create_task(_send_audio(client, player))
            async for text in client.iter_text():
                try:
                    reply = await self._command(player, text)
                except WavearError as error:
                    reply = {"error": str(error)}
                if reply:
                    await client.send_json(reply)
        except (WavearError, HTTPException) as error:
            await client.send_json({"error": str(error)})
            await client.close(1008)
        except KeyError:  # of Starlette
            await client.send_json({"error": "the message is binary; it must be JSON text"})
            await client.close(1008)
        except WebSocketDisconnect:
            pass
        finally:
            self._joined -= 1
            if sending is not None:
                sending.cancel()
            if player is not None:
                with anyio.CancelScope(shield=True):
                    await self.live.leave(player)

    async def _start(self, text: str) -> Player:
        asked = _settings(text, "seed", "temperature", "top_p", "speaker", "recording", "text")
        if (words := asked.pop("text", None)) is not None:
            if self.tacotron is None or not isinstance(words, str):
                raise WavearError(_NO_SPEECH)
            mel = await self._in_turn(self.tacotron.mel, words, asked.get("seed", 0))
            return await self.live.join(mel, ends=True, **asked)
        if (recording := asked.pop("recording", None)) is not None:
            waveform = self.recordings.get(recording)
            if self.model.config.mel is None:
                asked["prime"] = waveform
            else:
                asked["mel"] = await run_in_threadpool(mel_of, self.model, waveform)
        return await self.live.join(**asked)

    async def _command(self, player: Player, text: str) -> dict[str, Any] | None:
        """Obey one message of a client, and return the answer."""
        message = _settings(text, "heard", "epoch", "temperature", "top_p", "mark", "back", "seed")
        if "heard" in message:
            heard, epoch = message["heard"], message.get("epoch")
            if not isinstance(heard, int) or not isinstance(epoch, int):
                raise WavearError("heard and epoch must be whole numbers")
            return self.live.heard(player, epoch, heard)
        if "mark" in message:
            number, position = await self.live.mark(player)
            return {"mark": number, "position": position}
        if "back" in message:
            settings = await self.live.back(player, message["back"], message.get("seed"))
            return {"back": message["back"], "epoch": player.epoch, **settings}
        about = {name: message[name] for name in ("temperature", "top_p") if name in message}
        return {"changed": await self.live.change(player, **about)} if about else None


async def _send_audio(client: WebSocket, player: Player) -> None:
    """Send blocks: epoch and position, each a little-endian uint32, and 16-bit PCM: none ends."""
    while (item := await player.queue.get()) is not None:
        epoch, position, pcm = item
        if epoch != player.epoch:
            continue
        await client.send_bytes(struct.pack("<II", epoch, position % 2**32) + pcm)
        if epoch == player.epoch:
            player.sent = position + len(pcm) // 2
    await client.send_json({"error": "the stream failed; the server's log has the reason"})
    await client.close(1011)


def _settings(text: str | bytes, *names: str) -> dict[str, Any]:
    """Return the JSON object of a message, whose keys must be among `names`."""
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(found) <= set(names):
        raise WavearError(f"the message must be a JSON object with {', '.join(names)}")
    return found


async def _refused(_: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 400
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": detail}, status)


def serve(model: AutoregressiveModel, name: str, config: ServeConfig = ServeConfig()) -> None:
    """Serve the page of a model until Ctrl-C; print its address.

    Raises
    ------
    WavearError
        If the address is wrong or in use.
    """
    server = Server(model, name, config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise WavearError(f"cannot listen on {config.host}:{config.port}: {reason}") from None
    # Compile the engine now rather than while the first client waits.
    mel = model.config.mel
    speaker = 0 if model.config.speakers else None
    sampling = Sampling(speaker=speaker, weights=config.weights, threads=config.threads)
    if mel is None:
        generate_with(model, sampling, samples=1)
    else:
        resynthesize(model, torch.zeros(mel.hop_length), sampling)
    host = f"[{config.host}]" if ":" in config.host else config.host
    say(f"http://{host}:{listener.getsockname()[1]}")
    uvicorn.Server(
        uvicorn.Config(
            server.app(),
            log_level="warning",
            ws="websockets-sansio",
            ws_max_size=_LONGEST_MESSAGE,
            limit_concurrency=8 * config.clients + 8,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
    ).run(sockets=[listener])
