"""The predictive WaveNet: step = forward = the equations, reach, states, configurations.

The promises of every family are tested in `test_families`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wavear
from wavear import MelConfig, PredictiveWaveNet, PredictiveWaveNetConfig
from wavear.models.frames import FrameConditioning
from wavear.models.info import describe
from wavear.models.predictive import folded

SMALL: dict[str, Any] = {
    "mixtures": 3,
    "conditioning_channels": 7,
    "conditioning_context": 1,
    "layers": 2,
    "residual_channels": 5,
    "skip_channels": 6,
    "head_channels": 7,
    "prediction_order": 6,
    "sub_frames": 2,
    "shortest_period": 8,
    "longest_period": 40,
    "recent_residuals": 5,
    "period_residuals": 2,
    "period_channels": 6,
}


def mel_config(rate: int = 16000, hop: int = 24, **changes: Any) -> MelConfig:
    return MelConfig(**{
        "sample_rate": rate, "n_fft": 256, "window_length": 256, "hop_length": hop, "bands": 10,
        "fmin": 60.0, "fmax": None, **changes,
    })  # fmt: skip


def small(rate: int = 16000, hop: int = 24, **changes: Any) -> PredictiveWaveNetConfig:
    return PredictiveWaveNetConfig(
        **{"sample_rate": rate, "mel": mel_config(rate, hop), **SMALL, **changes}
    )


AUTOMATIC = dict.fromkeys(
    ("prediction_order", "sub_frames", "shortest_period", "longest_period"), 0
)
CONFIGS = {
    "kernel 3": small(),
    "kernel 2": small(kernel_size=2),
    "kernel 4": small(kernel_size=4),
    "kernel 5, two periods": small(kernel_size=5, period_layers=2),
    "no period": small(period_layers=0),
    "two periods": small(period_layers=2, layers=1),
    "causal": small(causal=True),
    "causal, kernel 2, two periods": small(causal=True, kernel_size=2, period_layers=2),
    "speakers": small(speakers=3),
    "hop that sub-frames do not divide": small(hop=25, sub_frames=4),
    "a sub-frame for each sample": small(hop=7, sub_frames=7),
    "wide context": small(conditioning_context=4, causal=True, speakers=2),
    "16 kHz": small(hop=50, **AUTOMATIC),
    "24 kHz": small(24000, 75, **AUTOMATIC),
    "44.1 kHz": small(44100, 110, **AUTOMATIC),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: PredictiveWaveNetConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Return a model whose lags, voicing and mixtures change by frame, as after training."""
    torch.manual_seed(seed)
    model = PredictiveWaveNet(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks"):
                parameter.mul_(2)
        model.conditioning.period.lag.weight.mul_(30)
        model.conditioning.period.voicing.weight.mul_(8)
        model.output.weight.mul_(5)
        model.conditioning.mel_mean.fill_(-4.5)
        model.conditioning.mel_deviation.fill_(0.8)
        model.conditioning.gain.fill_(0.7)
    return model.to(dtype).eval()


def random_mel(model: Any, batch: int, frames: int, seed: int = 1) -> Tensor:
    """Return log-mels of noise whose spectrum changes from frame to frame."""
    noise = torch.randn(
        batch, model.config.mel.bands, frames, generator=torch.Generator().manual_seed(seed)
    )
    return (noise - 4.5).to(next(model.parameters()).dtype)


def random_speakers(model: Any, batch: int) -> Tensor | None:
    return torch.arange(batch) % model.config.speakers if model.config.speakers else None


@torch.no_grad()
def conditioning(model: Any, batch: int, frames: int, seed: int = 1) -> FrameConditioning:
    return model.condition(random_mel(model, batch, frames, seed), random_speakers(model, batch))


def random_codes(model: Any, batch: int, samples: int, seed: int = 2) -> Tensor:
    """Return codes of noise at the level of the scale, which clips few residuals."""
    spread = torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed)) * 0.03
    return model.grid.encode(spread.clamp(-1, 1))


def frames_for(config: PredictiveWaveNetConfig, samples: int) -> int:
    return -(-samples // config.mel.hop_length)  # type: ignore[union-attr]


def long_enough(config: PredictiveWaveNetConfig) -> int:
    """Return a number of samples that wraps short rings; 150 for long ones, for speed."""
    return config.longest_period + 60 if config.longest_period < 100 else 150


def start(model: Any, batch: int) -> Tensor:
    return torch.full((batch,), model.start_code)


# ---- step and forward


@torch.no_grad()
def written_out(
    model: Any, codes: np.ndarray, cond: FrameConditioning, noise: np.ndarray | None = None
) -> np.ndarray:
    """Compute the model's equations for one stream, sample by sample from the whole past: (T, 3 K).

    Round residuals and the network's input to float32, as the model does.
    """
    config = model.config
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    coefficients, scale, lag, voicing = (each[0].double().numpy() for each in cond.per_sample())
    gates = cond.gates_at(0, config.gates)[0].numpy()
    r, near, taps = config.residual_channels, config.period_residuals, config.kernel_size
    x, e, seen_e, found = {}, {}, {}, []
    inputs: list[dict[int, np.ndarray]] = [{} for _ in config.dilations]

    def clipped(residual: float) -> float:
        return 0.7 * min(max(residual, -15.0), 15.0)

    for t in range(len(codes)):
        p = -sum(coefficients[t, k] * x.get(t - 1 - k, 0.0) for k in range(config.prediction_order))
        s = scale[t]
        back = math.ceil(lag[t])
        w = back - lag[t]
        seen = [clipped(seen_e.get(t - n, 0.0)) for n in range(config.recent_residuals, 0, -1)]
        seen += [
            0.3 * math.asinh(p / s),
            0.3 * math.asinh(x.get(t - 1, 0.0) / s),
            (math.log(s) + 6) / 2,
        ]
        for n in range(-near, near + 1):
            a, b, c, d = (clipped(seen_e.get(t - back + n + j, 0.0)) for j in (-1, 0, 1, 2))
            cubic = (
                b
                + w * (c - a) / 2
                + w**2 * (a - 2.5 * b + 2 * c - d / 2)
                + w**3 * (d - a + 3 * (b - c)) / 2
            )
            seen.append(cubic * voicing[t])
        seen += [0.3 * math.asinh(x.get(t - back, 0.0) / s), 2 * voicing[t] - 1]
        h = (
            weights["input.weight"] @ np.array(seen, np.float32).astype(np.float64)
            + weights["input.bias"]
        )
        units = []
        for i, dilation in enumerate(config.dilations):
            inputs[i][t] = h
            at, past = t, [h]
            for _ in range(taps - 1):
                at -= dilation or (round(lag[at]) if at >= 0 else 0)
                past.insert(0, inputs[i].get(at, np.zeros(r)))
            z = (
                weights[f"blocks.{i}.taps.weight"] @ np.concatenate(past)
                + gates[t, 2 * r * i : 2 * r * (i + 1)]
            )
            units.append(np.tanh(z[:r]) / (1 + np.exp(-z[r:])))
            if i < len(config.dilations) - 1:
                h = (
                    h
                    + weights[f"blocks.{i}.residual.weight"] @ units[-1]
                    + weights[f"blocks.{i}.residual.bias"]
                )
        skip = (
            weights["skip.weight"] @ np.concatenate(units)
            + weights["skip.bias"]
            + gates[t, 2 * r * len(units) :]
        )
        hidden = weights["hidden.weight"] @ np.maximum(skip, 0) + weights["hidden.bias"]
        out = weights["output.weight"] @ np.maximum(hidden, 0) + weights["output.bias"]
        logits, means, scales = out.reshape(3, -1)
        found.append(np.concatenate([logits, p + s * means, math.log(s) + np.clip(scales, -7, 5)]))
        x[t] = (int(codes[t]) - 32768) / 32768
        e[t] = float(np.float32((x[t] - p) / s))
        seen_e[t] = float(np.float32(e[t]) + np.float32(0 if noise is None else noise[t]))
    return np.stack(found)


@pytest.mark.parametrize("noisy", [False, True], ids=["", "noise"])
@pytest.mark.parametrize(
    "name", ["kernel 3", "kernel 5, two periods", "causal, kernel 2, two periods", "speakers"]
)
@torch.no_grad()
def test_forward_equals_the_equations(name, noisy):
    model = make(CONFIGS[name])
    cond = conditioning(model, 1, 9)
    codes = random_codes(model, 1, cond.samples)
    codes[0, 100:105] = 65535  # clipped residuals, and the end of the grid
    noise = 0.4 * torch.randn(1, cond.samples) if noisy else None
    expected = written_out(
        model, codes[0].numpy(), cond, None if noise is None else noise[0].numpy()
    )
    found = model(codes, cond, noise=noise)[0].T.numpy()
    # asinh and the cubic are written in another form.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@configs
@torch.no_grad()
def test_step_and_forward_in_pieces_equal_the_whole(config):
    """In float64, with the same sums in another order, and long enough for the rings to wrap."""
    model = make(config)
    cond = conditioning(model, 3, frames_for(config, long_enough(config)))
    total = cond.samples
    codes = random_codes(model, 3, total)
    whole = model(codes, cond)
    assert whole.shape == (3, 9, total)
    assert cond.per_sample()[2].unique().numel() > 20  # the test needs lags that differ
    stepped, previous = model.init_state(3), start(model, 3)
    for t in range(total):
        found = model.step(previous, stepped, cond[:, :, t])
        torch.testing.assert_close(found, whole[:, :, t], rtol=0, atol=1e-12)
        previous = codes[:, t]
    expected = model.export_state(stepped)
    for cuts in ([0, total], sorted([0, 1, 2, config.mel.hop_length, 55, total - 1, total])):
        state, previous, parts = model.init_state(3), start(model, 3), []
        for a, b in itertools.pairwise(cuts):
            parts.append(model(codes[:, a:b], cond[:, :, a:b], state, previous))
            previous = codes[:, b - 1]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
        found = model.export_state(state)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


# ---- causality and reach


@configs
def test_gradients_with_respect_to_noise_vanish_at_and_after_the_sample(config):
    """Noise at t is added to the residual of sample t, which outputs up to t do not depend on."""
    model = make(config)
    cond = conditioning(model, 1, frames_for(config, long_enough(config)))
    codes = random_codes(model, 1, cond.samples)
    for t in (1, cond.samples - 1):
        noise = torch.zeros(1, cond.samples, requires_grad=True)
        law = model(codes, cond, noise=noise)[0, :, t]
        (law * torch.randn(len(law), dtype=law.dtype)).sum().backward()
        assert noise.grad is not None
        reached = noise.grad[0] != 0
        assert not reached[t:].any()
        assert reached[max(0, t - config.recent_residuals) : t].all()


@torch.no_grad()
def test_noise_does_not_change_prediction_and_target():
    model = make(CONFIGS["kernel 3"])
    cond = conditioning(model, 1, 4)
    codes = random_codes(model, 1, cond.samples)
    model.output.weight.zero_()  # leaves only the prediction
    noise = 3 * torch.randn(1, cond.samples)
    assert torch.equal(model(codes, cond, noise=noise), model(codes, cond))
    given = model.input_noise(codes, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(given["codes"], codes)
    assert 0 < given["noise"].std() < 0.6
    many = model.input_noise(codes.expand(400, -1), 0.5, torch.Generator().manual_seed(0))[
        "noise"
    ].std(dim=1)
    assert many.min() < 0.05
    assert 0.45 < many.max() < 0.6  # deviations from 0 to the amount, a row each


@pytest.mark.parametrize("name", ["kernel 4", "no period", "two periods", "causal", "16 kHz"])
@torch.no_grad()
def test_a_crop_after_the_receptive_field_equals_the_whole(name):
    """A sample further back changes nothing; the samples inside the field do."""
    config = CONFIGS[name]
    model = make(config)
    field = model.receptive_field
    hop = config.mel.hop_length  # type: ignore[union-attr]
    frames = frames_for(config, field + 200) + model.lookback
    mel = random_mel(model, 1, frames + model.lookahead + model.lookback)
    cond = model.condition(mel, padded=True)
    codes = random_codes(model, 1, cond.samples)
    whole = model(codes, cond)
    assert cond.samples == frames * hop
    # From the middle of a frame, with a slice of the conditioning.
    begin = 29
    part = model(codes[:, begin:], cond[:, :, begin:])
    torch.testing.assert_close(part[:, :, field:], whole[:, :, begin + field :], rtol=0, atol=1e-12)
    assert not torch.allclose(
        part[:, :, 1:50], whole[:, :, begin + 1 : begin + 50], rtol=0, atol=1e-6
    )
    # From frame 2 on, with a crop of the mel and its context.
    crop = model.condition(mel[:, :, 2:], padded=True)
    part = model(codes[:, 2 * hop :], crop)
    torch.testing.assert_close(
        part[:, :, field:], whole[:, :, 2 * hop + field :], rtol=0, atol=1e-12
    )
    changed = codes.clone()
    changed[0, 5] += 9000
    moved = (model(changed, cond) != whole)[0].any(dim=0)
    assert not moved[5 + field + 1 :].any()
    assert moved[6:12].all()


@pytest.mark.parametrize(("hop", "context"), [(1, 2), (7, 0), (24, 5)])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_mel_frame_reaches_from_lookahead_to_lookback(hop, causal, context):
    """Frame f changes the samples of frames f - lookahead to f + lookback, both included."""
    model = make(small(hop=hop, causal=causal, conditioning_context=context, sub_frames=1))
    assert (model.lookahead == 0) == causal
    frames, f = 40, 18
    mel = random_mel(model, 1, frames)
    changed = mel.clone()
    changed[:, :, f] += 1
    before, after = model.condition(mel).dense(), model.condition(changed).dense()
    assert before.shape == (1, model.condition(mel).shape[1], frames * hop)
    moved = (before != after).any(dim=1)[0].reshape(frames, hop).any(dim=1)
    assert not moved[: f - model.lookahead].any()
    assert not moved[f + model.lookback + 1 :].any()
    assert moved[f]
    if hop > 1:  # a single sample of a frame lies in its centre, and has nothing of its neighbours
        assert moved[f - model.lookahead]
        assert moved[f + model.lookback]


def test_muon_trains_the_matrices_inside_the_network():
    model = make(CONFIGS["speakers"])
    muon = {id(p) for p in model.muon_parameters()}
    named = {name for name, p in model.named_parameters() if id(p) in muon}
    layers = [
        f"blocks.{i}.{part}.weight"
        for i in range(3)
        for part in ("taps", "residual")
        if (i, part) != (2, "residual")
    ]
    assert named == {*layers, "skip.weight", "hidden.weight"}


# ---- the configuration


def test_lengths_follow_the_sample_rate():
    """The lengths are tuned at 22.05 kHz; at other rates they last as long."""
    expected = {  # rate, hop: order, sub-frames, shortest and longest period
        (22050, 256): (32, 4, 40, 441),
        (16000, 200): (24, 4, 29, 320),
        (24000, 300): (34, 4, 44, 480),
        (44100, 512): (64, 4, 80, 882),
        (8000, 80): (12, 3, 15, 160),
    }
    for (rate, hop), lengths in expected.items():
        config = PredictiveWaveNetConfig(
            sample_rate=rate, mel=MelConfig(sample_rate=rate, hop_length=hop, fmax=None)
        )
        found = (
            config.prediction_order,
            config.sub_frames,
            config.shortest_period,
            config.longest_period,
        )
        assert found == lengths


def test_sizes_of_the_default():
    model = PredictiveWaveNet(PredictiveWaveNetConfig(mel=MelConfig()))
    # About 100,000 multiply-adds, 48,000 parameters of the period network.
    assert 85_000 < model.multiply_adds < 115_000
    assert 45_000 < sum(p.numel() for p in model.conditioning.period.parameters()) < 60_000
    assert model.config.dilations == (1, 3, 9, 27, 0)
    assert model.receptive_field == 2 * (1 + 3 + 9 + 27 + 441) + (441 + 4 + 2) + 32 + 1
    assert model.lookahead == 4
    assert PredictiveWaveNet(PredictiveWaveNetConfig(mel=MelConfig(), causal=True)).lookahead == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mel": None}, "takes its prediction from a mel: give one, or use wavenet"),
        ({"law": "gaussian"}, "law is 'gaussian'"),
        ({"law": "categorical"}, "law is 'categorical'"),
        ({"classes": 256}, "classes is 256"),
        ({"coarse_classes": 16}, "coarse_classes is 16"),
        ({"pre_emphasis": 0.9}, "pre_emphasis is 0.9"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 13}, "layers is 13: .* at most 12"),
        ({"period_layers": -1}, "period_layers is -1"),
        ({"kernel_size": 1}, "kernel_size is 1"),
        ({"residual_channels": 2.5}, "residual_channels is 2.5"),
        ({"prediction_order": -3}, "prediction_order is -3"),
        ({"sub_frames": 25}, "sub_frames is 25, and a frame has 24 samples"),
        ({"shortest_period": 5}, "shortest_period is 5, .* at least 6"),
        ({"longest_period": 8}, "longest_period is 8, .* at least 9"),
        ({"longest_period": 16001}, "longest_period is 16001"),
        ({"period_residuals": 0}, "period_residuals is 0"),
        ({"recent_residuals": 0}, "recent_residuals is 0"),
        ({"sample_rate": 22050}, "16000 Hz audio and the model of 22050 Hz"),
    ],
    ids=str,
)
def test_invalid_configurations_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**settings) if "sample_rate" not in settings else small(22050, mel=mel_config(16000))
    assert "\n" not in str(error.value)


def test_generation_without_a_mel_is_refused():
    model = make(CONFIGS["kernel 3"])
    with pytest.raises(ValueError, match="the model needs a mel: 10 bands"):
        wavear.generate(model, samples=100)


# ---- files


def test_info_describes_a_predictive_wavenet(tmp_path):
    model = make(CONFIGS["kernel 3"], torch.float32)
    model.save(tmp_path / "model", training={"step": 7, "speakers": []})
    rows = dict(describe(tmp_path / "model"))
    assert [row for row in rows if row.startswith("training")] == ["training step"]
    assert rows["model"].startswith("predictive")
    assert rows["mel look-ahead"] == "4 frames (6 ms)"
    assert rows["longest_period"] == "40"
    assert rows["multiply-adds per sample"].startswith(f"{model.multiply_adds:,}")
    make(CONFIGS["causal"], torch.float32).save(tmp_path / "causal")
    assert dict(describe(tmp_path / "causal"))["mel look-ahead"] == "0 frames (0 ms)"


def test_a_filter_that_clips_does_not_stay_at_full_scale():
    """The filter is stable: poles of radius 0.95 at 0.05, 0.1 and 0.15 of the sampling rate."""
    polynomial = np.ones(1)
    for frequency in (0.05, 0.1, 0.15):
        pole = 0.95 * np.exp(2j * np.pi * frequency)
        polynomial = np.convolve(polynomial, [1, -2 * pole.real, abs(pole) ** 2])
    coefficients = torch.from_numpy(polynomial[:0:-1].copy())

    def last(fold: Any) -> float:
        x = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
        for _ in range(500):
            x = torch.cat([x, fold(-(x[-6:] * coefficients).sum()).clamp(-1, 1)[None]])
        return float(x[-100:].square().mean().sqrt())

    assert last(lambda p: p) == 1
    assert last(folded) < 0.5


def test_only_predictions_beyond_full_scale_are_folded():
    p = torch.tensor([-3.0, -2.0, -1.25, -1.0, 0.5, 1.0, 1.5, 2.5])
    assert folded(p).tolist() == [0, 0, -0.75, -1, 0.5, 1, 0.5, 0]
