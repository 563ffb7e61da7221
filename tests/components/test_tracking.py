"""MLflow is a view of the store: complete after any crash, the same after it was lost, and never logged twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from silotune.components import keys, tracking
from silotune.components.errors import UnreachableError
from silotune.components.federation import Federation
from silotune.components.protocol import Commit, Contribution, Evaluation, pooled
from silotune.components.rounds import Rounds
from silotune.pipelines.simulate import Simulation


def history(uri: str, run: str) -> dict[str, list[tuple[int, float]]]:
    """Everything a run has logged, repetitions included."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(run).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in sorted(names)}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, federation_writer: Any, tiny_llama: Path) -> tuple[Federation, Rounds, str]:
    """A finished federation with an SQLite tracking store, which no test changes."""
    file = federation_writer(tmp_path_factory.mktemp("tracked"), tiny_llama, tracking={"uri": "sqlite:///mlflow.db"})
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


def test_the_terms_are_parameters_and_the_experiment_is_one_of_training(tracked: tuple[Federation, Rounds, str]) -> None:
    from mlflow.tracking import MlflowClient

    federation, _, run = tracked
    client = MlflowClient(tracking_uri=federation.tracking.uri)
    params = client.get_run(run).data.params
    assert {"training.steps": "2", "privacy.epsilon": "None", "silos": "east, north, south"}.items() <= params.items()
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


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


# Courses written by hand


def write_round(rounds: Rounds, number: int, outcome: str, made: str, losses: dict[str, float | None] | None = None) -> None:
    """A commit whose outgoing global is ``made``, and its scores: losses in nats per token, of 10 tokens each."""
    (agreement,) = (key.rsplit("/", 1)[-1].removesuffix(".json") for key in rounds.store.list(rounds.key("agreements") + "/"))
    part = Contribution(manifest="m", object="o", bytes=10, weight=0.5, examples=4, tokens=9, steps=2, cursor=4, norm=0.5)
    terms = {
        "round": number, "outcome": outcome, "custody": "local", "agreement": agreement, "plan": "p", "attempt": 1,
        "contributions": dict.fromkeys(("east", "north"), part) if outcome == "aggregated" else {}, "missing": {}, "previous": "c",
        "incoming": "g", "outgoing": made, "best": 0, "bytes_up": 20, "bytes_down": 20, "started": 1e9 + number, "at": 1e9 + number + 1,
    }  # fmt: skip
    rounds.write_commit(Commit(**terms))  # type: ignore[arg-type]
    for silo, loss in (losses or {}).items():
        sum_ = None if loss is None else 10 * loss
        rounds.write_evaluation(
            Evaluation(round=number + 1, outgoing=made, silo=silo, split="valid", split_digest="d" * 64, examples=2, tokens=10, loss_sum=sum_,
                       correct=3, at=1e9)
        )  # fmt: skip


@pytest.fixture
def by_hand(make_federation: Any) -> tuple[Federation, Rounds]:
    """Round 1 has no finite loss in one silo and is left behind by round 2, round 3 is skipped, round 4 is amended, round 5 goes on."""
    federation = Federation.load(make_federation(tracking={"uri": "sqlite:///mlflow.db"}))
    keys.ensure(federation)
    rounds = Rounds.of(federation)
    rounds.put_agreement(federation.agreement("b" * 64, "t" * 64))
    write_round(rounds, 0, "initialized", "g0", {"east": 2.0, "north": 4.0})
    write_round(rounds, 1, "aggregated", "g1", {"east": None, "north": 9.0})
    write_round(rounds, 2, "rolled-back", "g0")
    write_round(rounds, 3, "skipped", "g0")
    write_round(rounds, 4, "amended", "g0")
    write_round(rounds, 5, "aggregated", "g5", {"east": 1.0, "north": 2.0})
    return federation, rounds


def test_only_rounds_that_made_a_global_have_a_loss(by_hand: tuple[Federation, Rounds]) -> None:
    _, rounds = by_hand
    found = dict(tracking.metrics(rounds, complete=True))
    steps = {name: sorted(step for n, step in found if n == name) for name, _ in found}
    assert steps["global/loss"] == steps["global/perplexity"] == steps["round/evaluated"] == steps["silo/east/loss"] == [0, 1, 5]
    assert steps["bytes/up"] == steps["bytes/down"] == steps["round/participants"] == steps["silo/east/update_norm"] == [1, 5]
    assert found["global/loss", 0][0] == pytest.approx(3.0)
    assert found["global/loss", 5] == (pytest.approx(1.5), 1_000_000_006_000)


@pytest.mark.parametrize("outcome", ["aggregated", "skipped", "rolled-back"])
def test_the_scores_of_a_global_are_in_once_the_next_round_is_closed(make_federation: Any, outcome: str) -> None:
    federation = Federation.load(make_federation())
    keys.ensure(federation)
    rounds = Rounds.of(federation)
    rounds.put_agreement(federation.agreement("b" * 64, "t" * 64))
    write_round(rounds, 0, "initialized", "g0", {"east": 2.0})
    write_round(rounds, 1, "amended", "g0")
    assert ("global/loss", 0) not in dict(tracking.metrics(rounds, complete=False)), "its round was closed before it was over"
    write_round(rounds, 2, outcome, "g1" if outcome == "aggregated" else "g0")
    assert dict(tracking.metrics(rounds, complete=False))["global/loss", 0][0] == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_does_not_stop_the_sync(by_hand: tuple[Federation, Rounds]) -> None:
    federation, rounds = by_hand
    run = tracking.sync(federation, rounds, complete=True)
    logged = history(federation.tracking.uri, run)
    for name in ("global/loss", "global/perplexity", "silo/east/loss", "silo/east/perplexity"):
        (first, second, third) = logged[name]
        assert [step for step, _ in (first, second, third)] == [0, 1, 5]
        assert second[1] > 1e308, "as large as MLflow's SQL stores can tell"
        assert math.isfinite(first[1])
        assert math.isfinite(third[1])
    assert logged["silo/north/loss"][1] == (1, pytest.approx(9.0))
    assert tracking.sync(federation, rounds, complete=True) == run
    assert history(federation.tracking.uri, run) == logged, "and is not logged again"
    json.dumps(logged, allow_nan=False)
