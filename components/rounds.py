"""The protocol: how a round opens, is answered and is committed in an object store.

No server holds a federation; these keys do, each one PUT, created if absent, so that the first writer wins and the loser goes on from it:

    <federation>/agreements/<digest>.json                terms, by their digest
    <federation>/objects/<sha256>                        globals and lists of tensors, by content
    <federation>/contributions/<silo>/<sha256>           a silo's update files, by content: it can write nowhere else, nobody else can read there
    <federation>/rounds/00003/plan.json                  who takes part, from which global, with which tensors
    <federation>/rounds/00003/attempts/<k>.json          which silos were asked in the k-th try, and when
    <federation>/rounds/00003/reports/<k>/<silo>.json    ok | failed | refused | late, with a reason and allowed scalars
    <federation>/rounds/00003/updates/<silo>.json        manifest of an update file; stays valid while the round is open
    <federation>/rounds/00003/refusals/<silo>.json       why the aggregator refused it; the silo's next one is updates/<silo>.2.json
    <federation>/rounds/00003/partials/<k>/<group>.json  what the sum of a group of updates was made of, in the k-th try (see `aggregate.groups`)
    <federation>/partials/<sha256>                       such sums, by content, until the round is committed; the coordinator's alone to read
    <federation>/rounds/00003/commit.json                written last: the round happened if and only if it exists
    <federation>/evaluations/<global>/<silo>/<split>-<digest>.json
    <federation>/exports/<commit>.json                   what was exported from a commit
    <federation>/audit/000007.json                       the audit log (see `audit`)
    <federation>/tracking.json                           the MLflow run of the federation

Round 0 is the initial global: it has a commit and nothing else. To resume is to read the highest commit. How a round may end:

    initialized    round 0
    aggregated     the updates made a new global
    skipped        too few silos delivered, and the federation goes on without; the global stays
    rolled-back    the round began from a global that proved bad; the next one begins from the last good one
    amended        the terms were changed while it was open; the global stays

Records are signed by whom they are of (see `keys`), and none is believed before its signature is verified. In a federation that says
``signing: off``, none is signed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, Federation, canonical_json
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
from silotune.components.store.object_store import ObjectMissing, ObjectStore, open_store
from silotune.components.store.store_blob import StoreBlob

R = TypeVar("R", bound=Record)


class CorruptObject(RefusedError):
    """An object whose bytes are not those that its name promises."""

    def __init__(self, key: str, got: str) -> None:
        super().__init__(
            f"object '{key}': its bytes have the digest {got[:12]}…; it was damaged in the store: `silotune verify --repair` makes a global "
            "again, other objects come from a backup",
            "object corrupt",
        )
        self.key = key


class Rounds:
    """One federation's records in one store, signed with the keys of this machine and verified against those of the federation file."""

    def __init__(self, store: ObjectStore, federation: str, keyring: Keyring | None = None) -> None:
        self.store = store
        self.federation = federation
        self.keyring = keyring
        self.refused: dict[str, str] = {}  # key -> why a record there was passed over
        self._commits: dict[int, Commit] = {}  # a commit never changes
        self._agreements: dict[str, Agreement] = {}  # by digest; named by a record that the coordinator has signed

    @classmethod
    def of(cls, federation: Federation) -> Rounds:
        keyring = Keyring(federation) if federation.security.signing else None
        return cls(open_store(federation.storage.root), federation.name, keyring)

    # Keys

    def key(self, *parts: str) -> str:
        return "/".join((self.federation, *parts))

    def _round(self, number: int, *parts: str) -> str:
        return self.key("rounds", f"{number:05d}", *parts)

    # Agreements and objects, by content

    def put_agreement(self, agreement: Agreement) -> str:
        self.store.create(self.key("agreements", f"{agreement.digest}.json"), agreement.encode())
        return agreement.digest

    def agreement(self, digest: str) -> Agreement:
        if digest in self._agreements:
            return self._agreements[digest]
        key = self.key("agreements", f"{digest}.json")
        data = self.store.get(key)
        if hashlib.sha256(data).hexdigest() != digest:
            raise RefusedError(f"{key}: its bytes do not have the digest in its name; restore the object from a backup")
        self._agreements[digest] = agreement = Agreement.decode(data)
        return agreement

    def object_key(self, digest: str, silo: str | None = None) -> str:
        """Where a global lies, or the update file of a silo."""
        return self.key("contributions", silo, digest) if silo else self.key("objects", digest)

    def put_object(self, path: Path, silo: str | None = None) -> str:
        """Store a file under its SHA-256 and return that."""
        digest = file_digest(path)
        self.store.put_file(self.object_key(digest, silo), path)
        return digest

    def fetch_object(self, digest: str, path: Path, silo: str | None = None) -> Path:
        """Copy an object to ``path``; what arrives damaged is asked for once more.

        Raises:
            CorruptObject: the bytes in the store do not have the digest.
            ObjectMissing: there is no such object.
        """
        key = self.object_key(digest, silo)
        for _ in range(2):
            self.store.fetch_file(key, path)
            if (got := file_digest(path)) == digest:
                return path
            path.unlink()
        raise CorruptObject(key, got)

    def object_blob(self, digest: str, silo: str | None = None) -> StoreBlob:
        """An object that is to be read in ranges, of which nobody has compared the digest yet. Raises ObjectMissing."""
        return StoreBlob(self.store, self.object_key(digest, silo), self.object_size(digest, silo))

    def object_size(self, digest: str, silo: str | None = None) -> int:
        size = self.store.size(self.object_key(digest, silo))
        if size is None:
            raise ObjectMissing(self.object_key(digest, silo))
        return size

    def tensor_shapes(self, digest: str) -> dict[str, list[int]]:
        """Names and shapes of a safetensors object. All of it is read, because only the digest of all says that its header is sound.

        Raises:
            CorruptObject: the bytes in the store do not have the digest.
        """
        with tempfile.TemporaryDirectory() as folder, self.fetch_object(digest, Path(folder) / "tensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}

    def put_json_object(self, value: Any) -> str:
        data = canonical_json(value)
        digest = hashlib.sha256(data).hexdigest()
        self.store.create(self.key("objects", digest), data)
        return digest

    def json_object(self, digest: str) -> Any:
        """Raises CorruptObject where the bytes in the store do not have the digest, and ObjectMissing."""
        key = self.object_key(digest)
        data = self.store.get(key)
        if (got := hashlib.sha256(data).hexdigest()) != digest:
            raise CorruptObject(key, got)
        return json.loads(data)

    # The course of a round

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

    def write_commit(self, commit: Commit) -> Commit:
        """Make the round happen. Returns the commit that stands, which may be a racing run's."""
        return self.create(commit, self._round(commit.round, "commit.json"))

    def open_round(self, plan: Plan) -> Plan:
        """Open a round. Returns the plan that stands, which may be a racing run's."""
        return self.create(plan, self._round(plan.round, "plan.json"))

    def plan(self, number: int) -> Plan | None:
        try:
            return self.read(Plan, self._round(number, "plan.json"))
        except ObjectMissing:
            return None

    def begin_attempt(self, plan: Plan, missing: dict[str, str]) -> Attempt:
        """Ask every participant without an update, except those already known to be ``missing``."""
        delivered, _ = self.updates(plan.round)
        asked = [s for s in sorted(plan.participants) if s not in delivered and s not in missing]
        left_out = {s: why for s, why in missing.items() if s in plan.participants and s not in delivered}
        number = 1 + max((a.attempt for a in self.attempts(plan.round)), default=0)
        while True:
            attempt = Attempt(round=plan.round, attempt=number, asked=asked, missing=left_out, at=time.time())
            standing = self.create(attempt, self._round(plan.round, "attempts", f"{number}.json"))
            if (standing.asked, standing.missing, standing.at) == (attempt.asked, attempt.missing, attempt.at):
                return standing
            number += 1

    def attempts(self, number: int) -> list[Attempt]:
        keys = self.store.list(self._round(number, "attempts") + "/")
        return sorted((self.read(Attempt, k) for k in keys), key=lambda a: a.attempt)

    def attempt(self, number: int, attempt: int) -> Attempt:
        return self.read(Attempt, self._round(number, "attempts", f"{attempt}.json"))

    def write_report(self, report: Report) -> Report:
        if unknown := sorted(set(report.numbers) - Report.SCALARS):
            raise RefusedError(
                f"silo {report.silo!r}: a report may not hold {', '.join(unknown)}; allowed: {', '.join(sorted(Report.SCALARS))}"
            )
        return self.create(report, self._round(report.round, "reports", str(report.attempt), f"{report.silo}.json"))

    def reports(self, number: int, attempt: int) -> dict[str, Report]:
        keys = self.store.list(self._round(number, "reports", str(attempt)) + "/")
        return {r.silo: r for r in self._believed(Report, keys)}

    def write_update(self, manifest: UpdateManifest) -> UpdateManifest:
        """Deliver an update. Returns the manifest that stands: the silo's first one for this round that has not been refused."""
        return self.create(manifest, self._round(manifest.round, "updates", f"{self._slot(manifest.round, manifest.silo)}.json"))

    def _slot(self, number: int, silo: str) -> str:
        """Name of a silo's present manifest: its id, and from the second one on a number. By look-ups only: a silo may not list."""
        count = 1
        while self.store.size(self._round(number, "refusals", f"{_nth(silo, count)}.json")) is not None:
            count += 1
        return _nth(silo, count)

    def update(self, number: int, silo: str) -> UpdateManifest | None:
        """A silo's update to a round, unless it was refused. Raises RefusedError where it is not the silo's."""
        try:
            return self.read(UpdateManifest, self._round(number, "updates", f"{self._slot(number, silo)}.json"))
        except ObjectMissing:
            return None

    def updates(self, number: int) -> tuple[dict[str, UpdateManifest], dict[str, str]]:
        """By silo: the manifests that stand, and why others cannot be believed."""
        manifests, bad = {}, {}
        names = {k.rsplit("/", 1)[1].split(".", 1)[0] for k in self.store.list(self._round(number, "updates") + "/")}
        for silo in sorted(names):
            try:
                if found := self.update(number, silo):
                    manifests[silo] = found
            except RefusedError as error:
                bad[silo] = str(error)
        return manifests, bad

    def refuse_update(self, number: int, silo: str, rule: str, *, resend: bool, manifest: str | None = None) -> None:
        """Keep a silo's present update out of its round, so that it can deliver another one.

        Args:
            manifest: digest of the manifest that was judged; None for one that cannot be believed. Another one, that has come since because
                somebody else has refused the first, is left alone.
        """
        slot = self._slot(number, silo)
        try:
            data = self.store.get(self._round(number, "updates", f"{slot}.json"))
            if manifest is None:
                with suppress(RefusedError):
                    self.update(number, silo)
                    return
        except ObjectMissing:
            return
        found = hashlib.sha256(data).hexdigest()
        if manifest in (None, found):
            refusal = Refusal(round=number, silo=silo, manifest=found, rule=rule, resend=resend, at=time.time())
            self.create(refusal, self._round(number, "refusals", f"{slot}.json"))

    def refusal(self, number: int, silo: str) -> Refusal | None:
        """Why a silo's last update was refused, if it was."""
        count, found = 1, None
        while True:
            try:
                found = self.read(Refusal, self._round(number, "refusals", f"{_nth(silo, count)}.json"))
            except ObjectMissing:
                return found
            count += 1

    # Sums of groups of updates

    def partial_key(self, digest: str) -> str:
        """Where the sum of a group lies: not among the objects, which silos may read, since from a small group's sum one learns of its members."""
        return self.key("partials", digest)

    def put_partial(self, path: Path) -> str:
        """Store a sum under its SHA-256 and return that."""
        digest = file_digest(path)
        self.store.put_file(self.partial_key(digest), path)
        return digest

    def partial_blob(self, digest: str) -> StoreBlob:
        """As `object_blob`, of a sum. Raises ObjectMissing."""
        key = self.partial_key(digest)
        if (size := self.store.size(key)) is None:
            raise ObjectMissing(key)
        return StoreBlob(self.store, key, size)

    def write_partial(self, partial: Partial) -> Partial:
        """Returns the record that stands for this group in this attempt."""
        return self.create(partial, self._round(partial.round, "partials", str(partial.attempt), f"{partial.group}.json"))

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

    def drop_partials(self) -> None:
        """Delete all stored sums: those of committed rounds are of no use, and any other is made again by whoever misses it."""
        for key in list(self.store.list(self.key("partials") + "/")):
            self.store.delete(key)

    # Silo-level privacy: what has been published

    def write_release(self, release: Release) -> Release:
        return self.create(release, self.key("releases", f"{release.number:05d}.json"))

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

    def write_evaluation(self, evaluation: Evaluation) -> Evaluation:
        e = evaluation
        return self.create(e, self.key("evaluations", e.outgoing, e.silo, f"{e.split}-{e.split_digest[:16]}.json"))

    def evaluation(self, outgoing: str, silo: str, split: str, split_digest: str) -> Evaluation | None:
        try:
            return self.read(Evaluation, self.key("evaluations", outgoing, silo, f"{split}-{split_digest[:16]}.json"))
        except ObjectMissing:
            return None

    def evaluations(self, outgoing: str, split: str) -> dict[str, Evaluation]:
        """By silo; where a silo's split has changed since, the newest record. None can be older than the global that it scores."""
        newest: dict[str, Evaluation] = {}
        made = next((c.round for c in self.commits() if c.outgoing == outgoing), 0)
        for key in self.store.list(self.key("evaluations", outgoing) + "/"):
            if key.rsplit("/", 1)[1].startswith(f"{split}-"):
                for found in self._believed(Evaluation, [key]):
                    if found.round < made:
                        self.refused[key] = f"{key}: says it is of round {found.round}, when this global was not made yet"
                    elif found.silo not in newest or newest[found.silo].at < found.at:
                        newest[found.silo] = found
        return newest

    def write_exposed(self, exposed: Exposed) -> Exposed:
        return self.create(exposed, self.key("evaluations", exposed.outgoing, exposed.silo, f"exposure-{exposed.planted[:16]}.json"))

    def exposed(self, outgoing: str) -> dict[str, Exposed]:
        """By silo; where a silo has planted anew since, the newest record."""
        newest: dict[str, Exposed] = {}
        keys = (k for k in self.store.list(self.key("evaluations", outgoing) + "/") if k.rsplit("/", 1)[1].startswith("exposure-"))
        for found in self._believed(Exposed, keys):
            if found.outgoing == outgoing and (found.silo not in newest or newest[found.silo].at < found.at):
                newest[found.silo] = found
        return newest

    def write_export(self, exported: Exported) -> Exported:
        return self.create(exported, self.key("exports", f"{exported.commit}.json"))

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

    def write_tracking_run(self, run: TrackingRun) -> TrackingRun:
        return self.create(run, self.key("tracking.json"))

    def _believed(self, kind: type[R], keys: Iterable[str]) -> Iterator[R]:
        """The records under these keys, without those that are not what they say; why is in `refused`."""
        for key in keys:
            try:
                yield self.read(kind, key)
            except RefusedError as error:
                self.refused[key] = str(error)

    def sign(self, party: str, number: int | None, message: bytes) -> str:
        """Sign what is no record, such as an update file's header. Raises FederationError without a key of the party."""
        if self.keyring is None:
            raise FederationError("security.signing: is off, so that nothing is signed here")
        return self.keyring.sign(party, number, message)

    # Records of any kind

    def read(self, kind: type[R], key: str) -> R:
        """The record under a key.

        Raises:
            ObjectMissing: there is none.
            RefusedError: it is not whole, or not signed by whom it must be.
        """
        record = kind.decode(self.store.get(key), key)
        if isinstance(record, OfSilo) and record.silo not in _filed_under(key):
            raise RefusedError(f"{key}: must be of the silo that it is filed under, is of {record.silo!r}", "filed under another silo")
        self._verify(record, key)
        # A key that is good for another round only could else sign for this one.
        if (number := re.search(r"/rounds/(\d+)/", key)) and int(number[1]) != (said := getattr(record, "round", None)):
            raise RefusedError(f"{key}: must be of the round that it is filed under, is of round {said}", "filed under another round")
        return record

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

    def create(self, record: R, key: str) -> R:
        """Sign and create if absent; returns the record that stands under the key."""
        party, number = record.signer
        if self.keyring:
            record = record.model_copy(update={"signature": self.keyring.sign(party, number, record.message(key))})
        if self.store.create(key, record.encode()):
            return record
        return self.read(type(record), key)


def highest(exists: Callable[[int], bool]) -> int:
    """The highest of the numbers 1, 2, … n that exist without a gap, in O(log n) look-ups; 0 if there is none."""
    known, probe = 0, 1
    while exists(probe):
        known, probe = probe, probe * 2
    while probe - known > 1:
        middle = (known + probe) // 2
        if exists(middle):
            known = middle
        else:
            probe = middle
    return known


def _filed_under(key: str) -> tuple[str, str]:
    """The names in a key that can be the silo's: its folder's, or its own without number and suffix."""
    *_, folder, name = key.split("/")
    return folder, name.split(".", 1)[0]


def _nth(silo: str, count: int) -> str:
    return silo if count == 1 else f"{silo}.{count}"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
