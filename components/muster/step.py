"""muster: fix who goes on to the next stage of a round's secure sum, by what the silos have put into the store.

    muster share     those with keys exchange shares
    muster mask      those who have shared are masked against
    muster confirm   those whose masked vectors are there are summed: the survivors, fixed once for the round
    muster unmask    nothing is fixed; it goes on if a threshold of silos has confirmed the survivors

A silo that comes later is left out of this attempt. With too few of them the attempt ends here, and a later one begins anew with fresh keys,
without training; once there are survivors, all later attempts go on to open their sum.

    python -m silotune.components.muster.step FEDERATION "round:1 attempt:1" share "north ok" "south failed: disk full"
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable

from silotune.components import opening, silo_promise
from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation
from silotune.components.process import child
from silotune.components.process.progress import tell
from silotune.components.protocol import Plan, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.records import (
    A,
    MaskedVector,
    MaskKeys,
    Roster,
    SealedShares,
    SecureRound,
    Stage,
    Survivors,
)
from silotune.components.silo_job import first_troubles


def run(federation: str, turn: str, stage: str, statuses: list[str]) -> str:
    """As a pipeline task; nothing at all where no round is open.

    Args:
        stage: ``share``, ``mask``, ``confirm`` or ``unmask``.
        statuses: of the silos' boxes before it.
    """
    if Turn.parse(turn).done:
        return turn
    return child.coordinate("muster", federation, turn, stage, *statuses)


def work(federation_file: str, turn_text: str, stage: str, *statuses: str) -> str:
    """Returns the turn for the silos' boxes of the stage; one that is done where they have nothing to do.

    Raises:
        RefusedError: the round was never opened.
    """
    federation = Federation.load(federation_file)
    rounds, turn = Rounds.of(federation), Turn.parse(turn_text)
    plan = rounds.plan(turn.round)
    if plan is None:
        raise RefusedError(f"round {turn.round} was never opened; run again")
    latest = rounds.latest()
    if latest is not None and latest.round >= turn.round:
        return Turn(done=f"round {turn.round} is committed").text
    agreement = rounds.agreement(plan.agreement)
    muster = Muster(federation, SecureRound.of(rounds, turn, plan.digest), plan, agreement, first_troubles(statuses))
    if (survivors := muster.secure.survivors()) is not None:
        return turn_text if muster.goes_on(stage, survivors) else Turn(done=f"round {turn.round} has its survivors").text
    enough = {"share": muster.to_share, "mask": muster.to_mask, "confirm": muster.to_confirm, "unmask": lambda: False}[stage]()
    return turn_text if enough else Turn(done=f"too few silos to {stage} in round {turn.round}").text


class Muster:
    """The coordinator's look at one attempt."""

    def __init__(self, federation: Federation, secure: SecureRound, plan: Plan, agreement: Agreement, troubles: dict[str, str]) -> None:
        self.federation, self.secure, self.plan, self.agreement, self.troubles = federation, secure, plan, agreement, troubles

    def to_share(self) -> bool:
        """Those whose keys are there; silos that show the same key are all left out."""
        from silotune.components.learning.privacy.agreed_keys import is_key

        if self.secure.roster("share"):
            return True
        silo_promise.secure_epsilon_with(self.secure.rounds, self.plan, self.agreement)
        found = self._found(MaskKeys, self.plan.participants)
        shown = Counter(key for record in found.values() for key in (record.sealing, record.masking))
        members = {}
        for silo, record in found.items():
            keys = (record.sealing, record.masking)
            if any(shown[key] > 1 for key in keys):
                tell("muster", "warned", silo, detail="it shows a key that is another's, and is left out")
            elif not all(is_key(bytes.fromhex(key)) for key in keys):
                tell("muster", "warned", silo, detail="it shows a key by which no secret can be agreed on, and is left out")
            else:
                members[silo] = record.digest
        return self._enough(members) and self._fixed("share", members)

    def to_mask(self) -> bool:
        """Those who have shared with all of the first roster."""
        if self.secure.roster("mask"):
            return True
        first = self.secure.roster("share")
        if first is None:
            return False
        found = self._found(SealedShares, first.members)
        members = {s: r.digest for s, r in found.items() if r.roster == first.digest and r.shares.keys() == first.members.keys()}
        return self._enough(members) and self._fixed("mask", members)

    def to_confirm(self) -> bool:
        """Those whose masked vectors are there, whole by their size, and whose part in the data is as the terms have it."""
        roster = self.secure.roster("mask")
        if roster is None:
            return False
        found = {s: r for s, r in self._found(MaskedVector, roster.members).items() if r.roster == roster.digest and self._is_there(r)}
        members = {s: r.digest for s, r in found.items()}
        if not self._enough(members):
            return False
        missing = {s: self.troubles.get(s, "failed: dropped out of the secure sum") for s in self.plan.participants if s not in members}
        self.secure.write_survivors(
            Survivors(
                round=self.secure.number, attempt=self.secure.attempt, plan=self.secure.plan, roster=roster.digest, members=members,
                missing=missing, at=time.time(),
            )
        )  # fmt: skip
        return True

    def goes_on(self, stage: str, survivors: Survivors) -> bool:
        """Whether the silos' boxes of a stage have anything to do for a round whose survivors stand."""
        if stage == "share":
            return False
        if stage == "mask":
            return not self.all_there(survivors)
        roster = self.secure.roster("mask")
        if roster is None:  # aggregate says which record is gone
            return False
        confirmed = len(self.secure.confirmed(survivors, roster.members))
        if stage == "confirm":  # also where enough have: some of them may be gone by the time that shares are told
            return confirmed < len(roster.members)
        return confirmed >= secure_terms.threshold(self.agreement)

    def all_there(self, survivors: Survivors) -> bool:
        """Whether the store still has all survivors' vectors; one that was damaged is deleted, and its silo sends it again."""
        found = self._found(MaskedVector, survivors.members)
        return all(s in found and self._is_there(found[s]) for s in survivors.members)

    def _is_there(self, record: MaskedVector) -> bool:
        rounds, start = self.secure.rounds, self.plan.participants[record.silo].cursor
        if not start < record.cursor <= start + secure_terms.examples(self.agreement, record.silo):
            tell("muster", "warned", record.silo, detail=f"its data cursor is {record.cursor}, the plan's {start}; it is left out")
            return False
        size = secure_terms.vector_bytes(self.agreement, rounds.json_object(self.plan.participants[record.silo].tensors))
        return record.bytes == size == rounds.store.size(rounds.object_key(record.object, record.silo))

    def _found(self, kind: type[A], silos: Iterable[str]) -> dict[str, A]:
        records, bad = self.secure.believed(kind, silos)
        for silo, why in bad.items():
            tell("muster", "warned", silo, detail=why)
        return records

    def _enough(self, members: dict[str, str]) -> bool:
        share = opening.share_trained(self.plan, self.agreement, {s: secure_terms.examples(self.agreement, s) for s in members})
        return len(members) >= secure_terms.least(self.agreement) and opening.has_quorum(self.federation, sorted(members), share)

    def _fixed(self, stage: Stage, members: dict[str, str]) -> bool:
        self.secure.write_roster(
            Roster(
                round=self.secure.number, attempt=self.secure.attempt, stage=stage, plan=self.secure.plan, members=members, at=time.time()
            )
        )  # fmt: skip
        return True


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
