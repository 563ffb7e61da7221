"""Whole runs with more silos than `aggregation.fan_in`: by the pipeline on this machine, and by a simulation, to the same globals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from silotune.components.aggregate import groups
from silotune.components.combine import step as combine
from silotune.components.errors import RefusedError
from silotune.components.federation import Federation
from silotune.components.process.progress import read_events
from silotune.components.rounds import Rounds
from silotune.pipelines.simulate import Simulation

FIVE = ("ada", "bo", "cy", "di", "ed")
TERMS = {"silos": FIVE, "aggregation": {"fan_in": 2}, "rounds": {"total": 1, "quorum": 5}, "training": {"steps": 1, "batch_size": 2}}


def outgoing(file: Path) -> list[str]:
    return [c.outgoing for c in Rounds.of(Federation.load(file)).commits()]


def test_a_simulation_combines_groups_and_does_without_where_that_fails(
    make_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    inner = groups.stored_sums
    monkeypatch.setattr(groups, "stored_sums", lambda *a: (sums := inner(*a), found.append(len(sums)))[0])
    file = make_federation(tmp_path / "boxed", **TERMS)
    assert len(list(Simulation(file).run())) == 1

    def broken(*_: str) -> str:
        raise RefusedError("it does not work")

    monkeypatch.setattr(combine, "work", broken)
    other = make_federation(tmp_path / "broken", **TERMS)
    assert len(list(Simulation(other).run())) == 1
    assert found == [3, 0]
    one, two = (Rounds.of(Federation.load(f)).commit(1) for f in (file, other))
    assert sorted(one.contributions) == sorted(two.contributions) == list(FIVE)
    assert outgoing(file) == outgoing(other)


@pytest.mark.slow
def test_a_run_combines_its_groups_and_gives_the_globals_of_a_simulation(make_federation: Any, tmp_path: Path) -> None:
    from silotune.pipelines import engines

    file = make_federation(tmp_path / "run", **TERMS)
    run = engines.start(Federation.load(file), 1)
    while run.running():
        time.sleep(0.2)
    assert run.result()["exit_code"] == 0, run.result()
    events = [e for e in read_events(run.folder, 0)[0] if e["box"] == "combine"]
    assert sorted(e["output"] for e in events if e["what"] == "ended") == [
        "group 1 ok: 2 of 2 updates", "group 2 ok: 2 of 2 updates", "group 3 ok: 1 of 1 updates"
    ]  # fmt: skip
    other = make_federation(tmp_path / "simulated", **TERMS)
    list(Simulation(other).run())
    assert outgoing(file) == outgoing(other)
