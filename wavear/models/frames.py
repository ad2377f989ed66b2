"""Conditioning at the frame rate: a few numbers per mel frame that stand for one vector per sample.

A network that projects its conditioning to every layer has some hundred numbers of it per sample.
They change slowly: kept once per frame and interpolated where they are used, they take a hundredth
of the memory and of the time. `FrameConditioning` is indexed like the tensor (B, C, T) that it
stands for; `dense` returns that tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conditioned = Any  # Tensor (B, C, T) or (B, C, 1), or a FrameConditioning


def interpolation_weights(steps: int, causal: bool = False) -> Tensor:
    """Return weights (3, steps), float64, of the frames before, at and after `steps` places.

    Linear interpolation between frame centres; with `causal` between the ends of the frames, so
    that a frame's end has its own value and the frame after it has the weight zero.

    Examples
    --------
    >>> interpolation_weights(2).tolist()
    [[0.25, 0.0], [0.75, 0.75], [0.0, 0.25]]
    >>> interpolation_weights(2, causal=True).tolist()
    [[0.75, 0.25], [0.25, 0.75], [0.0, 0.0]]
    """
    place = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    if causal:
        return torch.stack([1 - place, place, torch.zeros_like(place)])
    place = place - 0.5  # from the centre of the frame
    return torch.stack([(-place).clamp(min=0), 1 - place.abs(), place.clamp(min=0)])


def interpolated(frames: Tensor, weights: Tensor) -> Tensor:
    """Interpolate frames (..., F + 2), the outer ones context, to (..., F * steps)."""
    w = weights.to(frames.dtype)
    x = frames[..., None]
    mixed = x[..., :-2, :] * w[0] + x[..., 1:-1, :] * w[1] + x[..., 2:, :] * w[2]
    return mixed.flatten(-2)


@dataclass(frozen=True)
class FrameConditioning:
    """Conditioning of a `PredictiveWaveNet`, for `samples` samples of B streams.

    Letters: B batch, F frames, K sub-frames per frame, G gate biases, P prediction order, T = F *
    hop. It stands for a tensor (B, C, samples) with C = G + P + 3: gate biases, coefficients,
    scale, lag, voicing.

    Examples
    --------
    >>> frames = FrameConditioning(
    ...     gates=torch.zeros(1, 2, 4, 3), coefficients=torch.zeros(1, 4, 5),
    ...     scale=torch.ones(1, 4), lag=torch.ones(1, 6), voicing=torch.ones(1, 6),
    ...     offset=torch.tensor([0]), samples=6, weights=interpolation_weights(3))
    >>> frames.shape, frames[:, :, 2:5].shape, frames[:, :, 0].shape
    ((1, 12, 6), (1, 12, 3), torch.Size([1, 12]))
    """

    gates: Tensor
    """(B, F, G, 3): values of the frame before each frame, of its own, and of the one after."""
    coefficients: Tensor
    """(B, F * K, P), float32: of the prediction, constant over a sub-frame."""
    scale: Tensor
    """(B, F * K), float32: of the residual, in units of full scale."""
    lag: Tensor
    """(B, T), float32: the period of each sample, in samples."""
    voicing: Tensor
    """(B, T), float32, 0 to 1."""
    offset: Tensor
    """(B,), int64: the first sample of each stream, counted from its first frame."""
    samples: int
    weights: Tensor
    """(3, hop), float64: see `interpolation_weights`."""

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return self.weights.shape[1]

    @property
    def sub_frames(self) -> int:
        """Sub-frames per frame."""
        return self.scale.shape[1] // self.gates.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, C, samples) of the tensor that this stands for."""
        return len(self.gates), self.gates.shape[2] + self.coefficients.shape[2] + 3, self.samples

    def dim(self) -> int:
        """Return 3, as of the tensor."""
        return 3

    def __len__(self) -> int:
        return len(self.gates)

    def __getitem__(self, index: tuple[slice | Tensor, slice, slice | int]) -> Any:
        """Return [rows, :, a:b] as a FrameConditioning, [rows, :, t] as a tensor (B, C)."""
        rows, channels, times = index
        assert channels == slice(None), "all channels go together"
        everything = isinstance(rows, slice) and rows == slice(None)
        chosen = self if everything else self._map(lambda x: x[rows])
        if isinstance(times, slice):
            start, stop, step = times.indices(self.samples)
            assert step == 1
            return chosen._cut(start, stop)
        at = range(self.samples)[times]  # counted from the end, if below 0
        return chosen._cut(at, at + 1).dense()[:, :, 0]

    def to(self, target: torch.dtype | torch.device | str) -> FrameConditioning:
        """Move to a device, or cast the gate biases; all else keeps its precision."""
        if isinstance(target, torch.dtype):
            return dataclasses.replace(self, gates=self.gates.to(target))
        moved = self._map(lambda x: x.to(target))
        return dataclasses.replace(moved, weights=self.weights.to(target))

    def repeated(self, times: int) -> FrameConditioning:
        """Return the conditioning of `times` copies of the streams, one after the other."""
        return self._map(lambda x: torch.cat([x] * times))

    def distinct(self) -> FrameConditioning:
        """Return the conditioning of one stream where all share it (`shared`), else this."""
        return self._map(lambda x: x[:1]) if self.gates.stride(0) == 0 else self

    def times(self) -> Tensor:
        """Return the place (B, samples), int64, of each sample, counted from the first frame."""
        return self.offset[:, None] + torch.arange(self.samples, device=self.offset.device)

    def sub_frame_of(self, times: Tensor) -> Tensor:
        """Return the sub-frame of each place; of an odd hop the sub-frames differ by one sample."""
        return times // self.hop * self.sub_frames + times % self.hop * self.sub_frames // self.hop

    def gates_at(self, first: int, last: int) -> Tensor:
        """Interpolate gate biases [first, last) to samples: (B, samples, last - first)."""
        chosen = self.gates[:, :, first:last]  # (B, F, g, 3)
        w = self.weights.to(chosen.dtype)[:, :, None]
        before, at, after = (chosen[:, :, None, :, j] for j in range(3))
        return self._aligned((before * w[0] + at * w[1] + after * w[2]).flatten(1, 2))

    def per_sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return coefficients (B, samples, P), scale, lag and voicing (B, samples), float32."""
        sub = self.sub_frame_of(self.times())
        every = sub[:, :, None].expand(-1, -1, self.coefficients.shape[2])
        coefficients, scale = self.coefficients.gather(1, every), self.scale.gather(1, sub)
        return coefficients, scale, self._aligned(self.lag), self._aligned(self.voicing)

    def dense(self) -> Tensor:
        """Return the tensor (B, C, samples), float32 or float64; a cast rounds only gate biases."""
        coefficients, *rest = self.per_sample()
        gates = self.gates_at(0, self.gates.shape[2])
        dtype = torch.promote_types(gates.dtype, torch.float32)
        rows = [gates, coefficients, *(each[:, :, None] for each in rest)]
        return torch.cat([row.to(dtype) for row in rows], dim=2).transpose(1, 2)

    def _aligned(self, at_samples: Tensor) -> Tensor:
        """Cut (B, T, ...) to the samples asked for, which begin at another place in each stream."""
        first = int(self.offset[0])
        if len(self.offset) == 1 or bool((self.offset == first).all()):
            return at_samples[:, first : first + self.samples]
        rows = zip(at_samples, self.offset.tolist(), strict=True)
        return torch.stack([row[begin : begin + self.samples] for row, begin in rows])

    def _cut(self, start: int, stop: int) -> FrameConditioning:
        """Keep the samples [start, stop), and the frames that they lie in."""
        begin = self.offset + start
        first = int(begin.min()) // self.hop
        last = -(-(int(begin.max()) + stop - start) // self.hop)
        k = self.sub_frames
        cut = {
            name: getattr(self, name)[:, first * rate : last * rate]
            for name, rate in zip(_ALONG_TIME, (1, k, k, self.hop, self.hop), strict=True)
        }
        offset = begin - first * self.hop
        return dataclasses.replace(self, **cut, offset=offset, samples=stop - start)

    def _map(self, change: Any) -> FrameConditioning:
        tensors = {name: change(getattr(self, name)) for name in (*_ALONG_TIME, "offset")}
        return dataclasses.replace(self, **tensors)


_ALONG_TIME = ("gates", "coefficients", "scale", "lag", "voicing")


def joined(parts: Sequence[Conditioned]) -> Conditioned:
    """Concatenate blocks of whole frames of the same streams."""
    if not isinstance(parts[0], FrameConditioning):
        return torch.cat(list(parts), dim=2)
    if len(parts) == 1:
        return parts[0]
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in _ALONG_TIME
    }
    return dataclasses.replace(parts[0], samples=sum(part.samples for part in parts), **tensors)


def stacked(rows: Sequence[Conditioned]) -> Conditioned:
    """Stack streams of equally many samples, which may begin at different places of a frame."""
    if not isinstance(rows[0], FrameConditioning):
        return torch.cat(list(rows))
    if len(rows) == 1:
        return rows[0]
    found: dict[str, Tensor] = {"offset": torch.cat([row.offset for row in rows])}
    for name in _ALONG_TIME:
        tensors = [getattr(row, name) for row in rows]
        length = max(tensor.shape[1] for tensor in tensors)
        # A stream that begins early in its frame may need a frame less: its last one is repeated,
        # and never read.
        places = torch.arange(length, device=tensors[0].device)
        found[name] = torch.cat([t[:, places.clamp(max=t.shape[1] - 1)] for t in tensors])
    return dataclasses.replace(rows[0], **found)  # type: ignore[arg-type]


def shared(cond: Conditioned, streams: int) -> Conditioned:
    """Return the conditioning of one stream for several, all in its memory."""
    if isinstance(cond, FrameConditioning):
        return cond._map(lambda x: shared(x, streams))
    return cond.expand(streams, *cond.shape[1:])


def dense(cond: Conditioned) -> Tensor:
    """Return the tensor (B, C, T or 1) that conditioning is or stands for."""
    return cond.dense() if isinstance(cond, FrameConditioning) else cond
