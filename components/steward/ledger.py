"""The ledger: every training that has touched a silo's data set, whichever federation asked for it. The silo's own; nobody else reads it.

    <storage of the silo>/ledger/<dataset>/000007.json     the seventh entry; names the digest of the sixth

``<dataset>`` is the name that the silo's steward has given the data (see `policy`), and not a digest of them: one record more or less makes no
other data set. It lies beside the silo's folders for single federations, so that all of them are counted together, or where the policy says.

Entries are created, never overwritten, so that of two who append at once one wins and the other looks again. Each names the one before by
digest, and the silo's key signs it: the last signature vouches for all before it. `Ledger.entries` reads all of them and refuses where one was
altered, taken out or put elsewhere. What it cannot see is that the *last* ones are gone: for that there is `require_told`.

An entry stands before a record is read, so that a training that breaks off counts as done.

Of a ledger in a bucket the silo keeps a copy in its storage, a line an entry, so that only new ones are fetched. The copy is held to the same rules, and
its last entry to the bucket's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from silotune.components import keys
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation, PublicKey, canonical_json
from silotune.components.federation_file import is_remote
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.protocol import Record
from silotune.components.store.local_files import beside, file_errors
from silotune.components.store.object_store import ObjectMissing, ObjectStore, open_store
from silotune.components.terms.section import Section

if TYPE_CHECKING:
    from silotune.components.steward.policy import Policy

FOLDER = "ledger"
READERS = 16  # entries that are fetched at once
DAMAGED = "ledger damaged"


class Charge(Section):
    """What a training is about to do to a data set."""

    federation: str
    agreement: str = Field(description="Digest of the terms.")
    plan: str = Field(description="Digest of the round's plan.")
    round: int = Field(ge=1)
    silo: str = Field(description="The silo's id in that federation.")
    content: str = Field(description="Digest of the train split.")
    mechanism: Mechanism | None = Field(
        None, description="What it costs; none: a training without differential privacy, which nothing bounds."
    )
    unit: Literal["record", "person"] = Field("record", description="Whose traces the mechanism bounds.")
    delta: float | None = Field(None, description="The delta of the federation's promise.")
    noise: str = Field("", description="Which secret the noise is from, by a digest that does not tell it.")

    def identity(self, dataset: str) -> str:
        """The same for every try at the same training, which gives the same update; another one where anything that it depends on has changed."""
        facts = self.model_dump(include={"plan", "silo", "content", "mechanism", "noise"})
        return hashlib.sha256(canonical_json([dataset, facts])).hexdigest()


class Entry(Record):
    """One training."""

    number: int = Field(ge=1)
    previous: str | None = Field(description="Digest of the entry before.")
    dataset: str
    identity: str = Field(description="The same for every try at this training.")
    charge: Charge
    at: float = Field(description="Unix time in seconds; never before that of the entry before.")


class Ledger:
    """One data set's entries in one store."""

    def __init__(
        self, store: ObjectStore, dataset: str, sign: Callable[[bytes], str], trusted: Iterable[PublicKey], copies: Path | None = None
    ) -> None:  # fmt: skip
        self.store = store
        self.dataset = dataset
        self._copies = copies  # folder of copies on this machine
        self._sign = sign
        self._trusted = list(trusted)
        self._entries: list[Entry] = []  # that have been read and verified
        self._head: str | None = None  # digest of the last of them

    @classmethod
    def of(cls, federation: Federation, silo_id: str, policy: Policy | None) -> Ledger:
        """Where a silo's policy says, else in its storage under its id.

        Raises:
            FederationError: this machine has no key of the silo.
        """
        own = keys.own(federation, silo_id)
        former = policy.ledger.keys if policy else []
        trusted = [*own, *federation.public_keys.get(silo_id, []), *(PublicKey(public=text) for text in former)]
        location = (policy.ledger.at if policy else None) or federation.silo(silo_id).storage
        dataset = policy.dataset if policy else silo_id
        copies = Path(federation.silo(silo_id).storage) / "ledger-copies" if is_remote(location) else None
        return cls(open_store(location), dataset, lambda message: keys.sign_as(federation, silo_id, message), trusted, copies)

    def beside(self, dataset: str) -> Ledger:
        """That of another data set in the same place."""
        return Ledger(self.store, dataset, self._sign, self._trusted, self._copies)

    def datasets(self) -> list[str]:
        """All that have a ledger in this place."""
        return sorted({key.split("/")[1] for key in self.store.list(f"{FOLDER}/") if key.count("/") == 2})

    def key(self, number: int) -> str:
        return f"{FOLDER}/{self.dataset}/{number:06d}.json"

    def entries(self) -> list[Entry]:
        """All of them, in order, verified.

        Raises:
            RefusedError: one is missing, altered or not where it was written.
        """
        count = self._count()
        if self._copies and not self._entries:
            self._recall(self._copies / f"{self.dataset}.jsonl")
        if count < len(self._entries):
            raise self._damaged(self.key(len(self._entries)), "was there before, and is gone")
        new = [self.key(number) for number in range(len(self._entries) + 1, count + 1)]
        with ThreadPoolExecutor(READERS) as pool:
            self._take(list(pool.map(self.store.get, new)))
        if self._copies and new:
            with file_errors(str(self._copies)), beside(self._copies / f"{self.dataset}.jsonl") as copy:
                copy.write_bytes(b"".join(entry.encode() + b"\n" for entry in self._entries))
        return list(self._entries)

    def _take(self, further: Sequence[bytes]) -> None:
        """Verify entries that go on from those that are known, and know them."""
        found, head = list(self._entries), self._head
        for data in further:
            found.append(self._linked(self.key(len(found) + 1), data, found[-1] if found else None, head))
            head = hashlib.sha256(data).hexdigest()
        if further:
            self._require_signed(found[-1], self.key(len(found)))
        self._entries, self._head = found, head

    def _recall(self, copy: Path) -> None:
        """Know what a copy holds; one that is not whole is no loss, one that the store contradicts is a history that was written twice."""
        try:
            lines = copy.read_bytes().splitlines()
            self._take(lines)
        except FileNotFoundError:
            return
        except RefusedError:
            copy.unlink()
            return
        with suppress(ObjectMissing):  # told by the count
            if lines and self.store.get(self.key(len(lines))) != lines[-1]:
                self._entries, self._head = [], None
                raise self._damaged(self.key(len(lines)), f"is not what it was when this machine last read it (see {copy})")

    def append(self, charge: Charge, at: float) -> Entry | None:
        """Put an entry behind those that `entries` has given; None where somebody was faster.

        Args:
            at: Unix time in seconds. Where the clock has gone back since the last entry, that one's time counts.
        """
        last = self._entries[-1] if self._entries else None
        entry = Entry(
            number=len(self._entries) + 1, previous=self._head, dataset=self.dataset, charge=charge,
            identity=charge.identity(self.dataset), at=max(at, last.at) if last else at,
        )  # fmt: skip
        key = self.key(entry.number)
        entry = entry.model_copy(update={"signature": self._sign(entry.message(key))})
        if not self.store.create(key, entry.encode()):
            return None
        self._entries.append(entry)
        self._head = entry.digest
        return entry

    def require_told(self, plan: str, silo_id: str) -> None:
        """Insist on an entry about a round that, as the federation's store shows, the silo has taken part in.

        Raises:
            RefusedError: no ledger in this place has one: its end, or all of it, was lost.
        """
        for dataset in dict.fromkeys([self.dataset, *self.datasets()]):
            ledger = self if dataset == self.dataset else self.beside(dataset)
            if any(e.charge.plan == plan and e.charge.silo == silo_id for e in ledger.entries()):
                return
        raise RefusedError(
            f"{self.store}: the ledger of {self.dataset!r} does not tell of a round that silo {silo_id!r} has trained in (plan {plan[:12]}…), so that "
            "what was spent is not known; restore it from a backup, or say in the policy from which day on it is whole (ledger.since)",
            DAMAGED,
        )

    def _count(self) -> int:
        names = (key.rsplit("/", 1)[1] for key in self.store.list(f"{FOLDER}/{self.dataset}/"))
        numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"(\d{6,})\.json", name)))
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                raise self._damaged(self.key(expected), "is missing, and later ones are there")
        return len(numbers)

    def _linked(self, key: str, data: bytes, last: Entry | None, head: str | None) -> Entry:
        """An entry that goes on from the last one, of digest ``head``."""
        try:
            entry = Entry.decode(data, key)
        except RefusedError:
            raise self._damaged(key, "is no entry") from None
        if self.key(entry.number) != key or entry.dataset != self.dataset:
            raise self._damaged(key, f"is entry {entry.number} of {entry.dataset!r}, and was not written here")
        if entry.previous != head:
            raise self._damaged(key, "does not go on from the entry before it, which was altered or belongs elsewhere")
        if entry.identity != entry.charge.identity(self.dataset) or (last and entry.at < last.at):
            raise self._damaged(key, "contradicts itself")
        return entry

    def _require_signed(self, entry: Entry, key: str) -> None:
        if not entry.signature or not keys.verify(self._trusted, None, entry.message(key), entry.signature):
            raise self._damaged(key, "does not bear a signature of the silo's key (former ones stand in the policy under ledger.keys)")

    def _damaged(self, key: str, what: str) -> RefusedError:
        return RefusedError(f"{self.store}: {key} {what}; nothing is trained until the ledger is restored from a backup", DAMAGED)


def last_of(entries: Sequence[Entry], federation: str) -> Entry | None:
    """The newest about one federation."""
    return next((e for e in reversed(entries) if e.charge.federation == federation), None)
