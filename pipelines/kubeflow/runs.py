"""Runs of a federation on Kubeflow: how they stand, what the coordinator's tasks wrote, and how to stop one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.pipelines.kubeflow.kfp_api import Cluster, experiment_of, get_text, pages, speaking, words_of

GOING = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING")
COORDINATOR_TASKS = ("initialize", "muster", "combine", "aggregate", "export")


@dataclass(frozen=True)
class Task:
    """One box of a run. ``name`` is the box and its silo, as the pipeline shows them."""

    name: str
    state: str
    pods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run as Kubeflow tells it. What it has achieved is for the store to say: `silotune status`."""

    identity: str
    name: str
    state: str
    created: datetime | None
    finished: datetime | None
    scheduled: bool
    error: str
    url: str
    tasks: tuple[Task, ...]


def runs(cluster: Cluster, federation: Federation, *, limit: int = 5) -> list[Run]:
    """The latest runs of a federation, the latest first, with the states of their tasks.

    Raises:
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = experiment_of(cluster, federation)
        if not experiment:
            return []
        listed = cluster.client.list_runs(page_size=limit, sort_by="created_at desc", experiment_id=experiment).runs or []
        names: dict[str, dict[str, str]] = {}
        return [_run(cluster, cluster.client.get_run(r.run_id), names) for r in listed]


def going_on(run: Any) -> bool:
    """Whether a run has not ended."""
    return (run.state or "PENDING") in GOING


def _run(cluster: Cluster, run: Any, names: dict[str, dict[str, str]]) -> Run:
    return Run(
        identity=run.run_id,
        name=run.display_name or "",
        state=run.state or "PENDING",
        created=run.created_at,
        finished=None if going_on(run) else run.finished_at,
        scheduled=bool(run.recurring_run_id),
        error=words_of(run.error.message) if run.error else "",
        url=cluster.url("runs", run.run_id),
        tasks=tuple(_tasks(run, _task_names(cluster, run, names))),
    )


def _task_names(cluster: Cluster, run: Any, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Key of a task in the pipeline (``train-2``) -> what it is called (``train south``)."""
    pinned = run.pipeline_version_reference
    key = pinned.pipeline_version_id if pinned else run.run_id
    if key not in known:
        spec = run.pipeline_spec
        if not spec and pinned:
            spec = cluster.client.get_pipeline_version(pinned.pipeline_id, pinned.pipeline_version_id).pipeline_spec
        spec = (spec or {}).get("pipeline_spec", spec or {})
        dags = [spec.get("root", {}), *spec.get("components", {}).values()]
        known[key] = {task: its["taskInfo"]["name"] for dag in dags for task, its in dag.get("dag", {}).get("tasks", {}).items()}
    return known[key]


def _tasks(run: Any, names: dict[str, str]) -> Iterator[Task]:
    """The boxes among the nodes of a workflow, which are also drivers, executors and the graph itself; in the order of their start."""
    details = (run.run_details.task_details if run.run_details else None) or []
    executors = {d.task_id: d.pod_name for d in details if d.display_name == "executor"}
    last = datetime.max.replace(tzinfo=UTC)
    for detail in sorted(details, key=lambda d: (d.start_time or d.create_time or last, d.display_name or "")):
        name = names.get(detail.display_name) or (detail.display_name if detail.display_name in names.values() else None)
        if name:
            pods = [detail.pod_name, *(child.pod_name or executors.get(child.task_id) for child in detail.child_tasks or [])]
            yield Task(name, detail.state or "PENDING", tuple(dict.fromkeys(p for p in pods if p and "-driver-" not in p)))


def cancel(cluster: Cluster, federation: Federation, run: str | None = None) -> list[str]:
    """Stop a run of a federation, or all that are going on; returns those that were. What is committed stays.

    Raises:
        FederationError: the run is not one of this federation.
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = experiment_of(cluster, federation)
        listed = list(pages(cluster.client.list_runs, "runs", experiment_id=experiment)) if experiment else []
        if run is not None and run not in {r.run_id for r in listed}:
            raise FederationError(f"run {run!r} is none of federation {federation.name!r}; `silotune runs` lists them")
        going = [r.run_id for r in listed if going_on(r) and r.state != "CANCELING" and run in (None, r.run_id)]
        for identity in going:
            cluster.client.terminate_run(identity)
    return going


@dataclass(frozen=True)
class TaskLog:
    """The log of one of the coordinator's tasks; ``problem`` says why there is none."""

    task: str
    state: str
    text: str
    problem: str = ""


def logs(cluster: Cluster, federation: Federation, run: str | None = None) -> list[TaskLog]:
    """What the coordinator's tasks of a run wrote; of the latest run by default. Silos' logs stay theirs: see `silo_logs`.

    Raises:
        FederationError: there is no such run of this federation.
        UnreachableError: Kubeflow Pipelines.
    """
    with speaking(cluster.endpoint):
        experiment = experiment_of(cluster, federation)
        listed = pages(cluster.client.list_runs, "runs", experiment_id=experiment, sort_by="created_at desc") if experiment else iter(())
        wanted = next((r.run_id for r in listed if run in (None, r.run_id)), None)
        if wanted is None:
            what = f"run {run!r} is none of federation {federation.name!r}" if run else f"federation {federation.name!r} has no run"
            raise FederationError(f"{what}; `silotune runs` lists them, `silotune submit` starts one")
        found = _run(cluster, cluster.client.get_run(wanted), {})
        return [_log(cluster, found, task) for task in found.tasks if task.name.split(" ")[0] in COORDINATOR_TASKS]


def _log(cluster: Cluster, run: Run, task: Task) -> TaskLog:
    from kfp_server_api import ApiException

    texts, problem = [], "" if task.pods else "it has no pod yet"
    for pod in task.pods:
        try:
            texts.append(get_text(cluster.client, "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log", run_id=run.identity, node_id=pod))
        except ApiException as error:
            if error.status in (401, 403):
                raise
            problem = f"pod {pod}: Kubeflow has no log of it ({error.status}), as where the pod is gone and logs are not archived"
    return TaskLog(task.name, task.state, "".join(texts), problem)


def silo_logs(federation: Federation) -> list[str]:
    """A line per silo that says where its own people find its logs."""
    lines = []
    for silo in federation.silos:
        place = silo.placement
        where = f" (volume of namespace {place.namespace})" if place.namespace else ""
        how = "; its people read them with logs.yaml of the silo's folder (`silotune onboard`)" if federation.launcher == "job" else ""
        lines.append(f"{silo.id}: {silo.storage}/{federation.name}/logs{where}, and they never leave the silo{how}")
    return lines
