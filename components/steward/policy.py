"""The silo's own policy: what its steward lets federations do with its records, whatever a coordinator asks.

``policy.yaml`` lies in the silo's ``storage``; in a Job, beside the federation file in the silo's own ConfigMap; or where SILOTUNE_POLICY says: a
file, or a folder with such a file. The silo's own steps read it, and insist on it before any record is read; a federation that asks for something else is refused by the name of the rule:

    refused: policy: strategy

No term is required but ``dataset``; what is left out is not restricted. Without a policy a silo allows whatever its copy of the federation file
says. Stewards see what a file asks for against their policy with ``silotune review``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from silotune.components import federation_file
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.federation_file import COORDINATOR, PUBLIC_KEY
from silotune.components.protocol import Report
from silotune.components.steward.budget import Limits, Unit
from silotune.components.terms.section import Positive, Section
from silotune.components.terms.strategies import STRATEGIES

VARIABLE = "SILOTUNE_POLICY"
NAME = "policy.yaml"
MOUNT = Path("/federation")  # where a Job finds the silo's ConfigMap, of which the admission policy lets it see no other
DATASET = r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ImageDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=PUBLIC_KEY)]
PATTERNS = federation_file.PATTERNS | {
    r"^(/|s3://)": "an absolute path or s3://bucket/prefix",
    DATASET: "lower-case letters, digits and inner dashes, 64 at most",
    r"^[0-9a-f]{64}$": "a SHA-256 digest of 64 hexadecimal digits",
    r"^sha256:[0-9a-f]{64}$": "sha256: and 64 hexadecimal digits",
}


class PrivacyRule(Section):
    """Differential privacy that the steward insists on, and how much of it all federations together may spend."""

    required: bool | None = Field(
        None,
        description="Refuse trainings without record-level differential privacy; default: where any epsilon is limited. `false`: let them "
        "through, and limit only what the others say together.",
    )
    unit: Unit = Field("record", description="Whose traces count: one record's, or all of a person.")
    epsilon: Limits = Field(default_factory=Limits, description="Bounds on what trainings say together.")


class LedgerPlace(Section):
    """Where it is written down what was spent."""

    at: str | None = Field(
        None,
        pattern=r"^(/|s3://)",
        description="A folder, or `s3://bucket/prefix`; default: the silo's `storage`. The same wherever the data are used.",
    )
    since: date | None = Field(None, description="The ledger is whole from this day (UTC) on: of rounds before, no entry is asked for.")
    keys: list[Key] = Field(default_factory=list, description="Former public keys of the silo, which older entries may be signed with.")


class Policy(Section):
    """A whole policy file. `Policy.load` reads one."""

    dataset: str = Field(
        pattern=DATASET, description="The steward's name of the data, which budgets are counted by. Other records: another name."
    )
    coordinators: list[Key] | None = Field(None, min_length=1, description="Public keys of coordinators that may ask.")
    bases: list[Digest] | None = Field(
        None, min_length=1, description="Digests of base models that may be trained; `silotune policy new` fills in the present one."
    )
    images: list[ImageDigest] | None = Field(None, min_length=1, description="Digests of images that the silo's work may run in.")
    strategies: list[str] | None = Field(None, min_length=1, description="Strategies of aggregation.")
    codecs: list[Literal["float32", "bfloat16"]] | None = Field(None, min_length=1, description="Number formats of updates.")
    privacy: PrivacyRule = Field(default_factory=PrivacyRule)
    secure_aggregation: bool = Field(False, description="Refuse federations whose coordinator sees single updates.")
    min_participants: Positive | None = Field(None, description="Silos that a round must ask at least.")
    report: list[str] | None = Field(
        None, description="Numbers that reports may hold; the others are left out. Default: all that the protocol knows."
    )
    scores: bool = Field(True, description="Score globals on the silo's valid and test records, and tell the sums.")
    max_update_bytes: Positive | None = Field(None, description="Bytes of an update file at most.")
    max_runs: Positive | None = Field(None, description="Federations that may ever train on the data set, by their names.")
    expires: date | None = Field(None, description="First day (UTC) on which nothing is allowed any more.")
    ledger: LedgerPlace = Field(default_factory=LedgerPlace)

    @field_validator("strategies")
    @classmethod
    def _strategies_known(cls, value: list[str] | None) -> list[str] | None:
        if unknown := sorted(set(value or []) - STRATEGIES.keys()):
            raise ValueError(f"must be of {', '.join(STRATEGIES)}, not {', '.join(unknown)}")
        return value

    @field_validator("report")
    @classmethod
    def _numbers_known(cls, value: list[str] | None) -> list[str] | None:
        if unknown := sorted(set(value or []) - Report.SCALARS):
            raise ValueError(f"must be of {', '.join(sorted(Report.SCALARS))}, not {', '.join(unknown)}")
        return value

    @property
    def private(self) -> bool:
        """Whether trainings must be differentially private."""
        return self.privacy.epsilon.any if self.privacy.required is None else self.privacy.required

    @classmethod
    def load(cls, file: Path) -> Policy:
        """Raises FederationError with every problem found."""
        raw = federation_file.parse(file, "policy", "dataset", "`silotune policy new FILE` writes one to start from")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = [federation_file.explain(e, cls, PATTERNS) for e in error.errors(include_url=False)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise FederationError("\n".join([f"{file.name}: {count}", *(f"  {p}" for p in problems)]), "policy is wrong")

    @classmethod
    def of(cls, federation: Federation, silo_id: str) -> Policy | None:
        """The one that holds for a silo on this machine, if there is any.

        Raises:
            FederationError: SILOTUNE_POLICY names none; or it is wrong.
        """
        if named := os.environ.get(VARIABLE):
            path = Path(named)
            return cls.load(path / NAME if path.is_dir() else path)
        mounted = federation.file.parent if federation.file.parent == MOUNT else None
        for folder in filter(None, (mounted, Path(federation.silo(silo_id).storage))):
            if (folder / NAME).exists():
                return cls.load(folder / NAME)
        return None


@dataclass(frozen=True)
class Asked:
    """What a federation asks of one silo, as far as it is known where one looks."""

    silo: str
    agreement: Agreement
    image: str | None = None
    participants: int | None = None  # of the round; default: all silos of the terms
    update_bytes: int | None = None  # an update file's, at most
    runs: frozenset[str] = frozenset()  # federations that have trained on the data set


@dataclass(frozen=True)
class Verdict:
    """One rule of the policy on what is asked."""

    rule: str  # in the fixed vocabulary: refused: policy: <rule>
    passed: bool | None  # None: cannot be told here
    asked: str
    allowed: str


def review(policy: Policy, asked: Asked, today: date | None = None) -> list[Verdict]:
    """Every rule that the policy has, in the order in which they are insisted on."""
    return list(_verdicts(policy, asked, today or datetime.now(UTC).date()))


def require(policy: Policy | None, asked: Asked) -> None:
    """Insist on a policy, before any record is read.

    Raises:
        RefusedError: with the first rule that is broken.
    """
    for verdict in review(policy, asked) if policy else []:
        if verdict.passed is False:
            raise RefusedError(
                f"silo {asked.silo!r}: its policy allows {verdict.allowed} as {verdict.rule}, the federation asks for {verdict.asked}; "
                "agree on it with the silo's steward",
                f"policy: {verdict.rule}",
            )


def _verdicts(policy: Policy, asked: Asked, today: date) -> Iterator[Verdict]:
    terms, privacy = asked.agreement, asked.agreement.privacy
    if policy.expires is not None:
        yield Verdict("expired", today < policy.expires, f"today, {today}", f"days before {policy.expires}")
    if policy.coordinators is not None:
        found = [k.public for k in terms.keys.get(COORDINATOR, [])]
        yield Verdict("coordinator key", bool(found) and set(found) <= set(policy.coordinators), _words(found, "nobody's, nothing is signed"),
                      _words(policy.coordinators))  # fmt: skip
    if policy.bases is not None:
        yield Verdict("base model", terms.base in policy.bases, terms.base, _words(policy.bases))
    if policy.images is not None:
        digest = asked.image.rpartition("@")[2] if asked.image else ""
        yield Verdict("image", digest in policy.images, asked.image or "none: it runs outside of a container", _words(policy.images))
    if policy.strategies is not None:
        strategy = terms.aggregation.strategy
        yield Verdict("strategy", strategy in policy.strategies, strategy, _words(policy.strategies))
    if policy.codecs is not None:
        codec = terms.communication.codec
        yield Verdict("codec", codec in policy.codecs, codec, _words(policy.codecs))
    yield from _privacy_verdicts(policy, terms)
    if policy.secure_aggregation:
        yield Verdict("secure aggregation", privacy.secure_aggregation is not None,
                      "secure aggregation" if privacy.secure_aggregation else "updates that the coordinator sees", "secure aggregation only")  # fmt: skip
    if policy.min_participants is not None:
        count = asked.participants if asked.participants is not None else len(terms.silos)
        yield Verdict("participants", count >= policy.min_participants, f"{count} silos", f"{policy.min_participants} silos or more")
    if policy.max_update_bytes is not None:
        size = asked.update_bytes
        yield Verdict("update size", None if size is None else size <= policy.max_update_bytes,
                      "what the first plan will say" if size is None else f"at most {size} bytes", f"at most {policy.max_update_bytes} bytes")  # fmt: skip
    if policy.max_runs is not None:
        runs = asked.runs | {terms.federation}
        yield Verdict("runs", len(runs) <= policy.max_runs, f"{len(runs)} with this one", f"at most {policy.max_runs} federations")


def _privacy_verdicts(policy: Policy, terms: Agreement) -> Iterator[Verdict]:
    rule, privacy = policy.privacy, terms.privacy
    if policy.private:
        yield Verdict("privacy", privacy.of_records, "differential privacy" if privacy.of_records else "training without differential privacy",
                      "differential privacy only")  # fmt: skip
    if not privacy.of_records:
        return
    if policy.private and rule.unit == "person":
        yield Verdict("unit", privacy.unit == "person", f"privacy of a {privacy.unit}", "privacy of a person")
    limits = rule.epsilon
    if (bounds := [b for b in (limits.run, limits.total) if b is not None]) and privacy.epsilon is not None:
        yield Verdict(
            "epsilon",
            privacy.epsilon <= min(bounds),
            f"epsilon {privacy.epsilon:g} over {privacy.rounds} rounds",
            f"at most {min(bounds):g}",
        )
        yield Verdict("delta", privacy.delta <= limits.delta, f"delta {privacy.delta:g}", f"at most {limits.delta:g}")


def _words(items: Iterable[Any], none: str = "none") -> str:
    return ", ".join(map(str, items)) or none
