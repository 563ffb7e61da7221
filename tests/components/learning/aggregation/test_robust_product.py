"""Rules on LoRA's products against the same arithmetic on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from silotune.components.learning.aggregation.coordinates import Rule, mean_around_median, median, trimmed_mean
from silotune.components.learning.aggregation.factors import LoraPair
from silotune.components.learning.aggregation.robust_product import rule_on_products, weighed_product

OUT, IN, R = 20, 26, 3


def pair(seed: int, rank: int = R, scale: float = 1.0) -> LoraPair:
    rng = np.random.default_rng(seed)
    return LoraPair(
        (scale * rng.standard_normal((OUT, rank))).astype(np.float32), (scale * rng.standard_normal((rank, IN))).astype(np.float32)
    )


def change(incoming: LoraPair, difference: LoraPair) -> np.ndarray:
    b0, a0 = (x.astype(np.float64) for x in (incoming.b[:, : difference.rank], incoming.a[: difference.rank]))
    return (b0 + difference.b) @ (a0 + difference.a) - b0 @ a0


def best(dense: np.ndarray, rank: int = R) -> np.ndarray:
    u, s, vt = np.linalg.svd(dense)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def dense_rule(incoming: LoraPair, differences: dict[str, LoraPair], rule: str) -> np.ndarray:
    """In the complete bases of the stacked, normalised changes, by dense SVDs."""
    moved = [change(incoming, differences[s]) for s in sorted(differences)]
    unit = [m / np.linalg.norm(m) for m in moved]
    u, v = np.linalg.svd(np.hstack(unit))[0], np.linalg.svd(np.vstack(unit))[2].T
    cores = np.stack([u.T @ m @ v for m in moved])
    core = np.median(cores, axis=0) if rule == "median" else np.sort(cores, axis=0)[1:-1].mean(axis=0)
    return best(incoming.product() + u @ core @ v.T)


@pytest.mark.parametrize(("name", "rule"), [("median", median()), ("trimmed", trimmed_mean(1))])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 3, 3, 3), (1, 3, 2, 3), (3,) * 9])  # the last: more columns than the matrix has
def test_equals_the_rule_on_dense_matrices(name: str, rule: Rule, ranks: tuple[int, ...]) -> None:
    incoming = pair(0)
    differences = {f"s{i}": pair(i, rank, 0.3 * i) for i, rank in enumerate(ranks, 1)}
    got, wanted = rule_on_products(incoming, differences, rule).pair.product(), dense_rule(incoming, differences, name)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 3, 2)])
def test_weighed_products_equal_dense_ones(ranks: tuple[int, ...]) -> None:
    incoming = pair(0)
    differences = {f"s{i}": pair(i, rank) for i, rank in enumerate(ranks, 1)}
    for coefficients in ({"s1": 0.2, "s2": 0.5, "s3": 0.3}, {"s1": 0.1, "s2": 0.0, "s3": 0.2}, {"s1": 0.9, "s2": 0.6, "s3": 0.4}):
        wanted = best(incoming.product() + sum(c * change(incoming, differences[s]) for s, c in coefficients.items()))
        got = weighed_product(incoming, differences, coefficients).pair.product()
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


RULES = {"median": median(), "trimmed mean": trimmed_mean(2), "around the median": mean_around_median(3)}
EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


@EVERY
def test_other_factors_of_the_same_products_change_nothing(rule: Rule) -> None:
    incoming = pair(0)
    b, a = (x.astype(np.float64) for x in (incoming.b, incoming.a))
    differences = {f"s{i}": pair(i, scale=0.2) for i in range(1, 6)}
    turned = {}
    for n, (silo, d) in enumerate(differences.items()):
        q = np.linalg.qr(np.random.default_rng(n).standard_normal((R, R)))[0] * (-1e3, 1e-3, 5.0, -1.0, 0.1)[n]
        turned[silo] = LoraPair((b + d.b) @ np.linalg.inv(q) - b, q @ (a + d.a) - a)
    usual = rule_on_products(incoming, differences, rule).pair.product()
    np.testing.assert_allclose(rule_on_products(incoming, turned, rule).pair.product(), usual, atol=1e-5 * np.abs(usual).max())


@EVERY
def test_identical_in_same_out(rule: Rule) -> None:
    incoming, same = pair(0), pair(1)
    got = rule_on_products(incoming, dict.fromkeys("abcde", same), rule).pair.product()
    wanted = incoming.product() + change(incoming, same)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("rule", [median(), trimmed_mean(0), mean_around_median(1)], ids=list(RULES))
def test_one_silo_is_the_identity(rule: Rule) -> None:
    incoming, one = pair(0), pair(1)
    wanted = incoming.product() + change(incoming, one)
    np.testing.assert_allclose(rule_on_products(incoming, {"a": one}, rule).pair.product(), wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(weighed_product(incoming, {"a": one}, {"a": 1.0}).pair.product(), wanted, atol=1e-5 * np.abs(wanted).max())


@EVERY
def test_order_of_arrival_changes_no_byte(rule: Rule) -> None:
    differences = {f"s{i}": pair(i) for i in range(1, 6)}
    one = rule_on_products(pair(0), differences, rule).pair
    other = rule_on_products(pair(0), dict(reversed(differences.items())), rule).pair
    assert (one.b.tobytes(), one.a.tobytes()) == (other.b.tobytes(), other.a.tobytes())


@EVERY
@pytest.mark.parametrize("size", [1e2, 1e6])
def test_two_of_seven_cannot_carry_the_product_away(rule: Rule, size: float) -> None:
    incoming, common = pair(0), pair(10)
    differences = {f"s{i}": LoraPair(common.b + 0.1 * pair(i).b, common.a + 0.1 * pair(i).a) for i in range(1, 6)}
    honest = rule_on_products(incoming, differences, RULES["median"]).pair.product()
    hostile = {"h1": pair(21, scale=size), "h2": pair(22, scale=size)}
    got = rule_on_products(incoming, differences | hostile, rule).pair.product()
    spread = max(np.linalg.norm(change(incoming, d) - honest + incoming.product()) for d in differences.values())
    assert np.linalg.norm(got - honest) < 2 * spread


def test_factors_scale_changes_before_the_rule() -> None:
    incoming = pair(0)
    differences = {"a": pair(1), "b": pair(2), "c": pair(3)}
    none = rule_on_products(incoming, differences, median(), dict.fromkeys("abc", 0.0)).pair.product()
    np.testing.assert_allclose(none, incoming.product(), atol=1e-5)
    half = rule_on_products(incoming, {"a": pair(1)}, median(), {"a": 0.5}).pair.product()
    np.testing.assert_allclose(half, best(incoming.product() + change(incoming, pair(1)) / 2), atol=1e-5 * np.abs(half).max())
