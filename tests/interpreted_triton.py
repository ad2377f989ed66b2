"""The Triton engine in Triton's CPU interpreter: scores, batches, states.

tests/test_triton_scores.py runs this file in a separate process. The interpreter runs a kernel's
operations one by one with NumPy, one program after another. It covers neither the compiler's output
nor the order of threads: tests/test_triton.py compiles the kernels, and runs them on a GPU.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.cuda import triton
from wavear.generation.reference import ReferenceEngine
from wavear.models.wavenet import WaveNet, WaveNetConfig

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from triton.runtime import interpreter

from wavear.generation.cuda.triton import TritonEngine, interpreted

TOLERANCE = 1e-4  # nats, float32
# Nats, for the worst sample. These weights are twice the initial ones, and the activations are
# rounded as well.
HALF = {"bfloat16": 0.1, "float16": 0.01}

_patched: set[str] = set()


def _call(self, *arguments, **named):
    """Patch the language once per module.

    The interpreter patches it for each function that a kernel calls, which takes most of the time.
    """
    if self.fn.__module__.startswith("triton") and self.fn.__module__ not in _patched:
        _patched.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Multiply in float64 and round once, so that a row's result is the same anywhere in a tile.

    NumPy's float32 product may depend on the row's place; that of a tensor core does not.
    """
    product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter.InterpretedFunction.__call__ = _call
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def make(**config) -> WaveNet:
    torch.manual_seed(0)
    tiny = {
        "layers": 4,
        "stacks": 2,
        "residual_channels": 6,
        "skip_channels": 8,
        "head_channels": 10,
        "classes": 32,
    }
    model = WaveNet(WaveNetConfig(**{**tiny, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(2)
    return model.eval()


def inputs(
    model: WaveNet, batch: int, samples: int
) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Return codes, uniforms and conditioning."""
    generator = np.random.default_rng(0)
    cond = (
        torch.randn(batch, model.config.conditioning_channels, samples)
        if model.conditioned
        else None
    )
    shape = (batch, samples)
    return generator.integers(0, model.config.classes, shape), generator.random(shape), cond


def piece(cond: Tensor | None, start: int, stop: int) -> Tensor | None:
    return cond if cond is None or cond.shape[2] == 1 else cond[:, :, start:stop]


@torch.inference_mode()
def parallel(model: WaveNet, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
    """Return the log-probabilities (B, T) that the model's forward pass gives codes."""
    given = torch.from_numpy(codes)
    logs = torch.log_softmax(model(given, cond).double(), dim=1)
    return logs.gather(1, given[:, None])[:, 0].numpy()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


SHAPES: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "kernel 3, speakers": {"kernel_size": 3, "speakers": 2, "conditioning_channels": 5},
    "kernel 4, one layer": {"layers": 1, "stacks": 1, "kernel_size": 4, "residual_channels": 17},
    "odd channels": {
        "residual_channels": 33,
        "skip_channels": 37,
        "head_channels": 41,
        "classes": 50,
        "speakers": 1,
    },
    "two classes": {"classes": 2, "layers": 2, "stacks": 2},
    "many classes": {"classes": 1000, "layers": 2, "stacks": 1, "head_channels": 130},
    "tiles of channels": {
        "residual_channels": 70,
        "skip_channels": 130,
        "kernel_size": 3,
        "layers": 2,
        "stacks": 1,
    },
    "tiles of conditioning": {"speakers": 2, "conditioning_channels": 81, "layers": 3, "stacks": 1},
}


FAST = [
    *((shape, "float32") for shape in SHAPES),
    ("kernel 3, speakers", "bfloat16"),
    ("tiles of channels", "float16"),
]
ALL = [(shape, kind) for shape in SHAPES for kind in ("float32", "bfloat16", "float16")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST]


@pytest.mark.parametrize(("shape", "weights"), [*FAST, *SLOW])
def test_scores_equal_forward(shape, weights):
    assert interpreted()
    model = make(**SHAPES[shape])
    samples = 7  # so that the queues wrap around
    codes, _, cond = inputs(model, 3, samples)
    engine = TritonEngine(model, 3, weights=weights)
    found = [engine.score(codes[:, a:b], piece(cond, a, b)) for a, b in ((0, 3), (3, samples))]
    tolerance = TOLERANCE if weights == "float32" else HALF[weights]
    error = np.abs(np.concatenate(found, axis=1) - parallel(model, codes, cond))
    assert error.max() < tolerance
    if weights != "float32":
        assert error.max() > TOLERANCE / 10  # it is rounded


@pytest.mark.parametrize(
    ("shape", "weights"),
    [
        ("kernel 3, speakers", "float32"),
        ("kernel 3, speakers", "bfloat16"),
        pytest.param("tiles of channels", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_stream_has_the_same_bits_in_every_batch_and_cut(shape, weights, monkeypatch):
    model = make(**SHAPES[shape])
    most, samples = 18, 5
    codes, uniforms, cond = inputs(model, most, samples)
    drawn, scored = {}, {}
    for number, (batch, cuts) in enumerate([(1, [0, 5]), (2, [0, 1, 5]), (18, [0, 3, 5])]):
        # At a different place each time, in a full and in a last group; and with conditioning in
        # several launches.
        monkeypatch.setattr(triton, "_PROJECTED", 2**28 if number else 1)
        chosen = (np.arange(batch) * 5 + number) % most
        rows = None if cond is None else cond[chosen]
        runner, scorer = (TritonEngine(model, batch, weights=weights) for _ in range(2))
        found, scores = [], []
        for a, b in pairwise(cuts):
            logs = np.empty((batch, b - a))
            found.append(
                runner.generate(uniforms[chosen, a:b], piece(rows, a, b), log_probability=logs)
            )
            scores.append(scorer.score(codes[chosen, a:b], piece(rows, a, b)))
        for place, stream in enumerate(chosen):
            drawn.setdefault(stream, set()).add(np.concatenate(found, axis=1)[place].tobytes())
            scored.setdefault(stream, set()).add(np.concatenate(scores, axis=1)[place].tobytes())
    assert len(scored) == most
    assert all(len(bits) == 1 for bits in (*drawn.values(), *scored.values()))


def test_constant_conditioning_equals_the_same_for_every_sample():
    model = make(**SHAPES["kernel 3, speakers"])
    codes, _, _ = inputs(model, 2, 5)
    cond = torch.randn(2, 5, 1)
    repeated = TritonEngine(model, 2).score(codes, cond.expand(-1, -1, 5))
    np.testing.assert_array_equal(TritonEngine(model, 2).score(codes, cond), repeated)


@pytest.mark.parametrize(
    ("shape", "other"),
    [("unconditional", NumbaEngine), ("tiles of channels", ReferenceEngine)],
)
def test_states_resume_on_other_engines_and_return(shape, other, monkeypatch):
    model = make(**SHAPES[shape])
    _, uniforms, _ = inputs(model, 3, 15)
    expected = ReferenceEngine(model, 3).generate(uniforms, None)
    engine = TritonEngine(model, 3)
    engine.generate(uniforms[:, :6], None)
    elsewhere = other(model, 1)
    elsewhere.load_state(0, engine.state(1))
    np.testing.assert_array_equal(
        elsewhere.generate(uniforms[1:2, 6:10], None), expected[1:2, 6:10]
    )
    engine.generate(uniforms[:, :4], None)  # the queues of other streams are at other positions
    monkeypatch.setattr(triton, "_WRAP", 12)  # and wrap around within the call
    engine.load_state(2, elsewhere.state(0))
    np.testing.assert_array_equal(
        engine.generate(uniforms[:, 10:][[0, 0, 1]], None)[2], expected[1, 10:]
    )
    assert engine._now < 12


def test_ended_streams_leave_and_others_begin():
    model = make(**SHAPES["kernel 3, speakers"])
    _, uniforms, cond = inputs(model, 4, 9)
    assert cond is not None
    expected = ReferenceEngine(model, 4).generate(uniforms, cond)
    engine = TritonEngine(model, 4)
    beginning = engine.state(0)
    engine.generate(uniforms[:, :5], cond[:, :, :5])
    rest = engine.keep([3, 1])
    rest.load_state(1, beginning)
    mixed, given = uniforms[[3, 1], 5:].copy(), cond[[3, 1], :, 5:].clone()
    mixed[1], given[1] = uniforms[1, :4], cond[1, :, :4]
    found = rest.generate(mixed, given)
    np.testing.assert_array_equal(found[0], expected[3, 5:])
    np.testing.assert_array_equal(found[1], expected[1, :4])


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_stream_moves_past_a_recording(weights):
    model = make(**SHAPES["kernel 3, speakers"])
    codes, _, cond = inputs(model, 2, 12)
    assert cond is not None
    found, stepped = (TritonEngine(model, 2, weights=weights) for _ in range(2))
    found.fill(1, codes[1, :8], cond[1:, :, :8])
    stepped.score(codes[:, :8], cond[:, :, :8])
    scores = [engine.score(codes[:, 8:], cond[:, :, 8:])[1] for engine in (found, stepped)]
    # The past is computed with the rounded weights, but its activations are not rounded.
    np.testing.assert_allclose(*scores, atol=TOLERANCE if weights == "float32" else HALF[weights])


def test_unusable_arguments_are_refused():
    model = make(**SHAPES["kernel 3, speakers"])
    codes, _, cond = inputs(model, 2, 5)
    assert cond is not None
    for batch, given, weights, message in (
        (2, cond, "int4", "int4"),
        (0, cond, "float32", "batch is 0"),
        (3, cond, "float32", "for 3 streams"),
        (2, None, "float32", "conditioned"),
        (2, cond[:, :-1], "float32", r"expected \(2, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            TritonEngine(model, batch, weights=weights).score(codes, given)
    with pytest.raises(ValueError, match="expected 0 to 31"):
        TritonEngine(model, 2).score(codes + 32, cond)
    with pytest.raises(ValueError, match="serves WaveNet"):
        TritonEngine(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]
