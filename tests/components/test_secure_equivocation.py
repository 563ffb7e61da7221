"""A coordinator that owns the store, has some silos in league with it, and tells different silos different things.

It signs as coordinator and as its own silos only, and works on what it gets out of honest ones with all that it may know. The attacks are real:
with the check taken out that stops one, fewer updates come out of it than a sum may have, bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from secure_courses import CLIP, SecureCourse, clipped

from silotune.components.learning.privacy import shamir
from silotune.components.learning.privacy.masking import Mask, masked, pair_mask, self_mask
from silotune.components.protocol import Record
from silotune.components.secure_sum import terms as secure_terms
from silotune.components.secure_sum.records import Confirmation, MaskedVector, MaskKeys, Opening, Roster, SealedShares, Survivors
from silotune.components.secure_sum.view import View

UNCHECKED = {"require_sound": lambda *_: None, "require_confirmed": lambda *_: None}


class Spy(SecureCourse):
    """A course as such a coordinator runs it, up to where silos mask; `league` are its own silos."""

    def __init__(self, folder: Path, silos: tuple[str, ...], league: tuple[str, ...]) -> None:
        super().__init__(folder, silos)
        self.league = league
        n, c, t = len(silos), len(league), secure_terms.threshold(self.agreement)
        assert 2 * t > n + c, "so few that the promise holds"
        for silo in silos:
            self.train(silo)
        self.stage("share")
        self.told: dict[str, Opening] = {}  # by honest silo
        self.against: dict[str, set[str]] = {}  # whom each has masked its vector against

    def show(self, key: str, record: Record) -> None:
        """To whoever looks next."""
        self.rounds.store.delete(key)
        self.rounds.create(record.model_copy(update={"signature": None}), key)

    def show_roster(self, *silos: str) -> Roster:
        members = {s: self.seen(SealedShares, s).digest for s in silos}
        self.show(
            self.secure.key("1", "rosters", "mask.json"),
            Roster(round=1, attempt=1, stage="mask", plan=self.secure.plan, members=members, at=1.0),
        )
        found = self.secure.roster("mask")
        assert found is not None
        return found

    def show_survivors(self, *silos: str) -> Survivors:
        members, roster = {s: self.seen(MaskedVector, s).digest for s in silos}, self.secure.roster("mask")
        assert roster is not None
        record = Survivors(round=1, attempt=1, plan=self.secure.plan, roster=roster.digest, members=members, missing={}, at=1.0)
        self.show(self.secure.key("survivors.json"), record)
        found = self.secure.survivors()
        assert found is not None
        for own in self.league:  # they sign whatever helps
            word = Confirmation(silo=own, round=1, attempt=1, plan=self.secure.plan, survivors=found.digest)
            self.show(self.secure.place(Confirmation, own), word)
        return found

    def seen(self, kind: type, silo: str) -> Record:
        found = self.secure.read(kind, silo)
        assert found is not None
        return found

    def ask(self, box: str, silo: str) -> str:
        """What an honest silo answers; the shares that it tells are noted, and put out of its sight."""
        status = self.box(box, silo)
        if told := self.secure.read(Opening, silo):
            self.told[silo] = told
        return status

    def learns(self, of: Collection[str]) -> np.ndarray:
        """The sum of some honest silos' whole numbers, by every share that was told and that the league holds. Raises where they are too few."""
        places, needed, context = secure_terms.places(self.agreement), secure_terms.threshold(self.agreement), self.secure.context
        roster, first = self.secure.roster("mask"), self.secure.roster("share")
        assert roster is not None
        assert first is not None
        held = {own: (view := self.part(own).view).shares(first, roster, view.peers(first)) for own in self.league}

        def joined(kind: int, silo: str) -> bytes:
            shares = {places[own]: shares[silo][kind] for own, shares in held.items()}
            named = {h: (o.seeds, o.keys)[kind] for h, o in self.told.items()}
            shares |= {places[holder]: bytes.fromhex(told[silo]) for holder, told in named.items() if silo in told}
            if len(shares) < needed:
                raise ValueError(f"{len(shares)} shares of {silo}")
            return shamir.join(dict(list(shares.items())[:needed]))

        public = {s: bytes.fromhex(r.masking) for s, r in self.secure.named(MaskKeys, first.members).items()}
        private = {own: bytes.fromhex(self.part(own).view.secrets.known(1, 1).masking) for own in self.league}
        total = np.zeros(0)
        for silo in of:
            record = self.secure.read(MaskedVector, silo)
            assert record is not None
            known: list[Mask] = [self_mask(joined(0, silo), context, remove=True)]
            for other in self.against[silo] - {silo, *of}:
                key = private.get(other) or joined(1, other)
                known.append(pair_mask(silo, other, key, public[silo], context, remove=True))
            vector = np.frombuffer(self.path(self.rounds.object_key(record.object, silo)).read_bytes(), "<u4").copy()
            plain = next(iter(masked([vector], known)))
            total = plain if not total.size else total + plain
        return total.view("<i4").astype(np.int64)

    def mask(self, roster: Roster, *silos: str) -> None:
        self.against |= {s: set(roster.members) for s in silos}
        assert [self.box("mask", s) for s in silos] == [f"{s} ok" for s in silos]

    def whole(self, of: Collection[str]) -> np.ndarray:
        """What those silos' whole numbers add up to."""
        total = 0
        for silo in of:
            scaled = clipped(self.tensors(silo))
            total = total + np.concatenate([np.rint(scaled[n].reshape(-1) / (CLIP / 2**24)) for n in sorted(scaled)]).astype(np.int64)
        return np.asarray(total)


def two_rosters(folder: Path) -> Spy:
    """Of four silos, di is in league. ada is made to mask against bo and di only; to all others bo is told of as dropped out."""
    spy = Spy(folder, ("ada", "bo", "cy", "di"), ("di",))
    spy.mask(spy.show_roster("ada", "bo", "di"), "ada")
    spy.mask(spy.show_roster("ada", "bo", "cy", "di"), "bo", "cy", "di")
    spy.show_survivors("ada", "cy", "di")
    return spy


def two_sums(spy: Spy, box: str) -> list[str]:
    """Of seven silos, fay and gus are in league; every honest one is shown survivors of its own, with ada and bo in all of them, the others in few."""
    found = []
    for silo, third in zip(("ada", "bo", "cy", "di", "ed"), ("cy", "cy", "di", "di", "ed"), strict=True):
        spy.show_survivors("ada", "bo", third, *spy.league)
        found.append(spy.ask(box, silo))
    return found


def seven(folder: Path) -> Spy:
    silos = ("ada", "bo", "cy", "di", "ed", "fay", "gus")
    spy = Spy(folder, silos, ("fay", "gus"))
    spy.mask(spy.show_roster(*silos), *silos)
    return spy


def test_one_update_would_come_out_of_two_rosters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No honest silo answers twice, and all that answer are shown the same survivors: it is what these have masked against that differs."""
    spy = two_rosters(tmp_path)
    for name, nothing in UNCHECKED.items():
        monkeypatch.setattr(View, name, nothing)
    assert [spy.ask("unmask", s) for s in ("bo", "cy")] == ["bo ok", "cy ok"]
    assert (spy.learns({"ada"}) == spy.whole({"ada"})).all()


def test_nobody_confirms_survivors_that_masked_against_another_roster(tmp_path: Path) -> None:
    spy = two_rosters(tmp_path)
    for box, rule in (("confirm", "another roster"), ("unmask", "not confirmed")):
        assert [spy.ask(box, s) for s in ("bo", "cy")] == [f"bo refused: {rule}", f"cy refused: {rule}"]
    with pytest.raises(ValueError, match="1 shares of ada"):
        spy.learns({"ada"})


def test_a_sum_of_fewer_would_come_out_of_different_survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least t - c = 3 honest updates are promised to be in a sum, and it would be one of two."""
    spy = seven(tmp_path)
    for name, nothing in UNCHECKED.items():
        monkeypatch.setattr(View, name, nothing)
    assert two_sums(spy, "unmask") == [f"{s} ok" for s in ("ada", "bo", "cy", "di", "ed")]
    assert (spy.learns({"ada", "bo"}) == spy.whole({"ada", "bo"})).all()


def test_no_two_sets_of_survivors_get_a_threshold_of_signatures(tmp_path: Path) -> None:
    spy = seven(tmp_path)
    honest = ("ada", "bo", "cy", "di", "ed")
    assert two_sums(spy, "confirm") == [f"{s} ok" for s in honest], "each is shown one set, and signs it"
    assert two_sums(spy, "unmask") == [f"{s} refused: too few confirmations" for s in honest], "two honest ones and the league at most"
    spy.show_survivors(*honest, *spy.league)
    assert [spy.ask("confirm", s) for s in honest] == [f"{s} refused: second survivor set" for s in honest]
    assert [spy.ask("unmask", s) for s in honest] == [f"{s} refused: not confirmed" for s in honest]
    assert not spy.told
