"""Causal self-attention over a window of positions: rotary angles, a layer, the attention of many positions at once.

A position attends to itself and to the `window` - 1 before it. Keys and queries are turned by
angles that grow with the position (Su et al., 2021, "RoFormer", https://arxiv.org/abs/2104.09864),
so a product of the two knows how far they lie apart and nothing else. Here every frequency is a
whole number of turns in `period` positions: the angles are those of the position modulo the period,
in whole steps, and after a day of audio they are what they were in its first second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PERIOD = 4  # windows: the slowest pair of channels turns by at most a quarter within the window

Rotation = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def turns(head_channels: int, window: int) -> Tensor:
    """How often each pair of channels turns in `rotation_period(window)` positions: (head_channels / 2,), int64.

    In even ratios from about one radian per position down to one turn in the whole period.

    Examples
    --------
    >>> turns(8, 64).tolist(), rotation_period(64)
    ([41, 12, 3, 1], 256)
    """
    fastest = max(1.0, rotation_period(window) / (2 * math.pi))
    pairs = head_channels // 2
    return torch.tensor([round(fastest ** (1 - i / max(pairs - 1, 1))) for i in range(pairs)])


def rotation_period(window: int) -> int:
    """Positions after which the angles repeat: more than a window, so that no two distances in it look alike."""
    return _PERIOD * window


def rotation(positions: Tensor, turns: Tensor, period: int, like: Tensor) -> Rotation:
    """Cosines and sines, (..., head_channels), of int64 positions (...), in the precision of `like`.

    The products are reduced as whole numbers, so no precision is lost however late the position.
    """
    steps = positions[..., None] * turns % period
    angles = steps.to(torch.promote_types(like.dtype, torch.float32)) * (2 * math.pi / period)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Channel i and channel i + half of `x` (..., head_channels) turned by the i-th angle."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def normalised(x: Tensor) -> Tensor:
    """`x` (..., D) scaled to a mean square of one. (The gain of an RMSNorm is left to the matrix that follows it.)"""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """One layer: attention and two matrices with a squared ReLU between, each added to what it reads normalised.

    Squares of ReLUs (So et al., 2021, "Primer") learn as well as GELUs, and half of them are zero:
    what a kernel skips.
    """

    def __init__(self, channels: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.up = nn.Linear(channels, hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor, by: Rotation, attend: Attend) -> Tensor:
        """Positions (B, N, D) -> the next layer's.

        Parameters
        ----------
        x : Tensor, shape (B, N, D)
        by : cosines and sines, shape (B, 1, N, D / heads)
        attend : callable
            Queries, keys and values of these positions, (B, heads, N, D / heads) each, to what the
            queries find there and in the past. It is where a whole segment and a single step
            differ.
        """
        q, k, v = self.qkv(normalised(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = attend(rotate(q, by), rotate(k, by), v)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(normalised(x))).square())


def attend_within(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Each query's attention to its own key and the `window` - 1 before it, in memory that grows with N alone.

    Queries go in blocks of up to a window; each block sees its own keys and those of the window
    before it.

    Parameters
    ----------
    q : Tensor, shape (B, heads, N, head_channels)
    k, v : Tensor, shape (B, heads, window + N, head_channels)
        Those of the `window` positions before the first query, then those of the queries.
    valid : Tensor of bool, shape (B, window)
        Which of the positions before there are.
    """
    total, window = q.shape[2], valid.shape[1]
    size = min(total, window)
    blocks = -(-total // size)
    rest = blocks * size - total
    q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v)) if rest else (q, k, v)
    query, key = (
        torch.arange(size, device=q.device)[:, None],
        torch.arange(window + size, device=q.device),
    )
    band = (key > query) & (key <= query + window)
    seen = F.pad(valid, (0, size), value=True)[:, None, None] & band
    first = slice(None, window + size)
    found = [
        F.scaled_dot_product_attention(
            q[:, :, :size], k[:, :, first], v[:, :, first], attn_mask=seen
        )
    ]
    if blocks > 1:
        # (B, heads, blocks - 1, ...) with the blocks folded into the batch; here the size is the
        # window.
        q = q[:, :, size:].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        k, v = (
            t[:, :, size:].unfold(2, window + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
            for t in (k, v)
        )
        others = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
        found.append(others.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3))
    return torch.cat(found, dim=2)[:, :, :total]
