"""Learning-rate schedules by their values at known points."""

from __future__ import annotations

from itertools import pairwise

import pytest

from silotune.components.learning.schedule import decay, rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8] * 5),
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
        ("cosine", [0.8, 0.4 * (1 + 2**-0.5), 0.4, 0.4 * (1 - 2**-0.5), 0.0]),
    ],
)
def test_course_without_warmup(schedule: str, expected: list[float]) -> None:
    assert [rate(step, 4, 0.8, schedule, 0) for step in range(5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_climbs_in_equal_steps_to_the_peak(schedule: str) -> None:
    rates = [rate(step, 12, 1.0, schedule, 4) for step in range(12)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert all(0 < later <= earlier for earlier, later in pairwise(rates[4:]))


def test_warmup_as_long_as_the_round_never_passes_the_peak() -> None:
    assert [rate(step, 3, 1.0, "linear", 10) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert rate(2, 3, 1.0, "cosine", 3) == pytest.approx(1.0)


def test_decay_over_rounds_starts_at_one_and_ends_at_nothing() -> None:
    assert [decay(s, 0.0) for s in ("constant", "linear", "cosine")] == [1.0, 1.0, 1.0]
    assert [decay(s, 1.0) for s in ("constant", "linear", "cosine")] == pytest.approx([1.0, 0.0, 0.0])
