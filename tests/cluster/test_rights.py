"""What the coordinator's account may do in a silo, by the API server's own word, and where a silo's pods can reach, by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from trial.place import LABEL
from trial.trial import Trial

from silotune.components.federation import Federation

pytestmark = pytest.mark.cluster
Object = dict[str, Any]


@pytest.fixture(scope="module")
def federation(trial: Trial) -> Federation:
    return trial.begin("rights")


def main(job: Object) -> Object:
    return job["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def test_the_job_that_a_launcher_makes_is_admitted(trial: Trial, federation: Federation) -> None:
    assert trial.refusal(federation, trial.place.silos[0]) == ""


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("image", lambda job: main(job).update(image="docker.io/library/busybox@sha256:" + "0" * 64)),
        ("command", lambda job: main(job).update(command=["python", "-c", "print(open('/silo/records/train.jsonl').read())"])),
        ("args", lambda job: main(job).update(args=["train", "/silo/own.yaml", *main(job)["args"][2:]])),
        ("env", lambda job: main(job)["env"].append({"name": "PYTHONPATH", "value": "/silo"})),
        ("volumes", lambda job: job["spec"]["template"]["spec"]["volumes"].append({"name": "silo-2", "secret": {"secretName": "silotune-keys"}})),
        ("account", lambda job: job["spec"]["template"]["spec"].update(automountServiceAccountToken=True)),
        ("deadline", lambda job: job["spec"].update(activeDeadlineSeconds=10**7)),
        ("one-container", lambda job: job["spec"]["template"]["spec"]["containers"].append(copy.deepcopy(main(job)) | {"name": "other"})),
    ],
)  # fmt: skip
def test_the_launcher_cannot_have_another_job_admitted(
    trial: Trial, federation: Federation, word: str, change: Callable[[Object], object]
) -> None:
    said = trial.refusal(federation, trial.place.silos[0], change)
    assert "denied request" in said, f"admitted, or refused by another rule: {said!r}"
    assert f"denied request: {word}:" in said


def test_a_silo_cannot_be_given_anothers_work(trial: Trial, federation: Federation) -> None:
    north, south = trial.place.silos[:2]
    assert "args" in trial.refusal(federation, north, lambda job: main(job)["args"].__setitem__(2, south))


@pytest.mark.parametrize(
    ("verb", "resource", "group"),
    [
        ("create", "pods", ""), ("get", "pods", ""), ("list", "pods", ""), ("create", "pods/exec", ""), ("create", "pods/attach", ""),
        ("get", "pods/log", ""), ("update", "pods/ephemeralcontainers", ""), ("get", "secrets", ""), ("list", "secrets", ""),
        ("get", "configmaps", ""), ("update", "configmaps", ""), ("get", "persistentvolumeclaims", ""), ("update", "jobs", "batch"),
        ("patch", "jobs", "batch"), ("create", "cronjobs", "batch"), ("create", "deployments", "apps"), ("list", "events", ""),
        ("create", "serviceaccounts/token", ""), ("create", "rolebindings", "rbac.authorization.k8s.io"),
    ],
)  # fmt: skip
def test_the_launcher_has_no_other_right_in_a_silo(trial: Trial, verb: str, resource: str, group: str) -> None:
    namespaces = [trial.place.namespace(s) for s in trial.place.silos]
    assert [n for n in namespaces if trial.kube.may(trial.place.launcher, verb, resource, n, group)] == []


def test_the_launcher_has_the_one_right_that_it_needs(trial: Trial) -> None:
    for silo in trial.place.silos:
        for verb in ("create", "get", "list", "watch", "delete"):
            assert trial.kube.may(trial.place.launcher, verb, "jobs", trial.place.namespace(silo), "batch"), (silo, verb)


def test_a_silos_pods_reach_nothing_but_the_store_and_names(trial: Trial) -> None:
    silo = trial.place.silos[0]
    folder = trial.folder / "manifests" / silo
    probe = yaml.safe_load((folder / "probe.yaml").read_text())
    probe["metadata"]["labels"] |= trial.place.labels
    closed = copy.deepcopy(probe)  # with no label that opens anything: even names are closed to it where policies are enforced
    closed["metadata"] |= {"name": "silotune-probe-closed", "labels": {LABEL: trial.place.identity}}
    if " OPEN" in tried(trial, closed):
        pytest.skip("the cluster's network plug-in enforces no NetworkPolicy (kindnet does from kind 0.24 on; so do Calico and Cilium)")
    said = tried(trial, probe)
    lines = said.strip().splitlines()
    assert len(lines) == 4, said
    assert [line for line in lines if not line.endswith(" closed")] == []


def tried(trial: Trial, pod: Object) -> str:
    """What a probe says; it is deleted."""
    at, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    trial.kube.create(pod)
    try:
        return trial.kube.finished(at, name, 400)
    finally:
        trial.kube.delete_pod(at, name)


def test_the_policy_of_a_silo_has_no_type_errors(trial: Trial) -> None:
    """What cannot be seen without an API server: whether its expressions fit the types of what they look at."""
    for silo in trial.place.silos:
        policy = yaml.safe_load(trial.kube.kubectl("get", "validatingadmissionpolicy", f"silotune-jobs-{silo}", "-o", "yaml"))
        warnings = (policy.get("status") or {}).get("typeChecking", {}).get("expressionWarnings", [])
        assert warnings == []
