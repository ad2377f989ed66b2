"""The contract of a model, held by the GRU: torch.nn.GRU, step = forward, a state that is carried, causality."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from wavear import GRU, GRUConfig, MelConfig, Stream, audio, generate, load, score
from wavear.benchmark import speed
from wavear.data.corpus import open_corpus
from wavear.evaluation import held_out
from wavear.generation.cpu.ceiling import cost
from wavear.models.info import multiply_adds

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


def piece(cond, start, stop):
    return cond if cond is None or cond.shape[2] == 1 else cond[:, :, start:stop]


def random_codes(model, batch, samples):
    return torch.randint(model.config.classes, (batch, samples))


def stepped(model, codes, cond, state, previous=None):
    """Parameters (B, P, T) by `step`."""
    previous = torch.full((len(codes),), model.start_code) if previous is None else previous
    found = []
    for t in range(codes.shape[1]):
        cond_t = None if cond is None else cond[:, :, t if cond.shape[2] > 1 else 0]
        found.append(model.step(previous, state, cond_t))
        previous = codes[:, t]
    return torch.stack(found, dim=2)


@shapes
def test_step_equals_forward(config):
    model = make(config)
    codes = random_codes(model, 3, 36)
    with torch.no_grad():
        cond = make_cond(model, 3, 36)
        torch.testing.assert_close(
            stepped(model, codes, cond, model.init_state(3)), model(codes, cond), **EXACT
        )


@pytest.mark.parametrize("layers", [1, 3])
def test_the_layers_are_those_of_torch(layers):
    """Against `torch.nn.GRU` and `torch.nn.GRUCell` with the same weights, step by step."""
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


def test_the_network_is_that_of_its_equations():
    """Written out with matrix products, one sample at a time."""
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


CUTS = [[0, 36], [0, 1, 2, 36], [0, 13, 20, 35, 36], list(range(37))]


@shapes
@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "early", "odd", "one by one"])
def test_forward_in_pieces_is_the_whole(config, cuts):
    """The state goes along, in place, to where as many steps would bring it."""
    model = make(config)
    codes = random_codes(model, 2, 36)
    with torch.no_grad():
        cond = make_cond(model, 2, 36)
        state, steps = model.init_state(2), model.init_state(2)
        memory = state.h.data_ptr()
        previous = torch.full((2,), model.start_code)
        found = []
        for start, stop in pairwise(cuts):
            found.append(model(codes[:, start:stop], piece(cond, start, stop), state, previous))
            stepped(model, codes[:, start:stop], piece(cond, start, stop), steps, previous)
            torch.testing.assert_close(state.h, steps.h, **EXACT)
            previous = codes[:, stop - 1]
        torch.testing.assert_close(torch.cat(found, dim=2), model(codes, cond), **EXACT)
    assert state.h.data_ptr() == memory


@shapes
def test_prefill_is_as_many_steps(config, monkeypatch):
    monkeypatch.setattr("wavear.models.base._PREFILL", 10)
    model = make(config)
    codes = random_codes(model, 2, 37)
    with torch.no_grad():
        cond = make_cond(model, 2, 37)
        filled, steps = model.init_state(2), model.init_state(2)
        model.prefill(model.shift(codes), filled, cond)
        stepped(model, codes, cond, steps)
        torch.testing.assert_close(filled.h, steps.h, **EXACT)
        assert steps.h.abs().max() > 0.01


@shapes
def test_output_depends_on_all_of_the_past_and_on_nothing_else(config):
    """The gradient of the output at t with respect to each sample: zero from t on, else not."""
    model = make(config)
    total, t = 20, 14
    codes = random_codes(model, 1, total)
    embedded = []
    handle = model.input.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    parameters = model(codes, make_cond(model, 1, total))
    (parameters[0, :, t] * torch.randn(parameters.shape[1], dtype=torch.float64)).sum().backward()
    handle.remove()
    # The embedding at position u is that of the sample u - 1.
    reach = embedded[0].grad[0].abs().sum(dim=1) > 0
    assert reach.tolist() == [u <= t for u in range(total)]
    assert model.receptive_field is None
    assert model.carries


@shapes
def test_rows_of_a_batch_do_not_meet(config):
    model = make(config)
    codes = random_codes(model, 3, 20)
    with torch.no_grad():
        cond = make_cond(model, 3, 20)
        state = model.init_state(3)
        previous = random_codes(model, 3, 1)[:, 0]
        together = model(codes, cond, state, previous)
        for row in range(3):
            alone = model.init_state(1)
            own = None if cond is None else cond[row : row + 1]
            found = model(codes[row : row + 1], own, alone, previous[row : row + 1])
            torch.testing.assert_close(found, together[row : row + 1], **EXACT)
            torch.testing.assert_close(alone.h, state.h[row : row + 1], **EXACT)


@pytest.mark.parametrize("batch", [1, 3])
def test_no_gradient_flows_through_a_carried_state(batch):
    """And the gradient of a piece is the same whether the state moved on before it was taken or not."""
    model = make(SHAPES["mel and speakers"])
    codes = random_codes(model, batch, 40)
    cond = make_cond(model, batch, 40).detach()
    state = model.init_state(batch)
    previous = torch.full((batch,), model.start_code)
    model(codes[:, :10], cond[:, :, :10], state, previous).sum().backward()
    assert not state.h.requires_grad
    begin = state.h.clone()
    assert begin.abs().max() > 0.01
    model.zero_grad()
    embedded = []
    handle = model.input.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    first = model(codes[:, 10:20], cond[:, :, 10:20], state, codes[:, 9])
    second = model(codes[:, 20:], cond[:, :, 20:], state, codes[:, 19])
    handle.remove()
    second.square().sum().backward()
    assert embedded[0].grad is None
    assert embedded[1].grad is not None
    model.zero_grad()
    first.square().sum().backward()
    late = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # The same piece from the same state, and its gradient at once.
    again = model.import_state({"h": begin})
    model.zero_grad()
    model(codes[:, 10:20], cond[:, :, 10:20], again, codes[:, 9]).square().sum().backward()
    assert len(late) >= 10
    for name, gradient in late.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **EXACT)
    # Nor into a state that was made with one.
    start = torch.zeros(batch, 2, 7, dtype=torch.float64, requires_grad=True)
    model(
        codes[:, :10], cond[:, :, :10], model.import_state({"h": start}), previous
    ).sum().backward()
    assert start.grad is None


@shapes
def test_a_state_is_exported_batch_first_and_goes_on(config):
    model = make(config)
    codes = random_codes(model, 3, 30)
    with torch.no_grad():
        cond = make_cond(model, 3, 30)
        state = model.init_state(3)
        start = torch.full((3,), model.start_code)
        model(codes[:, :12], piece(cond, 0, 12), state, start)
        tensors = model.export_state(state)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {"h": (3, config.layers, 7)}
        order = [2, 0]
        mixed = model.import_state({name: t[order] for name, t in tensors.items()})
        rows = None if cond is None else cond[order]
        found = model(codes[order, 12:], piece(rows, 12, 30), mixed, codes[order, 11])
        torch.testing.assert_close(found, model(codes, cond)[order, :, 12:], **EXACT)
        # A copy, of any precision.
        assert tensors["h"].data_ptr() != state.h.data_ptr()
        read = model.import_state({"h": tensors["h"].float()})
        assert read.h.dtype == torch.float64
        torch.testing.assert_close(read.h, tensors["h"], rtol=0, atol=1e-7)


@shapes
def test_every_parameter_learns(config):
    """No parameter is without a gradient: none is wasted, and distributed training needs no search for unused ones."""
    model = make(config)
    codes = random_codes(model, 2, 24)
    cond = make_cond(model, 2, 24)
    nats = -model.law.log_prob(model(codes, cond), codes)
    nats.sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == len(
        list(model.parameters())
    )


@pytest.mark.parametrize("name", ["mel and speakers", "mixture"])
def test_rounded_weights_put_in_by_training_are_the_ones_used(name):
    """As `functional_call` puts them in; torch.nn.GRU itself would go on with its own."""
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


def test_a_law_over_values_begins_spread_about_silence():
    model = GRU(SHAPES["mixture"])
    torch.testing.assert_close(
        model.head.last.bias.detach(), model.law.initial_bias(), rtol=0, atol=0
    )


def test_conditioning_and_speaker_reach_the_input_and_the_head():
    model = make(SHAPES["mel and speakers"])
    codes = random_codes(model, 1, 24)
    mel = torch.randn(1, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        base = model(codes, model.condition(mel, torch.tensor([0])))
        assert (model(codes, model.condition(mel + 1, torch.tensor([0]))) - base).abs().max() > 1e-3
        assert (model(codes, model.condition(mel, torch.tensor([1]))) - base).abs().max() > 1e-3
        for part in (model.condition_input, model.head.conditioning):
            kept = part.weight.clone()
            part.weight.zero_()
            assert (model(codes, model.condition(mel, torch.tensor([0]))) - base).abs().max() > 1e-3
            part.weight.copy_(kept)


def test_the_cost_of_a_sample_by_hand():
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


@shapes
def test_the_cost_is_counted_the_same_everywhere(config):
    model = GRU(config)
    asked = cost(config)
    assert asked.multiply_adds == model.multiply_adds == multiply_adds(model)[0]
    assert asked.weight_bytes == model.weight_bytes
    # Read for every sample: all but the first layer's input, and what of the conditioning is
    # multiplied ahead.
    layers, h, head = config.layers, config.channels, config.head_channels
    hot = (2 * layers - 1) * 3 * h * h + head * (h + model.law.channels)
    assert asked.hot_bytes == 4 * hot
    assert cost(config, "bfloat16").hot_bytes == 2 * hot


def test_wavear_bench_measures_it():
    model = GRU(GRUConfig(classes=16, speakers=2, **SMALL)).eval()
    exact = speed.measure(model, "reference", seconds=0.01)
    assert exact.samples_per_second > 0
    assert exact.error < 1e-5
    assert {"gru", "gru-512", "wavernn"} <= set(speed.SHAPES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"channels": 2.5}, "channels is 2.5"),
        ({"input_channels": True}, "input_channels is True"),
        ({"head_channels": -1}, "head_channels is -1"),
        ({"classes": 1}, "classes is 1"),
        ({"law": "cauchy"}, "law is 'cauchy'"),
        ({"mel": MEL, "sample_rate": 16000}, "8000 Hz audio and the model of 16000 Hz"),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GRUConfig(**settings)


@pytest.mark.parametrize("name", ["mel and speakers", "mixture", "gaussian, coarse"])
def test_a_checkpoint_round_trip(name, tmp_path):
    model = GRU(SHAPES[name]).eval()
    model.save(tmp_path / "model")
    found = load(tmp_path / "model")
    assert isinstance(found, GRU)
    assert found.config == model.config
    codes = random_codes(model, 2, 24)
    with torch.no_grad():
        cond = make_cond(copy.deepcopy(model).double(), 2, 24).float()
        torch.testing.assert_close(found(codes, cond), model(codes, cond), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["one layer", "mixture", "gaussian, coarse"])
def test_scores_by_forward_and_by_steps_are_one(name, monkeypatch):
    """Over the cuts of `score`, and of what a seed makes."""
    monkeypatch.setattr(
        sys.modules["wavear.generation.scoring"], "PARALLEL_CHUNK", 100
    )  # (`wavear.generate` is the function)
    model = GRU(SHAPES[name]).eval()
    mel = torch.randn(1, 5, 25) if model.config.mel else None
    speaker = 1 if model.config.speakers else None
    audio, made = generate(
        model,
        mel,
        samples=250,
        speaker=speaker,
        seed=3,
        engine="reference",
        return_log_probability=True,
    )
    waveform = model.grid.decode(model.grid.encode(audio))
    found = score(model, waveform, mel, speaker=speaker, engine="parallel")
    # float32 sums in another order; a narrow bin of 16 bits magnifies them.
    np.testing.assert_allclose(
        found, score(model, waveform, mel, speaker=speaker, engine="reference"), atol=1e-3
    )
    np.testing.assert_allclose(found, made, atol=1e-3)


@pytest.mark.parametrize(("lanes", "world"), [(1, 1), (3, 1), (2, 3), (64, 1)])
def test_held_out_bits_are_those_of_score(lanes, world, tmp_path, monkeypatch):
    """Per recording, whatever others run beside it; the lengths are whole frames, as `score` extends what is not."""
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


@pytest.mark.parametrize("name", ["speakers", "laplace, 256 values"])
def test_a_stream_saved_and_loaded_goes_on(name, tmp_path):
    model = GRU(SHAPES[name]).eval()
    speaker = 2 if model.config.speakers else None
    whole = generate(model, samples=200, seed=4, speaker=speaker, engine="reference")[0]
    stream = Stream(model, seed=4, speaker=speaker, engine="reference")
    first = stream.pull(70)
    stream.state().save(tmp_path / "stream.safetensors")
    later = Stream.load(model, tmp_path / "stream.safetensors", engine="reference")
    np.testing.assert_array_equal(torch.cat([first, later.pull(130)]).numpy(), whole.numpy())
