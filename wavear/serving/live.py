"""Endless audio for several clients, whose streams share one `StreamBatch` per top-p.

A client reports how much it has heard, and audio is made only up to `lead` samples ahead of that:
a slow or stalled client pauses its own stream, and its queue never holds more than `lead` samples
and a block. Nothing is skipped.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.generation.pipes import pcm16
from wavear.generation.states import StreamState
from wavear.generation.streams import StreamBatch
from wavear.models.base import AutoregressiveModel

logger = get_logger(__name__)

BLOCK = 512  # samples that are made at once
MARKS = 16  # saved states of a client; the oldest is dropped


@dataclasses.dataclass
class Mark:
    """A saved state of a client's stream."""

    state: StreamState
    pushed: int
    position: int


@dataclasses.dataclass(eq=False)
class Player:
    """One client. Positions are samples since the start, without a prime."""

    batch: StreamBatch
    member: int
    mel: Tensor | None
    """(M, F), repeated without an end unless it `ends`."""
    ends: bool = False
    pushed: int = 0
    """Frames so far."""
    made: int = 0
    sent: int = 0
    heard: int = 0
    """As the client reports, at most `sent`."""
    epoch: int = 0
    """Rises when the stream goes back: blocks and reports of an earlier epoch are void."""
    marks: dict[int, Mark] = dataclasses.field(default_factory=dict)
    queue: asyncio.Queue[tuple[int, int, bytes] | None] = dataclasses.field(
        default_factory=asyncio.Queue
    )
    """(epoch, position, 16-bit PCM) to send; None if the stream failed. Bounded by `lead`. The last
    block of a stream that ends is empty."""

    @property
    def complete(self) -> bool:
        """True if all of a stream that ends is made."""
        if not self.ends or self.mel is None:
            return False
        return self.made >= self.mel.shape[1] * self.batch.model.config.mel.hop_length

    def report(self, epoch: int, heard: int) -> None:
        """Note what the client has heard; more than was sent is not believed."""
        if epoch == self.epoch:
            self.heard = max(self.heard, min(heard, self.sent))


class Live:
    """The streams of all clients.

    Parameters
    ----------
    model : AutoregressiveModel
    lead : int
        Samples to make ahead of what a client has heard.
    weights, threads
        See `wavear.generation.engines.make_engine`.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        lead: int,
        weights: str = "float32",
        threads: int | None = None,
    ):
        self.model, self.lead = model, lead
        self._engine = {"weights": weights, "threads": threads}
        self.players: set[Player] = set()
        self._batches: dict[float | None, StreamBatch] = {}
        # asyncio's lock serves in order, so that commands are not starved by the next step.
        self._lock, self._wake = asyncio.Lock(), asyncio.Event()

    async def join(
        self,
        mel: Tensor | None = None,
        top_p: float | None = None,
        ends: bool = False,
        **settings: Any,
    ) -> Player:
        """Add a client's stream; `settings` are those of `StreamBatch.add`.

        A mel is repeated without an end, unless it `ends`.
        """
        if self.model.config.mel is not None and mel is None:
            raise WavearError("the model follows a recording: upload one first")

        def start() -> Player:
            batch = self._batch(top_p)
            player = Player(batch, batch.add(**settings), mel, ends)
            player.marks[0] = Mark(batch.state(player.member), 0, 0)
            return player

        async with self._lock:
            player = await run_in_threadpool(start)
            self.players.add(player)
            self._wake.set()
        return player

    async def leave(self, player: Player) -> None:
        """Drop a client's stream."""
        async with self._lock:
            player.batch.remove(player.member)
            self.players.discard(player)
            self._tidy()

    def heard(self, player: Player, epoch: int, heard: int) -> None:
        """Note the report of a client, and make what it now has room for."""
        player.report(epoch, heard)
        self._wake.set()

    async def change(self, player: Player, **about: Any) -> int:
        """Change `temperature` or `top_p`; return the position from which it is heard."""
        async with self._lock:
            state = await run_in_threadpool(player.batch.state, player.member)
            await run_in_threadpool(self._resume, player, state, about)
        return player.made

    async def mark(self, player: Player) -> tuple[int, int]:
        """Save the stream's state; return the number of the mark and its position."""
        async with self._lock:
            state = await run_in_threadpool(player.batch.state, player.member)
            number = max(player.marks, default=0) + 1
            player.marks[number] = Mark(state, player.pushed, player.made)
            if len(player.marks) > MARKS:
                del player.marks[min(player.marks)]
        return number, player.made

    async def back(self, player: Player, number: Any, seed: int | None = None) -> dict[str, Any]:
        """Resume a mark: the same samples again, or with another seed another continuation.

        Returns
        -------
        dict: seed, temperature and top_p of the stream, which are those of the mark
        """
        mark = player.marks.get(number) if isinstance(number, int) else None
        if mark is None:
            raise WavearError(f"there is no mark {number!r}; the newest {MARKS} are kept")
        async with self._lock:
            about = {} if seed is None else {"seed": seed}
            await run_in_threadpool(self._resume, player, mark.state, about)
            player.pushed = mark.pushed
            player.made = player.sent = player.heard = mark.position
            player.epoch += 1
            while not player.queue.empty():
                player.queue.get_nowait()
            self._wake.set()
        return {k: (mark.state.about | about)[k] for k in ("seed", "temperature", "top_p")}

    async def play(self) -> None:
        """Make audio for all clients, until it is cancelled."""
        while True:
            await self._wake.wait()
            async with self._lock:
                # If one client needs a block, all that have room for one take part: so clients stay
                # together, and share each read of the weights.
                ahead = {p: p.made - p.heard for p in self.players if not p.complete}
                if min(ahead.values(), default=self.lead) >= self.lead:
                    self._wake.clear()
                    continue
                due = [p for p, samples in ahead.items() if samples < self.lead + BLOCK]
                try:
                    made = await run_in_threadpool(self._step, due)
                except Exception:  # a fault must not end the streams of later clients
                    logger.exception("live streams failed")
                    for player in due:  # no room is left: it waits for `leave`
                        player.heard = player.made - self.lead - BLOCK
                        player.queue.put_nowait(None)
                    continue
                for player, audio in made.items():
                    player.queue.put_nowait((player.epoch, player.made, pcm16(audio.numpy())))
                    player.made += len(audio)
                    if player.complete:
                        player.queue.put_nowait((player.epoch, player.made, b""))

    def _step(self, due: list[Player]) -> dict[Player, Tensor]:
        """Make a block or a little more for each of the players."""
        for player in due:
            if player.mel is None:
                player.batch.pull(player.member, BLOCK)
                continue
            hop, frames = self.model.config.mel.hop_length, player.mel.shape[1]
            # A stream computes its conditioning in blocks of at most 128 samples or one frame.
            needed = (player.made + BLOCK + 128) // hop + 2 + self.model.lookahead
            needed = max(min(needed, frames) if player.ends else needed, player.pushed)
            order = torch.arange(player.pushed, needed) % frames
            player.batch.push(player.member, player.mel[:, order])
            player.pushed += len(order)
            if player.ends and len(order) and player.pushed == frames:
                player.batch.flush(player.member)
        owners = {(player.batch, player.member): player for player in due}
        batches = {player.batch for player in due}
        return {owners[b, member]: audio for b in batches for member, audio in b.step().items()}

    def _batch(self, top_p: float | None) -> StreamBatch:
        """Return the batch of a top-p, which all members of a batch share."""
        if top_p not in self._batches:
            self._batches[top_p] = StreamBatch(self.model, top_p=top_p, **self._engine)
        return self._batches[top_p]

    def _resume(self, player: Player, state: StreamState, about: dict[str, Any]) -> None:
        """Replace a player's stream by a state with changed settings."""
        state = dataclasses.replace(state, about=state.about | about)
        batch = self._batch(state.about["top_p"])
        member = batch.add(state=state)
        player.batch.remove(player.member)
        player.batch, player.member = batch, member
        self._tidy()

    def _tidy(self) -> None:
        """Drop batches that have lost their last member, except the usual one."""
        self._batches = {p: b for p, b in self._batches.items() if len(b) or p is None}
