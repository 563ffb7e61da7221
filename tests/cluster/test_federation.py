"""A federation on a real cluster: it runs to its end, and a silo that fails, or two, are told and dealt with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from trial import checks
from trial.trial import Trial
from trial.waiting import wait_for

from silotune.components.federation import Federation

pytestmark = pytest.mark.cluster


def test_the_example_federation_runs_to_its_end(trial: Trial) -> None:
    federation = trial.begin("example")
    run = trial.submit(federation)
    assert trial.ended(run) == "SUCCEEDED", trial.tasks(run)
    checks.course_is_whole(trial, federation, 2)
    checks.jobs_are_complete(trial, federation, 2)
    checks.pods_are_confined(trial, federation)
    checks.nothing_secret_is_kept(trial, run)
    found = checks.artefacts(trial, run)
    assert len(found.get("page", [])) >= 2, f"no page of each round among {sorted(found)}"
    assert all(federation.name in page for page in found["page"])
    if address := trial.mlflow():
        checks.in_mlflow(trial, federation, 2, address)


def test_the_metrics_of_a_round_are_listed_where_kubeflow_lists_outputs(trial: Trial) -> None:
    from silotune.pipelines.kubeflow import runs

    federation = next((f for f in trial.federations if f.name.endswith("-example")), None)
    if federation is None:
        pytest.skip("the example has not run")
    (run,) = runs.runs(trial.cluster, federation)
    details = trial.run_object(run.identity).run_details.task_details
    outputs = {name for task in details for name in task.outputs or {}}
    if not outputs:
        pytest.skip("this release of Kubeflow Pipelines lists no outputs of tasks in its API; look at the metrics in its page of the run")
    assert {"metrics", "page"} <= outputs


def test_a_silo_that_exits_badly_is_missing_with_its_reason_and_the_round_goes_on(trial: Trial) -> None:
    bad, *others = trial.place.silos
    federation = trial.begin("exit", rounds={"total": 1}, broken=(bad,))
    run = trial.submit(federation)
    assert trial.ended(run) == "SUCCEEDED", trial.tasks(run)
    last = trial.course(federation)["rounds"][1]
    assert last["committed"]
    assert last["participants"] == sorted(others)
    assert last["missing"] == {bad: "failed: data or settings are wrong"}
    (job,) = trial.kube.jobs(bad, federation=federation.name, box="preprocess")
    kind, reason, message = checks.condition(job)
    assert (kind, reason) == ("Failed", "PodFailurePolicy")
    assert "exit code 2 " in message
    assert trial.kube.jobs(bad, federation=federation.name, box="train") == [], "a silo that was not ready is not asked to train"


def test_a_silo_out_of_memory_is_told_as_that(trial: Trial) -> None:
    """With cgroup v2 the kernel ends the whole container, which Kubernetes knows as OOMKilled, exit code 137."""
    bad, *others = trial.place.silos
    federation = trial.begin("memory", rounds={"total": 1}, memory={bad: "96Mi"})
    run = trial.submit(federation)
    assert trial.ended(run) == "SUCCEEDED", trial.tasks(run)
    last = trial.course(federation)["rounds"][1]
    assert (last["committed"], last["participants"]) == (True, sorted(others))
    assert last["missing"][bad].startswith("failed: out of memory"), last["missing"]
    (job,) = trial.kube.jobs(bad, federation=federation.name, box="preprocess")
    (pod,) = trial.kube.pods_of(job)
    assert pod.status.container_statuses[0].state.terminated.reason == "OOMKilled"


def test_a_round_below_quorum_stays_open_and_is_completed_later_without_training_anew(trial: Trial) -> None:
    good, *revoking = trial.place.silos
    federation = trial.begin("quorum", rounds={"total": 1, "quorum": 2})
    with contextlib.ExitStack() as stack:
        run = trial.submit(federation)
        for silo in revoking:  # their stewards take the image from the list, after preprocess and before the training
            job = trial.job(federation, silo, "preprocess")
            wait_for(f"preprocess of {silo} to be complete", lambda job=job: checks.condition(refreshed(trial, job))[0] == "Complete", 600)
            stack.enter_context(revoked(trial, federation, silo))
        assert trial.ended(run) == "FAILED", trial.tasks(run)
        assert any(name.startswith("aggregate") and state == "FAILED" for name, state in trial.tasks(run).items()), trial.tasks(run)
        committed, still_open = trial.course(federation)["rounds"]
        assert (committed["round"], committed["committed"]) == (0, True)
        assert (still_open["round"], still_open["committed"]) == (1, False)
        assert sorted(trial.rounds(federation).updates(1)[0]) == [good]
        assert [trial.kube.jobs(s, federation=federation.name, box="train") for s in revoking] == [[], []]
    again = trial.submit(federation)
    assert trial.ended(again) == "SUCCEEDED", trial.tasks(again)
    last = trial.course(federation)["rounds"][1]
    assert (last["round"], last["committed"], last["participants"], last["missing"]) == (1, True, sorted(trial.place.silos), {})
    attempts = {
        s: [j.metadata.labels["silotune.dev/attempt"] for j in trial.kube.jobs(s, federation=federation.name, box="train")]
        for s in trial.place.silos
    }
    assert attempts == {good: ["1"]} | {silo: ["2"] for silo in revoking}


@contextlib.contextmanager
def revoked(trial: Trial, federation: Federation, silo: str) -> Iterator[None]:
    """The silo admits no image any more, as its README tells how; and does again."""
    at = trial.place.namespace(silo)
    trial.kube.patch_config(at, "silotune-job-terms", {"image-1": None})
    try:
        wait_for(f"{silo} to admit no Job", lambda: "image" in trial.refusal(federation, silo), 120)
        yield
    finally:
        trial.kube.patch_config(at, "silotune-job-terms", {"image-1": trial.place.silo_image})
        wait_for(f"{silo} to admit Jobs again", lambda: trial.refusal(federation, silo) == "", 120)


def refreshed(trial: Trial, job: object) -> object:
    meta = job.metadata  # type: ignore[attr-defined]
    return trial.kube.batch.read_namespaced_job(meta.name, meta.namespace)
