"""The budget: ε of all trainings together against closed forms, limits, months, and many who reserve at once."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ledgers
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from silotune.components.errors import RefusedError
from silotune.components.learning.privacy.accounting import Mechanism, epsilon
from silotune.components.steward import budget
from silotune.components.steward.budget import Limits, reserve, spent
from silotune.components.steward.entry import Charge
from silotune.components.store.object_store import ObjectStore
from silotune.components.store.s3_store import S3Store

JANUARY = datetime(2027, 1, 20, tzinfo=UTC).timestamp()
DAY = 86_400.0
NO_LIMITS = Limits(delta=1e-5)


def gaussian(z: float, times: int, delta: float = 1e-5) -> float:
    """ε of a Gaussian mechanism that ran so often, by Balle & Wang 2018 (arXiv:1805.06530), Theorem 5: its own formula, and no distributions."""
    mu = math.sqrt(times) / z

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0, 500))


def told(charges: list[Charge], at: float = JANUARY, **more: Any) -> budget.Spent:
    return spent([(c, at) for c in charges], 1e-5, more.pop("unit", "record"), more.pop("federation", "fed"), at, **more)


@pytest.mark.parametrize("times", [1, 7, 30])
def test_trainings_compose_as_the_closed_form_says(times: int) -> None:
    found = told([ledgers.charge(n) for n in range(1, times + 1)])
    assert found.total == pytest.approx(gaussian(4.0, times), rel=2e-3)
    assert found.total >= gaussian(4.0, times) * (1 - 1e-6)
    assert found.run == found.month == found.total
    assert found.trainings == times


def test_unlike_trainings_of_unlike_federations_compose() -> None:
    charges = [ledgers.charge(1, z=4.0), ledgers.charge(2, z=8.0), ledgers.charge(1, "other", z=2.0)]
    together = (1 / 16 + 1 / 64 + 1 / 4) ** -0.5
    found = told(charges)
    assert found.total == pytest.approx(gaussian(together, 1), rel=2e-3)
    assert found.run == pytest.approx(gaussian((1 / 16 + 1 / 64) ** -0.5, 1), rel=2e-3)
    assert found.total < told(charges[:2]).total + told(charges[2:]).total  # and less than if each were added up by itself


def test_nothing_is_nothing() -> None:
    assert told([]).total == 0


def test_a_training_without_privacy_has_no_bound() -> None:
    charges = [ledgers.charge(1), ledgers.charge(2, mechanism=None)]
    assert told(charges).total == math.inf
    assert told(charges, federation="other").run == 0
    apart = told(charges, bounded=False)
    assert apart.total == pytest.approx(gaussian(4.0, 1), rel=2e-3)
    assert apart.unprotected == told(charges).unprotected == 1


@pytest.mark.parametrize(
    ("promised", "asked", "bounded"), [("record", "record", 1), ("person", "record", 1), ("person", "person", 1), ("record", "person", 0)]
)
def test_a_persons_privacy_is_a_records_too_and_not_the_other_way(promised: str, asked: str, bounded: int) -> None:
    assert math.isfinite(told([ledgers.charge(unit=promised)], unit=asked).total) is bool(bounded)


def test_a_month_is_one_of_the_calendar() -> None:
    first = datetime(2027, 1, 31, 23, 59, tzinfo=UTC).timestamp()
    charges = [(ledgers.charge(1), first), (ledgers.charge(2), first + 120)]
    january, february = (spent(charges, 1e-5, "record", "fed", at) for at in (first, first + 120))
    assert january.month == february.month == pytest.approx(gaussian(4.0, 1), rel=2e-3)
    assert january.total == pytest.approx(gaussian(4.0, 2), rel=2e-3)


# Limits


def let_in(store: ObjectStore, folder: Path, limits: Limits, charges: list[Charge], at: float = JANUARY, **more: Any) -> budget.Spent:
    book = ledgers.ledger(store, folder)
    for wanted in charges:
        after = reserve(book, wanted, limits, "record", bounded=more.get("bounded", True), clock=lambda: at)
    return after


@pytest.mark.parametrize(("limit", "words"), [("run", "for federation 'fed'"), ("month", "in a calendar month"), ("total", "in total")])
def test_what_would_pass_a_limit_is_refused_and_not_written(folder: ObjectStore, tmp_path: Path, limit: str, words: str) -> None:
    limits = Limits(delta=1e-5, **{limit: gaussian(4.0, 2) * 1.01})
    after = let_in(folder, tmp_path, limits, [ledgers.charge(1), ledgers.charge(2)])
    assert after.total == pytest.approx(gaussian(4.0, 2), rel=2e-3)
    with pytest.raises(RefusedError, match=words) as refused:
        let_in(folder, tmp_path, limits, [ledgers.charge(3)])
    assert refused.value.reason == "budget"
    assert refused.value.exit_code == 4
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 2


def test_each_limit_is_of_what_it_is_of(folder: ObjectStore, tmp_path: Path) -> None:
    once = gaussian(4.0, 1) * 1.01
    let_in(folder, tmp_path, Limits(run=once), [ledgers.charge(1, "a"), ledgers.charge(1, "b"), ledgers.charge(1, "c")])
    with pytest.raises(RefusedError, match="for federation 'b'"):
        let_in(folder, tmp_path, Limits(run=once), [ledgers.charge(2, "b")])
    let_in(folder, tmp_path, Limits(month=once), [ledgers.charge(3, "b")], JANUARY + 30 * DAY)
    with pytest.raises(RefusedError, match="month"):
        let_in(folder, tmp_path, Limits(month=once), [ledgers.charge(4, "d")], JANUARY + 30 * DAY)


def test_records_that_were_added_give_no_fresh_budget(folder: ObjectStore, tmp_path: Path) -> None:
    limits = Limits(total=gaussian(4.0, 1) * 1.01)
    let_in(folder, tmp_path, limits, [ledgers.charge(1)])
    with pytest.raises(RefusedError, match="budget of data set 'notes'"):
        let_in(folder, tmp_path, limits, [ledgers.charge(1, content="d" * 64)])


def test_a_resumed_training_is_not_charged_twice_even_where_nothing_is_left(folder: ObjectStore, tmp_path: Path) -> None:
    limits = Limits(total=gaussian(4.0, 1) * 1.01)
    first = let_in(folder, tmp_path, limits, [ledgers.charge(1)])
    again = let_in(folder, tmp_path, limits, [ledgers.charge(1)] * 3, JANUARY + 400 * DAY)
    assert again == first
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 1


def test_without_privacy_a_limit_lets_nothing_through(folder: ObjectStore, tmp_path: Path) -> None:
    plain = ledgers.charge(1, mechanism=None)
    with pytest.raises(RefusedError, match="with this training: no bound"):
        let_in(folder, tmp_path, Limits(total=100.0), [plain])
    assert let_in(folder, tmp_path, Limits(total=100.0), [plain], bounded=False).unprotected == 1  # where the steward said so
    assert let_in(folder, tmp_path, NO_LIMITS, [ledgers.charge(2, mechanism=None)]).total == math.inf
    with pytest.raises(RefusedError, match="spent: no bound"):
        let_in(folder, tmp_path, Limits(total=100.0), [ledgers.charge(3)])


@pytest.mark.parametrize("jump", [-40 * DAY, -1.0, 40 * DAY])
def test_a_clock_that_jumps_gives_no_months_budget_twice(folder: ObjectStore, tmp_path: Path, jump: float) -> None:
    """January's budget and February's can be had once each, however the clock goes to and fro between them."""
    once = Limits(month=gaussian(4.0, 1) * 1.01)
    times = [JANUARY, JANUARY + jump, JANUARY, JANUARY + 20 * DAY, JANUARY + 20 * DAY + jump, JANUARY, JANUARY + 20 * DAY]
    done = []
    for number, at in enumerate(times, 1):
        try:
            let_in(folder, tmp_path, once, [ledgers.charge(number)], at)
            done.append(at)
        except RefusedError:
            continue
    entries = ledgers.ledger(folder, tmp_path).entries()
    months = Counter(f"{datetime.fromtimestamp(e.at, UTC):%Y-%m}" for e in entries)
    assert max(months.values()) == 1
    assert [e.at for e in entries] == sorted(e.at for e in entries)


# Many at once, and kills


def test_what_must_hold_besides_is_asked_of_the_very_entries_that_it_goes_behind(folder: ObjectStore, tmp_path: Path) -> None:
    """Of two federations that begin at once, the second sees the first."""

    class Racing:
        """A store in which another federation is faster, once."""

        def __init__(self) -> None:
            self.lost = False

        def create(self, key: str, data: bytes) -> bool:
            if not self.lost:
                self.lost = True
                let_in(folder, tmp_path, NO_LIMITS, [ledgers.charge(1, "faster")])
            return folder.create(key, data)

        def __getattr__(self, name: str) -> Any:
            return getattr(folder, name)

    seen: list[list[str]] = []
    book = ledgers.ledger(Racing(), tmp_path)  # type: ignore[arg-type]
    reserve(
        book, ledgers.charge(1), NO_LIMITS, "record", bounded=True, also=lambda entries: seen.append([e.charge.federation for e in entries])
    )
    assert seen == [[], ["faster"]]

    def never(_: Any) -> None:
        raise RefusedError("one federation only", "policy: runs")

    with pytest.raises(RefusedError, match="one federation only"):
        reserve(ledgers.ledger(folder, tmp_path), ledgers.charge(2), NO_LIMITS, "record", bounded=True, also=never)
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 2


def test_of_many_who_reserve_at_once_only_so_many_come_in_as_the_limit_has_room_for(folder: ObjectStore, tmp_path: Path) -> None:
    room = 9
    limits = Limits(total=(gaussian(4.0, room) + gaussian(4.0, room + 1)) / 2)
    ledgers.key_of(tmp_path)
    told([ledgers.charge(1)])  # what is imported once is imported for all forks
    assert forked(4, lambda i: ledgers.reserve_many(folder, tmp_path, [ledgers.charge(100 * i + n) for n in range(1, 7)], limits)) == room
    entries = ledgers.ledger(folder, tmp_path).entries()
    assert len(entries) == room
    assert len({e.identity for e in entries}) == room


def test_many_who_reserve_the_same_training_are_charged_once(folder: ObjectStore, tmp_path: Path) -> None:
    ledgers.key_of(tmp_path)
    assert forked(4, lambda _: ledgers.reserve_many(folder, tmp_path, [ledgers.charge(n) for n in (1, 2, 3)], NO_LIMITS)) == 12
    assert len(ledgers.ledger(folder, tmp_path).entries()) == 3


def test_the_same_in_s3(s3: S3Store, tmp_path: Path) -> None:
    limits = Limits(total=(gaussian(4.0, 3) + gaussian(4.0, 4)) / 2)
    ledgers.key_of(tmp_path)
    assert forked(3, lambda i: ledgers.reserve_many(s3, tmp_path, [ledgers.charge(10 * i + n) for n in (1, 2)], limits)) == 3
    assert len(ledgers.ledger(s3, tmp_path).entries()) == 3


def forked(count: int, work: Any) -> int:
    """Do the work in so many processes at once; returns the sum of what they return."""
    import os

    reading, writing = os.pipe()
    children = []
    for i in range(count):
        if (pid := os.fork()) == 0:
            try:
                os.write(writing, bytes([work(i)]))
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answers = pipe.read()
    assert len(answers) == count
    return sum(answers)


def test_killed_at_any_moment_of_a_reservation_what_may_have_begun_is_spent_and_once(folder: ObjectStore, tmp_path: Path) -> None:
    ledgers.key_of(tmp_path)
    kept = Limits(total=gaussian(4.0, 200))
    told([ledgers.charge(1)])
    begun = tmp_path / "begun"
    for kill_at in range(1, 200):
        wanted = ledgers.charge(kill_at)

        def work(wanted: Charge = wanted) -> None:
            reserve(ledgers.ledger(folder, tmp_path), wanted, kept, "record", bounded=True, clock=lambda: JANUARY)
            begun.touch()  # from here on records are read

        begun.unlink(missing_ok=True)
        ended = ledgers.life(kill_at, work)
        stands = [e.identity for e in ledgers.ledger(folder, tmp_path).entries()].count(wanted.identity("notes"))
        assert stands <= 1
        if begun.exists():
            assert stands == 1
        let_in(folder, tmp_path, kept, [wanted])  # another life does it again
        assert len(ledgers.ledger(folder, tmp_path).entries()) == kill_at
        if ended == 0:
            assert kill_at > 6
            return
    pytest.fail("no life was long enough to end by itself")


# Many kinds


def test_few_kinds_are_composed_as_they_are() -> None:
    kinds = Counter({Mechanism(sampling_probability=0.01 * (i + 1), noise_multiplier=1.0 + i, steps=10): 2 for i in range(5)})
    assert epsilon(budget._grouped(kinds), 1e-5) == pytest.approx(epsilon(kinds, 1e-5), rel=1e-9)


@pytest.mark.parametrize("count", [20, 700])
def test_of_many_kinds_the_likest_are_merged_and_the_bound_stays_one(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Full-batch Gaussians, whose exact ε is known for any number of kinds: q is 1, so that only noise is rounded."""
    monkeypatch.setattr(budget, "MOST_DISTINCT", 8)
    noises = [20.0 + 0.7 * (i % 29) + i / count for i in range(count)]
    kinds = Counter({Mechanism(sampling_probability=1.0, noise_multiplier=z, steps=1): 1 for z in noises})
    grouped = budget._grouped(kinds)
    assert len(grouped) <= 8
    assert sum(count * m.steps for m, count in grouped.items()) == count
    exact = gaussian(sum(z**-2 for z in noises) ** -0.5, 1)
    assert exact * (1 - 1e-6) <= epsilon(grouped, 1e-5) <= exact * 1.12


def test_merging_rounds_sampling_up_and_noise_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_DISTINCT", 2)
    kinds = Counter({Mechanism(sampling_probability=q, noise_multiplier=z, steps=3): 1 for q, z in ((0.1, 2.0), (0.11, 2.1), (0.9, 1.0))})
    merged = {(m.sampling_probability, m.noise_multiplier): n for m, n in budget._grouped(kinds).items()}
    assert merged == {(0.11, 2.0): 6, (0.9, 1.0): 3}


def test_what_is_sampled_costs_less_and_still_adds_up() -> None:
    few = Mechanism(sampling_probability=0.02, noise_multiplier=1.0, steps=50)
    charges = [ledgers.charge(n, mechanism=few) for n in range(1, 5)]
    assert told(charges).total == pytest.approx(epsilon([few.model_copy(update={"steps": 200})], 1e-5), rel=1e-6)
    assert told(charges).total > told(charges[:1]).total
