"""`wavear bench` measures what it says: costs by hand, an error that is there when the weights are rounded."""

from typing import Any

import pytest
import torch

from wavear import Linear, LinearConfig, MelConfig, WaveNet, WaveNetConfig
from wavear.benchmark import speed
from wavear.generation.cpu.ceiling import Ceiling, cost

SMALL: dict[str, Any] = {
    "residual_channels": 8,
    "skip_channels": 8,
    "head_channels": 8,
    "conditioning_channels": 4,
}
CEILING = Ceiling(multiply_adds=1e9, bandwidth={1000: 4e9, 10**8: 1e9})
SLOW_MEMORY = Ceiling(multiply_adds=1e15, bandwidth={1000: 1e9, 10**8: 1e9})


def test_cost_of_a_network_by_hand():
    config = WaveNetConfig(layers=2, stacks=1, kernel_size=3, classes=16, mel=MelConfig(), **SMALL)
    layer = 3 * 8 * 16 + 4 * 16 + 8 * 8  # taps, conditioning, skip
    expected = 2 * layer + 8 * 8 + 8 * 8 + 8 * 16  # one residual: nothing reads the last; head
    assert cost(config).multiply_adds == expected
    assert cost(config, "bfloat16").weight_bytes == 2 * expected


def test_limit_is_the_slower_of_reading_and_multiplying():
    config = WaveNetConfig(layers=2, stacks=1, classes=16, **SMALL)
    asked = cost(config)
    one = speed.limit(CEILING, config, "float32", 1, 1)
    assert one == pytest.approx(
        min(CEILING.read_rate(asked.hot_bytes) / asked.hot_bytes, 1e9 / asked.multiply_adds)
    )
    many = speed.limit(CEILING, config, "float32", 64, 2)
    assert many == pytest.approx(2e9 / asked.multiply_adds)  # all reads are shared
    # Three streams on two cores: each core reads once for all of its streams, and one of them has
    # two.
    assert speed.limit(CEILING, config, "float32", 3, 2) == pytest.approx(
        1.5 * 1e9 / asked.multiply_adds
    )
    three = speed.limit(SLOW_MEMORY, config, "float32", 3, 2)
    assert three == pytest.approx(3 * 1e9 / asked.hot_bytes)


def test_a_measurement():
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(layers=2, stacks=1, classes=16, speakers=2, **SMALL)).eval()
    exact = speed.measure(model, "numba", batch=2, seconds=0.01, ceiling=SLOW_MEMORY)
    rounded = speed.measure(model, "numba", weights="bfloat16", seconds=0.01)
    reference = speed.measure(model, "reference", seconds=0.01)
    assert exact.samples_per_second > reference.samples_per_second > 0
    assert exact.real_time == pytest.approx(exact.samples_per_second / 22050)
    allowed = speed.limit(SLOW_MEMORY, model.config, "float32", 2, 1)
    assert exact.share == pytest.approx(exact.samples_per_second / allowed)
    assert exact.error < 1e-5 < rounded.error < 0.1
    assert reference.error < 1e-5
    assert exact.engine in speed.table([exact, rounded, reference])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "huge"}, "shape is 'huge', expected one of predictive, nv-wavenet"),
        ({"engines": ("warp",)}, "engine is 'warp', expected numba or reference"),
        ({"weights": ("int3",)}, "weights is 'int3'"),
        ({"batches": (0,)}, "are 0, expected 1 or more"),
        ({"seconds": -1.0}, "seconds is -1"),
        ({"settings": {"layers": 7}}, "7 layers do not divide into 2 stacks"),
        (
            {"weights": ("float32", "float16")},
            "nothing to measure with weights='float16': numba and reference",
        ),
        (
            {"engines": ("reference",), "weights": ("bfloat16",)},
            "nothing to measure with weights='bfloat16'",
        ),
        (
            {"engines": ("reference",), "batches": (24,)},
            "nothing to measure with weights='float32'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        speed.run(**arguments)


def test_a_linear_model_is_measured_too():
    model = Linear(LinearConfig(order=4)).eval()
    said: list[str] = []
    rows = speed.run(model, batches=(1,), seconds=0.01, say=said.append)
    assert [(row.engine, row.weights) for row in rows] == [
        ("numba", "float32"),
        ("reference", "float32"),
    ]
    assert rows[0].error < 1e-6
    assert any("linear, order 4" in line for line in said)
