"""The drawing that `silotune privacy --plot` makes: ε over trainings, what further rounds would add, and the limit in total.

One SVG file without scripts, fonts or links, fit to be mailed and printed. It follows the reader's light or dark theme, and says in words
(``title`` and ``desc``) what it shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from silotune.pipelines.steward.privacy_view import Account, day, text, whose

WIDTH, HEIGHT = 760, 420  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 44, 96, 104  # around the field
TICKS = 6  # on an axis, about
COLOURS = 5  # federations that have one of their own; the others share the last
CHARACTER = 7.0  # pixels, about
STYLE = """\
svg{--paper:#fff;--ink:#1c1c1c;--faint:#666;--grid:#e3e3e3;--line:#1f5fa8;--limit:#b02020;\
--f0:#1f5fa8;--f1:#c26a00;--f2:#2c7a4b;--f3:#7b4fa3;--f4:#8a8a8a}
@media (prefers-color-scheme:dark){svg{--paper:#16181c;--ink:#ececec;--faint:#a3a3a3;--grid:#33373d;--line:#7ab4f0;--limit:#ff8a80;\
--f0:#7ab4f0;--f1:#f0a95a;--f2:#7fcf9e;--f3:#c3a1e8;--f4:#9a9a9a}}
text{fill:var(--ink)} .faint{fill:var(--faint)} .grid{stroke:var(--grid)} .axis{stroke:var(--faint)}
.spent{fill:none;stroke:var(--line);stroke-width:2} .dot{fill:var(--line)}
.ahead{fill:none;stroke:var(--line);stroke-width:2;stroke-dasharray:2 4} .open{fill:var(--paper);stroke:var(--line);stroke-width:2}
.limit{stroke:var(--limit);stroke-dasharray:6 4} .over{fill:var(--limit)} .refused{fill:var(--paper);stroke:var(--limit);stroke-width:2}
.nothing{fill:var(--limit);opacity:.12}"""


def svg(found: Account) -> str:
    """One silo's account as an SVG text."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
            'aria-labelledby="title desc" font-family="system-ui, sans-serif" font-size="13">',
            f'<title id="title">{escape(_title(found))}</title>',
            f'<desc id="desc">{escape(" ".join(_said(found)))}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
            f'<text x="20" y="30" font-size="17" font-weight="600">{escape(_title(found))}</text>',
            *(f'<text x="20" y="{52 + 18 * i}" class="faint">{escape(line)}</text>' for i, line in enumerate(_said(found)[:2])),
            *_Field(found).parts(),
            "</svg>\n",
        ]
    )


def _title(found: Account) -> str:
    return f"Privacy spent on data set {found.dataset}, silo {found.silo}"


def _said(found: Account) -> list[str]:
    """The account in sentences; the first two stand above the field."""
    s, told = found.spent, []
    trainings = f"{s.trainings} training{'s' * (s.trainings != 1)}"
    until = f" until {day(found.trained[-1][1])}" if found.trained else ""
    told.append(f"{trainings}{until}. Epsilon about {whose(found)}, at delta {s.delta:g}.")
    parts = [f"{text(s.total)}{_of(found.limits.total)} in total", f"{text(s.month)}{_of(found.limits.month)} this month"]
    told.append(f"Spent: {', '.join(parts)}.")
    if found.next:
        ahead = (
            f"{count} more: {text(after.total)}{' (refused)' if count in found.refused else ''}" for count, after in found.next.items()
        )
        told.append(f"With further rounds of federation {found.federation}: {', '.join(ahead)}.")
    return told


def _of(limit: float | None) -> str:
    return "" if limit is None else f" of {limit:g}"


class _Field:
    """The part with axes."""

    def __init__(self, found: Account) -> None:
        self.found = found
        self.trained = len(found.trained)
        self.known = [p for p in found.course if p.epsilon < math.inf]
        whole = len(self.known) == len(found.course) > 0
        self.ahead = [(self.trained + count, after.total, count) for count, after in sorted(found.next.items())] if whole else []
        finite = [
            e for e in [*(p.epsilon for p in found.course), *(e for _, e, _ in self.ahead), found.limits.total or 0.0] if e < math.inf
        ]
        self.step = _nice(max([*finite, 0.0]) or 1.0)
        self.top = self.step * math.ceil((max([*finite, 0.0]) or 1.0) * 1.04 / self.step)
        self.last = max([self.trained, *(n for n, _, _ in self.ahead)]) or 1

    def parts(self) -> Iterator[str]:
        yield from self._axes()
        if not self.found.course:
            yield f'<text x="{self.x(self.last / 2):.1f}" y="{self.y(self.top / 2):.1f}" text-anchor="middle" class="faint">no training yet</text>'
        yield from self._limit()
        yield from self._course()
        yield from self._federations()

    def x(self, trainings: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * trainings / self.last

    def y(self, epsilon: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(epsilon, self.top) / self.top

    def _axes(self) -> Iterator[str]:
        bottom = HEIGHT - BOTTOM
        for i in range(round(self.top / self.step) + 1):
            value, at = i * self.step, self.y(i * self.step)
            yield f'<path d="M{LEFT},{at:.1f} H{WIDTH - RIGHT}" class="{"grid" if i else "axis"}"/>'
            yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" class="faint">{value:g}</text>'
        middle = (TOP + bottom) / 2
        yield f'<text transform="translate(20 {middle:.1f}) rotate(-90)" text-anchor="middle">epsilon</text>'
        step = max(1, round(_nice(self.last)))
        for number in range(0, self.last + 1, step):
            yield f'<path d="M{self.x(number):.1f},{bottom} v5" class="axis"/>'
            yield f'<text x="{self.x(number):.1f}" y="{bottom + 20}" text-anchor="middle" class="faint">{number}</text>'
            if 0 < number <= self.trained:
                when = day(self.found.trained[number - 1][1])
                yield f'<text x="{self.x(number):.1f}" y="{bottom + 35}" text-anchor="middle" class="faint" font-size="11">{when}</text>'
        yield f'<text x="{LEFT}" y="{bottom + 56}">trainings (one a round)</text>'

    def _limit(self) -> Iterator[str]:
        if (limit := self.found.limits.total) is None:
            return
        at = self.y(limit)
        yield f'<path d="M{LEFT},{at:.1f} H{WIDTH - RIGHT}" class="limit"/>'
        yield f'<text x="{LEFT + 8}" y="{at - 6:.1f}" class="over">limit in total: {limit:g}</text>'

    def _course(self) -> Iterator[str]:
        known = self.known
        if len(known) < len(self.found.course):
            start = known[-1].trainings if known else 0
            left, right = self.x(start), self.x(self.trained)
            yield f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}" class="nothing"/>'
            middle = min(max((left + right) / 2, LEFT + 60), WIDTH - RIGHT - 60)
            yield f'<text x="{middle:.1f}" y="{(TOP + HEIGHT - BOTTOM) / 2:.1f}" text-anchor="middle" class="over">no bound</text>'
        if not known:
            return
        yield _line("spent", [(LEFT, self.y(0)), *((self.x(p.trainings), self.y(p.epsilon)) for p in known)])
        if self.ahead:
            yield _line(
                "ahead",
                [(self.x(n), self.y(e)) for n, e in [(known[-1].trainings, known[-1].epsilon), *((n, e) for n, e, _ in self.ahead)]],
            )
            for n, e, count in self.ahead:
                refused = count in self.found.refused
                words = f"{count} further round{'s' * (count != 1)}: {text(e)}{', refused' * refused}"
                yield _dot("refused" if refused else "open", self.x(n), self.y(e), words)
        for p in known:
            yield _dot("dot", self.x(p.trainings), self.y(p.epsilon), f"{p.trainings} trainings until {day(p.at)}: {text(p.epsilon)}")

    def _federations(self) -> Iterator[str]:
        """Whose each training was: a strip under the axis, and names."""
        names = [name for name, _ in self.found.trained]
        most = [name for name, _ in Counter(names).most_common()]
        colour = {name: min(i, COLOURS - 1) for i, name in enumerate(most)}
        at = 0
        for name, group in groupby(names):
            count = len(list(group))
            left, right = self.x(at), self.x(at + count)
            yield (
                f'<rect x="{left:.1f}" y="{HEIGHT - BOTTOM + 1}" width="{right - left:.1f}" height="4" fill="var(--f{colour[name]})">'
                f"<title>{escape(name)}: {count}</title></rect>"
            )
            at += count
        shown = most if len(most) <= COLOURS else [*most[: COLOURS - 1], f"{len(most) - COLOURS + 1} others"]
        marks = [(name, f'<rect y="-8" width="14" height="8" fill="var(--f{i})"/>') for i, name in enumerate(shown)]
        if self.ahead:
            marks.append(("further rounds", '<path d="M0,-4 h14" class="ahead"/>'))
        if self.ahead and self.found.refused:
            marks.append(("refused", '<circle cx="7" cy="-4" r="4" class="refused"/>'))
        yield from _legend(marks)


def _legend(marks: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names, each behind its mark, in as many rows as they take."""
    at, row = float(LEFT), HEIGHT - 30
    for name, mark in marks:
        width = 20 + CHARACTER * len(name)
        if at + width > WIDTH - RIGHT and at > LEFT:
            at, row = float(LEFT), row + 18
        yield f'<g transform="translate({at:.1f} {row})">{mark}<text x="20">{escape(name)}</text></g>'
        at += width + 22


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def _dot(kind: str, x: float, y: float, words: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}"><title>{escape(words)}</title></circle>'


def _nice(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a span into about `TICKS`."""
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next((m for m in (1, 2, 5) if m * power >= rough), 10)
