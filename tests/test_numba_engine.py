"""The CPU engine against the model's forward and the reference loop, and against itself, to the bit."""

# Numba's settings have no types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

import wavear
from wavear.common import compiled as compiled_module
from wavear.common.compiled import compiled, source_key
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.reference import ReferenceEngine
from wavear.models.wavenet import WaveNet, WaveNetConfig

# Nats. Sums of some hundred float32 products round to about 1e-6 of their size.
TOLERANCE = 1e-4


def make(gain: float = 2.0, seed: int = 0, **config) -> WaveNet:
    """A model whose weights are so large that its logits differ, as those of a trained one do."""
    torch.manual_seed(seed)
    model = WaveNet(
        WaveNetConfig(
            **{"layers": 4, "stacks": 2, "residual_channels": 16, "skip_channels": 32, **config}
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(gain)
    return model.eval()


def conditioning(model: WaveNet, batch: int, samples: int) -> Tensor | None:
    return (
        torch.randn(batch, model.config.conditioning_channels, samples)
        if model.conditioned
        else None
    )


def piece(cond: Tensor | None, start: int, stop: int) -> Tensor | None:
    return cond if cond is None or cond.shape[2] == 1 else cond[:, :, start:stop]


@torch.inference_mode()
def parallel(model: WaveNet, codes: np.ndarray, cond: Tensor | None) -> np.ndarray:
    """Log-probabilities (B, T) of codes by the model's forward pass."""
    given = torch.from_numpy(codes)
    logs = torch.log_softmax(model(given, cond).double(), dim=1)
    return logs.gather(1, given[:, None])[:, 0].numpy()


def random_codes(model: WaveNet, batch: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.classes, (batch, samples))


def random_uniforms(batch: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, samples))


small = st.integers(1, 40)


# Shrinking a failure takes minutes; the example found says enough.
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    stacks=st.integers(1, 3),
    depth=st.integers(1, 7),
    kernel=st.integers(2, 5),
    residual=small,
    skip=small,
    head=small,
    classes=st.sampled_from([2, 3, 17, 256, 1024, 5003]),
    speakers=st.sampled_from([0, 3]),
    channels=small,
    batch=st.sampled_from([1, 2, 3, 5, 13, 30]),
    samples=st.integers(1, 150),
    cut=st.integers(0, 150),
    constant=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(3, 8, 2, 64, 128, 256, 256, 3, 80, 1, 700, 333, False, 1)
@example(2, 5, 3, 128, 96, 100, 512, 3, 31, 7, 150, 1, False, 2)
@example(1, 1, 2, 1, 1, 1, 2, 0, 1, 1, 5, 2, False, 1)
def test_scores_equal_the_forward_pass(
    stacks,
    depth,
    kernel,
    residual,
    skip,
    head,
    classes,
    speakers,
    channels,
    batch,
    samples,
    cut,
    constant,
    threads,
):
    model = make(
        layers=stacks * depth, stacks=stacks, kernel_size=kernel, residual_channels=residual, skip_channels=skip,
        head_channels=head, classes=classes, speakers=speakers, conditioning_channels=channels,
    )  # fmt: skip
    codes = random_codes(model, batch, samples)
    cond = conditioning(model, batch, 1 if constant else samples)
    engine = NumbaEngine(model, batch, threads=min(threads, batch))
    cut = min(cut, samples)
    found = [
        engine.score(codes[:, a:b], piece(cond, a, b))
        for a, b in ((0, cut), (cut, samples))
        if b > a
    ]
    expected = parallel(model, codes, None if cond is None else cond.expand(-1, -1, samples))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 65536])
def test_the_fewest_and_the_most_classes(classes):
    model = make(classes=classes)
    codes = random_codes(model, 2, 50)
    codes[0, -2:] = classes - 1
    np.testing.assert_allclose(
        NumbaEngine(model, 2).score(codes, None),
        parallel(model, codes, None),
        atol=TOLERANCE,
        rtol=1e-6,
    )
    generated = NumbaEngine(model, 2).generate(random_uniforms(2, 50), None)
    np.testing.assert_array_equal(
        generated, ReferenceEngine(model, 2).generate(random_uniforms(2, 50), None)
    )


def assert_codes_follow(
    model: WaveNet, codes: np.ndarray, uniforms: np.ndarray, cond: Tensor | None, tolerance: float
):
    """Every code is the one its uniform selects from the law of the forward pass, or the uniform lies within
    `tolerance` of a boundary between the two."""
    with torch.inference_mode():
        law = (
            torch.softmax(model(torch.from_numpy(codes), cond).double(), dim=1)
            .cumsum(dim=1)
            .numpy()
        )
    upper = np.take_along_axis(law, codes[:, None], axis=1)[:, 0]
    lower = np.take_along_axis(law, np.maximum(codes - 1, 0)[:, None], axis=1)[:, 0] * (codes > 0)
    assert (uniforms >= lower - tolerance).all()
    assert (uniforms < upper + tolerance).all()


@pytest.mark.parametrize(
    "config",
    [
        {"layers": 10, "stacks": 1, "residual_channels": 32},
        {"kernel_size": 3, "speakers": 2, "classes": 1024},
    ],
    ids=["ten layers", "kernel 3, conditioned, 1024 classes"],
)
def test_free_running_codes_equal_the_reference(config):
    model = make(**config)
    batch, samples = 2, 1500
    uniforms, cond = random_uniforms(batch, samples), conditioning(model, batch, samples)
    with torch.inference_mode():
        found = NumbaEngine(model, batch).generate(uniforms, cond)
        expected = ReferenceEngine(model, batch).generate(uniforms, cond)
    # Rounding moves a boundary by about 1e-7; a uniform that near selects another code, and then
    # another future.
    assert_codes_follow(model, found, uniforms, cond, 1e-5)
    for row in range(batch):
        # The first code that differs: the reference's, too, is within tolerance of being drawn.
        differ = np.flatnonzero(found[row] != expected[row])
        part = slice(0, differ[0] + 1 if differ.size else samples)
        rows = slice(row, row + 1)
        assert_codes_follow(
            model,
            expected[rows, part],
            uniforms[rows, part],
            None if cond is None else cond[rows, :, part],
            1e-5,
        )
    assert (found == expected).mean() > 0.5
    assert len(np.unique(found)) > 20


GROUPINGS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (5, 2), (12, 1), (13, 1), (29, 2), (75, 2)]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "config",
    [{}, {"kernel_size": 3, "residual_channels": 37, "layers": 6, "stacks": 1, "speakers": 2}],
)
def test_a_stream_has_the_same_bits_in_every_batch_grouping_and_cut(config, weights):
    model = make(**config)
    samples, most = 120, max(batch for batch, _ in GROUPINGS)
    uniforms, codes = random_uniforms(most, samples), random_codes(model, most, samples)
    cond = conditioning(model, most, samples)
    temperatures = np.random.default_rng(1).uniform(0.5, 1.5, (most, samples))
    generated, scored = {}, {}
    for number, (batch, threads) in enumerate(GROUPINGS):
        # Other streams in other places: every seventh, beginning with the number of the grouping.
        chosen = (np.arange(batch) * 7 + number) % most
        cuts = [0, *sorted({1, 17 + number, 64, 64 + 3 * number}), samples]
        rows = None if cond is None else cond[chosen]
        runner = NumbaEngine(model, batch, weights=weights, threads=threads)
        scorer = NumbaEngine(model, batch, weights=weights, threads=threads)
        found, scores = [], []
        for start, stop in pairwise(cuts):
            part = slice(start, stop)
            found.append(
                runner.generate(
                    uniforms[chosen, part], piece(rows, start, stop), temperatures[chosen, part]
                )
            )
            scores.append(scorer.score(codes[chosen, part], piece(rows, start, stop)))
        for place, stream in enumerate(chosen):
            generated.setdefault(stream, set()).add(np.concatenate(found, axis=1)[place].tobytes())
            scored.setdefault(stream, set()).add(np.concatenate(scores, axis=1)[place].tobytes())
    assert len(generated) == most
    assert all(len(found) == 1 for found in generated.values())
    assert all(len(found) == 1 for found in scored.values())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        {"residual_channels": 64, "skip_channels": 128},
        {
            "kernel_size": 3,
            "residual_channels": 37,
            "skip_channels": 53,
            "head_channels": 67,
            "classes": 333,
            "speakers": 2,
        },
        {
            "layers": 1,
            "stacks": 1,
            "residual_channels": 17,
            "skip_channels": 18,
            "head_channels": 19,
            "classes": 20,
        },
    ],
)
def test_a_stream_on_two_cores_has_the_same_bits(config, weights):
    model = make(**config)
    codes, uniforms, cond = (
        random_codes(model, 1, 40),
        random_uniforms(1, 40),
        conditioning(model, 1, 40),
    )
    one, two = (NumbaEngine(model, 1, weights=weights, threads=threads) for threads in (1, 2))
    assert len(two._groups) == 2
    scores = [two.score(codes[:, a:b], piece(cond, a, b)) for a, b in ((0, 11), (11, 12), (12, 40))]
    np.testing.assert_array_equal(np.concatenate(scores, axis=1), one.score(codes, cond))
    one, two = (NumbaEngine(model, 1, weights=weights, threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(two.generate(uniforms, cond), one.generate(uniforms, cond))


def test_constant_conditioning_has_the_bits_of_the_same_for_every_sample():
    model = make(speakers=2)
    cond, codes = torch.randn(3, model.config.conditioning_channels, 1), random_codes(model, 3, 40)
    constant = NumbaEngine(model, 3).score(codes, cond)
    repeated = NumbaEngine(model, 3).score(codes, cond.expand(-1, -1, 40))
    np.testing.assert_array_equal(constant, repeated)


def test_bfloat16_is_float32_with_rounded_matrices():
    model = make(kernel_size=3, speakers=2, residual_channels=20)
    codes, cond = random_codes(model, 2, 80), torch.randn(2, model.config.conditioning_channels, 80)
    found = NumbaEngine(model, 2, weights="bfloat16").score(codes, cond)
    assert np.abs(found - NumbaEngine(model, 2).score(codes, cond)).max() > 1e-3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.startswith(("blocks", "head")):
                parameter.copy_(parameter.bfloat16().float())
    np.testing.assert_array_equal(found, NumbaEngine(model, 2).score(codes, cond))


def test_temperature_divides_the_logits():
    model, uniforms = make(gain=3.0), random_uniforms(1, 200)
    temperature = np.where(np.arange(200) < 100, 0.25, 2.0)[None]
    with torch.inference_mode():
        found = NumbaEngine(model, 1).generate(uniforms, None, temperature)
        np.testing.assert_array_equal(
            found, ReferenceEngine(model, 1).generate(uniforms, None, temperature)
        )
        np.testing.assert_array_equal(
            NumbaEngine(model, 1).generate(uniforms, None, 0.7),
            ReferenceEngine(model, 1).generate(uniforms, None, 0.7),
        )


def with_bias_alone(logits: list[float], **config) -> WaveNet:
    """A model whose law is the softmax of `logits` at every sample."""
    model = make(
        layers=1,
        stacks=1,
        residual_channels=1,
        skip_channels=1,
        head_channels=1,
        classes=len(logits),
        **config,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.state_dict()["head.3.bias"].copy_(torch.tensor(logits))
    return model


def test_a_million_draws_follow_the_law():
    logits = np.random.default_rng(0).normal(0, 2, 200)
    model, draws = with_bias_alone(logits.tolist()), 1_000_000
    codes = NumbaEngine(model, 100).generate(random_uniforms(100, draws // 100), None)
    law = np.exp(logits - logits.max())
    expected = draws * law / law.sum()
    counts = np.bincount(codes.ravel(), minlength=len(logits))
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Both tails: too good a fit is as wrong as a bad one.
    assert 1e-4 < chi2.sf(statistic, len(logits) - 1) < 1 - 1e-4


@pytest.mark.parametrize(
    ("first", "second", "classes"), [(2, 4, 7), (2, 20, 40), (20, 37, 40), (16, 32, 64)]
)
def test_codes_without_probability_are_never_drawn(first, second, classes):
    """Not even by a uniform on the very boundary, within a block of the sums or between two."""
    logits = np.full(classes, -300.0)
    logits[[0, -1]] = -np.inf
    logits[[first, second]] = 0.0
    ends = np.array([[0.0, 2.0**-53, 0.25, 0.5 - 2.0**-53, 0.5, 0.75, 1 - 2.0**-53]])
    codes = NumbaEngine(with_bias_alone(logits.tolist()), 1).generate(ends, None)
    assert codes.tolist() == [[first] * 4 + [second] * 3]


def test_weights_changed_in_place_loaded_or_swapped_are_the_ones_used():
    model, other = make(seed=0), make(seed=1)
    codes = random_codes(model, 1, 30)

    def agrees() -> bool:
        return (
            np.abs(NumbaEngine(model, 1).score(codes, None) - parallel(model, codes, None)).max()
            < TOLERANCE
        )

    assert agrees()
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: [parameter.data.mul_(1.1) for parameter in model.parameters()],
        lambda: [
            parameter.data.copy_(parameter.data * 0.9 + 0.01) for parameter in model.parameters()
        ],
        lambda: setattr(
            model.embedding, "weight", torch.nn.Parameter(torch.randn_like(model.embedding.weight))
        ),
    ):
        before = NumbaEngine(model, 1).score(codes, None)
        change()
        assert np.abs(NumbaEngine(model, 1).score(codes, None) - before).max() > 1e-3
        assert agrees()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision(precision):
    model = make(speakers=2).to(precision)
    codes, cond = (
        random_codes(model, 1, 40),
        torch.randn(1, model.config.conditioning_channels, 40).to(precision),
    )
    found = NumbaEngine(model, 1).score(codes, cond)
    np.testing.assert_allclose(found, parallel(model.float(), codes, cond.float()), atol=TOLERANCE)


@pytest.mark.cuda
def test_a_model_on_another_device():
    model = make(speakers=2)
    codes, cond = random_codes(model, 1, 40), torch.randn(1, model.config.conditioning_channels, 40)
    expected = parallel(model, codes, cond)
    found = NumbaEngine(model.cuda(), 1).score(codes, cond.cuda())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_what_cannot_be_run_is_refused_by_name():
    model = make(speakers=2)
    channels = model.config.conditioning_channels
    cond = torch.zeros(2, channels, 10)
    for arguments, message in (
        ((2, torch.zeros(2, 10), cond, "int4"), "int4"),
        ((0, torch.zeros(2, 10), cond, "float32"), "batch is 0"),
        ((3, torch.zeros(2, 10), cond, "float32"), "for 3 streams"),
        ((2, torch.zeros(2, 10), None, "float32"), "conditioned"),
        ((2, torch.zeros(2, 10), cond[:, :-1], "float32"), f"expected \\(2, {channels}, 10\\)"),
    ):
        batch, uniforms, condition, weights = arguments
        with pytest.raises(ValueError, match=message):
            NumbaEngine(model, batch, weights=weights).generate(uniforms.numpy(), condition)
    with pytest.raises(ValueError, match="expected 0 to 255"):
        NumbaEngine(model, 2).score(np.full((2, 10), 256), cond)
    with pytest.raises(ValueError, match="reference"):
        NumbaEngine(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_logits_that_are_no_numbers_are_an_error(batch):
    model = make()
    with torch.no_grad():
        model.blocks[1].dilated.bias[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        NumbaEngine(model, batch).generate(random_uniforms(batch, 10), None)


# The cache of compiled code, tried with functions that compile in an instant.


def _double(x):
    return 2 * x


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_module, "_warned", False)
    return tmp_path / "cache"


def stored(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.nbc"))


def test_compiled_code_is_kept_and_found_again(cache):
    before = numba.config.CACHE_DIR
    first = compiled(_double, "int64(int64)")
    assert first(4) == 8
    assert len(stored(cache)) == 1
    assert sum(first.stats.cache_hits.values()) == 0
    again = compiled(_double, "int64(int64)")
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    assert before == numba.config.CACHE_DIR


def test_a_changed_source_compiles_anew(cache, monkeypatch):
    compiled(_double, "int64(int64)")
    monkeypatch.setattr(compiled_module, "source_key", lambda path: "other")
    assert sum(compiled(_double, "int64(int64)").stats.cache_hits.values()) == 0


def test_sources_of_the_kernels_and_the_compiler_are_in_the_key_and_others_are_not(
    tmp_path, monkeypatch
):
    package = tmp_path / "wavear"
    shutil.copytree(
        Path(wavear.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    engines = package / "generation" / "cpu"
    monkeypatch.setattr(compiled_module, "__file__", str(package / "common" / "compiled.py"))
    loop, ceiling = engines / "wavenet_loop.py", engines / "ceiling.py"
    before = source_key(loop)
    for name, source in {"simd.py": True, "../../common/compiled.py": True, "wavenet_loop.py": True, "products.py": True,
                         "__init__.py": False, "wavenet.py": False, "wavenet_plan.py": False, "packing.py": False,
                         "../streams.py": False}.items():  # fmt: skip
        text = (engines / name).read_bytes()
        (engines / name).write_bytes(text + b"# changed\n")
        assert (source_key(loop) != before) == source, name
        (engines / name).write_bytes(text)
    assert source_key(loop) == before != source_key(ceiling)
    before = source_key(ceiling)
    (package / "models" / "wavenet.py").write_text("")
    assert source_key(ceiling) != before  # in other directories too
    before = source_key(loop)
    monkeypatch.setattr(numba, "__version__", "0.0.0")
    assert source_key(loop) != before


_CHANGES = """
import sys
from wavear.generation.cpu import kernel_of_a_test
print(kernel_of_a_test.outer(4), sum(kernel_of_a_test.outer.stats.cache_hits.values()))
"""


def test_a_change_in_a_file_that_a_kernel_calls_recompiles_and_another_does_not(tmp_path):
    package = tmp_path / "wavear"
    shutil.copytree(
        Path(wavear.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    inner = package / "generation" / "cpu" / "part_of_a_test.py"
    (package / "generation" / "cpu" / "kernel_of_a_test.py").write_text(
        "from wavear.common.compiled import compiled\n"
        "from wavear.generation.cpu.part_of_a_test import inner\n"
        "def _outer(x):\n    return inner(x)\n"
        "outer = compiled(_outer, 'int64(int64)')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    found = []
    for factor, comment in ((2, ""), (2, "# another"), (3, "# another")):
        inner.write_text(f"import numba\n@numba.njit\ndef inner(x):\n    return {factor} * x\n")
        (package / "generation" / "cpu" / "wavenet.py").write_text(comment)
        result = subprocess.run([sys.executable, "-c", _CHANGES], capture_output=True, text=True, check=True,
                                env=environment, cwd=tmp_path)  # fmt: skip
        found.append(result.stdout.split())
    assert found == [["8", "0"], ["8", "1"], ["12", "0"]]


def test_another_processor_compiles_anew(cache, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from wavear.common.compiled import compiled\n"
        "def double(x):\n    return 2 * x\n"
        "assert compiled(double, 'int64(int64)')(4) == 8\n"
    )
    for processor in ({}, {"NUMBA_CPU_NAME": "generic"}):
        subprocess.run([sys.executable, program], check=True, env={**os.environ, **processor})
    assert len(stored(cache)) == 2


def test_a_cache_that_cannot_be_written_is_said_once_and_does_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiled_module, "_warned", False)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        assert compiled(_double, "int64(int64)")(4) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(_double, "int64(int64)")(4) == 8


def test_a_damaged_cache_does_without(cache):
    compiled(_double, "int64(int64)")
    for path in cache.rglob("*.nb?"):
        path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="not kept"):
        assert compiled(_double, "int64(int64)")(4) == 8


_ON_ANOTHER_PROCESSOR = """
import numpy as np
import torch
from wavear.generate import _simd
from wavear.generation.cpu.wavenet import NumbaEngine
from wavear.generation.cpu.wavenet_loop import kernels
from wavear.models.wavenet import WaveNet, WaveNetConfig
assert kernels.cache_info().currsize == 0  # importing compiles nothing
torch.manual_seed(0)
model = WaveNet(WaveNetConfig(layers=4, stacks=2, residual_channels=24, skip_channels=20))
codes = np.random.default_rng(0).integers(0, 256, (5, 40))
scores = [NumbaEngine(model, b).score(codes[:b], None)[0] for b in (1, 2, 5)]
print(_simd.LANES, *(row.tobytes().hex() for row in scores))
"""


def test_narrower_vectors_give_the_same_bits():
    """As on a processor with AVX2 and without AVX-512. (Compiles once, then comes from the cache.)"""
    outputs = []
    narrow = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2,+bmi,+bmi2,+popcnt",
    }
    if not {"avx2", "fma"} <= _features():
        pytest.skip("needs a processor with AVX2")
    for environment in ({}, narrow):
        command = [sys.executable, "-c", _ON_ANOTHER_PROCESSOR]
        result = subprocess.run(command, capture_output=True, text=True, check=True,
                                env={**os.environ, **environment})  # fmt: skip
        outputs.append(result.stdout.split())
    assert outputs[1][0] == "8"
    assert len({row for found in outputs for row in found[1:]}) == 1


def _features() -> set[str]:
    from wavear.generation.cpu.simd import machine_features

    return {name for name, present in machine_features()[1].items() if present}
