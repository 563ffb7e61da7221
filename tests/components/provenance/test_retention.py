"""Retention: what is kept, what is erased, and that nothing goes without an entry in the audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import courses
import pytest

from silotune.components.errors import FederationError
from silotune.components.provenance import audit, chain, retention
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.s3_store import S3Store

KEEP = {"storage": {"retention": {"updates": 2}}}


@pytest.fixture
def course(tmp_path: Path) -> Any:
    return courses.Course(tmp_path, **KEEP).run(4)


def of(*numbers: int, silos: tuple[str, ...] = courses.SILOS) -> dict[str, list[str]]:
    """The updates of some rounds, as what is to be erased."""
    return {s: sorted(courses.digest_of(f"update of {s} in {n}") for n in numbers) for s in silos}


def kept(course: Any) -> set[str]:
    return {k.rsplit("/", 1)[1] for k in course.store.list(course.key("contributions") + "/")}


def test_the_latest_rounds_are_kept(course: Any) -> None:
    assert retention.due(course.federation, course.rounds) == of(1, 2)


def test_without_a_term_all_is_kept(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(4)
    assert retention.due(course.federation, course.rounds) == {}
    assert retention.due(courses.load(tmp_path, **KEEP), courses.Course(tmp_path / "empty").rounds) == {}


def test_updates_of_the_open_round_are_kept(course: Any) -> None:
    plan = course.open(5)
    course.manifest(plan, "north")
    course.object("being sent just now", "south")
    assert retention.due(course.federation, course.rounds) == of(1, 2)
    course.object("came too late for the last round", "north")
    found = retention.due(course.federation, course.rounds)
    assert set(found["north"]) - set(of(1, 2)["north"]) == {courses.digest_of("came too late for the last round")}, "it has delivered"


def test_a_refused_update_goes_once_its_round_is_over(course: Any) -> None:
    course.object("was refused", "north")
    assert courses.digest_of("was refused") in retention.due(course.federation, course.rounds)["north"]


class Opening(DirectoryStore):
    """A store where a round opens, and a silo sends to it, while somebody looks for its plan."""

    course: Any = None
    sent = ""

    def get(self, key: str) -> bytes:
        if self.course and key.endswith("00005/plan.json"):
            course, self.course = self.course, None
            try:
                return super().get(key)  # not there yet
            finally:
                self.sent = course.manifest(course.open(5), "north").object
        return super().get(key)


def test_what_is_sent_to_a_round_that_opens_meanwhile_is_kept(tmp_path: Path) -> None:
    store = Opening(tmp_path / "store")
    course = courses.Course(tmp_path, store, **KEEP).run(4)
    store.course = course
    assert retention.due(course.federation, course.rounds) == of(1, 2)
    assert store.sent


def test_an_erasure_is_told_and_the_chain_holds(course: Any) -> None:
    retention.erase(course.rounds, of(1, 2), "old", "alice")
    assert kept(course) == {courses.digest_of(f"update of {s} in {n}") for s in courses.SILOS for n in (3, 4)}
    entry = list(audit.entries(course.reader()))[-1]
    assert (entry.kind, entry.round, entry.erased, entry.reason, entry.by) == ("erasure", 5, of(1, 2), "old", "alice")
    found = chain.verify(course.reader(), deep=True)
    assert found.breaks == []
    assert found.erased.keys() == {d for digests in of(1, 2).values() for d in digests}
    assert all(said.startswith("erased on 20") and said.endswith(" UTC by alice: old") for said in found.erased.values())
    assert retention.due(course.federation, course.rounds) == {}


def test_nothing_to_erase_is_not_told(course: Any) -> None:
    retention.erase(course.rounds, {}, "old", "alice")
    assert [e.kind for e in audit.entries(course.reader())] == ["commit"] * 5


class Killed(BaseException):
    pass


def test_a_crash_between_the_entry_and_the_erasure_is_no_break(course: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kept(course)
    deleted: list[str] = []

    survives = iter((False, True, True, True, False))

    def delete(key: str) -> None:
        if not next(survives):
            raise Killed
        deleted.append(key)
        DirectoryStore.delete(course.store, key)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(course.store, "delete", delete)
            with pytest.raises(Killed):
                retention.erase(course.rounds, retention.due(course.federation, course.rounds), "old", "alice")
        assert len(kept(course)) == len(whole) - len(deleted)
        assert chain.verify(course.reader()).breaks == []
    retention.erase(course.rounds, retention.due(course.federation, course.rounds), "old", "alice")
    assert len(kept(course)) == len(whole) - 6
    assert chain.verify(course.reader()).breaks == []


def test_an_entry_comes_before_what_it_tells_of_goes(course: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(course.store, "delete", lambda key: seen.append([e.kind for e in audit.entries(course.reader())][-1]))
    retention.erase(course.rounds, of(1), "old", "alice")
    assert seen == ["erasure"] * 3


def test_a_commit_that_the_log_lacks_is_told_before_an_erasure(tmp_path: Path) -> None:
    course = courses.Course(tmp_path, **KEEP).run(3).run(1, logged=False)
    retention.erase(course.rounds, of(1), "old", "alice")
    assert [(e.kind, e.round) for e in audit.entries(course.reader())][-2:] == [("commit", 4), ("erasure", 5)]
    assert chain.verify(course.reader()).breaks == []


# A silo that leaves


def leave(course: Any, silo: str) -> None:
    course.amend(courses.load(course.folder, tuple(s for s in courses.SILOS if s != silo), **KEEP))
    course.rounds = course.reader()


def test_a_silo_that_takes_part_keeps_its_updates(course: Any) -> None:
    with pytest.raises(FederationError, match=r"silo 'north': is part of the federation.*take it out of the file and run once"):
        retention.departed(course.rounds, "north")
    leave(course, "north")  # out of the file, but no round has been committed on the new terms
    with pytest.raises(FederationError, match="silo 'north': is part of the federation"):
        retention.departed(course.rounds, "north")


def test_all_updates_of_a_silo_that_has_left_can_be_erased(course: Any) -> None:
    leave(course, "north")
    course.run(1)
    files = retention.departed(course.rounds, "north")
    assert files == of(1, 2, 3, 4, silos=("north",))
    retention.erase(course.rounds, files, "north has left", "alice")
    assert not list(course.store.list(course.key("contributions", "north") + "/"))
    assert chain.verify(course.reader(), deep=True).breaks == []
    assert retention.departed(course.rounds, "north") == {}, "nothing is left to erase"


def test_a_silo_that_was_never_there_is_told(course: Any) -> None:
    with pytest.raises(FederationError, match="silo 'nowhere': has never contributed to federation 'fed'; correct the id"):
        retention.departed(course.rounds, "nowhere")


def test_a_silo_whose_name_begins_another_ones_is_not_mixed_up_with_it(tmp_path: Path) -> None:
    course = courses.Course(tmp_path, silos=("east", "nor", "north"))
    course.run(1)
    course.amend(courses.load(tmp_path, ("east", "north")))
    course.rounds = course.reader()
    course.run(1)
    assert retention.departed(course.rounds, "nor") == of(1, silos=("nor",))


def test_a_bucket_is_cleared_as_a_folder_is(tmp_path: Path, s3: S3Store) -> None:
    course = courses.Course(tmp_path, s3, **KEEP).run(3)
    files = retention.due(course.federation, course.rounds)
    assert files == of(1)
    retention.erase(course.rounds, files, "old", "alice")
    assert kept(course) == {courses.digest_of(f"update of {s} in {n}") for s in courses.SILOS for n in (2, 3)}
    found = chain.verify(course.reader(), deep=True)
    assert (found.breaks, len(found.erased)) == ([], 3)
