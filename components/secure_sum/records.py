"""What silos and coordinator tell each other for a secure sum: signed records, and where they lie in the store.

    rounds/00003/secagg/<a>/keys/<silo>.json      two fresh public keys: for shares, and for masks
    rounds/00003/secagg/<a>/rosters/share.json    the coordinator: with whom shares are exchanged
    rounds/00003/secagg/<a>/shares/<silo>.json    a share of the silo's own secrets for each of them, sealed
    rounds/00003/secagg/<a>/rosters/mask.json     the coordinator: who has shared, and is masked against
    rounds/00003/secagg/<a>/masked/<silo>.json    names the silo's masked vector, an object like an update file
    rounds/00003/secagg/survivors.json            the coordinator: whose vectors are summed; one for the round, whatever the attempt
    rounds/00003/secagg/<a>/confirmations/<silo>.json  that these are the survivors it was shown: it confirms no others in the round
    rounds/00003/secagg/<a>/openings/<silo>.json  the shares that open that sum, told once a threshold of silos has confirmed it

An attempt ``a`` has the number of the round's attempt that began it. A roster names its members' records by digest, so that all silos work from
the same bytes, or not at all. Of `Survivors` there is one in a round: from then on its attempt is the one that all go on with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import Field

from silotune.components.errors import RefusedError
from silotune.components.protocol import OfSilo, Plan, Record, Turn
from silotune.components.round_records import READERS
from silotune.components.rounds import Rounds
from silotune.components.store.object_store import ObjectMissing
from silotune.components.terms.section import Section

HEX_32 = "^[0-9a-f]{64}$"
Stage = Literal["share", "mask"]


class OfAttempt(OfSilo):
    """A silo's record in one attempt at a secure sum."""

    attempt: int = Field(ge=1)
    plan: str


class MaskKeys(OfAttempt):
    """A silo's public keys, made for this attempt only: X25519, in hexadecimal."""

    sealing: str = Field(pattern=HEX_32, description="Shares for it are sealed to this one.")
    masking: str = Field(pattern=HEX_32, description="Masks are agreed on by this one.")


class SealedShare(Section):
    """What one holder gets of a silo's two secrets, and by what anybody knows a share again that the holder tells later."""

    sealed: str = Field(description="Both shares, of the seed and then of the key, sealed to the holder; hexadecimal.")
    seed: str = Field(pattern=HEX_32, description="`mark` of the seed's share.")
    key: str = Field(pattern=HEX_32, description="`mark` of the key's share.")


class SealedShares(OfAttempt):
    """A silo's secrets, shared out to all members of a roster, itself among them."""

    roster: str
    seed: str = Field(pattern=HEX_32, description="`mark` of the seed.")
    shares: dict[str, SealedShare]


class MaskedVector(OfAttempt):
    """Names a masked vector."""

    roster: str
    object: str = Field(description="SHA-256 of its bytes.")
    bytes: int
    cursor: int = Field(ge=1, description="Examples consumed after this round.")


class Confirmation(OfAttempt):
    """A silo's word that it was shown these survivors, and will help to open no other sum of the round."""

    survivors: str


class Opening(OfAttempt):
    """What one holder tells of shares: of the survivors' seeds, and of the others' keys; never both of one silo."""

    survivors: str
    seeds: dict[str, str] = Field(description="Survivor -> share of its seed.")
    keys: dict[str, str] = Field(description="Silo that has shared and is no survivor -> share of its key.")


class Roster(Record):
    """Who goes on to a stage, by the digests of their records in the stage before."""

    round: int
    attempt: int = Field(ge=1)
    stage: Stage
    plan: str
    members: dict[str, str]
    at: float


class Survivors(Record):
    """Whose masked vectors are summed."""

    round: int
    attempt: int = Field(ge=1)
    plan: str
    roster: str
    members: dict[str, str]
    missing: dict[str, str] = Field(description="Participants that are not summed, and why.")
    at: float


A = TypeVar("A", bound=OfAttempt)
FOLDERS: dict[type[OfAttempt], str] = {MaskKeys: "keys", SealedShares: "shares", MaskedVector: "masked", Confirmation: "confirmations", Opening: "openings"}  # fmt: skip


@dataclass(frozen=True)
class SecureRound:
    """The records of a round's secure sum, in the attempt that is worked on."""

    rounds: Rounds
    number: int
    attempt: int
    plan: str  # digest

    @classmethod
    def of(cls, rounds: Rounds, turn: Turn, plan: str) -> SecureRound:
        """In the attempt whose survivors are known; where none are, in the turn's own. Raises RefusedError as `survivors`."""
        own = cls(rounds, turn.round, turn.attempt, plan)
        standing = own.survivors()
        return own if standing is None else cls(rounds, turn.round, standing.attempt, plan)

    @property
    def context(self) -> bytes:
        """What the attempt's keys are bound to."""
        return f"{self.rounds.federation}\n{self.number}\n{self.attempt}\n{self.plan}".encode()

    def key(self, *parts: str) -> str:
        return self.rounds.key("rounds", f"{self.number:05d}", "secagg", *parts)

    def place(self, kind: type[OfAttempt], silo: str) -> str:
        return self.key(str(self.attempt), FOLDERS[kind], f"{silo}.json")

    def read(self, kind: type[A], silo: str, digest: str | None = None) -> A | None:
        """A silo's record in this attempt.

        Args:
            digest: that it must have; what a roster names must be there.

        Raises:
            RefusedError: it is not the silo's, of another attempt, or not the one that is named.
        """
        key = self.place(kind, silo)
        try:
            found = self.rounds.read(kind, key)
        except ObjectMissing:
            if digest is None:
                return None
            raise RefusedError(f"{key}: is gone, and a roster names it; restore it from a backup", "record gone") from None
        if (found.silo, found.round, found.attempt, found.plan) != (silo, self.number, self.attempt, self.plan):
            raise RefusedError(f"{key}: must be of {silo}, this attempt and this plan; the record was put elsewhere", "filed elsewhere")
        if digest is not None and found.digest != digest:
            raise RefusedError(f"{key}: is not the record that the roster names; the store shows different ones", "another record")
        return found

    def named(self, kind: type[A], members: Mapping[str, str]) -> dict[str, A]:
        """By silo: the records that a roster, or the survivors, name by digest. Raises RefusedError where one is gone or is another one."""
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda silo: self.read(kind, silo, members[silo]), sorted(members))
            return {record.silo: record for record in found if record is not None}

    def write(self, record: A) -> A:
        """Returns the record that stands."""
        return self.rounds.create(record, self.place(type(record), record.silo))

    def believed(self, kind: type[A], silos: Iterable[str]) -> tuple[dict[str, A], dict[str, str]]:
        """Those silos' records that are there, and why others cannot be believed."""

        def tried(silo: str) -> tuple[str, A | None, str]:
            try:
                return silo, self.read(kind, silo), ""
            except RefusedError as error:
                return silo, None, str(error)

        with ThreadPoolExecutor(READERS) as pool:
            results = list(pool.map(tried, sorted(silos)))
        return {silo: record for silo, record, _ in results if record}, {silo: why for silo, _, why in results if why}

    def roster(self, stage: Stage) -> Roster | None:
        """Raises RefusedError where it is of something else."""
        key = self.roster_key(stage)
        try:
            found = self.rounds.read(Roster, key)
        except ObjectMissing:
            return None
        if (found.attempt, found.stage, found.plan) != (self.attempt, stage, self.plan):
            raise RefusedError(f"{key}: must be of this attempt, stage and plan; the record was put elsewhere", "filed elsewhere")
        return found

    def write_roster(self, roster: Roster) -> Roster:
        return self.rounds.create(roster, self.roster_key(roster.stage))

    def roster_key(self, stage: Stage) -> str:
        return self.key(str(self.attempt), "rosters", f"{stage}.json")

    def survivors(self) -> Survivors | None:
        """Of the round, in whatever attempt. Raises RefusedError where they are of another plan."""
        key = self.key("survivors.json")
        try:
            found = self.rounds.read(Survivors, key)
        except ObjectMissing:
            return None
        if found.plan != self.plan:
            raise RefusedError(f"{key}: must be of this round's plan; the record was put elsewhere", "filed elsewhere")
        return found

    def write_survivors(self, survivors: Survivors) -> Survivors:
        return self.rounds.create(survivors, self.key("survivors.json"))

    def confirmed(self, survivors: Survivors, holders: Iterable[str]) -> list[str]:
        """Those of the holders of shares who were shown the same survivors."""
        found, _ = self.believed(Confirmation, holders)
        return [silo for silo, record in found.items() if record.survivors == survivors.digest]


def mark(secret: bytes) -> str:
    """By what a secret is known again, by those who are told it: SHA-256. Secrets are random, and cannot be guessed from it."""
    return hashlib.sha256(b"silotune secret\n" + secret).hexdigest()


def has_trained(rounds: Rounds, turn: Turn, silo: str) -> bool:
    """Whether the store has what a silo's training leaves in this turn: its update, or, of one that stays with it, the keys that will cover it.

    Raises:
        RefusedError: the record is not the silo's.
    """
    plan = rounds.plan(turn.round)
    if plan is None or rounds.agreement(plan.agreement).privacy.secure_aggregation is None:
        return rounds.update(turn.round, silo) is not None
    secure = SecureRound.of(rounds, turn, plan.digest)
    return secure.survivors() is not None or secure.read(MaskKeys, silo) is not None


def spent(rounds: Rounds, plan: Plan) -> dict[str, int]:
    """Of a round that ends without a new global: the data cursors of the silos whose sum may have been opened.

    Trained anew on the same examples from the same global, their updates would be nearly the same, and another sum of them would tell them
    apart; silos refuse that (`mask_secrets`).

    Raises:
        RefusedError: a record of the sum was altered.
    """
    found = SecureRound(rounds, plan.round, 1, plan.digest).survivors()
    if found is None:
        return {}
    secure = SecureRound(rounds, plan.round, found.attempt, plan.digest)
    return {silo: record.cursor for silo, record in secure.named(MaskedVector, found.members).items()}
