"""Rounds whose updates are summed securely, through the boxes' own steps: what comes out, who may die when, and what reaches the store."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secure_courses import CLIP, SecureCourse, clipped, quantised_mean

from silotune.components.aggregate import lost_global
from silotune.components.aggregate import step as aggregate
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.protocol import Commit, Turn
from silotune.components.provenance import chain
from silotune.components.secure_sum.silo import UPDATE
from silotune.components.store.store_blob import StoreBlob
from silotune.pipelines.status import status

SILOS = ("ada", "bo", "cy", "di")


def global_of(course: SecureCourse, digest: str) -> dict[str, np.ndarray]:
    return open_tensor_file(course.rounds.fetch_object(digest, course.folder / "fetched")).read_all()


def assert_mean_of(
    course: SecureCourse, commit: Commit, updates: dict[str, dict[str, np.ndarray]], weights: dict[str, float] | None = None
) -> None:
    """The global is the old one and the quantised plain mean, to the last bit."""
    before, after = global_of(course, commit.incoming or ""), global_of(course, commit.outgoing)
    mean = quantised_mean(updates, weights or dict.fromkeys(updates, 1.0))
    for name, array in after.items():
        assert (array == (before[name] + mean[name]).astype(np.float32)).all()


def test_a_round_is_the_quantised_mean(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    for _ in range(3):
        updates = {s: course.tensors(s) for s in SILOS}
        commit = course.try_round()
        assert set(commit.contributions) == set(SILOS)
        assert commit.missing == {}
        assert_mean_of(course, commit, updates)
    assert all(np.sqrt(sum((a**2).sum() for a in u.values())) > CLIP for u in updates.values()), "so that clipping is tried"
    assert all(c.norm is None and c.examples == c.tokens == 32 for c in commit.contributions.values())
    found = chain.verify(course.rounds, deep=True)
    assert not found.breaks
    assert len([c for c in found.commits if c.contributions]) == 3


def test_small_updates_are_not_scaled_up(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s, 0.01) for s in SILOS}
    assert_mean_of(course, course.try_round(scale=0.01), updates)


def test_weights_follow_the_terms_and_not_the_data(tmp_path: Path) -> None:
    own = {s: {"training": {"steps": 8 * n}} for n, s in enumerate(SILOS, 1)}
    course = SecureCourse(tmp_path, own=own, aggregation={"clip": {"norm": CLIP}, "weights": "examples"})
    course_updates = {s: course.tensors(s) for s in SILOS}
    commit = course.try_round()
    weights = {s: n / 4 for n, s in enumerate(SILOS, 1)}
    assert_mean_of(course, commit, course_updates, weights)
    assert {s: c.weight for s, c in commit.contributions.items()} == pytest.approx({s: n / 10 for n, s in enumerate(SILOS, 1)})


@pytest.mark.parametrize(
    ("stage", "silo"), [("train", "ada"), ("share", "di"), ("mask", "ada"), ("mask", "di"), ("confirm", "cy"), ("unmask", "bo")]
)
def test_one_silo_dies_at_any_stage(tmp_path: Path, stage: str, silo: str) -> None:
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    commit = course.try_round({stage: [silo]})
    summed = set(SILOS) if stage in ("confirm", "unmask") else set(SILOS) - {silo}
    assert set(commit.contributions) == summed
    assert commit.missing == ({} if silo in summed else {silo: "failed: killed by signal 9"})
    assert_mean_of(course, commit, {s: updates[s] for s in summed})
    assert set(course.try_round().contributions) == set(SILOS), "and it is back in the next round"


@pytest.mark.parametrize("stage", ["train", "share", "mask"])
def test_two_of_four_are_too_few_and_the_next_attempt_goes_on_without_training(tmp_path: Path, stage: str) -> None:
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    with pytest.raises(QuorumError, match="3 silos must mask their updates"):
        course.try_round({stage: ["bo", "di"]})
    assert course.secure.survivors() is None
    kept = {s: (course.home(s) / UPDATE).stat().st_mtime_ns for s in ("ada", "cy")}
    course.open()
    assert Turn.parse(course.turn).attempt == 2
    commit = course.try_round()
    assert {s: (course.home(s) / UPDATE).stat().st_mtime_ns for s in kept} == kept
    assert_mean_of(course, commit, updates)


def test_a_sum_that_too_few_open_is_opened_later_by_those_who_have_not_answered(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    with pytest.raises(QuorumError, match="3 silos must tell their shares, 2 did; waiting for bo, di"):
        course.try_round({"mask": ["di"], "unmask": ["bo"]})
    before = {s: course.rounds.store.get(course.secure.place(type(o), s)) for s, o in openings(course).items()}
    assert set(before) == {"ada", "cy"}
    course.open()
    commit = course.try_round()
    assert set(commit.contributions) == {"ada", "bo", "cy"}, "the survivors stand; di comes too late for this round"
    assert_mean_of(course, commit, {s: updates[s] for s in ("ada", "bo", "cy")})
    assert {s: course.rounds.store.get(course_key(course, s)) for s in before} == before
    assert set(course.try_round().contributions) == set(SILOS)


def test_who_has_not_confirmed_is_asked_again_where_others_are_gone_since(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    with pytest.raises(QuorumError, match="3 silos must tell their shares, 2 did; waiting for ada, di"):
        course.try_round({"confirm": ["di"], "unmask": ["ada"]})
    course.open()
    assert_mean_of(course, course.try_round({"train": ["ada"]}), updates)


def openings(course: SecureCourse) -> dict[str, object]:
    from silotune.components.secure_sum.records import Opening

    return dict(course.secure.believed(Opening, SILOS)[0])


def course_key(course: SecureCourse, silo: str) -> str:
    return course.rounds.key("rounds", "00001", "secagg", "1", "openings", f"{silo}.json")


def test_the_quorum_counts_before_survivors_are_fixed(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path, rounds={"total": 9, "quorum": 4})
    with pytest.raises(QuorumError):
        course.try_round({"mask": ["ada"]})
    assert course.secure.survivors() is None
    course.open()
    assert set(course.try_round().contributions) == set(SILOS)


def test_a_round_that_is_skipped_leaves_the_data_of_an_opened_sum_behind(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path, rounds={"total": 9, "quorum": 1, "on_missing_quorum": "skip"})
    assert course.try_round({"train": ["ada", "bo"]}).outcome == "skipped"
    commit = course.try_round({"unmask": ["ada", "bo"]})
    assert (commit.outcome, commit.spent) == ("skipped", dict.fromkeys(SILOS, 32))
    plan = course.rounds.plan(3)
    assert plan is not None
    assert {s: p.cursor for s, p in plan.participants.items()} == dict.fromkeys(SILOS, 32)
    assert course.try_round().outcome == "aggregated"
    assert not chain.verify(course.rounds, deep=True).breaks


def test_terms_that_change_after_a_sum_was_opened_leave_its_data_behind(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    with pytest.raises(QuorumError):
        course.try_round({"unmask": ["ada", "bo"]})
    course.edit(training={"steps": 8, "batch_size": 4, "weight_decay": 0.1})
    course.agreement = course.federation.agreement("b" * 64, "t" * 64)
    course.rounds.put_agreement(course.agreement)
    course.open()
    assert course.rounds.commit(1).outcome == "amended"
    assert course.rounds.commit(1).spent == dict.fromkeys(SILOS, 32)
    commit = course.try_round()
    assert set(commit.contributions) == set(SILOS)


def test_a_vector_that_the_store_damaged_is_sent_again_with_the_same_bytes(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    statuses = [course.train(s) for s in SILOS]
    for stage in ("share", "mask", "confirm", "unmask"):
        statuses += course.stage(stage)
    survivors = course.secure.survivors()
    assert survivors is not None
    from silotune.components.secure_sum.records import MaskedVector

    record = course.secure.named(MaskedVector, survivors.members)["cy"]
    path = course.path(course.rounds.object_key(record.object, "cy"))
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    with pytest.raises(RefusedError, match="'cy': its masked vector does not have its digest"):
        aggregate.work(str(course.file), course.turn, *statuses)
    course.open()
    updates = {s: course.tensors(s) for s in SILOS}
    assert_mean_of(course, course.try_round(), updates)


def test_a_vector_that_is_damaged_on_the_way_only_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silo may be gone by now, and could not send it again."""
    course = SecureCourse(tmp_path)
    updates = {s: course.tensors(s) for s in SILOS}
    statuses = [course.train(s) for s in SILOS]
    for stage in ("share", "mask", "confirm", "unmask"):
        statuses += course.stage(stage)
    reads = []

    def harmed(blob: StoreBlob, start: int, end: int, inner: Any = StoreBlob.read) -> bytes:
        data = bytearray(inner(blob, start, end))
        reads.append(blob.key)
        data[0] ^= len(reads) == 2
        return bytes(data)

    monkeypatch.setattr(StoreBlob, "read", harmed)
    aggregate.work(str(course.file), course.turn, *statuses)
    monkeypatch.undo()
    assert len(reads) == 2 * len(SILOS)
    assert_mean_of(course, course.rounds.commit(1), updates)


def test_a_lost_global_is_made_again_from_its_masked_vectors(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    commit = course.try_round({"mask": ["bo"]})
    course.rounds.store.delete(course.rounds.object_key(commit.outgoing))
    lost_global.fetch_global(course.rounds, commit, tmp_path / "again")
    assert course.rounds.object_size(commit.outgoing)
    course.rounds.store.delete(course.rounds.object_key(commit.outgoing))
    part = commit.contributions["ada"]
    course.rounds.store.delete(course.rounds.object_key(part.object, "ada"))
    with pytest.raises(RefusedError, match="and so is its secure sum"):
        lost_global.fetch_global(course.rounds, commit, tmp_path / "again")


def test_no_bytes_of_an_update_reach_the_store(tmp_path: Path) -> None:
    """Neither as they are, nor clipped, nor as whole numbers: eight bytes in a row would be found, at any place in any object or record."""
    course = SecureCourse(tmp_path)
    seen: list[bytes] = []
    for dead in ({}, {"mask": ["di"]}, {"unmask": ["ada"]}):
        for silo in SILOS:
            scaled = clipped(course.tensors(silo))
            flat = np.concatenate([scaled[n].reshape(-1) for n in sorted(scaled)])
            raw = np.concatenate([course.tensors(silo)[n].reshape(-1) for n in sorted(scaled)])
            quanta = np.rint(flat / (CLIP / 2**24)).astype(np.int64)
            seen += [raw.astype("<f4").tobytes(), flat.astype("<f4").tobytes(), flat.astype("<f8").tobytes()]
            seen += [quanta.astype("<i4").tobytes(), quanta.astype("<i8").tobytes()]
        course.try_round(dead)
    runs = {text[at : at + 8] for text in seen for at in range(0, len(text) - 7, 4)}
    store = b"\0".join(p.read_bytes() for p in course.path(course.rounds.key("x")).parent.rglob("*") if p.is_file())
    assert len(store) > 10_000
    found = [run for run in runs if run in store]
    assert not found
    control = global_of(course, course.rounds.commit(3).outgoing)["a.weight"].astype("<f4").tobytes()
    assert control in store, "what is there, is found"


def test_secrets_of_a_round_are_gone_in_the_next(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    course.try_round()
    (course.home("ada") / "secagg" / ".00001-1.json.4711").write_text("what a killed step left")
    course.train("ada")
    assert sorted(p.name for p in (course.home("ada") / "secagg").iterdir()) == ["00002-1.json", "opened.json"]
    assert (course.home("ada") / "secagg" / "00002-1.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("pattern", list(itertools.combinations_with_replacement(["share", "mask", "confirm", "unmask"], 3)))
def test_three_deaths_among_five_recover_or_fail_closed(tmp_path: Path, pattern: tuple[str, ...]) -> None:
    course = SecureCourse(tmp_path, (*SILOS, "ed"), privacy={"secure_aggregation": {"threshold": 3}})
    updates = {s: course.tensors(s) for s in course.federation.silo_ids}
    dead: dict[str, list[str]] = {}
    for silo, stage in zip(("ada", "cy", "ed"), pattern, strict=True):
        if stage:
            dead.setdefault(stage, []).append(silo)
    masked = 5 - sum(1 for p in pattern if p in ("train", "share", "mask"))
    told = 5 - sum(1 for p in pattern if p)
    if masked >= 3 and told >= 3:
        commit = course.try_round(dead)
        assert len(commit.contributions) == masked
        assert_mean_of(course, commit, {s: updates[s] for s in commit.contributions})
        return
    with pytest.raises(QuorumError):
        course.try_round(dead)
    assert (course.secure.survivors() is None) == (masked < 3)
    course.open()
    commit = course.try_round()  # all are back
    assert len(commit.contributions) == (5 if masked < 3 else masked)
    assert_mean_of(course, commit, {s: updates[s] for s in commit.contributions})


def test_status_tells_how_far_an_open_sum_has_come(tmp_path: Path) -> None:
    course = SecureCourse(tmp_path)
    with pytest.raises(QuorumError):
        course.try_round({"train": ["di"], "mask": ["bo"]})
    (found,) = [r for r in status(course.federation, course.rounds).rounds if not r.committed]
    assert found.participants == ["ada", "cy"]
    assert found.missing == {"bo": "trained, not masked yet", "di": "no update yet"}
