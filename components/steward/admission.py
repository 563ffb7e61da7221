"""Admission: what a federation asks of a silo, held against the silo's own policy.

Every box of a silo insists on it before it reads a record, and again before anything leaves, with the policy as it stands just then; a federation
that asks for something else is refused by the name of the rule:

    refused: policy: strategy

Stewards see the same with ``silotune review``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.steward.policy import NAME, Policy
from silotune.components.store.local_files import beside

MARK = "policy.held"  # in the silo's storage, once a policy has held there: the name of its data set


@dataclass(frozen=True)
class Asked:
    """What a federation asks of one silo, as far as it is known where one looks."""

    silo: str
    agreement: Agreement
    image: str | None = None
    participants: int | None = None  # of the round; default: all silos of the terms
    update_bytes: int | None = None  # an update file's, at most
    runs: frozenset[str] = frozenset()  # federations that have trained on the data set


@dataclass(frozen=True)
class Verdict:
    """One rule of the policy on what is asked."""

    rule: str  # in the fixed vocabulary: refused: policy: <rule>
    passed: bool | None  # None: cannot be told here
    asked: str
    allowed: str


def review(policy: Policy, asked: Asked, today: date | None = None) -> list[Verdict]:
    """Every rule that the policy has, in the order in which they are insisted on."""
    return list(_verdicts(policy, asked, today or datetime.now(UTC).date()))


def require(policy: Policy | None, asked: Asked) -> None:
    """Insist on a policy, before any record is read.

    Raises:
        RefusedError: with the first rule that is broken.
    """
    if policy is None or (broken := next((v for v in review(policy, asked) if v.passed is False), None)) is None:
        return
    words = f"its policy allows {broken.allowed} as {broken.rule}, the federation asks for {broken.asked}"
    if broken.rule == "expired":
        words = f"its policy ended on {policy.expires}"
    raise RefusedError(f"silo {asked.silo!r}: {words}; agree on it with the silo's steward", f"policy: {broken.rule}")


def admit(federation: Federation, agreement: Agreement, silo_id: str, **known: Any) -> Policy | None:
    """In a silo's box, before it does anything: the silo's policy, which allows these terms; None where there is none.

    Args:
        known: what else is known of what is asked; fields of `Asked`.

    Raises:
        RefusedError: it does not allow them; or one has held here before and is gone.
        FederationError: it is wrong.
    """
    policy, mark = Policy.of(federation, silo_id), Path(federation.silo(silo_id).storage) / MARK
    if policy is None and mark.exists():
        raise RefusedError(
            f"silo {silo_id!r}: its policy, of data set {mark.read_text(encoding='utf-8').strip()!r}, is gone; put {NAME} back, or remove {mark} "
            "as well if nothing is to be restricted any more",
            "policy: gone",
        )
    if policy and not (mark.exists() and mark.read_text(encoding="utf-8") == f"{policy.dataset}\n"):
        with beside(mark) as written:
            written.write_text(f"{policy.dataset}\n", encoding="utf-8")
    require(policy, Asked(silo_id, agreement, image=federation.silo(silo_id).placement.image, **known))
    return policy


def _verdicts(policy: Policy, asked: Asked, today: date) -> Iterator[Verdict]:
    terms, privacy = asked.agreement, asked.agreement.privacy
    if policy.expires is not None:
        yield Verdict("expired", today < policy.expires, f"today, {today}", f"days before {policy.expires}")
    if policy.coordinators is not None:
        found = [k.public for k in terms.keys.get(COORDINATOR, [])]
        yield Verdict("coordinator key", bool(found) and set(found) <= set(policy.coordinators), _words(found, "nobody's, nothing is signed"),
                      _words(policy.coordinators))  # fmt: skip
    if policy.bases is not None:
        yield Verdict("base model", terms.base in policy.bases, terms.base, _words(policy.bases))
    if policy.images is not None:
        digest = asked.image.rpartition("@")[2] if asked.image else ""
        yield Verdict("image", digest in policy.images, asked.image or "none: it runs outside of a container", _words(policy.images))
    if policy.strategies is not None:
        strategy = terms.aggregation.strategy
        yield Verdict("strategy", strategy in policy.strategies, strategy, _words(policy.strategies))
    if policy.codecs is not None:
        codec = terms.communication.codec
        yield Verdict("codec", codec in policy.codecs, codec, _words(policy.codecs))
    yield from _privacy_verdicts(policy, terms)
    if policy.secure_aggregation:
        yield Verdict("secure aggregation", privacy.secure_aggregation is not None,
                      "secure aggregation" if privacy.secure_aggregation else "updates that the coordinator sees", "secure aggregation only")  # fmt: skip
    if policy.min_participants is not None:
        count = asked.participants if asked.participants is not None else len(terms.silos)
        yield Verdict("participants", count >= policy.min_participants, f"{count} silos", f"{policy.min_participants} silos or more")
    if policy.max_update_bytes is not None:
        size = asked.update_bytes
        yield Verdict("update size", None if size is None else size <= policy.max_update_bytes,
                      "what the first plan will say" if size is None else f"at most {size} bytes", f"at most {policy.max_update_bytes} bytes")  # fmt: skip
    if policy.max_runs is not None:
        runs = asked.runs | {terms.federation}
        yield Verdict("runs", len(runs) <= policy.max_runs, f"{len(runs)} with this one", f"at most {policy.max_runs} federations")


def _privacy_verdicts(policy: Policy, terms: Agreement) -> Iterator[Verdict]:
    rule, privacy = policy.privacy, terms.privacy
    if policy.private:
        yield Verdict("privacy", privacy.of_records, "differential privacy" if privacy.of_records else "training without differential privacy",
                      "differential privacy only")  # fmt: skip
    if not privacy.of_records:
        return
    if policy.private and rule.unit == "person":
        yield Verdict("unit", privacy.unit == "person", f"privacy of a {privacy.unit}", "privacy of a person")
    limits = rule.epsilon
    if (bounds := [b for b in (limits.run, limits.total) if b is not None]) and privacy.epsilon is not None:
        yield Verdict(
            "epsilon",
            privacy.epsilon <= min(bounds),
            f"epsilon {privacy.epsilon:g} over {privacy.rounds} rounds",
            f"at most {min(bounds):g}",
        )
        yield Verdict("delta", privacy.delta <= limits.delta, f"delta {privacy.delta:g}", f"at most {limits.delta:g}")


def _words(items: Iterable[Any], none: str = "none") -> str:
    return ", ".join(map(str, items)) or none
