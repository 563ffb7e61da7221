"""Status is read from the store alone: these stores are written by hand."""

import io
import json

import pytest
from rich.console import Console

from silotune.components.protocol import Evaluation, Report, UpdateManifest
from silotune.components.terms.rounds import Quorum
from silotune.pipelines import status as stand


def course(federation, rounds):
    return stand.status(federation, rounds).as_json()


def shown(*tables):
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def manifest(plan, silo):
    return UpdateManifest(round=plan.round, silo=silo, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming, object="o", header="h", bytes=42,
                          examples=1, tokens=1, steps=1, cursor=1, codec="float32", norm=0.0, loss=1.0)  # fmt: skip


def test_nothing_yet(federation, rounds):
    assert course(federation, rounds) == {"federation": "hand", "digest": None, "rounds": [], "export": None}


def test_json_is_exactly_what_is_promised(federation, rounds, two_rounds):
    found = course(federation, rounds)
    assert found["digest"] == two_rounds.agreement.digest
    assert found["export"] == "/models/2"
    assert found["rounds"][2] == {
        "round": 2,
        "committed": True,
        "participants": ["north", "south"],
        "missing": {"west": "failed: disk full"},
        # (30 tokens x 3.0 + 10 x 4.0) / 40 by hand
        "global": {"loss": pytest.approx(3.25), "perplexity": pytest.approx(25.7903399), "sha256": f"{2:064d}"},
        "bytes": {"up": 200, "down": 70},
    }
    assert found["rounds"][0]["participants"] == []
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_loss_counts_from_the_quorum_on(federation, rounds, hand):
    hand.commit(0)
    assert course(federation, rounds)["rounds"][0]["global"]["loss"] is None
    hand.evaluate(0, {"north": 5.0})
    assert course(federation, rounds)["rounds"][0]["global"]["loss"] is None
    hand.evaluate(0, {"north": 5.0, "south": 9.0})
    assert course(federation, rounds)["rounds"][0]["global"]["loss"] == pytest.approx(6.0)


def test_a_quorum_by_weight_alone_is_one_silo(federation, rounds, hand):
    quorum = Quorum(weight=0.9)
    relaxed = federation.model_copy(update={"rounds": federation.rounds.model_copy(update={"quorum": quorum})})
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0})
    assert course(relaxed, rounds)["rounds"][0]["global"]["loss"] == pytest.approx(5.0)


def test_a_loss_counts_once_the_next_round_is_committed(federation, rounds, hand):
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0})
    hand.commit(1)
    assert course(federation, rounds)["rounds"][0]["global"]["loss"] == pytest.approx(5.0)


def test_infinite_perplexity_is_null(federation, rounds, hand):
    hand.commit(0)
    hand.evaluate(0, dict.fromkeys(("north", "south", "west"), 800.0))
    assert course(federation, rounds)["rounds"][0]["global"] == {"loss": 800.0, "perplexity": None, "sha256": "0" * 64}


def test_a_loss_that_is_not_finite_is_null_in_json_and_told_to_people(federation, rounds, hand):
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0, "south": 6.0})
    hand.commit(1)
    for silo, loss in (("north", None), ("south", 60.0)):
        rounds.write_evaluation(
            Evaluation(round=2, outgoing=f"{1:064d}", silo=silo, split="valid", split_digest="d" * 64, examples=2, tokens=10, loss_sum=loss,
                       correct=1, at=1.0)
        )  # fmt: skip
    found = stand.status(federation, rounds)
    assert found.as_json()["rounds"][1]["global"] == {"loss": None, "perplexity": None, "sha256": f"{1:064d}"}
    assert json.loads(json.dumps(found.as_json(), allow_nan=False)) == found.as_json()
    assert "inf (2 silos)" in shown(stand.status_table(found, 3))
    assert stand.chosen(federation, rounds).round == 0


def test_open_round_says_who_is_missing_and_why(federation, rounds, hand):
    hand.commit(0)
    plan = hand.open(1)
    assert set(course(federation, rounds)["rounds"][1]["missing"].values()) == {"not asked yet"}

    attempt = rounds.begin_attempt(plan, {"west": "refused: base model differs"})
    rounds.write_report(Report(round=1, attempt=attempt.attempt, silo="south", status="failed", reason="out of memory"))
    rounds.write_update(manifest(plan, "north"))
    found = course(federation, rounds)["rounds"][1]
    assert (found["committed"], found["participants"]) == (False, ["north"])
    assert found["missing"] == {"south": "failed: out of memory", "west": "refused: base model differs"}
    assert found["global"] == {"loss": None, "perplexity": None, "sha256": None}
    assert found["bytes"] == {"up": 42, "down": len(b'{"w":[2,2]}')}

    rounds.begin_attempt(plan, {})
    assert course(federation, rounds)["rounds"][1]["missing"] == {"south": "no update yet", "west": "no update yet"}


def test_open_round_says_why_an_update_was_refused(federation, rounds, hand):
    hand.commit(0)
    plan = hand.open(1)
    rounds.begin_attempt(plan, {})
    for silo in ("north", "south"):
        sent = rounds.write_update(manifest(plan, silo))
    rounds.refuse_update(1, "south", "tensor 'w' is not finite", resend=False, manifest=sent.digest)
    west = rounds.key("rounds", "00001", "updates", "west.json")
    rounds.store.create(west, manifest(plan, "west").encode())  # without a signature
    found = course(federation, rounds)["rounds"][1]
    assert found["participants"] == ["north"]
    assert found["missing"] == {"south": "refused: tensor 'w' is not finite", "west": "refused: its manifest is not the silo's"}

    rounds.write_update(manifest(plan, "south"))
    assert course(federation, rounds)["rounds"][1]["participants"] == ["north", "south"]


@pytest.mark.parametrize(("outcome", "told"), [("skipped", "too few silos delivered"), ("rolled-back", "is left behind")])
def test_a_round_without_a_global_of_its_own_has_no_loss_and_says_why(federation, rounds, hand, outcome, told):
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0, "south": 6.0, "west": 7.0})
    hand.commit(1, (), outcome=outcome, outgoing="0" * 64, back_to=0, missing={"west": "late: 1 of 4 steps"}, bytes_up=0, bytes_down=0)
    hand.commit(2)
    hand.evaluate(2, {"north": 4.0, "south": 4.0, "west": 4.0})
    found = stand.status(federation, rounds)
    assert [r.as_json()["global"]["loss"] for r in found.rounds] == [pytest.approx(5.6), None, pytest.approx(4.0)]
    assert found.rounds[1].as_json()["global"]["sha256"] == "0" * 64
    assert found.rounds[1].seconds is None
    lines = list(stand.notes(found))
    assert any(line.startswith("round 1: ") and told in line for line in lines)
    assert "round 1: west: late: 1 of 4 steps" in lines
    assert stand.chosen(federation, rounds).round == 2
    assert stand.comparison(federation, rounds).round == 2


def test_amended_round_has_no_loss_of_its_own(federation, rounds, hand):
    hand.commit(0)
    hand.evaluate(0, {"north": 5.0, "south": 6.0, "west": 7.0})
    hand.commit(1, (), outcome="amended", outgoing="0" * 64, missing={}, bytes_up=0)
    found = stand.status(federation, rounds)
    assert found.rounds[1].as_json()["global"]["loss"] is None
    assert any("amended" in line for line in stand.notes(found))


def test_export_is_the_one_the_file_asks_for_now(federation, rounds, two_rounds):
    two_rounds.export(two_rounds.last, "-merged")
    assert course(federation, rounds)["export"] == "/models/2"
    third = two_rounds.commit(3)
    two_rounds.evaluate(3, {"north": 9.0, "south": 9.0, "west": 9.0})
    two_rounds.export(third)  # a later, worse round
    assert course(federation, rounds)["export"] == "/models/2"

    last = federation.model_copy(update={"export": federation.export.model_copy(update={"select": "last"})})
    assert course(last, rounds)["export"] == "/models/3"
    merged = federation.model_copy(update={"export": federation.export.model_copy(update={"merge": True})})
    assert course(merged, rounds)["export"] == "/models/2-merged"


def test_an_export_that_cannot_be_believed_is_not_shown(federation, rounds, two_rounds):
    third = two_rounds.commit(3)
    two_rounds.evaluate(3, {"north": 1.0, "south": 1.0, "west": 1.0})
    key = rounds.key("exports", f"{third.digest}.json")
    forged = stand.export(federation, rounds).model_copy(update={"commit": third.digest, "round": 3, "location": "/elsewhere"})
    rounds.store.create(key, forged.encode())
    assert course(federation, rounds)["export"] == "/models/2"


def test_is_current_turns_false_with_a_better_round(federation, rounds, two_rounds):
    assert stand.is_current(federation, rounds, stand.export(federation, rounds))
    two_rounds.commit(3)
    two_rounds.evaluate(3, {"north": 1.0, "south": 1.0, "west": 1.0})
    assert not stand.is_current(federation, rounds, stand.export(federation, rounds))


def test_comparison_pools_the_silos_that_scored_both(federation, rounds, two_rounds):
    found = stand.comparison(federation, rounds)
    assert (found.split, found.round) == ("valid", 2)
    # base: (30 x 5 + 10 x 6) / 40; west has no score in round 2
    assert found.rows == [("north", 5.0, 3.0), ("south", 6.0, 4.0), ("all", pytest.approx(5.25), pytest.approx(3.25))]


def test_comparison_prefers_test(federation, rounds, two_rounds):
    for number in (0, 2):
        two_rounds.evaluate(number, {"north": 8.0 - number}, split="test")
    found = stand.comparison(federation, rounds)
    assert (found.split, found.rows) == ("test", [("north", 8.0, 6.0), ("all", 8.0, 6.0)])


def test_tables_show_rounds_silos_and_partial_scores(federation, rounds, two_rounds):
    text = shown(stand.status_table(stand.status(federation, rounds), 3), stand.comparison_table(stand.comparison(federation, rounds)))
    for piece in ("2 of 3", "3.2500 (2 silos)", "25.79", "north", "-2.0000"):
        assert piece in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.9, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_duration(seconds, text):
    assert stand.duration(seconds) == text


def test_a_narrow_terminal_loses_columns_and_never_digits(federation, rounds, two_rounds):
    found = stand.status(federation, rounds)
    for width in (120, 80, 60, 50):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(stand.status_table(found, 3, width))
        text = console.export_text()
        assert "…" not in text
        assert f"{found.rounds[-1].loss:.4f}" in text
        assert (" up " in text) == (width >= 80)
