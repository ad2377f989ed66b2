"""Uniforms and inverse-CDF sampling."""

import numpy as np
import pytest
import torch
from scipy import stats

from wavear.models.sampling import sample, uniforms


def test_uniforms_are_a_function_of_seed_and_time():
    whole = uniforms(123, 0, 1000)
    for start, count in [(0, 1), (1, 1), (3, 5), (4, 4), (997, 3), (500, 0)]:
        assert (uniforms(123, start, count) == whole[start : start + count]).all()
    assert not (uniforms(124, 0, 1000) == whole).any()


def test_uniforms_do_not_change_between_versions():
    # Philox4x64-10, key 1, from counter 1: the generator of the paper in exact integer
    # arithmetic.
    def philox(counter, key, rounds=10):
        c, k = [counter, 0, 0, 0], [key, 0]
        mask = 2**64 - 1
        for _ in range(rounds):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        return c

    words = philox(1, 1) + philox(2, 1)
    assert uniforms(1, 0, 8).tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_uniforms_are_uniform():
    draws = np.concatenate([uniforms(seed, 0, 100_000) for seed in range(10)])
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:100_000], draws[100_000:200_000])[0, 1]) < 0.02


def test_sample_inverts_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25]]))
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits.expand(6, 4).double(), u).tolist() == [0, 0, 2, 2, 3, 3]
    # A uniform on a boundary belongs to the code above.
    u = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert sample(torch.zeros(4, 4), u).tolist() == [0, 1, 2, 3]


def test_no_uniform_reaches_past_the_last_possible_code():
    logits = torch.tensor([[0.0, 1.0, 2.0] + [-1e30] * 61])
    assert sample(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_distribution(temperature):
    torch.manual_seed(0)
    logits = torch.randn(16)
    draws = sample(
        logits.expand(200_000, 16), torch.from_numpy(uniforms(5, 0, 200_000)), temperature
    )
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * 200_000
    assert stats.chisquare(np.bincount(draws.numpy(), minlength=16), expected).pvalue > 1e-3


def by_hand(
    logits: np.ndarray, uniform: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """Compute the definition step by step in plain Python."""
    scaled = logits / temperature
    law = np.exp(scaled - scaled.max())
    law /= law.sum()
    order = sorted(range(len(law)), key=lambda code: (-logits[code], code))
    staying = order if top_k is None else order[:top_k]
    law = np.array([p if code in staying else 0.0 for code, p in enumerate(law)])
    law /= law.sum()
    if top_p is not None:
        nucleus, share = [], 0.0
        for code in staying:
            nucleus.append(code)
            share += law[code]
            if share >= top_p:
                break
        law = np.array([p if code in nucleus else 0.0 for code, p in enumerate(law)])
        law /= law.sum()
    cumulative = 0.0
    for code, p in enumerate(law):
        cumulative += p
        if cumulative > uniform:
            return code
    return int(np.flatnonzero(law)[-1])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.5), (5, None), (5, 0.7), (1, None), (None, 1e-9), (99, 1.0)]
)
def test_truncated_sampling_equals_the_definition(temperature, top_k, top_p):
    generator = np.random.default_rng(3)
    for _ in range(200):
        logits, uniform = generator.normal(0, 2, 16), generator.random()
        code = sample(
            torch.tensor(logits)[None], torch.tensor([uniform]).double(), temperature, top_k, top_p
        ).item()
        assert code == by_hand(logits, uniform, temperature, top_k, top_p)


def test_among_equal_logits_the_lower_codes_are_kept():
    u = torch.tensor([0.999], dtype=torch.float64)
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, u, top_k=2).item() == 2
    assert sample(logits, u, top_k=1).item() == 1
    # Two of 4 equal codes have exactly half of the probability, which reaches top_p.
    assert sample(torch.zeros(1, 4), u, top_p=0.5).item() == 1
    assert sample(torch.zeros(1, 4), u, top_p=0.500001).item() == 2


def test_top_p_is_a_share_of_the_codes_top_k_keeps():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    u = torch.tensor([0.999], dtype=torch.float64)
    # Among all codes 0.4 + 0.3 < 0.72 requires a third. Among the first two, 0.4 / 0.7 < 0.72
    # requires both, and there is no third.
    assert sample(logits, u, top_p=0.72).item() == 2
    assert sample(logits, u, top_k=2, top_p=0.72).item() == 1
    assert sample(logits, u, top_k=2, top_p=0.5).item() == 0
