"""Transformer: its equations, reach, exact patches, memory of segments, states.

The promises of every family are tested in `test_families`.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wavear import MelConfig
from wavear.models import base
from wavear.models.attention import attend_within, rotate, rotation, rotation_period, turns
from wavear.models.transformer import Transformer, TransformerConfig

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
SMALL: dict[str, Any] = {
    "channels": 12,
    "heads": 2,
    "sample_channels": 5,
    "head_channels": 7,
    "conditioning_channels": 5,
    "sample_rate": 8000,
}
SHAPES = {
    "sample by sample": TransformerConfig(layers=2, window=4, patch=1, classes=16, **SMALL),
    "patches": TransformerConfig(layers=2, window=3, patch=4, classes=16, **SMALL),
    "one layer, odd patches": TransformerConfig(layers=1, window=5, patch=3, classes=3, **SMALL),
    "window of one": TransformerConfig(layers=2, window=1, patch=5, classes=16, **SMALL),
    "mel": TransformerConfig(layers=2, window=3, patch=4, classes=16, mel=MEL, **SMALL),
    "speakers": TransformerConfig(layers=1, window=4, patch=2, classes=16, speakers=3, **SMALL),
    "mel and speakers": TransformerConfig(
        layers=3, window=3, patch=1, classes=16, mel=MEL, speakers=2, **SMALL
    ),
    "16 bits": TransformerConfig(
        layers=2, window=3, patch=4, law="logistic_mixture", mixtures=2, **SMALL
    ),
    "16 bits and codes": TransformerConfig(
        layers=1, window=3, patch=2, law="gaussian", coarse_classes=16, **SMALL
    ),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
# The same float64 sums in another order.
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


def make(config) -> Any:
    torch.manual_seed(0)
    model = Transformer(config).double()
    if model.head.place is not None:  # which begin at zero
        torch.nn.init.normal_(model.head.place.weight)
    return model


def make_codes(config, batch, total):
    """Return codes near silence, where distributions over values have their mass."""
    spread = min(config.classes, 2000)
    return torch.randint(spread, (batch, total)) + (config.classes - spread) // 2


def make_cond(model, batch, total):
    config = model.config
    if not model.conditioned:
        return None
    frames = -(-total // MEL.hop_length)
    mel = torch.randn(batch, config.mel.bands, frames, dtype=torch.float64) if config.mel else None
    speaker = torch.arange(batch) % config.speakers if config.speakers else None
    with torch.no_grad():
        return model.condition(mel, speaker)[:, :, :total]


def part(cond, start, stop):
    return cond if cond is None or cond.shape[2] == 1 else cond[:, :, start:stop]


def run_steps(model, given, state, cond=None):
    """Step with each of `given` (B, T), and return the parameters (B, P, T)."""
    rows = []
    for t in range(given.shape[1]):
        cond_t = None if cond is None else cond[:, :, min(t, cond.shape[2] - 1)]
        rows.append(model.step(given[:, t], state, cond_t))
    return torch.stack(rows, dim=2)


def assert_same_state(model, one, other, **tolerance):
    first, second = model.export_state(one), model.export_state(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def reach_of(model, codes, cond, t):
    """Return which samples the output at `t` depends on, bool (T,), by gradients."""
    embedded = []
    handle = model.embedding.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    parameters = model(codes, cond)
    (parameters[0, :, t] * torch.randn(parameters.shape[1], dtype=torch.float64)).sum().backward()
    handle.remove()
    # A patch of silence and the start code precede the samples; no output depends on the last
    # sample.
    reach = embedded[0].grad[0, model.config.patch + 1 :].abs().sum(dim=1) > 0
    return torch.cat([reach, torch.zeros(1, dtype=torch.bool)])


@shapes
def test_output_depends_on_exactly_the_receptive_field(config):
    """The gradient of the output at t is zero at samples from t on and before the field."""
    model = make(config)
    # A ReLU has no gradient for some inputs, but hardly ever all of a hidden layer at once.
    field, patch = config.receptive_field, config.patch
    first = -(-(field + 2) // patch) * patch
    total = first + 2 * patch
    codes, cond = make_codes(config, 1, total), make_cond(model, 1, total)
    for place in range(patch):
        t = first + place
        expected = torch.zeros(total, dtype=torch.bool)
        # The field is that of the last sample of a patch; the others reach as far back.
        expected[t - field + patch - 1 - place : t] = True
        assert reach_of(model, codes, cond, t).tolist() == expected.tolist()


def test_receptive_field_of_known_shapes():
    # GPT over samples: 3 layers of 15 earlier positions, and the sample before.
    assert TransformerConfig(layers=3, window=16, patch=1).receptive_field == 46
    # The last of 8 samples: 7 of its patch, the patch before, and 4 layers of 127 patches.
    assert TransformerConfig(layers=4, window=128, patch=8).receptive_field == 7 + 8 + 4 * 127 * 8


@pytest.mark.parametrize(
    ("total", "window"), [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (13, 4), (8, 1), (30, 7)]
)
@pytest.mark.parametrize("past", [0, 2, 9])
def test_attention_equals_the_formula(total, window, past):
    """Compute softmax over the keys at distance 0 to window - 1, densely."""
    q, k, v = torch.randn(3, 2, 3, total + past, 4, dtype=torch.float64)
    distance = torch.arange(total + past)[:, None] - torch.arange(total + past)
    scores = (q @ k.mT / 2).masked_fill((distance < 0) | (distance >= window), -math.inf)
    expected = (torch.softmax(scores, dim=-1) @ v)[:, :, past:]
    # Positions before the past must have no effect.
    k, v = (torch.nn.functional.pad(t, (0, 0, window, 0), value=7.0)[:, :, past:] for t in (k, v))
    valid = (torch.arange(window) >= window - past).expand(2, -1)
    found = attend_within(q[:, :, past:], k, v, valid)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    "config", [SHAPES["sample by sample"], SHAPES["mel"]], ids=["sample by sample", "mel"]
)
def test_forward_equals_the_equations(config):
    """Compute each position in turn, with complex rotations by the absolute position."""
    model = make(config)
    total, patch, heads = 40, config.patch, config.heads
    codes, cond = make_codes(config, 1, total), make_cond(model, 1, total)
    pairs = config.channels // heads // 2
    with torch.no_grad():
        table = model.embedding.weight
        history = [model.start_code] * (patch + 1) + codes[0].tolist()
        expected = []
        keys: list[list] = [[] for _ in model.blocks]
        values: list[list] = [[] for _ in model.blocks]
        head, output = model.head, torch.empty(0)
        for t in range(total):
            samples = table[history[t + 1 : t + 1 + patch]].flatten()
            if t % patch == 0:
                n = t // patch
                turn = torch.polar(
                    torch.ones(pairs).double(),
                    2 * torch.pi * n * model.turns.double() / (4 * config.window),
                )
                x = model.enter.weight @ samples + model.enter.bias
                x = x if cond is None else x + model.enter_conditioning.weight @ cond[0, :, t]
                for block, ks, vs in zip(model.blocks, keys, values, strict=True):
                    q, k, v = (block.qkv.weight @ (x / x.square().mean().add(1e-6).sqrt())).view(
                        3, heads, -1
                    )
                    ks.append(torch.complex(k[:, :pairs], k[:, pairs:]) * turn)
                    vs.append(v)
                    seen = range(max(0, n - config.window + 1), n + 1)
                    query = torch.complex(q[:, :pairs], q[:, pairs:]) * turn
                    scores = torch.stack([(query * ks[m].conj()).real.sum(dim=1) for m in seen])
                    weights = torch.softmax(scores / math.sqrt(2 * pairs), dim=0)
                    found = (weights[:, :, None] * torch.stack([vs[m] for m in seen])).sum(dim=0)
                    x = x + block.out.weight @ found.flatten()
                    hidden = (
                        torch.relu(block.up.weight @ (x / x.square().mean().add(1e-6).sqrt())) ** 2
                    )
                    x = x + block.down.weight @ hidden
                output = head.position.weight @ (x / x.square().mean().add(1e-6).sqrt())
            z = output + head.samples.weight @ samples + head.samples.bias
            z = z if cond is None else z + head.conditioning.weight @ cond[0, :, t]
            z = torch.relu(z if patch == 1 else z + head.place.weight[t % patch])
            z = torch.relu(z + head.hidden.weight @ z + head.hidden.bias)
            expected.append(head.out.weight @ z + head.out.bias)
        torch.testing.assert_close(
            model(codes, cond)[0].T, torch.stack(expected), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("position", [0, 5, 63, 10**12])
def test_rotated_products_depend_on_distances_only(position):
    """In float32, also after 2000 years of audio."""
    window, channels = 64, 16
    angles, period = turns(channels, window), rotation_period(window)
    q, k = torch.randn(2, channels)
    distances = torch.arange(window)

    def products(at):
        turned = rotate(q, rotation(torch.tensor(at), angles, period, q))
        return (
            rotate(k.expand(window, -1), rotation(at - distances, angles, period, q)) * turned
        ).sum(dim=1)

    torch.testing.assert_close(products(position), products(1000), rtol=0, atol=1e-5)
    # Angles computed in bfloat16 would be off by a whole turn.
    place = torch.tensor(position + 61)
    for rough, fine in zip(
        rotation(place, angles, period, q.bfloat16()),
        rotation(place, angles, period, q),
        strict=True,
    ):
        torch.testing.assert_close(rough.float(), fine, rtol=0, atol=2**-8)


@pytest.mark.parametrize("window", [1, 2, 3, 64, 1000])
def test_all_distances_in_a_window_are_distinct(window):
    angles, period = (
        turns(2, window),
        rotation_period(window),
    )  # a single pair turns fastest: by about one radian
    assert 0.5 < 2 * math.pi * float(angles[0]) / period < 1.6
    slowest = turns(16, window)[-1]
    cos, _ = rotation(
        torch.arange(window), slowest[None], period, torch.zeros(1, dtype=torch.float64)
    )
    assert cos[:, 0].unique().numel() == window


@pytest.mark.parametrize("law", ["categorical", "logistic_mixture"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_patches_are_factorised_exactly(law, before):
    """Probabilities of all sequences of a patch and one more sample add up to one."""
    config = TransformerConfig(layers=1, window=2, patch=3, classes=4, law=law, mixtures=2, **SMALL)
    model = make(config)
    sequences = torch.tensor(list(itertools.product(range(4), repeat=4)))
    past = make_codes(config, 1, before).expand(len(sequences), -1)
    codes = torch.cat([past, sequences], dim=1)
    with torch.no_grad():
        nats = model.law.log_prob(model(codes), codes)[:, before:].sum(dim=1)
        assert math.isclose(float(nats.exp().sum()), 1.0, rel_tol=1e-10)
        # Every sample has an effect on later ones.
        for place in range(1, 4):
            changed = codes.clone()
            changed[:, before + place - 1] = (codes[:, before + place - 1] + 1) % 4
            moved = (model(changed) - model(codes)).abs().amax(dim=(0, 1))
            assert moved[before + place] > 1e-4
            assert (moved[: before + place] == 0).all()


@pytest.mark.parametrize(
    "config", [SHAPES["one layer, odd patches"], SHAPES["mel"]], ids=["", "mel"]
)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_segments_with_memory_equal_one_long_forward(config, cuts):
    """For any cuts, a segment sees the keys and values of earlier segments."""
    model = make(config)
    total = sum(cuts)
    codes, cond = make_codes(config, 2, total), make_cond(model, 2, total)
    with torch.no_grad():
        expected = model(codes, cond)
        state, previous = model.init_state(2), torch.full((2,), model.start_code)
        stepped = model.init_state(2)
        found, start = [], 0
        for length in cuts:
            stop = start + length
            found.append(model(codes[:, start:stop], part(cond, start, stop), state, previous))
            previous, start = codes[:, stop - 1], stop
        run_steps(model, model.shift(codes), stepped, cond)
    torch.testing.assert_close(torch.cat(found, dim=2), expected, **EXACT)
    assert_same_state(model, state, stepped, **EXACT)


@pytest.mark.parametrize("begin", [12, 14], ids=["at a patch", "inside a patch"])
def test_gradients_end_at_the_memory(begin):
    """A segment's gradients equal those of one long forward; none reaches the past."""
    config = TransformerConfig(layers=2, window=4, patch=4, classes=16, **SMALL)
    model = make(config)
    codes = make_codes(config, 2, 30)
    embedded = []
    model.embedding.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    weights = torch.randn(2, 16, 30 - begin, dtype=torch.float64)
    (model(codes)[:, :, begin:] * weights).sum().backward()
    state = model.init_state(2)
    model(codes[:, :begin], None, state, torch.full((2,), model.start_code))
    assert not any(t.requires_grad for t in model.export_state(state).values())
    (model(codes[:, begin:], None, state, codes[:, begin - 1]) * weights).sum().backward()
    long, before, segment = (e.grad for e in embedded)
    assert before is None
    # From its first whole patch on, only positions of the segment itself read its samples.
    whole, margin = -(-begin // 4) * 4, config.patch + 1
    torch.testing.assert_close(
        segment[:, margin + whole - begin :], long[:, margin + whole :], **EXACT
    )
    assert long[:, : margin + begin].abs().sum() > 0


@shapes
def test_rows_at_different_times_equal_single_rows(config):
    """Rows at different times, in one `forward` and `step`, equal single rows."""
    model = make(config)
    times = [0, 1, config.patch + 1, 3 * config.window * config.patch + 2]
    codes = make_codes(config, len(times), max(times) + 40)
    cond = make_cond(model, len(times), codes.shape[1])
    alone, states = [], []
    with torch.no_grad():
        for b, time in enumerate(times):
            row, conditioning = codes[b : b + 1], None if cond is None else cond[b : b + 1]
            alone.append(model(row[:, : time + 40], part(conditioning, 0, time + 40))[0, :, time:])
            states.append(model.init_state(1))
            model.prefill(model.shift(row)[:, :time], states[-1], part(conditioning, 0, time))
        exported = [model.export_state(state) for state in states]
        state = model.import_state(
            {name: torch.cat([e[name] for e in exported]) for name in exported[0]}
        )
        given = torch.stack(
            [model.shift(codes)[b, time : time + 40] for b, time in enumerate(times)]
        )
        if cond is not None and cond.shape[2] > 1:
            cond = torch.stack([cond[b, :, time : time + 40] for b, time in enumerate(times)])
        first = run_steps(model, given[:, :11], state, part(cond, 0, 11))
        # `forward` takes the codes themselves, of which the last is not consumed.
        inner = torch.cat([given[:, 12:23], given[:, :1]], dim=1)
        second = model(inner, part(cond, 11, 23), state, given[:, 11])
        third = run_steps(model, given[:, 23:], state, part(cond, 23, 40))
    found = torch.cat([first, second, third], dim=2)
    torch.testing.assert_close(found, torch.stack(alone), **EXACT)
    assert state.time.tolist() == [time + 40 for time in times]


def test_exported_states_are_in_order():
    """At any time the oldest position comes first, after zeros; the tensors are copies."""
    config = SHAPES["patches"]
    model = make(config)
    with torch.no_grad():
        state, before = model.init_state(1), None
        for t in range(30):
            model.step(torch.tensor([t % 16]), state)
            tensors = model.export_state(state)
            begun = t // 4 + 1
            for name in ("keys.1", "values.0"):
                assert tensors[name].shape == (1, 3, 12)
                assert (tensors[name].abs().sum(dim=2) > 0)[0].tolist() == [
                    i >= 3 - begun for i in range(3)
                ]
                if before is not None and t % 4 == 0:
                    assert torch.equal(tensors[name][:, :-1], before[name][:, 1:])
                    assert not torch.equal(tensors[name][:, -1], before[name][:, -1])
                elif before is not None:
                    assert torch.equal(tensors[name], before[name])
            assert tensors["codes"][0].tolist() == [
                8 if u < 0 else u % 16 for u in range(t - 3, t + 1)
            ]
            before = tensors
        assert before is not None
        kept = {name: tensor.clone() for name, tensor in before.items()}
        run_steps(model, torch.zeros(1, 9, dtype=torch.long), state)
        assert all(torch.equal(kept[name], before[name]) for name in kept)


@pytest.mark.parametrize(("name", "value"), [("time", -1), ("codes", 16), ("codes", -1)])
def test_damaged_states_are_refused(name, value):
    model = make(SHAPES["patches"])
    tensors = model.export_state(model.init_state(2))
    tensors[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match="the state is damaged"):
        model.import_state(tensors)


class _Sizes(TorchDispatchMode):
    """Record the size of the largest floating-point tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


def test_prefill_equals_steps_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(base, "_PREFILL", 24)
    config = SHAPES["speakers"]
    model = make(config)
    cond, found = make_cond(model, 1, 1), []
    for total in (60, 120):
        given = make_codes(config, 1, total)
        filled, stepped = model.init_state(1), model.init_state(1)
        with _Sizes() as sizes:
            model.prefill(given, filled, cond)
        with torch.no_grad():
            run_steps(model, given, stepped, cond)
        assert_same_state(model, filled, stepped, **EXACT)
        assert filled.position.requires_grad is False
        found.append(sizes.largest)
    assert found[0] == found[1]


def test_attention_memory_is_linear_in_the_length():
    """The largest tensor holds the products of each query with its window."""
    model = make(SHAPES["sample by sample"])
    found = []
    for total in (256, 512):
        with _Sizes() as sizes, torch.no_grad():
            model(make_codes(model.config, 1, total))
        found.append(sizes.largest)
    assert found[1] <= 2.1 * found[0]


@shapes
def test_step_never_reads_a_value(config):
    """Reading on the meta device is an error. A CUDA graph can capture such a step."""
    model = Transformer(config).to("meta")
    state = model.init_state(2)
    addresses = [
        id(t) for t in (state.time, state.codes, state.position, *state.keys, *state.values)
    ]
    cond = (
        torch.empty(2, config.conditioning_channels, device="meta") if model.conditioned else None
    )
    for _ in range(3):
        out = model.step(torch.zeros(2, dtype=torch.long, device="meta"), state, cond)
        assert out.shape == (2, model.law.channels)
    assert addresses == [
        id(t) for t in (state.time, state.codes, state.position, *state.keys, *state.values)
    ]


@pytest.mark.parametrize("patch", [1, 4])
def test_output_depends_on_conditioning_up_to_its_sample(patch):
    """The output at t depends on the conditioning at t, and not on later conditioning."""
    config = TransformerConfig(layers=2, window=3, patch=patch, classes=16, mel=MEL, **SMALL)
    model = make(config)
    codes = make_codes(config, 1, 24)
    cond = torch.randn(1, 5, 24, dtype=torch.float64, requires_grad=True)
    for t in (11, 12, 14):
        (grad,) = torch.autograd.grad(model(codes, cond)[0, :, t].sum(), cond)
        assert not grad[:, :, t + 1 :].any()
        assert grad[:, :, t].any()


def test_runs_in_bfloat16():
    """Weights in bfloat16 and a state in float32, as in mixed training."""
    config = SHAPES["patches"]
    model = make(config).float()
    codes = make_codes(config, 2, 60)
    state = model.init_state(2)
    with torch.no_grad():
        expected = model(codes)
        weights = {name: p.bfloat16() for name, p in model.named_parameters()}
        found = []
        previous = torch.full((2,), model.start_code)
        for start in (0, 30):
            given = (codes[:, start : start + 30], None, state, previous)
            found.append(torch.func.functional_call(model, weights, given))
            previous = codes[:, start + 29]
    assert state.keys[0].dtype == torch.float32
    assert found[0].dtype == torch.bfloat16
    # bfloat16 has 8 bits: each of a few tens of operations on numbers near one is off by 2^-9.
    torch.testing.assert_close(
        torch.cat(found, dim=2).float(),
        expected,
        rtol=0,
        atol=0.1,
    )


def test_cost_equals_the_size_of_the_matrices():
    """Count the products of a step, over one patch and beyond the first window."""
    config = TransformerConfig(layers=3, window=4, patch=4, classes=16, speakers=2, **SMALL)
    model = Transformer(config)
    counted = 0

    def count(module, inputs, _):
        nonlocal counted
        counted += module.weight.numel() * inputs[0].shape[0]

    with torch.no_grad():
        state, cond = model.init_state(1), model.condition(None, torch.tensor([1]))[:, :, 0]
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(count)
        for _ in range(config.patch):
            model.step(torch.tensor([3]), state, cond)
    attention = config.layers * 2 * config.window * config.channels
    assert abs(model.multiply_adds - (counted + attention) / config.patch) <= 1
    assert abs(model.weight_bytes - 4 * counted / config.patch) <= 4
    from wavear.benchmark.ceiling import cost

    assert abs(cost(config).multiply_adds - model.multiply_adds) <= 1
    assert abs(cost(config).weight_bytes - model.weight_bytes) <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"channels": 30, "heads": 4},
            "30 channels do not divide into 4 heads of an even number: .* multiple of 8",
        ),
        ({"channels": 6, "heads": 2}, "6 channels do not divide"),
        ({"window": 0}, "window is 0"),
        ({"patch": 0}, "patch is 0"),
    ],
)
def test_invalid_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**settings)
