"""Permission: what the silo's own side must say before a training reads a record. The policy allows it, and the budget has room for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.tensor_file import WIDTH
from silotune.components.learning.update import DTYPE
from silotune.components.protocol import Plan
from silotune.components.rounds import Rounds
from silotune.components.steward.admission import admit
from silotune.components.steward.budget import promised, reserve, spent
from silotune.components.steward.entry import Charge, Entry
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy, counted_by


def allowed(
    federation: Federation, rounds: Rounds, plan: Plan, agreement: Agreement, silo_id: str, runs: frozenset[str] = frozenset()
) -> Policy | None:
    """The silo's policy as it stands now, which allows what a plan asks for; None where there is none. Raises RefusedError: ``policy: …``.

    Args:
        runs: federations that have trained on the data set.
    """
    known = {"participants": len(plan.participants), "update_bytes": update_bytes(rounds, plan, agreement, silo_id), "runs": runs}
    return admit(federation, agreement, silo_id, **known)


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
    policy = allowed(federation, rounds, plan, agreement, silo_id)
    ledger = Ledger.of(federation, silo_id, policy)
    terms, (limits, unit) = agreement.privacy, counted_by(policy, agreement.privacy)
    charge = Charge(
        federation=federation.name, agreement=plan.agreement, plan=plan.digest, round=plan.round, silo=silo_id, content=content,
        mechanism=mechanism, unit=terms.unit, delta=terms.delta if terms.of_records else None, noise=noise,
    )  # fmt: skip

    def require_room(entries: Sequence[Entry]) -> None:
        """Of the very entries that the new one goes behind: another federation may be asking at the same time."""
        if policy and policy.max_runs is not None:
            allowed(federation, rounds, plan, agreement, silo_id, frozenset(e.charge.federation for e in entries))
        _require_promise(entries, charge, agreement, ledger.dataset)

    if terms.of_records or limits.any:
        _require_whole(ledger, rounds, plan, silo_id, policy)
    reserve(ledger, charge, limits, unit, bounded=policy is None or policy.private, also=require_room)
    return policy


def bound(federation: Federation, agreement: Agreement, silo_id: str, policy: Policy | None) -> dict[str, float]:
    """What a report says of it: ε and δ of all that was ever trained on the data set, and nothing where no ε bounds that."""
    if not agreement.privacy.of_records:
        return {}
    (limits, unit), entries = counted_by(policy, agreement.privacy), Ledger.of(federation, silo_id, policy).entries()
    if not entries:
        return {}
    found = spent([(e.charge, e.at) for e in entries], limits.delta, unit, federation.name, entries[-1].at)
    return {"epsilon": found.total, "delta": found.delta} if math.isfinite(found.total) else {}


def _require_promise(entries: Sequence[Entry], charge: Charge, agreement: Agreement, dataset: str) -> None:
    """All private rounds of the federation stay within the ε that it promises: noise is made for so many rounds, and more would pass it.

    Raises:
        RefusedError: this one would.
    """
    terms, identity = agreement.privacy, charge.identity(dataset)
    if terms.epsilon is None or charge.mechanism is None or any(e.identity == identity for e in entries):
        return
    if (after := promised([*(e.charge for e in entries), charge], charge.federation, terms)) > terms.epsilon:
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
