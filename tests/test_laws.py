"""Output distributions: probabilities, gradients, draws, other grids, and compiled code."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from wavear.audio.grid import Grid
from wavear.generation.cpu import distributions
from wavear.models.distributions import (
    LAWS,
    Categorical,
    Gaussian,
    Laplace,
    LogisticMixture,
    converts,
    law_of,
    log_prob_on,
)
from wavear.models.sampling import uniforms
from wavear.models.wavenet import WaveNet, WaveNetConfig

GRIDS = [Grid("linear", 64), Grid("linear", 6), Grid("mulaw", 33), Grid("linear", 65536)]
LINEAR, MULAW = Grid("linear", 256), Grid("mulaw", 256)
VALUES = [lambda g: LogisticMixture(g, 3), lambda g: LogisticMixture(g, 1), Gaussian, Laplace]
NAMES = ["mixture", "logistic", "gaussian", "laplace"]


def parameters(law: Any, log_scale: float | None = None, seed: int = 0) -> torch.Tensor:
    """Return float64 parameters (1, P, 1) whose means lie within full scale."""
    draw = torch.Generator().manual_seed(seed)
    made = 0.4 * torch.randn(1, law.channels, 1, dtype=torch.float64, generator=draw)
    if log_scale is not None:
        made[:, -(law.channels // 3 or 1) if isinstance(law, LogisticMixture) else -1 :] = log_scale
    return made


def every(law: Any, given: torch.Tensor) -> torch.Tensor:
    """Return log P of every code, (Q,)."""
    codes = torch.arange(law.grid.classes)[None]
    return law.log_prob(given.expand(-1, -1, codes.shape[1]), codes)[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("make", [Categorical, *VALUES], ids=["categorical", *NAMES])
@pytest.mark.parametrize("log_scale", [-14.0, -5.0, -1.0, 8.0])
def test_probabilities_sum_to_one_at_every_scale(grid, make, log_scale):
    law = make(grid)
    if isinstance(law, Categorical) and grid.classes > 256:
        law = Categorical(Grid("mulaw", 500))  # the test needs classes * classes numbers
    given = parameters(law, None if isinstance(law, Categorical) else log_scale)
    assert every(law, given).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (Gaussian, scipy.stats.norm),
        (Laplace, scipy.stats.laplace),
        (lambda g: LogisticMixture(g, 1), scipy.stats.logistic),
    ],
    ids=["gaussian", "laplace", "logistic"],
)
def test_probabilities_equal_scipys_integrals(grid, make, theirs):
    law = make(grid)
    given = parameters(law, -2.0)
    mean = given[0, -2, 0].item()
    edges = (grid.edges() - mean) / math.exp(-2.0)
    expected = np.diff(theirs.cdf(edges))
    survival = -np.diff(theirs.sf(edges))  # exact in the upper tail
    expected = np.where(edges[:-1] > 0, survival, expected)
    found = every(law, given).exp().numpy()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    law, one = LogisticMixture(GRIDS[0], 3), LogisticMixture(GRIDS[0], 1)
    given = parameters(law, seed=3)
    logits, means, scales = given[0, :, 0].split(3)
    parts = [
        every(one, torch.tensor([0.0, m, s]).double()[None, :, None]).exp()
        for m, s in zip(means, scales, strict=True)
    ]
    mixed = sum(w * part for w, part in zip(torch.softmax(logits, 0), parts, strict=True))
    torch.testing.assert_close(every(law, given).exp(), mixed, rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", VALUES, ids=NAMES)
@pytest.mark.parametrize("log_scale", [-13.0, -3.0, 1.0])
def test_gradients_are_finite_and_equal_finite_differences(make, log_scale):
    law = make(LINEAR)
    given = parameters(law, log_scale, seed=1).requires_grad_()
    codes = torch.tensor([[0, 1, 100, 128, 255]])
    nats = law.log_prob(given.expand(-1, -1, 5), codes)
    (gradient,) = torch.autograd.grad(nats.sum(), given)
    assert torch.isfinite(nats).all()
    assert torch.isfinite(gradient).all()
    if log_scale in (-3.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda p: law.log_prob(p.expand(-1, -1, 5), codes), (given,), rtol=1e-4
        )


@pytest.mark.parametrize("make", VALUES, ids=NAMES)
def test_float32_has_the_likelihood_of_float64(make):
    law = make(Grid("linear", 65536))
    given = parameters(law, -6.0)
    near = ((given[0, -2 if law.channels == 2 else law.channels // 3, 0] + 1) * 32768).long().item()
    codes = torch.arange(near - 300, near + 300)[None]
    wide = given.expand(-1, -1, 600)
    torch.testing.assert_close(
        law.log_prob(wide.float(), codes).double(), law.log_prob(wide, codes), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize("make", [Categorical, *VALUES], ids=["categorical", *NAMES])
def test_draws_follow_the_distribution(grid, make):
    """Chi-squared test of generated codes; the seed is fixed, and p must exceed 0.001."""
    law, count = make(grid), 100_000
    given = parameters(law, None if isinstance(law, Categorical) else -1.5, seed=2)
    expected = every(law, given).exp().numpy() * count
    codes = law.sample(given[..., 0].expand(count, -1), torch.from_numpy(uniforms(11, 0, count)))
    seen = np.bincount(codes.numpy(), minlength=grid.classes).astype(float)
    rare = expected < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    assert scipy.stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize("make", VALUES, ids=NAMES)
def test_temperature_scales_the_spread(make):
    """Temperature multiplies the deviation (of a single component)."""
    law = make(Grid("linear", 65536))
    if isinstance(law, LogisticMixture) and law.mixtures > 1:
        law = LogisticMixture(law.grid, 1)
    given = parameters(law, -5.0)[..., 0].expand(200_000, -1)
    draws = torch.from_numpy(uniforms(3, 0, 200_000))
    temperatures = (1.0, 0.5, 2.0, torch.full((200_000,), 0.5))
    spread = [
        law.grid.decode(law.sample(given, draws, t)).double().std().item() for t in temperatures
    ]
    assert spread[1] / spread[0] == pytest.approx(0.5, rel=1e-3)
    assert spread[2] / spread[0] == pytest.approx(2.0, rel=1e-2)  # full scale clips a few
    assert spread[3] == spread[1]


def test_a_low_temperature_takes_the_likeliest_component():
    law = LogisticMixture(Grid("linear", 65536), 2)
    given = torch.tensor([[0.0, 1.0, -0.5, 0.5, -6.0, -6.0]]).expand(10_000, -1)
    drawn = law.grid.decode(law.sample(given, torch.from_numpy(uniforms(0, 0, 10_000)), 0.01))
    assert drawn.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert drawn.std().item() < 1e-3


@pytest.mark.parametrize("make", [Categorical, *VALUES], ids=["categorical", *NAMES])
def test_the_ends_of_the_uniform_give_codes(make):
    law = make(LINEAR)
    given = parameters(law, None if isinstance(law, Categorical) else -1.0)[..., 0].expand(3, -1)
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    codes = law.sample(given, ends)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < 256


@pytest.mark.parametrize("make", VALUES, ids=NAMES)
@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.9}])
def test_distributions_over_values_refuse_truncation(make, cut):
    law = make(GRIDS[0])
    with pytest.raises(ValueError, match="use temperature"):
        law.sample(parameters(law)[..., 0], torch.tensor([0.5], dtype=torch.float64), **cut)


def test_small_scales_are_clamped_so_that_gradients_remain():
    """Below a twentieth of the finest step the likelihood is constant, and the code certain."""
    law = Gaussian(LINEAR)
    sharp = every(law, torch.tensor([0.0, -40.0]).double()[None, :, None])
    assert sharp.exp()[128].item() == pytest.approx(1)
    assert sharp[0] > -1e7


# ---- grids


@pytest.mark.parametrize("grid", [*GRIDS, MULAW], ids=str)
def test_codes_survive_the_round_trip_and_lie_in_their_intervals(grid):
    codes = torch.arange(grid.classes)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    edges, values = grid.edges(), grid.values()
    assert (edges[:-1] < values).all()
    assert (values < edges[1:]).all()
    x = torch.linspace(-1, 1, 20011, dtype=torch.float64)
    found = grid.encode(x).numpy()
    by_edges = np.searchsorted(edges[1:-1], x.numpy(), side="right")
    assert (by_edges == found).mean() > 0.9999  # except for x on an edge
    assert np.abs(grid.decode(codes).numpy() - values).max() < 1e-6


def test_the_16_bit_grid_is_pcm():
    pcm = np.array([-32768, -1, 0, 1, 32767], dtype=np.int16)
    grid = Grid("linear", 65536)
    codes = grid.encode(torch.from_numpy(pcm.astype(np.float32) / 32768))
    assert (codes.numpy() - 32768 == pcm).all()
    assert grid.silence == 32768
    assert grid.decode(np.array([32768]))[0] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid("linear", 7), "even number"),
        (lambda: Grid("log", 8), "mulaw or linear"),  # type: ignore[arg-type]
        (lambda: Grid("linear", 65538), "2 to 65536"),
        (lambda: Grid("linear", 8).encode(torch.tensor([float("nan")])), "NaN"),
        (lambda: Grid("linear", 8).encode(torch.tensor([1])), "floating point"),
        (lambda: Grid("linear", 8).decode(torch.tensor([8])), "outside"),
        (lambda: Grid("linear", 8).decode(torch.tensor([0.5])), "expected integers"),
    ],
)
def test_wrong_grids_and_samples_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- configurations


@pytest.mark.parametrize("law", LAWS)
def test_the_name_selects_its_distribution_and_the_default_classes(law):
    config = WaveNetConfig(law=law)
    assert type(law_of(config)).__name__.lower() == law.replace("_", "")
    assert config.classes == (256 if law == "categorical" else 65536)
    assert law_of(config).grid.kind == ("mulaw" if law == "categorical" else "linear")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"law": "poisson"}, "categorical, logistic_mixture, gaussian, laplace"),
        ({"law": "gaussian", "classes": 255}, "even number"),
        ({"law": "logistic_mixture", "mixtures": 0}, "mixtures is 0"),
        ({"coarse_classes": 64}, "set 0"),
        ({"law": "gaussian", "coarse_classes": 1}, "2 to 65536"),
        ({"classes": 1}, "2 to 65536"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WaveNetConfig(**fields)


# ---- compiled code


@pytest.mark.parametrize("make", VALUES, ids=NAMES)
@pytest.mark.parametrize("classes", [6, 256, 65536])
@pytest.mark.parametrize("log_scale", [-14.0, -1.0, 3.0])
def test_compiled_distributions_draw_and_score_alike(make, classes, log_scale):
    law = make(Grid("linear", classes))
    numbers = distributions.numbers(law)
    row = np.ascontiguousarray(parameters(law, log_scale, seed=4)[0, :, 0], dtype=np.float32)
    given = torch.from_numpy(row).double()[None]
    codes = torch.cat([torch.tensor([0, classes - 1]), torch.randint(classes, (100,))])
    expected = law.log_prob(given[..., None].expand(-1, -1, 102), codes[None])[0].numpy()
    found = [distributions.log_probability(*numbers, row.ctypes.data, int(code)) for code in codes]
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)
    # In the last 2**-30 of a mixture's component the value depends on the last bits of the sum
    # of the weights, so the draws stop there.
    draws = np.concatenate([[0.0, 2.0**-53, 1 - 2.0**-30], uniforms(5, 0, 500)])
    memory = np.empty(numbers[1])
    for temperature in (1.0, 0.7):
        theirs = law.sample(given.expand(503, -1), torch.from_numpy(draws), temperature).tolist()
        assert [
            distributions.draw_value(*numbers, row.ctypes.data, u, temperature, memory)
            for u in draws
        ] == theirs


def test_compiled_draws_detect_non_finite_parameters():
    for law in (LogisticMixture(GRIDS[0], 2), Gaussian(GRIDS[0])):
        row = np.zeros(law.channels, np.float32)
        row[-1] = np.nan
        numbers = distributions.numbers(law)
        memory = np.empty(numbers[1])
        assert distributions.draw_value(*numbers, row.ctypes.data, 0.5, 1.0, memory) == -1


def test_the_normal_quantile_equals_scipys():
    ends = [2.0 ** -np.arange(1, 1000, 7.0), 1 - 2.0 ** -np.arange(1, 53.0)]
    u = np.concatenate([uniforms(0, 0, 2000), *ends])
    found = [distributions.normal_quantile(x) for x in u]
    assert found == pytest.approx(scipy.special.ndtri(u), rel=1e-14, abs=1e-15)


def test_half_precision_leaves_the_values_of_codes_exact():
    model = WaveNet(
        WaveNetConfig(layers=1, stacks=1, residual_channels=4, skip_channels=4, law="gaussian")
    )
    values = model.embedding.values.clone()
    assert torch.equal(model.half().float().embedding.values, values)
    assert model.bfloat16().embedding.values.dtype == torch.float32
    assert len(values.unique()) == 65536


# ---- other grids


PAIRS = [
    (Grid("linear", 65536), Grid("mulaw", 256)),
    (Grid("linear", 1024), Grid("linear", 64)),
    (Grid("mulaw", 256), Grid("mulaw", 33)),
]


@pytest.mark.parametrize(("own", "coarser"), PAIRS, ids=str)
@pytest.mark.parametrize("make", [Categorical, *VALUES], ids=["categorical", *NAMES])
@pytest.mark.parametrize("log_scale", [-10.0, -1.0])
def test_probabilities_on_a_coarser_grid_are_sums_over_codes(own, coarser, make, log_scale):
    """They equal a sum over single codes, and add up to one, within float64 rounding."""
    if make is Categorical and own.classes > 1024:
        own = Grid("mulaw", 1024)
    law = make(own)
    given = parameters(law, None if make is Categorical else log_scale)
    becomes = coarser.encode(own.values().copy())
    summed = np.zeros(coarser.classes)
    np.add.at(summed, becomes, every(law, given).exp().numpy())
    one_each = torch.from_numpy(np.unique(becomes, return_index=True)[1])[None]
    assert one_each.shape == (1, coarser.classes)
    wide = given.expand(-1, -1, coarser.classes)
    found = log_prob_on(law, wide, one_each, coarser)[0].exp().numpy()
    assert found.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found, summed, rtol=1e-9, atol=1e-13)


def test_a_code_belongs_to_the_coarser_code_of_its_sample():
    own, coarser = Grid("linear", 65536), Grid("mulaw", 256)
    law = Gaussian(own)
    codes = torch.arange(30000, 35000)[None]
    given = parameters(law, -6.0).expand(-1, -1, codes.shape[1])
    found = log_prob_on(law, given, codes, coarser)[0]
    became = coarser.encode(own.decode(codes))[0]
    pairs = set(zip(became.tolist(), found.tolist(), strict=True))
    assert len(pairs) == len(set(became.tolist())) > 50


def test_probabilities_on_a_finer_grid_are_spread_evenly():
    own, finer = Grid("mulaw", 256), Grid("linear", 65536)
    law = Categorical(own)
    given = parameters(law)
    codes = own.encode(torch.from_numpy(finer.values().copy()))[None]
    found = log_prob_on(law, given.expand(-1, -1, 65536), codes, finer)[0].exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-9)
    per_code = np.bincount(codes[0].numpy(), found.numpy())
    np.testing.assert_allclose(per_code, every(law, given).exp().numpy(), rtol=1e-9)
    assert found[codes[0] == 128].unique().numel() == 1


def test_grids_that_are_finer_in_places_do_not_convert():
    law = Gaussian(LINEAR)
    assert not converts(law.grid, Grid("mulaw", 256))
    assert converts(law.grid, Grid("linear", 65536))
    with pytest.raises(ValueError, match="8-bit linear and 256 mu-law codes cannot be compared"):
        log_prob_on(law, parameters(law), torch.tensor([[3]]), Grid("mulaw", 256))
