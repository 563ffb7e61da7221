"""Rounds that go wrong: silos that are late, missing, damaged or hostile, globals that prove bad, runs that race."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.aggregate import step as aggregate
from silotune.components.errors import QuorumError, RefusedError
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning import training
from silotune.components.preprocess import step as preprocess
from silotune.components.rounds import Rounds
from silotune.components.train import order
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

SILOS = ("east", "north", "south")
TRAINING = {"steps": 4, "batch_size": 3, "learning_rate": 0.01}


def begin(file: Path) -> str:
    return initialize.work(str(file), *(preprocess.work(str(file), s) for s in SILOS))


def rounds_of(file: Path) -> Rounds:
    return Rounds.of(Federation.load(file))


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def one_round(file: Path, *silos: str) -> str:
    turn = begin(file)
    return aggregate.work(str(file), turn, *(train.work(str(file), s, turn) for s in silos or SILOS))


def globals_of(file: Path) -> list[str]:
    return [c.outgoing for c in rounds_of(file).commits()]


def leave(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """As if the deadline were near after so many steps."""
    clock: Iterator[float] = iter([1e6] * (steps - 1) + [0.0] * 100)
    monkeypatch.setattr(order, "time_left", lambda: next(clock))


# --- too few, too late ---


def test_a_round_below_quorum_can_be_skipped(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 2, "quorum": 2, "on_missing_quorum": "skip"})
    following = one_round(file, "east")
    skipped = rounds_of(file).commit(1)
    assert following == "round:2 attempt:1"
    assert (skipped.outcome, skipped.contributions) == ("skipped", {})
    assert skipped.outgoing == skipped.incoming == rounds_of(file).commit(0).outgoing
    assert skipped.missing == {"north": "failed: no report came", "south": "failed: no report came"}
    plan = rounds_of(file).plan(2)
    assert plan is not None
    assert plan.participants["east"].cursor == 0, "what was trained for a skipped round is trained anew"
    assert one_round(file).startswith("done:")
    assert sorted(rounds_of(file).commit(2).contributions) == list(SILOS)


def test_a_skipped_rounds_update_never_reaches_a_later_round(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 2, "quorum": 2, "on_missing_quorum": "skip"})
    one_round(file, "east")
    late = rounds_of(file).update(1, "east")
    one_round(file)
    assert late is not None
    assert late.object not in {c.object for c in rounds_of(file).commit(2).contributions.values()}


def test_quorum_by_the_share_of_examples(make_federation: Any) -> None:
    training = {"steps": 2, "batch_size": 3, "learning_rate": 0.01}
    file = make_federation(rounds={"total": 1, "quorum": {"weight": 0.7}}, training=training)
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in ("east", "north")]
    with pytest.raises(QuorumError, match=r"70% of the examples asked for must be trained on, 67% were:\n  south +failed: crashed"):
        aggregate.work(str(file), turn, *statuses, "south failed: crashed")
    edit(file, rounds={"total": 1, "quorum": {"weight": 0.6}})
    assert aggregate.work(str(file), turn, *statuses, "south failed: crashed").startswith("done:")


def test_at_the_deadline_a_silo_sends_what_it_has(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "deadline": "1h", "min_fraction": 0.5}, training=TRAINING)
    turn = begin(file)
    with monkeypatch.context() as hurried:
        leave(hurried, steps=3)
        assert train.work(str(file), "south", turn) == "south ok"
    aggregate.work(str(file), turn, *(train.work(str(file), s, turn) for s in SILOS))
    contributions = rounds_of(file).commit(1).contributions
    assert {s: c.steps for s, c in contributions.items()} == {"east": 4, "north": 4, "south": 3}
    assert contributions["south"].weight == pytest.approx(9 / 33), "it counts by the examples that it has really seen"
    assert contributions["south"].cursor == 9


def test_with_less_than_min_fraction_it_is_late_and_goes_on_next_time(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = make_federation(Path(make_federation().parent / "undisturbed"), rounds={"total": 1, "quorum": 3}, training=TRAINING)
    one_round(undisturbed)
    file = make_federation(rounds={"total": 1, "quorum": 3, "deadline": "1h", "min_fraction": 0.5}, training=TRAINING)
    turn = begin(file)
    with monkeypatch.context() as hurried:
        leave(hurried, steps=1)
        late = train.work(str(file), "south", turn)
    assert late == "south late: 1 of 4 steps"
    assert rounds_of(file).reports(1, 1)["south"].text == "late: 1 of 4 steps"
    with pytest.raises(QuorumError, match=r"south +late: 1 of 4 steps"):
        aggregate.work(str(file), turn, *(train.work(str(file), s, turn) for s in ("east", "north")), late)

    seen: list[int] = []
    inner = training.train

    def watched(*arguments: Any, **options: Any) -> Any:
        pulse = arguments[7]
        return inner(*arguments[:7], lambda step, steps, loss: (seen.append(step), pulse(step, steps, loss))[0], **options)

    monkeypatch.setattr(training, "train", watched)
    one_round(file)
    assert seen == [2, 3, 4], "the second attempt goes on where the first one stopped, and nobody else trains again"
    assert globals_of(file) == globals_of(undisturbed)


# --- bad globals ---


def test_a_global_that_proves_worse_is_left_behind(make_federation: Any) -> None:
    hot = {"steps": 4, "batch_size": 3, "learning_rate": 3.0}
    rounds = {"total": 3, "rollback": {"max_loss_increase": 0.2}, "guards": {"norm_band": None}}
    file = make_federation(rounds=rounds, training=hot, aggregation={"strategy": "fedavg"})
    one_round(file)
    edit(file, training=TRAINING)  # the cause is mended; that amends the terms from the next round on
    list(Simulation(file).run())
    base, first, *rest = rounds_of(file).commits()
    back = next(c for c in rest if c.outcome == "rolled-back")
    assert (back.back_to, back.outgoing) == (0, base.outgoing)
    assert back.incoming == first.outgoing
    after = rounds_of(file).plan(back.round + 1)
    assert after is not None
    assert after.incoming == base.outgoing
    assert after.participants["east"].cursor == first.contributions["east"].cursor, "not the same examples again"
    assert rest[-1].best == 0
    assert Simulation(file).results()[-1].loss < Simulation(file).results()[0].loss


def test_without_rollback_a_worse_global_stands(make_federation: Any) -> None:
    hot = {"steps": 4, "batch_size": 3, "learning_rate": 3.0}
    file = make_federation(rounds={"total": 2, "guards": {"norm_band": None}}, training=hot)
    list(Simulation(file).run())
    assert [c.outcome for c in rounds_of(file).commits()] == ["initialized", "aggregated", "aggregated"]


def test_a_global_without_finite_loss_is_left_behind_though_no_silo_can_train_from_it(make_federation: Any) -> None:
    broken = {"steps": 1, "batch_size": 3, "learning_rate": 1e25}
    file = make_federation(rounds={"total": 3}, training=broken)
    one_round(file)
    turn = begin(file)
    statuses = []
    for silo in SILOS:
        with pytest.raises(training.NonFiniteLoss, match="of the incoming global"):
            train.work(str(file), silo, turn)
        statuses.append(f"{silo} failed: non-finite loss of the incoming global")
    assert aggregate.work(str(file), turn, *statuses) == "round:3 attempt:1"
    back = rounds_of(file).commit(2)
    assert (back.outcome, back.outgoing) == ("rolled-back", rounds_of(file).commit(0).outgoing)


# --- updates that must not count ---


def scaled(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = training.update_of
    monkeypatch.setattr(training, "update_of", lambda before, after: {n: x * factor for n, x in inner(before, after).items()})


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_an_update_of_unusual_size_is_left_out_and_named(make_federation: Any, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    file = make_federation(rounds={"total": 1})
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in ("east", "south")]
    with monkeypatch.context() as hostile:
        scaled(factor, hostile)
        statuses.append(train.work(str(file), "north", turn))
    aggregate.work(str(file), turn, *statuses)
    commit = rounds_of(file).commit(1)
    assert sorted(commit.contributions) == ["east", "south"]
    assert "times the median of recent updates, 0.1 to 10 times are allowed" in commit.missing["north"]


def test_an_update_that_changes_nothing_is_not_sent(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1})
    turn = begin(file)
    scaled(0.0, monkeypatch)
    with pytest.raises(RefusedError, match=r"its update has norm 0; raise training\.learning_rate") as refused:
        train.work(str(file), "north", turn)
    assert refused.value.reason == "training changed nothing"
    assert list(rounds_of(file).store.list("tiny/contributions/")) == []


def test_a_refused_silo_may_deliver_again(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 3})
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in ("east", "south")]
    with monkeypatch.context() as hostile:
        scaled(1000.0, hostile)
        statuses.append(train.work(str(file), "north", turn))
    with pytest.raises(QuorumError, match=r"north +refused: its norm"):
        aggregate.work(str(file), turn, *statuses)
    assert rounds_of(file).update(1, "north") is None
    assert one_round(file).startswith("done:")
    assert sorted(rounds_of(file).commit(1).contributions) == list(SILOS)


def test_an_update_damaged_in_the_store_is_sent_again_without_training(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 3})
    turn = begin(file)
    statuses = [train.work(str(file), s, turn) for s in SILOS]
    rounds = rounds_of(file)
    manifest = rounds.update(1, "south")
    assert manifest is not None
    path = Path(rounds.store.url(rounds.object_key(manifest.object, "south")))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(QuorumError, match=r"south +refused: object corrupt"):
        aggregate.work(str(file), turn, *statuses)
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("what was trained need only be sent again"))
    assert one_round(file).startswith("done:")
    assert rounds_of(file).commit(1).contributions["south"].object == manifest.object


def test_a_global_damaged_in_the_store_is_made_again_from_its_updates(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 2})
    turn = one_round(file)
    rounds = rounds_of(file)
    outgoing = rounds.commit(1).outgoing
    path = Path(rounds.store.url(rounds.object_key(outgoing)))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for silo in SILOS:
        with pytest.raises(RefusedError, match=outgoing[:12]):
            train.work(str(file), silo, turn)
    with pytest.raises(QuorumError, match="object corrupt"):
        aggregate.work(str(file), turn, *(f"{s} refused: object corrupt" for s in SILOS))
    assert path.read_bytes() == sound
    assert one_round(file).startswith("done:")


# --- runs that race ---


def in_forks(*works: Any) -> list[int]:
    """Do some works at the same time, each in a process of its own; their exit codes."""
    children = []
    for work in works:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_two_runs_at_once_train_once_and_commit_once(make_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 3}, training=TRAINING)
    turns = [begin(file), begin(file)]
    assert turns == ["round:1 attempt:1", "round:1 attempt:2"]
    inner = training.train

    def counted(*arguments: Any, **options: Any) -> Any:
        with (tmp_path / "trainings").open("a") as log:
            log.write("one\n")
        return inner(*arguments, **options)

    monkeypatch.setattr(training, "train", counted)

    def a_run(turn: str) -> None:
        aggregate.work(str(file), turn, *(train.work(str(file), s, turn) for s in SILOS))

    assert in_forks(*(lambda t=t: a_run(t) for t in turns)) == [0, 0]
    assert (tmp_path / "trainings").read_text().count("one") == len(SILOS), "nothing is trained twice"
    commits = list(rounds_of(file).commits())
    assert [c.round for c in commits] == [0, 1]
    assert sorted(commits[1].contributions) == list(SILOS)
