"""The ledger: every training that has touched a silo's data set, whichever federation asked for it. The silo's own; nobody else reads it.

    <storage of the silo>/ledger/<dataset>/000007.json             the seventh entry; names the digest of the sixth
    <storage of the silo>/ledger/<dataset>/000001-000256.jsonl     a volume: these entries once more, a line each

``<dataset>`` is the name that the silo's steward has given the data (see `policy`), and not a digest of them: one record more or less makes no
other data set. It lies beside the silo's folders for single federations, so that all of them are counted together, or where the policy says.

Entries are created, never overwritten, so that of two who append at once one wins and the other looks again. Each names the one before by
digest, and the silo's key signs it: the last signature vouches for all before it. `Ledger.entries` refuses where one was altered, taken out or put
elsewhere. What it cannot see is that the *last* ones are gone: for that there is `require_told`.

An entry stands before a record is read, so that a training that breaks off counts as done.

So that a long ledger takes few requests, `entries` reads volumes instead of the entries in them; whoever appends puts them there. And of a ledger that
does not lie in the silo's storage the silo keeps a copy there, so that only new entries are fetched. Volumes and copy are held to the same chain and
signature, so that what they say is what was written; the copy's last entry is compared with the store's, so that a ledger that was put back to
an older state is missed. That a single entry was harmed which they made needless to read, only `every_entry` finds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from silotune.components import keys
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.record_keys import highest
from silotune.components.steward.entry import Charge, Entry
from silotune.components.store.local_files import beside, file_errors
from silotune.components.store.object_store import ObjectMissing, ObjectStore, open_store
from silotune.components.terms.security import PublicKey

if TYPE_CHECKING:
    from silotune.components.steward.policy import Policy

FOLDER = "ledger"
COPIES = "ledger-copies"  # in the silo's storage
VOLUME = 256  # entries
READERS = 16  # objects that are fetched at once
DAMAGED = "ledger damaged"


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
        self._lines: list[bytes] = []  # as they stand in the store
        self._volumes: set[int] = set()  # that are known to be there, by their last entry

    @classmethod
    def of(cls, federation: Federation, silo_id: str, policy: Policy | None) -> Ledger:
        """Where a silo's policy says, else in its storage under its id.

        Raises:
            FederationError: this machine has no key of the silo.
        """
        own = keys.own(federation, silo_id)
        former = policy.ledger.keys if policy else []
        trusted = [*own, *federation.public_keys_of(silo_id), *(PublicKey(public=text) for text in former)]
        storage = federation.silo(silo_id).storage
        location = (policy.ledger.at if policy else None) or storage
        dataset = policy.dataset if policy else silo_id
        copies = None if Path(location) == Path(storage) else Path(storage) / COPIES
        return cls(open_store(location, own=True), dataset, lambda message: keys.sign_as(federation, silo_id, message), trusted, copies)

    def beside(self, dataset: str) -> Ledger:
        """That of another data set in the same place."""
        return Ledger(self.store, dataset, self._sign, self._trusted, self._copies)

    def datasets(self) -> list[str]:
        """All that have a ledger in this place."""
        return sorted({key.split("/")[1] for key in self.store.list(f"{FOLDER}/") if key.count("/") == 2})

    def key(self, number: int) -> str:
        return f"{FOLDER}/{self.dataset}/{number:06d}.json"

    def volume_key(self, last: int) -> str:
        """Of the volume that ends with this entry."""
        return f"{FOLDER}/{self.dataset}/{last - VOLUME + 1:06d}-{last:06d}.jsonl"

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return self.store.url(f"{FOLDER}/{self.dataset}")

    def entries(self) -> list[Entry]:
        """All of them, in order, verified.

        Raises:
            RefusedError: one is missing, altered or not where it was written.
        """
        if self._copies and not self._entries:
            self._recall(self._copies / f"{self.dataset}.jsonl")
        known = len(self._entries)
        if known:
            self._require_standing(known)
        if new := self._fetched(known, self._count(known or self._bound())):
            self._take(new)
            self._keep_copy()
        return list(self._entries)

    def every_entry(self) -> list[Entry]:
        """As `entries`, and every object in the store is read and compared, also where a volume or the copy made that needless.

        Raises:
            RefusedError: one is not what it was.
        """
        found, self._volumes = self.entries(), set()
        if self._count() < len(found):
            raise self._damaged(self.key(len(found)), "was there before, and is gone")
        wanted = {self.key(number): line for number, line in enumerate(self._lines, 1)}
        wanted |= {self.volume_key(last): _volume(self._lines[last - VOLUME : last]) for last in self._volumes}
        for key, data in zip(wanted, self._get(wanted), strict=True):
            if data != wanted[key]:
                raise self._damaged(key, "was altered since it was written")
        return found

    def append(self, charge: Charge, at: float) -> Entry | None:
        """Put an entry behind those that `entries` has given; None where somebody was faster.

        Args:
            at: Unix time in seconds. Where the clock has gone back since the last entry, that one's time counts.
        """
        last = self._entries[-1] if self._entries else None
        entry = Entry(
            number=len(self._entries) + 1, previous=_head(self._lines), dataset=self.dataset, charge=charge,
            identity=charge.identity(self.dataset), at=max(at, last.at) if last else at,
        )  # fmt: skip
        key = self.key(entry.number)
        entry = entry.model_copy(update={"signature": self._sign(entry.message(key))})
        if not self.store.create(key, data := entry.encode()):
            return None
        self._entries.append(entry)
        self._lines.append(data)
        for end in range(VOLUME, len(self._lines) + 1, VOLUME):
            if end not in self._volumes:
                self.store.create(self.volume_key(end), _volume(self._lines[end - VOLUME : end]))
                self._volumes.add(end)
        self._keep_copy()
        return entry

    def require_told(self, plan: str, silo_id: str) -> None:
        """Insist on an entry about a round that, as the federation's store shows, the silo has taken part in.

        Raises:
            RefusedError: no ledger in this place has one: its end, or all of it, was lost.
        """
        if self._tells(plan, silo_id) or any(self.beside(name)._tells(plan, silo_id) for name in self.datasets() if name != self.dataset):
            return
        raise RefusedError(
            f"{self.store}: the ledger of {self.dataset!r} does not tell of a round that silo {silo_id!r} has trained in (plan {plan[:12]}…), so that "
            "what was spent is not known; restore it from a backup, or say in the policy from which day on it is whole (ledger.since)",
            DAMAGED,
        )

    def _tells(self, plan: str, silo_id: str) -> bool:
        return any(e.charge.plan == plan and e.charge.silo == silo_id for e in self.entries())

    def _count(self, known: int = 0) -> int:
        """How many entries there are, of which so many are known and not looked for; learns of the volumes."""
        keys = self.store.list(f"{FOLDER}/{self.dataset}/", self.key(known) if known else "")
        names = {key.rsplit("/", 1)[1] for key in keys}
        numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"(\d{6,})\.json", name)))
        for expected, number in enumerate(numbers, known + 1):
            if number != expected:
                raise self._damaged(self.key(expected), "is missing, and later ones are there")
        count = known + len(numbers)
        ends = (int(found[1]) for name in names if (found := re.fullmatch(r"\d{6,}-(\d{6,})\.jsonl", name)))
        bound = {end for end in ends if end % VOLUME == 0 and self.volume_key(end).rsplit("/", 1)[1] in names}
        if max(bound, default=0) > count:
            raise self._damaged(self.key(count + 1), "is missing, and a volume that holds it is there")
        self._volumes |= bound
        return count

    def _bound(self) -> int:
        """How many entries stand in volumes, by look-ups, since to list a long ledger takes longer than to read it; learns of the volumes."""
        many = highest(lambda number: self.store.size(self.volume_key(number * VOLUME)) is not None)
        ends = range(VOLUME, many * VOLUME + 1, VOLUME)
        with ThreadPoolExecutor(READERS) as pool:
            sizes = pool.map(self.store.size, map(self.volume_key, ends))
        self._volumes = {end for end, size in zip(ends, sizes, strict=True) if size is not None}
        return many * VOLUME

    def _require_standing(self, number: int) -> None:
        """The last known entry is in the store as it is known, so that this is no older state of it, and no other history."""
        key, see = self.key(number), f" (see {self._copies / self.dataset}.jsonl)" if self._copies else ""
        try:
            if self.store.get(key) != self._lines[number - 1]:
                raise self._damaged(key, f"is not what it was when this machine last read it{see}")
        except ObjectMissing:
            raise self._damaged(key, f"was there before, and is gone{see}") from None

    def _fetched(self, known: int, count: int) -> list[bytes]:
        """The entries behind those that are known, as they stand in the store."""
        asked: dict[str, int] = {}  # key -> entries in it
        while known < count:
            end = known + VOLUME
            whole = known % VOLUME == 0 and end in self._volumes
            asked[self.volume_key(end) if whole else self.key(known + 1)] = VOLUME if whole else 1
            known = end if whole else known + 1
        found: list[bytes] = []
        for key, data in zip(asked, self._get(asked), strict=True):
            lines = data.splitlines() if asked[key] > 1 else [data]
            if len(lines) != asked[key]:
                raise self._damaged(key, f"must hold {asked[key]} entries, has {len(lines)}")
            found += lines
        return found

    def _get(self, wanted: Iterable[str]) -> list[bytes]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.store.get, wanted))

    def _take(self, further: Sequence[bytes]) -> None:
        """Verify entries that go on from those that are known, and know them.

        The digests of what is read, and the last signature, vouch for every byte, so that nothing else of the entries before is compared.
        """
        entries, lines = list(self._entries), list(self._lines)
        for data in further:
            entries.append(self._linked(self.key(len(entries) + 1), data, entries[-1] if entries else None, _head(lines)))
            lines.append(data)
        if further:
            key, last = self.key(len(entries)), entries[-1]
            if last.encode() != lines[-1] or last.identity != last.charge.identity(self.dataset):
                raise self._damaged(key, "contradicts itself")
            self._require_signed(last, key)
        self._entries, self._lines = entries, lines

    def _recall(self, copy: Path) -> None:
        """Know what a copy holds; one that is not whole is no loss."""
        try:
            self._take(copy.read_bytes().splitlines())
            self._volumes = set(range(VOLUME, len(self._lines) + 1, VOLUME))  # their writers have put them there
        except FileNotFoundError:
            return
        except RefusedError:
            copy.unlink()

    def _keep_copy(self) -> None:
        if self._copies:
            with file_errors(str(self._copies)), beside(self._copies / f"{self.dataset}.jsonl") as copy:
                copy.write_bytes(_volume(self._lines))

    def _linked(self, key: str, data: bytes, last: Entry | None, head: str | None) -> Entry:
        """An entry that goes on from the last one, of digest ``head``."""
        try:
            entry = Entry.model_validate_json(data)
        except ValidationError:
            raise self._damaged(key, "is no entry") from None
        if self.key(entry.number) != key or entry.dataset != self.dataset:
            raise self._damaged(key, f"is entry {entry.number} of {entry.dataset!r}, and was not written here")
        if entry.previous != head:
            raise self._damaged(key, "does not go on from the entry before it, which was altered or belongs elsewhere")
        if last and entry.at < last.at:
            raise self._damaged(key, "contradicts itself")
        return entry

    def _require_signed(self, entry: Entry, key: str) -> None:
        if not entry.signature or not keys.verify(self._trusted, None, entry.message(key), entry.signature):
            raise self._damaged(key, "does not bear a signature of the silo's key (former ones stand in the policy under ledger.keys)")

    def _damaged(self, key: str, what: str) -> RefusedError:
        return RefusedError(f"{self.store}: {key} {what}; nothing is trained until the ledger is restored from a backup", DAMAGED)


def _volume(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _head(lines: Sequence[bytes]) -> str | None:
    """Digest of the last one."""
    return hashlib.sha256(lines[-1]).hexdigest() if lines else None
