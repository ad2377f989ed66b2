"""Write the part of docs/benchmarks.md on the forms of a layer: products, convolutions, gates.

    python bench/forms.py                      # both shapes and types, some minutes
    python bench/forms.py --device cuda
    python bench/forms.py --shapes A --types bf16 --rounds 3

All forms are of the same weights, and each is held to the first before it is timed: its loss and
its gradient. They take turns, so that a machine whose speed drifts favours none.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import write_section
from torch import Tensor
from torch.nn import functional as F

from wavear import MelConfig, WaveNet, WaveNetConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SHAPES: dict[str, dict[str, Any]] = {
    "A": {"layers": 20, "stacks": 2, "residual_channels": 64, "skip_channels": 128},
    "B2": {"layers": 30, "stacks": 3, "residual_channels": 128, "skip_channels": 128},
    "B3": {
        "layers": 30,
        "stacks": 3,
        "kernel_size": 3,
        "residual_channels": 128,
        "skip_channels": 128,
    },
}
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SEGMENT = 8192
# float32 differs by the order of sums; bf16 by rounding after each operation, which the forms put
# at other places.
TOLERANCE = {"float32": 1e-4, "bf16": 0.1}

Z = Callable[
    [Any, Tensor, Tensor, int], Tensor
]  # block, x (B, T, R), cond (B, T, C), dilation -> (B, T, 2R)


def taps(x: Tensor, kernel: int, dilation: int) -> list[Tensor]:
    """x at each tap, the oldest first."""
    past = F.pad(x, (0, 0, (kernel - 1) * dilation, 0))
    return [past[:, k * dilation : k * dilation + x.shape[1]] for k in range(kernel)]


def product(block: Any, x: Tensor, cond: Tensor, dilation: int) -> Tensor:
    """One product over the taps side by side, one of the conditioning: what WaveNet does."""
    kernel = block.dilated.in_features // x.shape[2]
    return block.dilated(torch.cat(taps(x, kernel, dilation), dim=-1)) + block.conditioning(cond)


def product_of_all(block: Any, x: Tensor, cond: Tensor, dilation: int) -> Tensor:
    """One product over taps and conditioning side by side."""
    kernel = block.dilated.in_features // x.shape[2]
    weight = torch.cat([block.dilated.weight, block.conditioning.weight], dim=1)
    return F.linear(
        torch.cat([*taps(x, kernel, dilation), cond], dim=-1), weight, block.dilated.bias
    )


def shifted_products(block: Any, x: Tensor, cond: Tensor, dilation: int) -> Tensor:
    """Compute a product per tap and shift it in time, without concatenating the taps."""
    residual, kernel = x.shape[2], block.dilated.in_features // x.shape[2]
    z = F.linear(x, block.dilated.weight[:, -residual:], block.dilated.bias) + block.conditioning(
        cond
    )
    for k in range(kernel - 1):
        reach = (kernel - 1 - k) * dilation
        part = F.linear(
            x[:, : x.shape[1] - reach], block.dilated.weight[:, k * residual : (k + 1) * residual]
        )
        z = z + F.pad(part, (0, 0, reach, 0))
    return z


def kernels(block: Any, residual: int) -> Tensor:
    """Return the weights in the layout of a convolution, (2R, R, kernel)."""
    return block.dilated.weight.unflatten(1, (-1, residual)).transpose(1, 2)


def convolution(block: Any, x: Tensor, cond: Tensor, dilation: int) -> Tensor:
    """Conv1d, channels first; everything else channels last."""
    weight = kernels(block, x.shape[2])
    padded = F.pad(x.transpose(1, 2), ((weight.shape[2] - 1) * dilation, 0))
    return F.conv1d(padded, weight, block.dilated.bias, dilation=dilation).transpose(
        1, 2
    ) + block.conditioning(cond)


def channels_last(block: Any, x: Tensor, cond: Tensor, dilation: int) -> Tensor:
    """Conv2d of height 1 in torch's channels-last memory format."""
    weight = kernels(block, x.shape[2])[:, :, None].contiguous(memory_format=torch.channels_last)
    padded = F.pad(x, (0, 0, (weight.shape[3] - 1) * dilation, 0)).transpose(1, 2)[:, :, None]
    z = F.conv2d(padded, weight, block.dilated.bias, dilation=(1, dilation))
    return z[:, :, 0].transpose(1, 2) + block.conditioning(cond)


class FusedGate(torch.autograd.Function):
    """tanh(a) * sigmoid(b) that keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return gate(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        a, b = ctx.saved_tensors[0].chunk(2, dim=-1)
        t, s = torch.tanh(a), torch.sigmoid(b)
        through = gradients[0] * s
        return torch.cat([through * (1 - t * t), through * t * (1 - s)], dim=-1)


def gate(z: Tensor) -> Tensor:
    """As WaveNet has it."""
    a, b = z.chunk(2, dim=-1)
    return torch.tanh(a) * torch.sigmoid(b)


FORMS: dict[str, tuple[Z, Callable[[Tensor], Tensor], bool]] = {
    "matrix product": (product, gate, False),
    "matrix product, contiguous conditioning": (product, gate, True),
    "one product with the conditioning": (product_of_all, gate, True),
    "a product per tap": (shifted_products, gate, True),
    "Conv1d": (convolution, gate, True),
    "Conv2d, channels last": (channels_last, gate, True),
    "fused gate": (product, FusedGate.apply, True),
}


def loss(model: WaveNet, codes: Tensor, cond: Tensor, form: str) -> Tensor:
    """Nats of each sample, by one of the forms."""
    convolve, gated_by, contiguous = FORMS[form]
    x, cond = model.embedding(model.shift(codes)), cond.transpose(1, 2)
    cond = cond.contiguous() if contiguous else cond
    gates = []
    for block, dilation in zip(model.blocks, model.config.dilations, strict=True):
        gates.append(gated_by(convolve(block, x, cond, dilation)))
        x = x if block.residual is None else x + block.residual(gates[-1])
    logits = model._read(gates).transpose(1, 2)
    return F.cross_entropy(logits.float(), codes, reduction="none")


def compare(shape: str, kind: str, device: str, rounds: int, batch: int) -> list[str]:
    """Rows of the table."""
    torch.manual_seed(0)
    config = WaveNetConfig(mel=MelConfig(), **SHAPES[shape])
    model = WaveNet(config).to(device, TYPES[kind])
    samples = SEGMENT + -(-config.receptive_field // 256) * 256
    codes = torch.randint(0, config.classes, (batch, samples), device=device)
    cond = torch.randn(
        batch, config.conditioning_channels, samples, device=device, dtype=TYPES[kind]
    )
    weights = [p for name, p in model.named_parameters() if not name.startswith("conditioning.")]

    def step(form: str) -> tuple[float, Tensor, Tensor]:
        began = time.perf_counter()
        nats = loss(model, codes, cond, form)
        found = torch.autograd.grad(nats.mean(), weights)
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        return taken, nats.detach(), torch.cat([g.flatten().float() for g in found])

    _, first, gradient = step("matrix product")
    apart = {}
    for form in FORMS:
        _, nats, found = step(form)
        apart[form] = float((found - gradient).norm() / gradient.norm())
        worst = float((nats - first).abs().max())
        if max(apart[form], worst) > TOLERANCE[kind]:
            raise SystemExit(
                f"{form} is another function: loss off by {worst:.2g}, gradient by "
                f"{apart[form]:.2g}"
            )
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            times[form].append(step(form)[0])
    base = statistics.median(times["matrix product"])
    rows = []
    for form in FORMS:
        taken = statistics.median(times[form])
        speed = f"{batch * SEGMENT / taken:,.0f} | {base / taken:.2f}"
        rows.append(f"| {shape} | {kind} | {form} | {speed} | {apart[form]:.1e} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Compare, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B2"])
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="page to write (default docs/benchmarks.md)"
    )
    arguments = parser.parse_args()
    from training import BATCH, machine

    lines = [
        f"## Forms of a layer, {'GPU' if arguments.device == 'cuda' else 'CPU'}",
        "",
        f"Written by `python bench/forms.py --device {arguments.device}`, on "
        f"{machine(arguments.device)}.",
        f"Loss and gradient of batches of {BATCH[arguments.device]} crops of {SEGMENT} samples; "
        "median of"
        f" {arguments.rounds} rounds, in turns. **gradient**: how far it is from the first "
        "form's, relative.",
        "",
        "| shape | type | form | samples/s | of the first | gradient |",
        "|---|---|---|---:|---:|---:|",
    ]
    work = functools.partial(
        compare, device=arguments.device, rounds=arguments.rounds, batch=BATCH[arguments.device]
    )
    for shape in arguments.shapes:
        for kind in arguments.types:
            lines += work(shape, kind)
    write_section(arguments.out, f"forms-{arguments.device}", "\n".join(lines))


if __name__ == "__main__":
    main()
