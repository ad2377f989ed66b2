"""GRU: equal to torch.nn.GRU and to its equations, unbounded context, cost, held-out bits.

`test_families` tests the properties that all families share.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from wavear import GRU, GRUConfig, MelConfig, audio, score
from wavear.benchmark.ceiling import cost
from wavear.data.corpus import open_corpus
from wavear.evaluation import held_out

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
SMALL: dict[str, Any] = {
    "channels": 7,
    "input_channels": 6,
    "head_channels": 9,
    "conditioning_channels": 5,
    "sample_rate": 8000,
}

SHAPES = {
    "one layer": GRUConfig(classes=16, **SMALL),
    "three layers": GRUConfig(layers=3, classes=16, **SMALL),
    "mel": GRUConfig(layers=2, classes=16, mel=MEL, **SMALL),
    "speakers": GRUConfig(classes=16, speakers=3, **SMALL),
    "mel and speakers": GRUConfig(layers=2, classes=3, mel=MEL, speakers=2, **SMALL),
    "mixture": GRUConfig(law="logistic_mixture", mixtures=3, mel=MEL, **SMALL),
    "gaussian, coarse": GRUConfig(layers=2, law="gaussian", coarse_classes=32, speakers=2, **SMALL),
    "laplace, 256 values": GRUConfig(law="laplace", classes=256, **SMALL),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())

# The same float64 sums in another order.
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


def make(config) -> Any:
    torch.manual_seed(0)
    return GRU(config).double()


def make_cond(model, batch, samples) -> Any:
    config = model.config
    if not model.conditioned:
        return None
    frames = -(-samples // MEL.hop_length)
    mel = torch.randn(batch, config.mel.bands, frames, dtype=torch.float64) if config.mel else None
    speaker = torch.arange(batch) % config.speakers if config.speakers else None
    return model.condition(mel, speaker)[:, :, :samples]


def random_codes(model, batch, samples):
    return torch.randint(model.config.classes, (batch, samples))


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_equal_those_of_torch(layers):
    """Compare with `torch.nn.GRU` and `torch.nn.GRUCell` of the same weights, step by step."""
    model = make(GRUConfig(layers=layers, classes=16, speakers=2, **SMALL))
    codes = random_codes(model, 2, 30)
    cells = [torch.nn.GRUCell(6 if i == 0 else 7, 7).double() for i in range(layers)]
    whole = torch.nn.GRU(6, 7, layers, batch_first=True).double()
    whole.load_state_dict(model.gru.state_dict())
    for i, cell in enumerate(cells):
        cell.load_state_dict({n: model.gru.get_parameter(f"{n}_l{i}") for n in cell.state_dict()})
    with torch.no_grad():
        cond = make_cond(model, 2, 30)
        x = model.input(model.shift(codes)) + model.condition_input(cond.transpose(1, 2))
        hidden, _ = whole(x)
        torch.testing.assert_close(
            model.head(hidden, cond.transpose(1, 2)).transpose(1, 2), model(codes, cond), **EXACT
        )
        state = model.init_state(2)
        h = [torch.zeros(2, 7, dtype=torch.float64) for _ in cells]
        previous = torch.full((2,), model.start_code)
        for t in range(30):
            below = x[:, t]
            for i, cell in enumerate(cells):
                below = h[i] = cell(below, h[i])
            torch.testing.assert_close(below, hidden[:, t], **EXACT)
            model.step(previous, state, cond[:, :, 0])
            torch.testing.assert_close(state.h, torch.stack(h, dim=1), **EXACT)
            previous = codes[:, t]


def test_forward_equals_its_equations():
    """The equations are matrix products, one sample at a time."""
    config = GRUConfig(layers=2, classes=16, mel=MEL, **SMALL)
    model = make(config)
    codes = random_codes(model, 1, 24)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    with torch.no_grad():
        cond = make_cond(model, 1, 24)
        expected = model(codes, cond)[0].T
    h = torch.zeros(2, 7, dtype=torch.float64)
    previous = [model.start_code, *codes[0, :-1].tolist()]
    for t in range(24):
        c = cond[0, :, t]
        x = weights["input.weight"][previous[t]] + weights["condition_input.weight"] @ c
        for i in range(2):
            w_x, w_h = (weights[f"gru.weight_{kind}_l{i}"].view(3, 7, -1) for kind in ("ih", "hh"))
            b_x, b_h = (weights[f"gru.bias_{kind}_l{i}"].view(3, 7) for kind in ("ih", "hh"))
            r = torch.sigmoid(w_x[0] @ x + b_x[0] + w_h[0] @ h[i] + b_h[0])
            u = torch.sigmoid(w_x[1] @ x + b_x[1] + w_h[1] @ h[i] + b_h[1])
            n = torch.tanh(w_x[2] @ x + b_x[2] + r * (w_h[2] @ h[i] + b_h[2]))
            x = h[i] = (1 - u) * n + u * h[i]
        first = (
            weights["head.first.weight"] @ x
            + weights["head.first.bias"]
            + weights["head.conditioning.weight"] @ c
        )
        logits = weights["head.last.weight"] @ torch.relu(first) + weights["head.last.bias"]
        torch.testing.assert_close(logits, expected[t], **EXACT)


def test_output_depends_on_exactly_the_earlier_samples():
    """The gradient of the output at t is zero for samples from t on, nonzero for earlier ones."""
    model = make(SHAPES["mel and speakers"])
    total, t = 20, 14
    codes = random_codes(model, 1, total)
    embedded = []
    handle = model.input.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    parameters = model(codes, make_cond(model, 1, total))
    (parameters[0, :, t] * torch.randn(parameters.shape[1], dtype=torch.float64)).sum().backward()
    handle.remove()
    # Position u embeds sample u - 1.
    reach = embedded[0].grad[0].abs().sum(dim=1) > 0
    assert reach.tolist() == [u <= t for u in range(total)]
    assert model.receptive_field is None
    assert model.carries


@pytest.mark.parametrize("name", ["mel and speakers", "mixture"])
def test_substituted_bfloat16_weights_are_used(name):
    """`functional_call` substitutes them; torch.nn.GRU would use its own float32 weights."""
    model = GRU(SHAPES[name]).float()
    codes = random_codes(model, 2, 24)
    cond = make_cond(copy.deepcopy(model).double(), 2, 24).to(torch.bfloat16)
    state = model.init_state(2)
    weights = {
        n: p.bfloat16() for n, p in model.named_parameters() if not n.startswith("conditioning.")
    }
    previous = torch.full((2,), model.start_code)
    found = torch.func.functional_call(model, weights, (codes, cond, state, previous))
    assert found.dtype == torch.bfloat16
    assert state.h.dtype == torch.float32
    found.float().sum().backward()
    assert model.gru.weight_hh_l0.grad is not None
    with torch.no_grad():
        for n, weight in weights.items():
            model.get_parameter(n).copy_(weight)
        exact = model(codes, cond.float())
    assert (found.float() - exact).abs().max() < 0.05


def test_an_initial_distribution_over_values_is_spread_about_silence():
    model = GRU(SHAPES["mixture"])
    torch.testing.assert_close(
        model.head.last.bias.detach(), model.law.initial_bias(), rtol=0, atol=0
    )


def test_the_cost_of_a_sample_equals_a_manual_count():
    model = GRU(GRUConfig(layers=2, channels=7, input_channels=6, head_channels=9, classes=16))
    expected = 3 * 7 * 6 + 3 * 7 * 7 + 2 * 3 * 7 * 7 + 7 * 9 + 9 * 16
    assert model.multiply_adds == expected
    assert model.weight_bytes == 4 * expected
    config = GRUConfig(
        channels=7,
        input_channels=6,
        head_channels=9,
        law="gaussian",
        speakers=2,
        conditioning_channels=5,
    )
    assert GRU(config).multiply_adds == 6 + 5 * 6 + 3 * 7 * (6 + 7) + 5 * 9 + 7 * 9 + 9 * 2


def test_all_weights_but_the_first_layers_input_and_the_conditioning_are_read_for_every_sample():
    config = SHAPES["mixture"]
    layers, h, head = config.layers, config.channels, config.head_channels
    hot = (2 * layers - 1) * 3 * h * h + head * (h + 3 * config.mixtures)
    assert cost(config).hot_bytes == 4 * hot
    assert cost(config, "bfloat16").hot_bytes == 2 * hot


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"channels": 2.5}, "channels is 2.5"),
        ({"input_channels": True}, "input_channels is True"),
        ({"head_channels": -1}, "head_channels is -1"),
    ],
)
def test_invalid_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GRUConfig(**settings)


@pytest.mark.parametrize(("lanes", "world"), [(3, 1), (2, 3)])
def test_held_out_bits_equal_those_of_score(lanes, world, tmp_path, monkeypatch):
    """Bits agree per recording for any lanes; lengths are whole frames: `score` pads others."""
    monkeypatch.setattr(held_out, "_EVALUATION_SEGMENT", 96)
    monkeypatch.setattr(held_out, "_EVALUATION_LANES", {"cpu": lanes})
    model = make(SHAPES["mel"]).eval()
    for n, frames in enumerate((20, 8, 33, 9, 16)):
        noise = np.random.default_rng(n).uniform(-0.5, 0.5, frames * MEL.hop_length)
        audio.write(tmp_path / f"{n}.wav", noise.astype(np.float32), 8000)
    recordings = open_corpus(str(tmp_path), sample_rate=8000, validation_fraction=0.01).train
    assert len(recordings) == 4
    parts = [
        held_out.held_out_bits(model, recordings, rank=rank, world=world) for rank in range(world)
    ]
    for n, recording in enumerate(recordings):
        waveform = audio.read(recording.path, 8000)
        assert sum(part.samples[n] for part in parts) == len(waveform) == recording.frames
        expected = -score(model, waveform).sum().item() / np.log(2)
        assert sum(part.total[n] for part in parts) == pytest.approx(expected, rel=1e-6)
