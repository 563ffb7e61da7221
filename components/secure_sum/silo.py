"""A silo's part in a secure sum: its keys, its shares, its masked vector, and what it tells to open the sum.

The protocol is that of Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), its server being the records in the store (`secure_sum.records`). What a silo
makes sure of before it says anything is in `secure_sum.view`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file
from silotune.components.learning.update import Header, read_header, sum_of_squares
from silotune.components.process.progress import Pulse, beating
from silotune.components.protocol import Plan, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.mask_secrets import Covered, MaskSecrets, Opened
from silotune.components.secure_sum.records import (
    Confirmation,
    MaskedVector,
    MaskKeys,
    Opening,
    Roster,
    SealedShare,
    SealedShares,
    SecureRound,
    mark,
)
from silotune.components.secure_sum.view import View
from silotune.components.silo_job import one_at_a_time, silo_home, status_text
from silotune.components.silo_promise import Spent, require_left, spent_as_committed
from silotune.components.steward.admission import admit

if TYPE_CHECKING:
    from silotune.components.learning.privacy.masking import Mask

UPDATE = "update.safetensors"  # in the silo's folder: its update, which does not leave it
VECTOR = "masked.bin"  # in the silo's folder, until it is sent


def work(box: str, federation_file: str, silo_id: str, turn_text: str) -> str:
    """What the boxes ``share``, ``mask``, ``confirm`` and ``unmask`` do; returns the status."""
    federation = Federation.load(federation_file)
    turn = Turn.parse(turn_text)
    if turn.done:
        return status_text(silo_id, "ok", "nothing to do")
    home = silo_home(federation, federation.silo(silo_id))
    pulse = Pulse(home, box, turn.round)
    with one_at_a_time(home, pulse):
        rounds = Rounds.of(federation)
        plan = rounds.plan(turn.round)
        if plan is None or silo_id not in plan.participants:
            raise RefusedError(f"silo {silo_id!r}: round {turn.round} does not ask it; wait for a plan that does", "not a participant")
        part = SiloPart.of(federation, rounds, plan, turn, silo_id, home)
        done = {"share": part.share, "mask": part.mask, "confirm": part.confirm, "unmask": part.unmask}[box]()
    return status_text(silo_id, "ok", "" if done else "nothing to do")


@dataclass(frozen=True)
class SiloPart:
    """One silo in one attempt."""

    view: View
    home: Path

    @classmethod
    def of(cls, federation: Federation, rounds: Rounds, plan: Plan, turn: Turn, silo: str, home: Path) -> SiloPart:
        """
        Raises:
            FederationError: the round's updates are not summed securely.
            RefusedError: the round's terms are no longer those of the silo's own file, or its policy does not allow them; its records cannot be
                believed.
        """
        agreement = rounds.agreement(plan.agreement)
        secure_terms.terms_of(agreement)
        if odd := agreement.changes(federation.agreement(agreement.base, agreement.tokenizer)):
            rule = f"the plan's terms differ from this silo's federation file in {', '.join(odd)}; bring the two together"
            raise RefusedError(f"silo {silo!r}: {rule}", "terms differ")
        policy = admit(federation, agreement, silo, participants=len(plan.participants))
        few = max(secure_terms.least(agreement), (policy and policy.min_participants) or 0)
        return cls(View(SecureRound.of(rounds, turn, plan.digest), plan, agreement, silo, MaskSecrets(home), few), home)

    # The stages; each returns whether there was anything to do.

    def advertise(self) -> bool:
        """Make keys for this attempt, and say the public ones."""
        if self.view.secure.survivors() is not None:
            return False
        self.view.secrets.forget(self.view.secure.number)
        own = self.view.public(self.view.secrets.made(self.view.secure.number, self.view.secure.attempt))
        if self.view.secure.write(own).model_copy(update={"signature": None}) != own:
            raise self.view.refused("other keys of it stand in this attempt; take part in the next one", "mask secrets gone")
        return True

    def share(self) -> bool:
        """Share out the seed and the key of this attempt among the roster's silos."""
        from silotune.components.learning.privacy import shamir
        from silotune.components.learning.privacy.agreed_keys import seal

        roster = self.view.secure.roster("share")
        if roster is None or self.view.silo not in roster.members or self.view.secure.read(SealedShares, self.view.silo):
            return False
        peers, own = self.view.peers(roster), self.view.own()
        all_places = secure_terms.places(self.view.agreement)
        places = {peer: all_places[peer] for peer in peers}
        seed, key = bytes.fromhex(own.seed), bytes.fromhex(own.masking)
        needed = secure_terms.threshold(self.view.agreement)
        seeds, keys = (shamir.split(secret, places.values(), needed) for secret in (seed, key))
        shares = {}
        for peer, place in places.items():
            both = seeds[place] + keys[place]
            sealed = seal(self.view.sealing_key(peers[peer], self.view.silo, peer), both, self.view.about(roster, self.view.silo, peer))
            shares[peer] = SealedShare(sealed=sealed.hex(), seed=mark(seeds[place]), key=mark(keys[place]))
        self.view.secure.write(SealedShares(**self.view.head(), roster=roster.digest, seed=mark(seed), shares=shares))
        return True

    def mask(self) -> bool:
        """Send the update, as whole numbers under masks, where it has not been sent or was damaged in the store."""
        from silotune.components.learning.privacy.discrete_gaussian import Noise
        from silotune.components.learning.privacy.fixed_point import clipping_factor
        from silotune.components.learning.privacy.masked_vector import numbers, write_vector

        roster = self.view.secure.roster("mask")
        if roster is None or self.view.silo not in roster.members:
            return False
        rounds = self.view.secure.rounds
        standing = self.view.secure.read(MaskedVector, self.view.silo)
        if standing and rounds.store.size(rounds.object_key(standing.object, self.view.silo)) == standing.bytes:
            return False
        peers = self.view.peers(first := self.view.first(roster))
        self.view.shares(first, roster, peers)
        header = self.kept()
        if header is None:
            raise self.view.refused("holds no update that answers this plan; train again", "no update")
        self.view.secrets.require_fresh(self.view.plan.participants[self.view.silo].cursor, self.view.secure.number)
        self._cost()
        update = open_tensor_file(self.home / UPDATE)
        schema = rounds.json_object(self.view.plan.participants[self.view.silo].tensors)
        if {n: list(e.shape) for n, e in update.entries.items()} != schema:
            raise self.view.refused("its update has other tensors than the plan asks for; train again", "other tensors")
        with beating("masking"):
            point = secure_terms.fixed_point(self.view.agreement, schema)
            norm = sum(sum_of_squares(update.read(name)) for name in update.entries) ** 0.5
            if not math.isfinite(norm):
                rule = f"its update is not finite, and was damaged on this machine; delete {self.home / UPDATE}, and run again"
                raise self.view.refused(rule, "non-finite update")
            factor = clipping_factor(norm, point.clip) * secure_terms.weight(self.view.agreement, self.view.silo)
            path = self.home / VECTOR
            noise = Noise(self.view.secrets.noise(self.view.secure.number, self.view.secure.plan), point.noise) if point.noise else None
            digest = write_vector(path, numbers(update, point, factor, noise), self._masks(roster, peers))
            self.view.secrets.cover(self.view.secure.number, self.view.secure.attempt, Covered(roster=roster.digest, object=digest))
            rounds.put_object(path, self.view.silo)
        size = path.stat().st_size
        path.unlink()
        self.view.secure.write(MaskedVector(**self.view.head(), roster=roster.digest, object=digest, bytes=size, cursor=header.cursor))
        return True

    def confirm(self) -> bool:
        """Sign the survivors that this silo is shown: the only ones in the round that it will ever help to open the sum of."""
        survivors, roster = self.view.secure.survivors(), self.view.secure.roster("mask")
        if survivors is None or roster is None or self.view.silo not in roster.members:
            return False
        self.view.first(roster)
        self.view.require_sound(survivors, roster)
        self.view.own()  # whose memory of what it has confirmed is gone, is without its secrets, too: they lie side by side
        header = self.kept()
        participant = self.view.plan.participants[self.view.silo]
        self.view.secrets.confirm(
            Opened(
                round=self.view.secure.number, attempt=self.view.secure.attempt, record=survivors.digest, start=participant.cursor,
                survivors=sorted(survivors.members), summed=self.view.silo in survivors.members, rho=self._cost(),
                cursor=header.cursor if header else participant.cursor + secure_terms.examples(self.view.agreement, self.view.silo),
            )
        )  # fmt: skip
        if self.view.secure.read(Confirmation, self.view.silo):
            return False
        self.view.secure.write(Confirmation(**self.view.head(), survivors=survivors.digest))
        return True

    def unmask(self) -> bool:
        """Tell what opens the sum of the survivors: shares of their seeds, and of the keys of those who have dropped out."""
        survivors, roster = self.view.secure.survivors(), self.view.secure.roster("mask")
        if survivors is None or roster is None or self.view.silo not in roster.members or self.view.secure.read(Opening, self.view.silo):
            return False
        first = self.view.first(roster)
        self.view.require_confirmed(survivors, roster)
        shares = self.view.shares(first, roster, self.view.peers(first))
        seeds = {silo: seed.hex() for silo, (seed, _) in shares.items() if silo in survivors.members}
        keys = {silo: key.hex() for silo, (_, key) in shares.items() if silo not in survivors.members}
        self.view.secure.write(Opening(**self.view.head(), survivors=survivors.digest, seeds=seeds, keys=keys))
        return True

    def kept(self) -> Header | None:
        """Of the update in the silo's folder, if it answers this plan."""
        try:
            header = read_header(self.home / UPDATE)
        except (MalformedFile, FileNotFoundError):
            return None
        return header if header.plan == self.view.plan.digest else None

    def _cost(self) -> float:
        """What this sum costs of the promise about silos. Raises RefusedError where too little is left, by what the silo itself has helped to open."""
        schema = self.view.secure.rounds.json_object(self.view.plan.participants[self.view.silo].tensors)
        if not (cost := secure_terms.silo_rho(self.view.agreement, schema)):
            return 0.0
        before = Spent(rho=sum(old.rho for old in self.view.secrets.opened() if old.summed and old.round != self.view.secure.number))
        require_left(self.view.agreement, before + spent_as_committed(self.view.secure.rounds), Spent(rho=cost), f"silo {self.view.silo!r}")
        return cost

    def _masks(self, roster: Roster, peers: Mapping[str, MaskKeys]) -> list[Mask]:
        from silotune.components.learning.privacy.masking import pair_mask, self_mask

        own, context = self.view.own(), self.view.secure.context
        pairs = [
            pair_mask(self.view.silo, other, bytes.fromhex(own.masking), bytes.fromhex(peers[other].masking), context)
            for other in sorted(roster.members)
            if other != self.view.silo
        ]
        return [self_mask(bytes.fromhex(own.seed), context), *pairs]
