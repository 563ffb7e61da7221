"""Intake: which of the delivered updates are accepted, and what becomes of the others. Each sum of updates begins with it.

An update is accepted by its header, and its tensors are checked while they are added up. What is found then is told by `Intake.mend`, and the sum
is made again: with a whole copy of that update, or without it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from silotune.components.aggregate.delivery import expectations, fetch_whole, open_delivery, silo_of
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Agreement
from silotune.components.learning.update import Expectation, Update, UpdateRefused
from silotune.components.process.progress import tell
from silotune.components.protocol import Plan, UpdateManifest
from silotune.components.rounds import Rounds
from silotune.components.store.content import CorruptObject
from silotune.components.store.object_store import ObjectMissing

OPENERS = 8  # updates whose headers are read at once


@dataclass
class Intake:
    """The updates of an open round, or of some of its silos, as far as they have been looked at."""

    box: str  # that looks at them
    rounds: Rounds
    manifests: dict[str, UpdateManifest]
    folder: Path  # for whole copies
    expected: dict[str, Expectation]
    accepted: dict[str, Update] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # silo -> the rule that its update broke

    @classmethod
    def of(
        cls, box: str, rounds: Rounds, plan: Plan, agreement: Agreement, manifests: dict[str, UpdateManifest], folder: Path
    ) -> Intake:  # fmt: skip
        """Accept or refuse each update by its header.

        Raises:
            CorruptObject, ObjectMissing: the plan's own list of tensors is damaged or gone; no silo answers for that.
        """
        silos = sorted(manifests)
        expected = expectations(rounds, plan, agreement, (silo for silo in silos if silo in plan.participants))
        intake = cls(box, rounds, manifests, folder, expected)
        with ThreadPoolExecutor(OPENERS) as pool:
            for silo, found in zip(silos, pool.map(intake._opened, silos), strict=True):
                if isinstance(found, Update):
                    intake.accepted[silo] = found
                else:
                    intake.refuse(silo, found)
        return intake

    def _opened(self, silo: str) -> Update | RefusedError | ObjectMissing:
        """One update, or why there is none."""
        manifest = self.manifests[silo]
        try:
            if silo not in self.expected:
                raise UpdateRefused(silo, "it was not asked", "wait for a plan that names it")
            return open_delivery(self.rounds, self.expected[silo], manifest.object, self.folder, manifest.header)
        except (RefusedError, ObjectMissing) as error:
            return error

    def refuse(self, silo: str, error: SilotuneError) -> None:
        """Keep an update out, for good where it is wrong in itself."""
        manifest = self.manifests[silo]
        rule = error.rule if isinstance(error, UpdateRefused) else error.reason
        tell(self.box, "warned", silo, detail=str(error))
        damaged = isinstance(error, CorruptObject | ObjectMissing)
        if isinstance(error, CorruptObject):
            self.rounds.store.delete(error.key)  # else the silo could not send it again: what is there, is not written
        self.rounds.refuse_update(manifest.round, silo, rule, resend=damaged, manifest=manifest.digest)
        self.accepted.pop(silo, None)
        self.refused[silo] = rule

    @property
    def objects(self) -> dict[str, str]:
        """Of what is accepted: silo -> digest of its update."""
        return {silo: self.manifests[silo].object for silo in self.accepted}

    def only(self, silos: set[str], why: str) -> dict[str, str]:
        """Go on with these alone; returns whose update is passed over now, each with why."""
        passed = sorted(self.accepted.keys() - silos)
        for silo in passed:
            self.accepted.pop(silo)
        return dict.fromkeys(passed, why)

    def mend(self, error: UpdateRefused | ObjectMissing) -> None:
        """After an update has turned out bad while it was read: have a whole copy of it instead, or refuse it. Raises the error where it is of none."""
        silo = silo_of(error, self.accepted)
        try:
            whole = fetch_whole(self.rounds, self.expected[silo], self.manifests[silo].object, self.folder, self.accepted[silo], error)
        except (RefusedError, ObjectMissing) as final:
            self.refuse(silo, final)
        else:
            self.accepted[silo] = whole
