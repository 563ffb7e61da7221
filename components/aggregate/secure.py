"""The secure sum's last part, at the coordinator: from the shares that silos tell, the masks that have not cancelled; without these, the sum.

Of a survivor only its seed is recovered, of a silo that has dropped out only its key, and nobody's vector is ever seen alone without its masks:
vectors are added first, and the masks taken from their sum. Who tells a share that is not the one it was given is known by the mark that the
share's maker has signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.errors import QuorumError, RefusedError
from silotune.components.federation import Agreement
from silotune.components.process.progress import tell
from silotune.components.protocol import Contribution, Plan
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.records import (
    MaskedVector,
    MaskKeys,
    Opening,
    SealedShares,
    SecureRound,
    Survivors,
    mark,
)
from silotune.components.store.content import CorruptObject
from silotune.components.store.store_blob import StoreBlob

if TYPE_CHECKING:
    from silotune.components.learning.privacy.masked_vector import VectorDamaged
    from silotune.components.learning.privacy.masking import Mask

SUM = "sum.safetensors"


@dataclass(frozen=True)
class SecureSum:
    """A sum that was opened."""

    path: Path  # tensor file: the weighted sum of the clipped updates
    records: dict[str, MaskedVector]
    weights: dict[str, float]  # what each update was multiplied by

    def contributions(self, plan: Plan, agreement: Agreement) -> dict[str, Contribution]:
        """The silos' parts, by numbers that follow from the terms: nothing else is known of any one of them."""
        total = sum(self.weights.values())
        found = {}
        for silo, record in sorted(self.records.items()):
            examples = secure_terms.examples(agreement, silo)
            found[silo] = Contribution(
                manifest=record.digest, object=record.object, bytes=record.bytes, weight=self.weights[silo] / total, examples=examples,
                tokens=examples, steps=agreement.training_of(silo).steps, cursor=record.cursor, norm=None,
            )  # fmt: skip
        return found


def secure_sum(rounds: Rounds, plan: Plan, agreement: Agreement, survivors: Survivors, folder: Path) -> SecureSum:
    """Open the sum of a round's survivors, into a file of the folder.

    Raises:
        QuorumError: too few silos have told their shares so far.
        RefusedError: a record was altered; a silo has dealt shares that are not of one secret; a vector is damaged, which is deleted then, so
            that its silo sends it again; the sum is larger than clipped updates can make it.
        ObjectMissing: a vector is gone.
    """
    from silotune.components.learning.privacy.masked_vector import Vector, VectorDamaged, write_sum

    secure = SecureRound(rounds, plan.round, survivors.attempt, plan.digest)
    records = secure.named(MaskedVector, survivors.members)
    schema = rounds.json_object(plan.participants[min(records)].tensors)
    size = secure_terms.vector_bytes(agreement, schema)
    vectors = [Vector(s, StoreBlob(rounds.store, rounds.object_key(r.object, s), size), r.object) for s, r in sorted(records.items())]
    point, path = secure_terms.fixed_point(agreement, schema), folder / SUM
    try:
        norm = write_sum(path, vectors, _masks(secure, agreement, survivors), point, schema)
    except VectorDamaged as error:
        _require_whole(rounds, plan, error, records[error.silo], folder)
        norm = write_sum(path, vectors, _masks(secure, agreement, survivors), point, schema)  # it was damaged on the way only
    weights = {silo: secure_terms.weight(agreement, silo) for silo in sorted(records)}
    most = point.most(sum(weights.values()), len(weights), secure_terms.size_of(schema))
    if not norm <= most:
        raise RefusedError(
            f"round {plan.round} stays open: its sum has a norm of {norm:.4g}, clipped updates add up to {most:.4g} at most; a silo has sent other "
            "numbers than its update's, and nobody can see which: take out whom you suspect, which ends the round without a result",
            "guard",
        )
    return SecureSum(path, records, weights)


def _require_whole(rounds: Rounds, plan: Plan, error: VectorDamaged, record: MaskedVector, folder: Path) -> None:
    """Raises RefusedError where a vector is damaged in the store; it is deleted then, because what is there is not written."""
    try:
        rounds.fetch_object(record.object, folder / "vector", error.silo).unlink()
    except CorruptObject:
        rounds.store.delete(rounds.object_key(record.object, error.silo))
        raise RefusedError(f"round {plan.round} stays open: {error}", error.reason) from None


def _masks(secure: SecureRound, agreement: Agreement, survivors: Survivors) -> list[Mask]:
    """What takes from the sum the masks that have not cancelled."""
    from silotune.components.learning.privacy.agreed_keys import public_key
    from silotune.components.learning.privacy.masking import pair_mask, self_mask

    first, roster = secure.roster("share"), secure.roster("mask")
    if first is None or roster is None or roster.digest != survivors.roster:
        gone = secure.roster_key("share" if first is None else "mask")
        raise RefusedError(f"{gone}: is gone, or is not the one that the survivors name; restore it from a backup", "record gone")
    keys = secure.named(MaskKeys, {silo: first.members[silo] for silo in roster.members})
    dealt = secure.named(SealedShares, roster.members)
    openings = _openings(secure, agreement, survivors, dealt)
    masks, places = [], secure_terms.places(agreement)
    for silo in sorted(survivors.members):
        told = {places[holder]: bytes.fromhex(o.seeds[silo]) for holder, o in openings.items()}
        seed = _joined(silo, told)
        if mark(seed) != dealt[silo].seed:
            raise _not_of_one_secret(silo)
        masks.append(self_mask(seed, secure.context, remove=True))
    for silo in sorted(roster.members.keys() - survivors.members.keys()):
        told = {places[holder]: bytes.fromhex(o.keys[silo]) for holder, o in openings.items()}
        key = _joined(silo, told)
        if public_key(key).hex() != keys[silo].masking:
            raise _not_of_one_secret(silo)
        for other in sorted(survivors.members):
            masks.append(pair_mask(other, silo, key, bytes.fromhex(keys[other].masking), secure.context, remove=True))
    return masks


def _openings(secure: SecureRound, agreement: Agreement, survivors: Survivors, dealt: Mapping[str, SealedShares]) -> dict[str, Opening]:
    """As many as it takes, by holder. Raises QuorumError where there are fewer."""
    found, bad = secure.believed(Opening, dealt)
    for holder, why in bad.items():
        tell("aggregate", "warned", holder, detail=why)
    dropped = dealt.keys() - survivors.members.keys()
    sound = {}
    for holder, o in found.items():
        kinds = (("seed", o.seeds, survivors.members.keys()), ("key", o.keys, dropped))
        if o.survivors == survivors.digest and all(
            told.keys() == silos
            and all(_is_hex(told[s]) and mark(bytes.fromhex(told[s])) == getattr(dealt[s].shares[holder], kind) for s in silos)
            for kind, told, silos in kinds
        ):
            sound[holder] = o
        else:
            tell("aggregate", "warned", holder, detail="it tells other shares than it was given, and is passed over")
    needed = secure_terms.threshold(agreement)
    if len(sound) < needed:
        agreeing = secure.confirmed(survivors, dealt)
        what, did = ("tell their shares", sound.keys()) if len(agreeing) >= needed else ("confirm the survivors", set(agreeing))
        silent = ", ".join(sorted(dealt.keys() - did))
        raise QuorumError(
            f"round {secure.number} stays open: {needed} silos must {what}, {len(did)} did; waiting for {silent}; run again to ask "
            "them, nothing is trained anew",
            "secure sum not opened",
        )
    return {holder: sound[holder] for holder in sorted(sound)[:needed]}


def _joined(silo: str, shares: Mapping[int, bytes]) -> bytes:
    from silotune.components.learning.privacy.shamir import join

    try:
        return join(shares)
    except ValueError:
        raise _not_of_one_secret(silo) from None


def _not_of_one_secret(silo: str) -> RefusedError:
    return RefusedError(
        f"silo {silo!r}: it has dealt shares that are not of one secret, so that the round's sum cannot be opened; take it out of the federation, "
        "which ends the round without a result",
        "bad shares",
    )


def _is_hex(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) > 0
    except ValueError:
        return False
