"""Causal self-attention over a window of positions: rotary angles, a layer, attention in parallel.

A position attends to itself and to the `window` - 1 before it. Keys and queries are rotated by
angles that grow with the position (Su et al., 2021, "RoFormer", https://arxiv.org/abs/2104.09864),
so their product depends on their distance only. Here every frequency is a whole number of turns in
`rotation_period(window)` positions: the angles depend on the position modulo the period, in whole
steps, and have the same precision after a day of audio.
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
    """Return each pair's turns in `rotation_period(window)` positions: (head_channels / 2,), int64.

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
    """Return the positions after which angles repeat: all distances in a window are distinct."""
    return _PERIOD * window


def rotation(positions: Tensor, turns: Tensor, period: int, like: Tensor) -> Rotation:
    """Return cosines and sines, (..., head_channels), of int64 positions (...), typed as `like`.

    The products are reduced as whole numbers, so no precision is lost however late the position.
    """
    steps = positions[..., None] * turns % period
    angles = steps.to(torch.promote_types(like.dtype, torch.float32)) * (2 * math.pi / period)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate channels i and i + half of `x` (..., head_channels) by the i-th angle."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def normalised(x: Tensor) -> Tensor:
    """Scale `x` (..., D) to a mean square of one; the next matrix has the gain of an RMSNorm."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """One residual layer: attention, then two matrices with a squared ReLU; inputs normalised.

    Squares of ReLUs (So et al., 2021, "Primer") learn as well as GELUs, and half of them are zero,
    which a kernel can skip.
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
            From queries, keys and values of these positions, (B, heads, N, D / heads) each, to the
            attention's result. Here a whole segment and a single step differ.
        """
        q, k, v = self.qkv(normalised(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = attend(rotate(q, by), rotate(k, by), v)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(normalised(x))).square())


def attend_within(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Attend from each query to its own key and the `window` - 1 before it, in memory linear in N.

    Queries go in blocks of up to a window; each block sees its own keys and those of the window
    before it.

    Parameters
    ----------
    q : Tensor, shape (B, heads, N, head_channels)
    k, v : Tensor, shape (B, heads, window + N, head_channels)
        Those of the `window` positions before the first query, then those of the queries.
    valid : Tensor of bool, shape (B, window)
        Which of the positions before exist.
    """
    attention = F.scaled_dot_product_attention
    total, window = q.shape[2], valid.shape[1]
    size = min(total, window)
    blocks = -(-total // size)
    rest = blocks * size - total
    q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v)) if rest else (q, k, v)
    query = torch.arange(size, device=q.device)[:, None]
    key = torch.arange(window + size, device=q.device)
    band = (key > query) & (key <= query + window)
    seen = F.pad(valid, (0, size), value=True)[:, None, None] & band
    first = slice(None, window + size)
    found = [attention(q[:, :, :size], k[:, :, first], v[:, :, first], attn_mask=seen)]
    if blocks > 1:
        # (B, heads, blocks - 1, ...), the blocks folded into the batch; here size == window.
        q = q[:, :, size:].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        k, v = (
            t[:, :, size:].unfold(2, window + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
            for t in (k, v)
        )
        others = attention(q, k, v, attn_mask=band)
        found.append(others.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3))
    return torch.cat(found, dim=2)[:, :, :total]
