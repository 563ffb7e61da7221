"""Opening a round: the quorum, the next plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal

from silotune.components import silo_promise
from silotune.components.errors import FederationError, QuorumError, SilotuneError, UnreachableError
from silotune.components.federation import Agreement, Federation
from silotune.components.protocol import Commit, Participant, Plan, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import records as secure_records
from silotune.components.terms.strategies import Strategy


def require_quorum(federation: Federation, what: str, present: list[str], missing: dict[str, str], share: float = 1.0) -> None:
    """Raise a table of who is missing and why, unless enough silos are there.

    Args:
        share: of the examples asked of all silos together, how many the present ones have trained on.

    Raises:
        FederationError: if only data and settings are at fault, which trying again does not change.
        UnreachableError: if the store or a full disk is at fault for every missing silo.
        QuorumError: otherwise.
    """
    quorum = federation.quorum
    if (few := len(present) < quorum.count) is False and (quorum.weight is None or share >= quorum.weight):
        return
    rule = f"{quorum.count} of {len(federation.silos)} silos must deliver, {len(present)} did"
    if not few and quorum.weight is not None:
        digits = 0 if f"{quorum.weight:.0%}" != f"{share:.0%}" else 2  # else it would read: 67% must, 67% were
        rule = f"{quorum.weight:.{digits}%} of the examples asked for must be trained on, {share:.{digits}%} were"
    lines = [f"{what}, {rule}:"]
    lines += told(missing)
    if not missing:  # a deadline has cut all of them short, and nobody is left to ask
        lines.append("lower rounds.quorum.weight, or set rounds.on_missing_quorum: skip and a longer rounds.deadline; then run again")
    causes: list[tuple[tuple[str, ...], type[SilotuneError]]] = [
        (("data or settings",), FederationError),
        (("store unreachable", "disk full"), UnreachableError),
    ]
    whys = list(missing.values())
    kind = next((k for words, k in causes if whys and all(any(w in why for w in words) for why in whys)), QuorumError)
    raise kind("\n".join(lines))


def told(missing: dict[str, str]) -> list[str]:
    """Who is missing and why, as lines, and what to do about it; none where nobody is."""
    lines = [f"  {silo:<20} {why}" for silo, why in sorted(missing.items())]
    return [*lines, "run again to ask the missing silos only; what the others delivered is kept"] if lines else []


def has_quorum(federation: Federation, present: list[str], share: float = 1.0) -> bool:
    """Whether enough silos are there, and have trained on enough."""
    quorum = federation.quorum
    return len(present) >= quorum.count and (quorum.weight is None or share >= quorum.weight)


def share_trained(plan: Plan, agreement: Agreement, examples: dict[str, int]) -> float:
    """Of the examples that a plan asks of all its silos together, the share that some have trained on."""
    asked = {silo: agreement.training_of(silo) for silo in plan.participants}
    return sum(examples.values()) / sum(t.steps * t.batch_size for t in asked.values())


def open_next(federation: Federation, rounds: Rounds, latest: Commit, agreement: Agreement, missing: dict[str, str]) -> Turn:
    """Open the round after ``latest``, or go on with it where it is open already.

    A round that was opened under other terms is closed without a result first: the amended terms hold from the next one on. None is opened where all
    rounds are made, or the promise about silos has no room for another.
    """
    done = sum(c.counts for c in rounds.commits())
    if latest.converged and federation.rounds.until:
        return Turn(done=f"converged at round {latest.round}")
    if done >= federation.rounds.total:
        return Turn(done=f"all {federation.rounds.total} rounds are committed")
    plan = rounds.plan(latest.round + 1)
    if plan is not None and plan.agreement != agreement.digest:
        spent = secure_records.spent(rounds, plan)
        latest = rounds.write_commit(without_result("amended", federation, latest, plan, agreement, 0, {}, spent))
        plan = rounds.plan(latest.round + 1)
    if plan is None:
        plan = _plan(federation, rounds, latest, agreement, done)
        if why := silo_promise.spent_out(rounds, plan, agreement):
            return Turn(done=why)
        plan = rounds.open_round(plan)
    attempt = rounds.begin_attempt(plan, missing)
    return Turn(attempt.round, attempt.attempt)


def _plan(federation: Federation, rounds: Rounds, latest: Commit, agreement: Agreement, done: int) -> Plan:
    from silotune.components.learning.exchange import update_schema
    from silotune.components.learning.schedule import decay

    terms, strategy, number = agreement.training, agreement.aggregation.traits, latest.round + 1
    cursors = cursors_after(rounds)
    tensors = schema_object(rounds, latest)
    shapes = rounds.json_object(tensors)
    turn = turn_of(rounds, latest, strategy)
    ranks = {silo: agreement.rank_of(silo) for silo in sorted(agreement.silos)}
    schemas = {rank: rounds.put_json_object(update_schema(shapes, strategy, turn, rank)) for rank in sorted(set(ranks.values()))}
    return Plan(
        round=number,
        agreement=agreement.digest,
        base=agreement.base,
        incoming=latest.outgoing,
        tensors=tensors,
        accepted=[(number, latest.outgoing)],
        participants={s: Participant(tensors=schemas[rank], cursor=cursors.get(s, 0)) for s, rank in ranks.items()},
        learning_rate=terms.learning_rate * decay(terms.round_schedule, done / federation.rounds.total),
        server_state=carried_on(rounds, latest, agreement) if strategy.memory else {},
        code=version("silotune"),
    )


def lineage(rounds: Rounds, latest: Commit) -> Iterator[Commit]:
    """The commits that the global of ``latest`` was made through, newest first; without those that a rollback has left behind, and round 0."""
    commit = latest
    while commit.round:
        yield commit
        commit = rounds.commit(commit.round - 1 if commit.back_to is None else commit.back_to)


def under(rounds: Rounds, latest: Commit, agreement: Agreement) -> Iterator[Commit]:
    """The newest part of the lineage: as far as the terms of aggregation have been these. What is carried from round to round holds for it.

    Where silos have a memory, what the server carries is the mean of all theirs. So it holds as far as the silos and their parts have been these, too:
    with the memory of one that has left, or without that of one that has come, every later step would be off by it.
    """
    terms = agreement.aggregation
    for commit in lineage(rounds, latest):
        before = rounds.agreement(commit.agreement)
        if before.aggregation != terms or (terms.traits.memory and before.parts != agreement.parts):
            return
        yield commit


def carried_on(rounds: Rounds, latest: Commit, agreement: Agreement) -> dict[str, str]:
    """What aggregation carries into the next round; empty where it begins, or begins anew under other terms."""
    return next((c.server_state for c in under(rounds, latest, agreement) if c.made_global), {})


def turn_of(rounds: Rounds, latest: Commit, strategy: Strategy) -> int:
    """The next round's place, from 1, among those that have made a global on the way, where something is trained in turns: it must miss none."""
    return 1 + (sum(c.made_global for c in lineage(rounds, latest)) if strategy.sends == "alternate" else latest.round)


def cursors_after(rounds: Rounds) -> dict[str, int]:
    """Where each silo's data stream stands after all committed rounds."""
    cursors: dict[str, int] = {}
    for commit in rounds.commits():  # also those of a global that was left behind: the next one is made from other examples
        cursors.update({silo: c.cursor for silo, c in commit.contributions.items()} | commit.spent)
    return cursors


def schema_object(rounds: Rounds, latest: Commit) -> str:
    """Digest of the object that lists what can be trained, by tensor name and shape: that of the initial global, as the round before had it.

    Raises:
        CorruptObject: the initial global is damaged.
    """
    if latest.round and (plan := rounds.plan(latest.round)):
        return plan.tensors
    schema = {name: list(shape) for name, shape in rounds.tensor_shapes(latest.outgoing).items()}
    return rounds.put_json_object(schema)


def without_result(
    outcome: Literal["amended", "skipped"], federation: Federation, latest: Commit, plan: Plan, agreement: Agreement, attempt: int,
    missing: dict[str, str], spent: dict[str, int] | None = None,
) -> Commit:  # fmt: skip
    """A commit that closes a round and leaves the global as it was.

    Args:
        spent: `secure_records.spent` of the round.
    """
    return Commit(
        round=plan.round, outcome=outcome, custody=federation.custody, agreement=agreement.digest, plan=plan.digest, attempt=attempt,
        contributions={}, missing=missing, previous=latest.digest, incoming=latest.outgoing, outgoing=latest.outgoing, best=latest.best,
        learning_rate=plan.learning_rate, server_state=latest.server_state, spent=spent or {}, started=time.time(), at=time.time(),
    )  # fmt: skip
