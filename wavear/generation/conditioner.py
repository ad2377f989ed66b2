"""Conditioning in blocks of one shape: bit for bit the same wherever the audio is cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wavear.models.base import AutoregressiveModel
from wavear.models.frames import joined, stacked

# Samples per block, as nearly as whole frames allow. A block can be made once its frames and the
# look-ahead are there: fewer samples would save a stream less than 6 ms of latency, and cost more
# calls of the model.
_BLOCK = 128
# Windows that a device conditions at once, always as many: a card would mostly wait for single
# ones.
_TOGETHER = {"cuda": 64}


def _condition(
    model: AutoregressiveModel, windows: list[Tensor], speakers: list[Tensor | None]
) -> list[Any]:
    """Return (1, C, n) of each window (1, M, frames), in batches of one size."""
    size = _TOGETHER.get(windows[0].device.type, 1) if windows else 1
    found: list[Any] = []
    for at in range(0, len(windows), size):
        chosen = [min(at + i, len(windows) - 1) for i in range(size)]  # the last one fills up
        voices = [speaker for i in chosen if (speaker := speakers[i]) is not None]
        rows = model.condition(
            torch.cat([windows[i] for i in chosen]),
            torch.cat(voices) if voices else None,
            padded=True,
        )
        found += [rows[i : i + 1, :, :] for i in range(min(size, len(windows) - at))]
    return found


class Conditioner:
    """Conditioning of a batch of whole mels (M, F_i), any span of samples at a time."""

    def __init__(
        self, model: AutoregressiveModel, mels: list[Tensor] | None, speakers: list[int] | None
    ):
        count = len(mels or speakers or [None])
        self.utterances = [
            UtteranceConditioner(model, speakers[b] if speakers else None) for b in range(count)
        ]
        for utterance, mel in zip(self.utterances, mels or [], strict=False):
            utterance.push(mel)
            utterance.close()
        self.lengths = None
        if mels is not None:
            self.lengths = [utterance.frames * utterance.hop for utterance in self.utterances]

    def repeat(self, times: int) -> None:
        """Repeat every utterance `times` times in a row."""
        self.utterances = [utterance for utterance in self.utterances for _ in range(times)]
        if self.lengths is not None:
            self.lengths = [length for length in self.lengths for _ in range(times)]

    def keep(self, chosen: list[int]) -> None:
        """Keep these utterances only; without mels and speakers there is one for all streams."""
        if self.lengths is not None or len(self.utterances) > 1:
            self.utterances = [self.utterances[b] for b in chosen]
            self.lengths = None if self.lengths is None else [self.lengths[b] for b in chosen]

    def span(self, start: int, stop: int) -> Any:
        """Return the conditioning of samples `start` to `stop`, (B, C, stop - start).

        It is (B, C, 1) if only speakers condition the model, and None if nothing does.

        Beyond the end of a shorter utterance its last frame is repeated.
        """
        utterances = list(dict.fromkeys(self.utterances))  # several streams may have one
        if self.utterances[0].model.frames_are_exact:
            return stacked([utterance.span(start, stop) for utterance in self.utterances])
        missing = [(u, k) for u in utterances if u.has_mel for k in u.missing(start, stop)]
        made = _condition(
            self.utterances[0].model,
            [u.window(k) for u, k in missing],
            [u.speaker for u, _ in missing],
        )
        for (utterance, k), block in zip(missing, made, strict=True):
            utterance.blocks[k] = block
        rows = {utterance: utterance.span(start, stop) for utterance in utterances}
        found = [row for utterance in self.utterances if (row := rows[utterance]) is not None]
        return stacked(found) if found else None


class UtteranceConditioner:
    """Conditioning of one utterance, whose mel may still be growing.

    A convolution library may round differently for inputs of different shapes. So `model.condition`
    always gets one utterance and the same number of frames: the conditioning depends neither on the
    batch, nor on the spans that are asked for, nor on the pieces in which the mel arrived.
    """

    def __init__(self, model: AutoregressiveModel, speaker: int | None = None):
        weight = next(model.parameters())
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        self.has_mel = model.config.mel is not None
        self.speaker = None if speaker is None else torch.tensor([speaker], device=weight.device)
        self.hop = model.config.mel.hop_length if self.has_mel else 1
        self.block = max(1, round(_BLOCK / self.hop))  # frames
        self.frames = 0
        """Frames so far, including forgotten ones."""
        self.closed = False
        """True if no more frames will come."""
        self._first = 0  # of the frames still held
        self._held: list[Tensor] = []
        self._packed: Any = None  # weights of exact frames
        self.blocks: dict[int, Any] = {}
        """Conditioning by block number: a span may begin inside the last block of another."""

    def push(self, mel: Tensor) -> None:
        """Append frames (M, n)."""
        # A copy: the caller may fill the same memory with the frames that follow.
        self._held.append(mel.detach().to(self.device, self.dtype, copy=True))
        self.frames += mel.shape[1]

    def close(self) -> None:
        """Declare the frames complete: beyond the end the last one is repeated."""
        self.closed = True

    @property
    def certain(self) -> int:
        """Samples whose conditioning no later frame can change."""
        if self.closed:
            return self.frames * self.hop
        return max(0, (self.frames - self.model.lookahead) // self.block) * self.block * self.hop

    @property
    def held(self) -> Tensor:
        """The frames from `first_held` on, (M, n)."""
        if len(self._held) > 1:
            self._held = [torch.cat(self._held, dim=1)]
        return self._held[0]

    @property
    def first_held(self) -> int:
        """The number of the first frame still held."""
        return self._first

    def hold(self, mel: Tensor, first: int, closed: bool) -> None:
        """Resume with the frames that another conditioner held, from number `first` on."""
        self.push(mel)
        self.frames, self._first, self.closed = first + mel.shape[1], first, closed

    def forget(self, sample: int) -> None:
        """Drop the frames that no sample from `sample` on needs, but the last, which may repeat."""
        if not self._held:
            return
        first = self._first_needed(sample)
        if first > self._first:
            self._held = [self.held[:, first - self._first :].clone()]
            self._first = first

    def holds(self, sample: int) -> bool:
        """Return whether no frame that samples from `sample` on need was forgotten."""
        return self._first_needed(sample) >= self._first

    def _first_needed(self, sample: int) -> int:
        block = sample // (self.block * self.hop)
        return max(0, min(block * self.block - self.model.lookback, self.frames - 1))

    def span(self, start: int, stop: int) -> Any:
        """Return the conditioning of samples `start` to `stop`: (1, C, n), (1, C, 1) or None."""
        if not self.has_mel:
            return None if self.speaker is None else self.model.condition(None, self.speaker)
        size = self.block * self.hop
        first, last = start // size, -(-stop // size)
        if self.model.frames_are_exact and self.device.type == "cpu":
            parts = self._at_once(first, last)
        else:
            missing = self.missing(start, stop)
            windows = [self.window(k) for k in missing]
            made = _condition(self.model, windows, [self.speaker] * len(missing))
            self.blocks.update(zip(missing, made, strict=True))
            parts = [self.blocks[k] for k in range(first, last)]
            self.blocks = {last - 1: parts[-1]}
        return joined(parts)[:, :, start - first * size : stop - first * size]

    def _at_once(self, first: int, last: int) -> list[Any]:
        """Return the conditioning of blocks `first` to `last`, the first of which may be kept."""
        parts = [self.blocks[first]] if first in self.blocks else []
        begin = first + len(parts)
        if begin < last:
            conditioning = self.model.conditioning
            self._packed = self._packed or conditioning.packed()
            window = self.window(begin, last - 1)
            parts.append(conditioning(window, self.speaker, True, self._packed))
            self.blocks = {last - 1: parts[-1][:, :, -self.block * self.hop :]}
        return parts

    def missing(self, start: int, stop: int) -> list[int]:
        """Return the blocks of samples `start` to `stop` that are not in `blocks`."""
        size = self.block * self.hop
        return [k for k in range(start // size, -(-stop // size)) if k not in self.blocks]

    def window(self, k: int, last: int | None = None) -> Tensor:
        """Return the frames (1, M, n) of block k, or blocks k to `last`, with the ends repeated."""
        last = k if last is None else last
        first = k * self.block - self.model.lookback
        assert min(max(first, 0), self.frames - 1) >= self._first, (
            "the frames of this block are forgotten"
        )
        frames = torch.arange(
            first, (last + 1) * self.block + self.model.lookahead, device=self.device
        )
        return self.held[None, :, frames.clamp(0, self.frames - 1) - self._first]
