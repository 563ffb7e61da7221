"""What `silotune privacy` shows of a silo's ledger: spent, left, what further rounds would cost, and the course of it as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from silotune.components.federation import Federation
from silotune.components.steward.budget import Limits, Spent, Unit, bound, spent
from silotune.components.steward.entry import Charge, Entry, last_of
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy

if TYPE_CHECKING:
    from rich.console import RenderableType

POINTS = 12  # of a plot at most: each is a composition
BAR = 40  # characters
WIDTH, HEIGHT, EDGE = 640, 320, 48  # of a drawing, in pixels


@dataclass(frozen=True)
class Point:
    """ε of the first so many trainings."""

    trainings: int
    at: float  # Unix time in seconds of the last of them
    epsilon: float


@dataclass(frozen=True)
class Account:
    """One silo's ledger, read and added up. A month is the present one (UTC)."""

    silo: str
    dataset: str
    limits: Limits
    spent: Spent
    course: list[Point]
    next: dict[int, Spent]  # further rounds of this federation -> what is spent with them
    bounded: bool


def account(federation: Federation, silo_id: str, rounds: Sequence[int], now: float) -> Account:
    """Read and verify a silo's ledger, and add it up.

    Args:
        rounds: numbers of further rounds, to be forecast; where the federation has trained here before, and with differential privacy.

    Raises:
        RefusedError: the ledger is damaged.
        FederationError: the silo has no key on this machine, or its policy is wrong.
    """
    policy = Policy.of(federation, silo_id)
    ledger = Ledger.of(federation, silo_id, policy)
    entries = ledger.entries()
    terms = federation.privacy
    limits, unit = (policy.privacy.epsilon, policy.privacy.unit) if policy else (Limits(delta=terms.delta), terms.unit)
    bounded = policy is None or policy.private
    at = max(now, entries[-1].at) if entries else now
    charges = [(e.charge, e.at) for e in entries]

    def added(more: Sequence[Charge]) -> Spent:
        return spent([*charges, *((c, at) for c in more)], limits.delta, unit, federation.name, at, bounded=bounded)

    last = last_of(entries, federation.name)
    ahead = {k: added([last.charge] * k) for k in rounds} if last and last.charge.mechanism else {}
    return Account(silo_id, ledger.dataset, limits, added([]), _course(entries, limits.delta, unit, bounded), ahead, bounded)


def _course(entries: Sequence[Entry], delta: float, unit: Unit, bounded: bool) -> list[Point]:
    counted = [e for e in entries if bounded or e.charge.mechanism]
    count = len(counted)
    ends = sorted({math.ceil(count * i / POINTS) for i in range(1, POINTS + 1)} - {0})
    return [Point(n, counted[n - 1].at, bound((e.charge for e in counted[:n]), delta, unit)) for n in ends]


def text(value: float) -> str:
    return "no bound" if value == math.inf else f"{value:.3f}"


def lines(found: Account) -> list[str]:
    """In words."""
    s, whose = found.spent, "a person" if found.spent.unit == "person" else "a record"
    first = f"{found.silo}: data set {found.dataset!r}, {s.trainings} training{'s' * (s.trainings != 1)}, epsilon about {whose} at delta {s.delta:g}"
    told = [first]
    if s.unprotected:
        counts = "so that no epsilon bounds the whole" if found.bounded else "which the policy lets through and the numbers below leave out"
        told.append(f"{s.unprotected} of them without differential privacy about {whose}, {counts}")
    return told


def tables(found: Account) -> list[RenderableType]:
    """Spent and left; the forecast; the course."""
    from rich.table import Table

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for i, name in enumerate(columns):
            made.add_column(name, no_wrap=True, justify="right" if i and name != "" else "left")
        return made

    budget = table("", "spent", "limit", "left")
    for name, words in (("run", "this federation"), ("month", "this month"), ("total", "in total")):
        value, limit = getattr(found.spent, name), getattr(found.limits, name)
        left = "" if limit is None else text(max(0.0, limit - value)) if value < math.inf else "none"
        budget.add_row(words, text(value), "none" if limit is None else text(limit), left)
    made: list[RenderableType] = [budget]
    if found.next:
        ahead = table("further rounds", "this federation", "this month", "in total", "")
        for count, after in found.next.items():
            beyond = after.beyond(found.limits)
            ahead.add_row(
                str(count), text(after.run), text(after.month), text(after.total), f"refused: {', '.join(beyond)}" if beyond else ""
            )
        made.append(ahead)
    if found.course:
        made.append(_bars(found))
    return made


def _bars(found: Account) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    for name in ("trainings", "until", "epsilon", ""):
        made.add_column(name, no_wrap=True, justify="left" if name == "" else "right")
    top = _top(found)
    for point in found.course:
        length = BAR if point.epsilon == math.inf else round(BAR * point.epsilon / top)
        mark = round(BAR * found.limits.total / top) if found.limits.total else None
        bar = "".join("█" if i < length else "│" if mark is not None and i == mark - 1 else " " for i in range(BAR))
        made.add_row(str(point.trainings), _day(point.at), text(point.epsilon), Text(bar))
    return made


def _top(found: Account) -> float:
    finite = [p.epsilon for p in found.course if p.epsilon < math.inf]
    return max([*finite, found.limits.total or 0.0]) or 1.0


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}"


def svg(found: Account) -> str:
    """The course as a drawing: ε over trainings, with the limit in total as a dashed line."""
    top, count = _top(found) * 1.1, max((p.trainings for p in found.course), default=1)

    def x(trainings: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * trainings / count

    def y(epsilon: float) -> float:
        return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * min(epsilon, top) / top

    title = f"{found.silo}: epsilon of data set {found.dataset} at delta {found.spent.delta:g}"
    path = " ".join(f"{x(n):.1f},{y(e):.1f}" for n, e in [(0, 0.0), *((p.trainings, p.epsilon) for p in found.course)])
    axis = f"M{EDGE},{EDGE} V{HEIGHT - EDGE} H{WIDTH - EDGE}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{EDGE}" y="{EDGE / 2}">{escape(title)}</text>',
        f'<path d="{axis}" fill="none" stroke="#555"/>',
        f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
        *(f'<circle cx="{x(p.trainings):.1f}" cy="{y(p.epsilon):.1f}" r="3" fill="#1f5fa8"><title>{p.trainings}: {text(p.epsilon)}</title></circle>'
          for p in found.course),
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - EDGE / 2}" text-anchor="end">trainings, {count} until now</text>',
        f'<text x="{EDGE - 6}" y="{y(top / 1.1) + 4:.1f}" text-anchor="end">{top / 1.1:.3g}</text>',
        f'<text x="{EDGE - 6}" y="{HEIGHT - EDGE}" text-anchor="end">0</text>',
    ]  # fmt: skip
    if found.limits.total:
        at = y(found.limits.total)
        parts += [
            f'<path d="M{EDGE},{at:.1f} H{WIDTH - EDGE}" stroke="#b02020" stroke-dasharray="6 4"/>',
            f'<text x="{WIDTH - EDGE}" y="{at - 4:.1f}" text-anchor="end" fill="#b02020">limit {found.limits.total:g}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])
