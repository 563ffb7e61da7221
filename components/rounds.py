"""The protocol: how a round opens, is answered and is committed in an object store.

No server holds a federation; these keys do, each one PUT, created if absent, so that the first writer wins and the loser goes on from it:

    <federation>/agreements/<digest>.json                terms, by their digest
    <federation>/objects/<sha256>                        tensor files, by content
    <federation>/rounds/00003/plan.json                  who takes part, from which global, with which tensors
    <federation>/rounds/00003/attempts/<k>.json          which silos were asked in the k-th try, and when
    <federation>/rounds/00003/reports/<k>/<silo>.json    ok | failed | refused | late, with a reason and allowed scalars
    <federation>/rounds/00003/updates/<silo>.json        manifest of an update object; stays valid while the round is open
    <federation>/rounds/00003/commit.json                written last: the round happened if and only if it exists
    <federation>/evaluations/<global>/<silo>/<split>-<digest>.json
    <federation>/exports/<commit>.json                   what was exported from a commit
    <federation>/tracking.json                           the MLflow run of the federation

Round 0 is the initial global: it has a commit and nothing else. To resume is to read the highest commit. A round opened under terms that
were amended before it was committed is closed by a commit with ``outcome: amended`` that leaves the global as it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation, Section, canonical_json
from silotune.components.object_store import ObjectMissing, ObjectStore, open_store

Status = Literal["ok", "failed", "refused", "late"]
Split = Literal["valid", "test"]
R = TypeVar("R", bound="Record")


class Record(Section):
    """A small fact in the store: one encode, one decode, one digest."""

    format: Literal[1] = 1
    # Signed records carry an Ed25519 signature over their canonical JSON without this field; None in unsigned federations.
    signature: str | None = None

    def encode(self) -> bytes:
        return canonical_json(self.model_dump())

    @classmethod
    def decode(cls, data: bytes, key: str) -> Self:
        """Raises RefusedError where the bytes are no such record."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"])
            raise RefusedError(
                f"{key}: not a valid {cls.__name__} record: {where}: {first['msg']}; the object was altered or is newer"
            ) from None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()


class Participant(Section):
    """What a plan asks of one silo."""

    tensors: str = Field(description="Digest of the object that lists the exact tensors (name -> dtype, shape) of its update.")
    cursor: int = Field(
        ge=0, description="Training examples this silo has consumed in committed rounds; its data stream goes on from here."
    )


class Plan(Record):
    """An open round: everything a silo needs to know and an aggregator will insist on."""

    round: int = Field(ge=1)
    agreement: str
    base: str = Field(description="Digest of the base model.")
    incoming: str = Field(description="Digest of the global model that training starts from.")
    accepted: list[tuple[int, str]] = Field(description="Pairs (round, global) that an update may answer.")
    participants: dict[str, Participant]
    learning_rate: float
    code: str = Field(description="Version of silotune that opened the round.")
    image: str | None = None


class Attempt(Record):
    """One try at an open round."""

    round: int
    attempt: int = Field(ge=1)
    asked: list[str]
    missing: dict[str, str] = Field(default_factory=dict, description="Participants left out of this try before it began, and why.")
    at: float = Field(description="Unix time in seconds.")


class Report(Record):
    """How one silo's work in one attempt ended. ``reason`` is from a fixed vocabulary; never record text."""

    SCALARS: ClassVar[frozenset[str]] = frozenset({"steps", "examples", "tokens", "loss", "seconds", "bytes_down", "bytes_up"})

    round: int
    attempt: int
    silo: str
    status: Status
    reason: str = Field("", max_length=200)
    numbers: dict[str, float] = Field(default_factory=dict)

    @property
    def text(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class UpdateManifest(Record):
    """Names an update object and repeats what its header says."""

    round: int
    silo: str
    agreement: str
    plan: str
    incoming: str
    object: str = Field(description="SHA-256 of the update file.")
    bytes: int
    examples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    steps: int = Field(ge=1)
    cursor: int = Field(ge=1, description="Examples consumed after this round.")
    codec: str
    norm: float = Field(ge=0, description="L2 norm over all tensors of the update.")
    loss: float = Field(description="Mean training loss per token over the round.")


class Contribution(Section):
    """A silo's part in a commit."""

    manifest: str
    object: str
    bytes: int
    weight: float = Field(gt=0)
    examples: int
    tokens: int
    steps: int
    cursor: int
    norm: float


class Commit(Record):
    """A round that happened."""

    round: int = Field(ge=0)
    outcome: Literal["initialized", "aggregated", "amended"]
    agreement: str
    plan: str | None
    attempt: int
    contributions: dict[str, Contribution]
    missing: dict[str, str]
    previous: str | None = Field(description="Digest of the commit before.")
    incoming: str | None
    outgoing: str = Field(description="Digest of the next global model.")
    server_state: str | None = None
    converged: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    started: float
    at: float


class Evaluation(Record):
    """How one global model does on one split of one silo; sums, so that pooling is exact."""

    outgoing: str = Field(description="Digest of the global model.")
    silo: str
    split: Split
    split_digest: str
    examples: int
    tokens: int = Field(ge=1)
    loss_sum: float = Field(description="Cross entropy in nats, summed over response tokens.")
    correct: int = Field(description="Response tokens whose most likely prediction is right.")
    at: float


class Exported(Record):
    """Where a trained model was put."""

    commit: str
    round: int
    outgoing: str
    location: str
    files: dict[str, str] = Field(description="Relative name -> SHA-256.")


class TrackingRun(Record):
    """The MLflow run that shows this federation."""

    experiment: str
    run: str


@dataclass(frozen=True)
class Turn:
    """What a pipeline hands from box to box: which round is open, or why none is. Short text, since it travels as a parameter."""

    round: int = 0
    attempt: int = 0
    done: str = ""

    @property
    def text(self) -> str:
        return f"done:{self.done}" if self.done else f"round:{self.round} attempt:{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Turn:
        if text.startswith("done:"):
            return cls(done=text.removeprefix("done:"))
        if match := re.fullmatch(r"round:(\d+) attempt:(\d+)", text):
            return cls(int(match[1]), int(match[2]))
        raise RefusedError(f"turn must read 'round:N attempt:K' or 'done:WHY', got {text!r}")


class Rounds:
    """One federation's records in one store."""

    def __init__(self, store: ObjectStore, federation: str) -> None:
        self.store = store
        self.federation = federation

    @classmethod
    def of(cls, federation: Federation) -> Rounds:
        return cls(open_store(federation.storage.root), federation.name)

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
        key = self.key("agreements", f"{digest}.json")
        data = self.store.get(key)
        if hashlib.sha256(data).hexdigest() != digest:
            raise RefusedError(f"{key}: its bytes do not have the digest in its name; restore the object from a backup")
        return Agreement.decode(data)

    def put_object(self, path: Path) -> str:
        """Store a file under its SHA-256 and return that."""
        digest = file_digest(path)
        self.store.put_file(self.key("objects", digest), path)
        return digest

    def fetch_object(self, digest: str, path: Path) -> Path:
        """Copy an object to ``path``.

        Raises:
            RefusedError: the bytes that arrived do not have the digest.
            ObjectMissing: there is no such object.
        """
        self.store.fetch_file(self.key("objects", digest), path)
        if (got := file_digest(path)) != digest:
            path.unlink()
            raise RefusedError(f"object {digest[:12]}: arrived with digest {got[:12]}; the stored object or the transfer is corrupt")
        return path

    def object_size(self, digest: str) -> int:
        size = self.store.size(self.key("objects", digest))
        if size is None:
            raise ObjectMissing(self.key("objects", digest))
        return size

    def tensor_shapes(self, digest: str) -> dict[str, list[int]]:
        """Names and shapes of a safetensors object, from two ranged reads of its header."""
        key = self.key("objects", digest)
        length = int.from_bytes(self.store.get_range(key, 0, 8), "little")
        header = json.loads(self.store.get_range(key, 8, length))
        return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}

    def put_json_object(self, value: Any) -> str:
        data = canonical_json(value)
        digest = hashlib.sha256(data).hexdigest()
        self.store.create(self.key("objects", digest), data)
        return digest

    def json_object(self, digest: str) -> Any:
        data = self.store.get(self.key("objects", digest))
        if hashlib.sha256(data).hexdigest() != digest:
            raise RefusedError(f"object {digest[:12]}: its bytes do not have the digest in its name; restore the object from a backup")
        return json.loads(data)

    # The course of a round

    def latest(self) -> Commit | None:
        """The highest commit, found in O(log rounds) look-ups; None before the federation is initialised."""
        if self._commit_missing(0):
            return None
        known, probe = 0, 1
        while not self._commit_missing(probe):
            known, probe = probe, probe * 2
        while probe - known > 1:
            middle = (known + probe) // 2
            if self._commit_missing(middle):
                probe = middle
            else:
                known = middle
        return self.commit(known)

    def _commit_missing(self, number: int) -> bool:
        return self.store.size(self._round(number, "commit.json")) is None

    def commit(self, number: int) -> Commit:
        return self._read(Commit, self._round(number, "commit.json"))

    def commits(self) -> Iterator[Commit]:
        """All commits from round 0 on."""
        latest = self.latest()
        for number in range(latest.round + 1 if latest else 0):
            yield self.commit(number)

    def write_commit(self, commit: Commit) -> Commit:
        """Make the round happen. Returns the commit that stands, which may be a racing run's."""
        return self._create(commit, self._round(commit.round, "commit.json"))

    def open_round(self, plan: Plan) -> Plan:
        """Open a round. Returns the plan that stands, which may be a racing run's."""
        return self._create(plan, self._round(plan.round, "plan.json"))

    def plan(self, number: int) -> Plan | None:
        try:
            return self._read(Plan, self._round(number, "plan.json"))
        except ObjectMissing:
            return None

    def begin_attempt(self, plan: Plan, missing: dict[str, str]) -> Attempt:
        """Ask every participant without an update, except those already known to be ``missing``."""
        delivered = self.updates(plan.round)
        asked = [s for s in sorted(plan.participants) if s not in delivered and s not in missing]
        left_out = {s: why for s, why in missing.items() if s in plan.participants and s not in delivered}
        number = 1 + max((a.attempt for a in self.attempts(plan.round)), default=0)
        while True:
            attempt = Attempt(round=plan.round, attempt=number, asked=asked, missing=left_out, at=time.time())
            if self.store.create(self._round(plan.round, "attempts", f"{number}.json"), attempt.encode()):
                return attempt
            number += 1

    def attempts(self, number: int) -> list[Attempt]:
        keys = self.store.list(self._round(number, "attempts") + "/")
        return sorted((self._read(Attempt, k) for k in keys), key=lambda a: a.attempt)

    def write_report(self, report: Report) -> Report:
        if unknown := sorted(set(report.numbers) - Report.SCALARS):
            raise RefusedError(
                f"silo {report.silo!r}: a report may not hold {', '.join(unknown)}; allowed: {', '.join(sorted(Report.SCALARS))}"
            )
        return self._create(report, self._round(report.round, "reports", str(report.attempt), f"{report.silo}.json"))

    def reports(self, number: int, attempt: int) -> dict[str, Report]:
        keys = self.store.list(self._round(number, "reports", str(attempt)) + "/")
        found = (self._read(Report, k) for k in keys)
        return {r.silo: r for r in found}

    def write_update(self, manifest: UpdateManifest) -> UpdateManifest:
        """Deliver an update. Returns the manifest that stands: the silo's first one for this round."""
        return self._create(manifest, self._round(manifest.round, "updates", f"{manifest.silo}.json"))

    def update(self, number: int, silo: str) -> UpdateManifest | None:
        try:
            return self._read(UpdateManifest, self._round(number, "updates", f"{silo}.json"))
        except ObjectMissing:
            return None

    def updates(self, number: int) -> dict[str, UpdateManifest]:
        prefix = self._round(number, "updates") + "/"
        keys = {k.removeprefix(prefix).removesuffix(".json"): k for k in self.store.list(prefix)}
        return {silo: self._read(UpdateManifest, key) for silo, key in keys.items()}

    # Evaluations, exports, tracking

    def write_evaluation(self, evaluation: Evaluation) -> Evaluation:
        e = evaluation
        return self._create(e, self.key("evaluations", e.outgoing, e.silo, f"{e.split}-{e.split_digest[:16]}.json"))

    def evaluation(self, outgoing: str, silo: str, split: str, split_digest: str) -> Evaluation | None:
        try:
            return self._read(Evaluation, self.key("evaluations", outgoing, silo, f"{split}-{split_digest[:16]}.json"))
        except ObjectMissing:
            return None

    def evaluations(self, outgoing: str, split: str) -> dict[str, Evaluation]:
        """By silo; where a silo's split has changed since, the newest record."""
        newest: dict[str, Evaluation] = {}
        for key in self.store.list(self.key("evaluations", outgoing) + "/"):
            if key.rsplit("/", 1)[1].startswith(f"{split}-"):
                found = self._read(Evaluation, key)
                if found.silo not in newest or newest[found.silo].at < found.at:
                    newest[found.silo] = found
        return newest

    def write_export(self, exported: Exported) -> Exported:
        return self._create(exported, self.key("exports", f"{exported.commit}.json"))

    def export(self, commit: str) -> Exported | None:
        try:
            return self._read(Exported, self.key("exports", f"{commit}.json"))
        except ObjectMissing:
            return None

    def tracking_run(self) -> TrackingRun | None:
        try:
            return self._read(TrackingRun, self.key("tracking.json"))
        except ObjectMissing:
            return None

    def write_tracking_run(self, run: TrackingRun) -> TrackingRun:
        return self._create(run, self.key("tracking.json"))

    def _read(self, kind: type[R], key: str) -> R:
        return kind.decode(self.store.get(key), key)

    def _create(self, record: R, key: str) -> R:
        """Create-if-absent; returns the record that stands under the key."""
        if self.store.create(key, record.encode()):
            return record
        return self._read(type(record), key)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pooled(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Metrics over all silos, pooled by tokens: loss in nats per token, perplexity, token accuracy in [0, 1]; empty without evaluations."""
    tokens = sum(e.tokens for e in evaluations.values())
    if not tokens:
        return {}
    loss = sum(e.loss_sum for e in evaluations.values()) / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": sum(e.correct for e in evaluations.values()) / tokens}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows a float."""
    return math.exp(loss) if loss < 709 else math.inf
