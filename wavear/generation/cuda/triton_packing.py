"""A WaveNet's weights for the Triton kernels: matrices padded with zeros to whole tiles."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from wavear.models.wavenet import WaveNet, WaveNetConfig

ROWS = 16  # streams of a program: the rows of a tensor core's tile
WIDEST = 64  # residual channels of a layer that the registers hold
_OUTPUTS, _INPUTS = 128, 64  # of a tile of the head, at most
_DRAWN = 256  # classes that are drawn among at once, at most
_LEAST = 16  # of any axis of a product
# Bytes of shared memory for weights fetched ahead; an sm_80 or sm_90 block may have 163 KB.
_SHARED = 160 * 1024

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def padded(size: int, widest: int) -> tuple[int, int]:
    """Return (size in whole tiles, tile): tiles are powers of two.

    Examples
    --------
    >>> padded(5, 64), padded(64, 64), padded(65, 64), padded(300, 128)
    ((16, 16), (64, 64), (128, 64), (384, 128))
    """
    tile = min(max(_LEAST, 1 << (size - 1).bit_length()), widest)
    return -(-size // tile) * tile, tile


def shapes(config: WaveNetConfig, weights: str) -> dict[str, int]:
    """Return the sizes that the kernel `run` is compiled for."""
    layers, kernel, depth = config.layers, config.kernel_size, config.layers // config.stacks
    r, r_tile = padded(config.residual_channels, WIDEST)
    s, s_tile = padded(config.skip_channels, _OUTPUTS)
    a, a_tile = padded(config.head_channels, _OUTPUTS)
    q, q_tile = padded(config.classes, _OUTPUTS)
    g_step = padded(layers * r, _INPUTS)[1]
    size = TYPES[weights].itemsize
    layer = (2 * kernel + 1) * r * r * size  # bytes of weights
    return {
        "LAYERS": layers,
        "DEPTH": depth,
        "KERNEL": kernel,
        "SLOTS": config.stacks * ((kernel - 1) * (2**depth - 1) + depth),
        "R": r,
        "S": s,
        "A": a,
        "Q": q,
        "GATES": padded(layers * r, _INPUTS)[0],
        "ROWS": ROWS,
        "R_TILE": r_tile,
        "S_TILE": s_tile,
        "A_TILE": a_tile,
        "Q_TILE": q_tile,
        "D_TILE": next(tile for tile in (_DRAWN, q_tile) if q % tile == 0),
        "R_STEP": min(r, _INPUTS),
        "G_STEP": g_step,
        "S_STEP": padded(s, _INPUTS)[1],
        "A_STEP": padded(a, _INPUTS)[1],
        "LAYER_STAGES": max(1, min(3, _SHARED // layer)) if r == r_tile else 1,
        "STAGES": 3,
    }


def rounded(model: WaveNet, weights: str) -> WaveNet:
    """Return the model that the engine runs: in float32 or more, its matrices rounded as packed."""
    if weights == "float32" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    model = copy.deepcopy(model).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith(("blocks", "head")):
            parameter.data.copy_(parameter.data.to(TYPES[weights]))
    return model


def pack(model: WaveNet, weights: str) -> dict[str, Tensor]:
    """Return the weights by argument of `run` and `project`, on the model's device.

    Matrices in the type that `weights` names, the rest in float32. What is added has no effect:
    inputs and outputs of zero, classes of logit minus infinity.
    """
    config, sizes = model.config, shapes(model.config, weights)
    layers, kernel, residual = config.layers, config.kernel_size, config.residual_channels
    r, s, a, q = (sizes[name] for name in "RSAQ")
    kind = TYPES[weights]
    blocks: list[Any] = list(model.blocks)
    head: Any = model.head

    def made(
        shape: tuple[int, ...], value: Tensor, dtype: torch.dtype = torch.float32, fill: float = 0.0
    ) -> Tensor:
        out = torch.full(shape, fill, dtype=dtype, device=value.device)
        out[tuple(slice(length) for length in value.shape)] = value.detach().to(dtype)
        return out

    dilated = torch.stack([block.dilated.weight for block in blocks])
    dilated = dilated.reshape(layers, 2, residual, kernel, residual).permute(0, 3, 1, 2, 4)
    bias = torch.stack([block.dilated.bias for block in blocks]).reshape(layers, 2, residual)
    inner = blocks[:-1]  # nothing reads the last one's residual output
    skip = torch.zeros(config.skip_channels, layers, r, device=dilated.device)
    skip[:, :, :residual] = torch.stack([block.skip.weight for block in blocks], dim=1).detach()
    packed = {
        "embedding": made((config.classes, r), model.embedding.weight),
        "dilated": made((layers, kernel, 2, r, r), dilated, kind),
        "bias": made((layers, 2, r), bias),
        "residual": torch.zeros(layers, r, r, dtype=kind, device=dilated.device),
        "residual_bias": torch.zeros(layers, r, device=dilated.device),
        "skip": made((s, sizes["GATES"]), skip.flatten(1), kind),
        "skip_bias": made(
            (s,), torch.stack([block.skip.bias for block in blocks]).detach().float().sum(dim=0)
        ),
        "head1": made((a, s), head[1].weight, kind),
        "head1_bias": made((a,), head[1].bias),
        "head2": made((q, a), head[3].weight, kind),
        "head2_bias": made((q,), head[3].bias, fill=float("-inf")),
    }
    if inner:
        packed["residual"][:-1] = made(
            (layers - 1, r, r), torch.stack([block.residual.weight for block in inner]), kind
        )
        packed["residual_bias"][:-1] = made(
            (layers - 1, r), torch.stack([block.residual.bias for block in inner])
        )
    if model.conditioned:
        channels = padded(config.conditioning_channels, _INPUTS)[0]
        cond = torch.stack([block.conditioning.weight for block in blocks]).reshape(
            layers, 2, residual, -1
        )
        packed["conditioning"] = made((layers, 2, r, channels), cond, kind)
    return packed
