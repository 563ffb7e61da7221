"""A silo's part in a secure sum: its keys, its shares, its masked vector, and what it tells to open the sum.

The protocol is that of Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), its server being the records in the store (`secure_sum.records`). A silo
believes nobody: it verifies signatures, works from the records that a roster names by digest, and refuses rosters that are too small, that are no
part of the one before, that leave it out, or in which two silos show the same key. Where it refuses, it is as if it had dropped out.

Whether all are shown the same is for the silos to find out (their section 6 and figure 4, ConsistencyCheck): each signs the survivors that it was shown,
one record in a round, and tells its shares only when a threshold t of silos has signed the very same record. Of n silos, c of them in league with the
coordinator, no two records can get t signatures where 2t > n + c. The record names the roster and the vectors, and a silo signs it only if all
these vectors were masked against that roster; else some of them could have been masked against fewer, and come out of it by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, Federation, canonical_json
from silotune.components.learning.tensor_file import MalformedFile, open_tensor_file
from silotune.components.learning.update import Header, read_header, sum_of_squares
from silotune.components.process.progress import Pulse, beating
from silotune.components.protocol import Plan, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.mask_secrets import Covered, MaskSecrets, Opened, Secrets
from silotune.components.secure_sum.records import (
    Confirmation,
    MaskedVector,
    MaskKeys,
    Opening,
    Roster,
    SealedShare,
    SealedShares,
    SecureRound,
    Survivors,
    mark,
)
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

    secure: SecureRound
    plan: Plan
    agreement: Agreement
    silo: str
    home: Path
    secrets: MaskSecrets
    few: int  # silos that a roster, or a sum, must have: by the terms, and by the silo's own policy

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
        return cls(SecureRound.of(rounds, turn, plan.digest), plan, agreement, silo, home, MaskSecrets(home), few)

    # The stages; each returns whether there was anything to do.

    def advertise(self) -> bool:
        """Make keys for this attempt, and say the public ones."""
        if self.secure.survivors() is not None:
            return False
        self.secrets.forget(self.secure.number)
        own = self._public(self.secrets.made(self.secure.number, self.secure.attempt))
        if self.secure.write(own).model_copy(update={"signature": None}) != own:
            raise self._refused("other keys of it stand in this attempt; take part in the next one", "mask secrets gone")
        return True

    def share(self) -> bool:
        """Share out the seed and the key of this attempt among the roster's silos."""
        from silotune.components.learning.privacy import shamir
        from silotune.components.learning.privacy.agreed_keys import seal

        roster = self.secure.roster("share")
        if roster is None or self.silo not in roster.members or self.secure.read(SealedShares, self.silo):
            return False
        peers, own = self._peers(roster), self._own()
        all_places = secure_terms.places(self.agreement)
        places = {peer: all_places[peer] for peer in peers}
        seed, key = bytes.fromhex(own.seed), bytes.fromhex(own.masking)
        needed = secure_terms.threshold(self.agreement)
        seeds, keys = (shamir.split(secret, places.values(), needed) for secret in (seed, key))
        shares = {}
        for peer, place in places.items():
            both = seeds[place] + keys[place]
            sealed = seal(self._sealing_key(peers[peer], self.silo, peer), both, self._about(roster, self.silo, peer))
            shares[peer] = SealedShare(sealed=sealed.hex(), seed=mark(seeds[place]), key=mark(keys[place]))
        self.secure.write(SealedShares(**self._head(), roster=roster.digest, seed=mark(seed), shares=shares))
        return True

    def mask(self) -> bool:
        """Send the update, as whole numbers under masks, where it has not been sent or was damaged in the store."""
        from silotune.components.learning.privacy.discrete_gaussian import Noise
        from silotune.components.learning.privacy.fixed_point import clipping_factor
        from silotune.components.learning.privacy.masked_vector import numbers, write_vector

        roster = self.secure.roster("mask")
        if roster is None or self.silo not in roster.members:
            return False
        rounds = self.secure.rounds
        standing = self.secure.read(MaskedVector, self.silo)
        if standing and rounds.store.size(rounds.object_key(standing.object, self.silo)) == standing.bytes:
            return False
        peers = self._peers(first := self._first(roster))
        self._shares(first, roster, peers)
        header = self.kept()
        if header is None:
            raise self._refused("holds no update that answers this plan; train again", "no update")
        self.secrets.require_fresh(self.plan.participants[self.silo].cursor, self.secure.number)
        self._cost()
        update = open_tensor_file(self.home / UPDATE)
        schema = rounds.json_object(self.plan.participants[self.silo].tensors)
        if {n: list(e.shape) for n, e in update.entries.items()} != schema:
            raise self._refused("its update has other tensors than the plan asks for; train again", "other tensors")
        with beating("masking"):
            point = secure_terms.fixed_point(self.agreement, schema)
            norm = sum(sum_of_squares(update.read(name)) for name in update.entries) ** 0.5
            if not math.isfinite(norm):
                rule = f"its update is not finite, and was damaged on this machine; delete {self.home / UPDATE}, and run again"
                raise self._refused(rule, "non-finite update")
            factor = clipping_factor(norm, point.clip) * secure_terms.weight(self.agreement, self.silo)
            path = self.home / VECTOR
            noise = Noise(self.secrets.noise(self.secure.number, self.secure.plan), point.noise) if point.noise else None
            digest = write_vector(path, numbers(update, point, factor, noise), self._masks(roster, peers))
            self.secrets.cover(self.secure.number, self.secure.attempt, Covered(roster=roster.digest, object=digest))
            rounds.put_object(path, self.silo)
        size = path.stat().st_size
        path.unlink()
        self.secure.write(MaskedVector(**self._head(), roster=roster.digest, object=digest, bytes=size, cursor=header.cursor))
        return True

    def confirm(self) -> bool:
        """Sign the survivors that this silo is shown: the only ones in the round that it will ever help to open the sum of."""
        survivors, roster = self.secure.survivors(), self.secure.roster("mask")
        if survivors is None or roster is None or self.silo not in roster.members:
            return False
        self._first(roster)
        self._check(survivors, roster)
        self._own()  # whose memory of what it has confirmed is gone, is without its secrets, too: they lie side by side
        header = self.kept()
        participant = self.plan.participants[self.silo]
        self.secrets.confirm(
            Opened(
                round=self.secure.number, attempt=self.secure.attempt, record=survivors.digest, start=participant.cursor,
                survivors=sorted(survivors.members), summed=self.silo in survivors.members, rho=self._cost(),
                cursor=header.cursor if header else participant.cursor + secure_terms.examples(self.agreement, self.silo),
            )
        )  # fmt: skip
        if self.secure.read(Confirmation, self.silo):
            return False
        self.secure.write(Confirmation(**self._head(), survivors=survivors.digest))
        return True

    def unmask(self) -> bool:
        """Tell what opens the sum of the survivors: shares of their seeds, and of the keys of those who have dropped out."""
        survivors, roster = self.secure.survivors(), self.secure.roster("mask")
        if survivors is None or roster is None or self.silo not in roster.members or self.secure.read(Opening, self.silo):
            return False
        first = self._first(roster)
        self._agreed(survivors, roster)
        shares = self._shares(first, roster, self._peers(first))
        seeds = {silo: seed.hex() for silo, (seed, _) in shares.items() if silo in survivors.members}
        keys = {silo: key.hex() for silo, (_, key) in shares.items() if silo not in survivors.members}
        self.secure.write(Opening(**self._head(), survivors=survivors.digest, seeds=seeds, keys=keys))
        return True

    def kept(self) -> Header | None:
        """Of the update in the silo's folder, if it answers this plan."""
        try:
            header = read_header(self.home / UPDATE)
        except (MalformedFile, FileNotFoundError):
            return None
        return header if header.plan == self.plan.digest else None

    def _cost(self) -> float:
        """What this sum costs of the promise about silos. Raises RefusedError where too little is left, by what the silo itself has helped to open."""
        schema = self.secure.rounds.json_object(self.plan.participants[self.silo].tensors)
        if not (cost := secure_terms.silo_rho(self.agreement, schema)):
            return 0.0
        before = Spent(rho=sum(old.rho for old in self.secrets.opened() if old.summed and old.round != self.secure.number))
        require_left(self.agreement, before + spent_as_committed(self.secure.rounds), Spent(rho=cost), f"silo {self.silo!r}")
        return cost

    # What is verified

    def _peers(self, roster: Roster) -> dict[str, MaskKeys]:
        """The keys of all members of a first roster.

        Raises:
            RefusedError: the roster would not protect this silo.
        """
        from silotune.components.learning.privacy.agreed_keys import is_key

        if self.silo not in roster.members:
            raise self._refused("the roster leaves it out", "not in the roster")
        if strangers := sorted(set(roster.members) - set(self.plan.participants)):
            raise self._refused(f"the roster names {', '.join(strangers)}, whom the plan does not ask", "strangers in the roster")
        if len(roster.members) < self.few:
            raise self._refused(f"the roster has {len(roster.members)} silos, needs {self.few}", "roster too small")
        peers = {silo: self.secure.named(MaskKeys, silo, digest) for silo, digest in roster.members.items()}
        for silo, shown in peers.items():
            if not (is_key(bytes.fromhex(shown.sealing)) and is_key(bytes.fromhex(shown.masking))):
                raise self._refused(f"by a key of {silo} no secret can be agreed on; look into that silo", f"bad key of {silo}")
        own = self._public(self._own())
        if (peers[self.silo].sealing, peers[self.silo].masking) != (own.sealing, own.masking):
            raise self._refused("the roster names other keys as its own; take part in the next attempt", "mask secrets gone")
        if len({key for peer in peers.values() for key in (peer.sealing, peer.masking)}) != 2 * len(peers):
            raise self._refused("two silos of the roster show the same key", "same key twice")
        return peers

    def _first(self, roster: Roster) -> Roster:
        """The roster that a second one is part of. Raises RefusedError where it is not, or is too small."""
        first = self.secure.roster("share")
        if first is None or not roster.members.keys() <= first.members.keys():
            raise self._refused("the second roster names silos that the first one does not", "roster grew")
        if len(roster.members) < self.few:
            raise self._refused(f"the roster has {len(roster.members)} silos, needs {self.few}", "roster too small")
        return first

    def _shares(self, first: Roster, roster: Roster, peers: Mapping[str, MaskKeys]) -> dict[str, tuple[bytes, bytes]]:
        """By silo: the shares (of its seed, of its key) that this silo holds.

        Raises:
            RefusedError: one is not what its silo has signed; who it is stands in the message.
        """
        from silotune.components.learning.privacy.agreed_keys import unseal
        from silotune.components.learning.privacy.shamir import SHARE_BYTES

        found = {}
        for dealer, digest in sorted(roster.members.items()):
            dealt = self.secure.named(SealedShares, dealer, digest)
            bad = self._refused(f"the shares of {dealer} are not as the protocol has them; look into that silo", f"bad shares of {dealer}")
            if dealt.roster != first.digest or dealt.shares.keys() != first.members.keys():
                raise bad
            share = dealt.shares[self.silo]
            try:
                both = unseal(
                    self._sealing_key(peers[dealer], dealer, self.silo), bytes.fromhex(share.sealed), self._about(first, dealer, self.silo)
                )
            except ValueError:
                raise bad from None
            seed, key = both[:SHARE_BYTES], both[SHARE_BYTES:]
            if (mark(seed), mark(key), len(both)) != (share.seed, share.key, 2 * SHARE_BYTES):
                raise bad
            found[dealer] = seed, key
        return found

    def _check(self, survivors: Survivors, roster: Roster) -> None:
        """Raises RefusedError where a set of survivors would not protect those in it."""
        if survivors.roster != roster.digest or not survivors.members.keys() <= roster.members.keys():
            raise self._refused("the survivors are not of the second roster", "survivors grew")
        if len(survivors.members) < self.few:
            raise self._refused(f"{len(survivors.members)} silos survive, a sum needs {self.few}", "too few survivors")
        for silo, digest in sorted(survivors.members.items()):
            if self.secure.named(MaskedVector, silo, digest).roster != roster.digest:
                rule = f"the vector of {silo} was masked against another roster than the one shown; the coordinator tells silos different things"
                raise self._refused(rule, "another roster")

    def _agreed(self, survivors: Survivors, roster: Roster) -> None:
        """Raises RefusedError unless this silo, and a threshold of all, have confirmed these survivors."""
        if survivors.roster != roster.digest:
            raise self._refused("the survivors are not of the second roster", "survivors grew")
        if not self.secrets.has_confirmed(self.secure.number, survivors.digest):
            raise self._refused("these are not the survivors that it has confirmed", "not confirmed")
        needed, agreeing = secure_terms.threshold(self.agreement), self.secure.confirmed(survivors, roster.members)
        if len(agreeing) < needed:
            rule = f"{len(agreeing)} silos have confirmed these survivors, {needed} must, so that no others can be confirmed; run again to ask the rest"
            raise self._refused(rule, "too few confirmations")

    # Keys

    def _own(self) -> Secrets:
        return self.secrets.known(self.secure.number, self.secure.attempt)

    def _public(self, own: Secrets) -> MaskKeys:
        from silotune.components.learning.privacy.agreed_keys import public_key

        sealing, masking = (public_key(bytes.fromhex(secret)).hex() for secret in (own.sealing, own.masking))
        return MaskKeys(**self._head(), sealing=sealing, masking=masking)

    def _sealing_key(self, peer: MaskKeys, dealer: str, holder: str) -> bytes:
        from silotune.components.learning.privacy.agreed_keys import shared_key

        private, public = bytes.fromhex(self._own().sealing), bytes.fromhex(peer.sealing)
        return shared_key(private, public, self.secure.context, f"share {dealer} {holder}")

    def _masks(self, roster: Roster, peers: Mapping[str, MaskKeys]) -> list[Mask]:
        from silotune.components.learning.privacy.masking import pair_mask, self_mask

        own, context = self._own(), self.secure.context
        pairs = [
            pair_mask(self.silo, other, bytes.fromhex(own.masking), bytes.fromhex(peers[other].masking), context)
            for other in sorted(roster.members)
            if other != self.silo
        ]
        return [self_mask(bytes.fromhex(own.seed), context), *pairs]

    def _about(self, roster: Roster, dealer: str, holder: str) -> bytes:
        return canonical_json([self.secure.rounds.federation, self.secure.number, self.secure.attempt, roster.digest, dealer, holder])

    def _head(self) -> dict[str, Any]:
        return {"silo": self.silo, "round": self.secure.number, "attempt": self.secure.attempt, "plan": self.secure.plan}

    def _refused(self, rule: str, reason: str) -> RefusedError:
        return RefusedError(f"silo {self.silo!r}: round {self.secure.number}, secure sum {self.secure.attempt}: {rule}", reason)
