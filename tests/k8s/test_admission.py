"""What a silo's admission policy lets in: the Job of the example, and none that differs from it where it matters."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

spec = importlib.util.spec_from_file_location("k8s_admission", Path(__file__).parent / "admission.py")
assert spec
assert spec.loader
admission = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(admission)

Object = dict[str, Any]
ROOT = Path(__file__).parents[2] / "k8s"
IMAGE = "registry.example/silotune-silo@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
POLICY = next(o for o in yaml.safe_load_all((ROOT / "base/silo/admission.yaml").read_text()) if o["kind"] == "ValidatingAdmissionPolicy")
TERMS = {
    "data": {"silo": "north", "maxSeconds": "10800", "image-1": IMAGE, "image-2": IMAGE.replace("9f", "00"), "runtimeClass": "silotune-gpu"}
}


def refused(job: Object, terms: Object = TERMS) -> list[str]:
    return list(admission.refusals(POLICY, terms, job))


def main(job: Object) -> Object:
    return pod(job)["containers"][0]  # type: ignore[no-any-return]


def pod(job: Object) -> Object:
    return job["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def test_the_job_of_the_example_is_admitted(job: Object) -> None:
    assert refused(job) == []


def test_it_is_admitted_by_what_the_production_example_makes_of_the_policy(build: Any, job: Object) -> None:
    objects = build(ROOT / "overlays/example-production/silo-north")
    (policy,) = (o for o in objects if o["kind"] == "ValidatingAdmissionPolicy")
    (terms,) = (o for o in objects if o["metadata"]["name"] == "silotune-job-terms")
    assert admission.refusals(policy, terms, job) == []
    job["spec"]["activeDeadlineSeconds"] = 10801
    assert admission.refusals(policy, terms, job) == ["deadline"]


def test_what_the_api_server_fills_in_by_itself_is_admitted(job: Object) -> None:
    """A validating policy sees the Job with its defaults and its selector."""
    job["spec"] |= {"suspend": False, "completionMode": "NonIndexed", "podReplacementPolicy": "TerminatingOrFailed"}
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "0123"}}
    job["spec"]["template"]["metadata"] |= {"creationTimestamp": None}
    job["spec"]["template"]["metadata"]["labels"] |= {
        "batch.kubernetes.io/controller-uid": "0123", "batch.kubernetes.io/job-name": "j", "controller-uid": "0123", "job-name": "j"
    }  # fmt: skip
    pod(job).update(
        dnsPolicy="ClusterFirst", schedulerName="default-scheduler", serviceAccount="silotune-silo", terminationGracePeriodSeconds=30
    )
    main(job).update(terminationMessagePath="/dev/termination-log", terminationMessagePolicy="File", imagePullPolicy="IfNotPresent")
    pod(job)["volumes"][0]["configMap"]["defaultMode"] = 420
    assert refused(job) == []


@pytest.mark.parametrize("box", ["preprocess", "train", "evaluate"])
def test_every_box_is_admitted_and_a_gpu(job: Object, box: str) -> None:
    main(job)["args"] = [box, "/federation/federation.yaml", "north", *(["round:12 attempt:2"] if box != "preprocess" else [])]
    main(job)["image"] = TERMS["data"]["image-2"]
    pod(job)["runtimeClassName"] = "silotune-gpu"
    pod(job)["imagePullSecrets"] = [{"name": "silotune-registry"}]
    pod(job)["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    main(job)["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    main(job)["env"] += [
        {"name": "OMP_NUM_THREADS", "value": "8"},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        {"name": "AWS_REGION", "valueFrom": {"configMapKeyRef": {"name": "silotune-store", "key": "AWS_REGION"}}},
    ]
    assert refused(job) == []


Change = Callable[[Object], object]


def args(*words: str) -> Change:
    return lambda job: main(job).update(args=list(words))


def env(name: str, **how: Any) -> Change:
    return lambda job: main(job)["env"].append({"name": name, **how})


def secret(name: str, key: str) -> Object:
    return {"secretKeyRef": {"name": name, "key": key}}


def volume(name: str, **source: Any) -> Change:
    return lambda job: pod(job)["volumes"].append({"name": name, **source})


def mount(**what: Any) -> Change:
    return lambda job: main(job)["volumeMounts"].append(what)


def job_spec(**more: Any) -> Change:
    return lambda job: job["spec"].update(more)


def job_without(name: str) -> Change:
    return lambda job: job["spec"].pop(name)


def in_pod(**more: Any) -> Change:
    return lambda job: pod(job).update(more)


def in_main(**more: Any) -> Change:
    return lambda job: main(job).update(more)


def pod_context(**more: Any) -> Change:
    return lambda job: pod(job)["securityContext"].update(more)


def main_context(**more: Any) -> Change:
    return lambda job: main(job)["securityContext"].update(more)


def template(**more: Any) -> Change:
    return lambda job: job["spec"]["template"]["metadata"].update(more)


FILE = "/federation/federation.yaml"
REFUSED: list[tuple[str, Change]] = [
    ("one-container", lambda job: pod(job)["containers"].append({"name": "sidecar", "image": IMAGE})),
    ("one-container", in_pod(initContainers=[{"name": "first", "image": IMAGE}])),
    ("one-container", in_pod(ephemeralContainers=[{"name": "shell", "image": IMAGE}])),
    ("image", in_main(image="registry.example/silotune-silo:1.0")),
    ("image", in_main(image="registry.example/other@sha256:" + "9" * 64)),
    ("image", in_main(image=f"{IMAGE}\n")),
    ("image", in_main(image="north")),  # a value of the terms, but no image
    ("command", in_main(command=["sh", "-c", "tar c /silo"])),
    ("command", lambda job: main(job).pop("command")),
    ("command", in_main(command=["python", "-m", "silotune.components.silo_job", "-c"])),
    ("command", in_main(workingDir="/silo")),
    ("args", args("export", FILE, "north")),
    ("args", args("train", "/silo/other.yaml", "north")),
    ("args", args("train", FILE, "south")),
    ("args", args("train", FILE)),
    ("args", args("train", FILE, "north", "--option")),
    ("args", args("train", FILE, "north", "$(AWS_SECRET_ACCESS_KEY)")),
    ("args", args("train", FILE, "north", "a/b")),
    ("args", args("train", FILE, "north", "1", "2", "3", "4", "5")),
    ("args", lambda job: main(job).pop("args")),
    ("env", env("PYTHONPATH", value="/silo")),
    ("env", env("LD_PRELOAD", value="/silo/x.so")),
    ("env", env("HTTPS_PROXY", value="http://192.0.2.1")),
    ("env", env("HOME", value="/silo")),
    ("env", env("OMP_NUM_THREADS", value="many")),
    ("env", env("AWS_ENDPOINT_URL", value="https://elsewhere.example")),
    ("env", env("AWS_ACCESS_KEY_ID", value="ours")),
    ("env", env("AWS_SECRET_ACCESS_KEY", valueFrom=secret("silotune-keys", "AWS_SECRET_ACCESS_KEY"))),
    ("env", env("AWS_SECRET_ACCESS_KEY", valueFrom=secret("silotune-s3", "AWS_ACCESS_KEY_ID"))),
    ("env", in_main(envFrom=[{"secretRef": {"name": "silotune-s3"}}])),
    ("volumes", volume("host", hostPath={"path": "/"})),
    ("volumes", volume("silo", hostPath={"path": "/"})),
    ("volumes", volume("silo", persistentVolumeClaim={"claimName": "hospital-archive"})),
    ("volumes", volume("keys", secret={"secretName": "other"})),
    ("volumes", volume("federation", configMap={"name": "of-the-coordinator"})),
    ("volumes", volume("token", projected={"sources": [{"serviceAccountToken": {"path": "token"}}]})),
    ("volumes", volume("scratch", nfs={"server": "192.0.2.1", "path": "/"})),
    ("mounts", mount(name="silo", mountPath="/usr/lib/python3")),
    ("mounts", mount(name="keys", mountPath="/keys")),
    ("mounts", mount(name="silo", mountPath="/silo", subPath="north")),
    ("mounts", in_main(volumeDevices=[{"name": "silo", "devicePath": "/dev/x"}])),
    ("host", in_pod(hostNetwork=True)),
    ("host", in_pod(hostPID=True)),
    ("host", in_pod(hostIPC=True)),
    ("host", in_pod(shareProcessNamespace=True)),
    ("host", in_pod(hostAliases=[{"ip": "192.0.2.1", "hostnames": ["store.example"]}])),
    ("host", in_pod(nodeName="node-1")),
    ("host", in_main(ports=[{"containerPort": 1, "hostPort": 1}])),
    ("account", in_pod(serviceAccountName="default")),
    ("account", lambda job: pod(job).pop("serviceAccountName")),
    ("account", in_pod(automountServiceAccountToken=True)),
    ("account", lambda job: pod(job).pop("automountServiceAccountToken")),
    ("deadline", job_without("activeDeadlineSeconds")),
    ("deadline", job_spec(activeDeadlineSeconds=10801)),
    ("ttl", job_without("ttlSecondsAfterFinished")),
    ("ttl", job_spec(ttlSecondsAfterFinished=604801)),
    ("once", job_spec(parallelism=2)),
    ("once", job_spec(completions=2)),
    ("once", job_spec(backoffLimit=6)),
    ("once", job_without("backoffLimit")),
    ("once", in_pod(restartPolicy="OnFailure")),
    ("pod-security", lambda job: pod(job).pop("securityContext")),
    ("pod-security", pod_context(runAsUser=0)),
    ("pod-security", pod_context(runAsNonRoot=False)),
    ("pod-security", pod_context(seccompProfile={"type": "Unconfined"})),
    ("container-security", main_context(privileged=True)),
    ("container-security", main_context(allowPrivilegeEscalation=True)),
    ("container-security", main_context(readOnlyRootFilesystem=False)),
    ("container-security", main_context(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]})),
    ("container-security", main_context(capabilities={"drop": ["NET_RAW"]})),
    ("container-security", main_context(runAsUser=0)),
    ("container-security", lambda job: main(job).pop("securityContext")),
    ("no-hooks", in_main(lifecycle={"postStart": {"exec": {"command": ["sh"]}}})),
    ("no-hooks", in_main(livenessProbe={"exec": {"command": ["sh"]}})),
    ("no-hooks", in_main(startupProbe={"exec": {"command": ["sh"]}})),
    ("no-hooks", in_main(stdin=True)),
    ("messages", in_main(terminationMessagePolicy="FallbackToLogsOnError")),
    ("resources", lambda job: main(job).pop("resources")),
    ("resources", in_main(resources={"requests": {"memory": "1Gi"}, "limits": {"cpu": "1"}})),
    ("placement", in_pod(runtimeClassName="privileged")),
    ("placement", in_pod(schedulerName="other")),
    ("placement", in_pod(priorityClassName="system-cluster-critical")),
    ("placement", in_pod(dnsPolicy="None", dnsConfig={"nameservers": ["192.0.2.1"]})),
    ("placement", in_pod(resourceClaims=[{"name": "x"}])),
    ("placement", in_pod(imagePullSecrets=[{"name": "silotune-keys"}])),
    ("labels", template(annotations={"vault.hashicorp.com/agent-inject": "true"})),
    ("labels", template(labels={"azure.workload.identity/use": "true"})),
]


@pytest.mark.parametrize(("rule", "change"), REFUSED, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(REFUSED)])
def test_a_job_that_differs_is_refused_by_its_rule_and_no_other(job: Object, rule: str, change: Change) -> None:
    change(job)
    assert refused(job) == [rule]


def test_every_rule_refuses_something() -> None:
    assert {rule for rule, _ in REFUSED} == {v["message"].split(":")[0] for v in POLICY["spec"]["validations"]}


@pytest.mark.parametrize(
    ("terms", "rules"),
    [
        ({}, {"image", "args", "deadline"}),
        ({"data": {"silo": "north", "maxSeconds": "10800"}}, {"image"}),
        ({"data": {"silo": "north", "maxSeconds": "soon", "image-1": IMAGE}}, {"deadline"}),
    ],
)
def test_terms_that_are_missing_admit_nothing(job: Object, terms: Object, rules: set[str]) -> None:
    assert set(refused(job, terms)) == rules


def test_a_runtime_class_is_refused_where_the_terms_name_none(job: Object) -> None:
    pod(job)["runtimeClassName"] = "silotune-gpu"
    assert refused(job, {"data": {k: v for k, v in TERMS["data"].items() if k != "runtimeClass"}}) == ["placement"]


def test_only_jobs_are_asked_about_and_only_when_created() -> None:
    (rule,) = POLICY["spec"]["matchConstraints"]["resourceRules"]
    assert rule == {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    assert "matchConditions" not in POLICY["spec"], "whoever creates a Job"
