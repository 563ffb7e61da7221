"""Permission: what the silo's own side must say before a training reads a record. The policy allows it, and the budget has room for it."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.tensor_file import WIDTH
from silotune.components.learning.update import DTYPE
from silotune.components.protocol import Plan
from silotune.components.rounds import Rounds
from silotune.components.steward.budget import Limits, Unit, reserve, spent
from silotune.components.steward.budget import bound as composed
from silotune.components.steward.ledger import Charge, Ledger
from silotune.components.steward.policy import Asked, Policy, require


def admit(federation: Federation, agreement: Agreement, silo_id: str) -> Policy | None:
    """The silo's policy, which allows these terms; None where there is none. Raises RefusedError where it does not."""
    policy = Policy.of(federation, silo_id)
    require(policy, Asked(silo_id, agreement, image=federation.silo(silo_id).placement.image))
    return policy


def permit(
    federation: Federation, rounds: Rounds, plan: Plan, agreement: Agreement, silo_id: str, content: str, mechanism: Mechanism | None,
    noise: str = "",
) -> Policy | None:  # fmt: skip
    """Have a training allowed by the policy and written into the ledger; returns the policy.

    Args:
        content: digest of the train split.
        mechanism: what it costs; None without differential privacy.
        noise: which secret its noise is from (see `ledger.Charge`).

    Raises:
        RefusedError: ``policy: …``, ``budget`` or ``ledger damaged``.
    """
    policy = Policy.of(federation, silo_id)
    ledger = Ledger.of(federation, silo_id, policy)
    runs = frozenset(entry.charge.federation for entry in ledger.entries()) if policy and policy.max_runs else frozenset()
    require(policy, Asked(
        silo_id, agreement, image=federation.silo(silo_id).placement.image, participants=len(plan.participants),
        update_bytes=update_bytes(rounds, plan, agreement, silo_id), runs=runs,
    ))  # fmt: skip
    terms, (limits, unit) = agreement.privacy, _rule(policy, agreement)
    if terms.of_records or limits.any:
        _require_whole(ledger, rounds, plan, silo_id, policy)
    charge = Charge(
        federation=federation.name, agreement=plan.agreement, plan=plan.digest, round=plan.round, silo=silo_id, content=content,
        mechanism=mechanism, unit=terms.unit, delta=terms.delta if terms.of_records else None, noise=noise,
    )  # fmt: skip
    _require_promise(ledger, charge, agreement)
    reserve(ledger, charge, limits, unit, bounded=policy is None or policy.private)
    return policy


def bound(federation: Federation, agreement: Agreement, silo_id: str, policy: Policy | None) -> dict[str, float]:
    """What a report says of it: ε and δ of all that was ever trained on the data set, and nothing where no ε bounds that."""
    limits, unit = _rule(policy, agreement)
    entries = Ledger.of(federation, silo_id, policy).entries()
    if not agreement.privacy.of_records or not entries:
        return {}
    found = spent([(e.charge, e.at) for e in entries], limits.delta, unit, federation.name, entries[-1].at)
    return {"epsilon": found.total, "delta": found.delta} if math.isfinite(found.total) else {}


def _rule(policy: Policy | None, agreement: Agreement) -> tuple[Limits, Unit]:
    """By which limits, and about whose traces, budgets are counted."""
    if policy:
        return policy.privacy.epsilon, policy.privacy.unit
    return Limits(delta=agreement.privacy.delta), agreement.privacy.unit


def _require_promise(ledger: Ledger, charge: Charge, agreement: Agreement) -> None:
    """All private rounds of the federation stay within the ε that it promises: noise is made for so many rounds, and more would pass it.

    Raises:
        RefusedError: this one would.
    """
    terms, entries = agreement.privacy, [e for e in ledger.entries() if e.charge.federation == charge.federation]
    if terms.epsilon is None or charge.mechanism is None or any(e.identity == charge.identity(ledger.dataset) for e in entries):
        return
    private = [e.charge for e in entries if e.charge.mechanism is not None]
    if (after := composed([*private, charge], terms.delta, charge.unit)) > terms.epsilon:
        raise RefusedError(
            f"silo {charge.silo!r}: privacy.epsilon: must not pass {terms.epsilon:g}, which is planned for {terms.rounds} rounds, got {after:.4g} "
            "with this one; raise privacy.rounds and epsilon together, which all silos must agree to, or end the federation",
            "budget",
        )


def update_bytes(rounds: Rounds, plan: Plan, agreement: Agreement, silo_id: str) -> int:
    """What the tensors of a silo's update take."""
    shapes = rounds.json_object(plan.participants[silo_id].tensors).values()
    return sum(math.prod(shape) for shape in shapes) * WIDTH[DTYPE[agreement.communication.codec]]


def _require_whole(ledger: Ledger, rounds: Rounds, plan: Plan, silo_id: str, policy: Policy | None) -> None:
    """The ledger tells of the silo's last round that counted: whoever lost its end does not begin anew. Raises RefusedError."""
    for number in range(plan.round - 1, 0, -1):
        commit = rounds.commit(number)
        if policy and policy.ledger.since and datetime.fromtimestamp(commit.at, UTC).date() < policy.ledger.since:
            return
        if silo_id in commit.contributions and commit.plan:
            ledger.require_told(commit.plan, silo_id)
            return
