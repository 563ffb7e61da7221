import math

import pytest

from silotune.components.learning.privacy.gaussian import composed, delta_of, epsilon_of, mu_of, noise_multiplier_of

GRID = [(e, d) for e in (0.1, 0.5, 1.0, 3.0, 8.0, 40.0) for d in (1e-3, 1e-5, 1e-9)]


@pytest.mark.parametrize(("epsilon", "delta"), GRID)
def test_noise_is_that_of_another_accountant(epsilon, delta):
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian, get_sigma_gaussian

    z = noise_multiplier_of(epsilon, delta, 1)
    assert z == pytest.approx(get_sigma_gaussian(epsilon, delta), rel=1e-6)
    assert epsilon_of(delta, 1 / z) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon_of(delta, 1.0) == pytest.approx(get_epsilon_gaussian(1.0, delta), rel=1e-6)


@pytest.mark.parametrize(("epsilon", "delta", "rounds"), [(1.0, 1e-5, 10), (3.0, 1e-6, 50), (8.0, 1e-5, 200)])
def test_many_rounds_are_within_epsilon_by_loss_distributions_too(epsilon, delta, rounds):
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    z = noise_multiplier_of(epsilon, delta, rounds)
    pessimistic = from_gaussian_mechanism(z, value_discretization_interval=1e-3).self_compose(rounds).get_epsilon_for_delta(delta)
    optimistic = (
        from_gaussian_mechanism(z, value_discretization_interval=1e-3, pessimistic_estimate=False)
        .self_compose(rounds)
        .get_epsilon_for_delta(delta)
    )
    assert optimistic <= epsilon * (1 + 1e-6)
    assert pessimistic >= epsilon * (1 - 1e-6)
    assert pessimistic - optimistic < 0.2 * epsilon  # else the comparison says nothing


def test_delta_is_the_mass_beyond_epsilon():
    """δ(ε) = ∫ max(0, p - exp(ε)·q) of two normal densities μ apart, by a plain sum."""
    mu, epsilon, step = 1.3, 0.7, 1e-4

    def density(x):
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    mass = step * math.fsum(max(0.0, density(i * step - mu) - math.exp(epsilon) * density(i * step)) for i in range(-100_000, 120_000))
    assert delta_of(epsilon, mu) == pytest.approx(mass, rel=1e-7)


@pytest.mark.parametrize(("epsilon", "delta"), [*GRID, (1e-3, 1e-12), (500.0, 1e-5), (900.0, 1e-12), (5e5, 1e-5)])
def test_forth_and_back_never_promises_too_much(epsilon, delta):
    mu = mu_of(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon, mu * (1 + 1e-6)) > delta
    found = epsilon_of(delta, mu)
    assert found == pytest.approx(epsilon, rel=1e-6)
    assert delta_of(found, mu) <= delta


def test_equal_releases_add_up_to_one():
    z = noise_multiplier_of(2.0, 1e-5, 16)
    assert composed([1 / z] * 16) == pytest.approx(mu_of(2.0, 1e-5), rel=1e-12)
    assert epsilon_of(1e-5, composed([1 / z] * 16)) <= 2.0 * (1 + 1e-8)
    assert epsilon_of(1e-5, composed([1 / z] * 17)) > 2.0
    assert composed([]) == 0.0
    assert epsilon_of(1e-5, 0.0) == 0.0


def test_far_out_in_the_tail():
    assert delta_of(0.0, 0.0) == 0.0
    assert delta_of(2000.0, 1.0) == 0.0
    assert delta_of(10.0, 100.0) == pytest.approx(1.0)
    assert epsilon_of(1e-5, 1e9) == math.inf


@pytest.mark.parametrize("bad", [(-1.0, 1e-5), (0.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (math.nan, 0.1)])
def test_what_is_no_promise_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        mu_of(*bad)
