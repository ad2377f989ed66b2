"""What every family, law and engine holds true: a new family costs a line in `MODELS`, an engine one in `ENGINES`."""

import itertools
import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from wavear import (
    GRUConfig,
    LinearConfig,
    MelConfig,
    Stream,
    TrainConfig,
    TransformerConfig,
    WaveNetConfig,
    audio,
    generate,
    load,
    score,
    train,
)
from wavear.cli.commands import main
from wavear.generation.engines import make_engine
from wavear.models.families import FAMILIES
from wavear.training.lanes import VISIT, Carried, Lanes
from wavear.training.state import load_state

MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
COMMON: dict[str, Any] = {"sample_rate": 8000, "conditioning_channels": 5}
WAVENET = {
    "layers": 4,
    "stacks": 2,
    "residual_channels": 6,
    "skip_channels": 7,
    "head_channels": 9,
    **COMMON,
}
GRU: dict[str, Any] = {"channels": 7, "input_channels": 6, "head_channels": 9, **COMMON}
TRANSFORMER = {"channels": 12, "heads": 2, "sample_channels": 5, "head_channels": 7, **COMMON}

MODELS = {
    "wavenet": WaveNetConfig(classes=64, **WAVENET),
    "wavenet kernel 3": WaveNetConfig(classes=64, kernel_size=3, **WAVENET),
    "gru": GRUConfig(classes=64, **GRU),
    "gru, two layers": GRUConfig(layers=2, classes=64, **GRU),
    "transformer": TransformerConfig(layers=2, window=7, patch=4, classes=64, **TRANSFORMER),
    "transformer, sample by sample": TransformerConfig(
        layers=2, window=9, patch=1, classes=64, **TRANSFORMER
    ),
    "linear": LinearConfig(order=9, differencing=1, sample_rate=8000),
    "linear, 16 bits": LinearConfig(
        order=1, differencing=2, law="gaussian", grid="linear", sample_rate=8000
    ),
}
CONDITIONED = {
    "wavenet": WaveNetConfig(classes=64, mel=MEL, speakers=3, **WAVENET),
    "gru": GRUConfig(classes=64, mel=MEL, speakers=3, **GRU),
    "transformer": TransformerConfig(
        layers=2, window=7, patch=4, classes=64, mel=MEL, speakers=3, **TRANSFORMER
    ),
}
LAWS = {
    "mixture": {"law": "logistic_mixture", "mixtures": 3},
    "mixture, coarse codes": {"law": "logistic_mixture", "mixtures": 2, "coarse_classes": 32},
    "gaussian": {"law": "gaussian"},
    "laplace, 8 bits": {"law": "laplace", "classes": 256},
}
VALUES = {
    f"{family} {law}": type(config)(**{**own, **fields})
    for family, config, own in [
        ("wavenet", MODELS["wavenet"], WAVENET),
        ("gru", MODELS["gru"], GRU),
        (
            "transformer",
            MODELS["transformer"],
            {"layers": 1, "window": 7, "patch": 3, **TRANSFORMER},
        ),
    ]
    for law, fields in LAWS.items()
}
# Fields of `TrainConfig` that make a small model of each family.
TRAINED: dict[str, dict[str, Any]] = {
    "wavenet": {
        "layers": 3,
        "stacks": 1,
        "residual_channels": 8,
        "skip_channels": 8,
        "head_channels": 8,
    },
    # Without mels: those of three tones it learns by heart, and a fourth is none of them.
    "gru": {
        "layers": 1,
        "channels": 16,
        "head_channels": 16,
        "unconditional": True,
        "mel_hop_length": None,
    },
    "transformer": {
        "layers": 2,
        "channels": 16,
        "heads": 2,
        "window": 8,
        "patch": 4,
        "learning_rate": 3e-3,
        "unconditional": True,
        "mel_hop_length": None,
    },
    "linear": {"order": 8},
}
ENGINES = ["reference", "numba"]

EVERY = {
    **MODELS,
    **{f"{name}, mel and speakers": config for name, config in CONDITIONED.items()},
    **VALUES,
}
every = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY.keys())


def make(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = next(cls for cls, settings in FAMILIES.values() if type(config) is settings)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # livelier than at the start of training
            parameter.mul_(1.5)
    return model.to(dtype).eval()


def conditioning(model: Any, batch: int, samples: int) -> Any:
    """cond (B, C, samples), or None."""
    if not model.conditioned:
        return None
    dtype = next(model.parameters()).dtype
    frames = -(-samples // MEL.hop_length)
    mel = torch.randn(
        batch, MEL.bands, frames, dtype=dtype, generator=torch.Generator().manual_seed(1)
    )
    speaker = torch.arange(batch) % model.config.speakers if model.config.speakers else None
    return model.condition(mel, speaker)[:, :, :samples].detach()


def random_codes(model: Any, batch: int, samples: int) -> torch.Tensor:
    """Codes about silence, as audio has them."""
    spread = torch.randn(batch, samples, generator=torch.Generator().manual_seed(2)) * 0.1
    return model.grid.encode(spread.clamp(-1, 1))


def given(model: Any, batch: int, samples: int) -> dict[str, Any]:
    """A mel and speakers for the public functions."""
    if not model.conditioned:
        return {}
    frames = -(-samples // MEL.hop_length)
    mel = torch.randn(batch, MEL.bands, frames, generator=torch.Generator().manual_seed(1))
    return {"mel": mel, "speaker": list(range(batch))}


@every
@torch.no_grad()
def test_step_is_forward(config):
    model = make(config)
    codes, cond = random_codes(model, 2, 60), conditioning(model, 2, 60)
    whole = model(codes, cond)
    assert whole.shape == (2, model.law.channels, 60)
    state, previous = model.init_state(2), torch.full((2,), model.start_code)
    for t in range(60):
        stepped = model.step(previous, state, None if cond is None else cond[:, :, t])
        torch.testing.assert_close(stepped, whole[:, :, t], rtol=1e-9, atol=1e-10)
        previous = codes[:, t]


@every
def test_the_law_of_a_sample_does_not_depend_on_it_or_on_what_follows(config):
    model = make(config)
    codes, cond = random_codes(model, 1, 40), conditioning(model, 1, 40)
    with torch.no_grad():
        before = model(codes, cond)
        for t in (0, 1, 17, 39):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + model.grid.classes // 3) % model.grid.classes
            after = model(changed, cond)
            torch.testing.assert_close(
                after[:, :, : t + 1], before[:, :, : t + 1], rtol=0, atol=1e-12
            )
            if t < 39:
                assert not torch.equal(after[:, :, t + 1], before[:, :, t + 1])


@every
@torch.no_grad()
def test_forward_goes_on_from_a_state_in_any_pieces(config):
    model = make(config)
    codes, cond = random_codes(model, 3, 97), conditioning(model, 3, 97)
    whole = model(codes, cond)
    for cuts in ((0, 97), (0, 1, 2, 50, 97), (0, 64, 96, 97)):
        state, previous, parts = model.init_state(3), torch.full((3,), model.start_code), []
        for start, stop in itertools.pairwise(cuts):
            piece = None if cond is None else cond[:, :, start:stop]
            parts.append(model(codes[:, start:stop], piece, state, previous))
            previous = codes[:, stop - 1]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-9, atol=1e-10)
        # And `step` goes on from there, as from `prefill`.
        other = model.init_state(3)
        model.prefill(model.shift(codes), other, cond)
        last = None if cond is None else cond[:, :, -1]
        torch.testing.assert_close(
            model.step(previous, state, last),
            model.step(previous, other, last),
            rtol=1e-9,
            atol=1e-10,
        )


@every
def test_no_gradient_reaches_into_the_state(config):
    model = make(config)
    codes, cond = random_codes(model, 2, 40), conditioning(model, 2, 40)
    state, previous = model.init_state(2), torch.full((2,), model.start_code)
    first = model(codes[:, :20], None if cond is None else cond[:, :, :20], state, previous)
    assert all(not tensor.requires_grad for tensor in model.export_state(state).values())
    second = model(codes[:, 20:], None if cond is None else cond[:, :, 20:], state, codes[:, 19])
    second.sum().backward()  # needs nothing of the first pass...
    first.sum().backward()  # ... which is whole


@every
@torch.no_grad()
def test_rows_of_a_state_are_independent(config):
    """Exported, mixed with rows of a state at another time, imported: each row goes on as it would have alone."""
    model = make(config)
    codes, cond = random_codes(model, 2, 70), conditioning(model, 2, 70)
    long, short = model.init_state(2), model.init_state(2)
    start = torch.full((2,), model.start_code)
    model(codes[:, :50], None if cond is None else cond[:, :, :50], long, start)
    model(codes[:, :7], None if cond is None else cond[:, :, :7], short, start)
    rows = torch.tensor([True, False])
    exported = [model.export_state(state) for state in (long, short)]
    mixed = {
        name: torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, exported[1][name])
        for name, a in exported[0].items()
    }
    state = model.import_state(mixed)
    previous = torch.stack([codes[0, 49], codes[1, 6]])
    for n in range(15):
        cond_t = None if cond is None else torch.stack([cond[0, :, 50 + n], cond[1, :, 7 + n]])
        together = model.step(previous, state, cond_t)
        alone = [
            model.step(codes[:, 49 + n], long, None if cond is None else cond[:, :, 50 + n])[0],
            model.step(codes[:, 6 + n], short, None if cond is None else cond[:, :, 7 + n])[1],
        ]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-10)
        previous = torch.stack([codes[0, 50 + n], codes[1, 7 + n]])


@every
def test_past_the_receptive_field_nothing_counts(config):
    model = make(config)
    field = model.receptive_field
    if field is None:
        pytest.skip("the past of this family is unbounded")
    total = field + 20
    codes, cond = random_codes(model, 1, total), conditioning(model, 1, total)
    changed = codes.clone()
    changed[0, 5] = (changed[0, 5] + model.grid.classes // 3) % model.grid.classes
    with torch.no_grad():
        moved = (model(changed, cond) != model(codes, cond))[0].any(dim=0)
    assert not moved[5 + field + 1 :].any()
    assert moved[6 : 5 + field + 1].any()


@every
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_score_like_the_parallel_pass(config, engine):
    model = make(config, torch.float32)
    _needs(model, engine)
    waveform = model.grid.decode(random_codes(model, 2, 150))
    conditions = given(model, 2, 150)
    parallel = score(model, waveform, **conditions)
    stepped = score(model, waveform, engine=engine, **conditions)
    torch.testing.assert_close(stepped, parallel, rtol=1e-5, atol=1e-4)


@every
def test_scores_do_not_depend_on_the_chunks_of_the_parallel_pass(config, monkeypatch):
    model = make(config)
    waveform = model.grid.decode(random_codes(model, 2, 150))
    conditions = given(model, 2, 150)
    if conditions:
        conditions["mel"] = conditions["mel"].double()
    whole = score(model, waveform, **conditions)
    monkeypatch.setattr(sys.modules["wavear.generation.scoring"], "PARALLEL_CHUNK", 37)
    torch.testing.assert_close(score(model, waveform, **conditions), whole, rtol=1e-8, atol=1e-8)


@every
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_audio_on_every_engine(config, engine):
    """To the code, but where a uniform lies within rounding of a boundary: then the values are neighbours."""
    model = make(config, torch.float32)
    _needs(model, engine)
    conditions = given(model, 2, 180)
    expected = generate(model, samples=180, seed=[3, 4], engine="reference", **conditions)
    found = generate(model, samples=180, seed=[3, 4], engine=engine, **conditions)
    differ = (expected != found).any(dim=1)
    for b in range(2):
        if differ[b]:
            t = int((expected[b] != found[b]).nonzero()[0])
            steps = model.grid.encode(expected[b, t]) - model.grid.encode(found[b, t])
            assert abs(int(steps)) <= 1, f"sample {t} of stream {b} differs by {int(steps)} codes"
    # Of 65536 values a boundary lies so near every 30th uniform or so.
    assert model.grid.classes > 4096 or not differ.all()


@every
@pytest.mark.parametrize("engine", ENGINES)
def test_audio_does_not_depend_on_batch_or_chunks(config, engine):
    model = make(config, torch.float32)
    _needs(model, engine)
    conditions = given(model, 3, 120)
    together = generate(model, samples=120, seed=[5, 6, 7], engine=engine, **conditions)
    for b in (0, 2):
        one = {"mel": conditions["mel"][b], "speaker": b} if conditions else {}
        alone = generate(model, samples=120, seed=5 + b, engine=engine, **one)
        assert torch.equal(alone[0], together[b])
        stream = Stream(model, seed=5 + b, engine=engine, speaker=one.get("speaker"))
        if one:
            parts = [stream.push(one["mel"][:, n : n + 3]) for n in range(0, 10, 3)]
            made = torch.cat([*parts, stream.flush()])
        else:
            made = torch.cat([stream.pull(n) for n in (1, 50, 69)])
        assert torch.equal(made[:120], alone[0])


@every
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_goes_on_from_its_file_on_another_engine(config, engine, tmp_path):
    model = make(config, torch.float32)
    _needs(model, engine)
    if model.config.mel is not None:
        pytest.skip("test_stream has streams with mels")
    whole = Stream(model, seed=9, engine=engine)
    expected = torch.cat([whole.pull(60), whole.pull(40)])
    stream = Stream(model, seed=9, engine="reference")
    first = stream.pull(60)
    rest = Stream.load(model, stream.save(tmp_path / "state.safetensors"), engine=engine).pull(40)
    found = torch.cat([first, rest])
    assert (found == expected).float().mean() > 0.5
    assert torch.isfinite(found).all()


@every
def test_a_recording_is_gone_on_from_as_from_one_that_was_made(config):
    model = make(config, torch.float32)
    conditions = given(model, 1, 120)
    whole = generate(model, samples=120, seed=1, engine="reference", **conditions)
    rest = generate(
        model, samples=60, seed=1, engine="reference", prime=whole[:, :60], **conditions
    )
    assert (
        rest == whole[:, 60:]
    ).float().mean() > 0.5  # float32 sums in another order may flip one, and what follows


@every
def test_save_and_load(config, tmp_path):
    model = make(config, torch.float32)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert again.family == model.family
    codes, cond = random_codes(model, 1, 30), conditioning(model, 1, 30)
    with torch.no_grad():
        assert torch.equal(again(codes, cond), model(codes, cond))


def _needs(model: Any, engine: str) -> None:
    try:
        make_engine(model, 1, engine)
    except ValueError as error:
        pytest.skip(str(error))


# ---- training and the command line, by family


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("recordings")
    for n in range(4):
        t = np.arange(3000 + 700 * n) / 8000
        audio.write(
            folder / f"{n}.wav",
            (0.4 * np.sin(2 * np.pi * (200 + 50 * n) * t)).astype(np.float32),
            8000,
        )
    return folder


def settings(family: str, recordings: Any, out: Any, **changes: Any) -> TrainConfig:
    small = {
        "segment": 480,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "max_steps": 40,
    }
    fixed = {
        "sample_rate": 8000,
        "mel_hop_length": 64,
        "precision": "32",
        "device": "cpu",
        "progress": False,
    }
    return TrainConfig(
        family=family,
        data=recordings,
        out=out,
        sample_seconds=0.0,
        **{**small, **fixed, **TRAINED[family], **changes},
    )


@pytest.mark.parametrize("family", TRAINED)
def test_training_learns(family, recordings, tmp_path):
    result = train(settings(family, recordings, tmp_path / "run"))
    assert result.bits_final < result.bits_before - 0.5
    model = load(result.best)
    assert model.family == family
    held_out = audio.read(sorted(recordings.glob("*.wav"))[0], 8000)
    bits = -score(model, held_out[:1000]).mean() / math.log(2)
    assert bits < 8


@pytest.mark.parametrize("family", [f for f in TRAINED if f != "linear"])
@pytest.mark.parametrize("law", ["logistic_mixture", "gaussian"])
def test_laws_over_values_train(family, law, recordings, tmp_path):
    result = train(
        settings(
            family, recordings, tmp_path / "run", law=law, unconditional=True, mel_hop_length=None
        )
    )
    assert result.bits_final < result.bits_before - 0.5
    assert result.held_out["uniform"] == 16


@pytest.mark.parametrize("family", [f for f in TRAINED if f != "linear"])
def test_a_resumed_run_is_the_run_that_never_stopped(family, recordings, tmp_path):
    """Weights and carried states, bit for bit."""
    whole = settings(family, recordings, tmp_path / "whole", max_steps=12, checkpoint_every=6)
    train(whole)
    cut = settings(
        family, recordings, tmp_path / "cut", max_steps=12, checkpoint_every=6, validate_every=100
    )
    train(cut)
    for path in sorted((tmp_path / "cut" / "states").glob("*"))[1:]:
        if "12" in path.name:
            path.unlink()
    train(
        settings(
            family, recordings, tmp_path / "cut", max_steps=12, checkpoint_every=6, resume=True
        )
    )
    for name, tensor in load(tmp_path / "whole" / "last").state_dict().items():
        assert torch.equal(tensor, load(tmp_path / "cut" / "last").state_dict()[name]), name


@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_training_carries_the_state_from_batch_to_batch(family, recordings, tmp_path):
    train(settings(family, recordings, tmp_path / "run", max_steps=3, checkpoint_every=1))
    carried = [
        load_state(path)["carried"] for path in sorted((tmp_path / "run" / "states").glob("*"))
    ]
    assert len(carried) >= 2
    for name, before in carried[-2].items():
        if before.is_floating_point():
            assert before.abs().sum() > 0, name
    assert any(not torch.equal(tensor, carried[-1][name]) for name, tensor in carried[-2].items())


@pytest.mark.parametrize("family", TRAINED)
def test_the_command_line_makes_a_model_and_sound_of_it(family, recordings, tmp_path, capsys):
    from wavear.common.atomic import replace_file  # noqa: F401 (imported before warnings are made errors)

    config = settings(
        family, recordings, tmp_path / "run", max_steps=3, unconditional=True, mel_hop_length=None
    )
    train(config)
    assert main(["info", str(tmp_path / "run" / "best")]) == 0
    assert family in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = main(
            [
                "generate",
                str(tmp_path / "run" / "best"),
                "--seconds",
                "0.05",
                "--out",
                str(tmp_path / "made.wav"),
            ]
        )
    assert made == 0
    assert audio.read(tmp_path / "made.wav", 8000).numel() == 400


def test_settings_of_another_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match="family is 'rnn', it must be one of predictive, wavenet"):
        TrainConfig(data="x", out="y", family="rnn")


# ---- lanes


def test_lanes_play_recordings_in_order_and_every_second_as_often(recordings):
    from wavear.data.corpus import open_corpus
    from wavear.data.crops import Layout

    corpus = open_corpus(str(recordings), sample_rate=8000, validation_fraction=0.01)
    layout = Layout(
        segment=100,
        context=0,
        receptive_field=0,
        hop=1,
        lookahead=0,
        lookback=0,
        mel=None,
        sample_rate=8000,
    )
    lanes = Lanes(corpus.train, layout, batch_size=3, seed=1)
    counts = [np.zeros(r.frames, dtype=int) for r in corpus.train]
    for visit in range(400):
        plan = lanes.visit(0, visit)
        assert len(plan) == VISIT
        assert plan == Lanes(corpus.train, layout, batch_size=3, seed=1).visit(0, visit)
        before = None
        for source, start, begins in plan:
            assert begins or (before is not None and before == (source, start - 100))
            counts[source][start : start + 100] += 1
            before = (source, start)
    means = [count.mean() for count in counts]
    assert min(means) > 0.8 * max(means)
    assert min(count[:-100].min() for count in counts) > 0.6 * np.mean(means)
    # Item by item, what the plan says.
    for batch in (0, 1, VISIT - 1, VISIT, 5 * VISIT + 3):
        for lane in range(3):
            item = lanes[batch * 3 + lane]
            source, start, begins = lanes.visit(lane, batch // VISIT)[batch % VISIT]
            assert (item["source"], item["start"], item["begins"]) == (source, start, begins)
    assert lanes.visit(0, 0) != lanes.visit(1, 0)


def test_a_lane_rests_where_a_file_cannot_be_read(recordings, tmp_path):
    from wavear.data.corpus import open_corpus
    from wavear.data.crops import Layout

    for path in recordings.glob("*.wav"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    corpus = open_corpus(str(tmp_path), sample_rate=8000, validation_fraction=0.01)
    layout = Layout(
        segment=100,
        context=0,
        receptive_field=0,
        hop=1,
        lookahead=0,
        lookback=0,
        mel=None,
        sample_rate=8000,
    )
    lanes = Lanes(corpus.train, layout, batch_size=1)
    source = lanes.visit(0, 0)[0][0]
    (tmp_path / corpus.train[source].name).write_bytes(b"gone")
    item = lanes[0]
    assert item["span"] == (0, 0)
    assert item["skipped"][0][0] == corpus.train[source].name


def test_carried_states_begin_anew_where_a_stretch_begins():
    model = make(MODELS["wavenet"], torch.float32)
    carried = Carried(model, 2)
    codes = random_codes(model, 2, 30)
    with torch.no_grad():
        state, previous = carried.take(model, slice(0, 2), torch.tensor([True, True]))
        model(codes, None, state, previous)
        carried.put([Carried.give(model, state, codes[:, -1])])
        state, previous = carried.take(model, slice(0, 2), torch.tensor([False, True]))
    fresh = model.export_state(model.init_state(2))
    assert previous.tolist() == [int(codes[0, -1]), model.start_code]
    found = model.export_state(state)
    assert all(torch.equal(found[name][1], fresh[name][1]) for name in fresh)
    assert any(not torch.equal(found[name][0], fresh[name][0]) for name in fresh)
