"""The audit log: every commit, export and erasure once, in order, whoever crashed or came second."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import courses
import pytest

from silotune.components.errors import RefusedError
from silotune.components.provenance import audit, chain
from silotune.components.store.object_store import ObjectStore


@pytest.fixture
def course(tmp_path: Path) -> Any:
    return courses.Course(tmp_path).run(3)


def told(course: Any) -> list[tuple[str, int]]:
    return [(e.kind, e.round) for e in audit.entries(course.reader())]


def commits(*numbers: int) -> list[tuple[str, int]]:
    return [("commit", n) for n in numbers]


def test_an_entry_says_who_contributed_what_to_which_global(course: Any) -> None:
    entry = list(audit.entries(course.rounds))[2]
    commit = course.rounds.commit(2)
    assert (entry.commit, entry.outgoing, entry.reason, entry.at) == (commit.digest, commit.outgoing, "aggregated", commit.at)
    assert entry.contributions == {s: courses.digest_of(f"update of {s} in 2") for s in courses.SILOS}


def test_each_entry_names_the_one_before(course: Any) -> None:
    found = list(audit.entries(course.rounds))
    assert [e.number for e in found] == [1, 2, 3, 4]
    assert [e.previous for e in found] == [None, *(e.digest for e in found[:-1])]


def test_what_is_told_is_told_once(course: Any) -> None:
    for _ in range(3):
        audit.sync(course.reader())
        course.export(2)
    assert told(course) == [*commits(0, 1, 2, 3), ("export", 2)]


def test_a_crash_between_commits_and_their_entries_is_made_good(course: Any) -> None:
    course.export(1)
    course.run(2, logged=False)
    audit.sync(course.reader())
    assert told(course) == [*commits(0, 1, 2, 3), ("export", 1), *commits(4, 5)]
    assert chain.verify(course.reader()).breaks == []


def test_whoever_comes_second_writes_nothing_again(course: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look at the log's end and its entry, another run writes the same entry."""
    course.run(1, logged=False)
    slow, raced = course.reader(), []
    latest = slow.latest

    def late() -> Any:
        if not raced:
            raced.append(True)
            audit.sync(course.reader())
        return latest()

    monkeypatch.setattr(slow, "latest", late)
    audit.sync(slow)
    assert raced
    assert told(course) == commits(0, 1, 2, 3, 4)


def test_an_export_that_two_record_at_once_is_told_once(course: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, raced, read = course.reader(), [], audit.entries

    def entries(rounds: Any, number: int = 1) -> Any:
        yield from read(rounds, number)
        if rounds is slow:
            raced.append(course.export(2))

    monkeypatch.setattr(audit, "entries", entries)
    exported = course.rounds.write_export(
        audit.Exported(
            commit=course.rounds.commit(2).digest, round=2, outgoing=course.rounds.commit(2).outgoing, location="/models/2", files={}
        )
    )
    audit.record_export(slow, exported, course.rounds.commit(2).at)
    assert len(raced) == 1
    assert told(course) == [*commits(0, 1, 2, 3), ("export", 2)]


def test_many_at_once_make_one_chain(store: ObjectStore, tmp_path: Path) -> None:
    course = courses.Course(tmp_path, store).run(3, logged=False)
    gate, errors = threading.Barrier(6), []

    def work(i: int) -> None:
        rounds = course.reader()
        gate.wait()
        try:
            audit.sync(rounds)
            audit.append(rounds, audit.of_erasure(4, {"north": [f"{i}"]}, "a test", "me"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = list(audit.entries(course.reader()))
    assert [(e.kind, e.round) for e in found[:4]] == commits(0, 1, 2, 3)
    assert sorted(e.erased["north"][0] for e in found[4:]) == list("012345")
    assert [e.previous for e in found] == [None, *(e.digest for e in found[:-1])]
    assert chain.verify(course.reader()).breaks == []


def test_the_log_outlives_a_commit_that_was_deleted(course: Any) -> None:
    """Else the next run would make that round once more, and nobody would see that there was another."""
    course.store.delete(course.of_round(3, "commit.json"))
    with pytest.raises(RefusedError, match=r"fed/audit/000004\.json: tells of the commit of round 3, and the commit of round 3 is gone"):
        audit.sync(course.reader())
    course.store.delete(course.of_round(0, "commit.json"))
    with pytest.raises(RefusedError, match="the commit of round 0 is gone; restore it from a backup"):
        audit.sync(course.reader())
    assert told(course) == commits(0, 1, 2, 3)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_entry_that_was_deleted_is_not_made_good_by_telling_others_twice(course: Any, number: int) -> None:
    before = [course.store.get(audit.key(course.rounds, n)) for n in (1, 2, 3, 4)]
    course.store.delete(audit.key(course.rounds, number))
    course.run(1)
    assert chain.verify(course.reader()).breaks == [] or number == 1
    assert [course.store.get(audit.key(course.rounds, n)) for n in (1, 2, 3, 4) if n != number] == [
        b for n, b in enumerate(before, 1) if n != number
    ]
    assert told(course)[:4] == commits(0, 1, 2, 3)


def test_an_entry_that_is_not_the_coordinators_stops_the_log(course: Any) -> None:
    course.store.create(audit.key(course.rounds, 5), b'{"format":1}')
    with pytest.raises(RefusedError, match=r"fed/audit/000005\.json"):
        audit.sync(course.reader())
