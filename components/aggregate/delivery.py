"""A silo's delivery: its update, read from the store in ranges, and what is done where a range is not what it should be.

No copy of an update is made as long as all is well: its header, then its tensors as the mean asks for them, each with a digest of its own.
Only where something is wrong is the whole object fetched, because only the digest of all of it tells whose fault that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from silotune.components.federation import Agreement
from silotune.components.keys import verify
from silotune.components.learning.blob import FileBlob
from silotune.components.learning.update import Expectation, Update, UpdateRefused, open_update
from silotune.components.protocol import Plan
from silotune.components.rounds import Rounds
from silotune.components.store.object_store import ObjectMissing
from silotune.components.store.store_blob import StoreBlob
from silotune.components.terms.security import PublicKey


def expectation(rounds: Rounds, plan: Plan, agreement: Agreement, silo: str) -> Expectation:
    """What a silo's update must be to answer a plan."""
    return expectations(rounds, plan, agreement, [silo])[silo]


def expectations(rounds: Rounds, plan: Plan, agreement: Agreement, silos: Iterable[str]) -> dict[str, Expectation]:
    """The same of several silos. A plan is as long as its silos are many, and is digested once for all of them."""
    digest, number, found = plan.digest, plan.round, {}

    def verifier(keys: list[PublicKey]) -> Callable[[bytes, str], bool]:
        return lambda message, signature: verify(keys, number, message, signature)

    for silo in silos:
        participant, terms = plan.participants[silo], agreement.training_of(silo)
        examples = agreement.examples_of(silo)
        found[silo] = Expectation(
            federation=rounds.federation, agreement=plan.agreement, plan=digest, base=plan.base, accepted=tuple(plan.accepted), silo=silo,
            cursor=participant.cursor, codec=agreement.communication.codec, schema=rounds.schema(participant.tensors),
            most_steps=terms.steps, most_examples=examples, most_tokens=examples * agreement.data["max_length"],
            verify=None if agreement.custody == "none" else verifier(agreement.keys.get(silo, [])),
        )  # fmt: skip
    return found


def open_delivery(rounds: Rounds, expected: Expectation, digest: str, folder: Path, header: str = "") -> Update:
    """An update that is accepted by its header, and whose tensors are still in the store.

    Args:
        digest: of the object.
        folder: where a whole copy may be put, if it comes to that.
        header: what the silo's manifest says is the digest of the file's header; "" where that need not be compared.

    Raises:
        CorruptObject: the store has damaged it.
        UpdateRefused: the silo has sent what must be refused.
        ObjectMissing: it is gone.
    """
    blob = rounds.object_blob(digest, expected.silo)
    if blob.size > expected.most_bytes:
        rule = f"its object is larger than the {expected.most_bytes} bytes that its tensors can take"
        raise UpdateRefused(expected.silo, rule, "send the plan's tensors only")
    try:
        update = open_update(blob, expected)
        if header in ("", update.file.header_digest):
            return update
    except UpdateRefused:
        pass  # the bytes need not be the silo's
    return _whole(rounds, expected, digest, folder, header)


def fetch_whole(
    rounds: Rounds, expected: Expectation, digest: str, folder: Path, update: Update, error: UpdateRefused | ObjectMissing
) -> Update:
    """The update from a whole copy of it, after reading it in ranges has ended in an error.

    Raises:
        CorruptObject, UpdateRefused, ObjectMissing: as `open_delivery`; the error itself where the update is a whole copy already.
    """
    if isinstance(update.file.blob, FileBlob):
        raise error
    return _whole(rounds, expected, digest, folder, update.file.header_digest)


def silo_of(error: UpdateRefused | ObjectMissing, updates: Mapping[str, Update]) -> str:
    """Whose update it was. Raises the error where it was nobody's."""
    if isinstance(error, UpdateRefused):
        return error.silo
    silo = next((s for s, u in updates.items() if isinstance(u.file.blob, StoreBlob) and u.file.blob.key == error.key), None)
    if silo is None:
        raise error
    return silo


def _whole(rounds: Rounds, expected: Expectation, digest: str, folder: Path, header: str) -> Update:
    """Every byte verified. A range can have been damaged on the way: then the copy is sound. The store can have damaged the object: then it does
    not have its digest, and the silo can send it again. Where it has, the silo has sent what must be refused."""
    path = rounds.fetch_object(digest, folder / f"update-{expected.silo}.safetensors", expected.silo)
    try:
        update = open_update(path, expected)
        if header not in ("", update.file.header_digest):
            raise UpdateRefused(expected.silo, "its header is not the one that its manifest names", "send the update again")
        update.verify()
    except UpdateRefused:
        path.unlink()
        raise
    return update
