"""Which records are set aside to steer the run."""

from __future__ import annotations

import random

import pytest

from silotune.components.learning.held_out import held_out
from silotune.components.learning.records import PERSON

SEED = ("clinics", 17, "north")


def notes(first: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(first, first + count)]


def aside(records: list[dict[str, str]], fraction: float = 0.05, *seed: str | int) -> set[str]:
    held = held_out(records, fraction, *(seed or SEED))
    assert held is not None
    return {r["prompt"] for r, h in zip(records, held, strict=True) if h}


def test_about_the_share_that_is_asked_for_is_set_aside() -> None:
    """Of 4,000 draws with probability 0.05 the standard deviation is 14."""
    assert 200 - 5 * 14 < len(aside(notes(0, 4000))) < 200 + 5 * 14


def test_records_that_are_added_removed_or_put_in_another_order_move_no_other() -> None:
    before = notes(0, 400)
    held = aside(before)
    assert aside(before + notes(400, 400)) & {r["prompt"] for r in before} == held
    assert aside(before[::2]) == held & {r["prompt"] for r in before[::2]}
    mixed = random.Random(3).sample(before, len(before))
    assert aside(mixed) == held


def test_copies_of_a_record_and_records_of_a_person_are_on_one_side() -> None:
    records = notes(0, 50) * 3
    held = held_out(records, 0.3, *SEED)
    assert held is not None
    assert held[:50] == held[50:100] == held[100:]
    owned = [r | {PERSON: f"p{i % 7}"} for i, r in enumerate(notes(0, 70))]
    held = held_out(owned, 0.3, *SEED)
    assert held is not None
    assert all(held[i] == held[i % 7] for i in range(70))
    assert 0 < sum(held) < 70


@pytest.mark.parametrize("fraction", [0.0001, 0.05, 0.5, 0.9999])
def test_at_least_one_is_set_aside_and_at_least_one_is_not(fraction: float) -> None:
    for count in (2, 3, 10):
        assert 0 < len(aside(notes(0, count), fraction)) < count


def test_what_cannot_be_split_is_told() -> None:
    assert held_out(notes(0, 1) * 5, 0.05, *SEED) is None
    assert held_out([r | {PERSON: "ann"} for r in notes(0, 5)], 0.05, *SEED) is None
    assert held_out([], 0.05, *SEED) == []


def test_another_silo_or_seed_draws_others() -> None:
    records = notes(0, 400)
    assert len({frozenset(aside(records, 0.05, *seed)) for seed in (SEED, ("clinics", 18, "north"), ("clinics", 17, "south"))}) == 3
