"""The gauge: the same product, written in the factors that silos learn on from."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.linalg import norm

from silotune.components.learning.aggregation.factors import LoraPair, truncated
from silotune.components.learning.aggregation.gauge import aligned
from silotune.components.learning.aggregation.product import best_of_rank, mean_product

OUT, IN, RANK = 30, 40, 6


def pair(seed: int, rank: int = RANK, scale: float = 1.0) -> LoraPair:
    draw = np.random.default_rng(seed)
    return LoraPair((scale * draw.standard_normal((OUT, rank))).astype(np.float32), draw.uniform(-0.2, 0.2, (rank, IN)).astype(np.float32))


def best(made: LoraPair, rank: int = RANK) -> LoraPair:
    return best_of_rank(made.b.astype(np.float64), made.a.astype(np.float64), rank).pair


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(norm(found - wanted) <= 1e-6 * norm(wanted))


@pytest.mark.parametrize("ranks", [(), (RANK,), (2, RANK), (1, 2, 4, RANK)])
def test_the_product_stays_and_so_does_every_silos_truncation(ranks: tuple[int, ...]) -> None:
    balanced = best(pair(1))
    found = aligned(balanced, pair(2), ranks)
    assert close(found.product(), balanced.product())
    for rank in ranks:
        assert close(truncated(found, rank).product(), truncated(balanced, rank).product())


def test_rows_of_a_are_orthogonal_and_as_long_as_before() -> None:
    incoming = pair(2)
    found = aligned(best(pair(1)), incoming).a.astype(np.float64)
    size = np.mean(np.sum(np.square(incoming.a.astype(np.float64)), axis=1))
    np.testing.assert_allclose(found @ found.T, size * np.eye(RANK), atol=1e-6)


def test_no_other_orthogonal_frame_of_that_span_is_nearer_to_what_silos_had() -> None:
    incoming = pair(2)
    found = aligned(best(pair(1)), incoming).a.astype(np.float64)
    draw = np.random.default_rng(3)
    for step in (1e-3, 0.1, 1.0):
        turn = np.linalg.qr(np.eye(RANK) + step * draw.standard_normal((RANK, RANK)))[0]
        turn *= np.sign(np.diag(turn))
        assert norm(found - incoming.a) <= norm(turn @ found - incoming.a)


def test_a_pair_that_is_in_place_stays_in_place() -> None:
    once = aligned(best(pair(1)), pair(2))
    again = aligned(best(once), once)
    np.testing.assert_allclose(again.a, once.a, atol=1e-6)
    np.testing.assert_allclose(again.b, once.b, atol=1e-5)


def test_how_a_silo_writes_its_product_changes_nothing() -> None:
    incoming = LoraPair(pair(5).b, pair(5).a)
    plain = {s: LoraPair(0.1 * pair(i).b, 0.1 * pair(i).a) for i, s in enumerate("abc")}
    gauged = {s: LoraPair(incoming.b * 0, incoming.a * 0) for s in plain}
    for s, d in plain.items():
        factor = np.float32(7.0 if s == "b" else 1.0)
        gauged[s] = LoraPair((incoming.b + d.b) / factor - incoming.b, (incoming.a + d.a) * factor - incoming.a)
    weights = dict.fromkeys(plain, 1.0)
    one, other = (aligned(mean_product(incoming, d, weights).pair, incoming) for d in (plain, gauged))
    np.testing.assert_allclose(one.a, other.a, atol=2e-5)
    np.testing.assert_allclose(one.b, other.b, atol=2e-4)


def test_before_the_first_step_nothing_changes() -> None:
    incoming = LoraPair(np.zeros((OUT, RANK), np.float32), pair(2).a)
    nothing = LoraPair(np.zeros((OUT, RANK), np.float32), np.zeros((RANK, IN), np.float32))
    found = aligned(nothing, incoming)
    assert found.a.tobytes() == incoming.a.tobytes()
    assert not found.b.any()


@pytest.mark.parametrize("live", [1, 3])
@pytest.mark.parametrize("inside", [False, True])
def test_directions_that_are_lost_can_be_learned_again(live: int, inside: bool) -> None:
    """Zero in both factors is a saddle: no gradient moves either."""
    incoming = pair(2)
    made = pair(1, live)
    if inside:  # of the incoming rows' own span
        made = LoraPair(made.b, (np.random.default_rng(4).standard_normal((live, RANK)) @ incoming.a).astype(np.float32))
    balanced = best(made)
    found = aligned(balanced, incoming, (2, RANK))
    assert close(found.product(), made.product())
    np.testing.assert_allclose(norm(found.a, axis=1), np.full(RANK, np.sqrt(np.mean(np.sum(np.square(incoming.a), axis=1)))), rtol=1e-5)


def test_where_there_is_no_a_to_turn_to_the_balanced_pair_stays() -> None:
    balanced = best(pair(1))
    found = aligned(balanced, LoraPair(np.zeros((OUT, RANK), np.float32), np.zeros((RANK, IN), np.float32)))
    assert found.a.tobytes() == balanced.a.tobytes()
    assert found.b.tobytes() == balanced.b.tobytes()
