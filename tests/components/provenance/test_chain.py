"""The chain: what is whole verifies, and whatever somebody did to the store is told with its place."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import courses
import pytest

from silotune.components import keys
from silotune.components.errors import RefusedError
from silotune.components.protocol import Commit, UpdateManifest
from silotune.components.provenance import audit, chain, retention
from silotune.components.rounds import Rounds
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.s3_store import S3Store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six rounds, one exported. Not to be written to."""
    course = courses.Course(tmp_path_factory.mktemp("whole") / "fed").run(6)
    course.export(4)
    return course


@pytest.fixture
def course(whole: Any, tmp_path: Path) -> Any:
    return whole.copy(tmp_path / "fed")


def breaks(course: Any, **how: bool) -> str:
    return "\n".join(chain.verify(course.reader(), **how).breaks)


def test_a_good_federation_is_unbroken(whole: Any) -> None:
    found = chain.verify(whole.reader(), deep=True)
    assert found.breaks == found.lost == []
    assert [c.round for c in found.commits] == list(range(7))
    assert found.objects == 7 + 18 + 1  # globals, updates, the list of tensors
    assert found.records == 7 + 8 + 6 + 18 + 1  # commits, log, plans, manifests, and round 0
    assert found.erased == {}


def test_before_the_first_round_there_is_nothing(tmp_path: Path) -> None:
    found = chain.verify(courses.Course(tmp_path).reader())
    assert found.commits == found.breaks == []


def test_rounds_without_a_new_global_are_part_of_it(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(2).end("skipped").end("amended").run(1)
    course.end("rolled-back", outgoing=course.rounds.commit(1).outgoing, back_to=1).run(2)
    found = chain.verify(course.reader(), deep=True)
    assert found.breaks == []
    assert [c.round for c in found.lineage(found.commits[-1].outgoing)] == [8, 7, 1, 0], "round 2 and 5 were left behind"


@pytest.mark.parametrize(
    ("outcome", "more", "told"),
    [
        ("skipped", {"outgoing": "0" * 64}, "round 3: it was skipped, and yet has another global"),
        ("amended", {"outgoing": "0" * 64}, "round 3: it was amended, and yet has another global"),
        ("rolled-back", {"back_to": 1}, "round 3: it was rolled back to a global that is not that of an earlier round"),
        ("rolled-back", {"back_to": None}, "round 3: it was rolled back to a global that is not"),
        ("rolled-back", {"back_to": 3}, "round 3: it was rolled back to a global that is not"),
        ("skipped", {"previous": "0" * 64}, "round 3: its commit does not name the one before it"),
        ("skipped", {"incoming": "0" * 64}, "round 3: it does not begin from the global before it"),
        ("skipped", {"agreement": "0" * 64}, "round 3: its terms cannot be read"),
    ],
)
def test_a_commit_that_does_not_follow_is_told(tmp_path: Path, outcome: str, more: dict[str, Any], told: str) -> None:
    """Also where the coordinator itself has signed it."""
    assert told in breaks(courses.Course(tmp_path).run(2).end(outcome, **more))


Tamper = Callable[[Any], object]
TAMPERINGS: dict[str, tuple[Tamper, str]] = {
    "first commit gone": (lambda c: c.store.delete(c.of_round(0, "commit.json")), "round 0: its commit is gone"),
    "second commit gone": (lambda c: c.store.delete(c.of_round(1, "commit.json")), "round 1: its commit is gone"),
    "middle commit gone": (lambda c: c.store.delete(c.of_round(3, "commit.json")), "round 3: its commit is gone"),
    "all commits gone": (
        lambda c: [c.store.delete(c.of_round(n, "commit.json")) for n in range(7)],
        "round 0: its commit is gone",
    ),
    "last commit gone": (
        lambda c: c.store.delete(c.of_round(6, "commit.json")),
        "round 6: the audit log tells of its commit, which is gone",
    ),
    "last commit and log gone": (
        lambda c: (
            [c.store.delete(c.of_round(4, "commit.json"))]
            + [c.store.delete(c.of_round(n, r)) for n in (5, 6) for r in ("commit.json",)]
            + [c.store.delete(audit.key(c.rounds, n)) for n in (5, 6, 7, 8)]
        ),
        "round 4: its commit is gone",
    ),
    "commits swapped": (
        lambda c: c.swap(c.of_round(2, "commit.json"), c.of_round(3, "commit.json")),
        "round 2: its commit cannot be believed: fed/rounds/00002/commit.json",
    ),
    "commit is garbage": (lambda c: c.replace(c.of_round(2, "commit.json"), b"{"), "round 2: its commit cannot be believed"),
    "plan swapped": (
        lambda c: c.swap(c.of_round(2, "plan.json"), c.of_round(3, "plan.json")),
        "round 2: its plan is not the one that its commit names",
    ),
    "plan gone": (lambda c: c.store.delete(c.of_round(5, "plan.json")), "round 5: its plan is not the one that its commit names"),
    "plan is another": (
        lambda c: (c.store.delete(c.of_round(5, "plan.json")), c.open(5)),
        "round 5: its plan is not the one that its commit names",
    ),
    "manifest gone": (
        lambda c: c.store.delete(c.of_round(4, "updates", "north.json")),
        "round 4: the manifest of north is gone, altered or not signed by it",
    ),
    "manifest altered": (
        lambda c: c.replace(
            c.of_round(4, "updates", "north.json"),
            c.store.get(c.of_round(4, "updates", "north.json")).replace(b'"examples":8', b'"examples":9'),
        ),
        "round 4: the manifest of north is gone, altered or not signed by it",
    ),
    "manifest of another": (
        lambda c: c.swap(c.of_round(4, "updates", "north.json"), c.of_round(4, "updates", "south.json")),
        "round 4: the manifest of north is gone, altered or not signed by it",
    ),
    "terms altered": (
        lambda c: c.replace(c.key("agreements", f"{c.agreement.digest}.json"), c.agreement.encode() + b" "),
        "round 0: its terms cannot be read",
    ),
    "update gone": (
        lambda c: c.store.delete(c.key("contributions", "south", courses.digest_of("update of south in 2"))),
        "round 2: the update "
        + courses.digest_of("update of south in 2")[:12]
        + "… of south is gone, and the audit log tells of no erasure",
    ),
    "global gone": (
        lambda c: c.store.delete(c.key("objects", courses.digest_of("global 3"))),
        f"round 3: its global {courses.digest_of('global 3')[:12]}… is gone from the store",
    ),
    "list of tensors gone": (
        lambda c: c.store.delete(c.key("objects", c.rounds.put_json_object({"w": [2, 2]}))),
        "round 1: the list of tensors",
    ),
    "log entry gone": (lambda c: c.store.delete(audit.key(c.rounds, 4)), "audit log: entry 5 is not chained to the one before it"),
    "first log entry gone": (lambda c: c.store.delete(audit.key(c.rounds, 1)), "audit log: entry 2 is not chained"),
    "entry of the last commit gone": (lambda c: c.store.delete(audit.key(c.rounds, 7)), "audit log: entry 8 is not chained"),
    "log truncated": (
        lambda c: [c.store.delete(audit.key(c.rounds, n)) for n in (6, 7, 8)],
        "round 5: the audit log does not tell of it",
    ),
    "log gone": (lambda c: [c.store.delete(audit.key(c.rounds, n)) for n in range(1, 9)], "round 0: the audit log does not tell of it"),
    "log entry altered": (
        lambda c: c.replace(audit.key(c.rounds, 4), c.store.get(audit.key(c.rounds, 4)).replace(b'"at":5.0', b'"at":5.5')),
        "audit log: fed/audit/000004.json: must be signed by coordinator",
    ),
    "log entry inserted": (
        lambda c: c.replace(audit.key(c.rounds, 9), c.store.get(audit.key(c.rounds, 8))),
        "audit log: fed/audit/000009.json: must be signed by coordinator",
    ),
    "log entries swapped": (
        lambda c: c.swap(audit.key(c.rounds, 3), audit.key(c.rounds, 4)),
        "audit log: fed/audit/000003.json: must be signed by coordinator",
    ),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_what_was_done_to_the_store_is_told_with_its_place(course: Any, what: str) -> None:
    tamper, told = TAMPERINGS[what]
    tamper(course)
    assert told in breaks(course)


def test_an_initial_commit_that_is_gone_is_told(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(0)
    course.store.delete(course.of_round(0, "commit.json"))
    assert "round 0: the audit log tells of its commit, which is gone" in breaks(course)


def test_all_breaks_are_told(course: Any) -> None:
    for what in ("middle commit gone", "manifest altered", "update gone", "log entry altered"):
        TAMPERINGS[what][0](course)
    told = breaks(course)
    for what in ("middle commit gone", "update gone", "log entry altered"):
        assert TAMPERINGS[what][1] in told


@pytest.mark.parametrize(
    "key", ["objects/" + courses.digest_of("global 3"), "contributions/north/" + courses.digest_of("update of north in 3")]
)
def test_a_flipped_byte_is_found_where_bytes_are_read(course: Any, key: str) -> None:
    data = bytearray(course.store.get(course.key(key)))
    data[3] ^= 1
    course.replace(course.key(key), bytes(data))
    assert breaks(course) == ""
    assert f"object 'fed/{key}': its bytes have the digest" in breaks(course, deep=True)
    assert [c.round for c in chain.verify(course.reader(), deep=True).lost] == ([3] if key.startswith("objects") else [])


def test_what_no_commit_names_breaks_nothing(course: Any) -> None:
    """A refused update, one on its way, or what a silo puts into its own folder to make verification fail."""
    course.object("a refused update", "north")
    course.store.create(course.key("contributions", "north", "f" * 64), b"junk")
    course.store.create(course.key("contributions", "north", "deeper", "f" * 64), b"junk")
    course.store.create(course.of_round(7, "updates", "north.json"), b"junk")
    course.store.create(course.of_round(9, "plan.json"), b"junk")
    course.store.create(course.of_round(3, "updates", "north.2.json"), b"junk")
    course.store.create(course.key("rounds", "junk", "x", "y.json"), b"junk")
    assert breaks(course, deep=True) == ""


def test_a_manifest_in_a_later_slot_is_found(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(0)
    plan = course.open(1)
    bad = course.manifest(plan, "north", "a bad one")
    course.rounds.refuse_update(1, "north", "it is bad", resend=False, manifest=bad.digest)
    course._commit("aggregated", 1, plan=plan, contributions={"north": course.contribution(plan, "north")}, outgoing=course.object("g"))
    assert set(course.rounds.commit(1).contributions) == {"north"}
    assert course.store.size(course.of_round(1, "updates", "north.2.json"))
    assert breaks(course, deep=True) == ""


def test_a_commit_that_names_another_update_than_the_manifest_is_told(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(0)
    plan = course.open(1)
    part = course.contribution(plan, "north").model_copy(update={"object": course.object("other", "north")})
    course._commit("aggregated", 1, plan=plan, contributions={"north": part}, outgoing=course.object("g"))
    assert "round 1: the manifest of north names another update than the commit" in breaks(course)


# Who signs


def forged(course: Any, party: str, record: Any, key: str) -> None:
    """A record in its place, signed with the key of a party that must not."""
    signature = keys.private_key(course.federation.key_folder(party) / f"{party}.pem").sign(record.message(key))
    course.replace(key, record.model_copy(update={"signature": base64.b64encode(signature).decode()}).encode())


def test_a_log_that_a_silo_forges_breaks(course: Any) -> None:
    last = None
    for commit in course.rounds.commits():
        key = audit.key(course.rounds, commit.round + 1)
        entry = audit.of_commit(commit).model_copy(update={"number": commit.round + 1, "previous": last})
        forged(course, "north", entry, key)
        last = audit.Entry.decode(course.store.get(key), key).digest
    told = breaks(course)
    for number in range(1, 8):
        assert f"audit log: fed/audit/{number:06d}.json: must be signed by coordinator" in told


def test_an_erasure_that_a_silo_forges_excuses_nothing(course: Any) -> None:
    digest = courses.digest_of("update of south in 2")
    course.store.delete(course.key("contributions", "south", digest))
    entry = audit.of_erasure(7, {"south": [digest]}, "a lie", "north").model_copy(update={"number": 9, "previous": "x"})
    forged(course, "north", entry, audit.key(course.rounds, 9))
    assert f"round 2: the update {digest[:12]}… of south is gone" in breaks(course)


def test_an_erasure_with_a_key_for_earlier_rounds_is_told(tmp_path: Path) -> None:
    """A coordinator's key that leaked and was rotated out must not excuse what is gone today."""
    course = courses.Course(tmp_path).run(4)
    audit.append(course.rounds, audit.of_erasure(2, {"south": [courses.digest_of("update of south in 2")]}, "a lie", "x"))
    assert "audit log: entry 6 is an erasure in round 2, and stands behind round 4" in breaks(course)


@pytest.mark.parametrize("kind", [Commit, UpdateManifest])
def test_a_silos_key_opens_no_other_place(course: Any, kind: type) -> None:
    key = course.of_round(2, *(("commit.json",) if kind is Commit else ("updates", "south.json")))
    forged(course, "north", kind.decode(course.store.get(key), key), key)
    assert "round 2: its commit cannot be believed" in breaks(course) or "round 2: the manifest of south is gone, altered" in breaks(course)


def test_without_signing_only_digests_hold(tmp_path: Path) -> None:
    course = courses.Course(tmp_path, security={"signing": False}).run(2)
    assert breaks(course) == ""
    signed = Rounds(course.store, "fed", keys.Keyring(courses.load(tmp_path)))
    assert "has no signature" in "\n".join(chain.verify(signed).breaks), "and it cannot pass for a signed one"


def test_rotated_keys_verify_each_for_its_rounds(tmp_path: Path) -> None:
    made = {p: keys.new(tmp_path / ".silotune/keys", p) for p in ("coordinator",)}
    made |= {s: keys.new(tmp_path / f".silotune-private/{s}/keys", s) for s in courses.SILOS}
    course = courses.Course(tmp_path, security={"keys": made}).run(2)
    rotated = {}
    for party, public in made.items():
        new = keys.new(course.federation.key_folder(party), party, replace=True)
        rotated[party] = [{"public": public, "until": 2}, {"public": new, "since": 3}]
    course.amend(courses.load(tmp_path, security={"keys": rotated}))
    course.rounds = course.reader()
    course.run(2)
    course.export(1)
    assert breaks(course, deep=True) == ""


# While a run is at work, and after a crash


def test_the_entry_of_the_last_commit_may_be_on_its_way(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(2)
    course.run(1, logged=False)
    assert breaks(course) == ""
    audit.sync(course.rounds)
    assert breaks(course) == ""
    assert [e.round for e in audit.entries(course.rounds)] == [0, 1, 2, 3]


def test_the_entry_of_the_last_commit_is_not_on_its_way_once_the_next_round_is_open(tmp_path: Path) -> None:
    course = courses.Course(tmp_path).run(3)
    course.open(4)
    assert breaks(course) == ""
    course.store.delete(audit.key(course.rounds, 4))
    assert "round 3: the audit log does not tell of it" in breaks(course)


class Working(DirectoryStore):
    """A store in which a run commits the next round whenever a folder is listed."""

    busy = False

    def list(self, prefix: str, after: str = "") -> Any:
        found = list(super().list(prefix, after))
        if self.busy:
            self.busy = False
            self.run()
            self.busy = True
        return iter(found)


def test_a_federation_that_is_at_work_is_unbroken(tmp_path: Path) -> None:
    store = Working(tmp_path / "store")
    course = courses.Course(tmp_path, store).run(2)
    store.run = lambda: course.run(1).open(course.last.round + 1)  # type: ignore[attr-defined]
    store.busy = True
    assert breaks(course) == ""
    assert course.last.round >= 5


def test_what_is_erased_meanwhile_is_explained(tmp_path: Path) -> None:
    store = Working(tmp_path / "store")
    course = courses.Course(tmp_path, store).run(2)
    store.run = lambda: retention.erase(  # type: ignore[attr-defined]
        course.rounds, {"north": [courses.digest_of("update of north in 1")]}, "asked to", "me"
    )
    store.busy = True
    assert breaks(course) == ""


# Lineage and exports


def test_a_lineage_goes_back_to_round_0(whole: Any) -> None:
    found = chain.verify(whole.reader())
    digest = courses.digest_of("global 4")
    assert [c.round for c in found.lineage(digest)] == [4, 3, 2, 1, 0]
    assert [c.round for c in found.lineage(digest[:10])] == [4, 3, 2, 1, 0]
    with pytest.raises(RefusedError, match="several globals begin"):
        found.lineage("")
    with pytest.raises(RefusedError, match="no committed global begins"):
        found.lineage("0" * 64)


# What it costs


class Counting(DirectoryStore):
    """Counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: dict[str, list[str]] = {}

    def get(self, key: str) -> bytes:
        self.asked.setdefault("get", []).append(key)
        return super().get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.asked.setdefault("get_range", []).append(key)
        return super().get_range(key, start, length)

    def fetch_file(self, key: str, path: Path) -> None:
        self.asked.setdefault("fetch_file", []).append(key)
        super().fetch_file(key, path)


def test_a_hundred_rounds_are_verified_from_records_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # writing them takes longer than all else
    store = Counting(tmp_path / "store")
    course = courses.Course(tmp_path, store).run(100, logged=False)
    audit.sync(course.rounds)
    store.asked.clear()
    began = time.perf_counter()
    found = chain.verify(course.reader())
    with capsys.disabled():
        print(f"\nverify: 100 rounds of 3 silos in {time.perf_counter() - began:.2f} s")
    assert found.breaks == []
    assert found.records > 600
    assert not store.asked.keys() & {"get_range", "fetch_file"}
    assert not [k for k in store.asked["get"] if "/objects/" in k or "/contributions/" in k]
    assert len(store.asked["get"]) <= len(set(store.asked["get"])) + chain.READERS, "each record once, but for the terms that all share"


def test_a_bucket_is_verified_as_a_folder_is(tmp_path: Path, s3: S3Store) -> None:
    course = courses.Course(tmp_path, s3).run(3)
    assert breaks(course, deep=True) == ""
    s3.delete(course.of_round(2, "commit.json"))
    assert "round 2: its commit is gone" in breaks(course)
