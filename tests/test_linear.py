"""Linear prediction: fits of known processes, the definition, engines, training."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
import scipy.stats
import torch
from test_lpc import AR4, process

from wavear import (
    Linear,
    LinearConfig,
    TrainConfig,
    audio,
    fit_linear,
    generate,
    load,
    score,
    train,
)
from wavear.audio.grid import Grid
from wavear.cli.commands import main
from wavear.generation.cpu.distributions import GAUSSIAN, LAPLACE, log_mass
from wavear.generation.cpu.linear import NumbaLinearEngine
from wavear.generation.engines import make_engine
from wavear.generation.reference import ReferenceEngine
from wavear.models import fitting as fitting
from wavear.models import lpc
from wavear.models.sampling import uniforms
from wavear.training import linear_run

KINDS: dict[str, dict[str, Any]] = {
    "laplace": {"law": "laplace"},
    "gaussian": {"law": "gaussian"},
    "companded laplace": {"law": "laplace", "domain": "companded"},
    "companded gaussian": {"law": "gaussian", "domain": "companded"},
    "16 bits, laplace": {"law": "laplace", "grid": "linear"},
    "16 bits, gaussian, differences": {"law": "gaussian", "grid": "linear", "differencing": 2},
    "33 codes, differences": {"law": "laplace", "classes": 33, "differencing": 1},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
FEW = ("gaussian", "companded laplace", "16 bits, gaussian, differences")
few = pytest.mark.parametrize("kind", [KINDS[name] for name in FEW], ids=FEW)


def speechlike(seconds: float = 0.4, rate: int = 8000, seed: int = 0) -> np.ndarray:
    """Return a process whose level swells."""
    samples = round(seconds * rate)
    swell = np.sin(np.arange(samples) / samples * 3 * np.pi) ** 2 + 0.01
    return (process(AR4, samples, 0.03, "laplace", seed) * swell).clip(-1, 1).astype(np.float32)


def model_of(kind: dict[str, Any], order: int = 5) -> Linear:
    return fit_linear(
        [speechlike(), speechlike(seed=1)], sample_rate=8000, order=order, constant=True, **kind
    )


def test_burgs_method_equals_librosas():
    librosa = pytest.importorskip("librosa")
    x = speechlike()
    model = fit_linear(x, sample_rate=8000, order=10, method="burg", grid="linear")
    values = model.grid.values()[model.grid.encode(x)]
    expected = -librosa.lpc(values, order=10)[1:]
    assert model.coefficients.detach().numpy() == pytest.approx(expected, rel=1e-9)
    assert np.abs(model.poles()).max() < 1
    energies = lpc.burg(values, 10)[1]
    assert len(energies) == 11
    assert (np.diff(energies) <= 0).all()


# ---- known processes


@pytest.mark.parametrize("law", ["laplace", "gaussian"])
@pytest.mark.parametrize("method", ["covariance", "autocorrelation", "silence", "burg"])
def test_a_known_process_is_found(law, method):
    x = process(AR4, 50000, 0.01, law)
    model = fit_linear(x, sample_rate=8000, order=4, grid="linear", law="auto", method=method)
    assert model.config.law == law
    assert model.coefficients.tolist() == pytest.approx(AR4.tolist(), abs=0.02)
    assert model.scale().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("method", ["covariance", "burg"])
def test_the_order_of_a_process_is_found(method):
    x = process(AR4, 20000, 0.01)
    shared: dict[str, Any] = {"sample_rate": 8000, "max_order": 12, "grid": "linear"}
    assert fit_linear(x, order="bic", method=method, **shared).config.order == 4
    assert fit_linear(x, order="aic", method=method, **shared).config.order >= 4


def test_a_drifting_process_is_found_by_its_differences():
    """ARI(2, 1) is the running sum of an AR(2) process; the taps apply to the signal itself."""
    x = np.cumsum(process(np.array([0.9, -0.5]), 30000, 0.002))
    x -= x.mean()
    assert np.abs(x).max() < 1
    model = fit_linear(x, sample_rate=8000, order=2, differencing=1, grid="linear")
    a, b = model.coefficients.tolist()
    assert (a, b) == pytest.approx((0.9, -0.5), abs=0.02)
    assert model.taps().tolist() == pytest.approx([1 + a, b - a, -b], abs=1e-12)
    assert model.receptive_field == 3


@few
def test_the_scale_has_the_maximum_likelihood(kind):
    """The fit uses all samples of short recordings, so the gradient of their likelihood is zero."""
    model = model_of(kind)
    codes = [model.grid.encode(torch.from_numpy(speechlike(seed=seed)))[None] for seed in (0, 1)]
    nats = torch.cat([-model.law.log_prob(model(row), row) for row in codes], dim=1).mean()
    (slope,) = torch.autograd.grad(nats, [model.log_scale])
    (curved,) = torch.autograd.grad(
        _shifted(model, codes, 0.01) - _shifted(model, codes, -0.01), [model.log_scale]
    )
    assert abs(slope) < 2e-3
    assert curved > 2e-3  # and rises on both sides


def _shifted(model: Linear, codes: list[torch.Tensor], by: float) -> torch.Tensor:
    shift = torch.tensor([0.0, by]).double()[None, :, None]
    return torch.cat([-model.law.log_prob(model(row) + shift, row) for row in codes], dim=1).mean()


# ---- the distribution


@kinds
def test_probabilities_are_integrals_over_each_code(kind):
    """scipy integrates between the edges where codes change, about a prediction made by hand."""
    model = model_of(kind)
    config, classes = model.config, model.grid.classes
    assert model.receptive_field is not None
    past = np.random.default_rng(0).integers(
        classes // 3, 2 * classes // 3, model.receptive_field + 1
    )
    values = model.predicted_grid.values()
    mean = model.constant.item()
    for lag, tap in enumerate(model.taps().tolist(), 1):
        mean += tap * values[past[-lag]]
    if config.domain == "companded":
        edges = (np.arange(1, classes) - 0.5) / (classes - 1) * 2 - 1
    else:
        edges = Grid(config.grid, classes).edges()[1:-1]  # type: ignore[arg-type]
    theirs: Any = {"laplace": scipy.stats.laplace, "gaussian": scipy.stats.norm}[config.law]
    z = (np.concatenate([[-np.inf], edges, [np.inf]]) - mean) / model.scale().item()
    expected = np.where(z[:-1] > 0, -np.diff(theirs.sf(z)), np.diff(theirs.cdf(z)))
    codes = torch.from_numpy(np.tile(past, (classes, 1)))
    every = torch.cat([codes, torch.arange(classes)[:, None]], dim=1)
    with torch.no_grad():
        found = model.law.log_prob(model(every)[:, :, -1:], every[:, -1:])[:, 0].exp().numpy()
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-300)


@few
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(kind):
    model = model_of(kind)
    classes = model.grid.classes
    parameters = torch.tensor([[0.05], [model.log_scale.item()]]).double()[None]
    every = torch.arange(classes)[None]
    above = model.law.log_prob(parameters.expand(1, 2, classes), every)[0].exp().cumsum(0)
    draws = torch.from_numpy(uniforms(5, 0, 4000))
    codes = model.law.sample(parameters[0].T.expand(4000, 2), draws)
    expected = torch.searchsorted(above, draws, right=True).clamp(max=classes - 1)
    around = torch.stack([above[(expected - 1).clamp(min=0)], above[expected]])
    near = (draws - around).abs().min(dim=0).values < 1e-9
    assert (codes == expected)[~near].all()
    assert near.sum() < 40


@few
def test_score_is_the_definition_sample_by_sample(kind):
    model = model_of(kind)
    x = torch.from_numpy(speechlike(seed=7)[:300])
    codes = model.grid.encode(x).tolist()
    values, taps = model.predicted_grid.values(), model.taps().tolist()
    past = [values[model.grid.silence]] * len(taps)
    nats = []
    for code in codes:
        mean = model.constant.item()
        for tap, value in reversed(list(zip(taps, reversed(past), strict=True))):
            mean += tap * value
        parameters = torch.tensor([[[mean], [model.log_scale.item()]]], dtype=torch.float64)
        nats.append(model.law.log_prob(parameters, torch.tensor([[code]])).item())
        past = [*past[1:], values[code]]
    for engine in ("parallel", "reference", "numba"):
        assert score(model, x, engine=engine)[0].tolist() == pytest.approx(
            nats, rel=1e-12, abs=1e-12
        )


# ---- engines


@kinds
def test_predictions_have_the_same_bits_in_forward_step_and_engines(kind):
    model = model_of(kind, order=11)
    codes = model.grid.encode(torch.from_numpy(speechlike(seed=3)[:400]))[None]
    with torch.no_grad():
        whole = model(codes)
        state, previous = model.init_state(1), torch.full((1,), model.start_code)
        for t in range(60):
            assert torch.equal(model.step(previous, state), whole[:, :, t])
            previous = codes[:, t]
    # The compiled loop computes the mass of each interval about the same prediction.
    law = {"laplace": LAPLACE, "gaussian": GAUSSIAN}[model.config.law]
    scale, limits, last = model.scale().item(), model.predicted_grid.edges(), model.grid.classes - 1
    expected = []
    for c, mean in zip(codes[0].tolist(), whole[0, 0].tolist(), strict=True):
        lower, upper = (limits[c] - mean) / scale, (limits[c + 1] - mean) / scale
        expected.append(log_mass(law, lower, upper, upper - lower, c == 0, c == last))
    assert NumbaLinearEngine(model, 1).score(codes.numpy(), None)[0].tolist() == expected


@few
def test_engines_agree_code_by_code_and_in_their_scores(kind):
    """Temperatures vary by sample; in float64 rounding changes none of these codes."""
    model = model_of(kind)
    compiled, plain = NumbaLinearEngine(model, 3, threads=2), ReferenceEngine(model, 3)
    draws = np.stack([uniforms(seed, 0, 150) for seed in range(3)])
    draws[0, 40], draws[1, 50] = 0.0, 1 - 2.0**-53  # the ends
    heat = np.random.default_rng(0).uniform(0.5, 1.5, (3, 150))
    nats = np.empty((2, 3, 150))
    with torch.inference_mode():
        codes = [
            e.generate(draws, None, heat, log_probability=n)
            for e, n in zip((compiled, plain), nats, strict=True)
        ]
    assert (codes[0] == codes[1]).all()
    assert nats[0] == pytest.approx(nats[1], rel=1e-9, abs=1e-9)
    assert codes[0][0, 40] == 0


@pytest.mark.parametrize("law", ["laplace", "gaussian"])
@pytest.mark.parametrize("grid", ["mulaw", "linear"])
def test_scores_are_exact_in_far_tails(law, grid):
    """Codes lie up to a million nats from the prediction; scipy has the asymptotics."""
    model = Linear(LinearConfig(order=1, law=law, grid=grid))
    for scale in (1e-4, 1e-3, 0.3):
        model.set(np.array([0.5]), 0.0, scale)
        codes = np.array(
            [[3, model.grid.classes - 5, 7, model.grid.classes - 1, 0, model.grid.silence]]
        )
        with torch.no_grad():
            expected = model.law.log_prob(
                model(torch.from_numpy(codes)), torch.from_numpy(codes)
            ).numpy()
        found = NumbaLinearEngine(model, 1).score(codes, None)
        assert np.isfinite(found).all()
        assert found == pytest.approx(expected, rel=1e-9)
        if law == "gaussian":  # the upper tail from edge to edge, as a difference of logarithms
            edges, values = model.grid.edges(), model.grid.values()
            mean = 0.5 * values[codes[0, 0]]
            z = (edges[codes[0, 1] : codes[0, 1] + 2] - mean) / scale
            low, high = scipy.special.log_ndtr(-z)
            assert found[0, 1] == pytest.approx(low + np.log(-np.expm1(high - low)), rel=1e-9)


def test_filling_a_state_equals_stepping():
    model = model_of(KINDS["33 codes, differences"])
    codes = np.random.default_rng(0).integers(0, 33, (1, 50))
    for samples in (1, 3, 50):
        filled, stepped = NumbaLinearEngine(model, 2), ReferenceEngine(model, 1)
        filled.fill(1, codes[0, :samples], None)
        with torch.inference_mode():
            stepped.score(codes[:, :samples], None)
        state, expected = filled.state(1), stepped.state(0)
        assert {name: value.tolist() for name, value in state.items()} == {
            n: v.tolist() for n, v in expected.items()
        }
        assert model.receptive_field is not None
        assert filled.state(0)["past"].tolist() == [model.start_code] * model.receptive_field


@pytest.mark.parametrize("code", [-1, 33])
def test_the_compiled_engine_refuses_codes_out_of_range(code):
    engine = NumbaLinearEngine(model_of(KINDS["33 codes, differences"]), 1)
    with pytest.raises(ValueError, match="code"):
        engine.score(np.full((1, 4), code), None)


# ---- files, training, the command line


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    for n in range(5):
        audio.write(folder / f"{n}.wav", speechlike(1.0 + 0.3 * n, seed=n), 8000)
    return folder


def settings(recordings: Path, out: Path, **changes: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"family": "linear", "sample_rate": 8000, "progress": False, "order": 8}
    return TrainConfig(data=str(recordings), out=str(out), **{**fixed, **changes})


def test_a_run_writes_the_files_of_every_family(recordings, tmp_path):
    result = train(settings(recordings, tmp_path / "run"))
    assert result.stopped_by == "fit"
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert set(record["held_out"]) == {"model", "uniform", "unigram", "markov"}
    assert record["held_out"] == result.held_out
    assert result.held_out["model"] < result.held_out["markov"] < result.held_out["unigram"] < 8
    assert result.bits_final == pytest.approx(result.held_out["model"])
    assert record["history"][0]["bits"] == result.bits_before > result.bits_final + 1
    model = load(result.best)
    held_out = [
        name for name in recordings.glob("*.wav") if name.name not in _trained_on(recordings)
    ]
    nats = torch.cat([-score(model, audio.read(path, 8000))[0] for path in held_out])
    assert nats.mean().item() / math.log(2) == pytest.approx(result.held_out["model"], rel=1e-6)
    for name in ("coefficients", "constant", "log_scale"):
        assert torch.equal(model.state_dict()[name], load(result.last).state_dict()[name])
    # The run fits the same model as `fit_linear`.
    rows = [audio.read(recordings / name, 8000) for name in sorted(_trained_on(recordings))]
    expected = fit_linear(rows, sample_rate=8000, order=8, method="silence")
    assert expected.config == model.config
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_overwriting_a_run_removes_all_of_it(recordings, tmp_path):
    out = tmp_path / "run"
    train(settings(recordings, out))
    for name in ("metrics.csv", "bad-step-00000003.safetensors"):
        (out / name).touch()
    (out / "states").mkdir()
    train(settings(recordings, out, overwrite=True))
    assert {path.name for path in out.iterdir()} == {"best", "last", "train.json"}


def _trained_on(recordings: Path) -> set[str]:
    from wavear.data.corpus import open_corpus

    return {r.name for r in open_corpus(str(recordings), sample_rate=8000).train}


def test_reading_in_blocks_has_no_effect(recordings, tmp_path, monkeypatch):
    whole = load(train(settings(recordings, tmp_path / "whole")).best)
    monkeypatch.setattr(linear_run, "_SECONDS", 0.11)
    cut = load(train(settings(recordings, tmp_path / "cut")).best)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_truncated_file_is_named_and_the_rest_is_fitted(
    recordings, tmp_path, caplog, monkeypatch
):
    from wavear.data import crops

    broken = sorted(_trained_on(recordings))[1]
    read = crops.read_span

    def failing(recording: Any, *rest: Any) -> np.ndarray:
        if recording.name == broken:
            raise ValueError(f"{recording.path}: ends at sample 7")
        return read(recording, *rest)

    monkeypatch.setattr(linear_run, "read_span", failing)
    result = train(settings(recordings, tmp_path / "run", progress=True))
    assert result.skipped == {broken: "ends at sample 7"}
    assert f"skipped {broken}: ends at sample 7" in caplog.text
    rows = [
        audio.read(recordings / name, 8000) for name in sorted(_trained_on(recordings) - {broken})
    ]
    expected = fit_linear(rows, sample_rate=8000, order=8, method="silence")
    torch.testing.assert_close(
        load(result.best).coefficients, expected.coefficients, rtol=1e-9, atol=1e-12
    )


def test_the_command_line_fits_describes_and_generates(recordings, tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = [
        "--family=linear",
        "--sample-rate=8000",
        "--order=12",
        "--criterion=bic",
        "--stabilise",
    ]
    assert main(["train", str(recordings), "--out", out, *flags]) == 0
    printed = "".join(capsys.readouterr())
    assert "law of scale" in printed
    assert "fitted in" in printed
    model = load(f"{out}/best")
    assert 1 <= model.config.order <= 12
    assert f"AR({model.config.order})" in printed
    assert main(["info", f"{out}/best"]) == 0
    assert "linear" in capsys.readouterr().out
    flags_of_audio = ["--seconds", "0.1", "--out", str(tmp_path / "made.wav")]
    assert main(["generate", f"{out}/best", *flags_of_audio]) == 0
    made = audio.read(tmp_path / "made.wav", 8000)
    assert made.numel() == 800
    assert torch.allclose(made, generate(model, samples=800, seed=0)[0], atol=1e-4)  # 16 bits
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(recordings), "--out", out, *flags, "--resume"])
    assert "nothing to resume" in capsys.readouterr().err


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": -1}, "order is -1"),
        ({"order": 0}, "order is 0 and differencing 0"),
        ({"differencing": 1.5}, r"differencing is 1\.5"),
        ({"law": "categorical"}, "law is 'categorical', it must be laplace or gaussian"),
        ({"grid": "cubic"}, "the grid is 'cubic'"),
        ({"classes": 1}, "classes is 1"),
        ({"domain": "companded", "grid": "linear"}, "needs grid 'mulaw'"),
        ({"speakers": 2}, "neither mels nor speakers"),
        ({"sample_rate": 10}, "sample_rate is 10"),
    ],
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LinearConfig(**changes)


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ([], {}, "no samples"),
        ([np.zeros(3)], {"order": 5}, "no recording is longer than 5 samples"),
        ([np.array([0.0, np.nan, 0.0])], {"order": 1}, "NaN"),
        ([np.zeros((2, 2, 2))], {}, r"recording 0 has shape \(2, 2, 2\)"),
        ([np.zeros(50, np.int16)], {}, "recording 0 is torch.int16"),
        ([np.zeros(50), np.zeros(50)], {"method": "burg"}, "burg' is for one recording"),
        ([np.zeros(50)], {"method": "burg", "constant": True}, "has no constant"),
        ([np.zeros(50)], {"method": "prony"}, "method is 'prony', it must be one of covariance"),
        ([np.zeros(50)], {"order": "fpe"}, "order is 'fpe', it must be a whole number, aic or bic"),
        ([np.zeros(50)], {"law": "cauchy"}, "law is 'cauchy'"),
        ([np.zeros(50)], {"ridge": -1.0}, "ridge is -1"),
        ([np.zeros(50)], {"order": 2, "ridge": 0.0, "grid": "linear"}, "give a ridge above 0"),
    ],
    ids=str,
)
def test_invalid_fits_are_refused(given, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_linear(given, sample_rate=8000, **changes)


def test_recordings_beyond_full_scale_are_clipped_or_refused():
    x = np.random.default_rng(0).uniform(-1.01, 1.01, 5000)
    with pytest.warns(UserWarning, match=r"recording 0: 1\.\d+% of the samples exceed full scale"):
        loud = fit_linear(x, sample_rate=8000, order=2)
    assert loud.config == fit_linear(x.clip(-1, 1), sample_rate=8000, order=2).config
    with pytest.raises(ValueError, match=r"recording 1: .* divide 16-bit values by 32768"):
        fit_linear([x.clip(-1, 1), 32768 * x], sample_rate=8000, order=2)


def test_silence_can_be_fitted():
    model = fit_linear(np.zeros(1000), sample_rate=8000, order=4)
    assert score(model, np.zeros(100)).mean() > -0.1


def test_engines_and_runs_refuse_unsupported_options(recordings, tmp_path, monkeypatch):
    model = model_of(KINDS["laplace"])
    with pytest.raises(ValueError, match="top_k, top_p and argmax"):
        generate(model, samples=10, top_k=3)
    with pytest.raises(ValueError, match="top_k, top_p and argmax"):
        NumbaLinearEngine(model, 1).generate(np.zeros((1, 2)), None, top_p=0.5)
    with pytest.raises(ValueError, match="weights is 'bfloat16'"):
        make_engine(model, 1, "numba", weights="bfloat16")
    with pytest.raises(ValueError, match="nothing to resume"):
        settings(recordings, tmp_path, resume=True)
    with pytest.raises(ValueError, match="a linear model has no speakers: drop speakers"):
        settings(recordings, tmp_path, speakers=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        train(settings(recordings, tmp_path / "two"))


def test_settings_of_the_linear_family_are_its_own(tmp_path):
    with pytest.raises(ValueError, match="a linear model takes no mels"):
        settings(tmp_path, tmp_path, mel_preset="hifigan")
    with pytest.raises(ValueError, match="criterion is 'hqic', expected aic or bic"):
        settings(tmp_path, tmp_path, criterion="hqic")
    with pytest.raises(ValueError, match="the family linear has no layers"):
        settings(tmp_path, tmp_path, layers=3)
    with pytest.raises(ValueError, match="the family wavenet has no order"):
        settings(tmp_path, tmp_path, family="wavenet")
    for name, value in {"criterion": "bic", "stabilise": True}.items():
        with pytest.raises(ValueError, match=f"the family wavenet has no {name}"):
            settings(tmp_path, tmp_path, family="wavenet", order=None, **{name: value})
