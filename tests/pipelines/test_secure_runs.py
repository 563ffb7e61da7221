"""Whole runs with secure aggregation, with real training: by the Python door with every strategy that is one sum, and by the pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trials
from secure_courses import quantised_mean

from silotune.components.federation import Federation
from silotune.components.learning.aggregation.server_optimizer import fedadam
from silotune.components.learning.tensor_file import open_tensor_file
from silotune.components.process.progress import read_events
from silotune.components.provenance import chain
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.silo import UPDATE
from silotune.components.silo_job import silo_home
from silotune.components.terms.privacy import sums_securely
from silotune.components.terms.strategies import STRATEGIES
from silotune.pipelines.simulate import Simulation

SECURE = {"privacy": {"secure_aggregation": {}}}
CLIP = 0.05
ABLE = [name for name, strategy in STRATEGIES.items() if sums_securely(strategy)]


def test_these_strategies_are_one_sum() -> None:
    assert set(ABLE) == {"fedavg", "fedprox", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "diloco", "fedit", "ffa", "rolora", "fed-sb"}


def last_updates(simulation: Simulation) -> dict[str, dict[str, np.ndarray]]:
    """Of the last round: they lie in the silos' own folders, and nowhere else."""
    homes = {s.id: silo_home(simulation.federation, s) for s in simulation.federation.silos}
    return {silo: open_tensor_file(home / UPDATE).read_all() for silo, home in homes.items()}


def kept_secrets(simulation: Simulation) -> set[str]:
    homes = [silo_home(simulation.federation, s) for s in simulation.federation.silos]
    return {path.name for home in homes for path in (home / "secagg").iterdir()}


def state(rounds: Rounds, digest: str, folder: Path) -> dict[str, np.ndarray]:
    return open_tensor_file(rounds.fetch_object(digest, folder / "state")).read_all()


@pytest.mark.parametrize("name", ["fedadam", "fedit", "ffa", "rolora", "fed-sb"])  # each way of sending, and a server that remembers
def test_a_strategy_under_secure_aggregation(make_federation: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    terms = trials.terms(tiny_llama, name, {"clip": {"norm": CLIP}}, rounds={"total": 2, "quorum": 3})
    simulation = Simulation(make_federation(tmp_path, **terms, **SECURE))
    results = list(simulation.run())
    rounds, commits = simulation.rounds, list(simulation.rounds.commits())
    assert [c.outcome for c in commits] == ["initialized", "aggregated", "aggregated"]
    assert all(set(c.contributions) == set(trials.SILOS) and not c.missing for c in commits[1:])
    assert len(results) == 2
    assert not chain.verify(rounds, deep=True).breaks
    updates, last = last_updates(simulation), commits[-1]
    before, after = state(rounds, last.incoming or "", tmp_path), state(rounds, last.outgoing, tmp_path)
    mean = quantised_mean(updates, dict.fromkeys(updates, 1.0), clip=CLIP)
    norms = [np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in u.values())) for u in updates.values()]
    assert max(norms) > CLIP, "so that clipping is tried"
    if STRATEGIES[name].server == "add":
        for tensor, array in after.items():
            step = mean.get(tensor, np.zeros(()))
            assert (array == (before[tensor] + step).astype(np.float32)).all()
    if name == "fedadam":
        first = state(rounds, commits[1].server_state["optimizer"], tmp_path)
        step = fedadam(0.01).step
        for tensor in mean:
            kinds = {kind: first[f"{kind}.{tensor}"].astype(np.float64) for kind in ("momentum", "second")}
            moved, _ = step(mean[tensor], kinds)
            assert (after[tensor] == (before[tensor] + moved).astype(np.float32)).all()
    assert not list(rounds.store.list(rounds.key("rounds", "00001", "updates") + "/")), "no manifest of a plain update"


def test_full_fine_tuning_under_secure_aggregation_with_a_silo_that_dies(
    make_federation: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from silotune.components.errors import SilotuneError
    from silotune.components.mask import step as mask

    silos = ("east", "north", "south", "west")
    terms = {"model": {"base": str(tiny_llama), "method": "full"}, "aggregation": {"clip": {"norm": CLIP}, "weights": "uniform"}}
    simulation = Simulation(make_federation(tmp_path, silos=silos, rounds={"total": 1, "quorum": 3}, **terms, **SECURE))
    inner = mask.work

    def dying(file: str, silo: str, turn: str) -> str:
        if silo == "north":
            raise SilotuneError("killed", "killed by signal 9")
        return inner(file, silo, turn)

    monkeypatch.setattr(mask, "work", dying)
    (result,) = simulation.run()
    assert result.missing == {"north": "failed: killed by signal 9"}
    commit = simulation.rounds.commit(1)
    assert kept_secrets(simulation) == {"00001-1.json", "00001-1.masked", "opened.json"}
    simulation.test()
    assert kept_secrets(simulation) == {"opened.json"}, "also those of the last round are gone, behind which no next one comes"
    updates = {s: u for s, u in last_updates(simulation).items() if s != "north"}
    mean = quantised_mean(updates, dict.fromkeys(updates, 1.0), clip=CLIP)
    before, after = (state(simulation.rounds, d, tmp_path) for d in (commit.incoming or "", commit.outgoing))
    assert all((after[n] == (before[n] + mean[n]).astype(np.float32)).all() for n in after)


@pytest.mark.slow
def test_a_run_of_the_pipeline_gives_the_globals_of_a_simulation(make_federation: Any, tmp_path: Path) -> None:
    from silotune.pipelines import engines

    terms = {"aggregation": {"clip": {"norm": CLIP}}, "rounds": {"total": 2, "quorum": 3}, **SECURE}
    file = make_federation(tmp_path / "run", **terms)
    run = engines.start(Federation.load(file), 2)
    while run.running():
        time.sleep(0.2)
    assert run.result()["exit_code"] == 0, (run.result(), run.log.read_text()[-3000:])
    events = read_events(run.folder, 0)[0]
    boxes = [e["box"] for e in events if e["what"] == "ended"]
    assert {box: boxes.count(box) for box in ("train", "muster", "share", "mask", "confirm", "unmask", "aggregate")} == {
        "train": 6, "muster": 8, "share": 6, "mask": 6, "confirm": 6, "unmask": 6, "aggregate": 2
    }  # fmt: skip
    other = make_federation(tmp_path / "simulated", **terms)
    list(Simulation(other).run())
    one, two = ([c.outgoing for c in Rounds.of(Federation.load(f)).commits()] for f in (file, other))
    assert one == two, "masks are other ones each time, and leave no trace in the sum"
