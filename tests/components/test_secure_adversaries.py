"""What a silo refuses of a coordinator, a store and other silos that play false; and what the coordinator refuses of silos that do.

Whoever plays false here holds the real signing keys of those he plays, and may put anything into the store.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secure_courses import SecureCourse

from silotune.components.aggregate import step as aggregate
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.learning.privacy.agreed_keys import public_key
from silotune.components.learning.update import read_header, write_update
from silotune.components.protocol import Record
from silotune.components.secure_sum import mask_secrets
from silotune.components.secure_sum.records import Confirmation, MaskedVector, MaskKeys, Opening, Roster, SealedShares, Survivors, mark
from silotune.components.secure_sum.silo import UPDATE

SILOS = ("ada", "bo", "cy", "di")
HONEST = "0" * 64


def reach(course: SecureCourse, stage: str) -> SecureCourse:
    """Up to where the silos' boxes of a stage are next; its muster is done."""
    from silotune.components.muster import step as muster

    for silo in SILOS:
        course.train(silo)
    for name in ("share", "mask", "confirm", "unmask"):
        turn = muster.work(str(course.file), course.turn, name)
        assert turn == course.turn
        if name == stage:
            return course
        assert [course.box(name, silo) for silo in SILOS] == [f"{silo} ok" for silo in SILOS]
    return course


def forge(course: SecureCourse, key: str, record: Record, **changes: Any) -> Record:
    """Put a changed record in the place of another, signed by whom it says it is of."""
    if course.rounds.store.size(key) is not None:
        course.rounds.store.delete(key)
    return course.rounds.create(record.model_copy(update=changes | {"signature": None}), key)


def roster_key(course: SecureCourse, stage: str) -> str:
    return course.secure.key("1", "rosters", f"{stage}.json")


def roster(course: SecureCourse, stage: str) -> Roster:
    found = course.secure.roster(stage)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_an_honest_course_refuses_nothing(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "unmask")
    assert [course.box("unmask", s) for s in SILOS] == [f"{s} ok" for s in SILOS]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda m: dict(list(m.items())[:2]), "roster too small"),
        (lambda m: m | {"mallory": HONEST}, "strangers in the roster"),
        (lambda m: m | {"cy": HONEST}, "another record"),
        (lambda m: m | {"ada": HONEST}, "another record"),
    ],
)
def test_a_forged_first_roster(tmp_path: Path, change: Any, rule: str) -> None:
    course = reach(SecureCourse(tmp_path), "share")
    standing = roster(course, "share")
    forge(course, roster_key(course, "share"), standing, members=change(standing.members))
    assert course.box("share", "ada") == f"ada refused: {rule}"
    assert course.secure.read(SealedShares, "ada") is None


def test_a_roster_that_nobody_signed(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "share")
    key = roster_key(course, "share")
    data = course.rounds.store.get(key).replace(b'"stage":"share"', b'"stage":"mask"')
    course.rounds.store.delete(key)
    course.rounds.store.create(key, data)
    assert course.box("share", "ada") == "ada refused: bad signature"


def test_a_roster_of_an_earlier_attempt_or_round(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "share")
    old = course.rounds.store.get(roster_key(course, "share"))
    course.open()
    for silo in SILOS:
        course.train(silo)
    course.rounds.store.create(course.secure.key("2", "rosters", "share.json"), old)
    assert course.box("share", "ada") == "ada refused: bad signature", "a record is signed with its place"


def test_keys_that_another_silo_shows_too(tmp_path: Path) -> None:
    """A sybil that copies a silo's keys would know nothing by it; but two silos with the same keys are one."""
    course = SecureCourse(tmp_path, (*SILOS, "ed"))
    for silo in course.federation.silo_ids:
        course.train(silo)
    theirs = course.secure.read(MaskKeys, "bo")
    mine = course.secure.read(MaskKeys, "di")
    assert theirs is not None
    assert mine is not None
    forged = forge(course, course.secure.place(MaskKeys, "di"), mine, masking=theirs.masking)
    course.stage("share", without=course.federation.silo_ids)
    assert set(roster(course, "share").members) == {"ada", "cy", "ed"} if course.secure.roster("share") else True
    standing = {s: r.digest for s, r in course.secure.believed(MaskKeys, course.federation.silo_ids)[0].items()}
    record = Roster(round=1, attempt=1, stage="share", plan=course.secure.plan, members=standing | {"di": forged.digest}, at=1.0)
    forge(course, roster_key(course, "share"), record)
    assert course.box("share", "ada") == "ada refused: same key twice"


def test_a_silo_whose_key_the_coordinator_has_put_in_place_of_its_own(tmp_path: Path) -> None:
    """Man in the middle: without the silo's signing key it cannot be done, with it the silo itself sees it."""
    course = reach(SecureCourse(tmp_path), "share")
    mine = course.secure.read(MaskKeys, "ada")
    assert mine is not None
    known = os.urandom(32)
    other = forge(course, course.secure.place(MaskKeys, "ada"), mine, masking=public_key(known).hex())
    standing = roster(course, "share")
    forge(course, roster_key(course, "share"), standing, members=standing.members | {"ada": other.digest})
    assert course.box("share", "ada") == "ada refused: mask secrets gone"


@pytest.mark.parametrize("how", ["swapped", "of another attempt", "inconsistent", "to others"])
def test_shares_that_are_not_what_they_should_be(tmp_path: Path, how: str) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    dealt = course.secure.read(SealedShares, "bo")
    assert dealt is not None
    shares = dict(dealt.shares)
    if how == "swapped":
        shares["ada"], shares["cy"] = shares["cy"], shares["ada"]
    elif how == "inconsistent":
        shares["ada"] = shares["ada"].model_copy(update={"seed": mark(b"another")})
    elif how == "to others":
        del shares["di"]
    more = {"roster": HONEST} if how == "of another attempt" else {}
    forged = forge(course, course.secure.place(SealedShares, "bo"), dealt, shares=shares, **more)
    standing = roster(course, "mask")
    forge(course, roster_key(course, "mask"), standing, members=standing.members | {"bo": forged.digest})
    assert course.box("mask", "ada") == "ada refused: bad shares of bo"
    assert course.secure.read(MaskedVector, "ada") is None


def test_a_second_roster_with_silos_that_the_first_has_not(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path, rounds={"total": 9, "quorum": 1}), "mask")
    first = roster(course, "share")
    forge(course, roster_key(course, "share"), first, members={s: d for s, d in first.members.items() if s != "di"})
    assert course.box("mask", "ada") == "ada refused: roster grew"


def test_two_second_rosters_in_one_attempt(tmp_path: Path) -> None:
    """The difference of two vectors under the same masks but one would show that one mask, and bit by bit all of them."""
    course = reach(SecureCourse(tmp_path), "mask")
    assert course.box("mask", "ada") == "ada ok"
    standing = roster(course, "mask")
    forge(course, roster_key(course, "mask"), standing, members={s: d for s, d in standing.members.items() if s != "di"})
    course.rounds.store.delete(course.secure.place(MaskedVector, "ada"))
    assert course.box("mask", "ada") == "ada refused: second vector"


def test_two_updates_under_the_same_masks(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    assert course.box("mask", "ada") == "ada ok"
    course.rounds.store.delete(course.secure.place(MaskedVector, "ada"))
    path = course.home("ada") / UPDATE
    write_update(path, read_header(path), {n: -a for n, a in course.tensors("ada").items()})
    assert course.box("mask", "ada") == "ada refused: second vector"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda s: {"members": dict(list(s.members.items())[:2])}, "too few survivors"),
        (lambda s: {"members": s.members | {"mallory": HONEST}}, "survivors grew"),
        (lambda s: {"roster": HONEST}, "survivors grew"),
        (lambda s: {"members": s.members | {"ada": HONEST}}, "another record"),
        (lambda s: {"plan": HONEST}, "filed elsewhere"),
    ],
)
def test_forged_survivors(tmp_path: Path, change: Any, rule: str) -> None:
    course = reach(SecureCourse(tmp_path), "confirm")
    standing = course.secure.survivors()
    assert standing is not None
    secure = course.secure
    forge(course, secure.key("survivors.json"), standing, **change(standing))
    assert course.box("confirm", "ada") == f"ada refused: {rule}"
    assert course.rounds.store.size(secure.place(Confirmation, "ada")) is None


def test_a_second_set_of_survivors(tmp_path: Path) -> None:
    """The store shows another set after a silo has signed one: in the same attempt, and in a later one."""
    course = reach(SecureCourse(tmp_path), "confirm")
    key, standing = course.secure.key("survivors.json"), course.secure.survivors()
    assert standing is not None
    assert [course.box("confirm", s) for s in SILOS] == [f"{s} ok" for s in SILOS]
    forge(course, key, standing, members={s: d for s, d in standing.members.items() if s != "di"})
    assert course.box("unmask", "ada") == "ada refused: not confirmed"
    course.rounds.store.delete(course.secure.place(Confirmation, "ada"))
    assert course.box("confirm", "ada") == "ada refused: second survivor set"

    course.rounds.store.delete(key)
    course.open()
    course.stage("share", statuses=[course.train(s) for s in SILOS])
    course.stage("mask")
    course.stage("confirm", without=SILOS)
    again = course.secure.survivors()
    assert again is not None
    assert (again.attempt, set(again.members)) == (2, set(SILOS))
    assert course.box("confirm", "ada") == "ada refused: second survivor set", "the same silos, and yet other vectors"
    assert course.box("unmask", "ada") == "ada refused: not confirmed"


def test_shares_are_told_only_where_a_threshold_has_confirmed(tmp_path: Path) -> None:
    """Signatures count only if they are of holders of shares, under the very same record, and in their own place."""
    course = reach(SecureCourse(tmp_path), "confirm")
    assert course.stage("unmask") == [], "nobody has confirmed"
    assert course.box("confirm", "ada") == "ada ok"
    assert course.box("confirm", "bo") == "bo ok"
    assert course.box("unmask", "ada") == "ada refused: too few confirmations"
    mine, theirs = course.secure.read(Confirmation, "ada"), course.secure.place(Confirmation, "cy")
    assert mine is not None
    course.rounds.store.create(theirs, course.rounds.store.get(course.secure.place(Confirmation, "ada")))
    assert course.box("unmask", "ada") == "ada refused: too few confirmations", "bo's own word under cy's name"
    forge(course, theirs, mine, silo="cy", survivors=HONEST)
    assert course.box("unmask", "ada") == "ada refused: too few confirmations", "a word for another set"
    forge(course, theirs, mine, silo="cy", attempt=2)
    assert course.box("unmask", "ada") == "ada refused: too few confirmations", "a word in another attempt"
    assert course.secure.believed(Opening, SILOS) == ({}, {})
    course.rounds.store.delete(theirs)
    with pytest.raises(QuorumError, match="3 silos must confirm the survivors, 2 did; waiting for cy, di"):
        aggregate.work(str(course.file), course.turn)
    assert course.box("confirm", "cy") == "cy ok"
    assert course.stage("unmask") == [f"{s} ok" for s in SILOS[:3]] + ["di refused: not confirmed"]


def test_never_both_secrets_of_one_silo(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    course.stage("mask", without=["di"])
    course.stage("confirm")
    course.stage("unmask")
    for silo in SILOS:
        told = course.secure.read(Opening, silo)
        assert told is not None
        assert set(told.seeds) == {"ada", "bo", "cy"}
        assert set(told.keys) == {"di"}


def test_a_plan_that_would_use_summed_examples_again(tmp_path: Path) -> None:
    """A coordinator that drops a round after its sum was opened, and asks nearly the same of all but one."""
    course = reach(SecureCourse(tmp_path), "unmask")
    assert [course.box("unmask", s) for s in SILOS] == [f"{s} ok" for s in SILOS]
    latest, plan = course.rounds.latest(), course.rounds.plan(1)
    assert latest is not None
    assert plan is not None
    from silotune.components import opening

    course.rounds.write_commit(
        opening.without_result("skipped", course.federation, latest, plan, course.agreement, 1, {})
    )  # spends nothing
    course.open()
    course.stage("share", statuses=[course.train(s) for s in SILOS])
    assert course.stage("mask") == [f"{s} refused: examples summed before" for s in SILOS]


def test_a_silo_that_lost_its_folder_counts_as_dropped(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    shutil.rmtree(course.home("bo") / "secagg")
    statuses = course.stage("mask")
    assert statuses == ["ada ok", "bo refused: mask secrets gone", "cy ok", "di ok"]
    statuses += [*course.stage("confirm"), *course.stage("unmask")]
    aggregate.work(str(course.file), course.turn, *statuses)
    commit = course.rounds.commit(1)
    assert set(commit.contributions) == {"ada", "cy", "di"}
    assert commit.missing == {"bo": "failed: dropped out of the secure sum"} or "mask secrets gone" in commit.missing["bo"]


def test_terms_that_the_silo_no_longer_agrees_to(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    course.edit(privacy={"secure_aggregation": {"threshold": 4}})
    assert course.box("mask", "ada") == "ada refused: terms differ"


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "unmask"])
def test_a_policy_that_was_tightened_holds_in_every_stage(tmp_path: Path, stage: str) -> None:
    course = reach(SecureCourse(tmp_path), stage)
    (Path(course.federation.silo("bo").storage) / "policy.yaml").write_text("dataset: notes\nexpires: 2020-01-01\n")
    assert [course.box(stage, silo) for silo in SILOS] == [f"{s} {'refused: policy: expired' if s == 'bo' else 'ok'}" for s in SILOS]


def test_a_policy_that_wants_more_silos_in_a_sum_than_the_terms(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    course.stage("mask", without=["di"])
    (Path(course.federation.silo("ada").storage) / "policy.yaml").write_text("dataset: ward\nmin_participants: 4\n")
    assert course.stage("confirm") == ["ada refused: too few survivors", "bo ok", "cy ok", "di ok"]


# Silos that play false


@pytest.mark.parametrize("which", ["sealing", "masking"])
def test_a_silo_whose_key_gives_all_the_same_secret_is_left_out(tmp_path: Path, which: str) -> None:
    course = SecureCourse(tmp_path)
    for silo in SILOS:
        course.train(silo)
    theirs = course.secure.read(MaskKeys, "di")
    assert theirs is not None
    weak = forge(course, course.secure.place(MaskKeys, "di"), theirs, **{which: "01" + "00" * 31})
    assert course.stage("share") == [f"{s} ok" for s in SILOS[:3]] + ["di ok: nothing to do"]
    standing = roster(course, "share")
    forge(course, roster_key(course, "share"), standing, members=standing.members | {"di": weak.digest})
    course.rounds.store.delete(course.secure.place(SealedShares, "ada"))
    assert course.box("share", "ada") == "ada refused: bad key of di", "a coordinator that takes it in gains nothing"


def test_a_vector_that_is_no_clipped_update_makes_no_global(tmp_path: Path) -> None:
    """Nobody sees whose numbers are too large; but a sum of clipped updates is no larger than their clips."""
    course = reach(SecureCourse(tmp_path), "confirm")
    course.rounds.store.delete(course.secure.key("survivors.json"))
    sent = course.secure.read(MaskedVector, "di")
    assert sent is not None
    vector = np.frombuffer(course.path(course.rounds.object_key(sent.object, "di")).read_bytes(), "<u4")
    (tmp_path / "hostile").write_bytes((vector + np.uint32(1 << 28)).tobytes())
    forge(course, course.secure.place(MaskedVector, "di"), sent, object=course.rounds.put_object(tmp_path / "hostile", "di"))
    statuses = [*course.stage("confirm"), *course.stage("unmask")]
    assert statuses == [f"{s} ok" for s in SILOS] * 2
    with pytest.raises(RefusedError, match=r"its sum has a norm of .*, clipped updates add up to 8 at most"):
        aggregate.work(str(course.file), course.turn, *statuses)
    assert course.rounds.latest().round == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "lie", [{"bytes": 2**60}, {"cursor": 10**6}], ids=["of another size than it says", "with a cursor not of the terms"]
)
def test_a_vector_that_is_not_what_it_says_is_left_out(tmp_path: Path, lie: dict[str, int]) -> None:
    course = reach(SecureCourse(tmp_path), "confirm")
    course.rounds.store.delete(course.secure.key("survivors.json"))
    sent = course.secure.read(MaskedVector, "bo")
    assert sent is not None
    forge(course, course.secure.place(MaskedVector, "bo"), sent, **lie)
    course.stage("confirm", without=SILOS)
    survivors = course.secure.survivors()
    assert survivors is not None
    assert set(survivors.members) == {"ada", "cy", "di"}


def test_an_update_that_was_damaged_in_the_silo_is_not_masked(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "mask")
    path = course.home("ada") / UPDATE
    data = bytearray(path.read_bytes())
    data[-4:] = np.array([np.inf], "<f4").tobytes()
    path.write_bytes(data)
    assert course.box("mask", "ada") == "ada refused: non-finite update"


def test_a_silo_whose_memory_of_sums_is_damaged_helps_with_none(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "confirm")
    (course.home("ada") / "secagg" / "opened.json").write_text("[{")
    assert course.box("confirm", "ada") == "ada refused: sum memory damaged"


def test_a_holder_that_tells_other_shares_is_passed_over(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "unmask")
    statuses = course.stage("unmask")
    told = course.secure.read(Opening, "bo")
    assert told is not None
    forge(course, course.secure.place(Opening, "bo"), told, seeds=told.seeds | {"ada": "ab" * 66})
    aggregate.work(str(course.file), course.turn, *statuses)
    assert set(course.rounds.commit(1).contributions) == set(SILOS)


def test_too_many_holders_that_tell_other_shares_leave_the_round_open(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "unmask")
    statuses = course.stage("unmask")
    for silo, changes in (("bo", {"seeds": {}}), ("cy", {"survivors": HONEST})):
        told = course.secure.read(Opening, silo)
        assert told is not None
        forge(course, course.secure.place(Opening, silo), told, **changes)
    with pytest.raises(QuorumError, match="3 silos must tell their shares, 2 did; waiting for bo, cy"):
        aggregate.work(str(course.file), course.turn, *statuses)


def test_a_silo_that_dealt_shares_of_no_secret_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from silotune.components.learning.privacy import shamir

    course = reach(SecureCourse(tmp_path), "share")
    honest = shamir.split

    def crooked(secret: bytes, holders: Any, threshold: int) -> dict[int, bytes]:
        places = list(holders)
        return {p: honest(os.urandom(32), places, threshold)[p] for p in places}

    monkeypatch.setattr(shamir, "split", crooked)
    assert course.box("share", "cy") == "cy ok"
    monkeypatch.undo()
    statuses = [*course.stage("share"), *course.stage("mask"), *course.stage("confirm"), *course.stage("unmask")]
    assert all(s.endswith("ok") or s.endswith("nothing to do") for s in statuses)
    with pytest.raises(RefusedError, match="silo 'cy': it has dealt shares that are not of one secret"):
        aggregate.work(str(course.file), course.turn, *statuses)


def test_what_a_coordinator_can_make_of_all_it_ever_sees_is_the_sum_alone(tmp_path: Path) -> None:
    """With every record, every share told and the late silo's vector: each vector minus all masks that can be known stays random."""
    from silotune.components.learning.privacy import shamir
    from silotune.components.learning.privacy.masking import masked, pair_mask, self_mask

    course = reach(SecureCourse(tmp_path), "mask")
    assert [course.box("mask", s) for s in SILOS] == [f"{s} ok" for s in SILOS]
    late = course.secure.read(MaskedVector, "di")
    assert late is not None
    course.rounds.store.delete(course.secure.place(MaskedVector, "di"))
    course.stage("confirm")
    course.stage("unmask")  # di is dropped, and its key told
    secure = course.secure
    told = {s: secure.read(Opening, s) for s in SILOS}
    places = {s: n for n, s in enumerate(SILOS, 1)}
    keys = {s: secure.read(MaskKeys, s) for s in SILOS}
    secret = shamir.join({places[s]: bytes.fromhex(o.keys["di"]) for s, o in told.items() if o})
    assert public_key(secret).hex() == keys["di"].masking  # type: ignore[union-attr]
    seeds = {s: shamir.join({places[h]: bytes.fromhex(o.seeds[s]) for h, o in told.items() if o}) for s in ("ada", "bo", "cy")}
    plain = {}
    for silo in SILOS:
        record = late if silo == "di" else secure.read(MaskedVector, silo)
        assert record is not None
        vector = np.frombuffer(course.path(course.rounds.object_key(record.object, silo)).read_bytes(), "<u4").copy()
        known = [self_mask(seeds[silo], secure.context, remove=True)] if silo in seeds else []
        other = bytes.fromhex(keys[silo].masking)  # type: ignore[union-attr]
        if silo == "di":
            known += [pair_mask("di", o, secret, bytes.fromhex(keys[o].masking), secure.context, remove=True) for o in seeds]  # type: ignore[union-attr]
        else:
            known += [pair_mask(silo, "di", secret, other, secure.context, remove=True)]
        plain[silo] = next(iter(masked([vector], known)))
    for silo, left in plain.items():
        small = np.abs(left.view("<i4").astype(np.int64)) <= 2**24
        assert small.sum() < len(left) * 0.2, f"{silo}: an update's numbers would all be this small; of random ones 1 in 128 is"
    total = (plain["ada"] + plain["bo"] + plain["cy"]).view("<i4").astype(np.int64)
    assert (np.abs(total) <= 3 * 2**24).all(), "their sum is what is known"


def test_marks_and_messages_name_no_secret(tmp_path: Path) -> None:
    secrets = mask_secrets.MaskSecrets(tmp_path).made(1, 1)
    assert len({secrets.seed, secrets.sealing, secrets.masking, mark(bytes.fromhex(secrets.seed))}) == 4
    assert secrets == mask_secrets.MaskSecrets(tmp_path).made(1, 1), "a step that is run again has the same"
    assert secrets != mask_secrets.MaskSecrets(tmp_path).made(1, 2), "another attempt has others"


def test_survivors_are_one_record_of_the_round(tmp_path: Path) -> None:
    course = reach(SecureCourse(tmp_path), "unmask")
    standing = course.secure.survivors()
    assert standing is not None
    other = standing.model_copy(update={"attempt": 2, "members": {}, "signature": None})
    assert course.secure.write_survivors(Survivors.model_validate(other.model_dump())) == standing
