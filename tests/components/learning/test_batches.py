"""Batches: every example once an epoch, rows that hold what they may, and no example that sees another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.components.learning.batches import batches, collate, pack, seed_of, stream
from silotune.components.learning.model import load_base
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import token_losses

PAD = 2

# Order


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_is_a_permutation(size: int) -> None:
    order = stream(size, 0, 3 * size, "fed", 17, "north")
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=st.integers(1, 30), cursor=st.integers(0, 100), counts=st.lists(st.integers(0, 40), max_size=5))
@settings(max_examples=60, deadline=None)
def test_stretches_join_to_one_stream(size: int, cursor: int, counts: list[int]) -> None:
    parts = []
    at = cursor
    for count in counts:
        parts.append(stream(size, at, count, "fed", 17, "north"))
        assert len(parts[-1]) == count
        at += count
    whole = stream(size, 0, at, "fed", 17, "north")[cursor:]
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == whole.tolist()


def test_epochs_silos_seeds_and_federations_have_orders_of_their_own() -> None:
    orders = [
        stream(50, cursor, 50, *seed).tolist()
        for cursor, *seed in [(0, "f", 1, "a"), (50, "f", 1, "a"), (0, "f", 1, "b"), (0, "f", 2, "a"), (0, "g", 1, "a")]
    ]
    assert len({tuple(order) for order in orders}) == 5
    assert stream(50, 0, 50, "f", 1, "a").tolist() == orders[0]


def test_order_is_pinned() -> None:
    """A silo that upgrades in the middle of a federation must go on in the same order."""
    assert seed_of("fed", 17, "north", 0) == 3212030037956898630
    assert stream(8, 0, 8, "fed", 17, "north").tolist() == [5, 7, 6, 4, 3, 1, 2, 0]


def test_seed_parts_do_not_run_together() -> None:
    assert len({seed_of("a", "bc"), seed_of("ab", "c"), seed_of("abc"), seed_of("abc", "")}) == 4
    assert all(0 <= seed_of(i) < 2**63 for i in range(50))


# Rows

lengths_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=40), st.just(capacity))
)


@given(lengths_and_capacity)
@settings(max_examples=150, deadline=None)
def test_rows_part_the_examples_and_fit(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    rows = pack(np.array(lengths), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # Any two rows of first-fit hold more than one row's worth, else the later one's first example would have gone into the earlier.
    assert len(rows) <= 1 or len(rows) * capacity < 2 * sum(lengths)


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest rows, by trying every placement."""

    def place(i: int, rows: tuple[int, ...]) -> int:
        if i == len(lengths):
            return len(rows)
        found = [
            place(i + 1, (*rows[:r], used + lengths[i], *rows[r + 1 :])) for r, used in enumerate(rows) if used + lengths[i] <= capacity
        ]
        return min([*found, place(i + 1, (*rows, lengths[i]))])

    return place(0, ())


@given(st.integers(4, 20).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), min_size=1, max_size=6), st.just(c))))
@settings(max_examples=60, deadline=None)
def test_rows_are_few(drawn: tuple[list[int], int]) -> None:
    """The tight bound for first-fit-decreasing: 11/9 of the fewest, plus 6/9 (Dosa 2007)."""
    lengths, capacity = drawn
    assert len(pack(np.array(lengths), capacity)) <= 11 / 9 * fewest(lengths, capacity) + 6 / 9


def test_an_example_over_the_capacity_has_its_own_row() -> None:
    assert sorted(map(sorted, pack(np.array([9, 3, 2]), 5))) == [[0], [1, 2]]


def test_capacity_nothing_means_no_packing() -> None:
    assert sorted(pack(np.array([3, 1, 2]), 0)) == [[0], [1], [2]]


# Tensors


def test_unpacked_rows_are_padded_on_the_right(make_shard: Callable[..., Shard]) -> None:
    shard = make_shard([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])])
    batch = collate(shard, [[0], [1]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert batch.targets.tolist() == [[False, True, True], [False, True, False]]
    assert batch.position_ids[0].tolist() == [0, 1, 2]
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.tokens == 3


def test_packed_rows_see_only_their_own_example_and_its_past(make_shard: Callable[..., Shard]) -> None:
    shard = make_shard([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1]), ([3], [0])])
    batch = collate(shard, [[0, 1], [2]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, PAD, PAD, PAD, PAD]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1]
    assert batch.attention_mask.shape == (2, 1, 5, 5)
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert batch.attention_mask[1, 0, 0].int().tolist() == [1, 0, 0, 0, 0]
    assert batch.attention_mask.any(-1).all()  # a softmax over nothing would be NaN
    assert batch.tokens == 3


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 50])
def test_parts_of_a_step_hold_every_example_once(some_shard: Shard, packing: bool, parts: int) -> None:
    indices = np.array([7, 3, 3, 0, 9, 1])
    made = list(batches(some_shard, indices, parts, 32, PAD, packing))
    assert 1 <= len(made) <= parts
    assert sum(b.tokens for b in made) == sum(int(some_shard.example(i)[1].sum()) for i in indices)
    found = sorted(tuple(ids[m].tolist()) for b in made for ids, m in zip(b.input_ids, b.targets, strict=True))
    wanted = sorted(t for i in indices for t in some_shard.example(i)[0][some_shard.example(i)[1] == 1].tolist())
    assert sorted(t for row in found for t in row) == wanted
    assert all(b.input_ids.shape[1] <= 32 for b in made)
    if packing:
        assert sum(b.input_ids.shape[0] for b in made) < len(indices)


# No example sees another


def alone(model: Any, shard: Shard, index: int) -> list[float]:
    """Losses of one example by itself: no mask, no positions, log-softmax by hand."""
    import torch

    ids, targets = shard.example(index)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0].double()
    logs = logits - logits.logsumexp(-1, keepdim=True)
    return [-float(logs[i - 1, ids[i]]) for i in range(len(ids)) if targets[i]]


def together(model: Any, shard: Shard, rows: list[list[int]], mask: Any = None) -> list[float]:
    import dataclasses

    import torch

    batch = collate(shard, rows, PAD)
    if mask is not None:
        batch = dataclasses.replace(batch, attention_mask=mask(batch.attention_mask))
    with torch.inference_mode():
        return token_losses(model, batch).tolist()


ROWS = [[1, 0], [6, 3, 8], [2], [5, 4]]


def test_packed_losses_are_those_of_the_examples_alone(tiny_base: Path, some_shard: Shard) -> None:
    model = load_base(tiny_base, "float32").eval()
    expected = [loss for row in ROWS for i in row for loss in alone(model, some_shard, i)]
    assert np.ptp(expected) > 0.5  # the model tells tokens apart
    np.testing.assert_allclose(together(model, some_shard, ROWS), expected, atol=1e-5)
    unpacked = [[i] for row in ROWS for i in row]
    np.testing.assert_allclose(together(model, some_shard, unpacked), expected, atol=1e-5)


def test_changing_an_example_leaves_its_neighbours_alone(tiny_base: Path, make_shard: Callable[..., Shard]) -> None:
    import torch

    model = load_base(tiny_base, "float32").eval()
    rng = np.random.default_rng(1)
    first, second, third, other = (rng.integers(3, 300, n).tolist() for n in (6, 5, 7, 5))
    marks = {n: [0] + [1] * (n - 1) for n in (5, 6, 7)}
    before = make_shard([(first, marks[6]), (second, marks[5]), (third, marks[7])])
    after = make_shard([(first, marks[6]), (other, marks[5]), (third, marks[7])])
    a, b = (np.array(together(model, shard, [[0, 1, 2]])) for shard in (before, after))
    assert np.abs(a[5:9] - b[5:9]).max() > 0.1
    np.testing.assert_allclose(a[:5], b[:5], atol=1e-6)
    np.testing.assert_allclose(a[9:], b[9:], atol=1e-6)

    def plain(mask: Any) -> Any:
        return torch.ones_like(mask).tril()

    a, b = (np.array(together(model, shard, [[0, 1, 2]], plain)) for shard in (before, after))
    assert np.abs(a[9:] - b[9:]).max() > 1e-3  # without the mask it would have shown
