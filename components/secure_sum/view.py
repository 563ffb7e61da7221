"""What a silo is shown of an attempt at a secure sum, and what of it it refuses.

A silo believes nobody: it verifies signatures, works from the records that a roster names by digest, and refuses rosters that are too small, that
are no part of the one before, that leave it out, or in which two silos show the same key. Where it refuses, it is as if it had dropped out.

Whether all are shown the same is for the silos to find out (Bonawitz et al. 2017, doi:10.1145/3133956.3133982, section 6 and figure 4, round 3): each
signs the survivors that it was shown, one record in a round, and tells its shares only when a threshold t of silos has signed the very same record. Of n
silos, c of them in league with the coordinator, no two records can get t signatures where 2t > n + c. The record names the roster and the vectors, and a
silo signs it only if all these vectors were masked against that roster; else some of them could have been masked against fewer, and come out of it by
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from silotune.components.errors import RefusedError
from silotune.components.federation import Agreement, canonical_json
from silotune.components.protocol import Plan
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.mask_secrets import MaskSecrets, Secrets
from silotune.components.secure_sum.records import MaskedVector, MaskKeys, Roster, SealedShares, SecureRound, Survivors, mark


@dataclass(frozen=True)
class View:
    """Of one silo, in one attempt."""

    secure: SecureRound
    plan: Plan
    agreement: Agreement
    silo: str
    secrets: MaskSecrets
    few: int  # silos that a roster, or a sum, must have: by the terms, and by the silo's own policy

    def peers(self, roster: Roster) -> dict[str, MaskKeys]:
        """The keys of all members of a first roster.

        Raises:
            RefusedError: the roster would not protect this silo.
        """
        from silotune.components.learning.privacy.agreed_keys import is_key

        if self.silo not in roster.members:
            raise self.refused("the roster leaves it out", "not in the roster")
        if strangers := sorted(set(roster.members) - set(self.plan.participants)):
            raise self.refused(f"the roster names {', '.join(strangers)}, whom the plan does not ask", "strangers in the roster")
        if len(roster.members) < self.few:
            raise self.refused(f"the roster has {len(roster.members)} silos, needs {self.few}", "roster too small")
        peers = self.secure.named(MaskKeys, roster.members)
        for silo, shown in peers.items():
            if not (is_key(bytes.fromhex(shown.sealing)) and is_key(bytes.fromhex(shown.masking))):
                raise self.refused(f"by a key of {silo} no secret can be agreed on; look into that silo", f"bad key of {silo}")
        own = self.public(self.own())
        if (peers[self.silo].sealing, peers[self.silo].masking) != (own.sealing, own.masking):
            raise self.refused("the roster names other keys as its own; take part in the next attempt", "mask secrets gone")
        if len({key for peer in peers.values() for key in (peer.sealing, peer.masking)}) != 2 * len(peers):
            raise self.refused("two silos of the roster show the same key", "same key twice")
        return peers

    def first(self, roster: Roster) -> Roster:
        """The roster that a second one is part of. Raises RefusedError where it is not, or is too small."""
        first = self.secure.roster("share")
        if first is None or not roster.members.keys() <= first.members.keys():
            raise self.refused("the second roster names silos that the first one does not", "roster grew")
        if len(roster.members) < self.few:
            raise self.refused(f"the roster has {len(roster.members)} silos, needs {self.few}", "roster too small")
        return first

    def shares(self, first: Roster, roster: Roster, peers: Mapping[str, MaskKeys]) -> dict[str, tuple[bytes, bytes]]:
        """By silo: the shares (of its seed, of its key) that this silo holds.

        Raises:
            RefusedError: one is not what its silo has signed; who it is stands in the message.
        """
        from silotune.components.learning.privacy.agreed_keys import unseal
        from silotune.components.learning.privacy.shamir import SHARE_BYTES

        found = {}
        for dealer, dealt in self.secure.named(SealedShares, roster.members).items():
            bad = self.refused(f"the shares of {dealer} are not as the protocol has them; look into that silo", f"bad shares of {dealer}")
            if dealt.roster != first.digest or dealt.shares.keys() != first.members.keys():
                raise bad
            share = dealt.shares[self.silo]
            try:
                both = unseal(
                    self.sealing_key(peers[dealer], dealer, self.silo), bytes.fromhex(share.sealed), self.about(first, dealer, self.silo)
                )
            except ValueError:
                raise bad from None
            seed, key = both[:SHARE_BYTES], both[SHARE_BYTES:]
            if (mark(seed), mark(key), len(both)) != (share.seed, share.key, 2 * SHARE_BYTES):
                raise bad
            found[dealer] = seed, key
        return found

    def require_sound(self, survivors: Survivors, roster: Roster) -> None:
        """Raises RefusedError where a set of survivors would not protect those in it."""
        if survivors.roster != roster.digest or not survivors.members.keys() <= roster.members.keys():
            raise self.refused("the survivors are not of the second roster", "survivors grew")
        if len(survivors.members) < self.few:
            raise self.refused(f"{len(survivors.members)} silos survive, a sum needs {self.few}", "too few survivors")
        for silo, record in self.secure.named(MaskedVector, survivors.members).items():
            if record.roster != roster.digest:
                rule = f"the vector of {silo} was masked against another roster than the one shown; the coordinator tells silos different things"
                raise self.refused(rule, "another roster")

    def require_confirmed(self, survivors: Survivors, roster: Roster) -> None:
        """Raises RefusedError unless this silo, and a threshold of all, have confirmed these survivors."""
        if survivors.roster != roster.digest:
            raise self.refused("the survivors are not of the second roster", "survivors grew")
        if not self.secrets.has_confirmed(self.secure.number, survivors.digest):
            raise self.refused("these are not the survivors that it has confirmed", "not confirmed")
        needed, agreeing = secure_terms.threshold(self.agreement), self.secure.confirmed(survivors, roster.members)
        if len(agreeing) < needed:
            rule = f"{len(agreeing)} silos have confirmed these survivors, {needed} must, so that no others can be confirmed; run again to ask the rest"
            raise self.refused(rule, "too few confirmations")

    # Keys

    def own(self) -> Secrets:
        """This silo's secrets in the attempt. Raises RefusedError where they are gone."""
        return self.secrets.known(self.secure.number, self.secure.attempt)

    def public(self, own: Secrets) -> MaskKeys:
        """What it shows of them, not yet signed."""
        from silotune.components.learning.privacy.agreed_keys import public_key

        sealing, masking = (public_key(bytes.fromhex(secret)).hex() for secret in (own.sealing, own.masking))
        return MaskKeys(**self.head(), sealing=sealing, masking=masking)

    def sealing_key(self, peer: MaskKeys, dealer: str, holder: str) -> bytes:
        """What a dealer's share is sealed to its holder with, of whom this silo is one and the peer the other."""
        from silotune.components.learning.privacy.agreed_keys import shared_key

        private, public = bytes.fromhex(self.own().sealing), bytes.fromhex(peer.sealing)
        return shared_key(private, public, self.secure.context, f"share {dealer} {holder}")

    def about(self, roster: Roster, dealer: str, holder: str) -> bytes:
        """What that share is bound to."""
        return canonical_json([self.secure.rounds.federation, self.secure.number, self.secure.attempt, roster.digest, dealer, holder])

    def head(self) -> dict[str, Any]:
        """What all of this silo's records in the attempt begin with."""
        return {"silo": self.silo, "round": self.secure.number, "attempt": self.secure.attempt, "plan": self.secure.plan}

    def refused(self, rule: str, reason: str) -> RefusedError:
        """An error that says who refuses what where."""
        return RefusedError(f"silo {self.silo!r}: round {self.secure.number}, secure sum {self.secure.attempt}: {rule}", reason)
