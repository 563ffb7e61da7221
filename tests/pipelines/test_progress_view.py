"""A run is told to the view event by event; nothing runs here."""

import io
import json
import time

import pytest
from rich.console import Console

from silotune.components.process.progress import Heartbeat
from silotune.components.protocol import Evaluation
from silotune.pipelines.progress_view import Course, View, watch

SILOS = ["north", "south"]


class Tape:
    """Plays boxes to a course on a clock of its own."""

    def __init__(self, course):
        self.course, self.now = course, 1000.0

    def box(self, box, silo="", seconds=1.0, **more):
        self.course.take({"at": self.now, "box": box, "what": "started", "silo": silo})
        self.now += seconds
        if silo:
            more = {"status": f"{silo} ok", "detail": "", **more}
        return self.course.take({"at": self.now, "box": box, "what": "ended", "silo": silo, "seconds": seconds, **more})

    def begin(self):
        for silo in SILOS:
            self.box("preprocess", silo)
        return self.box("initialize", output="round:3 attempt:1")


def test_headline_follows_the_turn():
    course = Course(SILOS, 2)
    tape = Tape(course)
    assert course.headline == "getting ready"
    assert "round 3 is open" in tape.begin()
    assert course.headline == "round 3 of 4"
    tape.box("aggregate", output="round:4 attempt:1")
    assert course.headline == "round 4 of 4"
    tape.box("aggregate", output="round:5 attempt:1")
    assert course.headline == "rounds 3 to 4 are committed"
    tape.box("aggregate", output="done:converged at round 5")
    assert course.headline == "converged at round 5"


def test_groups_are_counted_and_leave_the_turn_alone():
    plain, course = Course(SILOS, 2), Course(SILOS, 2, groups=3)
    assert course.boxes == plain.boxes + 6
    tape = Tape(course)
    tape.begin()
    before = course.boxes
    for output in ("group 1 ok: 2 of 2 updates", "group 2 failed: out of memory"):
        tape.box("combine", output=output)
    assert (course.headline, course.boxes) == ("round 3 of 4", before)
    tape.box("aggregate", output="done:converged at round 3")
    assert course.boxes == course.begun + len(SILOS) + 1, "no round is left, so no group"


def test_nothing_is_foretold_before_a_training_gives_the_speed():
    course = Course(SILOS, 2)
    tape = Tape(course)
    tape.begin()
    assert course.remaining(tape.now, None) is None


def test_remaining_counts_every_box_at_its_own_cost():
    course = Course(SILOS, 2)
    tape = Tape(course)
    tape.begin()
    tape.box("train", "north", 10)
    tape.box("train", "south", 30)
    tape.box("aggregate", seconds=2, output="round:4 attempt:1")
    tape.course.take({"at": tape.now, "box": "train", "what": "started", "silo": "north"})
    # this training 10, south's 30, an aggregation (unknown while the first one is the last box: its cost ends when the next begins) 2,
    # two evaluations at the mean of the trainings 20 each, an export of unknown cost 0
    assert course.remaining(tape.now, None) == pytest.approx(10 + 30 + 2 + 40)
    assert course.remaining(tape.now + 4, None) == pytest.approx(6 + 30 + 2 + 40)


def test_remaining_within_a_training_follows_its_steps():
    course = Course(["north"], 1)
    course.take({"at": 100.0, "box": "train", "what": "started", "silo": "north"})
    beat = Heartbeat("train", 1, 5, 20, 3.0, 110.0)
    # 10 s for a quarter: 30 s more; north's evaluation as long as a training; preprocess unknown
    assert course.remaining(110.0, beat) == pytest.approx(30 + 40)


def test_convergence_takes_the_rest_of_the_rounds_off():
    course = Course(SILOS, 9)
    tape = Tape(course)
    tape.begin()
    before = course.boxes
    tape.box("aggregate", output="done:converged at round 3")
    assert course.boxes == before - 9 * 2 - 8


def test_troubles_are_kept_once_with_their_detail():
    course = Course(SILOS, 1)
    tape = Tape(course)
    line = tape.box("train", "south", status="south failed: out of memory", detail="use a smaller batch")
    assert line == "warning: south: train failed: use a smaller batch"
    tape.box("train", "south", status="south failed: out of memory", detail="use a smaller batch")
    course.take({"at": 1.0, "box": "aggregate", "what": "warned", "silo": "", "detail": "not in MLflow yet"})
    assert course.troubles == {"south": ["train failed: use a smaller batch"], "": ["not in MLflow yet"]}


def test_what_follows_from_records_that_are_not_ready_is_no_news():
    course = Course(SILOS, 1)
    tape = Tape(course)
    said = "silo 'south': train: r.csv: holds no record"
    assert tape.box("preprocess", "south", status="south failed: data or settings are wrong", detail=said).startswith("warning: ")
    assert (
        tape.box("train", "south", status="south refused: not ready", detail="was not ready when this attempt began")
        == "train south  not ready"
    )
    assert course.take(event("evaluate", "warned", "south", detail="has not been evaluated: failed")) == ""
    assert course.troubles == {"south": [f"preprocess failed: {said}"]}


def test_it_is_told_once_why_no_round_follows():
    course = Course(["north"], 3)
    lines = [
        course.take({"seconds": 1.0, **event("aggregate", "ended", output=turn)})
        for turn in ("round:2 attempt:1", "done:spent", "done:spent")
    ]
    assert [line.partition("; ")[2] for line in lines] == ["", "spent", ""]


def test_a_silo_is_named_also_where_its_id_is_part_of_a_word():
    course = Course(["d", "north-2"], 1)
    assert course.take(event("aggregate", "warned", "d", detail="round 1: left out")) == "warning: d: round 1: left out"
    assert course.take(event("aggregate", "warned", "d", detail="silo 'd' is left out")) == "warning: silo 'd' is left out"


def event(box, what, silo="", **more):
    return {"at": 5.0, "box": box, "what": what, "silo": silo, **more}


def ended(box, output):
    return event(box, "ended", seconds=1.0, output=output)


def test_rounds_are_told_when_committed_and_losses_when_complete(federation, rounds, hand):
    view = View(federation, rounds, 1)
    hand.commit(0)
    assert view.take(ended("initialize", "round:1 attempt:1")) == ["initialize  1 s; round 1 is open"]
    hand.evaluate(0, {"north": 5.0, "south": 6.0, "west": 7.0})
    hand.commit(1, ("north", "south"))
    lines = view.take(ended("aggregate", "round:2 attempt:1"))
    assert lines[1:] == ["round 1 committed, 2 of 3 silos; missing: west (failed: disk full)", "round 0 loss 5.6000, perplexity 270.43"]
    hand.evaluate(1, {"north": 4.0, "south": 4.0, "west": 4.0})
    assert view.take(event("export", "started")) == ["round 1 loss 4.0000, perplexity 54.60"]


@pytest.mark.parametrize(("outcome", "told"), [("skipped", "skipped"), ("rolled-back", "rolled back"), ("amended", "terms amended")])
def test_a_round_without_a_global_of_its_own_is_named_and_has_no_loss(federation, rounds, hand, outcome, told):
    view = View(federation, rounds, 2)
    hand.commit(0)
    view.take(ended("initialize", "round:1 attempt:1"))
    hand.evaluate(0, {"north": 5.0, "south": 6.0, "west": 7.0})
    hand.commit(1, (), outcome=outcome, outgoing="0" * 64, missing={})
    lines = view.take(ended("aggregate", "round:2 attempt:1"))
    assert lines[1:] == ["round 0 loss 5.6000, perplexity 270.43"], "its own warning has told of it"
    row = next(line for line in draw(view).splitlines() if told in line)
    assert row.split()[1:4] == ["1", "…", told.split()[0]]


def test_a_loss_that_is_not_finite_is_told_as_such(federation, rounds, hand):
    view = View(federation, rounds, 1)
    hand.commit(0)
    view.take(ended("initialize", "round:1 attempt:1"))
    hand.commit(1)
    for silo in ("north", "south", "west"):
        rounds.write_evaluation(
            Evaluation(round=2, outgoing=f"{1:064d}", silo=silo, split="valid", split_digest="d" * 64, examples=2, tokens=10, loss_sum=None,
                       correct=1, at=1.0)
        )  # fmt: skip
    view.take(ended("aggregate", "round:2 attempt:1"))
    assert view.take(event("export", "started")) == []
    assert view.done[1].evaluated
    assert "inf" in draw(view)


def test_a_resumed_run_does_not_tell_old_rounds_again(federation, rounds, two_rounds):
    view = View(federation, rounds, 1)
    lines = view.take(ended("initialize", "round:3 attempt:1"))
    assert not any("committed" in line for line in lines)
    assert list(view.done) == [2]


def draw(view):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(view.draw())
    return console.export_text()


def test_panel_shows_round_silo_step_loss_and_finished_rounds(federation, rounds, two_rounds):
    home = federation.file.parent / ".silotune-private" / "north" / "hand"
    home.mkdir(parents=True)
    view = View(federation, rounds, 1)
    view.take(ended("initialize", "round:3 attempt:1"))
    view.take({**event("train", "started", "north"), "at": time.time() - 10})
    (home / "heartbeat.json").write_text(json.dumps(vars(Heartbeat("train", 3, 2, 8, 1.2345, time.time()))))
    text = draw(view)
    for piece in ("hand round 3 of 3", "train north", "step 2/8", "loss 1.2345", "3.2500", "2 of 3 silos", "to go"):
        assert piece in text


def test_a_heartbeat_from_an_earlier_box_is_not_shown(federation, rounds, two_rounds):
    home = federation.file.parent / ".silotune-private" / "north" / "hand"
    home.mkdir(parents=True)
    (home / "heartbeat.json").write_text(json.dumps(vars(Heartbeat("train", 2, 8, 8, 1.0, time.time() - 60))))
    view = View(federation, rounds, 1)
    view.take({**event("train", "started", "north"), "at": time.time()})
    assert view.beat() is None


class Over:
    """A run that has ended."""

    def __init__(self, folder):
        self.folder = folder

    def running(self):
        return False


@pytest.mark.parametrize("terminal", [True, False])
def test_watch_tells_every_event_of_a_run_that_is_over_already(federation, rounds, two_rounds, tmp_path, capsys, terminal):
    events = [
        event("preprocess", "started", "west"),
        event("preprocess", "ended", "west", status="west failed: disk full", detail="no room on /srv [0]", seconds=2.0),
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    console = Console(force_terminal=terminal, width=100)
    course = watch(Over(tmp_path), federation, rounds, 1, console)
    assert course.troubles == {"west": ["preprocess failed: no room on /srv [0]"]}
    assert "no room on /srv [0]" in capsys.readouterr().out


def test_a_store_that_fails_while_watching_does_not_end_the_view(federation, rounds, two_rounds, monkeypatch):
    from silotune.components.errors import UnreachableError

    def refuse(*_):
        raise UnreachableError("away")

    monkeypatch.setattr(rounds, "latest", refuse)
    assert View(federation, rounds, 1).take(ended("aggregate", "round:3 attempt:1")) == ["aggregate  1 s"]
