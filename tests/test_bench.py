"""`wavear bench`: costs by hand, limits, and the error of rounded weights."""

from typing import Any

import pytest
import torch

from wavear import GRU, GRUConfig, Linear, LinearConfig, MelConfig, WaveNet, WaveNetConfig
from wavear.benchmark import speed
from wavear.benchmark.ceiling import Ceiling, cost

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


def test_int8_costs_a_byte_for_every_weight_and_a_scale_for_every_output():
    config = WaveNetConfig(
        layers=2, stacks=1, kernel_size=3, residual_channels=8, skip_channels=9, head_channels=10,
        classes=16,
    )  # fmt: skip
    outputs = 2 * 3 * 16 + 8 + 2 * 9 + 10 + 16  # taps, one residual, skips, head
    asked, whole = cost(config, "int8"), cost(config)
    assert asked.multiply_adds == whole.multiply_adds
    assert asked.weight_bytes == whole.weight_bytes // 4 + 4 * outputs
    # One layer is a table; the other reads its two past taps every second sample.
    layers = (8 * 16 + 4 * 16) * 2 + 8 * 8 + 4 * 8 + 2 * (8 * 9 + 4 * 9)
    assert asked.hot_bytes == layers + 9 * 10 + 4 * 10 + 10 * 16 + 4 * 16


def test_limit_is_the_slower_of_reading_and_multiplying():
    config = WaveNetConfig(layers=2, stacks=1, classes=16, **SMALL)
    asked = cost(config)
    one = speed.limit(CEILING, config, "float32", 1, 1)
    assert one == pytest.approx(
        min(CEILING.read_rate(asked.hot_bytes) / asked.hot_bytes, 1e9 / asked.multiply_adds)
    )
    many = speed.limit(CEILING, config, "float32", 64, 2)
    assert many == pytest.approx(2e9 / asked.multiply_adds)  # the streams share all reads
    # Three streams on two cores: each core reads once for all of its streams, and one core has two.
    assert speed.limit(CEILING, config, "float32", 3, 2) == pytest.approx(
        1.5 * 1e9 / asked.multiply_adds
    )
    three = speed.limit(SLOW_MEMORY, config, "float32", 3, 2)
    assert three == pytest.approx(3 * 1e9 / asked.hot_bytes)


def test_a_measurement_has_speed_share_and_error():
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
    gru = speed.measure(GRU(GRUConfig(channels=8)).eval(), weights="int8", seconds=0.01)
    assert 1e-5 < gru.error < 1
    # On audio drawn from the model, the expected loss is the divergence between the distributions,
    # which is at least zero; the estimate is noisy.
    assert -1e-3 < rounded.cost < 0.01
    assert f"{rounded.cost:+.5f}" in speed.table([exact, rounded, reference])


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
def test_unusable_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        speed.measure_all(**arguments)


def test_linear_models_are_measured():
    model = Linear(LinearConfig(order=4)).eval()
    report = speed.measure_all(model, batches=(1,), seconds=0.01)
    measured = [(row.engine, row.weights) for row in report.rows]
    assert measured == [("numba", "float32"), ("reference", "float32")]
    assert report.rows[0].error < 1e-6
    assert "linear, order 4" in str(report)
