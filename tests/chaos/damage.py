"""Damage: one bit of a stored object is another, as a failing disk would have it; and what must come of it.

update    of the open round: refused as damaged, and sent again
global    of a committed round: made again from its updates; that of round 0 is refused by name, for nothing is stored to make it from
record    refused by name; an operator restores it from a backup
withheld  a record of the open round's secure sum is not there for a life, or a masked vector; what it cannot do without it waits for
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import MaskedVector, SecureRound
from silotune.components.store.object_store import ObjectMissing, ObjectStore


@dataclass(frozen=True)
class Damage:
    """One altered object."""

    what: str  # update, global, record or withheld
    key: str
    sound: bytes
    altered: bytes | None  # None: it is not there
    mends: bool  # by itself, in the lives that follow

    @property
    def told(self) -> str:
        return "withheld record of a sum" if self.altered is None else f"altered {self.what}"

    def there(self, store: ObjectStore) -> bool:
        """Whether the store still has it so."""
        try:
            return store.get(self.key) == self.altered
        except ObjectMissing:
            return self.altered is None

    def restore(self, store: ObjectStore) -> None:
        """As from a backup."""
        store.delete(self.key)
        store.create(self.key, self.sound)

    def named(self, messages: list[str]) -> bool:
        """Whether some message says which object it is."""
        name = self.key.rsplit("/", 1)[1]
        return any(self.key in m or (len(name) == 64 and name[:12] in m) for m in messages)


def alter(rounds: Rounds, what: str, rng: random.Random) -> Damage | None:
    """Flip one bit of an object of this kind; None where there is none."""
    store, latest = rounds.store, rounds.latest()
    if latest is None:
        return None
    globals_ = {rounds.object_key(c.outgoing): c.round for c in reversed(list(rounds.commits())) if c.made_global}
    if what == "update":
        found = _delivered(rounds, latest.round + 1)
        keys = [key for silo, digest in found.items() if store.size(key := rounds.object_key(digest, silo))]
    elif what == "withheld":
        prefix = rounds.key("rounds", f"{latest.round + 1:05d}", "secagg") + "/"
        # Without the survivors another set might be fixed, which those who have signed the first would never sign.
        keys = [key for key in store.list(prefix) if not key.endswith("survivors.json")]
        keys += [key for silo, digest in _delivered(rounds, latest.round + 1).items() if store.size(key := rounds.object_key(digest, silo))]
    elif what == "global":
        keys = list(globals_)
    else:
        every = [k for k in store.list(rounds.key("")) if _is_record(store, k)]
        kind = rng.choice(sorted({_kind(k) for k in every}))
        keys = [k for k in every if _kind(k) == kind]
    if not keys:
        return None
    key = rng.choice(sorted(keys))
    sound = store.get(key)
    if what == "withheld":
        store.delete(key)
        return Damage(what, key, sound, None, mends=False)
    place = rng.randrange(8 * len(sound))
    altered = bytearray(sound)
    altered[place // 8] ^= 1 << place % 8
    store.delete(key)
    store.create(key, bytes(altered))
    return Damage(what, key, sound, bytes(altered), what == "update" or globals_.get(key, 0) > 0)


def _delivered(rounds: Rounds, number: int) -> dict[str, str]:
    """By silo: the digest of its update to the open round, or of its masked vector in the attempt that is summed."""
    delivered, _ = rounds.updates(number)
    found = {silo: manifest.object for silo, manifest in delivered.items()}
    plan = rounds.plan(number)
    if plan and (survivors := SecureRound(rounds, number, 1, plan.digest).survivors()):
        secure = SecureRound(rounds, number, survivors.attempt, plan.digest)
        found |= {silo: record.object for silo, record in secure.named(MaskedVector, survivors.members).items()}
    return found


def _is_record(store: ObjectStore, key: str) -> bool:
    """Not a tensor file, nor a file of an exported model."""
    _, kind, *rest = key.split("/")
    return store.get(key)[:1] == b"{" if kind == "objects" else key.endswith(".json") and (kind != "exports" or len(rest) == 1)


def _kind(key: str) -> str:
    """Such as commit.json, updates or audit: of some kinds there are many, and each is to have its turn."""
    parts = key.split("/")
    return parts[3] if parts[1] == "rounds" else parts[1]
