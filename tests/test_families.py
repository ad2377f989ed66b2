"""Properties of every family, distribution and engine: step = forward, causality, states, seeds."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import piece

from wavear import (
    GRUConfig,
    LinearConfig,
    MelConfig,
    PredictiveWaveNetConfig,
    Stream,
    TransformerConfig,
    WaveNetConfig,
    generate,
    load,
    score,
)
from wavear.benchmark.ceiling import cost
from wavear.generation.engines import make_engine
from wavear.models.families import FAMILIES

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
COMMON: dict[str, Any] = {"sample_rate": 8000, "conditioning_channels": 5, "head_channels": 9}
WAVENET = {"layers": 4, "stacks": 2, "residual_channels": 6, "skip_channels": 7, **COMMON}
GRU = {"channels": 7, "input_channels": 6, **COMMON}
TRANSFORMER = {"channels": 12, "heads": 2, "sample_channels": 5, "window": 7, "patch": 4, **COMMON}
PREDICTIVE = {
    "mixtures": 3,
    "layers": 2,
    "residual_channels": 5,
    "skip_channels": 6,
    "prediction_order": 6,
    "sub_frames": 2,
    "shortest_period": 8,
    "longest_period": 20,
    "recent_residuals": 5,
    "period_residuals": 2,
    "period_channels": 6,
    **COMMON,
}

MODELS = {
    "wavenet": WaveNetConfig(classes=64, **WAVENET),
    "wavenet kernel 3": WaveNetConfig(classes=64, kernel_size=3, **WAVENET),
    "gru": GRUConfig(classes=64, **GRU),
    "transformer": TransformerConfig(layers=2, classes=64, **TRANSFORMER),
    "transformer, sample by sample": TransformerConfig(
        layers=2, classes=64, **{**TRANSFORMER, "window": 9, "patch": 1}
    ),
    "transformer, window of one": TransformerConfig(
        layers=2, classes=64, **{**TRANSFORMER, "window": 1, "patch": 5}
    ),
    "linear": LinearConfig(order=9, differencing=1, sample_rate=8000),
    "linear, 16 bits": LinearConfig(
        order=1, differencing=2, law="gaussian", grid="linear", sample_rate=8000
    ),
}
CONDITIONED = {
    "wavenet": WaveNetConfig(classes=64, mel=MEL, speakers=3, **WAVENET),
    "gru, three layers": GRUConfig(layers=3, classes=64, mel=MEL, speakers=3, **GRU),
    "transformer": TransformerConfig(layers=2, classes=64, mel=MEL, speakers=3, **TRANSFORMER),
}
SPEAKERS = {"speakers": 3, "law": "gaussian", "coarse_classes": 32}
VALUES = {
    "wavenet mixture, coarse codes": WaveNetConfig(
        law="logistic_mixture", mixtures=2, coarse_classes=32, **WAVENET
    ),
    "gru gaussian, coarse codes, speakers": GRUConfig(**SPEAKERS, **GRU),
    "transformer mixture": TransformerConfig(
        layers=1, law="logistic_mixture", mixtures=3, **{**TRANSFORMER, "patch": 3}
    ),
    "gru laplace, 8 bits": GRUConfig(law="laplace", classes=256, **GRU),
}
ENGINES = ["reference", "numba"]

EVERY = {
    **MODELS,
    **{f"{name}, mel and speakers": config for name, config in CONDITIONED.items()},
    **VALUES,
}
ALL = EVERY | {
    f"predictive, {'causal' if causal else 'speakers'}": PredictiveWaveNetConfig(
        mel=MEL, causal=causal, speakers=0 if causal else 3, period_layers=1 + causal, **PREDICTIVE
    )
    for causal in (False, True)
}
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
engines = pytest.mark.parametrize("engine", ENGINES)
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}  # the same float64 sums in another order


def make(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = next(cls for cls, settings in FAMILIES.values() if type(config) is settings)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than initial weights, so that outputs vary
            parameter.mul_(1.5)
    return model.to(dtype).eval()


@torch.no_grad()
def conditioning(model: Any, batch: int, samples: int) -> Any:
    """Return conditioning (B, C, samples), or None."""
    if not model.conditioned:
        return None
    values = given(model, batch, samples)
    mel = values["mel"].to(next(model.parameters()).dtype) if model.config.mel else None
    speaker = torch.tensor(values["speaker"]) if model.config.speakers else None
    return model.condition(mel, speaker)[:, :, :samples]


def random_codes(model: Any, batch: int, samples: int) -> torch.Tensor:
    """Return codes near silence, as in audio."""
    spread = torch.randn(batch, samples, generator=torch.Generator().manual_seed(2)) * 0.1
    return model.grid.encode(spread.clamp(-1, 1))


def given(model: Any, batch: int, samples: int) -> dict[str, Any]:
    """Return a mel and speakers for the public functions."""
    found: dict[str, Any] = {}
    if model.config.mel:
        frames = -(-samples // MEL.hop_length)
        draw = torch.Generator().manual_seed(1)
        found["mel"] = torch.randn(batch, MEL.bands, frames, generator=draw)
    if model.config.speakers:
        found["speaker"] = [row % model.config.speakers for row in range(batch)]
    return found


def part(cond: Any, at: Any) -> Any:
    """Return columns of conditioning; a speaker without a mel has one column for all samples."""
    if cond is None:
        return None
    if cond.shape[2] == 1:
        return cond if isinstance(at, slice) else cond[:, :, 0]
    return cond[:, :, at]


def start(model: Any, batch: int) -> torch.Tensor:
    return torch.full((batch,), model.start_code)


@every
@torch.no_grad()
def test_step_equals_forward(config):
    model = make(config)
    codes, cond = random_codes(model, 2, 60), conditioning(model, 2, 60)
    whole = model(codes, cond)
    assert whole.shape == (2, model.law.channels, 60)
    state, previous = model.init_state(2), start(model, 2)
    places = addresses(state)
    for t in range(60):
        stepped = model.step(previous, state, part(cond, t))
        torch.testing.assert_close(stepped, whole[:, :, t], **EXACT)
        previous = codes[:, t]
    assert addresses(state) == places  # updated in place: a CUDA graph holds the addresses


def addresses(state: Any) -> list[int]:
    """Return where the tensors of a state lie."""
    parts = [x if isinstance(x, list) else [x] for x in vars(state).values()]
    return [tensor.data_ptr() for tensor in itertools.chain.from_iterable(parts)]


@every
@torch.no_grad()
def test_distributions_depend_only_on_earlier_samples(config):
    model = make(config)
    codes, cond = random_codes(model, 1, 40), conditioning(model, 1, 40)
    before = model(codes, cond)
    for t in (0, 1, 17, 39):
        changed = codes.clone()
        changed[:, t] = (changed[:, t] + model.grid.classes // 3) % model.grid.classes
        after = model(changed, cond)
        same = slice(0, t + 1)
        torch.testing.assert_close(after[:, :, same], before[:, :, same], rtol=0, atol=1e-12)
        if t < 39:
            assert not torch.equal(after[:, :, t + 1], before[:, :, t + 1])


@every
@torch.no_grad()
def test_forward_in_pieces_and_prefill_equal_the_whole(config, monkeypatch):
    monkeypatch.setattr("wavear.models.base._PREFILL", 40)
    model = make(config)
    codes, cond = random_codes(model, 3, 97), conditioning(model, 3, 97)
    whole = model(codes, cond)
    for cuts in ((0, 97), (0, 1, 2, 50, 97), (0, 64, 96, 97)):
        state, previous, parts = model.init_state(3), start(model, 3), []
        for first, last in itertools.pairwise(cuts):
            piece = slice(first, last)
            parts.append(model(codes[:, piece], part(cond, piece), state, previous))
            previous = codes[:, last - 1]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, **EXACT)
        filled = model.init_state(3)
        model.prefill(model.shift(codes), filled, cond)
        expected = model.step(previous, filled, part(cond, -1))
        torch.testing.assert_close(model.step(previous, state, part(cond, -1)), expected, **EXACT)


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_no_gradient_reaches_into_the_state(config, batch):
    model = make(config)
    codes, cond = random_codes(model, batch, 40), conditioning(model, batch, 40)
    state = model.init_state(batch)
    first = model(codes[:, :20], part(cond, slice(0, 20)), state, start(model, batch))
    assert all(not tensor.requires_grad for tensor in model.export_state(state).values())
    second = model(codes[:, 20:], part(cond, slice(20, 40)), state, codes[:, 19])
    second.sum().backward()  # needs no tensor of the first pass
    first.sum().backward()  # the second pass has not changed the tensors of the first


@every
@torch.no_grad()
def test_rows_of_a_state_are_independent(config):
    """Rows exported at different times and imported as one state continue unchanged."""
    model = make(config)
    codes, cond = random_codes(model, 2, 70), conditioning(model, 2, 70)
    long, short = model.init_state(2), model.init_state(2)
    model(codes[:, :50], part(cond, slice(0, 50)), long, start(model, 2))
    model(codes[:, :7], part(cond, slice(0, 7)), short, start(model, 2))
    rows = torch.tensor([True, False])
    exported = [model.export_state(state) for state in (long, short)]
    mixed = {
        name: torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, exported[1][name])
        for name, a in exported[0].items()
    }
    state = model.import_state(mixed)
    previous = torch.stack([codes[0, 49], codes[1, 6]])
    for n in range(15):
        columns = part(cond, 50 + n), part(cond, 7 + n)
        cond_t = None if cond is None else torch.stack([columns[0][0], columns[1][1]])
        together = model.step(previous, state, cond_t)
        alone = [
            model.step(codes[:, 49 + n], long, columns[0])[0],
            model.step(codes[:, 6 + n], short, columns[1])[1],
        ]
        torch.testing.assert_close(together, torch.stack(alone), **EXACT)
        previous = torch.stack([codes[0, 50 + n], codes[1, 7 + n]])
    if cond is not None and not isinstance(cond, torch.Tensor):
        return
    pieces = slice(65, 70), slice(22, 27)
    columns = part(cond, pieces[0]), part(cond, pieces[1])
    cond_t = None if cond is None else torch.stack([columns[0][0], columns[1][1]])
    given = torch.stack([codes[row, piece] for row, piece in enumerate(pieces)])
    alone = [
        model(codes[:, pieces[0]], columns[0], long, codes[:, 64])[0],
        model(codes[:, pieces[1]], columns[1], short, codes[:, 21])[1],
    ]
    torch.testing.assert_close(model(given, cond_t, state, previous), torch.stack(alone), **EXACT)


def test_the_receptive_field_in_words():
    assert make(MODELS["wavenet"]).span == "7 samples (1 ms)"
    assert make(MODELS["gru"]).span == "unbounded"


@every
@torch.no_grad()
def test_samples_beyond_the_receptive_field_have_no_effect(config):
    model = make(config)
    field = model.receptive_field
    if field is None:
        pytest.skip("the context of this family is unbounded")
    total = field + 20
    codes, cond = random_codes(model, 1, total), conditioning(model, 1, total)
    changed = codes.clone()
    changed[0, 5] = (changed[0, 5] + model.grid.classes // 3) % model.grid.classes
    moved = (model(changed, cond) != model(codes, cond))[0].any(dim=0)
    assert not moved[5 + field + 1 :].any()
    assert moved[6 : 5 + field + 1].any()


@every
def test_every_parameter_gets_its_own_gradient(config):
    """No parameter is unused, so distributed training need not search for unused ones.

    Gradients that share memory would be clipped, or accumulated, once per parameter.
    """
    model = make(config)
    codes = random_codes(model, 3, 36)
    values = given(model, 3, 36)
    cond = None
    if model.conditioned:
        speaker = torch.tensor(values["speaker"]) if model.config.speakers else None
        cond = model.condition(values["mel"].double() if model.config.mel else None, speaker)
    (-model.law.log_prob(model(codes, cond), codes)).mean().backward()
    own = "conditioning.period."  # trained separately
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith(own)}
    assert [n for n, p in parameters.items() if p.grad is None or not p.grad.any()] == []
    memory = {p.grad.untyped_storage().data_ptr() for p in parameters.values()}
    assert len(memory) == len(parameters)


@every
def test_the_cost_of_a_configuration_is_that_of_its_model(config):
    """`cost` counts by formula, the model its own matrices; shares of a patch are rounded."""
    if isinstance(config, LinearConfig):
        pytest.skip("its prediction is not a matrix")
    model, asked = make(config), cost(config)
    prediction = getattr(config, "prediction_order", 0)  # not a matrix either
    assert model.multiply_adds == pytest.approx(asked.multiply_adds + prediction, abs=1)
    assert model.weight_bytes == pytest.approx(asked.weight_bytes + 4 * prediction, abs=4)


@every
@engines
def test_scores_of_engines_equal_the_parallel_pass(config, engine, monkeypatch):
    monkeypatch.setattr(sys.modules["wavear.generation.scoring"], "PARALLEL_CHUNK", 37)
    model = make(config, torch.float32)
    _needs(model, engine)
    waveform = model.grid.decode(random_codes(model, 2, 90))
    conditions = given(model, 2, 90)
    parallel = score(model, waveform, **conditions)
    stepped = score(model, waveform, engine=engine, **conditions)
    torch.testing.assert_close(stepped, parallel, rtol=1e-5, atol=1e-3)


@every
def test_the_same_seed_gives_the_same_audio_on_the_compiled_engine(config):
    """Codes are equal, unless a uniform is within rounding of a boundary between neighbours."""
    model = make(config, torch.float32)
    _needs(model, "numba")
    conditions = given(model, 2, 140)
    expected = generate(model, samples=140, seed=[3, 4], engine="reference", **conditions)
    found = generate(model, samples=140, seed=[3, 4], engine="numba", **conditions)
    differ = (expected != found).any(dim=1)
    for b in range(2):
        if differ[b]:
            t = int((expected[b] != found[b]).nonzero()[0])
            steps = model.grid.encode(expected[b, t]) - model.grid.encode(found[b, t])
            assert abs(int(steps)) <= 1, f"sample {t} of stream {b} differs by {int(steps)} codes"
    # With 65536 values, about every 30th uniform is this close to a boundary.
    assert model.grid.classes > 4096 or not differ.all()


@every
@engines
def test_audio_does_not_depend_on_batch_or_chunks(config, engine):
    model = make(config, torch.float32)
    _needs(model, engine)
    conditions = given(model, 3, 72)
    together = generate(model, samples=72, seed=[5, 6, 7], engine=engine, **conditions)
    for b in (0, 2):
        one = {name: values[b] for name, values in conditions.items()}
        alone = generate(model, samples=72, seed=5 + b, engine=engine, **one)
        assert torch.equal(alone[0], together[b])
        stream = Stream(model, seed=5 + b, engine=engine, speaker=one.get("speaker"))
        if "mel" in one:
            parts = [stream.push(one["mel"][:, n : n + 2]) for n in range(0, 6, 2)]
            made = torch.cat([*parts, stream.flush()])
        else:
            made = torch.cat([stream.pull(n) for n in (1, 0, 30, 41)])
        assert torch.equal(made[:72], alone[0])


@every
@engines
def test_a_stream_resumes_from_its_file_on_another_engine(config, engine, tmp_path):
    model = make(config, torch.float32)
    _needs(model, engine)
    if model.config.mel is not None:
        pytest.skip("test_stream covers streams with mels")
    speaker = 1 if model.config.speakers else None
    whole = Stream(model, seed=9, engine=engine, speaker=speaker)
    expected = torch.cat([whole.pull(60), whole.pull(40)])
    stream = Stream(model, seed=9, engine="reference", speaker=speaker)
    first = stream.pull(60)
    rest = Stream.load(model, stream.save(tmp_path / "state.safetensors"), engine=engine).pull(40)
    found = torch.cat([first, rest])
    assert (found == expected).float().mean() > 0.5
    assert torch.isfinite(found).all()


@every
@engines
def test_a_copied_stream_continues_alike(config, engine):
    """Particles copy the states of streams."""
    model = make(config, torch.float32)
    _needs(model, engine)
    _, runner = make_engine(model, 3, engine)
    codes, cond = random_codes(model, 3, 60), conditioning(model, 3, 60)
    runner.score(codes[:, :40].numpy(), part(cond, slice(0, 40)))
    runner.copy_streams([2], [0])
    rows = [2, 1, 2]
    nats = runner.score(codes[rows, 40:].numpy(), piece(cond, 40, 60, rows))
    assert np.array_equal(nats[0], nats[2])
    assert not np.array_equal(nats[0], nats[1])


@every
def test_a_prime_is_continued_like_generated_audio(config):
    model = make(config, torch.float32)
    conditions = given(model, 1, 120)
    whole = generate(model, samples=120, seed=1, engine="reference", **conditions)
    rest = generate(
        model, samples=70, seed=1, engine="reference", prime=whole[:, :50], **conditions
    )
    # float32 sums in another order may change one code, and hence the following ones.
    assert (rest == whole[:, 50:]).float().mean() > 0.5


@every
@torch.no_grad()
def test_a_loaded_model_equals_the_saved_one(config, tmp_path):
    model = make(config, torch.float32)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert again.family == model.family
    codes = random_codes(model, 1, 30)
    found = again(codes, conditioning(again, 1, 30))
    assert torch.equal(found, model(codes, conditioning(model, 1, 30)))


def _needs(model: Any, engine: str) -> None:
    try:
        make_engine(model, 1, engine)
    except ValueError as error:
        pytest.skip(str(error))
