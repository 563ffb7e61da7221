"""aggregate: check what the silos delivered, apply the quorum, average, commit the round and open the next one.

Nothing is committed that has not passed the guards: the quorum, a positive total weight, norms within the usual band, data cursors that moved
on, a global that changed. A round that began from a global which turns out to be bad is rolled back. What was found stands in the commit.

    python -m silotune.components.aggregate.step FEDERATION "round:1 attempt:1" "north ok" "south failed: disk full"
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from silotune.components import best_global, opening, silo_promise, tracking
from silotune.components.aggregate import carried, groups, releases
from silotune.components.aggregate.intake import Intake
from silotune.components.aggregate.lost_global import fetch_global
from silotune.components.aggregate.secure import secure_sum
from silotune.components.errors import QuorumError, RefusedError, SilotuneError
from silotune.components.federation import Agreement, Federation
from silotune.components.learning.aggregation.combination import OUTGOING, Combined, combine, combine_sum, summands
from silotune.components.learning.aggregation.guards import norm_outliers
from silotune.components.learning.aggregation.summation import SumDamaged
from silotune.components.learning.aggregation.tree import Stored
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Update, UpdateRefused
from silotune.components.process import child
from silotune.components.process.progress import tell
from silotune.components.protocol import Commit, Contribution, Plan, Turn, UpdateManifest
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import records as secure_records
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.records import SecureRound
from silotune.components.silo_job import first_troubles, parse_status
from silotune.components.store.object_store import ObjectMissing

RECENT = 5  # rounds whose norms say what is usual


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
        latest = rounds.write_commit(_close(federation, rounds, latest, turn, statuses))
    rounds.drop_partials()
    audit.sync(rounds)
    try:
        tracking.sync(federation, rounds)
    except SilotuneError as error:  # the commit stands; metrics can be made from it at any time
        tell("aggregate", "warned", detail=f"round {latest.round} is committed, but not in MLflow yet: {error}")
    return opening.open_next(federation, rounds, latest, rounds.agreement(latest.agreement), {}).text


def _close(federation: Federation, rounds: Rounds, latest: Commit, turn: Turn, statuses: tuple[str, ...]) -> Commit:
    """The commit that ends the open round."""
    plan = rounds.plan(turn.round)
    if plan is None:
        raise RefusedError(f"round {turn.round} was never opened; run again")
    agreement = rounds.agreement(plan.agreement)
    if bad := _bad_global(federation, rounds, latest):
        tell("aggregate", "warned", detail=bad)
        return _rolled_back(federation, rounds, latest, plan, agreement, turn)
    return _aggregated(federation, rounds, latest, plan, agreement, turn, statuses)


def _bad_global(federation: Federation, rounds: Rounds, latest: Commit) -> str:
    """Why the global that the open round began from must be left behind, now that the silos have scored it; "" where it need not."""
    maker = next(c for n in range(latest.round, -1, -1) if (c := rounds.commit(n)).made_global and c.outgoing == latest.outgoing)
    if maker.round == 0:
        return ""
    found = rounds.evaluations(maker.outgoing, "valid")
    if len([e for e in found.values() if e.loss_sum is None]) * 2 > len(found):
        return f"the global of round {maker.round} has no finite loss in most silos, and is left behind"
    if federation.rounds.rollback is None:
        return ""
    before = rounds.evaluations(rounds.commit(latest.best).outgoing, "valid")
    pair = best_global.compare(found, before, "loss")
    if pair is None or pair[0] <= pair[1] + federation.rounds.rollback.max_loss_increase:
        return ""
    return (
        f"the global of round {maker.round} has a validation loss of {pair[0]:.4f}, {pair[0] - pair[1]:.4f} above round {latest.best}'s; "
        f"rounds.rollback allows {federation.rounds.rollback.max_loss_increase:g}, so it is left behind"
    )


def _rolled_back(federation: Federation, rounds: Rounds, latest: Commit, plan: Plan, agreement: Agreement, turn: Turn) -> Commit:
    """The next round begins from the best global so far; what was trained from the bad one is dropped."""
    good = rounds.commit(latest.best)
    return Commit(
        round=turn.round, outcome="rolled-back", custody=federation.custody, agreement=plan.agreement, plan=plan.digest, attempt=turn.attempt,
        contributions={}, missing={}, previous=latest.digest, incoming=plan.incoming, outgoing=good.outgoing, back_to=good.round,
        best=good.round, learning_rate=plan.learning_rate, server_state=good.server_state, spent=secure_records.spent(rounds, plan), started=_started(rounds, turn), at=time.time(),
    )  # fmt: skip


def _aggregated(
    federation: Federation, rounds: Rounds, latest: Commit, plan: Plan, agreement: Agreement, turn: Turn, statuses: tuple[str, ...]
) -> Commit:
    if agreement.privacy.secure_aggregation is not None:
        return _summed_securely(federation, rounds, latest, plan, agreement, turn, statuses)
    manifests, disbelieved = rounds.updates(turn.round)
    for silo, why in disbelieved.items():
        tell("aggregate", "warned", silo, detail=why)
        if silo in plan.participants:
            rounds.refuse_update(turn.round, silo, "its manifest is not the silo's", resend=False)
    missing = _absent(rounds, plan, manifests, turn, statuses) | {
        silo: "refused: its manifest is not the silo's" for silo in disbelieved if silo in plan.participants
    }
    federation.work.mkdir(parents=True, exist_ok=True)  # in a pod of its own nobody was here before
    with tempfile.TemporaryDirectory(dir=federation.work) as folder:
        incoming = fetch_global(rounds, latest, Path(folder) / "incoming.safetensors", federation)
        intake = Intake.of("aggregate", rounds, plan, agreement, manifests, Path(folder))
        accepted = intake.accepted
        for silo, rule in _norm_outliers(federation, rounds, latest, plan, accepted).items():
            intake.refuse(silo, UpdateRefused(silo, rule, "look into its records and learning rate"))
        given = carried.round_of(rounds, latest, plan, agreement, open_tensor_file(incoming), Path(folder))
        stored: list[Stored] = []
        planned: releases.Planned | None = None
        if agreement.privacy.silo is not None:
            missing |= intake.only(releases.settled(rounds, plan, intake.objects), "late: the round was summed before its update came")
        if given.groups and accepted:
            stored = groups.stored_sums(rounds, turn, given.groups, summands(given.terms, accepted, given.training_of)[0], intake)
        while True:
            missing |= {silo: f"refused: {rule}" for silo, rule in intake.refused.items()}
            share = opening.share_trained(plan, agreement, {silo: u.header.examples for silo, u in accepted.items()})
            if federation.rounds.on_missing_quorum == "skip" and not opening.has_quorum(federation, sorted(accepted), share):
                tell("aggregate", "warned", detail=f"round {turn.round} is skipped: too few silos delivered")
                return opening.without_result("skipped", federation, latest, plan, agreement, turn.attempt, missing)
            opening.require_quorum(federation, f"round {turn.round} stays open", sorted(accepted), missing, share)
            try:
                if agreement.privacy.silo is not None:
                    planned = releases.planned(federation, rounds, plan, agreement, given, intake.objects)
                made = combine(planned.given if planned else given, accepted, Path(folder), stored)
                break
            except QuorumError as error:  # enough for the federation, too few for its robust rule
                if federation.rounds.on_missing_quorum == "skip":
                    tell("aggregate", "warned", detail=f"round {turn.round} is skipped: {error}")
                    return opening.without_result("skipped", federation, latest, plan, agreement, turn.attempt, missing)
                raise QuorumError("\n".join([f"round {turn.round} stays open: {error}", *opening.told(missing)])) from None
            except (SumDamaged, UpdateRefused, ObjectMissing) as error:  # found late: start over, without that sum or silo or with a copy
                left = groups.without(rounds, stored, error)
                if len(left) < len(stored):
                    tell("aggregate", "warned", detail=f"round {turn.round}: {error}; the group is summed again")
                    stored = left
                elif isinstance(error, SumDamaged):
                    raise
                else:
                    intake.mend(error)
        if planned:
            releases.write(rounds, planned.release)
        outgoing = rounds.put_object(Path(folder) / OUTGOING)
        server_state = carried.put(rounds, made)
    for silo, why in made.told.items():
        tell("aggregate", "warned", silo, detail=f"round {turn.round}: {why}")
    # What no noise covers stays with the coordinator: a commit is read by all silos.
    contributions = {
        silo: Contribution(
            manifest=(m := manifests[silo]).digest, object=m.object, bytes=m.bytes, weight=made.weights[silo], examples=u.header.examples,
            tokens=u.header.tokens, steps=u.header.steps, cursor=u.header.cursor, norm=None if planned else made.norms[silo],
            score=made.scores.get(silo), told="" if planned else made.told.get(silo, ""),
        )
        for silo, u in accepted.items()
    }  # fmt: skip
    promises = releases.guards(rounds, planned.release) if planned else {}
    return _commit(federation, rounds, latest, plan, turn, Result(made, contributions, missing, outgoing, server_state, promises))


def _summed_securely(
    federation: Federation, rounds: Rounds, latest: Commit, plan: Plan, agreement: Agreement, turn: Turn, statuses: tuple[str, ...]
) -> Commit:
    """The same of a round whose updates nobody has seen: of the sum that their silos have opened."""
    survivors = SecureRound.of(rounds, turn, plan.digest).survivors()
    if survivors is None:
        troubles = _absent(rounds, plan, {}, turn, statuses) | first_troubles(statuses)
        missing = {silo: "failed: the secure sum had too few silos" if why.startswith("ok") else why for silo, why in troubles.items()}
        if federation.rounds.on_missing_quorum == "skip":
            tell("aggregate", "warned", detail=f"round {turn.round} is skipped: too few silos for a secure sum")
            return opening.without_result("skipped", federation, latest, plan, agreement, turn.attempt, missing)
        rule = f"{secure_terms.least(agreement)} silos must mask their updates for a secure sum"
        raise QuorumError("\n".join([f"round {turn.round} stays open: {rule}, and the quorum must be met:", *opening.told(missing)]))
    federation.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=federation.work) as folder:
        incoming = fetch_global(rounds, latest, Path(folder) / "incoming.safetensors", federation)
        given = carried.round_of(rounds, latest, plan, agreement, open_tensor_file(incoming), Path(folder))
        try:
            opened = secure_sum(rounds, plan, agreement, survivors, Path(folder))
        except QuorumError as error:
            if federation.rounds.on_missing_quorum != "skip":
                raise
            tell("aggregate", "warned", detail=f"round {turn.round} is skipped: {error}")
            spent = secure_records.spent(rounds, plan)
            return opening.without_result("skipped", federation, latest, plan, agreement, turn.attempt, survivors.missing, spent)
        made = combine_sum(given, opened.path, opened.weights, Path(folder))
        outgoing = rounds.put_object(Path(folder) / OUTGOING)
        server_state = carried.put(rounds, made)
    contributions = opened.contributions(plan, agreement)
    promises, silo = {}, agreement.privacy.silo
    if silo and (epsilon := silo_promise.secure_epsilon_with(rounds, plan, agreement)) is not None:
        promises = {"silo epsilon": epsilon, "silo delta": silo.delta}
    return _commit(federation, rounds, latest, plan, turn, Result(made, contributions, survivors.missing, outgoing, server_state, promises))


@dataclass(frozen=True)
class Result:
    """What a round has come to."""

    made: Combined
    contributions: dict[str, Contribution]
    missing: dict[str, str]
    outgoing: str
    server_state: dict[str, str]
    promises: dict[str, float] = field(default_factory=dict)  # what is kept of the promise about silos


def _commit(federation: Federation, rounds: Rounds, latest: Commit, plan: Plan, turn: Turn, result: Result) -> Commit:
    spectrum = carried.spectrum_of(result.made)
    if spectrum and (lost := carried.rank_lost(rounds, spectrum)):
        tell("aggregate", "warned", detail=f"round {turn.round}: {lost}")
    scores = best_global.judged(rounds)
    until = federation.rounds.until
    best = best_global.best_of(scores)
    return Commit(
        round=turn.round,
        outcome="aggregated",
        custody=federation.custody,
        agreement=plan.agreement,
        plan=plan.digest,
        attempt=turn.attempt,
        contributions=result.contributions,
        missing=result.missing,
        previous=latest.digest,
        incoming=plan.incoming,
        outgoing=result.outgoing,
        best=latest.round if best is None else best,
        learning_rate=plan.learning_rate,
        guards=_guards(plan, result.outgoing, result.contributions, result.made) | result.promises,
        server_state=result.server_state,
        spectrum=spectrum,
        converged=bool(until and best_global.has_converged(scores, until)),
        bytes_up=sum(c.bytes for c in result.contributions.values()),
        bytes_down=len(result.contributions) * rounds.object_size(plan.incoming),
        started=_started(rounds, turn),
        at=time.time(),
    )


def _started(rounds: Rounds, turn: Turn) -> float:
    attempts = rounds.attempts(turn.round)
    return attempts[0].at if attempts else time.time()


def _absent(rounds: Rounds, plan: Plan, manifests: dict[str, UpdateManifest], turn: Turn, statuses: tuple[str, ...]) -> dict[str, str]:
    """Why each participant without an update has none: its report, else its task's status, else why it was not asked."""
    said = {silo: f"{status}: {reason}" if reason else status for silo, status, reason in map(parse_status, statuses)}
    absent = [silo for silo in plan.participants if silo not in manifests]
    reports = {silo: report.text for silo, report in rounds.reports(turn.round, turn.attempt, absent).items()}
    unasked = rounds.attempt(turn.round, turn.attempt).missing
    known = {**said, **reports, **unasked}
    found = {silo: known.get(silo, "failed: no report came") for silo in absent}
    for silo, why in found.items():  # it delivered, and another box, or run, has refused that since
        if (why == "ok" or why.startswith("ok:")) and (refusal := rounds.refusal(turn.round, silo)):
            found[silo] = f"refused: {refusal.rule}"
    return found


def _norm_outliers(federation: Federation, rounds: Rounds, latest: Commit, plan: Plan, accepted: dict[str, Update]) -> dict[str, str]:
    band = federation.rounds.guards.norm_band
    if band is None or federation.privacy.silo is not None:  # one silo's norm would decide on another's part
        return {}
    recent = [rounds.commit(r) for r in range(max(1, latest.round - RECENT + 1), latest.round + 1)]
    usual = [c.norm / commit.learning_rate for commit in recent for c in commit.contributions.values() if c.norm is not None]
    return norm_outliers({silo: u.header.norm / plan.learning_rate for silo, u in accepted.items()}, usual, band)


def _guards(plan: Plan, outgoing: str, contributions: dict[str, Contribution], made: Combined) -> dict[str, float]:
    """What was checked, with the values found.

    Raises:
        RefusedError: the round would be a round in name only.
    """
    weight = sum(c.weight for c in contributions.values())
    norms = [c.norm for c in contributions.values() if c.norm is not None]
    standing = [silo for silo, c in contributions.items() if c.cursor <= plan.participants[silo].cursor]
    problem = ""
    if not (math.isfinite(weight) and weight > 0):
        problem = f"the updates' total weight is {weight}, must be positive"
    elif outgoing == plan.incoming or not made.change > 0:
        problem = "the updates leave the global as it was; raise training.learning_rate"
    elif standing:
        problem = f"the data cursor of {', '.join(standing)} has not moved on"
    if problem:
        raise RefusedError(f"round {plan.round} stays open: {problem}", "guard")
    return {
        "weight": weight,
        "examples": float(sum(c.examples for c in contributions.values())),
        "change": made.change,
    } | ({"least norm": min(norms), "greatest norm": max(norms)} if norms else {})  # fmt: skip


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
