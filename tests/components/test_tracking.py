"""MLflow is a view of the store: complete after any crash, the same after it was lost, and never logged twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from silotune.components import tracking
from silotune.components.errors import UnreachableError
from silotune.components.federation import Federation
from silotune.components.rounds import Rounds, pooled
from silotune.pipelines.simulate import Simulation


def history(uri: str, run: str) -> dict[str, list[tuple[int, float]]]:
    """Everything a run has logged, repetitions included."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(run).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in sorted(names)}


@pytest.fixture
def tracked(make_federation: Any) -> tuple[Federation, Rounds, str]:
    """A finished federation with an SQLite tracking store."""
    file = make_federation(tracking={"uri": "sqlite:///mlflow.db"})
    simulation = Simulation(file)
    list(simulation.run())
    simulation.test()
    simulation.export()
    run = simulation.rounds.tracking_run()
    assert run is not None
    return simulation.federation, simulation.rounds, run.run


def test_one_step_a_round_and_the_names_that_are_promised(tracked: tuple[Federation, Rounds, str]) -> None:
    federation, rounds, run = tracked
    logged = history(federation.tracking.uri, run)
    per_silo = [f"silo/{s}/{name}" for s in federation.silo_ids for name in ("loss", "perplexity", "tokens", "update_norm")]
    everyone = ["global/loss", "global/perplexity", "round/evaluated", "bytes/up", "bytes/down", "round/seconds", "round/participants"]
    tests = ["test/global/loss", *(f"test/silo/{s}/loss" for s in federation.silo_ids)]
    assert set(logged) >= {*per_silo, *everyone, *tests}
    assert [step for step, _ in logged["global/loss"]] == [0, 1, 2]
    assert [step for step, _ in logged["round/participants"]] == [1, 2]
    expected = [pooled(rounds.evaluations(c.outgoing, "valid"))["loss"] for c in rounds.commits()]
    assert [value for _, value in logged["global/loss"]] == pytest.approx(expected, rel=1e-12)


def test_syncing_again_logs_nothing(tracked: tuple[Federation, Rounds, str]) -> None:
    federation, rounds, run = tracked
    before = history(federation.tracking.uri, run)
    assert tracking.sync(federation, rounds, complete=True) == run
    assert history(federation.tracking.uri, run) == before


def test_a_lost_mlflow_is_rebuilt_from_the_store(tracked: tuple[Federation, Rounds, str]) -> None:
    federation, rounds, run = tracked
    uri = federation.tracking.uri
    before = history(uri, run)
    rebuilt_uri = uri.replace("mlflow.db", "rebuilt.db")
    rebuilt = federation.model_copy(update={"tracking": federation.tracking.model_copy(update={"uri": rebuilt_uri})})
    Path(uri.removeprefix("sqlite:///")).unlink()
    other = tracking.sync(rebuilt, rounds, complete=True)
    assert other != run
    assert history(rebuilt_uri, other) == before
    assert tracking.sync(rebuilt, rounds, complete=True) == other


def test_evaluations_of_an_open_round_are_not_pooled_yet(make_federation: Any) -> None:
    from silotune.components.initialize import step as initialize
    from silotune.components.preprocess import step as preprocess
    from silotune.components.train import step as train

    file = str(make_federation())
    turn = initialize.work(file, *(preprocess.work(file, s) for s in ("east", "north", "south")))
    train.work(file, "east", turn)
    found = dict(tracking.metrics(Rounds.of(Federation.load(file)), complete=False))
    assert ("global/loss", 0) not in found


def test_the_export_is_registered_with_its_lineage(tracked: tuple[Federation, Rounds, str]) -> None:
    from mlflow.tracking import MlflowClient

    federation, rounds, run = tracked
    client = MlflowClient(tracking_uri=federation.tracking.uri, registry_uri=federation.tracking.uri)
    (version,) = client.search_model_versions(f"name = '{federation.name}'")
    assert version.run_id == run
    assert version.tags["silos"] == "east, north, south"
    assert version.tags["commit"] == rounds.commit(int(version.tags["round"])).digest
    assert client.get_run(run).info.status == "FINISHED"


def test_an_unreachable_server_is_told_with_its_address(make_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    federation = Federation.load(make_federation(tracking={"uri": "http://127.0.0.1:1"}))
    with pytest.raises(UnreachableError, match=r"http://127\.0\.0\.1:1.*silotune sync") as caught:
        tracking.sync(federation, Rounds.of(federation))
    assert caught.value.reason == "tracking unreachable"
