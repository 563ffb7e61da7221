"""MLflow: one experiment and one run per federation, in which step 0 is the base model and step r is round r.

Metrics are never logged as they happen; they are *derived* from commits and evaluation records by `sync`, which reads what MLflow has and
logs what is missing or has changed. It can be called at any time, by anyone, after any crash, and rebuilds an empty MLflow from the store.
Only the coordinator calls it. MLflow is imported on first use: that takes seconds.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silotune.components.errors import UnreachableError
from silotune.components.federation import Federation
from silotune.components.protocol import Commit, Exported, TrackingRun, perplexity, pooled
from silotune.components.rounds import Rounds

BATCH = 1000  # metrics per request, MLflow's own limit
REPLACES = "silotune.replaces"

Point = tuple[str, int]  # (metric name, step)


def sync(federation: Federation, rounds: Rounds, *, complete: bool = False) -> str:
    """Bring MLflow up to date; returns the run's id, or "" where ``tracking.uri`` is ``none``.

    Args:
        complete: evaluations of the last round are all in, so that its metrics can be pooled now rather than after the next round.

    Raises:
        UnreachableError: the tracking server cannot be reached, or refuses.
    """
    if federation.tracking.uri == "none":
        return ""
    with _speaking(federation) as client:
        run = _run(client, federation, rounds)
        _log_missing(client, run, dict(metrics(rounds, complete=complete)))
        return run


def record_export(federation: Federation, rounds: Rounds, exported: Exported, *, finished: bool) -> None:
    """Sync, link the exported model to its run, and register it as a version that names its round, commit and silos."""
    run = sync(federation, rounds, complete=True)
    if not run:
        return
    from mlflow.exceptions import MlflowException

    commit = rounds.commit(exported.round)
    tags = {
        "round": str(exported.round),
        "commit": exported.commit,
        "global": exported.outgoing,
        "silos": ", ".join(sorted(commit.contributions)),
    }
    with _speaking(federation) as client:
        for key, value in tags.items():
            client.set_tag(run, f"silotune.export.{key}", value)
        client.set_tag(run, "silotune.export.location", exported.location)
        try:
            client.create_registered_model(federation.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{federation.name}'")
        local = exported.location.startswith("/")
        # A server refuses a folder of this machine as a source, which it could not read; the run's tag names it all the same.
        if not (local and federation.tracking.uri.startswith("http")) and not any(
            v.tags.get("commit") == exported.commit for v in versions
        ):
            source = Path(exported.location).as_uri() if local else exported.location
            client.create_model_version(federation.name, source=source, run_id=run, tags=tags)
        if finished:
            client.set_terminated(run)


def metrics(rounds: Rounds, *, complete: bool) -> Iterator[tuple[Point, tuple[float, int]]]:
    """((name, step), (value, milliseconds)) of everything the store can tell, by commit.

    A global is evaluated by the next round's trainings, so that its validation metrics count once that round is committed.
    """
    commits = list(rounds.commits())
    for i, commit in enumerate(commits):
        at = int(commit.at * 1000)
        values = dict(_costs(rounds, commit)) | dict(_spectrum(commit))
        if commit.made_global:
            if complete or any(c.counts for c in commits[i + 1 :]):
                values |= dict(_validation(rounds, commit))
            values |= dict(_test(rounds, commit))
        yield from (((name, commit.round), (value, at)) for name, value in values.items())


def _spectrum(commit: Commit) -> Iterator[tuple[str, float]]:
    """What rank the mean of LoRA's products has, and what of it the global's rank cannot hold."""
    if (spectrum := commit.spectrum) is None:
        return
    yield "aggregate/residual", spectrum.residual
    yield "aggregate/effective_rank", spectrum.effective_rank
    yield "aggregate/least_effective_rank", spectrum.least_effective_rank
    for i, value in enumerate(spectrum.values, 1):
        yield f"aggregate/singular_value/{i:02d}", value


def _costs(rounds: Rounds, commit: Commit) -> Iterator[tuple[str, float]]:
    private = rounds.agreement(commit.agreement).privacy.of_records
    if private:
        yield from _epsilons(rounds, commit)
    if commit.outcome == "aggregated":
        yield "bytes/up", commit.bytes_up
        yield "bytes/down", commit.bytes_down
        yield "round/seconds", commit.at - commit.started
        yield "round/participants", len(commit.contributions)
        if (spent := commit.guards.get("silo epsilon")) is not None:
            yield "privacy/silo_epsilon", spent
        for silo, contribution in commit.contributions.items():
            if not private:  # else nobody is told how many there were
                yield f"silo/{silo}/tokens", contribution.tokens
            if contribution.norm is not None:
                yield f"silo/{silo}/update_norm", contribution.norm


def _epsilons(rounds: Rounds, commit: Commit) -> Iterator[tuple[str, float]]:
    """What silos report to have spent by now, in whichever attempt they delivered, and whatever became of their updates: sent is sent."""
    found: dict[str, float] = {}
    for attempt in range(1, len(rounds.attempts(commit.round)) + 1):
        for silo, report in rounds.reports(commit.round, attempt).items():
            if "epsilon" in report.numbers:
                found[silo] = report.numbers["epsilon"]
    yield from ((f"silo/{silo}/epsilon", value) for silo, value in found.items())


def _validation(rounds: Rounds, commit: Commit) -> Iterator[tuple[str, float]]:
    evaluations = rounds.evaluations(commit.outgoing, "valid")
    if not evaluations:
        return
    for name, value in pooled(evaluations).items():
        yield f"global/{name}", value
    yield "round/evaluated", len(evaluations)
    for silo, evaluation in evaluations.items():
        loss = evaluation.loss
        yield f"silo/{silo}/loss", loss
        yield f"silo/{silo}/perplexity", perplexity(loss)


def _test(rounds: Rounds, commit: Commit) -> Iterator[tuple[str, float]]:
    evaluations = rounds.evaluations(commit.outgoing, "test")
    if evaluations:
        yield "test/global/loss", pooled(evaluations)["loss"]
        yield from ((f"test/silo/{silo}/loss", e.loss) for silo, e in evaluations.items())


TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow 3 may show it as one of prompts and traces


@contextmanager
def _speaking(federation: Federation) -> Iterator[Any]:
    """An MLflow client whose errors are ours."""
    # A server that is down should be told as such in seconds; MLflow's own patience is minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = federation.tracking.uri
    try:
        with _migrated(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        yield client
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        if "Max retries exceeded" in reason or "Connection refused" in reason:
            reason = "no answer from the server"
        raise UnreachableError(
            f"tracking.uri {uri!r}: MLflow cannot be used: {reason}; start it or correct the address, then `silotune sync` catches up",
            "tracking unreachable",
        ) from None


@contextmanager
def _migrated(uri: str) -> Iterator[None]:
    """Let one process at a time make an SQLite store's tables: several at once break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    import logging

    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(uri, _artifacts(uri) or "")
        yield


def _artifacts(uri: str) -> str | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()


def _run(client: Any, federation: Federation, rounds: Rounds) -> str:
    """The federation's MLflow run: the one the store names, the one that replaces it where MLflow lost it, or a new one."""
    named = rounds.tracking_run()
    if named:
        found = _existing(client, named.run)
        if found:
            return found
    name = federation.tracking.experiment or federation.name
    experiment = client.get_experiment_by_name(name)
    if experiment:
        number = experiment.experiment_id
    else:
        number = client.create_experiment(name, artifact_location=_artifacts(federation.tracking.uri), tags=TRAINING)
    if named:
        substitutes = client.search_runs([number], f"tags.`{REPLACES}` = '{named.run}'", max_results=1)
        if substitutes:
            return str(substitutes[0].info.run_id)
    run = client.create_run(number, run_name=federation.name, tags=_tags(named)).info.run_id
    _log_terms(client, run, federation)
    if named:
        return str(run)
    standing = rounds.write_tracking_run(TrackingRun(experiment=number, run=run)).run
    if standing != run:  # a racing run was first
        client.delete_run(run)
    return standing


def _existing(client: Any, run: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run).info.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _tags(named: TrackingRun | None) -> dict[str, str]:
    tags = {REPLACES: named.run} if named else {}
    if task_run := os.environ.get("MLFLOW_RUN_ID"):  # set by Kubeflow Pipelines for its own run; ours is another
        tags["silotune.kfp_run"] = task_run
    return tags


def _log_terms(client: Any, run: str, federation: Federation) -> None:
    from mlflow.entities import Param

    sections = {
        "model": federation.model,
        "training": federation.training,
        "aggregation": federation.aggregation,
        "communication": federation.communication,
        "privacy": federation.privacy,
    }
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump().items()}
    flat |= {"silos": ", ".join(federation.silo_ids), "data.format": federation.data.format, "data.max_length": federation.data.max_length}
    client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in flat.items()])


def _log_missing(client: Any, run: str, wanted: dict[Point, tuple[float, int]]) -> None:
    from mlflow.entities import Metric

    logged: dict[Point, float] = {}
    for name in {name for name, _ in wanted}:
        for old in client.get_metric_history(run, name):  # in the order of logging: the last one at a step counts
            logged[name, old.step] = old.value
    new = [
        Metric(name, value, at, step)
        for (name, step), (value, at) in sorted(wanted.items(), key=lambda item: item[0][1])
        if not _same(logged.get((name, step)), value)
    ]
    for start in range(0, len(new), BATCH):
        client.log_batch(run, metrics=new[start : start + BATCH])


def _same(logged: float | None, value: float) -> bool:
    # MLflow's SQL stores keep infinity as the largest double.
    return logged is not None and (math.isclose(logged, value, rel_tol=1e-12) or (math.isinf(value) and logged > 1e308))
