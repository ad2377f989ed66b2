"""Compiled engines of every family equal forward, the reference and themselves."""

from __future__ import annotations

import copy
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    CASES,
    PREDICTIVE,
    WAVENET,
    WEIGHTS,
    assert_codes_follow,
    conditioning,
    make_gru,
    make_transformer,
    make_wavenet,
    parallel,
    piece,
    random_codes,
    random_uniforms,
    scored_in_parts,
    tolerance,
)

from wavear import Stream, generate
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine

cases = pytest.mark.parametrize(("case", "config"), CASES.values(), ids=CASES.keys())
FIRST = {name: CASES[name] for name in ("wavenet", "gru", "transformer", "predictive")}
families = pytest.mark.parametrize(("case", "config"), FIRST.values(), ids=FIRST.keys())
weights_ = pytest.mark.parametrize("weights", WEIGHTS)


@cases
def test_scores_equal_forward_for_any_cuts(case, config):
    model = case.make(**config)
    codes, cond = random_codes(model, 5, 150), conditioning(model, 5, 150)
    expected = parallel(model, codes, cond)
    for cuts, threads in (((0, 150), 1), ((0, 1, 2, 70, 150), 2)):
        engine = case.engine(model, 5, threads=threads)
        found = scored_in_parts(engine, codes, cond, cuts)
        np.testing.assert_allclose(found, expected, atol=case.tolerance, rtol=1e-5)


GROUPINGS = [(1, 1), (2, 2), (3, 1), (5, 2), (13, 1), (29, 2), (40, 1)]


@weights_
@cases
def test_a_stream_has_the_same_bits_in_every_batch_grouping_and_cut(case, config, weights):
    model = case.make(**config)
    samples, most = 90, max(batch for batch, _ in GROUPINGS)
    uniforms, codes = random_uniforms(most, samples), random_codes(model, most, samples)
    cond = conditioning(model, most, samples)
    temperatures = np.random.default_rng(1).uniform(0.5, 1.5, (most, samples))
    bits: dict[tuple[str, int], set[bytes]] = {}
    packed = case.engine(model, 1, weights=weights)
    for number, (batch, threads) in enumerate(GROUPINGS):
        # Each grouping places the streams differently: every seventh, from its own number on.
        chosen = (np.arange(batch) * 7 + number) % most
        cuts = [0, *sorted({1, 17 + number, 64, 64 + 3 * number}), samples]
        packed._asked_threads = threads
        runner, scorer = packed.resized(batch), packed.resized(batch)
        found = [
            runner.generate(uniforms[chosen, a:b], piece(cond, a, b, chosen),
                            temperatures[chosen, a:b])
            for a, b in pairwise(cuts)
        ]  # fmt: skip
        scores = [
            scorer.score(codes[chosen, a:b], piece(cond, a, b, chosen)) for a, b in pairwise(cuts)
        ]
        for place, stream in enumerate(chosen.tolist()):
            for name, parts in (("drawn", found), ("scored", scores)):
                row = np.concatenate(parts, axis=1)[place].tobytes()
                bits.setdefault((name, stream), set()).add(row)
    assert len(bits) == 2 * most
    assert all(len(rows) == 1 for rows in bits.values())


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (CASES["wavenet"][0], {"layers": 10, "stacks": 1, "residual_channels": 32}),
        (CASES["wavenet"][0], {"kernel_size": 3, "speakers": 2, "classes": 1024}),
        (CASES["gru"][0], {"layers": 1, "channels": 64}),
        (CASES["gru"][0], {"layers": 3, "channels": 21, "speakers": 2, "classes": 1024}),
        (CASES["transformer"][0], {"speakers": 2}),
    ],
)
@torch.inference_mode()
def test_free_running_codes_equal_the_reference(case, config):
    model = case.make(**config)
    samples = 150
    uniforms, cond = random_uniforms(2, samples), conditioning(model, 2, samples)
    nats = np.empty((2, samples))
    found = case.engine(model, 2).generate(uniforms, cond, log_probability=nats)
    expected = ReferenceEngine(model, 2).generate(uniforms, cond)
    assert_codes_follow(model, found, uniforms, cond)
    for row in range(2):
        # A uniform near a boundary selects another code, and so another future. Up to the first
        # code that differs, the reference's codes are within tolerance too.
        differ = np.flatnonzero(found[row] != expected[row])
        stop, rows = differ[0] + 1 if differ.size else samples, slice(row, row + 1)
        assert_codes_follow(
            model, expected[rows, :stop], uniforms[rows, :stop], piece(cond, 0, stop, [row])
        )
    assert (found == expected).mean() > 0.5
    assert len(np.unique(found)) > 20
    np.testing.assert_allclose(nats, parallel(model, found, cond), atol=case.tolerance, rtol=1e-5)


@pytest.mark.parametrize("make", [make_wavenet, make_gru, make_transformer])
@torch.inference_mode()
def test_temperature_top_k_and_top_p_equal_those_of_the_reference(make):
    model, uniforms = make(), random_uniforms(1, 80)
    temperature = np.where(np.arange(80) < 40, 0.25, 2.0)[None]
    options: tuple[dict[str, Any], ...] = (
        {}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6},
    )  # fmt: skip
    for given in options:
        nats = np.empty((2, 1, 80))
        found, expected = (
            engine.generate(uniforms, None, temperature, log_probability=row, **given)
            for engine, row in zip(
                (make_engine(model, 1, "numba")[1], ReferenceEngine(model, 1)), nats, strict=True
            )
        )
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(nats[0], nats[1], atol=1e-4)


@pytest.mark.parametrize("name", ["wavenet, odd", "gru", "gru, mixture", "transformer"])
def test_constant_conditioning_equals_the_same_for_every_sample(name):
    case, config = CASES[name]
    model = case.make(**config)
    cond, codes = conditioning(model, 3, 1), random_codes(model, 3, 100)
    constant = case.engine(model, 3).score(codes, cond)
    repeated = case.engine(model, 3).score(codes, cond.expand(-1, -1, 100))
    if name == "transformer":  # the head adds it in another place of the sum
        np.testing.assert_allclose(constant, repeated, atol=case.tolerance)
    else:
        np.testing.assert_array_equal(constant, repeated)


def is_rounded(model: Any, name: str) -> bool:
    """Return if `weights` rounds a parameter, by the definition and not by the engine's."""
    kind = type(model).__name__
    if model.get_parameter(name).dim() != 2:
        return False
    if kind == "GRU":
        return name.startswith(("gru.", "head.first", "head.last")) and name != "gru.weight_ih_l0"
    if kind == "PredictiveWaveNet":
        return not name.startswith("conditioning.")
    return name.startswith(("blocks", "head", "enter")) and name != "head.place.weight"


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@families
def test_rounded_weights_equal_a_model_of_rounded_matrices(case, config, weights):
    model = case.make(**config)
    codes, cond = random_codes(model, 2, 80), conditioning(model, 2, 80)
    before = copy.deepcopy(model.state_dict())
    engine = case.engine(model, 2, weights=weights)
    found = engine.score(codes, cond)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert np.abs(found - case.engine(model, 2).score(codes, cond)).max() > 1e-4
    as_run = engine._as_run()
    with torch.no_grad():
        for name, matrix in model.named_parameters():
            if not is_rounded(model, name):
                assert torch.equal(matrix, as_run.get_parameter(name)), name
                continue
            if weights == "bfloat16":
                matrix.copy_(matrix.bfloat16().float())
            else:  # each tap of a dilated convolution is a matrix of its own
                taps = model.config.kernel_size if name.endswith("dilated.weight") else 1
                rows = matrix.reshape(len(matrix), taps, -1).double()
                step = rows.abs().amax(dim=2, keepdim=True) / 127
                matrix.copy_((torch.round(rows / step) * step).reshape(matrix.shape))
            torch.testing.assert_close(matrix, as_run.get_parameter(name), rtol=1e-6, atol=1e-8)
    if case in (PREDICTIVE, WAVENET):  # activations too: in test_numba_predictive and test_int8
        model = as_run
    expected = parallel(model, codes, cond)
    np.testing.assert_allclose(found, expected, atol=tolerance(case, weights), rtol=1e-5)


@cases
@torch.inference_mode()
def test_a_state_resumes_on_any_engine(case, config):
    model = case.make(**config)
    codes, cond = random_codes(model, 3, 110), conditioning(model, 3, 110)
    expected = parallel(model, codes, cond)
    engine, reference = case.engine(model, 3), ReferenceEngine(model, 3)
    for each in (engine, reference):
        each.score(codes[:, :60], piece(cond, 0, 60))
    found = engine.state(1)
    for name, tensor in reference.state(1).items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    order, rest = [2, 0, 1], (60, 110)
    goals = engine.resized(3), case.engine(model, 3, threads=1), ReferenceEngine(model, 3)
    for source in (engine, reference):
        for goal in goals:
            goal.score(codes[:, :9], piece(cond, 0, 9))  # at another position before
            for place, stream in enumerate(order):
                goal.load_state(place, source.state(stream))
            scores = goal.score(codes[order, 60:], piece(cond, *rest, order))
            np.testing.assert_allclose(
                scores, expected[order, 60:], atol=2 * case.tolerance, rtol=1e-5
            )


@cases
@torch.inference_mode()
def test_resuming_from_its_own_state_changes_no_bit_and_a_state_is_a_copy(case, config):
    model = case.make(**config)
    uniforms, cond = random_uniforms(3, 100), conditioning(model, 3, 100)
    whole = case.engine(model, 3).generate(uniforms, cond)
    first = case.engine(model, 3)
    first.generate(uniforms[:, :41], piece(cond, 0, 41))
    order = [2, 0, 1]
    other = first.resized(3)
    for place, stream in enumerate(order):
        other.load_state(place, first.state(stream))
    found = other.generate(uniforms[order, 41:], piece(cond, 41, 100, order))
    np.testing.assert_array_equal(found, whole[order, 41:])
    state = first.state(0)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    first.generate(uniforms[:, 41:], piece(cond, 41, 100))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert not all(torch.equal(first.state(0)[name], kept[name]) for name in kept)


@weights_
@families
@torch.inference_mode()
def test_filling_equals_scoring(case, config, weights):
    model = case.make(**{"speakers": 2, **config})
    codes, cond = random_codes(model, 2, 150), conditioning(model, 2, 150)
    filled, scored = (case.engine(model, 2, weights=weights) for _ in range(2))
    for stream in range(2):
        filled.fill(stream, codes[stream, :100], piece(cond, 0, 100, [stream]))
    scored.score(codes[:, :100], piece(cond, 0, 100))
    for name, tensor in scored.state(1).items():
        close = tolerance(case, weights)
        torch.testing.assert_close(filled.state(1)[name], tensor, rtol=1e-4, atol=close)
    rest = [engine.score(codes[:, 100:], piece(cond, 100, 150)) for engine in (filled, scored)]
    np.testing.assert_allclose(rest[0], rest[1], atol=tolerance(case, weights), rtol=1e-5)


@families
def test_a_new_engine_runs_the_weights_changed_in_place(case, config):
    model = case.make(**config)
    codes, cond = random_codes(model, 1, 30), conditioning(model, 1, 30)
    other = case.make(**config, seed=1)
    for change in (
        lambda: model.load_state_dict(other.state_dict()),
        lambda: [parameter.data.mul_(1.1) for parameter in model.parameters()],
    ):
        before = case.engine(model, 1).score(codes, cond)
        change()
        found = case.engine(model, 1).score(codes, cond)
        assert np.abs(found - before).max() > 1e-3
        expected = parallel(model, codes, cond)
        np.testing.assert_allclose(found, expected, atol=case.tolerance, rtol=1e-5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
@families
def test_a_model_of_another_precision_runs_in_float32(case, config, precision):
    model = case.make(**{"speakers": 2, **config}).to(precision)
    codes, cond = random_codes(model, 2, 40), conditioning(model, 2, 40).to(precision)
    found = case.engine(model, 2).score(codes, cond)
    expected = parallel(model.float(), codes, cond.to(torch.float32))
    np.testing.assert_allclose(found, expected, atol=case.tolerance, rtol=1e-5)


@pytest.mark.cuda
def test_a_model_on_another_device_runs_on_the_cpu():
    case, config = CASES["wavenet, odd"]
    model = case.make(**config)
    codes, cond = random_codes(model, 1, 40), conditioning(model, 1, 40)
    expected = parallel(model, codes, cond)
    found = case.engine(model.cuda(), 1).score(codes, cond.cuda())
    np.testing.assert_allclose(found, expected, atol=case.tolerance)


@families
def test_unusable_arguments_are_refused_by_name(case, config):
    model = case.make(**{"speakers": 2, **config})
    cond, uniforms, classes = conditioning(model, 2, 10), np.zeros((2, 10)), model.config.classes
    for call, message in (
        (lambda: case.engine(model, 2, weights="int4"), "weights is 'int4'"),
        (lambda: case.engine(model, 0), "batch is 0"),
        (lambda: case.engine(model, 1, threads=0), "threads is 0"),
        (lambda: case.engine(torch.nn.Linear(1, 1), 1), "not Linear: use engine 'reference'"),
        (lambda: case.engine(model, 3).generate(uniforms, cond), "for 3 streams"),
        (lambda: case.engine(model, 2).generate(uniforms, None), "cond"),
        (lambda: case.engine(model, 2).generate(uniforms, cond[:, :, :9]), "9"),
        (
            lambda: case.engine(model, 2).score(np.full((2, 10), classes), cond),
            f"reach from {classes} to {classes}, expected 0 to {classes - 1}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert case.engine(model, 2).generate(uniforms[:, :0], piece(cond, 0, 0)).shape == (2, 0)


def test_unusable_conditioning_is_refused():
    model, free = make_wavenet(speakers=2), make_gru()
    channels = model.config.conditioning_channels
    engine = make_engine(model, 2, "numba")[1]
    with pytest.raises(ValueError, match=rf"expected \(2, {channels}, 10\)"):
        engine.generate(np.zeros((2, 10)), torch.zeros(2, channels - 1, 10))
    with pytest.raises(ValueError, match="unconditional, and cond is given"):
        make_engine(free, 1, "numba")[1].generate(np.zeros((1, 3)), torch.zeros(1, 80, 3))


@families
def test_non_finite_values_are_an_error(case, config):
    model = case.make(**config)
    names = "head.3.bias", "head.last.bias", "head.out.bias", "output.bias"
    (last,) = (value for name, value in model.named_parameters() if name in names)
    cond = conditioning(model, 4, 10)
    with torch.no_grad():
        last[0] = torch.nan
    for batch in (1, 4):
        engine = case.engine(model, batch)
        with pytest.raises(ValueError, match="infinite or NaN: check the model's weights"):
            engine.generate(random_uniforms(batch, 10), piece(cond, 0, 10, range(batch)))


@families
def test_auto_is_numba_on_the_cpu_and_a_stream_equals_the_recording(case, config):
    model = case.make(**config)
    name, engine = make_engine(model, 2, weights="bfloat16")
    assert (name, type(engine)) == ("numba", case.engine)
    if case is PREDICTIVE:  # in test_numba_predictive: its streams need mels
        return
    speaker = 1 if model.config.speakers else None
    whole = generate(model, samples=1000, speaker=speaker, seed=5)[0]
    stream = Stream(model, seed=5, speaker=speaker)
    parts = [stream.pull(n) for n in (1, 300, 400)]
    later = Stream.load(model, stream.state())
    assert torch.equal(torch.cat([*parts, later.pull(299)]), whole)


def test_other_threads_run_during_a_call():
    """The loop over samples releases the interpreter lock."""
    model = make_gru(channels=200, layers=2)
    engine = make_engine(model, 1, "numba", threads=1)[1]
    engine.generate(random_uniforms(1, 10), None)
    turns, done = [0], threading.Event()
    uniforms = random_uniforms(1, 10000)
    runner = threading.Thread(target=lambda: (engine.generate(uniforms, None), done.set()))
    runner.start()
    while not done.is_set():
        turns[0] += 1
    runner.join()
    # With the lock held, this thread would run once before the call and once after it.
    assert turns[0] > 500
