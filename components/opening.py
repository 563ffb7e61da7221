"""Opening a round: the quorum, the next plan, and when to stop."""

from __future__ import annotations

import time
from importlib.metadata import version

from silotune.components.errors import FederationError, QuorumError, SilotuneError, UnreachableError
from silotune.components.federation import Agreement, Federation, Until
from silotune.components.rounds import Commit, Participant, Plan, Rounds, Turn, pooled


def require_quorum(federation: Federation, what: str, present: list[str], missing: dict[str, str]) -> None:
    """Raise a table of who is missing and why, unless enough silos are there.

    Raises:
        FederationError: if only data and settings are at fault, which trying again does not change.
        UnreachableError: if the store or a full disk is at fault for every missing silo.
        QuorumError: otherwise.
    """
    if len(present) >= federation.quorum:
        return
    lines = [f"{what}, {federation.quorum} of {len(federation.silos)} silos must deliver, {len(present)} did:"]
    lines += [f"  {silo:<20} {why}" for silo, why in sorted(missing.items())]
    lines.append("run again to ask the missing silos only; what the others delivered is kept")
    causes: list[tuple[tuple[str, ...], type[SilotuneError]]] = [
        (("data or settings",), FederationError),
        (("store unreachable", "disk full"), UnreachableError),
    ]
    whys = list(missing.values())
    kind = next((k for words, k in causes if whys and all(any(w in why for w in words) for why in whys)), QuorumError)
    raise kind("\n".join(lines))


def open_next(federation: Federation, rounds: Rounds, latest: Commit, agreement: Agreement, missing: dict[str, str]) -> Turn:
    """Open the round after ``latest``, or go on with it where it is open already.

    A round that was opened under other terms is closed without a result first: the amended terms hold from the next one on.
    """
    done = sum(c.outcome == "aggregated" for c in rounds.commits())
    if latest.converged and federation.rounds.until:
        return Turn(done=f"converged at round {latest.round}")
    if done >= federation.rounds.total:
        return Turn(done=f"all {federation.rounds.total} rounds are committed")
    plan = rounds.plan(latest.round + 1)
    if plan is not None and plan.agreement != agreement.digest:
        latest = rounds.write_commit(_amended(latest, plan, agreement))
        plan = rounds.plan(latest.round + 1)
    if plan is None:
        plan = rounds.open_round(_plan(federation, rounds, latest, agreement, done))
    attempt = rounds.begin_attempt(plan, missing)
    return Turn(attempt.round, attempt.attempt)


def _plan(federation: Federation, rounds: Rounds, latest: Commit, agreement: Agreement, done: int) -> Plan:
    from silotune.components.learning.schedule import decay

    terms = agreement.training
    cursors = cursors_after(rounds)
    schema = schema_object(rounds, latest.outgoing)
    return Plan(
        round=latest.round + 1,
        agreement=agreement.digest,
        base=agreement.base,
        incoming=latest.outgoing,
        accepted=[(latest.round + 1, latest.outgoing)],
        participants={s: Participant(tensors=schema, cursor=cursors.get(s, 0)) for s in sorted(agreement.silos)},
        learning_rate=terms.learning_rate * decay(terms.round_schedule, done / federation.rounds.total),
        code=version("silotune"),
    )


def cursors_after(rounds: Rounds) -> dict[str, int]:
    """Where each silo's data stream stands after all committed rounds."""
    cursors: dict[str, int] = {}
    for commit in rounds.commits():
        cursors.update({silo: c.cursor for silo, c in commit.contributions.items()})
    return cursors


def schema_object(rounds: Rounds, outgoing: str) -> str:
    """Digest of the object that lists a global's tensors and their shapes."""
    schema = {name: list(shape) for name, shape in rounds.tensor_shapes(outgoing).items()}
    return rounds.put_json_object(schema)


def _amended(latest: Commit, plan: Plan, agreement: Agreement) -> Commit:
    return Commit(
        round=plan.round, outcome="amended", agreement=agreement.digest, plan=plan.digest, attempt=0, contributions={}, missing={},
        previous=latest.digest, incoming=latest.outgoing, outgoing=latest.outgoing, server_state=latest.server_state, started=time.time(),
        at=time.time(),
    )  # fmt: skip


def history(rounds: Rounds, metric: str) -> list[tuple[int, float]]:
    """(round, pooled validation metric) of every global that has one, in order; amended rounds have none of their own."""
    found = []
    for commit in rounds.commits():
        if commit.outcome != "amended" and (value := pooled(rounds.evaluations(commit.outgoing, "valid"))):
            found.append((commit.round, value[metric]))
    return found


def has_converged(values: list[float], until: Until) -> bool:
    """Whether the last ``patience`` values are no better than the best before them by more than ``min_delta``."""
    sign = -1.0 if until.metric == "token_accuracy" else 1.0
    best, stale = float("inf"), 0
    for value in values:
        if sign * value < best - until.min_delta:
            best, stale = sign * value, 0
        else:
            stale += 1
    return stale >= until.patience


def best_round(rounds: Rounds) -> int:
    """The round whose global has the lowest pooled validation loss; the last one where none has been evaluated."""
    losses = history(rounds, "loss")
    if losses:
        return min(losses, key=lambda x: (x[1], x[0]))[0]
    latest = rounds.latest()
    return latest.round if latest else 0
