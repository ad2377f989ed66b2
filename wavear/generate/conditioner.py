"""Conditioning in blocks of one shape, so that it is the same to the bit however the audio is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from wavear.models.base import AutoregressiveModel

_LEAST = 256  # samples a block covers at least: keeps the calls few where the hop is small


class Conditioner:
    """Conditioning of a batch, any span of samples at a time, in memory that does not grow with the length.

    A convolution library may round differently for inputs of different shapes. So `model.condition` is always called
    with one utterance and the same number of frames, and an utterance's conditioning depends neither on the batch it
    rides in nor on the spans it is asked for.

    Parameters
    ----------
    model : AutoregressiveModel
    mels : list of Tensor (M, F_i), or None
    speakers : list of int, or None
    """

    def __init__(self, model: AutoregressiveModel, mels: list[Tensor] | None, speakers: list[int] | None):
        weight = next(model.parameters())
        self.model = model
        self.hop = model.config.mel.hop_length if mels is not None else 1
        self.lengths = [mel.shape[1] * self.hop for mel in mels] if mels is not None else None
        self.mels = [mel.to(weight.device, weight.dtype) for mel in mels] if mels is not None else None
        self.speakers = None if speakers is None else torch.tensor(speakers, device=weight.device)
        self.block = -(-_LEAST // self.hop)  # frames
        self._kept: dict[tuple[int, int], Tensor] = {}

    def repeat(self, times: int) -> None:
        """Every utterance so many times, one after the other."""

        def repeated(values: list) -> list:
            return [value for value in values for _ in range(times)]

        self.lengths = None if self.lengths is None else repeated(self.lengths)
        self.mels = None if self.mels is None else repeated(self.mels)
        self.speakers = None if self.speakers is None else self.speakers.repeat_interleave(times)

    def span(self, start: int, stop: int) -> Tensor | None:
        """Conditioning of samples `start` to `stop`: (B, C, stop - start), (B, C, 1) of a speaker alone, or None.

        Beyond the end of a shorter utterance its last frame goes on.
        """
        if self.mels is None:
            return None if self.speakers is None else self.model.condition(None, self.speakers)
        size = self.block * self.hop
        first, last = start // size, -(-stop // size)
        rows = []
        for b in range(len(self.mels)):
            blocks = [self._block(b, k) for k in range(first, last)]
            rows.append(torch.cat(blocks, dim=2)[:, :, start - first * size : stop - first * size])
        # The next span may begin inside the last block.
        self._kept = {(b, k): value for (b, k), value in self._kept.items() if k == last - 1}
        return torch.cat(rows)

    def _block(self, b: int, k: int) -> Tensor:
        if (b, k) not in self._kept:
            assert self.mels is not None
            mel = self.mels[b]
            lookahead = self.model.lookahead
            frames = torch.arange(k * self.block - lookahead, (k + 1) * self.block + lookahead, device=mel.device)
            window = mel[None, :, frames.clamp(0, mel.shape[1] - 1)]
            speaker = None if self.speakers is None else self.speakers[b : b + 1]
            self._kept[b, k] = self.model.condition(window, speaker, padded=True)
        return self._kept[b, k]
