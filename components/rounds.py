"""The course of rounds: how one opens, is answered and is committed, by records in an object store.

Every record is one PUT, created if absent, so that the first writer wins and the loser goes on from it. Round 0 is the initial global: it
has a commit and nothing else. To resume is to read the highest commit. How a round may end:

    initialized    round 0
    aggregated     the updates made a new global
    skipped        too few silos delivered, and the federation goes on without; the global stays
    rolled-back    the round began from a global that proved bad; the next one begins from the last good one
    amended        the terms were changed while it was open; the global stays

Where the records lie is `record_keys`; how they are found, and when they are believed, is `round_records`.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, canonical_json
from silotune.components.protocol import (
    Attempt,
    Commit,
    Evaluation,
    Exported,
    Exposed,
    Partial,
    Plan,
    Refusal,
    Release,
    Report,
    TrackingRun,
    UpdateManifest,
)  # fmt: skip
from silotune.components.round_records import R, RoundRecords
from silotune.components.store.content import file_digest
from silotune.components.store.object_store import ObjectMissing


class Rounds(RoundRecords):
    """One federation's records in one store, to be read, and written with the keys of this machine."""

    # Agreements and objects, by content

    def put_agreement(self, agreement: Agreement) -> str:
        self.store.create(self.key("agreements", f"{agreement.digest}.json"), agreement.encode())
        return agreement.digest

    def put_object(self, path: Path, silo: str | None = None) -> str:
        """Store a file under its SHA-256 and return that."""
        digest = file_digest(path)
        self.store.put_file(self.object_key(digest, silo), path)
        return digest

    def put_json_object(self, value: Any) -> str:
        data = canonical_json(value)
        digest = hashlib.sha256(data).hexdigest()
        self.store.create(self.key("objects", digest), data)
        return digest

    def put_partial(self, path: Path) -> str:
        """Store a sum under its SHA-256 and return that."""
        digest = file_digest(path)
        self.store.put_file(self.partial_key(digest), path)
        return digest

    # The course of a round

    def open_round(self, plan: Plan) -> Plan:
        """Open a round. Returns the plan that stands, which may be a racing run's."""
        return self.create(plan, self._round(plan.round, "plan.json"))

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

    def write_report(self, report: Report) -> Report:
        if unknown := sorted(set(report.numbers) - Report.SCALARS):
            raise RefusedError(
                f"silo {report.silo!r}: a report may not hold {', '.join(unknown)}; allowed: {', '.join(sorted(Report.SCALARS))}"
            )
        return self.create(report, self._round(report.round, "reports", str(report.attempt), f"{report.silo}.json"))

    def write_update(self, manifest: UpdateManifest) -> UpdateManifest:
        """Deliver an update. Returns the manifest that stands: the silo's first one for this round that has not been refused."""
        return self.create(manifest, self._round(manifest.round, "updates", f"{self._slot(manifest.round, manifest.silo)}.json"))

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

    def write_partial(self, partial: Partial) -> Partial:
        """Returns the record that stands for this group in this attempt."""
        return self.create(partial, self._round(partial.round, "partials", str(partial.attempt), f"{partial.group}.json"))

    def drop_partials(self) -> None:
        """Delete all stored sums: those of committed rounds are of no use, and any other is made again by whoever misses it."""
        for key in list(self.store.list(self.key("partials") + "/")):
            self.store.delete(key)

    def write_commit(self, commit: Commit) -> Commit:
        """Make the round happen. Returns the commit that stands, which may be a racing run's."""
        return self.create(commit, self._round(commit.round, "commit.json"))

    # Beside the rounds

    def write_release(self, release: Release) -> Release:
        return self.create(release, self.key("releases", f"{release.number:05d}.json"))

    def write_evaluation(self, evaluation: Evaluation) -> Evaluation:
        e = evaluation
        return self.create(e, self.key("evaluations", e.outgoing, e.silo, f"{e.split}-{e.split_digest[:16]}.json"))

    def write_exposed(self, exposed: Exposed) -> Exposed:
        return self.create(exposed, self.key("evaluations", exposed.outgoing, exposed.silo, f"exposure-{exposed.planted[:16]}.json"))

    def write_export(self, exported: Exported) -> Exported:
        return self.create(exported, self.key("exports", f"{exported.commit}.json"))

    def write_tracking_run(self, run: TrackingRun) -> TrackingRun:
        return self.create(run, self.key("tracking.json"))

    # Signing

    def sign(self, party: str, number: int | None, message: bytes) -> str:
        """Sign what is no record, such as an update file's header. Raises FederationError without a key of the party."""
        if self.keyring is None:
            raise FederationError("security.signing: is off, so that nothing is signed here")
        return self.keyring.sign(party, number, message)

    def create(self, record: R, key: str) -> R:
        """Sign and create if absent; returns the record that stands under the key."""
        party, number = record.signer
        if self.keyring:
            record = record.model_copy(update={"signature": self.keyring.sign(party, number, record.message(key))})
        if self.store.create(key, record.encode()):
            return record
        return self.read(type(record), key)
