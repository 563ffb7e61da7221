import math
from itertools import product

import numpy as np
import pytest

from silotune.components.learning.leakage.one_run import lower_bound, p_value, refuted
from silotune.components.learning.privacy.gaussian import epsilon_of

DELTA = 1e-5


def test_p_value_of_pure_privacy_is_a_binomial_tail():
    q, r, v = math.exp(1.3) / (1 + math.exp(1.3)), 40, 33
    tail = math.fsum(math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(v, r + 1))
    assert p_value(1.3, 0.0, 100, r, v) == pytest.approx(tail, rel=1e-10)


def test_p_value_with_delta_is_the_theorems():
    """Theorem 5.2 written out, with whole numbers and `math.comb`."""
    epsilon, delta, m, r, v = 0.8, 1e-4, 60, 30, 24
    q = 1 / (1 + math.exp(-epsilon))

    def f(w):
        return math.fsum(math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(max(w, 0), r + 1))

    alpha = max((f(v - i) - f(v)) / i for i in range(1, m + 1))
    assert p_value(epsilon, delta, m, r, v) == pytest.approx(f(v) + 2 * m * delta * alpha, rel=1e-10)


def test_p_value_bounds_randomised_response_exactly():
    """The best attack on m randomised responses, which are what ε is tight for, is right as often as the bound allows."""
    epsilon, m = 1.0, 6
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    for v in range(m + 1):
        chance = sum(q ** sum(bits) * (1 - q) ** (m - sum(bits)) for bits in product([0, 1], repeat=m) if sum(bits) >= v)
        assert p_value(epsilon, 0.0, m, m, v) == pytest.approx(chance)


def test_what_is_refuted_has_a_small_p_value_and_the_next_has_not():
    found = refuted(DELTA, 1000, 200, 190, 0.95)
    assert 2 < found < 3
    assert p_value(found, DELTA, 1000, 200, 190) <= 0.05 < p_value(found + 1e-5, DELTA, 1000, 200, 190)
    assert refuted(DELTA, 1000, 200, 100, 0.95) == 0.0


def audited(mu, canaries=2000, seed=0):
    """Gaussian sums of disjoint canaries: each has a coordinate of its own, which it moves by μ standard deviations."""
    draw = np.random.default_rng(seed)
    coins = draw.random(canaries) < 0.5
    return lower_bound(mu * coins + draw.standard_normal(canaries), coins, DELTA)


@pytest.mark.parametrize("mu", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_bound_lies_below_epsilon_of_a_gaussian(mu):
    bounds = [audited(mu, seed=seed).epsilon for seed in range(20)]
    assert sum(b > epsilon_of(DELTA, mu) for b in bounds) == 0
    if mu >= 0.5:
        assert np.median(bounds) > 0.1 * epsilon_of(DELTA, mu)  # and is no idle one


@pytest.mark.parametrize("claimed", [0.3, 0.5, 1.0])
def test_a_quarter_of_the_noise_is_found_out(claimed):
    from silotune.components.learning.privacy.gaussian import mu_of

    assert audited(mu_of(claimed, DELTA)).epsilon < claimed
    assert audited(4 * mu_of(claimed, DELTA)).epsilon > claimed


def test_guessing_by_chance_shows_nothing_at_the_promised_rate():
    draw = np.random.default_rng(1)
    false = sum(lower_bound(draw.standard_normal(200), draw.random(200) < 0.5, 0.0).epsilon > 0 for _ in range(300))
    assert false <= 0.05 * 300 + 3 * math.sqrt(0.05 * 0.95 * 300)


def test_wrong_scores_show_nothing():
    coins = np.arange(100) % 2 == 0
    assert lower_bound(-1.0 * coins, coins, DELTA).epsilon == 0.0
    assert lower_bound(1.0 * coins, coins, DELTA).epsilon > 2


@pytest.mark.parametrize(
    ("scores", "coins"), [([1.0] * 4, [True] * 4), ([1.0] * 9, [True] * 8), ([math.nan] * 9, [True] * 9)], ids=["few", "unequal", "nan"]
)
def test_what_is_no_audit_is_refused(scores, coins):
    with pytest.raises(ValueError, match="scores"):
        lower_bound(scores, coins, DELTA)
