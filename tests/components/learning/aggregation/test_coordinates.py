"""Rules by number against references that sort one column after the other, in float64."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.learning.aggregation.coordinates import WIDE, Rule, combine, exchanges, mean_around_median, median, trimmed_mean


def rows(count: int, size: int = 50, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.round(rng.standard_normal(size) * 4, 1).astype(np.float32) for _ in range(count)]  # rounded, so that some are equal


def by_column(found: list[np.ndarray], rule: object) -> np.ndarray:
    return np.array([rule([float(row[j]) for row in found]) for j in range(found[0].size)])  # type: ignore[operator]


def reference_trimmed(trim: int) -> object:
    return lambda column: statistics.fmean(sorted(column)[trim : len(column) - trim])


def reference_nearest(keep: int) -> object:
    def rule(column: list[float]) -> float:
        middle = statistics.median(column)
        best = min(itertools.combinations(sorted(column), keep), key=lambda some: sorted((abs(x - middle) for x in some), reverse=True)[0])
        return statistics.fmean(best)

    return rule


@pytest.mark.parametrize("count", [*range(1, 14), 32, 33, 100])
def test_median(count: int) -> None:
    x = rows(count)
    np.testing.assert_allclose(combine(x, median()), by_column(x, statistics.median), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("count", "trim"), [(1, 0), (2, 0), (3, 1), (5, 1), (7, 2), (8, 3), (32, 1), (32, 8), (33, 16), (40, 3)])
def test_trimmed_mean(count: int, trim: int) -> None:
    x = rows(count)
    np.testing.assert_allclose(combine(x, trimmed_mean(trim)), by_column(x, reference_trimmed(trim)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("count", "keep"), [(1, 1), (3, 1), (5, 3), (5, 5), (6, 2), (9, 7)])
def test_mean_around_the_median(count: int, keep: int) -> None:
    x = [row + np.float32(1e-3) * i for i, row in enumerate(rows(count))]  # no two equally near
    np.testing.assert_allclose(combine(x, mean_around_median(keep)), by_column(x, reference_nearest(keep)), rtol=2e-5, atol=2e-6)


def test_of_equally_near_numbers_the_lower_ones_count() -> None:
    assert combine([np.full(2, v, np.float32) for v in (1.0, -1.0, 0.0)], mean_around_median(2)).tolist() == [-0.5] * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_exchanges_order_every_pattern_of_zeros_and_ones(count: int, data: st.DataObject) -> None:
    """Which is proof for all numbers (Knuth, The Art of Computer Programming 3, 5.3.4, Theorem Z)."""
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    patterns = np.array(list(itertools.product([0, 1], repeat=count)), np.int8).T
    for apart in (False, True):
        got = patterns.copy()
        for a, b, low, high in exchanges(count, start, stop, apart):
            one, two = got[a].copy(), got[b].copy()
            if low:
                got[a] = np.minimum(one, two)
            if high:
                got[b] = np.maximum(one, two)
        wanted, kept = np.sort(patterns, axis=0)[start:stop], got[start:stop]
        assert (np.sort(kept, axis=0) == wanted).all() if apart else (kept == wanted).all()


def test_what_is_not_needed_is_struck_out() -> None:
    every = exchanges(32, 0, 32)
    assert len(every) == 191  # Knuth 5.2.2: what Batcher's sort of 32 takes
    assert sum(low + high for *_, low, high in exchanges(32, 15, 17)) < 0.75 * 2 * len(every)
    assert len(exchanges(32, 1, 31, apart=True)) < len(every) / 3


def test_weights_count_in_the_median() -> None:
    x = [np.full(3, v, np.float32) for v in (10.0, -1.0, 2.0, 4.0)]
    assert combine(x, median([1, 1, 1, 5])).tolist() == [4.0] * 3
    assert combine(x, median([1, 1, 3, 1])).tolist() == [2.0] * 3
    assert combine(x, median([2, 1, 1, 2])).tolist() == [4.0] * 3
    assert combine(x, median([1, 1, 2, 2])).tolist() == [3.0] * 3  # half of the weight is reached exactly at 2


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_equal_weights_are_none(count: int) -> None:
    x = rows(count)
    np.testing.assert_allclose(combine(x, median([3] * count)), combine(x, median()), rtol=1e-6)
    trim = (count - 1) // 2
    np.testing.assert_allclose(combine(x, trimmed_mean(trim, [0.1] * count)), combine(x, trimmed_mean(trim)), rtol=1e-6, atol=1e-6)


def test_weights_count_in_what_the_trimmed_mean_keeps() -> None:
    x = [np.full(2, v, np.float32) for v in (9.0, 1.0, 2.0, -7.0)]
    assert combine(x, trimmed_mean(1, [100, 1, 3, 100])).tolist() == [1.75] * 2


RULES = {
    "median": median(), "trimmed mean": trimmed_mean(2), "around the median": mean_around_median(3), "weighted median": median(range(1, 8)),
    "weighted trimmed mean": trimmed_mean(2, range(1, 8)),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_identical_in_same_out(rule: Rule) -> None:
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    np.testing.assert_allclose(combine([x] * 7, rule), x, rtol=3e-7)


@pytest.mark.parametrize(
    "rule", [median(), trimmed_mean(0), mean_around_median(1), median([4.0])], ids=["median", "trimmed", "around", "weighted"]
)
def test_one_silo_is_the_identity(rule: Rule) -> None:
    x = rows(1)[0].reshape(5, 10)
    assert (combine([x], rule) == x).all()


@pytest.mark.parametrize("rule", list(RULES.values())[:3], ids=list(RULES)[:3])
def test_order_of_silos_changes_little_and_scale_scales(rule: Rule) -> None:
    x = [row + np.float32(1e-3) * i for i, row in enumerate(rows(7))]  # no two equally near to the median
    np.testing.assert_allclose(combine(x[::-1], rule), combine(x, rule), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(combine([-8 * row for row in x], rule), -8 * combine(x, rule), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rule", list(RULES.values())[:3], ids=list(RULES)[:3])
@pytest.mark.parametrize("push", [1e30, -1e30])
def test_two_of_seven_cannot_leave_the_range_of_the_others(rule: Rule, push: float) -> None:
    x = rows(7)
    got = combine([*x[:5], np.full_like(x[0], push), np.full_like(x[0], push)], rule)
    assert (got >= np.min(x[:5], axis=0) - 1e-6).all()
    assert (got <= np.max(x[:5], axis=0) + 1e-6).all()


def test_blocks_and_factors() -> None:
    x = rows(3, 2 * WIDE + 5)
    whole = combine(x, median())
    assert (whole == np.median(x, axis=0)).all()
    kept = [row.copy() for row in x]
    assert (combine(x, median(), [0.0, 1.0, 0.5]) == np.median([0 * x[0], x[1], x[2] / 2], axis=0)).all()
    assert all((a == b).all() for a, b in zip(kept, x, strict=True))  # what silos sent is not written to


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="less than half of the 4"):
        combine(rows(4), trimmed_mean(2))
    with pytest.raises(ValueError, match="from 1 to 4"):
        combine(rows(4), mean_around_median(5))
    with pytest.raises(ValueError, match="one shape"):
        combine([np.zeros(3, np.float32), np.zeros(4, np.float32)], median())
