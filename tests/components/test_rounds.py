"""The protocol, on both kinds of store: first writer wins, a round is what is committed, and nothing altered is believed.

Then what follows from its records: the quorum, where data streams stand, which global is the best, and when to stop.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from pathlib import Path
from typing import Any, get_args

import pytest

from silotune.components import best_global, keys, opening
from silotune.components.errors import FederationError, QuorumError, RefusedError, SilotuneError, UnreachableError
from silotune.components.federation import Agreement, Federation
from silotune.components.keys import Keyring
from silotune.components.protocol import Commit, Contribution, Evaluation, Participant, Plan, Report, Turn, UpdateManifest, pooled
from silotune.components.record_keys import highest
from silotune.components.rounds import Rounds
from silotune.components.store.content import CorruptObject
from silotune.components.store.directory_store import DirectoryStore
from silotune.components.store.object_store import ObjectMissing, ObjectStore
from silotune.components.terms.rounds import Until


@pytest.fixture
def rounds(store: ObjectStore) -> Rounds:
    return Rounds(store, "fed")


def commit(number: int, **changes: Any) -> Commit:
    part = Contribution(manifest="m", object="o", bytes=10, weight=1.0, examples=4, tokens=9, steps=2, cursor=4 * number, norm=0.5)
    terms = {
        "round": number, "outcome": "aggregated" if number else "initialized", "custody": "none", "agreement": "a", "plan": "p",
        "attempt": 1, "contributions": {"north": part}, "missing": {}, "previous": "c", "incoming": "g", "outgoing": f"global-{number}",
        "best": 0, "started": 1.0, "at": 2.0,
    }  # fmt: skip
    return Commit(**(terms | changes))


def plan(number: int = 1, silos: tuple[str, ...] = ("north", "south"), **changes: Any) -> Plan:
    terms = {
        "round": number, "agreement": "a", "base": "b", "incoming": "g", "tensors": "t", "accepted": [(number, "g")], "learning_rate": 0.1, "code": "1",
        "participants": {s: Participant(tensors="t", cursor=0) for s in silos},
    }  # fmt: skip
    return Plan(**(terms | changes))


def manifest(silo: str, **changes: Any) -> UpdateManifest:
    terms = {
        "round": 1, "silo": silo, "agreement": "a", "plan": "p", "incoming": "g", "object": "o", "header": "h", "bytes": 10, "examples": 4, "tokens": 9,
        "steps": 2, "cursor": 4, "codec": "float32", "norm": 0.5, "loss": 1.0,
    }  # fmt: skip
    return UpdateManifest(**(terms | changes))


def alter(rounds: Rounds, key: str, data: bytes) -> None:
    """As someone can who may do anything in the store."""
    rounds.store.delete(key)
    assert rounds.store.create(key, data)


def test_the_first_commit_of_a_round_stands(rounds: Rounds) -> None:
    first = rounds.write_commit(commit(0, outgoing="mine"))
    second = rounds.write_commit(commit(0, outgoing="late"))
    assert first.outgoing == second.outgoing == "mine"
    assert rounds.commit(0) == first


def test_racing_writers_agree_on_one_plan(rounds: Rounds) -> None:
    stood: list[Plan] = []
    threads = [threading.Thread(target=lambda i=i: stood.append(rounds.open_round(plan(learning_rate=float(i + 1))))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stood) == 6
    assert len({p.learning_rate for p in stood}) == 1


@pytest.mark.parametrize("last", [0, 1, 2, 3, 6, 7, 8, 20])
def test_latest_is_the_highest_commit(tmp_path: Path, last: int) -> None:
    rounds = Rounds(DirectoryStore(tmp_path), "fed")
    assert rounds.latest() is None
    for number in range(last + 1):
        rounds.write_commit(commit(number))
    latest = rounds.latest()
    assert latest is not None
    assert latest.round == last
    assert [c.round for c in rounds.commits()] == list(range(last + 1))


def test_an_open_round_is_no_commit(rounds: Rounds) -> None:
    rounds.write_commit(commit(0))
    rounds.open_round(plan())
    rounds.write_update(manifest("north"))
    latest = rounds.latest()
    assert latest is not None
    assert latest.round == 0


def test_an_attempt_asks_only_who_has_not_delivered(rounds: Rounds) -> None:
    opened = rounds.open_round(plan(silos=("east", "north", "south")))
    assert rounds.begin_attempt(opened, {}).asked == ["east", "north", "south"]
    rounds.write_update(manifest("north"))
    second = rounds.begin_attempt(opened, {"south": "failed: disk full", "north": "failed: too late to matter"})
    assert (second.attempt, second.asked, second.missing) == (2, ["east"], {"south": "failed: disk full"})


def test_a_silos_first_update_stands(rounds: Rounds) -> None:
    rounds.write_update(manifest("north", object="first"))
    assert rounds.write_update(manifest("north", object="second")).object == "first"
    manifests, disbelieved = rounds.updates(1)
    assert {s: m.object for s, m in manifests.items()} == {"north": "first"}
    assert disbelieved == {}
    assert rounds.update(1, "south") is None


def test_a_refused_update_makes_room_for_another(rounds: Rounds) -> None:
    assert rounds.refusal(1, "north") is None
    first = rounds.write_update(manifest("north", object="first"))
    rounds.refuse_update(1, "north", "its norm is 7, its header says 8", resend=False, manifest=first.digest)
    refused = rounds.refusal(1, "north")
    assert refused is not None
    assert (refused.manifest, refused.rule) == (first.digest, "its norm is 7, its header says 8")
    assert rounds.updates(1) == ({}, {})
    assert rounds.refusal(1, "north") == refused
    assert rounds.write_update(manifest("north", object="second")).object == "second"
    assert rounds.write_update(manifest("north", object="third")).object == "second", "the first one that was not refused stands"
    assert {s: m.object for s, m in rounds.updates(1)[0].items()} == {"north": "second"}
    assert rounds.refusal(1, "north") == refused, "what was wrong with the one before stays known"


def test_every_refused_update_keeps_its_place(rounds: Rounds) -> None:
    for i in range(3):
        sent = rounds.write_update(manifest("north", object=f"u{i}"))
        rounds.refuse_update(1, "north", f"rule {i}", resend=i == 2, manifest=sent.digest)
    rounds.write_update(manifest("north", object="good"))
    rounds.write_update(manifest("south", object="other"))
    names = ("north.json", "north.2.json", "north.3.json", "north.4.json")
    kept = [rounds.read(UpdateManifest, f"fed/rounds/00001/updates/{name}").object for name in names]
    assert kept == ["u0", "u1", "u2", "good"]
    last = rounds.refusal(1, "north")
    assert last is not None
    assert (last.rule, last.resend) == ("rule 2", True)
    assert {s: m.object for s, m in rounds.updates(1)[0].items()} == {"north": "good", "south": "other"}


def test_of_two_that_refuse_the_slower_one_leaves_what_came_since(rounds: Rounds) -> None:
    judged = rounds.write_update(manifest("north", object="bad"))
    rounds.refuse_update(1, "north", "not finite", resend=False, manifest=judged.digest)
    rounds.refuse_update(1, "north", "not finite", resend=False, manifest=judged.digest)  # its slot is empty by now
    rounds.write_update(manifest("north", object="good"))
    rounds.refuse_update(1, "north", "not finite", resend=False, manifest=judged.digest)
    assert {s: m.object for s, m in rounds.updates(1)[0].items()} == {"north": "good"}


def test_a_manifest_that_can_be_believed_is_not_refused_as_one_that_cannot(rounds: Rounds) -> None:
    rounds.write_update(manifest("north"))
    rounds.refuse_update(1, "north", "its manifest is not the silo's", resend=False)
    assert rounds.update(1, "north") is not None


def test_who_was_refused_is_asked_again(rounds: Rounds) -> None:
    opened = rounds.open_round(plan(silos=("north", "south")))
    rounds.write_update(manifest("north"))
    sent = rounds.write_update(manifest("south"))
    assert rounds.begin_attempt(opened, {}).asked == []
    rounds.refuse_update(1, "south", "not finite", resend=False, manifest=sent.digest)
    assert rounds.begin_attempt(opened, {}).asked == ["south"]


def test_a_manifest_that_cannot_be_believed_stands_in_nobodys_way(tmp_path: Path) -> None:
    rounds = Rounds(DirectoryStore(tmp_path), "fed")
    rounds.write_update(manifest("north"))
    rounds.write_update(manifest("south"))
    alter(rounds, "fed/rounds/00001/updates/south.json", b"{}")
    manifests, disbelieved = rounds.updates(1)
    assert list(manifests) == ["north"]
    assert list(disbelieved) == ["south"]
    assert "rounds/00001/updates/south.json: not a valid UpdateManifest" in disbelieved["south"]
    rounds.refuse_update(1, "south", "its manifest is not the silo's", resend=False)
    rounds.write_update(manifest("south", object="again"))
    assert {s: m.object for s, m in rounds.updates(1)[0].items()} == {"north": "o", "south": "again"}


def test_reports_are_kept_by_attempt(rounds: Rounds) -> None:
    rounds.write_report(Report(round=1, attempt=1, silo="north", status="failed", reason="disk full"))
    rounds.write_report(Report(round=1, attempt=2, silo="north", status="ok", numbers={"loss": 1.5}))
    assert rounds.reports(1, 1)["north"].text == "failed: disk full"
    assert rounds.reports(1, 2)["north"].text == "ok"


def test_a_report_holds_allowed_scalars_only(rounds: Rounds) -> None:
    with pytest.raises(RefusedError, match=r"may not hold diagnosis.*allowed: .*loss"):
        rounds.write_report(Report(round=1, attempt=1, silo="north", status="ok", numbers={"diagnosis": 1.0}))


def test_objects_are_named_by_their_bytes(rounds: Rounds, tmp_path: Path) -> None:
    source = tmp_path / "x"
    source.write_bytes(b"tensors")
    digest = rounds.put_object(source)
    assert digest == hashlib.sha256(b"tensors").hexdigest()
    assert rounds.fetch_object(digest, tmp_path / "y").read_bytes() == b"tensors"
    assert rounds.object_size(digest) == 7
    with pytest.raises(ObjectMissing):
        rounds.fetch_object("0" * 64, tmp_path / "z")


def test_an_altered_object_is_refused(tmp_path: Path) -> None:
    rounds = Rounds(DirectoryStore(tmp_path / "store"), "fed")
    source = tmp_path / "x"
    source.write_bytes(b"tensors")
    digest = rounds.put_object(source)
    (tmp_path / "store" / "fed" / "objects" / digest).write_bytes(b"tensorz")
    with pytest.raises(CorruptObject, match=rf"'fed/objects/{digest}'.*damaged in the store: `silotune verify --repair`") as caught:
        rounds.fetch_object(digest, tmp_path / "y")
    assert (caught.value.key, caught.value.reason) == (f"fed/objects/{digest}", "object corrupt")
    assert not (tmp_path / "y").exists()


class Noisy(DirectoryStore):
    """Alters a byte of the first files that it hands out."""

    bad = 1
    asked = 0

    def fetch_file(self, key: str, path: Path) -> None:
        super().fetch_file(key, path)
        self.asked += 1
        if self.asked <= self.bad:
            path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_arrives_damaged_is_asked_for_once_more(tmp_path: Path, bad: int) -> None:
    store = Noisy(tmp_path / "store")
    rounds = Rounds(store, "fed")
    store.bad = bad
    (tmp_path / "x").write_bytes(b"tensors")
    digest = rounds.put_object(tmp_path / "x")
    if bad < 2:
        assert rounds.fetch_object(digest, tmp_path / "y").read_bytes() == b"tensors"
    else:
        with pytest.raises(CorruptObject):
            rounds.fetch_object(digest, tmp_path / "y")
    assert store.asked == min(bad + 1, 2)


def test_a_silos_update_files_lie_in_its_own_folder(rounds: Rounds, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"update")
    digest = rounds.put_object(tmp_path / "x", "north")
    assert list(rounds.store.list("fed/")) == [f"fed/contributions/north/{digest}"]
    assert rounds.fetch_object(digest, tmp_path / "y", "north").read_bytes() == b"update"
    assert rounds.object_size(digest, "north") == 6
    for silo in (None, "south"):
        with pytest.raises(ObjectMissing):
            rounds.object_size(digest, silo)
        with pytest.raises(ObjectMissing):
            rounds.fetch_object(digest, tmp_path / "z", silo)


def test_an_altered_record_is_refused_by_name(tmp_path: Path) -> None:
    rounds = Rounds(DirectoryStore(tmp_path), "fed")
    rounds.write_commit(commit(0))
    path = tmp_path / "fed" / "rounds" / "00000" / "commit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    with pytest.raises(RefusedError, match=r"rounds/00000/commit\.json.*surprise"):
        rounds.commit(0)


def test_records_survive_the_store_and_keep_their_digest(rounds: Rounds) -> None:
    written = rounds.open_round(plan())
    read = rounds.plan(1)
    assert read == written
    assert read is not None
    assert read.digest == hashlib.sha256(written.encode()).hexdigest()


def evaluation(silo: str, loss_sum: float | None, tokens: int, **changes: Any) -> Evaluation:
    terms = {
        "round": 1, "outgoing": "g", "silo": silo, "split": "valid", "split_digest": "d" * 64, "examples": 3, "tokens": tokens, "loss_sum": loss_sum,
        "correct": 1, "at": 1.0,
    }  # fmt: skip
    return Evaluation(**(terms | changes))


def test_evaluations_pool_by_tokens(rounds: Rounds) -> None:
    rounds.write_evaluation(evaluation("north", 30.0, 10))
    rounds.write_evaluation(evaluation("south", 10.0, 30))
    rounds.write_evaluation(evaluation("south", 1.0, 1, split="test"))
    found = pooled(rounds.evaluations("g", "valid"))
    assert found["loss"] == pytest.approx(40 / 40)
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["token_accuracy"] == pytest.approx(2 / 40)


def test_a_loss_that_is_not_finite_is_infinite_and_survives_the_store(rounds: Rounds) -> None:
    rounds.write_evaluation(evaluation("north", None, 10))
    rounds.write_evaluation(evaluation("south", 10.0, 30))
    found = rounds.evaluations("g", "valid")
    assert (found["north"].loss, found["south"].loss) == (math.inf, pytest.approx(1 / 3))
    assert pooled(found) == {"loss": math.inf, "perplexity": math.inf, "token_accuracy": pytest.approx(2 / 40)}
    assert pooled({"south": found["south"]})["loss"] == pytest.approx(1 / 3)
    assert pooled({}) == {}


def test_an_evaluation_that_cannot_be_believed_is_passed_over_and_named(tmp_path: Path) -> None:
    rounds = Rounds(DirectoryStore(tmp_path), "fed")
    rounds.write_evaluation(evaluation("north", 30.0, 10))
    rounds.write_evaluation(evaluation("south", 10.0, 30))
    key = f"fed/evaluations/g/south/valid-{'d' * 16}.json"
    alter(rounds, key, evaluation("south", 0.0, 30).encode().replace(b'"tokens":30', b'"tokens":0'))
    assert list(rounds.evaluations("g", "valid")) == ["north"]
    assert list(rounds.refused) == [key]


def test_a_changed_split_is_evaluated_anew_and_the_newest_counts(rounds: Rounds) -> None:
    rounds.write_evaluation(evaluation("north", 30.0, 10, at=1.0))
    rounds.write_evaluation(evaluation("north", 20.0, 10, at=2.0, split_digest="e" * 64))
    assert rounds.evaluations("g", "valid")["north"].loss_sum == 20.0
    known = rounds.evaluation("g", "north", "valid", "d" * 64)
    assert known is not None
    assert known.loss_sum == 30.0


def test_tensor_shapes_are_read_from_the_header(rounds: Rounds, tmp_path: Path) -> None:
    from silotune.components.learning.tensor_file import write_tensor_file

    write_tensor_file(tmp_path / "g", {"a": (2, 3), "b": (4,)}, "F32", [("a", bytes(24)), ("b", bytes(16))], {"format": "pt"})
    assert rounds.tensor_shapes(rounds.put_object(tmp_path / "g")) == {"a": [2, 3], "b": [4]}


@pytest.mark.parametrize("turn", [Turn(3, 2), Turn(done="converged at round 7")])
def test_a_turn_survives_as_text(turn: Turn) -> None:
    assert Turn.parse(turn.text) == turn


@pytest.mark.parametrize("text", ["", "round:1", "round:x attempt:1", "round:1 attempt:1; rm"])
def test_what_is_no_turn_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="turn must read"):
        Turn.parse(text)


# Outcomes


@pytest.mark.parametrize(
    ("outcome", "counts", "made_global"),
    [
        ("initialized", False, True),
        ("aggregated", True, True),
        ("skipped", True, False),
        ("rolled-back", True, False),
        ("amended", False, False),
    ],
)
def test_what_an_outcome_means(rounds: Rounds, outcome: str, counts: bool, made_global: bool) -> None:
    back_to = 0 if outcome == "rolled-back" else None
    written = rounds.write_commit(commit(3, outcome=outcome, custody="local", back_to=back_to, guards={"weight": 1.0}, best=2))
    assert (written.counts, written.made_global) == (counts, made_global)
    assert rounds.commit(3) == written
    assert rounds.commit(3).digest == written.digest


def test_there_is_no_other_outcome() -> None:
    known = get_args(Commit.model_fields["outcome"].annotation)
    assert sorted(known) == ["aggregated", "amended", "initialized", "rolled-back", "skipped"]
    with pytest.raises(RefusedError, match=r"commit\.json: not a valid Commit record: outcome"):
        Commit.decode(commit(1).encode().replace(b'"aggregated"', b'"forgotten"'), "fed/rounds/00001/commit.json")


@pytest.mark.parametrize("outcome", ["skipped", "amended"])
def test_a_round_without_a_result_leaves_the_global_as_it_was(federation: Federation, outcome: Any) -> None:
    before = commit(4, best=2, server_state={"optimizer": "s"})
    agreement = federation.agreement("b", "t")
    opened = plan(5, learning_rate=0.25)
    closed = opening.without_result(outcome, federation, before, opened, agreement, 3, {"south": "late: 1 of 4 steps"})
    assert (closed.round, closed.outcome, closed.attempt) == (5, outcome, 3)
    assert closed.outgoing == closed.incoming == before.outgoing
    assert (closed.previous, closed.plan, closed.agreement) == (before.digest, opened.digest, agreement.digest)
    assert (closed.best, closed.server_state, closed.learning_rate, closed.custody) == (2, {"optimizer": "s"}, 0.25, "local")
    assert (closed.contributions, closed.missing, closed.converged) == ({}, {"south": "late: 1 of 4 steps"}, False)


# Signatures


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Four silos, keys on this machine, half of the examples and two silos for a quorum."""
    return federation_of(tmp_path, {"count": 2, "weight": 0.5})


def federation_of(folder: Path, quorum: Any, **rounds: Any) -> Federation:
    silos: list[dict[str, Any]] = [
        {"id": s, "train": "x", "storage": str(folder / "private" / s)} for s in ("east", "north", "south", "west")
    ]
    silos[3]["training"] = {"steps": 6}
    raw = {
        "name": "fed", "model": {"base": "b"}, "silos": silos, "rounds": {"quorum": quorum, **rounds},
        "training": {"steps": 2, "batch_size": 3, "round_schedule": "linear", "learning_rate": 0.5}, "storage": {"root": str(folder / "store")},
    }  # fmt: skip
    found = Federation.model_validate(raw)
    found._file = folder / "federation.yaml"
    return found


@pytest.fixture
def signed(federation: Federation) -> Rounds:
    keys.ensure(federation)
    return Rounds.of(federation)


def test_records_are_signed_by_whom_they_are_of(signed: Rounds, federation: Federation) -> None:
    signed.write_commit(commit(0))
    signed.open_round(plan())
    signed.write_update(manifest("north"))
    fresh = Rounds.of(federation)
    assert fresh.commit(0).signature
    assert fresh.plan(1)
    manifests, disbelieved = fresh.updates(1)
    assert (list(manifests), disbelieved) == (["north"], {})
    assert manifests["north"].signer == ("north", 1)


@pytest.mark.parametrize("forgery", ["altered", "unsigned", "of another silo", "of another round", "in another silo's place"])
def test_a_forged_update_is_not_believed(signed: Rounds, federation: Federation, forgery: str) -> None:
    good = signed.write_update(manifest("north"))
    place = "fed/rounds/00001/updates/north.json"
    keyring = Keyring(federation)
    if forgery == "altered":
        forged = good.model_copy(update={"examples": 1000})
    elif forgery == "unsigned":
        forged = good.model_copy(update={"signature": None})
    elif forgery == "of another silo":
        forged = good.model_copy(update={"signature": keyring.sign("south", 1, good.message(place))})
    elif forgery == "of another round":
        forged = signed.write_update(manifest("north", round=2))
    else:
        forged, place = good, "fed/rounds/00001/updates/south.json"
    alter(signed, place, forged.encode())
    manifests, disbelieved = signed.updates(1)
    silo = "south" if forgery == "in another silo's place" else "north"
    assert silo not in manifests
    rule = "must be of the silo that it is filed under, is of 'north'" if silo == "south" else "must be signed by north"
    assert f"{place}: {rule}" in disbelieved[silo]
    assert ("has no signature" in disbelieved[silo]) == (forgery == "unsigned")


def test_a_commit_that_the_coordinator_did_not_sign_is_refused(signed: Rounds, federation: Federation) -> None:
    signed.write_commit(commit(0))
    place = "fed/rounds/00000/commit.json"
    by_north = Keyring(federation).sign("north", 0, commit(0).message(place))
    alter(signed, place, commit(0, signature=by_north).encode())
    with pytest.raises(RefusedError, match=r"commit\.json: must be signed by coordinator") as caught:
        Rounds.of(federation).latest()
    assert caught.value.reason == "bad signature"


# Look-ups


@pytest.mark.parametrize("last", [*range(18), 63, 64, 65, 1000])
def test_the_highest_number_is_found_in_few_look_ups(last: int) -> None:
    asked: list[int] = []
    found = highest(lambda n: (asked.append(n), 1 <= n <= last)[1])
    assert found == last
    assert len(asked) <= 2 * last.bit_length() + 1
    assert min(asked) >= 1


# Quorum


def test_enough_silos_and_examples_make_a_round(federation: Federation) -> None:
    opening.require_quorum(federation, "round 1", ["north", "west"], {"south": "failed: disk full"}, share=0.5)


@pytest.mark.parametrize(
    ("present", "share", "rule"),
    [
        (["north"], 1.0, "2 of 4 silos must deliver, 1 did:"),
        ([], 0.0, "2 of 4 silos must deliver, 0 did:"),
        (["east", "north"], 0.25, "50% of the examples asked for must be trained on, 25% were:"),
        (["east", "north", "south"], 0.4999, "50.00% of the examples asked for must be trained on, 49.99% were:"),
    ],
)
def test_below_quorum_the_table_says_who_is_missing_and_why(federation: Federation, present: list[str], share: float, rule: str) -> None:
    missing = {"west": "late: 2 of 6 steps", "south": "failed: disk full"}
    with pytest.raises(QuorumError) as caught:
        opening.require_quorum(federation, "round 7 stays open", present, missing, share)
    assert str(caught.value).splitlines() == [
        f"round 7 stays open, {rule}",
        "  south                failed: disk full",
        "  west                 late: 2 of 6 steps",
        "run again to ask the missing silos only; what the others delivered is kept",
    ]


def test_where_nobody_is_missing_the_cure_is_another_one(federation: Federation) -> None:
    """A deadline has cut all of them short: none would be asked again."""
    with pytest.raises(QuorumError, match=r"25% were:\nlower rounds\.quorum\.weight, or .*rounds\.deadline"):
        opening.require_quorum(federation, "round 1", ["east", "north", "south", "west"], {}, 0.25)


@pytest.mark.parametrize(
    ("whys", "kind", "code"),
    [
        (["failed: crashed", "late: 1 of 4 steps"], QuorumError, 3),
        (["failed: data or settings are wrong", "failed: data or settings are wrong"], FederationError, 2),
        (["failed: store unreachable or full", "failed: disk full"], UnreachableError, 5),
        (["failed: data or settings are wrong", "failed: store unreachable or full"], QuorumError, 3),
        (["failed: store unreachable or full", "failed: crashed"], QuorumError, 3),
        ([], QuorumError, 3),
    ],
)
def test_the_exit_code_says_whether_to_try_again(federation: Federation, whys: list[str], kind: type[SilotuneError], code: int) -> None:
    with pytest.raises(SilotuneError) as caught:
        opening.require_quorum(federation, "round 1", ["north"], dict(zip(("east", "south"), whys, strict=False)))
    assert type(caught.value) is kind
    assert caught.value.exit_code == code


def test_the_share_trained_is_of_what_was_asked_of_everyone(federation: Federation) -> None:
    asked = plan(silos=("east", "north", "south", "west"))
    agreement = federation.agreement("b", "t")
    # 2 steps of 3 from three silos, 6 steps of 3 from west: 36
    assert opening.share_trained(asked, agreement, {"north": 6}) == pytest.approx(6 / 36)
    assert opening.share_trained(asked, agreement, {"west": 18}) == pytest.approx(0.5)
    assert opening.share_trained(asked, agreement, {"east": 6, "north": 6, "south": 6, "west": 18}) == 1.0
    assert opening.share_trained(asked, agreement, {}) == 0.0
    assert opening.share_trained(plan(silos=("north",)), agreement, {"north": 6}) == 1.0, "who is not in the plan was not asked"


# The next round


def test_data_streams_go_on_where_committed_rounds_left_them(rounds: Rounds) -> None:
    def part(cursor: int) -> Contribution:
        return Contribution(manifest="m", object="o", bytes=1, weight=1.0, examples=4, tokens=9, steps=2, cursor=cursor, norm=0.5)

    assert opening.cursors_after(rounds) == {}
    rounds.write_commit(commit(0, contributions={}))
    rounds.write_commit(commit(1, contributions={"north": part(4), "south": part(6)}))
    rounds.write_commit(commit(2, outcome="skipped", contributions={}))
    rounds.write_commit(commit(3, contributions={"north": part(8)}))
    rounds.write_commit(commit(4, outcome="rolled-back", contributions={}, back_to=1))
    rounds.write_commit(commit(5, outcome="amended", contributions={}))
    assert opening.cursors_after(rounds) == {"north": 8, "south": 6}, "also those of the global of round 3, which was left behind"


def begun(federation: Federation, folder: Path) -> tuple[Rounds, Commit, Agreement]:
    """Round 0 of a global of one tensor."""
    from silotune.components.learning.tensor_file import write_tensor_file

    keys.ensure(federation)
    rounds = Rounds.of(federation)
    agreement = federation.agreement("b", "t")
    rounds.put_agreement(agreement)
    write_tensor_file(folder / "g", {"a": (2, 3)}, "F32", [("a", bytes(24))], {"format": "pt"})
    outgoing = rounds.put_object(folder / "g")
    return rounds, rounds.write_commit(commit(0, contributions={}, outgoing=outgoing, agreement=agreement.digest)), agreement


def test_skipped_and_rolled_back_rounds_count_and_amended_ones_do_not(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, 1, total=3)
    rounds, latest, agreement = begun(federation, tmp_path)
    rates = []
    for number, outcome in enumerate(("aggregated", "amended", "skipped", "rolled-back"), 1):
        turn = opening.open_next(federation, rounds, latest, agreement, {})
        assert (turn.round, turn.attempt, turn.done) == (number, 1, "")
        opened = rounds.plan(number)
        assert opened is not None
        rates.append(opened.learning_rate)
        latest = rounds.write_commit(commit(number, outcome=outcome, outgoing=latest.outgoing, agreement=agreement.digest))
    assert opening.open_next(federation, rounds, latest, agreement, {}) == Turn(done="all 3 rounds are committed")
    assert rates == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 * 2 / 3, 0.5 / 3]), "the rate follows the rounds that count"


def test_an_open_round_on_other_terms_is_closed_first(tmp_path: Path) -> None:
    before = federation_of(tmp_path, 1)
    rounds, latest, agreement = begun(before, tmp_path)
    opening.open_next(before, rounds, latest, agreement, {})
    after = before.model_copy(update={"training": before.training.model_copy(update={"steps": 9})})
    amended = after.agreement("b", "t")
    rounds.put_agreement(amended)
    assert opening.open_next(after, rounds, latest, amended, {"south": "failed: crashed"}) == Turn(2, 1)
    closed, opened = rounds.commit(1), rounds.plan(2)
    assert (closed.outcome, closed.outgoing, closed.agreement) == ("amended", latest.outgoing, amended.digest)
    assert opened is not None
    assert (opened.agreement, opened.incoming) == (amended.digest, latest.outgoing)
    assert rounds.attempt(2, 1).missing == {"south": "failed: crashed"}


def test_a_converged_federation_goes_on_only_without_the_rule_that_stopped_it(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, 1, until={})
    rounds, latest, agreement = begun(federation, tmp_path)
    latest = rounds.write_commit(commit(1, converged=True, outgoing=latest.outgoing, agreement=agreement.digest))
    assert opening.open_next(federation, rounds, latest, agreement, {}) == Turn(done="converged at round 1")
    assert opening.open_next(federation_of(tmp_path, 1), rounds, latest, agreement, {}) == Turn(2, 1)


# Which global is best, and when to stop


def scored(split: str = "d", accuracy: float = 0.0, **losses: float | None) -> dict[str, Evaluation]:
    """Scores by silo over 10 tokens each; None is a loss that is not finite."""
    return {
        silo: evaluation(silo, None if loss is None else 10 * loss, 10, split_digest=split * 64, correct=round(10 * accuracy))
        for silo, loss in losses.items()
    }


def course(*globals_: dict[str, Evaluation]) -> list[best_global.Judged]:
    return list(enumerate(globals_))


def test_globals_are_compared_over_the_silos_that_scored_both() -> None:
    a, b = scored(north=1.0, south=3.0), scored(north=0.5, west=9.0)
    assert best_global.compare(a, b, "loss") == (pytest.approx(1.0), pytest.approx(0.5))
    assert best_global.compare(a, scored(west=9.0), "loss") is None
    assert best_global.compare(a, scored("e", north=0.5), "loss") is None, "another split is another measure"
    assert best_global.compare(a, scored("e", north=0.5) | scored(south=2.0), "loss") == (pytest.approx(3.0), pytest.approx(2.0))
    more = {"north": evaluation("north", 30.0, 30), "south": evaluation("south", 30.0, 10)}
    assert best_global.compare(more, more, "loss") == (pytest.approx(1.5), pytest.approx(1.5)), "pooled by tokens"


def test_a_silo_with_hard_data_that_joins_does_not_make_the_global_worse() -> None:
    scores = course(scored(north=1.0, south=1.0), scored(north=0.9, south=0.9, west=6.0), scored(north=0.8, south=0.8, west=5.9))
    assert pooled(scores[1][1])["loss"] > pooled(scores[0][1])["loss"], "pooled over all, it looks worse"
    assert best_global.best_of(scores) == 2
    assert not best_global.has_converged(scores, Until(patience=1))


def test_a_silo_with_easy_data_that_is_absent_does_not_either() -> None:
    scores = course(scored(north=1.0, south=0.1), scored(north=0.9))
    assert best_global.best_of(scores) == 1
    assert not best_global.has_converged(scores, Until(patience=1))


def test_a_silo_with_easy_data_that_joins_does_not_make_a_worse_global_better() -> None:
    scores = course(scored(north=1.0), scored(north=1.1, south=0.1))
    assert best_global.best_of(scores) == 0
    assert best_global.has_converged(scores, Until(patience=1))


def test_globals_that_no_silo_can_compare_are_neither_better_nor_stale() -> None:
    scores = course(scored(north=1.0), scored(south=0.1), scored(south=0.1))
    assert best_global.best_of(scores) == 0
    assert not best_global.has_converged(scores, Until(patience=1))


def test_where_records_have_changed_a_global_that_was_scored_on_both_joins_old_and_new() -> None:
    """north's records grow after round 2, which is 0.2 above round 1 on the old ones; round 1 is never scored on the new ones."""
    old = [(0, scored(north=3.0)), (1, scored(north=2.0)), (2, scored(north=2.2)), (2, scored("e", north=5.2))]
    assert best_global.best_of([*old, (3, scored("e", north=5.1))]) == 1, "0.1 below round 2 is 0.1 above round 1"
    assert best_global.best_of([*old, (3, scored("e", north=4.9))]) == 3
    assert best_global.best_of([*old, (3, scored("e", north=4.9)), (4, scored("e", north=4.95))]) == 3
    assert best_global.has_converged([*old, (3, scored("e", north=5.1))], Until(patience=2))
    assert not best_global.has_converged([*old, (3, scored("e", north=4.9))], Until(patience=1))


def test_where_nothing_joins_old_and_new_records_the_best_is_sought_anew() -> None:
    """Else the best round would stay for ever the last one before any silo's records grew."""
    scores = course(scored(north=1.0), scored("e", north=2.0), scored("e", north=1.9), scored("e", north=2.1))
    assert best_global.best_of(scores) == 2
    assert best_global.has_converged(scores, Until(patience=1))
    assert best_global.best_of(course(scored(north=1.0, south=1.0), scored("e", north=0.1))) == 0, "south may come back"


def test_a_global_that_was_scored_before_and_after_a_change_is_judged_by_both(rounds: Rounds) -> None:
    for number in range(3):
        rounds.write_commit(commit(number, outgoing=f"g{number}"))
    for at, (number, split, loss) in enumerate([(0, "d", 30.0), (1, "d", 20.0), (1, "e", 50.0), (2, "e", 45.0)]):
        rounds.write_evaluation(evaluation("north", loss, 10, outgoing=f"g{number}", split_digest=split * 64, round=number, at=at))
    assert [(n, e["north"].loss) for n, e in best_global.judged(rounds)] == [(0, 3.0), (1, 2.0), (1, 5.0), (2, 4.5)]
    assert best_global.best_round(rounds) == 2


def test_the_best_of_several_is_the_lowest_and_the_earliest() -> None:
    assert best_global.best_of([]) is None
    assert best_global.best_of(course(scored(north=2.0), scored(north=1.0), scored(north=1.5), scored(north=1.0))) == 1
    assert best_global.best_of([(4, scored(north=2.0)), (9, scored(north=1.0))]) == 9, "by round, not by place"


def test_a_global_without_a_finite_loss_is_never_better() -> None:
    assert best_global.best_of(course(scored(north=2.0), scored(north=None))) == 0
    assert best_global.best_of(course(scored(north=None), scored(north=2.0))) == 1
    assert best_global.best_of(course(scored(north=2.0, south=2.0), scored(north=None, south=0.1))) == 0
    assert best_global.has_converged(course(scored(north=2.0), scored(north=None)), Until(patience=1))
    assert not best_global.has_converged(course(scored(north=None), scored(north=2.0)), Until(patience=1))
    assert best_global.has_converged(course(scored(north=None), scored(north=None)), Until(patience=1, metric="perplexity"))


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "converged"),
    [
        ([], 1, 0.0, False),
        ([2.0], 1, 0.0, False),
        ([2.0, 2.0], 1, 0.0, True),
        ([2.0, 2.0], 2, 0.0, False),
        ([2.0, 1.0, 1.5, 1.2], 2, 0.0, True),
        ([2.0, 1.0, 1.5, 0.9], 2, 0.0, False),
        ([2.0, 1.95, 1.91], 2, 0.1, True),
        ([2.0, 1.95, 1.89], 2, 0.1, False),  # slow, but below the best by now
    ],
)
def test_convergence_waits_for_patience(losses: list[float], patience: int, min_delta: float, converged: bool) -> None:
    scores = course(*(scored(north=loss) for loss in losses))
    assert best_global.has_converged(scores, Until(patience=patience, min_delta=min_delta)) == converged


@pytest.mark.parametrize(("second", "converged"), [(0.6, False), (0.5, True), (0.4, True)])
def test_accuracy_is_better_when_higher(second: float, converged: bool) -> None:
    scores = course(scored(accuracy=0.5, north=1.0), scored(accuracy=second, north=1.0))
    assert best_global.has_converged(scores, Until(metric="token_accuracy", patience=1)) == converged


def test_only_globals_that_rounds_made_are_judged(rounds: Rounds) -> None:
    rounds.write_commit(commit(0, outgoing="g"))
    rounds.write_commit(commit(1, outgoing="better"))
    rounds.write_commit(commit(2, outcome="skipped", outgoing="better"))
    rounds.write_commit(commit(3, outgoing="unscored"))
    assert best_global.best_round(rounds) == 3, "the last one where none has been scored"
    rounds.write_evaluation(evaluation("north", 30.0, 10))
    rounds.write_evaluation(evaluation("north", 20.0, 10, outgoing="better"))
    rounds.write_evaluation(evaluation("north", 1.0, 10, outgoing="better", split="test"))
    assert [(number, found["north"].loss) for number, found in best_global.judged(rounds)] == [(0, 3.0), (1, 2.0)]
    assert best_global.best_round(rounds) == 1
