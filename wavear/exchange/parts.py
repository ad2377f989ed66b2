"""The parts of a WaveNet of another project, and the wavear WaveNet that computes the same.

Letters: L layers, R residual channels, G units of a gate, S skip channels, C conditioning channels,
K taps. Constants of the source become weights:

    x[l + 1] = shrink (x[l] + W[l] z[l])      with y[l] = x[l] / shrink^l it is
    y[l + 1] = y[l] + shrink^-l W[l] z[l]     and a layer that reads x[l] reads shrink^l y[l]

Where R and G differ, the narrower one is padded with zeros: tanh(0) sigmoid(0) = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wavear.common.errors import WavearError
from wavear.mel.spectrogram import MelConfig
from wavear.models.wavenet import WaveNet, WaveNetConfig


@dataclass(frozen=True)
class Affine:
    """A matrix or a convolution."""

    weight: Tensor
    """(outputs, inputs) or (outputs, inputs, taps)."""
    bias: Tensor
    """(outputs,)."""

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.weight * factor, self.bias * factor)


@dataclass(frozen=True)
class Layer:
    """One layer of a WaveNet."""

    dilated: Affine
    """(2 G, R, K), oldest tap first; the first half of the outputs goes to tanh. Its bias includes
    that of the conditioning."""
    residual: Affine | None
    """(R, G); None of a last layer without."""
    skip: Affine
    """(S, G), scaled."""
    conditioning: Tensor | None = None
    """(2 G, C)."""


@dataclass(frozen=True)
class Upsampling:
    """A convolution over frames, then stages that repeat each value and smooth with a kernel."""

    frames: Tensor
    """(M, M, 2 context + 1), without bias."""
    kernels: Sequence[Tensor]
    """Per stage, (2 scale + 1,), of a convolution over the repeated values."""

    @property
    def scales(self) -> tuple[int, ...]:
        """Factor of each stage."""
        return tuple((len(kernel) - 1) // 2 for kernel in self.kernels)


@dataclass(frozen=True)
class Parts:
    """Everything that the source's network computes with."""

    table: Tensor | None
    """(Q, R): the vector of each code."""
    line: Affine | None
    """(R, 1): or the line through the sample's value."""
    layers: Sequence[Layer]
    hidden: Affine
    """(head channels, S)."""
    output: Affine
    """(P, head channels)."""
    shrink: float = 1.0
    """Factor on the sum of input and residual in each layer."""
    upsampling: Upsampling | None = None
    speakers: Tensor | None = None
    """(number, C of the speaker): these channels follow those of the mel."""
    law: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration: law, classes, mixtures."""


def assemble(parts: Parts, stacks: int, sample_rate: int, mel: MelConfig | None) -> WaveNet:
    """Return the wavear WaveNet that computes what the parts do.

    Raises
    ------
    WavearError
        If the layers do not divide into the stacks, or the upsampling does not fit the mel.
    """
    first, up = parts.layers[0], parts.upsampling
    doubled, read, taps = first.dilated.weight.shape
    width = max(doubled // 2, read)
    channels = 0 if first.conditioning is None else first.conditioning.shape[1]
    bands = 0 if up is None else len(up.frames)
    voice = 0 if parts.speakers is None else parts.speakers.shape[1]
    if bands + voice != channels:
        raise WavearError(
            f"it is conditioned on {channels} channels, of which {bands} come from mels and {voice}"
            " from a table of speakers: others cannot be imported"
        )
    _check_mel(up, mel)
    config = WaveNetConfig(
        sample_rate=sample_rate,
        mel=mel,
        speakers=0 if parts.speakers is None else len(parts.speakers),
        conditioning_channels=channels or WaveNetConfig.conditioning_channels,
        conditioning_context=0 if up is None else up.frames.shape[2] // 2,
        conditioning_scales=() if up is None else up.scales,
        conditioning_slope=1.0,
        layers=len(parts.layers),
        stacks=stacks,
        kernel_size=taps,
        residual_channels=width,
        skip_channels=first.skip.weight.shape[0],
        head_channels=parts.hidden.weight.shape[0],
        **parts.law,
    )
    model = WaveNet(config)
    model.load_state_dict(_weights(parts, width, channels))
    return model.eval()


def _check_mel(up: Upsampling | None, mel: MelConfig | None) -> None:
    if (up is None) != (mel is None):
        raise WavearError(
            "the checkpoint has no upsampling of mels: drop --mel"
            if up is None
            else f"the checkpoint is conditioned on mels of {len(up.frames)} bands: name their"
            " preset with --mel"
        )
    if up is None or mel is None:
        return
    hop = int(torch.tensor(up.scales).prod())
    if mel.bands != len(up.frames) or mel.hop_length != hop:
        raise WavearError(
            f"the checkpoint takes {len(up.frames)} bands and {hop} samples per frame, the mel has"
            f" {mel.bands} and {mel.hop_length}: name another preset"
        )


def _weights(parts: Parts, width: int, channels: int) -> dict[str, Tensor]:
    """Return the state dict of the WaveNet."""
    found: dict[str, Tensor] = {}

    def put(name: str, affine: Affine) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = affine.weight, affine.bias

    if parts.table is not None:
        found["embedding.weight"] = _padded(parts.table, -1, width)
    if parts.line is not None:
        line = parts.line
        put("embedding.line", Affine(_padded(line.weight, 0, width), _padded(line.bias, 0, width)))
    for i, layer in enumerate(parts.layers):
        level = parts.shrink**i
        put(f"blocks.{i}.dilated", _dilated(layer.dilated, width, level))
        if layer.conditioning is not None:
            found[f"blocks.{i}.conditioning.weight"] = _halves(layer.conditioning, width)
        skip = Affine(_padded(layer.skip.weight, 1, width), layer.skip.bias)
        put(f"blocks.{i}.skip", skip)
        if i < len(parts.layers) - 1:
            assert layer.residual is not None
            out = layer.residual * (1 / level)
            weight = _padded(_padded(out.weight, 0, width), 1, width)
            put(f"blocks.{i}.residual", Affine(weight, _padded(out.bias, 0, width)))
    put("head.1", parts.hidden)
    put("head.3", parts.output)
    if (up := parts.upsampling) is not None:
        bands = len(up.frames)
        found["conditioning.mel_mean"] = torch.zeros(bands)
        found["conditioning.mel_deviation"] = torch.ones(bands)
        frames = Affine(_padded(up.frames, 0, channels), torch.zeros(channels))
        put("conditioning.frames", frames)
        for i, kernel in enumerate(up.kernels):
            found[f"conditioning.stages.{i}.weight"] = phases(kernel).expand(channels, -1, -1)
    if parts.speakers is not None:
        before = channels - parts.speakers.shape[1]
        found["conditioning.speakers.weight"] = F.pad(parts.speakers, (before, 0))
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def phases(kernel: Tensor) -> Tensor:
    """Return what a kernel (2 s + 1,) over values repeated s times weights: (3, s).

    Output p of an input sample reads the repeated values p - s to p + s, which are copies of the
    sample before (below 0), the sample itself, and the one after (from s on).

    Examples
    --------
    >>> phases(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist()
    [[3.0, 1.0], [12.0, 6.0], [16.0, 24.0]]
    """
    scale = (len(kernel) - 1) // 2
    weights = kernel.new_zeros(3, scale)
    for p in range(scale):
        for j, value in enumerate(kernel):
            weights[(p + j - scale) // scale + 1, p] += value
    return weights


def _dilated(affine: Affine, width: int, level: float) -> Affine:
    """(2 G, R, K) -> (2 width, K width), the taps side by side."""
    weight = _halves(_padded(affine.weight * level, 1, width), width)
    return Affine(weight.transpose(1, 2).flatten(1), _halves(affine.bias, width))


def _halves(x: Tensor, width: int) -> Tensor:
    """Pad each half of the rows (2 G, ...) to `width`."""
    return torch.cat([_padded(half, 0, width) for half in x.chunk(2)])


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """Pad a dimension with zeros at its end."""
    dim = dim % x.dim()
    missing = size - x.shape[dim]
    return F.pad(x, (*[0] * (2 * (x.dim() - 1 - dim)), 0, missing))
