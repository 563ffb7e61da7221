"""Groups of updates summed ahead: the same bytes as without, whoever is missing, refused, killed or lying."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deliveries import SILOS, Deliveries

from silotune.components.aggregate import lost_global
from silotune.components.aggregate import step as aggregate
from silotune.components.combine import step as combine
from silotune.components.errors import RefusedError, SilotuneError, UnreachableError
from silotune.components.learning.aggregation.mean import weighted_mean
from silotune.components.learning.aggregation.summation import SumDamaged
from silotune.components.learning.aggregation.tree import Partial as Known
from silotune.components.learning.aggregation.tree import Stored, grouped_mean
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.learning.update import Update
from silotune.components.process import child
from silotune.components.process.progress import RUN_VARIABLE, read_events
from silotune.components.protocol import Commit, Partial
from silotune.components.provenance import chain
from silotune.components.rounds import Rounds
from silotune.components.store.content import file_digest
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.terms.strategies import STRATEGIES, Aggregation

PAIRS = {"fan_in": 2}
GROUPS = (("ada", "bo"), ("cy", "di"), ("ed",))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Deliveries]:
    """Twins: what is delivered to one is delivered to the next, byte for byte."""
    made: list[Deliveries] = []

    def one(**aggregation: Any) -> Deliveries:
        made.append(Deliveries(tmp_path / str(len(made)), aggregation=PAIRS | aggregation))
        return made[-1]

    return one


def parts(commit: Commit) -> dict[str, dict[str, Any]]:
    """What a commit says of each silo, without what its signature is part of: twins have keys of their own."""
    return {silo: c.model_dump(exclude={"manifest", "object", "bytes"}) for silo, c in commit.contributions.items()}


@pytest.fixture
def tensor_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Silos of whose updates more than the header is read, one entry for each read."""
    found: list[str] = []
    get_range = DirectoryStore.get_range

    def read(store: DirectoryStore, key: str, start: int, length: int) -> bytes:
        if "/contributions/" in key and start > 0:
            found.append(key.split("/")[-2])
        return get_range(store, key, start, length)

    monkeypatch.setattr(DirectoryStore, "get_range", read)
    return found


def test_groups_are_cut_from_all_that_are_asked(make: Callable[..., Deliveries]) -> None:
    assert make().groups == GROUPS
    assert Aggregation(fan_in=2).groups(["b", "a"]) == ()
    assert Aggregation(fan_in=2).groups(["c", "b", "a"]) == (("a", "b"), ("c",))
    assert Aggregation(fan_in=2, strategy="product").groups("abc") == ()
    for more in ({"robust": {"rule": "median"}}, {"clip": {"norm": 1.0}}, {"zeroing": True}):
        assert Aggregation.model_validate({"fan_in": 2} | more).groups("abc") == ()


@pytest.mark.parametrize("strategy", [name for name, s in STRATEGIES.items() if s.linear and not s.lora_only])
def test_boxes_or_not_the_course_is_the_same(make: Callable[..., Deliveries], tensor_reads: list[str], strategy: str) -> None:
    boxed, alone = make(strategy=strategy), make(strategy=strategy)
    for number in (1, 2):
        boxed.deliver(*SILOS)
        alone.deliver(*SILOS)
        assert boxed.combine() == [f"group {n} ok: {len(g)} of {len(g)} updates" for n, g in enumerate(GROUPS, 1)]
        assert sorted(set(tensor_reads)) == list(SILOS)
        tensor_reads.clear()
        one = boxed.aggregate()
        assert tensor_reads == [], "what is summed already is not read again"
        other = alone.aggregate()
        assert sorted(set(tensor_reads)) == list(SILOS)
        tensor_reads.clear()
        assert one.outcome == "aggregated"
        assert (one.outgoing, one.server_state, one.guards) == (other.outgoing, other.server_state, other.guards)
        assert parts(one) == parts(other), f"round {number}: weights, norms and all"
        assert boxed.sums() == [], "a committed round needs none"


def test_groups_order_the_sum_and_up_to_fan_in_nothing_changes(make: Callable[..., Deliveries], tmp_path: Path) -> None:
    outgoing = {}
    for name, fan_in in (("pairs", 2), ("threes", 3), ("one", 5), ("usual", 16)):
        course = Deliveries(tmp_path / name, aggregation={"fan_in": fan_in})
        course.deliver(*SILOS)
        outgoing[name] = course.aggregate().outgoing
    assert outgoing["one"] == outgoing["usual"]
    assert len({outgoing["pairs"], outgoing["threes"], outgoing["one"]}) == 3, (
        "the order shows in the bytes, so equal bytes mean an equal order"
    )


@pytest.mark.parametrize("absent", [("bo",), ("ada", "bo"), ("ed",), ("ada", "di"), ("ada", "bo", "cy", "di")])
def test_who_is_missing_moves_nobody(make: Callable[..., Deliveries], tensor_reads: list[str], absent: tuple[str, ...]) -> None:
    present = [s for s in SILOS if s not in absent]
    boxed, alone = make(), make()
    boxed.deliver(*present)
    alone.deliver(*present)
    boxed.combine()
    tensor_reads.clear()
    one = boxed.aggregate()
    assert tensor_reads == []
    other = alone.aggregate()
    assert sorted(one.contributions) == present
    assert (one.outgoing, parts(one)) == (other.outgoing, parts(other))
    by_hand = np.zeros((6, 4))
    total = sum(c.examples for c in one.contributions.values())
    for silo, c in one.contributions.items():
        path = boxed.rounds.fetch_object(c.object, boxed.folder / "fetched", silo)
        by_hand += c.examples / total * open_tensor_file(path).read("a.weight").astype(np.float64)
    before, after = (open_tensor_file(boxed.path(boxed.rounds.object_key(d or ""))).read("a.weight") for d in (one.incoming, one.outgoing))
    np.testing.assert_allclose(after, before + by_hand, atol=2e-6)


def damage(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def contribution(course: Deliveries, silo: str) -> Path:
    manifest = course.rounds.update(1, silo)
    assert manifest is not None
    return course.path(course.rounds.object_key(manifest.object, silo))


def test_a_silo_that_a_box_refuses_is_told_of_in_the_commit_and_can_send_again(make: Callable[..., Deliveries]) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    damage(contribution(course, "cy"))
    assert course.combine() == ["group 1 ok: 2 of 2 updates", "group 2 ok: 1 of 2 updates", "group 3 ok: 1 of 1 updates"]
    record = course.rounds.partial(1, 1, 2)
    assert record is not None
    assert (sorted(record.silos), record.refused) == (["di"], {"cy": "object corrupt"})
    refusal = course.rounds.refusal(1, "cy")
    assert refusal is not None
    assert refusal.resend
    alone.deliver("ada", "bo", "di", "ed")
    commit = course.aggregate()
    assert commit.missing == {"cy": "refused: object corrupt"}, "its status says ok, which it was when it was sent"
    assert commit.outgoing == alone.aggregate().outgoing


def test_a_silo_that_sends_again_in_the_next_attempt_is_summed_then(make: Callable[..., Deliveries], tensor_reads: list[str]) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    damage(contribution(course, "cy"))
    course.combine()
    assert course.open() == "round:1 attempt:2"
    course.deliver("cy")
    tensor_reads.clear()
    told = course.combine()
    assert told == ["group 1 ok: it is summed already", "group 2 ok: 2 of 2 updates", "group 3 ok: it is summed already"]
    assert sorted(set(tensor_reads)) == ["cy", "di"], "only the group that changed is summed anew"
    tensor_reads.clear()
    commit = course.aggregate()
    assert tensor_reads == []
    alone.deliver(*SILOS)
    assert (commit.outgoing, commit.missing) == (alone.aggregate().outgoing, {})


def test_a_sum_of_other_manifests_is_not_used(make: Callable[..., Deliveries], tensor_reads: list[str]) -> None:
    """Of a silo that has delivered since, and of one that was refused since."""
    course, alone = make(), make()
    sent = course.deliver("ada", "cy", "di", "ed")
    course.combine()
    course.deliver("bo")
    course.rounds.refuse_update(1, "di", "its records were mixed up", resend=False, manifest=sent["di"].digest)
    course.open()
    tensor_reads.clear()
    commit = course.aggregate()
    assert sorted(set(tensor_reads)) == ["ada", "bo", "cy"]
    assert commit.missing == {"di": "refused: its records were mixed up"}
    alone.deliver("ada", "bo", "cy", "ed")
    assert commit.outgoing == alone.aggregate().outgoing


def test_an_outlier_that_only_all_updates_together_show_is_left_out_of_its_group(make: Callable[..., Deliveries]) -> None:
    course, alone = make(), make()
    course.deliver("ada", "bo", "cy", "ed")
    course.deliver("di", scale=1000.0)
    assert course.combine()[1] == "group 2 ok: 2 of 2 updates"
    commit = course.aggregate()
    assert "times the median" in commit.missing["di"]
    alone.deliver("ada", "bo", "cy", "ed")
    assert commit.outgoing == alone.aggregate().outgoing


# --- what a box has stored, and others have changed ---


@pytest.mark.parametrize(("place", "reread"), [(-1, ["ada", "bo"]), (40, ["ada", "bo"])], ids=["tensors", "header"])
def test_a_damaged_sum_is_found_and_made_again(
    make: Callable[..., Deliveries], tensor_reads: list[str], place: int, reread: list[str]
) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    alone.deliver(*SILOS)
    course.combine()
    record = course.rounds.partial(1, 1, 1)
    assert record is not None
    damage(course.path(course.rounds.partial_key(record.object)), place)
    tensor_reads.clear()
    commit = course.aggregate()
    assert sorted(set(tensor_reads)) == reread, "the other groups' sums are still used"
    assert (commit.outgoing, commit.missing) == (alone.aggregate().outgoing, {})


def test_a_sum_that_damage_has_made_infinite_is_damaged_and_no_silos_fault(make: Callable[..., Deliveries]) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    alone.deliver(*SILOS)
    course.combine()
    record = course.rounds.partial(1, 1, 2)
    assert record is not None
    path = course.path(course.rounds.partial_key(record.object))
    data = path.read_bytes()
    start = open_tensor_file(path).entries["a.weight"].start
    path.write_bytes(data[:start] + np.float32(np.inf).tobytes() + data[start + 4 :])
    assert course.aggregate().outgoing == alone.aggregate().outgoing


def test_sums_that_are_gone_are_made_again(make: Callable[..., Deliveries], monkeypatch: pytest.MonkeyPatch) -> None:
    """One before aggregate looks, one while it reads, as by another run that has just committed the round."""
    course, alone = make(), make()
    course.deliver(*SILOS)
    alone.deliver(*SILOS)
    course.combine()
    records = [course.rounds.partial(1, 1, n) for n in (1, 2)]
    first, second = (course.path(course.rounds.partial_key(r.object)) for r in records if r)
    first.unlink()
    inner = aggregate.combine

    def late(*arguments: Any) -> Any:
        second.unlink(missing_ok=True)
        return inner(*arguments)

    monkeypatch.setattr(aggregate, "combine", late)
    assert course.aggregate().outgoing == alone.aggregate().outgoing


def rewrite(course: Deliveries, key: str, data: bytes) -> None:
    course.rounds.store.delete(key)
    assert course.rounds.store.create(key, data)


@pytest.mark.parametrize("forgery", ["weight", "object", "unsigned", "by a silo", "of another group", "no record"])
def test_a_forged_record_is_passed_over(make: Callable[..., Deliveries], tensor_reads: list[str], forgery: str) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    alone.deliver(*SILOS)
    course.combine()
    keys, record = course.records(), course.rounds.partial(1, 1, 1)
    other = course.rounds.partial(1, 1, 2)
    assert record is not None
    assert other is not None
    ada = record.silos["ada"]
    forged: Partial = {
        "weight": record.model_copy(update={"silos": record.silos | {"ada": ada.model_copy(update={"weight": 9 * ada.weight})}}),
        "object": record.model_copy(update={"object": other.object}),
        "unsigned": record.model_copy(update={"object": other.object, "signature": None}),
        "of another group": other,
    }.get(forgery, record)
    if forgery == "by a silo":
        keyring = course.rounds.keyring
        assert keyring is not None
        lie = record.model_copy(update={"object": other.object, "signature": None})
        forged = lie.model_copy(update={"signature": keyring.sign("ada", 1, lie.message(keys[0]))})
    rewrite(course, keys[0], b"{}" if forgery == "no record" else forged.encode())
    tensor_reads.clear()
    commit = course.aggregate()
    assert sorted(set(tensor_reads)) == ["ada", "bo"]
    assert commit.outgoing == alone.aggregate().outgoing


def test_without_signatures_a_record_still_holds_for_its_own_place_only(tmp_path: Path, tensor_reads: list[str]) -> None:
    course = Deliveries(tmp_path / "f", aggregation=PAIRS, security={"signing": False})
    course.deliver(*SILOS)
    course.combine()
    second = course.rounds.partial(1, 1, 2)
    assert second is not None
    rewrite(course, course.records()[0], second.encode())
    with pytest.raises(RefusedError, match="says that it is of group 2 in attempt 1"):
        course.rounds.partial(1, 1, 1)
    tensor_reads.clear()
    assert sorted(course.aggregate().contributions) == list(SILOS)
    assert sorted(set(tensor_reads)) == ["ada", "bo"]


def test_silos_may_not_read_sums(make: Callable[..., Deliveries]) -> None:
    """Of a group of one it is that one's update."""
    from silotune.pipelines.membership import bucket_policies as policies

    course = make()
    course.deliver(*SILOS)
    course.combine()
    federation = course.federation.model_copy(update={"storage": course.federation.storage.model_copy(update={"root": "s3://bucket/team"})})
    given = {s["Sid"]: s for s in policies.silo_policy(federation, "ada")["Statement"]}
    assert not any("partials" in resource for s in given.values() for resource in s.get("Resource", ()))
    stored = course.sums()
    assert len(stored) == 3
    assert not {key.rsplit("/", 1)[1] for key in stored} & {key.rsplit("/", 1)[1] for key in course.rounds.store.list("fed/objects/")}
    written = {s["Sid"]: s for s in policies.coordinator_policy(federation)["Statement"]}
    for sid in ("CreateCourse", "EraseTensorFiles"):
        assert any(resource.endswith("/fed/partials/*") for resource in written[sid]["Resource"])
    assert any(resource.endswith("/fed/rounds/?????/partials/*") for resource in written["CreateCourse"]["Resource"])


# --- boxes that end badly ---


def test_a_box_that_is_killed_at_any_write_can_run_again(make: Callable[..., Deliveries], monkeypatch: pytest.MonkeyPatch) -> None:
    course, alone = make(), make()
    course.deliver(*SILOS)
    alone.deliver(*SILOS)
    kills = 0
    for method in ("put_partial", "write_partial"):
        for after in (False, True):
            inner = getattr(Rounds, method)

            def killed(rounds: Rounds, what: Any, inner: Any = inner, after: bool = after) -> Any:
                if after:
                    inner(rounds, what)
                os.kill(os.getpid(), signal.SIGKILL)

            if (pid := os.fork()) == 0:
                setattr(Rounds, method, killed)
                combine.work(str(course.file), course.turn, "1")
                os._exit(0)
            kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert kills == 4
    assert course.combine() == ["group 1 ok: it is summed already", "group 2 ok: 2 of 2 updates", "group 3 ok: 1 of 1 updates"]
    assert course.aggregate().outgoing == alone.aggregate().outgoing


def test_two_boxes_of_one_group_at_once_store_one_sum(make: Callable[..., Deliveries], monkeypatch: pytest.MonkeyPatch) -> None:
    course = make()
    course.deliver(*SILOS)
    monkeypatch.setattr(combine.groups, "stored_sum", lambda *_: None)  # as where neither has seen the other
    assert course.combine(1, 1) == ["group 1 ok: 2 of 2 updates"] * 2
    assert len(course.records()) == len(course.sums()) == 1


def test_a_box_that_meets_an_older_sum_in_its_place_leaves_the_work_to_aggregate(make: Callable[..., Deliveries]) -> None:
    course, alone = make(), make()
    course.deliver("ada", "cy", "di", "ed")
    course.combine()
    course.deliver("bo")
    with pytest.raises(RefusedError, match="another sum was stored in this attempt"):
        course.combine(1)
    alone.deliver(*SILOS)
    assert course.aggregate().outgoing == alone.aggregate().outgoing


def test_a_box_with_nothing_to_do_says_so(make: Callable[..., Deliveries]) -> None:
    course = make()
    course.deliver("ada")
    assert course.combine(2, 9) == ["group 2 ok: no update to sum", "group 9 ok: the plan has 3 groups"]
    turn = course.turn
    course.aggregate()
    assert combine.work(str(course.file), turn, "1") == "group 1 ok: the round is committed"
    assert combine.run(str(course.file), "done:all 9 rounds are committed", "1", []) == "done:all 9 rounds are committed"
    with pytest.raises(RefusedError, match="round 7 was never opened"):
        combine.work(str(course.file), "round:7 attempt:1", "1")


@pytest.mark.parametrize("reason", ["against the protocol", "disk full"])
def test_a_box_that_fails_is_a_value(make: Callable[..., Deliveries], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str) -> None:
    course = make()
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    monkeypatch.setattr(child, "die_with_run", lambda: None)

    def call(*_: Any) -> str:
        raise (UnreachableError if reason == "disk full" else RefusedError)("it does not work", reason)

    monkeypatch.setattr(child, "call", call)
    assert combine.run(str(course.file), course.turn, "2", []) == f"group 2 failed: {reason}"
    assert [e["what"] for e in read_events(tmp_path, 0)[0]] == ["started", "warned", "ended"]


def test_a_box_that_dies_is_a_value(make: Callable[..., Deliveries]) -> None:
    """In a child of its own, as in a pipeline; the federation file is not one."""
    course = make()
    course.deliver(*SILOS)
    text = course.file.read_text()
    course.file.write_text(text.replace("fan_in: 2", "fan_in: 0"))
    assert combine.run(str(course.file), course.turn, "1", []) == "group 1 failed: data or settings are wrong"
    course.file.write_text(text)
    assert combine.run(str(course.file), course.turn, "1", []) == "group 1 ok: 2 of 2 updates"


def test_a_store_out_of_reach_breaks_the_run(make: Callable[..., Deliveries], monkeypatch: pytest.MonkeyPatch) -> None:
    course = make()
    monkeypatch.setattr(child, "die_with_run", lambda: None)

    def call(*_: Any) -> str:
        raise UnreachableError("no answer")

    monkeypatch.setattr(child, "call", call)
    with pytest.raises(SystemExit) as left:
        combine.run(str(course.file), course.turn, "2", [])
    assert left.value.code == 5


# --- afterwards ---


@pytest.mark.parametrize("silos", [SILOS, ("ada", "cy", "di")])
def test_a_lost_global_is_made_again_in_the_same_groups(make: Callable[..., Deliveries], silos: tuple[str, ...]) -> None:
    course = make(strategy="fedavgm")
    course.deliver(*silos)
    course.combine()
    course.aggregate()
    course.deliver(*silos)
    course.combine()
    commit = course.aggregate()
    path = course.path(course.rounds.object_key(commit.outgoing))
    sound = path.read_bytes()
    path.unlink()
    lost_global.fetch_global(course.rounds, commit, course.folder / "again")
    assert path.read_bytes() == (course.folder / "again").read_bytes() == sound


def test_the_chain_holds_with_sums_in_the_store(make: Callable[..., Deliveries]) -> None:
    course = make()
    course.deliver(*SILOS)
    course.combine()
    course.aggregate()
    course.deliver(*SILOS)
    course.combine()
    assert len(course.records()) == len(course.sums()) == 3
    assert chain.verify(Rounds.of(course.federation), deep=True).breaks == []


# --- the arithmetic by itself ---


def updates_of(course: Deliveries) -> dict[str, Update]:
    from silotune.components.aggregate.intake import Intake

    manifests, _ = course.rounds.updates(1)
    plan = course.rounds.plan(1)
    assert plan is not None
    return Intake.of("aggregate", course.rounds, plan, course.agreement, manifests, course.folder).accepted


def test_grouped_mean_wants_groups_that_hold_all_and_sums_of_these_groups(make: Callable[..., Deliveries], tmp_path: Path) -> None:
    course = make()
    course.deliver(*SILOS)
    course.combine()
    updates = updates_of(course)
    incoming = open_tensor_file(course.folder / "initial")
    weights = dict.fromkeys(SILOS, 1.0)
    record = course.rounds.partial(1, 1, 1)
    assert record is not None
    file = open_tensor_file(course.rounds.partial_blob(record.object))
    stored = Stored(Known({"ada": 1.0, "bo": 1.0}, {"ada": 1.0, "bo": 1.0}), file, record.object)
    with pytest.raises(ValueError, match="groups: must hold all silos"):
        grouped_mean(incoming, GROUPS[:2], updates, weights, (), tmp_path / "out")
    with pytest.raises(ValueError, match="groups: must hold all silos"):
        grouped_mean(incoming, [("ada", "bo", "cy"), ("di", "ed")], updates, weights, (stored,), tmp_path / "out")
    with pytest.raises(ValueError, match="must be of the weights at hand"):
        grouped_mean(incoming, GROUPS, updates, weights | {"bo": 2.0}, (stored,), tmp_path / "out")
    with pytest.raises(SumDamaged):
        grouped_mean(incoming, GROUPS, updates, weights, (Stored(stored.partial, file, "0" * 64),), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SilotuneError, match="not finite") as raised:  # a true sum of honest updates that is too large is no damage
        grouped_mean(incoming, GROUPS, updates, weights, (stored,), tmp_path / "out", total=1e-40)
    assert not isinstance(raised.value, SumDamaged)


def test_full_groups_are_the_order_of_a_flat_mean(make: Callable[..., Deliveries], tmp_path: Path) -> None:
    course = make()
    course.deliver(*SILOS)
    updates, incoming = updates_of(course), open_tensor_file(course.folder / "initial")
    weights = {silo: float(u.header.examples) for silo, u in updates.items()}
    flat = weighted_mean(incoming, updates, weights, tmp_path / "flat", fan_in=2)
    grouped = grouped_mean(incoming, GROUPS, updates, weights, (), tmp_path / "grouped", fan_in=2)
    assert file_digest(tmp_path / "flat") == file_digest(tmp_path / "grouped")
    assert (flat.norms, flat.change) == (grouped.norms, grouped.change)
