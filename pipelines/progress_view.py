"""The view of a run: which box works, how far it is, what each round brought; live on a terminal, lines elsewhere.

watch(run, federation, rounds, slots)    until the run ends
Course                                   what is known of a run from its events and heartbeats; draws nothing
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from silotune.components.errors import SilotuneError
from silotune.components.federation import Federation
from silotune.components.process.progress import Heartbeat, read_events, read_heartbeats
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.components.silo_job import parse_status
from silotune.pipelines.status import RoundStatus, duration, number, round_status

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

INTERVAL = 0.25  # seconds between looks
# After these the store has something new: a commit, or the evaluations that complete the last round.
LOOKS = {("initialize", "ended"), ("aggregate", "ended"), ("export", "started")}
SECURE = ("share", "mask", "confirm", "unmask")  # boxes of a silo in a round of secure aggregation
SHOWN = 8  # finished rounds, and warnings, that the live view shows


class Run(Protocol):
    """What a view needs of a run."""

    folder: Path

    def running(self) -> bool: ...


@dataclass(frozen=True)
class Current:
    """The box at work."""

    box: str
    silo: str
    began: float

    @property
    def text(self) -> str:
        return f"{self.box} {self.silo}".rstrip()


class Course:
    """A run of ``slots`` rounds over ``silos``, whose updates are summed in ``groups`` if there are any, or securely, told event by event."""

    def __init__(self, silos: list[str], slots: int, groups: int = 0, *, secure: bool = False) -> None:
        self.current: Current | None = None
        self.turn = Turn()
        self.first = 0  # round that the run's first slot works on
        self.slots = slots
        self.troubles: dict[str, list[str]] = {}  # by silo; '' for the coordinator
        self.unready: set[str] = set()  # silos whose records could not be made ready: what follows from that is no news
        self.begun = 0  # boxes
        self._costs: dict[tuple[str, str], float] = {}  # seconds of a (box, silo), to the start of the next one
        self._todo = Counter([(box, s) for box in ("preprocess", "evaluate") for s in silos])
        of_silos = ("train", *SECURE) if secure else ("train",)
        self._todo += Counter({(box, s): slots for box in of_silos for s in silos} if slots else {})
        self._todo += Counter({("muster", ""): slots * len(SECURE)} if secure and slots else {})
        self._todo += Counter({("initialize", ""): 1, ("combine", ""): slots * groups, ("aggregate", ""): slots, ("export", ""): 1})

    def take(self, event: dict[str, Any]) -> str:
        """Take in one event; returns the line that tells of it, or nothing."""
        box, silo, what = str(event["box"]), str(event["silo"]), str(event["what"])
        if what == "started":
            self._finish(event["at"])
            self.current = Current(box, silo, event["at"])
            self.begun += 1
            self._todo[box, silo] = max(0, self._todo[box, silo] - 1)
            return ""
        if silo in self.unready and box != "preprocess" and (what == "warned" or (what == "ended" and not _is_ok(event))):
            return f"{box} {silo}  not ready" if what == "ended" else ""
        if what == "warned":
            return f"warning: {self._trouble(silo, event['detail'])}"
        if what != "ended":
            return ""
        took = duration(event["seconds"])
        if silo:
            _, status, reason = parse_status(event["status"])
            if status != "ok":
                self.unready |= {silo} if box == "preprocess" else set()
                return f"warning: {self._trouble(silo, f'{box} {status}: ' + (event['detail'] or reason))}"
            return f"{box} {silo}  {took}"
        known = self.turn.done
        if box in ("initialize", "aggregate"):
            self._turn(Turn.parse(event["output"]))
        if box == "initialize":
            return f"initialize  {took}; " + (self.turn.done or f"round {self.turn.round} is open")
        if box == "aggregate" and self.turn.done and not known:  # why no round follows
            return f"aggregate  {took}; {self.turn.done}"
        return f"{box}  {took}"

    def _turn(self, turn: Turn) -> None:
        self.turn = turn
        self.first = self.first or turn.round
        if turn.done:
            for key in self._todo:
                if key[0] in ("train", "muster", *SECURE, "combine", "aggregate"):
                    self._todo[key] = 0

    def _trouble(self, silo: str, text: str) -> str:
        known = self.troubles.setdefault(silo, [])
        if text not in known:
            known.append(text)
        return f"{silo}: {text}" if silo and not re.search(rf"(?<![\w-]){re.escape(silo)}(?![\w-])", text) else text

    def _finish(self, at: float) -> None:
        if self.current:
            self._costs[self.current.box, self.current.silo] = at - self.current.began

    def remaining(self, now: float, beat: Heartbeat | None) -> float | None:
        """Seconds to the end of the run, about; None before a training says how fast it is."""
        share = beat.step / beat.steps if beat and beat.steps else 0.0
        training = [c for (box, _), c in self._costs.items() if box == "train"]
        if beat and share and self.current:
            training.append((now - self.current.began) / share)
        if not training and (self._todo.total() == 0 or any(n for (box, _), n in self._todo.items() if box == "train")):
            return None
        usual = sum(training) / len(training) if training else 0.0

        def cost(box: str, silo: str) -> float:
            same = [c for (b, _), c in self._costs.items() if b == box]
            return self._costs.get((box, silo), sum(same) / len(same) if same else usual if box in ("train", "evaluate") else 0.0)

        left = sum(n * cost(*key) for key, n in self._todo.items() if n)
        if self.current:
            spent = now - self.current.began
            whole = spent / share if share else cost(self.current.box, self.current.silo)
            left += max(0.0, whole - spent)
        return left

    @property
    def boxes(self) -> int:
        """Of the whole run, as far as is known now."""
        return self.begun + self._todo.total()

    @property
    def headline(self) -> str:
        if self.turn.done:
            return self.turn.done
        if not self.turn.round:
            return "getting ready"
        last = self.first + self.slots - 1
        return f"round {self.turn.round} of {last}" if self.turn.round <= last else f"rounds {self.first} to {last} are committed"


def _is_ok(event: dict[str, Any]) -> bool:
    return parse_status(event["status"])[1] == "ok"


class View:
    """A course with what the store says about its rounds."""

    def __init__(self, federation: Federation, rounds: Rounds, slots: int) -> None:
        self.federation, self.rounds = federation, rounds
        secure = federation.privacy.secure_aggregation is not None
        self.course = Course(federation.silo_ids, slots, len(federation.aggregation.groups(federation.silo_ids)), secure=secure)
        self.done: dict[int, RoundStatus] = {}  # rounds committed while we watched, and the one before them
        self.began = time.time()
        self._homes = {s.id: Path(s.storage) / federation.name for s in federation.silos}

    def take(self, event: dict[str, Any]) -> list[str]:
        """Take in one event; returns the lines to tell."""
        before = {n for n, r in self.done.items() if r.evaluated}
        line = self.course.take(event)
        lines = [line] if line else []
        if (event["box"], event["what"]) in LOOKS:
            with contextlib.suppress(SilotuneError):  # the run meets the same trouble and tells of it; the next event looks again
                lines += self._look(tell=event["box"] == "aggregate")
        fresh = [r for n, r in self.done.items() if r.evaluated and n not in before]
        return lines + [f"round {r.round} loss {number(r.loss)}, perplexity {number(r.perplexity, 2)}" for r in fresh]

    def _look(self, *, tell: bool) -> list[str]:
        latest = self.rounds.latest()
        if latest is None:
            return []
        fresh = range(max(self.done, default=latest.round - 1) + 1, latest.round + 1)
        for n in [*(n for n, r in self.done.items() if not r.evaluated), *fresh]:
            self.done[n] = round_status(self.federation, self.rounds, self.rounds.commit(n), latest.round)
        return [f"round {n} committed, {_silos(self.done[n])}" for n in fresh if tell and self.done[n].outcome == "aggregated"]

    def beat(self) -> Heartbeat | None:
        """Of the box at work, if it has one."""
        now = self.course.current
        if not now or not now.silo:
            return None
        for _, beat in read_heartbeats({now.silo: self._homes[now.silo]}):
            if beat.box == now.box and beat.at >= now.began:
                return beat
        return None

    def draw(self) -> RenderableType:
        """The live panel."""
        from rich.console import Group
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.text import Text

        now, beat = time.time(), self.beat()
        parts: list[RenderableType] = []
        if shown := [r for _, r in sorted(self.done.items())][-SHOWN:]:
            parts += [_rounds_table(shown), ""]
        if self.course.current:
            parts.append(_work_line(self.course.current, beat, now))
        for silo, texts in self.course.troubles.items():
            first = texts[-1].splitlines()[0]
            parts.append(Text(f"{silo}: {first}" if silo else first, style="yellow"))
        left = self.course.remaining(now, beat) if self.course.current else None
        ahead = f", about {duration(left)} to go" if left is not None else ""
        panel = Panel(
            Group(*parts),
            title=f"[bold]{self.federation.name}[/] {self.course.headline}",
            subtitle=f"box {self.course.begun} of {self.course.boxes}, {duration(now - self.began)}{ahead}",
            title_align="left",
            subtitle_align="left",
        )
        return Padding(panel, (0, 3, 0, 0))  # room for the ^C that a terminal writes at the cursor


def _silos(r: RoundStatus) -> str:
    missing = f"; missing: {', '.join(f'{s} ({why})' for s, why in sorted(r.missing.items()))}" if r.missing else ""
    return f"{len(r.participants)} of {len(r.participants) + len(r.missing)} silos{missing}"


def _rounds_table(shown: list[RoundStatus]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("round", "valid loss", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("silos", overflow="ellipsis", no_wrap=True)
    for r in shown:
        silos = {"initialized": "the base model", "amended": "terms amended", "skipped": "skipped", "rolled-back": "rolled back"}.get(
            r.outcome
        ) or _silos(r)
        table.add_row(f"{r.round}", number(r.loss) or "…", number(r.perplexity, 2), silos)
    return table


def _work_line(current: Current, beat: Heartbeat | None, now: float) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [f"[bold]{current.text}[/]"]
    if beat:
        cells += [
            ProgressBar(total=beat.steps, completed=beat.step, width=24),
            f"step {beat.step}/{beat.steps}",
            "private" if beat.loss is None else f"loss {beat.loss:.4f}",
        ]
    line.add_row(*cells, f"[dim]{duration(now - current.began)}[/]")
    return line


def watch(run: Run, federation: Federation, rounds: Rounds, slots: int, console: Console) -> Course:
    """Show a run until it ends: a live panel where ``console`` is a terminal, else one line per box, warning and round."""
    view = View(federation, rounds, slots)
    offset = 0
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            from rich.live import Live

            live = stack.enter_context(Live(view.draw(), console=console, auto_refresh=False, transient=False))
        while True:
            going = run.running()
            events, offset = read_events(run.folder, offset)
            for event in events:
                for line in view.take(event):
                    if not live:
                        stamp = time.strftime("%H:%M:%S", time.localtime(event["at"]))
                        console.print(f"{stamp} {line}", markup=False, highlight=False, soft_wrap=True)
            if not going:
                view.course.current = None
            if live:
                live.update(view.draw(), refresh=True)
            if not going:
                return view.course
            time.sleep(INTERVAL)
