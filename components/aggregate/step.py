"""aggregate: check what the silos delivered, apply the quorum, average, commit the round and open the next one.

python -m silotune.components.aggregate.step FEDERATION "round:1 attempt:1" "north ok" "south failed: disk full"
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from silotune.components import child, opening, tracking
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Agreement, Federation
from silotune.components.learning.aggregation import weigh, weighted_mean
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Expectation, Update, UpdateRefused, open_update
from silotune.components.object_store import ObjectMissing
from silotune.components.progress import tell
from silotune.components.rounds import Commit, Contribution, Plan, Rounds, Turn, UpdateManifest
from silotune.components.silo_job import parse_status


def run(federation: str, turn: str, statuses: list[str]) -> str:
    """As a pipeline task; nothing at all where no round is open."""
    if Turn.parse(turn).done:
        return turn
    return child.coordinate("aggregate", federation, turn, *statuses)


def work(federation_file: str, turn_text: str, *statuses: str) -> str:
    """Returns the next turn.

    Raises:
        QuorumError: the round stays open.
    """
    turn = Turn.parse(turn_text)
    if turn.done:
        return turn_text
    federation = Federation.load(federation_file)
    rounds = Rounds.of(federation)
    latest = rounds.latest()
    if latest is None or latest.round < turn.round - 1:
        raise RefusedError(f"round {turn.round} cannot be committed: the highest commit is {latest.round if latest else 'none'}; run again")
    if latest.round < turn.round:
        latest = _commit(federation, rounds, latest, turn, statuses)
    try:
        tracking.sync(federation, rounds)
    except SilotuneError as error:  # the commit stands; metrics can be made from it at any time
        tell("aggregate", "warned", detail=f"round {latest.round} is committed, but not in MLflow yet: {error}")
    return opening.open_next(federation, rounds, latest, rounds.agreement(latest.agreement), {}).text


def _commit(federation: Federation, rounds: Rounds, latest: Commit, turn: Turn, statuses: tuple[str, ...]) -> Commit:
    plan = rounds.plan(turn.round)
    if plan is None:
        raise RefusedError(f"round {turn.round} was never opened; run again")
    agreement = rounds.agreement(plan.agreement)
    manifests = rounds.updates(turn.round)
    missing = _absent(rounds, plan, manifests, turn, statuses)
    with tempfile.TemporaryDirectory(dir=federation.work) as folder:
        incoming = rounds.fetch_object(plan.incoming, Path(folder) / "incoming.safetensors")
        accepted: dict[str, Update] = {}
        for silo, manifest in sorted(manifests.items()):
            try:
                accepted[silo] = _fetch(rounds, plan, agreement, silo, manifest, Path(folder))
            except (RefusedError, ObjectMissing) as error:
                missing[silo] = _refusal(silo, error)
        while True:
            opening.require_quorum(federation, f"round {turn.round} stays open", sorted(accepted), missing)
            weights = weigh(accepted, agreement.aggregation.weights)
            out = Path(folder) / "outgoing.safetensors"
            try:
                weighted_mean(open_tensor_file(incoming), accepted, weights, out)
                break
            except UpdateRefused as error:  # found late: start over without that silo
                del accepted[error.silo]
                missing[error.silo] = _refusal(error.silo, error)
        outgoing = rounds.put_object(out)
    contributions = {
        silo: Contribution(
            manifest=(m := manifests[silo]).digest, object=m.object, bytes=m.bytes, weight=weights[silo], examples=u.header.examples,
            tokens=u.header.tokens, steps=u.header.steps, cursor=u.header.cursor, norm=u.header.norm,
        )
        for silo, u in accepted.items()
    }  # fmt: skip
    until = federation.rounds.until
    values = [value for _, value in opening.history(rounds, until.metric)] if until else []
    attempts = rounds.attempts(turn.round)
    return rounds.write_commit(
        Commit(
            round=turn.round,
            outcome="aggregated",
            agreement=plan.agreement,
            plan=plan.digest,
            attempt=turn.attempt,
            contributions=contributions,
            missing=missing,
            previous=latest.digest,
            incoming=plan.incoming,
            outgoing=outgoing,
            converged=bool(until and opening.has_converged(values, until)),
            bytes_up=sum(c.bytes for c in contributions.values()),
            bytes_down=len(contributions) * rounds.object_size(plan.incoming),
            started=attempts[0].at if attempts else time.time(),
            at=time.time(),
        )
    )


def _absent(rounds: Rounds, plan: Plan, manifests: dict[str, UpdateManifest], turn: Turn, statuses: tuple[str, ...]) -> dict[str, str]:
    """Why each participant without an update has none: its report, else its task's status, else why it was not asked."""
    said = {silo: f"{status}: {reason}" for silo, status, reason in map(parse_status, statuses)}
    reports = {silo: report.text for silo, report in rounds.reports(turn.round, turn.attempt).items()}
    unasked = {silo: why for a in rounds.attempts(turn.round) if a.attempt == turn.attempt for silo, why in a.missing.items()}
    known = {**said, **reports, **unasked}
    return {silo: known.get(silo, "failed: no report came") for silo in plan.participants if silo not in manifests}


def _fetch(rounds: Rounds, plan: Plan, agreement: Agreement, silo: str, manifest: UpdateManifest, folder: Path) -> Update:
    """Fetch and accept one update. Raises RefusedError or ObjectMissing."""
    if silo not in plan.participants:
        raise UpdateRefused(silo, "it was not asked", "wait for a plan that names it")
    participant = plan.participants[silo]
    expected = Expectation(
        federation=rounds.federation, agreement=plan.agreement, plan=plan.digest, base=plan.base, accepted=tuple(plan.accepted), silo=silo,
        cursor=participant.cursor, codec=agreement.communication.codec, schema=rounds.json_object(participant.tensors),
    )  # fmt: skip
    if rounds.object_size(manifest.object) > expected.most_bytes:
        raise UpdateRefused(
            silo, f"its object is larger than the {expected.most_bytes} bytes that its tensors can take", "send the plan's tensors only"
        )
    return open_update(rounds.fetch_object(manifest.object, folder / f"{silo}.safetensors"), expected)


def _refusal(silo: str, error: SilotuneError) -> str:
    tell("aggregate", "warned", silo, detail=str(error))
    return f"refused: {error.rule if isinstance(error, UpdateRefused) else error.reason}"


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
