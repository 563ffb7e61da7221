"""Status: where a federation stands, from the store alone.

    status(federation, rounds)       the whole course as data; `silotune status --json` prints its `as_json`
    comparison(federation, rounds)   base against federated, by silo

The loss of a global is pooled over the silos that scored it on their valid split. It counts from the quorum on, or once the next round is
committed: a mean over whoever came first would move about while a round is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from silotune.components import best_global
from silotune.components.federation import Federation
from silotune.components.protocol import Attempt, Commit, Evaluation, Exported, Plan, Turn, perplexity, pooled
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import MaskedVector, MaskKeys, SecureRound

if TYPE_CHECKING:
    from rich.console import RenderableType

CLOSED = {
    "amended": "closed without a result, since the terms were amended",
    "skipped": "skipped, since too few silos delivered; the global stays",
    "rolled-back": "its global proved worse and is left behind; the next round begins from the best one before",
}
NOTHING = "no update yet"
SHOWN = 12  # hexadecimal digits of a digest that people see


def _finite(value: float | None) -> float | None:
    """None in place of infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class RoundStatus:
    """One round: committed, or open."""

    round: int
    committed: bool
    outcome: str
    participants: list[str]
    missing: dict[str, str]
    sha256: str | None = None
    scores: dict[str, Evaluation] = field(default_factory=dict)  # of its global on valid, by silo
    evaluated: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None

    @property
    def loss(self) -> float | None:
        return pooled(self.scores)["loss"] if self.evaluated else None

    @property
    def perplexity(self) -> float | None:
        """None, too, where it overflows."""
        return None if self.loss is None else _finite(perplexity(self.loss))

    def as_json(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "committed": self.committed,
            "participants": self.participants,
            "missing": self.missing,
            "global": {"loss": _finite(self.loss), "perplexity": self.perplexity, "sha256": self.sha256},
            "bytes": {"up": self.bytes_up, "down": self.bytes_down},
        }


@dataclass(frozen=True)
class Status:
    """A federation's course."""

    federation: str
    digest: str | None  # of the agreement of the highest commit
    rounds: list[RoundStatus]
    export: str | None

    def as_json(self) -> dict[str, Any]:
        rounds = [r.as_json() for r in self.rounds]
        return {"federation": self.federation, "digest": self.digest, "rounds": rounds, "export": self.export}


def status(federation: Federation, rounds: Rounds) -> Status:
    """Read the whole course."""
    commits = list(rounds.commits())
    if not commits:
        return Status(federation.name, None, [], None)
    latest = commits[-1]
    course = [round_status(federation, rounds, commit, latest.round) for commit in commits]
    if plan := rounds.plan(latest.round + 1):
        course.append(_open(rounds, plan))
    found = export(federation, rounds)
    return Status(federation.name, latest.agreement, course, found.location if found else None)


def round_status(federation: Federation, rounds: Rounds, commit: Commit, latest: int) -> RoundStatus:
    """A committed round; ``latest`` is the number of the highest commit."""
    scores = {} if not commit.made_global else rounds.evaluations(commit.outgoing, "valid")
    return RoundStatus(
        round=commit.round,
        committed=True,
        outcome=commit.outcome,
        participants=sorted(commit.contributions),
        missing=commit.missing,
        sha256=commit.outgoing,
        scores=scores,
        evaluated=bool(scores) and (commit.round < latest or len(scores) >= federation.quorum.count),
        bytes_up=commit.bytes_up,
        bytes_down=commit.bytes_down,
        seconds=commit.at - commit.started if commit.outcome == "aggregated" else None,
    )


def _open(rounds: Rounds, plan: Plan) -> RoundStatus:
    delivered, disbelieved = rounds.updates(plan.round)
    attempts = rounds.attempts(plan.round)
    if attempts and rounds.agreement(plan.agreement).privacy.secure_aggregation is not None:
        return _open_securely(rounds, plan, attempts[-1])
    known: dict[str, str] = {}
    for attempt in attempts:
        known |= attempt.missing
        known |= dict.fromkeys((s for s in attempt.asked), NOTHING)
        known |= {silo: report.text for silo, report in rounds.reports(plan.round, attempt.attempt).items() if report.status != "ok"}
    for silo in (s for s, why in known.items() if why == NOTHING and s not in delivered):
        if refusal := rounds.refusal(plan.round, silo):
            known[silo] = f"refused: {refusal.rule}"
    known |= dict.fromkeys(disbelieved, "refused: its manifest is not the silo's")
    return RoundStatus(
        round=plan.round,
        committed=False,
        outcome="open",
        participants=sorted(delivered),
        missing={silo: known.get(silo, "not asked yet") for silo in sorted(plan.participants) if silo not in delivered},
        bytes_up=sum(m.bytes for m in delivered.values()),
        bytes_down=len(delivered) * rounds.object_size(plan.incoming),
    )


def _open_securely(rounds: Rounds, plan: Plan, attempt: Attempt) -> RoundStatus:
    """As far as its secure sum has come: whose masked vectors are there, and of the others how far each is."""
    secure = SecureRound.of(rounds, Turn(plan.round, attempt.attempt), plan.digest)
    trained, _ = secure.believed(MaskKeys, plan.participants)
    masked, _ = secure.believed(MaskedVector, plan.participants)
    reports = {silo: r.text for silo, r in rounds.reports(plan.round, attempt.attempt).items() if r.status != "ok"}
    missing = {s: "trained, not masked yet" if s in trained else NOTHING for s in sorted(plan.participants) if s not in masked}
    return RoundStatus(
        round=plan.round, committed=False, outcome="open", participants=sorted(masked), bytes_up=sum(m.bytes for m in masked.values()),
        missing=missing | {s: why for s, why in (attempt.missing | reports).items() if s in missing},
        bytes_down=len(trained) * rounds.object_size(plan.incoming),
    )  # fmt: skip


def chosen(federation: Federation, rounds: Rounds) -> Commit:
    """The commit that ``export.select`` means now; there must be one."""
    number = best_global.best_round(rounds) if federation.export.select == "best" else None
    latest = rounds.latest() if number is None else rounds.commit(number)
    if latest is None:
        raise ValueError("nothing is committed")
    return latest


def export(federation: Federation, rounds: Rounds) -> Exported | None:
    """The export that the file asks for now, else the one of the highest round."""
    wanted = chosen(federation, rounds).digest
    found = list(rounds.exports())
    merged = federation.export.merge
    return max(found, key=lambda e: (e.commit.startswith(wanted), e.commit.endswith("-merged") == merged, e.round), default=None)


def is_current(federation: Federation, rounds: Rounds, exported: Exported) -> bool:
    """Whether an export is of the commit, and of the kind, that the file asks for now."""
    merged = exported.commit.endswith("-merged") == federation.export.merge
    return exported.commit.startswith(chosen(federation, rounds).digest) and merged


@dataclass(frozen=True)
class Comparison:
    """How the base and the federated model do on the same split; (silo, base, federated), the last row over all silos."""

    split: str
    round: int
    rows: list[tuple[str, float, float]]


def comparison(federation: Federation, rounds: Rounds) -> Comparison | None:
    """On test where silos have one, else on valid; None without scores of both."""
    commit = chosen(federation, rounds)
    for split in ("test", "valid"):
        base = rounds.evaluations(rounds.commit(0).outgoing, split)
        federated = rounds.evaluations(commit.outgoing, split)
        both = sorted(best_global.same_records(base, federated))
        if both:
            rows = [(s, base[s].loss, federated[s].loss) for s in both]
            pools = [pooled({s: scores[s] for s in both})["loss"] for scores in (base, federated)]
            return Comparison(split, commit.round, [*rows, ("all", pools[0], pools[1])])
    return None


# For people


def status_table(found: Status, participants: int, width: int = 200) -> RenderableType:
    """The course, and the silos' own losses in the last round that has been evaluated; in ``width`` columns, without some where it is less."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text.assemble((found.federation, "bold"), f"  agreement {(found.digest or 'none yet')[:SHOWN]}")
    if not found.rounds:
        return Group(title, Text("no round is committed; `silotune run` begins"))
    names = ("round", "silos", "loss", "perplexity", "up", "down", "time", "global")
    rows = [_cells(r, participants) for r in found.rounds]
    widths = {name: max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(names)}
    while sum(widths.values()) + 2 * len(widths) > width and (
        least := next((n for n in ("down", "up", "time", "perplexity") if n in widths), "")
    ):
        del widths[least]
    table = Table(box=None, pad_edge=False)
    for name in widths:
        table.add_column(name, justify="left" if name == "global" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell for name, cell in zip(names, row, strict=True) if name in widths))
    parts: list[RenderableType] = [title, table]
    evaluated = [r for r in found.rounds if r.evaluated]
    if evaluated:
        parts += ["", _silo_table(evaluated[-1])]
    return Group(*parts)


def notes(found: Status) -> Iterator[str]:
    """What a table has no room for: who is missing and why, and where the export is."""
    for r in found.rounds:
        if r.outcome in CLOSED:
            yield f"round {r.round}: {CLOSED[r.outcome]}"
        for why, silos in groupby(sorted(r.missing, key=lambda s: (r.missing[s], s)), key=lambda s: r.missing[s]):
            yield f"round {r.round}: {', '.join(silos)}: {why}"
    if found.rounds:
        yield f"exported to {found.export}" if found.export else "nothing exported yet"


def _cells(r: RoundStatus, participants: int) -> list[str]:
    from rich.filesize import decimal

    aggregated = r.outcome == "aggregated"
    return [
        f"{r.round}" if r.committed else f"{r.round} open",
        f"{len(r.participants)} of {len(r.participants) + len(r.missing)}" if aggregated or not r.committed else "",
        number(r.loss) + ("" if not r.evaluated or len(r.scores) >= participants else f" ({len(r.scores)} silos)"),
        number(r.perplexity, 2),
        decimal(r.bytes_up) if r.bytes_up else "",
        decimal(r.bytes_down) if r.bytes_down else "",
        duration(r.seconds) if r.seconds is not None else "",
        (r.sha256 or "")[:SHOWN],
    ]


def _silo_table(r: RoundStatus) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"on valid, round {r.round}", title_justify="left", title_style="")
    table.add_column("silo", no_wrap=True)
    for name in ("loss", "perplexity", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for silo, score in sorted(r.scores.items()):
        table.add_row(silo, number(score.loss), number(perplexity(score.loss), 2), f"{score.tokens}")
    return table


def comparison_table(found: Comparison) -> RenderableType:
    from rich.table import Table

    title = f"on {found.split}, base against round {found.round}; loss in nats per token"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="")
    table.add_column("silo", no_wrap=True)
    for name in ("base loss", "federated", "change", "base perplexity", "federated"):
        table.add_column(name, justify="right", no_wrap=True)
    for silo, base, federated in found.rows:
        better = "green" if federated < base else "red" if federated > base else ""
        change = f"[{better}]{federated - base:+.4f}[/]" if better else "0"
        table.add_row(silo, number(base), number(federated), change, number(perplexity(base), 2), number(perplexity(federated), 2),
                      style="bold" if silo == "all" else "")  # fmt: skip
    return table


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
