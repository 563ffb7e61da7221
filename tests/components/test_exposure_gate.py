"""Canaries in whole federations: planted in the silo, measured by it, and a model that knows them is not exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trials

from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Federation
from silotune.components.learning.leakage.canaries import REFERENCES, planted
from silotune.components.preprocess import step as preprocess
from silotune.components.silo_job import silo_home
from silotune.components.train.order import open_split
from silotune.pipelines.simulate import Simulation


@pytest.fixture
def file(make_federation: Any, tiny_llama: Path, tmp_path: Path) -> Any:
    def made(canaries: int = 8, silos: Any = ("east", "north"), **sections: Any) -> Path:
        sections = {"rounds": {"total": 1, "quorum": 1}, "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3}} | sections
        path = Path(make_federation(tmp_path, silos=silos, **trials.terms(tiny_llama, "fedavg", **sections)))
        trials.edit_silo(path, "east", canaries=canaries)
        return path

    return made


def test_a_random_half_is_trained_on_and_all_can_be_measured(file: Any) -> None:
    path = file(canaries=40)
    federation = Federation.load(path)
    bare = Federation.load(path)
    preprocess.work(str(path), "east")
    home = silo_home(federation, federation.silo("east"))
    made = planted(home, 40)
    assert 8 < made.coins.sum() < 32
    assert len({c.code for c in made.canaries}) == 40 + REFERENCES
    with_them, shard = open_split(home, "train"), open_split(home, "canaries")
    assert len(shard) == 40 + REFERENCES
    rows = {tuple(with_them.example(i)[0].tolist()) for i in range(len(with_them))}
    for i in range(40):
        assert (tuple(shard.example(i)[0].tolist()) in rows) == made.coins[i]
    trials.edit_silo(path, "east", canaries=0)
    preprocess.work(str(path), "east")
    assert len(open_split(home, "train")) == len(with_them) - made.coins.sum()
    with pytest.raises(FederationError, match="holds no canaries split"):
        open_split(home, "canaries")
    assert bare.agreement("b", "t") == federation.agreement("b", "t")  # no silo's canaries are anybody else's business


def test_the_silo_tells_one_number_of_what_it_planted(file: Any) -> None:
    simulation = Simulation(file())
    list(simulation.run())
    simulation.test()
    rounds = simulation.rounds
    found = rounds.exposed(rounds.latest().outgoing)
    assert set(found) == {"east"}
    assert 0 <= found["east"].exposure <= 9
    assert found["east"].references >= REFERENCES
    home = silo_home(simulation.federation, simulation.federation.silo("east"))
    secrets = [c.code.encode() for c in planted(home, 8).canaries]
    for key in rounds.store.list(""):
        data = rounds.store.get(key)
        assert not any(secret in data for secret in secrets)


def test_a_model_that_knows_them_is_refused(file: Any, tiny_llama: Path) -> None:
    whole = {"model": {"base": str(tiny_llama), "method": "full"}, "training": {"steps": 150, "batch_size": 8, "learning_rate": 3e-3}}
    simulation = Simulation(file(canaries=6, silos=("east",), export={"max_exposure": 3.0}, **whole))
    list(simulation.run())
    with pytest.raises(RefusedError, match="east has not measured it") as caught:
        simulation.export()
    assert caught.value.reason == "exposure unmeasured"
    simulation.test()
    with pytest.raises(RefusedError, match=r"not exported: export\.max_exposure is 3 bits, measured are east") as caught:
        simulation.export()
    assert caught.value.reason == "exposure too high"
    trials.edit(Path(simulation.file), export={"max_exposure": 12.0})
    assert Path(Simulation(simulation.file).export()).is_dir()


def test_a_gate_without_anything_to_measure_by_is_refused(file: Any) -> None:
    path = file(canaries=0, export={"max_exposure": 3.0})
    with pytest.raises(FederationError, match=r"export\.max_exposure: needs silos with canaries, by which it is measured, got none"):
        Federation.load(path)


def test_canaries_that_do_not_fit_are_refused(file: Any) -> None:
    path = file(data={"max_length": 12, "template": "{prompt} {response}"})
    train = Path(Federation.load(path).silo("east").train)
    train.write_text('{"prompt": "a", "response": "b"}\n' * 30)
    with pytest.raises(FederationError, match=r"data\.max_length: must hold a canary, got 12"):
        preprocess.work(str(path), "east")
