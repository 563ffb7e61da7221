"""Federations that run into a silo's budget: the silo is refused, the others go on, and nothing is spent twice or forgotten."""

from __future__ import annotations

import os
import signal
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.rounds import Rounds
from silotune.components.steward.entry import Entry
from silotune.components.steward.ledger import Ledger
from silotune.components.steward.policy import Policy
from silotune.components.train import step as train
from silotune.pipelines.simulate import Simulation

PRIVACY = {"epsilon": 8.0, "delta": 1e-3, "rounds": 4}
TERMS = {"privacy": PRIVACY, "rounds": {"total": 4, "quorum": 2}, "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01}}


def storage(file: Path, silo: str) -> Path:
    return Path(Federation.load(file).silo(silo).storage)


def put(file: Path, silo: str, **terms: Any) -> None:
    storage(file, silo).mkdir(parents=True, exist_ok=True)
    (storage(file, silo) / "policy.yaml").write_text(yaml.safe_dump({"dataset": "letters"} | terms))


def entries(file: Path, silo: str = "north") -> list[Entry]:
    federation = Federation.load(file)
    return Ledger.of(federation, silo, Policy.of(federation, silo)).entries()


def test_a_federation_runs_into_one_silos_budget(make_federation: Any) -> None:
    file = make_federation(**TERMS)
    put(file, "north", privacy={"epsilon": {"total": 20.0, "delta": 1e-3}})
    put(file, "south", privacy={"epsilon": {"total": 8.0, "run": 8.0, "delta": 1e-3}})  # just what was asked for
    first, second = Simulation(file).run(rounds=2)
    assert not first.missing
    assert not second.missing
    spent = [Rounds.of(Federation.load(file)).reports(n, 1)["north"].numbers for n in (1, 2)]
    assert 0 < spent[0]["epsilon"] < spent[1]["epsilon"] < 8.0
    assert spent[1]["delta"] == 1e-3
    put(file, "north", privacy={"epsilon": {"total": 8.0, "month": spent[1]["epsilon"] * 1.01, "delta": 1e-3}})
    third, fourth = Simulation(file).run()
    for result in (third, fourth):
        assert sorted(result.silos) == ["east", "south"]
        assert result.missing == {"north": "refused: budget"}
    assert [e.charge.round for e in entries(file)] == [1, 2]
    assert [e.charge.round for e in entries(file, "south")] == [1, 2, 3, 4]
    assert [e.charge.round for e in entries(file, "east")] == [1, 2, 3, 4]  # without a policy: written down all the same
    last = Rounds.of(Federation.load(file)).reports(4, 1)["south"].numbers
    assert last["epsilon"] <= PRIVACY["epsilon"] + 1e-6  # what was promised for all planned rounds


def test_another_federation_on_the_same_data_finds_what_is_left(make_federation: Any, tmp_path: Path) -> None:
    """In another folder, with another name, a storage of its own and records that were added to since."""
    first, second = tmp_path / "one", tmp_path / "two"
    books = {"ledger": {"at": str(tmp_path / "books")}, "privacy": {"epsilon": {"total": 8.0, "delta": 1e-3}}}
    for folder in (first, second):
        folder.mkdir()
    file = make_federation(first, **TERMS)
    put(file, "north", **books)
    list(Simulation(file).run())
    other = make_federation(second, **TERMS | {"name": "other"})
    with (second / "data/north/train.jsonl").open("a") as records:
        records.write('{"prompt": "one more?", "response": "yes"}\n')
    key = storage(file, "north") / "keys" / "north.pub"
    put(other, "north", **books | {"ledger": books["ledger"] | {"keys": [key.read_text().strip()]}})
    (result,) = Simulation(other).run(rounds=1)
    assert result.missing == {"north": "refused: budget"}


def test_a_training_that_is_killed_is_spent_and_its_resumption_costs_nothing(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(**TERMS)
    put(file, "north", privacy={"epsilon": {"total": 8.0, "delta": 1e-3}})
    simulation = Simulation(file)
    turn = simulation._begin().text
    pid = os.fork()
    if pid == 0:
        train.learn = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        train.work(str(file), "north", turn)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [e.charge.round for e in entries(file)] == [1]
    assert train.work(str(file), "north", turn) == "north ok"
    assert [e.charge.round for e in entries(file)] == [1]


def test_records_that_changed_while_a_round_was_open_are_another_training(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(**TERMS)
    with monkeypatch.context() as patched:
        patched.setattr(train, "learn", lambda *_: (_ for _ in ()).throw(MemoryError))
        simulation = Simulation(file)
        turn = simulation._begin().text
        with pytest.raises(MemoryError):
            train.work(str(file), "north", turn)
    with (file.parent / "data/north/train.jsonl").open("a") as records:
        records.write('{"prompt": "one more?", "response": "yes"}\n')
    turn = Simulation(file)._begin().text
    assert train.work(str(file), "north", turn) == "north ok"
    one, two = entries(file)
    assert one.charge.plan == two.charge.plan
    assert one.charge.content != two.charge.content


@pytest.mark.parametrize("lost", ["the last entry", "all of it"])
def test_a_ledger_that_lost_its_end_is_missed(make_federation: Any, lost: str) -> None:
    file = make_federation(**TERMS)
    list(Simulation(file).run(rounds=2))
    for path in sorted((storage(file, "north") / "ledger" / "north").iterdir())[-1 if lost == "the last entry" else 0 :]:
        path.unlink()
    simulation = Simulation(file)
    (result,) = simulation.run(rounds=1)
    assert result.missing == {"north": "refused: ledger damaged"}
    assert "restore it from a backup" in simulation.details["north"]
    put(file, "north", ledger={"since": date(2100, 1, 1)})  # the steward's way out, under their own name
    (result,) = Simulation(file).run(rounds=1)
    assert not result.missing


def test_what_was_altered_is_refused_before_a_record_is_read(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_federation(**TERMS)
    list(Simulation(file).run(rounds=1))
    path = storage(file, "north") / "ledger" / "north" / "000001.json"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":', b'"noise_multiplier":1'))
    turn = Simulation(file)._begin().text
    monkeypatch.setattr(train, "learn", lambda *_: pytest.fail("was trained"))
    with pytest.raises(RefusedError, match=r"000001\.json contradicts itself"):
        train.work(str(file), "north", turn)


def test_trainings_without_privacy_are_written_down_as_such(make_federation: Any) -> None:
    file = make_federation(rounds={"total": 1, "quorum": 2})
    list(Simulation(file).run())
    (entry,) = entries(file)
    assert entry.charge.mechanism is None
    assert "epsilon" not in Rounds.of(Federation.load(file)).reports(1, 1)["north"].numbers
