"""What `silotune privacy` shows of a silo's ledger: spent, left, what further rounds would cost, and the course of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.federation import Federation
from silotune.components.steward.budget import Limits, Spent, Unit, bound, bounds, promised, spent
from silotune.components.steward.entry import Charge, Entry, last_of
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy, counted_by, place

if TYPE_CHECKING:
    from rich.console import RenderableType

POINTS = 12  # of a course at most: each is a composition
BAR = 40  # characters
AHEAD = 60.0  # seconds by which a ledger's time may be ahead of this machine's without a word
NAMES = (("run", "this federation"), ("month", "this month"), ("total", "in total"))


@dataclass(frozen=True)
class Point:
    """ε of the first so many trainings."""

    trainings: int
    at: float  # Unix time in seconds of the last of them
    epsilon: float


@dataclass(frozen=True)
class Promise:
    """The federation's own ε, which no round may pass, and what its private rounds have spent of it."""

    epsilon: float
    delta: float
    spent: float
    next: dict[int, float]  # further rounds -> spent with them


@dataclass(frozen=True)
class Account:
    """One silo's ledger, read and added up. A month is the present one (UTC)."""

    silo: str
    federation: str
    dataset: str
    place: str  # of the ledger
    policy: Path | None
    now: float  # Unix time in seconds
    limits: Limits
    spent: Spent
    promise: Promise | None
    trained: list[tuple[str, float]]  # of each training that counts: its federation, and Unix time in seconds
    course: list[Point]
    next: dict[int, Spent]  # further rounds of this federation -> what is spent with them
    bounded: bool

    @property
    def refused(self) -> dict[int, list[str]]:
        """Of those further rounds, which are more than there is room for, and what they would pass."""
        found = {count: after.beyond(self.limits) for count, after in self.next.items()}
        if self.promise:
            found = {c: [*names, *["promise"] * (self.promise.next[c] > self.promise.epsilon)] for c, names in found.items()}
        return {count: names for count, names in found.items() if names}


def account(
    federation: Federation, silo_id: str, rounds: Sequence[int], now: float, policy: Policy | None = None, *, every: bool = True
) -> Account:
    """Read and verify a silo's ledger, and add it up.

    Args:
        rounds: numbers of further rounds, to be forecast; where the federation has trained here before, and with differential privacy.
        policy: to count by; default: the one that holds.
        every: read every object anew, also those that a training does without.

    Raises:
        RefusedError: the ledger is damaged.
        FederationError: the silo has no key on this machine, or its policy is wrong.
    """
    policy = policy or Policy.of(federation, silo_id)
    ledger = Ledger.of(federation, silo_id, policy)
    entries = ledger.every_entry() if every else ledger.entries()
    terms = federation.privacy_agreed
    limits, unit = counted_by(policy, terms)
    bounded = policy is None or policy.private
    at = max(now, entries[-1].at) if entries else now
    charges = [(e.charge, e.at) for e in entries]

    def added(more: Sequence[Charge]) -> Spent:
        return spent([*charges, *((c, at) for c in more)], limits.delta, unit, federation.name, at, bounded=bounded)

    last = last_of(entries, federation.name)
    ahead = {k: [last.charge] * k for k in rounds} if last and last.charge.mechanism else {}
    promise = None
    if terms.epsilon is not None:
        kept = {k: promised([*(c for c, _ in charges), *more], federation.name, terms) for k, more in {0: [], **ahead}.items()}
        promise = Promise(terms.epsilon, terms.delta, kept.pop(0), kept)
    counted = [e for e in entries if bounded or e.charge.mechanism]
    return Account(
        silo=silo_id, federation=federation.name, dataset=ledger.dataset, place=ledger.place, policy=place(federation, silo_id),
        now=now, limits=limits, spent=added([]), promise=promise, trained=[(e.charge.federation, e.at) for e in counted],
        course=_course(counted, limits.delta, unit), next={k: added(more) for k, more in ahead.items()}, bounded=bounded,
    )  # fmt: skip


def _course(counted: Sequence[Entry], delta: float, unit: Unit) -> list[Point]:
    """At equal distances, and where a training comes that nothing bounds."""
    count = len(counted)
    ends = {math.ceil(count * i / POINTS) for i in range(1, POINTS + 1)}
    if (free := next((i for i, e in enumerate(counted) if not bounds(e.charge, unit)), None)) is not None:
        ends |= {free, free + 1}
    return [Point(n, counted[n - 1].at, bound((e.charge for e in counted[:n]), delta, unit)) for n in sorted(ends - {0})]


def text(value: float) -> str:
    return "no bound" if value == math.inf else f"{value:.3f}"


def whose(found: Account) -> str:
    return "a person" if found.spent.unit == "person" else "a record"


def day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"


def lines(found: Account) -> list[str]:
    """In words."""
    s = found.spent
    words = [
        f"{found.silo}: data set {found.dataset!r}, {_times(s.trainings, 'training')}, epsilon about {whose(found)} at delta {s.delta:g}",
        f"ledger: {found.place}",
        f"policy: {found.policy or 'none holds here, so that nothing is limited but by what the federation promises'}",
    ]
    if s.unprotected:
        counts = "so that no epsilon bounds the whole" if found.bounded else "which the policy lets through and the numbers below leave out"
        words.append(f"{s.unprotected} of them without differential privacy about {whose(found)}, {counts}")
    last = found.trained[-1][1] if found.trained else found.now
    if last > found.now + AHEAD:
        words.append(
            f"the last of them was written down on {day(last)}, which this machine's clock has not reached; months count from there"
        )
    if found.limits.month is not None:
        words.append(f"the next month begins on {_next_month(max(last, found.now))} (UTC)")
    return words


def told(found: Account) -> str:
    """In a line."""
    limits = ((getattr(found.spent, name), getattr(found.limits, name), words) for name, words in NAMES[1:])
    parts = ", ".join(f"epsilon {text(value)}{f' of {limit:g}' if limit is not None else ''} {words}" for value, limit, words in limits)
    return f"{_times(found.spent.trainings, 'training')} on data set {found.dataset!r}; {parts}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _next_month(at: float) -> str:
    first = datetime.fromtimestamp(at, UTC).replace(day=1)
    return f"{(first + timedelta(days=32)).replace(day=1):%Y-%m-%d}"


def tables(found: Account) -> list[RenderableType]:
    """Spent and left; the forecast; the course."""
    from rich.table import Table

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for i, name in enumerate(columns):
            made.add_column(name, no_wrap=True, justify="left" if not i or name == "refused by" else "right")
        return made

    budget = table("", "spent", "limit", "left")

    def add(words: str, value: float, limit: float | None) -> None:
        left = "" if limit is None else text(max(0.0, limit - value)) if value < math.inf else "none"
        budget.add_row(words, text(value), "none" if limit is None else text(limit), left)

    for name, words in NAMES:
        add(words, getattr(found.spent, name), getattr(found.limits, name))
    if found.promise:
        add(f"of its promise (delta {found.promise.delta:g})", found.promise.spent, found.promise.epsilon)
    made: list[RenderableType] = [budget]
    if found.next:
        ahead = table("more rounds", *(words for _, words in NAMES), "refused by")
        for count, after in found.next.items():
            ahead.add_row(str(count), *(text(getattr(after, name)) for name, _ in NAMES), ", ".join(found.refused.get(count, [])))
        made.append(ahead)
    if any(point.epsilon < math.inf for point in found.course):  # else there is nothing to see
        made.append(_bars(found))
    return made


def _bars(found: Account) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    limit = found.limits.total
    made = Table(box=None, pad_edge=False)
    for name in ("trainings", "until", "epsilon", f"│ limit in total, {limit:g}" if limit else ""):
        made.add_column(name, no_wrap=True, justify="left" if name == "" or name.startswith("│") else "right")
    finite = [p.epsilon for p in found.course if p.epsilon < math.inf]
    top = max([*finite, limit or 0.0]) or 1.0
    mark = round(BAR * limit / top) - 1 if limit else None
    for point in found.course:
        length = BAR if point.epsilon == math.inf else round(BAR * point.epsilon / top)
        bar = "".join("│" if i == mark and i >= length else "█" if i < length else " " for i in range(BAR))
        made.add_row(str(point.trainings), day(point.at), text(point.epsilon), Text(bar))
    return made
