"""Poisson sampling: the distribution of what is drawn, and groups that hold each unit whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from silotune.components.learning.privacy.sampling import Group, Units, groups, sample
from silotune.components.learning.tokens import Shard

KEY = bytes(range(1, 33))


def test_sizes_are_binomial_and_units_are_drawn_alike_and_apart() -> None:
    units, q, steps = 400, 0.03, 3000
    drawn = [sample(KEY, step, units, q) for step in range(steps)]
    hits = np.zeros((steps, units), bool)
    for step, found in enumerate(drawn):
        assert (np.diff(found) > 0).all()
        hits[step, found] = True
    sizes = hits.sum(1)
    edges = [0, 7, 9, 10, 11, 12, 13, 14, 15, 17, 401]
    seen = np.histogram(sizes, bins=edges)[0]
    expected = steps * np.diff(stats.binom.cdf(np.array(edges) - 1, units, q))
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-3
    per_unit = hits.sum(0)
    assert stats.chisquare(per_unit).pvalue > 1e-3
    assert abs(per_unit.mean() - q * steps) < 4 * np.sqrt(q * steps / units)
    together = (hits[:, 0::2] & hits[:, 1::2]).sum()  # two neighbours in one step
    assert abs(together - q * q * steps * units / 2) < 4 * np.sqrt(q * q * steps * units / 2)
    follow = (hits[:-1] & hits[1:]).sum()  # one unit in two steps on end
    assert abs(follow - q * q * steps * units) < 4 * np.sqrt(q * q * steps * units)


def test_a_sample_may_be_empty_or_all_and_depends_on_key_and_step() -> None:
    sizes = [len(sample(KEY, step, 10, 0.05)) for step in range(200)]
    assert sizes.count(0) > 80
    assert max(sizes) >= 2
    assert sample(KEY, 3, 7, 1.0).tolist() == list(range(7))
    many = sample(KEY, 3, 100_000, 0.01)
    np.testing.assert_array_equal(many, sample(KEY, 3, 100_000, 0.01))
    for other in (sample(KEY, 4, 100_000, 0.01), sample(bytes(32), 3, 100_000, 0.01)):
        assert len(np.intersect1d(many, other)) < 40  # 10 by chance


@pytest.fixture
def persons(some_shard: Shard) -> Shard:
    """Ten examples of four persons, not in order; one has five of them."""
    return Shard(
        some_shard.tokens, some_shard.targets, some_shard.offsets, "digest", some_shard.counts, np.array([0, 1, 0, 2, 1, 1, 3, 1, 1, 2])
    )


def test_units_know_their_examples(persons: Shard) -> None:
    units = Units.of(persons)
    assert len(units) == 4
    assert [units.of_unit(u).tolist() for u in range(4)] == [[0, 2], [1, 4, 5, 7, 8], [3, 9], [6]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_groups_hold_every_unit_whole_and_no_more_rows_than_memory(persons: Shard, packing: bool, rows: int) -> None:
    units = Units.of(persons)
    found: list[Group] = list(groups(persons, units, np.arange(4), rows, 40, packing))
    assert [u for g in found for u in g.units] == [0, 1, 2, 3]
    for group in found:
        assert all(0 < len(part) <= rows for part in group.parts)
        assert len(group.parts) == 1 or len(group.units) == 1
        examples = [e for part in group.parts for row in part for e in row]
        assert sorted(examples) == sorted(np.concatenate([units.of_unit(u) for u in group.units]).tolist())
        for row in (row for part in group.parts for row in part):
            assert (len(row) == 1) if not packing else (persons.lengths(np.array(row)).sum() <= 40)
    if rows == 50:
        assert len(found) == 1
    assert list(groups(persons, units, np.empty(0, np.int64), rows, 40, packing)) == []


def test_a_record_is_its_own_unit_where_nobody_is_named(make_shard: Callable[..., Any]) -> None:
    shard = make_shard([([1, 2, 3], [0, 1, 1])] * 5)
    assert [Units.of(shard).of_unit(u).tolist() for u in range(5)] == [[0], [1], [2], [3], [4]]
    assert shard.unit_count == 5
