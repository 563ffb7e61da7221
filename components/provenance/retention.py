"""Retention: erasing old update files, and those of a silo that has left. What is erased stands in the audit log before it goes.

Only update files are erased. Globals, commits, manifests and scores stay, so that the chain still verifies, by digest.
"""

from __future__ import annotations

from silotune.components import opening
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.provenance import audit
from silotune.components.rounds import Rounds


def due(federation: Federation, rounds: Rounds) -> dict[str, list[str]]:
    """Update files that ``storage.retention.updates`` no longer keeps, by silo: digests in order.

    Kept are those of the latest rounds, those of the open round, and whatever a silo may be sending just now. With a strategy whose silos
    need what their own rounds add up to, all that adds up to it is kept as well.
    """
    keep = federation.storage.retention.updates
    stored = _stored(rounds)  # before the rounds are looked at: what is sent while this works is not even in the list
    latest = rounds.latest()
    if latest is None or keep is None:
        return {}
    kept = {
        c.object
        for number in range(max(0, latest.round - keep + 1), latest.round + 1)
        for c in rounds.commit(number).contributions.values()
    }
    plan = rounds.plan(latest.round + 1)
    agreement = rounds.agreement(plan.agreement if plan else latest.agreement)
    if agreement.aggregation.traits.memory:
        kept |= {c.object for commit in opening.under(rounds, latest, agreement) for c in commit.contributions.values()}
    delivered = rounds.updates(latest.round + 1)[0] if plan else {}
    kept |= {m.object for m in delivered.values()}
    known = {c.object for commit in rounds.commits() for c in commit.contributions.values()}
    found: dict[str, list[str]] = {}
    for silo, digest in stored:
        sending = plan is not None and silo in plan.participants and silo not in delivered and digest not in known
        if digest not in kept and not sending:
            found.setdefault(silo, []).append(digest)
    return found


def departed(rounds: Rounds, silo: str) -> dict[str, list[str]]:
    """All update files of a silo that has left the federation.

    Raises:
        FederationError: it has not left, or was never there.
    """
    latest = rounds.latest()
    if latest and silo in rounds.agreement(latest.agreement).silos:
        raise FederationError(
            f"silo {silo!r}: is part of the federation, whose rounds need its updates; take it out of the file and run once"
        )
    found = [digest for owner, digest in _stored(rounds) if owner == silo]
    if not found and not any(silo in c.contributions for c in rounds.commits()):
        raise FederationError(f"silo {silo!r}: has never contributed to federation {rounds.federation!r}; correct the id")
    return {silo: found} if found else {}


def _stored(rounds: Rounds) -> list[tuple[str, str]]:
    """(silo, digest) of every update file that is there."""
    prefix = rounds.key("contributions") + "/"
    return [(silo, digest) for silo, _, digest in (k.removeprefix(prefix).partition("/") for k in rounds.store.list(prefix))]


def erase(rounds: Rounds, files: dict[str, list[str]], reason: str, by: str) -> None:
    """Log the erasure, then erase: a file that is gone must never be without an explanation."""
    if not files:
        return
    audit.sync(rounds)
    latest = rounds.latest()
    audit.append(rounds, audit.of_erasure(latest.round + 1 if latest else 0, files, reason, by))
    for silo, digests in files.items():
        for digest in digests:
            rounds.store.delete(rounds.object_key(digest, silo))
