"""Training a predictive WaveNet: compiled layers in bfloat16, and fits before the first step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import test_predictive
import torch
from test_predictive import random_codes, random_mel, random_speakers, small
from torch import Tensor

from wavear import MelConfig, PredictiveWaveNet, PredictiveWaveNetConfig, audio, log_mel
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate, read_crop
from wavear.models import fused
from wavear.models.crop_loss import crop_loss, inputs, layout_of
from wavear.models.period import CLASSES, period_loss
from wavear.training import prepare

# ---- fused layers

HALF = 2.0**-8  # a step of bfloat16, relative


def test_the_fused_gate_equals_tanh_times_sigmoid():
    """They differ by bfloat16 rounding of the result and of the factors in its gradient."""
    z = (3 * torch.randn(200, 14)).bfloat16()
    z[0], z[1] = 30.0, -30.0
    gradient = torch.randn(200, 7).bfloat16()
    given, exact = z.clone().requires_grad_(), z.float().requires_grad_()
    units: Any = fused._Gate.apply(given)
    expected = torch.tanh(exact[:, :7]) * torch.sigmoid(exact[:, 7:])
    assert units.dtype == torch.bfloat16
    torch.testing.assert_close(units.float(), expected, rtol=HALF, atol=1e-6)
    units.backward(gradient)
    expected.backward(gradient.float())
    assert given.grad is not None
    assert exact.grad is not None
    # 1 - tanh^2 of a tanh near one has twice the error of the tanh, which is half a step.
    limit = HALF * exact.grad.abs() + 1.5 * HALF * gradient.float().abs().repeat(1, 2) + 1e-6
    assert ((given.grad.float() - exact.grad).abs() <= limit).all()
    # Half of the roundings are up: a bias would add up over a run.
    assert abs((given.grad.float() - exact.grad).mean()) < 3e-4
    assert abs((units.float() - expected).mean()) < 3e-4


@pytest.mark.parametrize("dilation", [1, 5, 0])
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fused_taps_equal_a_loop(dilation, taps):
    """Values are equal; gradients equal float32 sums, rounded once."""
    batch, total, r = 3, 40, 4
    whole = torch.randint(2, 12, (batch, total))
    x = torch.randn(batch, total, r).bfloat16()
    gradient = torch.randn(batch * total, (taps + 1) * r).bfloat16()
    given, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    found: Any = fused._Taps.apply(given.view(-1, r), fused._rows(dilation, whole, taps))
    rows = []
    for b in range(batch):
        for t in range(total):
            at, parts = t, [exact[b, t]]
            for _ in range(taps):
                at = at - (dilation or int(whole[b, at])) if at >= 0 else -1
                parts.insert(0, exact[b, at] if at >= 0 else torch.zeros(r))
            rows.append(torch.cat(parts))
    expected = torch.stack(rows)
    assert torch.equal(found.float(), expected)
    found.backward(gradient)
    expected.backward(gradient.float())
    assert given.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(given.grad.float(), exact.grad, rtol=HALF, atol=1e-6)


def test_interpolated_biases_are_added():
    model: Any = test_predictive.make(small(), torch.float32)
    cond = test_predictive.conditioning(model, 2, 4)
    z = torch.randn(2, cond.samples, 10)
    found = fused.interpolated_onto(z, cond, 3, 13)
    torch.testing.assert_close(found, z + cond.gates_at(3, 13), rtol=0, atol=1e-6)


def gradients(model: Any, dtype: torch.dtype | None) -> tuple[float, dict[str, Tensor]]:
    """Return the mean `crop_loss` of a few crops, and the gradients of all weights."""
    model.zero_grad()
    mel = random_mel(model, 3, 10 + model.lookback + model.lookahead)
    cond = model.condition(mel, random_speakers(model, 3), padded=True)
    codes = random_codes(model, 3, cond.samples)
    noise = 0.3 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(4))
    if dtype is None:
        parameters = model(codes, cond, noise=noise)
    else:
        weights = {
            n: p.to(dtype) for n, p in model.named_parameters() if not n.startswith("conditioning.")
        }
        parameters = torch.func.functional_call(
            model, weights, (codes, cond.to(dtype)), {"noise": noise}
        )
    loss = -model.law.log_prob(parameters.float(), codes).mean()
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": 2, "period_layers": 0},
        {"causal": True, "speakers": 2},
        {"kernel_size": 4, "period_layers": 2},
    ],
    ids=str,
)
def test_fused_layers_train_like_plain_ones(changes, monkeypatch):
    """float32 equals torch up to rounding; bfloat16: loss to 1e-3 nats, gradient to 2 %."""
    sizes = {"residual_channels": 24, "skip_channels": 32, "head_channels": 32, "layers": 3}
    torch.manual_seed(0)
    model: Any = PredictiveWaveNet(small(**{**sizes, **changes}))
    with torch.no_grad():
        model.conditioning.mel_mean.fill_(-4.5)
        model.output.weight.mul_(5)
    calls = []
    layers = fused.gated_layers
    monkeypatch.setattr(fused, "gated_layers", lambda *a: calls.append(1) or layers(*a))
    single_loss, single = gradients(model, None)
    fused_loss, found = gradients(model, torch.bfloat16)
    assert calls == [1, 1]
    monkeypatch.setattr(fused, "usable", lambda *a: False)
    loss, exact = gradients(model, None)
    plain_loss, plain = gradients(model, torch.bfloat16)
    assert calls == [1, 1]
    assert abs(single_loss - loss) < 1e-6
    for name, gradient in exact.items():
        assert (single[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, name
    assert abs(fused_loss - loss) < 1e-3
    assert abs(fused_loss - plain_loss) < 1e-3
    assert found.keys() == exact.keys() == plain.keys()

    def off(one: dict[str, Tensor]) -> float:
        total = sum(float((one[name] - exact[name]).square().sum()) for name in exact)
        return math.sqrt(total / sum(float(g.square().sum()) for g in exact.values()))

    assert 0 < off(found) < 0.02
    assert off(found) < off(plain) + 0.005
    # Single matrices differ more: fewer numbers average out the rounding.
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-6, name


# ---- fits before the first step

RATE, HOP = 8000, 64


def voice(periods: float | np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Return a sawtooth of a few harmonics whose period glides, with a little noise."""
    random = np.random.default_rng(seed)
    phase = np.cumsum(1 / np.broadcast_to(periods, samples)) + random.random()
    saw = sum(np.sin(2 * np.pi * n * phase) / n for n in range(1, 12))
    return (0.2 * saw + 0.003 * random.normal(size=samples)).astype(np.float32)


def glide(samples: int, phase: float) -> np.ndarray:
    """Return periods that glide from 30 to 80 samples and back."""
    return 30 * (80 / 30) ** (0.5 - 0.5 * np.cos(np.linspace(0, 4 * np.pi, samples) + phase))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("voices")
    for i in range(6):
        audio.write(folder / f"{i}.wav", voice(glide(12000, i), 12000, i), RATE)
    return open_corpus(folder, sample_rate=RATE, validation_fraction=0.01).train


def voiced_model(**changes: Any) -> Any:
    mel = MelConfig(
        sample_rate=RATE, n_fft=512, window_length=512, hop_length=HOP, bands=40, fmax=None
    )
    sizes = {
        "layers": 2,
        "residual_channels": 8,
        "period_channels": 32,
        "shortest_period": 20,
        "longest_period": 120,
    }
    torch.manual_seed(0)
    return PredictiveWaveNet(PredictiveWaveNetConfig(sample_rate=RATE, mel=mel, **sizes, **changes))


@pytest.fixture
def _fast(monkeypatch) -> None:
    values = {"_CROPS": 40, "_CROP_SECONDS": 0.25, "_STEPS": 250, "_ROWS": 16, "_FRAMES": 16}
    for name, value in {**values, "_STATISTICS_CROPS": 16, "_GAIN_CROPS": 16}.items():
        monkeypatch.setattr(prepare, name, value)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("causal", [False, True])
def test_prepare_fits_statistics_period_and_gain(recordings, causal, caplog):
    model = voiced_model(causal=causal)
    before = {name: p.clone() for name, p in model.named_parameters()}
    segments = Segments(recordings, layout_of(model, 16 * HOP))
    caplog.set_level("INFO", "wavear")
    prepare.prepare(model, segments, 3)
    assert "median error" in caplog.text
    assert "20 to 120 samples, 67 to 400 Hz" in caplog.text
    # Measure another glide. The period between the middle of a frame and one period before it is
    # the glide's value half a period earlier. It moves by 36 cents from frame to frame.
    periods = glide(12000, 0.5)
    wave = torch.from_numpy(voice(periods, 12000, 9))[None]
    log_lag, voicing = model.conditioning.period_of(log_mel(wave, model.config.mel))
    middle = np.arange(log_lag.shape[1]) * HOP + HOP // 2
    true = torch.from_numpy(
        np.log(periods[(middle - periods[middle] / 2).astype(int).clip(0)])
    ).float()
    cents = 1200 / math.log(2) * (log_lag[0] - true)[10:-10]
    assert cents.abs().median() < 15
    # At most a third of a frame late or early.
    assert (cents * torch.sign(true.diff())[9:-10]).median().abs() < 12
    assert cents.abs().quantile(0.9) < 60
    assert voicing[0, 10:-10].median() > 0.8
    # Nothing else has changed, and the period network is frozen.
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("conditioning.period.")}
    assert not any(p.requires_grad for p in model.conditioning.period.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in changed)
    # Residuals of training crops have the mean 0.6, mels the mean 0 and the deviation 1.
    total, mels = [], []
    for index in range(16, 40):
        codes, cond, mask = inputs(model, collate([segments[index]]), segments.layout)
        residual, _ = model.residuals(codes, cond)
        total.append(residual[mask].abs().clamp(max=15))
        mels.append(log_mel(collate([segments[index]]).waveform, model.config.mel)[0])
    assert 0.5 < torch.cat(total).mean() < 0.7
    normal = model.conditioning.normalised(torch.cat(mels, dim=1)[None])[0]
    assert normal.mean().abs() < 0.2
    assert 0.7 < normal.std() < 1.3


@pytest.mark.usefixtures("_fast")
def test_the_fitted_gain_does_not_depend_on_the_former_gain(recordings):
    model = voiced_model()
    segments = Segments(recordings, layout_of(model, 16 * HOP))
    prepare.fit_gain(model, segments)
    first = model.conditioning.gain.item()
    assert first != 1
    model.conditioning.gain.fill_(100.0)
    prepare.fit_gain(model, segments)
    assert model.conditioning.gain.item() == first
    total = []
    for index in range(16):
        codes, cond, mask = inputs(model, collate([segments[index]]), segments.layout)
        total.append(model.residuals(codes, cond)[0][mask].abs())
    assert torch.cat(total).mean().item() == pytest.approx(
        0.6, rel=0.02
    )  # except for the clipped ones


@pytest.mark.usefixtures("_fast")
def test_fits_to_digital_silence_are_finite(tmp_path, monkeypatch, caplog):
    """Digital silence has no scale, no period and no spread."""
    monkeypatch.setattr(prepare, "_STEPS", 3)
    audio.write(tmp_path / "a.wav", np.zeros(12000, np.float32), RATE)
    audio.write(tmp_path / "b.wav", np.zeros(12000, np.float32), RATE)
    model = voiced_model()
    caplog.set_level("INFO", "wavear")
    recordings = open_corpus(tmp_path, sample_rate=RATE, validation_fraction=0.01).train
    prepare.prepare(model, Segments(recordings, layout_of(model, 16 * HOP)), 0)
    assert "no voiced frame" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert model.conditioning.gain == 1


@pytest.mark.usefixtures("_fast")
def test_prepare_depends_on_its_seed_only(recordings, monkeypatch):
    monkeypatch.setattr(prepare, "_STEPS", 3)

    def fitted(seed: int) -> Any:
        model = voiced_model()
        torch.rand(seed)  # earlier draws have no effect
        state = torch.random.get_rng_state()
        prepare.prepare(model, Segments(recordings, layout_of(model, 16 * HOP)), seed % 2)
        assert torch.equal(torch.random.get_rng_state(), state)
        return model.state_dict()

    first, again, other = fitted(1), fitted(3), fitted(2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    name = "conditioning.period.lag.weight"
    assert not torch.equal(first[name], other[name])


def test_the_period_loss_is_least_at_the_measured_lag():
    grid = torch.linspace(math.log(40), math.log(440), CLASSES)
    log_lag = torch.tensor([[grid[50], grid[90]]])
    correlation = torch.tensor([[0.9, 0.3]])

    def loss(classes: tuple[int, int], voicing: float) -> float:
        logits = torch.zeros(1, CLASSES, 2)
        logits[0, classes[0], 0] = logits[0, classes[1], 1] = 5
        return period_loss(logits, torch.full((1, 2), voicing), log_lag, correlation, grid).item()

    assert loss((50, 90), 0.0) < loss((51, 90), 0.0) < loss((60, 90), 0.0)
    assert loss((50, 90), 0.0) == loss((50, 10), 0.0)  # of an unvoiced frame the lag does not count
    found = torch.tensor(0.6).logit().item()
    assert loss((50, 90), found) < min(loss((50, 90), found - 1), loss((50, 90), found + 1))


@pytest.mark.parametrize("causal", [False, True])
def test_crop_loss_equals_the_slice_of_the_whole(recordings, causal):
    """Crops include the model's look-back and look-ahead, which differ in a causal model."""
    model = voiced_model(causal=causal).double()
    layout = layout_of(model, 10 * HOP)
    assert (layout.lookahead == 0) == causal
    segments = Segments(recordings, layout)
    recording = recordings[0]
    wave = torch.from_numpy(audio.read(recording.path, RATE).numpy())[None]
    codes = model.grid.encode(wave)[:, : layout.length(recording)]
    with torch.no_grad():
        cond = model.condition(log_mel(wave.double(), model.config.mel))
        whole = -model.law.log_prob(model(codes, cond), codes)[0]
        for start, first, last in [layout.cover(recording)[i] for i in (0, 1, 7, -1)]:
            waveform = read_crop(recording, layout, start)
            batch = collate([segments.item(recording, 0, start, first, last, waveform)])
            batch = batch.map(lambda t: t.double() if t.is_floating_point() else t)
            loss, mask = crop_loss(model, batch, layout)
            expected = whole[start + first : start + last]
            torch.testing.assert_close(loss[0, first:last], expected, rtol=0, atol=1e-9)
            assert mask.sum() == last - first
