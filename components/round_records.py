"""The records of a federation, and the objects they name, as they are found and read. Nothing is written here.

Records are signed by whom they are of (see `keys`), and none is believed before its signature is verified. In a federation that says
``signing: off``, none is signed. Where they lie is `record_keys`; what makes a round of them is `rounds`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.keys import Keyring, verify
from silotune.components.protocol import (
    Attempt,
    Commit,
    Evaluation,
    Exported,
    Exposed,
    OfSilo,
    Partial,
    Plan,
    Record,
    Refusal,
    Release,
    Report,
    TrackingRun,
    UpdateManifest,
)  # fmt: skip
from silotune.components.record_keys import filed_under, highest, name_of, nth, round_key, slot_of
from silotune.components.store import content
from silotune.components.store.object_store import ObjectMissing, ObjectStore, open_store
from silotune.components.store.store_blob import StoreBlob

READERS = 8  # records asked for at once, where there are many: a far store's answers take their time

R = TypeVar("R", bound=Record)


class RoundRecords:
    """What one federation has in one store, as far as it can be believed: verified against the keys of the federation file."""

    def __init__(self, store: ObjectStore, federation: str, keyring: Keyring | None = None) -> None:
        self.store = store
        self.federation = federation
        self.keyring = keyring
        self.refused: dict[str, str] = {}  # key -> why a record there was passed over
        self._commits: dict[int, Commit] = {}  # a commit never changes
        self._evaluations: dict[str, Evaluation] = {}  # by key; nor does a score
        self._schemas: dict[str, dict[str, list[int]]] = {}  # by digest
        self._agreements: dict[str, Agreement] = {}  # by digest; named by a record that the coordinator has signed

    @classmethod
    def of(cls, federation: Federation) -> Self:
        keyring = Keyring(federation) if federation.security.signing else None
        return cls(open_store(federation.storage.root, kms_key=federation.storage.kms_key), federation.name, keyring)

    # Keys

    def key(self, *parts: str) -> str:
        return "/".join((self.federation, *parts))

    def _round(self, number: int, *parts: str) -> str:
        return round_key(self.federation, number, *parts)

    def object_key(self, digest: str, silo: str | None = None) -> str:
        """Where a global lies, or the update file of a silo."""
        return self.key("contributions", silo, digest) if silo else self.key("objects", digest)

    def partial_key(self, digest: str) -> str:
        """Where the sum of a group lies: not among the objects, which silos may read, since from a small group's sum one learns of its members."""
        return self.key("partials", digest)

    # Agreements and objects, by content

    def agreement(self, digest: str) -> Agreement:
        if digest in self._agreements:
            return self._agreements[digest]
        key = self.key("agreements", f"{digest}.json")
        data = self.store.get(key)
        if hashlib.sha256(data).hexdigest() != digest:
            raise RefusedError(f"{key}: its bytes do not have the digest in its name; restore the object from a backup")
        self._agreements[digest] = agreement = Agreement.decode(data)
        return agreement

    def fetch_object(self, digest: str, path: Path, silo: str | None = None) -> Path:
        """Copy an object to ``path``. Raises CorruptObject and ObjectMissing."""
        return content.fetch(self.store, self.object_key(digest, silo), digest, path)

    def object_blob(self, digest: str, silo: str | None = None) -> StoreBlob:
        """An object that is to be read in ranges, of which nobody has compared the digest yet. Raises ObjectMissing."""
        return StoreBlob(self.store, self.object_key(digest, silo), self.object_size(digest, silo))

    def object_size(self, digest: str, silo: str | None = None) -> int:
        size = self.store.size(self.object_key(digest, silo))
        if size is None:
            raise ObjectMissing(self.object_key(digest, silo))
        return size

    def tensor_shapes(self, digest: str) -> dict[str, list[int]]:
        """Names and shapes of a safetensors object. Raises CorruptObject and ObjectMissing."""
        return content.fetch_shapes(self.store, self.object_key(digest), digest)

    def json_object(self, digest: str) -> Any:
        """Raises CorruptObject and ObjectMissing."""
        return content.fetch_json(self.store, self.object_key(digest), digest)

    def schema(self, digest: str) -> dict[str, list[int]]:
        """As `json_object`, of an object that lists tensors, name -> shape. Most silos of a plan share one, so that it is read once."""
        if digest not in self._schemas:
            self._schemas[digest] = self.json_object(digest)
        return self._schemas[digest]

    def partial_blob(self, digest: str) -> StoreBlob:
        """As `object_blob`, of a sum. Raises ObjectMissing."""
        key = self.partial_key(digest)
        if (size := self.store.size(key)) is None:
            raise ObjectMissing(key)
        return StoreBlob(self.store, key, size)

    # Rounds

    def latest(self) -> Commit | None:
        """The highest commit, found in O(log rounds) look-ups; None before the federation is initialised."""
        if not self._committed(0):
            return None
        return self.commit(highest(self._committed))

    def _committed(self, number: int) -> bool:
        return number in self._commits or self.store.size(self._round(number, "commit.json")) is not None

    def commit(self, number: int) -> Commit:
        if number not in self._commits:
            self._commits[number] = self.read(Commit, self._round(number, "commit.json"))
        return self._commits[number]

    def commits(self) -> Iterator[Commit]:
        """All commits from round 0 on."""
        latest = self.latest()
        for number in range(latest.round + 1 if latest else 0):
            yield self.commit(number)

    def plan(self, number: int) -> Plan | None:
        try:
            return self.read(Plan, self._round(number, "plan.json"))
        except ObjectMissing:
            return None

    def attempts(self, number: int) -> list[Attempt]:
        keys = self.store.list(self._round(number, "attempts") + "/")
        return sorted((self.read(Attempt, k) for k in keys), key=lambda a: a.attempt)

    def attempt(self, number: int, attempt: int) -> Attempt:
        return self.read(Attempt, self._round(number, "attempts", f"{attempt}.json"))

    def reports(self, number: int, attempt: int, among: Collection[str] | None = None) -> dict[str, Report]:
        """By silo.

        Args:
            among: silos whose reports are wanted; default: all.
        """
        keys = self.store.list(self._round(number, "reports", str(attempt)) + "/")
        wanted = (key for key in keys if among is None or name_of(key) in among)
        return {r.silo: r for r in self._believed(Report, wanted)}

    def _slot(self, number: int, silo: str) -> str:
        """Name of a silo's present manifest: its id, and from the second one on a number. By look-ups only: a silo may not list."""
        return slot_of(silo, lambda slot: self.store.size(self._round(number, "refusals", f"{slot}.json")) is not None)

    def update(self, number: int, silo: str) -> UpdateManifest | None:
        """A silo's update to a round, unless it was refused. Raises RefusedError where it is not the silo's."""
        try:
            return self.read(UpdateManifest, self._round(number, "updates", f"{self._slot(number, silo)}.json"))
        except ObjectMissing:
            return None

    def updates(self, number: int) -> tuple[dict[str, UpdateManifest], dict[str, str]]:
        """By silo: the manifests that stand, and why others cannot be believed. By listing, as only the coordinator may."""
        delivered = sorted({name_of(key) for key in self.store.list(self._round(number, "updates") + "/")})
        refused = {key.rsplit("/", 1)[1] for key in self.store.list(self._round(number, "refusals") + "/")}
        slots = {silo: slot_of(silo, lambda slot: f"{slot}.json" in refused) for silo in delivered}
        keys = [self._round(number, "updates", f"{slots[silo]}.json") for silo in delivered]
        manifests, bad = {}, {}
        for silo, found in zip(delivered, self._found(UpdateManifest, keys), strict=True):
            if isinstance(found, UpdateManifest):
                manifests[silo] = found
            elif isinstance(found, RefusedError):
                bad[silo] = str(found)
        return manifests, bad

    def refusal(self, number: int, silo: str) -> Refusal | None:
        """Why a silo's last update was refused, if it was."""
        count, found = 1, None
        while True:
            try:
                found = self.read(Refusal, self._round(number, "refusals", f"{nth(silo, count)}.json"))
            except ObjectMissing:
                return found
            count += 1

    def partial(self, number: int, attempt: int, group: int) -> Partial | None:
        """Raises RefusedError where the record cannot be believed, or is of another group or attempt."""
        key = self._round(number, "partials", str(attempt), f"{group}.json")
        try:
            found = self.read(Partial, key)
        except ObjectMissing:
            return None
        if (found.attempt, found.group) != (attempt, group):
            raise RefusedError(f"{key}: says that it is of group {found.group} in attempt {found.attempt}", "filed elsewhere")
        return found

    # Silo-level privacy: what has been published

    def releases(self) -> Iterator[Release]:
        """All of them, in order.

        Raises:
            RefusedError: one is missing or not what it says; what has been spent would be unknown.
        """
        for number, key in enumerate(sorted(self.store.list(self.key("releases") + "/")), 1):
            release = self.read(Release, key)
            if release.number != number or key != self.key("releases", f"{number:05d}.json"):
                raise RefusedError(f"{key}: must be release {number} of the federation; one is missing, restore it from a backup")
            yield release

    # Evaluations, exports, tracking

    def evaluation(self, outgoing: str, silo: str, split: str, split_digest: str) -> Evaluation | None:
        try:
            return self.read(Evaluation, self.key("evaluations", outgoing, silo, f"{split}-{split_digest[:16]}.json"))
        except ObjectMissing:
            return None

    def evaluations(self, outgoing: str, split: str) -> dict[str, Evaluation]:
        """By silo; where a silo's split has changed since, the newest record. None can be older than the global that it scores."""
        newest: dict[str, Evaluation] = {}
        made = next((c.round for c in self.commits() if c.outgoing == outgoing), 0)
        every = self.store.list(self.key("evaluations", outgoing) + "/")
        keys = [key for key in every if key.rsplit("/", 1)[1].startswith(f"{split}-")]
        unread = [key for key in keys if key not in self._evaluations]
        for key, read in zip(unread, self._found(Evaluation, unread), strict=True):
            if isinstance(read, Evaluation):
                self._evaluations[key] = read
            else:
                self._pass_over(key, read)
        for key in keys:
            if (found := self._evaluations.get(key)) is None:
                continue
            if found.round < made:
                self.refused[key] = f"{key}: says it is of round {found.round}, when this global was not made yet"
            elif found.silo not in newest or newest[found.silo].at < found.at:
                newest[found.silo] = found
        return newest

    def exposed(self, outgoing: str) -> dict[str, Exposed]:
        """By silo; where a silo has planted anew since, the newest record."""
        newest: dict[str, Exposed] = {}
        keys = (k for k in self.store.list(self.key("evaluations", outgoing) + "/") if k.rsplit("/", 1)[1].startswith("exposure-"))
        for found in self._believed(Exposed, keys):
            if found.outgoing == outgoing and (found.silo not in newest or newest[found.silo].at < found.at):
                newest[found.silo] = found
        return newest

    def export(self, commit: str) -> Exported | None:
        try:
            return self.read(Exported, self.key("exports", f"{commit}.json"))
        except ObjectMissing:
            return None

    def exports(self) -> Iterator[Exported]:
        """All exports of this federation."""
        keys = (k for k in self.store.list(self.key("exports") + "/") if k.count("/") == 2 and k.endswith(".json"))
        return self._believed(Exported, keys)

    def tracking_run(self) -> TrackingRun | None:
        try:
            return self.read(TrackingRun, self.key("tracking.json"))
        except ObjectMissing:
            return None

    # Records of any kind

    def read(self, kind: type[R], key: str) -> R:
        """The record under a key.

        Raises:
            ObjectMissing: there is none.
            RefusedError: it is not whole, or not signed by whom it must be.
        """
        record = kind.decode(self.store.get(key), key)
        if isinstance(record, OfSilo) and record.silo not in filed_under(key):
            raise RefusedError(f"{key}: must be of the silo that it is filed under, is of {record.silo!r}", "filed under another silo")
        self._verify(record, key)
        # A key that is good for another round only could else sign for this one.
        if (number := re.search(r"/rounds/(\d+)/", key)) and int(number[1]) != (said := getattr(record, "round", None)):
            raise RefusedError(f"{key}: must be of the round that it is filed under, is of round {said}", "filed under another round")
        return record

    def _believed(self, kind: type[R], keys: Iterable[str]) -> Iterator[R]:
        """The records under these keys, without those that are not what they say; why is in `refused`."""
        every = list(keys)
        for key, found in zip(every, self._found(kind, every), strict=True):
            if isinstance(found, kind):
                yield found
            else:
                self._pass_over(key, found)

    def _pass_over(self, key: str, why: Record | RefusedError | ObjectMissing) -> None:
        """Raises ObjectMissing where the record has gone since it was listed."""
        if isinstance(why, ObjectMissing):
            raise why
        self.refused[key] = str(why)

    def _found(self, kind: type[R], keys: Sequence[str]) -> Iterator[R | RefusedError | ObjectMissing]:
        """What `read` returns or raises under each of these keys, several at a time."""
        if len(keys) <= 1:
            yield from (self._read_or_why(kind, key) for key in keys)
            return
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda key: self._read_or_why(kind, key), keys)

    def _read_or_why(self, kind: type[R], key: str) -> R | RefusedError | ObjectMissing:
        try:
            return self.read(kind, key)
        except (RefusedError, ObjectMissing) as error:
            return error

    def _verify(self, record: Record, key: str) -> None:
        """Raises RefusedError unless the record bears the signature it must."""
        if self.keyring is None:
            return
        party, number = record.signer
        what = f"{key}: must be signed by {party}"
        if record.signature is None:
            raise RefusedError(f"{what}, has no signature; whoever wrote it is not a party of this federation", "no signature")
        message = record.message(key)
        if self.keyring.trusts(party, number, message, record.signature):
            return
        # A silo may have left, or rotated its key, since: then the terms of that round have its key, and they are the coordinator's word.
        terms = self._terms(number) if party != COORDINATOR and number is not None else None
        if terms and verify(terms.keys.get(party, []), number, message, record.signature):
            return
        raise RefusedError(
            f"{what}, and no key of security.keys.{party} that is good for round {number} made its signature; the record was altered, or the "
            f"key is missing from the federation file",
            "bad signature",
        )

    def _terms(self, number: int) -> Agreement | None:
        """The terms that the coordinator put to the silos in a round."""
        if plan := self.plan(number):
            return self.agreement(plan.agreement)
        return self.agreement(self.commit(number).agreement) if self._committed(number) else None
