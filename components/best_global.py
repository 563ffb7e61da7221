"""Which global is the best so far, and when to stop: from what the silos' validation scores say of each.

    judged(rounds)               the scores of every global, in order
    best_of(scores)              the round of the best one; `best_round` where nothing is scored, too
    has_converged(scores, until)

Two globals can only be compared over silos that scored both on the same records. Silos come and go, and their records grow: where a global
shares no measure with the best one, the difference is added up over those between, of which each shares one with the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from silotune.components.errors import RefusedError
from silotune.components.protocol import Commit, Evaluation, pooled
from silotune.components.rounds import Rounds
from silotune.components.terms.rounds import Until

Judged = tuple[int, dict[str, Evaluation]]


def judged(rounds: Rounds) -> list[Judged]:
    """(round, validation scores by silo) of every global that has any, in order.

    A global that was scored before and after a silo's records changed stands twice, by the old and by the new ones: it joins the two.
    """
    scores: list[Judged] = []
    before: dict[str, str] = {}  # silo -> the split that it scored last
    for commit in (c for c in rounds.commits() if c.made_global):
        found = rounds.evaluations(commit.outgoing, "valid")
        changed = [silo for silo, e in found.items() if before.get(silo, e.split_digest) != e.split_digest]
        if old := {silo: e for silo in changed if (e := _scored(rounds, commit, silo, before[silo]))}:
            scores.append((commit.round, found | old))
        if found:
            scores.append((commit.round, found))
        before |= {silo: e.split_digest for silo, e in found.items()}
    return scores


def _scored(rounds: Rounds, commit: Commit, silo: str, split_digest: str) -> Evaluation | None:
    """A commit's global on records that the silo had before, if it is there and to be believed."""
    with suppress(RefusedError):
        found = rounds.evaluation(commit.outgoing, silo, "valid", split_digest)
        return found if found and found.round >= commit.round else None
    return None


def compare(a: dict[str, Evaluation], b: dict[str, Evaluation], metric: str) -> tuple[float, float] | None:
    """A pooled metric of two globals, over the silos that scored both on the same split; None where there is none.

    Silos come and go, and theirs are not equally hard: pooled over different ones, two globals cannot be compared.
    """
    both = same_records(a, b)
    if not both:
        return None
    return pooled({s: a[s] for s in both})[metric], pooled({s: b[s] for s in both})[metric]


def same_records(a: dict[str, Evaluation], b: dict[str, Evaluation]) -> list[str]:
    """The silos that scored two globals on the same split."""
    return [s for s in a if s in b and a[s].split_digest == b[s].split_digest]


@dataclass(frozen=True)
class _Step:
    """A global on its way: how far its metric lies above the best one's by then, and whether it became the best; None: nobody can tell."""

    number: int
    scores: dict[str, Evaluation]
    above: float
    better: bool | None


def _course(scores: list[Judged], metric: str, min_delta: float = 0.0) -> Iterator[_Step]:
    """Every global beside the best one before it, which it must fall below by more than ``min_delta`` to take its place."""
    sign = -1.0 if metric == "token_accuracy" else 1.0
    seen: list[_Step] = []
    best = -1  # round of it
    newest: dict[str, str] = {}  # silo -> split that it scored last
    for number, found in scores:
        newest |= {silo: e.split_digest for silo, e in found.items()}
        if seen and seen[-1].number == number:  # the same one, by other records
            seen.append(replace(seen[-1], scores=found))
            continue
        # Measured beside the best one where both have a measure in common, else by the newest that has.
        above = _above(found, sorted(seen, key=lambda s: s.number == best), metric, sign)
        better = None if above is None else above < -min_delta
        if above is None:
            # Where nothing joins it to the best one, and what that was measured by is no longer there, there is no way back to it.
            better = True if all(newest[silo] != e.split_digest for s in seen if s.number == best for silo, e in s.scores.items()) else None
            above = -math.inf if better else math.inf
        if better:
            seen = [replace(s, above=s.above - above) for s in seen] if math.isfinite(above) else []
            best, above = number, 0.0
        seen.append(_Step(number, found, above, better))
        yield seen[-1]


def _above(found: dict[str, Evaluation], seen: list[_Step], metric: str, sign: float) -> float | None:
    """By how much a global's metric lies above the best one's, by the last of ``seen`` that it can be compared with."""
    for step in reversed(seen):
        pair = compare(found, step.scores, metric) if math.isfinite(step.above) else None
        if pair:
            rise = sign * (pair[0] - pair[1])
            return step.above + (0.0 if math.isnan(rise) else rise)  # not a number where neither is finite
    return None


def has_converged(scores: list[Judged], until: Until) -> bool:
    """Whether the last ``patience`` globals are no better than the best one before them by more than ``min_delta``."""
    stale = 0
    for step in _course(scores, until.metric, until.min_delta):
        stale = 0 if step.better else stale + (step.better is not None)
    return stale >= until.patience


def best_of(scores: list[Judged]) -> int | None:
    """The round whose global has the lowest pooled validation loss, each compared with the best before it; None without scores."""
    return next((step.number for step in reversed(list(_course(scores, "loss"))) if step.better), None)


def best_round(rounds: Rounds) -> int:
    """The round whose global has the lowest pooled validation loss; the last one where none has been evaluated."""
    best = best_of(judged(rounds))
    if best is not None:
        return best
    latest = rounds.latest()
    return latest.round if latest else 0
