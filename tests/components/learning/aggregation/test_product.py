"""The best pair for a mean of products, against dense SVDs in float64, and what must not change it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.errors import SilotuneError
from silotune.components.learning.aggregation import product
from silotune.components.learning.aggregation.factors import LoraPair, stacked, truncated
from silotune.components.learning.aggregation.product import Best, best_of_rank, distance, kept_alive, mean_product

OUT, IN, RANK = 40, 31, 4
ATOL = 1e-6  # of the norm of what is approximated


def pair(seed: int, rank: int = RANK, out: int = OUT, into: int = IN, scale: float = 1.0) -> LoraPair:
    rng = np.random.default_rng(seed)
    return LoraPair((scale * rng.standard_normal((out, rank))).astype(np.float32), rng.standard_normal((rank, into)).astype(np.float32))


def graded(seed: int, rank: int, out: int = OUT, into: int = IN) -> LoraPair:
    """Singular values that fall by half from one to the next, so that the best product is unique."""
    made = pair(seed, rank, out, into)
    return LoraPair(made.b * np.float32(0.5) ** np.arange(rank, dtype=np.float32), made.a)


def zero(rank: int = RANK) -> LoraPair:
    return LoraPair(np.zeros((OUT, rank), np.float32), np.zeros((rank, IN), np.float32))


def less(one: LoraPair, other: LoraPair) -> LoraPair:
    return LoraPair(one.b - other.b, one.a - other.a)


def dense_best(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def agree(found: Best, w: np.ndarray, rank: int) -> None:
    """The pair is as good as the dense SVD's, and where there is no tie, the same; the spectrum is W's."""
    best, s = dense_best(w, rank)
    norm = np.linalg.norm(w)
    assert np.linalg.norm(w - found.pair.product()) <= np.linalg.norm(w - best) + ATOL * norm
    if rank >= len(s) or s[rank - 1] - s[rank] > 1e-3 * s[0] or s[rank] < 1e-7 * s[0]:
        assert np.linalg.norm(found.pair.product() - best) <= ATOL * norm
    known = found.spectrum.values
    np.testing.assert_allclose(known[: len(s)], s[: len(known)], rtol=0, atol=2e-7 * s[0])
    assert found.spectrum.residual == pytest.approx(1 - np.sum(s[:rank] ** 2) / np.sum(s**2), abs=1e-12)


def silos(count: int, scale: float = 0.1, ranks: tuple[int, ...] = (RANK,)) -> dict[str, LoraPair]:
    return {f"s{i:02d}": pair(10 + i, ranks[i % len(ranks)], scale=scale) for i in range(count)}


def by_hand(incoming: LoraPair, differences: Mapping[str, LoraPair], weights: Mapping[str, float]) -> np.ndarray:
    total = sum(weights.values())
    w = np.zeros((incoming.b.shape[0], incoming.a.shape[1]))
    for silo, d in differences.items():
        whole_b, whole_a = incoming.b.astype(np.float64), incoming.a.astype(np.float64)
        own = (whole_b[:, : d.rank] + d.b) @ (whole_a[: d.rank] + d.a)
        w += weights[silo] / total * (own + whole_b[:, d.rank :] @ whole_a[d.rank :])
    return w


# Against the dense SVD


@pytest.mark.parametrize(("out", "into"), [(40, 31), (31, 40), (200, 30), (30, 200), (120, 120), (5, 90), (90, 5)])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_it_is_the_dense_svds(out: int, into: int, count: int) -> None:
    stacks = [graded(i, 5, out, into) for i in range(count)]
    b, a = np.hstack([p.b for p in stacks]).astype(np.float64), np.vstack([p.a for p in stacks]).astype(np.float64)
    agree(best_of_rank(b, a, 4), b @ a, 4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 12), st.floats(0, 8),
    st.floats(-8, 8), st.floats(-12, 12),
)  # fmt: skip
def test_any_shape_and_condition(
    seed: int, out: int, into: int, width: int, rank: int, condition: float, gauge: float, scale: float
) -> None:
    """Factors whose spectra span decades, whose sizes lie decades apart column by column, and whose product is far from one."""
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((out, width)) @ (np.logspace(0, -condition, width)[:, None] * rng.standard_normal((width, width)))
    a = rng.standard_normal((width, into))
    spread = 10 ** (gauge * rng.uniform(-1, 1, width))
    agree(best_of_rank(10**scale * b * spread, a / spread[:, None], rank), 10**scale * b @ a, rank)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 9), st.booleans())
def test_what_nearly_cancels_out(seed: int, decades: float, wide: bool) -> None:
    """Two silos that all but undo each other: what is left is small beside the factors, which squaring alone would not survive."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((50, 8 if not wide else 30)), rng.standard_normal((8 if not wide else 30, 70))
    left, up = 10**-decades * rng.standard_normal((2, *b.shape)), 10**-decades * rng.standard_normal(a.shape)
    b, a = np.hstack([b + left[0], -b + left[1]]), np.vstack([a, a + up])
    best, s = dense_best(b @ a, 4)
    noise = 1e-14 * np.linalg.norm(b) * np.linalg.norm(a)  # of making W itself
    found = best_of_rank(b, a, 4)
    assert np.linalg.norm(b @ a - found.pair.product()) <= np.linalg.norm(b @ a - best) + ATOL * np.linalg.norm(s) + noise


def test_gram_gives_way_to_qr_where_it_must_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    qr = product._by_qr
    monkeypatch.setattr(product, "_by_qr", lambda *args: used.append(1) or qr(*args))
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((200, 30)), rng.standard_normal((30, 100))
    best_of_rank(b, a, 4)
    best_of_rank(np.tile(b, 2), np.vstack([a, a]), 4)
    best_of_rank(b * np.logspace(-9, 9, 30), a, 4)
    assert not used
    best_of_rank(np.hstack([b, -b]), np.vstack([a, a + 1e-3 * rng.standard_normal(a.shape)]), 4)
    assert used


def test_both_ways_agree() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((200, 30)) * np.logspace(0, -6, 30), rng.standard_normal((30, 100))
    gram, qr = product._by_gram(b, a, 5), product._by_qr(b, a, 5)
    assert gram
    np.testing.assert_allclose(gram[1], qr[1], rtol=0, atol=1e-7 * qr[1][0])
    assert gram[2] == pytest.approx(qr[2], rel=1e-12)
    one, other = (np.linalg.qr(found[0])[0] for found in (gram, qr))
    assert np.linalg.norm(one @ one.T - other @ other.T) < 1e-9


# What the pair looks like


@pytest.mark.parametrize("width", [9, 60])
def test_factors_are_balanced_ordered_and_signed(width: int) -> None:
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((OUT, width)), rng.standard_normal((width, IN))
    found = best_of_rank(b, a, RANK).pair
    s = np.linalg.svd(b @ a, compute_uv=False)[:RANK]
    np.testing.assert_allclose(found.b.T @ found.b, np.diag(s), atol=1e-5 * s[0])
    np.testing.assert_allclose(found.a @ found.a.T, np.diag(s), atol=1e-5 * s[0])
    for column in found.b.T:
        assert column[np.abs(column).argmax()] > 0
    assert found.b.dtype == found.a.dtype == np.float32


def test_its_first_columns_are_the_best_of_a_lower_rank() -> None:
    b, a = (x.astype(np.float64) for x in (graded(3, 9).b, graded(3, 9).a))
    six = best_of_rank(b, a, 6).pair
    for rank in (1, 3, 5):
        best, s = dense_best(b @ a, rank)
        assert np.linalg.norm(truncated(six, rank).product() - best) <= ATOL * s[0]


def test_rank_beyond_the_stacks_is_filled_with_zeros() -> None:
    made = graded(2, 3)
    found = best_of_rank(made.b.astype(np.float64), made.a.astype(np.float64), 8)
    assert found.pair.rank == 8
    assert not found.pair.b[:, 3:].any()
    assert not found.pair.a[3:].any()
    assert found.spectrum.residual == pytest.approx(0, abs=1e-12)
    assert np.linalg.norm(found.pair.product() - made.product()) <= ATOL * np.linalg.norm(made.product())


# Means of silos


@pytest.mark.parametrize("ranks", [(4,), (4, 2, 1), (1, 3), (2,)])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_mean_product_of_silos_of_any_ranks(ranks: tuple[int, ...], count: int) -> None:
    incoming = best_of_rank(*(x.astype(np.float64) for x in (graded(1, 9).b, graded(1, 9).a)), RANK).pair
    differences = silos(count, ranks=ranks)
    weights = {silo: 1.0 + i for i, silo in enumerate(differences)}
    agree(mean_product(incoming, differences, weights), by_hand(incoming, differences, weights), RANK)


def test_order_of_arrival_does_not_matter() -> None:
    differences = silos(7, ranks=(4, 2))
    weights = {silo: 3.0 + i for i, silo in enumerate(differences)}
    one = mean_product(pair(1), differences, weights, carry=True)
    other = mean_product(pair(1), dict(reversed(differences.items())), dict(reversed(weights.items())), carry=True)
    assert one.rest
    assert other.rest
    for x, y in ((one.pair, other.pair), (one.rest, other.rest)):
        assert (x.b.tobytes(), x.a.tobytes()) == (y.b.tobytes(), y.a.tobytes())


def test_one_silo_is_taken_as_it_is() -> None:
    incoming, difference = pair(1), pair(2)
    own = LoraPair(incoming.b + difference.b, incoming.a + difference.a)
    found = mean_product(incoming, {"a": difference}, {"a": 17.0})
    assert distance(found.pair, own) <= ATOL * np.linalg.norm(own.product())
    assert found.spectrum.residual == pytest.approx(0, abs=1e-12)


def test_identical_silos_give_what_each_has() -> None:
    incoming, difference = pair(1), pair(2)
    one = mean_product(incoming, {"a": difference}, {"a": 1.0}).pair
    many = mean_product(incoming, {f"s{i}": difference for i in range(9)}, {f"s{i}": 1.0 + i for i in range(9)}).pair
    assert distance(one, many) <= ATOL * np.linalg.norm(one.product())


def test_silos_that_change_nothing_leave_the_product() -> None:
    incoming = pair(1)
    still = {"a": zero(), "b": zero(2), "c": zero(1)}
    found = mean_product(incoming, still, dict.fromkeys(still, 1.0)).pair
    assert distance(found, incoming) <= ATOL * np.linalg.norm(incoming.product())


@pytest.mark.parametrize("factor", [0.25, 1e-9, 3e7])
def test_scale_of_weights_does_not_matter(factor: float) -> None:
    differences = silos(5)
    weights = {silo: 1.0 + i for i, silo in enumerate(differences)}
    one = mean_product(pair(1), differences, weights).pair
    other = mean_product(pair(1), differences, {s: factor * w for s, w in weights.items()}).pair
    assert distance(one, other) <= ATOL * np.linalg.norm(one.product())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=3, max_size=3), st.integers(0, 1000))
def test_how_a_silo_spreads_its_product_over_its_factors_does_not_matter(decades: list[float], seed: int) -> None:
    """A → cA, B → B/c leaves each silo's model as it is; the mean of factors takes it for another one."""
    incoming = pair(seed)
    own = {f"s{i}": graded(seed + 1 + i, RANK) for i in range(3)}
    spread = {s: LoraPair((p.b / 10**c).astype(np.float32), (p.a * 10**c).astype(np.float32)) for (s, p), c in zip(own.items(), decades, strict=True)}  # fmt: skip
    weights = dict.fromkeys(own, 1.0)

    b, a = stacked(zero(), own, weights)
    b2, a2 = stacked(zero(), spread, weights)
    one, other = best_of_rank(b, a, RANK).pair, best_of_rank(b2, a2, RANK).pair
    assert distance(one, other) <= 3 * ATOL * np.linalg.norm(one.product())
    # and through the differences to an incoming pair, where float32 can hold them
    if max(map(abs, decades)) < 1:
        moved = {s: less(p, incoming) for s, p in spread.items()}
        third = mean_product(incoming, moved, weights).pair
        assert distance(one, third) <= 1e-5 * np.linalg.norm(one.product())


def test_the_mean_of_factors_does_depend_on_it() -> None:
    own = {"a": pair(1), "b": pair(2)}
    spread = own | {"b": LoraPair(own["b"].b / 4, own["b"].a * 4)}

    def naive(pairs: Mapping[str, LoraPair]) -> LoraPair:
        return LoraPair(np.mean([p.b for p in pairs.values()], 0), np.mean([p.a for p in pairs.values()], 0))

    assert distance(naive(own), naive(spread)) > 0.1 * np.linalg.norm(naive(own).product())


# Zeros, and what is nearly zero or nearly too large


def test_before_the_first_step_nothing_changes() -> None:
    """B = 0 at round 1, and nobody has moved."""
    incoming = LoraPair(np.zeros((OUT, RANK), np.float32), pair(1).a)
    found = mean_product(incoming, {"a": zero(), "b": zero(2)}, {"a": 1.0, "b": 2.0}, carry=True)
    assert not found.pair.b.any()
    assert (found.spectrum.residual, found.spectrum.effective_rank, found.spectrum.stable_rank) == (0.0, 0.0, 0.0)
    assert found.rest
    assert not found.rest.product().any()


def test_first_round_from_a_zero_b() -> None:
    incoming = LoraPair(np.zeros((OUT, RANK), np.float32), pair(1).a)
    differences = silos(5)
    weights = dict.fromkeys(differences, 1.0)
    agree(mean_product(incoming, differences, weights), by_hand(incoming, differences, weights), RANK)


def test_directions_that_are_lost_can_be_learned_again() -> None:
    """Zero in both factors is a saddle: no gradient moves either. So A keeps the incoming rows there, and the product is the same."""
    incoming = LoraPair(np.zeros((OUT, RANK), np.float32), pair(1).a)
    own = pair(2, 1)
    found = kept_alive(mean_product(incoming, {"a": LoraPair(own.b, own.a)}, {"a": 1.0}).pair, incoming)
    assert not found.b[:, 1:].any()
    assert found.a[1:].tobytes() == incoming.a[1:].tobytes()
    expected = own.b.astype(np.float64) @ (incoming.a[:1].astype(np.float64) + own.a)
    assert np.linalg.norm(found.product() - expected) <= ATOL * np.linalg.norm(expected)


@pytest.mark.parametrize("width", [6, 60])
def test_silos_that_undo_each_other_to_the_last_bit(width: int) -> None:
    one = pair(1, width)
    b, a = np.hstack([one.b, -one.b]).astype(np.float64), np.vstack([one.a, one.a]).astype(np.float64)
    found = best_of_rank(b, a, RANK)
    assert not found.pair.product().any()
    assert found.spectrum.effective_rank == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_tiny_and_huge_numbers(scale: float) -> None:
    differences = {s: LoraPair((scale * p.b).astype(np.float32), p.a) for s, p in silos(6).items()}
    weights = dict.fromkeys(differences, 1.0)
    agree(mean_product(zero(), differences, weights), by_hand(zero(), differences, weights), RANK)


def test_what_float32_cannot_hold_is_refused() -> None:
    huge = {"a": LoraPair(np.full((OUT, 1), 3e38, np.float32), np.full((1, IN), 3e38, np.float32))}
    mean_product(zero(), huge, {"a": 1.0})  # its square root can
    with pytest.raises(SilotuneError, match=r"the mean product is not finite in float32; lower training.learning_rate"):
        best_of_rank(np.full((OUT, 1), 1e40), np.full((1, IN), 1e40), 1)


def test_rank_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rank: must be 1 or more, got 0"):
        best_of_rank(np.ones((3, 1)), np.ones((1, 3)), 0)


# Carrying


@pytest.mark.parametrize("count", [2, 20])
def test_what_is_carried_is_the_next_best_and_comes_back(count: int) -> None:
    differences = silos(count, scale=1.0)
    weights = dict.fromkeys(differences, 1.0)
    w = by_hand(zero(), differences, weights)
    found = mean_product(zero(), differences, weights, carry=True)
    assert found.rest
    assert found.rest.rank == RANK
    both, s = dense_best(w, 2 * RANK)
    assert np.linalg.norm(found.pair.product() + found.rest.product() - both) <= ATOL * s[0] * 4
    still = {"a": zero()}
    again = mean_product(found.pair, still, {"a": 1.0}, found.rest, carry=True)
    assert again.rest
    assert distance(again.pair, found.pair) <= ATOL * s[0] * 4
    assert distance(again.rest, found.rest) <= ATOL * s[0] * 4


def test_carrying_lets_many_small_steps_add_up() -> None:
    """A fifth direction, in which each round pushes by 0.3, beside four of size 1: cut off each time, or carried until it outgrows them."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((size, RANK + 1)))[0] for size in (OUT, IN))

    def fifth_after(rounds: int, carry: bool) -> float:
        now, rest = LoraPair(u[:, :RANK], v[:, :RANK].T), None
        for _ in range(rounds):
            parts = [now, LoraPair(0.3 * u[:, RANK:], v[:, RANK:].T), *([rest] if rest else [])]
            b, a = np.hstack([p.b for p in parts]), np.vstack([p.a for p in parts])
            best = best_of_rank(b.astype(np.float64), a.astype(np.float64), RANK, RANK if carry else 0)
            now, rest = best.pair, best.rest
        return float(u[:, RANK] @ now.product() @ v[:, RANK])

    assert abs(fifth_after(5, carry=False)) < 1e-6
    assert abs(fifth_after(3, carry=True)) < 1e-6
    assert fifth_after(5, carry=True) == pytest.approx(1.5, abs=1e-5)
