"""A silo's work as a Job: every way it can end is a status, whatever happens to launcher, network and API server meanwhile.

The real Kubernetes client talks over a loopback port to `fakes.kubernetes_api`, which is as strict as a server. The launcher has the one right
that a silo grants, on Jobs, unless a test says that it may see pods.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components import keys, silo_job
from silotune.components.cluster import cluster_job, job_manifest, jobs_api, train_job
from silotune.components.cluster.cluster_job import Clock
from silotune.components.errors import FederationError, SilotuneError
from silotune.components.federation import Federation
from silotune.components.process.nodes import Layout
from silotune.components.protocol import Attempt, Report, UpdateManifest
from silotune.components.rounds import Rounds

sys.path.append(str(Path(__file__).parents[2] / "fakes"))
from kubernetes_api import ALL_JOB_VERBS, Cluster, Fault, invalid_job, schema_error

IMAGE = "registry.example/silotune-silo@sha256:" + "a" * 64
TURN = "round:1 attempt:1"
OOM = {"code": 137, "reason": "OOMKilled"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    rights = {
        "jobs only": {"north": {"jobs": ALL_JOB_VERBS}},
        "pods too": {"north": {"jobs": ALL_JOB_VERBS, "pods": {"list"}}},
        "trainjobs": {"north": {"jobs": ALL_JOB_VERBS, "trainjobs": ALL_JOB_VERBS}},
        "all three": {"north": {"jobs": ALL_JOB_VERBS, "trainjobs": ALL_JOB_VERBS, "pods": {"list"}}},
        "nothing": {},
    }
    cluster = Cluster(rights=rights, namespaces={"north"})
    yield cluster
    cluster.close()
    assert cluster.violations == []


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return load(tmp_path)


def load(folder: Path, deadline: str | None = "5m", **placement: Any) -> Federation:
    wishes = {"namespace": "north", "image": IMAGE} | placement
    silos = [{"id": s, "train": f"./{s}.jsonl", "placement": wishes} for s in ("east", "north")]
    terms = {"name": "fed", "model": {"base": "./base"}, "silos": silos, "rounds": {"deadline": deadline}, "tracking": {"uri": "none"}}
    (folder / "f.yaml").write_text(yaml.safe_dump(terms))
    federation = Federation.load(folder / "f.yaml")
    keys.ensure(federation)
    return federation


@pytest.fixture
def launch(cluster: Cluster, federation: Federation, tmp_path: Path) -> Callable[..., str]:
    """Launches a box of the silo ``north``, evaluate unless told otherwise, with a token of certain rights."""

    def run(
        box: str = "evaluate", turn: str = TURN, token: str = "jobs only", speed: float = 1.0, federation: Federation = federation
    ) -> str:
        kubeconfig = cluster.kubeconfig(tmp_path / f"kubeconfig-{token.replace(' ', '-')}", token)
        return cluster_job.run(federation, "north", box, turn, kubeconfig=kubeconfig, clock=fast(speed), watch=1)

    return run


def fast(speed: float) -> Clock:
    """A clock on which time goes by ``speed`` times as fast."""
    return Clock(lambda: time.monotonic() * speed, time.time, lambda seconds: time.sleep(seconds / speed), random.Random(3).random)


def deliver(federation: Federation, attempt: int = 1) -> None:
    update = UpdateManifest(
        round=1, silo="north", agreement="a", plan="p", incoming="i", object="o", header="h", bytes=1, examples=1, tokens=1, steps=1, cursor=1,
        codec="float32", norm=1.0, loss=1.0,
    )  # fmt: skip
    Rounds.of(federation).write_update(update)
    Rounds.of(federation).write_report(Report(round=1, attempt=attempt, silo="north", status="ok"))


def ask(federation: Federation, **missing: str) -> None:
    """Begin the attempt that `TURN` names."""
    asked = [s for s in federation.silo_ids if s not in missing]
    rounds = Rounds.of(federation)
    rounds.create(
        Attempt(round=1, attempt=1, asked=asked, missing=missing, at=time.time()), rounds.key("rounds", "00001", "attempts", "1.json")
    )


def verbs(cluster: Cluster, verb: str) -> int:
    return cluster.requests.count((verb, "jobs"))


# The Job itself


FULL = {
    "node_selector": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "effect": "NoSchedule"}, {"operator": "Equal", "key": "a", "value": "b"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu.nvidia.com/class", "operator": "In", "values": ["A100"]}]}]}}},
    "gpus": 1, "cpu": "2500m", "memory": "16Gi", "ephemeral_storage": "20Gi", "runtime_class": "kata", "priority_class": "low",
    "service_account": "trainer", "claims": [{"claim": "data", "mount": "/silo"}, {"claim": "models", "mount": "/data/models", "read_only": True}],
    "secrets": [{"name": "s", "env": {"AWS_SECRET_ACCESS_KEY": "secret"}}, {"name": "k", "mount": "/keys"}], "config_map": "terms",
}  # fmt: skip


@pytest.mark.parametrize("placement", [{}, FULL], ids=["least", "most"])
@pytest.mark.parametrize(("box", "turn"), [("preprocess", ""), ("train", TURN), ("evaluate", "done:all 2 rounds are committed")])
def test_a_job_is_valid_for_kubernetes(tmp_path: Path, placement: dict[str, Any], box: str, turn: str) -> None:
    job = job_manifest.job_of(load(tmp_path, **placement), "north", box, turn)
    assert schema_error(job, "job-batch-v1") == ""
    assert invalid_job(job) == []


def test_a_job_has_the_one_shape_that_a_silo_admits(federation: Federation) -> None:
    job = job_manifest.job_of(federation, "north", "train", TURN)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "silotune.components.silo_job"]
    assert container["args"] == ["train", "/federation/federation.yaml", "north", TURN]
    assert container["image"] == IMAGE
    assert {v["name"] for v in pod["volumes"]} == {"silo", "keys", "federation", "ca", "scratch", "shm"}
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    assert mounts == {"/silo": False, "/keys": True, "/federation": True, "/ca": True, "/tmp": False, "/dev/shm": False}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "silotune-silo"
    assert "annotations" not in job["spec"]["template"]["metadata"]
    assert "memory" in container["resources"]["limits"]
    assert {"name": "SILOTUNE_KEYS", "value": "/keys"} in container["env"]
    assert job["spec"]["backoffLimit"] == 0
    assert "ownerReferences" not in job["metadata"]


def test_a_placement_reaches_the_job_whole(tmp_path: Path) -> None:
    pod = job_manifest.job_of(load(tmp_path, **FULL), "north", "train", TURN)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"][0] == {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert pod["affinity"] == FULL["affinity"]
    assert (pod["runtimeClassName"], pod["priorityClassName"], pod["serviceAccountName"]) == ("kata", "low", "trainer")
    assert container["resources"]["limits"] == {"memory": "16Gi", "ephemeral-storage": "20Gi", "nvidia.com/gpu": "1"}
    assert container["resources"]["requests"]["cpu"] == "2500m"
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in container["env"]
    assert {"name": "data-models", "mountPath": "/data/models", "readOnly": True} in container["volumeMounts"]


def test_the_deadline_of_a_job_is_that_of_the_round_and_a_margin(tmp_path: Path) -> None:
    for deadline, seconds in (("90s", 150), ("1.5s", 62), (None, 86_400)):
        assert job_manifest.job_of(load(tmp_path, deadline), "north", "train", TURN)["spec"]["activeDeadlineSeconds"] == seconds


def test_a_jobs_name_says_whose_work_it_is_and_is_never_too_long() -> None:
    long = "x" * 40
    names = [job_manifest.job_name(f, s, b, t) for f in (long, long[:-1]) for s in ("north", long) for b in ("train", "preprocess")
             for t in (TURN, "round:1 attempt:2", "round:99999 attempt:999")]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all(len(n) <= 63 and n[0].isalnum() and n[-1].isalnum() for n in names)
    assert job_manifest.job_name("fed", "north", "train", TURN).startswith("fed-north-train-r1a1-")


@pytest.mark.parametrize(
    ("wish", "field"),
    [({"image": "silo:latest"}, "image"), ({"namespace": None}, "namespace")],
)
def test_what_cannot_become_a_job_is_refused_by_name(tmp_path: Path, wish: dict[str, Any], field: str) -> None:
    with pytest.raises(FederationError, match=rf"silo 'north': placement\.{field}: .+; "):
        job_manifest.job_of(load(tmp_path, **wish), "north", "train", TURN)


def variables(job: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e["value"] for e in job["spec"]["template"]["spec"]["containers"][0]["env"] if "value" in e}


def test_a_training_on_several_gpus_is_one_pod_with_a_process_for_each(tmp_path: Path) -> None:
    federation = load(tmp_path, gpus=4)
    train, evaluate = (job_manifest.job_of(federation, "north", box, TURN) for box in ("train", "evaluate"))
    assert [j["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for j in (train, evaluate)] == [
        "4",
        "1",
    ]
    assert variables(train)["PET_NPROC_PER_NODE"] == "4"
    assert not [n for n in variables(evaluate) if n.startswith("PET_")]
    assert train["spec"]["completions"] == 1
    assert "completionMode" not in train["spec"]


def test_a_training_on_several_nodes_is_an_indexed_job_whose_pods_find_the_first(tmp_path: Path) -> None:
    federation = load(tmp_path, nodes=3, gpus=8)
    train = job_manifest.job_of(federation, "north", "train", TURN)
    assert (schema_error(train, "job-batch-v1"), invalid_job(train)) == ("", [])
    spec, name = train["spec"], train["metadata"]["name"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"], spec["backoffLimit"]) == (3, 3, "Indexed", 0)
    assert spec["template"]["spec"]["subdomain"] == job_manifest.SERVICE
    said = {n: v for n, v in variables(train).items() if n.startswith("PET_")}
    assert said == {"PET_NPROC_PER_NODE": "8", "PET_NNODES": "3", "PET_MASTER_ADDR": f"{name}-0.{job_manifest.SERVICE}"}
    layouts = [Layout.of(said | {"JOB_COMPLETION_INDEX": str(i)}) for i in range(3)]
    assert [(x.nodes, x.per_node, x.node, x.size) for x in layouts] == [(3, 8, i, 24) for i in range(3)]
    evaluate = job_manifest.job_of(federation, "north", "evaluate", TURN)
    assert (evaluate["spec"]["parallelism"], "subdomain" in evaluate["spec"]["template"]["spec"]) == (1, False)


def test_what_the_silo_sets_for_its_network_reaches_its_pods_by_reference_only(federation: Federation) -> None:
    (container,) = job_manifest.job_of(federation, "north", "train", TURN)["spec"]["template"]["spec"]["containers"]
    referred = {e["name"]: e["valueFrom"]["configMapKeyRef"] for e in container["env"] if "configMapKeyRef" in e.get("valueFrom", {})}
    names = {
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "SILO_AWS_ENDPOINT_URL",
        "SILO_AWS_REGION",
        "AWS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
    }
    assert referred == {n: {"name": "silotune-store", "key": n, "optional": True} for n in names}


# The time a silo has


def test_a_job_says_until_when_its_silo_may_work_and_its_name_does_not(federation: Federation) -> None:
    jobs = [job_manifest.job_of(federation, "north", "train", TURN, until) for until in (1_700_000_000, 1_700_000_060, None)]
    words = [j["spec"]["template"]["spec"]["containers"][0]["args"][3:] for j in jobs]
    assert words == [[TURN, "until:1700000000"], [TURN, "until:1700000060"], [TURN]]
    assert len({j["metadata"]["name"] for j in jobs}) == 1


def test_the_time_counts_from_the_launch_and_a_job_that_is_found_keeps_its_own(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.2, "exit", {})]
    began = time.time()
    assert launch() == "north ok"
    (job,) = cluster.jobs()
    until = int(job["spec"]["template"]["spec"]["containers"][0]["args"][-1].removeprefix("until:"))
    assert began + 300 <= until <= time.time() + 301
    cluster.erase(job)
    cluster.create("north", job_manifest.job_of(load(tmp_path), "north", "train", TURN, 1_700_000_000))
    cluster.exit(cluster.jobs()[0])
    launch("train")
    assert cluster.jobs()[0]["spec"]["template"]["spec"]["containers"][0]["args"][-1] == "until:1700000000"
    launch("preprocess", "", federation=load(tmp_path, None))
    (free,) = (j for j in cluster.jobs() if j["metadata"]["labels"]["silotune.dev/box"] == "preprocess")
    assert free["spec"]["template"]["spec"]["containers"][0]["args"][1:] == ["/federation/federation.yaml", "north"]


# Ends, seen from the Job alone


@pytest.mark.parametrize(
    ("course", "status"),
    [
        ([("run", {}), ("exit", {})], "north ok"),
        ([("exit", {"code": 1})], "north failed: see the log of the silo"),
        ([("run", {}), ("exit", {"code": 2})], "north failed: data or settings are wrong"),
        ([("run", {}), ("exit", {"code": 4})], "north refused: by the silo"),
        ([("run", {}), ("exit", {"code": 5})], "north failed: store unreachable or full"),
        ([("run", {}), ("exit", {"code": 6})], "north late: past the deadline"),
        ([("run", {}), ("exit", OOM)], "north failed: out of memory or killed"),
        ([("run", {}), ("exit", {"code": 139})], "north failed: exit code 139"),
        ([("run", {}), ("disrupt", {})], "north failed: evicted or node lost"),
        ([("run", {}), ("exceed_backoff", {})], "north failed: its pod failed"),
        ([("run", {}), ("exceed_deadline", {})], "north late: past the deadline"),
        ([("pending", {}), ("exceed_deadline", {})], "north late: past the deadline"),
        ([("run", {}), ("erase", {})], "north failed: Job deleted"),
        ([("erase", {})], "north failed: Job deleted"),
    ],
)
def test_every_end_of_a_job_is_a_status_from_the_job_alone(cluster: Cluster, launch: Any, course: Any, status: str) -> None:
    cluster.course = [(0.05, verb, arguments) for verb, arguments in course]
    assert launch() == status
    assert ("list", "pods") not in cluster.requests or cluster.requests.count(("list", "pods")) == 1  # asked once, and never again


@pytest.mark.parametrize(
    ("course", "status"),
    [
        ([("run", {}), ("exit", OOM)], "north failed: out of memory"),
        ([("run", {}), ("disrupt", {"reason": "DeletionByTaintManager"})], "north failed: node lost"),
        ([("run", {}), ("disrupt", {"reason": "EvictionByEvictionAPI"})], "north failed: evicted"),
        ([("run", {}), ("disrupt", {"reason": "PreemptionByScheduler"})], "north failed: preempted"),
        ([("pending", {}), ("exceed_deadline", {})], "north late: unschedulable: insufficient nvidia.com_gpu"),
        ([("waiting", {}), ("exceed_deadline", {})], "north late: image cannot be pulled"),
        ([("run", {}), ("exit", {"code": 1, "message": "north failed: hung at step 3 of 50"})], "north failed: hung at step 3 of 50"),
        ([("run", {}), ("exit", {"message": "north ok: base:b tokenizer:t"})], "north ok: base:b tokenizer:t"),
        ([("run", {}), ("exit", {"code": 1, "message": "east ok"})], "north failed: see the log of the silo"),
        ([("run", {}), ("exit", {"message": "a record's text"})], "north ok"),
    ],
)
def test_reasons_are_finer_where_pods_may_be_seen(cluster: Cluster, launch: Any, course: Any, status: str) -> None:
    cluster.course = [(0.05, verb, arguments) for verb, arguments in course]
    assert launch(token="pods too") == status


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("0/5 nodes are available: 2 Insufficient memory, 3 node(s) had untolerated taint {secret-project: x}.", "insufficient memory"),
        ("0/5 nodes are available: 5 node(s) had untolerated taint {secret-project: x}.", "taint"),
        ("0/5 nodes are available: 5 node(s) didn't match Pod's node affinity/selector.", "node selector"),
        ('persistentvolumeclaim "silotune-silo" not found', "volume"),
        ("something new about node secret-7", "other"),
    ],
)
def test_of_the_schedulers_words_only_the_class_comes_through(cluster: Cluster, launch: Any, message: str, why: str) -> None:
    cluster.course = [(0.0, "pending", {"message": message}), (0.05, "exceed_deadline", {})]
    assert launch(token="pods too") == f"north late: unschedulable: {why}"


# Several nodes


def several(*verbs: tuple[str, dict[str, Any]]) -> list[tuple[float, str, dict[str, Any]]]:
    return [(0.05, verb, arguments) for verb, arguments in verbs]


@pytest.mark.parametrize(
    ("course", "token", "status"),
    [
        ([("run", {}), ("exit", {"index": 1}), ("exit", {"index": 0})], "jobs only", "north ok"),
        ([("run", {}), ("exit", {**OOM, "index": 1})], "jobs only", "north failed: out of memory or killed"),
        ([("run", {}), ("exit", {**OOM, "index": 1})], "pods too", "north failed: out of memory"),
        ([("run", {}), ("disrupt", {"index": 1})], "pods too", "north failed: node lost"),
        (
            [("run", {}), ("exit", {"index": 1, "message": "north ok"}), ("exit", {"index": 0, "code": 4, "message": "north refused: terms differ"})],
            "pods too", "north refused: terms differ",
        ),
        ([("pending", {"index": 1}), ("run", {"index": 0}), ("exceed_deadline", {})], "pods too", "north late: unschedulable: insufficient nvidia.com_gpu"),
    ],
)  # fmt: skip
def test_a_training_on_several_nodes_ends_as_its_job_says(
    cluster: Cluster, launch: Any, tmp_path: Path, course: Any, token: str, status: str
) -> None:
    federation = load(tmp_path, nodes=2)
    cluster.course = several(*course)
    assert launch("train", token=token, federation=federation) == status


def test_of_several_nodes_the_one_that_failed_is_heard_and_not_those_that_lost_it(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    lost = {"index": 0, "message": "north failed: another node was lost", "code": 1}
    made = cluster.create("north", job_manifest.job_of(load(tmp_path, nodes=2), "north", "train", TURN))
    cluster.run(made)
    cluster._pod(made, 1, {"phase": "Failed", "conditions": [], "containerStatuses": [
        cluster._container(made, {"terminated": {"exitCode": 1, "reason": "Error", "message": "north failed: disk full"}})]})  # fmt: skip
    cluster.exit(made, **lost)
    assert launch("train", token="pods too", federation=load(tmp_path, nodes=2)) == "north failed: disk full"


def test_a_node_that_never_came_is_told_of(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = several(("pending", {"index": 1}), ("run", {"index": 0}))
    assert launch("train", federation=load(tmp_path, "30s", nodes=2), speed=40) == "north late: not all nodes started"
    assert cluster.jobs() == []


# TrainJobs


@pytest.fixture
def trainer(cluster: Cluster, tmp_path: Path) -> Federation:
    """A federation whose silo ``north`` trains by TrainJobs."""
    federation = load(tmp_path, trainer="trainjob", nodes=2, gpus=2)
    cluster.runtimes["north"] = train_job.runtime_of(federation.silo("north").placement, "north", 600)
    return federation


def trainjobs(cluster: Cluster) -> list[dict[str, Any]]:
    return [t for (resource, _, _), t in cluster.things.items() if resource == "trainjobs"]


def test_a_trainjob_says_how_many_and_how_large_and_nothing_else(trainer: Federation) -> None:
    made = train_job.train_job_of(trainer, "north", "train", TURN, 1_700_000_000)
    assert schema_error(made, "trainjob") == ""
    assert made["spec"]["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "silotune"}
    resources = {"memory": "4Gi", "nvidia.com/gpu": "2"}
    assert made["spec"]["trainer"] == {
        "args": ["train", "/federation/federation.yaml", "north", TURN, "until:1700000000"],
        "numNodes": 2, "numProcPerNode": 2, "resourcesPerNode": {"requests": resources, "limits": resources},
    }  # fmt: skip
    runtime = train_job.runtime_of(trainer.silo("north").placement, "north", 600)
    assert schema_error(runtime, "trainingruntime") == ""


def test_names_of_trainjobs_leave_room_for_what_is_appended_and_begin_with_a_letter() -> None:
    long = "x" * 40
    names = [
        train_job.name_of(f, s, "train", t)
        for f in (long, long[:-1], "7b")
        for s in ("north", long)
        for t in (TURN, "round:99999 attempt:999")
    ]
    assert len(set(names)) == len(names)
    assert all(len(f"{n}-node-0-99") <= 63 and n[0].isalpha() for n in names)


@pytest.mark.parametrize(
    ("course", "token", "status"),
    [
        ([("run", {}), ("exit", {})], "trainjobs", "north ok"),
        ([("run", {}), ("exit", {"code": 4, "index": 0})], "trainjobs", "north refused: by the silo"),
        ([("run", {}), ("exit", {**OOM, "index": 1})], "trainjobs", "north failed: out of memory or killed"),
        ([("run", {}), ("exit", {**OOM, "index": 1})], "all three", "north failed: out of memory"),
        ([("run", {}), ("disrupt", {"index": 1})], "trainjobs", "north failed: evicted or node lost"),
        ([("run", {}), ("exceed_deadline", {})], "trainjobs", "north late: past the deadline"),
        ([("pending", {}), ("exceed_deadline", {})], "all three", "north late: unschedulable: insufficient nvidia.com_gpu"),
    ],
)
def test_every_end_of_a_trainjob_is_a_status_in_the_same_words(
    cluster: Cluster, launch: Any, trainer: Federation, course: Any, token: str, status: str
) -> None:
    cluster.course = several(*course)
    assert launch("train", token=token, federation=trainer) == status
    assert ("create", "jobs") not in cluster.requests


def test_only_training_is_a_trainjob(cluster: Cluster, launch: Any, trainer: Federation) -> None:
    cluster.course = several(("exit", {}))
    assert launch("evaluate", token="trainjobs", federation=trainer) == "north ok"
    assert ("create", "trainjobs") not in cluster.requests


def test_the_pods_of_a_trainjob_find_each_other_as_those_of_a_job_do(cluster: Cluster, launch: Any, trainer: Federation) -> None:
    cluster.course = several(("exit", {}))
    launch("train", token="trainjobs", federation=trainer)
    (job,) = cluster.jobs()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = {e["name"]: e["value"] for e in container["env"] if e["name"].startswith("PET_") and "value" in e} | {"PET_NODE_RANK": "1"}
    layout = Layout.of(told)
    assert (layout.nodes, layout.per_node, layout.node, layout.port) == (2, 2, 1, 29400)
    assert layout.host == f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    assert container["image"] == IMAGE
    assert container["args"][:4] == ["train", "/federation/federation.yaml", "north", TURN]


def test_a_trainjob_is_found_again_and_one_that_is_finished_makes_room(cluster: Cluster, launch: Any, trainer: Federation) -> None:
    cluster.course = several(("run", {}), ("exit", {"code": 139}))
    assert [launch("train", token="trainjobs", federation=trainer) for _ in range(2)] == ["north failed: exit code 139"] * 2
    assert [h[2] for h in cluster.history if h[1] == "trainjobs"].count("ADDED") == 1
    (before,) = trainjobs(cluster)
    launch("train", "round:1 attempt:2", token="trainjobs", federation=trainer)
    (after,) = trainjobs(cluster)
    assert after["metadata"]["name"] != before["metadata"]["name"]


@pytest.mark.parametrize(("verb", "status"), [("pending", "never started"), ("suspend", "suspended")])
def test_a_trainjob_that_waits_at_the_deadline_is_late_and_taken_away(
    cluster: Cluster, launch: Any, tmp_path: Path, trainer: Federation, verb: str, status: str
) -> None:
    cluster.course = several((verb, {}))
    federation = load(tmp_path, "1s", trainer="trainjob", nodes=2, gpus=2)
    assert launch("train", token="trainjobs", federation=federation) == f"north late: {status}"
    assert trainjobs(cluster) == cluster.jobs() == []


def test_a_trainjob_that_a_cluster_cannot_have_is_a_status(cluster: Cluster, launch: Any, trainer: Federation) -> None:
    assert launch("train", federation=trainer) == "north refused: forbidden"  # the right on Jobs is none on TrainJobs
    cluster.runtimes.clear()
    assert launch("train", token="trainjobs", federation=trainer) == "north refused: admission policy"
    cluster.admission = lambda body: "fields: must name no more than these"
    assert launch("train", token="trainjobs", federation=trainer) == "north refused: admission policy: fields"


def test_a_cluster_without_kubeflow_trainer_is_told_so() -> None:
    known = jobs_api._problem(404, json.dumps({"reason": "NotFound", "message": 'namespaces "north" not found'}), True)
    unknown = jobs_api._problem(404, b"404 page not found\n", True)
    assert [e.reason for e in (known, unknown) if isinstance(e, SilotuneError)] == ["no such namespace", "no Kubeflow Trainer"]


# Deadlines


def test_a_job_that_is_pending_at_the_deadline_is_late_and_taken_away(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.0, "pending", {})]
    began = time.monotonic()
    assert launch(federation=load(tmp_path, "1s")) == "north late: never started"
    assert 0.9 < time.monotonic() - began < 5
    assert cluster.jobs() == []


def test_a_job_that_runs_at_the_deadline_may_still_say_that_it_is_late(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.1, "run", {}), (1.5, "exit", {"code": 6})]
    assert launch(federation=load(tmp_path, "1s")) == "north late: past the deadline"
    assert len(cluster.jobs()) == 1  # it ended by itself


def test_a_job_that_outlives_even_the_margin_is_given_up(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.0, "run", {})]
    assert launch(federation=load(tmp_path, "30s"), speed=40) == "north late: past the deadline"
    assert cluster.jobs() == []


def test_an_image_that_cannot_be_pulled_is_not_waited_for_to_the_deadline(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.0, "waiting", {})]
    assert launch(federation=load(tmp_path, "10h"), token="pods too", speed=200) == "north failed: image cannot be pulled"
    assert cluster.jobs() == []


@pytest.mark.parametrize("skew", [3600.0, -3600.0])
def test_a_server_whose_clock_is_wrong_makes_nobody_late(cluster: Cluster, launch: Any, federation: Federation, skew: float) -> None:
    cluster.skew = skew
    cluster.create("north", job_manifest.job_of(federation, "north", "evaluate", TURN))
    threading.Timer(0.3, lambda: cluster.exit(cluster.jobs()[0])).start()
    assert launch() == "north ok"


def test_a_job_that_is_found_has_been_going_on_since_it_was_made(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    federation = load(tmp_path, "20s")
    made = cluster.create("north", job_manifest.job_of(federation, "north", "evaluate", TURN))
    cluster.things["jobs", "north", made["metadata"]["name"]]["metadata"]["creationTimestamp"] = "2024-01-01T00:00:00Z"
    began = time.monotonic()
    assert launch(federation=federation) == "north late: never started"
    assert time.monotonic() - began < 10


# Refusals


@pytest.mark.parametrize(
    ("denial", "status"),
    [
        ("image: must be one of the digests in the ConfigMap silotune-job-terms", "north refused: admission policy: image"),
        ("Something with a name in it", "north refused: admission policy"),
        ((403, 'admission webhook "policy.example" denied the request: secret-project'), "north refused: admission policy"),
    ],
)
def test_what_a_silo_does_not_admit_is_refused_with_one_word(cluster: Cluster, launch: Any, denial: Any, status: str) -> None:
    cluster.admission = lambda job: denial
    assert launch() == status
    assert verbs(cluster, "create") == 1


def test_a_launcher_without_rights_is_refused(cluster: Cluster, launch: Any) -> None:
    assert launch(token="nothing") == "north refused: forbidden"


def test_rights_that_are_taken_away_meanwhile_are_a_refusal(cluster: Cluster, launch: Any) -> None:
    threading.Timer(0.3, lambda: (cluster.rights["jobs only"].clear(), cluster.cut_watches())).start()
    assert launch() == "north refused: forbidden"


def test_an_unknown_token_is_tried_again_until_patience_ends(cluster: Cluster, launch: Any, federation: Federation) -> None:
    known = dict(cluster.rights)
    cluster.rights.clear()
    threading.Timer(0.3, lambda: cluster.rights.update(known)).start()
    cluster.course = [(0.0, "exit", {})]
    assert launch(speed=20) == "north ok"
    cluster.rights.clear()
    assert launch(speed=2000) == "north failed: not authenticated"


@pytest.mark.parametrize(
    ("section", "odd"),
    [
        ("user", {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "touch", "args": ["RAN"]}}),
        ("user", {"auth-provider": {"name": "gcp", "config": {"cmd-path": "touch", "cmd-args": "RAN"}}}),
        ("user", {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}),
        ("user", {"client-key": "/keys/coordinator.pem"}),
        ("cluster", {"certificate-authority": "/etc/hostname"}),
        ("cluster", {"insecure-skip-tls-verify": True}),
    ],
)
def test_a_silos_kubeconfig_runs_nothing_here_and_sends_no_file_of_the_coordinators(
    cluster: Cluster, federation: Federation, tmp_path: Path, section: str, odd: dict[str, Any]
) -> None:
    path = cluster.kubeconfig(tmp_path / "kubeconfig", "jobs only")
    whole = json.loads(path.read_text().replace("RAN", str(tmp_path / "ran")))
    changed = json.loads(json.dumps(odd).replace("RAN", str(tmp_path / "ran")))
    whole["users" if section == "user" else "clusters"][0][section] |= changed
    path.write_text(json.dumps(whole))
    assert cluster_job.run(federation, "north", "evaluate", TURN, kubeconfig=path, clock=fast(10), watch=1) == "north failed: no kubeconfig"
    assert not (tmp_path / "ran").exists()
    assert cluster.requests == []


def test_a_renewed_kubeconfig_is_taken_up(cluster: Cluster, federation: Federation, tmp_path: Path) -> None:
    path = cluster.kubeconfig(tmp_path / "kubeconfig", "old")
    cluster.rights["old"] = cluster.rights["jobs only"]

    def renew(job: Any) -> None:
        del cluster.rights["old"]
        cluster.cut_watches()
        cluster.kubeconfig(path, "jobs only")

    cluster.renew = renew  # type: ignore[attr-defined]
    cluster.course = [(0.2, "renew", {}), (0.5, "exit", {})]
    assert cluster_job.run(federation, "north", "evaluate", TURN, kubeconfig=path, clock=fast(10), watch=1) == "north ok"


def test_a_missing_namespace_is_named(cluster: Cluster, launch: Any) -> None:
    cluster.namespaces.clear()
    assert launch() == "north failed: no such namespace"


def test_a_quota_is_waited_for(cluster: Cluster, launch: Any, federation: Federation) -> None:
    cluster.quota = 1
    other = cluster.create("north", job_manifest.job_of(federation, "east", "evaluate", TURN))
    cluster.course = [(0.0, "exit", {})]
    threading.Timer(0.4, lambda: cluster.erase(other)).start()
    assert launch(speed=20) == "north ok"


def test_a_quota_that_stays_full_is_said(cluster: Cluster, launch: Any) -> None:
    cluster.quota = 0
    assert launch(speed=1000) == "north failed: quota exceeded"


def test_a_job_that_the_server_finds_wrong_is_said(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    claims = [{"claim": "a", "mount": "/tmp"}]
    assert launch(federation=load(tmp_path, claims=claims)) == "north failed: Job not valid"


def test_a_job_of_other_work_under_the_same_name_is_left_alone(cluster: Cluster, launch: Any, federation: Federation) -> None:
    other = job_manifest.job_of(federation, "north", "evaluate", TURN)
    other["metadata"]["labels"] = {"silotune.dev/federation": "another"}
    cluster.create("north", other)
    assert launch() == "north refused: Job not ours"
    assert len(cluster.jobs()) == 1


def test_a_wrong_placement_or_kubeconfig_is_a_status_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_job.run(load(tmp_path, image="silo:latest"), "north", "evaluate", TURN) == "north failed: data or settings are wrong"
    assert cluster_job.run(load(tmp_path), "north", "evaluate", TURN) == "north failed: no kubeconfig"  # this is no pod
    assert cluster_job.run(load(tmp_path, kubeconfig_secret="s"), "north", "evaluate", TURN) == "north failed: no kubeconfig"
    (tmp_path / "bad").write_text("{]")
    monkeypatch.setenv(jobs_api.KUBECONFIG_VARIABLE, str(tmp_path / "bad"))
    assert cluster_job.run(load(tmp_path), "north", "evaluate", TURN) == "north failed: no kubeconfig"


# The store is the truth


def test_a_delivered_training_asks_nothing_of_the_cluster(cluster: Cluster, launch: Any, federation: Federation) -> None:
    deliver(federation)
    assert launch("train") == "north ok"
    assert launch("train", "done:converged at round 3") == "north ok: nothing to do"
    assert cluster.requests == []


def test_a_silo_that_this_attempt_does_without_gets_no_job(cluster: Cluster, launch: Any, federation: Federation) -> None:
    ask(federation, north="failed: disk full")
    assert launch("train") == "north refused: failed: disk full"
    assert cluster.requests == []


@pytest.mark.parametrize("end", [("exit", {}), ("exit", OOM), ("erase", {}), ("exceed_deadline", {})])
def test_what_was_delivered_counts_however_the_job_ended(cluster: Cluster, launch: Any, federation: Federation, end: Any) -> None:
    ask(federation)
    cluster.course = [(0.1, "run", {}), (0.3, *end)]
    threading.Timer(0.3, lambda: deliver(federation)).start()
    assert launch("train") == "north ok"


def test_the_silos_own_report_says_more_than_the_job(cluster: Cluster, launch: Any, federation: Federation) -> None:
    ask(federation)
    Rounds.of(federation).write_report(Report(round=1, attempt=1, silo="north", status="late", reason="12 of 50 steps"))
    cluster.course = [(0.0, "exit", {"code": 6})]
    assert launch("train") == "north late: 12 of 50 steps"


def test_a_complete_job_without_a_trace_in_the_store_has_failed(cluster: Cluster, launch: Any, federation: Federation) -> None:
    ask(federation)
    cluster.course = [(0.0, "exit", {})]
    assert launch("train") == "north failed: nothing in the store"


def test_where_the_store_cannot_be_asked_the_jobs_word_holds(cluster: Cluster, launch: Any, federation: Federation) -> None:
    cluster.course = [(0.0, "exit", {})]
    Path(federation.storage.root).parent.mkdir(exist_ok=True)
    Path(federation.storage.root).write_text("no folder")
    assert launch("train") == "north ok"


# One work, one Job


def test_two_launchers_at_once_make_one_job(cluster: Cluster, launch: Any) -> None:
    cluster.course = [(0.2, "run", {}), (0.3, "exit", {})]
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(launch())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert said == ["north ok"] * 4
    assert len([h for h in cluster.history if h[1:3] == ("jobs", "ADDED")]) == 1


LAUNCHER = """
import sys
from pathlib import Path
from silotune.components.cluster import cluster_job
from silotune.components.federation import Federation
print(cluster_job.run(Federation.load(sys.argv[1]), "north", "evaluate", sys.argv[2], kubeconfig=Path(sys.argv[3])), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_leaves_its_job_to_the_next_one(
    cluster: Cluster, launch: Any, federation: Federation, tmp_path: Path, number: int
) -> None:
    kubeconfig = cluster.kubeconfig(tmp_path / "kubeconfig", "jobs only")
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(federation.file), TURN, str(kubeconfig)], stdout=subprocess.PIPE)
    while not verbs(cluster, "watch"):
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(process.pid, number)
    process.wait()
    (job,) = cluster.jobs()
    threading.Timer(0.3, lambda: (cluster.run(job), cluster.exit(job))).start()
    assert launch() == "north ok"
    assert [j["metadata"]["uid"] for j in cluster.jobs()] == [job["metadata"]["uid"]]


def test_a_finished_training_stands_and_is_not_done_again(cluster: Cluster, launch: Any, federation: Federation) -> None:
    ask(federation)
    cluster.course = [(0.0, "exit", {"code": 139})]
    assert [launch("train"), launch("train")] == ["north failed: exit code 139"] * 2
    assert len([h for h in cluster.history if h[1:3] == ("jobs", "ADDED")]) == 1


def test_a_finished_preprocessing_of_an_earlier_run_is_made_anew(cluster: Cluster, launch: Any) -> None:
    cluster.course = [(0.0, "exit", {"code": 2})]
    assert launch("preprocess", "") == "north failed: data or settings are wrong"
    cluster.course = [(0.0, "exit", {})]
    assert launch("preprocess", "") == "north ok"
    assert len(cluster.jobs()) == 1


def test_a_finished_job_that_may_not_be_deleted_is_not_waited_for_forever(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.0, "exit", {})]
    launch("preprocess", "")
    cluster.rights["jobs only"]["north"] = {"jobs": ALL_JOB_VERBS - {"delete"}}
    began = time.monotonic()
    assert launch("preprocess", "", speed=1000, federation=load(tmp_path, "10h")) == "north failed: Job not deleted"
    assert time.monotonic() - began < 10  # far less than the deadline


# A bad network and a bad server


@pytest.mark.parametrize("verb", ["create", "list", "watch"])
@pytest.mark.parametrize("how", ["cut", "429", "500", "503", "504"])
def test_a_request_that_fails_is_made_again(cluster: Cluster, launch: Any, verb: str, how: str) -> None:
    cluster.faults = [Fault(verb, how, times=3)]
    cluster.course = [(0.3, "run", {}), (0.3, "exit", {})]
    assert launch(speed=20) == "north ok"
    assert len([h for h in cluster.history if h[1:3] == ("jobs", "ADDED")]) == 1


@pytest.mark.parametrize("verb", ["create", "list", "watch"])
def test_a_request_without_an_answer_is_made_again(cluster: Cluster, launch: Any, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr(jobs_api, "ANSWER", 0.2)
    cluster.faults = [Fault(verb, "hang", seconds=3)]
    cluster.course = [(0.1, "exit", {})]
    assert launch(speed=5) == "north ok"


@pytest.mark.parametrize("how", ["gone", "midline", "short"])
def test_a_watch_that_ends_badly_is_begun_anew_from_a_fresh_look(cluster: Cluster, launch: Any, how: str) -> None:
    cluster.faults = [Fault("watch", how, times=3)]
    cluster.course = [(0.1, "run", {}), (0.3, "exit", {})]
    assert launch(speed=5) == "north ok"


def test_a_job_whose_creation_was_not_acknowledged_is_found(cluster: Cluster, launch: Any) -> None:
    cluster.faults = [Fault("create", "after")]
    cluster.course = [(0.3, "exit", {})]
    assert launch() == "north ok"
    assert verbs(cluster, "create") == 2


def test_versions_that_are_forgotten_are_looked_up_anew(cluster: Cluster, launch: Any) -> None:
    cluster.course = [(0.2, "compact_and_cut", {}), (0.2, "exit", {})]
    cluster.compact_and_cut = lambda job: (cluster.compact(), cluster.cut_watches())  # type: ignore[attr-defined]
    assert launch(speed=5) == "north ok"


@pytest.mark.parametrize("seed", range(4))
def test_a_watch_may_break_at_any_moment(cluster: Cluster, launch: Any, seed: int) -> None:
    chance = random.Random(seed)
    cluster.course = [(0.1 + chance.random() / 4, verb, {}) for verb in ("pending", "waiting", "run", "exit")]
    over = threading.Event()

    def spoil() -> None:
        while not over.wait(chance.random() / 10):
            (cluster.cut_watches if chance.random() < 0.7 else cluster.compact)()

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        assert launch(speed=20) == "north ok"
    finally:
        over.set()
        thread.join()


def test_an_api_server_that_is_away_for_minutes_costs_nothing(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    speed = 200.0
    cluster.course = [(0.2, "run", {}), (0.2, "gone_for_eight_minutes", {}), (0.5, "exit", {})]
    cluster.gone_for_eight_minutes = lambda job: cluster.away(480 / speed)  # type: ignore[attr-defined]
    began = time.monotonic()
    assert launch(speed=speed, federation=load(tmp_path, "10h")) == "north ok"
    assert time.monotonic() - began > 480 / speed


def test_an_api_server_that_stays_away_ends_in_a_status(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.away(1000)
    assert launch(speed=500, federation=load(tmp_path, "10h")) == "north failed: cluster unreachable"


def test_a_deadline_that_passes_while_the_server_is_away_is_late(cluster: Cluster, launch: Any, tmp_path: Path) -> None:
    cluster.course = [(0.1, "run", {}), (0.1, "leave", {})]
    cluster.leave = lambda job: cluster.away(1000)  # type: ignore[attr-defined]
    assert launch(speed=100, federation=load(tmp_path, "2m")) == "north late: past the deadline"


def test_pauses_grow_and_differ_between_launchers(cluster: Cluster, federation: Federation, tmp_path: Path) -> None:
    cluster.away(1000)
    pauses: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    clock = Clock(lambda: now[0], time.time, sleep, random.Random(5).random)
    cluster_job.run(federation, "north", "evaluate", TURN, kubeconfig=cluster.kubeconfig(tmp_path / "k", "jobs only"), clock=clock)
    assert pauses[0] < 1.0
    assert all(15 <= p <= 30 for p in pauses[8:])
    assert len(set(pauses)) == len(pauses)


# The silo's side of it


def silo_main(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "silotune.components.silo_job", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)


def test_as_a_job_the_status_is_all_that_stands_on_stdout(federation: Federation, tmp_path: Path) -> None:
    done = silo_main("evaluate", str(federation.file), "north", "done:all", folder=tmp_path)
    assert (done.stdout, done.returncode) == ("north ok: nothing to do\n", 0)
    failed = silo_main("preprocess", str(federation.file), "north", folder=tmp_path)
    assert (failed.stdout, failed.returncode) == ("north failed: data or settings are wrong\n", 2)
    absent = silo_main("preprocess", str(tmp_path / "no.yaml"), "north", folder=tmp_path)
    assert (absent.stdout, absent.returncode) == ("", 2)
    assert "no such federation file" in absent.stderr


@pytest.mark.parametrize(("deadline", "left", "given"), [("5m", 100, 100), ("5m", 4000, 300), (None, 100, 100)])
def test_the_time_that_was_waited_is_taken_off_and_none_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: str | None, left: float, given: float
) -> None:
    """A clock that is behind shows more time to be left; the deadline itself stays the limit."""
    federation = load(tmp_path, deadline)
    seen: list[float] = []
    monkeypatch.setattr(silo_job.child, "call", lambda *_, deadline, **__: seen.append(deadline) or "north ok")
    monkeypatch.setattr(silo_job, "TERMINATION_LOG", tmp_path / "none")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert silo_job.main("evaluate", str(federation.file), "north", TURN, f"until:{int(time.time() + left)}") == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert given - 3 < seen[0] <= given


def test_a_silo_whose_time_is_over_is_late_at_once_and_says_so(federation: Federation, tmp_path: Path) -> None:
    ask(federation)
    words = ("train", str(federation.file), "north", TURN, f"until:{int(time.time()) - 90}")
    done = silo_main(*words, folder=tmp_path)
    assert (done.stdout, done.returncode) == ("north late\n", 6)
    report = Rounds.of(federation).reports(1, 1)["north"]
    assert (report.status, report.reason) == ("late", silo_job.PAST_DEADLINE)
    early = silo_main("preprocess", str(federation.file), "north", f"until:{int(time.time()) - 1}", folder=tmp_path)
    assert (early.stdout, early.returncode) == ("north late\n", 6)


def test_a_job_that_is_told_to_stop_takes_its_work_with_it(federation: Federation, tmp_path: Path) -> None:
    with silo_job.one_at_a_time(silo_job.silo_home(federation, federation.silo("north"))):
        process = subprocess.Popen([sys.executable, "-m", "silotune.components.silo_job", "preprocess", str(federation.file), "north"])
        log = silo_job.silo_home(federation, federation.silo("north")) / "logs" / "preprocess.log"
        while not log.exists():  # its child waits for the folder
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        assert process.wait(timeout=10) == 143
    assert children
    assert not any(running(int(c)) for c in children)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("status", "code"), [("ok", 0), ("failed: disk full", 5), ("failed: hung", 1), ("refused: terms differ", 4), ("late", 6)]
)
def test_the_exit_code_says_the_kind_of_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, code: int) -> None:
    monkeypatch.setattr(silo_job, "supervise", lambda *_, **__: f"north {status}")
    monkeypatch.setattr(silo_job, "TERMINATION_LOG", tmp_path / "log")
    (tmp_path / "log").write_text("")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert silo_job.main("train", "f", "north", TURN) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "log").read_text() == f"north {status}"


# The fake is as strict as it says


def test_the_fake_refuses_what_a_server_refuses(federation: Federation) -> None:
    from kubernetes import client

    jobs = {"jobs": ALL_JOB_VERBS | {"update"}}
    cluster = Cluster(rights={"t": {"north": jobs}}, namespaces={"north"})
    settings = client.Configuration(host=cluster.url, api_key={"authorization": "Bearer t"})
    api = client.BatchV1Api(client.ApiClient(settings))

    def code(call: Callable[..., Any], *arguments: Any, **more: Any) -> int:
        with pytest.raises(client.ApiException) as error:
            call(*arguments, **more)
        assert json.loads(error.value.body)["code"] == error.value.status
        return int(error.value.status)

    job = job_manifest.job_of(federation, "north", "train", TURN)
    try:
        made = api.create_namespaced_job("north", job)
        assert made.spec.backoff_limit == 0
        assert code(api.create_namespaced_job, "north", job) == 409
        assert code(api.create_namespaced_job, "north", job | {"surprise": 1}) == 400
        assert code(api.create_namespaced_job, "south", job) == 403
        assert code(api.read_namespaced_job, "other", "north") == 404
        assert code(api.list_namespaced_job, "north", field_selector="spec.x=1") == 400
        assert code(client.CoreV1Api(api.api_client).list_namespaced_pod, "north") == 403
        assert code(client.CoreV1Api(api.api_client).list_namespaced_secret, "north") == 404
        body = {"propagationPolicy": "Background", "preconditions": {"uid": "other"}}
        assert code(api.delete_namespaced_job, made.metadata.name, "north", body=body) == 409
        stale = api.api_client.sanitize_for_serialization(made)
        cluster.run(cluster.jobs()[0])
        assert code(api.replace_namespaced_job, made.metadata.name, "north", stale) == 409
        assert api.list_namespaced_job("north", label_selector="silotune.dev/silo=north").items
        assert not api.list_namespaced_job("north", label_selector="silotune.dev/silo=east").items
    finally:
        cluster.close()
    assert cluster.violations  # the unknown field, and the path it does not have
