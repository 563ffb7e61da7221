"""The discrete Gaussian: what is drawn against its probabilities, and what it promises against divergences that are summed up here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

from silotune.components.learning.privacy import discrete_gaussian
from silotune.components.learning.privacy.discrete_gaussian import (
    MOST_SCALE,
    Noise,
    Words,
    concentrated_epsilon,
    concentrated_rho,
    rho_for,
    rho_of,
    scale_for,
    sensitivity,
)

KEY = bytes(range(32))


def probabilities(scale: float, reach: int) -> np.ndarray:
    """Of -reach … reach."""
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-(x**2) / (2 * scale**2))
    return weights / weights.sum()


def chi_square(drawn: np.ndarray, scale: int, reach: int) -> float:
    """Per degree of freedom, over the values within reach."""
    expected = probabilities(scale, 12 * scale)[12 * scale - reach : 12 * scale + reach + 1] * len(drawn)
    found = np.array([(drawn == value).sum() for value in range(-reach, reach + 1)])
    return float(((found - expected) ** 2 / expected).sum() / (2 * reach))


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_every_value_comes_as_often_as_it_should(scale: int) -> None:
    drawn = Noise(KEY, scale).take(200_000)
    assert chi_square(drawn, scale, 3 * scale) < 2.5
    assert chi_square(Noise(KEY, scale + 1).take(200_000), scale, 3 * scale) > 100, "another scale would show"


def test_rare_draws_that_need_longer_numbers_follow_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete_gaussian, "FAR", 1)  # so that many are taken for far off
    assert chi_square(Noise(KEY, 3).take(20_000), 3, 8) < 2.5


@pytest.mark.parametrize("scale", [1000, 1 << 20, MOST_SCALE])
def test_large_scales_are_normal_to_the_fourth_moment(scale: int) -> None:
    x = Noise(KEY, scale).take(200_000) / scale
    assert abs(x.mean()) < 0.01
    assert abs((x**2).mean() - 1) < 0.015
    assert abs((x**4).mean() - 3) < 0.15
    assert len(np.unique(np.floor(x * scale).astype(np.int64) % 7)) == 7, "all whole numbers come"


def test_the_same_key_gives_the_same_draws_however_they_are_taken() -> None:
    whole = Noise(KEY, 77).take(150_000)
    noise = Noise(KEY, 77)
    parts = np.concatenate([noise.take(n) for n in (1, 0, 65_535, 2, 84_462)])
    assert (parts == whole).all()
    other = Noise(bytes(32), 77).take(150_000)
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.01


def test_whole_numbers_below_a_limit_are_all_alike() -> None:
    limits = np.full(70_000, 7, np.uint64)
    counts = np.bincount(Words(KEY).below(limits).astype(np.int64), minlength=7)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22, "6 degrees; p < 0.001"
    high = Words(KEY).below(np.full(1000, 3 << 62, np.uint64))
    assert high.max() > 2 << 62, "a limit near 2^64 is rejected by, and not folded"


@pytest.mark.parametrize("rho", [1e-4, 1e-2, 0.5, 5.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_epsilon_is_that_of_a_second_accountant(rho: float, delta: float) -> None:
    """ρ-concentrated is αρ at every order, and so is a Gaussian of noise multiplier 1/sqrt(2ρ)."""
    accountant = RdpAccountant(orders=[1 + 10 ** (n / 20) for n in range(-60, 80)])
    accountant.compose(GaussianDpEvent(1 / math.sqrt(2 * rho)))
    assert concentrated_epsilon(rho, delta) == pytest.approx(accountant.get_epsilon(delta), rel=0.02)
    assert concentrated_epsilon(rho_for(1.5, delta), delta) == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize(("silos", "scale", "shift"), [(2, 1, 1), (2, 2, 3), (3, 1, 2), (5, 2, 4)])
def test_the_promise_holds_for_the_sum_itself(silos: int, scale: int, shift: int) -> None:
    """Rényi divergences of the sum of such noises from the same, moved: summed up number by number, at most αρ at every order."""
    reach = 40 * scale
    one = probabilities(scale, reach)
    total = one
    for _ in range(silos - 1):
        total = np.convolve(total, one)
    moved = np.zeros_like(total)
    moved[shift:] = total[:-shift]
    both = (total > 1e-250) & (moved > 1e-250)
    rho = rho_of(shift, 1, silos, scale)
    for alpha in (1.5, 2.0, 4.0, 8.0):
        logs = alpha * np.log(total[both]) + (1 - alpha) * np.log(moved[both])
        divergence = (logs.max() + math.log(np.exp(logs - logs.max()).sum())) / (alpha - 1)
        assert divergence <= alpha * rho * (1 + 1e-6)
    naive = shift**2 / (2 * silos * scale**2)
    assert rho >= naive * (1 - 1e-12), "a sum of discrete Gaussians is none, and never better than one"


def test_scales_keep_the_promise_and_hardly_more() -> None:
    for epsilon, rounds, silos, numbers in ((1.0, 10, 3, 10**6), (8.0, 100, 20, 20_000_000), (0.1, 1, 5, 100)):
        scale = scale_for(epsilon, 1e-5, rounds, 20, numbers, silos)
        spent = concentrated_epsilon(rounds * concentrated_rho(20, numbers, silos, scale), 1e-5)
        assert 0.99 * epsilon <= spent <= epsilon
    assert sensitivity(20, 0) == pytest.approx(1 << 20, rel=1e-5)
    with pytest.raises(ValueError, match="secure_aggregation"):
        scale_for(0.01, 1e-5, 100, 24, 10, 3)
    with pytest.raises(ValueError, match="scale: must be from 1"):
        Noise(KEY, 0)
