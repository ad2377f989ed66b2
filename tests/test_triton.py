"""The Triton engine, compiled ahead of time for cards that need not be here, and on a card."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wavear import MelConfig, WaveNet, WaveNetConfig
from wavear.generation.cuda import choice
from wavear.generation.reference import ReferenceEngine

triton = pytest.importorskip("triton")

SHAPE_A = WaveNetConfig(
    layers=20, stacks=2, residual_channels=64, skip_channels=128, mel=MelConfig()
)
WIDE = WaveNetConfig(
    layers=30, stacks=3, kernel_size=3, residual_channels=128, skip_channels=128, mel=MelConfig()
)
SHARED = 163 * 1024  # bytes of a block on sm_80, the fewest of all supported cards


def compiled(config: WaveNetConfig, weights: str, capability: int, **flags: bool) -> Any:
    """Return the kernel `run`, compiled for a card that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavear.generation.cuda import triton_kernels
    from wavear.generation.cuda.triton import WARPS
    from wavear.generation.cuda.triton_packing import shapes

    half = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[weights]
    kinds = (  # pairs: in float32 two of them are of one kind
        ("*fp64", "uniforms scores top_p"),
        ("*i32", "codes previous"),
        (
            "*fp32",
            "sharpness queues z embedding residual_bias skip_bias head1_bias head2_bias signal "
            "logits",
        ),
        (half, "dilated residual skip head1 head2 gates skips hidden"),
    )
    pointers = {name: kind for kind, names in kinds for name in names.split()}
    none = dict.fromkeys(("UPCAST", "SCORING", "SCORED", "TOP_K", "TOP_P"), False)
    constants = {**shapes(config, weights), **none, **flags}
    names = triton_kernels.run.arg_names
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
    source = ASTSource(triton_kernels.run, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS}
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("fp32", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.slow),
        "fp16",
    ],
)
def test_the_projection_compiles_without_a_card(kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavear.generation.cuda import triton_kernels
    from wavear.generation.cuda.triton import PROJECTION

    kernel = triton_kernels.project
    constants = {"CHANNELS": 128, "OUTPUTS": 2560, "TILE": 128, "UPCAST": False, **PROJECTION}
    pointers = {"cond": "*fp32", "weights": f"*{kind}", "bias": "*fp32", "out": "*fp32"}
    names = kernel.arg_names
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert made.metadata.shared <= SHARED
    assert "mma.sync" in made.asm["ptx"]


SMALL = WaveNetConfig(layers=2, stacks=1)
MANY = WaveNetConfig(layers=2, stacks=1, classes=1024)
COMPILED = {
    "a fp16 sm_90": (SHAPE_A, "float16", 90, {}),
    "scoring sm_90": (SMALL, "float32", 90, {"SCORING": True, "SCORED": True}),
}
SLOW = {
    "a bf16 sm_80": (SHAPE_A, "bfloat16", 80, {"SCORED": True}),
    "a fp32 sm_80": (SHAPE_A, "float32", 80, {}),
    "wide fp16 sm_90": (WIDE, "float16", 90, {}),
    "truncated sm_90": (MANY, "float16", 90, {"TOP_K": True, "TOP_P": True}),
}
slow = [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


@pytest.mark.parametrize(
    ("config", "weights", "capability", "flags"),
    [*(pytest.param(*case, id=name) for name, case in COMPILED.items()), *slow],
)
def test_compiles_to_machine_code_that_fits_a_block(config, weights, capability, flags, tmp_path):
    """The code uses tensor cores, and barriers between writing and reading threads."""
    made = compiled(config, weights, capability, **flags)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= SHARED
    assert "mma.sync" in ptx
    assert ptx.count("bar.sync") >= 4
    assert "cp.async" in ptx  # prefetches weights
    assert len(made.asm["cubin"]) > 10_000
    tool = (
        shutil.which("cuobjdump")
        or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    )
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True)
    stack = int(re.search(r"STACK:(\d+)", usage.stdout)[1])  # type: ignore[index]
    assert stack <= 256, usage.stdout  # bytes of registers that did not fit, for each thread


def test_auto_on_a_card(monkeypatch):
    """A WaveNet gets triton where it can run, otherwise cuda-graph and a reason."""
    device = torch.device("cuda")
    wavenet, other = WaveNet(WaveNetConfig(layers=1, stacks=1)), torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc")
    assert choice.pick(wavenet, device) == "triton"
    assert choice.pick(other, device) == "cuda-graph"  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(
        UserWarning, match="Old Card has compute capability 7.5.*'cuda-graph' is taken"
    ):
        assert choice.pick(wavenet, device) == "cuda-graph"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="no C compiler"):
        assert choice.pick(wavenet, device) == "cuda-graph"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert choice.pick(wavenet, device) == "cuda-graph"


# On a card. In nats of the worst sample, see tests/test_triton_interpreted.py.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.01}


def make(config: WaveNetConfig) -> WaveNet:
    torch.manual_seed(0)
    model = WaveNet(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(2)
    return model.eval().cuda()


CARD: dict[str, WaveNetConfig] = {
    "a": SHAPE_A,
    "wide": WIDE,
    "odd": WaveNetConfig(
        layers=4, stacks=2, kernel_size=3, residual_channels=37, skip_channels=53,
        head_channels=67, classes=333, speakers=2,
    ),
    "many classes": WaveNetConfig(layers=2, stacks=1, classes=5003),
}  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CARD)
@torch.inference_mode()
def test_on_a_card_scores_equal_the_forward_pass(name, weights):
    from wavear.generation.cuda.triton import TritonEngine

    model, batch, samples = make(CARD[name]), 19, 2500
    codes = np.random.default_rng(0).integers(0, model.config.classes, (batch, samples))
    channels = model.config.conditioning_channels
    cond = torch.randn(batch, channels, samples, device="cuda") if model.conditioned else None
    given = torch.from_numpy(codes).cuda()
    logs = (
        torch.log_softmax(model(given, cond).double(), dim=1)
        .gather(1, given[:, None])[:, 0]
        .cpu()
        .numpy()
    )
    found = TritonEngine(model, batch, weights=weights).score(codes, cond)
    assert np.abs(found - logs).max() < BOUNDS[weights]


@pytest.mark.cuda
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
@torch.inference_mode()
def test_on_a_card_a_stream_has_the_same_bits_in_every_batch_and_cut(weights):
    from wavear.generation.cuda.triton import TritonEngine

    model, most, samples = make(SHAPE_A), 400, 600
    uniforms = np.random.default_rng(0).random((most, samples))
    cond = torch.randn(most, model.config.conditioning_channels, samples, device="cuda")
    whole = TritonEngine(model, most, weights=weights).generate(uniforms, cond)
    for chosen in ([7], [399, 0, 7], list(range(5, 38))):
        engine = TritonEngine(model, len(chosen), weights=weights)
        parts = [
            engine.generate(uniforms[chosen, a:b], cond[chosen, :, a:b])
            for a, b in ((0, 1), (1, 250), (250, samples))
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[chosen])


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}], ids=str
)
@torch.inference_mode()
def test_on_a_card_free_running_codes_equal_the_reference(settings):
    from wavear.generation.cuda.triton import TritonEngine

    model = make(CARD["odd"])
    uniforms = np.random.default_rng(0).random((2, 300))
    cond = torch.randn(2, model.config.conditioning_channels, 1, device="cuda")
    found = TritonEngine(model, 2).generate(uniforms, cond, **settings)
    expected = ReferenceEngine(model, 2).generate(uniforms, cond, **settings)
    # After a uniform within 1e-6 of a boundary between two codes the engines differ for good.
    assert (found == expected).mean() > 0.5
