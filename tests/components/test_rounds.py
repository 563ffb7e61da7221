"""The protocol, on both kinds of store: first writer wins, a round is what is committed, and nothing altered is believed."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from silotune.components.errors import RefusedError
from silotune.components.object_store import DirectoryStore, ObjectMissing, ObjectStore
from silotune.components.rounds import Commit, Contribution, Evaluation, Participant, Plan, Report, Rounds, Turn, UpdateManifest, pooled


@pytest.fixture
def rounds(store: ObjectStore) -> Rounds:
    return Rounds(store, "fed")


def commit(number: int, **changes: Any) -> Commit:
    part = Contribution(manifest="m", object="o", bytes=10, weight=1.0, examples=4, tokens=9, steps=2, cursor=4 * number, norm=0.5)
    terms = {
        "round": number, "outcome": "aggregated" if number else "initialized", "agreement": "a", "plan": "p", "attempt": 1,
        "contributions": {"north": part}, "missing": {}, "previous": "c", "incoming": "g", "outgoing": f"global-{number}", "started": 1.0,
        "at": 2.0,
    }  # fmt: skip
    return Commit(**(terms | changes))


def plan(number: int = 1, silos: tuple[str, ...] = ("north", "south"), **changes: Any) -> Plan:
    terms = {
        "round": number, "agreement": "a", "base": "b", "incoming": "g", "accepted": [(number, "g")], "learning_rate": 0.1, "code": "1",
        "participants": {s: Participant(tensors="t", cursor=0) for s in silos},
    }  # fmt: skip
    return Plan(**(terms | changes))


def manifest(silo: str, **changes: Any) -> UpdateManifest:
    terms = {
        "round": 1, "silo": silo, "agreement": "a", "plan": "p", "incoming": "g", "object": "o", "bytes": 10, "examples": 4, "tokens": 9,
        "steps": 2, "cursor": 4, "codec": "float32", "norm": 0.5, "loss": 1.0,
    }  # fmt: skip
    return UpdateManifest(**(terms | changes))


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
    assert {s: m.object for s, m in rounds.updates(1).items()} == {"north": "first"}
    assert rounds.update(1, "south") is None


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
    with pytest.raises(RefusedError, match="corrupt"):
        rounds.fetch_object(digest, tmp_path / "y")
    assert not (tmp_path / "y").exists()


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


def evaluation(silo: str, loss_sum: float, tokens: int, **changes: Any) -> Evaluation:
    terms = {
        "outgoing": "g", "silo": silo, "split": "valid", "split_digest": "d" * 64, "examples": 3, "tokens": tokens, "loss_sum": loss_sum,
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
