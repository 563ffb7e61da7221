"""The silo's own policy: what its steward lets federations do with its records, whatever a coordinator asks.

``policy.yaml`` lies in the silo's ``storage``; in a Job, beside the federation file in the silo's own ConfigMap; or where SILOTUNE_POLICY says: a
file, or a folder with such a file. What a federation asks for is held against it by `admission`.

No term is required but ``dataset``; what is left out is not restricted. Without a policy a silo allows whatever its copy of the federation file
says; but where one has held, its absence allows nothing.
"""

from __future__ import annotations

import os
import stat
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from silotune.components import federation_file
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.federation_file import PUBLIC_KEY
from silotune.components.protocol import Report
from silotune.components.steward.budget import Limits, Unit
from silotune.components.terms.privacy import Privacy
from silotune.components.terms.section import Positive, Section
from silotune.components.terms.strategies import STRATEGIES

VARIABLE = "SILOTUNE_POLICY"
NAME = "policy.yaml"
WRONG = "policy is wrong"
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
        None,
        description="Numbers that reports may hold; the others are left out, and without `loss` updates tell no training loss either. An update "
        "always says its examples, tokens and steps. Default: all that the protocol knows.",
    )
    scores: bool = Field(True, description="Score globals on the silo's valid and test records, and tell the sums.")
    min_scored: Positive | None = Field(
        None, description="Examples that a score must be over at least: a sum over few tells of each of them, and is not made."
    )
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

    def scored(self, examples: int) -> bool:
        """Whether a score over so many examples may be told."""
        return self.scores and examples >= (self.min_scored or 0)

    @classmethod
    def load(cls, file: Path) -> Policy:
        """Raises FederationError with every problem found."""
        try:
            raw = federation_file.parse(file, "policy", "dataset", "`silotune policy new FILE` writes one to start from")
        except FederationError as error:
            raise FederationError(str(error), WRONG) from None
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = [federation_file.explain(e, cls, PATTERNS) for e in error.errors(include_url=False)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise FederationError("\n".join([f"{file.name}: {count}", *(f"  {p}" for p in problems)]), WRONG)

    @classmethod
    def of(cls, federation: Federation, silo_id: str) -> Policy | None:
        """The one that holds for a silo on this machine, if there is any.

        Raises:
            FederationError: SILOTUNE_POLICY names none; it is wrong; or anybody may write it.
        """
        if (path := place(federation, silo_id)) is None:
            return None
        policy = cls.load(path)
        if path.stat().st_mode & stat.S_IWOTH:
            raise FederationError(f"{path}: must not be writable by everybody on this machine; take that away: chmod o-w {path}", WRONG)
        return policy


def place(federation: Federation, silo_id: str) -> Path | None:
    """Where the policy lies that holds for a silo on this machine, if there is any.

    A name that is there counts, also where it is a link to nothing, or a folder in which this user may not look: what cannot be read allows nothing.
    """
    if named := os.environ.get(VARIABLE):
        path = Path(named)
        return path / NAME if path.is_dir() else path
    mounted = federation.file.parent if federation.file.parent == MOUNT else None
    for folder in filter(None, (mounted, Path(federation.silo(silo_id).storage))):
        try:
            os.lstat(folder / NAME)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise FederationError(f"{folder / NAME}: cannot be looked for: {error.strerror}; give access", WRONG) from None
        return folder / NAME
    return None


def counted_by(policy: Policy | None, terms: Privacy) -> tuple[Limits, Unit]:
    """By which limits, and about whose traces, budgets are counted: as the policy says, and where it limits nothing, as the federation promises."""
    rule = policy.privacy if policy else PrivacyRule()
    if rule.epsilon.any:
        return rule.epsilon, rule.unit
    delta = rule.epsilon.delta if "delta" in rule.epsilon.model_fields_set else terms.delta
    return Limits(delta=delta), rule.unit if "unit" in rule.model_fields_set else terms.unit
