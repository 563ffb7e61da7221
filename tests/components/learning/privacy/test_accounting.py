"""ε against closed forms and against accountants that share no code with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.errors import RefusedError
from silotune.components.learning.privacy.accounting import Mechanism, epsilon, noise_multiplier_for, rdp_epsilon, round_mechanism
from silotune.components.terms.privacy import Privacy
from silotune.components.terms.training import Training


def mechanism(q: float, z: float, steps: int = 1, **more: Any) -> Mechanism:
    return Mechanism(sampling_probability=q, noise_multiplier=z, steps=steps, **more)


def Phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def gaussian_delta(eps: float, z: float) -> float:
    """Balle & Wang 2018, arXiv:1805.06530, Theorem 8, with sensitivity 1."""
    return Phi(1 / (2 * z) - eps * z) - math.exp(eps) * Phi(-1 / (2 * z) - eps * z)


def gaussian_epsilon(delta: float, z: float) -> float:
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, z) > delta else (low, middle)
    return high


@pytest.mark.parametrize("z", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_on_all_data_it_is_the_analytic_gaussian_mechanism(z: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(delta, z / math.sqrt(steps))
    found = epsilon([mechanism(1.0, z, steps)], delta)
    assert exact * (1 - 1e-9) <= found <= exact * 1.001 + 2e-4


@pytest.mark.parametrize(("q", "z", "steps"), [(0.01, 1.0, 1000), (0.05, 2.0, 300), (0.3, 5.0, 300), (0.001, 0.6, 200), (0.02, 60.0, 500)])
def test_two_other_accountants_agree(q: float, z: float, steps: int) -> None:
    """Opacus' is Gopi et al. 2021, arXiv:2106.02848, which gives lower bound, estimate and upper bound."""
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(z, q, steps)]
    other = prv.get_epsilon(1e-5, eps_error=0.01, delta_error=1e-8)
    found = epsilon([mechanism(q, z, steps)], 1e-5)
    assert found == pytest.approx(other, abs=0.02)
    assert found <= rdp_epsilon([mechanism(q, z, steps)], 1e-5) * 1.001 <= 3 * found + 0.1


def test_one_step_in_closed_form() -> None:
    """A subsampled step's δ is that of the two mixtures, by integration over the line."""
    q, z, eps = 0.1, 1.3, 0.7
    grid = [i / 2000 for i in range(-24000, 26000)]

    def density(x: float, shift: float) -> float:
        return math.exp(-((x - shift) ** 2) / (2 * z * z)) / (z * math.sqrt(2 * math.pi))

    mixed = [(1 - q) * density(x, 0) + q * density(x, 1) for x in grid]
    plain = [density(x, 0) for x in grid]
    remove = sum(max(0.0, m - math.exp(eps) * p) for m, p in zip(mixed, plain, strict=True)) / 2000
    add = sum(max(0.0, p - math.exp(eps) * m) for m, p in zip(mixed, plain, strict=True)) / 2000
    delta = max(remove, add)
    assert epsilon([mechanism(q, z)], delta) == pytest.approx(eps, abs=1e-3)


def test_counting_composing_and_the_order_do_not_matter() -> None:
    one, other = mechanism(0.01, 1.0, 50), mechanism(0.05, 2.0, 20)
    at_once = epsilon({one: 6, other: 4}, 1e-6)
    assert epsilon([other] * 4 + [one] * 6, 1e-6) == at_once
    assert epsilon({mechanism(0.01, 1.0, 300): 1, mechanism(0.05, 2.0, 80): 1}, 1e-6) == at_once
    assert epsilon({one: 6}, 1e-6) < at_once < epsilon({one: 6}, 5e-7) + epsilon({other: 4}, 5e-7)
    assert epsilon({}, 1e-6) == epsilon({one: 0}, 1e-6) == 0.0


def test_adaptive_clipping_is_paid_for() -> None:
    """Gradient and centred count are one Gaussian vector: as if each were a mechanism on all data that composes with the other."""
    both = mechanism(1.0, 2.0, 10, quantile_noise_multiplier=3.0)
    assert epsilon([both], 1e-5) == pytest.approx(epsilon([mechanism(1.0, 2.0, 10), mechanism(1.0, 6.0, 10)], 1e-5), abs=1e-3)
    terms = Privacy(epsilon=3.0, clipping="adaptive", rounds=5)
    training = Training(steps=20, batch_size=16)
    adaptive, flat = round_mechanism(terms, training, 800), round_mechanism(terms.model_copy(update={"clipping": "flat"}), training, 800)
    assert adaptive.noise_multiplier > flat.noise_multiplier
    assert adaptive.joint_noise_multiplier == pytest.approx(flat.noise_multiplier, rel=1e-3)
    assert epsilon({adaptive: 5}, 1e-5) <= 3.0


@given(eps=st.floats(0.3, 20), q=st.floats(0.01, 0.5), steps=st.integers(1, 2000), digits=st.integers(4, 8))
@settings(max_examples=6, deadline=None)
def test_calibrated_noise_keeps_its_promise_and_wastes_little(eps: float, q: float, steps: int, digits: int) -> None:
    delta = 10.0**-digits
    z = noise_multiplier_for(eps, delta, q, steps)
    assert epsilon([mechanism(q, z, steps)], delta) <= eps
    if z > 0.125:
        assert epsilon([mechanism(q, z * 0.99, steps)], delta) > eps


def test_calibration_knows_its_limits() -> None:
    assert noise_multiplier_for(1e4, 1e-5, 0.01, 10) == 0.125
    with pytest.raises(ValueError, match="no noise keeps epsilon"):
        noise_multiplier_for(1e-6, 1e-5, 1.0, 10**6)
    with pytest.raises(ValueError, match="delta must be from"):
        epsilon([mechanism(0.1, 1.0)], 0.0)


def test_a_silo_with_too_few_units_is_refused_with_a_cure() -> None:
    terms, training = Privacy(epsilon=2.0, rounds=3), Training(steps=5, batch_size=32)
    with pytest.raises(RefusedError, match=r"at most the 31 records to train on.*got 32; lower it"):
        round_mechanism(terms, training, 31)
    with pytest.raises(
        RefusedError, match=r"privacy.delta: must be below 1/2000, since the silo has 2000 persons, got 0.001; lower it, to 5e-05"
    ):
        round_mechanism(terms.model_copy(update={"delta": 1e-3, "unit": "person"}), training, 2000)
    whole = round_mechanism(terms, training, 32)
    assert whole.sampling_probability == 1.0
    assert epsilon({whole: 3}, terms.delta) <= 2.0


def test_little_noise_and_many_steps_still_have_an_answer() -> None:
    """Where the grid must be coarse: a bound of hundreds is no promise, but a ledger must be able to add it up."""
    found = epsilon([mechanism(0.5, 0.3, 3000)], 1e-5)
    assert 1e3 < found < rdp_epsilon([mechanism(0.5, 0.3, 3000)], 1e-5) * 1.01
