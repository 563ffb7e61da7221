"""What clusters do to pods: a node is drained, a launcher is killed, a run is submitted twice."""

from __future__ import annotations

import pytest
from trial import checks
from trial.trial import BOX, Trial
from trial.waiting import wait_for

from silotune.components.errors import RefusedError

pytestmark = pytest.mark.cluster
LONG = 300  # steps, so that a training is met while it goes on


def test_a_training_on_a_drained_node_is_told_as_evicted_and_the_next_round_has_the_silo_again(trial: Trial) -> None:
    silo = trial.place.silos[0]
    federation = trial.begin("drain", steps=LONG)
    run = trial.submit(federation)
    job = trial.job(federation, silo, "train", round="1")
    pod = trial.at_work(job)
    with trial.kube.cordoned(pod.spec.node_name) as cordoned:
        trial.kube.evict(pod)

        def over() -> bool:
            return checks.condition(trial.kube.batch.read_namespaced_job(job.metadata.name, job.metadata.namespace))[0] != ""

        wait_for(f"Job {job.metadata.name} to end after its pod was evicted (node cordoned: {cordoned})", over, 180)
    kind, reason, message = checks.condition(trial.kube.batch.read_namespaced_job(job.metadata.name, job.metadata.namespace))
    assert (kind, reason) == ("Failed", "PodFailurePolicy")
    assert "condition DisruptionTarget" in message
    assert trial.ended(run) == "SUCCEEDED", trial.tasks(run)
    _, first, second = trial.course(federation)["rounds"]
    assert first["committed"]
    assert silo not in first["participants"]
    assert first["missing"][silo] in ("failed: evicted or node lost", "failed: evicted"), first["missing"]
    assert (second["committed"], second["participants"], second["missing"]) == (True, sorted(trial.place.silos), {})


def test_a_run_that_is_going_on_refuses_another_and_a_killed_launcher_finds_its_job_again(trial: Trial) -> None:
    silo = trial.place.silos[1]
    federation = trial.begin("launcher", rounds={"total": 1, "quorum": 3}, steps=LONG)
    run = trial.submit(federation)
    with pytest.raises(RefusedError, match=f"run {run} is going on"):
        trial.submit(federation)
    job = trial.job(federation, silo, "train", round="1")
    trial.at_work(job)
    launcher = trial.launcher_pod(run, silo)
    trial.kube.delete_pod(launcher.metadata.namespace, launcher.metadata.name)
    after = wait_for(
        f"another launcher of {silo}",
        lambda: (p := trial.launcher_pod(run, silo)).metadata.name != launcher.metadata.name and p,
        BOX,
        seen=lambda: trial.tasks(run),
    )
    assert after.metadata.uid != launcher.metadata.uid
    assert trial.ended(run) == "SUCCEEDED", trial.tasks(run)
    (found,) = trial.kube.jobs(silo, federation=federation.name, box="train")
    assert found.metadata.uid == job.metadata.uid, "the Job was made anew"
    checks.course_is_whole(trial, federation, 1)
